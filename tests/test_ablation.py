"""What data are worth: dirt by code, arms compared document by document, and the whole command."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.ablation import get_config
from llama_jax import ablation
from llama_jax.ablation import AblationConfig
from llama_jax.config import ConfigError, parse
from llama_jax.corpus_build.dirt import Dirt, dirty, markup, mojibake
from llama_jax.corpus_build.document import Document, Removed
from llama_jax.corpus_build.steps import CleanConfig, clean, make_steps
from llama_jax.corpus_build.text import fix_mojibake
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.evals.ablation import (
    Arm,
    HeldOutTexts,
    compare,
    curve_figure,
    gain_figure,
    page,
    tokens_to_match,
    verdicts,
    write_ablation,
)
from llama_jax.evals.documents import document_bits
from llama_jax.evals.statistics import ratio_interval
from llama_jax.model.config import Compute
from llama_jax.model.params import table
from llama_jax.parallel.mesh import make_mesh
from llama_jax.pretrain.base import fresh
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.pretrain.stage import bits_per_byte

REPOSITORY = Path(__file__).parents[1]
TEXT = """Return the 'name' of a file.

The path is what the caller gave, and it is read once, when it is asked for:

    open(x)

A file that is not there is an error; one that is empty is not, and the answer to it is the empty string, as before.
"""


def documents(count: int) -> list[Document]:
    return [Document(f"d{i}", f"{TEXT}\nNumber {i}.\n", "docs") for i in range(count)]


# Dirt


def test_dirt_depends_on_the_document_alone():
    dirt = Dirt()
    first = {d.id: d for d in dirty(documents(400), dirt, seed=0)}
    assert {d.id: d for d in dirty(documents(400)[::-1], dirt, seed=0)} == first
    assert {d.id: d for d in dirty(documents(400), dirt, seed=1)} != first
    kinds = Counter(name.partition("#")[2] for name in first)
    assert kinds[""] == 400 and 80 < kinds["copy"] < 160 and 80 < kinds["junk"] < 160
    marked = sum(d.text.startswith("<!DOCTYPE") for name, d in first.items() if not name.endswith("junk"))
    assert 0.1 < marked / (400 + kinds["copy"]) < 0.3


def test_no_dirt_changes_no_text():
    none = Dirt(boilerplate=0.0, copies=0.0, mojibake=0.0, markup=0.0, junk=0.0)
    assert [d.text for d in dirty(documents(20), none, seed=0)] == [d.text for d in documents(20)]
    with pytest.raises(ValueError, match="junk: expected a share between 0 and 1, got 2"):
        Dirt(junk=2)


def test_the_steps_undo_what_the_dirt_did():
    pytest.importorskip("resiliparse")
    steps = make_steps(("extract", "normalise", "gopher"), CleanConfig())
    broken = mojibake(TEXT)
    assert "â€™" in broken and fix_mojibake(broken) == TEXT.replace("'", "’")
    page_ = markup(TEXT, ["Home | News | Sport"], ["All rights reserved"])
    text = clean(Document("p", page_, "docs"), steps).text
    assert "<" not in text and "gtag" not in text and "    open(x)" in text and "the answer to it is the empty string" in text
    plain = Document("t", TEXT + "with a < b\n", "docs")
    assert clean(plain, steps).text == plain.text  # what is no markup is not extracted from
    junk = [d for d in dirty(documents(400), Dirt(), seed=0) if d.id.endswith("junk")]
    removed = [isinstance(clean(d, steps), Removed) for d in junk]
    assert len(junk) > 80 and np.mean(removed) > 0.95


# Comparison


def test_the_gain_by_hand(tmp_path):
    sizes = np.array([100, 300, 100])
    held_out = HeldOutTexts(["a", "b", "a"], sizes, (0, 1))
    bits = np.array([[210.0, 610.0, 210.0], [190.0, 590.0, 190.0]])
    base = Arm("raw", "as it came", bits, [(10, 3.0), (20, 2.0)], 50, 5, 0.4, "", [(2.9, 3.1), (1.9, 2.1)])
    bits = np.array([[150.0, 600.0, 150.0], [150.0, 600.0, 150.0]])
    better = Arm("cleaned", "cleaned", bits, [(10, 2.5), (20, 1.8)], 40, 4, 0.5, "")
    results = compare([base, better], held_out)
    raw, cleaned = results["arms"]
    assert raw["bits_per_byte"] == 2.0 and cleaned["bits_per_byte"] == 1.8 and raw["tokens_to_match"] is None
    assert cleaned["gain"]["all"]["mean"] == pytest.approx(0.2) and cleaned["relative_gain"] == pytest.approx(0.1)
    assert cleaned["gain"]["a"]["mean"] == pytest.approx(0.5) and cleaned["gain"]["b"]["mean"] == 0.0
    assert cleaned["gain_by_seed"] == pytest.approx([130 / 500, 70 / 500])
    assert cleaned["documents_won"]["mean"] == pytest.approx(2 / 3)
    assert cleaned["tokens_to_match"] == pytest.approx(10 + 10 * 0.5 / 0.7)
    assert results["tokens"] == 20 and results["held_out"] == {"documents": 3, "bytes": 500, "sources": ["a", "b"]}
    html = page(results, "Title")
    assert "http" not in html.replace("http-equiv", "") and html.count('role="img"') == 2 and "+0.2000" in html
    assert html.count("<polygon") == 1 and "bands: lowest to highest of the seeds" in html
    gain, curves = gain_figure(results), curve_figure(results)
    assert "cleaned · b: +0.0000 (+0.0000 to +0.0000)" in gain.alt
    assert "raw from 3.000 to 2.000; cleaned from 2.500" in curves.alt
    pytest.importorskip("matplotlib")
    write_ablation(results, tmp_path, title="Title")
    names = {f"ablation_{name}.{ending}" for name in ("gain", "curves") for ending in ("png", "svg", "dark.svg")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names


def test_an_arm_that_cannot_be_told_apart_is_called_so():
    draw = np.random.default_rng(0)
    sizes = np.full(200, 100)
    base = draw.normal(200, 20, (1, 200))
    curve = [(10, 2.0)]
    arms = [Arm("raw", "", base, curve, 1, 1, 1.0, "")] + [
        Arm(name, "", base - shift + draw.normal(0, 5, (1, 200)), curve, 1, 1, 1.0, "")
        for name, shift in (("same", 0.0), ("better", 4.0), ("worse", -4.0))
    ]
    lines = verdicts(compare(arms, HeldOutTexts(["a"] * 200, sizes, (0,))))
    assert [re.match(r"\w+ is (?:[\d.]+% )?(\w+)", line)[1] for line in lines] == ["not", "better", "worse"]


def test_ratio_interval_covers_the_ratio_it_should():
    draw, inside = np.random.default_rng(0), 0
    for seed in range(200):
        sizes = draw.uniform(10, 1000, 80)
        found = ratio_interval(sizes * draw.normal(2.0, 0.5, 80), sizes, resamples=400, seed=seed)
        inside += found.low <= 2.0 <= found.high
    assert 0.88 < inside / 200 <= 1.0
    exact = ratio_interval(np.array([2.0, 6.0]), np.array([1.0, 3.0]))
    assert (exact.mean, exact.low, exact.high, exact.n) == (2.0, 2.0, 2.0, 2)
    with pytest.raises(ValueError, match="denominator: expected 2 numbers above 0"):
        ratio_interval(np.ones(2), np.array([1.0, 0.0]))


def test_tokens_to_match():
    assert tokens_to_match([(10, 3.0), (20, 2.0)], 2.5) == 15.0
    assert tokens_to_match([(10, 3.0)], 3.0) == 10.0 and tokens_to_match([(10, 3.0)], 2.0) is None


def test_document_bits_are_those_of_the_stage(tiny, tmp_path):
    texts = [f"{TEXT * (i % 3 + 1)}number {i}" for i in range(5)]
    tokenizer = train_tokenizer(texts, tmp_path / "t.model", vocab_size=300)
    model = dataclasses.replace(tiny, vocab_size=300)
    mesh, compute = make_mesh(devices=jax.devices()[:1]), Compute("float32", "float32")
    params = fresh(table(model, head="lm_head"), mesh, seed=0)
    how = {"length": 32, "batch_size": 4, "mesh": mesh}
    with jax.set_mesh(mesh):
        bits = document_bits(model, compute, texts, tokenizer, **how)(params)
        loss = language_model_loss(model, compute)
        for i, text in enumerate(texts):
            (alone,) = bits_per_byte(loss, {"x": [text]}, tokenizer, **how)(params).values()
            assert bits[i] == pytest.approx(alone * len(text.encode()), rel=1e-5)
    tokens = len(tokenizer.encode(texts[0], bos=True, eos=True)) - 1
    assert bits[0] / tokens == pytest.approx(math.log2(300), rel=0.2)  # a model that knows nothing


# The command


def cleaned(**changes):
    """The second arm otherwise."""
    arms = get_config("smoke").to_dict()["arms"]
    return {"arms": arms | {"cleaned": arms["cleaned"] | changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ("raw",)}, r"order: expected each of the arms \['cleaned', 'raw'\] once, at least two"),
        ({"seeds": ()}, "expected at least one of each"),
        ({"dirt": {"junk": 3.0}}, "junk: expected a share between 0 and 1"),
        ({"leak_ngram": 0}, "leak_ngram: expected at least 1, got 0"),
        ({"held_out_bytes": 0}, "held_out_bytes: expected at least 1, got 0"),
        (cleaned(steps=("extrct",)), r"arms\.cleaned: step 'extrct' is unknown"),
        (cleaned(deduplication={"nearr": {}}), r"arms\.cleaned: .*nearr: unknown field of Deduplication"),
        (cleaned(weights={"stdlib_docs": 0.0}), r"arms\.cleaned\.weights\.stdlib_docs: expected a positive share, got 0\.0"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse(AblationConfig, {**get_config("smoke").to_dict(), **changes})


def test_held_out_bytes_that_no_document_fits_are_refused(tmp_path):
    config = parse(AblationConfig, {**get_config("smoke").to_dict(), "held_out_bytes": 10})
    with pytest.raises(ConfigError, match="held_out_bytes: expected room for a document, got 10: none is held out"):
        ablation.make_pool(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_programs_go_by_the_share_of_the_pool_and_corpora_come_before_training(tmp_path, monkeypatch):
    seen = []

    def run(config, output):
        seen.append(f"corpus {config.deduplication.evaluation_share} {Path(output).parent.name}")
        return {}

    def train_arm(config, name, *_):
        seen.append(f"train {name}")
        raise KeyboardInterrupt

    (tmp_path / "pool/held_out").mkdir(parents=True)
    config = parse(AblationConfig, get_config("smoke"))
    for name in config.sources:
        for path in (tmp_path / f"pool/{name}.jsonl", tmp_path / f"pool/held_out/{name}.jsonl"):
            path.write_text(json.dumps({"text": "words", "source": name}) + "\n")
    monkeypatch.setattr(ablation.corpus, "run", run)
    monkeypatch.setattr(ablation, "_train_config", lambda *_: types.SimpleNamespace(mesh=None))
    monkeypatch.setattr(ablation, "make_mesh", lambda _: None)
    monkeypatch.setattr(ablation, "train_arm", train_arm)
    (tmp_path / "raw/corpus").mkdir(parents=True)
    train_tokenizer([TEXT], tmp_path / "raw/corpus/tokenizer.model", vocab_size=300)
    monkeypatch.setattr(ablation, "size", lambda _: types.SimpleNamespace(vocab_size=300))
    with pytest.raises(KeyboardInterrupt):
        ablation.run(config, tmp_path)
    assert seen == ["corpus 0.1 raw", "corpus 0.1 cleaned", "train raw"]


def test_every_ablation_parses():
    for name in ("clean", "mixture", "crawl", "smoke"):
        config = parse(AblationConfig, get_config(name))
        assert config.order[0] in config.arms and set(config.order) == set(config.arms)
    with pytest.raises(ValueError, match="ablation 'x' is unknown; expected clean, mixture, crawl or smoke"):
        get_config("x")


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "llama_jax.ablation", "--config=configs/ablation.py:smoke", f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "w" / "report.json").read_text())
    raw, cleaned = results["arms"]
    assert (raw["name"], cleaned["name"]) == ("raw", "cleaned") and results["tokens"] == 6 * 4 * 256
    assert done.stdout.strip() == "\n".join(verdicts(results))
    assert cleaned["corpus"]["documents"] < raw["corpus"]["documents"]
    assert len(raw["curve"]) == 2 and 2 < raw["bits_per_byte"] < 9
    held_out = {row["text"] for path in (tmp_path / "w" / "pool" / "held_out").glob("*.jsonl")
                for row in map(json.loads, path.read_text().splitlines())}  # fmt: skip
    pool = "\n".join(path.read_text() for path in (tmp_path / "w" / "pool").glob("*.jsonl"))
    assert results["held_out"]["documents"] == len(held_out)
    assert not any(json.dumps(text[:200])[1:-1] in pool for text in held_out)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*.array_record")}
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*.array_record")} == before
