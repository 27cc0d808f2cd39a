"""Direct preference optimisation (Rafailov et al. 2023): the policy learns from comparisons without reward model and rollout.

Not in the Llama 2 paper: the baseline that its RLHF is compared with, on the same comparisons, from the same start. The reward
that DPO fits implicitly is beta * (log pi(y|x) - log pi_0(y|x)), summed over the response's tokens, EOS included.

1. The reference pi_0 is the frozen start checkpoint. Its log-probabilities are computed with each batch, by the program that
   computes the policy's, so that resuming costs nothing and the first loss is that of two equal models.
2. The same prompt stands before both responses; only the last answer counts, as in the reward model's pairs.
3. Variants: label smoothing (conservative DPO), hinge (SLiC-HF), IPO (on sums, as published), an offset by degree of preference
   (ODPO, with the margins of the paper's Table 27) and a next-token term on the chosen response (as Llama 3 adds).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.loader import IndexedBatches
from llama_jax.model import heads
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel import compiler
from llama_jax.parallel.axes import batch_field, batch_sharding
from llama_jax.pretrain.base import StageConfig, begin, check_length, load_tokenizer, meta
from llama_jax.reward.comparisons import Comparison, encode_comparisons
from llama_jax.reward.held_out import preferred
from llama_jax.reward.stage import PairData, make_batches, mixed_pairs
from llama_jax.training import optimizer
from llama_jax.training.stage import LoopConfig, Loss, Metrics, Stage, Weighted, evaluation
from llama_jax.training.step import put_batch

Kind = Literal["sigmoid", "hinge", "ipo"]


@dataclasses.dataclass(frozen=True)
class DpoSettings:
    """The numbers of the algorithm; see configs/dpo.py."""

    beta: float
    kind: Kind = "sigmoid"
    label_smoothing: float = 0.0  # how often the labels are taken to be wrong; "sigmoid" only
    margin: Literal["none", "small", "large"] = "none"  # offset by degree of preference
    sft_weight: float = 0.0  # of -log pi(chosen) per token

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"dpo.beta: expected a positive number, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo.label_smoothing: expected 0 up to 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.kind != "sigmoid":
            raise ValueError(f"dpo.label_smoothing: belongs to kind 'sigmoid', got {self.kind!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(StageConfig):
    """See configs/dpo.py. `start` is the policy's and the reference's checkpoint."""

    data: PairData
    dpo: DpoSettings
    epochs: float = 1.0


@flax.struct.dataclass
class DpoBatch:
    """Pairs; index 0 of the second axis is the chosen response."""

    tokens: Any = batch_field("batch", "pair", "length")  # [B, 2, T] int32: the whole dialog
    targets: Any = batch_field("batch", "pair", "length")  # [B, 2, T] int32: the next token
    response: Any = batch_field("batch", "pair", "length")  # [B, 2, T] float32: 1 on the compared response
    segment_ids: Any = batch_field("batch", "pair", "length")  # [B, 2, T] int32: 1 where real
    reference: Any = batch_field("batch", "pair")  # [B, 2] float32: log pi_0 of the responses
    margin: Any  # [B] float32
    weight: Any  # [B] float32: 0 for filling


def empty_batch(rows: int, length: int) -> DpoBatch:
    """A batch of zeros."""
    ids, number = np.zeros((rows, 2, length), np.int32), np.zeros(rows, np.float32)
    return DpoBatch(
        tokens=ids, targets=ids.copy(), response=np.zeros(ids.shape, np.float32), segment_ids=ids.copy(),
        reference=np.zeros((rows, 2), np.float32), margin=number, weight=number.copy(),
    )  # fmt: skip


def collate(comparisons: Sequence[Comparison], *, length: int) -> DpoBatch:
    """Pairs to arrays, padded on the right; `reference` is 0 until `with_reference`."""
    batch = empty_batch(len(comparisons), length)
    for i, pair in enumerate(comparisons):
        for side, ids in enumerate((pair.chosen, pair.rejected)):
            n = len(ids)
            batch.tokens[i, side, :n] = ids
            batch.targets[i, side, : n - 1] = ids[1:]
            batch.segment_ids[i, side, :n] = 1
            batch.response[i, side, pair.response_start - 1 : n - 1] = 1
        batch.margin[i], batch.weight[i] = pair.margin, pair.weight
    return batch


def response_log_probs(config: ModelConfig, compute: Compute) -> Callable[[Params, DpoBatch], jax.Array]:
    """(params, DpoBatch) -> log pi of both responses, summed over their tokens, by one forward pass. # float32 [B, 2]"""

    def log_probs(params: Params, batch: DpoBatch) -> jax.Array:
        B, _, T = batch.tokens.shape
        tokens, targets, response, segment_ids = (
            x.reshape(2 * B, T) for x in (batch.tokens, batch.targets, batch.response, batch.segment_ids)
        )
        positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
        hidden = hidden_states(params, tokens, segment_ids, positions, config=config, compute=compute)
        by_token, _ = heads.log_probabilities(params, hidden, targets, compute=compute)
        return jnp.sum(by_token * response, axis=1).reshape(B, 2)

    return log_probs


def dpo_losses(
    log_probs: jax.Array, reference: jax.Array, margin: jax.Array, *, beta: float, kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
) -> jax.Array:  # fmt: skip
    """The loss of each pair, of h = log pi(y_c)/pi_0(y_c) - log pi(y_r)/pi_0(y_r).

    sigmoid: -(1 - s) log sigmoid(beta h - m) - s log sigmoid(m - beta h); hinge: max(0, 1 + m - beta h);
    ipo: (h - m / beta - 1 / (2 beta))^2.

    Args:
      log_probs, reference: of (chosen, rejected). # float32 [B, 2]
      margin: m, 0 for plain DPO. # float32 [B]
    """
    if log_probs.shape != reference.shape or log_probs.shape != (*margin.shape, 2):
        raise ValueError(f"expected log_probs and reference [B, 2], margin [B]; got {log_probs.shape}, {reference.shape}, "
                         f"{margin.shape}")  # fmt: skip
    ratios = log_probs - reference
    logits = beta * (ratios[:, 0] - ratios[:, 1]) - margin
    if kind == "hinge":
        return jax.nn.relu(1 - logits)
    if kind == "ipo":
        return jnp.square((logits - 0.5) / beta)
    log_sigmoid = jax.nn.log_sigmoid
    return -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)


def dpo_loss(config: ModelConfig, compute: Compute, settings: DpoSettings) -> Loss:
    """(params, DpoBatch) -> loss per pair; implicit rewards and how often the chosen response has the higher one.

    Before the first update the two are equal, and the accuracy one half, as each tie is.
    """
    log_probs_of = response_log_probs(config, compute)

    def loss(params: Params, batch: DpoBatch) -> tuple[Weighted, Metrics]:
        log_probs = log_probs_of(params, batch)
        losses = dpo_losses(
            log_probs, batch.reference, batch.margin, beta=settings.beta, kind=settings.kind,
            label_smoothing=settings.label_smoothing,
        )  # fmt: skip
        if settings.sft_weight:
            tokens = jnp.maximum(jnp.sum(batch.response[:, 0], axis=1), 1)
            losses += settings.sft_weight * -log_probs[:, 0] / tokens
        rewards = settings.beta * (log_probs - batch.reference)
        pairs = jnp.sum(batch.weight)

        def mean_of(x: jax.Array) -> Weighted:
            return Weighted(jnp.sum(x * batch.weight), pairs)

        metrics = {
            "accuracy": mean_of(preferred(rewards[:, 0], rewards[:, 1])),
            "reward/chosen": mean_of(rewards[:, 0]),
            "reward/rejected": mean_of(rewards[:, 1]),
            "reward/margin": mean_of(rewards[:, 0] - rewards[:, 1]),
            "log_prob/chosen": mean_of(log_probs[:, 0]),
            "log_prob/rejected": mean_of(log_probs[:, 1]),
        }
        return mean_of(losses), metrics

    return loss


class DpoSource:
    """Batches of pairs with the reference's log-probabilities; a pure function of the step.

    It computes on the device, so the loop must ask for batches in its own thread: on several hosts all have to launch their
    programs in one order. Nothing waits for the result, the next update is queued behind it.
    """

    looks_at_params = True

    def __init__(self, batches: IndexedBatches, reference: Params, *, config: ModelConfig, compute: Compute, mesh: Mesh):
        self.batches, self.reference, self.mesh = batches, reference, mesh
        self._log_probs = compiler.jit(response_log_probs(config, compute), out_shardings=batch_sharding(mesh, 1))

    def with_reference(self, batch: DpoBatch) -> DpoBatch:
        """The batch on the device, `reference` filled in."""
        batch = put_batch(batch, self.mesh)
        return batch.replace(reference=self._log_probs(self.reference, batch))

    def batch(self, step: int, params: Params) -> tuple[DpoBatch, Mapping[str, float]]:
        """The batch of a step; the parameters are not looked at."""
        del params
        return self.with_reference(self.batches.batch(step)), {}

    def examples(self) -> Iterator[DpoBatch]:
        """A batch of each shape, where they have several."""
        return map(self.with_reference, self.batches.shapes()) if hasattr(self.batches, "shapes") else iter(())

    def epoch(self, step: int) -> float:
        """Epochs that have been seen when the batch of a step has."""
        return self.batches.epoch(step)

    def eval_batches(self) -> Iterator[DpoBatch]:
        """One epoch in stored order."""
        return self.batches.eval_batches()

    def state(self) -> Any:
        """Nothing is held."""
        return {}

    def restore(self, state: Any) -> None:
        """Nothing to take up."""


def make_stage(config: DpoConfig, mesh: Mesh, workdir: Path) -> tuple[Stage, LoopConfig]:
    """The DPO stage, and its loop with the number of steps of its epochs."""
    if not config.start:
        raise ConfigError("config.start: DPO starts from a chat model; expected a stage's workdir, got nothing")
    model, tokenizer = load_tokenizer(config)
    length = config.data.length
    check_length(length, model)
    encode = functools.partial(encode_comparisons, tokenizer=tokenizer, length=length, margin=config.dpo.margin)
    train = mixed_pairs(config.data, encode, seed=config.loop.seed)
    held_out = [pair for path in config.data.held_out for pair in encode(path)]
    loop = config.loop.over(len(train), config.epochs)
    config.loop.check_schedule(config.optim, len(train), config.epochs)
    specs = table.table(model, head="lm_head")
    begun = begin(config, specs, mesh, workdir=workdir, reads=("start",))
    reference = begun.completed(specs, mesh, start=config.start)

    batches = make_batches(config.data, mesh, batch_size=loop.batch_size, collate=collate)

    source = functools.partial(DpoSource, reference=reference, config=model, compute=config.compute, mesh=mesh)
    trained = batches(train, seed=loop.seed)
    loss = dpo_loss(model, config.compute, config.dpo)
    evaluate = None
    if held_out:
        # Sorted, batches of one length have little padding.
        judged = source(batches(sorted(held_out, key=lambda pair: pair.tokens), seed=0))
        evaluate = evaluation(loss, judged.eval_batches, judged.with_reference)
    stage = Stage(
        name="dpo",
        specs=begun.specs,
        init=begun.init,
        frozen=begun.frozen,
        optimizer=optimizer.make(config.optim, steps=loop.steps, decay=table.decay_mask(begun.specs)),
        loss=loss,
        source=source(trained),
        evaluate=evaluate,
        tokens_per_step=round(2 * loop.batch_size * getattr(trained, "mean_length", length)),  # of rows in buckets
        show="accuracy",
        meta=meta(config, model, tokenizer) | begun.meta,
    )
    return stage, loop
