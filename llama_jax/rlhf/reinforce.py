"""What PPO and GRPO share: prompts and scorers, the clipped objective, the check of the first step, the stage around them."""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError, check_least, check_shares
from llama_jax.data.dialog import encode_prompt
from llama_jax.data.loader import IndexedBatches
from llama_jax.data.mixture import files_of, mix, whole_or_share
from llama_jax.data.sources import read_prompts
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.pretrain.base import Begin, begin, check_reward_model, load_tokenizer, meta
from llama_jax.reward.scorers import REWARD_MODELS, HostScorers
from llama_jax.rlhf.chips import check_generates
from llama_jax.rlhf.clock import StepClock
from llama_jax.rlhf.held_out import stage_evaluate
from llama_jax.rlhf.judge import Frozen, Judge, PromptBatch, RewardRule
from llama_jax.rlhf.reward_watch import watched
from llama_jax.rlhf.rollout import KlControl, Roller, RolloutSource, check_size, draws_in_slots, on_mesh
from llama_jax.sampling.answers import make_slot_sampler
from llama_jax.sampling.generate import Samples, make_sampler, pad_left
from llama_jax.sampling.keys import row_keys
from llama_jax.training import optimizer
from llama_jax.training.attempt import waypoint
from llama_jax.training.recorder import Diverged
from llama_jax.training.stage import Loss, Stage

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RolloutData:
    """Prompts (JSONL, one file or several) and the longest one that is taken; longer ones are left out and counted.

    held_out: prompts whose reward is measured every `loop.eval_every` steps and at the end; empty: none.
    shares: of each file of `prompts` in the mix; 0: all of it; none: all of all. A tenth of adversarial prompts:
      `prompts=("prompts.jsonl", "adversarial.jsonl")`, `shares=(0.0, 0.1)`.
    """

    prompts: str | tuple[str, ...]
    prompt_length: int
    held_out: str = ""
    shares: tuple[float, ...] = ()

    def __post_init__(self):
        check_prompts("data", self)


def check_prompts(group: str, data: Any) -> None:
    """ConfigError for `prompts` and `shares`, of a RolloutData or of what has the same fields, that make no mix."""
    whole_or_share(files_of(data.prompts), data.shares, group=group, field="prompts")


def check_settings(name: str, settings: Any) -> None:
    """ValueError naming a number that PPO or GRPO cannot work with."""
    check_least(name, settings, new_tokens=1, epochs=1, beta=0, missing_eos_penalty=0)
    if settings.rollout_size < 2:
        raise ValueError(
            f"{name}.rollout_size: expected at least 2, got {settings.rollout_size}: scores are whitened over the rollout, and "
            "that of one response alone becomes 0"
        )
    check_least(name, settings, sampling_batch=0, judge_batch=0)
    check_shares(name, settings, "safety_threshold")
    if not 0 < settings.clip < 1:
        raise ValueError(f"{name}.clip: expected a number between 0 and 1, got {settings.clip}")
    if not 0 < settings.temperature < math.inf:
        raise ValueError(f"{name}.temperature: expected a positive number, got {settings.temperature}")
    if settings.importance_cap and not settings.importance_cap >= 1:
        raise ValueError(f"{name}.importance_cap: expected 0 (off) or at least 1, got {settings.importance_cap}")


@dataclasses.dataclass(frozen=True)
class Opening:
    """A stage of reinforcement learning before its own loss: the policy begun, prompts and scorers read and checked.

    Attributes:
      config: PpoConfig or GrpoConfig; `settings`: its numbers of the algorithm, `on_mesh`.
      scored: whether reward models score.
      batches: of prompts, `answers` draws for each left to the source.
      scorers, held_out_scorers: those that are no reward models, of the mixed rows of the data files and of the held-out ones.
      held_out: the encoded held-out prompts; none: nothing is measured.
    """

    config: Any
    settings: Any
    mesh: Mesh
    model: ModelConfig
    tokenizer: Tokenizer
    scored: bool
    batches: IndexedBatches
    scorers: HostScorers | None
    held_out: list[tuple[dict[str, Any], list[int]]]
    held_out_scorers: HostScorers | None
    policy: Begin

    @classmethod
    def of(cls, config: Any, settings: Any, mesh: Mesh, workdir: Path, *, answers: int = 1) -> "Opening":
        """Reads the prompts and begins the policy; ConfigError for what cannot be rolled out."""
        settings = on_mesh(settings, mesh)
        if not config.start:
            name = config.stage.upper()
            raise ConfigError(f"config.start: {name} starts from a chat model; expected a stage's workdir, got nothing")
        check_size(settings.rollout_size, config.loop.batch_size, mesh)
        model, tokenizer = load_tokenizer(config)
        at_once = settings.sampling_batch if draws_in_slots(settings) else settings.rollout_size
        check_generates(model, config.compute, mesh, rows=at_once, length=config.data.prompt_length + settings.new_tokens)
        scored = check_rewards(config, model, tokenizer)
        batches, rows = rollout_prompts(config, settings, tokenizer, model, mesh, answers=answers)
        path, length = config.data.held_out, config.data.prompt_length
        held_out = encode_prompts(path, tokenizer, length=length) if path else []
        scorers, held_out_scorers = (
            HostScorers.of(config.reward, some, tokenizer) for some in (rows, [row for row, _ in held_out])
        )
        # What is wrong with the files and scorers has been said: from here on models are loaded, up to four of them.
        reads = ("start", *reward_models(config))
        policy = begin(config, table.table(model, head="lm_head"), mesh, workdir=workdir, reads=reads)
        return cls(
            config, settings, mesh, model, tokenizer, scored, batches, scorers, held_out, held_out_scorers, policy
        )

    def reference(self) -> Params:
        """The policy's start, which the KL term holds it to."""
        return self.policy.completed(table.table(self.model, head="lm_head"), self.mesh, start=self.config.start)

    def stage(
        self, *, judge: Judge, rule: RewardRule, frozen: Frozen, loss: Loss, empty: Any, control: KlControl,
        answers: int = 1, critic: Begin | None = None,
    ) -> Stage:  # fmt: skip
        """The stage. `frozen` are the models that only judge, `empty` is a rollout of zeros, `critic` is trained beside."""
        config, settings, model = self.config, self.settings, self.model
        parts = {"policy": self.policy} | ({"critic": critic} if critic else {})
        specs = {name: part.specs for name, part in parts.items()}
        roller = Roller(
            sample=row_sampler(config, settings, self.tokenizer, model), judge=judge, frozen=frozen,
            keys=functools.partial(row_keys, config.loop.seed), score=self.scorers,
        )  # fmt: skip
        source = RolloutSource(
            self.batches, roller, mesh=self.mesh, empty=empty, size=settings.rollout_size, rows=config.loop.batch_size,
            answers=answers, epochs=settings.epochs, control=control, seed=config.loop.seed,
        )  # fmt: skip
        evaluate = None
        if self.held_out:
            evaluate = stage_evaluate(
                config, settings, roller, rule, prompts=self.held_out, score=self.held_out_scorers,
                collate=functools.partial(collate_prompts, length=config.data.prompt_length), model=model, mesh=self.mesh,
            )  # fmt: skip
        noted = meta(config, model, self.tokenizer)
        for part in parts.values():
            noted |= part.meta
        return Stage(
            name=config.stage,
            specs=specs,
            init=lambda: {name: part.init() for name, part in parts.items()},
            frozen={name: part.frozen for name, part in parts.items()},
            optimizer=optimizer.make(config.optim, steps=config.loop.steps, decay=table.decay_mask(specs)),
            loss=loss,
            source=source,
            evaluate=watched(evaluate, source.watch, config.stage),
            tokens_per_step=config.loop.batch_size * (config.data.prompt_length + settings.new_tokens),
            show="reward",
            check=StepCheck(source.clock, source.minibatches, rounding(config.compute), config.stage),
            meta=noted,
            still=control.warm_up * source.minibatches,
        )  # fmt: skip


def clipped_policy_loss(
    log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, *, clip: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = pi / pi_old; also r and where the clip acted. # [B, N] x 3"""
    ratio = jnp.exp(jnp.clip(log_probs - old_log_probs, -20.0, 20.0))
    unclipped = -advantages * ratio
    bounded = -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    return jnp.maximum(unclipped, bounded), ratio, (bounded > unclipped).astype(jnp.float32)


def ratio_metrics(log_probs: jax.Array, old_log_probs: jax.Array, *, compute: Compute) -> dict[str, jax.Array]:
    """What tells whether rollout and update agree: each token's estimate of KL(old || new), and whether its ratio is further
    off 1 than rounding moves it. # [B, N] x 2 -> float32 [B, N] each"""
    log_ratio = jnp.clip(log_probs - old_log_probs, -20.0, 20.0)
    off = jnp.abs(jnp.expm1(log_ratio)) > rounding(compute).ratio
    # k3, never negative. As ratio - 1 - log_ratio it would be nothing but rounding where the two are nearly the same.
    return {"approx_kl": jnp.expm1(log_ratio) - log_ratio, "ratio_off": off.astype(jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How far the probabilities of the same tokens by two compiled programs may lie apart.

    Attributes:
      ratio: how far that of a token may be off 1; `share`: of the tokens that may be further off.
      kl: the mean of the KL estimate.
      largest: how far the one token may be off that is furthest; beyond it there is a warning.
      drift: how far log-probabilities of the sampler may be off those of the trainer in the mean; so is there beyond it.
    """

    ratio: float
    share: float
    kl: float
    largest: float
    drift: float


def rounding(compute: Compute) -> Rounding:
    """By the type of matrix products.

    bfloat16 keeps 8 bits: a product that is rounded the other way moves a log-probability by thousandths, and layers add up.
    Between bfloat16 and float32, a real model of 30 layers (SmolLM2-135M) gave ratios off by more than 0.1 for a tenth of its
    tokens, and by 0.28 at most. What computes something else (other temperatures, positions or parameters) moves most tokens.
    """
    if compute.matmul_dtype == jnp.float32:
        return Rounding(ratio=1e-4, share=0.0, kl=1e-8, largest=1e-4, drift=1e-4)
    return Rounding(ratio=0.2, share=0.05, kl=1e-2, largest=0.5, drift=0.1)


class OffPolicy(Diverged):
    """A rollout and the first update on it do not compute the same probabilities."""


class StepCheck:
    """A stage's `check`: what the first step of an iteration must show; and the clock is told when each step ended.

    On the first mini-batch the policy is the one that was rolled out: ratio 1, KL 0, nothing clipped. Anything beyond rounding
    means that rollout and update do not compute the same log-probabilities. Both are the trainer's; that the sampler drew by
    others spoils no invariant, as weights (`importance_cap`) may make up for it, and is told once.
    """

    def __init__(self, clock: StepClock, minibatches: int, bounds: Rounding, name: str):
        self.clock, self.minibatches, self.bounds, self.name = clock, minibatches, bounds, name
        self.warned = self.told_drift = False

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """OffPolicy if they do not agree."""
        self.clock.ends(step, time.monotonic())
        if step % self.minibatches:
            return
        bounds = self.bounds
        if metrics["sampler_drift_mean"] > bounds.drift and not self.told_drift:
            self.told_drift = True
            log.warning(
                "%s: at step %d, which begins an iteration, the log-probabilities of sampler and trainer lie %.2g apart in the "
                "mean, and %.2g at most; rounding explains a mean of %g. The sampler may draw at another temperature, from "
                "other parameters or in other types than are trained: what it drew is then off the policy (said once; the log "
                "has `sampler_drift_mean` of every iteration)",
                self.name, step, metrics["sampler_drift_mean"], metrics["sampler_drift"], bounds.drift,
            )  # fmt: skip
        if metrics["ratio_off"] > bounds.share or abs(metrics["approx_kl"]) > bounds.kl:
            raise OffPolicy(
                f"{self.name}: step {step} begins an iteration, but rollout and update do not give its tokens the same "
                f"probabilities: approx_kl is {metrics['approx_kl']:.2e}, expected at most {bounds.kl:.0e}; the ratio is off 1 "
                f"by more than {bounds.ratio:g} for {100 * metrics['ratio_off']:.3g} % of the tokens, expected at most "
                f"{100 * bounds.share:g} %; the largest deviation is {metrics['ratio_deviation']:.2e}"
            )
        if metrics["ratio_deviation"] > bounds.largest and not self.warned:
            self.warned = True
            log.warning(
                "%s: at step %d, which begins an iteration, the ratio of one token is off 1 by %.2f; the mean, and all but a "
                "few tokens, are as bfloat16 rounds them (said once; the log has `ratio_deviation` of every step)",
                self.name, step, metrics["ratio_deviation"],
            )  # fmt: skip


def encode_prompts(path: str, tokenizer: Tokenizer, *, length: int) -> list[tuple[dict[str, Any], list[int]]]:
    """The prompts of a file that have at most `length` tokens, with their ids; longer ones are counted in the log.

    ConfigError if there is none.
    """
    rows = read_prompts(path)
    encoded = [(row, encode_prompt(row["messages"], tokenizer, where=path)) for row in rows]
    kept = [(row, ids) for row, ids in encoded if len(ids) <= length]
    if not kept:
        raise ConfigError(f"{path}: none of {len(rows)} prompts fits into {length} tokens")
    if len(kept) < len(rows):
        log.warning(
            "%s: %d of %d prompts are longer than %d tokens and left out", path, len(rows) - len(kept), len(rows), length
        )
    return kept


def mixed_prompts(data: Any, tokenizer: Tokenizer, *, seed: int) -> list[tuple[dict[str, Any], list[int]]]:
    """The prompts of a RolloutData, or of what has the same fields, with their ids: each file's own in its share of the mix.

    ConfigError for a file of which no prompt fits.
    """
    files = files_of(data.prompts)
    fitting = [encode_prompts(path, tokenizer, length=data.prompt_length) for path in files]
    return mix(fitting, whole_or_share(files, data.shares), names=files, seed=seed, unit="prompts")


def check_rewards(config: Any, model: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Whether reward models score; ConfigError if they are missing, none, or of another model than the policy's."""
    used, models = REWARD_MODELS in config.reward.scorers, reward_models(config)
    if used and not models:
        raise ConfigError(
            f"config.helpfulness, config.safety: reward.scorers names {REWARD_MODELS!r}; expected the workdir of one at least, "
            "got nothing"
        )
    for name, path in models.items():
        check_reward_model(name, path, model, tokenizer)
    return used


def reward_models(config: Any) -> dict[str, str]:
    """Workdirs of the reward models that a config names. Where it names one alone, R_c is the score of that one."""
    return {name: path for name in ("helpfulness", "safety") if (path := getattr(config, name))}


def rollout_prompts(
    config: Any, settings: Any, tokenizer: Tokenizer, model: ModelConfig, mesh: Mesh, *, answers: int = 1
) -> tuple[IndexedBatches, list[dict[str, Any]]]:
    """Batches of prompts, `answers` draws for each left to the source, and the rows of the data files, as they are mixed."""
    length = config.data.prompt_length
    if length + settings.new_tokens > model.max_length:
        raise ConfigError(
            f"data.prompt_length={length} + {config.stage}.new_tokens={settings.new_tokens} exceed the model's "
            f"{model.max_length}"
        )
    prompts = mixed_prompts(config.data, tokenizer, seed=config.loop.seed)
    examples = [(bool(row["is_safety"]), ids, number) for number, (row, ids) in enumerate(prompts)]
    batches = IndexedBatches(
        examples, functools.partial(collate_prompts, length=length), settings.rollout_size // answers, config.loop.seed
    )
    return batches, [row for row, _ in prompts]


def row_sampler(config: Any, settings: Any, tokenizer: Tokenizer, model: ModelConfig) -> Callable[..., Samples]:
    """What draws a rollout: one program for all of it, or (`sampling_batch`) slots that row after row takes its place in."""
    how = {
        "compute": config.compute, "eos_id": tokenizer.eos_id, "max_new_tokens": settings.new_tokens,
        "temperature": settings.temperature,
    }  # fmt: skip
    if draws_in_slots(settings):
        # Between two answers the run is alive, and hears of SIGTERM: most of an iteration is its rollout.
        return make_slot_sampler(model, slots=settings.sampling_batch, progress=lambda _: waypoint(), **how)
    return make_sampler(model, table.table(model, head="lm_head"), **how)


def reward_rule(config: Any, settings: Any, *, gamma: float = 1.0, lam: float = 1.0, warm_up: int = 0) -> RewardRule:
    """The rule of a stage's settings."""
    return RewardRule(
        beta=settings.beta, gamma=gamma, lam=lam, safety_threshold=settings.safety_threshold,
        missing_eos_penalty=settings.missing_eos_penalty, temperature=settings.temperature,
        model_weight=config.reward.weighted().get(REWARD_MODELS, 0.0), importance_cap=settings.importance_cap,
        warm_up=warm_up,
    )  # fmt: skip


def collate_prompts(examples: Any, *, length: int) -> PromptBatch:
    """(is_safety, ids, row of the data) triples to a batch; `RolloutSource` numbers its draws."""
    is_safety, ids, rows = zip(*examples, strict=True)
    tokens, valid = pad_left(ids, length)
    return PromptBatch(
        tokens=tokens, valid=valid, is_safety=np.array(is_safety, bool), index=np.zeros(len(ids), np.uint32),
        row=np.array(rows, np.int32),
    )  # fmt: skip
