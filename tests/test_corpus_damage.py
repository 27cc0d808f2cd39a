"""A torn file of every format: what comes before is read, the damage is counted and named, and fatal beyond the limit."""

import bz2
import gzip
import io
import json
import lzma
import struct
from pathlib import Path

import numpy as np
import pytest

from configs.corpus import get_config
from llama_jax import corpus
from llama_jax.config import parse
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.readers import BadRow, read_file

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
    records = [json.dumps({"text": text}).encode() for text in TEXTS]
    return b"".join(struct.pack("<Q", len(record)) + b"crc!" + record + b"crc!" for record in records)


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
    path.write_bytes(whole[: int(len(whole) * 0.7)])
    *rows, last = read_file(str(path), "s")
    assert isinstance(last, BadRow) and last.where.startswith(str(path)) and last.problem
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
        "max_bad_rows": limit, "deduplication": {},
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
    assert counts["bad_rows"] == 2 and counts["documents_read"] >= 60
    assert all(str(source / f"{i}{name}") in row for i, row in enumerate(counts["bad_rows_named"]))
    with pytest.raises(ValueError, match=r"bad row 2 of source 'web'; max_bad_rows is 1"):
        corpus.run(config_of(source, 1), tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
