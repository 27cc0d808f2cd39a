"""Builds a training corpus: `python -m llama_jax.corpus --config=configs/corpus.py:tiny --output=...`."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags

from llama_jax import command
from llama_jax.assistant.documents import SOURCES, installation_documents
from llama_jax.config import ConfigError, describe, differences, parse
from llama_jax.corpus_build.build import Deduplication, build_corpus
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.manifest import NAME, check_manifest, read_manifest
from llama_jax.data.sources import read_jsonl
from llama_jax.data.tokenizer import Tokenizer

INSTALLATION = "installation"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source: the documentation of this Python installation, or a JSONL file with a `text` in each row."""

    reader: str  # "installation" or a JSONL file (.gz too)
    weight: float  # share in the mixture; need not add up to 1
    byte_budget: int  # text read at most
    whole: bool = False  # programs: their documents lose no paragraphs, they stay or go


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
    deduplication: Deduplication = Deduplication()  # beside exact copies
    tokenizer: str | None = None  # a model file to use instead of training one
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
            if source.byte_budget <= 0:
                raise ValueError(f"sources.{name}.byte_budget: expected bytes above 0, got {source.byte_budget}")
            if source.reader == INSTALLATION:
                if name not in SOURCES:
                    raise ValueError(f"sources.{name}: an installation has the sources {', '.join(SOURCES)}")
            elif not Path(source.reader).is_file():
                raise ValueError(f"sources.{name}.reader: expected {INSTALLATION!r} or a JSONL file, got {source.reader!r}")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction: expected a number between 0 and 1, got {self.held_out_fraction}")


def documents(name: str, source: SourceConfig, *, seed: int) -> Iterable[Document]:
    """The documents of a source, up to its bytes."""
    if source.reader == INSTALLATION:
        yield from installation_documents(name, byte_budget=source.byte_budget, seed=seed)
        return
    left = source.byte_budget
    for where, row in read_jsonl(source.reader):
        text, metadata = row.get("text"), row.get("metadata", {})
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: text: expected a string that is not blank, got {text!r}")
        if not isinstance(metadata, dict):
            raise ConfigError(f"{where}: metadata: expected an object, got {metadata!r}")
        module = metadata.get("module")  # documents of one module stay on one side of the split
        if not isinstance(module, str | None):
            raise ConfigError(f"{where}: metadata.module: expected a string, got {module!r}")
        left -= len(text.encode(errors="replace"))
        if left < 0:
            return
        yield Document(str(row.get("id", where)), text, name, url=str(row.get("url", "")), metadata=metadata)


def run(config: CorpusConfig, output: str | Path) -> dict[str, Any]:
    """Builds the corpus and returns its manifest. One that is there already is checked instead of built again.

    Raises:
      ConfigError: the corpus at `output` was built with another config; lists the fields.
    """
    if (Path(output) / NAME).exists():
        changed = differences(read_manifest(output)["config"], describe(config))
        if changed:
            raise ConfigError(f"{output}: was built with another config: {'; '.join(changed)}")
        return check_manifest(output, Tokenizer(Path(output) / "tokenizer.model"))
    return build_corpus(
        {name: documents(name, config.sources[name], seed=config.seed) for name in config.order},
        output,
        vocab_size=config.vocab_size,
        block_length=config.block_length,
        held_out_fraction=config.held_out_fraction,
        weights={name: config.sources[name].weight for name in config.order},
        held_out_minimum=config.held_out_minimum,
        held_out_maximum=config.held_out_maximum,
        total_tokens=config.total_tokens,
        tokenizer_path=config.tokenizer,
        tokenizer_bytes=config.tokenizer_bytes,
        deduplication=config.deduplication,
        whole={name for name, source in config.sources.items() if source.whole},
        config=describe(config),
        seed=config.seed,
    )


def main() -> None:
    """Flags to config to call."""
    print(run(parse(CorpusConfig, flags.FLAGS.config), flags.FLAGS.output)["table"])


if __name__ == "__main__":
    command.define("configs/corpus.py:<name>", output="directory to be made")
    command.launch(main)
