"""What fewer kv heads bring in serving (section A.2.1, Fig. 24): `python -m llama_jax.serving_study`.

    python -m llama_jax.serving_study --config=configs/serving_study.py:30b --output=runs/serving

One model three times: a kv head for every head (MHA), eight (GQA), one (MQA), with the feed-forward layers widened until the
parameters are as many, as the paper's Table 18 compares them. The weights are random, which changes no speed. Each answers
batches of 1, 2, 4, ... prompts of the same length with the same number of tokens, until a batch does not fit the chip or
`largest` is reached.

    latency       seconds of a batch / tokens of an answer: what somebody waits for a token, prompt included
    throughput    queries of a batch / its seconds

`serving.json`, `serving.md` and `serving.png` have both by batch, for each length of prompt, beside the paper's. What has been
measured is kept: a run that is stopped goes on with the same command. On a pod the same command runs on every host.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from llama_jax import command
from llama_jax.config import ConfigError, check_least, describe, differences, parse
from llama_jax.evals import serving_figure
from llama_jax.evals.plots import save
from llama_jax.files import read_json, write_json, write_text
from llama_jax.model import params
from llama_jax.model.config import Compute, ModelConfig, size
from llama_jax.model.decode import Prepared, prepare
from llama_jax.parallel.axes import DECODE, batch_shards, layout
from llama_jax.parallel.host import device_memory, keep_heap
from llama_jax.parallel.hosts import from_host_0, on_host_0
from llama_jax.parallel.mesh import MeshConfig, make_mesh, start_distributed
from llama_jax.sampling.generate import make_sampler, pad_left
from llama_jax.sampling.keys import row_keys
from llama_jax.training.metrics import Progress

_GROUPS = 8  # kv heads of GQA (section A.2.1)
_FFN_MULTIPLE = 64  # of a widened feed-forward layer, so that it divides over chips and fills their tiles


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """See configs/serving_study.py.

    Attributes:
      size: the model with a kv head for every head; a name of `model/config.py`.
      prompts: lengths of prompts in tokens; `new_tokens` are drawn after each.
      largest: no batch is larger than that, though it may fit.
      repeats: the best of so many times counts.
    """

    size: str
    prompts: tuple[int, ...]
    new_tokens: int
    largest: int
    repeats: int
    compute: Compute
    mesh: MeshConfig

    def __post_init__(self):
        check_least("", self, new_tokens=1, largest=1, repeats=1, prompts=1)
        if not self.prompts:
            raise ValueError("prompts: expected lengths, got none")
        size(self.size)


@dataclasses.dataclass(frozen=True)
class Point:
    """A batch: its size, and the seconds from its prompts to its last tokens."""

    batch: int
    seconds: float


def variants(model: ModelConfig, *, longest: int) -> dict[str, ModelConfig]:
    """The model with a kv head for every head, for eight groups of them and for all, with about as many parameters each.

    What a smaller key and value projection saves goes into the feed-forward layers, rounded to a multiple of 64: its factor is
    4/3 at most, where keys and values are the same share of the parameters as in the paper. (A.2.1)
    """
    found = {}
    for name, kv_heads in (("MHA", model.heads), ("GQA", _groups(model.heads)), ("MQA", 1)):
        saved = 2 * (model.heads - kv_heads) * model.head_size  # of each row of width D; the layer has three matrices D x F
        widened = model.ffn + round(saved / 3 / _FFN_MULTIPLE) * _FFN_MULTIPLE
        found[name] = dataclasses.replace(
            model, name=f"{model.name} {name}", kv_heads=kv_heads, ffn=widened, max_length=max(model.max_length, longest)
        )
    return found


def _groups(heads: int) -> int:
    """The paper's eight groups, or the most below that divide the heads and are fewer than they."""
    return max(count for count in range(1, min(_GROUPS, max(heads - 1, 1)) + 1) if heads % count == 0)


def batches(largest: int, *, least: int) -> Iterator[int]:
    """1, 2, 4, ... up to `largest`; the first is the least number of rows that the mesh can divide."""
    batch = least
    while batch <= largest:
        yield batch
        batch *= 2


def weights_of(model: ModelConfig, compute: Compute) -> Prepared:
    """Random weights as decoding lays them out, made where they stay."""
    specs = params.table(model, head="lm_head")

    def make(key: jax.Array) -> Prepared:
        with layout(DECODE):
            return prepare(params.init(specs, key), specs, compute=compute)

    return jax.block_until_ready(jax.jit(make)(jax.random.key(0)))


def measure(
    model: ModelConfig, weights: Prepared, config: ServingConfig, *, prompt: int, batch: int, memory: int
) -> Point | None:
    """One batch; None if it does not fit `memory` bytes a chip (0: unknown), by the compiler's word or by trying."""
    specs = params.table(model, head="lm_head")
    sampler = make_sampler(
        model, specs, compute=config.compute, eos_id=-1, max_new_tokens=config.new_tokens, temperature=0.0
    )
    rng = np.random.default_rng(0)
    tokens, valid = pad_left(rng.integers(0, model.vocab_size, (batch, prompt)).tolist(), prompt)
    arguments = (weights, tokens, valid, row_keys(0, range(batch)))
    try:
        program = sampler.lower(*arguments).compile()
        if memory and (needed := _bytes(program)) and needed > memory:
            return None
        return Point(batch, _fastest(lambda: program(*arguments), config.repeats))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _bytes(program: Any) -> int:
    """Of the arguments, the results and all between them on one chip; 0 where the compiler does not tell."""
    if (found := program.memory_analysis()) is None:
        return 0
    return (
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    )


def _fastest(run: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(run())  # what is done once
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _line(
    model: ModelConfig, weights: Prepared, config: ServingConfig, *, prompt: int, mesh: Mesh, memory: int
) -> dict[str, Any]:  # fmt: skip
    """Ever larger batches of prompts of one length, and what the last one stopped at."""
    sizes, points = list(batches(config.largest, least=batch_shards(mesh))), []
    with Progress(len(sizes), f"{model.name}, prompts of {prompt}", "size", quiet=jax.process_index() > 0) as progress:
        for batch in sizes:
            point = measure(model, weights, config, prompt=prompt, batch=batch, memory=memory)
            # One host's clock counts, and all go on or stop alike.
            point = from_host_0(lambda point=point: point and dataclasses.asdict(point))
            if point is None:
                return {"points": points, "stopped": "memory"}
            points.append(point)
            progress.update(1)
    return {"points": points, "stopped": "largest"}


def run(config: ServingConfig, directory: Path, mesh: Mesh, *, memory: int | None = None) -> dict[str, Any]:
    """Measures what `serving.json` does not have yet; returns what it has then.

    Args:
      memory: bytes of a chip; None: what the chip says.

    Raises:
      ConfigError: the directory holds a study under another config or of another device.
    """
    memory = device_memory() if memory is None else memory
    models = variants(size(config.size), longest=max(config.prompts) + config.new_tokens)
    told = {"config": describe(config), "device": jax.devices()[0].device_kind, "devices": mesh.size}
    found = from_host_0(lambda: _kept(directory / "serving.json", told))
    for name, model in models.items():
        missing = [prompt for prompt in config.prompts if str(prompt) not in found["variants"].get(name, {}).get("prompts", {})]
        if not missing:
            continue
        parameters = params.count(params.table(model, head="lm_head"))
        variant = found["variants"].setdefault(
            name, {"kv_heads": model.kv_heads, "ffn": model.ffn, "parameters": parameters, "prompts": {}}
        )
        with jax.set_mesh(mesh):
            weights = weights_of(model, config.compute)
            for prompt in missing:
                variant["prompts"][str(prompt)] = _line(model, weights, config, prompt=prompt, mesh=mesh, memory=memory)
                on_host_0(write_json, directory / "serving.json", found)
            del weights  # before the next ones are made
    return found


def _kept(path: Path, told: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {**told, "variants": {}}
    found = read_json(path)
    if changed := differences({name: found[name] for name in told}, json.loads(json.dumps(told))):
        raise ConfigError(f"{path.parent}: holds another study: {'; '.join(changed)}; expected a directory of its own")
    return found


def main() -> None:
    """Flags to config to call."""
    keep_heap()
    start_distributed()
    config, directory = parse(ServingConfig, flags.FLAGS.config), Path(flags.FLAGS.output)
    directory.mkdir(parents=True, exist_ok=True)
    found = run(config, directory, make_mesh(config.mesh))

    def finish() -> None:
        text = serving_figure.report(found)
        write_text(directory / "serving.md", text)
        save([serving_figure.curves(found)], directory)
        print(text)

    on_host_0(finish)


if __name__ == "__main__":
    command.define("configs/serving_study.py:<size>", output="directory of the results; an earlier run there goes on")
    command.launch(main)
