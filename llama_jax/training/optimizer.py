"""AdamW as in the paper (section 2.2): beta 0.9 / 0.95, eps 1e-5, weight decay 0.1, clipping at 1.0, warm-up, cosine."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer of a stage. Defaults are the paper's pretraining values; `lr` is the peak.

    warmup: steps of linear warm-up; at least so many where `warmup_share` is the share of all steps that warm up, for stages
      whose length follows from their data (the paper's reward models: 3 %, at least 5; section 3.2.2).
    final: last learning rate of the cosine, as a share of the peak.
    clip: largest global norm of a gradient; 0: any.
    """

    lr: float
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    warmup_share: float = 0.0
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self):
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr: expected a positive learning rate, got {self.lr}")
        for name in ("warmup", "final", "eps", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("warmup_share", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}: expected 0 or more and less than 1, got {getattr(self, name)}")

    def warmup_of(self, steps: int) -> int:
        """Steps of warm-up in a stage of so many steps. A short stage warms up in half of them at most where a share is asked
        for, which nobody can choose before the data are counted."""
        if not self.warmup_share:
            return self.warmup
        return min(max(round(self.warmup_share * steps), self.warmup), steps // 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate by step (0-based): linear from 0 over `warmup` steps, then a cosine to `final` x `peak` at `steps`.

    Steps are those whose updates were made: a skipped one does not count, so the next one has the rate that it would have had.

    Its numbers are arrays, so that a compiled step takes them as arguments: stages that differ in nothing but how long they
    train, as the reward models of one version and the next, share one program.
    """

    peak: Any
    final: Any  # share of the peak; 1: constant after the warm-up
    warmup: Any
    steps: Any

    def __call__(self, count: Any) -> jax.Array:
        """The rate of step `count`, float32 []."""
        count = jnp.asarray(count, jnp.float32)
        done = jnp.clip((count - self.warmup) / jnp.maximum(self.steps - self.warmup, 1.0), 0.0, 1.0)
        cosine = self.final + (1.0 - self.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        return self.peak * jnp.where(count < self.warmup, count / jnp.maximum(self.warmup, 1.0), cosine)


def schedule(config: OptimConfig, steps: int, *, reckoned: str = "") -> Schedule:
    """The schedule of a stage of so many steps; ValueError where warm-up takes all of them.

    Args:
      reckoned: what the number of steps comes from (`LoopConfig.reckoned`), for the error.
    """
    warmup = config.warmup_of(steps)
    if config.schedule == "cosine" and warmup >= steps:
        why = f" ({reckoned})" if reckoned else ""
        raise ValueError(f"optim.warmup={warmup} leaves nothing of loop.steps={steps} for the cosine{why}")
    final = config.final if config.schedule == "cosine" else 1.0
    return Schedule(*(np.float32(value) for value in (config.lr, final, warmup, steps)))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What `optax` calls a transformation, and its schedule.

    Attributes:
      init: params -> state.
      update: (gradients, state, params, schedule=None) -> (updates, state); the schedule of a compiled step is an argument of
        it, or the optimizer's own.
      schedule: how fast it learns.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    schedule: Schedule


def make(config: OptimConfig, *, steps: int, decay: Any) -> Optimizer:
    """AdamW. `decay` is a tree of booleans: which parameters feel weight decay."""
    own = schedule(config, steps)

    def scale(updates, state, params=None, *, schedule):
        del params
        rate = schedule(state.count)
        return jax.tree.map(lambda x: -rate * x, updates), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    whole = optax.chain(
        clip_each_model(config.clip),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay),
        optax.GradientTransformationExtraArgs(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), scale),
    )

    def update(gradients: Any, state: Any, params: Any, schedule: Schedule | None = None) -> tuple[Any, Any]:
        updates, state = whole.update(gradients, state, params, schedule=own if schedule is None else schedule)
        if several_models(gradients):
            updates = {name: _still_without(gradients[name], tree) for name, tree in updates.items()}
        return updates, state

    return Optimizer(whole.init, update, own)


def several_models(tree: Any) -> bool:
    """Whether several models are trained at once: policy and critic."""
    return isinstance(tree, dict) and len(tree) > 1 and not {"trunk", "lora"} & set(tree)


def gradient_norms(gradient: Any) -> dict[str, jax.Array]:
    """The norms that gradients are clipped by, under the names of their metrics: of several models, one for each."""
    if not several_models(gradient):
        return {"gradient_norm": optax.tree.norm(gradient)}
    return {f"gradient_norm/{name}": optax.tree.norm(tree) for name, tree in gradient.items()}


def _still_without(gradient: Any, updates: Any) -> Any:
    """The updates of one model of several; zeros where no gradient reaches it, as a policy while its critic warms up: weight
    decay alone would move it."""
    moves = optax.tree.norm(gradient) > 0
    return jax.tree.map(lambda x: jnp.where(moves, x, 0.0), updates)


def clip_each_model(limit: float) -> optax.GradientTransformation:
    """Clips by global norm, or (0) not at all; when several models are trained at once (policy and critic), each by its own."""

    def update(updates, state, params=None):
        del params
        if not limit:
            return updates, state
        if not several_models(updates):
            return _clip(updates, limit), state
        return {name: _clip(tree, limit) for name, tree in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _clip(tree: Any, limit: float) -> Any:
    scale = jnp.minimum(1.0, limit / jnp.maximum(optax.tree.norm(tree), 1e-9))
    return jax.tree.map(lambda x: x * scale, tree)
