"""Builds a training corpus: `python -m llama_jax.corpus --config=configs/corpus.py:tiny --output=...`.

`--dry_run` prints what the mixture will be and ends; `--beam="--runner=..."` builds with Apache Beam and its own options
instead of in this process, on one machine or many (launch/README.md). The result is the same, on a disk or in a bucket
(`--output=gs://bucket/corpus`).
"""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from llama_jax import command
from llama_jax.assistant.documents import SOURCES, installation_documents
from llama_jax.config import ConfigError, describe, differences, parse
from llama_jax.corpus_build.build import Settings, build_corpus
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.estimate import estimate_table
from llama_jax.corpus_build.manifest import NAME, check_manifest, read_manifest
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.refine import Deduplication, HeldOut
from llama_jax.corpus_build.source_files import expand, file_facts, file_size, most_text
from llama_jax.corpus_build.stages import discard
from llama_jax.corpus_build.steps import CleanConfig, make_steps
from llama_jax.corpus_build.storage import StorageError
from llama_jax.data.classifier import place_of
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.corpus_figures import corpus_figures, save_figures
from llama_jax.paths import check_bucket, is_remote, place

INSTALLATION = "installation"
_NAMED = 5  # changed files in a sentence


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source: the documentation of this Python installation, or files with a `text` in each row."""

    reader: str  # "installation", or a path, a pattern or a directory (corpus_build/source_files.py)
    weight: float  # share in the mixture; need not add up to 1
    byte_budget: int | None = None  # text read at most; None: all there is
    whole: bool = False  # programs: their documents lose no paragraphs, they stay or go
    steps: tuple[str, ...] = ()  # cleaning, in this order (corpus_build/steps.py)

    @property
    def most(self) -> float:
        """Bytes of text that are read at most."""
        return math.inf if self.byte_budget is None else self.byte_budget


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """A corpus; see configs/corpus.py."""

    sources: dict[str, SourceConfig]
    order: tuple[str, ...]  # of the sources: of copies, the one in the first source stays
    vocab_size: int
    block_length: int
    total_tokens: int  # of the planned training run, for the table of the mixture
    held_out_fraction: float
    held_out_minimum: int  # bytes a source
    held_out_maximum: int
    tokenizer_bytes: int  # of text to train the tokenizer on
    clean: CleanConfig = CleanConfig()  # settings of the steps
    deduplication: Deduplication = Deduplication()  # beside exact copies
    held_out_group: str | None = None  # a field of the metadata: documents with one value are on one side
    temperature: float | None = None  # of the mixture; None: the weights are the shares
    max_epochs: float | None = None  # cap on how often a source is seen
    tokenizer: str | None = None  # a model file to use instead of training one
    shards: int = 1  # files of blocks a source
    max_bad_rows: int = 0  # of each source that are skipped; one more ends the build
    max_bad_files: int = 0  # the same of files that cannot be read to their ends
    analyses: tuple[str, ...] = ()  # of the report: language, demographics, toxicity
    analysed_share: float = 1.0
    identities: str | None = None  # a file of axes and descriptors (corpus_build/demographics.py)
    toxicity_checkpoint: str | None = None  # of a sequence classifier (corpus_build/toxicity.py)
    seed: int = 0

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources: expected at least one")
        # A ConfigDict sorts its keys, so the order needs a field of its own.
        if sorted(self.order) != sorted(self.sources):
            raise ValueError(f"order: expected each of {sorted(self.sources)} once, got {list(self.order)}")
        for name, source in self.sources.items():
            if not source.weight > 0:
                raise ValueError(f"sources.{name}.weight: expected a positive share, got {source.weight}")
            if source.most <= 0:
                raise ValueError(f"sources.{name}.byte_budget: expected bytes above 0, got {source.byte_budget}")
            make_steps(source.steps, self.clean)
            if source.reader == INSTALLATION:
                if name not in SOURCES:
                    raise ValueError(f"sources.{name}: an installation has the sources {', '.join(SOURCES)}")
                if source.byte_budget is None:
                    raise ValueError(f"sources.{name}.byte_budget: of an installation expected a number of bytes, got None")
                continue
            try:
                files = expand(source.reader)
            except (FileNotFoundError, StorageError) as error:
                raise ValueError(f"sources.{name}.reader: expected {INSTALLATION!r} or files; {error}") from None
            if all(file_size(path) == 0 for path in files):
                more = f" and {len(files) - 1:,} more" * (len(files) > 1)
                raise ValueError(f"sources.{name}.reader: expected text in the files, {files[0]}{more}: empty")
        self.settings()

    def settings(self) -> Settings:
        """What the library needs to know of it."""
        return Settings(
            vocab_size=self.vocab_size,
            block_length=self.block_length,
            held_out=HeldOut(self.held_out_fraction, self.held_out_minimum, self.held_out_maximum, self.held_out_group),
            weights={name: self.sources[name].weight for name in self.order},
            total_tokens=self.total_tokens,
            temperature=self.temperature,
            max_epochs=self.max_epochs,
            tokenizer_path=self.tokenizer,
            tokenizer_bytes=self.tokenizer_bytes,
            shards=self.shards,
            steps={name: source.steps for name, source in self.sources.items()},
            clean=self.clean,
            deduplication=self.deduplication,
            whole=frozenset(name for name, source in self.sources.items() if source.whole),
            max_bad_rows=self.max_bad_rows,
            max_bad_files=self.max_bad_files,
            analyses=self.analyses,
            analysed_share=self.analysed_share,
            identities=self.identities,
            toxicity_checkpoint=self.toxicity_checkpoint,
            seed=self.seed,
        )


def documents(name: str, source: SourceConfig, *, seed: int) -> Iterator[Document | BadRow]:
    """The documents of a source, up to its bytes."""
    if source.reader == INSTALLATION:
        yield from installation_documents(name, byte_budget=source.byte_budget, seed=seed)
        return
    left = source.most
    for path in expand(source.reader):
        for row in read_file(path, name):
            if isinstance(row, Document):
                left -= len(row.text.encode())
                if left < 0:
                    return
            yield row


def run(config: CorpusConfig, output: str | Path, *, beam: list[str] | None = None) -> dict[str, Any]:
    """Builds the corpus and returns its manifest. One that is there already is checked instead of built again.

    With `beam`, a list of Beam's own options, it is built by Apache Beam instead of in this process.

    Raises:
      ConfigError: the corpus at `output` was built with another config or of other files; lists the fields or the files.
    """
    output = place(output)
    check_bucket(output)
    if (output / NAME).exists():
        built = read_manifest(output)
        if changed := differences(built["config"], describe(config)):
            raise ConfigError(f"{output}: was built with another config: {'; '.join(changed)}; undo, or use another --output")
        # A corpus of the library's own callers may say nothing of its inputs.
        known = built.get("inputs")
        if changed := [] if known is None else changed_files(known, inputs(config)):
            more = f"; and {len(changed) - _NAMED:,} more" if len(changed) > _NAMED else ""
            raise ConfigError(f"{output}: was built of other files; use another --output: {'; '.join(changed[:_NAMED])}{more}")
        discard(output)
        return check_manifest(output, Tokenizer(output / "tokenizer.model"))
    if beam is not None:
        from llama_jax.corpus_build.beam_pipeline import build_with_beam  # needs apache-beam

        files = {name: beam_files(name, config.sources[name]) for name in config.order}
        return build_with_beam(
            files, output, config.settings(), options=beam, config=describe(config), inputs=inputs(config)
        )
    return build_corpus(
        {name: documents(name, config.sources[name], seed=config.seed) for name in config.order},
        output,
        config.settings(),
        config=describe(config),
        inputs=inputs(config),
    )


def inputs(config: CorpusConfig) -> dict[str, Any]:
    """What is read: a killed build goes on, and a finished one is that of this config, only if it is still the same."""
    given = [path for path in (config.tokenizer, config.identities, config.clean.block_list) if path is not None]
    if config.toxicity_checkpoint is not None:  # a local one: a name of the hub stands for what it is
        given += sorted(str(path) for path in Path(place_of(config.toxicity_checkpoint)).rglob("*") if path.is_file())
    return {
        "budgets": {name: source.byte_budget for name, source in config.sources.items()},
        "sources": {
            name: [] if source.reader == INSTALLATION else [file_facts(path) for path in expand(source.reader)]
            for name, source in config.sources.items()
        },
        "evaluation": [file_facts(path) for pattern in config.deduplication.evaluation for path in expand(pattern)],
        "settings": [file_facts(path) for path in given],
    }


def changed_files(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The files in which two `inputs` differ, each with what became of it."""
    before, after = ({facts[0]: facts[1:] for facts in _files(each)} for each in (old, new))
    lines = []
    for path in sorted({*before, *after}):
        if path not in after:
            lines.append(f"{path}: is gone")
        elif path not in before:
            lines.append(f"{path}: was not there")
        elif before[path] != after[path]:
            a, b = ("?" if facts[0] is None else f"{facts[0]:,} bytes" for facts in (before[path], after[path]))
            lines.append(f"{path}: {a} -> {b}" if a != b else f"{path}: {a}, written again")
    return lines


def _files(inputs: Mapping[str, Any]) -> list[list[Any]]:
    return [*itertools.chain(*inputs["sources"].values()), *inputs["evaluation"], *inputs["settings"]]


def beam_files(name: str, source: SourceConfig) -> list[str]:
    """The files of a source, which Beam reads whole. ConfigError if it is no files, or its text may exceed its budget."""
    if source.reader == INSTALLATION:
        raise ConfigError(f"sources.{name}: Beam reads files; {INSTALLATION!r} is read in one process, without --beam")
    files = expand(source.reader)
    if source.byte_budget is None:
        return files
    sizes = {path: most_text(path) for path in files}
    if unknown := [path for path, size in sizes.items() if size is None]:
        problem = f"how much text is in {unknown[0]} only reading tells; expected none"
    else:
        problem = f"expected at least {sum(sizes.values()):,}"
    if unknown or sum(sizes.values()) > source.byte_budget:
        raise ConfigError(f"sources.{name}.byte_budget: Beam reads whole files; {problem}, got {source.byte_budget:,}")
    return files


def dry_run(config: CorpusConfig) -> str:
    """The mixture as it will be, estimated from a sample of each source."""
    sources = {}
    for name in config.order:
        source = config.sources[name]
        files = None if source.reader == INSTALLATION else expand(source.reader)
        sources[name] = (documents(name, source, seed=config.seed), files, source.most)
    return estimate_table(sources, config.settings())


def main() -> None:
    """Flags to config to call."""
    config = parse(CorpusConfig, flags.FLAGS.config)
    if flags.FLAGS.dry_run:
        print(dry_run(config))
        return
    if flags.FLAGS.output is None:
        raise ConfigError("--output: expected a directory to be made")
    if "://" in flags.FLAGS.output and not is_remote(flags.FLAGS.output):  # a path object would make a directory "s3:" of it
        raise ConfigError(f"--output: expected a directory or gs://bucket/directory, got {flags.FLAGS.output}")
    beam = None if flags.FLAGS.beam is None else shlex.split(flags.FLAGS.beam)
    manifest = run(config, flags.FLAGS.output, beam=beam)
    save_figures(corpus_figures(manifest), flags.FLAGS.output)  # which no hash of the manifest depends on
    print(manifest["table"])


if __name__ == "__main__":
    command.define("configs/corpus.py:<name>")
    flags.DEFINE_string("output", None, "directory to be made; gs://bucket/... too")
    flags.DEFINE_bool("dry_run", False, "print the mixture, estimated from samples, and end")
    flags.DEFINE_string("beam", None, "build with Apache Beam; its options, as in '--direct_num_workers=8'")
    command.launch(main)
