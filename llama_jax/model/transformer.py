"""The decoder: embedding, L pre-norm blocks under one scan, final norm (paper section 2.2).

    h = x + attention(norm(x));  x' = h + swiglu(norm(h))

This is training's path, on packed rows; `decode.py` runs the same block over a cache.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.model.attention import causal_attention
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import contract, materialise, rms_norm, rope_angles, rotate, swiglu
from llama_jax.model.params import Params
from llama_jax.parallel.axes import constrain

_REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def hidden_states(
    params: Params, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, *, config: ModelConfig, compute: Compute
) -> jax.Array:
    """The final normed states of packed rows. # int32 [B, T] x 3 -> [B, T, D]"""
    trunk = params["trunk"]
    angles = rope_angles(positions, config.head_size, theta=config.rope_theta)
    if compute.unroll:
        angles = materialise(angles)

    def block(x, layer):
        return _block(x, layer, segment_ids, angles, config=config, compute=compute), None

    policy = _REMAT[compute.remat]
    if policy is not None:
        block = jax.checkpoint(block, policy=policy)
    unroll = config.layers if compute.unroll else 1
    x, _ = jax.lax.scan(block, _embed(trunk, tokens, compute), trunk["layers"], unroll=unroll)
    return rms_norm(x, trunk["final_norm"], eps=config.norm_eps)


def _embed(trunk: Params, tokens: jax.Array, compute: Compute) -> jax.Array:
    with jax.named_scope("embedding"):
        x = jnp.take(trunk["embedding"], tokens, axis=0).astype(compute.activation_dtype)
        return constrain(x, "batch", "length", "act_width")


def _block(x, layer, segment_ids, angles, *, config: ModelConfig, compute: Compute):
    project = functools.partial(contract, "btd,dhe->bthe", dtype=compute.matmul_dtype)
    with jax.named_scope("attention"):
        normed = rms_norm(x, layer["attention_norm"], eps=config.norm_eps)
        query = rotate(project(normed, layer["query"]), angles)
        key = rotate(project(normed, layer["key"]), angles)
        value = project(normed, layer["value"])
        query = constrain(query, "batch", "length", "act_heads", None)
        key = constrain(key, "batch", "length", "act_kv_heads", None)
        value = constrain(value, "batch", "length", "act_kv_heads", None)
        heads = causal_attention(query, key, value, segment_ids, compute.matmul_dtype)
        x = x + contract("bthe,hed->btd", heads, layer["output"], compute.matmul_dtype).astype(x.dtype)
        x = constrain(x, "batch", "length", "act_width")
    with jax.named_scope("feed_forward"):
        normed = rms_norm(x, layer["ffn_norm"], eps=config.norm_eps)
        x = x + swiglu(normed, layer["gate"], layer["up"], layer["down"], dtype=compute.matmul_dtype).astype(x.dtype)
        x = constrain(x, "batch", "length", "act_width")
    return x
