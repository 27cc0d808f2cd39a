"""The build in one process: documents -> dedup -> split -> tokenizer -> blocks and manifest, whole or not at all.

Layout of the result:

    tokenizer.model   blocks/<source>.array_record   held_out/<source>.jsonl (raw: bits per byte needs the bytes)
    manifest.json
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

import llama_jax
from llama_jax.corpus_build import mixture
from llama_jax.corpus_build.dedup import drop_duplicates
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.manifest import NAME, file_sha256
from llama_jax.corpus_build.split import split
from llama_jax.data.blocks import block_record
from llama_jax.data.sources import write_jsonl
from llama_jax.data.tokenizer import Tokenizer, train_tokenizer


def blocks(documents: Iterable[list[int]], block_length: int) -> Iterable[np.ndarray]:
    """Cuts the joined ids of documents into blocks of T+1 that overlap by one, so that each id but the first of the
    source is a target exactly once. The last block may be shorter. # -> [<= T+1]"""
    buffer = np.concatenate([np.asarray(ids, np.uint32) for ids in documents] or [np.zeros(0, np.uint32)])
    for start in range(0, max(len(buffer) - 1, 0), block_length):
        yield buffer[start : start + block_length + 1]


def build_corpus(
    documents_by_source: Mapping[str, Iterable[Document]],
    output: str | Path,
    *,
    weights: Mapping[str, float],
    vocab_size: int,
    block_length: int,
    held_out_fraction: float,
    held_out_bytes: int,
    total_tokens: int,
    tokenizer_path: str | None = None,
    tokenizer_bytes: int = 4_000_000,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Builds the corpus in `output` and returns its manifest.

    Args:
      documents_by_source: in the order in which duplicates are kept.
      weights: share of each source in the training mixture.
      vocab_size: pieces of the tokenizer that is trained on the train split, unless `tokenizer_path` names one.
      block_length: T; a block has T+1 ids.
      held_out_fraction: share of the documents that no model sees.
      held_out_bytes: of those, how many bytes a source keeps for evaluation (whole documents).
      total_tokens: of the planned training run, for the mixture table.
      tokenizer_bytes: size of the weighted sample that the tokenizer is trained on.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output}: exists; a corpus is never changed in place")
    work = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    (work / "blocks").mkdir(parents=True)

    kept, duplicates = drop_duplicates(documents_by_source)
    train: dict[str, list[Document]] = {}
    counts: dict[str, dict[str, int]] = {}
    for source, documents in kept.items():
        train[source], held_out = split(documents, fraction=held_out_fraction)
        held_out = _first_bytes(held_out, held_out_bytes)
        if not train[source] or not held_out:
            raise ValueError(
                f"source {source!r}: {len(documents)} documents leave {len(train[source])} to train on and "
                f"{len(held_out)} held out; expected at least one each"
            )
        write_jsonl(
            work / "held_out" / f"{source}.jsonl", ({"id": d.id, "source": source, "text": d.text} for d in held_out)
        )
        counts[source] = {
            "documents": len(train[source]),
            "bytes": sum(len(d.text.encode()) for d in train[source]),
            "held_out_documents": len(held_out),
            "held_out_bytes": sum(len(d.text.encode()) for d in held_out),
            "duplicates": duplicates[source],
        }

    if tokenizer_path is None:
        sample = _tokenizer_sample(train, weights, tokenizer_bytes)
        tokenizer = train_tokenizer(sample, work / "tokenizer.model", vocab_size=vocab_size, seed=seed)
    else:
        shutil.copyfile(tokenizer_path, work / "tokenizer.model")
        tokenizer = Tokenizer(work / "tokenizer.model")
    for source, documents in train.items():
        encoded = tokenizer.encode_many([d.text for d in documents])
        ids = [[tokenizer.bos_id, *document, tokenizer.eos_id] for document in encoded]
        path = work / "blocks" / f"{source}.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        number = 0
        for block in blocks(ids, block_length):
            writer.write(block_record(block, block_length, tokenizer.vocab_size))
            number += 1
        writer.close()
        counts[source] |= {"tokens": sum(map(len, ids)), "blocks": number}

    shares = mixture.plan(
        weights, {s: counts[s]["documents"] for s in weights}, {s: counts[s]["tokens"] for s in weights},
        total_tokens=total_tokens,
    )  # fmt: skip
    files = sorted(path for path in work.rglob("*") if path.is_file())
    manifest = {
        "sources": {
            share.source: {**counts[share.source], "share": share.share, "epochs": share.epochs} for share in shares
        },
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "block_length": block_length,
        "table": mixture.table(shares),
        "config": dict(config or {}),
        "version": llama_jax.__version__,
        "sha256": {str(path.relative_to(work)): file_sha256(path) for path in files},
    }
    (work / NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(work, output)
    return manifest


def _first_bytes(documents: list[Document], limit: int) -> list[Document]:
    """Whole documents up to `limit` bytes, at least one; longer ones than the limit are passed over."""
    chosen, size = [], 0
    for document in documents:
        length = len(document.text.encode())
        if size + length <= limit:
            chosen.append(document)
            size += length
    return chosen


def _tokenizer_sample(
    train: Mapping[str, list[Document]], weights: Mapping[str, float], size: int
) -> Iterable[str]:
    """Documents of each source up to its share of `size` bytes."""
    whole = sum(weights.values())
    for source, weight in weights.items():
        used = 0
        for document in train[source]:
            if used > size * weight / whole:
                break
            used += len(document.text)
            yield document.text
