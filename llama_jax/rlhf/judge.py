"""What models say of responses, and what these are worth: rewards and advantages of a rollout (paper section 3.2.3).

The steps stand in the paper's order in `make_reader` and `make_judge`: one compiled program, or two where models read the
rollout in parts. PPO and GRPO share all but what is made of the readings.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model import heads
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel import compiler
from llama_jax.reward.held_out import ScoreStatistics
from llama_jax.reward.score import combined_logit, scorer, whiten
from llama_jax.reward.scorers import OtherScores
from llama_jax.rlhf.advantage import generalised_advantages, importance_weights, token_rewards
from llama_jax.rlhf.parts import by_parts
from llama_jax.sampling.generate import Samples


@flax.struct.dataclass
class PromptBatch:
    """Left-padded prompts."""

    tokens: Any  # [B, P] int32
    valid: Any  # [B, P] bool
    is_safety: Any  # [B] bool
    index: Any  # [B] uint32: the prompt's number in the whole job, for its random key
    row: Any  # [B] int32: its number in the data file, for scorers


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
    importance: Any  # [B, N] float32: pi_old of the trainer over that of the sampler, at most the cap; 1 without a cap
    warm_up: Any  # [B] bool: the critic learns from it, and the policy does not


def empty_rollout(rows: int, prompt_length: int, new_tokens: int) -> Rollout:
    """A rollout of zeros: the shape of what a checkpoint holds."""
    S, N = prompt_length + new_tokens, new_tokens
    names = ("log_probs", "values", "advantages", "returns", "importance")
    floats = {name: np.zeros((rows, N), np.float32) for name in names}
    return Rollout(
        tokens=np.zeros((rows, S), np.int32),
        segment_ids=np.zeros((rows, S), np.int32),
        mask=np.zeros((rows, N), bool),
        warm_up=np.zeros((rows,), bool),
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
    model_weight: float = 1.0  # of the reward models' score, beside other scorers
    importance_cap: float = 0.0  # 0: no importance weights
    warm_up: int = 0  # of a job's responses, the first so many are for the critic alone


UNSCALED = ScoreStatistics(0.0, 1.0)
Frozen = dict[str, Params]  # "reference", and "helpfulness", "safety" or both where reward models score
# (params, frozen, prompts, samples, OtherScores or None, beta) -> (rollout, metrics)
Judge = Callable[..., tuple[Any, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Dialogs:
    """Prompts and responses side by side, as a judge reads them."""

    tokens: jax.Array  # [B, S] int32
    segment_ids: jax.Array  # [B, S] int32
    samples: Samples
    config: ModelConfig
    compute: Compute

    @classmethod
    def of(cls, prompts: PromptBatch, samples: Samples, config: ModelConfig, compute: Compute) -> "Dialogs":
        """Prompts are left-padded, so that all responses begin in one column."""
        return cls(
            tokens=jnp.concatenate([prompts.tokens, samples.tokens], axis=1),
            segment_ids=jnp.concatenate([prompts.valid, samples.mask], axis=1).astype(jnp.int32),
            samples=samples, config=config, compute=compute,
        )  # fmt: skip

    def states(self, params: Params) -> jax.Array:
        """The hidden states that predict the response. # -> [B, N, D]"""
        N = self.samples.tokens.shape[1]
        return response_states(params, self.tokens, self.segment_ids, N, config=self.config, compute=self.compute)

    def log_probs(self, params: Params, *, temperature: float) -> tuple[jax.Array, jax.Array]:
        """log pi of the response's tokens, and the entropies, at the sampling temperature. # -> 2 x float32 [B, N]"""
        return heads.log_probabilities(
            params, self.states(params), self.samples.tokens, temperature=temperature, compute=self.compute
        )


@flax.struct.dataclass
class Readings:
    """What models say of each response by itself; columns outside the mask mean nothing."""

    log_probs: Any  # [B, N] float32: of the policy
    entropy: Any  # [B, N] float32
    initial: Any  # [B, N] float32: log pi_0; zeros without a reference
    values: Any  # [B, N] float32: the critic's; None without one
    logits: dict[str, Any]  # of each reward model: float32 [B]


def model_logits(frozen: Frozen, dialogs: Dialogs) -> dict[str, jax.Array]:
    """The logit of each reward model that there is. # -> {name: float32 [B]}"""
    score = scorer(dialogs.config, dialogs.compute)
    names = [name for name in ("helpfulness", "safety") if name in frozen]
    return {name: score(frozen[name], dialogs.tokens, dialogs.segment_ids) for name in names}


def answer_scores(
    logits: Mapping[str, jax.Array], prompts: PromptBatch, other: OtherScores | None, rule: RewardRule
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What each response is rewarded with before whitening, and the scores it is made of. # -> float32 [B], {name: [B]}

    Scores of reward models are sigmoids; those of other scorers are as they gave them, under their own names, and "other" is
    their weighted sum. "reward" is what is reported of the reward: R_c alone, or the sum with other scorers.
    """
    parts, total = {name: jax.nn.sigmoid(value) for name, value in logits.items()}, 0.0 if other is None else other.total
    if logits:
        combined = models_reward(logits, prompts.is_safety, threshold=rule.safety_threshold)
        parts["reward"] = jax.nn.sigmoid(combined)
        total += rule.model_weight * combined
    if other is not None:
        parts |= {**other.each, "other": other.total, "reward": total}
    return total, parts


def models_reward(logits: Mapping[str, jax.Array], is_safety: jax.Array, *, threshold: float) -> jax.Array:
    """logit(R_c) of both reward models' logits; of one model alone, its own. # {name: float32 [B]}, bool [B] -> float32 [B]"""
    if len(logits) == 1:
        (alone,) = logits.values()
        return alone
    return combined_logit(logits["helpfulness"], logits["safety"], is_safety, threshold=threshold)


def sequence_scores(
    readings: Readings, samples: Samples, prompts: PromptBatch, other: OtherScores | None, rule: RewardRule
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The whitened score of each response, less the penalty where it has no EOS; and metrics. # -> float32 [B]

    Metrics are means over the responses: "reward" and, under "score/", the scores of `answer_scores` that it is made of, those
    of a reward model over the prompts of its own track.
    """
    total, parts = answer_scores(readings.logits, prompts, other, rule)
    metrics = {"reward": jnp.mean(parts["reward"]), "reward_std": jnp.std(parts["reward"])}
    for name, of_track in (("helpfulness", ~prompts.is_safety), ("safety", prompts.is_safety)):
        if name in parts:
            metrics[f"score/{name}"] = jnp.sum(parts[name] * of_track) / jnp.sum(of_track)  # without such a prompt, no number
    if other is not None:
        metrics |= {f"score/{name}": jnp.mean(parts[name]) for name in ("other", *other.each)}
    return whiten(total) - rule.missing_eos_penalty * ~samples.ended, metrics


def common_metrics(samples: Samples, readings: Readings, importance: jax.Array) -> dict[str, jax.Array]:
    """What every rollout reports."""
    mask, count, old = samples.mask, jnp.maximum(jnp.sum(samples.mask), 1), readings.log_probs
    # The sampler decodes with a cache, the trainer does not: the same numbers, up to rounding.
    drift = jnp.abs(samples.log_probs - old) * mask
    return {
        "kl": jnp.mean(jnp.sum((old - readings.initial) * mask, axis=1)),
        "entropy": jnp.sum(readings.entropy * mask) / count,
        "response_length": jnp.mean(jnp.sum(mask, axis=1)),
        "eos_rate": jnp.mean(samples.ended),
        "sampler_drift": jnp.max(drift),
        "sampler_drift_mean": jnp.sum(drift) / count,
        "importance": jnp.sum(importance * mask) / count,
    }


def critic_values(critic: Params, states: jax.Array, scale: ScoreStatistics) -> jax.Array:
    """What the critic expects from each token on, in units of the whitened reward. # [B, N, D] -> float32 [B, N]

    It begins as a reward model, whose scores have any mean and deviation; `scale` takes them away. Without it the value loss,
    which moves a value by at most `value_clip` a rollout, would spend dozens of iterations on that difference alone.
    """
    return scale.standardise(heads.scores(critic, states, head="value_head"))


def make_reader(
    config: ModelConfig, compute: Compute, rule: RewardRule, scale: ScoreStatistics = UNSCALED
) -> Callable[..., Readings]:
    """(params, frozen, prompts, samples) -> what all models that there are say of each row; `scale` is the critic's."""

    def read(params: Mapping[str, Params], frozen: Frozen, prompts: PromptBatch, samples: Samples) -> Readings:
        dialogs = Dialogs.of(prompts, samples, config, compute)
        # 1. The reward models.
        logits = model_logits(frozen, dialogs)
        # 2. log pi and log pi_0 by the trainer's own program, at the sampling temperature.
        old, entropy = dialogs.log_probs(params["policy"], temperature=rule.temperature)
        initial = jnp.zeros_like(old)
        if "reference" in frozen:
            initial, _ = dialogs.log_probs(frozen["reference"], temperature=rule.temperature)
        # 3. What the critic expects.
        values = critic_values(params["critic"], dialogs.states(params["critic"]), scale) if "critic" in params else None
        return Readings(old, entropy, initial, values, logits)

    return read


def judge_with(read: Callable[..., Readings], settle: Callable[..., tuple[Any, dict[str, jax.Array]]], most: int) -> Judge:
    """A judge of two parts: `read` says what it can row by row, of at most `most` rows at a time (0: of all), and `settle`
    makes the rollout of it, with statistics over all rows: (readings, prompts, samples, other, beta) -> (rollout, metrics)."""
    if not most:
        return compiler.jit(lambda params, frozen, prompts, samples, *rest: settle(
            read(params, frozen, prompts, samples), prompts, samples, *rest
        ))  # fmt: skip
    read, settle = by_parts(compiler.jit(read), most, fixed=2), jax.jit(settle)
    return lambda params, frozen, prompts, samples, *rest: settle(
        read(params, frozen, prompts, samples), prompts, samples, *rest
    )


def make_judge(
    config: ModelConfig, compute: Compute, rule: RewardRule, scale: ScoreStatistics = UNSCALED, *, most: int = 0
) -> Judge:
    """PPO's part after sampling. `scale` is the critic's; models read at most `most` rows at a time (0: all)."""

    def settle(readings: Readings, prompts: PromptBatch, samples: Samples, other: OtherScores | None, beta: jax.Array):
        mask, old = samples.mask, readings.log_probs
        # 4. The gate of the reward models' sigmoids, the logit that it chooses, and whitening over the whole batch.
        scores, metrics = sequence_scores(readings, samples, prompts, other, rule)
        # 5. KL-shaped rewards, values, advantages; whitened last, over the whole rollout.
        rewards = token_rewards(scores, jnp.where(mask, old - readings.initial, 0.0), mask, beta=beta)
        values = jnp.where(mask, readings.values, 0.0)
        advantages, returns = generalised_advantages(rewards, values, mask, gamma=rule.gamma, lam=rule.lam)
        importance = importance_weights(old, samples.log_probs, mask, cap=rule.importance_cap)
        dialogs = Dialogs.of(prompts, samples, config, compute)
        rollout = Rollout(
            tokens=dialogs.tokens, segment_ids=dialogs.segment_ids, mask=mask, log_probs=jnp.where(mask, old, 0.0),
            values=values, advantages=whiten(advantages, mask), returns=returns, importance=importance,
            warm_up=prompts.index < rule.warm_up,
        )  # fmt: skip
        count, shaped = jnp.maximum(jnp.sum(mask), 1), jnp.sum(rewards, axis=1)
        error = jnp.sum(jnp.square(returns - values) * mask) / count
        spread = jnp.sum(jnp.square(returns - jnp.sum(returns) / count) * mask) / count
        metrics |= common_metrics(samples, readings, importance)
        metrics |= {"reward_after_kl": jnp.mean(shaped), "reward_after_kl_std": jnp.std(shaped)}  # of the whitened reward
        return rollout, metrics | {"explained_variance": 1 - error / jnp.maximum(spread, 1e-8)}

    return judge_with(make_reader(config, compute, rule, scale), settle, most)
