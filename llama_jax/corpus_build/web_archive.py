"""Web archives: WARC and WET, whose torn records warcio alone would pass over."""

from collections.abc import Iterator
from typing import Any

from llama_jax.corpus_build.content_encoding import unpacked
from llama_jax.corpus_build.damage import BadRow, Rows
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.storage import StorageError, stored
from llama_jax.corpus_build.unpack import compression, gzip_members


def warc(path: str) -> Rows:
    """Responses of a WARC file as HTML (the step `extract` makes text of them), conversions of a WET file as text."""
    archive = extra("warcio.archiveiterator")
    with stored(path) as file:
        number = 0
        # warcio would undo the compression too, but takes a torn member for the end of the file.
        for part in gzip_members(file) if compression(path, file) == ".gz" else (file,):
            records, end = archive.ArchiveIterator(part), 0
            for record in _archive(records):
                number += 1
                row = _warc_row(record, f"{path}:{number}")
                if missing := _missing(record):
                    raise EOFError(f"record {number} is torn, {missing} bytes are missing")
                end = records.get_record_offset() + records.get_record_length()
                if records.offset == end:  # a length torn to nothing looks like an empty record
                    raise EOFError(f"record {number} is torn, no line end follows it")
                if row:
                    yield f"{path}:{number}", row
            if (beyond := part.tell() - end) > 4:  # two line ends
                raise EOFError(f"{beyond:,} bytes after record {number} are no whole record")


def _missing(record: Any) -> int | str:
    """Bytes that the file lacks of a record, all of which is read: warcio ends quietly where a file does."""
    while record.raw_stream.read(2**16):
        pass
    return getattr(record.raw_stream, "limit", "some")  # without a length the record's own header is torn


def _warc_row(record: Any, where: str) -> dict[str, Any] | BadRow | None:
    """A record as a row; None for one that holds no text or that is torn."""
    if record.rec_type not in ("response", "conversion"):
        return None
    if record.rec_type == "response":
        kind = (record.http_headers.get_header("Content-Type") or "") if record.http_headers else ""
        if "html" not in kind.lower():
            return None
    body = _body(record)
    if _missing(record):
        return None
    if record.rec_type == "conversion":
        text = body.decode("utf-8", "replace")
    else:
        strings = extra("resiliparse.parse.encoding")
        try:
            body = unpacked(body, record.http_headers.get_header("Content-Encoding") or "")
        except ValueError as error:
            return BadRow(where, str(error))
        text = strings.bytes_to_str(body, strings.detect_encoding(body))
    headers = record.rec_headers
    return {
        "id": headers.get_header("WARC-Record-ID"), "text": text, "url": headers.get_header("WARC-Target-URI") or "",
        "metadata": {"date": headers.get_header("WARC-Date") or ""},
    }  # fmt: skip


def _body(record: Any) -> bytes:
    """The body of a record, its chunks joined where it came in chunks, and packed as it was sent."""
    transfer = (record.http_headers.get_header("Transfer-Encoding") or "") if record.http_headers else ""
    if transfer.strip().lower() != "chunked":
        return record.raw_stream.read()
    return extra("warcio.bufferedreaders").ChunkedDataReader(record.raw_stream).read()


def _archive(records: Iterator) -> Iterator:
    """Records; ValueError for whatever warcio raises on a torn header: errors of its own, of types and of attributes."""
    try:
        yield from records
    except StorageError:
        raise
    except Exception as error:
        raise ValueError(f"no whole record follows ({type(error).__name__}: {error})") from None
