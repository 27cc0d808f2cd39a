"""Frozen scorers and the combined reward R_c (paper section 3.2.3): gate, logit, whitening. Small pure functions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.model import heads
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.model.transformer import hidden_states
from llama_jax.reward.ranking import last_token_scores

SAFETY_THRESHOLD = 0.15  # section 3.2.3: precision 0.89, recall 0.55 for unsafe responses


def scorer(config: ModelConfig, compute: Compute) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """(params, tokens [N, T], segment_ids [N, T]) -> the reward model's logit at the last real token, float32 [N]."""

    def score(params: Params, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        real = segment_ids > 0
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        hidden = hidden_states(params, tokens, segment_ids, positions, config=config, compute=compute)
        return last_token_scores(heads.scores(params, hidden, head="reward_head"), segment_ids)

    return score


def tree_scorer(config: ModelConfig, compute: Compute) -> Callable[..., jax.Array]:
    """(params, tokens, positions, trees, branches) -> the reward model's logit at every token of rows of trees.

    # int32 [B, T] each (`data/forest.py`) -> float32 [B, T]
    """

    def score(params: Params, tokens: jax.Array, positions: jax.Array, trees: jax.Array, branches: jax.Array) -> jax.Array:
        hidden = hidden_states(params, tokens, trees, positions, config=config, compute=compute, branches=branches)
        return heads.scores(params, hidden, head="reward_head")

    return score


def gate(safety: jax.Array, is_safety: jax.Array, *, threshold: float = SAFETY_THRESHOLD) -> jax.Array:
    """Where R_c is the safety score: on safety prompts and wherever it, in (0, 1), is below the threshold. # [B] x 2 -> [B]"""
    return is_safety | (safety < threshold)


def combined_logit(
    helpfulness: jax.Array, safety: jax.Array, is_safety: jax.Array, *, threshold: float = SAFETY_THRESHOLD
) -> jax.Array:
    """logit(R_c) of the reward models' own logits: the safety model's where the gate says so, else the helpfulness model's.

    The gate looks at a sigmoid, and what it chooses is left as it was.

    A sigmoid in float32 and its inverse would make one reward of all logits above 14. # [B], [B], bool [B] -> float32 [B]
    """
    return jnp.where(gate(jax.nn.sigmoid(safety), is_safety, threshold=threshold), safety, helpfulness)


def whiten(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """(x - mean) / std over the whole (global) batch, or over the masked part of it; 0s if all are equal. # float32 [...]"""
    mask = jnp.ones_like(x) if mask is None else mask.astype(x.dtype)
    count = jnp.maximum(jnp.sum(mask), 1.0)
    # Less the largest first: the float32 mean of large numbers is off, and where all are equal that error, over the root of
    # 1e-8, would be all that is left.
    largest = jnp.max(x, where=mask > 0, initial=-jnp.inf)
    x = x - jnp.where(jnp.isneginf(largest), 0.0, largest)  # of an empty part there is none
    mean = jnp.sum(x * mask) / count
    variance = jnp.sum(jnp.square(x - mean) * mask) / count
    return (x - mean) * jax.lax.rsqrt(variance + 1e-8) * mask
