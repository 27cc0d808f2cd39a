"""The state of a run, sharded from birth: the optimizer's moments lie where their parameters lie."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.parallel.axes import abstract
from llama_jax.training.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds, beside the source's state."""

    step: jax.Array  # [] int32: updates tried, skipped ones included
    params: Any
    opt_state: Any
    skipped: jax.Array  # [] int32: updates skipped because the loss or a gradient was not finite
    skipped_in_a_row: jax.Array  # [] int32


def overlay(params: Any, frozen: Any) -> Any:
    """The tree of both: two trees of dicts that share no leaf, laid over each other."""
    if not isinstance(params, dict):
        return params
    return {**frozen, **{name: overlay(part, frozen.get(name, {})) for name, part in params.items()}}


def create(params: Any, optimizer: Optimizer | optax.GradientTransformation) -> TrainState:
    """The state before the first step."""

    def zero() -> jax.Array:  # each its own buffer: the state is donated, and no buffer can be donated twice
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(), params=params, opt_state=optimizer.init(params), skipped=zero(), skipped_in_a_row=zero()
    )


def abstract_state(specs: Any, optimizer: Optimizer | optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state: a restore target, and the layout of `create`'s result."""
    params = abstract(specs, mesh)
    by_path = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment's path ends with the path of its parameter.
        for start in range(len(path)):
            match = by_path.get(jax.tree_util.keystr(path[start:]))
            if match is not None and match.shape == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=match.sharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    shapes = jax.eval_shape(lambda p: create(p, optimizer), abstract(specs))
    return jax.tree_util.tree_map_with_path(place, shapes)


def born_sharded(
    init: Callable[[], Any], specs: Any, optimizer: Optimizer | optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The first state of a run; the parameters come sharded from `init`, the rest is made in its layout."""
    target = abstract_state(specs, optimizer, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, target)
    return jax.jit(lambda p: create(p, optimizer), out_shardings=layout)(init())
