"""A checkpoint of any format as sharded arrays: each tensor goes from its file into its shards before the next is read.

`load_params` gives what is trained, `load_prepared` what generation reads: never both, which would be twice the memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from llama_jax.interop.names import Tensor, by_leaf, leaves
from llama_jax.interop.source import Source
from llama_jax.interop.storage import check_finite
from llama_jax.model.config import Compute
from llama_jax.model.decode import Prepared, arrange, eight_bits
from llama_jax.model.params import Params
from llama_jax.parallel.axes import DECODE, TRAIN, Rules, partition


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
        kind = jnp.dtype((vectors if _is_vector(rows[0]) else None) or dtype or spec.dtype)

        def read(row, kind=kind):
            x = _read(source, row)
            if progress:
                progress(1)
            return x.astype(kind, copy=False)

        one = _sharding(rows[0], mesh, rules)
        if rows[0].layer is None:
            flat[path] = _place(read(rows[0]), one)
            continue
        stack = _zeros(spec.shape, kind, NamedSharding(mesh, partition(spec.shape, spec.axes, rules, mesh)))
        for row in rows:
            # Waiting for each keeps one tensor in flight; the donated stack is written in place.
            stack = jax.block_until_ready(_set_layer(stack, _place(read(row), one), row.layer))
        flat[path] = stack
    return traverse_util.unflatten_dict(flat, sep="/")


def load_prepared(source: Source, mesh: Mesh, *, compute: Compute, int8: bool = False) -> Prepared:
    """What `model.decode.prepare` makes of a language model's parameters, straight from its checkpoint.

    Neither those parameters nor stacks of layers exist meanwhile: on top of the weights a process holds one tensor of one
    layer, as it is stored and as it is needed.

    Raises:
      ValueError: a tensor holds a number that is not finite.
    """
    found: dict[str, Any] = {}
    with jax.set_mesh(mesh):
        for path, rows in by_leaf(list(source.tensors)).items():
            # Eight bits are rounded from what is stored.
            kind = jnp.dtype("float32") if int8 or _is_vector(rows[0]) else jnp.dtype(compute.matmul_dtype)
            sharding, weights = _sharding(rows[0], mesh, DECODE), []
            for row in rows:
                # A copy: an array of a CPU may lie where NumPy's does, which here may be a part of all layers.
                x = _place(np.array(_read(source, row), dtype=kind, order="C"), sharding)
                weights.append(jax.block_until_ready(_eight_bits(path, x) if int8 else x))
            found[path] = weights[0] if rows[0].layer is None else weights
    return arrange(found)


def _read(source: Source, row: Tensor) -> np.ndarray:
    x = source.read(row)
    check_finite(x, row.name, source.path)
    return x


def _is_vector(row: Tensor) -> bool:
    return len(row.ours) == 1


_eight_bits = jax.jit(eight_bits, static_argnums=0)


def _sharding(row: Tensor, mesh: Mesh, rules: Rules) -> NamedSharding:
    return NamedSharding(mesh, partition(row.ours, row.axes, rules, mesh))


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
