"""AdamW as in the paper (section 2.2): beta 0.9 / 0.95, eps 1e-5, weight decay 0.1, clipping at 1.0, warm-up, cosine."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer of a stage. Defaults are the paper's pretraining values; `lr` is the peak."""

    lr: float
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0  # steps of linear warm-up
    final: float = 0.1  # last learning rate of the cosine, as a share of the peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"optim.lr: expected a positive learning rate, got {self.lr}")


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step (0-based): linear from 0 over `warmup` steps, then to `final` x peak at `steps`, or constant."""
    if config.schedule == "constant":
        if not config.warmup:
            return optax.constant_schedule(config.lr)
        return optax.warmup_constant_schedule(0.0, config.lr, config.warmup)
    if config.warmup >= steps:
        raise ValueError(f"optim.warmup={config.warmup} leaves nothing of loop.steps={steps} for the cosine")
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup else config.lr, config.lr, config.warmup, steps, end_value=config.final * config.lr
    )


def make(config: OptimConfig, *, steps: int, decay: Any) -> optax.GradientTransformation:
    """The optimizer. `decay` is a tree of booleans: which parameters feel weight decay."""
    return optax.chain(
        clip_each_model(config.clip),
        optax.adamw(
            schedule(config, steps), b1=config.beta1, b2=config.beta2, eps=config.eps,
            weight_decay=config.weight_decay, mask=decay,
        ),
    )  # fmt: skip


def clip_each_model(limit: float) -> optax.GradientTransformation:
    """Clips by global norm; when several models are trained at once (policy and critic), each by its own."""

    def update(updates, state, params=None):
        del params
        if "trunk" in updates or "lora" in updates:
            return _clip(updates, limit), state
        return {name: _clip(tree, limit) for name, tree in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _clip(tree: Any, limit: float) -> Any:
    scale = jnp.minimum(1.0, limit / jnp.maximum(optax.tree.norm(tree), 1e-9))
    return jax.tree.map(lambda x: x * scale, tree)
