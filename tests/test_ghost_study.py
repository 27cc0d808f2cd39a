"""The study of Ghost Attention: its table, figure and target from given answers, and configs that cannot run.

The whole study runs in the slow test of the five versions (tests/test_recipe.py).
"""

import pytest
import small_runs

from llama_jax.config import parse
from llama_jax.data.sources import write_jsonl
from llama_jax.evals import ghost_figures
from llama_jax.evals.report_sections import build_sections
from llama_jax.evals.targets import check_targets
from llama_jax.ghost_study import GhostStudy, GhostStudyConfig
from llama_jax.steps import load_config


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high, "n": 48}


FOUND = {
    "recall": {
        "baseline": {"2": interval(0.25, 0.1, 0.4), "20": interval(0.0, 0.0, 0.0)},
        "ghost": {"2": interval(0.9, 0.8, 1.0), "20": interval(0.875, 0.8, 0.95)},
    },
    "policy_obeys": 0.92,
}


def test_the_table_stands_beside_the_papers():
    assert ghost_figures.rows(FOUND["recall"]) == [
        ["2", "25 % (10 to 40)", "90 % (80 to 100)", "100 %", "100 %"],
        ["20", "0 % (0 to 0)", "88 % (80 to 95)", "0 %", "100 %"],
    ]
    assert "| 20 | 0 % (0 to 0) | 88 % (80 to 95) | 0 % | 100 % |" in ghost_figures.markdown(FOUND)


@pytest.mark.parametrize(("ghost", "baseline", "met"), [(0.8, 0.29, True), (0.79, 0.1, False), (0.9, 0.3, False)])
def test_the_target_is_that_of_the_last_turn(ghost, baseline, met):
    recall = {"baseline": {"2": interval(0, 0, 0), "20": interval(baseline, 0, 1)}, "ghost": {"20": interval(ghost, 0, 1)}}
    (target,) = [t for t in check_targets({"ghost_attention": {"recall": recall}}) if t.stage == "Ghost Attention"]
    assert target.met is met and "turn 20" in target.asked


def test_the_report_has_both_studies_where_they_were_made():
    distillation = {
        "prompts": 20, "kept": 7, "safety_score": {"base": interval(0.5, 0.4, 0.6), "generic": interval(0.6, 0.5, 0.7)},
        "before": {"true_utility": interval(0.6, 0.5, 0.7), "safety_violations": 0.1},
        "after": {"true_utility": interval(0.6, 0.5, 0.7), "safety_violations": 0.05},
    }  # fmt: skip
    results = {"ghost_attention": FOUND, "distillation": distillation}
    sections = {section.title: section for section in build_sections(results, ["ghost_recall", "distillation"])}
    assert sections["Ghost Attention"].figures == ["ghost_recall"]
    scores, policies = sections["Safety context distillation"].tables
    assert scores.rows[1] == ["generic", "0.600 (0.500 to 0.700)"] and policies.rows[1][2] == "5.0 %"
    assert "Ghost Attention" not in {section.title for section in build_sections({}, [])}


def test_samples_that_no_program_can_judge_count_neither_way(tmp_path):
    write_jsonl(tmp_path / "ghost" / "samples.jsonl", [{"obeyed": obeyed} for obeyed in (True, True, False, None, None, True)])
    values = load_config(small_runs.ROOT / "configs", "ghost_study.py:tiny")
    values.start = "chat"
    assert GhostStudy(parse(GhostStudyConfig, values), tmp_path).policy_obeys() == 0.75


def test_the_figure_is_drawn_and_says_what_it_shows():
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    plot = ghost_figures.recall(FOUND["recall"])
    assert plot.png().startswith(b"\x89PNG") and "Ghost Attention: turn 2 90 % (80 to 100), turn 20 88 %" in plot.alt


@pytest.mark.parametrize(("changes", "message"), [
    ({}, "start: expected the workdir of a chat model, got nothing"),
    ({"start": "a", "turns": ()}, "turns: expected turns from 1"),
    ({"start": "a", "samples": 0}, "samples: expected at least 1, got 0"),
])  # fmt: skip
def test_configs_that_cannot_run_are_refused(changes, message):
    small_runs.assert_refused(GhostStudyConfig, "ghost_study.py:tiny", changes, message)
