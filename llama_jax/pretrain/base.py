"""What every stage's config and start have in common: a model of some size, from scratch or from another stage.

Only pretraining draws its parameters by itself; every later stage is told where they come from.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.config import ConfigError, describe, parse
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop.restore import describe_base, model_parts, restore_model
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig, size
from llama_jax.model.lora import LoraConfig, divide
from llama_jax.model.params import Params, Specs
from llama_jax.parallel.axes import row_share, shardings
from llama_jax.parallel.mesh import MeshConfig
from llama_jax.training.checkpoint import CheckpointError, read_meta
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.stage import LoopConfig

SCRATCH = "scratch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The fields of every stage's config.

    stage: which stage this is (the key of `train.STAGES`).
    model: a name of `model.config.SIZES`.
    tokenizer: path of the SentencePiece model.
    start: workdir of the stage whose parameters this one starts from; "scratch": they are drawn, as pretraining's are where
      it is empty.
    context: tokens that a row may have; 0: as many as the model's size has. Rotary positions have no parameters, so a
      longer context than the one of `start` needs training, but no other model.
    lora: adapters that are trained in place of the matrices of `start`; rank 0: none.
    """

    stage: str
    model: str
    tokenizer: str
    start: str = ""
    context: int = 0
    compute: Compute
    mesh: MeshConfig
    optim: OptimConfig
    loop: LoopConfig
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        size(self.model)
        if self.context < 0:
            raise ValueError(f"context: expected 0 or more tokens, got {self.context}")


def load_tokenizer(config: StageConfig) -> tuple[ModelConfig, Tokenizer]:
    """The model's shape and the tokenizer; ConfigError if they, or `start`, do not fit together, or if there is no start."""
    model, tokenizer = size(config.model), Tokenizer(config.tokenizer)
    if config.context:
        model = dataclasses.replace(model, max_length=config.context)
    if tokenizer.vocab_size != model.vocab_size:
        raise ConfigError(
            f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} pieces, model {config.model} expects "
            f"{model.vocab_size}"
        )
    if not is_drawn(config.start):
        check_start(config.start, model, tokenizer)
    elif not config.start and config.stage != "pretrain":
        raise ConfigError(
            f"config.start: {config.stage} goes on with the parameters of another stage; expected its workdir, got nothing "
            f"({SCRATCH!r} draws them)"
        )
    return model, tokenizer


def is_drawn(start: str) -> bool:
    """Whether parameters with this start are drawn."""
    return start in ("", SCRATCH)


def check_start(workdir: str | Path, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """ConfigError if another stage's checkpoint is of another model (but for its context) or tokenizer."""
    saved = read_meta(workdir)
    held = parse(ModelConfig, saved["model"], where=str(workdir))  # fields that it does not know have their defaults
    if dataclasses.replace(held, max_length=model.max_length) != model:
        raise ConfigError(f"{workdir} holds model {saved['model']}, expected {describe(model)}")
    if saved["tokenizer"] != tokenizer.fingerprint:
        raise ConfigError(
            f"{workdir} was trained with tokenizer {saved['tokenizer'][:12]}, {tokenizer.path} is "
            f"{tokenizer.fingerprint[:12]}"
        )


def meta(config: StageConfig, model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is stored with each checkpoint of a stage."""
    return {"stage": config.stage, "model": describe(model), "tokenizer": tokenizer.fingerprint}


def fresh(specs: Specs, mesh: Mesh, *, seed: int) -> Params:
    """Draws the parameters of a table, each device its own shards."""
    # On a CPU, optimising the random draws takes ten seconds and saves none.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    draw = jax.jit(lambda key: table.init(specs, key), out_shardings=shardings(specs, mesh), compiler_options=options)
    return draw(jax.random.key(seed))


def starting_params(specs: Specs, mesh: Mesh, *, start: str, seed: int) -> Callable[[], Params]:
    """How a stage's parameters begin: drawn, or another stage's trunk, with its head where it has the one we need."""

    def init() -> Params:
        if is_drawn(start):
            return fresh(specs, mesh, seed=seed)
        saved = model_parts(start)
        found = {name: part for name, part in specs.items() if name in saved}
        missing = {name: part for name, part in specs.items() if name not in saved}
        params = restore_model(start, found, mesh)
        return {**params, **(fresh(missing, mesh, seed=seed) if missing else {})}

    return init


@dataclasses.dataclass(frozen=True)
class Begin:
    """What a stage trains of its model and what it keeps as it is (`training.stage.Stage` has fields of these names).

    Attributes:
      meta: what checkpoints say of the adapters.
    """

    specs: Specs
    init: Callable[[], Params]
    frozen: Params
    meta: dict[str, Any]

    def completed(self, specs: Specs, mesh: Mesh, *, start: str | Path) -> Params:
        """The start's own model: the reference of DPO and PPO. What is frozen here anyway is not held twice."""
        if is_drawn(str(start)):
            raise ConfigError(f"config.start={start}: parameters drawn at random are no reference; expected a stage's workdir")
        base = {name: part for name, part in self.frozen.items() if name in specs}
        return {**base, **restore_model(start, {name: part for name, part in specs.items() if name not in base}, mesh)}


def begin(
    config: StageConfig, specs: Specs, mesh: Mesh, *, workdir: Path, start: str = "", name: str = "lora"
) -> Begin:
    """How a stage begins with a model of the table `specs`: from `start` (of the config, if none is given), whole or adapted.

    With adapters the trunk and the language-model head of the start are frozen; scalar heads, and heads that the start does
    not have, are trained whole. `name` is the adapters' in the meta of checkpoints.
    """
    start, seed = start or config.start, config.loop.seed
    if not config.lora.rank:
        return Begin(specs, starting_params(specs, mesh, start=start, seed=seed), {}, {})
    check_adapters(config.lora, start)
    described = describe_base(config.lora, start, workdir)
    check_base(workdir, name, described)
    trained, kept = divide(specs, config.lora, model_parts(start))
    adapters, heads = {"lora": trained["lora"]}, {part: spec for part, spec in trained.items() if part != "lora"}
    scale = {"lora": kept.pop("lora")}
    frozen = {**restore_model(start, kept, mesh), **fresh(scale, mesh, seed=seed)}

    def init() -> Params:
        drawn = fresh(adapters, mesh, seed=seed)
        return {**drawn, **starting_params(heads, mesh, start=start, seed=seed)()} if heads else drawn

    return Begin(trained, init, frozen, {name: described})


def check_base(workdir: Path, name: str, described: dict[str, Any]) -> None:
    """ConfigError if the run in `workdir` was begun on another base than the one that is there now."""
    try:
        before = read_meta(workdir)[name]["base"]
    except CheckpointError:  # nothing saved yet, or damaged: the loop will say so
        return
    now = described["base"]
    if before["fingerprint"] != now["fingerprint"]:
        raise ConfigError(
            f"{workdir} was begun on {before['workdir']} with fingerprint {before['fingerprint'][:12]}, which now is "
            f"{now['fingerprint'][:12]}"
        )


def check_adapters(lora: LoraConfig, start: str) -> None:
    """ConfigError for adapters of nothing."""
    if lora.rank and is_drawn(start):
        raise ConfigError("config.start: adapters (config.lora.rank) need a model to adapt; expected a stage's workdir")


def check_length(length: int, model: ModelConfig) -> None:
    """ConfigError for rows of data that are longer than the model's context."""
    if length > model.max_length:
        raise ConfigError(f"data.length={length}, model {model.name} takes {model.max_length}")


def process_slice(mesh: Mesh) -> dict[str, int]:
    """Which slice of each global batch this process reads, as sources of batches take it (`parallel.axes.row_share`)."""
    index, count = row_share(mesh)
    return {"process_index": index, "process_count": count}
