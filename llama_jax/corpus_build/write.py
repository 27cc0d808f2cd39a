"""Refined documents to the files of a corpus: tokenizer, token blocks, held-out texts, report, manifest."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_jax
from llama_jax.corpus_build import mixture
from llama_jax.corpus_build.blocks import BlockCounts, write_blocks
from llama_jax.corpus_build.dedup import by_hash, content_hash
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.evaluation import Evaluation
from llama_jax.corpus_build.manifest import write_manifest
from llama_jax.corpus_build.profile import TOXICITY_BINS, Profile
from llama_jax.corpus_build.refine import Refined
from llama_jax.corpus_build.report import write_report
from llama_jax.corpus_build.stages import SettingsError, Stages, code_hash
from llama_jax.corpus_build.tables import cleaning_table
from llama_jax.data.blocks import item_type
from llama_jax.data.sources import write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer, train_tokenizer
from llama_jax.files import atomic_write, write_text
from llama_jax.paths import sizes

if TYPE_CHECKING:
    from llama_jax.corpus_build.build import Settings

_BAD_ROWS_NAMED = 20  # in the manifest
_TFDS_FEATURES = """{
 "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
 "featuresDict": {"features": {
  "item_size": {"pythonClassName": "tensorflow_datasets.core.features.scalar.Scalar",
   "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"}},
  "length": {"pythonClassName": "tensorflow_datasets.core.features.scalar.Scalar",
   "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"}},
  "tokens": {"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
   "tensor": {"shape": {"dimensions": ["%d"]}, "dtype": "%s", "encoding": "bytes"}}
 }}
}
"""


def write_corpus(
    refined: Mapping[str, Refined],
    profiles: Mapping[str, Profile],
    directory: Path,
    settings: "Settings",
    *,
    evaluation: Evaluation,
    config: dict[str, Any],
    inputs: Mapping[str, Any] | None,
    stages: Stages,
) -> dict[str, Any]:
    """Writes all files of the corpus into `directory`, the manifest last, and returns the manifest."""
    for source, part in refined.items():
        check_split(source, source_counts(part, profiles[source]), len(part.train), len(part.held_out), settings)
    train = {source: part.train for source, part in refined.items()}
    budgets = sample_budgets(settings, {source: size(documents) for source, documents in train.items()})
    tokenizer = make_tokenizer(train, budgets, directory, settings, stages)
    counts: dict[str, dict[str, Any]] = {}
    digests: dict[str, str] = {}
    for source, part in refined.items():
        shards = write_shards(part.train, directory / "blocks", source, tokenizer, settings, stages)
        digests |= {name: digest for name, (_, digest) in shards.items()}
        counts[source] = {
            **source_counts(part, profiles[source]),
            **shard_counts({name: shard for name, (shard, _) in shards.items()}),
            **write_held_out(part.held_out, directory / "held_out", source, tokenizer, settings.block_length),
        }
    return finish(
        counts, profiles, directory, tokenizer, settings, digests=digests, evaluation=evaluation, config=config, inputs=inputs
    )


def finish(
    counts: dict[str, dict[str, Any]],
    profiles: Mapping[str, Profile],
    directory: Path,
    tokenizer: Tokenizer,
    settings: "Settings",
    *,
    digests: Mapping[str, str],
    evaluation: Evaluation,
    config: dict[str, Any],
    inputs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Mixture, report and manifest of a corpus whose blocks are written, with these sha256."""
    tokens = {source: row["tokens"] for source, row in counts.items()}
    shares = mixture.plan(
        {source: settings.weights[source] for source in counts},  # in the order of the sources
        {source: row["documents"] for source, row in counts.items()},
        tokens,
        sizes={source: row["bytes"] for source, row in counts.items()},
        total_tokens=settings.total_tokens or sum(tokens.values()),
        temperature=settings.temperature,
        max_epochs=settings.max_epochs,
    )
    for share in shares:
        counts[share.source] |= {"share": share.share, "planned_tokens": share.planned_tokens, "epochs": share.epochs}
    write_report(
        directory / "report.html", counts, profiles, shares, evaluation,
        identities=settings.identities, checkpoint=settings.toxicity_checkpoint,
    )  # fmt: skip
    write_tfds_metadata(directory / "blocks", counts, tokenizer.vocab_size, settings)
    return write_manifest(
        directory,
        {
            "sources": counts,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "block_length": settings.block_length,
            "evaluation": {"samples": len(evaluation.texts), "too_short": evaluation.too_short},
            "table": f"{cleaning_table(counts)}\n\n{mixture.table(shares)}",
            "config": config,
            "inputs": inputs,
            "version": llama_jax.__version__,
            "code": code_hash(),
        },
        known=digests,
    )


def write_tfds_metadata(
    directory: Path, counts: Mapping[str, Mapping[str, Any]], vocab_size: int, settings: "Settings"
) -> None:
    """What makes `blocks/` a data set of TFDS with a split for each source:

    tfds.builder_from_directory("corpus/blocks").as_data_source("books")
    """
    features = _TFDS_FEATURES % (settings.block_length + 1, item_type(vocab_size).name)
    written = sizes(directory.parent)
    splits = [
        {
            "name": source,
            "numBytes": str(sum(written[shard] for shard in row["shards"])),
            "shardLengths": [str(blocks) for blocks in row["shards"].values()],
            "filepathTemplate": "{SPLIT}.{FILEFORMAT}" if settings.shards == 1 else "{SPLIT}-{SHARD_X_OF_Y}.{FILEFORMAT}",
        }
        for source, row in counts.items()
    ]
    info = {"name": "blocks", "version": "1.0.0", "fileFormat": "array_record", "splits": splits}
    for name, text in (("features.json", features), ("dataset_info.json", json.dumps(info, indent=1) + "\n")):
        write_text(directory / name, text)


def check_split(source: str, counts: Mapping[str, Any], train: int, held_out: int, settings: "Settings") -> None:
    """SettingsError that says what became of a source, for one that gives nothing to train on or nothing to evaluate on."""
    if train and held_out:
        return
    by_rule = sorted(counts["filtered_by"].items(), key=lambda item: (-item[1], item[0]))
    most = f" ({', '.join(f'{rule} {count:,}' for rule, count in by_rule[:3])})"
    gone = {
        f"filtered{most if by_rule else ''}": "filtered", "exact copies": "duplicates", "near duplicates": "near_duplicates",
        "leaks of held-out text": "leaks", "evaluation samples": "evaluation", "nothing but repeated paragraphs": "repeats",
        "withheld": "withheld_documents",
    }  # fmt: skip
    fates = [f"{counts[name]:,} {what}" for what, name in gone.items() if counts[name]]
    fates += [
        f"{counts[f'bad_{kind}']:,} bad {kind} skipped, the first {counts[f'bad_{kind}_named'][0]}"
        for kind in ("rows", "files")
        if counts[f"bad_{kind}"]
    ]
    raise SettingsError(
        f"source {source!r}: {counts['documents_read']:,} documents leave {train:,} to train on and {held_out:,} held out; "
        f"expected at least one each; {'; '.join(fates) or 'none went'} "
        f"(held_out_maximum is {settings.held_out.maximum_bytes:,} bytes)"
    )


def make_tokenizer(
    train: Mapping[str, Sequence[Document]],
    budgets: Mapping[str, float],
    directory: Path,
    settings: "Settings",
    stages: Stages,
) -> Tokenizer:
    """The tokenizer of the corpus, trained on so much of each source or copied; SettingsError if it cannot be trained."""
    model = directory / "tokenizer.model"
    if settings.tokenizer_path is None:

        def trained() -> bytes:
            try:
                train_tokenizer(_sample(train, budgets), model, vocab_size=settings.vocab_size, seed=settings.seed)
            except ValueError as error:
                raise SettingsError(str(error)) from None
            return model.read_bytes()

        content = stages.once("tokenizer", trained)
    else:
        content = given_tokenizer(settings.tokenizer_path, settings.vocab_size).serialized()
    with atomic_write(model) as file:
        file.write(content)
    return Tokenizer(model)


def given_tokenizer(path: str, vocab_size: int) -> SentencePieceTokenizer:
    """The tokenizer that a corpus is told to use. ValueError for one of another kind or size, or for none."""
    try:
        tokenizer = Tokenizer(path)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise ValueError(f"tokenizer: expected a SentencePiece model, as a corpus keeps one, got {tokenizer.path}")
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"vocab_size: expected the {tokenizer.vocab_size} of {path}, got {vocab_size}")
    return tokenizer


def sample_budgets(settings: "Settings", sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes of each source in the sample that the tokenizer is trained on: its share of the mixture.

    Before there is a tokenizer nobody knows tokens. Bytes (`sizes`, by source) stand for them where shares follow from a
    temperature, and the cap on epochs is left out.
    """
    shares = mixture.shares(settings.weights, sizes, total_tokens=1, temperature=settings.temperature)
    return {source: settings.tokenizer_bytes * shares[source] for source in sizes}


def _sample(train: Mapping[str, Sequence[Document]], budgets: Mapping[str, float]) -> Iterator[str]:
    """Documents of each source up to its budget, in order of their hashes: an unbiased sample."""
    for source, documents in train.items():
        left = budgets[source]
        for document in by_hash(documents):
            if left <= 0:
                break
            left -= len(document.text.encode())
            yield document.text


def shard_of(document: Document, shards: int) -> int:
    """The shard of a document: ranges of its text's hash, so that sorted documents fill the shards in their order."""
    return int.from_bytes(content_hash(document.text)[:4], "big") * shards >> 32


def shard_name(source: str, shard: int, shards: int) -> str:
    """File name of a shard of blocks, as TFDS has them."""
    return f"{source}.array_record" if shards == 1 else f"{source}-{shard:05d}-of-{shards:05d}.array_record"


def write_shard(documents: Sequence[Document], path: Path, tokenizer: Tokenizer, block_length: int) -> BlockCounts:
    """One shard: its documents in the order of their hashes, which is a shuffle."""
    texts = (d.text for d in by_hash(documents))
    return write_blocks(texts, path, tokenizer=tokenizer, block_length=block_length)


def write_shards(
    documents: Sequence[Document],
    directory: Path,
    source: str,
    tokenizer: Tokenizer,
    settings: "Settings",
    stages: Stages,
) -> dict[str, tuple[BlockCounts, str]]:
    """All shards of a source, with their sha256, by file below the corpus; empty ones too: TFDS asks for every one."""
    parts: list[list[Document]] = [[] for _ in range(settings.shards)]
    for document in documents:
        parts[shard_of(document, settings.shards)].append(document)
    names = [shard_name(source, shard, settings.shards) for shard in range(settings.shards)]
    return {
        f"blocks/{name}": stages.file_once(
            directory / name, functools.partial(write_shard, part, directory / name, tokenizer, settings.block_length)
        )
        for name, part in zip(names, parts, strict=True)
    }


def write_held_out(
    documents: Sequence[Document], directory: Path, source: str, tokenizer: Tokenizer, block_length: int
) -> dict[str, int]:
    """The held-out documents of a source as text and as blocks."""
    documents = by_hash(documents)
    write_jsonl(directory / f"{source}.jsonl", map(dataclasses.asdict, documents))
    counts = write_blocks(
        (d.text for d in documents), directory / f"{source}.array_record", tokenizer=tokenizer, block_length=block_length
    )
    return {f"held_out_{name}": value for name, value in dataclasses.asdict(counts).items()}


def shard_counts(shards: Mapping[str, BlockCounts]) -> dict[str, Any]:
    """The counts of all shards of a source, and the blocks of each."""
    rows = [dataclasses.asdict(shard) for shard in shards.values()]
    summed = {name: sum(row[name] for row in rows) for name in rows[0]}
    return {**summed, "shards": {name: shard.blocks for name, shard in shards.items()}}


def source_counts(part: Refined, profile: Profile) -> dict[str, Any]:
    """What became of the documents of a source. `documents_read` is the sum of: filtered, duplicates, near_duplicates, leaks,
    evaluation, repeats, documents, held_out_documents, withheld_documents."""
    filtered = sum(profile.removed.values())
    return {
        "documents_read": filtered + part.unique + part.counts["duplicates"] + part.counts["near_duplicates"],
        "bytes_read": profile.bytes_read,
        "bad_rows": profile.bad_rows.count,
        "bad_rows_named": profile.bad_rows.first[:_BAD_ROWS_NAMED],
        "bad_files": profile.bad_files.count,
        "bad_files_named": profile.bad_files.first[:_BAD_ROWS_NAMED],
        "filtered": filtered,
        "filtered_by": {f"{step}: {rule}": n for (step, rule), n in sorted(profile.removed.items())},
        "trimmed_by": {  # what steps took from documents that stayed
            step: {"documents": n, "lines": profile.trimmed_lines[step], "bytes": profile.trimmed_bytes[step]}
            for step, n in sorted(profile.trimmed.items())
        },
        "private": dict(sorted(profile.private.items())),  # findings by kind in documents to train on, and in removed ones
        "removed_private": dict(sorted(profile.removed_private.items())),
        # Documents by score (Fig. 13), where they were scored: bins from 0 to 1.
        **({"toxicity": [profile.toxicity[i] for i in range(TOXICITY_BINS)]} if profile.scored else {}),
        **part.counts,
        "bytes": size(part.train),
        "held_out_bytes": size(part.held_out),
        "held_out_lines_seen": round(part.lines_seen, 4),
        "withheld_documents": len(part.withheld),
        "withheld_bytes": size(part.withheld),
    }


def size(documents: Sequence[Document]) -> int:
    """Bytes of the texts."""
    return sum(len(d.text.encode()) for d in documents)
