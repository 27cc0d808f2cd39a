"""Studies of reward models: batches, shares of conflict by hand, the figures, and a whole small study through its command."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
import small_runs

from llama_jax import reward_study
from llama_jax.config import ConfigError, parse
from llama_jax.data.sources import read_comparisons, write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals import reward_figures
from llama_jax.interop import ours
from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.reward_study import StudyConfig, conflict_shares, cumulative_batches, markdown, stage_values
from llama_jax.steps import change, load_config
from llama_jax.training.checkpoint import CheckpointError


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
    with pytest.raises(ConfigError, match="7 pairs cannot be divided into 20 parts"):
        cumulative_batches((str(tmp_path / "plain.jsonl"),), tmp_path / "many", 20)


SCORES = {
    "safe": {"safety": [0.9, 0.8, 0.4, 0.95], "helpfulness": [0.2, 0.7, 0.1, 0.4]},
    "unsafe": {"safety": [0.1, 0.2, 0.9], "helpfulness": [0.98, 0.3, 0.9]},
}


def test_shares_of_conflict_by_hand():
    found = conflict_shares(SCORES)
    assert found["safe_but_unhelpful"]["share"] == 0.5 and found["safe_but_unhelpful"]["count"] == 4
    assert found["helpful_but_unsafe"]["share"] == pytest.approx(1 / 3)


def test_figures_and_tables():
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    share = {"share": 0.7, "low": 0.6, "high": 0.8, "count": 50}
    histogram = {"edges": [0, 0.5, 1], "shares": [0.25, 0.75]}
    values = {
        "margins": {name: {"accuracy": {"all": {"significantly": share, "all": share}}, "histogram": histogram}
                    for name in ("none", "large")},
        "scaling": {"7b": [{"batch": 1, "pairs": 1000, "accuracy": {"all": share}},
                           {"batch": 2, "pairs": 2000, "accuracy": {"all": share, "significantly": share}}]},
        "conflict": {"scores": SCORES, "shares": conflict_shares(SCORES)},
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


@pytest.mark.parametrize(("changes", "message"), [
    ({}, "train, held_out: expected at least one file"),
    ({"starts": ()}, "starts: expected a workdir for each of the sizes"),
    ({"sizes": ("tiny", "7b"), "starts": ("a", "b"), "reward": "reward.py:7b"}, "reward: expected {size} in the place of"),
    ({"train": ("a",), "held_out": ("b",), "safety": "x"}, "expected both workdirs, or neither"),
])  # fmt: skip
def test_configs_that_cannot_run_are_refused(changes, message):
    small_runs.assert_refused(StudyConfig, "reward_study.py:tiny", changes, message)


def test_each_size_is_trained_by_its_own_config():
    values = load_config(small_runs.ROOT / "configs", "reward_study.py:7b,70b")
    change(values, {"configs": str(small_runs.ROOT / "configs"), "train": ("a",), "held_out": ("b",)}, where="study")
    config = parse(StudyConfig, values)
    found = {model: stage_values(config, model, "start", config.train, {}) for model in config.sizes}
    assert [(v.model, v.optim.lr, v.mesh.tensor) for v in found.values()] == [("7b", 1e-5, 1), ("70b", 5e-6, 8)]


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
        "helpfulness": str(tmp_path / "helpfulness"), "safety": str(tmp_path / "safety"),
    }, where="study")  # fmt: skip
    values.overrides.update({**overrides, "epochs": 0.0, "data": {"length": 32}})
    study = parse(StudyConfig, values)
    found = reward_study.run(study, tmp_path / "study")
    assert set(found["margins"]) == {"none", "large"} and [p["pairs"] for p in found["scaling"]["tiny"]] == [16, 32]
    assert found["margins"]["large"]["accuracy"]["all"]["all"]["count"] == 32
    assert {kind: len(scores["safety"]) for kind, scores in found["conflict"]["scores"].items()} == {"safe": 32, "unsafe": 32}
    for name in ("margins.png", "scaling.png", "conflict.png", "study.md", "study.json"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    assert json.loads((tmp_path / "study" / "study.json").read_text())["conflict"]["shares"]
    before = {path: path.stat().st_mtime for path in Path(tmp_path / "study").rglob("done.json")}
    assert reward_study.run(study, tmp_path / "study")["margins"] == found["margins"]
    assert {path: path.stat().st_mtime for path in before} == before
