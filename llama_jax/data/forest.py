"""Texts that share their beginnings, as trees in rows: what is shared stands there once (`model/branches.py` reads it)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
    """A stem and what follows it, with the requests that asked for each branch.

    unread: how many of a branch's last tokens no row holds: 1 where a branch is predicted rather than read.
    """

    stem: Ids
    branches: tuple[tuple[Ids, tuple[int, ...]], ...]  # (ids, indices of requests)
    unread: int = 0

    def size(self, start: int = 0) -> int:
        """Tokens of a row that it takes, where a cache holds the first `start` of the stem."""
        return len(self.stem) - start + sum(len(ids) - self.unread for ids, _ in self.branches)


class Placed(NamedTuple):
    """A branch in a row."""

    last: int  # the place of the stem's last token
    places: range  # those of its own tokens
    ids: Ids
    requests: tuple[int, ...]


class Rows(NamedTuple):
    """Rows of trees. # int32 [B, T] each, as in `model/branches.py`"""

    tokens: np.ndarray
    positions: np.ndarray
    trees: np.ndarray
    branches: np.ndarray

    @classmethod
    def empty(cls, rows: int, length: int) -> "Rows":
        """Padding alone."""
        return cls(*(np.zeros((rows, length), np.int32) for _ in cls._fields))

    def fill(self, row: int, trees: Sequence[Tree], *, start: int = 0) -> list[Placed]:
        """Writes trees into a row, without the first `start` tokens of their stems; where each branch came to stand."""
        at, out = 0, []

        def write(ids: Sequence[int], position: int, tree: int, branch: int) -> range:
            nonlocal at
            places = range(at, at + len(ids))
            span = slice(places.start, places.stop)
            self.tokens[row, span] = ids
            self.positions[row, span] = np.arange(position, position + len(ids))
            self.trees[row, span], self.branches[row, span] = tree, branch
            at = places.stop
            return places

        for number, tree in enumerate(trees, start=1):
            last = write(tree.stem[start:], start, number, 0)[-1]
            for branch, (ids, requests) in enumerate(tree.branches, start=1):
                read = ids[: len(ids) - tree.unread]
                out.append(Placed(last, write(read, len(tree.stem), number, branch), ids, requests))
        return out


def by_stem(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[Ids, dict[Ids, list[int]]]:
    """The places of all pairs (stem, branch), by stem and branch: equal ones are one."""
    stems: dict[Ids, dict[Ids, list[int]]] = {}
    for i, (stem, branch) in enumerate(pairs):
        stems.setdefault(tuple(stem), {}).setdefault(tuple(branch), []).append(i)
    return stems


def grow(stem: Ids, branches: Mapping[Ids, Sequence[int]], *, row: int, start: int = 0, unread: int = 0) -> list[Tree]:
    """The branches of a stem in as many trees as rows of `row` tokens need. The order of `branches` does not matter."""
    trees: list[Tree] = []
    for ids, requests in sorted((tuple(ids), tuple(requests)) for ids, requests in branches.items()):
        if trees and trees[-1].size(start) + len(ids) - unread <= row:
            trees[-1] = dataclasses.replace(trees[-1], branches=(*trees[-1].branches, (ids, requests)))
        else:
            trees.append(Tree(stem, ((ids, requests),), unread))
    return trees
