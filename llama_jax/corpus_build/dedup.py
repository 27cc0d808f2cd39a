"""Exact duplicates: of texts that differ in white space alone, one stays, by a declared order of sources."""

import hashlib
import json
from collections.abc import Iterable, Mapping

from llama_jax.corpus_build.document import Document


def content_hash(text: str) -> bytes:
    """sha256 of the text with its white space folded: copies that differ in indentation or line ends are copies."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def drop_duplicates(
    documents_by_source: Mapping[str, Iterable[Document]],
) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """Documents without exact copies, in the order of their hashes, and the number dropped by source.

    Of copies stays that of the earliest source, within it the first by `preference`: the result does not depend on the order of
    reading, and it is shuffled.

    Raises:
      ValueError: naming source and document, for a text that is blank or cannot be written as UTF-8.
    """
    seen: set[bytes] = set()
    kept: dict[str, list[Document]] = {}
    dropped: dict[str, int] = {}
    for source, documents in documents_by_source.items():
        best: dict[bytes, Document] = {}
        dropped[source] = 0
        for document in documents:
            key = checked_hash(document)
            if key in seen or key in best:
                dropped[source] += 1
            if key not in seen and (key not in best or preference(document) < preference(best[key])):
                best[key] = document
        seen.update(best)
        kept[source] = [best[key] for key in sorted(best)]
    return kept, dropped


def preference(document: Document) -> tuple[str, ...]:
    """Which of several copies comes first: by id, and since ids repeat (files that count from 0 each) by all else it says."""
    return document.id, document.text, document.url, json.dumps([document.metadata, document.findings], sort_keys=True)


def by_hash(documents: Iterable[Document]) -> list[Document]:
    """Documents in the order of their hashes: a shuffle that is the same in every build."""
    return sorted(documents, key=lambda d: (content_hash(d.text), preference(d)))


def checked_hash(document: Document) -> bytes:
    """`content_hash` of a document; ValueError if it has no text that can be written."""
    where = f"source {document.source!r}: document {document.id!r}"
    if not document.text.strip():
        raise ValueError(f"{where}: expected a text, got white space only")
    try:
        return content_hash(document.text)
    except UnicodeEncodeError:
        raise ValueError(f"{where}: its text holds a lone surrogate") from None
