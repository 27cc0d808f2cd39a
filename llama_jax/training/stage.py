"""A stage is a value: what is trained, from where, by which loss, on which batches. The loop knows nothing else.

Losses return *sums and weights*, never means: microbatches, devices and hosts then add up exactly, and the one division
happens when all have been added.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax

from llama_jax.config import check_least
from llama_jax.parallel import compiler
from llama_jax.training.optimizer import OptimConfig, Optimizer, schedule
from llama_jax.training.spikes import SpikeConfig
from llama_jax.training.state import overlay

log = logging.getLogger(__name__)

Batch = Any  # a flax.struct.dataclass whose arrays all begin with the row axis B
Params = Any


@flax.struct.dataclass
class Weighted:
    """A weighted sum on its way to a mean."""

    sum: jax.Array  # [] float32
    weight: jax.Array  # [] float32

    def mean(self) -> jax.Array:
        """sum / weight; NaN where nothing was weighed: no measurement is not a measurement of 0."""
        return jnp.where(self.weight > 0, self.sum / jnp.maximum(self.weight, 1e-9), jnp.nan)


Metrics = dict[str, Weighted]
Loss = Callable[[Params, Batch], tuple[Weighted, Metrics]]


class Source(Protocol):
    """Where batches come from.

    A supervised source is a pure function of the step (`looks_at_params` False): the loop computes batch k + 1 while the
    device works on k. An RL source rolls the current parameters out; what it holds between steps is its `state`, which
    the loop saves and restores with the parameters, so that resuming is exact inside a rollout too.

    A source whose batches have several shapes also has `examples()`, a batch of each: the loop compiles for all of them before
    the first step, since a program that is compiled in the middle of a run makes a pod wait, or its watchdog end it.
    """

    looks_at_params: bool

    def batch(self, step: int, params: Params) -> tuple[Batch, Mapping[str, float]]:
        """The batch of a step (this process's rows, numpy or jax arrays) and metrics of its making."""

    def state(self) -> Any:
        """A pytree of arrays to save; {} if nothing is held."""

    def restore(self, state: Any) -> None:
        """Takes up a saved state."""


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Makes a source of anything that has `batch(step)`, a pure function of the step."""

    batches: Any
    looks_at_params = False

    def batch(self, step: int, params: Params) -> tuple[Batch, Mapping[str, float]]:
        """The batch of a step; the parameters are not looked at."""
        del params
        return self.batches.batch(step), {}

    def state(self) -> Any:
        """Nothing is held."""
        return {}

    def restore(self, state: Any) -> None:
        """Nothing to take up."""

    def examples(self) -> Iterator[Batch]:
        """A batch of each shape, where they have several."""
        return self.batches.shapes() if hasattr(self.batches, "shapes") else iter(())

    def rows(self, step: int) -> Any:
        """Which rows the global batch of a step has, where the batches can tell: for the report of a bad one."""
        return self.batches.rows(step) if hasattr(self.batches, "rows") else None

    def epoch(self, step: int) -> float | None:
        """Epochs that have been seen when the batch of a step has; None where sources come round each in its own time."""
        return self.batches.epoch(step) if hasattr(self.batches, "epoch") else None


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a stage runs and what it writes; counts are optimizer steps."""

    steps: int  # at most, where the stage counts epochs of its data; 0: as many as they make
    batch_size: int  # rows of the global batch
    seed: int = 0
    microbatches: int = 1  # parts of a batch whose gradients are added before one update
    log_every: int = 10
    eval_every: int = 0  # 0: at the end only
    checkpoint_every: int = 1000
    keep: int = 2  # newest checkpoints
    keep_every: int = 0  # checkpoints of steps that are a multiple of this stay too; 0: none
    keep_best: str = ""  # the held-out metric by which the best checkpoint stays too; measured at first and before each save
    keep_best_mode: Literal["min", "max"] = "min"
    patience: int = 0  # evaluations (`eval_every`) in a row without a better `keep_best` until the run stops; 0: never
    least_gain: float = 0.0  # by how much a better one must be better
    max_skipped_in_a_row: int = 10  # non-finite steps until the run stops
    spike: SpikeConfig = SpikeConfig()

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"loop.seed: expected 0 to {2**32 - 1}, got {self.seed}")
        check_least(
            "loop", self, steps=0, batch_size=1, microbatches=1, log_every=1, checkpoint_every=1, keep=1, keep_every=0,
            patience=0, least_gain=0, max_skipped_in_a_row=1,
        )  # fmt: skip
        if self.patience and not (self.keep_best and self.eval_every > 0):
            raise ValueError(
                f"loop.patience={self.patience}: expected loop.keep_best, the held-out metric, and loop.eval_every; "
                f"got {self.keep_best!r} and {self.eval_every}"
            )
        if self.batch_size % self.microbatches:
            raise ValueError(f"loop.batch_size={self.batch_size} is no multiple of microbatches={self.microbatches}")

    def steps_of(self, rows: int, epochs: float) -> int:
        """Steps that see so many rows `epochs` times, but at most `steps`, if that is given; without epochs it is `steps`."""
        if not epochs > 0:
            return self.steps
        whole = max(math.ceil(epochs * rows / self.batch_size), 1)
        return min(whole, self.steps) if self.steps else whole

    def reckoned(self, rows: int, epochs: float) -> str:
        """What `steps_of` comes from, in words; "" where the data have no say in it."""
        whole = dataclasses.replace(self, steps=0).steps_of(rows, epochs)
        if not epochs > 0 or self.steps_of(rows, epochs) < whole:
            return ""
        return f"epochs={epochs:g} of {rows:,} rows, in steps of loop.batch_size={self.batch_size}"

    def check_schedule(self, optim: OptimConfig, rows: int, epochs: float) -> None:
        """ValueError for a learning rate's schedule that so many rows leave no room: to be said before weights are read."""
        schedule(optim, self.steps_of(rows, epochs), reckoned=self.reckoned(rows, epochs))

    def over(self, rows: int, epochs: float) -> Self:
        """With the steps that see so many rows `epochs` times; says so where `steps` ends them before."""
        steps, whole = self.steps_of(rows, epochs), dataclasses.replace(self, steps=0).steps_of(rows, epochs)
        if steps < whole:
            log.warning("loop.steps=%d ends the run before the %d steps of epochs=%g", steps, whole, epochs)
        return dataclasses.replace(self, steps=steps)


@dataclasses.dataclass(frozen=True)
class Stage:
    """All that the loop needs to know.

    Attributes:
      name: label of the progress bar.
      specs: tree of ParamSpecs of what is trained.
      init: makes the parameters, already sharded: fresh, or from another stage's checkpoint.
      frozen: parameters that belong to the model but are not trained, already sharded: the base of adapters. They are held
        once, are in no checkpoint and have no moments; the loss, the source, `evaluate` and `measure` are given both trees
        as one (`whole`).
      optimizer: of `optimizer.make`, or any of optax's.
      loss: (params, batch) -> (objective, metrics), sums and weights.
      source: batches.
      evaluate: params -> held-out metrics; called by the loop every `eval_every` steps and at the end.
      tokens_per_step: of rows, their padding included; for the rate that is logged. 0: none is.
      show: the metric in the progress bar.
      check: (step, metrics) of each step; raises if they break an invariant of the stage.
      meta: JSON values stored with every checkpoint (model shape, tokenizer fingerprint, ...).
      measure: params -> JSON values stored with the last checkpoint, as statistics of what was trained.
      still: the first steps, in which nothing changes that `evaluate` measures; it is not called in them, or patience would
        end a run that has not begun.
    """

    name: str
    specs: Any
    init: Callable[[], Params]
    optimizer: Optimizer | optax.GradientTransformation
    loss: Loss
    source: Source
    evaluate: Callable[[Params], Mapping[str, float]] | None = None
    tokens_per_step: int = 0
    show: str = "loss"
    check: Callable[[int, Mapping[str, float]], None] | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: Callable[[Params], Mapping[str, Any]] | None = None
    frozen: Params = dataclasses.field(default_factory=dict)
    still: int = 0

    def whole(self, params: Params) -> Params:
        """The trained parameters together with the frozen ones."""
        return overlay(params, self.frozen)


def evaluation(loss: Loss, batches: Callable[[], Any], put: Callable[[Batch], Batch]) -> Callable[[Params], dict]:
    """An `evaluate` that takes the weighted mean of a loss and its metrics over held-out batches."""
    step = compiler.jit(loss)

    def evaluate(params: Params) -> dict[str, float]:
        total = None
        for batch in batches():
            objective, metrics = step(params, put(batch))
            sums = {"loss": objective, **metrics}
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return {name: float(value.mean()) for name, value in total.items() if value.weight > 0}

    return evaluate
