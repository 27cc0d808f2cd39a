"""Attention in rows of trees: a stem (a question), then its branches (the answers to it), one tree after another.

A token sees the earlier tokens of its own branch and of its tree's stem, so what texts share at their beginning is computed
once. Any number of trees stands in a row, and `data/forest.py` packs them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.model.layers import einsum

_MASKED = -1e30  # as in decode_attention.py
_QUERIES = 512  # queries whose scores are held at once


def branch_attention(
    trees: jax.Array, branches: jax.Array, *, dtype: jnp.dtype
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Attention within the branches and stems of these rows, as a function of query, key and value.

    Args:
      trees: which tree a token belongs to; 0 is padding. # int32 [B, T]
      branches: which branch of it; 0 is the stem. # int32 [B, T]
      dtype: operand type of the contractions.

    Returns:
      ([B, T, H, E], [B, T, K, E] x 2) -> float32 [B, T, H, E]
    """

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        keys, values = jnp.einsum("btke->bket", key), jnp.einsum("btke->bkte", value)
        return attend_seen(query, keys, values, lambda start, size: seen(trees, branches, start, size), dtype=dtype)

    return attention


def seen(trees: jax.Array, branches: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    """Which of the T tokens the queries in [start, start + size) see. # int32 [B, T] x 2 -> bool [B, size, T]"""
    tree, branch = (jax.lax.dynamic_slice_in_dim(x, start, size, 1)[:, :, None] for x in (trees, branches))
    earlier = jnp.arange(trees.shape[1]) <= start + jnp.arange(size)[:, None]
    others = branches[:, None]
    return earlier & (trees[:, None] == tree) & ((others == 0) | (others == branch))


def attend_seen(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: Callable[[jax.Array | int, int], jax.Array], *, dtype: jnp.dtype
) -> jax.Array:
    """Attention under any mask, of 512 queries at once where T is a multiple of that, else of all.

    Args:
      query: # [B, T, H, E]
      keys: # [B, K, E, S]
      values: # [B, K, S, E]
      mask: (start, size) -> which keys the queries from `start` on see. # bool [B, size, S]

    Returns:
      float32 [B, T, H, E]
    """
    T = query.shape[1]
    if T <= _QUERIES or T % _QUERIES:
        return _attend(query, keys, values, mask(0, T), dtype=dtype)

    def block(start: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(query, start, _QUERIES, 1)
        return _attend(part, keys, values, mask(start, _QUERIES), dtype=dtype)

    out = jax.lax.map(block, jnp.arange(0, T, _QUERIES))  # [T / 512, B, 512, H, E]
    return jnp.moveaxis(out, 0, 1).reshape(query.shape)


def _attend(query, keys, values, mask, *, dtype):
    """`decode_attention.attend_cached` under any mask. # [B, Q, H, E], [B, K, E, S], [B, K, S, E], [B, Q, S]"""
    B, Q, H, E = query.shape
    K = keys.shape[1]
    queries = jnp.einsum("btkre->bkrte", query.reshape(B, Q, K, H // K, E)).reshape(B, K, H // K * Q, E).astype(dtype)
    scores = einsum("bkme,bkes->bkms", queries, keys.astype(dtype)) * E**-0.5
    scores = jnp.where(jnp.tile(mask, (1, H // K, 1))[:, None], scores, _MASKED)
    out = einsum("bkms,bkse->bkme", jax.nn.softmax(scores, axis=-1).astype(dtype), values.astype(dtype))
    return jnp.einsum("bkrte->btkre", out.reshape(B, K, H // K, Q, E)).reshape(B, Q, H, E)
