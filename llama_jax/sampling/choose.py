"""How the next token is drawn from logits: greedy, temperature, nucleus (reference `generation.py`; paper section 3.2.3)."""

import jax
import jax.numpy as jnp

_REMOVED = -1e30


def top_p_filter(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Removes the tokens of the tail: those before which the cumulative mass already exceeds `top_p`. # [B, V]

    The token that crosses the border stays, so at least one always does.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    removed_by_rank = before > top_p
    rows = jnp.arange(logits.shape[0])[:, None]
    removed = jnp.zeros(logits.shape, bool).at[rows, order].set(removed_by_rank)
    return jnp.where(removed, _REMOVED, logits)


def draw(
    logits: jax.Array, keys: jax.Array, *, temperature: float, top_p: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row and its log-probability under the distribution it was drawn from.

    Args:
      logits: # float32 [B, V]
      keys: one PRNG key a row, so that a row's draws do not depend on its neighbours. # [B]
      temperature: 0 takes the most likely token (its log-probability is then that of temperature 1).
      top_p: 1 leaves the distribution whole, as RLHF needs it.

    Returns:
      int32 [B], float32 [B]
    """
    scaled = logits / temperature if temperature > 0 else logits
    if temperature > 0 and top_p < 1:
        scaled = top_p_filter(scaled, top_p)
    tokens = jax.vmap(jax.random.categorical)(keys, scaled) if temperature > 0 else jnp.argmax(scaled, axis=-1)
    log_p = jax.nn.log_softmax(scaled, axis=-1)
    return tokens.astype(jnp.int32), jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]
