"""What there is to know about a corpus: counts that add up over documents, sources and workers (paper section 4.1)."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llama_jax.corpus_build import demographics, language, toxicity
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.document import Document, Removed, host_of
from llama_jax.corpus_build.samples import SAMPLES, Row, drawn, excerpt, lost_lines, sample
from llama_jax.corpus_build.text import all_text

ANALYSES = ("language", "demographics", "toxicity")
LENGTH_BINS = 4  # a decade of bytes
TOXICITY_BINS = 20
SITES_KEPT = 1000  # of each source, the most frequent; a crawl has tens of millions
NAMED = 1000  # of a source's problems


@dataclasses.dataclass
class Problems:
    """How many there are, and the first of them by name; of two halves the sum is that of the whole."""

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)  # "where: problem"

    def __iadd__(self, other: "Problems") -> "Problems":
        self.count += other.count
        self.first = sorted([*self.first, *other.first])[:NAMED]
        return self


@dataclasses.dataclass
class Profile:
    """Counts of one source. `merge` makes one of two; both are the same whatever the order of documents."""

    bytes_read: int = 0  # of text, as it came
    documents: int = 0
    bytes: int = 0
    removed: Counter = dataclasses.field(default_factory=Counter)  # (step, rule) -> documents
    removed_bytes: Counter = dataclasses.field(default_factory=Counter)
    trimmed: Counter = dataclasses.field(default_factory=Counter)  # step -> documents that passed all steps and lost text to it
    trimmed_lines: Counter = dataclasses.field(default_factory=Counter)  # by which they have fewer
    trimmed_bytes: Counter = dataclasses.field(default_factory=Counter)
    # (step, rule) -> rows of what it removed; ("trimmed", step) -> of the lines it took from documents that stay;
    # ("compared", what) -> of what comparing documents did
    samples: dict = dataclasses.field(default_factory=dict)
    lengths: Counter = dataclasses.field(default_factory=Counter)  # bin of log10 bytes -> documents
    sites: Counter = dataclasses.field(default_factory=Counter)
    more_sites: int = 0  # beyond the most frequent, after `keep_sites`
    private: Counter = dataclasses.field(default_factory=Counter)  # kind -> findings in documents that stay
    removed_private: Counter = dataclasses.field(default_factory=Counter)  # and in those that a step left out
    removed_languages: Counter = dataclasses.field(default_factory=Counter)  # by the language step
    bad_rows: Problems = dataclasses.field(default_factory=Problems)
    bad_files: Problems = dataclasses.field(default_factory=Problems)
    foreign: Problems = dataclasses.field(default_factory=Problems)  # files that the source should not have named
    analysed: int = 0  # documents that the following count
    languages: Counter = dataclasses.field(default_factory=Counter)
    mentions: Counter = dataclasses.field(default_factory=Counter)
    english: int = 0  # of the analysed, those in English or not identified: what mentions are a share of
    scored: int = 0  # for toxicity
    toxicity: Counter = dataclasses.field(default_factory=Counter)  # bin -> documents

    def read(self, document: Document) -> None:
        """Counts the text of a document as it came."""
        self.bytes_read += _size(document)

    def keep(self, document: Document) -> None:
        """Counts a document that stays."""
        size = _size(document)
        self.documents += 1
        self.bytes += size
        self.lengths[int(math.log10(max(size, 1)) * LENGTH_BINS)] += 1
        self.private.update(document.findings.get("private", {}))
        if document.url:
            self.sites[(host_of(document.url) or "?").removeprefix("www.")] += 1

    def remove(self, removed: Removed) -> None:
        """Counts a document that a step left out, and keeps a sample of them, drawn by hash."""
        rule, document = (removed.step, removed.rule), removed.document
        self.removed[rule] += 1
        if removed.step == "language":
            self.removed_languages[document.findings["language"]] += 1
        self.removed_bytes[rule] += _size(document)
        self.removed_private.update(document.findings.get("private", {}))
        self.show({rule: [sample(document, detail=removed.detail)]})

    def trim(self, step: str, before: Document, after: Document) -> None:
        """Counts what a step took from a document that passed all steps, and keeps a sample of its lines, drawn by hash."""
        if before.text == after.text:
            return
        self.trimmed[step] += 1
        self.trimmed_lines[step] += max(before.text.count("\n") - after.text.count("\n"), 0)
        self.trimmed_bytes[step] += _size(before) - _size(after)
        shown, row = self.samples.get(("trimmed", step), []), sample(before)
        if len(shown) < SAMPLES or row[0] <= shown[-1][0]:  # lines are looked for only where they will be shown
            whole = all_text(before.text) if step == "extract" else before.text
            if lines := lost_lines(whole, after.text):
                self.show({("trimmed", step): [(*row[:3], excerpt(lines))]})

    def lose(self, row: BadRow) -> None:
        """Counts and names a row, or the rest of a file, that could not be read."""
        problem = Problems(1, [f"{row.where}: {row.problem}"])
        if row.foreign:
            self.foreign += problem
        elif row.rest:
            self.bad_files += problem
        else:
            self.bad_rows += problem

    def keep_sites(self) -> None:
        """Leaves the names of the most frequent sites, and the number of the others; at the end, for no merge makes it up."""
        kept = Counter(dict(ranked(self.sites)[:SITES_KEPT]))
        self.more_sites += len(self.sites) - len(kept)
        self.sites = kept

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
        found = [d.findings.get("language") for d in documents]
        if "language" in analyses:
            found = [name or language.identify(d.text)[0] for d, name in zip(documents, found, strict=True)]
            self.languages.update(found)
        english = [d for d, name in zip(documents, found, strict=True) if name in ("en", None)]  # None: nothing has looked
        self.english += len(english)
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
            else:
                mine += theirs
                setattr(self, field.name, mine)
        return self

    def show(self, samples: Mapping[tuple[str, str], Iterable[Row]]) -> "Profile":
        """Takes over some samples, and gives itself back."""
        for rule, rows in samples.items():
            self.samples[rule] = drawn([self.samples.get(rule, []), rows])
        return self


def _size(document: Document) -> int:
    """Bytes of its text."""
    return len(document.text.encode(errors="replace"))


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
