"""Documents from files: JSONL, Parquet, TFRecord, ArrayRecord, WARC and WET, plain text, TFDS; compressed or not.

A reader is named by a path or a pattern (`web/*.jsonl.zst`), local or of any file system that fsspec knows
(`gs://bucket/...`), and its format follows from the name; `tfds://name:version?split=train` is a TFDS data set. Rows have their
text in the field `text`, or in the one that the path names at its end: `web/*.parquet?text=content`.

A row that cannot be read comes as `BadRow`, for the caller to count (`damage`). Files are found by `source_files`, and what
fails in `storage` is no damage.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from llama_jax.corpus_build import tfds
from llama_jax.corpus_build.damage import BadRow, Rows, until_damage
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.formats import FORMATS, format_of, parquet
from llama_jax.corpus_build.source_files import plain_path, text_field


def read_file(path: str, source: str) -> Iterator[Document | BadRow]:
    """The documents of one file, each with an id that names its file and place unless the row brings one.

    Raises:
      StorageError, OSError: it could not be read, or is not there.
    """
    field = text_field(path)
    for where, row in read_rows(path):
        yield row if isinstance(row, BadRow) else _document(row, where, source, field)


def read_rows(path: str, more: Sequence[str] = ()) -> Rows:
    """The rows of one file, as far as it can be read, each with the place where it stands; `more` are fields that are needed
    beside those of a document."""
    if tfds.is_name(path):
        rows = tfds.rows(path)
    else:
        path, field = plain_path(path), text_field(path)
        kind = format_of(path)
        if kind is None:
            raise ValueError(f"{path}: expected a file of a known format ({', '.join(sorted(FORMATS))})")
        rows = parquet(path, field, more) if kind == "parquet" else FORMATS[kind](path)
    return until_damage(path, rows)


def _document(row: dict[str, Any], where: str, source: str, field: str) -> Document | BadRow:
    if problem := text_problem(row, field):
        return BadRow(where, problem)
    text, metadata = row[field], _metadata(row.get("metadata"))
    # Dolma's rows have their addresses in there.
    key, url = row.get("id"), str(row.get("url") or metadata.get("url") or "")
    key = where if key is None else str(key)
    try:
        if metadata:  # dates of Parquet become text, and what is no number is none
            metadata = json.loads(json.dumps(_finite(metadata), default=str, allow_nan=False, ensure_ascii=False).encode())
        f"{key}{url}".encode()
    except (ValueError, TypeError, RecursionError) as error:
        return BadRow(where, f"id, url or metadata: {error}")
    return Document(key, text, source, url=url, metadata=metadata)


def text_problem(row: dict[str, Any], field: str) -> str | None:
    """What is wrong with the text of a row; None if it is one."""
    text = row.get(field)
    if not isinstance(text, str):
        got = text if text is None else type(text).__name__
        other = f" (there are {', '.join(map(repr, list(row)[:8]))}; a path may end in ?text=name)" if field not in row else ""
        return f"{field}: expected a string, got {got}{other}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{field}: an escape \\ud800 to \\udfff without its other half (character {error.start})"
    return None


def _metadata(value: Any) -> dict[str, Any]:
    """What a row says of itself as an object. Many data sets have it as a string of JSON; another value becomes a field."""
    if value is None or value == "":  # as Parquet and CSV have what a row lacks
        return {}
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(value)
            value = parsed if isinstance(parsed, dict) else value
    return value if isinstance(value, dict) else {"metadata": value}


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
