"""Held-out documents, by hash of their content: a text is on the same side in every build, whatever else is there.

Hashes alone would leak: the documentation of a module and its source code are two documents that share
paragraphs. So documents of one group, those with the same value in a field of their metadata that the caller names (say the
module), never stand on both sides. What is left of leaks, boilerplate and code copied between modules, is measured by
`lines_seen`.
"""

import json
from collections.abc import Iterable, Mapping, Set
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
    return _position(content_hash(text)) < fraction


@dataclass(frozen=True)
class Candidate:
    """What the choice of held-out documents needs to know of one: few bytes, so that those of a large corpus fit."""

    position: float  # of the text's hash between 0 and 1
    size: int  # bytes
    key: bytes  # of the text: ids come from the rows, which may repeat them
    group: str | None


def candidate(document: Document, group_field: str | None = None) -> Candidate:
    """A document as a candidate; documents of the same group are never on both sides."""
    size = len(document.text.encode())
    key = content_hash(document.text)
    return Candidate(_position(key), size, key, group_of(document, group_field))


def group_of(document: Document, field: str | None) -> str | None:
    """The group that a field of its metadata puts a document in, whatever the kind of its value; None for none."""
    value = None if field is None else document.metadata.get(field)
    return None if value is None else json.dumps(value, sort_keys=True)


def choose(
    candidates: Iterable[Candidate], whole: int, *, fraction: float, minimum_bytes: int = 0, maximum_bytes: int = 2**63
) -> tuple[set[bytes], set[bytes]]:
    """Keys of the documents of one source that are held out, and of those held out beyond what an evaluation reads.

    Args:
      candidates: documents of the source; those beyond `fraction` may be missing if the others have `minimum_bytes`.
      whole: bytes of the source.
      fraction, minimum_bytes, maximum_bytes: see `split`.
    """
    candidates = sorted(candidates, key=lambda c: (c.position, c.key))
    least = min(minimum_bytes, LARGEST_SHARE * whole)
    small = sum(c.size for c in candidates if c.position < fraction and c.size <= maximum_bytes) < least
    held_out, beyond, used = set(), set(), 0
    for document in candidates:
        fits = used + document.size <= maximum_bytes
        if document.position < fraction or (small and fits and used < least):
            (held_out if fits else beyond).add(document.key)
            used += document.size * fits
    return held_out, beyond


def split(
    documents_by_source: Mapping[str, Iterable[Document]],
    *,
    fraction: float,
    minimum_bytes: int = 0,
    maximum_bytes: int = 2**63,
    group_field: str | None = None,
) -> dict[str, Split]:
    """Train and held-out documents of each source.

    Args:
      fraction: share of the documents that no model sees.
      minimum_bytes: a source too small for this at `fraction` gives more documents (the next in order of their hashes),
        up to a fifth of its bytes, so that the figure measured on it is stable.
      maximum_bytes: what `held_out` has at most, in whole documents.
      group_field: of a document's metadata; documents with the same value there are never on both sides. None: no groups.
    """
    documents = {source: list(of_source) for source, of_source in documents_by_source.items()}
    chosen = {}
    unseen = set()
    for source, of_source in documents.items():
        candidates = [candidate(d, group_field) for d in of_source]
        chosen[source] = choose(
            candidates, sum(c.size for c in candidates),
            fraction=fraction, minimum_bytes=minimum_bytes, maximum_bytes=maximum_bytes,
        )  # fmt: skip
        kept_back = chosen[source][0] | chosen[source][1]
        unseen |= {c.group for c in candidates if c.group is not None and c.key in kept_back}
    sides: dict[str, dict[str, list[Document]]] = {s: {"train": [], "held_out": [], "withheld": []} for s in documents}
    for source, of_source in documents.items():
        for document in of_source:
            sides[source][side_of(document, *chosen[source], unseen, group_field)].append(document)
    return {source: Split(**parts) for source, parts in sides.items()}


def side_of(
    document: Document, held_out: Set[bytes], beyond: Set[bytes], unseen: Set[str], group_field: str | None = None
) -> str:
    """One of train, held_out, withheld; `unseen` are the groups of the documents that are not trained on."""
    key = content_hash(document.text)
    if key in held_out:
        return "held_out"
    return "withheld" if key in beyond or group_of(document, group_field) in unseen else "train"


def lines_seen(splits: Mapping[str, Split]) -> dict[str, float]:
    """By source, the share of long lines of the held-out documents that stand in some train document too."""
    lines = {source: [x for d in part.held_out for x in long_lines(d.text)] for source, part in splits.items()}
    wanted = {line for of_source in lines.values() for line in of_source}
    seen: set[str] = set()
    for part in splits.values():
        for document in part.train:
            seen.update(wanted.intersection(long_lines(document.text)))
    return {s: sum(line in seen for line in lines[s]) / max(len(lines[s]), 1) for s in splits}


def _position(key: bytes) -> float:
    """Where a text of this hash stands between 0 and 1."""
    return int.from_bytes(key[:8], "big") / 2**64


def long_lines(text: str) -> list[str]:
    """The lines that are long enough not to be alike by chance."""
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= LONG_LINE]
