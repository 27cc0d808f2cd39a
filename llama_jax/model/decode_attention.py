"""Attention of generation: a few new queries a row over the cached keys and values (paper section 2.2, A.2.1)."""

import jax
import jax.numpy as jnp

# Large enough to vanish in float32's softmax; finite, so that a row that sees nothing gives no NaN.
_MASKED = -1e30

# Longer caches are read in blocks of this many slots, as far as the longest row reaches. A row then adds the same numbers in
# the same order, however long its neighbours are.
BLOCK = 128
_WHOLE = 2 * BLOCK  # shorter ones in one piece, which is faster


def round_up(slots: int) -> int:
    """The number of slots to allocate for at least `slots`: whole blocks, where the cache is read in blocks."""
    return slots if slots <= _WHOLE else -(-slots // BLOCK) * BLOCK


def attend_cached(
    query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, limit: jax.Array, *, dtype: jnp.dtype
) -> jax.Array:
    """softmax(q k^T / sqrt(E)) v, where the query at position p sees slots 0..p and H / K query heads share a key head.

    Args:
      query: # [B, T, H, E]
      keys: S is at most 256 or a multiple of 128. # [B, K, E, S]
      values: # [B, K, S, E]
      positions: # int32 [B, T]
      limit: no position reaches it; slots behind it need not be read. # int32 []
      dtype: operand type of the two contractions.

    Returns:
      float32 [B, T, H, E]
    """
    B, T, H, E = query.shape
    K, S = keys.shape[1], keys.shape[-1]
    # The queries that share a key head are the M rows of one matrix product.
    rows = jnp.einsum("btkre->bkrte", query.reshape(B, T, K, H // K, E)).reshape(B, K, H // K * T, E).astype(dtype)
    positions = jnp.tile(positions, (1, H // K))[:, None, :, None]  # [B, 1, M, 1]

    def block(start, keys, values):
        """Scores and values of the slots from `start`."""
        scores = jnp.einsum("bkme,bkes->bkms", rows, keys.astype(dtype), preferred_element_type=jnp.float32) * E**-0.5
        return jnp.where(start + jnp.arange(keys.shape[-1]) <= positions, scores, _MASKED), values.astype(dtype)

    def weigh(weights, values):
        return jnp.einsum("bkms,bkse->bkme", weights.astype(dtype), values, preferred_element_type=jnp.float32)

    if S <= _WHOLE:
        scores, values = block(0, keys, values)
        out = weigh(jax.nn.softmax(scores, axis=-1), values)
    else:

        def step(i, carry):  # softmax on line: sums are kept relative to the largest score so far
            top, mass, out = carry
            at = i * BLOCK
            scores, part = block(
                at, jax.lax.dynamic_slice_in_dim(keys, at, BLOCK, 3), jax.lax.dynamic_slice_in_dim(values, at, BLOCK, 2)
            )
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            return new_top, mass * shrink + jnp.sum(weights, axis=-1, keepdims=True), out * shrink + weigh(weights, part)

        M = rows.shape[2]
        start = (jnp.full((B, K, M, 1), _MASKED), jnp.zeros((B, K, M, 1)), jnp.zeros((B, K, M, E)))
        _, mass, out = jax.lax.fori_loop(0, (limit + BLOCK - 1) // BLOCK, step, start)
        out = out / jnp.maximum(mass, 1e-30)
    return jnp.einsum("bkrte->btkre", out.reshape(B, K, H // K, T, E)).reshape(B, T, H, E)
