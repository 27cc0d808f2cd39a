"""Pretraining on a mixture of token blocks (paper section 2.2, Fig. 5); held out: bits per byte by source."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError, suggestion
from llama_jax.corpus_build.manifest import check_manifest, read_manifest
from llama_jax.data.blocks import block_record
from llama_jax.data.loader import BlockSource, TokenBatch, block_batch, row_source
from llama_jax.data.sources import read_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model import params as table
from llama_jax.model.params import Params
from llama_jax.parallel import compiler
from llama_jax.paths import is_remote, place
from llama_jax.pretrain.base import StageConfig, begin, load_tokenizer, meta, process_share
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.training import optimizer
from llama_jax.training.stage import Loss, Stage, Supervised
from llama_jax.training.step import put_batch

log = logging.getLogger(__name__)

_QUICKLY_READ = 20 * 10**9  # bytes: some seconds
_TOLD_EVERY = 100  # steps


@dataclasses.dataclass(frozen=True)
class PretrainData:
    """The corpus (a directory of llama_jax.corpus) and the weights of those of its sources that are read.

    No weights: the shares that the corpus was planned with.
    """

    corpus: str
    weights: dict[str, float]
    separate_documents: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """See configs/pretrain.py. `z_loss`: see `language_model_loss`; measurements on held-out text are without it."""

    data: PretrainData
    z_loss: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.z_loss < 0:
            raise ValueError(f"z_loss: expected 0 or more, got {self.z_loss}")


def make_stage(config: PretrainConfig, mesh: Mesh, workdir: Path) -> Stage:
    """The pretraining stage."""
    model, tokenizer = load_tokenizer(config)
    # One host reads it for all: a file of the others that is cut short has another size.
    checksums = jax.process_index() == 0 and is_quickly_read(config.data.corpus)
    manifest = check_manifest(config.data.corpus, tokenizer, checksums=checksums)
    length = manifest["block_length"]
    if length > model.max_length:
        raise ConfigError(f"{config.data.corpus}: blocks of {length} tokens, model {model.name} takes {model.max_length}")
    weights = mixture(config.data.weights, {name: source["share"] for name, source in manifest["sources"].items()})
    corpus = place(config.data.corpus)
    source = BlockSource(
        {name: [corpus / shard for shard in manifest["sources"][name]["shards"]] for name in weights}, weights,
        config.loop.batch_size, config.loop.seed,
        separate_documents=config.data.separate_documents, bos_id=tokenizer.bos_id, share=process_share(mesh),
    )  # fmt: skip
    drawn = Drawn(source)
    cap = manifest["config"].get("max_epochs")
    for name, epochs in drawn.epochs(config.loop.steps).items():
        if cap is not None and epochs > cap * 1.01:
            log.warning("source %s is seen %.2f times in loop.steps=%d; its corpus was made for at most %g",
                        name, epochs, config.loop.steps, cap)  # fmt: skip
    held_out = {
        name: [str(row["text"]) for _, row in read_jsonl(corpus / "held_out" / f"{name}.jsonl")] for name in weights
    }
    optimizer.schedule(config.optim, config.loop.steps)  # what is wrong with it is said before weights are read
    begun = begin(config, table.table(model, head="lm_head"), mesh, workdir=workdir)
    loss = language_model_loss(model, config.compute)
    return Stage(
        name="pretrain",
        specs=begun.specs,
        init=begun.init,
        frozen=begun.frozen,
        optimizer=optimizer.make(config.optim, steps=config.loop.steps, decay=table.decay_mask(begun.specs)),
        loss=language_model_loss(model, config.compute, z_loss=config.z_loss),
        source=drawn,
        evaluate=bits_per_byte(
            loss, held_out, tokenizer, length=length, batch_size=config.loop.batch_size, mesh=mesh
        ),
        tokens_per_step=config.loop.batch_size * length,
        meta=meta(config, model, tokenizer) | begun.meta,
    )


def is_quickly_read(corpus: str) -> bool:
    """Whether its checksums may be compared at every start. A bucket keeps checksums of its own, and to read terabytes would
    take hours: `python -m llama_jax.corpus` with the config of a corpus that is there compares them once."""
    return not is_remote(corpus) and sum(file["bytes"] for file in read_manifest(corpus)["files"].values()) <= _QUICKLY_READ


@dataclasses.dataclass(frozen=True)
class Drawn(Supervised):
    """A mixture of blocks that tells how often each source was seen so far (`epochs/<source>`), as the corpus planned it."""

    batches: BlockSource

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source is seen in so many steps; exact to a block, since the mixture deals out its shares evenly."""
        shares = self.batches.shares
        rows, whole = steps * self.batches.batch_size, sum(shares.values())
        return {name: rows * shares[name] / whole / blocks for name, blocks in self.batches.num_blocks.items()}

    def batch(self, step: int, params: Params) -> tuple[TokenBatch, Mapping[str, float]]:
        """The batch of a step; the parameters are not looked at. Some steps tell the epochs."""
        batch, metrics = super().batch(step, params)
        if step % _TOLD_EVERY:
            return batch, metrics
        return batch, {**metrics, **{f"epochs/{name}": value for name, value in self.epochs(step + 1).items()}}


def mixture(weights: Mapping[str, float], planned: Mapping[str, float]) -> Mapping[str, float]:
    """The weights of a run's sources, or the planned shares of all; ConfigError for a source that the corpus does not have."""
    for name in weights:
        if name not in planned:
            raise ConfigError(f"config.data.weights.{name}: the corpus has no such source{suggestion(name, planned)}")
    return weights or planned


def bits_per_byte(
    loss: Loss, texts: Mapping[str, Sequence[str]], tokenizer: Tokenizer, *, length: int, batch_size: int, mesh: Mesh
):
    """An `evaluate` that gives `bits_per_byte/<source>`: -log2 p of the source's documents over their UTF-8 bytes.

    Every token of a document and its EOS is predicted once. Documents longer than a row are read in rows that overlap by
    half, of which the second half counts: each prediction sees at least length / 2 tokens of what came before.
    """
    rows = {name: [row for text in texts[name] for row in document_rows(text, tokenizer, length)] for name in texts}
    size = {name: sum(len(text.encode()) for text in texts[name]) for name in texts}
    step = compiler.jit(loss)

    def evaluate(params: Params) -> dict[str, float]:
        result = {}
        for name in rows:
            source = row_source(rows[name], batch_size, seed=0, share=process_share(mesh))
            nats = sum(float(step(params, put_batch(batch, mesh))[0].sum) for batch in source.eval_batches())
            result[f"bits_per_byte/{name}"] = nats / math.log(2) / size[name]
        return result

    return evaluate


def document_rows(text: str, tokenizer: Tokenizer, length: int) -> list[TokenBatch]:
    """The overlapping rows [T] of a document."""
    ids = np.asarray(tokenizer.encode(text, bos=True, eos=True))
    stride = length // 2
    rows = []
    for start in range(0, max(len(ids) - 1 - stride, 1), stride):
        block = ids[start : start + length + 1]
        batch = block_batch([block_record(block, length, tokenizer.vocab_size)], length)
        row = TokenBatch(**{field.name: getattr(batch, field.name)[0] for field in dataclasses.fields(TokenBatch)})
        if start:
            row.weights[: length - stride] = 0.0  # counted in the row before
        rows.append(row)
    return rows
