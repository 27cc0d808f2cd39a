"""The key-value cache of generation."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.model import paged
from llama_jax.model.config import ModelConfig
from llama_jax.model.int8 import quantise
from llama_jax.parallel.axes import constrain, per_device
from llama_jax.parallel.mesh import platform


@flax.struct.dataclass
class LayerCache:
    """One layer's keys and values of S slots a row, stored as the two contractions of attention read them.

    On a CPU that makes attention eight times as fast as a common layout would.
    """

    keys: jax.Array  # [B, K, E, S], or [B, K, S, E] if `lengthwise`
    values: jax.Array  # [B, K, S, E]
    key_scales: jax.Array | None = None  # [B, K, S] float32, where keys and values are int8
    value_scales: jax.Array | None = None
    lengthwise: bool = flax.struct.field(pytree_node=False, default=False)  # as the TPU's kernel reads keys

    @property
    def key_axis(self) -> int:
        """Along which axis of `keys` the slots lie."""
        return 2 if self.lengthwise else 3

    def store(self, key: jax.Array, value: jax.Array, put: Callable[[jax.Array, jax.Array, int], jax.Array]) -> "LayerCache":
        """With new keys and values in it. # [B, T, K, E] x 2

        `put(slots, new, axis)` writes the tokens of `new`, its axis 1, along `axis` of the slots.
        """
        if self.key_scales is None:
            new = self.replace(
                keys=put(self.keys, key.astype(self.keys.dtype), self.key_axis),
                values=put(self.values, value.astype(self.values.dtype), 2),
            )
        else:
            k, v = quantise(key, -1), quantise(value, -1)
            new = LayerCache(
                keys=put(self.keys, k.values, 3), values=put(self.values, v.values, 2),
                key_scales=put(self.key_scales, k.scales[..., 0], 2), value_scales=put(self.value_scales, v.scales[..., 0], 2),
            )  # fmt: skip
        return jax.tree.map(lambda x: constrain(x, "cache_rows", "act_kv_heads", *[None] * (x.ndim - 2)), new)


@flax.struct.dataclass
class KVCache:
    """The cache of all layers, one array each, so that a step writes into it where it lies.

    The token at position t stands in slot t, whatever the other rows hold.
    """

    layers: tuple[LayerCache, ...]  # L
    lengths: jax.Array  # [B] int32: the slots in use

    @property
    def slots(self) -> int:
        """S: how many tokens a row can hold."""
        return self.layers[0].values.shape[2]


def write_token(slots: jax.Array, new: jax.Array, targets: jax.Array, axis: int) -> jax.Array:
    """Writes one key or value a row into slot `targets` along `axis`; a target outside is dropped. # [B, K, ...] x 2, [B]

    Head by head, by one scatter over all of them. On a TPU, left to write all heads of a token at once, the compiler lays the
    cache out with the heads beside each other, and copies all of it into the kernel's layout at every step (compiled for v5e).
    On a CPU, a scatter of a single row becomes two updates, before each of which the cache is copied: a seventh of the time
    that SmolLM2 takes for a token.
    """
    heads = ("cache_rows", "act_kv_heads")
    rest = [None] * (slots.ndim - 2)
    return per_device(
        functools.partial(_write_token, axis=axis), (slots, new.astype(slots.dtype), targets),
        ((*heads, *rest), (*heads, *rest[1:]), ("cache_rows",)), (*heads, *rest),
    )  # fmt: skip


def _write_token(slots, new, targets, *, axis):
    B, K, *rest = slots.shape
    index = (jnp.arange(B * K), *[slice(None)] * (axis - 2), jnp.repeat(targets, K))
    flat = slots.reshape(B * K, *rest).at[index].set(new.reshape(B * K, *new.shape[2:]), mode="drop")
    return flat.reshape(slots.shape)


def empty_cache(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache without content; with dtype int8, keys and values have scales.

    Raises:
      ValueError: more slots than the old context of a model with `dynamic` rotary scaling. Beyond it every further token
        turns all keys anew, and what the layers made of them: no cache gives what a forward pass of the whole row does.
    """
    B, K, E, S = batch, config.kv_heads, config.head_size, slots
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and config.max_length > scaling.original_length:
        raise ValueError(
            f"model {config.name}: its rotary positions are scaled by length (dynamic) beyond {scaling.original_length} "
            f"tokens, which generation cannot follow: expected a max_length of at most that, got {config.max_length}"
        )
    lengthwise = platform() == "tpu" and dtype == jnp.bfloat16 and paged.supports(paged.PAGE, E)

    def scales():
        return jnp.zeros((B, K, S), jnp.float32) if dtype == jnp.int8 else None

    return KVCache(
        layers=tuple(
            LayerCache(
                jnp.zeros((B, K, S, E) if lengthwise else (B, K, E, S), dtype), jnp.zeros((B, K, S, E), dtype), scales(),
                scales(), lengthwise,
            )
            for _ in range(config.layers)
        ),
        lengths=jnp.zeros((B,), jnp.int32),
    )
