"""Exact duplicates: the first copy in the declared order of sources stays."""

import hashlib
from collections.abc import Iterable, Mapping

from llama_jax.corpus_build.document import Document


def content_hash(text: str) -> bytes:
    """sha256 of the text with its white space folded: copies that differ in indentation or line ends are copies."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def drop_duplicates(
    documents_by_source: Mapping[str, Iterable[Document]],
) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """Documents without exact copies, and the number dropped by source. Earlier sources and documents win.

    Raises:
      ValueError: naming source and document, for a text that is blank or cannot be written as UTF-8.
    """
    seen: set[bytes] = set()
    kept: dict[str, list[Document]] = {}
    dropped: dict[str, int] = {}
    for source, documents in documents_by_source.items():
        kept[source], dropped[source] = [], 0
        for document in documents:
            if not document.text.strip():
                raise ValueError(f"source {source!r}: document {document.id!r}: expected a text, got white space only")
            try:
                key = content_hash(document.text)
            except UnicodeEncodeError:
                raise ValueError(f"source {source!r}: document {document.id!r}: its text holds a lone surrogate") from None
            if key in seen:
                dropped[source] += 1
            else:
                seen.add(key)
                kept[source].append(document)
    return kept, dropped
