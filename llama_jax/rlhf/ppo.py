"""PPO (paper section 3.2.3): maximise E[R~_c] - beta KL(pi || pi_0) with the clipped objective, one pass over each rollout.

What the paper leaves open, and what is done here:
1. The critic is a model of its own, started from the helpfulness reward model, head included, its scores standardised. Without
   reward models its head begins at random, and in the first iterations (`critic_warmup`) the critic alone learns.
2. The KL term is folded into token rewards, the score stands at the last token; advantages by GAE.
3. The score is whitened with the batch's mean and deviation before the KL term; a missing EOS costs a constant.
4. One epoch over each rollout: 512 / 64 = 8 gradient steps an iteration.
5. With adapters (`config.lora`) policy and critic adapt the frozen chat and reward model, which are reference and scorer too.
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import check_least, check_shares
from llama_jax.interop.restore import restore_model
from llama_jax.model import heads
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Specs
from llama_jax.parallel.axes import row_share
from llama_jax.pretrain.base import Begin, StageConfig, begin
from llama_jax.reward.held_out import ScoreStatistics
from llama_jax.reward.scorers import RewardMix
from llama_jax.rlhf.judge import UNSCALED, Rollout, critic_values, empty_rollout, make_judge, response_states
from llama_jax.rlhf.reinforce import (
    Opening,
    RolloutData,
    check_settings,
    clipped_policy_loss,
    ratio_metrics,
    reward_models,
    reward_rule,
)
from llama_jax.rlhf.rollout import MOST_ERROR, KlControl
from llama_jax.training.saved import newest_step, read_meta
from llama_jax.training.stage import Loss, Metrics, Stage, Weighted

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PpoSettings:
    """The numbers of the algorithm; the paper's are in configs/ppo.py.

    Attributes:
      sampling_batch, judge_batch: responses that each shard of the batch (devices of data x fsdp) draws at a time, and that
        models read there at a time; 0: the whole rollout. One program for 512 responses of 2048 tokens would hold 512 GiB of
        the 7B's keys and values.
      critic_warmup: iterations in which the policy's loss weighs 0 and the value is not clipped; -1: none where the critic
        begins as a reward model, else a twentieth of all.
    """

    rollout_size: int  # prompts of an iteration; loop.batch_size is the mini-batch
    new_tokens: int
    beta: float
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 1.0
    safety_threshold: float = 0.15
    missing_eos_penalty: float = 1.0
    epochs: int = 1  # passes over each rollout
    importance_cap: float = 0.0  # of pi_trainer / pi_sampler, by which a token's loss is weighted; 0: no weights
    kl_target: float = 0.0  # nats of a response that beta is led towards; 0: beta is fixed
    kl_horizon: float = 10_000.0  # responses
    sampling_batch: int = 0
    judge_batch: int = 0
    critic_warmup: int = -1

    def __post_init__(self):
        check_settings("ppo", self)
        check_least("ppo", self, value_weight=0, critic_warmup=-1)
        check_shares("ppo", self, "gamma", "lam")
        if not self.value_clip > 0:
            raise ValueError(f"ppo.value_clip: expected a positive number, got {self.value_clip}")
        if not (self.kl_target >= 0 and self.kl_horizon > 0):
            raise ValueError(
                f"ppo.kl_target, ppo.kl_horizon: expected 0 or more, and more than 0; got {self.kl_target}, {self.kl_horizon}"
            )
        if self.kl_target and not self.beta > 0:
            raise ValueError("ppo.beta: expected more than 0 to begin with, since ppo.kl_target multiplies it, got 0")
        if self.kl_target and not self.kl_horizon > MOST_ERROR * self.rollout_size:
            raise ValueError(
                f"ppo.kl_horizon: expected more than {MOST_ERROR * self.rollout_size:g}, or beta may fall below 0 "
                f"(ppo.rollout_size={self.rollout_size}), got {self.kl_horizon:g}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoConfig(StageConfig):
    """See configs/ppo.py. `start` is the policy's and the reference's checkpoint."""

    data: RolloutData
    ppo: PpoSettings
    # Workdirs of the reward models; of one alone, R_c is its score. The critic begins as the first one that there is, and
    # without any (see `reward`) with the policy's trunk.
    helpfulness: str
    safety: str
    reward: RewardMix = RewardMix()


def ppo_loss(
    config: ModelConfig, compute: Compute, settings: PpoSettings, scale: ScoreStatistics = UNSCALED
) -> Loss:  # fmt: skip
    """({policy, critic}, Rollout rows) -> clipped policy loss + value_weight * clipped value loss, per response token.

    Rows of the warm-up have no policy loss, and their value is not clipped: a random head has a long way to go.
    """

    def loss(params: dict[str, Any], batch: Rollout) -> tuple[Weighted, Metrics]:
        N = batch.mask.shape[1]
        states = functools.partial(
            response_states, tokens=batch.tokens, segment_ids=batch.segment_ids, N=N, config=config, compute=compute
        )
        log_probs, entropy = heads.log_probabilities(
            params["policy"], states(params["policy"]), batch.tokens[:, -N:], temperature=settings.temperature,
            compute=compute,
        )  # fmt: skip
        values = critic_values(params["critic"], states(params["critic"]), scale)
        mask, warm_up = batch.mask.astype(jnp.float32), batch.warm_up[:, None]
        policy, ratio, clipped = clipped_policy_loss(log_probs, batch.log_probs, batch.advantages, clip=settings.clip)
        policy = jnp.where(warm_up, 0.0, policy * batch.importance)
        reach = jnp.where(warm_up, jnp.inf, settings.value_clip)
        value = clipped_value_loss(values, batch.values, batch.returns, clip=reach)
        count = jnp.sum(mask)

        def mean_of(x: jax.Array) -> Weighted:
            return Weighted(jnp.sum(x * mask), count)

        metrics = {
            "policy_loss": mean_of(policy),
            "value_loss": mean_of(value),
            "clip_fraction": mean_of(clipped),
            **{name: mean_of(x) for name, x in ratio_metrics(log_probs, batch.log_probs, compute=compute).items()},
            "policy_entropy": mean_of(entropy),
            "ratio_deviation": Weighted(jnp.max(jnp.abs(ratio - 1) * mask), jnp.ones(())),
        }
        return mean_of(policy + settings.value_weight * value), metrics

    return loss


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float | jax.Array
) -> jax.Array:
    """Half the larger of two squared errors: of the value, and of the value kept within `clip` of the old. # [B, N]"""
    bounded = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(bounded - returns))


def make_stage(config: PpoConfig, mesh: Mesh, workdir: Path) -> Stage:
    """The PPO stage."""
    opening = Opening.of(config, config.ppo, mesh, workdir)
    settings = opening.settings
    reward_specs, models = table.table(opening.model, head="reward_head"), reward_models(config)
    start = next(iter(models.values()), "")
    critic = begin_critic(config, reward_specs, mesh, workdir=workdir, start=start)
    frozen = {"reference": opening.reference()}
    for name, path in models.items() if opening.scored else ():
        if path == start:  # with adapters its parameters are frozen as the critic's, and not held twice
            frozen[name] = critic.completed(reward_specs, mesh, start=path)
        else:
            frozen[name] = restore_model(path, reward_specs, mesh)
    warm_up = warm_up_iterations(config, start)
    rule = reward_rule(
        config, settings, gamma=settings.gamma, lam=settings.lam, warm_up=warm_up * settings.rollout_size
    )
    scale, rows = critic_scale(start), settings.rollout_size // row_share(mesh)[1]
    return opening.stage(
        judge=make_judge(opening.model, config.compute, rule, scale, most=settings.judge_batch), rule=rule, frozen=frozen,
        loss=ppo_loss(opening.model, config.compute, settings, scale),
        empty=empty_rollout(rows, config.data.prompt_length, settings.new_tokens),
        control=KlControl(settings.beta, settings.kl_target, settings.kl_horizon, warm_up), critic=critic,
    )  # fmt: skip


def warm_up_iterations(config: PpoConfig, start: str) -> int:
    """How many iterations are for the critic alone, which begins as the reward model in `start`, or ("") with a random head."""
    if config.ppo.critic_warmup >= 0:
        return config.ppo.critic_warmup
    steps = config.ppo.rollout_size // config.loop.batch_size * config.ppo.epochs
    return 0 if start else config.loop.steps // steps // 20


def begin_critic(config: PpoConfig, reward_specs: Specs, mesh: Mesh, *, workdir: Path, start: str) -> Begin:
    """The critic: the reward model in `start`, its head become the value head; without one, the policy's trunk."""
    if not start:
        specs = {"trunk": reward_specs["trunk"], "value_head": reward_specs["reward_head"]}
        return begin(config, specs, mesh, workdir=workdir, name="lora_critic")
    begun = begin(config, reward_specs, mesh, workdir=workdir, start=start, name="lora_critic")

    def renamed(tree: dict[str, Any]) -> dict[str, Any]:
        return {("value_head" if name == "reward_head" else name): part for name, part in tree.items()}

    return dataclasses.replace(begun, specs=renamed(begun.specs), init=lambda: renamed(begun.init()))


def critic_scale(start: str) -> ScoreStatistics:
    """The statistics that the reward stage stored beside the model that the critic begins as; none: its scores as they are."""
    found = read_meta(start).get("scores") if start else None
    if start and not found:
        log.warning(
            "%s: holds no statistics of the reward model's scores, so the critic begins with scores of any mean and deviation "
            "where whitened rewards have 0 and 1; a reward stage stores them with its last checkpoint if its score_pairs is "
            "not 0", newest_step(start) / "meta" / "metadata",
        )  # fmt: skip
    return ScoreStatistics(found["mean"], found["std"]) if found else UNSCALED
