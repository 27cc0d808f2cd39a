"""What there is to know about a corpus: counts that add up over documents, sources and workers (paper section 4.1)."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from llama_jax.corpus_build import demographics, language, toxicity
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.document import Document, Removed
from llama_jax.corpus_build.samples import Row, drawn, sample

ANALYSES = ("language", "demographics", "toxicity")
LENGTH_BINS = 4  # a decade of bytes
TOXICITY_BINS = 20


@dataclasses.dataclass
class Profile:
    """Counts of one source. `merge` makes one of two; both are the same whatever the order of documents."""

    documents: int = 0
    bytes: int = 0
    removed: Counter = dataclasses.field(default_factory=Counter)  # (step, rule) -> documents
    removed_bytes: Counter = dataclasses.field(default_factory=Counter)
    # (step, rule) -> rows of what it removed; ("compared", what) -> rows of what comparing documents did
    samples: dict = dataclasses.field(default_factory=dict)
    lengths: Counter = dataclasses.field(default_factory=Counter)  # bin of log10 bytes -> documents
    sites: Counter = dataclasses.field(default_factory=Counter)
    private: Counter = dataclasses.field(default_factory=Counter)  # kind -> findings
    removed_languages: Counter = dataclasses.field(default_factory=Counter)  # by the language step
    bad_rows: list = dataclasses.field(default_factory=list)  # "where: problem"
    bad_files: list = dataclasses.field(default_factory=list)
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
        self.show({rule: [sample(document, detail=removed.detail)]})

    def lose(self, row: BadRow) -> None:
        """Counts and names a row, or the rest of a file, that could not be read."""
        (self.bad_files if row.rest else self.bad_rows).append(f"{row.where}: {row.problem}")

    def analyse(
        self,
        documents: Iterable[Document],
        analyses: Iterable[str],
        *,
        identities: str | None = None,
        checkpoint: str | None = None,
    ) -> None:
        """Languages, pronouns, identities and toxicity of documents; costly, so a sample may be given.

        Args:
          identities: a file of descriptors instead of Table 9's, see `demographics.identities_of`.
          checkpoint: of a classifier of toxicity instead of the built-in one, see `toxicity.classifier_of`.
        """
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
            axes = demographics.identities_of(identities)
            for document in english:
                self.mentions.update(demographics.mentions(document.text, axes))
        if "toxicity" in analyses and english:
            scores = toxicity.document_scores([d.text for d in english], toxicity.classifier_of(checkpoint))
            self.scored += len(english)
            self.toxicity.update(np.minimum((scores * TOXICITY_BINS).astype(int), TOXICITY_BINS - 1).tolist())

    def merge(self, other: "Profile") -> "Profile":
        """Takes over the counts of another profile."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, dict):
                self.show(theirs)
            elif isinstance(mine, list):
                mine[:] = sorted([*mine, *theirs])
            else:
                setattr(self, field.name, mine + theirs)
        return self

    def show(self, samples: Mapping[tuple[str, str], Iterable[Row]]) -> "Profile":
        """Takes over some samples, and gives itself back."""
        for rule, rows in samples.items():
            self.samples[rule] = drawn([self.samples.get(rule, []), rows])
        return self


def ranked(counts: Mapping[Any, int]) -> list[tuple[Any, int]]:
    """Names and counts, the most frequent first; of equal counts the first name, as `most_common` does not promise."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def check_measures(analyses: Iterable[str], *, identities: str | None, checkpoint: str | None) -> None:
    """ValueError for a list or a classifier that no analysis would use or that is not there."""
    for name, value, analysis in (
        ("identities", identities, "demographics"), ("toxicity_checkpoint", checkpoint, "toxicity")
    ):  # fmt: skip
        if value is not None and analysis not in analyses:
            raise ValueError(f"{name}: {value!r} is for the analysis {analysis}, which is not among the analyses")
    if identities is not None:
        demographics.identities_of(identities)
    if checkpoint is not None:
        toxicity.check_checkpoint(checkpoint)


def in_sample(document: Document, share: float) -> bool:
    """Whether a document is among the share that is analysed; the same in every run."""
    return share >= 1 or toxicity.in_sample(document.text, share)
