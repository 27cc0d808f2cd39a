"""The key-value cache of generation."""

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.model.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of S slots a row. The token at position t stands in slot t, whatever the other rows hold.

    One array a layer, so that a step writes into it where it lies. Keys and values are stored as the two contractions of
    attention read them, which on a CPU makes those eight times as fast as a common layout.
    """

    keys: tuple[jax.Array, ...]  # L x [B, K, E, S]
    values: tuple[jax.Array, ...]  # L x [B, K, S, E]
    lengths: jax.Array  # [B] int32: the slots in use

    @property
    def slots(self) -> int:
        """S: how many tokens a row can hold."""
        return self.keys[0].shape[-1]


def empty_cache(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache without content."""
    B, K, E = batch, config.kv_heads, config.head_size
    return KVCache(
        keys=tuple(jnp.zeros((B, K, E, slots), dtype) for _ in range(config.layers)),
        values=tuple(jnp.zeros((B, K, slots, E), dtype) for _ in range(config.layers)),
        lengths=jnp.zeros((B,), jnp.int32),
    )
