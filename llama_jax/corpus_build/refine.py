"""What a corpus leaves out by comparing documents with each other, and which of them it holds out.

duplicates -> boilerplate lines -> near duplicates -> split -> leaks -> repeated paragraphs, in this order. Every decision
depends on texts, ids and the declared order of the sources alone: neither the order of reading nor the number of workers
changes a result, which is what lets `beam_pipeline` do the same over many machines.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Set

from llama_jax.config import check_least, check_shares
from llama_jax.corpus_build.boilerplate import Boilerplate, frequent_lines, line_rows, without_lines
from llama_jax.corpus_build.dedup import by_hash, drop_duplicates
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.evaluation import Evaluation, read_evaluation
from llama_jax.corpus_build.near_duplicates import NearDuplicates, drop_near_duplicates, pair_row
from llama_jax.corpus_build.paragraphs import Cut, drop_leaks, drop_repeats
from llama_jax.corpus_build.samples import Row, drawn, sample
from llama_jax.corpus_build.source_files import expand
from llama_jax.corpus_build.split import lines_seen, split
from llama_jax.corpus_build.storage import StorageError

# Names of samples, beside those of `cut_samples`.
LINES, PAIRS = ("compared", "boilerplate"), ("compared", "near")


@dataclasses.dataclass(frozen=True)
class Deduplication:
    """What is taken out beside exact copies; 0 (also as the first field of the first two) for none of it."""

    boilerplate: Boilerplate = Boilerplate(documents=0)  # lines that stand in many documents of a source
    near: NearDuplicates = NearDuplicates(threshold=0.0)  # whole documents, before the split
    leak_ngram: int = 0  # words: train paragraphs that share such a run with a held-out document are cut
    evaluation: tuple[str, ...] = ()  # files of evaluation samples (`text`): the same for what is shared with them, and
    # documents that cannot be cut go
    # Of the n-grams of one that cannot be cut, the share that may be in samples. These are short where a program may be long:
    # its share says nothing of how much of a sample it gives away, and one document less costs nothing beside a benchmark that
    # cannot be trusted.
    evaluation_share: float = 0.0
    repeated_paragraph: int = 0  # characters: of copies so long, the first stays, on each side of the split

    def __post_init__(self):
        check_least("", self, leak_ngram=0, repeated_paragraph=0)  # 0: none
        check_shares("", self, "evaluation_share")
        if self.evaluation and not self.leak_ngram:
            raise ValueError("leak_ngram: expected a number of words, by which evaluation samples are found")
        for path in self.evaluation:
            try:
                expand(path)
            except (FileNotFoundError, StorageError) as error:
                raise ValueError(f"evaluation: expected files of samples with a text each; {error}") from None


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How much is held out of each source; see `split.split`."""

    fraction: float
    minimum_bytes: int
    maximum_bytes: int
    group_field: str | None = None  # of the metadata: documents with the same value there stand on one side


@dataclasses.dataclass(frozen=True)
class Refined:
    """One source after all comparisons."""

    train: list[Document]
    held_out: list[Document]
    withheld: list[Document]
    unique: int  # documents after exact and near duplicates
    lines_seen: float  # share of long held-out lines that a train document has too
    counts: dict[str, int]  # what went, by kind
    samples: dict[tuple[str, str], list[Row]]  # of what went, for the report


def refine(
    documents_by_source: Mapping[str, Iterable[Document]],
    held_out: HeldOut,
    deduplication: Deduplication = Deduplication(),
    *,
    evaluation: Evaluation | None = None,
    whole: Set[str] = frozenset(),
) -> dict[str, Refined]:
    """All comparisons, in memory.

    Args:
      evaluation: the samples of `deduplication.evaluation`, where these have been read already.
      whole: the sources whose documents may not lose paragraphs or lines.
    """
    if evaluation is None:
        evaluation = read_evaluation(deduplication.evaluation, deduplication.leak_ngram)
    documents, duplicates = drop_duplicates(documents_by_source)
    lines: dict[str, Counter[str]] = {source: Counter() for source in documents}
    total = dict.fromkeys(documents, 0)
    if deduplication.boilerplate:
        for source in documents.keys() - whole:
            documents[source], total[source], lines[source] = drop_boilerplate(documents[source], deduplication.boilerplate)
    near: dict[str, list[tuple[Document, Document]]] = {source: [] for source in documents}
    if deduplication.near:
        documents, near = drop_near_duplicates(documents, deduplication.near)

    splits = split(documents, **dataclasses.asdict(held_out))
    train = {source: part.train for source, part in splits.items()}
    cuts = {kind: {source: Cut() for source in splits} for kind in ("leaks", "evaluation", "repeats")}
    if ngram := deduplication.leak_ngram:
        secrets = [d.text for part in splits.values() for d in part.held_out]
        train, cuts["leaks"] = drop_leaks(train, secrets, ngram=ngram, whole=whole)
        if evaluation.texts:
            train, cuts["evaluation"] = drop_leaks(
                train, evaluation.texts, ngram=ngram, whole=whole, largest=deduplication.evaluation_share
            )
    if shortest := deduplication.repeated_paragraph:
        train, cuts["repeats"] = drop_repeats(train, shortest=shortest, whole=whole)

    for source, part in splits.items():
        kept, cut = held_out_repeats(part.held_out, deduplication, whole=whole)
        cuts["repeats"][source] += cut
        splits[source] = dataclasses.replace(part, train=train[source], held_out=kept)
    seen = lines_seen(splits)
    refined = {}
    for source, part in splits.items():
        of_source = {kind: cuts[kind][source] for kind in cuts}
        samples = cut_samples(of_source) | {
            LINES: line_rows(lines[source].items(), source),
            PAIRS: drawn([pair_row(sample(dropped), stays)] for dropped, stays in near[source]),
        }
        refined[source] = Refined(
            part.train, part.held_out, part.withheld, len(documents[source]), seen[source],
            counts(duplicates[source], len(near[source]), total[source], of_source),
            {what: rows for what, rows in samples.items() if rows},
        )  # fmt: skip
    return refined


def held_out_repeats(
    documents: list[Document], deduplication: Deduplication, *, whole: Set[str] = frozenset()
) -> tuple[list[Document], Cut]:
    """The held-out documents of one source without their repeated paragraphs: text as the model is trained on.

    Otherwise a figure on them would be on other text than the training's: what sees all documents of a source at once, as `xz`
    does, gets each copy for nothing. The first is that of the smallest hash, whatever the order of the documents.
    """
    if not documents or not deduplication.repeated_paragraph:
        return documents, Cut()
    source, documents = documents[0].source, by_hash(documents)
    kept, cuts = drop_repeats({source: documents}, shortest=deduplication.repeated_paragraph, least=1, whole=whole)
    return kept[source], cuts[source]


def cut_samples(cuts: Mapping[str, Cut]) -> dict[tuple[str, str], list[Row]]:
    """What the report shows of the paragraphs and documents that were cut, by kind; kinds without any are left out."""
    return {("compared", kind): cut.samples for kind, cut in cuts.items() if cut.samples}


def counts(duplicates: int, near: int, lines: int, cuts: Mapping[str, Cut]) -> dict[str, int]:
    """What went of a source, by kind, as the manifest has it."""
    by_cut = {
        f"{kind}{what}": value
        for kind, cut in cuts.items()
        for what, value in (("", cut.documents), ("_paragraphs", cut.paragraphs), ("_bytes", cut.bytes))
    }
    return {"duplicates": duplicates, "near_duplicates": near, "boilerplate_lines": lines, **by_cut}


def drop_boilerplate(documents: list[Document], settings: Boilerplate) -> tuple[list[Document], int, Counter[str]]:
    """The documents of one source without their boilerplate lines, how many those were, and documents that lost each line.

    A document that is nothing but boilerplate keeps its lines: near-duplicate removal is what deals with it.
    """
    frequent = frequent_lines(documents, settings)
    kept, total, lost = [], 0, Counter()
    for document in documents:
        result, lines = without_lines(document, frequent, settings)
        if not result.text.strip():
            kept.append(document)
            continue
        kept.append(result)
        total += len(lines)
        lost.update(set(lines))
    return kept, total, lost
