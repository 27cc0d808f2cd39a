"""Documents from files: JSONL, Parquet, TFRecord, ArrayRecord, WARC and WET, plain text, TFDS; compressed or not.

A reader is named by a path or a pattern (`web/*.jsonl.zst`), local or of any file system that fsspec knows
(`gs://bucket/...`), and its format follows from the name; `tfds://name:version?split=train` is a TFDS data set. Rows have their
text in the field `text`, or in the one that the path names at its end: `web/*.parquet?text=content`.

A row that cannot be read comes as `BadRow`, for the caller to count: one torn line must not end a run over a billion. So does
the rest of a damaged file. Storage that fails says nothing of the file: it is asked again, then that ends the run.
"""

import bz2
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import json
import lzma
import math
import re
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.extras import extra


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row, or the rest of a file, that could not be read."""

    where: str  # file:line or file:record
    problem: str
    rest: bool = False  # whether it is the rest of a file, however many rows


class StorageError(OSError):
    """A file could not be read from where it lies, though it was tried several times."""


Rows = Iterator[tuple[str, "dict[str, Any] | BadRow"]]
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What reading a damaged or foreign file raises.
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError, struct.error)
TFDS = "tfds://"
_TEXT_OPTION = re.compile(r"\?text=([^?&=/]+)$")
_PAUSES = (1.0, 4.0)  # seconds before storage is asked again
_LARGEST_WINDOW = 2**31  # of zstd: what `zstd --long=31` writes


def expand(pattern: str) -> list[str]:
    """The files of a path or a pattern, sorted; a directory stands for every file of a known format below it.

    Raises:
      FileNotFoundError: there is none.
    """
    if pattern.startswith(TFDS):
        return [pattern]
    pattern, option = (plain := plain_path(pattern)), pattern[len(plain) :]
    if "://" in pattern:
        system, path = extra("fsspec").core.url_to_fs(pattern)
        found = system.find(path) if system.isdir(path) else system.glob(path)
        scheme = pattern.partition("://")[0]
        names = [f"{scheme}://{name.removeprefix(f'{scheme}://')}" for name in found]
    elif Path(pattern).is_dir():
        names = [str(path) for path in Path(pattern).rglob("*") if path.is_file()]
    else:
        names = glob.glob(pattern, recursive=True) or [pattern] * Path(pattern).is_file()
    many = len(names) != 1 or names[0] != pattern
    names = sorted(name for name in names if not many or format_of(name))
    if not names:
        raise FileNotFoundError(f"{pattern}: expected files to read ({', '.join(sorted(_FORMATS))}), found nothing")
    return [name + option for name in names]


def plain_path(path: str) -> str:
    """The path of a file without the name of its text field."""
    return path if path.startswith(TFDS) else _TEXT_OPTION.sub("", path)


def format_of(name: str) -> str | None:
    """The format that a file name speaks of, compression apart: `a/b.jsonl.gz` is "jsonl"."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and (suffixes[-1] in _OPENERS or suffixes[-1] == ".zst"):
        suffixes.pop()
    return suffixes[-1][1:] if suffixes and suffixes[-1][1:] in _FORMATS else None


def read_file(path: str, source: str) -> Iterator[Document | BadRow]:
    """The documents of one file, each with an id that names its file and place unless the row brings one.

    Raises:
      StorageError, OSError: it could not be read, or is not there.
    """
    field = "text"
    if path.startswith(TFDS):
        rows = _tfds(path)
    else:
        if option := _TEXT_OPTION.search(path):
            path, field = plain_path(path), option[1]
        kind = format_of(path)
        if kind is None:
            raise ValueError(f"{path}: expected a file of a known format ({', '.join(sorted(_FORMATS))})")
        rows = _parquet(path, field) if kind == "parquet" else _FORMATS[kind](path)
    where = f"{path}:0"
    try:
        for where, row in rows:
            yield row if isinstance(row, BadRow) else _document(row, where, source, field)
    except _DAMAGE as error:
        yield _damaged(where, error)
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        yield _damaged(where, error)  # so bz2's and Parquet's decoders complain, and nothing else does


def _damaged(where: str, error: Exception) -> BadRow:
    return BadRow(where, f"the file cannot be read beyond this ({type(error).__name__}: {error})", rest=True)


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
    key, url = row.get("id"), str(row.get("url") or "")
    key = where if key is None else str(key)
    try:
        urlsplit(url if "//" in url else f"//{url}").hostname  # noqa: B018  # raises for what is no address
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


class _Storage(io.RawIOBase):
    """The bytes of a file. A read that fails is tried again from the same place, after a while, with the file opened anew."""

    def __init__(self, path: str):
        self._path, self._at, self._file = path, 0, None
        self._seekable = self._try(lambda file: file.seekable())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = offset + self._at, io.SEEK_SET
        self._at = self._try(lambda file: file.seek(offset, whence))
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._try(lambda file: file.read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _try(self, act: Callable[[BinaryIO], Any]) -> Any:
        failures = Exception if "://" in self._path else OSError  # file systems of fsspec have errors of their own
        for pause in (*_PAUSES, None):
            try:
                if self._file is None:
                    self._file = _open(self._path)
                    if self._at:
                        self._file.seek(self._at)
                return act(self._file)
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                raise
            except failures as error:
                if pause is None:
                    raise StorageError(f"{self._path}: could not be read ({type(error).__name__}: {error})") from error
                self._file = None
                time.sleep(pause)


def _open(path: str) -> BinaryIO:
    return extra("fsspec").open(path, "rb").open() if "://" in path else open(path, "rb", buffering=0)


def _stored(path: str) -> BinaryIO:
    """The bytes of a file as they lie there."""
    return io.BufferedReader(_Storage(path), 2**18)


def open_binary(path: str) -> BinaryIO:
    """The bytes of a file behind its compression (.gz, .bz2, .xz, .zst)."""
    raw = _stored(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), 2**20)
    return _OPENERS[suffix](raw, "rb") if suffix in _OPENERS else raw


class _ZstdFile(io.RawIOBase):
    """The content of all frames of a zstd file; EOFError where the last one is torn, which its own reader passes over."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._zstandard = raw, extra("zstandard")
        self._frame: Any = None  # the frame that is being read
        self._data = b""  # of the file, not unpacked yet
        self._left = memoryview(b"")  # content that nobody has taken yet

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            self._data = self._data or self._raw.read(2**17)
            if not self._data:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is torn")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
            try:
                self._left = memoryview(self._frame.decompress(self._data))
            except self._zstandard.ZstdError as error:
                raise ValueError(str(error)) from None
            self._data = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _jsonl(path: str) -> Rows:
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                yield where, BadRow(where, f"not UTF-8 (byte {error.start})")
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
        yield f"{path}:1", BadRow(f"{path}:1", f"not UTF-8 (byte {error.start})")


def _parquet(path: str, field: str) -> Rows:
    parquet = extra("pyarrow.parquet")
    with open_binary(path) as file:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if field not in names:
            raise ValueError(f"no column {field!r} among {', '.join(map(repr, names))}; a path may end in ?text=name")
        columns = [name for name in dict.fromkeys(("id", field, "url", "metadata")) if name in names]
        number = 0
        for batch in table.iter_batches(batch_size=1000, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row


def _tfrecord(path: str) -> Rows:
    crc32c = extra("google_crc32c").value

    def matches(content: bytes, checksum: bytes) -> bool:
        plain = crc32c(content)
        masked = ((plain >> 15 | plain << 17) + 0xA282EAD8) & 0xFFFFFFFF  # as TensorFlow does
        return struct.pack("<I", masked) == checksum

    with open_binary(path) as file:
        for number in itertools.count(1):
            head = file.read(12)  # length and its checksum
            if not head:
                return
            size, where = struct.unpack("<Q", head[:8])[0], f"{path}:{number}"
            if not matches(head[:8], head[8:]):
                raise ValueError(f"record {number}: its length does not match its checksum")
            record = file.read(size + 4)  # and the checksum of the record
            if len(record) < size + 4:
                raise EOFError(f"record {number} of {size:,} bytes is torn")
            record, checksum = record[:size], record[size:]
            if matches(record, checksum):
                yield where, _record(record, where)
            else:
                yield where, BadRow(where, "the record does not match its checksum")


def _array_record(path: str) -> Rows:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        with _local_copy(path) as name:
            reader = ArrayRecordReader(name)
            for number in range(reader.num_records()):
                (record,) = reader.read([number])
                yield f"{path}:{number + 1}", _record(record, f"{path}:{number + 1}")
            reader.close()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


@contextlib.contextmanager
def _local_copy(path: str) -> Iterator[str]:
    """A local file with the content of `path`, for a library that reads local files by offset; itself if it is one."""
    if "://" not in path:
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".array_record") as copy, _stored(path) as file:
        shutil.copyfileobj(file, copy)
        copy.flush()
        yield copy.name


def _record(record: bytes, where: str) -> dict[str, Any] | BadRow:
    """A record as a row: a JSON object, or a tf.train.Example with a feature `text`."""
    try:
        if record[:1] == b"{":
            return json.loads(record)
        return _example(record)
    except (ValueError, IndexError, RecursionError) as error:
        return BadRow(where, f"expected a JSON object or a tf.train.Example: {error}")


def _example(record: bytes) -> dict[str, str]:
    """Byte features of a tf.train.Example, by its wire format: TensorFlow itself is not needed."""
    row = {}
    for features in _fields(record, 1):
        for entry in _fields(features, 1):
            name, value = next(_fields(entry, 1), b"").decode(), next(_fields(entry, 2), b"")  # both may be left out
            for bytes_list in _fields(value, 1):
                for item in _fields(bytes_list, 1):
                    row.setdefault(name, item.decode())
    return row


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """The length-delimited fields `number` of a protocol buffer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 2:
            size = varint()
            if at + size > len(message):
                raise ValueError("a torn protocol buffer")
            if key >> 3 == number:
                yield message[at : at + size]
            at += size
        elif key & 7 == 0:
            varint()
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
        else:
            raise ValueError("not a protocol buffer")


def _warc(path: str) -> Rows:
    """Responses of a WARC file as HTML (the step `extract` makes text of them), conversions of a WET file as text."""
    archive, strings = extra("warcio.archiveiterator"), extra("resiliparse.parse.encoding")
    with _stored(path) as file:
        number = 0
        # warcio would undo the compression too, but takes a torn member for the end of the file.
        for part in _gzip_members(file) if path.lower().endswith(".gz") else (file,):
            records, end = archive.ArchiveIterator(part), 0
            for record in _archive(records):
                number += 1
                row = _warc_row(record, strings)
                if missing := _missing(record):
                    raise EOFError(f"record {number} is torn, {missing} bytes are missing")
                end = records.get_record_offset() + records.get_record_length()
                if records.offset == end:  # a length torn to nothing looks like an empty record
                    raise EOFError(f"record {number} is torn, no line end follows it")
                if row:
                    yield f"{path}:{number}", row
            if (beyond := part.tell() - end) > 4:  # two line ends
                raise EOFError(f"{beyond:,} bytes after record {number} are no whole record")


def _gzip_members(file: BinaryIO) -> Iterator[BinaryIO]:
    """The content of each gzip member, which holds one record by the standard; EOFError where one is not whole."""
    rest = b""
    while rest := (rest or file.read(2**16)).lstrip(b"\0"):  # gzip allows zeros between members
        unpack = zlib.decompressobj(16 + zlib.MAX_WBITS)
        with tempfile.SpooledTemporaryFile(max_size=2**26) as content:
            while not unpack.eof:
                if not rest:
                    raise EOFError("the last gzip member is torn")
                content.write(unpack.decompress(rest))
                rest = unpack.unused_data if unpack.eof else file.read(2**16)
            content.seek(0)
            yield content


def _missing(record: Any) -> int | str:
    """Bytes that the file lacks of a record, all of which is read: warcio ends quietly where a file does."""
    while record.raw_stream.read(2**16):
        pass
    return getattr(record.raw_stream, "limit", "some")  # without a length the record's own header is torn


def _warc_row(record: Any, strings: Any) -> dict[str, Any] | None:
    """A record as a row; None for one that holds no text or that is torn."""
    if record.rec_type not in ("response", "conversion"):
        return None
    if record.rec_type == "response":
        kind = (record.http_headers.get_header("Content-Type") or "") if record.http_headers else ""
        if "html" not in kind.lower():
            return None
    body = record.content_stream().read()
    if _missing(record):
        return None
    text = body.decode("utf-8", "replace") if record.rec_type == "conversion" else strings.bytes_to_str(
        body, strings.detect_encoding(body)
    )  # fmt: skip
    headers = record.rec_headers
    return {
        "id": headers.get_header("WARC-Record-ID"), "text": text, "url": headers.get_header("WARC-Target-URI") or "",
        "metadata": {"date": headers.get_header("WARC-Date") or ""},
    }  # fmt: skip


def _archive(records: Iterator) -> Iterator:
    """Records; ValueError for whatever warcio raises on a torn header: errors of its own, of types and of attributes."""
    try:
        yield from records
    except StorageError:
        raise
    except Exception as error:
        raise ValueError(f"no whole record follows ({type(error).__name__}: {error})") from None


def _tfds(name: str) -> Rows:
    """`tfds://name:version?split=train&text=field&dir=data_dir`, read without TensorFlow (`tfds.data_source`)."""
    examples, field = _tfds_examples(name)
    for number, example in enumerate(examples, start=1):
        value = example.get(field)
        yield f"{name}:{number}", {"text": value.decode() if isinstance(value, bytes) else value}


def tfds_size(name: str) -> int:
    """How many examples the split of a TFDS data set has."""
    return len(_tfds_examples(name)[0])


def _tfds_examples(name: str) -> tuple[Any, str]:
    import tensorflow_datasets as tfds

    parts = urlsplit(name.replace(TFDS, "tfds:///", 1))
    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    examples = tfds.data_source(parts.path[1:], split=options.get("split", "train"), data_dir=options.get("dir"))
    return examples, options.get("text", "text")


_FORMATS = {
    "jsonl": _jsonl,
    "json": _jsonl,
    "ndjson": _jsonl,
    "txt": _text,
    "md": _text,
    "rst": _text,
    "parquet": _parquet,
    "tfrecord": _tfrecord,
    "tfrecords": _tfrecord,
    "array_record": _array_record,
    "arrayrecord": _array_record,
    "warc": _warc,
    "wet": _warc,
}
