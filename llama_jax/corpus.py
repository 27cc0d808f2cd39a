"""Builds a training corpus: `python -m llama_jax.corpus --config=configs/corpus.py:tiny --output=...`."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import app, flags

from llama_jax.assistant.documents import installation_documents
from llama_jax.config import ConfigError, describe, parse
from llama_jax.corpus_build.build import build_corpus
from llama_jax.corpus_build.document import Document
from llama_jax.data.sources import read_jsonl

INSTALLATION = "installation"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source: the documentation of this Python installation, or a JSONL file with a `text` in each row."""

    path: str  # "installation" or a file
    weight: float  # share in the mixture; need not add up to 1
    max_bytes: int  # text read at most


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """A corpus; see configs/corpus.py."""

    sources: dict[str, SourceConfig]
    vocab_size: int
    block_length: int
    total_tokens: int
    held_out_fraction: float
    held_out_bytes: int
    tokenizer: str | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources: expected at least one")
        for name, source in self.sources.items():
            if not source.weight > 0:
                raise ValueError(f"sources.{name}.weight: expected a positive share, got {source.weight}")
            if source.path != INSTALLATION and not Path(source.path).exists():
                raise ValueError(f"sources.{name}.path: expected a JSONL file, {source.path} does not exist")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction: expected a number between 0 and 1, got {self.held_out_fraction}")


def documents(name: str, source: SourceConfig, *, seed: int) -> Iterable[Document]:
    """The documents of a source, up to its bytes."""
    if source.path == INSTALLATION:
        yield from installation_documents(name, byte_budget=source.max_bytes, seed=seed)
        return
    size = 0
    for where, row in read_jsonl(source.path):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: text: expected a non-empty string, got {text!r}")
        size += len(text.encode())
        if size > source.max_bytes:
            return
        yield Document(id=str(row.get("id", where)), text=text, source=name, url=str(row.get("url", "")))


def run(config: CorpusConfig, output: str | Path) -> dict[str, Any]:
    """Builds the corpus and returns its manifest."""
    return build_corpus(
        {name: documents(name, source, seed=config.seed) for name, source in config.sources.items()},
        output,
        weights={name: source.weight for name, source in config.sources.items()},
        vocab_size=config.vocab_size,
        block_length=config.block_length,
        held_out_fraction=config.held_out_fraction,
        held_out_bytes=config.held_out_bytes,
        total_tokens=config.total_tokens,
        tokenizer_path=config.tokenizer,
        config=describe(config),
        seed=config.seed,
    )


def main(argv: list[str]) -> None:
    """Flags to config to call."""
    del argv
    print(run(parse(CorpusConfig, flags.FLAGS.config), flags.FLAGS.output)["table"])


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "configs/corpus.py:<name>")
    flags.DEFINE_string("output", None, "directory to be made")
    flags.mark_flags_as_required(["config", "output"])
    app.run(main)
