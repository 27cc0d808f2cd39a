"""Attention in blocks with an online softmax, in plain XLA: memory linear in the length, for long rows on any backend.

FlashAttention's algorithm (Dao et al., 2022, arXiv 2205.14135; version 2's loop order) as the pair that
`parallel.ring.Kernel` asks for. Blocks above the diagonal are skipped, not masked.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp

from llama_jax.model.layers import einsum
from llama_jax.parallel.ring import Kernel

# Blocks of 512 x 512 scores of one head are 1 MiB: they stay in a core's cache between the two products.
BLOCK = 512
# As in attention.py: vanishes in float32's softmax, and is finite.
_MASKED = -1e30


@functools.cache
def kernel(dtype: jnp.dtype, *, block: int = BLOCK) -> Kernel:
    """The kernel with operands of `dtype`, in blocks of at most `block` queries and keys; products are float32."""
    return Kernel(
        forward=functools.partial(_forward, dtype=dtype, block=block),
        backward=functools.partial(_backward, dtype=dtype, block=block),
    )


def _forward(query, key, value, query_segments, key_segments, *, causal, dtype, block):
    B, H, T, E = query.shape
    K, S = key.shape[1:3]
    q = _cut(query.reshape(B, K, H // K, T, E).astype(dtype), 3, block)  # [N, B, K, G, t, E]
    k, v = (_cut(x.astype(dtype), 2, block) for x in (key, value))  # [M, B, K, s, E]
    q_ids, k_ids = _cut(query_segments, 1, block, -1), _cut(key_segments, 1, block, -2)

    def rows(index):
        q_i, ids_i = q[index], q_ids[index]

        def add(j, state):
            out, peak, mass = state
            scores = _scores(q_i, k[j], ids_i, k_ids[j], causal & (j == index))
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
            shrink, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak[..., None])
            out = out * shrink[..., None] + einsum("bkgts,bkse->bkgte", weights.astype(dtype), v[j])
            return out, new_peak, mass * shrink + jnp.sum(weights, axis=-1)

        shape = q_i.shape[:-1]
        empty = jnp.zeros(q_i.shape, jnp.float32), jnp.full(shape, _MASKED), jnp.zeros(shape)
        with _mean_trips(len(k), causal=causal):
            out, peak, mass = jax.lax.fori_loop(0, index + 1 if causal else len(k), add, empty)
        return out / mass[..., None], peak + jnp.log(mass)

    out, normaliser = jax.lax.map(rows, jnp.arange(len(q)))
    return _joined(out, 3, T).reshape(B, H, T, E), _joined(normaliser, 3, T).reshape(B, H, T)


def _backward(query, key, value, query_segments, key_segments, out, normaliser, d_out, *, causal, dtype, block):
    B, H, T, E = query.shape
    K, S = key.shape[1:3]
    grouped = (B, K, H // K, T)
    q = _cut(query.reshape(*grouped, E).astype(dtype), 3, block)
    do = _cut(d_out.reshape(*grouped, E).astype(dtype), 3, block)
    k, v = (_cut(x.astype(dtype), 2, block) for x in (key, value))
    q_ids, k_ids = _cut(query_segments, 1, block, -1), _cut(key_segments, 1, block, -2)
    norm = _cut(normaliser.reshape(grouped), 3, block)
    inner = _cut(jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).reshape(grouped), 3, block)

    def columns(dq, j):
        def add(i, state):
            dq, dk, dv = state
            scores = _scores(q[i], k[j], q_ids[i], k_ids[j], causal & (i == j))
            weights = jnp.exp(scores - norm[i][..., None])
            dv += einsum("bkgts,bkgte->bkse", weights.astype(dtype), do[i])
            d_weights = einsum("bkgte,bkse->bkgts", do[i], v[j])
            d_scores = (weights * (d_weights - inner[i][..., None])).astype(dtype)
            dk += einsum("bkgts,bkgte->bkse", d_scores, q[i])
            return dq.at[i].add(einsum("bkgts,bkse->bkgte", d_scores, k[j])), dk, dv

        zero = jnp.zeros(k.shape[1:], jnp.float32)
        with _mean_trips(len(q), causal=causal):
            dq, dk, dv = jax.lax.fori_loop(j if causal else 0, len(q), add, (dq, zero, zero))
        return dq, (dk, dv)

    dq, (dk, dv) = jax.lax.scan(columns, jnp.zeros(q.shape, jnp.float32), jnp.arange(len(k)))
    return _joined(dq, 3, T).reshape(B, H, T, E), _joined(dk, 2, S), _joined(dv, 2, S)


def _mean_trips(blocks: int, *, causal: bool) -> contextlib.AbstractContextManager:
    """Names a loop by how often it runs on average over the loop around it, of which a compiled program says nothing: over 1
    to `blocks` under the causal mask. The planner reads it, in halves."""
    return jax.named_scope(f"mean_trips_{blocks + 1}_halves") if causal else contextlib.nullcontext()


def _scores(q, k, q_ids, k_ids, causal):
    """Masked scores of one block; `causal` if it lies on the diagonal. # [B, K, G, t, E], [B, K, s, E] -> [B, K, G, t, s]"""
    visible = q_ids[:, :, None] == k_ids[:, None, :]
    later = jnp.arange(k_ids.shape[1])[None, :] > jnp.arange(q_ids.shape[1])[:, None]
    visible &= ~(causal & later)[None]
    return jnp.where(visible[:, None, None], einsum("bkgte,bkse->bkgts", q, k), _MASKED)


def _cut(x, axis, block, fill=0):
    """Cuts an axis into equal blocks and brings their number to the front; the last is filled up."""
    size = x.shape[axis]
    number = -(-size // block)
    block = -(-size // number)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, number * block - size)
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], number, block, *x.shape[axis + 1 :]), axis, 0)


def _joined(x, axis, size):
    """Undoes `_cut`; `axis` as it was there."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, size, axis=axis)
