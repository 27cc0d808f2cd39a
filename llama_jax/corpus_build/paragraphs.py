"""Paragraphs: those that repeat others, and those that give a held-out document away.

A paragraph is what stands between blank lines. Cutting single paragraphs suits prose; a program without one of its parts is
broken, so documents of such sources are taken or left whole.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Set

import numpy as np

from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.shingles import ngram_hashes, word_hashes

_BREAK = re.compile(r"(\n[ \t]*(?:\n[ \t]*)+)")
# A document that may not be cut is left out when this share of its n-grams stands in held-out documents.
LARGEST_LEAK = 0.1


@dataclasses.dataclass
class Cut:
    """What a step took from one source."""

    paragraphs: int = 0
    bytes: int = 0  # of paragraphs and of whole documents
    documents: int = 0  # of which too little was left, or that could not be cut


def split_paragraphs(text: str) -> list[str]:
    """Paragraphs, each with the blank lines before it: joined they are the text again."""
    parts = _BREAK.split(text)
    return [parts[0], *(gap + body for gap, body in zip(parts[1::2], parts[2::2], strict=True))]


def paragraph_key(paragraph: str) -> bytes:
    """The same for paragraphs that differ in white space alone."""
    return hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=16).digest()


def drop_repeats(
    documents_by_source: Mapping[str, Iterable[Document]], *, shortest: int, least: int = 200, whole: Set[str] = frozenset()
) -> tuple[dict[str, list[Document]], dict[str, Cut]]:
    """Documents in which each paragraph of at least `shortest` characters stands once in all: where it came first.

    Documents of the sources `whole` stay as they are. One that loses paragraphs and has fewer than `least` characters left is
    dropped.
    """
    seen: set[bytes] = set()

    def repeats(paragraphs: list[str]) -> list[bool]:
        found = []
        for paragraph in paragraphs:
            long = len(paragraph.strip()) >= shortest
            key = paragraph_key(paragraph) if long else b""
            found.append(long and key in seen)
            if long:
                seen.add(key)
        return found

    kept: dict[str, list[Document]] = {}
    cuts = {}
    for source, documents in documents_by_source.items():
        cuts[source] = Cut()
        if source in whole:
            kept[source] = list(documents)
        else:
            kept[source] = _without(documents, repeats, least, cuts[source])
    return kept, cuts


def drop_leaks(
    documents_by_source: Mapping[str, Iterable[Document]],
    held_out: Iterable[str],
    *,
    ngram: int,
    least: int = 200,
    whole: Set[str] = frozenset(),
) -> tuple[dict[str, list[Document]], dict[str, Cut]]:
    """Train documents without the paragraphs that share a run of `ngram` words with a held-out text.

    Documents of the sources `whole` lose nothing or go altogether, when more than LARGEST_LEAK of their n-grams stand there.
    """
    secret = np.unique(np.concatenate([np.zeros(0, np.uint64), *(ngram_hashes(word_hashes(t), ngram) for t in held_out)]))

    def known(text: str) -> np.ndarray:
        words = word_hashes(text)
        if len(words) < ngram or not len(secret):
            return np.zeros(0, bool)
        grams = ngram_hashes(words, ngram)
        return secret[np.minimum(np.searchsorted(secret, grams), len(secret) - 1)] == grams

    def leaks(paragraphs: list[str]) -> list[bool]:
        return [bool(known(paragraph).any()) for paragraph in paragraphs]

    kept: dict[str, list[Document]] = {}
    cuts = {}
    for source, documents in documents_by_source.items():
        cut = cuts[source] = Cut()
        if source not in whole:
            kept[source] = _without(documents, leaks, least, cut)
            continue
        kept[source] = []
        for document in documents:
            found = known(document.text)
            if len(found) and found.mean() > LARGEST_LEAK:
                cut.documents += 1
                cut.bytes += len(document.text.encode())
            else:
                kept[source].append(document)
    return kept, cuts


def _without(documents: Iterable[Document], unwanted, least: int, cut: Cut) -> list[Document]:
    """Documents without the paragraphs for which `unwanted(paragraphs)` is True; counts what goes in `cut`."""
    kept = []
    for document in documents:
        paragraphs = split_paragraphs(document.text)
        drop = unwanted(paragraphs)
        if not any(drop):
            kept.append(document)
            continue
        text = "".join(p for p, gone in zip(paragraphs, drop, strict=True) if not gone).lstrip("\n")
        if text and not text.endswith("\n") and document.text.endswith("\n"):
            text += "\n"
        cut.paragraphs += sum(drop)
        if len(text.strip()) < least:
            text = ""
            cut.documents += 1
        else:
            kept.append(dataclasses.replace(document, text=text))
        cut.bytes += len(document.text.encode()) - len(text.encode())
    return kept
