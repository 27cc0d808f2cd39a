"""How much of evaluation sets stands in a training corpus, and whether it matters (paper appendix A.6, Table 51):

    python -m llama_jax.contamination --corpus=/tmp/corpus --samples='/tmp/evaluation/base/samples/*.jsonl' \\
        --output=/tmp/contamination.json

All three may lie in a bucket (gs://...). `llama_jax.evaluate` writes these samples beside its results. A row of JSONL, or of
any other format that a corpus is read from, is {"text": a question as the model reads it, with its gold answer, "score": its
metric, "groups": larger sets that the file is a part of}; without scores the table has no Z. A path may end in `?text=field`,
the field of the text in its rows. To take contaminated text out of a corpus instead, name the files in its config
(`deduplication.evaluation`).
"""

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from llama_jax import command
from llama_jax.corpus_build.contamination import LENGTHS, Index, analyse
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.manifest import check_manifest
from llama_jax.corpus_build.readers import read_rows, text_problem
from llama_jax.corpus_build.source_files import expand, plain_path, text_field
from llama_jax.corpus_build.storage import local_copy
from llama_jax.data.blocks import block_ids
from llama_jax.data.tokenizer import BOS_ID, Tokenizer
from llama_jax.evals.published_alignment import TABLE_51
from llama_jax.files import write_text
from llama_jax.paths import place


@dataclasses.dataclass(frozen=True)
class Samples:
    """One evaluation set: token ids and, where every row has one, scores."""

    name: str
    ids: list[list[int]]
    scores: np.ndarray | None  # [samples]
    groups: tuple[str, ...] = ()  # larger sets that it is a part of


def read_samples(path: str, tokenizer: Tokenizer, name: str = "") -> Samples:
    """The samples of a file. ValueError that names file, line and field for a row that is none."""
    texts: list[str] = []
    scores: list[float] = []
    groups: dict[str, None] = {}
    field = text_field(path)
    for where, row in read_rows(path, ("score", "groups")):
        if problem := row.problem if isinstance(row, BadRow) else text_problem(row, field):
            raise ValueError(f"{where}: {problem}")
        text, score = row[field], row.get("score")
        if not text.strip():
            raise ValueError(f"{where}: {field}: expected a string that is not blank, got {text!r}")
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score)):
            raise ValueError(f"{where}: score: expected a number, got {score!r}")
        if (score is None) != (len(scores) < len(texts)) and texts:
            raise ValueError(f"{where}: score: expected one in every row or in none")
        of = [] if row.get("groups") is None else row["groups"]  # as Parquet has what a row lacks
        if not isinstance(of, list) or not all(isinstance(name, str) for name in of):
            raise ValueError(f"{where}: groups: expected a list of names, got {of!r}")
        groups |= dict.fromkeys(of)
        texts.append(text)
        scores += [] if score is None else [float(score)]
    if not texts:
        raise ValueError(f"{path}: no samples: the file is empty")
    name = name or Path(plain_path(path)).stem
    return Samples(name, tokenizer.encode_many(texts), np.array(scores) if scores else None, tuple(groups))


def corpus_documents(shard: str | os.PathLike) -> Iterator[np.ndarray]:
    """The documents of a shard of blocks as token ids, without BOS and EOS."""
    from array_record.python.array_record_module import ArrayRecordReader

    with local_copy(os.fspath(shard), ".array_record") as name:
        reader = ArrayRecordReader(name)
        blocks = [block_ids(record) for record in reader.read_all()]
        reader.close()
    if not blocks:  # every shard exists, also those without documents
        return
    # The last id of a block is the first of the next.
    ids = np.concatenate([*(block[:-1] for block in blocks), blocks[-1][-1:]])
    for document in np.split(ids, np.flatnonzero(ids == BOS_ID)[1:]):
        yield document[1:-1]


def match(index: Index, shards: Sequence[str], *, workers: int = 1) -> Index:
    """The index after all documents of the shards have streamed past it."""
    if workers == 1:
        return _match_shards(index, shards)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for part in pool.map(_match_shards, [index] * workers, [shards[i::workers] for i in range(workers)]):
            index.merge(part)
    return index


def _match_shards(index: Index, shards: Iterable[str]) -> Index:
    for shard in shards:
        for document in corpus_documents(shard):
            index.add(document)
    return index


def run(corpus: str, samples: str, *, workers: int = 1) -> dict[str, Any]:
    """The analysis of every samples file, and before them of the larger sets that their rows name (`groups`: MMLU and its four
    parts, of which the paper's table tells), as plain JSON values."""
    tokenizer = Tokenizer(place(corpus) / "tokenizer.model")
    manifest = check_manifest(corpus, tokenizer, checksums=False)
    shards = [os.fspath(place(corpus) / shard) for source in manifest["sources"].values() for shard in source["shards"]]
    paths = expand(samples)
    stems = [Path(plain_path(path)).stem for path in paths]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):  # told apart by their paths, then
        stems = [path if stem in repeated else stem for path, stem in zip(paths, stems, strict=True)]
    sets = [read_samples(path, tokenizer, name) for path, name in zip(paths, stems, strict=True)]
    index = match(Index([ids for part in sets for ids in part.ids]), shards, workers=workers)
    single, larger, start = {}, {}, 0
    for path, part in zip(paths, sets, strict=True):
        own = index.part(start, start + len(part.ids))
        start += len(part.ids)
        single[part.name] = _row(own, part.scores)
        for group in part.groups:  # of one evaluation, whose files lie together
            larger.setdefault((os.path.dirname(path) or ".", group), []).append((own, part.scores))
    folders = {folder for folder, _ in larger}
    joined = {}
    for (folder, group), parts in larger.items():
        if len(parts) == 1:
            continue
        scores = [scores for _, scores in parts]
        known = None if any(some is None for some in scores) else np.concatenate(scores)
        name = group if len(folders) == 1 else f"{folder}/{group}"
        joined[name] = _row(Index.joined([own for own, _ in parts]), known)
    return joined | single


def _row(index: Index, scores: np.ndarray | None) -> dict[str, Any]:
    """The analysis of one set."""
    shares = {length: index.contamination(length) for length in LENGTHS}
    row: dict[str, Any] = {
        "samples": len(index.samples),
        "tokens": sum(map(len, index.samples)),
        "contaminated": {str(length): float(share.mean()) for length, share in shares.items()},
        "dirty": {str(length): int((share >= 0.8).sum()) for length, share in shares.items()},
    }
    if scores is not None:
        length, subsets, affected = analyse(index, scores)
        row |= {"length": length, "affected": affected, "subsets": [_plain(subset) for subset in subsets]}
    return row


def _plain(subset) -> dict[str, Any]:
    values = dataclasses.asdict(subset)
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in values.items()}


def table(result: dict[str, Any]) -> str:
    """The analysis as text: mean share of contaminated tokens by L; for sets with scores Table 51, and the paper's below it."""
    lines = [f"{'samples file':<28}{'samples':>9}" + "".join(f"{f'L={length}':>9}" for length in LENGTHS) + f"{'verdict':>14}"]
    for name, row in result.items():
        verdict = "" if "affected" not in row else "affected" if row["affected"] else "not affected"
        shares = "".join(f"{row['contaminated'][str(length)]:>9.2%}" for length in LENGTHS)
        lines.append(f"{name:<28}{row['samples']:>9,}{shares}{verdict:>14}")
    scored = {name: row for name, row in result.items() if "subsets" in row}
    if scored:
        lines += ["", f"{'samples file':<28}{'L':>4} {'subset':<10}{'% tokens':>9}{'n':>8}{'X':>9}{'mu':>9}{'Z':>8}"]
    for name, row in scored.items():
        for part in row["subsets"]:
            mean, z = ("-" if part[key] is None else f"{part[key]:.{digits}f}" for key, digits in (("mean", 3), ("z", 2)))
            lines.append(
                f"{name:<28}{row['length']:>4} {part['name']:<10}{part['contamination']:>9.1%}{part['samples']:>8,}{mean:>9}"
                f"{part['expected']:>9.3f}{z:>8}"
            )
    if scored:
        lines += ["", *map(_papers, (TABLE_51.columns, *TABLE_51.rows))]
    return "\n".join(lines)


def _papers(cells: Sequence[str]) -> str:
    """A line of the paper's table, below the columns of ours."""
    name, length, subset, share, count, mean, expected, z = cells
    return f"{name:<28}{length:>4} {subset:<10}{share:>9}{count:>8}{mean:>9}{expected:>9}{z:>8}"


def main() -> None:
    """Flags to call."""
    values = flags.FLAGS
    result = run(values.corpus, values.samples, workers=values.workers)
    if values.output:
        write_text(values.output, json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(table(result))


if __name__ == "__main__":
    flags.DEFINE_string("corpus", None, "directory of llama_jax.corpus", required=True)
    flags.DEFINE_string("samples", None, "files of evaluation samples: a path, a pattern or a directory", required=True)
    flags.DEFINE_string("output", None, "JSON file to write")
    flags.DEFINE_integer("workers", 1, "processes", lower_bound=1)
    command.launch(main)
