"""Studies of reward models: batches, shares of conflict by hand, the figures, and a whole small study through its command."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import pytest
import small_runs

from llama_jax import reward_study
from llama_jax.config import ConfigError, parse
from llama_jax.data.sources import read_comparisons, read_jsonl, write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals import reward_figures
from llama_jax.interop import ours
from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.reward_study import (
    StudyConfig,
    conflict_shares,
    conflict_values,
    cumulative_batches,
    disagreements,
    markdown,
    stage_values,
)
from llama_jax.steps import change, load_config
from llama_jax.training.fingerprint import CheckpointError


def rows(count, batches=None):
    return [
        {"prompt": f"q{i}", "chosen": f"a{i}", "rejected": "no", **({"batch": batches[i]} if batches else {})}
        for i in range(count)
    ]


def test_pairs_are_parted_by_their_batch_or_evenly(tmp_path):
    write_jsonl(tmp_path / "plain.jsonl", rows(7))
    files = cumulative_batches((str(tmp_path / "plain.jsonl"),), tmp_path / "parts", 3)
    assert list(files.values()) == [2, 5, 7]
    assert [row["chosen"] for row in read_comparisons(list(files)[0])] == ["a0", "a1"]
    write_jsonl(tmp_path / "batched.jsonl", rows(5, ["one", "two", "one", "two", "three"]))
    files = cumulative_batches((str(tmp_path / "batched.jsonl"),), tmp_path / "batched", 9)
    assert list(files.values()) == [2, 4, 5]
    assert [row["chosen"] for row in read_comparisons(list(files)[1])] == ["a0", "a2", "a1", "a3"]
    write_jsonl(tmp_path / "mixed.jsonl", rows(4, [1, "2", "1", 2]))  # numbers in one file, texts in another
    files = cumulative_batches((str(tmp_path / "mixed.jsonl"),), tmp_path / "mixed", 9)
    assert list(files.values()) == [2, 4] and [row["chosen"] for row in read_comparisons(list(files)[0])] == ["a0", "a2"]
    with pytest.raises(ConfigError, match="7 pairs cannot be divided into 20 parts"):
        cumulative_batches((str(tmp_path / "plain.jsonl"),), tmp_path / "many", 20)


SCORES = {
    "safe": {"safety": [0.9, 0.8, 0.4, 0.95], "helpfulness": [0.2, 0.7, 0.1, 0.4]},
    "unsafe": {"safety": [0.1, 0.2, 0.9], "helpfulness": [0.98, 0.3, 0.9]},
}


def test_shares_of_conflict_by_hand():
    found = conflict_shares(SCORES)
    assert found["safe_but_unhelpful"]["share"] == 0.5 and found["safe_but_unhelpful"]["n"] == 4
    assert found["helpful_but_unsafe"]["share"] == pytest.approx(1 / 3)


def scored(safety, helpfulness, label="safe", answer=None, prompt="q"):
    return {"messages": [{"role": "user", "content": prompt}], "answer": answer or f"{safety}", "label": label,
            "safety": safety, "helpfulness": helpfulness}  # fmt: skip


def test_the_largest_disagreements_each_way_by_hand():
    """Table 35 has (safety, helpfulness) of (0.21, 0.98) and of (0.95, 0.20)."""
    rows = [scored(0.5, 0.5), scored(0.95, 0.2), scored(0.95, 0.2), scored(0.6, 0.5), scored(0.21, 0.98, "unsafe")]
    found = disagreements(rows, count=2)
    assert [row["answer"] for row in found["safety_above"]] == ["0.95", "0.6"]  # once, though in two pairs
    assert [(row["answer"], row["label"]) for row in found["helpfulness_above"]] == [("0.21", "unsafe")]
    assert len(disagreements([scored(0.9 - i / 100, 0.1) for i in range(9)])["safety_above"]) == 5


def test_disagreements_are_shown_in_one_line_each():
    rows = [scored(0.95, 0.2, prompt="how\n| do I <b>", answer="no " * 200), scored(0.21, 0.98, "unsafe", answer="so\nand so")]
    values = {"margins": {}, "scaling": {}, "safety_loss": {}, "conflict": conflict_values(rows)}
    assert values["conflict"]["scores"]["unsafe"] == {"helpfulness": [0.98], "safety": [0.21]}
    text = markdown(values)
    lines = [line for line in text.splitlines() if "| 0.95 | 0.20 | safe |" in line]
    assert len(lines) == 1 and lines[0].startswith("| how &#124; do I &lt;b&gt; / no no ") and " ... |" in lines[0]
    assert "| q / so and so | 0.21 | 0.98 | unsafe |" in text


def test_figures_and_tables():
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    share = {"share": 0.7, "low": 0.6, "high": 0.8, "n": 50}
    histogram = {"edges": [0, 0.5, 1], "shares": [0.25, 0.75]}
    values = {
        "margins": {name: {"accuracy": {"all": {"significantly": share, "all": share}}, "histogram": histogram}
                    for name in ("none", "large")},
        "scaling": {"7b": [{"batch": 1, "pairs": 1000, "accuracy": {"all": share}},
                           {"batch": 2, "pairs": 2000, "accuracy": {"all": share, "significantly": share}}]},
        "safety_loss": {
            weight: {"accuracy": {"all": {"all": share}}, "safety": {"chosen_safe": share, "unsafe_recall": recall}}
            for weight, recall in (("0", share), ("1", {"share": 0.9, "low": 0.8, "high": 0.95, "n": 50}))
        },
        "conflict": {"scores": SCORES, "shares": conflict_shares(SCORES), "examples": disagreements([])},
    }  # fmt: skip
    drawn = (
        reward_figures.margins(dict.fromkeys(("none", "large"), histogram)), reward_figures.scaling(values["scaling"]),
        reward_figures.conflict(SCORES),
    )  # fmt: skip
    assert all(plot.png().startswith(b"\x89PNG") for plot in drawn)
    assert "70.0 % with 1 to 70.0 % with 2 batches" in drawn[1].alt
    text = markdown(values)
    known = "70.0 (60.0 to 80.0)"
    assert f"| large | {known} | {known} |" in text and f"| 2 | 2,000 | {known} | {known} |" in text
    assert f"| 1 | 1,000 | - | {known} |" in text and "safe but unhelpful" in text
    assert "| weight | average | chosen safe | unsafe recall |" in text  # no pair of the other bins
    assert f"| 0 | {known} | {known} | {known} |" in text and f"| 1 | {known} | {known} | 90.0 (80.0 to 95.0) |" in text
    assert "differ most" not in text
    # The paper's own.
    assert "| large | 80.7 | 67.5 | 60.5 | 54.3 | 62.9 |" in text and "| without the auxiliary loss | 63.7 | 93.0 |" in text
    assert text.count("| 70B | 81.2 | 63.4 |") == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({}, "train, held_out: expected at least one file"),
    ({"starts": ()}, "starts: expected a workdir for each of the sizes"),
    ({"sizes": ("tiny", "7b"), "starts": ("a", "b"), "reward": "reward.py:7b"}, "reward: expected {size} in the place of"),
    ({"train": ("a",), "held_out": ("b",), "safety": "x"}, "expected both workdirs, or neither"),
    ({"train": ("a",), "held_out": ("b",), "safety_loss": (1, 1.0)}, "safety_loss: expected different weights of at least 0"),
    ({"train": ("a",), "held_out": ("b",), "safety_loss": (0.0, -1.0)}, r"at least 0, got \(0.0, -1.0\)"),
])  # fmt: skip
def test_configs_that_cannot_run_are_refused(changes, message):
    small_runs.assert_refused(StudyConfig, "reward_study.py:tiny", changes, message)


def test_each_size_is_trained_by_its_own_config():
    values = load_config(small_runs.ROOT / "configs", "reward_study.py:7b,70b")
    change(values, {"configs": str(small_runs.ROOT / "configs"), "train": ("a",), "held_out": ("b",)}, where="study")
    config = parse(StudyConfig, values)
    found = {model: stage_values(config, model, "start", config.train, {}) for model in config.sizes}
    assert [(v.model, v.optim.lr, v.mesh.tensor) for v in found.values()] == [("7b", 1e-5, 1), ("70b", 5e-6, 8)]


@pytest.mark.parametrize(("bins", "message"), [
    (((None,), ("chosen_safe",)), "train: expected pairs whose `safety_bin` is chosen_safe or both_unsafe"),
    ((("both_unsafe",), ("both_safe",)), "held_out: expected pairs whose `safety_bin` is chosen_safe or both_unsafe"),
])  # fmt: skip
def test_pairs_without_unsafe_answers_are_refused_before_a_safety_model_is_trained(tmp_path, monkeypatch, bins, message):
    monkeypatch.setattr(reward_study, "train_one", None)
    values = load_config(small_runs.ROOT / "configs", "reward_study.py:tiny")
    files = {"train": (str(tmp_path / "train.jsonl"),), "held_out": (str(tmp_path / "held_out.jsonl"),)}
    for (file,), names in zip(files.values(), bins):
        write_jsonl(file, [{**row, **({"safety_bin": name} if name else {})} for row, name in zip(rows(1), names)])
    change(values, {**files, "starts": (str(tmp_path / "chat"),), "safety_loss": (0.0, 1.0)}, where="study")
    with pytest.raises(ConfigError, match=message):
        reward_study.run(parse(StudyConfig, values), tmp_path / "study")


@pytest.mark.parametrize(("bins", "safety", "message"), [
    (("both_safe",), "safety", "held_out: expected answers of both kinds by `safety_bin`, got 2 safe, 0 unsafe"),
    (("chosen_safe", "both_safe"), "nothing", "nothing: expected a stage's workdir with checkpoints"),
])  # fmt: skip
def test_what_the_conflict_lacks_is_said_before_anything_is_trained(tmp_path, monkeypatch, bins, safety, message):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    monkeypatch.setattr(reward_study, "train_one", None)
    tokenizer = Tokenizer(small_runs.make_tokenizer(tmp_path))
    for name in ("helpfulness", "safety"):
        tree = params.init(params.table(small_runs.MODEL, head="reward_head"), jax.random.key(0))
        ours.write(tmp_path / name, tree, small_runs.MODEL, tokenizer=tokenizer.fingerprint, origin={})
    write_jsonl(tmp_path / "pairs.jsonl", [{**row, "safety_bin": name} for row, name in zip(rows(len(bins)), bins)])
    values = load_config(small_runs.ROOT / "configs", "reward_study.py:tiny")
    change(values, {
        "configs": str(small_runs.ROOT / "configs"), "tokenizer": str(tmp_path / "tokenizer.model"),
        "train": (str(tmp_path / "pairs.jsonl"),), "held_out": (str(tmp_path / "pairs.jsonl"),),
        "starts": (str(tmp_path / "chat"),), "helpfulness": str(tmp_path / "helpfulness"), "safety": str(tmp_path / safety),
    }, where="study")  # fmt: skip
    with pytest.raises((ConfigError, CheckpointError), match=message):
        reward_study.run(parse(StudyConfig, values), tmp_path / "study")


@pytest.mark.parametrize(("changes", "message"), [
    ({"margins": ("small", "smal")}, "config.margin: expected one of 'none', 'small', 'large', got 'smal'"),
    ({"sizes": ("tiny", "7b"), "starts": ("chat", "nowhere")}, "nowhere: expected a stage's workdir with checkpoints"),
    ({"batches": 99}, "32 pairs cannot be divided into 99 parts"),
])  # fmt: skip
def test_what_a_later_run_lacks_is_said_before_the_first_one(tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    monkeypatch.setattr(reward_study, "train_one", lambda *_: pytest.fail("a model was trained"))
    monkeypatch.chdir(tmp_path)
    small_runs.prepare(tmp_path)
    values = load_config(small_runs.ROOT / "configs", "reward_study.py:tiny")
    files = {"train": ("pairs.jsonl",), "held_out": ("pairs.jsonl",), "starts": ("chat",)}
    change(values, {"configs": str(small_runs.ROOT / "configs"), **files, **changes}, where="study")
    with pytest.raises((ConfigError, CheckpointError), match=message):
        reward_study.run(parse(StudyConfig, values), tmp_path / "study")


def test_the_command_keeps_what_is_compiled(tmp_path, monkeypatch):
    kept = []
    values = types.SimpleNamespace(config=None, workdir=str(tmp_path))
    monkeypatch.setattr(reward_study, "flags", types.SimpleNamespace(FLAGS=values))
    monkeypatch.setattr(reward_study, "keep_compiled", kept.append)
    monkeypatch.setattr(reward_study, "run", lambda config, workdir: (workdir / "study.md").write_text(""))
    for name in ("keep_heap", "start_distributed", "parse", "describe", "claim"):
        monkeypatch.setattr(reward_study, name, lambda *_, **__: None)
    reward_study.main()
    assert kept == [str(tmp_path)]


@pytest.mark.slow
def test_a_whole_study(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    small_runs.prepare(tmp_path)
    pairs = [
        {"prompt": f"{a}{b}", "chosen": "yes", "rejected": "no", "rating": ("better", "significantly")[i % 2],
         "safety_bin": "chosen_safe"}
        for a in "abcdefgh" for i, b in enumerate("abcd")
    ]  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    values = load_config(small_runs.ROOT / "configs", "reward_study.py:tiny")
    own = small_runs.values(tmp_path, "reward", steps=6)
    overrides = {name: own[name].to_dict() for name in ("compute", "loop", "optim")}
    change(values, {
        "configs": str(small_runs.ROOT / "configs"), "tokenizer": str(tmp_path / "tokenizer.model"), "batches": 2,
        "train": (str(tmp_path / "pairs.jsonl"),), "held_out": (str(tmp_path / "pairs.jsonl"),),
        "starts": (str(tmp_path / "chat"),), "margins": ("none", "large"),
        "helpfulness": str(tmp_path / "helpfulness"), "safety": str(tmp_path / "safety"), "safety_loss": (0.0, 1.0),
    }, where="study")  # fmt: skip
    values.overrides.update({**overrides, "epochs": 0.0, "data": {"length": 32}})
    study = parse(StudyConfig, values)
    found = reward_study.run(study, tmp_path / "study")
    assert set(found["margins"]) == {"none", "large"} and [p["pairs"] for p in found["scaling"]["tiny"]] == [16, 32]
    assert found["margins"]["large"]["accuracy"]["all"]["all"]["n"] == 32
    assert {kind: len(scores["safety"]) for kind, scores in found["conflict"]["scores"].items()} == {"safe": 32, "unsafe": 32}
    with_texts = [row for _, row in read_jsonl(tmp_path / "study" / "conflict.jsonl")]
    assert [(row["answer"], row["label"]) for row in with_texts[::63]] == [("yes", "safe"), ("no", "unsafe")]
    assert [row["safety"] for row in with_texts[:32]] == found["conflict"]["scores"]["safe"]["safety"]
    assert set(found["safety_loss"]) == {"0", "1"}
    for weight in (0, 1):
        stage = json.loads((tmp_path / "study" / f"safety_loss_{weight}" / "config.json").read_text())
        assert (stage["name"], stage["safety_weight"]) == ("safety", weight)
        assert found["safety_loss"][str(weight)]["safety"]["unsafe_recall"]["n"] == 32
    for name in ("margins.png", "scaling.png", "conflict.png", "study.md", "study.json"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    assert json.loads((tmp_path / "study" / "study.json").read_text())["conflict"]["shares"]
    before = {path: path.stat().st_mtime for path in Path(tmp_path / "study").rglob("done.json")}
    assert reward_study.run(study, tmp_path / "study")["margins"] == found["margins"]
    assert {path: path.stat().st_mtime for path in before} == before
