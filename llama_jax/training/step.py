"""One update: gradients of all microbatches added as sums, divided once, clipped, applied; skipped if not finite."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from llama_jax.config import ConfigError
from llama_jax.parallel import compiler
from llama_jax.parallel.axes import WITHIN_DATA, batch_shardings, batch_shards, row_share
from llama_jax.parallel.axes import layout as rules
from llama_jax.parallel.mesh import MeshConfig, fitting_mesh, make_mesh, slice_count
from llama_jax.training.optimizer import Optimizer, Schedule, gradient_norms
from llama_jax.training.stage import LoopConfig, Loss, Metrics, Weighted
from llama_jax.training.state import TrainState, overlay

log = logging.getLogger(__name__)

def make_step(
    loss: Loss, optimizer: Optimizer | optax.GradientTransformation, *, microbatches: int, layout: Any
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted train step (state, batch, frozen=None, schedule=None) -> (state, means).

    The state is donated and keeps its `layout`. `frozen` are parameters that the loss reads beside the trained ones: neither
    donated nor differentiated. Without a `schedule`, the optimizer's own becomes part of the program.

    Beside the loss's own metrics, the means are:
      loss: of the objective, over its weight.
      gradient_norm: global, before clipping; of several models `gradient_norm/policy` and so on, as each is clipped by its own.
      learning_rate: that this step's update is made with (one that is skipped would have been); with a schedule only.
      tokens: real ones (no padding) of the batch, 0 if its update was skipped; where it has `segment_ids`.
      skipped, skipped_in_a_row: updates so far, this one included.
    """

    def step(
        state: TrainState, batch: Any, frozen: Any = None, schedule: Schedule | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        named = {} if schedule is None else {"schedule": schedule}

        def whole_loss(params: Any, part: Any) -> tuple[Weighted, Metrics]:
            return loss(overlay(params, frozen or {}), part)

        gradient, objective, metrics = _accumulate(whole_loss, state.params, batch, microbatches, layout.params)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(objective.weight, 1e-9), gradient)
        norms = gradient_norms(gradient)
        mean = objective.sum / jnp.maximum(objective.weight, 1e-9)
        finite = jnp.isfinite(mean) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
        more = {}
        rates = getattr(optimizer, "schedule", None) if schedule is None else schedule
        if rates is not None:
            # The optimizer's own count: a skipped update leaves it, as all of its state, where it was.
            more["learning_rate"] = rates(state.step - state.skipped)
        if hasattr(batch, "segment_ids"):
            more["tokens"] = jnp.where(finite, jnp.sum(batch.segment_ids > 0), 0)

        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, **named)
        updated = (optax.apply_updates(state.params, updates), opt_state)
        # A choice leaf by leaf fuses with the update; a branch (`lax.cond`) would copy the whole state.
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, (state.params, state.opt_state))
        state = TrainState(
            step=state.step + 1, params=kept[0], opt_state=kept[1],
            skipped=state.skipped + ~finite, skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )  # fmt: skip
        means = {name: value.mean() for name, value in metrics.items()}
        means |= {"loss": mean, **norms, **more}
        return state, means | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

    platform = jax.tree.leaves(layout)[0].mesh.devices.flat[0].platform
    return compiler.jit(step, on=platform, donate_argnums=0, out_shardings=(layout, None))


class Programs:
    """A jitted train step, compiled beforehand for the shapes of batches that are known."""

    def __init__(self, step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]):
        self.step = step
        self.compiled: dict[Any, Callable[..., tuple[TrainState, dict[str, jax.Array]]]] = {}

    def compile(self, state: TrainState, batch: Any, *others: Any) -> None:
        """For batches of this one's shapes; the arguments are those of the step, and nothing is computed."""
        self.compiled[_shapes(batch)] = self.step.lower(state, batch, *others).compile()

    def __call__(self, state: TrainState, batch: Any, *others: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """The step."""
        program = self.compiled.get(_shapes(batch), self.step) if self.compiled else self.step
        return program(state, batch, *others)


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(x.shape for x in jax.tree.leaves(batch))


def _accumulate(loss: Loss, params: Any, batch: Any, microbatches: int, layout: Any):
    """Sums over microbatches of (gradient of the objective's sum, objective, metrics); gradients lie as `layout` says."""

    def one(part):
        def objective_sum(p):
            objective, metrics = loss(p, part)
            return objective.sum, (objective, metrics)

        gradient, (objective, metrics) = jax.grad(objective_sum, has_aux=True)(params)
        return jax.lax.with_sharding_constraint(gradient, layout), objective, metrics

    if microbatches == 1:
        return one(batch)

    # Between slices the network is slow: parts along `data` keep sums of their own until the last microbatch. Within one, sums
    # that need not be kept apart are reduced to the device that holds them in half the traffic.
    mesh = jax.tree.leaves(layout)[0].mesh
    apart = mesh.shape["data"] if slice_count(mesh.devices.flat) > 1 else 1

    def by_parts(part):
        with rules(WITHIN_DATA):
            return jax.vmap(one, spmd_axis_name="data")(part)

    def split(x):
        # Row r goes to microbatch r % M, so that every device keeps a part of each.
        first = (apart,) if apart > 1 else ()
        rows = x.reshape(*first, x.shape[0] // (apart * microbatches), microbatches, *x.shape[1:])
        return jnp.moveaxis(rows, len(first) + 1, 0)

    parts, sums = jax.tree.map(split, batch), by_parts if apart > 1 else one
    shapes = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, sums(part)), None), zeros, parts)
    if apart == 1:
        return total
    gradient, objective, metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), total)
    return jax.lax.with_sharding_constraint(gradient, layout), objective, metrics


def mesh_for(config: MeshConfig, loop: LoopConfig, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run: where more devices are left to `fsdp` (-1) than the batch has rows for, they go to `tensor`."""
    count = jax.device_count() if devices is None else len(devices)
    fitted = fitting_mesh(config, devices=count, rows=loop.batch_size // loop.microbatches)
    if fitted != config:
        log.warning(
            "%d rows at a time (batch_size / microbatches) do not fill %d devices: mesh.fsdp=%d, mesh.tensor=%d, not %d",
            loop.batch_size // loop.microbatches, count, fitted.fsdp, fitted.tensor, config.tensor,
        )  # fmt: skip
    return make_mesh(fitted, devices=devices)


def check_batch(config: LoopConfig, mesh: Mesh) -> None:
    """ConfigError for a batch that the mesh and the microbatches cannot divide."""
    if config.batch_size % (batch_shards(mesh) * config.microbatches):
        raise ConfigError(
            f"loop.batch_size={config.batch_size} cannot be divided into {batch_shards(mesh)} shards of the mesh x "
            f"{config.microbatches} microbatches; expected a multiple, fewer of --config.loop.microbatches, or a larger "
            "--config.mesh.tensor"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes this process's rows part of global arrays, laid out by the axes of the batch; arrays that lie so stay.

    Rows come whole: what lies on other hosts of their length is left out here.
    """
    _, count = row_share(mesh)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        # The shape is said, since JAX would take a whole row for this host's part of a longer one.
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * count, *x.shape[1:]))

    return jax.tree.map(put, batch, batch_shardings(batch, mesh))
