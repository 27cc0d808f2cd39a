"""What there is to know about a corpus: counts that add up over documents, sources and workers (paper section 4.1)."""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from urllib.parse import urlsplit

import numpy as np

from llama_jax.corpus_build import demographics, language, toxicity
from llama_jax.corpus_build.document import Document, Removed

ANALYSES = ("language", "demographics", "toxicity")
LENGTH_BINS = 4  # a decade of bytes
TOXICITY_BINS = 20
_SAMPLES = 8  # kept of each rule
_EXCERPT = 600  # characters of each


@dataclasses.dataclass
class Profile:
    """Counts of one source. `merge` makes one of two; both are the same whatever the order of documents."""

    documents: int = 0
    bytes: int = 0
    removed: Counter = dataclasses.field(default_factory=Counter)  # (step, rule) -> documents
    removed_bytes: Counter = dataclasses.field(default_factory=Counter)
    samples: dict = dataclasses.field(default_factory=dict)  # (step, rule) -> [(hash, id, detail, excerpt)]
    lengths: Counter = dataclasses.field(default_factory=Counter)  # bin of log10 bytes -> documents
    sites: Counter = dataclasses.field(default_factory=Counter)
    private: Counter = dataclasses.field(default_factory=Counter)  # kind -> findings
    removed_languages: Counter = dataclasses.field(default_factory=Counter)  # by the language step
    bad_rows: list = dataclasses.field(default_factory=list)  # "where: problem"
    analysed: int = 0  # documents that the following count
    languages: Counter = dataclasses.field(default_factory=Counter)
    mentions: Counter = dataclasses.field(default_factory=Counter)
    english: int = 0  # of the analysed: what mentions are a share of
    scored: int = 0  # for toxicity
    toxicity: Counter = dataclasses.field(default_factory=Counter)  # bin -> documents

    def keep(self, document: Document) -> None:
        """Counts a document that stays."""
        size = len(document.text.encode())
        self.documents += 1
        self.bytes += size
        self.lengths[int(math.log10(max(size, 1)) * LENGTH_BINS)] += 1
        if document.url:
            self.sites[(urlsplit(document.url).hostname or "?").removeprefix("www.")] += 1

    def remove(self, removed: Removed) -> None:
        """Counts a document that a step left out, and keeps a sample of them, drawn by hash."""
        rule, document = (removed.step, removed.rule), removed.document
        self.removed[rule] += 1
        if removed.step == "language":
            self.removed_languages[document.findings["language"]] += 1
        self.removed_bytes[rule] += len(document.text.encode(errors="replace"))
        self.private.update(document.findings.get("private", {}))
        excerpt = document.text[:_EXCERPT].encode(errors="replace").decode()
        key = hashlib.blake2b(f"{document.source}:{document.id}".encode(errors="replace"), digest_size=8).hexdigest()
        self._sample(rule, [(key, document.id, removed.detail, excerpt)])

    def analyse(self, documents: Iterable[Document], analyses: Iterable[str]) -> None:
        """Languages, pronouns, identities and toxicity of documents; costly, so a sample may be given."""
        documents = list(documents)
        self.analysed += len(documents)
        english = documents
        if "language" in analyses:
            found = [d.findings.get("language") or language.identify(d.text)[0] for d in documents]
            self.languages.update(found)
            english = [d for d, name in zip(documents, found, strict=True) if name == "en"]
        self.english += len(english)
        for document in documents:
            self.private.update(document.findings.get("private", {}))
        if "demographics" in analyses:
            for document in english:
                self.mentions.update(demographics.mentions(document.text))
        if "toxicity" in analyses and english:
            scores = toxicity.document_scores([d.text for d in english])
            self.scored += len(english)
            self.toxicity.update(np.minimum((scores * TOXICITY_BINS).astype(int), TOXICITY_BINS - 1).tolist())

    def merge(self, other: "Profile") -> "Profile":
        """Takes over the counts of another profile."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, dict):
                for rule, rows in theirs.items():
                    self._sample(rule, rows)
            elif isinstance(mine, list):
                mine[:] = sorted([*mine, *theirs])
            else:
                setattr(self, field.name, mine + theirs)
        return self

    def _sample(self, rule: tuple[str, str], rows: Iterable[tuple]) -> None:
        self.samples[rule] = sorted([*self.samples.get(rule, []), *rows])[:_SAMPLES]


def in_sample(document: Document, share: float) -> bool:
    """Whether a document is among the share that is analysed; the same in every run."""
    return share >= 1 or toxicity.in_sample(document.text, share)
