"""Documents from files: JSONL, Parquet, TFRecord, ArrayRecord, WARC and WET, plain text, TFDS; compressed or not.

A reader is named by a path or a pattern (`web/*.jsonl.zst`), local or of any file system that fsspec knows
(`gs://bucket/...`), and its format follows from the name; `tfds://name:version?split=train` is a TFDS data set. Rows have their
text in the field `text`, or in the one that the path names at its end: `web/*.parquet?text=content`.

A row that cannot be read comes as `BadRow`, for the caller to count (`damage`). Files are found by `source_files`, and what
fails in `storage` is no damage.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

from llama_jax.corpus_build import tfds
from llama_jax.corpus_build.damage import BadRow, until_damage
from llama_jax.corpus_build.document import Document, host_of
from llama_jax.corpus_build.formats import FORMATS, format_of, parquet
from llama_jax.corpus_build.source_files import plain_path, text_field


def read_file(path: str, source: str) -> Iterator[Document | BadRow]:
    """The documents of one file, each with an id that names its file and place unless the row brings one.

    Raises:
      StorageError, OSError: it could not be read, or is not there.
    """
    field = "text"
    if tfds.is_name(path):
        rows = tfds.rows(path)
    else:
        path, field = plain_path(path), text_field(path)
        kind = format_of(path)
        if kind is None:
            raise ValueError(f"{path}: expected a file of a known format ({', '.join(sorted(FORMATS))})")
        rows = parquet(path, field) if kind == "parquet" else FORMATS[kind](path)
    for where, row in until_damage(path, rows):
        yield row if isinstance(row, BadRow) else _document(row, where, source, field)


def _document(row: dict[str, Any], where: str, source: str, field: str) -> Document | BadRow:
    text, metadata = row.get(field), row.get("metadata", {})
    metadata = {} if metadata is None else metadata  # as Parquet has it
    if not isinstance(text, str):
        got = text if text is None else type(text).__name__
        other = f" (there are {', '.join(map(repr, list(row)[:8]))}; a path may end in ?text=name)" if field not in row else ""
        return BadRow(where, f"{field}: expected a string, got {got}{other}")
    if not isinstance(metadata, dict):
        return BadRow(where, f"metadata: expected an object, got {metadata!r}")
    module = metadata.get("module")  # documents of one module stay on one side of the split
    if not isinstance(module, str | None):
        return BadRow(where, f"metadata.module: expected a string, got {module!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRow(where, f"text: an escape \\ud800 to \\udfff without its other half (character {error.start})")
    # Dolma's rows have their addresses in there.
    key, url = row.get("id"), str(row.get("url") or metadata.get("url") or "")
    key = where if key is None else str(key)
    try:
        host_of(url)  # raises for what is no address
        if metadata:  # dates of Parquet become text, and what is no number is none
            metadata = json.loads(json.dumps(_finite(metadata), default=str, allow_nan=False, ensure_ascii=False).encode())
        f"{key}{url}".encode()
    except (ValueError, TypeError, RecursionError) as error:
        return BadRow(where, f"id, url or metadata: {error}")
    return Document(key, text, source, url=url, metadata=metadata)


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
