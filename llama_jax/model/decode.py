"""The decoder as generation runs it: the same block as training's, over a cache, with weights laid out for reading.

Training scans over stacked layers. Generation reads every weight once a token, and slicing a layer out of the stack would
copy it first; so `prepare` cuts the stack once, and the layers are unrolled. The three matrices that make queries, keys and
values become one, which is read in one go: each of them is too small to keep the memory busy. The two that write into the
residual stream are turned: their outputs are fewer than their inputs, and XLA's CPU backend multiplies a row with such a matrix
in half the time if what makes an output lies together.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from llama_jax.model.attention import of_any_length, row_attention
from llama_jax.model.cache import KVCache, write_token
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode_attention import attend_cached
from llama_jax.model.int8 import Int8, product, quantise
from llama_jax.model.layers import materialise, rms_norm, rope_angles, rotate
from llama_jax.model.lora import merged
from llama_jax.model.params import Params, Specs, table
from llama_jax.parallel.axes import DECODE, constrain, is_spec, layout, partition, shards_of
from llama_jax.parallel.vocabulary import look_up

_LAYERS = "trunk/layers/"
_QKV = ("query", "key", "value")
_OUTWARD = {"output": "heads", "down": "ffn"}  # and the logical axis of what they sum over
Prepared = dict[str, Any]  # {"embedding", "layers": L x {...}, "final_norm", and "lm_head" unless it is the embedding}


# Of which axes each matrix's outputs are sums; those share a scale in 8 bits.
_SUMMED = {
    "query": (0,), "key": (0,), "value": (0,), "output": (0, 1), "gate": (0,), "up": (0,), "down": (0,), "kernel": (0,),
    "embedding": (1,),
}  # fmt: skip


@functools.lru_cache(maxsize=8)
def preparer(config: ModelConfig, compute: Compute, *, int8: bool = False) -> Callable[[Params], Prepared]:
    """`prepare` for a language model, compiled once."""
    specs = table(config, head="lm_head")
    return jax.jit(lambda params: prepare(params, specs, compute=compute, int8=int8))


def prepare(params: Params, specs: Specs, *, compute: Compute, int8: bool = False) -> Prepared:
    """The parameters as generation reads them: in the matmul type, gathered over fsdp, split over tensor, layer by layer.

    Adapters are merged into their matrices. With `int8`, matrices are rounded to 8 bits (`model.int8`). Where the parameters
    are not needed beside them, `interop.load.load_prepared` reads the same from a checkpoint, which takes half the memory.
    """
    params = merged(params)
    mesh = jax.sharding.get_abstract_mesh()

    def place(spec, x):
        # A stack of vectors holds the weights of norms; they stay as they are.
        if len([axis for axis in spec.axes if axis != "layers"]) > 1 and not int8:
            x = x.astype(compute.matmul_dtype)
        if mesh.empty or mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, partition(spec.shape, spec.axes, DECODE, mesh))

    def cut(path, x):
        pack = functools.partial(eight_bits, path) if int8 else lambda x: x
        return [pack(x[layer]) for layer in range(len(x))] if path.startswith(_LAYERS) else pack(x)

    placed = jax.tree.map(place, specs, {name: params[name] for name in specs}, is_leaf=is_spec)
    return arrange({path: cut(path, x) for path, x in traverse_util.flatten_dict(placed, sep="/").items()})


def eight_bits(path: str, x: jax.Array) -> jax.Array | Int8:
    """A parameter (of one layer) in 8 bits if it is a matrix, else as it is; `path` is its place in the table."""
    name = path.rsplit("/", 1)[-1]
    return quantise(x, _SUMMED[name]) if name in _SUMMED else x


def arrange(leaves: dict[str, Any]) -> Prepared:
    """The weights by their paths in the table, those of the layers as a list of L, in the order in which they are read.

    The lists are emptied on the way: at no time does more than one layer exist in both arrangements.
    """
    stacks = {path.removeprefix(_LAYERS): rows for path, rows in leaves.items() if path.startswith(_LAYERS)}
    layers = tuple(_for_reading({name: rows.pop(0) for name, rows in stacks.items()}) for _ in range(len(stacks["query"])))
    prepared = {"embedding": leaves["trunk/embedding"], "layers": layers, "final_norm": leaves["trunk/final_norm"]}
    return {**prepared, "lm_head": leaves["lm_head/kernel"]} if "lm_head/kernel" in leaves else prepared


def _for_reading(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer with queries, keys and values as one matrix of K groups: the queries of a key head, its key, its value; and with
    the outward matrices turned. # qkv [D, K * (H / K + 2) * E], output [D, H * E], down [D, F]

    Groups are what `tensor` divides. Where it is wider than there are key heads, which then lie on several devices (section
    A.2.1), the three stay apart.
    """
    key = layer["key"].values if isinstance(layer["key"], Int8) else layer["key"]
    with layout(DECODE):
        turned = {name: jax.tree.map(functools.partial(_turned, axis=axis), layer[name]) for name, axis in _OUTWARD.items()}
        if key.shape[1] % shards_of("kv_heads"):
            return layer | turned
        qkv = jax.tree.map(_join, *(layer[name] for name in _QKV))
    return {name: x for name, x in layer.items() if name not in _QKV} | turned | {"qkv": qkv}


@jax.jit
def _join(query, key, value):
    D, K, E = key.shape
    groups = jnp.concatenate([query.reshape(len(query), K, -1, E), key[:, :, None], value[:, :, None]], axis=2)
    return constrain(groups.reshape(len(query), -1), "width", "kv_heads")


@functools.partial(jax.jit, static_argnames="axis")
def _turned(x, *, axis):
    turned = x.reshape(-1, x.shape[-1]).T
    return constrain(turned, "width", axis if turned.shape[1] > 1 else None)  # of scales there is one for each output


def axes_of(prepared: Prepared, specs: Specs) -> Prepared:
    """The logical axes of each prepared weight, in a tree of the same form, for weights that are not in 8 bits."""
    own = {name: spec.axes[1:] for name, spec in specs["trunk"]["layers"].items()}
    own |= {name: ("width", axis) for name, axis in {"qkv": "kv_heads", **_OUTWARD}.items()}
    axes = {name: specs["trunk"][name].axes for name in ("embedding", "final_norm")}
    axes["layers"] = tuple({name: own[name] for name in layer} for layer in prepared["layers"])
    return {**axes, "lm_head": specs["lm_head"]["kernel"].axes} if "lm_head" in prepared else axes


def prefill(
    weights: Prepared, tokens: jax.Array, lengths: jax.Array, cache: KVCache, *, config: ModelConfig, compute: Compute
) -> tuple[jax.Array, KVCache]:
    """Fills an empty cache with rows of T tokens of which the first `lengths` are real. # int32 [B, T], [B] -> [B, T, D]"""
    B, T = tokens.shape
    steps = jnp.arange(T)
    segment_ids = (steps < lengths[:, None]).astype(jnp.int32)
    attention = _any_rows(segment_ids, config, compute)

    def attend(query, key, value, layer):
        # What lies behind a row's length is written over later, and never seen.
        layer = layer.store(
            key, value, lambda slots, new, axis: jax.lax.dynamic_update_slice_in_dim(slots, jnp.moveaxis(new, 1, axis), 0, axis)
        )
        return attention(query, key, value), layer

    x, cache = blocks(
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
    # What has no new token attends to nothing: its row may be long, and what is drawn for others would wait for it.
    positions = jnp.where(counts > 0, lengths, 0)[:, None] + steps
    # Slots outside the cache are dropped, and so are tokens that do not count.
    targets = jnp.where(steps < counts[:, None], positions, cache.slots)
    limit = jnp.max(positions[:, 0] + counts)

    def put(slots, new, axis):
        if rows is None and new.shape[1] == 1:
            return write_token(slots, new[:, 0], targets[:, 0], axis)
        if rows is None:  # each row into its own: no device needs to look at another's rows
            at = (slice(None),) * (axis - 1)
            return jax.vmap(
                lambda slots, new, targets: slots.at[(*at, targets)].set(jnp.moveaxis(new, 0, axis - 1), mode="drop")
            )(slots, new, targets)
        return slots.at[(rows[:, None], *[slice(None)] * (axis - 1), targets)].set(new, mode="drop")

    def attend(query, key, value, layer):
        layer = layer.store(key, value, put)
        seen = layer if rows is None else jax.tree.map(lambda x: x[rows], layer)
        # Attention reads far more than it computes: converting the cache would cost more than it saves.
        return attend_cached(query, seen, positions, limit, dtype=compute.activation_dtype), layer

    x, cache = blocks(weights, tokens, positions, cache, attend, config=config, compute=compute)
    if rows is None:
        return x, cache.replace(lengths=lengths + counts)
    return x, cache.replace(lengths=cache.lengths.at[rows].set(lengths + counts, mode="drop"))


def row_logits(weights: Prepared, tokens: jax.Array, *, config: ModelConfig, compute: Compute) -> jax.Array:
    """Next-token logits of full rows; no cache is made. # int32 [B, T] -> float32 [B, T, V]"""
    B, T = tokens.shape
    x = row_states(weights, tokens, config=config, compute=compute)
    return logits(weights, x.reshape(B * T, -1), compute=compute).reshape(B, T, -1)


def row_states(
    weights: Prepared, tokens: jax.Array, *, config: ModelConfig, compute: Compute, lengths: jax.Array | int | None = None
) -> jax.Array:
    """The final normed states of full rows; no cache is made. # int32 [B, T] -> [B, T, D]

    `lengths`, of rows that are filled up behind their ends, are those without the filling. # int32 [B]
    """
    B, T = tokens.shape
    lengths = jnp.broadcast_to(jnp.asarray(T if lengths is None else lengths, jnp.int32).reshape(-1, 1), (B, T))
    attention = _any_rows(jnp.ones_like(tokens), config, compute)
    no_cache = KVCache(layers=(None,) * config.layers, lengths=jnp.zeros((B,), jnp.int32))
    return blocks(
        weights, tokens, jnp.broadcast_to(jnp.arange(T), (B, T)), no_cache,
        lambda query, key, value, layer: (attention(query, key, value), layer), config=config, compute=compute,
        lengths=lengths,
    )[0]  # fmt: skip


def _any_rows(segment_ids: jax.Array, config: ModelConfig, compute: Compute) -> Callable[..., jax.Array]:
    """Training's attention, for rows of lengths that are none of training's."""
    size = config.head_size
    return row_attention(
        segment_ids, head_size=size, compute=of_any_length(compute, length=segment_ids.shape[1], head_size=size)
    )


def logits(weights: Prepared, hidden: jax.Array, *, compute: Compute) -> jax.Array:
    """Next-token logits. # [B, D] -> float32 [B, V]"""
    with jax.named_scope("lm_head"):
        if "lm_head" in weights:
            out = product("bd,dv->bv", hidden, weights["lm_head"], compute.matmul_dtype)
        else:
            out = product("bd,vd->bv", hidden, weights["embedding"], compute.matmul_dtype)
        return constrain(out, "batch", "act_vocab")


def blocks(weights, tokens, positions, cache, attend, *, config: ModelConfig, compute: Compute, lengths=None):
    """All blocks and the final norm. `attend(query, key, value, layer)` gives the heads' results and the layer's cache with the
    new keys and values in it. `lengths` are those of the whole sequences, where they are known (see `rope_angles`)."""
    angles = materialise(
        rope_angles(
            positions, config.head_size, theta=config.rope_theta, scaling=config.rope_scaling, lengths=lengths
        )
    )
    with jax.named_scope("embedding"):
        embedding = weights["embedding"]
        if isinstance(embedding, Int8):
            x = look_up(embedding.values, tokens, jnp.float32) * look_up(embedding.scales, tokens, jnp.float32)
            x = x.astype(compute.activation_dtype)
        else:
            x = look_up(embedding, tokens, compute.activation_dtype)
    layers = []
    for matrices, layer in zip(weights["layers"], cache.layers):
        x, layer = _block(x, matrices, angles, layer, attend, config=config, compute=compute)
        layers.append(layer)
    x = rms_norm(x, weights["final_norm"], eps=config.norm_eps)
    return x, cache.replace(layers=tuple(layers))


def _block(x, matrices, angles, layer, attend, *, config: ModelConfig, compute: Compute):
    multiply = functools.partial(product, dtype=compute.matmul_dtype)
    with jax.named_scope("attention"):
        normed = rms_norm(x, matrices["attention_norm"], eps=config.norm_eps)
        query, key, value = _heads(normed, matrices, config, multiply)
        query, key = rotate(query, angles), rotate(key, angles)
        query = constrain(query, "batch", "length", "act_heads", None)
        key = constrain(key, "batch", "length", "act_kv_heads", None).astype(x.dtype)
        value = constrain(value, "batch", "length", "act_kv_heads", None).astype(x.dtype)
        heads, layer = attend(query, key, value, layer)
        x = x + multiply("bti,di->btd", heads.reshape(*x.shape[:2], -1), matrices["output"]).astype(x.dtype)
        x = constrain(x, "batch", "length", "act_width")
    with jax.named_scope("feed_forward"):
        normed = rms_norm(x, matrices["ffn_norm"], eps=config.norm_eps)
        gated = jax.nn.silu(multiply("btd,df->btf", normed, matrices["gate"]).astype(x.dtype))
        hidden = gated * multiply("btd,df->btf", normed, matrices["up"]).astype(x.dtype)
        hidden = constrain(hidden, "batch", "length", "act_ffn")
        x = x + multiply("btf,df->btd", hidden, matrices["down"]).astype(x.dtype)
        x = constrain(x, "batch", "length", "act_width")
    return x, layer


def _heads(x, matrices, config: ModelConfig, multiply):
    """Queries, keys and values, not yet turned. # [B, T, D] -> float32 [B, T, H, E], [B, T, K, E] x 2"""
    if "qkv" not in matrices:
        return (multiply("btd,dhe->bthe", x, matrices[name]) for name in _QKV)
    B, T, _ = x.shape
    groups = multiply("btd,di->bti", x, matrices["qkv"]).reshape(B, T, config.kv_heads, -1, config.head_size)
    queries, key, value = groups[..., :-2, :], groups[..., -2, :], groups[..., -1, :]
    return queries.reshape(B, T, config.heads, config.head_size), key, value
