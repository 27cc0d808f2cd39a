"""What every stage's config and start have in common: a model of some size, from scratch or from another stage.

Only pretraining draws its parameters by itself; every later stage is told where they come from.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.config import ConfigError, describe, differences, parse
from llama_jax.data.loader import Share
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop.ours import TOKENIZERS
from llama_jax.interop.restore import describe_base, describe_model, model_parts, restore_model
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig, size
from llama_jax.model.lora import LoraConfig, divide
from llama_jax.model.params import Params, Specs
from llama_jax.parallel.axes import batch_shards, held_shards, shardings
from llama_jax.parallel.mesh import MeshConfig
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.saved import named, newest_step, read_meta, resumed_meta, warn_of_unfinished
from llama_jax.training.stage import LoopConfig

log = logging.getLogger(__name__)

SCRATCH = "scratch"
# What a stage may draw beside another one's trunk: a language model's head that its start lacks would answer at random.
DRAWN_HEADS = ("reward_head", "value_head")


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
        if not self.loop.steps and not getattr(self, "epochs", 0.0) > 0:
            because = " since epochs is 0" if hasattr(self, "epochs") else ""  # stages whose data may tell the number
            raise ValueError(f"loop.steps: expected at least 1{because}, got 0")


def load_tokenizer(config: StageConfig) -> tuple[ModelConfig, Tokenizer]:
    """The model's shape and the tokenizer; ConfigError if they, or `start`, do not fit together, or if there is no start."""
    model = size(config.model)
    if not is_drawn(config.start):
        newest_step(config.start)  # says what lies there instead, in which no tokenizer of ours may be
    tokenizer = Tokenizer(tokenizer_place(config))
    if config.context:
        model = dataclasses.replace(model, max_length=config.context)
    if tokenizer.vocab_size != model.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, model {config.model} expects "
            f"{model.vocab_size}"
        )
    if not is_drawn(config.start):
        if config.stage == "reward":  # goes on with a reward model, or begins one with a language model
            check_start(config.start, model, tokenizer)
        else:
            check_language_model("start", config.start, model, tokenizer)
        spoken, chat = read_meta(config.start).get("chat", ""), chat_of(config, tokenizer)
        if spoken and config.stage != "pretrain" and spoken != chat:
            log.warning("%s was trained to chat in the format %s, and %s speaks %s", config.start, spoken, config.stage, chat)
    elif not config.start and config.stage != "pretrain":
        raise ConfigError(
            f"config.start: {config.stage} goes on with the parameters of another stage; expected its workdir, got nothing "
            f"({SCRATCH!r} draws them)"
        )
    return model, tokenizer


def tokenizer_place(config: StageConfig) -> str:
    """Where the tokenizer of a stage lies: where the config says, else in its corpus, or in the workdir of its start.

    Raises:
      ConfigError: nowhere.
    """
    if config.tokenizer:
        return config.tokenizer
    beside = config.data.corpus if config.stage == "pretrain" else "" if is_drawn(config.start) else config.start
    if beside:
        directory, _ = named(beside)
        for name in TOKENIZERS:
            if (directory / name).is_file():
                return str(directory / name)
    why = f"none lies in {beside}" if beside else "there is no start that could have one"
    raise ConfigError(f"config.tokenizer: missing; expected a tokenizer, since {why}")


def is_drawn(start: str) -> bool:
    """Whether parameters with this start are drawn."""
    return start in ("", SCRATCH)


def check_start(workdir: str | Path, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """ConfigError if another stage's checkpoint is of another model (but for its context) or tokenizer."""
    saved = read_meta(workdir)
    held = parse(ModelConfig, saved["model"], where=str(workdir))  # fields that it does not know have their defaults
    held = dataclasses.replace(held, max_length=model.max_length)
    if held != model:
        lines = differences(describe(held), describe(model))
        raise ConfigError(f"{workdir} holds model {held.name}, expected {model.name}; they differ in {', '.join(lines)}")
    if saved["tokenizer"] != tokenizer.fingerprint:
        own = _tokenizer_of(workdir, saved["tokenizer"])
        raise ConfigError(
            f"{workdir} was trained with tokenizer {saved['tokenizer'][:12]}, {tokenizer.path} is "
            f"{tokenizer.fingerprint[:12]}" + (f"; its own lies at {own}" if own else "")
        )
    warn_of_unfinished(workdir)


def check_language_model(field: str, workdir: str | Path, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """`check_start` of what a field of the config names as a language model; ConfigError, too, for a reward model."""
    check_start(workdir, model, tokenizer)
    if "reward_head" in model_parts(workdir):
        raise ConfigError(f"config.{field}: {workdir}: expected a language model, found a reward model")


def check_reward_model(field: str, workdir: str | Path, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """`check_start` of what a field of the config, named after its track, names as a reward model; ConfigError, too, for a
    language model, and for a reward model of the other track (converted ones say none, and may be of either)."""
    check_start(workdir, model, tokenizer)
    if "reward_head" not in model_parts(workdir):
        raise ConfigError(f"config.{field}: {workdir}: expected a reward model, found a language model")
    track = read_meta(workdir).get("track", field)
    if track != field:
        raise ConfigError(f"config.{field}: {workdir}: expected a reward model of {field}, found one of {track}")


def _tokenizer_of(workdir: str | Path, fingerprint: str) -> Path | None:
    """The file beside a checkpoint that is its tokenizer; None if there is none, as in the workdirs of older runs."""
    directory, _ = named(workdir)
    for name in TOKENIZERS:
        with contextlib.suppress(OSError, ValueError, ModuleNotFoundError):
            if Tokenizer(directory / name).fingerprint == fingerprint:
                return directory / name
    return None


def chat_of(config: StageConfig, tokenizer: Tokenizer) -> str:
    """The format in which a stage trains to chat: "llama2", or the tokenizer's "template" if SFT is to have that."""
    chat = getattr(getattr(config, "data", None), "chat", "llama2")
    return chat if tokenizer.chat_template is not None else "llama2"


def meta(config: StageConfig, model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is stored with each checkpoint of a stage."""
    found = {"stage": config.stage, "model": describe(model), "tokenizer": tokenizer.fingerprint}
    if config.stage == "reward":
        found["track"] = config.name
    return found if config.stage == "pretrain" else {**found, "chat": chat_of(config, tokenizer)}


def fresh(specs: Specs, mesh: Mesh, *, seed: int) -> Params:
    """Draws the parameters of a table, each device its own shards."""
    # On a CPU, optimising the random draws takes ten seconds and saves none.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    draw = jax.jit(lambda key: table.init(specs, key), out_shardings=shardings(specs, mesh), compiler_options=options)
    return draw(jax.random.key(seed))


def starting_params(specs: Specs, mesh: Mesh, *, start: str, seed: int) -> Callable[[], Params]:
    """How a stage's parameters begin: drawn, or another stage's, but for a scalar head that it may lack."""

    def init() -> Params:
        if is_drawn(start):
            return fresh(specs, mesh, seed=seed)
        missing = {name: specs[name] for name in DRAWN_HEADS if name in specs and name not in model_parts(start)}
        found = {name: part for name, part in specs.items() if name not in missing}
        params = restore_model(start, found, mesh)
        return {**params, **(fresh(missing, mesh, seed=seed) if missing else {})}

    return init


@dataclasses.dataclass(frozen=True)
class Begin:
    """What a stage trains of its model and what it keeps as it is (`training.stage.Stage` has fields of these names).

    Attributes:
      meta: what checkpoints say of the adapters, and of the models that are read and not trained.
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
    config: StageConfig, specs: Specs, mesh: Mesh, *, workdir: Path, start: str = "", name: str = "lora",
    reads: Sequence[str] = (),
) -> Begin:  # fmt: skip
    """How a stage begins with a model of the table `specs`: from `start` (of the config, if none is given), whole or adapted.

    With adapters the trunk and the language-model head of the start are frozen; scalar heads, and heads that the start does
    not have, are trained whole. `name` is the adapters' in the meta of checkpoints. `reads` are the fields of the config that
    name models which every start of the run reads again: a reference, judges.
    """
    start, seed, noted = start or config.start, config.loop.seed, {}
    if reads:
        models = {field: getattr(config, field) for field in reads}
        noted["reads"] = {field: describe_model(at, workdir) for field, at in models.items() if not is_drawn(at)}
    if config.lora.rank:
        check_adapters(config.lora, start)
        noted[name] = describe_base(config.lora, start, workdir)
    check_unchanged(workdir, noted)
    if not config.lora.rank:
        return Begin(specs, starting_params(specs, mesh, start=start, seed=seed), {}, noted)
    trained, kept = divide(specs, config.lora, model_parts(start))
    adapters, heads = {"lora": trained["lora"]}, {part: spec for part, spec in trained.items() if part != "lora"}
    scale = {"lora": kept.pop("lora")}
    frozen = {**restore_model(start, kept, mesh), **fresh(scale, mesh, seed=seed)}

    def init() -> Params:
        drawn = fresh(adapters, mesh, seed=seed)
        return {**drawn, **starting_params(heads, mesh, start=start, seed=seed)()} if heads else drawn

    return Begin(trained, init, frozen, noted)


def check_unchanged(workdir: Path, noted: Mapping[str, Any]) -> None:
    """ConfigError if a model that the run in `workdir` reads, or adapts, is another one than when the run was begun.

    Going back under another config (--restart_from) may name another reference or judge, but no other base of adapters.
    """
    saved = resumed_meta(workdir) if noted else {}
    before, now = saved.get("reads", {}), noted.get("reads", {})
    pairs = [(before[field], now[field]) for field in now if field in before]
    pairs = [(then, here) for then, here in pairs if then["workdir"] == here["workdir"]]
    pairs += [(saved[name]["base"], noted[name]["base"]) for name in noted if name != "reads" and name in saved]
    for then, here in pairs:
        if then["fingerprint"] != here["fingerprint"]:
            raise ConfigError(
                f"{workdir} was begun with {then['workdir']} of fingerprint {then['fingerprint'][:12]}, and {here['workdir']} "
                f"now has {here['fingerprint'][:12]}: begin anew in another workdir, or, where the checkpoint of then is still "
                "there, go on with that (WORKDIR@STEP in the config, and --restart_from)"
            )


def check_adapters(lora: LoraConfig, start: str) -> None:
    """ConfigError for adapters of nothing."""
    if lora.rank and is_drawn(start):
        raise ConfigError("config.start: adapters (config.lora.rank) need a model to adapt; expected a stage's workdir")


def check_length(length: int, model: ModelConfig) -> None:
    """ConfigError for rows of data that are longer than the model's context."""
    if length > model.max_length:
        raise ConfigError(f"data.length={length}, model {model.name} takes {model.max_length}")


def process_share(mesh: Mesh) -> Share:
    """Which rows of each global batch this process reads: those that its devices hold."""
    return Share(held_shards(mesh), batch_shards(mesh))
