"""Attention of generation: a few new queries a row over the cached keys and values (paper section 2.2, A.2.1)."""

import jax
import jax.numpy as jnp

from llama_jax.model import paged
from llama_jax.model.cache import LayerCache
from llama_jax.model.layers import einsum
from llama_jax.parallel.axes import shards_of
from llama_jax.parallel.mesh import platform

# Large enough to vanish in float32's softmax; finite, so that a row that sees nothing gives no NaN.
_MASKED = -1e30

# Longer caches are read in blocks of this many slots, as far as the longest row reaches. A row then adds the same numbers in
# the same order, however long its neighbours are.
BLOCK = 128
_WHOLE = 2 * BLOCK  # shorter ones in one piece, which is faster
_VECTOR = 16  # float32 numbers in the widest register of a CPU


def round_up(slots: int) -> int:
    """The number of slots to allocate for at least `slots`: whole blocks, where the cache is read in blocks, else whole
    vectors of the processor (255 slots take half as long again as 256)."""
    unit = _VECTOR if slots <= _WHOLE and platform() != "tpu" else BLOCK
    return -(-slots // unit) * unit


def attend_cached(
    query: jax.Array, cache: LayerCache, positions: jax.Array, limit: jax.Array, *, dtype: jnp.dtype
) -> jax.Array:
    """softmax(q k^T / sqrt(E)) v, where the query at position p sees slots 0..p and H / K query heads share a key head.

    Single queries on a TPU take the Pallas kernel (`model.paged`) where it supports the cache; XLA's operations the rest.

    Args:
      query: # [B, T, H, E]
      cache: its keys and values; S is at most 256 or a multiple of 128.
      positions: # int32 [B, T]
      limit: no position reaches it; slots behind it need not be read. # int32 []
      dtype: operand type of the two contractions.

    Returns:
      float32 [B, T, H, E]
    """
    B, T, H, E = query.shape
    K, S = cache.values.shape[1:3]
    aligned = shards_of("batch") == shards_of("cache_rows")  # else these queries' devices have other rows of the cache
    if T == 1 and aligned and cache.lengthwise and paged.supports(S, E) and K % shards_of("act_heads") == 0:
        return paged.attend(query[:, 0], cache.keys, cache.values, positions[:, 0] + 1)[:, None]
    # The queries that share a key head are the M rows of one matrix product.
    rows = jnp.einsum("btkre->bkrte", query.reshape(B, T, K, H // K, E)).reshape(B, K, H // K * T, E).astype(dtype)
    positions = jnp.tile(positions, (1, H // K))[:, None, :, None]  # [B, 1, M, 1]

    def score(start, part):
        """Scores of the slots that `part` holds, which begin at `start`. # [B, K, M, slots]"""
        keys = "bkse" if cache.lengthwise else "bkes"
        scores = einsum(f"bkme,{keys}->bkms", rows, part.keys.astype(dtype))
        scores = scores * E**-0.5 if part.key_scales is None else scores * (part.key_scales * E**-0.5)[:, :, None]
        return jnp.where(start + jnp.arange(scores.shape[-1]) <= positions, scores, _MASKED)

    def weigh(weights, part):
        if part.value_scales is not None:
            weights = weights * part.value_scales[:, :, None]
        return einsum("bkms,bkse->bkme", weights.astype(dtype), part.values.astype(dtype))

    if S <= _WHOLE:
        out = weigh(jax.nn.softmax(score(0, cache), axis=-1), cache)
    else:

        def step(i, carry):  # softmax on line: sums are kept relative to the largest score so far
            top, mass, out = carry
            part = _slots(cache, i * BLOCK)
            scores = score(i * BLOCK, part)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            return new_top, mass * shrink + jnp.sum(weights, axis=-1, keepdims=True), out * shrink + weigh(weights, part)

        M = rows.shape[2]
        start = (jnp.full((B, K, M, 1), _MASKED), jnp.zeros((B, K, M, 1)), jnp.zeros((B, K, M, E)))
        _, mass, out = jax.lax.fori_loop(0, (limit + BLOCK - 1) // BLOCK, step, start)
        out = out / jnp.maximum(mass, 1e-30)
    return jnp.einsum("bkrte->btkre", out.reshape(B, K, H // K, T, E)).reshape(B, T, H, E)


def _slots(cache: LayerCache, start: jax.Array) -> LayerCache:
    """The block of slots from `start`."""

    def cut(x, axis):
        return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis)

    return cache.replace(
        keys=cut(cache.keys, cache.key_axis), values=cut(cache.values, 2), key_scales=cut(cache.key_scales, 2),
        value_scales=cut(cache.value_scales, 2),
    )  # fmt: skip
