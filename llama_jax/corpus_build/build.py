"""The build in one process: documents -> clean -> compare -> split -> tokenizer -> blocks -> manifest, whole or not at all.

A build that is killed goes on where it was, given the same inputs and as far as the settings are the same (`stages`).

Layout of the result:

    tokenizer.model
    blocks/<source>[-00000-of-00008].array_record     what to train on
    held_out/<source>.jsonl                           raw documents: bits per byte need the bytes
    held_out/<source>.array_record                    the same as blocks
    report.html                                       what there is to know about it
    manifest.json
"""

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llama_jax.config import check_least
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.document import Document, Removed
from llama_jax.corpus_build.evaluation import Evaluation, read_evaluation
from llama_jax.corpus_build.profile import ANALYSES, Profile, check_measures, in_sample
from llama_jax.corpus_build.refine import Deduplication, HeldOut, Refined, refine
from llama_jax.corpus_build.stages import SettingsError, Stages, fingerprint_of, unfinished
from llama_jax.corpus_build.steps import CleanConfig, check_readers, make_steps, trail
from llama_jax.corpus_build.write import given_tokenizer, write_corpus


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a corpus is built.

    Raises:
      ValueError: for settings that no corpus can be built with, before a document has been read.
    """

    vocab_size: int  # pieces of the tokenizer, trained on the train split unless `tokenizer_path` names one
    block_length: int  # T; a block has T+1 ids
    held_out: HeldOut
    weights: Mapping[str, float]  # share of each source in the training mixture, up to a factor; in the order of sources
    total_tokens: int | None = None  # of the planned training run; the tokens of the corpus if None
    temperature: float | None = None  # of the mixture, see mixture.shares
    max_epochs: float | None = None  # cap on how often a source is seen
    tokenizer_path: str | None = None
    tokenizer_bytes: int = 4_000_000  # size of the weighted sample that the tokenizer is trained on
    shards: int = 1  # files of blocks for each source
    steps: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # cleaning of each source
    clean: CleanConfig = CleanConfig()
    deduplication: Deduplication = Deduplication()
    whole: frozenset[str] = frozenset()  # sources whose documents may not lose paragraphs (programs)
    max_bad_rows: int = 0  # of each source: unreadable rows that are skipped; one more ends the build
    max_bad_files: int = 0  # the same of files that cannot be read to their ends
    analyses: tuple[str, ...] = ()  # of the report, beside what costs nothing: some of profile.ANALYSES
    analysed_share: float = 1.0  # of the documents
    identities: str | None = None  # a file of axes and descriptors for the analysis `demographics`
    toxicity_checkpoint: str | None = None  # of a classifier for the analysis `toxicity`
    seed: int = 0

    def __post_init__(self):
        if not self.weights:
            raise ValueError("weights: expected at least one source")
        for source, weight in self.weights.items():
            if not re.fullmatch(r"\w[\w.-]*", source):
                raise ValueError(f"source {source!r}: expected letters, digits, '_', '-' and '.': it names files")
            if not weight > 0:
                raise ValueError(f"weights[{source!r}]: expected a positive share, got {weight}")
        held_out = self.held_out
        if not 0 < held_out.fraction < 1:
            raise ValueError(f"held_out_fraction: expected a number between 0 and 1, got {held_out.fraction}")
        if not 0 <= held_out.minimum_bytes <= held_out.maximum_bytes:
            raise ValueError(
                f"held_out_minimum: expected 0 to held_out_maximum ({held_out.maximum_bytes:,}), got {held_out.minimum_bytes:,}"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ValueError(f"max_epochs: expected a number above 0, got {self.max_epochs}")
        check_least("", self, vocab_size=1, block_length=1, tokenizer_bytes=1, shards=1, max_bad_rows=0, max_bad_files=0)
        if self.total_tokens is not None:
            check_least("", self, total_tokens=1)
        if not 0 < self.analysed_share <= 1:
            raise ValueError(f"analysed_share: expected a share above 0 and up to 1, got {self.analysed_share}")
        if unknown := set(self.analyses) - set(ANALYSES):
            raise ValueError(f"analyses: expected some of {', '.join(ANALYSES)}, got {', '.join(sorted(unknown))}")
        check_measures(self.analyses, identities=self.identities, checkpoint=self.toxicity_checkpoint)
        for names in self.steps.values():
            make_steps(names, self.clean)
        check_readers(self.steps.values(), self.clean)
        if self.tokenizer_path is not None:
            given_tokenizer(self.tokenizer_path, self.vocab_size)


def build_corpus(
    documents_by_source: Mapping[str, Iterable[Document | BadRow]],
    output: str | os.PathLike,
    settings: Settings,
    *,
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Builds the corpus in `output` and returns its manifest; `config` are plain JSON values to keep in it.

    Sources come in the order in which duplicates are kept. `inputs` are plain JSON values that change when what is read does,
    and are kept in the manifest too: with them a build that was killed goes on, without them it starts clean.

    Raises:
      FileExistsError: `output` is there already.
      ValueError: for a wrong row of an evaluation file, before any document is read; for blank texts, or a source that gives
        no train or no held-out document.
      SettingsError: for settings that the documents do not allow, as more bad rows than may be skipped; with `inputs`, other
        settings go on with what was made.
    """
    if set(documents_by_source) != set(settings.weights):
        raise ValueError(f"weights: expected one for each of {list(documents_by_source)}, got {sorted(settings.weights)}")
    evaluation = read_evaluation(settings.deduplication.evaluation, settings.deduplication.leak_ngram)
    fingerprint = None if inputs is None else fingerprint_of(settings, inputs)
    with unfinished(output, fingerprint) as (directory, stages):
        refined, profiles = stages.once("refined", lambda: _compared(documents_by_source, settings, evaluation, stages))
        for source, profile in profiles.items():  # the run that made them may have had a higher limit
            check_bad_rows(source, profile, settings)
        for source, part in refined.items():
            profiles[source] = stages.once(
                f"profile/{source}", functools.partial(profile_train, part, settings, profiles[source])
            )
        return write_corpus(
            refined, profiles, directory, settings,
            evaluation=evaluation, config=dict(config or {}), inputs=inputs, stages=stages,
        )  # fmt: skip


def _compared(
    documents_by_source: Mapping[str, Iterable[Document | BadRow]], settings: Settings, evaluation: Evaluation, stages: Stages
) -> tuple[dict[str, Refined], dict[str, Profile]]:
    def cleaned(source: str) -> tuple[list[Document], Profile]:
        profile = Profile()
        return list(cleaned_documents(source, documents_by_source[source], settings, profile)), profile

    parts = {source: stages.once(f"cleaned/{source}", functools.partial(cleaned, source)) for source in documents_by_source}
    documents = {source: part[0] for source, part in parts.items()}
    refined = refine(documents, settings.held_out, settings.deduplication, evaluation=evaluation, whole=settings.whole)
    return refined, {source: part[1] for source, part in parts.items()}


def cleaned_documents(
    source: str, rows: Iterable[Document | BadRow], settings: Settings, profile: Profile, *, limited: bool = True
) -> Iterator[Document]:
    """The documents that pass the steps of their source; what does not, and what they lost on the way, is counted in `profile`.

    Bad rows beyond their limit end it, unless it is not `limited` since these rows are only some of the source.
    """
    names = settings.steps.get(source, ())
    steps = make_steps(names, settings.clean)
    for row in rows:
        if isinstance(row, BadRow):
            profile.lose(row)
            if limited:
                check_bad_rows(source, profile, settings)
            continue
        profile.read(row)
        *before, result = trail(row, steps)
        if isinstance(result, Removed):
            profile.remove(result)
            continue
        for name, (old, new) in zip(names, itertools.pairwise([*before, result]), strict=True):
            profile.trim(name, old, new)
        yield result


def check_bad_rows(source: str, profile: Profile, settings: Settings) -> None:
    """SettingsError that names the first bad row or file beyond those that may be skipped, or one that none may be."""
    if profile.foreign.count:
        raise SettingsError(f"{profile.foreign.first[0]} (source {source!r}; this is no damage that max_bad_files could skip)")
    for what, problems in (("row", profile.bad_rows), ("file", profile.bad_files)):
        limit = getattr(settings, f"max_bad_{what}s")
        if problems.count > limit:
            number = min(limit, len(problems.first) - 1)
            raise SettingsError(
                f"{problems.first[number]} (bad {what} {number + 1} of source {source!r}; max_bad_{what}s is {limit})"
            )


def profile_train(part: Refined, settings: Settings, profile: Profile) -> Profile:
    """Counts the train documents of a source, and analyses the share of them that the settings ask for."""
    profile.show(part.samples)
    for document in part.train:
        profile.keep(document)
    profile.keep_sites()
    analyse(profile, part.train, settings)
    return profile


def analyse(profile: Profile, documents: Sequence[Document], settings: Settings) -> None:
    """The analyses that the settings ask for, of the share of the documents that they ask for."""
    profile.analyse(
        [d for d in documents if in_sample(d, settings.analysed_share)], settings.analyses,
        identities=settings.identities, checkpoint=settings.toxicity_checkpoint,
    )  # fmt: skip
