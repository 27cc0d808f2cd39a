"""The reward on held-out prompts, by which PPO and GRPO tell their best checkpoint and stop early.

The scorers are those of training, and every evaluation draws with the same random numbers: two policies differ in their
answers because they differ, not by luck. The reward is reported as in training, before whitening and without the KL term.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.data.loader import WHOLE, IndexedBatches, Share
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.parallel.axes import batch_shards
from llama_jax.pretrain.base import process_share
from llama_jax.reward.scorers import HostScorers, OtherScores
from llama_jax.rlhf.judge import Dialogs, Frozen, PromptBatch, RewardRule, answer_scores, model_logits
from llama_jax.rlhf.rollout import Roller
from llama_jax.sampling.generate import Samples
from llama_jax.sampling.keys import row_keys
from llama_jax.training.stage import Weighted
from llama_jax.training.step import put_batch

Evaluate = Callable[[Mapping[str, Any]], dict[str, float]]


@flax.struct.dataclass
class HeldOut:
    """A batch of prompts; the last one is filled up with prompts of weight 0."""

    prompts: PromptBatch
    weight: Any  # [B] float32


def held_out_batches(
    examples: Sequence[tuple[bool, list[int], int]], collate: Callable[[Any], PromptBatch], *, most: int, mesh: Mesh,
    share: Share = WHOLE,
) -> list[HeldOut]:  # fmt: skip
    """All prompts in the order of the file, in batches of at most `most` rows that the mesh and the processes can divide.

    Each prompt has a number of its own, for its random key.
    """
    unit = batch_shards(mesh)
    rows = min(most, unit * -(-len(examples) // unit))

    def of(weighted: Sequence[tuple[Any, float, int]]) -> HeldOut:
        parts, weights, numbers = zip(*weighted, strict=True)
        return HeldOut(collate(parts).replace(index=np.array(numbers, np.uint32)), np.array(weights, np.float32))

    batches = IndexedBatches(
        [(example, 1.0, number) for number, example in enumerate(examples)], of, rows, seed=0, shuffle=False,
        blank=lambda row: (row[0], 0.0, row[2]), share=share,
    )  # fmt: skip
    return list(batches.eval_batches())


def make_measure(config: ModelConfig, compute: Compute, rule: RewardRule) -> Callable[..., dict[str, Weighted]]:
    """The compiled part after sampling: (policy, frozen, HeldOut, samples, other scores or None) -> sums and weights."""

    @jax.jit
    def measure(policy: Any, frozen: Frozen, batch: HeldOut, samples: Samples, other: OtherScores | None):
        prompts, weight = batch.prompts, batch.weight
        dialogs = Dialogs.of(prompts, samples, config, compute)
        _, parts = answer_scores(model_logits(frozen, dialogs), prompts, other, rule)
        track = {"helpfulness": ~prompts.is_safety, "safety": prompts.is_safety}
        sums = {
            name if name == "reward" else f"score/{name}": _weighted(values, weight * track.get(name, 1.0))
            for name, values in parts.items()
        }
        if "reference" in frozen:
            ours, theirs = (dialogs.log_probs(p, temperature=rule.temperature)[0] for p in (policy, frozen["reference"]))
            sums["kl"] = _weighted(jnp.sum((ours - theirs) * samples.mask, axis=1), weight)
        sums["eos_rate"] = _weighted(samples.ended.astype(jnp.float32), weight)
        sums["response_length"] = _weighted(jnp.sum(samples.mask, axis=1).astype(jnp.float32), weight)
        return sums

    return measure


def _weighted(values: jax.Array, weight: jax.Array) -> Weighted:
    return Weighted(jnp.sum(values * weight), jnp.sum(weight))


def make_evaluate(
    roller: Roller, batches: Sequence[HeldOut], measure: Callable[..., dict[str, Weighted]], *, score: HostScorers | None,
    seed: int, mesh: Mesh,
) -> Evaluate:  # fmt: skip
    """A stage's `evaluate`: means over all held-out prompts. A metric that nothing was measured for is left out."""
    keys = functools.partial(row_keys, seed)

    def evaluate(params: Mapping[str, Any]) -> dict[str, float]:
        total: dict[str, Weighted] | None = None
        for local in batches:
            batch = put_batch(local, mesh)
            prompts = batch.prompts
            samples = roller.sample(params["policy"], prompts.tokens, prompts.valid, keys(prompts.index))
            other = None if score is None else score(prompts.row, samples.tokens, samples.mask)
            sums = measure(params["policy"], roller.frozen, batch, samples, other)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return {name: float(value.mean()) for name, value in (total or {}).items() if value.weight > 0}

    return evaluate


def stage_evaluate(
    config: Any, settings: Any, roller: Roller, rule: RewardRule, *, prompts: Sequence[tuple[dict[str, Any], list[int]]],
    score: HostScorers | None, collate: Callable[[Any], PromptBatch], model: ModelConfig, mesh: Mesh,
) -> Evaluate:  # fmt: skip
    """`evaluate` of a stage's config, for encoded held-out prompts. Their random numbers are none of training's.

    `settings` are those of the stage `on_mesh`: a part has rows of every device, as in training.
    """
    examples = [(bool(row["is_safety"]), ids, number) for number, (row, ids) in enumerate(prompts)]
    most = min(settings.rollout_size, settings.judge_batch or settings.rollout_size)
    batches = held_out_batches(examples, collate, most=most, mesh=mesh, share=process_share(mesh))
    measure = make_measure(model, config.compute, rule)
    return make_evaluate(roller, batches, measure, score=score, seed=config.loop.seed + 1, mesh=mesh)
