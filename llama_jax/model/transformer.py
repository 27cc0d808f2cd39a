"""The decoder: embedding, L pre-norm blocks under one scan, final norm (paper section 2.2).

    h = x + attention(norm(x));  x' = h + swiglu(norm(h))

This is training's path, on packed rows; `decode.py` runs the same block over a cache.
"""

import functools

import jax

from llama_jax.model.attention import row_attention, uses_ring
from llama_jax.model.branches import branch_attention
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import compute_once, contract, materialise, rms_norm, rope_angles, rotate, swiglu
from llama_jax.model.lora import attach
from llama_jax.model.params import Params, table
from llama_jax.model.rope import sequence_lengths
from llama_jax.parallel.axes import constrain
from llama_jax.parallel.ring import ring_order
from llama_jax.parallel.vocabulary import look_up

# What the backward pass of a block finds saved, by the names given below and in attention.py; the block's input always is.
# Products are saved after their cast: the contraction itself gives float32, at twice the bytes. Those that write into the
# residual stream are not: what reads them is saved anyway, or costs one small product. Nor are values: that product is small
# too, and reads the normed states, which are computed again for the gradients of the weights.
_PROJECTIONS = ("query", "key", "gate", "up")
_REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(*_PROJECTIONS, "attention"),
    "queries": jax.checkpoint_policies.save_only_these_names("query", "key", "attention"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["attention"],
        names_which_can_be_offloaded=list(_PROJECTIONS),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def hidden_states(
    params: Params, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, *, config: ModelConfig, compute: Compute,
    branches: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The final normed states of packed rows; adapters, where `params` has some, apply. # int32 [B, T] x 3 -> [B, T, D]

    With `branches`, int32 [B, T], segments are trees (`branches.py`). That is for inference: no kernel or ring computes them.

    Ids are not checked, which a compiled program cannot do: one of V or more has NaN for an embedding on one device, and zeros
    on several.

    Raises:
      ValueError: the three have not one shape [B, T].
    """
    if tokens.ndim != 2 or not tokens.shape == segment_ids.shape == positions.shape:
        raise ValueError(
            f"expected tokens, segment_ids and positions of one shape [B, T]; got tokens {tokens.shape}, "
            f"segment_ids {segment_ids.shape}, positions {positions.shape}"
        )
    trunk, lora = params["trunk"], params.get("lora", {})
    ring = branches is None and uses_ring(compute, length=tokens.shape[1], head_size=config.head_size)
    if ring:  # the order of tokens matters to attention alone, so all blocks keep the ring's
        tokens, segment_ids, positions = map(ring_order, (tokens, segment_ids, positions))
    if branches is None:
        attention = row_attention(segment_ids, head_size=config.head_size, compute=compute)
    else:
        attention = branch_attention(segment_ids, branches, dtype=compute.matmul_dtype)
    angles = rope_angles(
        positions, config.head_size, theta=config.rope_theta, scaling=config.rope_scaling,
        lengths=sequence_lengths(segment_ids, positions, config.rope_scaling),
    )  # fmt: skip
    if compute.unroll:
        angles = materialise(angles)

    def block(x, layer):
        weights, adapters = layer
        weights = {name: constrain(weight, *axes[name]) for name, weight in weights.items()}
        layer = attach(weights, adapters, lora.get("scale"), axes)
        return _block(x, layer, attention, angles, config=config, compute=compute), None

    # Gradients take the layout of what they are gradients of: stated for each layer, they are reduced and scattered there,
    # rather than reduced whole on every device and cut when they are stacked.
    axes = {name: spec.axes[1:] for name, spec in table(config, head="lm_head")["trunk"]["layers"].items()}
    policy = _REMAT[compute.remat]
    if policy is not None:
        block = jax.checkpoint(block, policy=policy)
    unroll = config.layers if compute.unroll else 1
    layers = (trunk["layers"], lora.get("layers", {}))
    x, _ = jax.lax.scan(block, _embed(trunk, tokens, compute), layers, unroll=unroll)
    x = constrain(rms_norm(x, trunk["final_norm"], eps=config.norm_eps), "batch", "length", "act_width")
    return ring_order(x, back=True) if ring else x


def _embed(trunk: Params, tokens: jax.Array, compute: Compute) -> jax.Array:
    with jax.named_scope("embedding"):
        return look_up(trunk["embedding"], tokens, compute.activation_dtype)


def _block(x, layer, attention, angles, *, config: ModelConfig, compute: Compute):
    project = functools.partial(contract, "btd,dhe->bthe", dtype=compute.matmul_dtype)
    with jax.named_scope("attention"):
        normed = _normed(x, layer["attention_norm"], config)
        query = rotate(project(normed, layer["query"]), angles)
        key = rotate(project(normed, layer["key"]), angles)
        value = project(normed, layer["value"])
        query = constrain(query, "batch", "length", "act_heads", None)
        key = constrain(key, "batch", "length", "act_kv_heads", None)
        value = constrain(value, "batch", "length", "act_kv_heads", None)
        heads = constrain(attention(query, key, value), "batch", "length", "act_heads", None)
        x = _add(x, contract("bthe,hed->btd", heads, layer["output"], compute.matmul_dtype).astype(x.dtype))
    with jax.named_scope("feed_forward"):
        normed = _normed(x, layer["ffn_norm"], config)
        return _add(x, swiglu(normed, layer["gate"], layer["up"], layer["down"], dtype=compute.matmul_dtype).astype(x.dtype))


def _normed(x, weight, config: ModelConfig):
    """The input of a half-block's products, whole on every device that shares a piece of the residual stream."""
    return compute_once(constrain(rms_norm(x, weight, eps=config.norm_eps), "batch", "length", "act_width"))


def _add(x, update):
    """Adds a product to the residual stream. Its two layouts, one after the other, are what becomes one reduce-scatter."""
    for length in ("length", "residual"):
        update = constrain(update, "batch", length, "act_width")
    return constrain(x + update, "batch", "residual", "act_width")
