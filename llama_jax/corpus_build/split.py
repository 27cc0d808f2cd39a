"""Held-out documents, by hash of their content: a text is on the same side in every build, whatever else is there.

Hashes alone would leak: the documentation of a module and its source code are two documents that share
paragraphs. So documents of one group (say one module) never stand on both sides. What is left of leaks,
boilerplate and code copied between modules, is measured by `lines_seen`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llama_jax.corpus_build.dedup import content_hash
from llama_jax.corpus_build.document import Document

# Of a small source, at most this share of its bytes is held out to reach the minimum.
LARGEST_SHARE = 0.2
LONG_LINE = 40  # characters: shorter lines are alike by chance


@dataclass(frozen=True)
class Split:
    """The documents of one source: every one of them is in exactly one of the lists."""

    train: list[Document]
    held_out: list[Document]  # to evaluate on
    withheld: list[Document]  # neither: held out beyond what an evaluation reads, or of the group of a held-out document


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text is among the share `fraction` that no model trains on; what is held out at 1 % is so at 2 %."""
    return _position(text) < fraction


def split(
    documents_by_source: Mapping[str, Iterable[Document]],
    *,
    fraction: float,
    minimum_bytes: int = 0,
    maximum_bytes: int = 2**63,
    group_key: str = "module",
) -> dict[str, Split]:
    """Train and held-out documents of each source.

    Args:
      fraction: share of the documents that no model sees.
      minimum_bytes: a source too small for this at `fraction` gives more documents (the next in order of their hashes),
        up to a fifth of its bytes, so that the figure measured on it is stable.
      maximum_bytes: what `held_out` has at most, in whole documents.
      group_key: name in a document's metadata; documents with the same value there are never on both sides.
    """
    held_out: dict[str, list[Document]] = {}
    beyond: dict[str, list[Document]] = {}
    rest: dict[str, list[Document]] = {}
    for source, documents in documents_by_source.items():
        documents = list(documents)
        size = {id(d): len(d.text.encode()) for d in documents}
        least = min(minimum_bytes, LARGEST_SHARE * sum(size.values()))
        position = {id(d): _position(d.text) for d in documents}
        held_out[source], beyond[source], left, used = [], [], set(), 0
        for document in sorted(documents, key=lambda d: position[id(d)]):
            fits = used + size[id(document)] <= maximum_bytes
            if position[id(document)] < fraction or (fits and used < least):
                (held_out if fits else beyond)[source].append(document)
                used += size[id(document)] * fits
            else:
                left.add(id(document))
        rest[source] = [d for d in documents if id(d) in left]  # in their own order

    unseen = {d.metadata.get(group_key) for side in (held_out, beyond) for docs in side.values() for d in docs}
    unseen.discard(None)
    return {
        source: Split(
            train=[d for d in documents if d.metadata.get(group_key) not in unseen],
            held_out=held_out[source],
            withheld=beyond[source] + [d for d in documents if d.metadata.get(group_key) in unseen],
        )
        for source, documents in rest.items()
    }


def lines_seen(splits: Mapping[str, Split]) -> dict[str, float]:
    """By source, the share of long lines of the held-out documents that stand in some train document too."""
    lines = {source: [x for d in part.held_out for x in _long_lines(d.text)] for source, part in splits.items()}
    wanted = {line for of_source in lines.values() for line in of_source}
    seen: set[str] = set()
    for part in splits.values():
        for document in part.train:
            seen.update(wanted.intersection(_long_lines(document.text)))
    return {s: sum(line in seen for line in lines[s]) / max(len(lines[s]), 1) for s in splits}


def _position(text: str) -> float:
    """Where a text stands between 0 and 1."""
    return int.from_bytes(content_hash(text)[:8], "big") / 2**64


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= LONG_LINE]
