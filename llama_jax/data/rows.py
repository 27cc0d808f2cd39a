"""Rows of data sets in the formats that the ecosystem writes: JSONL, Parquet, a saved Hugging Face `datasets`, TFDS.

`read_rows` takes any of them by name and yields one plain dict a row:

    rows.jsonl  rows.jsonl.gz  rows.json     one JSON object a line, UTF-8
    rows.parquet                             needs the extra [data] (pyarrow)
    directory/                               the shards of one split, Parquet or JSONL, wherever they lie below it
    directory/train-*                        the files that a pattern matches, whatever their splits
    saved/                                   what `Dataset.save_to_disk` wrote; extra [data] (datasets)
    tfds://name:version?split=train&dir=...  a TFDS data set, read without TensorFlow (`tfds.data_source`)

Several files are read in the order of their names. A data set of the Hugging Face hub is downloaded first, by `hf download
--repo-type dataset OWNER/NAME --local-dir directory`.

Formats with columns write a missing field as null, so there a null is left out; in JSONL it stays for the reader to judge.
"""

import codecs
import collections
import glob
import gzip
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from llama_jax.files import atomic_write
from llama_jax.paths import first_line, place, sizes

log = logging.getLogger(__name__)

Row = dict[str, Any]
Refuse = Callable[[str, ValueError], None]  # is told where a line stands that holds no row, and why it does not
TFDS = "tfds://"
_BATCH = 1000  # rows of a Parquet file in memory at once
_SAVED = ("state.json", "dataset_dict.json")  # one of them lies in what `save_to_disk` wrote

# Endings of data, and which of them are read. Others, such as those of README.md or checksums, may lie beside.
_DATA = re.compile(r"\.(jsonl?|parquet|arrow|csv|tsv)(\.(?:gz|bz2|xz|zst))?$")
_READ = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".json.gz")
# Files of such an ending that hold no rows, but say what the data beside them are.
_DESCRIBES = re.compile(r"(dataset_infos?|dataset_dict|state|schema|manifest|croissant|(.*[-_.])?metadata)\.json")
_MAGIC = re.compile(r"[*?[]")
_NUMBER = "[0-9]*"  # of a shard, in a pattern
_SHARD = re.compile(r"\d+-of-(\d+)")  # train-00000-of-00003.parquet
_HUB_ADDRESS = re.compile(r"(?:hf:/|https://huggingface\.co)/datasets/([\w.-]+/[\w.-]+)")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SHOWN = 8  # names in an error


def read_rows(name: str | os.PathLike, *, refuse: Refuse | None = None) -> Iterator[tuple[str, Row]]:
    """Pairs ("file:row", row) of a data set, rows of each file counted from 1; the format follows from the name.

    A line of JSONL that holds no row is told to `refuse` and passed over; without it, it is a ValueError.
    """
    if str(name).startswith(TFDS):
        return _tfds(str(name))
    path = _named_place(name)
    if path.is_dir() and any((path / file).is_file() for file in _SAVED):
        return _saved_dataset(path)
    files = data_files(name)
    return itertools.chain.from_iterable(
        _parquet(file) if file.suffix == ".parquet" else read_jsonl(file, refuse=refuse) for file in files
    )


def data_files(name: str | os.PathLike) -> list[Path]:
    """The files whose rows make a data set, sorted: a file, the shards of a directory, or those that a pattern matches.

    Raises:
      FileNotFoundError: there is none.
      ValueError: they have several formats; or, of a directory, there are several splits, or not all of one; or the name is "".
    """
    path = _named_place(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = _of_one_format(path, [path / file for file in sizes(path) if not _is_hidden(file)])
        _check_one_split(path, files)
        for problem in _missing_shards(files):
            raise ValueError(f"{path}: {problem}")
        return files
    if hub := _hub_name(os.fspath(name)):
        raise FileNotFoundError(
            f"{name}: no such file or directory; a data set of the Hugging Face hub is downloaded first: hf download "
            f"--repo-type dataset {hub} --local-dir DIR; then expected DIR, or one split of it, such as DIR/data/train-*"
        )
    if _MAGIC.search(os.fspath(name)):
        files = _of_one_format(path, _matching(path))
        for problem in _missing_shards(files):  # some of them may be what is wanted
            log.warning("%s: %s", name, problem)
        return files
    raise FileNotFoundError(f"{path}: expected a {'Parquet' if path.suffix == '.parquet' else 'JSONL'} file, found nothing")


def _named_place(name: str | os.PathLike) -> Path:
    """The place of a data set; ValueError for an empty name, which would mean whatever lies in the current directory."""
    if not os.fspath(name).strip():
        raise ValueError("expected the path of a data set, got nothing")
    return place(name)


def several_files(name: str | os.PathLike) -> list[Path]:
    """The files of rows in a directory, or that a pattern matches; none of anything else, nor of what `data_files` refuses."""
    path = place(name)
    if path.is_file() or (path / "manifest.json").is_file() or not (path.is_dir() or _MAGIC.search(os.fspath(name))):
        return []
    if (path / "state.json").is_file():  # of `save_to_disk`
        return sorted(path.glob("*.arrow"))
    try:
        return data_files(name)
    except (ValueError, OSError):
        return []


def rows_fact(name: str | os.PathLike) -> str:
    """`file_fact` of a data set: of its file, or of all files of rows in a directory or that a pattern matches."""
    from llama_jax.parallel.hosts import file_fact  # brings JAX, which those who only read rows do without

    files = several_files(name)
    return hashlib.sha256("".join(map(file_fact, files)).encode()).hexdigest()[:16] if files else file_fact(name)


def _matching(pattern: Path) -> list[Path]:
    text = os.fspath(pattern)
    root = text[: _MAGIC.search(text).start()].rpartition("/")[0]
    try:
        found = [*place(root or pattern.anchor).glob(text[len(root) :].lstrip("/"))]
    except NotImplementedError:  # of etils
        raise ValueError(f"{pattern}: a pattern in a bucket may not hold **; expected a * for each directory") from None
    return [path for path in found if path.is_file() and not _is_hidden(os.fspath(path)[len(root) :])]


def _is_hidden(path: str) -> bool:
    """Whether a name in it begins with a dot, as that of the cache that `hf download` leaves."""
    return any(part.startswith(".") for part in path.split("/"))


def _of_one_format(name: Path, files: Iterable[Path]) -> list[Path]:
    """The data among files, sorted."""
    formats: dict[str, list[Path]] = {}
    for file in sorted(files, key=os.fspath):
        if (found := _DATA.search(file.name)) and not _DESCRIBES.fullmatch(file.name):
            formats.setdefault(f".{found[1]}" if found[0] in _READ else found[0], []).append(file)
    readable = {kind: some for kind, some in formats.items() if kind in _READ}
    if readable and len(formats) > 1:
        found = " and ".join(f"{len(some)} of {kind} ({some[0]})" for kind, some in formats.items())
        patterns = [f"{some[0].parent}/*{ending}" for kind, some in readable.items() for ending in _endings(kind, some)]
        raise ValueError(f"{name}: expected files of one format, found {found}; choose by a pattern: {' or '.join(patterns)}")
    for some in readable.values():
        return some
    found = _listed([str(file) for some in formats.values() for file in some])
    raise FileNotFoundError(
        f"{name}: expected files {', '.join(f'*{ending}' for ending in _READ)}, or a directory with the state.json of "
        f"datasets' save_to_disk; found {found or ('a directory without data' if name.is_dir() else 'nothing')}"
    )


def _endings(kind: str, files: Sequence[Path]) -> list[str]:
    """What patterns of the files of one format end in; `*.json*` would match `.jsonl` as well."""
    return sorted({_DATA.search(file.name)[0] for file in files}) if kind == ".json" else [f"{kind}*"]


def _check_one_split(directory: Path, files: Sequence[Path]) -> None:
    """Refuses files whose names differ in more than the numbers of shards."""
    splits = sorted({_split_of(file) for file in files})
    if len(splits) == 1:
        return
    patterns = []
    for split in splits:
        head = split.partition(_NUMBER)[0]
        short = head != split and sum(other.startswith(head) for other in splits) == 1
        patterns.append(f"{head}*" if short else split)
    raise ValueError(
        f"{directory}: expected the files of one split, found those of {len(splits)}; choose by a pattern, which is read "
        f"whatever it matches: {_listed(patterns)}"
    )


def _split_of(file: Path) -> str:
    """The pattern of the shards that a file belongs to: `data/train-[0-9]*-of-00003.parquet`."""
    name = re.sub(r"-[0-9a-f]{16}(?=\.)", "-*", glob.escape(file.name))  # older data sets have a checksum in each name
    return f"{glob.escape(os.fspath(file.parent))}/{re.sub(r'(?<!-of-)(?<![0-9])[0-9]+', _NUMBER, name)}"


def _missing_shards(files: Sequence[Path]) -> list[str]:
    """What is said of shards that know their number and are fewer, as after half a download."""
    shards: collections.Counter[tuple[str, int]] = collections.Counter()
    for file in files:
        if found := _SHARD.search(file.name):
            shards[f"{file.parent}/{file.name[: found.start()]}*", int(found[1])] += 1
    return [f"found {count} of the {total} shards {name}" for (name, total), count in shards.items() if count < total]


def _hub_name(name: str) -> str:
    """The OWNER/NAME of a data set of the Hugging Face hub; "" of what looks like a path."""
    if found := _HUB_ADDRESS.match(name):
        return found[1]
    is_name = _HUB_NAME.fullmatch(name) and not _DATA.search(name) and not Path(name).parent.exists()
    return name if is_name else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def read_jsonl(path: str | os.PathLike, *, refuse: Refuse | None = None) -> Iterator[tuple[str, Row]]:
    """Pairs ("file:line", row) of a JSONL file; `refuse` as in `read_rows`.

    A byte order mark is passed over, and so are empty lines at the end; elsewhere one holds no row.
    """
    path = _named_place(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSONL file, found {'a directory' if path.is_dir() else 'nothing'}")
    number, empty = 0, []  # lines without a row that may be the file's end
    with path.open("rb") as raw, gzip.open(raw, "rb") if path.suffix == ".gz" else raw as file:
        try:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    empty.append(number)
                    continue
                for before in empty:
                    where = f"{path}:{before}"
                    _told(where, ValueError(f"{where}: empty line; expected a JSON object"), refuse)
                empty.clear()
                where = f"{path}:{number}"
                try:
                    row = _row(line, where)
                except ValueError as error:
                    _told(where, error, refuse)
                else:
                    yield where, row
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


def _told(where: str, error: ValueError, refuse: Refuse | None) -> None:
    if refuse is None:
        raise error
    refuse(where, error)


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
    number = 0
    try:
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", without_nulls(row)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}:{number + 1}: damaged Parquet file ({first_line(error)})") from None


def _saved_dataset(path: Path) -> Iterator[tuple[str, Row]]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        raise ValueError(f"{path}: holds the splits {', '.join(splits)}; expected one of them, say {path / 'train'}")
    datasets = _extra("datasets", "directories of Hugging Face datasets")
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and Arrow raise many types for damaged files
        raise ValueError(f"{path}: damaged data set ({first_line(error)})") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", without_nulls(row)


def _tfds(name: str) -> Iterator[tuple[str, Row]]:
    import tensorflow_datasets as tfds  # importing it takes seconds

    parts = urlsplit(name.replace(TFDS, "tfds:///", 1))
    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    if unknown := set(options) - {"split", "dir"}:
        raise ValueError(f"{name}: {min(unknown)}: unknown option; expected split or dir")
    try:
        rows = tfds.data_source(parts.path[1:], split=options.get("split", "train"), data_dir=options.get("dir"))
    except (tfds.core.registered.DatasetNotFoundError, KeyError, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{name}: cannot be read: {first_line(error)}") from None
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


def without_nulls(row: Mapping[str, Any]) -> Row:
    """A copy without the fields that are null, as a missing one is in formats with columns."""
    return {key: value for key, value in row.items() if value is not None}


def _extra(name: str, what: str) -> ModuleType:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # it is there, something that it needs is not
        raise ModuleNotFoundError(f"{what} need the package {package}: pip install 'llama_jax[data]'", name=name) from None
