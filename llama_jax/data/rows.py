"""Rows of data sets in the formats that the ecosystem writes: JSONL, Parquet, a saved Hugging Face `datasets`, TFDS.

`read_rows` takes any of them by name and yields one plain dict a row:

    rows.jsonl  rows.jsonl.gz  rows.json     one JSON object a line, UTF-8
    rows.parquet                             needs the extra [data] (pyarrow)
    directory/                               what `Dataset.save_to_disk` wrote; extra [data] (datasets)
    tfds://name:version?split=train&dir=...  a TFDS data set, read without TensorFlow (`tfds.data_source`)

Formats with columns write a missing field as null, so there a null is left out; in JSONL it stays for the reader to judge.
"""

import gzip
import importlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from llama_jax.files import atomic_write
from llama_jax.paths import place

Row = dict[str, Any]
TFDS = "tfds://"
_BATCH = 1000  # rows of a Parquet file in memory at once


def read_rows(name: str | os.PathLike) -> Iterator[tuple[str, Row]]:
    """Pairs ("file:row", row) of a data set, rows counted from 1; the format follows from the name."""
    if str(name).startswith(TFDS):
        return _tfds(str(name))
    path = place(name)
    if path.is_dir():
        return _saved_dataset(path)
    return _parquet(path) if path.suffix == ".parquet" else read_jsonl(path)


def read_jsonl(path: str | os.PathLike) -> Iterator[tuple[str, Row]]:
    """Pairs ("file:line", row) of a JSONL file. An empty line is malformed JSON."""
    path = place(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSONL file, found {'a directory' if path.is_dir() else 'nothing'}")
    number = 0
    with path.open("rb") as raw, gzip.open(raw, "rb") if path.suffix == ".gz" else raw as file:
        try:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", _row(line, f"{path}:{number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: damaged gzip file ({error})") from None


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows, gzipped where the name ends in `.gz`, whole or not at all; returns their number."""
    count = 0
    with atomic_write(path) as file:
        # No name and no time in the gzip header: the same rows give the same bytes.
        gz = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) if str(path).endswith(".gz") else None
        for row in rows:
            (gz or file).write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))
            count += 1
        if gz:
            gz.close()
    return count


def _row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        if b"\\u" in line:  # an escape can hold half a character, which no UTF-8 and so no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where}: an escape \\ud800 to \\udfff without its other half is no character") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: malformed JSON, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # NaN, a number of 5,000 digits, 5,000 brackets
        raise ValueError(f"{where}: malformed JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    parquet = _extra("pyarrow.parquet", "Parquet files")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a Parquet file, found nothing")
    number = 0
    try:
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", _without_nulls(row)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}:{number + 1}: damaged Parquet file ({_first_line(error)})") from None


def _saved_dataset(path: Path) -> Iterator[tuple[str, Row]]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        raise ValueError(f"{path}: holds the splits {', '.join(splits)}; expected one of them, say {path / 'train'}")
    if not (path / "state.json").is_file():
        raise FileNotFoundError(
            f"{path}: expected a data set file, found a directory without the state.json of datasets' save_to_disk"
        )
    datasets = _extra("datasets", "directories of Hugging Face datasets")
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and Arrow raise many types for damaged files
        raise ValueError(f"{path}: damaged data set ({_first_line(error)})") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", _without_nulls(row)


def _tfds(name: str) -> Iterator[tuple[str, Row]]:
    import tensorflow_datasets as tfds  # importing it takes seconds

    parts = urlsplit(name.replace(TFDS, "tfds:///", 1))
    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    if unknown := set(options) - {"split", "dir"}:
        raise ValueError(f"{name}: {min(unknown)}: unknown option; expected split or dir")
    try:
        rows = tfds.data_source(parts.path[1:], split=options.get("split", "train"), data_dir=options.get("dir"))
    except (tfds.core.registered.DatasetNotFoundError, KeyError, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{name}: cannot be read: {_first_line(error)}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    """Text, numbers and lists of what TFDS gives: bytes, NumPy scalars and arrays, a dict of columns for a sequence."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int | float | None):
        return value
    if hasattr(value, "ndim") and value.ndim == 0:
        return _plain(value.item())
    return [_plain(item) for item in value]


def _without_nulls(row: Row) -> Row:
    return {key: value for key, value in row.items() if value is not None}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _extra(name: str, what: str) -> ModuleType:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # it is there, something that it needs is not
        raise ModuleNotFoundError(f"{what} need the package {package}: pip install 'llama_jax[data]'", name=name) from None
