"""A torn file of every format: what comes before is read, the damage is counted and named, and fatal beyond the limit."""

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from configs.corpus import get_config
from llama_jax import corpus
from llama_jax.config import parse
from llama_jax.corpus_build import formats, storage
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.storage import StorageError
from tests.test_corpus_readers import framed

NOISE = np.random.default_rng(0)
TEXTS = [f"text {i} " + NOISE.bytes(400).hex() for i in range(60)]  # hardly compresses, so a cut falls inside a row
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor()
    return b"".join(compressor.compress(data[start : start + 9000]) for start in range(0, len(data), 9000))  # frames


def parquet() -> bytes:
    pyarrow, parquet_ = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    parquet_.write_table(pyarrow.table({"text": TEXTS}), buffer)
    return buffer.getvalue()


def tfrecord() -> bytes:
    return b"".join(framed(json.dumps({"text": text}).encode()) for text in TEXTS)


def warc(kind: str, *, packed: bool) -> bytes:
    pytest.importorskip("resiliparse")
    statusandheaders, warcwriter = pytest.importorskip("warcio.statusandheaders"), pytest.importorskip("warcio.warcwriter")
    buffer = io.BytesIO()
    writer = warcwriter.WARCWriter(buffer, gzip=packed)
    for i, text in enumerate(TEXTS):
        html = statusandheaders.StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
        body = io.BytesIO(text.encode())
        extra = {"http_headers": html} if kind == "response" else {}
        writer.write_record(writer.create_warc_record(f"http://example.org/{i}", kind, payload=body, **extra))
    return buffer.getvalue()


MAKERS = {
    "x.jsonl": lambda: LINES,
    "x.jsonl.gz": lambda: gzip.compress(LINES),
    "x.jsonl.bz2": lambda: bz2.compress(LINES),
    "x.jsonl.xz": lambda: lzma.compress(LINES),
    "x.jsonl.zst": lambda: zstd(LINES),
    "x.parquet": parquet,
    "x.tfrecord": tfrecord,
    "x.warc": lambda: warc("response", packed=False),
    "x.warc.gz": lambda: warc("response", packed=True),
    "x.wet": lambda: warc("conversion", packed=False),
    "x.warc.wet.gz": lambda: warc("conversion", packed=True),
}
# Without the index at its end nothing of such a file is to be had; bzip2 gives whole blocks of 900 kB.
NOTHING = ("x.parquet", "x.jsonl.bz2")


@pytest.mark.parametrize("name", MAKERS)
def test_a_torn_file_gives_what_comes_before_and_one_bad_row(tmp_path, name):
    path = tmp_path / name
    whole = MAKERS[name]()
    path.write_bytes(whole)
    assert [row.text for row in read_file(str(path), "s")] == TEXTS
    path.write_bytes(whole[: int(len(whole) * 0.69)])  # 0.7 of 60 equal rows may fall between two
    *rows, last = read_file(str(path), "s")
    assert isinstance(last, BadRow) and last.where.startswith(str(path)) and last.problem
    assert last.rest == (name != "x.jsonl")  # plain lines are torn one at a time
    assert all(isinstance(row, Document) for row in rows)
    assert [row.text for row in rows] == TEXTS[: len(rows)]  # none of them cut short
    if name not in NOTHING:
        assert 30 < len(rows) < 50


@pytest.mark.parametrize("name", [name for name in MAKERS if "warc" in name or "wet" in name])
def test_a_web_archive_torn_anywhere_is_seen_to_be(tmp_path, name):
    path, whole = tmp_path / name, MAKERS[name]()
    start = len(whole) // 2
    for cut in range(start, start + 1600, 3):  # more than one record, header and body
        path.write_bytes(whole[:cut])
        rows = list(read_file(str(path), "s"))
        texts = [row.text for row in rows if isinstance(row, Document)]
        assert texts == TEXTS[: len(texts)]
        # A cut between two records leaves a shorter file that is whole.
        between = whole[cut : cut + 2] == b"\x1f\x8b" if name.endswith(".gz") else b"WARC/1.0" in whole[cut : cut + 11]
        assert between or isinstance(rows[-1], BadRow), cut


def test_a_torn_array_record_is_one_bad_row(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "x.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    *rows, last = read_file(str(path), "s")
    assert isinstance(last, BadRow) and last.where.startswith(str(path)) and not rows


def config_of(directory: Path, limit: int) -> corpus.CorpusConfig:
    values = get_config("jsonl").to_dict() | {
        "vocab_size": 330, "block_length": 32, "total_tokens": 1000, "held_out_fraction": 0.2, "held_out_minimum": 1,
        "max_bad_files": limit, "deduplication": {},
    }  # fmt: skip
    values["sources"]["web"]["reader"] = str(directory)
    return parse(corpus.CorpusConfig, values)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("x.jsonl", "x.wet", "x.warc")])
def test_torn_files_are_counted_and_fatal_beyond_the_limit(tmp_path, name):
    source = tmp_path / "source"
    source.mkdir()
    (source / "fine.jsonl").write_bytes(LINES.replace(b"text ", b"fine "))
    whole = MAKERS[name]()
    for number in range(2):
        (source / f"{number}{name}").write_bytes(whole[: int(len(whole) * 0.69) + number])
    counts = corpus.run(config_of(source, 2), tmp_path / "out")["sources"]["web"]
    assert (counts["bad_files"], counts["bad_rows"]) == (2, 0) and counts["documents_read"] >= 60
    assert all(str(source / f"{i}{name}") in row for i, row in enumerate(counts["bad_files_named"]))
    with pytest.raises(ValueError, match=r"bad file 2 of source 'web'; max_bad_files is 1"):
        corpus.run(config_of(source, 1), tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


class Failing:
    """A file that fails at its second read, and opened again at its first, `times` times in all."""

    opened = 0

    def __init__(self, path: str, times: int, error: OSError):
        Failing.opened += 1
        self._file, self._error = open(path, "rb"), error if Failing.opened <= times else None
        self._good = Failing.opened == 1  # reads

    def read(self, size: int) -> bytes:
        if self._error and not self._good:
            raise self._error
        self._good = False
        return self._file.read(min(size, 3000))

    def __getattr__(self, name: str):
        return getattr(self._file, name)


@pytest.mark.parametrize("name", [*MAKERS, "x.txt"])
def test_storage_that_fails_is_asked_again_and_is_no_damage(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(MAKERS.get(name, lambda: LINES)())
    texts = [row.text for row in read_file(str(path), "s")]
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    for error in (ConnectionResetError("Connection reset by peer"), OSError(5, "Input/output error"), OSError("no words")):
        for times, expected in ((2, [1.0, 4.0]), (9, None)):
            monkeypatch.setattr(Failing, "opened", 0)
            monkeypatch.setattr(storage, "_open", lambda path, times=times, error=error: Failing(path, times, error))
            pauses.clear()
            if expected:
                found = [row.text for row in read_file(str(path), "s")]
                assert len(found) == len(texts) and pauses == expected
                assert hash(tuple(found)) == hash(tuple(texts)), "what came twice or not at all would be long to print"
            else:
                with pytest.raises(StorageError, match=f"{path}: could not be read"):
                    list(read_file(str(path), "s"))


def test_a_decoder_that_reports_storage_is_believed(tmp_path, monkeypatch):
    def lost(path: str, *field: str):
        yield f"{path}:1", {"text": "one"}
        raise ConnectionResetError("Connection reset by peer")

    (tmp_path / "x.jsonl").touch()
    monkeypatch.setitem(formats.FORMATS, "jsonl", lost)
    with pytest.raises(ConnectionResetError):
        list(read_file(str(tmp_path / "x.jsonl"), "s"))


def test_tfrecords_are_compared_with_their_checksums(tmp_path):
    records = [framed(b'{"text": "one"}'), bytearray(framed(b'{"text": "two"}')), framed(b'{"text": "three"}')]
    records[1][22] ^= 1
    path = tmp_path / "x.tfrecord"
    path.write_bytes(b"".join(records))
    one, two, three = read_file(str(path), "s")
    assert (one.text, three.text) == ("one", "three") and not two.rest
    assert two == BadRow(f"{path}:2", "the record does not match its checksum")
    records[1][8] ^= 1  # of the length: where the next record begins is not known
    path.write_bytes(b"".join(records))
    one, rest = read_file(str(path), "s")
    assert rest.rest and "record 2: its length does not match its checksum" in rest.problem


@pytest.mark.parametrize("record", [b"\x0a\x02\x0a\x00", b"{" + b"[" * 100_000, b'{"text": "a", "metadata": ' + b'{"a":' * 900])
def test_an_odd_record_is_one_bad_row(tmp_path, record):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(framed(record) + framed(b'{"text": "fine"}'))
    bad, fine = read_file(str(path), "s")
    assert isinstance(bad, BadRow) and not bad.rest and fine.text == "fine"
