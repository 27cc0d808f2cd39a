"""JAX's Pallas splash attention for TPUs, as the pair that `parallel.ring.Kernel` asks for.

The forward kernel gives the normaliser with its result; the backward kernels are called with the result and normaliser of
*all* keys, of which a ring step sees one block. JAX exports the pair only as one differentiable function, which would use
those of the block, so the backward pass is reached by its private name (the same in jax 0.10 and 0.12).
"""

import functools
import math

import jax
import jax.numpy as jnp

from llama_jax.parallel.ring import Kernel

# Queries and keys of a tile. 1024 x 1024 fits the on-chip memory of every TPU from v4 on and leaves few grid steps.
BLOCK = 1024


def supports(length: int, head_size: int) -> bool:
    """Whether the kernel's tiles divide a row (or a ring's half-piece) of this length."""
    return length % 128 == 0 and head_size % 64 == 0


@functools.cache
def kernel(dtype: jnp.dtype, *, interpret: bool = False) -> Kernel:
    """The kernel with operands of `dtype`. `interpret` runs it on any backend, slowly: for tests."""
    return Kernel(
        forward=functools.partial(_forward, dtype=dtype, interpret=interpret),
        backward=functools.partial(_backward, dtype=dtype, interpret=interpret),
    )


def _forward(query, key, value, query_segments, key_segments, *, causal, dtype, interpret):
    made, splash = _make(query.shape[1], query.shape[2], key.shape[2], causal=causal, interpret=interpret)

    def row(q, k, v, q_ids, k_ids):
        out, (normaliser,) = made(q, k, v, splash.SegmentIds(q=q_ids, kv=k_ids))
        return out.astype(jnp.float32), normaliser

    operands = (x.astype(dtype) for x in (query, key, value))
    with jax.named_scope(_scope(causal)):
        return jax.vmap(row)(*operands, query_segments, key_segments)


def _backward(query, key, value, query_segments, key_segments, out, normaliser, d_out, *, causal, dtype, interpret):
    made, splash = _make(query.shape[1], query.shape[2], key.shape[2], causal=causal, interpret=interpret)

    def row(q, k, v, q_ids, k_ids, out, normaliser, d_out):
        residuals = (
            q, k, v, splash.SegmentIds(q=q_ids, kv=k_ids), None, out, normaliser, made.dq_mask_info, made.dkv_mask_info,
        )  # fmt: skip
        settings = ("save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function",
                    "attn_logits_soft_cap", "interpret")  # fmt: skip
        gradients = splash._splash_attention_bwd(*(made.kwargs[name] for name in settings), residuals, d_out)
        return tuple(g.astype(jnp.float32) for g in gradients[3:6])

    operands = (x.astype(dtype) for x in (query, key, value))
    with jax.named_scope(_scope(causal)):
        return jax.vmap(row)(*operands, query_segments, key_segments, out, normaliser, d_out.astype(dtype))


def _scope(causal: bool) -> str:
    """A name for profiles, and for planning: from it follows how many of its tiles the kernel visits."""
    return "causal_tiles" if causal else "all_tiles"


def _make(heads, queries, keys, *, causal, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (queries, keys)
    mask = masks.MultiHeadMask([masks.CausalMask(shape) if causal else masks.FullMask(shape)] * heads)
    q, kv = tile(queries), tile(keys)
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=math.gcd(kv, 512),
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=math.gcd(kv, 512), block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    made = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, save_residuals=True, interpret=interpret
    )
    return made, splash


def tile(length: int) -> int:
    """The largest tile up to BLOCK of whole lanes that divides the length."""
    return next(tile for tile in range(min(BLOCK, length), 0, -128) if length % tile == 0)
