"""Attention weights of a real model, to be looked at (Fig. 10): the blocks of `transformer.py`, which here keep them.

For one dialog or a few: what training never holds, [B, H, T, S] a layer, is computed here and reduced layer by layer.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llama_jax.model.attention import attend, training_mask
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import contract, rope_angles
from llama_jax.model.params import Params
from llama_jax.model.rope import sequence_lengths
from llama_jax.model.transformer import _block, _embed
from llama_jax.parallel.axes import ENTER, constrain, layout


def attention_weights(
    params: Params, tokens: jax.Array, segment_ids: jax.Array, *, config: ModelConfig, compute: Compute
) -> jax.Array:
    """The softmax weights of every layer and head, float32; padding has none. # int32 [B, T] x 2 -> [L, B, H, T, S]"""
    mask, angles = _mask_and_angles(segment_ids, config)

    def layer(x, weights):
        return _recording_block(x, weights, mask, angles, config=config, compute=compute)

    with layout(ENTER):  # a row or a few, which devices cannot share
        return jax.lax.scan(layer, _embed(params["trunk"], tokens, compute), params["trunk"]["layers"])[1]


def largest_attention(
    params: Params, tokens: jax.Array, segment_ids: jax.Array, *, config: ModelConfig, compute: Compute,
    layers: Sequence[int] | None = None, heads: Sequence[int] | None = None,
) -> jax.Array:  # fmt: skip
    """For each query and key the largest weight of all layers and heads, as in Fig. 10. # int32 [B, T] x 2 -> [B, T, S]

    Args:
      layers, heads: those that are looked at; default: all. The others are computed, and not looked at.
    """
    for name, chosen, count in (("layers", layers, config.layers), ("heads", heads, config.heads)):
        wrong = [n for n in chosen or () if not 0 <= n < count]
        if wrong or (chosen is not None and not len(chosen)):
            raise ValueError(f"{name}: expected numbers from 0 to {count - 1}, got {wrong or 'none'}")
    looked_at = jnp.isin(jnp.arange(config.layers), jnp.array(range(config.layers) if layers is None else layers))
    mask, angles = _mask_and_angles(segment_ids, config)

    def layer(carry, inputs):
        x, largest = carry
        weights, wanted = inputs
        x, found = _recording_block(x, weights, mask, angles, config=config, compute=compute)
        found = found if heads is None else found[:, jnp.array(heads)]
        return (x, jnp.where(wanted, jnp.maximum(largest, jnp.max(found, axis=1)), largest)), None

    with layout(ENTER):  # a row or a few, which devices cannot share
        start = (_embed(params["trunk"], tokens, compute), jnp.zeros(mask.shape, jnp.float32))
        largest = jax.lax.scan(layer, start, (params["trunk"]["layers"], looked_at))[0][1]
        return constrain(largest, None, None, None)  # every host looks at it


def _mask_and_angles(segment_ids: jax.Array, config: ModelConfig):
    positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)  # one segment a row
    angles = rope_angles(
        positions, config.head_size, theta=config.rope_theta, scaling=config.rope_scaling,
        lengths=sequence_lengths(segment_ids, positions, config.rope_scaling),
    )  # fmt: skip
    return training_mask(segment_ids), angles


def _recording_block(x, layer, mask, angles, *, config: ModelConfig, compute: Compute):
    """A block of the model, and the weights that its attention used. # [B, T, D] -> [B, T, D], [B, H, T, S]"""
    kept = []

    def attention(query, key, value):
        B, T, H, E = query.shape
        K = key.shape[2]
        scores = contract("btkge,bske->bkgts", query.reshape(B, T, K, H // K, E), key, compute.matmul_dtype) * E**-0.5
        seen = mask[:, None, None]
        weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), 0.0)  # none is NaN
        kept.append(weights.reshape(B, H, T, T))
        return attend(query, key, value, mask, dtype=compute.matmul_dtype)

    return _block(x, layer, attention, angles, config=config, compute=compute), kept[0]
