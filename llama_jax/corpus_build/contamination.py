"""Contamination of evaluation sets, as the paper analyses it (appendix A.6; fact sheet 2.6).

A token of a sample is contaminated at minimum match L if it lies in a span of L tokens or more that also stands in the
training data. A span begins with 10 equal tokens; after them up to 4 positions may differ (the skip-gram budget), and the
last token is equal. Token ids are compared, not text.

The paper searched suffix arrays of the corpus. Here the samples are what is indexed: their 10-grams fit in memory, and the
training data stream past them once, so the work is linear and any number of workers share it.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

SEED = 10  # tokens without any mismatch that a span begins with
BUDGET = 4  # positions of a span that may differ
LENGTHS = (10, 20, 30, 40, 50)  # values of L
_PAIRS = 1 << 20  # of equal 10-grams that are looked at together
_MULTIPLIER = np.uint64(6364136223846793005)
_OFFSET = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Subset:
    """One line of the paper's Table 51."""

    name: str
    contamination: float  # mean share of contaminated tokens
    samples: int
    mean: float  # X, of the metric
    expected: float  # mu_n
    z: float  # (X - mu_n) / sigma_n; nan for a subset without samples, or a metric without variance


class Index:
    """The evaluation samples by their 10-grams, and the longest match of each of their tokens so far.

    `longest[i]` is an int32 array over the tokens of sample i: the length of the longest span that covers the token.
    """

    def __init__(self, samples: Sequence[Sequence[int]]):
        self.samples = [np.asarray(sample, np.int64) for sample in samples]
        self.longest = [np.zeros(len(sample), np.int32) for sample in self.samples]
        grams = [_grams(sample) for sample in self.samples]
        keys = np.concatenate([np.zeros(0, np.uint64), *grams])
        order = np.argsort(keys, kind="stable")
        nothing = np.zeros(0, np.int64)
        self._keys = keys[order]
        # For each 10-gram: its sample, where it begins there, and the token before it (-1: none).
        self._sample = np.repeat(np.arange(len(grams)), [len(gram) for gram in grams])[order]
        self._start = np.concatenate([nothing, *(np.arange(len(gram)) for gram in grams)])[order]
        self._before = np.concatenate([nothing, *(_before(s)[: len(g)] for s, g in zip(self.samples, grams))])[order]

    def add(self, document: Sequence[int]) -> int:
        """Matches one training document; returns how many of its tokens lie in a span that stands in a sample."""
        document = np.asarray(document, np.int64)
        grams = _grams(document)
        if not len(grams) or not len(self._keys):
            return 0
        low = np.searchsorted(self._keys, grams, "left")
        covered = np.zeros(len(document), bool)
        hits = np.flatnonzero(self._keys[np.minimum(low, len(self._keys) - 1)] == grams)
        counts = np.searchsorted(self._keys, grams[hits], "right") - low[hits]
        # A run of one token, or the examples that all samples begin with, have millions of pairs and few that matter.
        for part in np.array_split(np.arange(len(hits)), counts.sum() // _PAIRS + 1):
            for at, place in self._seeds(document, hits[part], low[hits[part]], counts[part]):
                sample, start = self._sample[place], int(self._start[place])
                length = self._extend(self.samples[sample], start, document, int(at))
                if length:
                    span = self.longest[sample][start : start + length]
                    np.maximum(span, length, out=span)
                    covered[at : at + length] = True
        return int(covered.sum())

    def _seeds(
        self, document: np.ndarray, hits: np.ndarray, low: np.ndarray, counts: np.ndarray
    ) -> Iterator[tuple[int, int]]:
        """(where in the document, which 10-gram of the samples) of the pairs that no earlier one of the same run of equal
        tokens holds: those whose tokens before differ."""
        at = np.repeat(hits, counts)
        place = np.repeat(low - np.cumsum(counts) + counts, counts) + np.arange(len(at))
        before = np.where(at > 0, document[at - 1], -2)
        first = self._before[place] != before
        return zip(at[first].tolist(), place[first].tolist(), strict=True)

    @staticmethod
    def _extend(sample: np.ndarray, start: int, document: np.ndarray, at: int) -> int:
        """Length of the span from this seed; 0 if it is none."""
        n = min(len(sample) - start, len(document) - at)
        equal = sample[start : start + n] == document[at : at + n]
        if not equal[:SEED].all():
            return 0  # two 10-grams with one hash
        wrong = np.flatnonzero(~equal)
        end = int(wrong[BUDGET]) if len(wrong) > BUDGET else n
        return int(np.flatnonzero(equal[:end])[-1]) + 1

    def merge(self, other: "Index") -> None:
        """Takes over what another index of the same samples has found in other documents."""
        for mine, theirs in zip(self.longest, other.longest, strict=True):
            np.maximum(mine, theirs, out=mine)

    def part(self, start: int, stop: int) -> "Index":
        """The results of samples start to stop - 1; it takes no further documents."""
        part = Index([])
        part.samples, part.longest = self.samples[start:stop], self.longest[start:stop]
        return part

    @classmethod
    def joined(cls, parts: Sequence["Index"]) -> "Index":
        """The results of several parts as those of one set; it takes no further documents."""
        whole = cls([])
        whole.samples = [sample for part in parts for sample in part.samples]
        whole.longest = [longest for part in parts for longest in part.longest]
        return whole

    def contamination(self, length: int) -> np.ndarray:
        """Share of contaminated tokens of each sample [samples] at minimum match `length`."""
        return np.array([(longest >= length).mean() if len(longest) else 0.0 for longest in self.longest])


def subsets(contamination: np.ndarray, scores: np.ndarray) -> list[Subset]:
    """The four overlapping subsets of the samples, with the Z statistic of each.

    Args:
      contamination: share of contaminated tokens of each sample, [samples].
      scores: the metric of each sample, [samples]: 0 or 1 for accuracy.
    """
    parts = {
        "clean": contamination < 0.2,
        "not clean": contamination >= 0.2,
        "not dirty": contamination < 0.8,
        "dirty": contamination >= 0.8,
    }
    mean, deviation = float(scores.mean()), float(scores.std())
    rows = []
    for name, chosen in parts.items():
        n = int(chosen.sum())
        found = float(scores[chosen].mean()) if n else math.nan
        # Mean and deviation of the mean of n samples drawn from all: sqrt(p (1 - p) / n) for accuracy, which gives the
        # paper's own Z values back.
        z = (found - mean) / (deviation / math.sqrt(n)) if n and deviation else math.nan
        rows.append(Subset(name, float(contamination[chosen].mean()) if n else 0.0, n, found, mean, z))
    return rows


def is_affected(rows: Sequence[Subset]) -> bool:
    """The paper's verdict: |Z| > 2 for all four, negative without contamination and positive with it."""
    signs = {"clean": -1, "not clean": 1, "not dirty": -1, "dirty": 1}
    return all(row.z * signs[row.name] > 2 for row in rows)


def analyse(index: Index, scores: np.ndarray, lengths: Sequence[int] = LENGTHS) -> tuple[int, list[Subset], bool]:
    """The largest L that shows an effect, its subsets and True; where none does, the largest L that has any contamination."""
    tables: Mapping[int, list[Subset]] = {length: subsets(index.contamination(length), scores) for length in lengths}
    for length in sorted(lengths, reverse=True):
        if is_affected(tables[length]):
            return length, tables[length], True
    touched = [length for length in lengths if index.contamination(length).any()] or [min(lengths)]
    return max(touched), tables[max(touched)], False


def _before(ids: np.ndarray) -> np.ndarray:
    """The token before each, -1 before the first."""
    return np.concatenate([np.full(1, -1, np.int64), ids[:-1]])


def _grams(ids: np.ndarray) -> np.ndarray:
    """Hashes of the runs of SEED tokens [len(ids) - SEED + 1]."""
    count = len(ids) - SEED + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * _OFFSET
    hashes = np.zeros(count, np.uint64)
    for k in range(SEED):
        hashes = hashes * _MULTIPLIER + mixed[k : k + count]
    return hashes
