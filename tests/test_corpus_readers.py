"""Documents from files of every format, and what becomes of damage in them."""

import bz2
import datetime
import gzip
import json
import lzma
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llama_jax.corpus_build import tfds
from llama_jax.corpus_build.content_encoding import unpacked
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.document import Document, host_of
from llama_jax.corpus_build.formats import format_of
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.source_files import expand, file_facts, most_text
from llama_jax.corpus_build.steps import CleanConfig, make_steps
from llama_jax.corpus_build.storage import StorageError
from llama_jax.corpus_build.unpack import open_binary
from llama_jax.data.sources import write_jsonl
from llama_jax.paths import absolute, place

ROWS = [{"id": f"d{i}", "text": f"text {i}\nof ünicode", "url": f"http://u/{i}", "metadata": {"k": i}} for i in range(5)]


def documents(path) -> list[Document]:
    rows = list(read_file(str(path), "s"))
    assert all(isinstance(row, Document) for row in rows), rows
    return rows


def check(path, *, urls: bool = True) -> None:
    found = documents(path)
    assert [d.text for d in found] == [row["text"] for row in ROWS] and {d.source for d in found} == {"s"}
    assert [d.id for d in found] == [row["id"] for row in ROWS]
    if urls:
        assert [(d.url, d.metadata) for d in found] == [(row["url"], row["metadata"]) for row in ROWS]


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", None)]
)
def test_jsonl_behind_every_compression(tmp_path, suffix, pack):
    if pack is None:
        zstandard = pytest.importorskip("zstandard")
        half = LINES.index(b"\n") + 1  # two frames, as tools that append write
        data = zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:])
    else:
        data = pack(LINES)
    (tmp_path / f"x.jsonl{suffix}").write_bytes(data)
    check(tmp_path / f"x.jsonl{suffix}")
    with open_binary(str(tmp_path / f"x.jsonl{suffix}")) as file:
        assert file.read() == LINES


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "x.jsonl").write_bytes(LINES)
    for pattern in ("~/web", "~/web/*.jsonl", "~/web/x.jsonl"):
        assert expand(f"{pattern}?text=text") == [f"{tmp_path}/web/x.jsonl?text=text"]
    assert place("~/web") == absolute("~/web") == tmp_path / "web" and place("a/~").name == "~"


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "other": 1} for row in ROWS]), tmp_path / "x.parquet")
    check(tmp_path / "x.parquet")


def example(row: dict) -> bytes:
    """A tf.train.Example, spelt out: features { feature { key, value { bytes_list { value } } } }."""

    def field(number: int, content: bytes) -> bytes:
        size, head = len(content), b""
        while size >= 128:
            head, size = head + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + head + bytes([size]) + content

    names = ("id", "text", "url")
    entries = [field(1, field(1, name.encode()) + field(2, field(1, field(1, row[name].encode())))) for name in names]
    number = field(1, field(1, b"n") + field(2, field(3, field(1, bytes([7])))))  # an int64 feature is passed over
    return field(1, b"".join([*entries, number]))


def framed(record: bytes) -> bytes:
    """A record as a TFRecord file has it: its length and itself, each with its masked CRC-32C."""
    crc32c = pytest.importorskip("google_crc32c").value

    def checksum(content: bytes) -> bytes:
        crc = crc32c(content)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    size = struct.pack("<Q", len(record))
    return size + checksum(size) + record + checksum(record)


@pytest.mark.parametrize("encode", [example, lambda row: json.dumps(row).encode()], ids=["example", "json"])
def test_tfrecord_and_array_record(tmp_path, encode):
    records = [encode(row) for row in ROWS]
    written = b"".join(map(framed, records))
    (tmp_path / "x.tfrecord").write_bytes(written)
    check(tmp_path / "x.tfrecord", urls=False)
    (tmp_path / "x.tfrecord").write_bytes(written[:-9])
    rows = list(read_file(str(tmp_path / "x.tfrecord"), "s"))
    assert len(rows) == 5 and isinstance(rows[4], BadRow) and "torn" in rows[4].problem

    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"))
    for record in records:
        writer.write(record)
    writer.close()
    check(tmp_path / "x.array_record", urls=False)


def test_warc_and_wet(tmp_path):
    warcio = pytest.importorskip("warcio")
    pytest.importorskip("resiliparse")
    import io

    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    page = "<html><meta charset=latin-1><p>schön</p></html>"
    assert warcio
    bodies = {"x.warc.gz": ("response", page.encode("latin-1")), "x.warc.wet.gz": ("conversion", "schön".encode())}
    for name, (kind, body) in bodies.items():
        with open(tmp_path / name, "wb") as file:
            writer = WARCWriter(file, gzip=True)
            for i in range(2):
                for content in ("text/html", "image/png") if kind == "response" else ("text/plain",):
                    headers = StatusAndHeaders("200 OK", [("Content-Type", content)], protocol="HTTP/1.1")
                    writer.write_record(
                        writer.create_warc_record(
                            f"http://example.org/{i}", kind, payload=io.BytesIO(body),
                            http_headers=headers if kind == "response" else None,
                        )
                    )  # fmt: skip
        found = documents(tmp_path / name)
        assert [d.url for d in found] == ["http://example.org/0", "http://example.org/1"]  # the images are passed over
        assert all("schön" in d.text for d in found) and found[0].id.startswith("<urn:uuid:") and found[0].metadata["date"]


def test_a_tree_of_text_files(tmp_path):
    for name in ("b/two.md", "a/one.txt", "a/three.txt.gz", "a/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"three") if name.endswith("gz") else name.encode())
    paths = expand(str(tmp_path))
    assert [Path(path).name for path in paths] == ["one.txt", "three.txt.gz", "two.md"]
    assert [documents(path)[0].text for path in paths] == ["a/one.txt", "three", "b/two.md"]
    assert documents(paths[0])[0].id == paths[0]
    (tmp_path / "a" / "one.txt").write_bytes(b"\xff\xfe")
    assert list(read_file(paths[0], "s")) == [BadRow(f"{paths[0]}:1", "not UTF-8 (byte 0)")]


def test_patterns_and_formats(tmp_path):
    for name in ("2.jsonl", "1.jsonl.gz", "x.csv"):
        write_jsonl(tmp_path / name, ROWS)
    assert [Path(p).name for p in expand(f"{tmp_path}/*.jsonl*")] == ["1.jsonl.gz", "2.jsonl"]
    assert expand(str(tmp_path / "2.jsonl")) == [str(tmp_path / "2.jsonl")]
    names = {"a/b.jsonl.zst": "jsonl", "x.warc.wet.gz": "wet", "x.csv": None, "x": None, "x.gz": None}
    assert {name: format_of(name) for name in names} == names
    for nothing in (f"{tmp_path}/*.parquet", str(tmp_path / "none.jsonl")):
        with pytest.raises(FileNotFoundError, match="expected files to read"):
            expand(nothing)
    with pytest.raises(FileNotFoundError, match="x.csv: expected files to read .*, found .*/x.csv"):
        expand(str(tmp_path / "x.csv"))
    with pytest.raises(ValueError, match="x.csv: expected a file of a known format"):
        list(read_file(str(tmp_path / "x.csv"), "s"))
    for empty in ("", "?text=content"):  # which would be the current directory
        with pytest.raises(FileNotFoundError, match="expected a path, a pattern or a directory"):
            expand(empty)


def test_hidden_files_are_left_out_unless_they_are_spelt(tmp_path):
    for name in ("a.txt", "._a.txt", ".git/description.txt", "b/.c/d.txt", "b/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    for reader in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/**/*.txt", f"file://{tmp_path}", f"file://{tmp_path}/**/*.txt"):
        assert [Path(name).name for name in expand(reader)] == ["a.txt", "e.txt"], reader
    for reader in (f"{tmp_path}/.git", f"{tmp_path}/.git/*.txt", f"{tmp_path}/.git/description.txt", f"file://{tmp_path}/.git"):
        assert [Path(name).name for name in expand(reader)] == ["description.txt"], reader


def test_storage_that_cannot_be_asked_is_told_in_one_line(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    for error in (ImportError("Install s3fs to access S3"), RuntimeError("no route\nto host")):
        def failing(address, error=error):
            raise error

        monkeypatch.setattr(fsspec.core, "url_to_fs", failing)
        for ask in (expand, file_facts):
            said = " ".join(str(error).split())
            with pytest.raises(StorageError, match=f"^s3://b/x.jsonl: .*{type(error).__name__}: {said}"):
                ask("s3://b/x.jsonl")


def test_paths_of_any_file_system():
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe({"/crawl/1.jsonl.gz": gzip.compress(LINES), "/crawl/2.jsonl": LINES, "/crawl/readme.pdf": b""})
    try:
        paths = expand("memory://crawl")
        assert [Path(path).name for path in paths] == ["1.jsonl.gz", "2.jsonl"] and expand("memory://crawl/*.gz") == paths[:1]
        for path in paths:
            check(path)
    finally:
        memory.rm("/crawl", recursive=True)


def tfds_folder(directory: Path, examples: int) -> Path:
    """What TFDS writes beside the records of its data set `tiny_text`."""
    folder = directory / "tiny_text" / "1.0.0"
    folder.mkdir(parents=True)
    text = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
    kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    features = {"pythonClassName": kind, "featuresDict": {"features": dict.fromkeys(("id", "text", "url"), text)}}
    train = {"name": "train", "numBytes": "10", "shardLengths": [str(examples)]}
    train["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "tiny_text", "version": "1.0.0", "fileFormat": "array_record", "splits": [train]}
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "joined.jsonl").write_bytes(b'{"text": "a"}\n\n{"text": "b"}\r\n \t\r\n{"text": 3}\n\n')
    first, second, bad = read_file(str(tmp_path / "joined.jsonl"), "s")
    assert (first.text, second.text, bad.where) == ("a", "b", f"{tmp_path / 'joined.jsonl'}:5")


@pytest.mark.parametrize("group", [1, 64, 65536])
def test_packed_groups_of_an_array_record_are_unpacked_once(tmp_path, monkeypatch, group):
    """Writers pack up to 65,536 records in a group: unpacked for each of them, the cost of a file was its square."""
    from array_record.python import array_record_module

    rows = [{"id": str(i), "text": f"document {i}"} for i in range(1000)]
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "x.array_record"), f"group_size:{group}")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()

    class Reader(array_record_module.ArrayRecordReader):
        def read(self, start, stop):  # unpacks each group that holds one of the records
            unpacked.update(range(start // group, (stop - 1) // group + 1))
            return super().read(start, stop)

    unpacked = Counter()
    monkeypatch.setattr(array_record_module, "ArrayRecordReader", Reader)
    found = documents(tmp_path / "x.array_record")
    assert [(d.id, d.text) for d in found] == [(row["id"], row["text"]) for row in rows]
    assert unpacked == Counter(range(-(-len(rows) // group)))


def test_tfds(tmp_path, monkeypatch):
    """A data set written as TFDS writes it, read back by name; TensorFlow is not needed."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tfds_folder(tmp_path, len(ROWS))
    writer = ArrayRecordWriter(str(folder / "tiny_text-train.array_record-00000-of-00001"), "group_size:1")
    for row in ROWS:
        writer.write(example(row))
    writer.close()
    name = f"tfds://tiny_text:1.0.0?split=train&dir={tmp_path}"
    found = documents(name)
    assert [(d.text, d.id, d.url) for d in found] == [(row["text"], row["id"], row["url"]) for row in ROWS]
    # So a block list holds for them too.
    (step,) = make_steps(["privacy"], CleanConfig())
    monkeypatch.setattr(tfds, "_examples", lambda _: ([
        {"text": b"one", "url": b"https://www.spokeo.com/x"}, {"text": b"\xff"},
        {"text": b"two", "metadata": {"url": b"http://spokeo.com", "scores": np.array([0.5]), "tags": [b"a"]}},
    ], "text"))  # fmt: skip
    one, bad, two = read_file(name, "s")
    assert step(one).rule == step(two).rule == "blocked_site" and bad == BadRow(f"{name}:2", "not UTF-8 (byte 0)")
    assert two.metadata == {"url": "http://spokeo.com", "scores": [0.5], "tags": ["a"]}


def test_an_address_in_the_metadata_is_one(tmp_path):
    """As Dolma has it."""
    rows = [{"text": "a", "metadata": {"url": "b.org"}}, {"text": "a", "url": "c.org", "metadata": {"url": "d.org"}}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert [d.url for d in documents(tmp_path / "x.jsonl")] == ["b.org", "c.org"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "malformed JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"txt": "a"}', "text: expected a string, got None"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "a\\ud800"}', "text: an escape"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path, line, problem):
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES + line + b"\n" + LINES)
    rows = list(read_file(str(path), "s"))
    assert len(rows) == 11 and sum(isinstance(row, Document) for row in rows) == 10
    assert rows[5].where == f"{path}:6" and rows[5].problem.startswith(problem)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.xz", "x.parquet", "x.array_record", "x.warc.gz", "x.tfrecord"])
def test_a_file_of_noise_is_one_bad_row(tmp_path, name):
    for package in {"x.parquet": ["pyarrow"], "x.warc.gz": ["warcio", "resiliparse"]}.get(name, []):
        pytest.importorskip(package)
    path = tmp_path / name
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    (row,) = read_file(str(path), "s")
    assert isinstance(row, BadRow) and row.where.startswith(str(path))


def test_what_a_row_says_of_itself_in_other_forms(tmp_path):
    """As a string of JSON, as another value, as a map of Parquet; and an address that is none keeps its text."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    forms = [('{"k": 1}', {"k": 1}), ("Dickens", {"metadata": "Dickens"}), ([1], {"metadata": [1]}), ("", {}), (None, {}),
             ({"module": 3}, {"module": 3})]  # fmt: skip
    write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "metadata": form} for form, _ in forms])
    assert [d.metadata for d in documents(tmp_path / "x.jsonl")] == [found for _, found in forms]
    maps = pyarrow.array([[("k", "1"), ("url", "b.org")], None], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "metadata": maps}), tmp_path / "x.parquet")
    one, two = documents(tmp_path / "x.parquet")
    assert (one.metadata, one.url, two.metadata) == ({"k": "1", "url": "b.org"}, "b.org", {})
    addresses = ["http://[broken/x", "http://[www.example.com]/", "http://ex\u2100ample.com/"]
    write_jsonl(tmp_path / "y.jsonl", [{"text": "a", "url": url} for url in addresses])
    found = documents(tmp_path / "y.jsonl")
    assert [d.url for d in found] == addresses and {host_of(d.url) for d in found} == {""}
    hosts = {"b.org/x//y": "b.org", "HTTP://U:p@C.org:80/": "c.org", "//d.org": "d.org", "": ""}
    assert {url: host_of(url) for url in hosts} == hosts


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_file_is_unpacked_by_its_content_whatever_its_name(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(LINES))
    check(tmp_path / name)
    assert most_text(str(tmp_path / name)) is None  # its size says nothing of its text
    (tmp_path / "x.txt").write_text("BZh9 is how some texts begin")
    assert documents(tmp_path / "x.txt")[0].text.startswith("BZh9")


def test_what_is_no_json_lines_is_told_so(tmp_path):
    (tmp_path / "array.json").write_text(json.dumps(ROWS))
    (tmp_path / "pretty.json").write_text(json.dumps(ROWS[0], indent=1))
    (array,) = read_file(str(tmp_path / "array.json"), "s")
    assert array.problem == "expected a JSON object, got list (each line of a file is read as one object: JSON Lines)"
    first, second, *_ = read_file(str(tmp_path / "pretty.json"), "s")
    assert first.problem.startswith("malformed JSON") and first.problem.endswith("JSON Lines)") and ": J" not in second.problem


PAGE = b"<html><body><p>" + b"A page of words, as it was before it was packed. " * 9 + b"</p></body></html>"


def brotli(body: bytes) -> bytes:
    return pytest.importorskip("brotli").compress(body)


def zstd(body: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(body)


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        ("gzip", gzip.compress), ("x-gzip", gzip.compress),
        ("GZIP", lambda body: gzip.compress(body[:9]) + gzip.compress(body[9:])),
        ("deflate", zlib.compress), ("deflate", lambda body: zlib.compress(body)[2:-4]), ("br", brotli), ("zstd", zstd),
        ("gzip, br", lambda body: brotli(gzip.compress(body))), ("gzip, br", gzip.compress),
        *((coding, bytes) for coding in ("", "identity", "gzip", "br", "zstd", "utf-8")),  # what is said is not always done
    ],
)  # fmt: skip
def test_pages_come_unpacked(coding, pack):
    assert unpacked(pack(PAGE), coding) == PAGE


def test_a_page_that_cannot_be_unpacked_is_one_bad_row(tmp_path):
    pytest.importorskip("warcio")
    pytest.importorskip("resiliparse")
    import io

    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    noise, packed = np.random.default_rng(0).bytes(300), gzip.compress(PAGE)
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed)
    bodies = [
        ("gzip", packed, {}), ("br", noise, {}), ("compress", noise, {}), ("x-gzip", packed, {}),
        ("gzip", chunks, {"Transfer-Encoding": "chunked"}),
    ]  # fmt: skip
    with open(tmp_path / "x.warc", "wb") as file:
        writer = WARCWriter(file, gzip=False)
        for coding, body, more in bodies:
            headers = [("Content-Type", "text/html"), ("Content-Encoding", coding), *more.items()]
            response = StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1")
            record = writer.create_warc_record("http://u/", "response", payload=io.BytesIO(body), http_headers=response)
            writer.write_record(record)
    one, br, compress, two, three = read_file(str(tmp_path / "x.warc"), "s")
    assert one.text == two.text == three.text == PAGE.decode() and br.where == f"{tmp_path}/x.warc:2"
    assert "that fit the body, got 'br'" in br.problem and "got 'compress'" in compress.problem and not br.rest


def test_a_torn_file_gives_what_comes_before(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    noise = np.random.default_rng(0)
    many = b"".join(json.dumps({"text": f"row {i} {noise.bytes(20).hex()}"}).encode() + b"\n" for i in range(500))
    path.write_bytes(gzip.compress(many)[:-500])
    *rows, last = read_file(str(path), "s")
    assert len(rows) > 100 and all(isinstance(row, Document) for row in rows)
    assert isinstance(last, BadRow) and "cannot be read beyond this" in last.problem


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"url": "http://x.org/\ud800"}, "surrogates not allowed"),
        ({"id": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_what_cannot_be_written_again_is_a_bad_row(tmp_path, row, problem):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "one", **row}) + '\n{"text": "two"}\n')
    bad, good = read_file(str(tmp_path / "x.jsonl"), "s")
    assert bad.where == f"{tmp_path}/x.jsonl:1" and problem in bad.problem and good.text == "two"


def test_dates_of_parquet_are_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "one", "metadata": {"when": datetime.datetime(2026, 1, 2)}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert documents(tmp_path / "x.parquet")[0].metadata == {"when": "2026-01-02 00:00:00"}


def test_metadata_that_is_no_number_is_none(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "one", "metadata": {"score": float("nan"), "all": [1.5, float("-inf")]}}]
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[0]) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        assert documents(tmp_path / name)[0].metadata == {"score": None, "all": [1.5, None]}


def test_a_path_names_the_field_of_the_text(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"content": row["text"], "id": row["id"]} for row in ROWS]
    write_jsonl(tmp_path / "1.jsonl.gz", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "2.parquet")
    paths = expand(f"{tmp_path}/?.*?text=content")  # the first question mark is a pattern's
    assert paths == [f"{tmp_path}/1.jsonl.gz?text=content", f"{tmp_path}/2.parquet?text=content"]
    for path in (*paths, *expand(f"file://{tmp_path}?text=content")):
        assert [(d.text, d.id) for d in documents(path)] == [(row["text"], row["id"]) for row in ROWS]
    first = next(read_file(f"{tmp_path}/1.jsonl.gz", "s"))
    assert first.problem == "text: expected a string, got None (there are 'content', 'id'; a path may end in ?text=name)"
    (whole,) = read_file(f"{tmp_path}/2.parquet", "s")
    assert whole.rest and "no column 'text' among 'content', 'id'; a path may end in ?text=name" in whole.problem


def test_zstd_of_the_longest_windows(tmp_path):
    pytest.importorskip("zstandard")
    # A frame of one uncompressed block by hand, as `zstd --long=31` would ask for 2 GB here: window 2^(10 + 21), last block.
    block = (1 | len(LINES) << 3).to_bytes(3, "little") + LINES
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes([0, 21 << 3]) + block)
    check(tmp_path / "x.jsonl.zst")


def test_zstd_reads_all_frames_and_names_damage(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text = "".join(f"line {i} of a long text\n" for i in range(200_000))
    half = len(text) // 2
    frames = b"".join(zstandard.compress(part.encode()) for part in (text[:half], text[half:]))
    path = tmp_path / "x.txt.zst"
    path.write_bytes(frames)
    assert documents(path)[0].text == text
    for damaged in (frames[:-20], frames[:-20] + b"not of a frame" * 2, b"not zstd at all"):
        path.write_bytes(damaged)
        (row,) = read_file(str(path), "s")
        assert isinstance(row, BadRow) and row.where == f"{path}:0" and "cannot be read" in row.problem


def test_array_records_of_any_file_system(tmp_path):
    pytest.importorskip("fsspec")
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"))
    writer.write(b'{"text": "one"}')
    writer.close()
    assert [d.text for d in documents(f"file://{tmp_path}/x.array_record")] == ["one"]
