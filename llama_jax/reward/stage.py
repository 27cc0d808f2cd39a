"""Training of a reward model, helpfulness or safety (paper section 3.2.2): the chat model with a scalar head."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import ConfigError, check_least
from llama_jax.data.length_buckets import BucketedBatches, padded_lengths
from llama_jax.data.loader import IndexedBatches
from llama_jax.data.mixture import check_files, mix, whole_or_share
from llama_jax.data.rows import write_jsonl
from llama_jax.data.sources import RATINGS
from llama_jax.files import write_json, write_text
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.parallel import compiler
from llama_jax.pretrain.base import StageConfig, begin, check_length, load_tokenizer, meta, process_share
from llama_jax.reward.comparisons import Comparison, ComparisonBatch, blank, collate, encode_comparisons
from llama_jax.reward.held_out import HeldOutScores, accuracy_table, markdown, preferred, report, score_statistics
from llama_jax.reward.ranking import centring_loss, ranking_loss, safety_loss
from llama_jax.reward.score import scorer
from llama_jax.training import optimizer
from llama_jax.training.stage import LoopConfig, Loss, Metrics, Stage, Supervised, Weighted, evaluation
from llama_jax.training.step import put_batch


@dataclasses.dataclass(frozen=True)
class PairData:
    """Preference files of a stage that trains on pairs.

    train: what is trained on.
    shares: of each file of `train` in the mix; 0: all of it; none given: all of all.
    rest: files from which, taken together, pairs are drawn at random until they are `rest_share` of the mix: the paper's mixes
      (section 3.2.2) are a set of its own and a half or a tenth of all others.
    length: tokens of a pair's longer dialog; longer pairs are left out and counted.
    buckets: lengths that batches are padded to, in even steps up to `length`; 1: all to `length` (`data/length_buckets.py`).
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    length: int
    shares: tuple[float, ...] = ()
    rest: tuple[str, ...] = ()
    rest_share: float = 0.5
    buckets: int = 1

    def __post_init__(self):
        if not 0 < self.rest_share < 1:
            raise ValueError(f"data.rest_share: expected a share between 0 and 1, got {self.rest_share}")
        check_least("data", self, buckets=1)
        for name in ("train", "held_out", "rest"):
            check_files(f"data.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class RewardData(PairData):
    """Files that are not trained on beside `held_out`, which is measured at the end.

    others: held-out pairs of another track; the report sets them beside its own, as Table 8 does.
    validation: measured during training, to choose settings by, in the place of `held_out`.
    """

    others: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for name in ("others", "validation"):
            check_files(f"data.{name}", getattr(self, name))
        if self.others and not self.held_out:
            raise ValueError("data.others: expected data.held_out too, beside whose report it stands; got none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """See configs/reward.py."""

    data: RewardData
    name: Literal["helpfulness", "safety"]
    margin: Literal["none", "small", "large"] = "small"
    safety_weight: float = 0.0  # of the auxiliary loss (A.3.4)
    center_weight: float = 0.0  # of `centring_loss`; scores of several models that are whitened together should share a mean
    epochs: float = 1.0
    score_pairs: int = 4096  # training pairs whose scores' mean and deviation are stored with the last checkpoint; 0: none


def reward_loss(config: ModelConfig, compute: Compute, *, safety_weight: float, center_weight: float = 0.0) -> Loss:
    """(params, ComparisonBatch) -> ranking loss (+ auxiliary losses) per pair; accuracy overall and by degree, a tie
    being one half."""
    score = scorer(config, compute)

    def loss(params: Params, batch: ComparisonBatch) -> tuple[Weighted, Metrics]:
        B, _, T = batch.tokens.shape
        flat = score(params, batch.tokens.reshape(2 * B, T), batch.segment_ids.reshape(2 * B, T))
        scores = flat.reshape(B, 2)
        losses = ranking_loss(scores[:, 0], scores[:, 1], batch.margin)
        if center_weight:
            losses += center_weight * centring_loss(scores[:, 0], scores[:, 1])
        pairs = jnp.sum(batch.weight)
        correct = preferred(scores[:, 0], scores[:, 1]) * batch.weight
        metrics = {"accuracy/all": Weighted(jnp.sum(correct), pairs)}
        for index, degree in enumerate(RATINGS):
            chosen = (batch.degree == index) * batch.weight
            metrics[f"accuracy/{degree}"] = Weighted(jnp.sum(correct * chosen), jnp.sum(chosen))
        total = jnp.sum(losses * batch.weight)
        if safety_weight:
            known = batch.safe_known * batch.weight
            auxiliary = jnp.mean(safety_loss(scores, batch.safe), axis=1) * known
            total += safety_weight * jnp.sum(auxiliary)
            unsafe = (1 - batch.safe) * known[:, None]
            metrics["unsafe_recall"] = Weighted(jnp.sum((scores < 0) * unsafe), jnp.sum(unsafe))
        metrics["score"] = Weighted(jnp.sum(scores * batch.weight[:, None]), 2 * pairs)
        return Weighted(total, pairs), metrics

    return loss


def mixed_pairs(data: PairData, encode: Callable[[str], list[Comparison]], *, seed: int) -> list[Comparison]:
    """One epoch of the pairs of `data` in its shares; what cannot be mixed is said before reading."""
    paths, shares = data.train, data.shares
    if not paths:
        raise ConfigError("data.train: expected at least one preference file, got none")
    shares = whole_or_share(paths, shares)
    if data.rest and sum(shares) + data.rest_share >= 1:
        raise ConfigError(
            f"data.rest_share: expected less than 1 together with data.shares, got {data.rest_share} + {sum(shares):g}"
        )
    files, names = [encode(path) for path in paths], [*paths]
    if data.rest:
        files.append([pair for path in data.rest for pair in encode(path)])
        names.append(f"data.rest ({', '.join(data.rest)})")
        shares = (*shares, data.rest_share)
    return mix(files, shares, names=names, seed=seed, unit="pairs")


class Measure:
    """After the last step: statistics of the training scores for the checkpoint, and the report on the held-out pairs.

    Of `others` it has the accuracy only. The report goes to the workdir: `held_out_scores.jsonl` (a row a pair, in the order
    of the files), `reward_report.json` and `reward_report.md`.
    """

    def __init__(
        self, score: Callable[[Params, Any, Any], jax.Array], batches: Callable[..., IndexedBatches], *,
        train: Sequence[Comparison], held_out: Sequence[Comparison], others: Sequence[Comparison], pairs: int, mesh: Mesh,
        workdir: Path, title: str,
    ):  # fmt: skip
        def pair_scores(params: Params, batch: ComparisonBatch) -> jax.Array:  # -> [B, 2]
            B, _, T = batch.tokens.shape
            flat = score(params, batch.tokens.reshape(2 * B, T), batch.segment_ids.reshape(2 * B, T))
            return flat.reshape(B, 2)

        # Every process needs all scores, not only those of its rows.
        self.pair_scores = compiler.jit(pair_scores, out_shardings=NamedSharding(mesh, PartitionSpec()))
        # Evenly out of all files, which stand one after the other.
        chosen = np.linspace(0, len(train) - 1, min(pairs, len(train))).astype(int) if pairs else []
        self.train, self.held_out, self.others = [train[i] for i in chosen], held_out, others
        self.batches, self.mesh, self.workdir, self.title = batches, mesh, workdir, title

    def scores(self, params: Params, pairs: Sequence[Comparison]) -> np.ndarray:
        """Scores of (chosen, rejected). # -> float32 [n, 2]"""
        order = np.argsort([pair.tokens for pair in pairs], kind="stable")  # batches of one length have little padding
        made = self.batches([pairs[i] for i in order], seed=0).eval_batches()
        parts = [np.asarray(self.pair_scores(params, put_batch(batch, self.mesh))) for batch in made]
        scores = np.empty((len(pairs), 2), np.float32)
        scores[order] = np.concatenate(parts)[: len(pairs)]
        return scores

    def __call__(self, params: Params) -> dict[str, Any]:
        measured = {}
        if self.train:
            statistics = score_statistics(self.scores(params, self.train))
            measured = {"scores": {**dataclasses.asdict(statistics), "pairs": len(self.train)}}
        if self.held_out:
            own, others = (self.rows(params, pairs) for pairs in (self.held_out, self.others))
            if jax.process_index() == 0:
                self.write(own, others, measured)
        return measured

    def rows(self, params: Params, pairs: Sequence[Comparison]) -> list[dict[str, Any]]:
        """What is known of each pair, and its scores."""
        scores = self.scores(params, pairs) if pairs else ()
        return [
            {"chosen": float(c), "rejected": float(r), "source": pair.source, "safety_bin": pair.safety_bin,
             "rating": RATINGS[pair.degree] if pair.degree >= 0 else None,
             "longer_by": len(pair.chosen) - len(pair.rejected)}
            for (c, r), pair in zip(scores, pairs, strict=True)
        ]  # fmt: skip

    def write(self, own: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], measured: Mapping[str, Any]) -> None:
        """The scores of the held-out pairs, and the report."""
        write_jsonl(self.workdir / "held_out_scores.jsonl", own)
        values = report(HeldOutScores.of(own)) | dict(measured)
        if others:
            values["others"] = accuracy_table(HeldOutScores.of(others))
        write_json(self.workdir / "reward_report.json", values)
        write_text(self.workdir / "reward_report.md", markdown(values, title=self.title))


def make_batches(
    data: PairData, mesh: Mesh, *, batch_size: int, collate: Callable[..., Any] = collate
) -> Callable[..., IndexedBatches]:
    """(pairs, seed=...) -> their batches as `collate` makes them, all of one length or, with `data.buckets`, of a few."""
    common = {"batch_size": batch_size, "blank": blank, "share": process_share(mesh)}
    if data.buckets == 1:
        return functools.partial(IndexedBatches, collate=functools.partial(collate, length=data.length), **common)
    lengths = padded_lengths(data.length, data.buckets)
    return functools.partial(BucketedBatches, collate=collate, lengths=lengths, size=lambda pair: pair.tokens, **common)


def make_stage(config: RewardConfig, mesh: Mesh, workdir: Path) -> tuple[Stage, LoopConfig]:
    """The stage of one reward model, and its loop with the number of steps of its epochs."""
    model, tokenizer = load_tokenizer(config)
    length = config.data.length
    check_length(length, model)
    encode = functools.partial(encode_comparisons, tokenizer=tokenizer, length=length, margin=config.margin)
    train = mixed_pairs(config.data, encode, seed=config.loop.seed)
    held_out, others, validation = (
        [pair for path in paths for pair in encode(path)]
        for paths in (config.data.held_out, config.data.others, config.data.validation)
    )
    validation = validation or held_out
    batches = make_batches(config.data, mesh, batch_size=config.loop.batch_size)
    loop = config.loop.over(len(train), config.epochs)
    config.loop.check_schedule(config.optim, len(train), config.epochs)
    begun = begin(config, table.table(model, head="reward_head"), mesh, workdir=workdir)
    loss = reward_loss(model, config.compute, safety_weight=config.safety_weight, center_weight=config.center_weight)
    source = batches(train, seed=loop.seed)
    evaluate = None
    if validation:
        judged = batches(sorted(validation, key=lambda pair: pair.tokens), seed=0)
        evaluate = evaluation(loss, judged.eval_batches, lambda batch: put_batch(batch, mesh))
    stage = Stage(
        name=f"reward model ({config.name})",
        specs=begun.specs,
        init=begun.init,
        frozen=begun.frozen,
        optimizer=optimizer.make(config.optim, steps=loop.steps, decay=table.decay_mask(begun.specs)),
        loss=loss,
        source=Supervised(source),
        evaluate=evaluate,
        tokens_per_step=round(2 * loop.batch_size * getattr(source, "mean_length", length)),  # of rows in buckets
        show="accuracy/all",
        meta=meta(config, model, tokenizer) | begun.meta,
        measure=Measure(
            scorer(model, config.compute), batches, train=train, held_out=held_out, others=others, pairs=config.score_pairs,
            mesh=mesh, workdir=workdir, title=f"Reward model ({config.name})",
        ),
    )  # fmt: skip
    return stage, loop
