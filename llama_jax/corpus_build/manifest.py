"""The manifest of a corpus: what is in it, from which tokenizer, and a checksum of each shard."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llama_jax.data.tokenizer import Tokenizer

NAME = "manifest.json"


class CorpusError(ValueError):
    """A corpus that is missing, damaged or belongs to another tokenizer."""


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a corpus directory; CorpusError if there is none."""
    path = Path(directory) / NAME
    if not path.exists():
        raise CorpusError(f"{path}: expected a corpus written by llama_jax.corpus, found nothing")
    return json.loads(path.read_text(encoding="utf-8"))


def check_manifest(directory: str | Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest, after every shard's checksum and the tokenizer have been compared with it.

    Raises:
      CorpusError: naming the shard or the tokenizer that does not fit.
    """
    manifest = read_manifest(directory)
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise CorpusError(
            f"{directory}: its blocks were made with tokenizer {manifest['tokenizer'][:12]}, "
            f"{tokenizer.path} is {tokenizer.fingerprint[:12]}"
        )
    for name, expected in manifest["sha256"].items():
        path = Path(directory) / name
        if not path.exists():
            raise CorpusError(f"{path}: expected a shard of the corpus, found nothing")
        if file_sha256(path) != expected:
            raise CorpusError(f"{path}: damaged, its sha256 is not the one in {NAME}")
    return manifest
