"""The build on Apache Beam: the same functions, carried by its runners over one machine or many (paper section 2.1).

Two pipelines. The first reads, cleans, compares, splits and leaves sorted shards of documents; the second makes token blocks of
them. Between them one process trains the tokenizer. The result is that of `build.build_corpus`, byte for byte, whatever the
runner and the number of its workers. The output must lie where all workers see it, in a directory or in a bucket, and they
must have this package (launch/README.md); sources may be any path that fsspec opens.
"""

import contextlib
import io
import json
import os
import pickle
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import ConfigError
from llama_jax.corpus_build.beam_refine import Refinement
from llama_jax.corpus_build.blocks import BlockCounts
from llama_jax.corpus_build.build import Settings, check_bad_rows
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.evaluation import read_evaluation
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.paragraphs import Cut
from llama_jax.corpus_build.profile import Profile
from llama_jax.corpus_build.refine import Refined, counts, cut_samples, held_out_repeats
from llama_jax.corpus_build.split import long_lines
from llama_jax.corpus_build.stages import Stages, fingerprint_of, unfinished
from llama_jax.corpus_build.storage import stored
from llama_jax.corpus_build.write import (
    check_split,
    finish,
    make_tokenizer,
    sample_budgets,
    shard_counts,
    shard_name,
    source_counts,
    write_held_out,
    write_shard,
)
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import atomic_write
from llama_jax.paths import checksums, place, remove_tree


def build_with_beam(
    files: Mapping[str, Sequence[str]],
    output: str | os.PathLike,
    settings: Settings,
    *,
    options: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """As `build.build_corpus`, from the files of each source (in the order of the sources) and with Beam's `options`.

    With `inputs` a killed build goes on: each cleaned file, the whole first pipeline, the tokenizer and each shard of blocks
    are products that are not made again. Bad rows are counted by the first pipeline, and compared with their limit after it.
    """
    beam = extra("apache_beam")
    pipeline_options = parsed_options(beam, options)
    evaluation = read_evaluation(settings.deduplication.evaluation, settings.deduplication.leak_ngram)
    fingerprint = None if inputs is None else fingerprint_of(settings, inputs)
    with unfinished(output, fingerprint) as (directory, stages):
        work = directory.parent / "documents"

        def first_pipeline() -> dict[str, str]:
            remove_tree(work)
            with beam.Pipeline(options=pipeline_options) as pipeline:
                Refinement(beam, list(files), settings, evaluation, work, stages).expand(pipeline, files)
            return checksums(work)

        if stages.once("documents", first_pipeline) != checksums(work):  # damaged since
            stages.forget("documents")
            stages.once("documents", first_pipeline)
        summary = pickle.loads((work / "summary.pickle").read_bytes())
        profiles = {source: summary["profiles"].get(source, Profile()) for source in files}
        for source, profile in profiles.items():
            check_bad_rows(source, profile, settings)
        refined = {source: _refined(source, summary, work, settings) for source in files}
        for source, part in refined.items():
            profiles[source].show(part.samples)
            withheld = {"withheld_documents": summary["counts"].get((source, "withheld"), 0)}
            found = {**source_counts(part, profiles[source]), **withheld}
            check_split(source, found, profiles[source].documents, len(part.held_out), settings)

        budgets = sample_budgets(settings, {source: profile.bytes for source, profile in profiles.items()})
        tokenizer = make_tokenizer(_Samples(work, budgets), budgets, directory, settings, stages)
        shards = [(source, shard) for source in files for shard in range(settings.shards)]
        written = directory.parent / "written"
        with beam.Pipeline(options=pipeline_options) as pipeline:
            (
                pipeline
                | beam.Create(shards)
                | beam.Reshuffle()
                | beam.Map(_write_shard, work, written, directory / "blocks", str(tokenizer.path), settings, stages)
            )
        rows: dict[str, dict[str, Any]] = {}
        digests: dict[str, str] = {}
        for source, part in refined.items():
            names = [shard_name(source, shard, settings.shards) for shard in range(settings.shards)]
            found = {f"blocks/{name}": pickle.loads((written / f"{name}.pickle").read_bytes()) for name in names}
            digests |= {name: digest for name, (_, digest) in found.items()}
            rows[source] = {
                **source_counts(part, profiles[source]),
                "bytes": profiles[source].bytes,
                "withheld_documents": summary["counts"].get((source, "withheld"), 0),
                "withheld_bytes": summary["counts"].get((source, "withheld_bytes"), 0),
                **shard_counts({name: shard for name, (shard, _) in found.items()}),
                **write_held_out(part.held_out, directory / "held_out", source, tokenizer, settings.block_length),
            }
        return finish(
            rows, profiles, directory, tokenizer, settings,
            digests=digests, evaluation=evaluation, config=dict(config or {}), inputs=inputs,
        )  # fmt: skip


def parsed_options(beam: Any, options: Sequence[str]) -> Any:
    """Beam's own options. ConfigError, one sentence, for those with which it makes no pipeline."""
    said = io.StringIO()  # argparse prints how all options are used before the sentence that counts
    try:
        with contextlib.redirect_stderr(said):
            found = extra("apache_beam.options.pipeline_options").PipelineOptions(list(options))
            found.get_all_options()
            beam.Pipeline(options=found)
    except SystemExit:
        problem = said.getvalue().strip().rpartition("\n")[2].rpartition("error: ")[2]
    except (ValueError, ImportError, AttributeError) as error:
        problem = " ".join(str(error).split())
    else:
        return found
    raise ConfigError(f"--beam: expected options of Apache Beam (see launch/README.md), got {shlex.join(options)}: {problem}")


def _read_documents(path: Path) -> list[Document]:
    with stored(str(path)) as file:
        return [Document(**json.loads(line)) for line in file]


def _refined(source: str, summary: Mapping[str, Any], work: Path, settings: Settings) -> Refined:
    """The counts and held-out documents of a source. Its train documents stay on disk."""
    path = work / "held_out" / source / "held_out.jsonl"
    held_out = _read_documents(path) if path.exists() else []
    held_out, repeats = held_out_repeats(held_out, settings.deduplication, whole=settings.whole)
    number = summary["counts"].get
    lines = [line for document in held_out for line in long_lines(document.text)]
    cleaned, exact, unique = (number((source, name), 0) for name in ("cleaned", "exact", "unique"))
    cuts = {kind: number((source, kind), Cut()) for kind in ("leaks", "evaluation", "repeats")}
    cuts["repeats"] += repeats
    return Refined(
        train=[], held_out=held_out, withheld=[], unique=unique,
        lines_seen=sum(line in summary["seen"] for line in lines) / max(len(lines), 1),
        counts=counts(cleaned - exact, exact - unique, number((source, "lines"), 0), cuts),
        samples=cut_samples(cuts),
    )  # fmt: skip


class _Samples(Mapping):
    """For each source the first of its train documents, as many as the tokenizer's sample needs; read when asked for."""

    def __init__(self, work: Path, budgets: Mapping[str, float]):
        self._work, self._budgets = work, budgets

    def __iter__(self) -> Iterator[str]:
        return iter(self._budgets)

    def __len__(self) -> int:
        return len(self._budgets)

    def __getitem__(self, source: str) -> list[Document]:
        documents: list[Document] = []
        left = self._budgets[source]
        for path in sorted((self._work / source).glob("*.jsonl")):  # ranges of the hash, in their order
            if left <= 0:
                break
            part = _read_documents(path)
            documents += part
            left -= sum(len(d.text.encode()) for d in part)
        return documents


def _write_shard(
    item: tuple[str, int],
    work: str | os.PathLike,
    written: str | os.PathLike,
    blocks: str | os.PathLike,
    model: str,
    settings: Settings,
    stages: Stages,
) -> None:
    """Token blocks of one shard of documents, and their counts and sha256 for the manifest."""
    source, shard = item
    name = shard_name(source, shard, settings.shards)
    blocks_path = place(blocks) / name

    def write() -> BlockCounts:
        path = place(work) / source / f"{shard:05d}.jsonl"
        documents = _read_documents(path) if path.exists() else []
        return write_shard(documents, blocks_path, Tokenizer(model), settings.block_length)

    result = stages.file_once(blocks_path, write)
    with atomic_write(place(written) / f"{name}.pickle") as file:
        file.write(pickle.dumps(result))
