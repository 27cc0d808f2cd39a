"""PPO (paper section 3.2.3): maximise E[R~_c] - beta KL(pi || pi_0) with the clipped objective, one pass over each rollout.

What the paper leaves open, and what is done here:
1. The critic is a model of its own, started from the helpfulness reward model, head included, its scores standardised.
2. The KL term is folded into token rewards, the score stands at the last token; advantages by GAE.
3. The score is whitened with the batch's mean and deviation before the KL term; a missing EOS costs a constant.
4. One epoch over each rollout: 512 / 64 = 8 gradient steps an iteration.
5. With adapters (`config.lora`) policy and critic adapt the frozen chat and reward model, which are reference and scorer too.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.dialog import encode_prompt
from llama_jax.data.loader import IndexedBatches
from llama_jax.data.sources import read_prompts
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop.restore import restore_model
from llama_jax.model import heads
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Specs
from llama_jax.pretrain.base import Begin, StageConfig, begin, check_start, load_tokenizer, meta, process_slice
from llama_jax.reward.held_out import ScoreStatistics
from llama_jax.reward.scorers import REWARD_MODELS, HostScorers, RewardMix
from llama_jax.rlhf.held_out import Evaluate, stage_evaluate
from llama_jax.rlhf.rollout import (
    UNSCALED,
    Frozen,
    Judge,
    KlControl,
    PromptBatch,
    RewardRule,
    Roller,
    Rollout,
    RolloutSource,
    critic_values,
    empty_rollout,
    make_judge,
    response_states,
)
from llama_jax.sampling.generate import make_sampler, pad_left, row_keys
from llama_jax.training import optimizer
from llama_jax.training.checkpoint import read_meta
from llama_jax.training.stage import Loss, Metrics, Stage, Weighted


@dataclasses.dataclass(frozen=True)
class PpoData:
    """Prompts (JSONL) and the longest one that is taken; longer ones are left out and counted.

    held_out: prompts whose reward is measured every `loop.eval_every` steps and at the end; empty: none.
    """

    prompts: str
    prompt_length: int
    held_out: str = ""


@dataclasses.dataclass(frozen=True)
class PpoSettings:
    """The numbers of the algorithm; the paper's are in configs/ppo.py."""

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

    def __post_init__(self):
        check_settings("ppo", self)
        if self.kl_target < 0 or not self.kl_horizon > 0:
            raise ValueError(
                f"ppo.kl_target, ppo.kl_horizon: expected 0 or more, and more than 0; got {self.kl_target}, {self.kl_horizon}"
            )


def check_settings(name: str, settings: Any) -> None:
    """ValueError naming a number that PPO or GRPO cannot work with."""
    for field, least in (("rollout_size", 1), ("new_tokens", 1), ("epochs", 1), ("beta", 0)):
        if getattr(settings, field) < least:
            raise ValueError(f"{name}.{field}: expected at least {least}, got {getattr(settings, field)}")
    if not settings.temperature > 0:
        raise ValueError(f"{name}.temperature: expected a positive number, got {settings.temperature}")
    if settings.importance_cap and settings.importance_cap < 1:
        raise ValueError(f"{name}.importance_cap: expected 0 (off) or at least 1, got {settings.importance_cap}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoConfig(StageConfig):
    """See configs/ppo.py. `start` is the policy's and the reference's checkpoint."""

    data: PpoData
    ppo: PpoSettings
    helpfulness: str  # workdirs of the reward models; without them (see `reward`) the critic begins with the policy's trunk
    safety: str
    reward: RewardMix = RewardMix()


def ppo_loss(
    config: ModelConfig, compute: Compute, settings: PpoSettings, scale: ScoreStatistics = UNSCALED
) -> Loss:  # fmt: skip
    """({policy, critic}, Rollout rows) -> clipped policy loss + value_weight * clipped value loss, per response token."""

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
        mask = batch.mask.astype(jnp.float32)
        policy, ratio, clipped = clipped_policy_loss(log_probs, batch.log_probs, batch.advantages, clip=settings.clip)
        value = clipped_value_loss(values, batch.values, batch.returns, clip=settings.value_clip)
        count = jnp.sum(mask)

        def mean_of(x: jax.Array) -> Weighted:
            return Weighted(jnp.sum(x * mask), count)

        log_ratio = log_probs - batch.log_probs
        metrics = {
            "policy_loss": mean_of(policy * batch.importance),
            "value_loss": mean_of(value),
            "clip_fraction": mean_of(clipped),
            # k3, never negative; its mean is an estimate of KL(old || new) over this update.
            "approx_kl": mean_of(ratio - 1 - log_ratio),
            "policy_entropy": mean_of(entropy),
            "ratio_deviation": Weighted(jnp.max(jnp.abs(ratio - 1) * mask), jnp.ones(())),
        }
        return mean_of(policy * batch.importance + settings.value_weight * value), metrics

    return loss


def clipped_policy_loss(
    log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, *, clip: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = pi / pi_old; also r and where the clip acted. # [B, N] x 3"""
    ratio = jnp.exp(jnp.clip(log_probs - old_log_probs, -20.0, 20.0))
    unclipped = -advantages * ratio
    bounded = -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    return jnp.maximum(unclipped, bounded), ratio, (bounded > unclipped).astype(jnp.float32)


def clipped_value_loss(values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float) -> jax.Array:
    """Half the larger of two squared errors: of the value, and of the value kept within `clip` of the old. # [B, N]"""
    bounded = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(bounded - returns))


def check_first_step(step: int, metrics: Mapping[str, float], *, minibatches: int, tolerance: float, name: str = "ppo") -> None:
    """On an iteration's first mini-batch the policy is the one that was rolled out: ratio 1, KL 0, nothing clipped.

    Anything else means that rollout and update do not compute the same log-probabilities. The tolerance is for rounding:
    the two are different compiled programs.
    """
    if step % minibatches:
        return
    if metrics["ratio_deviation"] > tolerance or abs(metrics["approx_kl"]) > tolerance**2 or metrics["clip_fraction"] > 0:
        raise RuntimeError(
            f"{name}: step {step} begins an iteration, but its ratio is off 1 by {metrics['ratio_deviation']:.2e}, "
            f"approx_kl {metrics['approx_kl']:.2e}, clip_fraction {metrics['clip_fraction']:.2e}; expected at most "
            f"{tolerance:.0e}, {tolerance**2:.0e} and 0"
        )


def encode_prompts(path: str, tokenizer: Tokenizer, *, length: int) -> list[tuple[dict[str, Any], list[int]]]:
    """The prompts of a file that have at most `length` tokens, with their ids; ConfigError if there is none."""
    rows = read_prompts(path)
    encoded = [(row, encode_prompt(row["messages"], tokenizer, where=path)) for row in rows]
    kept = [(row, ids) for row, ids in encoded if len(ids) <= length]
    if not kept:
        raise ConfigError(f"{path}: none of {len(rows)} prompts fits into {length} tokens")
    return kept


def check_rewards(config: Any, model: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Whether reward models score; ConfigError if they are missing, unused, or of another model than the policy's."""
    used = REWARD_MODELS in config.reward.scorers
    for name in ("helpfulness", "safety"):
        path = getattr(config, name)
        if used and not path:
            raise ConfigError(f"config.{name}: reward.scorers names {REWARD_MODELS!r}; expected a workdir, got nothing")
        if path:
            check_start(path, model, tokenizer)
    return used


def rollout_prompts(
    config: Any, settings: Any, tokenizer: Tokenizer, model: ModelConfig, *, answers: int = 1
) -> tuple[IndexedBatches, list[dict[str, Any]]]:
    """Batches of prompts, `answers` draws for each left to the source, and the rows of the data file."""
    length = config.data.prompt_length
    if length + settings.new_tokens > model.max_length:
        raise ConfigError(
            f"data.prompt_length={length} + {config.stage}.new_tokens={settings.new_tokens} exceed the model's "
            f"{model.max_length}"
        )
    prompts = encode_prompts(config.data.prompts, tokenizer, length=length)
    examples = [(bool(row["is_safety"]), ids, number) for number, (row, ids) in enumerate(prompts)]
    batches = IndexedBatches(
        examples, functools.partial(collate_prompts, length=length), settings.rollout_size // answers, config.loop.seed,
        **process_slice(),
    )  # fmt: skip
    return batches, [row for row, _ in prompts]


def make_roller(
    config: Any, settings: Any, judge: Judge, frozen: Frozen, rows: list[dict[str, Any]], tokenizer: Tokenizer,
    model: ModelConfig,
) -> Roller:  # fmt: skip
    """The roller of a stage's policy."""
    return Roller(
        sample=make_sampler(
            model, table.table(model, head="lm_head"), compute=config.compute, eos_id=tokenizer.eos_id,
            max_new_tokens=settings.new_tokens, temperature=settings.temperature,
        ),
        judge=judge,
        frozen=frozen,
        keys=functools.partial(row_keys, config.loop.seed),
        score=HostScorers.of(config.reward, rows, tokenizer),
    )  # fmt: skip


def held_out_reward(
    config: Any, settings: Any, roller: Roller, rule: RewardRule, tokenizer: Tokenizer, model: ModelConfig, mesh: Mesh
) -> Evaluate | None:
    """The stage's `evaluate`, where it has held-out prompts."""
    if not config.data.held_out:
        return None
    length = config.data.prompt_length
    return stage_evaluate(
        config, settings, roller, rule, prompts=encode_prompts(config.data.held_out, tokenizer, length=length),
        collate=functools.partial(collate_prompts, length=length), tokenizer=tokenizer, model=model, mesh=mesh,
    )  # fmt: skip


def reward_rule(config: Any, settings: Any, *, gamma: float = 1.0, lam: float = 1.0) -> RewardRule:
    """The rule of a stage's settings."""
    return RewardRule(
        beta=settings.beta, gamma=gamma, lam=lam, safety_threshold=settings.safety_threshold,
        missing_eos_penalty=settings.missing_eos_penalty, temperature=settings.temperature,
        model_weight=config.reward.weighted().get(REWARD_MODELS, 0.0), importance_cap=settings.importance_cap,
    )  # fmt: skip


def rounding(compute: Compute) -> float:
    """How far the ratio of the first step may be off 1.

    bfloat16 keeps 8 bits: a product rounded the other way moves a log-probability by a few thousandths.
    """
    return 1e-4 if compute.matmul == "float32" else 0.1


def make_stage(config: PpoConfig, mesh: Mesh, workdir: Path) -> Stage:
    """The PPO stage."""
    if not config.start:
        raise ConfigError("config.start: PPO starts from a chat model; expected a stage's workdir, got nothing")
    model, tokenizer = load_tokenizer(config)
    scored = check_rewards(config, model, tokenizer)
    settings, length = config.ppo, config.data.prompt_length
    batches, rows = rollout_prompts(config, settings, tokenizer, model)
    policy_specs, reward_specs = table.table(model, head="lm_head"), table.table(model, head="reward_head")
    policy = begin(config, policy_specs, mesh, workdir=workdir)
    critic = begin_critic(config, reward_specs, mesh, workdir=workdir)
    specs = {"policy": policy.specs, "critic": critic.specs}
    frozen = {"reference": policy.completed(policy_specs, mesh, start=config.start)}
    if scored:
        frozen["helpfulness"] = critic.completed(reward_specs, mesh, start=config.helpfulness)
        frozen["safety"] = restore_model(config.safety, reward_specs, mesh)
    rule = reward_rule(config, settings, gamma=settings.gamma, lam=settings.lam)
    scale = critic_scale(config.helpfulness)
    judge = make_judge(model, config.compute, rule, scale)
    roller = make_roller(config, settings, judge, frozen, rows, tokenizer, model)
    source = RolloutSource(
        batches, roller, mesh=mesh,
        empty=empty_rollout(settings.rollout_size // jax.process_count(), length, settings.new_tokens),
        size=settings.rollout_size, rows=config.loop.batch_size, seed=config.loop.seed, epochs=settings.epochs,
        control=KlControl(settings.beta, settings.kl_target, settings.kl_horizon),
    )  # fmt: skip
    return Stage(
        name="ppo",
        specs=specs,
        init=lambda: {"policy": policy.init(), "critic": critic.init()},
        frozen={"policy": policy.frozen, "critic": critic.frozen},
        optimizer=optimizer.make(config.optim, steps=config.loop.steps, decay=table.decay_mask(specs)),
        loss=ppo_loss(model, config.compute, settings, scale),
        source=source,
        evaluate=held_out_reward(config, settings, roller, rule, tokenizer, model, mesh),
        tokens_per_step=config.loop.batch_size * (length + settings.new_tokens),
        show="reward",
        check=functools.partial(
            check_first_step, minibatches=source.minibatches, tolerance=rounding(config.compute), name="ppo"
        ),
        meta=meta(config, model, tokenizer) | policy.meta | critic.meta,
    )  # fmt: skip


def begin_critic(config: PpoConfig, reward_specs: Specs, mesh: Mesh, *, workdir: Path) -> Begin:
    """The critic: the helpfulness reward model, its head become the value head; without one, the policy's trunk."""
    if not config.helpfulness:
        specs = {"trunk": reward_specs["trunk"], "value_head": reward_specs["reward_head"]}
        return begin(config, specs, mesh, workdir=workdir, name="lora_critic")
    begun = begin(config, reward_specs, mesh, workdir=workdir, start=config.helpfulness, name="lora_critic")

    def renamed(tree: dict[str, Any]) -> dict[str, Any]:
        return {("value_head" if name == "reward_head" else name): part for name, part in tree.items()}

    return dataclasses.replace(begun, specs=renamed(begun.specs), init=lambda: renamed(begun.init()))


def critic_scale(helpfulness: str) -> ScoreStatistics:
    """The statistics that the reward stage stored beside the model that the critic begins as; none: its scores as they are."""
    found = read_meta(helpfulness).get("scores") if helpfulness else None
    return ScoreStatistics(found["mean"], found["std"]) if found else UNSCALED


def collate_prompts(examples: Any, *, length: int) -> PromptBatch:
    """(is_safety, ids, row of the data file) triples to a batch; `RolloutSource` numbers its draws."""
    is_safety, ids, rows = zip(*examples, strict=True)
    tokens, valid = pad_left(ids, length)
    return PromptBatch(
        tokens=tokens, valid=valid, is_safety=np.array(is_safety, bool), index=np.zeros(len(ids), np.uint32),
        row=np.array(rows, np.int32),
    )  # fmt: skip
