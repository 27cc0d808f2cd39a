"""GRPO (Shao et al. 2024), a baseline on PPO's pieces: K answers a prompt, judged against each other; there is no critic.

    A_i = (r_i - mean(r_1..K)) / std(r_1..K);  loss = max(-A r, -A clip(r, 1 - eps, 1 + eps)) + beta k3(pi, pi_0) per token

1. The score is PPO's: R_c through the inverse sigmoid (or any scorer), whitened, less the penalty for a missing EOS.
2. The KL term stands in the loss, as its k3 estimate, and not in the reward; beta 0 leaves the reference out altogether.
3. Every token of the batch weighs the same, or ("response", as published) every answer does. Dividing by the deviation can be
   switched off: it favours prompts whose answers are nearly alike.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.interop.restore import restore_model
from llama_jax.model import heads
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.parallel.axes import row_share
from llama_jax.pretrain.base import StageConfig
from llama_jax.reward.scorers import OtherScores, RewardMix
from llama_jax.rlhf.advantage import importance_weights
from llama_jax.rlhf.judge import (
    Dialogs,
    Frozen,
    Judge,
    PromptBatch,
    Readings,
    RewardRule,
    common_metrics,
    judge_with,
    make_reader,
    response_states,
    sequence_scores,
)
from llama_jax.rlhf.reinforce import (
    Opening,
    RolloutData,
    check_settings,
    clipped_policy_loss,
    ratio_metrics,
    reward_models,
    reward_rule,
)
from llama_jax.rlhf.rollout import KlControl
from llama_jax.sampling.generate import Samples
from llama_jax.training.stage import Loss, Metrics, Stage, Weighted


@dataclasses.dataclass(frozen=True)
class GrpoSettings:
    """The numbers of the algorithm; see configs/grpo.py."""

    rollout_size: int  # responses of an iteration; loop.batch_size is the mini-batch
    answers: int  # K of each prompt
    new_tokens: int
    beta: float  # of the k3 term in the loss
    clip: float = 0.2
    normalise: Literal["token", "response"] = "token"
    divide_by_std: bool = True
    temperature: float = 1.0
    safety_threshold: float = 0.15
    missing_eos_penalty: float = 1.0
    epochs: int = 1
    importance_cap: float = 0.0
    sampling_batch: int = 0  # responses that each shard of the batch draws at a time; 0: all
    judge_batch: int = 0  # and that models read there

    def __post_init__(self):
        check_settings("grpo", self)
        if self.answers < 2 or self.rollout_size % self.answers:
            raise ValueError(
                f"grpo.answers: expected at least 2 and a divisor of rollout_size={self.rollout_size}, got {self.answers}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoConfig(StageConfig):
    """See configs/grpo.py. `start` is the policy's and the reference's checkpoint."""

    data: RolloutData
    grpo: GrpoSettings
    helpfulness: str = ""  # workdirs of the reward models, where `reward` names them; one alone serves too
    safety: str = ""
    reward: RewardMix = RewardMix()


@flax.struct.dataclass
class GroupRollout:
    """What GRPO trains on; columns as in `Rollout`, answers of one prompt in consecutive rows."""

    tokens: Any  # [B, S] int32
    segment_ids: Any  # [B, S] int32: 1 where real
    mask: Any  # [B, N] bool
    log_probs: Any  # [B, N] float32: log pi_old
    reference: Any  # [B, N] float32: log pi_0; 0 where beta is 0
    importance: Any  # [B, N] float32
    advantages: Any  # [B] float32


def empty_rollout(rows: int, prompt_length: int, new_tokens: int) -> GroupRollout:
    """A rollout of zeros: the shape of what a checkpoint holds."""
    S, N = prompt_length + new_tokens, new_tokens
    floats = {name: np.zeros((rows, N), np.float32) for name in ("log_probs", "reference", "importance")}
    return GroupRollout(
        tokens=np.zeros((rows, S), np.int32), segment_ids=np.zeros((rows, S), np.int32), mask=np.zeros((rows, N), bool),
        advantages=np.zeros(rows, np.float32), **floats,
    )  # fmt: skip


def group_advantages(scores: jax.Array, answers: int, *, divide_by_std: bool) -> jax.Array:
    """Each score less its group's mean, over the group's deviation; 0 where all answers score alike. # float32 [B] -> [B]"""
    groups = scores.reshape(-1, answers)
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    if divide_by_std:
        centred /= jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True)) + 1e-4
    return centred.reshape(scores.shape)


def k3(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """An estimate of KL(pi || pi_0), never negative, of low variance: q - 1 - log q, q = pi_0 / pi. # [B, N] x 2 -> [B, N]"""
    # Finite, and no more: a clamp of the estimate (some have one at 10) would take the gradient of just those tokens that are
    # furthest from pi_0. What one token can do to an update is bounded by the clipping of gradients.
    log_ratio = jnp.clip(reference - log_probs, -20.0, 20.0)
    return jnp.expm1(log_ratio) - log_ratio  # which keeps its digits where the two are nearly the same


def token_weights(mask: jax.Array, normalise: str) -> jax.Array:
    """What each token weighs in the sum: 1, or 1 over the length of its answer. # bool [B, N] -> float32 [B, N]"""
    weights = mask.astype(jnp.float32)
    return weights if normalise == "token" else weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)


def grpo_loss(config: ModelConfig, compute: Compute, settings: GrpoSettings) -> Loss:
    """({policy}, GroupRollout rows) -> clipped policy loss + beta * k3, by the weights of `token_weights`."""

    def loss(params: dict[str, Any], batch: GroupRollout) -> tuple[Weighted, Metrics]:
        N = batch.mask.shape[1]
        hidden = response_states(
            params["policy"], batch.tokens, batch.segment_ids, N, config=config, compute=compute
        )
        log_probs, entropy = heads.log_probabilities(
            params["policy"], hidden, batch.tokens[:, -N:], temperature=settings.temperature, compute=compute
        )
        policy, ratio, clipped = clipped_policy_loss(
            log_probs, batch.log_probs, batch.advantages[:, None], clip=settings.clip
        )
        weights = token_weights(batch.mask, settings.normalise)
        total = jnp.sum(weights)

        def mean_of(x: jax.Array) -> Weighted:
            return Weighted(jnp.sum(x * weights), total)

        per_token = policy * batch.importance
        metrics = {
            "policy_loss": mean_of(per_token),
            "clip_fraction": mean_of(clipped),
            **{name: mean_of(x) for name, x in ratio_metrics(log_probs, batch.log_probs, compute=compute).items()},
            "policy_entropy": mean_of(entropy),
            "ratio_deviation": Weighted(jnp.max(jnp.abs(ratio - 1) * batch.mask), jnp.ones(())),
        }
        if settings.beta:
            divergence = k3(log_probs, batch.reference)
            metrics["kl_loss"] = mean_of(divergence)
            per_token += settings.beta * divergence
        return mean_of(per_token), metrics

    return loss


def make_group_judge(
    config: ModelConfig, compute: Compute, rule: RewardRule, settings: GrpoSettings, *, most: int = 0
) -> Judge:
    """The part after sampling; models read at most `most` rows at a time (0: all). Without a reference `kl` is not reported."""

    def settle(readings: Readings, prompts: PromptBatch, samples: Samples, other: OtherScores | None, beta: jax.Array):
        del beta
        dialogs, mask, old = Dialogs.of(prompts, samples, config, compute), samples.mask, readings.log_probs
        scores, metrics = sequence_scores(readings, samples, prompts, other, rule)
        importance = importance_weights(old, samples.log_probs, mask, cap=rule.importance_cap)
        metrics |= common_metrics(samples, readings, importance)
        if not settings.beta:
            del metrics["kl"]
        groups = scores.reshape(-1, settings.answers)
        metrics["group_std"] = jnp.mean(jnp.std(groups, axis=1))
        rollout = GroupRollout(
            tokens=dialogs.tokens, segment_ids=dialogs.segment_ids, mask=mask, log_probs=jnp.where(mask, old, 0.0),
            reference=jnp.where(mask, readings.initial, 0.0), importance=importance,
            advantages=group_advantages(scores, settings.answers, divide_by_std=settings.divide_by_std),
        )  # fmt: skip
        return rollout, metrics

    return judge_with(make_reader(config, compute, rule), settle, most)


def make_stage(config: GrpoConfig, mesh: Mesh, workdir: Path) -> Stage:
    """The GRPO stage."""
    opening = Opening.of(config, config.grpo, mesh, workdir, answers=config.grpo.answers)
    settings = opening.settings
    frozen: Frozen = {"reference": opening.reference()} if settings.beta else {}
    if opening.scored:
        specs = table.table(opening.model, head="reward_head")
        frozen |= {name: restore_model(path, specs, mesh) for name, path in reward_models(config).items()}
    rule, rows = reward_rule(config, settings), settings.rollout_size // row_share(mesh)[1]
    return opening.stage(
        judge=make_group_judge(opening.model, config.compute, rule, settings, most=settings.judge_batch), rule=rule,
        frozen=frozen,
        loss=grpo_loss(opening.model, config.compute, settings),
        empty=empty_rollout(rows, config.data.prompt_length, settings.new_tokens),
        control=KlControl(settings.beta), answers=settings.answers,
    )  # fmt: skip
