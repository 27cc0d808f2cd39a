"""Exact duplicates: the first copy in the declared order of sources stays."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from llama_jax.corpus_build.document import Document


def content_hash(text: str) -> bytes:
    """sha256 of the text with its white space folded: copies that differ in indentation or line ends are copies."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def drop_duplicates(
    documents_by_source: Mapping[str, Iterable[Document]],
) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """Documents without exact copies, and the number dropped by source. Earlier sources and documents win."""
    seen: set[bytes] = set()
    kept: dict[str, list[Document]] = {}
    dropped: Counter[str] = Counter()
    for source, documents in documents_by_source.items():
        kept[source] = []
        for document in documents:
            key = content_hash(document.text)
            if key in seen:
                dropped[source] += 1
                continue
            seen.add(key)
            kept[source].append(document)
    return kept, {source: dropped[source] for source in kept}
