"""The key-value cache of generation."""

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.model.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of S slots. Rows are left-padded, so all rows write the same slot at the same time."""

    keys: jax.Array  # [L, B, S, K, E]
    values: jax.Array  # [L, B, S, K, E]
    valid: jax.Array  # [B, S] bool: the slot holds a real token
    index: jax.Array  # [] int32: the next slot to write


def empty_cache(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """A cache without content."""
    shape = (config.layers, batch, slots, config.kv_heads, config.head_size)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch, slots), bool),
        index=jnp.zeros((), jnp.int32),
    )
