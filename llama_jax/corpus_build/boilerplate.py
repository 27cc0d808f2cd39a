"""Boilerplate: lines that stand in so many documents of a source that they are the site's, not the document's."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable

from llama_jax.corpus_build.document import Document


@dataclasses.dataclass(frozen=True)
class Boilerplate:
    """When a line counts as boilerplate."""

    documents: int = 10  # of one source that hold it, at least; 0: no line does
    share: float = 0.001  # of the source's documents, at least
    shortest: int = 20  # characters; shorter lines (a fence, an import, "Notes") recur in honest documents too

    def __post_init__(self):
        for name in ("documents", "share", "shortest"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")

    def __bool__(self) -> bool:
        return self.documents > 0

    def threshold(self, documents: int) -> int:
        """Documents that must hold a line, in a source of so many."""
        return max(self.documents, round(self.share * documents))


def line_keys(text: str, settings: Boilerplate) -> set[bytes]:
    """The lines of a text as keys, white space and case folded; each once."""
    return {_key(line) for line in text.split("\n") if len(line.strip()) >= settings.shortest}


def frequent_lines(documents: Iterable[Document], settings: Boilerplate) -> frozenset[bytes]:
    """Keys of the lines that are boilerplate in one source."""
    counts: Counter[bytes] = Counter()
    total = 0
    for document in documents:
        counts.update(line_keys(document.text, settings))
        total += 1
    least = settings.threshold(total)
    return frozenset(key for key, count in counts.items() if count >= least)


def without_lines(document: Document, frequent: frozenset[bytes], settings: Boilerplate) -> tuple[Document, int]:
    """The document without those lines, and how many there were."""
    if not frequent:
        return document, 0
    lines = document.text.split("\n")
    kept = [line for line in lines if len(line.strip()) < settings.shortest or _key(line) not in frequent]
    if len(kept) == len(lines):
        return document, 0
    return dataclasses.replace(document, text="\n".join(kept)), len(lines) - len(kept)


def _key(line: str) -> bytes:
    return hashlib.blake2b(" ".join(line.lower().split()).encode(), digest_size=12).digest()
