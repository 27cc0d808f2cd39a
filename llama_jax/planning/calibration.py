"""How far the estimate is from what others have measured: our train step, estimated, beside MaxText's, published.

Published for Llama 2 70B, 4096 tokens a sequence, weights divided over all chips (github.com/AI-Hypercomputer/maxtext).
The two programs are not the same, so the error holds both: that of the estimate, and how much faster or slower our step is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from llama_jax.model import params as table
from llama_jax.model.config import Compute, size
from llama_jax.parallel.mesh import MeshConfig
from llama_jax.parallel.topology import describe, parse
from llama_jax.planning.estimate import Plan
from llama_jax.pretrain.stage import PretrainConfig, PretrainData
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.stage import LoopConfig


@dataclasses.dataclass(frozen=True)
class Reference:
    """A published rate, the settings of our step that comes nearest, and what it was estimated at.

    published, estimated: tokens a second and chip.
    published_mfu: as published; MaxText counts attention to all tokens of a row.
    """

    topology: str
    remat: str
    rows_per_chip: int
    published: float
    published_mfu: float
    # With jax 0.10.2 and libtpu 0.0.42, by `python -m llama_jax.plan --calibrate`.
    estimated: float | None = None
    microbatches: int = 1

    @property
    def error(self) -> float | None:
        """How much more than the published rate was estimated, as a part of it."""
        return None if self.estimated is None else self.estimated / self.published - 1

    def mfu(self, rate: float) -> float:
        """Of so many tokens a second and chip, counted as the published one."""
        flops = table.flops_per_token(_MODEL, length=_MODEL.max_length)
        flops += 6 * _MODEL.layers * _MODEL.heads * _MODEL.head_size * _MODEL.max_length
        return rate * flops / parse(self.topology)[0].peak


_MODEL = size("70b")
REFERENCES = (
    Reference("v5p-128", "attention", 2, 692.0, 0.654, 647.0),
    Reference("v6e-256", "full", 4, 905.0, 0.438, 941.0, microbatches=4),
)


def measure(plan: Callable[[Any, Any], Plan], references: Sequence[Reference] = REFERENCES) -> list[Reference]:
    """Compiles the step of each reference with `plan(config, topology)`; minutes each."""
    found = []
    for reference in references:
        topology = describe(reference.topology)
        config = PretrainConfig(
            stage="pretrain", model="70b", tokenizer="", data=PretrainData(corpus="", weights={}), mesh=MeshConfig(),
            compute=Compute(remat=reference.remat, loss_chunks=8), optim=OptimConfig(lr=1.5e-4, warmup=2000),
            loop=LoopConfig(
                steps=500_000, batch_size=reference.rows_per_chip * topology.chips, microbatches=reference.microbatches
            ),
        )  # fmt: skip
        result = plan(config, topology)
        found.append(dataclasses.replace(reference, estimated=result.tokens_per_second_per_chip))
    return found


def as_json(references: Sequence[Reference] = REFERENCES) -> list[dict[str, Any]]:
    """The fields of each reference; estimated_mfu and error are None where nothing was estimated."""
    return [
        {
            **dataclasses.asdict(reference), "error": reference.error,
            "estimated_mfu": None if reference.estimated is None else reference.mfu(reference.estimated),
        }
        for reference in references
    ]  # fmt: skip


def as_text(references: Sequence[Reference] = REFERENCES) -> str:
    """A line for each reference: estimated, published, error."""
    lines = ["calibration: Llama 2 70B, our step as estimated beside MaxText's as published (--calibrate compiles it again);",
             "  MFU counts attention to all tokens of a row"]  # fmt: skip
    for reference in references:
        head = f"  {reference.topology:8} {reference.rows_per_chip} sequences a chip: "
        published = f"published {reference.published:.0f} tokens/s/chip, MFU {reference.published_mfu:.1%}"
        if reference.estimated is None:
            lines.append(f"{head}not estimated; {published}")
            continue
        estimated = f"estimated {reference.estimated:.0f}, MFU {reference.mfu(reference.estimated):.1%}"
        lines.append(f"{head}{estimated}; {published}: {reference.error:+.0%}")
    return "\n".join(lines)
