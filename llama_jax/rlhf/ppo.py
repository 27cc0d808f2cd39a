"""PPO (paper section 3.2.3): maximise E[R~_c] - beta KL(pi || pi_0) with the clipped objective, one pass over each rollout.

What the paper leaves open, and what is done here:
1. The critic is a model of its own, started from the helpfulness reward model, head included.
2. The KL term is folded into token rewards, the score stands at the last token; advantages by GAE.
3. The score is whitened with the batch's mean and deviation before the KL term; a missing EOS costs a constant.
4. One epoch over each rollout: 512 / 64 = 8 gradient steps an iteration.
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
from llama_jax.model import heads
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.parallel.axes import batch_sharding
from llama_jax.pretrain.base import StageConfig, check_start, load_tokenizer, meta, process_slice
from llama_jax.rlhf.rollout import PromptBatch, RewardRule, Roller, Rollout, empty_rollout, make_judge, response_states
from llama_jax.sampling.generate import make_sampler, pad_left, row_keys
from llama_jax.training import optimizer
from llama_jax.training.checkpoint import restore_model, restore_params
from llama_jax.training.stage import Loss, Metrics, Stage, Weighted
from llama_jax.training.step import put_batch


@dataclasses.dataclass(frozen=True)
class PpoData:
    """Prompts (JSONL) and the longest one that is taken; longer ones are left out and counted."""

    prompts: str
    prompt_length: int


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoConfig(StageConfig):
    """See configs/ppo.py. `start` is the policy's and the reference's checkpoint."""

    data: PpoData
    ppo: PpoSettings
    helpfulness: str  # workdirs of the reward models
    safety: str


def ppo_loss(config: ModelConfig, compute: Compute, settings: PpoSettings) -> Loss:
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
        values = heads.scores(params["critic"], states(params["critic"]), head="value_head")
        mask = batch.mask.astype(jnp.float32)
        policy, ratio, clipped = clipped_policy_loss(log_probs, batch.log_probs, batch.advantages, clip=settings.clip)
        value = clipped_value_loss(values, batch.values, batch.returns, clip=settings.value_clip)
        count = jnp.sum(mask)

        def mean_of(x: jax.Array) -> Weighted:
            return Weighted(jnp.sum(x * mask), count)

        log_ratio = log_probs - batch.log_probs
        metrics = {
            "policy_loss": mean_of(policy),
            "value_loss": mean_of(value),
            "clip_fraction": mean_of(clipped),
            # k3, never negative; its mean is an estimate of KL(old || new) over this update.
            "approx_kl": mean_of(ratio - 1 - log_ratio),
            "policy_entropy": mean_of(entropy),
            "ratio_deviation": Weighted(jnp.max(jnp.abs(ratio - 1) * mask), jnp.ones(())),
        }
        return mean_of(policy + settings.value_weight * value), metrics

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


def check_first_step(step: int, metrics: Mapping[str, float], *, minibatches: int, tolerance: float) -> None:
    """On an iteration's first mini-batch the policy is the one that was rolled out: ratio 1, KL 0, nothing clipped.

    Anything else means that rollout and update do not compute the same log-probabilities. The tolerance is for rounding:
    the two are different compiled programs.
    """
    if step % minibatches:
        return
    if metrics["ratio_deviation"] > tolerance or abs(metrics["approx_kl"]) > tolerance**2 or metrics["clip_fraction"] > 0:
        raise RuntimeError(
            f"ppo: step {step} begins an iteration, but its ratio is off 1 by {metrics['ratio_deviation']:.2e}, "
            f"approx_kl {metrics['approx_kl']:.2e}, clip_fraction {metrics['clip_fraction']:.2e}; expected at most "
            f"{tolerance:.0e}, {tolerance**2:.0e} and 0"
        )


class PpoSource:
    """Rolls out when an iteration begins and hands out its mini-batches; a checkpoint holds the rollout between them."""

    looks_at_params = True

    def __init__(self, prompts: IndexedBatches, roll: Roller, *, mesh: Mesh, settings: PpoSettings, rows: int,
                 prompt_length: int, seed: int):  # fmt: skip
        if settings.rollout_size % rows:
            raise ConfigError(f"ppo.rollout_size={settings.rollout_size} is no multiple of loop.batch_size={rows}")
        self.prompts, self.roll, self.mesh, self.rows, self.seed = prompts, roll, mesh, rows, seed
        self.size = settings.rollout_size
        self.minibatches = settings.rollout_size // rows
        self.rollout = put_batch(
            empty_rollout(settings.rollout_size // jax.process_count(), prompt_length, settings.new_tokens), mesh
        )
        layout = jax.tree.map(lambda x: batch_sharding(mesh, x.ndim), self.rollout)
        self._take = jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree), out_shardings=layout)

    def batch(self, step: int, params: dict[str, Any]) -> tuple[Rollout, Mapping[str, float]]:
        """Mini-batch `step % minibatches` of iteration `step // minibatches`."""
        iteration, part = divmod(step, self.minibatches)
        metrics: Mapping[str, float] = {}
        if part == 0:
            prompts = self.prompts.batch(iteration)
            # Each draw has a number of its own: a prompt that comes again is answered with other random numbers.
            first = iteration * self.size + self.prompts.process_index * len(prompts.index)
            prompts = prompts.replace(index=np.arange(first, first + len(prompts.index), dtype=np.uint32))
            self.rollout, metrics = self.roll(params, put_batch(prompts, self.mesh))
        key = jax.random.fold_in(jax.random.key(self.seed), iteration)
        order = jax.random.permutation(key, self.size)
        return self._take(self.rollout, order[part * self.rows : (part + 1) * self.rows]), metrics

    def state(self) -> Any:
        """The rollout that is being trained on."""
        return {"rollout": self.rollout}

    def restore(self, state: Any) -> None:
        """Goes on in the middle of an iteration."""
        self.rollout = state["rollout"]


def encode_prompts(path: str, tokenizer: Tokenizer, *, length: int) -> list[tuple[dict[str, Any], list[int]]]:
    """The prompts of a file that have at most `length` tokens, with their ids; ConfigError if there is none."""
    rows = read_prompts(path)
    encoded = [(row, encode_prompt(row["messages"], tokenizer, where=path)) for row in rows]
    kept = [(row, ids) for row, ids in encoded if len(ids) <= length]
    if not kept:
        raise ConfigError(f"{path}: none of {len(rows)} prompts fits into {length} tokens")
    return kept


def make_stage(config: PpoConfig, mesh: Mesh, workdir: Path) -> Stage:
    """The PPO stage."""
    del workdir
    if not config.start:
        raise ConfigError("config.start: PPO starts from a chat model; expected a stage's workdir, got nothing")
    model, tokenizer = load_tokenizer(config)
    for path in (config.helpfulness, config.safety):
        check_start(path, model, tokenizer)
    settings, length = config.ppo, config.data.prompt_length
    if length + settings.new_tokens > model.max_length:
        raise ConfigError(
            f"data.prompt_length={length} + ppo.new_tokens={settings.new_tokens} exceed the model's {model.max_length}"
        )
    policy = table.table(model, head="lm_head")
    critic = table.table(model, head="value_head")
    reward = table.table(model, head="reward_head")
    specs = {"policy": policy, "critic": critic}

    def init() -> dict[str, Any]:
        start = restore_params(config.helpfulness, reward, mesh)
        return {
            "policy": restore_model(config.start, policy, mesh),
            "critic": {"trunk": start["trunk"], "value_head": start["reward_head"]},
        }

    rule = RewardRule(
        beta=settings.beta, gamma=settings.gamma, lam=settings.lam, safety_threshold=settings.safety_threshold,
        missing_eos_penalty=settings.missing_eos_penalty, temperature=settings.temperature,
    )  # fmt: skip
    roll = Roller(
        sample=make_sampler(
            model, policy, compute=config.compute, eos_id=tokenizer.eos_id, max_new_tokens=settings.new_tokens,
            temperature=settings.temperature,
        ),
        judge=make_judge(model, config.compute, rule),
        frozen={
            "reference": restore_model(config.start, policy, mesh),
            "helpfulness": restore_params(config.helpfulness, reward, mesh),
            "safety": restore_params(config.safety, reward, mesh),
        },
        keys=functools.partial(row_keys, config.loop.seed),
    )  # fmt: skip
    prompts = encode_prompts(config.data.prompts, tokenizer, length=length)
    examples = [(row["is_safety"], ids) for row, ids in prompts]
    batches = IndexedBatches(
        examples, functools.partial(collate_prompts, length=length), settings.rollout_size, config.loop.seed,
        **process_slice(),
    )  # fmt: skip
    source = PpoSource(
        batches, roll, mesh=mesh, settings=settings, rows=config.loop.batch_size, prompt_length=length,
        seed=config.loop.seed,
    )  # fmt: skip
    return Stage(
        name="ppo",
        specs=specs,
        init=init,
        optimizer=optimizer.make(config.optim, steps=config.loop.steps, decay=table.decay_mask(specs)),
        loss=ppo_loss(model, config.compute, settings),
        source=source,
        tokens_per_step=config.loop.batch_size * (length + settings.new_tokens),
        show="reward",
        check=functools.partial(
            check_first_step, minibatches=source.minibatches,
            # bfloat16 keeps 8 bits: a product rounded the other way moves a log-probability by a few thousandths.
            tolerance=1e-4 if config.compute.matmul == "float32" else 0.1,
        ),
        meta=meta(config, model, tokenizer),
    )


def collate_prompts(examples: Any, *, length: int) -> PromptBatch:
    """(is_safety, ids) pairs to a batch; `PpoSource` numbers its rows."""
    is_safety, ids = zip(*examples, strict=True)
    tokens, valid = pad_left(ids, length)
    return PromptBatch(
        tokens=tokens, valid=valid, is_safety=np.array(is_safety, bool), index=np.zeros(len(ids), np.uint32)
    )
