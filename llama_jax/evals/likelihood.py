"""Log-likelihoods of continuations: what multiple-choice benchmarks and perplexities ask of a model (paper section 2.3).

    scorer = Scorer(model.config, prepared_weights, mesh, compute=model.compute)
    scorer([(context, continuation), ...])          # token ids -> [(log p, whether it is the greedy one), ...]

Continuations of one context are branches of a tree, contexts that begin alike (few-shot examples) continue one cache, and trees
are packed into rows of few static lengths (`data/forest.py`). The plan is made on the host, from token ids alone.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.data.forest import Ids, Rows, Tree, by_stem, grow
from llama_jax.data.packing import pack
from llama_jax.model.cache import KVCache, empty_cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import Prepared, prefill
from llama_jax.model.tree import Trees, target_log_probs, tree_states
from llama_jax.parallel.axes import DECODE, batch_shards, layout

Pair = tuple[Sequence[int], Sequence[int]]  # (context, continuation)
Score = tuple[float, bool]
_CHUNK = 64  # as in model/tree.py


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """The shapes of scoring; each that is met is compiled once.

    row: tokens of a row; a longer text takes the next power of two.
    tokens: tokens that a device computes at once, whole rows of them; 0: one row on a CPU, 16,384 elsewhere.
    share: a common beginning of at least so many tokens may get a cache.
    """

    row: int = 512
    tokens: int = 0
    share: int = 32

    def __post_init__(self):
        if self.row < 1 or self.tokens < 0 or self.share < 1:
            raise ValueError(f"scoring: expected positive sizes, got {self}")


@dataclasses.dataclass(frozen=True)
class Group:
    """Trees whose stems begin with the same `prefix`, which is computed first; it may be empty."""

    prefix: Ids
    trees: list[Tree]


class Scorer:
    """Scores pairs on any mesh; `cost` says what it computed for them."""

    def __init__(
        self, config: ModelConfig, weights: Prepared, mesh: Mesh, *, compute: Compute, settings: ScoringConfig | None = None
    ):
        self.config, self.weights, self.mesh, self.settings = config, weights, mesh, settings or ScoringConfig()
        self.cost: collections.Counter = collections.Counter()  # requests, their tokens, computed tokens, rows
        whole = NamedSharding(mesh, PartitionSpec())  # results are read by every host

        def fill(weights, tokens, lengths):
            with layout(DECODE):
                cache = empty_cache(config, batch=tokens.shape[0], slots=tokens.shape[1], dtype=compute.activation_dtype)
                return prefill(weights, tokens, lengths, cache, config=config, compute=compute)[1]

        def states(weights, rows, cache):
            with layout(DECODE):
                return tree_states(weights, rows, cache, config=config, compute=compute)

        def read(weights, hidden, places, targets):
            with layout(DECODE):
                return target_log_probs(weights, hidden, places, targets, compute=compute)

        self._fill, self._states = jax.jit(fill), jax.jit(states)
        self._read = jax.jit(read, out_shardings=(whole, whole))
        self._empty = functools.partial(empty_cache, config, slots=0, dtype=jnp.dtype(compute.activation_dtype))

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(program._cache_size() for program in (self._fill, self._states, self._read))

    def __call__(
        self, pairs: Sequence[Pair], *, progress: Callable[[int], None] | None = None,
        keep: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:  # fmt: skip
        """(log p(continuation | context), whether each of its tokens is the most likely one) for each pair, in order.

        `keep` is told the place and the score of each pair as soon as the batch of rows is read that it is in.

        Raises:
          ValueError: an empty context or continuation, or a pair that is longer than the model's context.
        """
        for i, (context, continuation) in enumerate(pairs):
            length = len(context) + len(continuation) - 1
            if not context or not continuation or length > self.config.max_length:
                raise ValueError(
                    f"pair {i}: expected a context and a continuation of at most {self.config.max_length} tokens together, "
                    f"got {len(context)} + {len(continuation)}"
                )
        log_probs, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        late: list[tuple[jax.Array, jax.Array, list]] = []

        def take(log_p, best, spans):
            log_p, best, done = np.asarray(log_p, np.float64), np.asarray(best), 0
            for row, start, end, requests in spans:
                for i in requests:
                    log_probs[i], greedy[i] = log_p[row, start:end].sum(), best[row, start:end].all()
                    if keep:
                        keep(i, (float(log_probs[i]), bool(greedy[i])))
                done += len(requests)
            if progress:
                progress(done)

        with jax.set_mesh(self.mesh):
            for batch in self._batches(pairs):
                late.append(batch)
                if len(late) > 1:  # the device computes the next batch while the host reads
                    take(*late.pop(0))
            for batch in late:
                take(*batch)
        self.cost["requests"] += len(pairs)
        self.cost["tokens"] += sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
        return list(zip(log_probs.tolist(), greedy.tolist()))

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[jax.Array, jax.Array, list]]:
        """Runs the plan: (log_p, best, spans [row, start, end, requests]) of each batch of rows."""
        plans: dict[tuple[int, int], list[Group]] = {}
        for group in plan(pairs, self.settings):
            slots = bucket(len(group.prefix))
            by_row: dict[int, list[Tree]] = {}
            for tree in group.trees:
                by_row.setdefault(row_length(tree.size(len(group.prefix)), self.settings.row), []).append(tree)
            for length, trees in by_row.items():
                plans.setdefault((length, slots), []).append(Group(group.prefix, trees))
        for (length, slots), groups in sorted(plans.items(), key=lambda item: item[0], reverse=True):
            batch = self._batch_size(length)
            for first in range(0, len(groups), batch):
                part = groups[first : first + batch]
                cache = self._prefixes([group.prefix for group in part], batch, slots)
                rows = [
                    (i, [group.trees[t] for t in chosen])
                    for i, group in enumerate(part)
                    for chosen in pack([tree.size(len(group.prefix)) for tree in group.trees], length)
                ]
                for start in range(0, len(rows), batch):
                    yield self._run(rows[start : start + batch], part, cache, batch, length)

    def _batch_size(self, length: int) -> int:
        tokens = self.settings.tokens or (0 if self.mesh.devices.flat[0].platform == "cpu" else 16_384)
        return max(tokens // length, 1) * batch_shards(self.mesh)

    def _prefixes(self, prefixes: Sequence[Sequence[int]], batch: int, slots: int) -> KVCache:
        """The caches of some prefixes, G = batch rows of `slots`."""
        if not slots:
            return self._empty(batch=batch)
        tokens, lengths = np.zeros((batch, slots), np.int32), np.ones((batch,), np.int32)
        for row, prefix in enumerate(prefixes):
            tokens[row, : len(prefix)], lengths[row] = prefix, len(prefix)
        self.cost["computed"] += tokens.size
        return self._fill(self.weights, tokens, lengths)

    def _run(self, rows, groups, cache, batch, length):
        filled, prefixes = Rows.empty(batch, length), np.zeros((batch,), np.int32)
        spans, wanted = [], []
        for row, (group, trees) in enumerate(rows):
            prefixes[row] = group
            questions = filled.fill(row, trees, start=len(groups[group].prefix))
            # The token before predicts each one; the last of the stem, the first.
            wanted.append([q for of in questions for q in zip((of.last, *of.places), of.ids, strict=True)])
            start = 0
            for question in questions:
                end = start + len(question.ids)
                spans.append((row, start, end, question.requests))
                start = end
        places, targets = (np.zeros((batch, bucket(max(map(len, wanted)), _CHUNK)), np.int32) for _ in range(2))
        for row, found in enumerate(wanted):
            places[row, : len(found)], targets[row, : len(found)] = np.array(found, np.int32).T
        self.cost["computed"] += filled.tokens.size
        self.cost["rows"] += len(rows)
        hidden = self._states(self.weights, Trees(*filled, prefixes), cache)
        return *self._read(self.weights, hidden, places, targets), spans


def plan(pairs: Sequence[Pair], settings: ScoringConfig) -> list[Group]:
    """Groups of trees that answer all pairs; each distinct pair is computed once."""
    stems, groups, alone = by_stem(pairs), [], []
    for common, members in _beginnings(sorted(stems), settings):
        trees = [tree for stem in members for tree in _trees(stem, stems[stem], common, settings.row)]
        if common:
            groups.append(Group(members[0][:common], trees))
        else:
            alone += trees
    return [*groups, *([Group((), alone)] if alone else [])]


def _trees(stem: Ids, branches: Mapping[Ids, Sequence[int]], start: int, row: int) -> list[Tree]:
    """The continuations of a stem in as many trees as rows need; a row holds at least the longest one."""
    row = row_length(len(stem) - start + max(map(len, branches)) - 1, row)
    return grow(stem, branches, row=row, start=start, unread=1)


def _beginnings(stems: list[Ids], settings: ScoringConfig) -> Iterator[tuple[int, list[Ids]]]:
    """Sorted stems in runs that begin alike: (tokens that a cache shall hold, the run)."""
    common = [0, *(_common(a, b) for a, b in zip(stems, stems[1:])), 0]
    start = 0
    for i in range(1, len(stems) + 1):
        # A stem belongs to the neighbour that it shares more with.
        if i < len(stems) and common[i] >= max(settings.share, max(common[i - 1], common[i + 1]) / 2):
            continue
        run = stems[start:i]
        shared = min([*common[start + 1 : i], *(len(stem) - 1 for stem in run)])  # the last token's state is wanted
        rest = sum(len(stem) - shared for stem in run)
        cached = bucket(shared) + -(-rest // settings.row) * settings.row
        worth = len(run) > 1 and shared >= settings.share and cached < sum(map(len, run))
        yield (shared if worth else 0), run
        start = i


def row_length(size: int, least: int) -> int:
    """The row that holds a tree: `least`, or the next power of two."""
    return least if size <= least else 1 << (size - 1).bit_length()


def bucket(size: int, least: int = 128) -> int:
    """The smallest of 0, 128, 192, 256, 384, 512, ... (powers of two and what lies half-way) that holds `size`."""
    if size == 0:
        return 0
    power = max(1 << (size - 1).bit_length(), least)
    return power * 3 // 4 if size <= power * 3 // 4 and power > least and power * 3 // 4 % _CHUNK == 0 else power


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
