"""The decoder as generation runs it: the same block as training's, over a cache, with weights laid out for reading.

Training scans over stacked layers. Generation reads every weight once a token, and slicing a layer out of the stack would
copy it first; so `prepare` cuts the stack once, and the layers are unrolled.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.model.attention import causal_attention
from llama_jax.model.cache import KVCache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode_attention import attend_cached
from llama_jax.model.layers import contract, materialise, rms_norm, rope_angles, rotate, swiglu
from llama_jax.model.params import Params, Specs
from llama_jax.parallel.axes import DECODE, constrain, is_spec, partition
from llama_jax.parallel.vocabulary import look_up

Prepared = dict[str, Any]  # {"embedding", "layers": L x {...}, "final_norm", and "lm_head" unless it is the embedding}


def prepare(params: Params, specs: Specs, *, compute: Compute) -> Prepared:
    """The parameters as generation reads them: in the matmul type, gathered over fsdp, split over tensor, layer by layer."""
    mesh = jax.sharding.get_abstract_mesh()

    def place(spec, x):
        # A stack of vectors holds the weights of norms; they stay as they are.
        if len([axis for axis in spec.axes if axis != "layers"]) > 1:
            x = x.astype(compute.matmul_dtype)
        if mesh.empty or mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, partition(spec.shape, spec.axes, DECODE, mesh))

    placed = jax.tree.map(place, specs, {name: params[name] for name in specs}, is_leaf=is_spec)
    trunk = placed["trunk"]
    layers = len(trunk["layers"]["query"])
    cut = tuple({name: stack[layer] for name, stack in trunk["layers"].items()} for layer in range(layers))
    prepared = {"embedding": trunk["embedding"], "layers": cut, "final_norm": trunk["final_norm"]}
    return {**prepared, "lm_head": placed["lm_head"]["kernel"]} if "lm_head" in placed else prepared


def prefill(
    weights: Prepared, tokens: jax.Array, lengths: jax.Array, cache: KVCache, *, config: ModelConfig, compute: Compute
) -> tuple[jax.Array, KVCache]:
    """Fills an empty cache with rows of T tokens of which the first `lengths` are real. # int32 [B, T], [B] -> [B, T, D]"""
    B, T = tokens.shape
    steps = jnp.arange(T)
    segment_ids = (steps < lengths[:, None]).astype(jnp.int32)

    def attend(query, key, value, keys, values):
        # What lies behind a row's length is written over later, and never seen.
        keys = jax.lax.dynamic_update_slice_in_dim(keys, jnp.einsum("btke->bket", key), 0, axis=3)
        values = jax.lax.dynamic_update_slice_in_dim(values, jnp.einsum("btke->bkte", value), 0, axis=2)
        return causal_attention(query, key, value, segment_ids, compute.matmul_dtype), keys, values

    x, cache = _layers(
        weights, tokens, jnp.broadcast_to(steps, (B, T)), cache, attend, config=config, compute=compute
    )
    return x, cache.replace(lengths=lengths)


def extend(
    weights: Prepared, tokens: jax.Array, counts: jax.Array, cache: KVCache, *, config: ModelConfig, compute: Compute,
    rows: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:  # fmt: skip
    """Appends tokens to the cache.

    Args:
      tokens: T new ones for each of B rows. # int32 [B, T]
      counts: how many of them are real. # int32 [B]
      rows: which rows of the cache they belong to; without it, all in order. Rows outside the cache are dropped. # int32 [B]

    Returns:
      the final normed states [B, T, D], and the cache.
    """
    steps = jnp.arange(tokens.shape[1])
    lengths = cache.lengths if rows is None else cache.lengths[rows]
    positions = lengths[:, None] + steps
    # Slots outside the cache are dropped, and so are tokens that do not count.
    targets = jnp.where(steps < counts[:, None], positions, cache.slots)
    limit = jnp.max(lengths + counts)

    def attend(query, key, value, keys, values):
        if rows is None:  # each row into its own: no device needs to look at another's rows
            keys = jax.vmap(lambda slots, new, at: slots.at[:, :, at].set(new, mode="drop"))(
                keys, jnp.einsum("btke->bket", key), targets
            )
            values = jax.vmap(lambda slots, new, at: slots.at[:, at].set(new, mode="drop"))(
                values, jnp.einsum("btke->bkte", value), targets
            )
            seen = keys, values
        else:
            keys = keys.at[rows[:, None], :, :, targets].set(key, mode="drop")
            values = values.at[rows[:, None], :, targets].set(value, mode="drop")
            seen = keys[rows], values[rows]
        # Attention reads far more than it computes: converting the cache would cost more than it saves.
        return attend_cached(query, *seen, positions, limit, dtype=compute.activation_dtype), keys, values

    x, cache = _layers(weights, tokens, positions, cache, attend, config=config, compute=compute)
    if rows is None:
        return x, cache.replace(lengths=lengths + counts)
    return x, cache.replace(lengths=cache.lengths.at[rows].set(lengths + counts, mode="drop"))


def logits(weights: Prepared, hidden: jax.Array, *, compute: Compute) -> jax.Array:
    """Next-token logits. # [B, D] -> float32 [B, V]"""
    with jax.named_scope("lm_head"):
        if "lm_head" in weights:
            out = contract("bd,dv->bv", hidden, weights["lm_head"], compute.matmul_dtype)
        else:
            out = contract("bd,vd->bv", hidden, weights["embedding"], compute.matmul_dtype)
        return constrain(out, "batch", "act_vocab")


def _layers(weights, tokens, positions, cache, attend, *, config: ModelConfig, compute: Compute):
    """All blocks and the final norm. `attend(query, key, value, keys, values)` gives the heads' results and the layer's slots
    with the new keys and values in them."""
    angles = materialise(rope_angles(positions, config.head_size, theta=config.rope_theta))
    with jax.named_scope("embedding"):
        x = look_up(weights["embedding"], tokens, compute.activation_dtype)
    keys, values = [], []
    for layer, *slots in zip(weights["layers"], cache.keys, cache.values):
        x, layer_keys, layer_values = _block(x, layer, angles, slots, attend, config=config, compute=compute)
        keys.append(layer_keys)
        values.append(layer_values)
    x = rms_norm(x, weights["final_norm"], eps=config.norm_eps)
    return x, cache.replace(keys=tuple(keys), values=tuple(values))


def _block(x, layer, angles, slots, attend, *, config: ModelConfig, compute: Compute):
    keys, values = slots
    project = functools.partial(contract, "btd,dhe->bthe", dtype=compute.matmul_dtype)
    with jax.named_scope("attention"):
        normed = rms_norm(x, layer["attention_norm"], eps=config.norm_eps)
        query = rotate(project(normed, layer["query"]), angles)
        key = rotate(project(normed, layer["key"]), angles)
        value = project(normed, layer["value"])
        query = constrain(query, "batch", "length", "act_heads", None)
        key = constrain(key, "batch", "length", "act_kv_heads", None).astype(keys.dtype)
        value = constrain(value, "batch", "length", "act_kv_heads", None).astype(values.dtype)
        heads, keys, values = attend(query, key, value, keys, values)
        keys = constrain(keys, "cache_rows", "act_kv_heads", None, None)
        values = constrain(values, "cache_rows", "act_kv_heads", None, None)
        x = x + contract("bthe,hed->btd", heads, layer["output"], compute.matmul_dtype).astype(x.dtype)
        x = constrain(x, "batch", "length", "act_width")
    with jax.named_scope("feed_forward"):
        normed = rms_norm(x, layer["ffn_norm"], eps=config.norm_eps)
        x = x + swiglu(normed, layer["gate"], layer["up"], layer["down"], dtype=compute.matmul_dtype).astype(x.dtype)
        x = constrain(x, "batch", "length", "act_width")
    return x, keys, values
