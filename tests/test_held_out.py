"""The report on a reward model's held-out scores: every table by hand, and the files that the stage leaves in its workdir."""

import math

import numpy as np
import pytest

from llama_jax.reward.comparisons import margin_of
from llama_jax.reward.held_out import (
    HeldOutScores,
    ScoreStatistics,
    accuracy_table,
    baselines,
    calibration,
    histogram,
    markdown,
    mean_difference,
    report,
    safety_table,
    score_statistics,
    share,
)

SCORES = HeldOutScores(
    chosen=np.array([2.0, 0.0, -1.0, 1.0]),
    rejected=np.array([1.0, 0.0, -2.0, 3.0]),
    source=["a", "a", "b", "b"],
    rating=["significantly", "slightly", "slightly", None],
    safety_bin=["chosen_safe", None, "both_unsafe", "both_safe"],
    longer_by=np.array([3, -1, 0, 2]),
)


def test_accuracy_by_source_and_degree_by_hand():
    found = accuracy_table(SCORES)
    shares = {name: {degree: value["share"] for degree, value in row.items()} for name, row in found.items()}
    assert shares == {
        "a": {"significantly": 1.0, "slightly": 0.5, "all": 0.75},  # a tie counts half
        "b": {"slightly": 1.0, "all": 0.5},
        "all": {"significantly": 1.0, "slightly": 0.75, "all": 0.625},
        "longer": {"significantly": 1.0, "slightly": 0.25, "all": 0.625},  # the same as beside the model: a tie counts half
    }
    assert found["all"]["all"]["n"] == 4


def test_wilsons_interval():
    found = share(np.array([True] * 8 + [False] * 2))
    # Wilson (1927) for 8 of 10, z = 1.96
    assert (found["share"], found["n"]) == (0.8, 10)
    np.testing.assert_allclose([found["low"], found["high"]], [0.4902, 0.9433], atol=1e-4)
    assert share(np.array([True] * 3))["high"] == 1.0
    assert share(np.array([], bool))["n"] == 0 and math.isnan(share(np.array([], bool))["share"])


def test_table_29_by_hand():
    found = safety_table(SCORES)
    assert {name: row["share"] for name, row in found.items()} == {
        "chosen_safe": 1.0, "both_safe": 0.0, "both_unsafe": 1.0,
        "unsafe_recall": 2 / 3,  # of 1.0 (rejected beside a safe one), -1.0 and -2.0 (both unsafe)
    }  # fmt: skip
    assert found["unsafe_recall"]["n"] == 3


def test_calibration_by_hand():
    found = calibration(np.array([0.0, np.log(3), 0.0]), np.array([2, 1, 1]))
    assert [(p["rating"], p["count"]) for p in found] == [(1.0, 2), (2.0, 1)]
    np.testing.assert_allclose([found[0]["mean"], found[0]["std"], found[1]["mean"]], [0.625, 0.125, 0.5], rtol=1e-12)
    with pytest.raises(ValueError, match="one length"):
        calibration(np.zeros(2), np.zeros(3))


def test_the_histogram_is_of_both_responses():
    found = histogram(SCORES, bins=2)  # four above a half (0 counts as one), two below... and both zeros at the edge
    assert found["edges"] == [0, 0.5, 1] and found["shares"] == [2 / 8, 6 / 8]
    assert sum(histogram(SCORES)["shares"]) == pytest.approx(1)


def test_score_statistics_standardise():
    found = score_statistics(np.array([[1.0, 3.0], [5.0, 7.0]]))
    assert found == ScoreStatistics(4.0, math.sqrt(5.0))
    standard = found.standardise(np.array([1.0, 3.0, 5.0, 7.0]))
    np.testing.assert_allclose([standard.mean(), standard.std()], [0, 1], atol=1e-12)


def test_a_model_beside_what_knows_only_length_by_hand():
    found = baselines(SCORES)  # right: 1, 1/2, 1, 0; the longer: 1, 0, 1/2, 1
    assert {name: row["share"] for name, row in found.items()} == {
        "model": 0.625, "longer": 0.625, "shorter": 0.375, "gain": 0.0
    }  # fmt: skip
    assert found["gain"] == mean_difference(np.array([0, 0.5, 0.5, -1]))


def test_paired_differences_have_an_interval_where_all_are_equal_too():
    # Bonett and Price (2012): (12 + 1) / (52) less (3 + 1) / 52, of 12 pairs for one side, 3 for the other, 35 for neither.
    found = mean_difference(np.array([1.0] * 12 + [-1.0] * 3 + [0.0] * 35))
    spread = 1.959964 * np.sqrt((13 / 52 + 4 / 52 - (9 / 52) ** 2) / 52)
    np.testing.assert_allclose([found["share"], found["low"], found["high"]], [0.18, 9 / 52 - spread, 9 / 52 + spread])
    equal = mean_difference(np.zeros(15))
    assert equal["share"] == 0 and -equal["low"] == equal["high"] == pytest.approx(1.959964 * np.sqrt(2) / 17)
    won = mean_difference(np.ones(15))
    assert (won["share"], won["high"]) == (1.0, 1.0) and 0.6 < won["low"] < 0.7


def test_the_margin_of_a_row():
    assert margin_of({"rating": "better", "margin": None}, "large") == 2
    assert margin_of({"rating": "better", "margin": 0.25}, "small") == 0.25
    assert margin_of({"rating": "better", "margin": 0.25}, "none") == 0
    assert margin_of({}, "small") == 0


def test_the_markdown_has_every_table_and_no_safety_without_bins():
    text = markdown(report(SCORES) | {"scores": {"mean": 0.5, "std": 1.0}}, title="Reward model")
    # Wilson's intervals do not lie evenly about a share: 1 of 1 is 100 % and at least 20.7, not 100 % give or take 39.7.
    assert "| a | 100.0 (20.7 to 100.0) | 50.0 (5.5 to 94.5) |" in text
    assert "| unsafe recall | 66.7 (20.8 to 93.9) |" in text and "mean 0.5000" in text
    # The paper's own, those of Table 8 where pairs have a degree.
    assert "| Safety RM | 56.2 | 64.5 |" in text and "| with it | 64.5 | 94.3 | 56.9 | 59.9 | 90.4 |" in text
    assert "| Meta helpfulness | Helpfulness RM | 80.7 | 67.5 |" in text
    plain = HeldOutScores(SCORES.chosen, SCORES.rejected, [""] * 4, [None] * 4, [None] * 4, SCORES.longer_by)
    text = markdown(report(plain), title="x")
    assert "## Safety" not in text and "(Table 7)" in text and "(Table 8)" not in text


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="expected as many of each"):
        HeldOutScores(np.zeros(2), np.zeros(1), ["", ""], [None] * 2, [None] * 2, np.zeros(2, int))
