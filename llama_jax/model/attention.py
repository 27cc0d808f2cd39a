"""Attention behind one function: grouped queries, causal within a segment, softmax in float32 (paper section 2.2, A.2.1).

The implementation here is XLA's. A splash-attention kernel and ring attention over the `sequence` axis take their place
behind `attend` when they come; callers will not change.
"""

import jax
import jax.numpy as jnp

from llama_jax.model.layers import contract

# Large enough to vanish in float32's softmax; finite, so that a row of padding (which sees nothing) gives no NaN.
_MASKED = -1e30


def training_mask(segment_ids: jax.Array) -> jax.Array:
    """Each token sees itself and earlier tokens of its own segment; segment 0 is padding. # [B, T] -> bool [B, T, T]"""
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return causal & same & (segment_ids > 0)[:, None, :]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """softmax(q k^T / sqrt(E)) v, where query heads g*r .. g*r+r-1 share key-value head g.

    Args:
      query: # [B, T, H, E]
      key, value: # [B, S, K, E]
      mask: bool, True where the query sees the key. # [B, T, S]
      dtype: operand type of the two contractions.

    Returns:
      float32 [B, T, H, E]
    """
    B, T, H, E = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, H // K, E)
    scores = contract("btkge,bske->bkgts", grouped, key, dtype) * E**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1)
    return contract("bkgts,bske->btkge", weights, value, dtype).reshape(B, T, H, E)
