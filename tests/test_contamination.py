"""Contamination of evaluation sets (paper appendix A.6): spans, subsets, Z, and the command on a corpus."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_jax import contamination as command
from llama_jax.corpus_build.build import Settings, build_corpus
from llama_jax.corpus_build.contamination import Index, analyse, is_affected, subsets
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.refine import Deduplication, HeldOut
from llama_jax.data.sources import write_jsonl
from llama_jax.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
WORDS = "ba ke li mo nu so ra ti du po ve za".split()


def brute_force(sample: list[int], documents: list[list[int]]) -> list[int]:
    """Longest span over each token by the definition: every pair of places, every mismatch counted."""
    longest = [0] * len(sample)
    for document in documents:
        for i in range(len(sample)):
            for j in range(len(document)):
                length = wrong = best = 0
                while i + length < len(sample) and j + length < len(document):
                    if sample[i + length] == document[j + length]:
                        best = length + 1
                    else:
                        wrong += 1
                        if length < 10 or wrong > 4:
                            break
                    length += 1
                if best >= 10:
                    for at in range(i, i + best):
                        longest[at] = max(longest[at], best)
    return longest


@pytest.mark.parametrize("seed", range(6))
def test_spans_are_those_of_the_definition(seed):
    draw = random.Random(seed)
    sample = [draw.randrange(50) for _ in range(90)]
    documents = []
    for _ in range(4):
        start = draw.randrange(60)
        copy = [token if draw.random() > 0.08 else draw.randrange(50) for token in sample[start : start + 40]]
        documents.append([draw.randrange(50) for _ in range(15)] + copy + [draw.randrange(50) for _ in range(5)])
    documents.append([1] * 30)
    index = Index([sample, [1] * 12, sample[:9]])
    for document in documents:
        index.add(document)
    assert index.longest[0].tolist() == brute_force(sample, documents)
    assert index.longest[1].tolist() == brute_force([1] * 12, documents) == [12] * 12
    assert not index.longest[2].any()  # shorter than a seed


def test_a_span_by_hand():
    base = list(range(100, 140))
    document = base.copy()
    for at in (12, 15, 20, 21):
        document[at] = 0
    index = Index([base])
    assert index.add([7, *document]) == 40  # four positions differ: the whole is one span
    assert index.longest[0].tolist() == [40] * 40 and index.contamination(40) == [1] and index.contamination(41) == [0]
    document[30] = 0
    index = Index([base])
    index.add(document)
    assert index.longest[0].tolist() == [30] * 30 + [0] * 10  # the fifth mismatch ends it; 9 equal tokens are no seed
    document[29] = 0
    index = Index([base])
    index.add(document)
    assert index.longest[0].tolist() == [29] * 29 + [0] * 11  # no trailing mismatch
    document[9] = 0
    index = Index([base])
    assert index.add(document) == 0


def test_runs_of_one_token_and_shared_beginnings_cost_what_their_edges_do(monkeypatch):
    extended = []
    monkeypatch.setattr(Index, "_extend", staticmethod(lambda *how, real=Index._extend: extended.append(1) or real(*how)))
    runs = Index([[7] * 200] * 20)
    assert runs.add([1, *[7] * 1000, 2]) == 1000 and all((longest == 200).all() for longest in runs.longest)
    assert len(extended) < 40_000  # of 20 * 191 * 991 equal pairs
    extended.clear()
    examples = list(range(100, 900))
    shots = Index([[*examples, 5, i] for i in range(200)])
    assert shots.add([3, *examples, 4]) == 800 and len(extended) == 200
    assert all((longest == [*[800] * 800, 0, 0]).all() for longest in shots.longest)


def test_workers_results_are_merged():
    sample = list(range(60))
    whole, one, two = Index([sample]), Index([sample]), Index([sample])
    for index, documents in ((whole, [sample[:20], sample[15:60]]), (one, [sample[:20]]), (two, [sample[15:60]])):
        for document in documents:
            index.add(document)
    one.merge(two)
    assert one.longest[0].tolist() == whole.longest[0].tolist() == [20] * 15 + [45] * 45


def paper_row(n_clean: int, clean: float, n_not: int, not_clean: float) -> tuple[np.ndarray, np.ndarray]:
    """Contamination and scores of a data set whose subsets have these sizes and accuracies."""
    scores = [np.arange(n) < round(n * mean / 100) for n, mean in ((n_clean, clean), (n_not, not_clean))]
    return np.repeat([0.0, 0.675], [n_clean, n_not]), np.concatenate(scores).astype(float)


@pytest.mark.parametrize(
    ("sizes", "z"),
    [((7391, 80.0, 2651, 89.5), (-5.73, 9.56)), ((7391, 70.5, 2651, 81.3), (-5.46, 9.17))],
    ids=["HellaSwag 70B", "HellaSwag 7B"],
)
def test_the_z_values_of_table_51(sizes, z):
    clean, not_clean, not_dirty, dirty = subsets(*paper_row(*sizes))
    assert (clean.samples, not_clean.samples) == (7391, 2651)
    assert (clean.z, not_clean.z) == pytest.approx(z, abs=0.15)  # the printed accuracies are rounded to 0.1
    assert not_dirty.samples == 10042 and not_dirty.z == pytest.approx(0) and dirty.samples == 0 and np.isnan(dirty.z)


def test_the_largest_length_that_shows_an_effect_is_reported():
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 10**6, 60).tolist() for _ in range(400)]
    index = Index(samples)
    for sample in samples[:150]:
        index.add(sample[:58])  # dirty at every L
    for sample in samples[150:160]:
        index.add(sample[:15])  # a quarter of the tokens, at L = 10 alone
    seen = np.arange(400) < 150
    length, rows, affected = analyse(index, (rng.random(400) < np.where(seen, 0.9, 0.3)).astype(float))
    assert (length, affected) == (50, True) and [row.samples for row in rows] == [250, 150, 250, 150]
    assert rows[0].z < -2 < 2 < rows[1].z and is_affected(rows) and not is_affected(rows[::-1][1:] + [rows[0].__class__(
        "dirty", 1.0, 1, 1.0, 0.5, 1.9)])  # fmt: skip
    length, rows, affected = analyse(index, np.tile([0.0, 1.0], 200))
    assert (length, affected) == (50, False)
    assert analyse(Index(samples), np.ones(400))[0] == 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    words = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "nu", "so") for b in ("ra", "ti", "du", "po", "ve", "za")]
    draw = random.Random(0)
    documents = [Document(str(i), " ".join(draw.choices(words, k=120)), "web") for i in range(60)]
    output = tmp_path_factory.mktemp("contamination") / "corpus"
    build_corpus({"web": documents}, output, Settings(400, 32, HeldOut(0.1, 0, 10**6), {"web": 1.0}, shards=3))
    return output


def test_the_documents_of_a_shard_come_back(corpus):
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    shards = sorted((corpus / "blocks").glob("*.array_record"))
    texts = [tokenizer.decode(ids.tolist()) for shard in shards for ids in command.corpus_documents(shard)]
    assert len(shards) == 3 and len(texts) == json.loads((corpus / "manifest.json").read_text())["sources"]["web"]["documents"]
    assert all(len(text.split()) == 120 for text in texts)


def test_the_command_finds_planted_samples(corpus, tmp_path):
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    documents = [ids for shard in (corpus / "blocks").glob("*.array_record") for ids in command.corpus_documents(shard)]
    texts = [tokenizer.decode(ids.tolist()) for ids in documents]
    draw = random.Random(1)
    rows = [{"text": texts[i], "score": 1} for i in range(40)]
    rows += [{"text": " ".join(draw.sample("xylo quartz fjord gypsum wizard jumbo vex dwarf".split(), 8)), "score": 0}] * 40
    write_jsonl(tmp_path / "planted.jsonl", rows)
    write_jsonl(tmp_path / "unscored.jsonl", [{"text": "xylo quartz fjord gypsum wizard"}])
    arguments = [f"--corpus={corpus}", f"--samples={tmp_path}/*.jsonl", f"--output={tmp_path / 'out.json'}", "--workers=2"]
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.contamination", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert command.table(result) == done.stdout.rstrip("\n")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["HellaSwag,", "70B", "40", "not", "clean", "67.5", "2,651", "89.5", "82.4", "9.56"] in lines  # the paper's
    assert "Table 51" not in command.table({"unscored": result["unscored"]})
    planted = result["planted"]
    assert planted["affected"] and planted["length"] == 50 and planted["dirty"]["50"] == 40
    assert [row["samples"] for row in planted["subsets"]] == [40, 40, 40, 40]
    assert result["unscored"]["contaminated"] == dict.fromkeys(["10", "20", "30", "40", "50"], 0.0)
    assert command.run(str(corpus), f"{tmp_path}/*.jsonl") == result


def test_corpus_samples_and_result_may_lie_in_a_bucket(corpus, tmp_path):
    pytest.importorskip("gcsfs")
    from bucket_server import BucketServer

    tokenizer = Tokenizer(corpus / "tokenizer.model")
    ids = next(command.corpus_documents(next((corpus / "blocks").glob("*.array_record"))))
    for folder in ("first", "second"):  # whose sets of one name are told apart by their addresses
        for part in range(2):
            rows = [{"text": tokenizer.decode(ids.tolist()), "groups": ["mmlu"]}, {"text": "xylo quartz fjord"}]
            write_jsonl(tmp_path / folder / f"mmlu.{part}.jsonl", [{"groups": ["mmlu"], **row} for row in rows])
    with BucketServer("bucket") as server:
        for root, place in ((corpus, "runs/corpus"), (tmp_path, "samples")):
            for path in (path for path in root.rglob("*") if path.is_file()):
                server.put("bucket", f"{place}/{path.relative_to(root).as_posix()}", path.read_bytes())
        arguments = ["--corpus=gs://bucket/runs/corpus", "--samples=gs://bucket/samples/*/*.jsonl", "--workers=2",
                     "--output=gs://bucket/out.json"]  # fmt: skip
        done = subprocess.run(  # a process of its own: gcsfs keeps the server that it met first
            [sys.executable, "-m", "llama_jax.contamination", *arguments], cwd=ROOT, capture_output=True, text=True,
            timeout=120, env={**os.environ, **server.environment()},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = json.loads(server.buckets["bucket"]["out.json"][0])
    local = command.run(str(corpus), f"{tmp_path}/*/*.jsonl")
    assert result == {name.replace(str(tmp_path), "gs://bucket/samples"): row for name, row in local.items()}
    assert list(result)[:2] == [f"gs://bucket/samples/{folder}/mmlu" for folder in ("first", "second")]
    assert result["gs://bucket/samples/first/mmlu"]["dirty"]["50"] == 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [({"txt": "a"}, "2: text: expected a string"), ({"text": "a", "score": "1"}, "2: score: expected a number"),
     ({"text": "a"}, "2: score: expected one in every row or in none")],
)  # fmt: skip
def test_a_wrong_sample_is_named(corpus, tmp_path, row, problem):
    write_jsonl(tmp_path / "s.jsonl", [{"text": "a", "score": 1}, row])
    with pytest.raises(ValueError, match=problem):
        command.run(str(corpus), str(tmp_path / "s.jsonl"))


def test_samples_are_read_as_the_corpus_reads_them(corpus, tmp_path):
    """Any format, and any field for the text: what `deduplication.evaluation` takes."""
    import pyarrow
    import pyarrow.parquet

    tokenizer = Tokenizer(corpus / "tokenizer.model")
    ids = next(command.corpus_documents(next((corpus / "blocks").glob("*.array_record"))))
    rows = [{"question": tokenizer.decode(ids.tolist()), "score": 1, "groups": ["all"]}, {"question": "xylo", "score": 0}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    found = command.run(str(corpus), f"{tmp_path}/*?text=question")
    assert list(found) == ["all", "a", "b"] and found["a"] == found["b"] and found["a"]["dirty"]["50"] == 1
    assert found["all"]["samples"] == 4 and "subsets" in found["b"]
    with pytest.raises(ValueError, match="b.parquet:0: no column 'text' among 'question', 'score', 'groups'"):
        command.run(str(corpus), f"{tmp_path}/b.parquet")
    with pytest.raises(ValueError, match="a.jsonl:1: text: expected a string, got None .there are 'question'"):
        command.run(str(corpus), f"{tmp_path}/a.jsonl")


def test_removal_leaves_the_command_nothing_to_find(tmp_path):
    """Samples between paragraphs of prose and inside programs ten times as long, of which no part may be cut."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices([f"{a}{b}" for a in WORDS for b in WORDS], k=count))

    samples = [words(100) for _ in range(8)]
    write_jsonl(tmp_path / "samples.jsonl", [{"text": text} for text in [*samples, words(12)]])
    documents = {
        "web": [Document(f"w{i}", f"{words(80)}\n\n{samples[i % 8]}\n\n{words(80)}", "web") for i in range(24)],
        "code": [Document(f"c{i}", f"{words(1000)}\n{samples[i % 8]}\n{words(1000)}", "code") for i in range(8)]
        + [Document(f"d{i}", words(200), "code") for i in range(24)],
    }
    settings = Settings(400, 32, HeldOut(0.1, 1, 10**4), {"web": 1.0, "code": 1.0}, whole=frozenset({"code"}))
    build_corpus(documents, tmp_path / "raw", settings)
    rules = Deduplication(leak_ngram=13, evaluation=(str(tmp_path / "samples.jsonl"),))
    manifest = build_corpus(documents, tmp_path / "clean", dataclasses.replace(settings, deduplication=rules))
    raw, clean = (command.run(str(tmp_path / name), str(tmp_path / "samples.jsonl"))["samples"] for name in ("raw", "clean"))
    assert raw["dirty"]["50"] == 8 and clean["contaminated"]["10"] == 0
    assert manifest["evaluation"] == {"samples": 9, "too_short": 1}
    web, code = manifest["sources"].values()
    assert web["leaks_paragraphs"] + web["evaluation_paragraphs"] == web["documents"] and web["evaluation_paragraphs"] > 4
    assert code["evaluation"] == 8 - code["withheld_documents"] > 4  # too long to be held out
    assert "1 of 9 evaluation samples have fewer words" in (tmp_path / "clean" / "report.html").read_text()


def test_parts_of_a_set_are_analysed_together_too(corpus, tmp_path):
    """Of a hundred questions no subset of Table 51 shows what those of all subjects do."""
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    documents = [ids for shard in (corpus / "blocks").glob("*.array_record") for ids in command.corpus_documents(shard)]
    planted, new = tokenizer.decode(documents[0].tolist()), "xylo quartz fjord gypsum wizard jumbo vex dwarf"
    for part in range(3):
        rows = [{"text": planted, "score": 1}] * 4 + [{"text": f"{new} {part}", "score": 0}] * 4
        groups = ["mmlu", "mmlu_stem"] if part else ["mmlu", "mmlu_other"]
        write_jsonl(tmp_path / f"mmlu.{part}.jsonl", [{**row, "groups": groups} for row in rows])
    write_jsonl(tmp_path / "boolq.jsonl", [{"text": new, "score": 1, "groups": []}])
    found = command.run(str(corpus), f"{tmp_path}/*.jsonl")
    assert list(found) == ["mmlu", "mmlu_stem", "boolq", "mmlu.0", "mmlu.1", "mmlu.2"]  # of one file there is no other
    assert [found[name]["samples"] for name in ("mmlu", "mmlu_stem", "mmlu.0")] == [24, 16, 8]
    assert [found[name]["affected"] for name in ("mmlu", "mmlu_stem", "mmlu.0")] == [True, True, False]
    write_jsonl(tmp_path / "wrong.jsonl", [{"text": new, "groups": "mmlu"}])
    with pytest.raises(ValueError, match="wrong.jsonl:1: groups: expected a list of names, got 'mmlu'"):
        command.run(str(corpus), f"{tmp_path}/wrong.jsonl")


def test_empty_shards_and_samples_of_one_name(tmp_path):
    documents = [Document(str(i), f"number {i} is a text of some words that {i} nobody reads", "web") for i in range(30)]
    settings = Settings(
        vocab_size=300, block_length=32, held_out=HeldOut(0.1, 0, 10**6), weights={"web": 1.0}, shards=64
    )  # fmt: skip
    build_corpus({"web": documents}, tmp_path / "corpus", settings)
    for name in ("arc", "boolq"):
        write_jsonl(tmp_path / name / "test.jsonl", [{"text": documents[3].text}])
    found = command.run(str(tmp_path / "corpus"), f"{tmp_path}/*/test.jsonl")
    assert list(found) == [f"{tmp_path}/arc/test.jsonl", f"{tmp_path}/boolq/test.jsonl"]
