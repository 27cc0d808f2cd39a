"""Attention behind one function: grouped queries, causal within a segment, softmax in float32 (paper section 2.2, A.2.1).

`attend` holds all scores and takes any mask; generation uses it. Training asks `row_attention` for the function that suits
the rows, the backend and the mesh: `attend`, blocks in XLA or Pallas splash attention, on one device, over heads or in a ring.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model import blockwise, splash
from llama_jax.model.config import Compute
from llama_jax.model.layers import contract
from llama_jax.parallel.axes import shards_of
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.ring import sharded_attention

# Large enough to vanish in float32's softmax; finite, so that a row of padding (which sees nothing) gives no NaN.
_MASKED = -1e30

# From this length on, `auto` holds blocks of scores instead of all of them.
_LONG = 2048


def training_mask(segment_ids: jax.Array) -> jax.Array:
    """Each token sees itself and earlier tokens of its own segment; segment 0 is padding. # [B, T] -> bool [B, T, T]"""
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return causal & same & (segment_ids > 0)[:, None, :]


def decoding_mask(valid: jax.Array, index: jax.Array, length: int) -> jax.Array:
    """`length` new tokens in the slots from `index` see every valid slot up to their own. # [B, S] -> bool [B, T, S]"""
    slots = jnp.arange(valid.shape[1])
    queries = index + jnp.arange(length)
    return valid[:, None, :] & (slots[None, :] <= queries[:, None])[None]


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


def implementation(compute: Compute, *, length: int, head_size: int) -> str:
    """What `compute.attention` means for rows of this length under the mesh in force: full, blockwise or splash."""
    if compute.attention != "auto":
        return compute.attention
    shards = shards_of("length")
    # On a ring the kernel sees half-pieces.
    if platform() == "tpu" and splash.supports(length // (2 * shards if shards > 1 else 1), head_size):
        return "splash"
    return "blockwise" if shards > 1 or length >= _LONG else "full"


def row_attention(
    segment_ids: jax.Array, *, head_size: int, compute: Compute
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Attention within the segments of these rows, as a function (query, key, value) -> [B, T, H, E]. # int32 [B, T]

    What all layers share, such as the mask, is computed here, once.
    """
    chosen = implementation(compute, length=segment_ids.shape[1], head_size=head_size)
    if chosen == "full":
        mask = training_mask(segment_ids)

        def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            query, key, value = _operands(query, key, value, compute.matmul_dtype)
            return checkpoint_name(attend(query, key, value, mask, dtype=compute.matmul_dtype), "attention")

        return attention
    if chosen == "blockwise":
        kernel = blockwise.kernel(compute.matmul_dtype)
    else:
        kernel = splash.kernel(compute.matmul_dtype, interpret=platform() != "tpu")

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        query, key, value = _operands(query * head_size**-0.5, key, value, compute.matmul_dtype)
        return sharded_attention(query, key, value, segment_ids, kernel=kernel, method=compute.sequence)

    return attention


def _operands(query, key, value, dtype):
    """Cast as the products will want them: what is saved or travels between devices then has half the bytes in bfloat16."""
    return (checkpoint_name(x.astype(dtype), name) for x, name in ((query, "query"), (key, "key"), (value, "value")))


def uses_ring(compute: Compute, *, length: int, head_size: int) -> bool:
    """Whether rows must be in `ring_order`."""
    chosen = implementation(compute, length=length, head_size=head_size)
    return chosen != "full" and compute.sequence == "ring" and shards_of("length") > 1
