"""Batches of rows of similar length, padded no further than they need.

Preference data are short beside the context: padded to it, most of a batch is padding, and a reward model computes all of it.
Examples are still drawn in shuffled order; only within a window of some batches they are sorted by length, and the batches of
the window shuffled again. A batch is padded to the first of a few lengths that it fits, so that few programs are compiled.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.data.loader import IndexedBatches

_SHAPES = 2  # windows whose lengths are looked up beforehand
_WINDOW = 64  # batches: enough for batches of one length, few enough that an epoch stays well mixed


def padded_lengths(length: int, buckets: int) -> tuple[int, ...]:
    """`buckets` lengths in even steps up to `length`, each a multiple of 8. # (32, 64, 96, 128) for 128 and 4"""
    if buckets < 1:
        raise ValueError(f"data.buckets: expected at least 1, got {buckets}")
    return tuple(sorted({min(-(-length * (i + 1) // buckets // 8) * 8, length) for i in range(buckets)}))


@dataclasses.dataclass(frozen=True)
class BucketedBatches(IndexedBatches):
    """`IndexedBatches` of similar lengths; `collate` is called with the `length` to which this batch is padded.

    Batch `step` is a function of seed and step alone, and its length that of the global batch, on every process. No window goes
    on into the next epoch, but for the examples that fill the last batch: a run that ends with an epoch has seen all.
    """

    lengths: Sequence[int] = dataclasses.field(kw_only=True)  # that batches are padded to, ascending
    size: Callable[[Any], int] = dataclasses.field(kw_only=True)  # tokens of an example

    @property
    def _windows(self) -> int:
        """Windows of an epoch, of about equal size: batches of one are sorted among themselves."""
        return max(round(self.steps_per_epoch / _WINDOW), 1)

    def _edges(self, epoch: int) -> list[int]:
        """The steps at which the windows of an epoch begin, and the one after its last."""
        first, end = self.steps(epoch), self.steps(epoch + 1)
        return [first + part * (end - first) // self._windows for part in range(self._windows + 1)]

    def _window(self, number: int) -> tuple[int, int]:
        """The first step of a window, counted over all epochs, and the one after its last."""
        epoch, part = divmod(number, self._windows)
        first, end = self._edges(epoch)[part : part + 2]
        return first, end

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([self.size(example) for example in self.examples])

    @functools.cached_property
    def _sorted(self) -> Callable[[int], np.ndarray]:
        return functools.lru_cache(maxsize=2)(self._sort)  # steps come in order, and one ahead

    def _sort(self, number: int) -> np.ndarray:
        """The examples of window `number`, a row for each batch. # int [W, B]"""
        (first, end), B = self._window(number), self.batch_size
        drawn = np.array([self._stream[i] for i in range(first * B, end * B)], np.int64)  # none, if a batch is several epochs
        drawn = drawn[np.argsort(self._sizes[drawn], kind="stable")].reshape(end - first, B)
        return drawn[np.random.default_rng((self.seed, number)).permutation(end - first)] if self.shuffle else drawn

    def rows(self, step: int) -> list[int]:
        """Which examples global batch `step` has."""
        epoch = step * self.batch_size // self.num_examples  # the last one that has begun
        edges = self._edges(epoch)
        part = bisect.bisect_right(edges, step) - 1
        return self._sorted(epoch * self._windows + part)[step - edges[part]].tolist()

    def batch(self, step: int) -> Any:
        """This process's rows of global batch `step`."""
        return self._padded([self.examples[i] for i in self.rows(step)])

    def shapes(self) -> Iterator[Any]:
        """A batch without weight for each length that batches of the first windows are padded to (as good as all)."""
        if self.blank is None:
            return
        row = self.blank(self.examples[int(np.argmin(self._sizes))])
        for length in sorted({self._length(size) for window in range(_SHAPES) for size in self._longest(window)}):
            yield self.collate([row] * len(self.share.places(self.batch_size)), length=length)

    def _longest(self, window: int) -> np.ndarray:
        """The longest row of each batch of a window. # int [W]"""
        return self._sizes[self._sorted(window)].max(axis=1)

    @functools.cached_property
    def mean_length(self) -> float:
        """What batches are padded to, on average: of the first window, which stands for the others."""
        return float(np.mean([self._length(size) for size in self._longest(0)]))

    def eval_batches(self) -> Iterator[Any]:
        """One epoch in stored order (sort it, and little is padded); the last batch is filled with `blank` examples."""
        for start in range(0, self.num_examples, self.batch_size):
            rows = list(self.examples[start : start + self.batch_size])
            if len(rows) < self.batch_size and self.blank is None:
                raise ValueError(f"eval_batches: {self.num_examples} examples do not fill batches of {self.batch_size}")
            yield self._padded(rows + [self.blank(rows[0]) for _ in range(self.batch_size - len(rows))])

    def _padded(self, rows: Sequence[Any]) -> Any:
        """This process's part of a global batch, padded as far as the longest row of all processes needs."""
        length = self._length(max(self.size(row) for row in rows))
        return self.collate([rows[place] for place in self.share.places(self.batch_size)], length=length)

    def _length(self, longest: int) -> int:
        """The first of the lengths that a row fits into."""
        at = bisect.bisect_left(self.lengths, longest)
        if at == len(self.lengths):
            raise ValueError(f"a row of {longest} tokens does not fit into {self.lengths[-1]}")
        return self.lengths[at]
