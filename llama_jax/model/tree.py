"""Likelihoods of texts that share their beginnings, each beginning computed once (for the benchmarks of section 2.3).

In rows of trees (`branches.py`) a token sees the earlier tokens of its branch, the stem, and the prefix of its row (few-shot
examples), which `decode.prefill` has computed before. So packing costs no padding, and what texts share costs nothing.
"""

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.model.branches import attend_seen, seen
from llama_jax.model.cache import KVCache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import Prepared, blocks, logits

_CHUNK = 64  # places of a row whose logits are held at once


@flax.struct.dataclass
class Trees:
    """Packed rows; on the host, NumPy arrays."""

    tokens: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32: counted from the beginning of the prefix
    trees: jax.Array  # [B, T] int32: which tree; 0 is padding
    branches: jax.Array  # [B, T] int32: which branch of it; 0 is the stem
    prefixes: jax.Array  # [B] int32: the row of the cache that all trees of this row continue


def tree_states(
    weights: Prepared, rows: Trees, cache: KVCache, *, config: ModelConfig, compute: Compute
) -> jax.Array:
    """The final normed states. A cache without slots is no prefix. # [B, T] x 4, G rows of P slots -> [B, T, D]"""
    P = cache.slots
    known = jnp.arange(P) < cache.lengths[rows.prefixes][:, None]  # [B, P]

    def mask(start, size):
        """Which of the P + T keys some queries see. # bool [B, size, P + T]"""
        own = seen(rows.trees, rows.branches, start, size)
        return jnp.concatenate([jnp.broadcast_to(known[:, None], (*own.shape[:2], P)), own], axis=2)

    def attend(query, key, value, layer):
        held = jax.tree.map(lambda x: x[rows.prefixes], layer)
        known_keys = jnp.swapaxes(held.keys, 2, 3) if held.lengthwise else held.keys
        keys = jnp.concatenate([known_keys.astype(key.dtype), jnp.einsum("btke->bket", key)], axis=3)
        values = jnp.concatenate([held.values.astype(value.dtype), jnp.einsum("btke->bkte", value)], axis=2)
        return attend_seen(query, keys, values, mask, dtype=compute.matmul_dtype), layer

    return blocks(weights, rows.tokens, rows.positions, cache, attend, config=config, compute=compute)[0]


def target_log_probs(
    weights: Prepared, hidden: jax.Array, places: jax.Array, targets: jax.Array, *, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """log p(target) after the token at each place, and whether no token is more likely.

    Args:
      hidden: # [B, T, D]
      places: indices into the row; N is a multiple of 64. # int32 [B, N]
      targets: # int32 [B, N]

    Returns:
      float32 [B, N], bool [B, N]
    """
    B, N = places.shape

    def step(carry, chunk):
        place, target = chunk  # [B, C]
        states = jnp.take_along_axis(hidden, place[..., None], axis=1)
        scores = logits(weights, states.reshape(B * _CHUNK, -1), compute=compute).reshape(B, _CHUNK, -1)
        score = jnp.take_along_axis(scores, target[..., None], axis=2)[..., 0]
        return carry, (score - jax.nn.logsumexp(scores, axis=-1), jnp.argmax(scores, axis=-1) == target)

    chunks = tuple(jnp.moveaxis(x.reshape(B, N // _CHUNK, _CHUNK), 1, 0) for x in (places, targets))
    _, out = jax.lax.scan(step, None, chunks)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, N) for x in out)
