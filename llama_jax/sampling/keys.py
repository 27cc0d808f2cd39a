"""Keys of draws: what answer i of a job draws depends on (seed, i) alone, not on what is drawn beside it."""

import hashlib
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_GROUP = 64  # keys that are made together, so that one program serves any number of them


def row_keys(seed: int, indices: Sequence[int] | jax.Array) -> jax.Array:
    """One key for each row, from its index in the whole job: batching does not change what is drawn. # [B]"""
    return _keys(np.uint32(small_seed(seed)), jnp.asarray(indices, jnp.uint32))


def key_data(seed: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """The keys of `row_keys` as plain numbers; after the first call no number of them compiles anything. # uint32 [B, ...]"""
    indices = np.asarray(indices, np.uint32)
    number = max(-(-len(indices) // _GROUP), 1)
    groups = np.pad(indices, (0, number * _GROUP - len(indices))).reshape(number, _GROUP)
    found = [np.asarray(_numbers(np.uint32(small_seed(seed)), group)) for group in groups]
    return np.concatenate(found)[: len(indices)]


def small_seed(seed: int) -> int:
    """A seed of 31 bits, which is what keys are made of here; those of 64 bits and a sign are mixed down to it.

    Raises:
      ValueError: anything but an integer of 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}")
    if 0 <= seed < 2**31:
        return int(seed)
    return int.from_bytes(hashlib.sha256(str(int(seed)).encode()).digest()[:4]) >> 1


@jax.jit
def _keys(seed: jax.Array, indices: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), indices)


@jax.jit
def _numbers(seed: jax.Array, indices: jax.Array) -> jax.Array:
    return jax.random.key_data(_keys(seed, indices))
