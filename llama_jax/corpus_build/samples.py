"""What the report shows of what was taken out: a few texts of each sort, drawn by hash, so the same whatever comes first."""

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

from llama_jax.corpus_build import privacy
from llama_jax.corpus_build.document import Document

SAMPLES = 8  # of each sort
_EXCERPT = 600  # characters that the report shows
_MARGIN = 100  # characters more, by which it sees what a finding at their end is

# What orders it (a hash, or minus a count), the document's id, a detail, an excerpt; of near duplicates a second excerpt.
Row = tuple[Any, ...]


def excerpt(text: str) -> str:
    """The beginning of a text, as it can be written, and no less of it than `shown` looks at."""
    return text[: _EXCERPT + _MARGIN].encode(errors="replace").decode()


def shown(excerpt: str) -> str:
    """An excerpt as people may read it: masked, whatever the corpus is, since reports go where their corpora may not."""
    found = privacy.find(excerpt)
    begun = {kind: [span for span in spans if span[0] < _EXCERPT] for kind, spans in found.items()}
    end = max([_EXCERPT, *(span[1] for spans in begun.values() for span in spans)])
    return privacy.mask(excerpt[:end], begun)


def lost_lines(before: str, after: str) -> str:
    """The lines of one text that another does not have, but for white space around them."""
    kept = {line.strip() for line in after.split("\n")}
    return "\n".join(line for line in map(str.strip, before.split("\n")) if line and line not in kept)


def sample(document: Document, text: str | None = None, detail: str = "") -> Row:
    """A document, or a text that was cut from it, as a row."""
    text = document.text if text is None else text
    whole = f"{document.source}:{document.id}:{text}".encode(errors="replace")
    return hashlib.blake2b(whole, digest_size=8).hexdigest(), document.id, detail, excerpt(text)


def drawn(parts: Iterable[Iterable[Row]]) -> list[Row]:
    """The rows that are shown of several lists; drawn in steps or at once they are the same."""
    return sorted(itertools.chain.from_iterable(parts))[:SAMPLES]
