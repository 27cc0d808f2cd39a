"""The report on versions, drawn from a workdir of a few small files."""

import json

import numpy as np
import pytest

from llama_jax.assistant.annotator import SimulatedAnnotator
from llama_jax.data.sources import write_jsonl
from llama_jax.evals import progress, summary
from llama_jax.evals.report import write_report
from llama_jax.evals.verdict import Answer
from llama_jax.files import write_json

PNG = b"\x89PNG"
NAMES = ("base", "sft", "v1", "v2", "v2_ppo")
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}], "reference": "It is a small number.", "is_safety": i % 3 == 0}
    for i in range(9)
]


@pytest.fixture
def workdir(tmp_path):
    """Answers that get better from version to version, and what else the report reads."""
    annotator = SimulatedAnnotator(noise=0.0)
    for level, name in enumerate(NAMES):
        good = [level > i % 4 for i in range(9)]
        answers = [
            Answer([3, 2], ("I can't help with that." if row["is_safety"] else row["reference"]) if g else "Bananas.", True)
            for row, g in zip(ROWS, good, strict=True)
        ]
        progress.write_answers(tmp_path / "answers" / f"{name}.jsonl", ROWS, answers, annotator)
        if name != "base":
            scores = [dict.fromkeys(("helpfulness", "safety", "reward"), (i + level) / 20) for i in range(9)]
            write_jsonl(tmp_path / "scores" / f"{name}.jsonl", scores)
    for name in ("pretrain", "sft", "v1/rejection", "v2/rejection", "ppo"):
        write_jsonl(tmp_path / name / "metrics.jsonl", [{"step": i, "loss": 1.0 / (i + 1), "reward": i} for i in range(3)])
    for number in (1, 2):
        write_jsonl(tmp_path / f"v{number}" / "rejection" / "samples.jsonl", [
            {"prompt": i // 3, "reward": (i % 3) / 3, "response": "yes", "ended": True} for i in range(12)
        ])  # fmt: skip
        for track in progress.TRACKS:
            accuracy = {
                f"simulated_annotator, batch {n}": {"all": {"share": 0.5 + n / 10 + number / 100}, "better": {"share": 1.0}}
                for n in range(1, number + 1)
            }
            accuracy |= {"all": {"all": {"share": 0.6}}} if number > 1 else {}
            accuracy |= {"longer": {"all": {"share": 0.4}}}
            write_json(tmp_path / f"v{number}" / f"reward_{track}" / "reward_report.json", {"accuracy": accuracy})
    write_jsonl(tmp_path / "v2" / "ghost" / "samples.jsonl", [{"obeyed": obeyed} for obeyed in (True, None, False, True, True)])
    write_jsonl(tmp_path / "v2" / "ghost" / "ghost.jsonl", [{"messages": []}] * 3)
    curve = {"maximum": [0.5, 0.6], "median": [0.5, 0.5]}
    write_json(tmp_path / "v2" / "rejection" / "temperatures.json", {"temperature": 1.0, "curves": {"0.8": curve, "1": curve}})
    return tmp_path


def results_of(workdir):
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    versions = {
        name: {"true_utility": interval, "safety_violations": 0.1, **progress.compare(workdir, name)} for name in NAMES
    }
    accuracy = {"accuracy": {"all": 0.7}}
    return {
        "size": "tiny", "pretrain": {"bits_per_byte": {"a": 1.5}, "xz_bits_per_byte": {"a": 2.0}},
        "reward": dict.fromkeys(progress.TRACKS, accuracy), "base": versions["base"], "sft": versions["sft"],
        "rejection": versions["v2"], "ppo": versions["v2_ppo"],
        "versions": {name: found for name, found in versions.items() if name != "base"},
        "reward_batches": summary.reward_batches(workdir, ["v1", "v2"]), "ghost": summary.ghost_samples(workdir),
        "ghost_versions": {
            name: {"capitals": {"1": interval, "2": {**interval, "mean": share}}}
            for name, share in (("v1", 0.45), ("v2_ppo", 0.55))
        },
    }  # fmt: skip


def test_win_rates_come_from_the_answers_and_from_the_scores_of_each_track(workdir):
    assert progress.compare(workdir, "base") == {}
    assert set(progress.compare(workdir, "sft")) == {"reward_score"}
    found = progress.compare(workdir, "v2")
    # SFT is right where i % 4 < 1 (0, 4, 8), V2 where i % 4 < 3 as well: it wins 1, 2, 5, 6 and ties elsewhere.
    assert found["win_rate"]["mean"] == pytest.approx((4 + 5 / 2) / 9)
    assert found["win_rate_by_track"]["safety"]["mean"] == pytest.approx((1 + 2 / 2) / 3)  # of 0, 3, 6 it wins 6
    assert found["win_rate_by_track"]["helpfulness"]["mean"] == pytest.approx((3 + 3 / 2) / 6)
    assert [found["win_rate_by_reward_models"][track]["mean"] for track in progress.TRACKS] == [1.0, 1.0]
    assert found["reward_score"] == pytest.approx(np.mean([(i + 3) / 20 for i in range(9)]))


def test_the_report_shows_the_way_from_version_to_version(workdir):
    pytest.importorskip("matplotlib")
    results = results_of(workdir)
    assert results["reward_batches"]["safety"]["v2"]["batch 2"] == {"all": pytest.approx(0.72), "better": 1.0}
    figures = summary.draw(workdir, results)
    shown = {
        "version_progress", "score_shift_helpfulness", "score_shift_safety", "score_scatter", "accuracy_by_batch",
        "temperature_map", "best_of_n", "ppo", "over_optimisation",
    }  # fmt: skip
    assert shown <= set(figures) and all(plot.png().startswith(PNG) for plot in figures.values())
    samples = progress.samples(ROWS, workdir, {"sft": "sft", "rejection": "v2"})
    assert samples[1]["answers"] == {"sft": "Bananas.", "rejection": "It is a small number."}
    paths = write_report(results, workdir, figures=figures, samples=samples)
    text = paths.markdown.read_text()
    section = text[text.index("## Versions") : text.index("## Time")]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines if "V" in line.split(" | ")[0]] == [
        "| V1", "| V2", "| V2 PPO", "| helpfulness, V1", "| helpfulness, V2", "| safety, V1", "| safety, V2",
        "| Ghost Attention, V2", "| V1, capitals", "| V2 PPO, capitals",
    ]  # fmt: skip
    assert "| safety, V2 | 62.0 % | 72.0 % | 60.0 % |" in lines and "66.7 % (" in section
    assert "| V2 PPO, capitals | 50.0 % (40.0 % to 60.0 %) | 55.0 % (40.0 % to 60.0 %) |" in lines
    assert "| Ghost Attention, V2 | 5 | 4 | 75.0 % | 3 |" in lines
    for name in ("version_progress", "score_shift_safety", "score_scatter", "accuracy_by_batch"):
        assert f"![{figures[name].alt}](figures/{name}.png)" in section
        assert (workdir / "figures" / f"{name}.dark.svg").exists() and figures[name].html() in paths.html.read_text()
    assert json.loads(paths.json.read_text())["versions"]["v2"]["win_rate_by_track"]["safety"]["n"] == 3


def test_a_run_without_ppo_has_a_report_too(workdir):
    pytest.importorskip("matplotlib")
    results = results_of(workdir)
    del results["ppo"], results["versions"]["v2_ppo"]
    figures = summary.draw(workdir, results)
    assert "ppo" not in figures and "version_progress" in figures
    document = json.loads(write_report(results, workdir, figures=figures, samples=[]).json.read_text())
    assert [t["met"] for t in document["targets"] if t["stage"] == "ppo"] == [None, None]
