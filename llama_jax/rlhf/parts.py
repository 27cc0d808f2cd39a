"""Rows of a batch in parts, one after the other, where all at once do not fit: the models that read a rollout.

A part takes as many rows from every device, so that none has to move, and all parts share one compiled program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.parallel.axes import batch_sharding, batch_shards


def part_size(rows: int, most: int, shards: int) -> int:
    """Rows of a part: at most `most` (0: all), as many of each of `shards` devices, at least one, and a divisor of all."""
    own = rows // shards
    if not most or rows % shards:
        return rows
    return shards * next(n for n in range(min(max(most // shards, 1), own), 0, -1) if own % n == 0)


def by_parts(function: Callable[..., Any], most: int, *, fixed: int) -> Callable[..., Any]:
    """`function`, which computes row by row, on at most `most` rows at a time; 0: on all.

    The first `fixed` of its arguments are the same for all rows.
    """
    if not most:
        return function

    def call(*arguments: Any) -> Any:
        same, rows = arguments[:fixed], arguments[fixed:]
        mesh, count = jax.sharding.get_mesh(), len(jax.tree.leaves(rows)[0])
        shards = 1 if mesh.empty else batch_shards(mesh)
        size = part_size(count, most, shards)
        if size == count:
            return function(*arguments)
        take, join = _cut(mesh, shards, count // size)
        return join([function(*same, *take(rows, part)) for part in range(count // size)])

    return call


@functools.lru_cache(maxsize=8)
def _cut(mesh: Mesh, shards: int, parts: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(rows, number) -> the rows of that part, and the rows of all parts -> all rows."""

    def laid_out(x: jax.Array) -> jax.Array:
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x.ndim))

    def take(x: jax.Array, part: jax.Array) -> jax.Array:
        by_device = x.reshape(shards, parts, -1, *x.shape[1:])
        return laid_out(jnp.take(by_device, part, axis=1).reshape(-1, *x.shape[1:]))

    def join(*found: jax.Array) -> jax.Array:
        by_device = jnp.stack([x.reshape(shards, -1, *x.shape[1:]) for x in found], axis=1)
        return laid_out(by_device.reshape(-1, *found[0].shape[1:]))

    return (
        jax.jit(lambda rows, part: jax.tree.map(lambda x: take(x, part), rows)),
        jax.jit(lambda found: jax.tree.map(join, *found)),
    )
