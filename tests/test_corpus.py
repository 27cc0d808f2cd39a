"""`python -m llama_jax.corpus` (paper section 2.1): what it builds, once, and what it refuses before a document is read."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from configs.corpus import get_config
from llama_jax import corpus
from llama_jax.config import ConfigError, parse
from llama_jax.corpus_build.manifest import CorpusError, check_manifest, read_manifest
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.data.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[1]


WORDS = "the model reads every naïve loop of a line and counts 42 tokens in it or returns no key when two lists meet".split()


def text(i: int) -> str:
    return f"number {i}: " + " ".join(random.Random(i).choices(WORDS, k=30 + i % 20)) + "\n"


def config_of(path: Path, **changes) -> corpus.CorpusConfig:
    config = get_config("jsonl")
    config.sources.web.reader = str(path)
    config.update({"vocab_size": 360, "block_length": 32, "held_out_fraction": 0.1, "total_tokens": 10_000, **changes})
    return parse(corpus.CorpusConfig, config)


@pytest.fixture
def web(tmp_path) -> Path:
    path = tmp_path / "web.jsonl.gz"
    write_jsonl(path, ({"id": i, "text": text(i), "url": f"u{i}"} if i % 2 else {"text": text(i)} for i in range(90)))
    return path


def test_the_command_builds_a_corpus_of_a_jsonl_file(web, tmp_path):
    command = [
        sys.executable, "-m", "llama_jax.corpus", "--config=configs/corpus.py:jsonl", f"--config.sources.web.reader={web}",
        "--config.vocab_size=360", "--config.block_length=32", "--config.held_out_fraction=0.1", "--config.total_tokens=10000",
        f"--output={tmp_path / 'out'}",
    ]  # fmt: skip
    first = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    assert [line.split()[0] for line in first.stdout.splitlines() if line] == ["source", "web", "source", "web"]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["sources"]["web"]["documents_read"] == 90 and manifest["sources"]["web"]["planned_tokens"] == 10_000
    # What is there is checked, not built again; another config or a damaged shard ends in one line.
    assert corpus.run(config_of(web), tmp_path / "out") == manifest
    second = subprocess.run(
        [*command, "--config.held_out_fraction=0.2"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert second.returncode == 1 and not second.stdout
    expected = f"error: {tmp_path / 'out'}: was built with another config: held_out_fraction: 0.1 -> 0.2"
    assert second.stderr.strip().splitlines()[-1] == expected and "Traceback" not in second.stderr
    (tmp_path / "out" / "blocks" / "web.array_record").write_bytes(b"")
    with pytest.raises(CorpusError, match="web.array_record: damaged"):
        corpus.run(config_of(web), tmp_path / "out")


def test_documents_of_a_file_keep_their_fields_up_to_the_budget(web):
    source = corpus.SourceConfig(reader=str(web), weight=1.0, byte_budget=10**9)
    documents = list(corpus.documents("web", source, seed=0))
    assert [d.text for d in documents] == [text(i) for i in range(90)]
    assert (documents[1].id, documents[1].url, documents[1].source) == ("1", "u1", "web")
    assert documents[0].id == f"{web}:1"
    budget = sum(len(text(i).encode()) for i in range(5))
    for bytes_, count in ((budget, 5), (budget - 1, 4)):
        assert len(list(corpus.documents("web", dataclasses.replace(source, byte_budget=bytes_), seed=0))) == count


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "malformed JSON"),
        ('{"txt": "a"}', "text: expected a string, got None"),
        ('{"text": ["a"]}', "text: expected a string, got list"),
        ('{"text": "a\\ud800"}', "text: an escape"),
        ('{"text": "a", "metadata": []}', r"metadata: expected an object, got \[\]"),
        ('{"text": "a", "metadata": {"module": ["m"]}}', r"metadata.module: expected a string, got \['m'\]"),
    ],
)
def test_a_bad_row_of_a_corpus_is_named_by_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "web.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"^{path}:2: {message}"):
        corpus.run(config_of(path), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["web.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ("web", "wiki")}, r"order: expected each of \['web'\] once, got \['web', 'wiki'\]"),
        ({"sources": {}, "order": ()}, "sources: expected at least one"),
        ({"sources": {"web": {"weight": 0.0}}}, "sources.web.weight: expected a positive share, got 0.0"),
        ({"sources": {"web": {"weight": "1"}}}, "sources.web.weight: expected a float, got '1'"),
        ({"sources": {"web": {"byte_budget": 0}}}, "sources.web.byte_budget: expected bytes above 0, got 0"),
        ({"sources": {"web": {"reader": "none.jsonl"}}}, "reader: expected 'installation' or files; none.jsonl: expected"),
        ({"sources": {"web": {"reader": "installation"}}}, "sources.web: an installation has the sources reference"),
        ({"sources": {"web": {"readers": "x"}}}, "readers: unknown field of SourceConfig; did you mean 'reader'?"),
        ({"vocabulary": 400}, "vocabulary: unknown field of CorpusConfig; did you mean 'vocab_size'?"),
        ({"deduplication": {"leak_ngram": 0}}, "config.deduplication: leak_ngram: expected at least 1, or None, got 0"),
        ({"deduplication": {"near": {"threshold": 2.0}}}, "deduplication.near: threshold: expected a number between 0 and 1"),
        ({"held_out_fraction": 1.0}, "held_out_fraction: expected a number between 0 and 1, got 1.0"),
        ({"block_length": "long"}, "block_length: expected a int, got 'long'"),
    ],
)
def test_a_wrong_corpus_config_is_refused(web, changes, message):
    values = get_config("jsonl").to_dict()
    values["sources"]["web"]["reader"] = str(web)
    if "web" in changes.get("sources", {}):
        values["sources"]["web"].update(changes["sources"]["web"])
        changes = {k: v for k, v in changes.items() if k != "sources"}
    with pytest.raises(ConfigError, match=message):
        parse(corpus.CorpusConfig, {**values, **changes})


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "web.jsonl").touch()
    with pytest.raises(ValueError, match="source 'web': 0 documents"):
        corpus.run(config_of(tmp_path / "web.jsonl"), tmp_path / "out")
    with pytest.raises(ValueError, match="corpus 'big' is unknown; expected tiny, default, jsonl or web"):
        get_config("big")


def test_a_dry_run_prints_the_mixture_and_writes_nothing(web, tmp_path):
    config = config_of(web, max_epochs=2.0, total_tokens=5000)
    printed = corpus.dry_run(config)
    size = sum(len(text(i).encode()) for i in range(90)) * 0.9  # what is held out does not count
    row = next(line for line in printed.splitlines() if line.startswith("web "))
    _, count, megabytes, tokens, share, planned, epochs = row.split()
    assert (count, share, planned) == ("81", "100.0%", "5,000")
    assert int(tokens.replace(",", "")) == pytest.approx(size / 4, rel=0.01)  # four bytes a token are assumed
    assert float(epochs) == pytest.approx(5000 / (size / 4), rel=0.02) and float(megabytes) == 0.0
    assert "90 documents" in printed and "100.0% pass the filters" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["web.jsonl.gz"]
    with pytest.raises(ValueError, match="max_epochs: 1,000,000 tokens of training ask for"):
        corpus.dry_run(config_of(web, max_epochs=2.0, total_tokens=1_000_000))


def test_bad_rows_are_counted_named_and_fatal_beyond_the_limit(tmp_path):
    path = tmp_path / "web.jsonl"
    rows = [f'{{"text": {json.dumps(text(i))}}}' for i in range(90)]
    path.write_text("\n".join([*rows[:40], "{", *rows[40:], "[]"]) + "\n")
    counts = corpus.run(config_of(path, max_bad_rows=2), tmp_path / "out")["sources"]["web"]
    assert counts["bad_rows"] == 2 and counts["documents_read"] == 90
    assert [row.split(": ")[0] for row in counts["bad_rows_named"]] == [f"{path}:41", f"{path}:92"]
    with pytest.raises(ValueError, match=rf"^{path}:92: expected a JSON object.*bad row 2 of source 'web'; max_bad_rows is 1"):
        corpus.run(config_of(path, max_bad_rows=1), tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_two_sources_in_their_order_built_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ({"text": text(i)} for i in range(40)))
    write_jsonl(tmp_path / "b.jsonl.gz", ({"text": text(i)} for i in range(30, 70)))
    values = get_config("jsonl").to_dict() | {
        "sources": {
            "a": {"reader": str(tmp_path / "a.jsonl"), "weight": 3.0, "byte_budget": 10**6},
            "b": {"reader": str(tmp_path / "b.jsonl.gz"), "weight": 1.0, "byte_budget": 10**6},
        },
        "order": ("b", "a"), "vocab_size": 330, "block_length": 16, "total_tokens": 5000, "held_out_fraction": 0.1,
    }  # fmt: skip
    manifest = corpus.run(parse(corpus.CorpusConfig, values), tmp_path / "c")
    assert list(manifest["sources"]) == ["b", "a"] and manifest["sources"]["a"]["planned_tokens"] == 3750
    assert [s["duplicates"] for s in manifest["sources"].values()] == [0, 10]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    assert corpus.run(parse(corpus.CorpusConfig, values), tmp_path / "c") == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before
    with pytest.raises(ConfigError, match="built with another config: block_length: 16 -> 8"):
        corpus.run(parse(corpus.CorpusConfig, {**values, "block_length": 8}), tmp_path / "c")


def test_the_command_on_this_installation(tmp_path):
    small = {"vocab_size": 400, "tokenizer_bytes": 100_000, "held_out_minimum": 5000, "held_out_maximum": 10_000}
    names = ("reference", "stdlib_docs", "package_docs", "source_code")
    budgets = {f"sources.{name}.byte_budget": 100_000 for name in names}
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.corpus", "--config=configs/corpus.py:tiny", f"--output={tmp_path / 'c'}"]
        + [f"--config.{name}={value}" for name, value in {**small, **budgets}.items()],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = check_manifest(tmp_path / "c", Tokenizer(tmp_path / "c" / "tokenizer.model"))
    assert done.stdout.strip() == manifest["table"]
    assert tuple(manifest["sources"]) == names
    assert manifest["config"]["vocab_size"] == 400 and manifest["config"]["deduplication"]["leak_ngram"] == 8
    for name, counts in manifest["sources"].items():
        rows = [row for _, row in read_jsonl(tmp_path / "c" / "held_out" / f"{name}.jsonl")]
        assert len(rows) == counts["held_out_documents"] and {row["source"] for row in rows} == {name}
        assert sum(len(row["text"].encode()) for row in rows) == counts["held_out_bytes"] <= 10_000
