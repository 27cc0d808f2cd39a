"""Paragraphs: those that repeat others, and those that give a held-out document or an evaluation sample away.

A paragraph is what stands between blank lines, or a line where a text has no blank ones, as C4's rules and many extractions of
web pages leave it. Cutting single paragraphs suits prose; a program without one of its parts is broken, so documents of such
sources are taken or left whole.
"""

import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Set

import numpy as np

from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.samples import Row, drawn, sample
from llama_jax.corpus_build.shingles import ngram_hashes, word_hashes

_BREAK = re.compile(r"(\n[ \t]*(?:\n[ \t]*)+)")
_LINE_BREAK = re.compile(r"(\n[ \t]*(?:\n[ \t]*)*)")
# A document that may not be cut is left out when more than this share of its n-grams stands in held-out documents. Programs
# share licences and idioms with held-out ones, and what stays is measured (`split.lines_seen`).
LEAK_LIMIT = 0.1
LEAST = 200  # characters: a document that loses paragraphs and has less left is dropped


@dataclasses.dataclass
class Cut:
    """What a step took from one source."""

    paragraphs: int = 0
    bytes: int = 0  # of paragraphs and of whole documents
    documents: int = 0  # of which too little was left, or that could not be cut
    samples: list[Row] = dataclasses.field(default_factory=list, compare=False)  # paragraphs, and documents that went whole

    def add(self, numbers: Collection[int], before: Document, after: Document | None) -> None:
        """Counts what was cut from one document: paragraphs of these numbers, and all if `after` is None."""
        self.paragraphs += len(numbers)
        self.bytes += len(before.text.encode()) - (len(after.text.encode()) if after else 0)
        self.documents += after is None
        parts = split_paragraphs(before.text) if numbers else []
        texts = [parts[number].strip() for number in numbers] or [before.text]
        self.samples = drawn([self.samples, [sample(before, text) for text in texts]])

    def __add__(self, other: "Cut") -> "Cut":
        return Cut(
            self.paragraphs + other.paragraphs, self.bytes + other.bytes, self.documents + other.documents,
            drawn([self.samples, other.samples]),
        )  # fmt: skip


def split_paragraphs(text: str) -> list[str]:
    """Paragraphs, each with the line ends before it: joined they are the text again."""
    parts = (_BREAK if _BREAK.search(text.strip()) else _LINE_BREAK).split(text)
    return [parts[0], *(gap + body for gap, body in zip(parts[1::2], parts[2::2], strict=True))]


def without_paragraphs(document: Document, numbers: Collection[int], *, least: int = LEAST) -> Document | None:
    """The document without the paragraphs of these numbers; None if fewer than `least` characters are left."""
    if not numbers:
        return document
    paragraphs = split_paragraphs(document.text)
    text = "".join(p for i, p in enumerate(paragraphs) if i not in numbers).lstrip("\n")
    if text and not text.endswith("\n") and document.text.endswith("\n"):
        text += "\n"
    return dataclasses.replace(document, text=text) if len(text.strip()) >= least else None


# Repeats


def without_repeats(document: Document, numbers: Collection[int], *, shortest: int, least: int = LEAST) -> Document | None:
    """`without_paragraphs`, but a document of which a paragraph of `shortest` characters is left stays, however short: other
    documents lose their copies of it."""
    result = without_paragraphs(document, numbers, least=least)
    if result is None:
        left = [p for i, p in enumerate(split_paragraphs(document.text)) if i not in numbers]
        if any(len(paragraph.strip()) >= shortest for paragraph in left):
            result = without_paragraphs(document, numbers, least=0)
    return result


def paragraph_keys(text: str, shortest: int) -> list[tuple[int, bytes]]:
    """(number, key) of the paragraphs of at least `shortest` characters; white space does not count."""
    return [
        (i, hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=16).digest())
        for i, paragraph in enumerate(split_paragraphs(text))
        if len(paragraph.strip()) >= shortest
    ]


def drop_repeats(
    documents_by_source: Mapping[str, Iterable[Document]], *, shortest: int, least: int = LEAST, whole: Set[str] = frozenset()
) -> tuple[dict[str, list[Document]], dict[str, Cut]]:
    """Documents in which each paragraph of at least `shortest` characters stands once in all: where it came first.

    Documents of the sources `whole` stay as they are and count for nothing.
    """
    seen: set[bytes] = set()
    kept: dict[str, list[Document]] = {}
    cuts = {source: Cut() for source in documents_by_source}
    for source, documents in documents_by_source.items():
        if source in whole:
            kept[source] = list(documents)
            continue
        kept[source] = []
        for document in documents:
            repeats = set()
            for number, key in paragraph_keys(document.text, shortest):
                if key in seen:
                    repeats.add(number)
                seen.add(key)
            result = without_repeats(document, repeats, shortest=shortest, least=least)
            if repeats:
                cuts[source].add(repeats, document, result)
            if result is not None:
                kept[source].append(result)
    return kept, cuts


# Leaks


def secret_ngrams(texts: Iterable[str], ngram: int) -> np.ndarray:
    """The n-grams of words that no train document may share: sorted hashes."""
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *(ngram_hashes(word_hashes(t), ngram) for t in texts)]))


def shared(text: str, secret: np.ndarray, ngram: int) -> np.ndarray:
    """For each n-gram of a text whether it is secret, bool [n-grams]; a text of fewer words has none."""
    words = word_hashes(text)
    if len(words) < ngram or not len(secret):
        return np.zeros(0, bool)
    grams = ngram_hashes(words, ngram)
    return secret[np.minimum(np.searchsorted(secret, grams), len(secret) - 1)] == grams


def without_leaks(
    document: Document,
    secret: np.ndarray,
    *,
    ngram: int,
    least: int = LEAST,
    whole: bool = False,
    largest: float = LEAK_LIMIT,
) -> tuple[Document | None, Set[int]]:
    """The document without the paragraphs that have part in an n-gram of `secret`, and their numbers.

    A secret run may reach over blank lines: a question and its answers stand in paragraphs of their own.
    With `whole` it loses nothing, or goes altogether where more than the share `largest` of its n-grams is secret.
    """
    found = shared(document.text, secret, ngram)
    if not found.any():
        return document, frozenset()
    if whole:
        return (None if found.mean() > largest else document), frozenset()
    edges = np.zeros(len(found) + ngram, np.int64)  # one more than words
    edges[: len(found)] += found
    edges[ngram:] -= found
    inside = np.cumsum(edges)[:-1] > 0  # for each word whether it is in a secret run
    owner = np.repeat(*zip(*((i, len(word_hashes(p))) for i, p in enumerate(split_paragraphs(document.text))), strict=True))
    numbers = set(owner[inside].tolist())
    return without_paragraphs(document, numbers, least=least), numbers


def drop_leaks(
    documents_by_source: Mapping[str, Iterable[Document]],
    texts: Iterable[str],
    *,
    ngram: int,
    least: int = LEAST,
    whole: Set[str] = frozenset(),
    largest: float = LEAK_LIMIT,
) -> tuple[dict[str, list[Document]], dict[str, Cut]]:
    """Train documents without what they share with held-out texts; see `without_leaks`."""
    secret = secret_ngrams(texts, ngram)
    kept: dict[str, list[Document]] = {source: [] for source in documents_by_source}
    cuts = {source: Cut() for source in documents_by_source}
    for source, documents in documents_by_source.items():
        for document in documents:
            result, numbers = without_leaks(
                document, secret, ngram=ngram, least=least, whole=source in whole, largest=largest
            )
            if result is not document:
                cuts[source].add(numbers, document, result)
            if result is not None:
                kept[source].append(result)
    return kept, cuts
