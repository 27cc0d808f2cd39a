"""The build in one process: documents -> duplicates -> split -> leaks -> tokenizer -> blocks -> manifest, whole or not at all.

Layout of the result:

    tokenizer.model
    blocks/<source>.array_record     what to train on
    held_out/<source>.jsonl          raw documents: bits per byte need the bytes
    held_out/<source>.array_record   the same as blocks
    manifest.json
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import llama_jax
from llama_jax.corpus_build import mixture
from llama_jax.corpus_build.blocks import write_blocks
from llama_jax.corpus_build.dedup import content_hash, drop_duplicates
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.manifest import write_manifest
from llama_jax.corpus_build.near_duplicates import NearDuplicates, drop_near_duplicates
from llama_jax.corpus_build.paragraphs import Cut, drop_leaks, drop_repeats
from llama_jax.corpus_build.split import Split, lines_seen, split
from llama_jax.data.sources import write_jsonl
from llama_jax.data.tokenizer import Tokenizer, train_tokenizer


@dataclasses.dataclass(frozen=True)
class Deduplication:
    """What is taken out beside exact copies; None for none of it."""

    near: NearDuplicates | None = None  # whole documents, before the split
    leak_ngram: int | None = None  # words: train paragraphs that share such a run with a held-out document are cut
    repeated_paragraph: int | None = None  # characters: of copies so long, the first stays; train documents only

    def __post_init__(self):
        for name in ("leak_ngram", "repeated_paragraph"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, or None, got {value}")


def build_corpus(
    documents_by_source: Mapping[str, Iterable[Document]],
    output: str | os.PathLike,
    *,
    vocab_size: int,
    block_length: int,
    held_out_fraction: float,
    weights: Mapping[str, float],
    held_out_minimum: int = 40_000,
    held_out_maximum: int = 60_000,
    total_tokens: int | None = None,
    tokenizer_path: str | os.PathLike | None = None,
    tokenizer_bytes: int = 4_000_000,
    deduplication: Deduplication = Deduplication(),
    whole: Set[str] = frozenset(),
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Builds the corpus in `output` and returns its manifest.

    Args:
      documents_by_source: in the order in which duplicates are kept.
      vocab_size: pieces of the tokenizer, which is trained on the train split unless `tokenizer_path` names one.
      block_length: T; a block has T+1 ids.
      held_out_fraction: share of the documents that no model sees.
      weights: share of each source in the training mixture; they need not add up to 1.
      held_out_minimum: a small source holds out more, up to so many bytes (`split.split`).
      held_out_maximum: bytes a source keeps for evaluation at most, in whole documents.
      total_tokens: of the planned training run, for the mixture table; the tokens of the corpus if None.
      tokenizer_bytes: size of the weighted sample that the tokenizer is trained on.
      deduplication: near duplicates, leaks of held-out documents into training, repeated paragraphs.
      whole: sources whose documents may not lose paragraphs (programs).
      config: plain JSON values to keep in the manifest.

    Raises:
      FileExistsError: `output` is there already.
      ValueError: for wrong arguments, blank texts, or a source that gives no train or no held-out document.
    """
    output = Path(output)
    _check(documents_by_source, weights, output, held_out_fraction, (held_out_minimum, held_out_maximum))
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was killed
    try:
        manifest = _build(
            documents_by_source, unfinished,
            vocab_size=vocab_size, block_length=block_length, weights=weights, total_tokens=total_tokens,
            tokenizer_path=tokenizer_path, tokenizer_bytes=tokenizer_bytes,
            deduplication=deduplication, whole=whole, config=dict(config or {}), seed=seed,
            held_out={
                "fraction": held_out_fraction, "minimum_bytes": held_out_minimum, "maximum_bytes": held_out_maximum
            },
        )  # fmt: skip
        os.rename(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def _build(
    documents_by_source: Mapping[str, Iterable[Document]],
    directory: Path,
    *,
    vocab_size: int,
    block_length: int,
    held_out: Mapping[str, Any],
    weights: Mapping[str, float],
    total_tokens: int | None,
    tokenizer_path: str | os.PathLike | None,
    tokenizer_bytes: int,
    deduplication: Deduplication,
    whole: Set[str],
    config: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    for name in ("blocks", "held_out"):
        (directory / name).mkdir(parents=True)
    kept, duplicates = drop_duplicates(documents_by_source)
    near = {source: {} for source in kept}
    if deduplication.near:
        kept, near = drop_near_duplicates(kept, deduplication.near)
    splits, cuts = _clean_train(split(kept, **held_out), deduplication, whole)
    for source, part in splits.items():
        if not part.train or not part.held_out:
            raise ValueError(
                f"source {source!r}: {len(kept[source])} documents without duplicates leave {len(part.train)} to train on and "
                f"{len(part.held_out)} held out (of at most {held_out['maximum_bytes']:,} bytes); expected at least one each"
            )

    model = directory / "tokenizer.model"
    if tokenizer_path is None:
        sample = _tokenizer_sample(splits, weights, tokenizer_bytes)
        tokenizer = train_tokenizer(sample, model, vocab_size=vocab_size, seed=seed)
    else:
        tokenizer = Tokenizer(tokenizer_path)
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(f"vocab_size: expected the {tokenizer.vocab_size} of {tokenizer_path}, got {vocab_size}")
        shutil.copyfile(tokenizer_path, model)

    seen = lines_seen(splits)
    counts: dict[str, dict[str, Any]] = {}
    for source, part in splits.items():
        written = {
            folder: write_blocks(
                (d.text for d in documents), directory / folder / f"{source}.array_record",
                tokenizer=tokenizer, block_length=block_length,
            )
            for folder, documents in (("blocks", part.train), ("held_out", part.held_out))
        }  # fmt: skip
        write_jsonl(directory / "held_out" / f"{source}.jsonl", map(dataclasses.asdict, part.held_out))
        counts[source] = {
            # The sum of: duplicates, near_duplicates, leaks, repeats, documents, held_out_documents, withheld_documents.
            "documents_read": len(kept[source]) + len(near[source]) + duplicates[source],
            "duplicates": duplicates[source],
            "near_duplicates": len(near[source]),
            **{f"{kind}{what}": n for kind, cut in cuts[source].items() for what, n in cut.items()},
            **dataclasses.asdict(written["blocks"]),
            "bytes": _size(part.train),
            **{f"held_out_{name}": value for name, value in dataclasses.asdict(written["held_out"]).items()},
            "held_out_bytes": _size(part.held_out),
            "held_out_lines_seen": round(seen[source], 4),
            "withheld_documents": len(part.withheld),
            "withheld_bytes": _size(part.withheld),
        }

    tokens = {source: counts[source]["tokens"] for source in splits}
    shares = mixture.plan(
        {source: weights[source] for source in splits},  # in the order of the sources
        {source: counts[source]["documents"] for source in splits},
        tokens,
        total_tokens=sum(tokens.values()) if total_tokens is None else total_tokens,
    )
    for share in shares:
        counts[share.source] |= {
            "share": share.share, "planned_tokens": share.planned_tokens, "epochs": share.epochs
        }  # fmt: skip
    return write_manifest(
        directory,
        {
            "sources": counts,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "block_length": block_length,
            "table": f"{cleaning_table(counts)}\n\n{mixture.table(shares)}",
            "config": config,
            "version": llama_jax.__version__,
        },
    )


def cleaning_table(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """What became of the documents of each source, and what the held-out ones have in common with those to train on."""
    lines = [
        f"{'source':<16}{'read':>8}{'exact':>8}{'near':>8}{'leak':>8}{'repeat':>8}{'cut kB':>8}{'withheld':>9}{'train':>8}"
        f"{'held out':>9}{'lines seen':>11}"
    ]
    for source, row in counts.items():
        lines.append(
            f"{source:<16}{row['documents_read']:>8,}{row['duplicates']:>8,}{row['near_duplicates']:>8,}{row['leaks']:>8,}"
            f"{row['repeats']:>8,}{(row['leaks_bytes'] + row['repeats_bytes']) / 1000:>8,.0f}{row['withheld_documents']:>9,}"
            f"{row['documents']:>8,}{row['held_out_documents']:>9,}{row['held_out_lines_seen']:>11.1%}"
        )
    return "\n".join(lines)


def _clean_train(
    splits: dict[str, Split], deduplication: Deduplication, whole: Set[str]
) -> tuple[dict[str, Split], dict[str, dict[str, dict[str, int]]]]:
    """The splits, train documents without what leaks or repeats, and what that took of each source."""
    train = {source: part.train for source, part in splits.items()}
    leaks = repeats = {source: Cut() for source in splits}
    if deduplication.leak_ngram:
        held_out = [d.text for part in splits.values() for d in part.held_out]
        train, leaks = drop_leaks(train, held_out, ngram=deduplication.leak_ngram, whole=whole)
    if deduplication.repeated_paragraph:
        train, repeats = drop_repeats(train, shortest=deduplication.repeated_paragraph, whole=whole)
    cuts = {
        source: {
            kind: {"": cut.documents, "_paragraphs": cut.paragraphs, "_bytes": cut.bytes}
            for kind, cut in (("leaks", leaks[source]), ("repeats", repeats[source]))
        }
        for source in splits
    }
    return {s: dataclasses.replace(part, train=train[s]) for s, part in splits.items()}, cuts


def _check(
    documents_by_source: Mapping[str, Iterable[Document]],
    weights: Mapping[str, float],
    output: Path,
    fraction: float,
    held_out: tuple[int, int],
) -> None:
    """All that can be wrong before a document has been read."""
    if output.exists():
        raise FileExistsError(f"{output}: exists; a corpus is never changed in place")
    if not documents_by_source or set(documents_by_source) != set(weights):
        raise ValueError(f"weights: expected one for each of {list(documents_by_source)}, got {sorted(weights)}")
    for source, weight in weights.items():
        if not re.fullmatch(r"\w[\w.-]*", source):
            raise ValueError(f"source {source!r}: expected letters, digits, '_', '-' and '.': it names files")
        if not weight > 0:
            raise ValueError(f"weights[{source!r}]: expected a positive share, got {weight}")
    if not 0 < fraction < 1:
        raise ValueError(f"held_out_fraction: expected a number between 0 and 1, got {fraction}")
    if not 0 <= held_out[0] <= held_out[1]:
        raise ValueError(f"held_out_minimum: expected 0 to held_out_maximum ({held_out[1]:,}), got {held_out[0]:,}")


def _tokenizer_sample(splits: Mapping[str, Split], weights: Mapping[str, float], size: int) -> Iterator[str]:
    """Train documents of each source up to its share of `size` bytes, in order of their hashes: an unbiased sample."""
    whole = sum(weights.values())
    for source, part in splits.items():
        left = size * weights[source] / whole
        for document in sorted(part.train, key=lambda d: content_hash(d.text)):
            if left <= 0:
                break
            left -= len(document.text.encode())
            yield document.text


def _size(documents: Iterable[Document]) -> int:
    return sum(len(d.text.encode()) for d in documents)
