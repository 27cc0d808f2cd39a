"""The manifest of a corpus: what is in it, by which tokenizer and config, and size and checksum of each shard."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import write_text
from llama_jax.paths import place, sizes

NAME = "manifest.json"
FIELDS = ("sources", "tokenizer", "vocab_size", "block_length", "table", "config", "version", "files")


class CorpusError(ValueError):
    """A corpus that is missing, damaged or belongs to another tokenizer."""


def file_sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes."""
    with place(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    directory: str | os.PathLike, values: dict[str, Any], *, known: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Adds `files` (size and sha256 of each file below `directory`) to `values`, writes and returns the manifest.

    Files whose sha256 is `known` are not read again: the shards of a large corpus were hashed by those who wrote them.
    """
    directory, known = place(directory), known or {}
    manifest = {
        **values,
        "files": {
            name: {"bytes": size, "sha256": known.get(name) or file_sha256(directory / name)}
            for name, size in sorted(sizes(directory).items())
            if name != NAME
        },
    }
    write_text(directory / NAME, json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    return manifest


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a corpus directory; CorpusError if there is none or it is damaged."""
    path = place(directory) / NAME
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{path}: expected a corpus written by llama_jax.corpus, found nothing") from None
    except ValueError as error:
        raise CorpusError(f"{path}: damaged, not JSON ({error})") from None
    for field in FIELDS:
        if not isinstance(manifest, dict) or field not in manifest:
            raise CorpusError(f"{path}: {field}: missing; is it the manifest of a corpus?")
    return manifest


def check_manifest(
    directory: str | os.PathLike, tokenizer: Tokenizer, *, checksums: bool = True
) -> dict[str, Any]:
    """The manifest, after the tokenizer and every shard have been compared with it.

    With `checksums` False only sizes are compared: reading a corpus of terabytes, or the same one on each host, takes too long.

    Raises:
      CorpusError: naming the shard or the tokenizer that does not fit.
    """
    manifest = read_manifest(directory)
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise CorpusError(
            f"{directory}: its blocks were made with tokenizer {manifest['tokenizer'][:12]}, "
            f"{tokenizer.path} is {tokenizer.fingerprint[:12]}"
        )
    found = sizes(place(directory))
    for name, expected in manifest["files"].items():
        path = place(directory) / name
        if name not in found:
            raise CorpusError(f"{path}: expected a shard of the corpus, found nothing")
        if (size := found[name]) != expected["bytes"]:
            raise CorpusError(f"{path}: damaged, expected {expected['bytes']:,} bytes, got {size:,}")
        if checksums and file_sha256(path) != expected["sha256"]:
            raise CorpusError(f"{path}: damaged, its sha256 is not the one in {NAME}")
    return manifest
