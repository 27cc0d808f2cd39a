"""JAX's Pallas paged attention for TPUs, over a cache of whole rows (paper section 2.2, A.2.1).

The kernel reads only the slots that a row has filled, whatever the longest row holds, and copies the next ones from memory
while it works on these. Its pages are our slots in blocks of PAGE. It wants the key-value heads before the pages; our rows
come first, so each pair of row and key-value head is a row of its own here, and nothing is moved.
"""

import functools
import math

import jax
import jax.numpy as jnp

from llama_jax.parallel.axes import per_device
from llama_jax.parallel.mesh import cores, platform

PAGE = 128
_PAGES_AT_ONCE = 4  # two buffers of 512 keys and values each: 0.5 MB of on-chip memory in bfloat16


def supports(slots: int, head_size: int) -> bool:
    """Whether the kernel can read a cache of this shape."""
    return slots % PAGE == 0 and head_size % 128 == 0


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(E)) v of one query a row over the first `lengths` slots.

    Args:
      query: # [B, H, E]
      keys, values: S slots a row, a multiple of PAGE. # bfloat16 [B, K, S, E]
      lengths: at least 1. # int32 [B]

    Returns:
      float32 [B, H, E], with bfloat16's precision
    """
    scaled = (query * query.shape[-1] ** -0.5).astype(keys.dtype)
    run = functools.partial(_attend, cores=cores() if platform() == "tpu" else 1)
    out = per_device(
        run, (scaled, keys, values, lengths),
        (("batch", "act_heads", None), *[("cache_rows", "act_kv_heads", None, None)] * 2, ("batch",)),
        ("batch", "act_heads", None),
    )  # fmt: skip
    return out.astype(jnp.float32)


def _attend(query, keys, values, lengths, *, cores):
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    B, H, E = query.shape
    K, S = keys.shape[1:3]
    pages = S // PAGE
    out = paged_attention(
        query.reshape(B * K, H // K, E), *(x.reshape(1, B * K * pages, PAGE, E) for x in (keys, values)),
        jnp.repeat(jnp.minimum(lengths, S), K), jnp.arange(B * K * pages, dtype=jnp.int32).reshape(B * K, pages),
        pages_per_compute_block=math.gcd(pages, _PAGES_AT_ONCE),
        megacore_mode="batch" if cores == 2 and B * K % 2 == 0 else None,
    )  # fmt: skip
    return out.reshape(B, H, E)
