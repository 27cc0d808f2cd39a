"""A rollout: responses to a batch of prompts, their log-probabilities, rewards and advantages (paper section 3.2.3).

The steps stand in the paper's order in `Roller.__call__`. Everything but sampling is one compiled program.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model import heads
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.model.transformer import hidden_states
from llama_jax.reward.score import combined_reward, logit, scorer, whiten
from llama_jax.rlhf.advantage import generalised_advantages, token_rewards
from llama_jax.sampling.generate import Samples


@flax.struct.dataclass
class PromptBatch:
    """Left-padded prompts."""

    tokens: Any  # [B, P] int32
    valid: Any  # [B, P] bool
    is_safety: Any  # [B] bool
    index: Any  # [B] uint32: the prompt's number in the whole job, for its random key


@flax.struct.dataclass
class Rollout:
    """What PPO trains on. S = P + N; response token n stands at column P + n and is predicted at column P + n - 1."""

    tokens: Any  # [B, S] int32
    segment_ids: Any  # [B, S] int32: 1 where real
    mask: Any  # [B, N] bool: response tokens, EOS included
    log_probs: Any  # [B, N] float32: log pi_old, frozen for the whole rollout
    values: Any  # [B, N] float32: the critic's, at rollout time
    advantages: Any  # [B, N] float32, whitened over the whole rollout
    returns: Any  # [B, N] float32


def empty_rollout(rows: int, prompt_length: int, new_tokens: int) -> Rollout:
    """A rollout of zeros: the shape of what a checkpoint holds."""
    S, N = prompt_length + new_tokens, new_tokens
    floats = {name: np.zeros((rows, N), np.float32) for name in ("log_probs", "values", "advantages", "returns")}
    return Rollout(
        tokens=np.zeros((rows, S), np.int32),
        segment_ids=np.zeros((rows, S), np.int32),
        mask=np.zeros((rows, N), bool),
        **floats,
    )


def response_states(params: Params, tokens: jax.Array, segment_ids: jax.Array, N: int, *, config: ModelConfig,
                    compute: Compute) -> jax.Array:  # fmt: skip
    """The hidden states that predict the last N columns. # int32 [B, S] x 2 -> [B, N, D]"""
    positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
    hidden = hidden_states(params, tokens, segment_ids, positions, config=config, compute=compute)
    return hidden[:, -N - 1 : -1]


@dataclasses.dataclass(frozen=True)
class RewardRule:
    """How scores become token rewards."""

    beta: float  # KL coefficient: 0.01 for 7B and 13B, 0.005 for 34B and 70B
    gamma: float
    lam: float
    safety_threshold: float
    missing_eos_penalty: float  # subtracted (in units of the whitened score) where no EOS was drawn
    temperature: float


def make_judge(config: ModelConfig, compute: Compute, rule: RewardRule) -> Callable[..., tuple[Rollout, dict]]:
    """The compiled part after sampling:
    (policy, critic, reference, helpfulness, safety, prompts, samples) -> (Rollout, metrics)."""
    score = scorer(config, compute)

    @jax.jit
    def judge(policy, critic, reference, helpfulness, safety, prompts: PromptBatch, samples: Samples):
        N = samples.tokens.shape[1]
        tokens = jnp.concatenate([prompts.tokens, samples.tokens], axis=1)
        segment_ids = jnp.concatenate([prompts.valid, samples.mask], axis=1).astype(jnp.int32)
        mask = samples.mask

        def log_probs(params):
            hidden = response_states(params, tokens, segment_ids, N, config=config, compute=compute)
            return heads.log_probabilities(
                params, hidden, samples.tokens, temperature=rule.temperature, compute=compute
            )

        # 1. Both reward models, then the gate, the inverse sigmoid and whitening over the whole batch.
        helpful = jax.nn.sigmoid(score(helpfulness, tokens, segment_ids))
        safe = jax.nn.sigmoid(score(safety, tokens, segment_ids))
        combined = combined_reward(helpful, safe, prompts.is_safety, threshold=rule.safety_threshold)
        whitened = whiten(logit(combined)) - rule.missing_eos_penalty * ~samples.ended
        # 2. log pi and log pi_0 by the trainer's own program, at the sampling temperature.
        old, entropy = log_probs(policy)
        initial, _ = log_probs(reference)
        kl = jnp.where(mask, old - initial, 0.0)
        # 3. KL-shaped rewards, values, advantages; whitened last, over the whole rollout.
        rewards = token_rewards(whitened, kl, mask, beta=rule.beta)
        hidden = response_states(critic, tokens, segment_ids, N, config=config, compute=compute)
        values = jnp.where(mask, heads.scores(critic, hidden, head="value_head"), 0.0)
        advantages, returns = generalised_advantages(rewards, values, mask, gamma=rule.gamma, lam=rule.lam)
        rollout = Rollout(
            tokens=tokens, segment_ids=segment_ids, mask=mask, log_probs=jnp.where(mask, old, 0.0), values=values,
            advantages=whiten(advantages, mask), returns=returns,
        )  # fmt: skip
        count = jnp.maximum(jnp.sum(mask), 1)
        error = jnp.sum(jnp.square(returns - values) * mask) / count
        spread = jnp.sum(jnp.square(returns - jnp.sum(returns) / count) * mask) / count
        metrics = {
            "reward": jnp.mean(combined),
            "score/helpfulness": jnp.sum(helpful * ~prompts.is_safety) / jnp.maximum(jnp.sum(~prompts.is_safety), 1),
            "score/safety": jnp.sum(safe * prompts.is_safety) / jnp.maximum(jnp.sum(prompts.is_safety), 1),
            "kl": jnp.mean(jnp.sum(kl, axis=1)),
            "entropy": jnp.sum(entropy * mask) / count,
            "explained_variance": 1 - error / jnp.maximum(spread, 1e-8),
            "response_length": jnp.mean(jnp.sum(mask, axis=1)),
            "eos_rate": jnp.mean(samples.ended),
            # The sampler decodes with a cache, the trainer does not: the same numbers, up to rounding.
            "sampler_drift": jnp.max(jnp.abs(samples.log_probs - old) * mask),
        }
        return rollout, metrics

    return judge


@dataclasses.dataclass(frozen=True)
class Roller:
    """Samples and judges one batch of prompts."""

    sample: Callable[[Params, jax.Array, jax.Array, jax.Array], Samples]
    judge: Callable[..., tuple[Rollout, dict]]
    frozen: dict[str, Params]  # reference, helpfulness, safety
    keys: Callable[[Any], jax.Array]  # prompt numbers [B] -> PRNG keys [B]

    def __call__(self, params: dict[str, Params], prompts: PromptBatch) -> tuple[Rollout, dict[str, float]]:
        """Rolls the current policy out. Returns the rollout (on the device) and its metrics, timings included."""
        start = time.monotonic()
        samples = self.sample(params["policy"], prompts.tokens, prompts.valid, self.keys(prompts.index))
        jax.block_until_ready(samples)
        sampled = time.monotonic()
        rollout, metrics = self.judge(
            params["policy"], params["critic"], self.frozen["reference"], self.frozen["helpfulness"],
            self.frozen["safety"], prompts, samples,
        )  # fmt: skip
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        timing = {"seconds/rollout": sampled - start, "seconds/score": time.monotonic() - sampled}
        return rollout, {**metrics, **timing}
