"""Documents to token blocks (paper section 2.1): duplicates, split, blocks, manifest. (The command: test_corpus.py.)"""

import dataclasses
import itertools
import json
import lzma
import random
import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from llama_jax import train
from llama_jax.corpus_build import manifest as manifests
from llama_jax.corpus_build.blocks import token_blocks, write_blocks
from llama_jax.corpus_build.build import Settings, build_corpus
from llama_jax.corpus_build.compress import bits_per_byte_of_xz
from llama_jax.corpus_build.dedup import content_hash, drop_duplicates
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.manifest import CorpusError, check_manifest, read_manifest
from llama_jax.corpus_build.mixture import plan, table
from llama_jax.corpus_build.near_duplicates import NearDuplicates
from llama_jax.corpus_build.refine import Deduplication, HeldOut
from llama_jax.corpus_build.split import is_held_out, lines_seen, split
from llama_jax.data.blocks import block_ids
from llama_jax.data.loader import BlockSource, block_batch
from llama_jax.data.sources import read_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.model.config import SIZES
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.pretrain import stage
from llama_jax.steps import change, load_config
from tests.small_runs import MODEL, ROOT

WORDS = "the model reads one line of text after another and counts 42 tokens in every naïve loop it finds".split()
VOCABULARY = ["".join(parts) for parts in itertools.product(("ba", "ke", "li", "mo", "nu"), repeat=5)]


def text(i: int, length: int = 60) -> str:
    return f"number {i}: " + " ".join(random.Random(i).choices(WORDS, k=length)) + "\n\treturn None\n"


def docs(source: str, numbers, **metadata) -> list[Document]:
    return [Document(f"{source}/{i}", text(i), source, metadata=metadata) for i in numbers]


def corpus_documents() -> dict[str, list[Document]]:
    # The two sources share twenty texts, and `notes` repeats five of its own.
    return {"books": docs("books", range(80)), "notes": docs("notes", [*range(60, 110), *range(100, 105)])}


def build(output, documents=None, *, config=None, fraction=0.1, minimum=0, maximum=10**6, **changes):
    settings = Settings(**{
        "vocab_size": 400, "block_length": 32, "weights": {"books": 1.0, "notes": 3.0},
        "held_out": HeldOut(fraction, minimum, maximum), **changes,
    })  # fmt: skip
    return build_corpus(corpus_documents() if documents is None else documents, output, settings, config=config)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "built"
    build(output, config={"name": "test"}, total_tokens=40_000)
    return output


@pytest.fixture(scope="module")
def tokenizer(built) -> Tokenizer:
    return Tokenizer(built / "tokenizer.model")


# Duplicates


def test_the_first_copy_in_the_order_of_the_sources_stays():
    documents = {
        "b": [Document("b1", "one  two\n", "b"), Document("b2", "three", "b"), Document("b3", "three\r\n", "b")],
        "a": [Document("a1", "\tone\n two", "a"), Document("a2", "One two", "a")],
    }
    kept, dropped = drop_duplicates(documents)
    assert {source: [d.id for d in of_source] for source, of_source in kept.items()} == {"b": ["b1", "b2"], "a": ["a2"]}
    assert dropped == {"b": 1, "a": 1} and list(kept) == ["b", "a"]
    kept, dropped = drop_duplicates(dict(reversed(documents.items())))
    assert [d.id for d in kept["b"]] == ["b2"] and dropped == {"a": 0, "b": 2}


@pytest.mark.parametrize(("bad", "message"), [(" \n", "expected a text, got white space only"), ("a\ud800", "lone surrogate")])
def test_a_document_without_text_is_named(bad, message):
    with pytest.raises(ValueError, match=f"source 's': document 'x': .*{message}"):
        drop_duplicates({"s": [Document("x", bad, "s")]})


# Split


def test_the_side_of_a_text_depends_on_nothing_but_the_text():
    documents = docs("s", range(1000))
    whole = split({"s": documents}, fraction=0.1)["s"]
    assert 70 < len(whole.held_out) < 130 and not whole.withheld
    assert whole.train == [d for d in documents if not is_held_out(d.text, 0.1)]
    few = split({"other": [], "s": documents[500:][::-1]}, fraction=0.1)["s"]
    assert {d.id for d in few.held_out} == {d.id for d in whole.held_out} & {d.id for d in documents[500:]}
    assert {d.id for d in whole.held_out} < {d.id for d in split({"s": documents}, fraction=0.2)["s"].held_out}
    assert is_held_out(text(3), 0.1) == is_held_out(text(3).replace(" ", "\n  "), 0.1)  # copies stay together


def test_no_group_stands_on_both_sides():
    modules = [f"m{i}" for i in range(40)]
    documents = {
        source: [Document(f"{m}{k}", f"{source} {k} of {m}", source, metadata={"module": m}) for m in modules for k in range(3)]
        for source in ("docs", "code")
    }
    parts = split(documents, fraction=0.05, group_field="module")
    held_out = {d.metadata["module"] for part in parts.values() for d in part.held_out}
    assert held_out and not held_out & {d.metadata["module"] for part in parts.values() for d in part.train}
    for source, part in parts.items():
        everything = [*part.train, *part.held_out, *part.withheld]
        assert sorted(d.id for d in everything) == sorted(d.id for d in documents[source])
        assert {d.metadata["module"] for d in part.withheld} <= held_out


def test_a_small_source_holds_out_more_and_a_large_one_evaluates_less():
    documents = docs("s", range(300))
    size = {d.id: len(d.text.encode()) for d in documents}
    whole = sum(size.values())
    more = split({"s": documents}, fraction=0.01, minimum_bytes=whole // 10)["s"]
    assert whole // 10 <= sum(size[d.id] for d in more.held_out) < whole // 10 + max(size.values())
    most = split({"s": documents}, fraction=0.01, minimum_bytes=whole)["s"]
    assert sum(size[d.id] for d in most.held_out) < 0.2 * whole + max(size.values())
    less = split({"s": documents}, fraction=0.3, maximum_bytes=2000)["s"]
    assert 1500 < sum(size[d.id] for d in less.held_out) <= 2000
    hidden = {d.id for d in less.held_out + less.withheld}
    assert hidden == {d.id for d in documents if is_held_out(d.text, 0.3)} and not hidden & {d.id for d in less.train}


def test_lines_seen_measures_what_leaks():
    shared, own = "this line of more than forty characters stands twice", "and this one, as long, in a single document only"
    documents = [Document(str(i), f"{own} {i}\n  {shared}\nshort", "s") for i in range(200)]
    assert lines_seen(split({"s": documents}, fraction=0.1)) == {"s": 0.5}


# Blocks


@pytest.mark.parametrize("block_length", [1, 4, 7, 1000])
def test_every_transition_is_a_target_exactly_once(block_length):
    rng = np.random.default_rng(0)
    ids = iter(range(10**6))
    documents = [list(itertools.islice(ids, n)) for n in rng.integers(1, 20, size=30)]
    joined = [i for document in documents for i in document]
    blocks = list(token_blocks(documents, block_length))
    assert [pair for block in blocks for pair in itertools.pairwise(block)] == list(itertools.pairwise(joined))
    assert all(len(block) == block_length + 1 for block in blocks[:-1]) and 2 <= len(blocks[-1]) <= block_length + 1


def test_blocks_of_nothing():
    assert list(token_blocks([], 4)) == list(token_blocks([[1]], 4)) == []
    assert list(token_blocks([[1], [2]], 4)) == [[1, 2]]
    with pytest.raises(ValueError, match="block_length: expected at least 1, got 0"):
        list(token_blocks([[1, 2]], 0))


def targets_of(path: Path) -> list[tuple[int, int]]:
    """(token, target) pairs of a shard with weight 1, as the loader gives them."""
    batch = block_batch(BlockSource({"x": [path]}, {"x": 1.0}, 4, 0)._records["x"], 32)
    real = batch.weights > 0
    return list(zip(batch.tokens[real].tolist(), batch.targets[real].tolist(), strict=True))


def test_written_blocks_give_the_loader_every_target_once(tokenizer, tmp_path):
    texts = [text(i) for i in range(8)]
    counts = write_blocks(texts, tmp_path / "x.array_record", tokenizer=tokenizer, block_length=32)
    joined = [i for t in texts for i in tokenizer.encode(t, bos=True, eos=True)]
    assert targets_of(tmp_path / "x.array_record") == list(itertools.pairwise(joined))
    assert dataclasses.asdict(counts) == {
        "documents": 8, "tokens": len(joined), "targets": len(joined) - 1, "blocks": -(-(len(joined) - 1) // 32)
    }  # fmt: skip


# The whole build


def test_nothing_is_lost_and_nothing_leaks(built, tokenizer):
    sources = read_manifest(built)["sources"]
    assert list(sources) == ["books", "notes"]
    assert [(s["documents_read"], s["duplicates"]) for s in sources.values()] == [(80, 0), (55, 25)]
    train_text = {}
    for name, numbers in (("books", range(80)), ("notes", range(80, 110))):
        counts = sources[name]
        assert counts["documents_read"] == sum(
            counts[k] for k in ("duplicates", "documents", "held_out_documents", "withheld_documents")
        )
        train = sorted((text(i) for i in numbers if not is_held_out(text(i), 0.1)), key=content_hash)
        train_text[name] = train
        for folder, texts, prefix in (
            ("blocks", train, ""),
            ("held_out", [row["text"] for _, row in read_jsonl(built / "held_out" / f"{name}.jsonl")], "held_out_"),
        ):
            ids = [i for t in texts for i in tokenizer.encode(t, bos=True, eos=True)]
            assert targets_of(built / folder / f"{name}.array_record") == list(itertools.pairwise(ids))
            assert counts[f"{prefix}tokens"] == len(ids) and counts[f"{prefix}documents"] == len(texts)
            assert counts[f"{prefix}bytes"] == sum(len(t.encode()) for t in texts)
        assert sorted([*train, *texts]) == sorted(text(i) for i in numbers)  # texts: the held-out ones
        assert all(is_held_out(t, 0.1) for t in texts)
    assert counts["held_out_lines_seen"] == 0


def test_no_held_out_document_has_a_near_duplicate_to_train_on(tmp_path):
    """Three sorts of copies: of whole documents with small changes, of paragraphs, and of a paragraph among the held out."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(VOCABULARY, k=count))

    originals = [[words(60) for _ in range(4)] for _ in range(120)]
    documents = {
        "books": [Document(f"b{i}", "\n\n".join(parts) + "\n", "books") for i, parts in enumerate(originals)],
        "notes": [Document(f"n{i}", "\n\n".join(parts) + f" {words(3)}\n", "notes") for i, parts in enumerate(originals[:40])]
        + [Document(f"m{i}", f"{words(60)}\n\n{parts[1]}\n\n{words(200)}\n", "notes") for i, parts in enumerate(originals)],
    }
    full = Deduplication(near=NearDuplicates(), leak_ngram=13, repeated_paragraph=80)
    for deduplication, leaks in ((Deduplication(), True), (full, False)):
        name = f"leaks-{leaks}"
        counts = build(tmp_path / name, documents, deduplication=deduplication)["sources"]
        assert (counts["books"]["held_out_lines_seen"] > 0.2) == leaks
        assert (counts["notes"]["held_out_lines_seen"] > 0.2) == leaks
        for row in counts.values():
            gone = sum(row[kind] for kind in ("duplicates", "near_duplicates", "leaks", "repeats", "withheld_documents"))
            assert row["documents_read"] == gone + row["documents"] + row["held_out_documents"]
    assert counts["notes"]["near_duplicates"] == 40 and counts["notes"]["repeats_paragraphs"] > 80
    assert counts["books"]["held_out_lines_seen"] == counts["notes"]["held_out_lines_seen"] == 0


def test_the_manifest_says_what_the_corpus_is(built, tokenizer):
    manifest = check_manifest(built, tokenizer)
    assert manifest["tokenizer"] == tokenizer.fingerprint and manifest["config"] == {"name": "test"}
    assert (manifest["vocab_size"], manifest["block_length"]) == (400, 32) == (tokenizer.vocab_size, 32)
    on_disk = {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk and len(on_disk) == 10
    assert [s["share"] for s in manifest["sources"].values()] == [0.25, 0.75]
    assert [s["planned_tokens"] for s in manifest["sources"].values()] == [10_000, 30_000]
    for source in manifest["sources"].values():
        assert source["epochs"] == pytest.approx(source["planned_tokens"] / source["tokens"])


def test_tfds_reads_the_blocks(built, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    build(tmp_path / "sharded", shards=3)
    for directory in (built, tmp_path / "sharded"):
        sources = read_manifest(directory)["sources"]
        builder = tfds.builder_from_directory(str(directory / "blocks"))
        for name, counts in sources.items():
            examples = builder.as_data_source(name)
            assert len(examples) == counts["blocks"] == sum(counts["shards"].values())
            rows = [np.asarray(example["tokens"])[: example["length"]].tolist() for example in examples]
            assert sum(len(row) - 1 for row in rows) == counts["targets"]
            files = [directory / shard for shard in counts["shards"]]
            blocks = BlockSource({name: files}, {name: 1.0}, 1, 0)._records[name]
            assert rows == [block_ids(blocks[i]).tolist() for i in range(len(blocks))]


def test_shards_hold_every_document_once_and_their_number_changes_no_decision(built, tokenizer, tmp_path):
    many = build(tmp_path / "many", shards=40, tokenizer_path=str(tokenizer.path))["sources"]
    for name, counts in read_manifest(built)["sources"].items():
        assert len(many[name]["shards"]) == 40 and 0 in many[name]["shards"].values()  # some hold nothing
        assert many[name]["targets"] == counts["tokens"] - sum(blocks > 0 for blocks in many[name]["shards"].values())
        assert {k: counts[k] for k in ("documents", "tokens", "bytes", "held_out_tokens")} == {
            k: many[name][k] for k in ("documents", "tokens", "bytes", "held_out_tokens")
        }
        files = [tmp_path / "many" / shard for shard in many[name]["shards"]]
        source = BlockSource({name: files}, {name: 1.0}, 4, 0)
        assert source.num_blocks == {name: many[name]["blocks"]} and source.batch(0).tokens.shape == (4, 32)


def test_two_builds_are_the_same_bytes(built, tmp_path):
    documents = {name: of_source[::-1] for name, of_source in corpus_documents().items()}  # the order of reading is nothing
    build(tmp_path / "again", documents, config={"name": "test"}, total_tokens=40_000)
    for path in built.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(built)).read_bytes() == path.read_bytes()


def test_a_given_tokenizer_is_used(built, tokenizer, tmp_path):
    books = {"books": docs("books", range(80))}
    manifest = build(tmp_path / "given", books, weights={"books": 1.0}, tokenizer_path=tokenizer.path)
    assert manifest["tokenizer"] == tokenizer.fingerprint
    with pytest.raises(ValueError, match="vocab_size: expected the 400 of .*tokenizer.model, got 500"):
        build(tmp_path / "wrong", tokenizer_path=tokenizer.path, vocab_size=500)
    assert [p.name for p in tmp_path.iterdir()] == ["given"]


class Interrupted(BaseException):
    """As a Ctrl-C: no Exception."""


def interrupted_documents():
    yield from docs("books", range(80))
    raise Interrupted


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        build(tmp_path / "out", {"books": interrupted_documents(), "notes": []})
    with pytest.raises(ValueError, match="9999 pieces are too many"):
        build(tmp_path / "out", vocab_size=9999)

    def no_space(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("llama_jax.corpus_build.write.write_manifest", no_space)
        build(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    # What a killed build left behind is in nobody's way.
    (tmp_path / ".out.unfinished" / "blocks").mkdir(parents=True)
    build(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"books": 1.0}}, r"weights: expected one for each of \['books', 'notes'\], got \['books'\]"),
        ({"weights": {"books": 1.0, "notes": 0.0}}, r"weights\['notes'\]: expected a positive share, got 0.0"),
        ({"weights": {"books": 1.0, "notes": float("nan")}}, r"weights\['notes'\]: expected a positive share, got nan"),
        ({"fraction": 0.0}, "held_out_fraction: expected a number between 0 and 1, got 0.0"),
        ({"minimum": 5, "maximum": 4}, r"held_out_minimum: expected 0 to held_out_maximum \(4\), got 5"),
        ({"documents": {}, "weights": {}}, "weights: expected at least one source"),
        ({"documents": {"../x": []}, "weights": {"../x": 1.0}}, r"source '../x': expected letters"),
        ({"documents": {"books": [], "notes": []}}, "source 'books': 0 documents leave 0 to train on and 0 held out"),
        ({"maximum": 10}, r"'books': 80 documents leave \d+ to train on and 0 held out; .* \(held_out_maximum is 10 bytes\)"),
    ],
)
def test_a_corpus_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 0), ("block_length", 0), ("tokenizer_bytes", 0), ("shards", 0), ("total_tokens", -5),
     ("max_bad_rows", -1), ("analysed_share", 0.0), ("analysed_share", 1.5)],
)  # fmt: skip
def test_settings_are_refused_before_a_document_is_read(field, value):
    settings = {"vocab_size": 300, "block_length": 8, "held_out": HeldOut(0.1, 0, 10), "weights": {"a": 1.0}}
    with pytest.raises(ValueError, match=f"^{field}: expected .* got {value}"):
        Settings(**settings | {field: value})


def test_a_corpus_is_never_changed_in_place(built):
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    with pytest.raises(FileExistsError, match="exists; a corpus is never changed in place"):
        build(built)
    assert {p: p.stat().st_mtime_ns for p in built.rglob("*")} == before


# Manifest


def test_the_manifest_refuses_damage_and_other_tokenizers(built, tokenizer, tmp_path):
    other = train_tokenizer([text(i) for i in range(9)], tmp_path / "other.model", vocab_size=320)
    with pytest.raises(CorpusError, match=f"made with tokenizer {tokenizer.fingerprint[:12]}, .*other.model is"):
        check_manifest(built, other)

    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    shard = copy / "blocks" / "books.array_record"
    whole = bytearray(shard.read_bytes())
    flipped = whole.copy()
    flipped[len(flipped) // 2] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(CorpusError, match="blocks/books.array_record: damaged, its sha256"):
        check_manifest(copy, tokenizer)
    check_manifest(copy, tokenizer, checksums=False)
    shard.write_bytes(whole[:-1])
    with pytest.raises(CorpusError, match="books.array_record: damaged, expected .* bytes, got"):
        check_manifest(copy, tokenizer, checksums=False)
    shard.unlink()
    with pytest.raises(CorpusError, match="books.array_record: expected a shard of the corpus, found nothing"):
        check_manifest(copy, tokenizer)

    manifest = copy / "manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({k: v for k, v in fields.items() if k != "files"}))
    with pytest.raises(CorpusError, match="manifest.json: files: missing"):
        read_manifest(copy)
    manifest.write_text("{")
    with pytest.raises(CorpusError, match="manifest.json: damaged, not JSON"):
        read_manifest(copy)
    for nothing in (tmp_path / "none", manifest):
        with pytest.raises(CorpusError, match="expected a corpus written by llama_jax.corpus, found nothing"):
            read_manifest(nothing)


def test_the_trainer_refuses_a_corpus_of_another_tokenizer(built, tmp_path, monkeypatch):
    """By the command's own way, with a tokenizer of as many pieces: nothing but its fingerprint is another one."""
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(MODEL, vocab_size=400))
    monkeypatch.setattr(stage, "BlockSource", reached := Mock(side_effect=Interrupted))
    other = train_tokenizer([text(i) for i in range(200, 320)], tmp_path / "other.model", vocab_size=400)
    config = load_config(ROOT / "configs", "pretrain.py:tiny")
    change(config, {"data": {"corpus": str(built)}, "tokenizer": str(other.path)}, where="pretrain")
    fingerprint = Tokenizer(built / "tokenizer.model").fingerprint
    with pytest.raises(CorpusError, match=f"{built}: .* made with tokenizer {fingerprint[:12]}, .*other.model is "):
        train.run(config, tmp_path / "run")
    assert not reached.called and not (tmp_path / "run" / "checkpoints").exists()
    change(config, {"tokenizer": str(built / "tokenizer.model")}, where="pretrain")
    with pytest.raises(Interrupted):  # with its own it is read
        train.run(config, tmp_path / "run")


@pytest.mark.parametrize("host", [0, 1])
def test_one_host_alone_reads_a_corpus_to_its_end_when_a_run_starts(built, monkeypatch, host):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(MODEL, vocab_size=400))
    monkeypatch.setattr(stage, "process_share", Mock(side_effect=Interrupted))
    monkeypatch.setattr(manifests, "file_sha256", read := Mock(side_effect=manifests.file_sha256))
    monkeypatch.setattr(jax, "process_index", lambda: host)
    config = load_config(ROOT / "configs", "pretrain.py:tiny")
    change(config, {"data": {"corpus": str(built)}, "tokenizer": str(built / "tokenizer.model")}, where="pretrain")
    with pytest.raises(Interrupted):
        stage.make_stage(train.parse_stage(config), None, built)
    assert bool(read.call_count) == (host == 0)


def test_what_pretraining_measures_and_its_schedule_are_looked_at_before_weights_are_read(built, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(MODEL, vocab_size=400))
    monkeypatch.setattr(stage, "begin", begun := Mock(side_effect=Interrupted))
    shutil.copytree(built, tmp_path / "corpus")
    config = load_config(ROOT / "configs", "pretrain.py:tiny")
    change(config, {
        "data": {"corpus": str(tmp_path / "corpus")}, "tokenizer": str(built / "tokenizer.model"), "loop": {"steps": 20},
        "optim": {"warmup": 20},
    }, where="pretrain")  # fmt: skip
    mesh = make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="optim.warmup=20 leaves nothing of loop.steps=20"):
        stage.make_stage(train.parse_stage(config), mesh, tmp_path)
    held_out = tmp_path / "corpus" / "held_out" / "books.jsonl"
    held_out.write_bytes(b"x" * held_out.stat().st_size)
    change(config, {"optim": {"warmup": 1}}, where="pretrain")
    monkeypatch.setattr(stage, "is_quickly_read", lambda corpus: False)
    with pytest.raises(ValueError, match="books.jsonl:1: malformed JSON"):
        stage.make_stage(train.parse_stage(config), mesh, tmp_path)
    assert not begun.called


def test_the_mixture_table_by_hand():
    shares = plan({"a": 1, "b": 3}, {"a": 10, "b": 20}, {"a": 500, "b": 3000}, total_tokens=4000)
    assert [(s.share, s.planned_tokens, s.epochs) for s in shares] == [(0.25, 1000, 2.0), (0.75, 3000, 1.0)]
    assert [line.split() for line in table(shares).split("\n")] == [
        ["source", "documents", "MB", "tokens", "share", "planned", "epochs"],
        ["a", "10", "0.0", "500", "25.0%", "1,000", "2.00"],
        ["b", "20", "0.0", "3,000", "75.0%", "3,000", "1.00"],
    ]


def test_xz_is_the_xz_of_the_command_line():
    texts = [text(i) for i in range(40)]
    data = "".join(texts).encode()
    bits = bits_per_byte_of_xz(iter(texts))
    assert 0.5 < bits < 4 and bits == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    if shutil.which("xz"):
        packed = subprocess.run(["xz", "-9e", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout
        assert bits == pytest.approx(8 * len(packed) / len(data), rel=0.01)  # headers differ by some bytes
    with pytest.raises(ValueError, match="texts: expected at least one byte"):
        bits_per_byte_of_xz([""])
