"""The whole recipe through its real command at size `smoke`; killed inside PPO, it goes on to the same parameters."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax.interop.restore import fingerprint

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def command(workdir, *more, size="smoke"):
    return [
        sys.executable, "-m", "llama_jax.recipe", f"--config=configs/recipe.py:{size}", f"--workdir={workdir}", *more,
    ]  # fmt: skip


def fingerprints(workdir, stage):
    steps = (Path(workdir) / stage / "checkpoints").glob("[0-9]*/meta/metadata")
    newest = max(steps, key=lambda path: int(path.parents[1].name))
    return json.loads(newest.read_text())["fingerprints"]


def ledger(workdir):
    return json.loads((workdir / "ledger.json").read_text())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_ledger(workdir, names):
    """Every file and checkpoint that the ledger names is there as it says, and pools come from the policies it names."""
    found = ledger(workdir)
    assert list(found) == names
    for name, version in found.items():
        for entry in version["data"]:
            data = (workdir / entry["file"]).read_bytes()
            assert (data.count(b"\n"), hashlib.sha256(data).hexdigest()) == (entry["rows"], entry["sha256"]), entry
        for entry in (*version["checkpoints"], *version["compared"]):
            assert entry["parameters"] == fingerprint(workdir / entry["workdir"]), entry
            assert (workdir / entry["start"] / "checkpoints").is_dir(), entry
        assert f"{name}/rejection" in {entry["workdir"] for entry in version["checkpoints"]}
        policy = fingerprint(workdir / version["sampled_from"])
        rows = rows_of(workdir / name / "rejection" / "pool.jsonl")
        assert all(row["policy"] == policy and row["version"] == name for row in rows)
        for scores in version["scores"].values():
            assert 0 <= scores["win_rate"]["mean"] <= 1 and set(scores["win_rate_by_track"]) == {"helpfulness", "safety"}
            # Figs. 11, 14 and 20: what the newest reward models say of it.
            assert 0 < scores["reward_score"] < 1 and scores["against"] == "sft"
            assert set(scores["win_rate_by_reward_models"]) == {"helpfulness", "safety"}
        assert version["scored_by"] == list(found.values())[-1]["scored_by"]
        for track, stage in version["scored_by"].items():
            assert (workdir / stage).resolve() == (workdir / f"reward_{track}").resolve()  # the newest
    shown = json.loads((workdir / "report.json").read_text())["versions"]
    scores = {name: entry for version in found.values() for name, entry in version["scores"].items()}
    for key in ("reward_score", "win_rate_by_reward_models", "win_rate"):
        assert {name: entry[key] for name, entry in scores.items()} == {n: shown[n][key] for n in shown if n != "sft"}
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One cache of compiled programs for all runs: they are those of one size."""
    kept = tmp_path_factory.mktemp("compiled")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(kept)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("recipe") / "run"
    subprocess.run(command(workdir), cwd=ROOT, check=True, env=environment, timeout=900)
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
    assert "simulat" in html and "data:image/svg+xml;base64" in html
    # With so few pairs a degree of preference may have none; everything else was measured.
    assert all(target["met"] is not None for target in report["targets"] if "degree" not in target["asked"])
    assert not list(finished.rglob("*.tmp"))


def test_the_ledger_of_two_versions(finished):
    first, second = check_ledger(finished, ["v1", "v2"]).values()
    assert (first["sampled_from"], second["sampled_from"]) == ("sft", "v1/rejection")
    compared = [(entry["workdir"], entry["temperature"], entry["start"]) for entry in first["compared"]]
    assert compared == [("sft", 0.8, "pretrain"), ("sft_variant", 1.1, "pretrain")] and second["compared"] == []
    assert set(second["scores"]) == {"v2", "v2_ppo"} and second["pools"] == ["v1/rejection", "v2/rejection"]
    # The second version collects nothing: its reward models are the first one's.
    assert not (finished / "v2" / "preferences").exists() and not (finished / "v2" / "reward_safety").exists()
    assert (finished / "rejection").readlink() == Path("v2/rejection")


def test_five_versions_are_the_papers(tmp_path, environment):
    subprocess.run(command(tmp_path, size="smoke,versions=5"), cwd=ROOT, check=True, env=environment, timeout=1800)
    versions = check_ledger(tmp_path, [f"v{n}" for n in range(1, 6)])
    assert [v["sampled_from"] for v in versions.values()] == ["sft", *(f"v{n}/rejection" for n in range(1, 5))]
    prompts = []
    for number in range(1, 6):
        config = json.loads((tmp_path / f"v{number}" / "rejection" / "config.json").read_text())
        # Each begins again from the base model, with the SFT data and the pools of all versions before it.
        assert config["start"] == str(tmp_path / "pretrain") and config["data"]["train"][0].endswith("sft.jsonl")
        assert config["pools"] == [str(tmp_path / f"v{n}" / "rejection" / "pool.jsonl") for n in range(1, number)]
        batches = [tmp_path / f"v{n}" / "preferences" for n in range(1, number + 1)]
        for track, other in (("helpfulness", "safety"), ("safety", "helpfulness")):
            reward = json.loads((tmp_path / f"v{number}" / f"reward_{track}" / "config.json").read_text())
            for name, kind in (("train", track), ("rest", other)):
                files = [batch / f"{kind}_train.jsonl" for batch in batches]
                assert reward["data"][name] == [str(path) for path in files if path.stat().st_size]  # a small one may be empty
        prompts += [json.dumps(row["prompt"]) for track in ("helpfulness", "safety")
                    for row in rows_of(tmp_path / f"v{number}" / "preferences" / f"{track}_train.jsonl")]  # fmt: skip
        found = json.loads((tmp_path / f"v{number}" / "rejection" / "temperatures.json").read_text())
        assert set(found["curves"]) == {"0.8", "1"} and found["temperature"] in (0.8, 1.0)
        assert (tmp_path / f"v{number}" / "ghost").exists() == (number > 3)
        assert (tmp_path / f"v{number}" / "ppo").exists() == (number == 5)
    assert len(set(prompts)) == len(prompts)  # fresh prompts for each batch
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["versions"]) == ["sft", "v1", "v2", "v3", "v4", "v5", "v5_ppo"]
    assert list(report["ghost_attention"]["recall"]) == ["baseline", "ghost"]
    assert list(report["ghost_versions"]) == ["v3", "v4", "v5", "v5_ppo"]
    for name, kinds in report["ghost_versions"].items():  # asked with the instructions of V4's dialogs
        answers = rows_of(tmp_path / "recall" / f"{name}.jsonl")
        assert set(kinds) == {"sentence", "capitals"} and {row["turn"] for row in answers} == {1, 2, 3}
        judged = sum(cell["n"] for turns in kinds.values() for cell in turns.values())
        assert judged == len(answers) > 0
    assert list(report["distillation"]["safety_score"]) == ["base", "generic", "category"]
    assert "Ghost Attention | an instruction of the first turn obeyed at turn 3" in (tmp_path / "report.md").read_text()
    for name in ("ghost_recall", "ghost_attention", "distillation"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert report["rejection"] == report["versions"]["v5"] and report["ppo"] == report["versions"]["v5_ppo"]
    for judge in ("win_rate_by_track", "win_rate_by_reward_models"):
        assert set(report["ppo"][judge]) == {"helpfulness", "safety"}
    assert list(report["reward_batches"]["helpfulness"]) == ["v1", "v2", "v3", "v4", "v5"]
    html = (tmp_path / "report.html").read_text()
    assert "V5 PPO" in html and html.count("data:image/svg+xml;base64") >= 16


def test_chat_answers_each_question_with_ppos_policy(finished, environment):
    done = subprocess.run(
        [
            sys.executable, "-m", "llama_jax.chat", f"--workdir={finished / 'ppo'}",
            f"--tokenizer={finished / 'corpus' / 'tokenizer.model'}", "--max_tokens=8", "--seed=3",
        ],
        cwd=ROOT, env=environment, input="What does `math.sqrt` do?\nWhat is `[INST]`?\n", capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "chat tag" in done.stdout  # the forged turn is refused, the session goes on


def test_a_finished_recipe_is_not_run_again(finished, environment):
    made = [*finished.rglob("done.json"), *finished.rglob("pool.jsonl"), *finished.glob("answers/*.jsonl"),
            *finished.glob("v1/preferences/*.jsonl"), *finished.glob("*/checkpoints/*/meta/metadata")]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in made}
    assert len(before) > 20
    subprocess.run(command(finished), cwd=ROOT, check=True, env=environment, timeout=300)
    assert {path: path.stat().st_mtime_ns for path in made} == before


def test_nothing_is_compiled_after_the_warm_up(finished):
    for stage in ("pretrain", "sft", "reward_helpfulness", "reward_safety", "rejection", "ppo"):
        done = json.loads((finished / stage / "done.json").read_text())
        assert done["compilations"] > 0 == done["compilations_after_warm_up"], stage


def test_another_config_is_refused_with_the_difference(finished, environment):
    done = subprocess.run(
        command(finished, "--config.seed=1"), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and "seed: 0 -> 1" in done.stderr and "Traceback" not in done.stderr


def test_killed_in_pretraining_sampling_and_ppo_it_ends_with_the_same_parameters(finished, tmp_path, environment):
    workdir = tmp_path / "run"
    for name in ("pretrain/checkpoints/3", "v1/rejection/pool.jsonl", "v2/ppo/checkpoints/1", "v2/ppo/checkpoints/3"):
        process = subprocess.Popen(command(workdir), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        sign = workdir / name
        limit = time.monotonic() + 600
        while not sign.exists():
            assert process.poll() is None and time.monotonic() < limit, f"no {name}"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (workdir / "v2" / "ppo" / "done.json").exists()
    subprocess.run(command(workdir), cwd=ROOT, check=True, env=environment, timeout=900)
    for stage in ("pretrain", "sft", "reward_helpfulness", "reward_safety", "rejection", "ppo"):
        assert fingerprints(workdir, stage) == fingerprints(finished, stage), stage
    for name in ("v1", "v2"):  # but for the paths, which are relative, nothing differs
        assert ledger(workdir)[name] == ledger(finished)[name]
    steps = [json.loads(line)["step"] for line in (workdir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) == list(range(8))
