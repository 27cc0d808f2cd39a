"""Attention: grouped queries, causal within a segment, softmax in float32 (paper section 2.2, A.2.1).

Training asks `row_attention` for the function that suits the rows, the backend and the mesh: `causal_attention`, blocks in XLA
(blockwise.py) or Pallas splash attention (splash.py), on one device, over heads or in a ring (parallel/ring.py).
`attend` is the plain form with any mask, its definition in tests; `decode_attention.py` has generation's.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model import blockwise, splash
from llama_jax.model.config import Compute
from llama_jax.model.layers import contract, einsum
from llama_jax.parallel.axes import shards_of
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.ring import sharded_attention

# Large enough to vanish in float32's softmax; finite, so that a row of padding (which sees nothing) gives no NaN.
_MASKED = -1e30

# From this length on, `auto` holds blocks of scores instead of all of them.
_LONG = 2048


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Each token attends to itself and to earlier tokens of its own segment: `attend` under `training_mask`, but faster.

    Query blocks see only the keys up to their own end, which leaves out up to half of the work. Scores are held transposed,
    [B, K, S, R] with R = (query, head of the group): then every product of the forward and of the backward pass has its
    contracted axis where matrix units want it, once the small operands (and never the scores) are transposed.

    Args:
      query: # [B, T, H, E]
      key, value: # [B, T, K, E]
      segment_ids: 0 is padding. # int32 [B, T]
      dtype: operand type of the contractions.

    Returns:
      float32 [B, T, H, E]; what padding queries give is finite and means nothing.
    """
    return _causal_attention_forward(query, key, value, segment_ids, dtype)[0]


def _causal_attention_forward(query, key, value, segment_ids, dtype):
    B, T, H, E = query.shape
    K = key.shape[2]
    G = H // K
    query, key, value, like = _cast(query * E**-0.5, key, value, dtype)
    queries, keys, values = _columns(query, K), _rows(key, K), _columns(value, K)
    outs, weights = [], []
    for start, end in _query_blocks(T):
        scores = einsum("bkse,bker->bksr", keys[:, :, :end], queries[..., start * G : end * G])
        seen = jnp.repeat(_seen(segment_ids, start, end), G, axis=2)[:, None]
        weight = jax.nn.softmax(jnp.where(seen, scores, _MASKED), axis=2).astype(dtype)
        weights.append(weight)
        outs.append(einsum("bkes,bksr->bker", values[..., :end], weight))
    out = jnp.concatenate(outs, axis=3)
    return _from_columns(out, H), (query, key, value, tuple(weights), out, like)


def _causal_attention_backward(dtype, residuals, cotangent):
    query, key, value, weights, out, like = residuals
    B, T, H, E = query.shape
    K = key.shape[2]
    G = H // K
    # Softmax's gradient is p * (dp - sum(p dp)), and that sum is also out . d_out.
    correction = jnp.sum(_columns(cotangent, K) * out, axis=2, keepdims=True)  # [B, K, 1, R]
    cotangent = cotangent.astype(dtype)
    d_out_rows, d_out_columns = _rows(cotangent, K), _columns(cotangent, K)
    queries, keys, values = _rows(query, K), _columns(key, K), _rows(value, K)
    d_queries, d_keys, d_values = [], 0.0, 0.0
    for (start, end), weight in zip(_query_blocks(T), weights, strict=True):
        block = slice(start * G, end * G)
        d_weight = einsum("bkse,bker->bksr", values[:, :, :end], d_out_columns[..., block])
        d_scores = (weight.astype(jnp.float32) * (d_weight - correction[..., block])).astype(dtype)
        d_queries.append(einsum("bkes,bksr->bker", keys[..., :end], d_scores))
        later = ((0, 0), (0, 0), (0, T - end), (0, 0))  # keys that this block does not see
        d_keys += jnp.pad(einsum("bksr,bkre->bkse", d_scores, queries[:, :, block]), later)
        d_values += jnp.pad(einsum("bksr,bkre->bkse", weight, d_out_rows[:, :, block]), later)
    d_query = _from_columns(jnp.concatenate(d_queries, axis=3), H) * E**-0.5
    gradients = (d_query, jnp.swapaxes(d_keys, 1, 2), jnp.swapaxes(d_values, 1, 2))
    return *(gradient.astype(x.dtype) for gradient, x in zip(gradients, like, strict=True)), None


causal_attention.defvjp(_causal_attention_forward, _causal_attention_backward)


def _cast(query, key, value, dtype):
    """The three in `dtype`, and empty arrays that carry their own types, to which the gradients are cast back."""
    arrays = (query, key, value)
    return *(x.astype(dtype) for x in arrays), tuple(jnp.empty((0,), x.dtype) for x in arrays)


def _rows(x: jax.Array, K: int) -> jax.Array:
    """By key-value head; the heads of its group at one position stand side by side. # [B, T, H, E] -> [B, K, T * H/K, E]"""
    B, T, H, E = x.shape
    return jnp.swapaxes(x.reshape(B, T, K, H // K, E), 1, 2).reshape(B, K, T * (H // K), E)


def _columns(x: jax.Array, K: int) -> jax.Array:
    """`_rows` transposed. # [B, T, H, E] -> [B, K, E, T * H/K]"""
    B, T, H, E = x.shape
    return jnp.transpose(x.reshape(B, T, K, H // K, E), (0, 2, 4, 1, 3)).reshape(B, K, E, T * (H // K))


def _from_columns(x: jax.Array, H: int) -> jax.Array:
    """The inverse of `_columns`. # [B, K, E, T * H/K] -> [B, T, H, E]"""
    B, K, E, R = x.shape
    T = R * K // H
    return jnp.transpose(x.reshape(B, K, E, T, H // K), (0, 3, 1, 4, 2)).reshape(B, T, H, E)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """Start and end of up to 4 blocks of at least 32 queries; more blocks save little and their products become small."""
    blocks = next(n for n in (4, 2, 1) if length % n == 0 and (n == 1 or length // n >= 32))
    size = length // blocks
    return [(i * size, (i + 1) * size) for i in range(blocks)]


def _seen(segment_ids: jax.Array, start: int, end: int) -> jax.Array:
    """`training_mask` of the queries in [start, end), transposed. # [B, T] -> bool [B, end, end - start]"""
    causal = jnp.arange(end)[:, None] <= jnp.arange(start, end)[None, :]
    keys = segment_ids[:, :end, None]
    return causal & (keys == segment_ids[:, None, start:end]) & (keys > 0)


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
    if H % K:
        raise ValueError(f"attend: expected heads of the query in groups of one size for each key-value head, got {H} and {K}")
    grouped = query.reshape(B, T, K, H // K, E)
    scores = contract("btkge,bske->bkgts", grouped, key, dtype) * E**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1)
    return contract("bkgts,bske->btkge", weights, value, dtype).reshape(B, T, H, E)


def implementation(compute: Compute, *, length: int, head_size: int) -> str:
    """What `compute.attention` means for rows of this length under the mesh in force: full, blockwise or splash.

    Raises:
      ValueError: splash is asked for by name, and its tiles do not divide the rows.
    """
    shards = shards_of("length")
    piece = length // (2 * shards) if shards > 1 and compute.sequence == "ring" else length  # on a ring, half of a device's
    supported = splash.supports(piece, head_size)
    if compute.attention == "splash" and not supported:
        raise ValueError(
            f"compute.attention=splash: its tiles do not divide pieces of {piece} tokens with heads of {head_size}; expected "
            f"multiples of 128 tokens and of 64, or another attention"
        )
    if compute.attention != "auto":
        return compute.attention
    if platform() == "tpu" and supported and compute.matmul_dtype == jnp.bfloat16:  # it would round float32
        return "splash"
    return "blockwise" if shards > 1 or length >= _LONG else "full"


def of_any_length(compute: Compute, *, length: int, head_size: int) -> Compute:
    """`compute` for rows whose length generation chose: where splash attention was asked for and cannot, `auto` decides."""
    if compute.attention == "splash" and not splash.supports(length, head_size):
        return dataclasses.replace(compute, attention="auto")
    return compute


def row_attention(
    segment_ids: jax.Array, *, head_size: int, compute: Compute
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Attention within the segments of these rows, as a function (query, key, value) -> [B, T, H, E]. # int32 [B, T]"""
    chosen = implementation(compute, length=segment_ids.shape[1], head_size=head_size)
    if chosen == "full":

        def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            query, key, value = _named(query, key, value)
            return checkpoint_name(causal_attention(query, key, value, segment_ids, compute.matmul_dtype), "attention")

        return attention
    if chosen == "blockwise":
        kernel = blockwise.kernel(compute.matmul_dtype)
    else:
        kernel = splash.kernel(compute.matmul_dtype, interpret=platform() != "tpu")

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        # Cast before they are saved or travel: half the bytes in bfloat16.
        scaled = (query * head_size**-0.5, key, value)
        query, key, value = _named(*(x.astype(compute.matmul_dtype) for x in scaled))
        return sharded_attention(query, key, value, segment_ids, kernel=kernel, method=compute.sequence)

    return attention


def _named(query, key, value):
    """The names that remat policies know them by."""
    return (checkpoint_name(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value")))


def uses_ring(compute: Compute, *, length: int, head_size: int) -> bool:
    """Whether rows must be in `ring_order`."""
    chosen = implementation(compute, length=length, head_size=head_size)
    return chosen != "full" and compute.sequence == "ring" and shards_of("length") > 1
