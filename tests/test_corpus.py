"""The corpus command: a config is checked before a document is read, and a corpus is built once."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax import corpus
from llama_jax.config import ConfigError, parse
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.manifest import check_manifest
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
WORDS = "the model reads a list of values and returns each key once when it is called with two arguments".split()


def make_documents(source: str, count: int) -> list[Document]:
    draw = random.Random(source)
    return [
        Document(f"{source}/{i}", f"{source} {i}: " + " ".join(draw.choices(WORDS, k=30)) + "\n", source)
        for i in range(count)
    ]


@pytest.fixture
def values(tmp_path) -> dict:
    write_jsonl(tmp_path / "a.jsonl", ({"id": d.id, "text": d.text} for d in make_documents("a", 40)))
    write_jsonl(tmp_path / "b.jsonl.gz", ({"text": d.text} for d in make_documents("b", 25)))
    return {
        "sources": {
            "a": {"reader": str(tmp_path / "a.jsonl"), "weight": 3.0, "byte_budget": 10**6},
            "b": {"reader": str(tmp_path / "b.jsonl.gz"), "weight": 1.0, "byte_budget": 1000},
        },
        "order": ("b", "a"), "vocab_size": 330, "block_length": 16, "total_tokens": 5000, "held_out_fraction": 0.1,
        "held_out_minimum": 100, "held_out_maximum": 2000, "tokenizer_bytes": 100_000,
    }  # fmt: skip


def test_it_builds_once_and_refuses_another_config(values, tmp_path):
    config = parse(corpus.CorpusConfig, values)
    manifest = corpus.run(config, tmp_path / "c")
    assert list(manifest["sources"]) == ["b", "a"] and manifest["sources"]["a"]["planned_tokens"] == 3750
    read = manifest["sources"]["b"]["documents_read"]
    texts = [len(d.text) for d in make_documents("b", 25)]
    assert sum(texts[:read]) <= 1000 < sum(texts[: read + 1])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    assert corpus.run(config, tmp_path / "c") == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before
    with pytest.raises(ConfigError, match="built with another config: block_length: 16 -> 8"):
        corpus.run(parse(corpus.CorpusConfig, {**values, "block_length": 8}), tmp_path / "c")


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"order": ("a",)}, r"order: expected each of \['a', 'b'\] once"),
        ({"held_out_fractoin": 0.1}, "did you mean 'held_out_fraction'"),
        ({"sources": {}, "order": ()}, "sources: expected at least one"),
    ],
)
def test_a_wrong_config_is_refused(values, change, problem):
    with pytest.raises(ConfigError, match=problem):
        parse(corpus.CorpusConfig, {**values, **change})


@pytest.mark.parametrize(
    "source, problem",
    [
        ({"reader": "nowhere.jsonl"}, r"sources.a.reader: expected 'installation' or a JSONL file, got 'nowhere"),
        ({"reader": "installation"}, "sources.a: an installation has the sources reference, stdlib_docs"),
        ({"weight": 0.0}, "sources.a.weight: expected a positive share"),
        ({"byte_budget": 0}, "sources.a.byte_budget"),
    ],
)
def test_a_wrong_source_is_refused(values, source, problem):
    values["sources"]["a"] |= source
    with pytest.raises(ConfigError, match=problem):
        parse(corpus.CorpusConfig, values)


@pytest.mark.parametrize("line, problem", [("{", "malformed JSON"), ('{"text": 3}', "text: expected a string")])
def test_a_malformed_row_names_file_and_line_and_leaves_nothing(values, tmp_path, line, problem):
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:41: {problem}"):
        corpus.run(parse(corpus.CorpusConfig, values), tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl.gz"]


def test_the_command_on_this_installation(tmp_path):
    small = {"vocab_size": 400, "tokenizer_bytes": 100_000, "held_out_minimum": 5000, "held_out_maximum": 10_000}
    names = ("reference", "stdlib_docs", "package_docs", "source_code")
    budgets = {f"sources.{name}.byte_budget": 100_000 for name in names}
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.corpus", "--config=configs/corpus.py:tiny", f"--output={tmp_path / 'c'}"]
        + [f"--config.{name}={value}" for name, value in {**small, **budgets}.items()],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = check_manifest(tmp_path / "c", Tokenizer(tmp_path / "c" / "tokenizer.model"))
    assert done.stdout.strip() == manifest["table"]
    assert tuple(manifest["sources"]) == names
    assert manifest["config"]["vocab_size"] == 400
    for name, counts in manifest["sources"].items():
        rows = [row for _, row in read_jsonl(tmp_path / "c" / "held_out" / f"{name}.jsonl")]
        assert len(rows) == counts["held_out_documents"] and {row["source"] for row in rows} == {name}
        assert sum(len(row["text"].encode()) for row in rows) == counts["held_out_bytes"] <= 10_000
