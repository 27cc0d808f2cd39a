"""Near duplicates: MinHash signatures, locality-sensitive hashing, connected components (Broder 1997; Leskovec et al., ch. 3).

The Jaccard similarity of two documents (over their word n-grams) is estimated by the share of equal places in their
signatures. Only documents that agree in a whole band of places are compared. All that are linked, directly or through
others, are one cluster, of which one document stays.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from llama_jax.corpus_build.components import components
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.samples import Row, excerpt
from llama_jax.corpus_build.shingles import shingles

_ODD = np.uint64(0x9E3779B97F4A7C15)  # a multiplier that spreads bits
_SIGNED_AT_ONCE = 1000  # documents: bounds the memory of their n-grams


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """What counts as a near duplicate.

    With `bands` bands of r = permutations / bands places each, two documents of similarity s are compared with probability
    1 - (1 - s^r)^bands: for the defaults, whose r is 6, 0.93 at s = 0.7 and 0.998 at s = 0.8.
    """

    threshold: float = 0.7  # Jaccard similarity from which on two documents are one; 0: none are
    ngram: int = 5  # words
    permutations: int = 128  # places of a signature: the estimate is off by 0.04 (one sigma) at most
    bands: int = 21
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: expected a number between 0 and 1, got {self.threshold}")
        if self.ngram < 1:
            raise ValueError(f"ngram: expected at least 1 word, got {self.ngram}")
        if not 1 <= self.bands <= self.permutations:
            raise ValueError(f"bands: expected 1 to {self.permutations} (permutations), got {self.bands}")

    def __bool__(self) -> bool:
        return self.threshold > 0

    @property
    def rows(self) -> int:
        """Places of a band; places beyond bands * rows serve the estimate alone."""
        return self.permutations // self.bands


def signatures(texts: Sequence[str], settings: NearDuplicates) -> np.ndarray:
    """MinHash signatures, uint32 [len(texts), permutations]."""
    rensa = extra("rensa")
    rows = []
    for start in range(0, len(texts), _SIGNED_AT_ONCE):
        sets = [shingles(text, settings.ngram) for text in texts[start : start + _SIGNED_AT_ONCE]]
        offsets = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(sets), offsets, settings.permutations, settings.seed
        )
        rows.append(np.array(matrix.to_rows(), np.uint32))
    return np.concatenate(rows) if rows else np.zeros((0, settings.permutations), np.uint32)


def band_keys(signature: np.ndarray, settings: NearDuplicates) -> list[bytes]:
    """The keys under which a signature [permutations] meets those it is compared with: number of the band, its places."""
    places = np.ascontiguousarray(signature[: settings.bands * settings.rows], "<u4").reshape(settings.bands, settings.rows)
    return [band.to_bytes(2, "little") + row.tobytes() for band, row in enumerate(places)]


def links(members: Sequence[int], signature: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Pairs that join, among documents that share a band, all that are as similar as `threshold`, directly or through others.

    `signature` is [documents, permutations], `members` rows of it in ascending order. Each is compared with the first of every
    cluster before it, and with the others of those that it is not joined with by that: n near copies cost n comparisons, and
    only clusters that stay apart cost more.
    """
    rows, pairs = signature[members], []
    groups: dict[int, list[int]] = {}  # of those joined, by their first

    def similar(others: list[int], i: int) -> list[int]:
        same = (rows[others] == rows[i]).mean(axis=1) >= threshold if others else ()
        return [other for other, is_same in zip(others, same, strict=True) if is_same]

    for i in range(len(members)):
        near = set(similar(list(groups), i))
        rest = {other: head for head, group in groups.items() if head not in near for other in group[1:]}
        near.update(rest[other] for other in similar(list(rest), i))
        if not near:
            groups[i] = [i]
            continue
        first, *others = sorted(near)
        for other in others:
            groups[first] += groups.pop(other)
        groups[first].append(i)
        pairs += [(members[first], members[other]) for other in (*others, i)]
    return pairs


def clusters(texts: Sequence[str], settings: NearDuplicates) -> list[int]:
    """For each text the index of the first text of its cluster; its own index where it stands alone."""
    signature = signatures(texts, settings)
    pairs: set[tuple[int, int]] = set()
    for band in range(settings.bands):  # one after the other: the keys of all of them are larger than the signatures
        key = np.zeros(len(texts), np.uint64)
        for place in range(band * settings.rows, (band + 1) * settings.rows):  # if two bands had one key, more is compared
            key = key * _ODD + signature[:, place].astype(np.uint64)
        order = np.argsort(key, kind="stable")
        begins = np.flatnonzero(np.diff(key[order], prepend=~key[order[:1]]) != 0)
        for begin, end in zip(begins, [*begins[1:], len(order)]):
            if end - begin > 1:
                pairs.update(links(order[begin:end].tolist(), signature, settings.threshold))
    return components(len(texts), sorted(pairs))


def drop_near_duplicates(
    documents_by_source: Mapping[str, Sequence[Document]], settings: NearDuplicates
) -> tuple[dict[str, list[Document]], dict[str, list[tuple[Document, Document]]]]:
    """Documents without near duplicates, and by source those that were dropped, each with the one that stands for it.

    Of a cluster stays the document of the earliest source; within that the longest, then the one with the smallest id, then,
    where ids repeat, the one that comes first (`drop_duplicates` puts documents in the order of their hashes).
    """
    documents = [d for of_source in documents_by_source.values() for d in of_source]
    rank = {source: i for i, source in enumerate(documents_by_source)}
    documents.sort(key=lambda d: (rank[d.source], -len(d.text), d.id))
    first = clusters([d.text for d in documents], settings)
    dropped: dict[str, list[tuple[Document, Document]]] = {source: [] for source in documents_by_source}
    gone = set()
    for document, head in zip(documents, first, strict=True):
        if documents[head] is not document:
            dropped[document.source].append((document, documents[head]))
            gone.add(id(document))
    kept = {source: [d for d in of_source if id(d) not in gone] for source, of_source in documents_by_source.items()}
    return kept, dropped


def pair_row(dropped: Row, stays: Document) -> Row:
    """What the report shows of two near duplicates, from the sample of the dropped one."""
    key, name, _, text = dropped
    return key, name, f"{stays.source}:{stays.id}", text, excerpt(stays.text)
