"""Batches as pure functions of (seed, step), so that resuming is a step number on any number of hosts.

Order comes from Grain's `MapDataset`: a global shuffle computed index by index (nothing is held, nothing is
replayed), a new one for each epoch, and a weighted mixture of sources (paper section 2.1). Every process
asks for the same global batch and takes the rows that its devices hold (`Share`), so the batch and the order
of its rows do not depend on how many processes there are, or on which of a pod's chips they have.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import grain
import numpy as np

from llama_jax.data.blocks import block_ids, block_length_of
from llama_jax.data.tokenizer import BOS_ID
from llama_jax.paths import is_remote


@flax.struct.dataclass
class TokenBatch:
    """Token rows. Padding is id 0 in segment 0; weight 0 marks a target that is missing or not trained on."""

    tokens: Any  # [B, T] int32
    targets: Any  # [B, T] int32, the next token inside the segment
    weights: Any  # [B, T] float32
    segment_ids: Any  # [B, T] int32, 1.. and 0 for padding
    positions: Any  # [B, T] int32, from 0 in each segment


@dataclasses.dataclass(frozen=True)
class Share:
    """Which rows of each global batch a process reads: of `pieces` equal ones, those that its devices hold, ascending.

    They need not be neighbours, for a mesh follows the links of a pod: the first host of 64 v5p chips holds four of 64 pieces,
    and the second of them may be the third of the batch.
    """

    held: tuple[int, ...] = (0,)
    pieces: int = 1

    def __post_init__(self):
        if not self.held or sorted({*self.held}) != [*self.held] or not 0 <= self.held[0] <= self.held[-1] < self.pieces:
            raise ValueError(f"share: expected some of the {self.pieces} pieces in order, got {self.held}")

    def places(self, rows: int) -> list[int]:
        """The places of the process's rows in a global batch of so many; ValueError if they cannot be divided."""
        if rows < 1:
            raise ValueError(f"batch_size: expected at least 1, got {rows}")
        if rows % self.pieces:
            raise ValueError(f"batch_size: expected a multiple of the {self.pieces} shards of its rows, got {rows}")
        size = rows // self.pieces
        return [piece * size + i for piece in self.held for i in range(size)]


WHOLE = Share()


def stack_rows(rows: Sequence[TokenBatch]) -> TokenBatch:
    """Rows with fields [T] to one batch with fields [B, T]."""
    names = [field.name for field in dataclasses.fields(TokenBatch)]
    return TokenBatch(**{name: np.stack([getattr(row, name) for row in rows]) for name in names})


def blank_row(row: TokenBatch) -> TokenBatch:
    """A row of padding of the same length."""
    return TokenBatch(**{f.name: np.zeros_like(getattr(row, f.name)) for f in dataclasses.fields(TokenBatch)})


@dataclasses.dataclass(frozen=True)
class IndexedBatches:
    """Batches of examples held in memory: packed rows, comparisons, prompts.

    The examples of all epochs form one stream, each epoch in its own shuffled order, and batch `step` is
    rows step * batch_size onwards of it: a last partial batch is filled from the next epoch, no example is
    lost or repeated within an epoch.
    """

    examples: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]  # this process's examples -> batch
    batch_size: int  # rows of the global batch
    seed: int
    _: dataclasses.KW_ONLY
    shuffle: bool = True
    blank: Callable[[Any], Any] | None = None  # example -> the same with weight 0; needed by `eval_batches`
    share: Share = WHOLE

    def __post_init__(self):
        if not len(self.examples):
            raise ValueError("examples: expected at least one, got an empty data set")
        self.share.places(self.batch_size)

    @property
    def num_examples(self) -> int:
        """Examples of one epoch."""
        return len(self.examples)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every example has been seen once; the last one may reach into the next epoch."""
        return self.steps(1)

    def steps(self, epochs: float) -> int:
        """Steps until `epochs` epochs have been seen."""
        return math.ceil(epochs * self.num_examples / self.batch_size)

    def epoch(self, step: int) -> float:
        """Epochs that have been seen when batch `step` has."""
        return (step + 1) * self.batch_size / self.num_examples

    @functools.cached_property
    def _stream(self) -> grain.MapDataset:
        stream = grain.MapDataset.source(range(self.num_examples))
        if self.shuffle:
            stream = stream.shuffle(seed=self.seed)
        return stream.repeat()

    def batch(self, step: int) -> Any:
        """This process's rows of global batch `step`."""
        rows = _slice(step, self.batch_size, self.share)
        return self.collate([self.examples[self._stream[i]] for i in rows])

    def rows(self, step: int) -> list[int]:
        """Which examples global batch `step` has."""
        return [int(self._stream[i]) for i in _slice(step, self.batch_size)]

    def eval_batches(self) -> Iterator[Any]:
        """One epoch in stored order; the last batch is filled with `blank` examples."""
        for step in range(self.steps_per_epoch):
            rows = _slice(step, self.batch_size, self.share)
            if (step + 1) * self.batch_size > self.num_examples and self.blank is None:
                raise ValueError(
                    f"eval_batches: {self.num_examples} examples do not fill batches of {self.batch_size}; "
                    "pass `blank` to fill the last one with rows of weight 0"
                )
            yield self.collate([self.examples[i] if i < self.num_examples else self.blank(self.examples[0]) for i in rows])


def row_source(
    rows: Sequence[TokenBatch],
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    share: Share = WHOLE,
) -> IndexedBatches:
    """Batches `TokenBatch` [B, T] of packed rows [T] (`packing.pack_dialogs`)."""
    return IndexedBatches(rows, stack_rows, batch_size, seed, shuffle=shuffle, blank=blank_row, share=share)


@dataclasses.dataclass(frozen=True)
class BlockSource:
    """Endless weighted mixture of token blocks on disk (`corpus_build.blocks` writes them).

    Each source is shuffled as a whole and repeated, with a new shuffle each epoch; a weight is the source's
    share of the rows. With `separate_documents` a document is a segment of its own: attention and positions
    begin anew at its BOS and that BOS is no target. The paper does not speak of such a mask, so it is off.
    """

    files: Mapping[str, Sequence[str | os.PathLike]]  # source -> ArrayRecord files
    weights: Mapping[str, float]  # source -> share; normalised here
    batch_size: int  # rows of the global batch
    seed: int
    _: dataclasses.KW_ONLY
    separate_documents: bool = False
    bos_id: int = BOS_ID  # the tokenizer's
    share: Share = WHOLE

    def __post_init__(self):
        self.share.places(self.batch_size)
        if set(self.files) != set(self.weights):
            raise ValueError(f"weights: expected one for each of {sorted(self.files)}, got {sorted(self.weights)}")
        if not self.files or any(not weight > 0 for weight in self.weights.values()):
            raise ValueError(f"weights: expected at least one source, each above 0, got {dict(self.weights)}")
        lengths = {name: block_length_of(self._records[name][0]) for name in self.files}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"files: expected one block length in all sources, got {lengths}")

    @functools.cached_property
    def _records(self) -> dict[str, grain.sources.ArrayRecordDataSource]:
        return {name: _open_records(name, paths) for name, paths in sorted(self.files.items())}

    @property
    def num_blocks(self) -> dict[str, int]:
        """Blocks of each source, one epoch."""
        return {name: len(records) for name, records in self._records.items()}

    @functools.cached_property
    def shares(self) -> dict[str, int]:
        """The weights as they are dealt out: whole numbers, the smallest 100, by which a share is off by 1 % at most."""
        scale = 100 / min(self.weights.values())
        return {name: int(weight * scale) for name, weight in self.weights.items()}

    @functools.cached_property
    def block_length(self) -> int:
        """T, the tokens of a row."""
        return block_length_of(next(iter(self._records.values()))[0])

    @functools.cached_property
    def _stream(self) -> grain.MapDataset:
        return self._mix(list(self._records.values()))

    def _mix(self, sources: Sequence[Any]) -> grain.MapDataset:
        # Seeds differ by source, or sources of one size would be shuffled alike.
        shuffled = [
            grain.MapDataset.source(source).shuffle(seed=(self.seed * 1_000_003 + i) % 2**32).repeat()
            for i, source in enumerate(sources)
        ]
        return grain.MapDataset.mix(shuffled, weights=[self.shares[name] for name in self._records])

    def rows(self, step: int) -> list[str]:
        """Which blocks global batch `step` has: `source:number`."""
        names = self._mix([_Names(name, count) for name, count in self.num_blocks.items()])
        return [names[i] for i in _slice(step, self.batch_size)]

    def batch(self, step: int) -> TokenBatch:
        """This process's rows [B_local, T] of global batch `step`."""
        rows = _slice(step, self.batch_size, self.share)
        blocks = [self._stream[i] for i in rows]
        return block_batch(blocks, self.block_length, separate_documents=self.separate_documents, bos_id=self.bos_id)


@dataclasses.dataclass(frozen=True)
class _Names:
    """A source of the names of blocks, in the place of the blocks."""

    source: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> str:
        return f"{self.source}:{number}"


def block_batch(
    records: Sequence[bytes],
    block_length: int,
    *,
    separate_documents: bool = False,
    bos_id: int = BOS_ID,
) -> TokenBatch:
    """Records of T+1 tokens to a batch [B, T]; short records are padded."""
    ids = np.zeros((len(records), block_length + 1), np.int32)
    lengths = np.zeros((len(ids), 1), np.int64)
    for i, record in enumerate(records):
        block = block_ids(record)
        ids[i, : len(block)] = block
        lengths[i] = len(block)
    columns = np.arange(block_length)
    tokens, targets = ids[:, :-1], ids[:, 1:]
    real = columns < lengths
    weights = (columns + 1 < lengths).astype(np.float32)
    segments = real.astype(np.int32)
    positions = np.where(real, columns, 0).astype(np.int32)
    if separate_documents:
        starts = (tokens == bos_id) & real
        starts[:, 0] = real[:, 0]
        segments = np.where(real, np.cumsum(starts, axis=1), 0).astype(np.int32)
        first = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
        positions = np.where(real, columns - first, 0).astype(np.int32)
        weights = weights * (targets != bos_id)
    return TokenBatch(
        tokens=np.ascontiguousarray(tokens),
        targets=np.ascontiguousarray(targets),
        weights=weights,
        segment_ids=segments,
        positions=positions,
    )


def _slice(step: int, batch_size: int, share: Share = WHOLE) -> list[int]:
    """Indices of a process's rows of global batch `step` in the endless stream."""
    if step < 0:
        raise ValueError(f"step: expected 0 or more, got {step}")
    return [step * batch_size + place for place in share.places(batch_size)]


def _open_records(name: str, paths: Sequence[str | os.PathLike]) -> grain.sources.ArrayRecordDataSource:
    for path in paths:
        if not is_remote(path) and not os.path.exists(path):  # of one in a bucket its reader says so
            raise FileNotFoundError(f"source {name}: {os.fspath(path)}: expected an ArrayRecord file, found nothing")
    if not paths:
        raise ValueError(f"source {name}: expected at least one ArrayRecord file, got none")
    try:
        records = grain.sources.ArrayRecordDataSource([os.fspath(path) for path in paths])
        count = len(records)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"source {name}: cannot read {[os.fspath(p) for p in paths]}: {error}") from None
    if not count:
        raise ValueError(f"source {name}: expected at least one block, got none")
    return records
