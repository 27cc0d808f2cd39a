"""The ranking loss with margin and the safety auxiliary loss (paper section 3.2.2, A.3.3, A.3.4; Table 27)."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# m(r) by degree of preference (Table 27). The paper does not say which one its final models use.
MARGINS: dict[str, dict[str, float]] = {
    "none": {"significantly": 0.0, "better": 0.0, "slightly": 0.0, "negligibly": 0.0},
    "small": {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0},
    "large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0, "negligibly": 0.0},
}


def margin_table(name: str) -> dict[str, float]:
    """m(r) by degree of preference, of the table of that name; ValueError with the names that there are."""
    if name not in MARGINS:
        raise ValueError(f"margin: expected one of {', '.join(MARGINS)}, got {name!r}")
    return MARGINS[name]


def ranking_loss(chosen: ArrayLike, rejected: ArrayLike, margin: ArrayLike) -> jax.Array:
    """-log sigmoid(r(x, y_c) - r(x, y_r) - m(r)). # float32 [B] x 3 -> [B]"""
    chosen, rejected, margin = (jnp.asarray(x, jnp.float32) for x in (chosen, rejected, margin))
    if not chosen.shape == rejected.shape == margin.shape:  # [B, 1] - [B] would silently become [B, B]
        raise ValueError(f"scores {chosen.shape}, {rejected.shape} and margin {margin.shape} must have one shape")
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def safety_loss(score: jax.Array, is_safe: jax.Array) -> jax.Array:
    """Binary cross entropy of sigmoid(r) with the response's safety label. # float32 [B] x 2 -> [B]

    The paper names the auxiliary term of A.3.4 but prints no formula; this is the plain reading.
    """
    return -(is_safe * jax.nn.log_sigmoid(score) + (1 - is_safe) * jax.nn.log_sigmoid(-score))


def centring_loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """(r(x, y_c) + r(x, y_r))^2: a ranking loss leaves the mean of the scores free, this leads it to 0. # [B] x 2 -> [B]

    Not in the paper; Eisenstein et al. 2023 (arXiv 2312.09244), equation 2, and TRL's `center_rewards_coefficient`.
    """
    return jnp.square(chosen + rejected)


def last_token_scores(scores: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The score at each row's last real token, found by the mask: padding on either side changes nothing. # [B, T] -> [B]"""
    positions = jnp.arange(scores.shape[1])
    last = jnp.max(jnp.where(segment_ids > 0, positions, -1), axis=1)
    return jnp.take_along_axis(scores, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
