"""Token rewards, generalised advantage estimation, importance weights.

The paper is silent on the critic; gamma = lambda = 1 gives its sequence-level objective R - beta KL exactly.
"""

import jax
import jax.numpy as jnp


def token_rewards(score: jax.Array, kl: jax.Array, mask: jax.Array, *, beta: float) -> jax.Array:
    """-beta * (log pi - log pi_0) at every response token, plus the score at the last one (EOS, if it was drawn).

    The log ratio is not clamped, as some trainers do (at 10 nats): nothing is exponentiated, so nothing can overflow; the sum
    over a response is the paper's sequence KL only as it is; and where the policy has left pi_0 furthest the price would end.

    Args:
      score: # float32 [B]
      kl: log pi - log pi_0 of the drawn token. # float32 [B, N]
      mask: the response's tokens, a prefix of each row. # bool [B, N]

    Returns:
      float32 [B, N], 0 outside the mask
    """
    if not (kl.ndim == 2 and kl.shape == mask.shape and score.shape == kl.shape[:1]):  # [B, 1] would be spread over all tokens
        raise ValueError(
            f"token_rewards: expected score [B], kl and mask [B, N]; got score {score.shape}, kl {kl.shape}, mask {mask.shape}"
        )
    last = jnp.sum(mask, axis=1) - 1
    at_last = jnp.arange(mask.shape[1]) == last[:, None]
    return jnp.where(mask, -beta * kl, 0.0) + jnp.where(at_last, score[:, None], 0.0)


def generalised_advantages(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """GAE backwards over each response: delta_t + gamma lambda A_{t+1}; the value after the last token is 0.

    Args:
      rewards, values: # float32 [B, N]
      mask: # bool [B, N]

    Returns:
      advantages (not whitened) and returns = advantages + values, both float32 [B, N], 0 outside the mask.
    """
    if not (rewards.ndim == 2 and rewards.shape == values.shape == mask.shape):
        raise ValueError(
            f"generalised_advantages: expected rewards, values and mask of one shape [B, N]; got rewards {rewards.shape}, "
            f"values {values.shape}, mask {mask.shape}"
        )
    values = jnp.where(mask, values, 0.0)

    def step(carry, inputs):
        advantage, next_value = carry
        reward, value, inside = inputs
        delta = reward + gamma * next_value - value
        advantage = jnp.where(inside, delta + gamma * lam * advantage, 0.0)
        return (advantage, value), advantage

    zero = jnp.zeros(rewards.shape[0], jnp.float32)
    _, advantages = jax.lax.scan(step, (zero, zero), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, jnp.where(mask, advantages.T + values, 0.0)


def importance_weights(old: jax.Array, sampled: jax.Array, mask: jax.Array, *, cap: float) -> jax.Array:
    """min(pi_trainer / pi_sampler, cap) of each drawn token; 1 if the cap is 0. # float32 [B, N] x 2, bool [B, N]

    Sampler and trainer are two programs: the weights take out, as far as the cap allows, that the tokens were drawn from the
    one and are trained on by the other.
    """
    if not cap:
        return jnp.ones_like(old)
    return jnp.where(mask, jnp.minimum(jnp.exp(jnp.clip(old - sampled, -20.0, 20.0)), cap), 1.0)
