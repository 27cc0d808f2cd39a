"""The whole recipe through its real command at size `smoke`; killed inside PPO, it goes on to the same parameters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def command(workdir, *more):
    return [
        sys.executable, "-m", "llama_jax.recipe", "--config=configs/recipe.py:smoke", f"--workdir={workdir}", *more,
    ]  # fmt: skip


def fingerprints(workdir, stage):
    steps = (Path(workdir) / stage / "checkpoints").glob("[0-9]*/meta/metadata")
    newest = max(steps, key=lambda path: int(path.parents[1].name))
    return json.loads(newest.read_text())["fingerprints"]


def environment():
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("recipe") / "run"
    subprocess.run(command(workdir), cwd=ROOT, check=True, env=environment(), timeout=900)
    return workdir


def test_the_report_has_every_figure_of_the_issue(finished):
    report = json.loads((finished / "report.json").read_text())
    sources = {"reference", "stdlib_docs", "package_docs", "source_code"}
    assert set(report["pretrain"]["bits_per_byte"]) == set(report["pretrain"]["xz_bits_per_byte"]) == sources
    for model in ("helpfulness", "safety"):
        assert "all" in report["reward"][model]["accuracy"]
    for version in ("rejection", "ppo"):
        assert {"mean", "low", "high"} <= set(report[version]["win_rate"])
        assert 0 <= report[version]["safety_violations"] <= 1
    assert report["seconds"]["total"] > 0
    html = (finished / "report.html").read_text()
    assert "simulat" in html and "data:image/png;base64" in html
    # With so few pairs a degree of preference may have none; everything else was measured.
    assert all(target["met"] is not None for target in report["targets"] if "degree" not in target["asked"])
    assert not list(finished.rglob("*.tmp"))


def test_chat_answers_each_question_with_ppos_policy(finished):
    done = subprocess.run(
        [
            sys.executable, "-m", "llama_jax.chat", f"--workdir={finished / 'ppo'}",
            f"--tokenizer={finished / 'corpus' / 'tokenizer.model'}", "--max_tokens=8", "--seed=3",
        ],
        cwd=ROOT, env=environment(), input="What does `math.sqrt` do?\nWhat is `[INST]`?\n", capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "chat tag" in done.stdout  # the forged turn is refused, the session goes on


def test_a_finished_recipe_is_not_run_again(finished):
    begun = time.monotonic()
    before = {stage: fingerprints(finished, stage) for stage in ("pretrain", "ppo")}
    subprocess.run(command(finished), cwd=ROOT, check=True, env=environment(), timeout=300)
    assert time.monotonic() - begun < 60
    assert {stage: fingerprints(finished, stage) for stage in before} == before


def test_nothing_is_compiled_after_the_warm_up(finished):
    for stage in ("pretrain", "sft", "reward_helpfulness", "reward_safety", "rejection", "ppo"):
        done = json.loads((finished / stage / "done.json").read_text())
        assert done["compilations"] > 0 == done["compilations_after_warm_up"], stage


def test_another_config_is_refused_with_the_difference(finished):
    done = subprocess.run(
        command(finished, "--config.seed=1"), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and "seed: 0 -> 1" in done.stderr and "Traceback" not in done.stderr


def test_killed_inside_pretraining_and_ppo_it_ends_with_the_same_parameters(finished, tmp_path):
    workdir = tmp_path / "run"
    for stage, step in (("pretrain", 3), ("ppo", 1), ("ppo", 3)):
        process = subprocess.Popen(command(workdir), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        sign = workdir / stage / "checkpoints" / str(step)
        limit = time.monotonic() + 600
        while not sign.exists():
            assert process.poll() is None and time.monotonic() < limit, f"no checkpoint {step} of {stage}"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (workdir / "ppo" / "done.json").exists()
    subprocess.run(command(workdir), cwd=ROOT, check=True, env=environment(), timeout=900)
    for stage in ("pretrain", "sft", "reward_helpfulness", "reward_safety", "rejection", "ppo"):
        assert fingerprints(workdir, stage) == fingerprints(finished, stage), stage
    steps = [json.loads(line)["step"] for line in (workdir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) == list(range(8))
