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
    # The Gumbel trick, as jax.random.categorical does it.
    V = logits.shape[-1]
    noisy = scaled + jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys) if temperature > 0 else scaled
    tokens = _first_argmax(noisy)
    log_p = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scaled, axis=-1)
    return tokens, log_p


def _first_argmax(x: jax.Array) -> jax.Array:
    """argmax over the last axis as two plain reductions: XLA's CPU backend takes nine times as long over its own. # [B]"""
    V = x.shape[-1]
    at_top = jnp.where(x >= jnp.max(x, axis=-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
    return jnp.min(at_top, axis=-1)
