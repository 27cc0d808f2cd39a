"""A checkpoint of any format as sharded arrays: each tensor goes from its file into its shards before the next is read."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from llama_jax.interop.names import by_leaf, leaves
from llama_jax.interop.source import Source
from llama_jax.interop.storage import check_finite
from llama_jax.model.params import Params
from llama_jax.parallel.axes import TRAIN, ParamSpec, Rules, partition


def load_params(
    source: Source, mesh: Mesh, *, dtype: Any = None, vectors: Any = None, rules: Rules = TRAIN,
    progress: Callable[[int], None] | None = None,
) -> Params:  # fmt: skip
    """The parameters of a checkpoint, laid out by a rule table on this mesh.

    On top of the arrays' own shards a process holds one tensor of one layer at a time; every process reads all files and
    keeps what belongs to its devices.

    Args:
      dtype: of the arrays; None: the parameter table's (float32).
      vectors: of those that are vectors (in each layer), where it is another.
      progress: called with the number of tensors read.

    Raises:
      ValueError: a tensor holds a number that is not finite.
    """
    specs = leaves(source.config, source.head)
    flat = {}
    for path, rows in by_leaf(list(source.tensors)).items():
        spec = specs[path]
        vector = len([axis for axis in spec.axes if axis != "layers"]) == 1
        kind = jnp.dtype((vectors if vector else None) or dtype or spec.dtype)

        def read(row, kind=kind):
            x = source.read(row)
            check_finite(x, row.name, source.path)
            if progress:
                progress(1)
            return x.astype(kind, copy=False)

        if rows[0].layer is None:
            flat[path] = _place(read(rows[0]), _sharding(spec, mesh, rules))
            continue
        layer_spec = ParamSpec(spec.shape[1:], spec.axes[1:], spec.init)
        layer_sharding = _sharding(layer_spec, mesh, rules)
        stack = _zeros(spec.shape, kind, _sharding(spec, mesh, rules))
        for row in rows:
            # Waiting for each keeps one tensor in flight; the donated stack is written in place.
            stack = jax.block_until_ready(_set_layer(stack, _place(read(row), layer_sharding), row.layer))
        flat[path] = stack
    return traverse_util.unflatten_dict(flat, sep="/")


def _sharding(spec: ParamSpec, mesh: Mesh, rules: Rules) -> NamedSharding:
    return NamedSharding(mesh, partition(spec.shape, spec.axes, rules, mesh))


def _place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.ascontiguousarray(x[index]))


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding) -> jax.Array:
    return _zeros_program(shape, dtype, sharding)()


@functools.lru_cache(maxsize=64)  # a second model of one shape compiles nothing
def _zeros_program(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding) -> Callable[[], jax.Array]:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, x: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)
