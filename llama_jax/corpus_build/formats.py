"""What a file's name says of its format, and the readers of rows by format."""

import json
from collections.abc import Sequence
from pathlib import Path

from llama_jax.corpus_build.damage import BadRow, Rows, SourceError, not_utf8
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.records import array_record, tfrecord
from llama_jax.corpus_build.storage import StorageError
from llama_jax.corpus_build.unpack import SUFFIXES, open_binary
from llama_jax.corpus_build.web_archive import warc


def format_of(name: str) -> str | None:
    """The format that a file name speaks of, compression apart: `a/b.jsonl.gz` is "jsonl"."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return suffixes[-1][1:] if suffixes and suffixes[-1][1:] in FORMATS else None


# A file that is one array, or one object over many lines, is no JSON Lines, whatever its name.
_LINES = " (each line of a file is read as one object: JSON Lines)"


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
                yield where, BadRow(where, f"malformed JSON: {error}{_LINES if number == 1 else ''}")
            else:
                problem = None if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}{_LINES}"
                yield where, BadRow(where, problem) if problem else row


def _text(path: str) -> Rows:
    with open_binary(path) as file:
        data = file.read()
    try:
        yield f"{path}:1", {"id": path, "text": data.decode()}
    except UnicodeDecodeError as error:
        yield f"{path}:1", not_utf8(f"{path}:1", error)


def parquet_rows(path: str) -> int:
    """How many rows a Parquet file has, by its last bytes alone; 0 for one that is damaged."""
    with open_binary(path) as file:
        try:
            return extra("pyarrow.parquet").ParquetFile(file).metadata.num_rows
        except (ValueError, OSError) as error:
            if isinstance(error, StorageError):
                raise
            return 0


def parquet(path: str, field: str, more: Sequence[str] = ()) -> Rows:
    """Rows with their text (`field`), id, url and metadata; `more` are further columns, as far as there are any."""
    arrow = extra("pyarrow.parquet")
    with open_binary(path) as file:
        table = arrow.ParquetFile(file)
        names = table.schema_arrow.names
        if field not in names:
            raise SourceError(f"no column {field!r} among {', '.join(map(repr, names))}; a path may end in ?text=name")
        columns = [name for name in dict.fromkeys(("id", field, "url", "metadata", *more)) if name in names]
        number = 0
        for batch in table.iter_batches(batch_size=1000, columns=columns):
            for row in batch.to_pylist(maps_as_pydicts="lossy"):  # of a key that repeats, the last value
                number += 1
                yield f"{path}:{number}", row


ONE_DOCUMENT = ("txt", "md", "rst")  # whose files are a document each
PLAIN = ("jsonl", "json", "ndjson", *ONE_DOCUMENT)  # whose files, uncompressed, are no smaller than their text
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
