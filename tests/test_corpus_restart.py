"""A corpus build that is killed: what comes after goes on with whole products, and ends with the same bytes."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from configs.corpus import get_config
from llama_jax import corpus
from llama_jax.config import parse
from llama_jax.corpus_build import stages
from llama_jax.corpus_build.stages import SettingsError, Stages, fingerprint_of, unfinished
from llama_jax.data.sources import write_jsonl

REPOSITORY = Path(__file__).parents[1]
WORDS = ["".join(parts) for parts in zip("bcdfghklmnpr" * 20, "aeiou" * 48, "bcdfghklmnprst" * 18, "aeiou" * 48)]


def config_in(directory: Path) -> corpus.CorpusConfig:
    """Two sources of two files and two shards each, with near copies; the files are made if they are not there."""
    draw = random.Random(0)
    texts = ["\n\n".join(" ".join(draw.choices(WORDS, k=40)) for _ in range(3)) + "\n" for _ in range(120)]
    if not (directory / "web-0.jsonl").exists():
        for part in range(2):
            write_jsonl(directory / f"docs-{part}.jsonl", ({"text": t} for t in texts[part:80:2]))
            write_jsonl(directory / f"web-{part}.jsonl", ({"text": t + "more"} for t in texts[60 + part :: 2]))
    source = {"weight": 1.0, "byte_budget": 10**9, "steps": ("normalise",)}
    values = get_config("jsonl").to_dict() | {
        "sources": {name: {"reader": str(directory / f"{name}-*.jsonl"), **source} for name in ("docs", "web")},
        "order": ("docs", "web"), "vocab_size": 360, "block_length": 32, "total_tokens": 10_000, "shards": 2,
        "held_out_fraction": 0.1, "held_out_minimum": 3000, "held_out_maximum": 8000, "analyses": ("demographics",),
    }  # fmt: skip
    return parse(corpus.CorpusConfig, values)


# Builds in children of one process; each is killed, with no time to tidy up, before or inside one of its products.
KILLED = """
import os, signal, sys
from pathlib import Path
from llama_jax import corpus
from llama_jax.corpus_build import beam_pipeline, stages, write
from llama_jax.paths import place
from tests.test_corpus_restart import config_in

directory, output, beam = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "beam"
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def patched(point):
    kind, name = point.split(":")
    if kind == "write":  # the file of a product stands half-written when the kill comes
        real = write.write_blocks
        def torn(texts, path, **how):
            if Path(path).name == name:
                place(path).write_bytes(b"half a shard")
                die()
            return real(texts, path, **how)
        write.write_blocks = torn
        return
    if kind == "publish":  # some objects of a bucket have their names when the kill comes
        def partly(directory, output, *, last):
            for part in ("tokenizer.model", "blocks/docs-00000-of-00002.array_record"):
                (output / part).write_bytes((directory / part).read_bytes())
            die()
        stages.publish = partly
        return
    real = stages.Stages.once
    def once(self, product, make):
        def made():
            value = make()
            if kind == "in" and product == name:
                die()  # all is done, nothing is kept yet
            return value
        result = real(self, product, made)
        if kind == "after" and product == name:
            die()
        return result
    stages.Stages.once = once
    if kind == "end":
        write.write_report = lambda *args, **options: die()

for point in sys.argv[4:]:
    child = os.fork()
    if not child:  # the parent asks no bucket: its client has threads, which a fork would lose
        assert not (place(output) / "manifest.json").exists(), f"before {point}"
        patched(point)
        corpus.run(config_in(directory), output, beam=[] if beam else None)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, point
    assert not Path(output).exists(), point
"""


def killed(directory: Path, points: list[str], *, beam: bool = False, output: str | Path | None = None) -> None:
    """Runs and kills the build at each of the points in turn, each run going on with what the one before left."""
    config_in(directory)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(directory), str(output or directory / "out"), "beam" if beam else "one", *points],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def files(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def products(directory: Path) -> dict[str, int]:
    """What is kept, with the time of its writing."""
    place = directory / ".out.unfinished"
    paths = [*(place / "work").rglob("*.pickle"), *(place / "corpus" / "blocks").glob("*.array_record")]
    return {path.relative_to(place).as_posix(): path.stat().st_mtime_ns for path in paths}


POINTS = [
    "in:cleaned/docs", "after:cleaned/docs", "in:refined", "after:refined", "after:profile/docs", "in:tokenizer",
    "after:tokenizer", "write:docs-00001-of-00002.array_record", "after:files/docs-00001-of-00002.array_record",
    "write:web-00000-of-00002.array_record", "write:web.array_record", "end:",
]  # fmt: skip


def test_a_build_killed_twelve_times_ends_with_the_bytes_of_an_undisturbed_one(tmp_path):
    killed(tmp_path, POINTS)
    config = config_in(tmp_path)
    kept = products(tmp_path)
    names = ("cleaned/docs", "cleaned/web", "refined", "profile/web", "tokenizer")
    assert {f"work/{name}.pickle" for name in names} < set(kept)
    assert sum(name.endswith(".array_record") for name in kept) == 4
    reused = []
    with pytest.MonkeyPatch.context() as patch:
        real = Stages.once
        patch.setattr(Stages, "once", lambda self, name, make: reused.append(name) or real(self, name, _must_not_run))
        manifest = corpus.run(config, tmp_path / "out")
    assert "refined" in reused and "files/web-00001-of-00002.array_record" in reused
    assert manifest["sources"]["web"]["near_duplicates"] > 0
    assert not (tmp_path / ".out.unfinished").exists()
    corpus.run(config, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def _must_not_run():
    raise AssertionError("a whole product was made again")


def test_damaged_products_are_made_again(tmp_path):
    killed(tmp_path, ["end:"])
    place = tmp_path / ".out.unfinished"
    for path in (place / "work" / "refined.pickle", place / "corpus" / "blocks" / "docs-00000-of-00002.array_record"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    (place / "corpus" / "blocks" / "web-00000-of-00002.array_record").unlink()
    (place / "corpus" / "blocks" / ".tokenizer.model.123.tmp").write_text("of the killed process")
    config = config_in(tmp_path)
    corpus.run(config, tmp_path / "out")
    corpus.run(config, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["settings", "inputs"])
def test_products_of_other_settings_or_inputs_are_not_used(tmp_path, change):
    killed(tmp_path, ["after:files/docs-00000-of-00002.array_record"])
    config = config_in(tmp_path)
    if change == "inputs":
        with open(tmp_path / "web-1.jsonl", "a") as file:
            file.write(json.dumps({"text": "a text that was not there before the kill " * 5}) + "\n")
    else:
        config = parse(corpus.CorpusConfig, {**corpus.describe(config), "held_out_maximum": 7000})
    corpus.run(config, tmp_path / "out")
    corpus.run(config, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_whatever_ends_a_build_leaves_what_is_done_and_else_nothing(tmp_path):
    made = []
    for error in (ValueError, SettingsError, KeyboardInterrupt):
        with pytest.raises(error), unfinished(tmp_path / "out", {"of": "this"}) as (directory, _):
            (directory / "half").write_text("a file")
            raise error
        assert not list(tmp_path.iterdir())
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), unfinished(tmp_path / "out", {"of": "this"}) as (_, stages):
            stages.once("part", lambda: made.append(1) or 7)
            raise error
        assert (tmp_path / ".out.unfinished").exists()
    with unfinished(tmp_path / "out", {"of": "this"}) as (directory, stages):
        assert stages.once("part", _must_not_run) == 7 and not list(directory.iterdir())
    assert len(made) == 1 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_evaluation_files_clean_nothing_again(tmp_path, monkeypatch):
    config = config_in(tmp_path)
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, [{"text": " ".join(WORDS[:20])}])
    config = dataclasses.replace(
        config, vocab_size=9999, deduplication=dataclasses.replace(config.deduplication, evaluation=(str(path),))
    )
    made = []
    monkeypatch.setattr(Stages, "once", lambda self, name, make, real=Stages.once: real(
        self, name, lambda: made.append(name) or make()))  # fmt: skip

    def run() -> list[str]:
        made.clear()
        with pytest.raises(SettingsError, match="pieces are too many"):
            corpus.run(config, tmp_path / "out")
        return made[:-1]  # but the tokenizer

    every = ["refined", "cleaned/docs", "cleaned/web", "profile/docs", "profile/web"]
    assert run() == every and run() == []
    write_jsonl(path, [{"text": " ".join(WORDS[:20])}, {"text": " ".join(WORDS[30:50])}])
    assert run() == ["refined", "profile/docs", "profile/web"]


def test_the_code_of_a_corpus_is_all_of_the_package(tmp_path, monkeypatch):
    for name in ("corpus.py", "files.py", "corpus_build/stages.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(stages, "__file__", str(tmp_path / "corpus_build" / "stages.py"))
    found = {stages.code_hash()}
    for name in ("corpus.py", "files.py", "corpus_build/stages.py"):
        (tmp_path / name).write_text("two")
        found.add(stages.code_hash())
    assert len(found) == 4


def test_settings_that_the_documents_do_not_allow_keep_what_was_made_of_them(tmp_path, monkeypatch):
    config = config_in(tmp_path)
    for changes, problem in (
        ({"vocab_size": 9999}, "vocab_size: 9999 pieces are too many for this text"),
        ({"held_out_minimum": 1, "held_out_maximum": 1}, "to train on and 0 held out"),
    ):
        with pytest.raises(SettingsError, match=f"{problem}.*; .*/.out.unfinished keeps what was made of the documents"):
            corpus.run(dataclasses.replace(config, **changes), tmp_path / "out")
    made = []
    monkeypatch.setattr(Stages, "once", lambda self, name, make, real=Stages.once: real(
        self, name, lambda: made.append(name) or make()))  # fmt: skip
    # Nothing is cleaned again, and 10,000 tokens are more than an eighth of an epoch.
    manifest = corpus.run(dataclasses.replace(config, max_epochs=0.125), tmp_path / "out")
    assert made[0] == "refined" and "tokenizer" in made and not (tmp_path / ".out.unfinished").exists()
    assert [s["epochs"] for s in manifest["sources"].values()] == pytest.approx([0.125] * 2, abs=1e-4)
    assert "max_epochs leaves" in manifest["table"]
    assert "tokens of training asked for" in (tmp_path / "out" / "report.html").read_text()
    corpus.run(dataclasses.replace(config, max_epochs=0.125), tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def with_bad_rows(directory: Path, count: int, **changes) -> corpus.CorpusConfig:
    """`config_in` with so many wrong rows at the beginning of the second source."""
    config = config_in(directory)
    path = directory / "web-0.jsonl"
    path.write_text("{\n" * count + path.read_text())
    return dataclasses.replace(config, **changes)


def test_a_limit_that_is_exceeded_keeps_what_is_finished_and_a_higher_one_goes_on(tmp_path, monkeypatch):
    config = with_bad_rows(tmp_path, 2, max_bad_rows=1)
    read, made = [], []
    monkeypatch.setattr(corpus, "read_file", lambda path, source, real=corpus.read_file: (
        read.append(path) or row for row in real(path, source)))  # fmt: skip
    monkeypatch.setattr(Stages, "once", lambda self, name, make, real=Stages.once: real(
        self, name, lambda: made.append(name) or make()))  # fmt: skip
    problem = f"{tmp_path}/web-0.jsonl:2: malformed JSON.*bad row 2 of source 'web'; max_bad_rows is 1.*keeps what was made"
    with pytest.raises(SettingsError, match=problem):
        corpus.run(config, tmp_path / "out")
    assert read[-2:] == [f"{tmp_path}/web-0.jsonl"] * 2 and read[-3].endswith("docs-1.jsonl")  # no more of it was read
    assert set(products(tmp_path)) == {"work/cleaned/docs.pickle"}
    made.clear()
    with pytest.raises(SettingsError, match="pieces are too many"):
        corpus.run(dataclasses.replace(config, max_bad_rows=2, vocab_size=9999), tmp_path / "out")
    assert "cleaned/docs" not in made and made[:2] == ["refined", "cleaned/web"]
    with pytest.raises(SettingsError, match="bad row 2 of source 'web'; max_bad_rows is 1"):  # of what is there already
        corpus.run(config, tmp_path / "out")
    made.clear()
    counts = corpus.run(dataclasses.replace(config, max_bad_rows=2), tmp_path / "out")["sources"]
    assert counts["web"]["bad_rows"] == 2 and made[0] == "tokenizer"
    corpus.run(dataclasses.replace(config, max_bad_rows=2), tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_a_source_that_reads_other_files_leaves_the_others_cleaned(tmp_path, monkeypatch):
    config = config_in(tmp_path)
    web, made = tmp_path / "web.jsonl", []
    monkeypatch.setattr(Stages, "once", lambda self, name, make, real=Stages.once: real(
        self, name, lambda: made.append(name) or make()))  # fmt: skip
    web.write_text('{"text": "one alone"}\n')
    source = dataclasses.replace(config.sources["web"], reader=str(web))
    wrong = dataclasses.replace(config, sources={**config.sources, "web": source})
    with pytest.raises(SettingsError, match="source 'web': 1 documents leave 0 .*; .* keeps what was made .* or files"):
        corpus.run(wrong, tmp_path / "out")
    assert made == ["refined", "cleaned/docs", "cleaned/web", "profile/docs", "profile/web"]
    made.clear()
    corpus.run(config, tmp_path / "out")
    assert made[:2] == ["refined", "cleaned/web"] and "cleaned/docs" not in made
    corpus.run(config, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_products_of_a_changed_source_are_taken_away_by_name(tmp_path):
    names = ["cleaned/a", "cleaned/a-00000", "cleaned/a-00001", "cleaned/ab", "cleaned/a.b-00000", "refined", "files/x"]

    def fingerprint(size: int) -> dict:
        inputs = {"sources": {"a": [["a.jsonl", size, 1]], "b": []}, "budgets": {"a": None, "b": None}}
        settings = dataclasses.replace(config_in(tmp_path).settings(), weights={"a": 1.0, "b": 1.0}, steps={})
        return fingerprint_of(settings, inputs)

    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "out", fingerprint(1)) as (_, before):
        assert [before.once(name, lambda: 1) for name in names] == [1] * 7
        raise KeyboardInterrupt
    with unfinished(tmp_path / "out", fingerprint(2)) as (_, after):
        assert [after.once(name, lambda: 2) for name in names] == [2, 2, 2, 1, 1, 2, 2]


@pytest.mark.slow
def test_a_limit_exceeded_under_beam_costs_no_pipeline(tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="needs apache-beam: pip install 'llama_jax[data]'")
    config = with_bad_rows(tmp_path, 2, max_bad_rows=1)
    with pytest.raises(SettingsError, match=r"web-0.jsonl:2: .*\(bad row 2 of source 'web'; max_bad_rows is 1\)"):
        corpus.run(config, tmp_path / "out", beam=[])
    made = []
    monkeypatch.setattr(Stages, "once", lambda self, name, make, real=Stages.once: real(
        self, name, lambda: made.append(name) or make()))  # fmt: skip
    corpus.run(dataclasses.replace(config, max_bad_rows=2), tmp_path / "out", beam=[])
    assert "documents" not in made and "tokenizer" in made


def test_a_wrong_evaluation_sample_is_told_before_a_document_is_read_and_costs_nothing(tmp_path, monkeypatch):
    config = with_bad_rows(tmp_path, 1)
    with pytest.raises(SettingsError, match="max_bad_rows is 0"):
        corpus.run(config, tmp_path / "out")
    kept = products(tmp_path)
    assert kept
    (tmp_path / "samples.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    rules = dataclasses.replace(config.deduplication, evaluation=(str(tmp_path / "samples.jsonl"),))
    monkeypatch.setattr(corpus, "read_file", lambda *_: _must_not_run())
    with pytest.raises(ValueError, match=f"^{tmp_path}/samples.jsonl:2: text: expected a string"):
        corpus.run(dataclasses.replace(config, deduplication=rules), tmp_path / "out")
    assert products(tmp_path) == kept


def test_products_that_read_none_of_the_changed_settings_stay(tmp_path):
    settings = config_in(tmp_path).settings()
    names = {field.name for field in dataclasses.fields(settings)}
    assert {*stages._READ_LAST, *(name for read in stages._READ.values() for name in read)} < {*names, "evaluation"}
    kinds = ["cleaned/a", "refined", "profile/a", "documents", "tokenizer", "files/a"]
    for changes, stay in (
        ({}, 6), ({"max_epochs": 2.0}, 6), ({"max_bad_rows": 9, "max_bad_files": 9}, 6), ({"block_length": 8}, 5),
        ({"vocab_size": 370}, 4), ({"shards": 3}, 3),
        ({"analysed_share": 0.5}, 2), ({"whole": frozenset({"web"})}, 1), ({"seed": 1}, 0),
        ({"weights": dict(reversed(settings.weights.items()))}, 0),  # the order of the sources
    ):  # fmt: skip
        with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "out", fingerprint_of(settings, {})) as (place, before):
            for kind in kinds:
                before.once(kind, lambda: 1)
            (place / "blocks").mkdir(exist_ok=True)
            (place / "blocks" / "a.array_record").write_bytes(b"1")
            raise KeyboardInterrupt
        fingerprint = fingerprint_of(dataclasses.replace(settings, **changes), {})
        with pytest.raises(ValueError), unfinished(tmp_path / "out", fingerprint) as (directory, after):
            assert [after.once(kind, lambda: 2) for kind in kinds] == [1] * stay + [2] * (6 - stay), changes
            assert (directory / "blocks" / "a.array_record").exists() == (stay == 6)
            raise ValueError


@pytest.mark.slow
def test_a_beam_build_killed_eight_times_ends_with_the_bytes_of_one_process(tmp_path):
    pytest.importorskip("apache_beam", reason="needs apache-beam: pip install 'llama_jax[data]'")
    points = [
        "in:cleaned/docs-00000", "after:cleaned/web-00001", "in:documents", "after:documents", "after:tokenizer",
        "write:docs-00001-of-00002.array_record", "after:files/web-00000-of-00002.array_record", "write:web.array_record",
    ]  # fmt: skip
    killed(tmp_path, points, beam=True)
    kept = products(tmp_path)
    assert {f"work/cleaned/{name}-0000{i}.pickle" for name in ("docs", "web") for i in (0, 1)} < set(kept)
    config = config_in(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        real = Stages.once
        patch.setattr(Stages, "once", lambda self, name, make: real(self, name, _must_not_run))
        corpus.run(config, tmp_path / "out", beam=[])
    corpus.run(config, tmp_path / "one")
    assert files(tmp_path / "out") == files(tmp_path / "one")


def test_a_full_disk_keeps_what_is_done_and_two_builds_do_not_meet(tmp_path):
    made = []
    with pytest.raises(OSError, match="no space"), unfinished(tmp_path / "out", {"of": "this"}) as (_, stages):
        stages.once("part", lambda: made.append(1) or 7)
        raise OSError("no space left")
    with unfinished(tmp_path / "out", {"of": "this"}) as (directory, stages):
        assert stages.once("part", _must_not_run) == 7
        (directory / "manifest.json").write_text("{}")
        for of in ({"of": "this"}, {"of": "that"}, None):
            with pytest.raises(ValueError, match="another build is writing here"), unfinished(tmp_path / "out", of):
                raise AssertionError("entered")
        assert (directory / "manifest.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(made) == 1


def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_is_read(tmp_path):
    config = config_in(tmp_path)
    corpus.run(config, tmp_path / "out")
    model = str(tmp_path / "out" / "tokenizer.model")
    (tmp_path / "words.json").write_text("{}")
    for tokenizer, size, problem in (
        (model, 361, "vocab_size: expected the 360 of"), (str(tmp_path / "none"), 360, "none: expected"),
        (str(tmp_path / "web-0.jsonl"), 360, "not a SentencePiece model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            parse(corpus.CorpusConfig, {**corpus.describe(config), "tokenizer": tokenizer, "vocab_size": size})
    values = get_config("jsonl")
    values.tokenizer, values.temperature, values.max_epochs, values.clean.block_list = model, 2.0, 6.0, model  # as by flags
