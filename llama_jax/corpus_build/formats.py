"""What a file's name says of its format, and the readers of rows by format."""

import json
from pathlib import Path

from llama_jax.corpus_build.damage import BadRow, Rows, not_utf8
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.records import array_record, tfrecord
from llama_jax.corpus_build.unpack import SUFFIXES, open_binary
from llama_jax.corpus_build.web_archive import warc


def format_of(name: str) -> str | None:
    """The format that a file name speaks of, compression apart: `a/b.jsonl.gz` is "jsonl"."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return suffixes[-1][1:] if suffixes and suffixes[-1][1:] in FORMATS else None


def _jsonl(path: str) -> Rows:
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():  # as files that were joined have
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                yield where, not_utf8(where, error)
            except (ValueError, RecursionError) as error:
                yield where, BadRow(where, f"malformed JSON: {error}")
            else:
                problem = None if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}"
                yield where, BadRow(where, problem) if problem else row


def _text(path: str) -> Rows:
    with open_binary(path) as file:
        data = file.read()
    try:
        yield f"{path}:1", {"id": path, "text": data.decode()}
    except UnicodeDecodeError as error:
        yield f"{path}:1", not_utf8(f"{path}:1", error)


def parquet_rows(path: str) -> int:
    """How many rows a Parquet file has, by its last bytes alone."""
    with open_binary(path) as file:
        return extra("pyarrow.parquet").ParquetFile(file).metadata.num_rows


def parquet(path: str, field: str) -> Rows:
    arrow = extra("pyarrow.parquet")
    with open_binary(path) as file:
        table = arrow.ParquetFile(file)
        names = table.schema_arrow.names
        if field not in names:
            raise ValueError(f"no column {field!r} among {', '.join(map(repr, names))}; a path may end in ?text=name")
        columns = [name for name in dict.fromkeys(("id", field, "url", "metadata")) if name in names]
        number = 0
        for batch in table.iter_batches(batch_size=1000, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row


PLAIN = ("jsonl", "json", "ndjson", "txt", "md", "rst")  # whose files, uncompressed, are no smaller than their text
FORMATS = {
    "jsonl": _jsonl,
    "json": _jsonl,
    "ndjson": _jsonl,
    "txt": _text,
    "md": _text,
    "rst": _text,
    "parquet": parquet,
    "tfrecord": tfrecord,
    "tfrecords": tfrecord,
    "array_record": array_record,
    "arrayrecord": array_record,
    "warc": warc,
    "wet": warc,
}
