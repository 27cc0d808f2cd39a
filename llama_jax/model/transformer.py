"""The decoder: embedding, L pre-norm blocks under one scan, final norm (paper section 2.2).

    h = x + attention(norm(x));  x' = h + swiglu(norm(h))

`hidden_states` serves training on packed rows, `extend` serves generation with a cache. Both run the same block.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.model.attention import attend, decoding_mask, row_attention, uses_ring
from llama_jax.model.cache import KVCache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import contract, rms_norm, rope_angles, rotate, swiglu
from llama_jax.model.params import Params
from llama_jax.parallel.axes import constrain
from llama_jax.parallel.ring import ring_order

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
    ring = uses_ring(compute, length=tokens.shape[1], head_size=config.head_size)
    if ring:  # the order of tokens matters to attention alone, so all blocks keep the ring's
        tokens, segment_ids, positions = map(ring_order, (tokens, segment_ids, positions))
    attention = row_attention(segment_ids, head_size=config.head_size, compute=compute)
    angles = rope_angles(positions, config.head_size, theta=config.rope_theta)

    def block(x, layer):
        x, _ = _block(x, layer, attention, angles, cache=None, config=config, compute=compute)
        return x, None

    policy = _REMAT[compute.remat]
    if policy is not None:
        block = jax.checkpoint(block, policy=policy)
    unroll = config.layers if compute.unroll else 1
    x, _ = jax.lax.scan(block, _embed(trunk, tokens, compute), trunk["layers"], unroll=unroll)
    x = ring_order(x, back=True) if ring else x
    return rms_norm(x, trunk["final_norm"], eps=config.norm_eps)


def extend(
    params: Params, tokens: jax.Array, valid: jax.Array, positions: jax.Array, cache: KVCache, *, config: ModelConfig,
    compute: Compute,
) -> tuple[jax.Array, KVCache]:  # fmt: skip
    """Appends T tokens to every row of the cache. # int32 [B, T], bool [B, T], int32 [B, T] -> [B, T, D]

    Left padding (valid False) occupies slots that nothing will see.
    """
    trunk = params["trunk"]
    valid = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.index))
    mask = decoding_mask(valid, cache.index, tokens.shape[1])
    # Attention to a cache reads far more than it computes: converting the cache would cost more than it saves.
    attention = functools.partial(attend, mask=mask, dtype=compute.activation_dtype)
    angles = rope_angles(positions, config.head_size, theta=config.rope_theta)

    def block(x, layer_and_cache):
        layer, keys, values = layer_and_cache
        return _block(x, layer, attention, angles, cache=(keys, values, cache.index), config=config, compute=compute)

    x = _embed(trunk, tokens, compute)
    x, (keys, values) = jax.lax.scan(block, x, (trunk["layers"], cache.keys, cache.values))
    cache = KVCache(keys=keys, values=values, valid=valid, index=cache.index + tokens.shape[1])
    return rms_norm(x, trunk["final_norm"], eps=config.norm_eps), cache


def _embed(trunk: Params, tokens: jax.Array, compute: Compute) -> jax.Array:
    with jax.named_scope("embedding"):
        x = jnp.take(trunk["embedding"], tokens, axis=0).astype(compute.activation_dtype)
        return constrain(x, "batch", "length", "act_width")


def _block(x, layer, attention, angles, *, cache, config: ModelConfig, compute: Compute):
    """One block; with a cache (keys, values, index) of this layer, also returns the new keys and values."""
    project = functools.partial(contract, "btd,dhe->bthe", dtype=compute.matmul_dtype)
    with jax.named_scope("attention"):
        normed = rms_norm(x, layer["attention_norm"], eps=config.norm_eps)
        query = rotate(project(normed, layer["query"]), angles)
        key = rotate(project(normed, layer["key"]), angles)
        value = project(normed, layer["value"])
        query = constrain(query, "batch", "length", "act_heads", None)
        key = constrain(key, "batch", "length", "act_kv_heads", None)
        value = constrain(value, "batch", "length", "act_kv_heads", None)
        if cache is not None:
            keys, values, index = cache
            key = jax.lax.dynamic_update_slice(keys, key.astype(keys.dtype), (0, index, 0, 0))
            value = jax.lax.dynamic_update_slice(values, value.astype(values.dtype), (0, index, 0, 0))
        heads = attention(query, key, value)
        x = x + contract("bthe,hed->btd", heads, layer["output"], compute.matmul_dtype).astype(x.dtype)
        x = constrain(x, "batch", "length", "act_width")
    with jax.named_scope("feed_forward"):
        normed = rms_norm(x, layer["ffn_norm"], eps=config.norm_eps)
        x = x + swiglu(normed, layer["gate"], layer["up"], layer["down"], dtype=compute.matmul_dtype).astype(x.dtype)
        x = constrain(x, "batch", "length", "act_width")
    return x, None if cache is None else (key, value)
