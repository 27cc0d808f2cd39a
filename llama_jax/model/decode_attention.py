"""Attention of generation: a few new queries a row over the cached keys and values (paper section 2.2, A.2.1)."""

import jax
import jax.numpy as jnp

# Large enough to vanish in float32's softmax; finite, so that a row that sees nothing gives no NaN.
_MASKED = -1e30


def attend_cached(
    query: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, *, dtype: jnp.dtype
) -> jax.Array:
    """softmax(q k^T / sqrt(E)) v, where the query at position p sees slots 0..p and H / K query heads share a key head.

    Args:
      query: # [B, T, H, E]
      keys: # [B, K, E, S]
      values: # [B, K, S, E]
      positions: # int32 [B, T]
      dtype: operand type of the two contractions.

    Returns:
      float32 [B, T, H, E]
    """
    B, T, H, E = query.shape
    K, S = keys.shape[1], keys.shape[-1]
    # The queries that share a key head are the rows of one matrix product.
    rows = jnp.einsum("btkre->bkrte", query.reshape(B, T, K, H // K, E)).reshape(B, K, H // K * T, E).astype(dtype)
    scores = jnp.einsum("bkme,bkes->bkms", rows, keys.astype(dtype), preferred_element_type=jnp.float32) * E**-0.5
    visible = jnp.tile(jnp.arange(S) <= positions[..., None], (1, H // K, 1))  # [B, R T, S]
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, _MASKED), axis=-1).astype(dtype)
    out = jnp.einsum("bkms,bkse->bkme", weights, values.astype(dtype), preferred_element_type=jnp.float32)
    return jnp.einsum("bkrte->btkre", out.reshape(B, K, H // K, T, E)).reshape(B, T, H, E)
