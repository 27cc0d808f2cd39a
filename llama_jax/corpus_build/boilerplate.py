"""Boilerplate: lines that stand in so many documents of a source that they are the site's, not the document's."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable

from llama_jax.config import check_least
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.samples import Row, drawn, excerpt


@dataclasses.dataclass(frozen=True)
class Boilerplate:
    """When a line counts as boilerplate."""

    documents: int = 10  # of one source that hold it, at least; 0: no line does
    share: float = 0.001  # of the source's documents, at least
    shortest: int = 20  # characters; shorter lines (a fence, an import, "Notes") recur in honest documents too

    def __post_init__(self):
        check_least("", self, documents=0, share=0, shortest=0)

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


def without_lines(document: Document, frequent: frozenset[bytes], settings: Boilerplate) -> tuple[Document, list[str]]:
    """The document without those lines, and the lines, white space and case folded."""
    if not frequent:
        return document, []
    kept, cut = [], []
    for line in document.text.split("\n"):
        if len(line.strip()) >= settings.shortest and _key(line) in frequent:
            cut.append(_folded(line))
        else:
            kept.append(line)
    return (dataclasses.replace(document, text="\n".join(kept)), cut) if cut else (document, cut)


def line_rows(counts: Iterable[tuple[str, int]], source: str) -> list[Row]:
    """What the report shows of the lines that were cut, from (line, documents of the source that lost it)."""
    return drawn([(-count, source, "", excerpt(line))] for line, count in counts)


def _folded(line: str) -> str:
    return " ".join(line.lower().split())


def _key(line: str) -> bytes:
    return hashlib.blake2b(_folded(line).encode(), digest_size=12).digest()
