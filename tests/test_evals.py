"""Statistics against brute force and by hand; figures are PNGs; the report tells met, missed and not run apart."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from llama_jax.corpus_build.manifest import FIELDS
from llama_jax.data.sources import write_jsonl
from llama_jax.evals import model_figures, statistics, summary, verdict
from llama_jax.evals.report import write_report
from llama_jax.evals.summary import rewards_of_samples
from llama_jax.evals.targets import check_targets, lookup, number, percent, share
from llama_jax.files import write_json
from llama_jax.rlhf import best_of

PNG = b"\x89PNG"


def test_of_none_or_all_a_share_has_an_interval_too():
    for values, expected in ((np.zeros(48), (0.0, 0.0, 0.0741)), (np.ones(48), (1.0, 0.9259, 1.0))):
        found = statistics.share_interval(values)
        np.testing.assert_allclose((found.mean, found.low, found.high), expected, atol=1e-4)
        assert found.n == 48
    with pytest.raises(ValueError, match="values"):
        statistics.share_interval(np.array([]))


def test_the_reward_of_an_answer_that_cannot_be_chosen_does_not_count(tmp_path):
    rows = [{"prompt": i // 2, "reward": 0.1 + i / 10, "response": text, "ended": ended} for i, (text, ended) in enumerate(
        [("yes", True), ("cut off", False), ("[INST]", True), ("no", True)])]  # fmt: skip
    write_jsonl(tmp_path / "samples.jsonl", rows)
    np.testing.assert_allclose(rewards_of_samples(tmp_path / "samples.jsonl"), [[0.1, 0.0], [0.0, 0.4]])
    write_jsonl(tmp_path / "others.jsonl", [{**row, "reward": 10 * row["reward"] - 3} for row in rows])
    np.testing.assert_allclose(rewards_of_samples(tmp_path / "others.jsonl"), [[-2, -2], [-2, 1]])


def test_temperatures_are_compared_at_a_number_of_samples_that_all_have():
    curves = {0.8: best_of.expected_max_of_n(np.array([[0.0, 0.0, 0.0, 1.0]]))}
    curves[1.2] = best_of.expected_max_of_n(np.array([[0.6, 0.8]]))
    assert model_figures.best_temperature(curves) == (1.2, 2)  # though four of the other's reach 1
    assert "best temperature at N = 2 is 1.2" in model_figures.temperature_map({"m": curves}).alt


def test_the_axis_of_samples_is_labelled_where_it_ends():
    plots = pytest.importorskip("llama_jax.evals.plots")
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    for count, expected in ((4, [1, 2, 4]), (11, [1, 2, 5, 11]), (100, [1, 2, 5, 10, 20, 50, 100]), (1, [1])):
        curves = {1.0: best_of.expected_max_of_n(np.arange(count, dtype=np.float64)[None])}
        (ax,) = model_figures.temperature_map({"m": curves}).draw(plots.LIGHT).axes
        assert ax.get_xticks().tolist() == expected


def test_mean_interval_is_deterministic_and_near_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = statistics.mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval == statistics.mean_interval(values)
    assert interval.mean == pytest.approx(values.mean()) and interval.n == 400
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_in_chunks_has_all_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK", 70)
    assert statistics._bootstrap_means(np.arange(10.0), resamples=100, seed=0).shape == (100,)


def test_win_rate_counts_ties_as_one_half():
    rate = statistics.win_rate(np.array([1, 0, 1, 1.0]), np.array([0, 1, 1, 0.0]))
    assert (rate.wins, rate.ties, rate.losses, rate.n) == (2, 1, 1, 4)
    assert rate.mean == 0.625 and rate.low <= 0.625 <= rate.high
    same = statistics.win_rate(np.ones(5), np.ones(5))
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)


def test_an_interval_is_never_of_width_zero_since_all_prompts_say_the_same():
    won, lost = statistics.win_rate(np.ones(8), np.zeros(8)), statistics.win_rate(np.zeros(8), np.ones(8))
    # Wilson's of 8 in 8 by hand: 1 / (1 + z²/8) with z = 1.96
    assert (won.mean, won.high) == (1.0, 1.0) and won.low == pytest.approx(0.6756, abs=1e-4)
    assert (lost.mean, lost.low) == (0.0, 0.0) and lost.high == pytest.approx(0.3244, abs=1e-4)
    assert dataclasses.astuple(statistics.mean_interval([4.0])) == (4.0, None, None, 1)
    assert dataclasses.astuple(statistics.win_rate([1.0], [1.0])) == (0.5, None, None, 0, 1, 0, 1)
    assert statistics.win_rate([2.0], [1.0]).low == pytest.approx(0.2065, abs=1e-4)


def test_win_rate_is_antisymmetric():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    forth, back = statistics.win_rate(a, b), statistics.win_rate(b, a)
    assert forth.mean == pytest.approx(1 - back.mean) and forth.low == pytest.approx(1 - back.high)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="a: expected finite numbers, got 1"):
        statistics.win_rate(np.array([np.nan, 1.0]), np.ones(2))
    with pytest.raises(ValueError, match="got 2 and 3 values"):
        statistics.win_rate(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"values: .* shape \(0,\)"):
        statistics.mean_interval(np.array([]))
    with pytest.raises(ValueError, match=r"rewards: .* shape \(3,\)"):
        best_of.expected_max_of_n(np.ones(3))


def test_expected_max_and_median_of_n_equal_brute_force():
    rewards = np.random.default_rng(0).normal(size=(3, 6))
    rewards[0, :2] = 0.5  # equal rewards are no special case
    best = best_of.expected_max_of_n(rewards)
    for n in range(1, 7):
        subsets = [rewards[:, list(chosen)] for chosen in itertools.combinations(range(6), n)]
        assert best.maximum[n - 1] == pytest.approx(np.mean([s.max(axis=1) for s in subsets]), abs=1e-12)
        assert best.median[n - 1] == pytest.approx(np.mean([np.median(s, axis=1) for s in subsets]), abs=1e-12)


def test_expected_max_of_n_by_hand():
    best = best_of.expected_max_of_n(np.array([[0.0, 1.0, 3.0]]))
    np.testing.assert_allclose(best.maximum, [4 / 3, (1 + 3 + 3) / 3, 3])
    np.testing.assert_allclose(best.median, [4 / 3, (0.5 + 1.5 + 2) / 3, 1])


def test_expected_max_of_many_answers_stays_finite():
    best = best_of.expected_max_of_n(np.random.default_rng(0).normal(size=(2, 100)))
    assert np.isfinite(best.median).all() and (np.diff(best.maximum) > 0).all()


def test_over_optimisation_needs_falling_truth_and_rising_score():
    found = statistics.over_optimisation([0, 1, 2], [0.2, 0.6, 0.4])
    assert found.detected and found.peak == 1 and found.utility_drop == pytest.approx(0.2)
    assert not statistics.over_optimisation([0, 1, 2], [0.2, 0.4, 0.6]).detected
    assert not statistics.over_optimisation([0, 1, 0.5], [0.2, 0.6, 0.4]).detected


def good_results() -> dict:
    utility = statistics.Interval(mean=0.5, low=0.45, high=0.55, n=100)
    accuracy = {"all": 0.75, "significantly": 0.9, "better": 0.8, "slightly": 0.65, "negligibly": 0.5}
    stage = {
        "true_utility": utility,
        "safety_violations": np.float64(0.01),
        "win_rate": statistics.WinRate(mean=0.65, low=0.58, high=0.72, wins=60, ties=10, losses=30, n=100),
    }
    return {
        "size": "tiny",
        "seconds": {"corpus": 12.0, "pretrain": 300.0, "total": 840.0},
        "pretrain": {"bits_per_byte": {"reference": 1.5}, "xz_bits_per_byte": {"reference": 2.0}},
        "base": {"true_utility": {"mean": 0.2, "low": 0.15, "high": 0.25}},
        "sft": {"true_utility": utility, "safety_violations": 0.02, "stop_rate": 1.0},
        "reward": {"helpfulness": {"accuracy": accuracy}, "safety": {"accuracy": accuracy}},
        "rejection": stage,
        "ppo": stage,
        "versions": {
            name: {**stage, "reward_score": score, "true_utility": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
            for name, score, mean in (("sft", 0.1, 0.4), ("v1", 0.2, 0.6), ("v1_ppo", 0.3, 0.5))
        },
    }


def report_of(results, tmp_path, **options):
    paths = write_report(results, tmp_path, **{"figures": {}, "samples": [], **options})
    return json.loads(paths.json.read_text()), paths.markdown.read_text(), paths.html.read_text()


def test_all_targets_of_a_good_run_are_met(tmp_path):
    document, markdown, html = report_of(good_results(), tmp_path)
    assert len(document["targets"]) == 12 and all(t["met"] is True for t in document["targets"])
    assert document["ppo"]["win_rate"]["low"] == 0.58 and document["sft"]["true_utility"]["mean"] == 0.5
    assert document["annotator"] == "simulation"
    for text in (markdown, html):
        assert "annotator of this run is a simulation" in text and "65.0 % (58.0 % to 72.0 %)" in text
        assert "true utility was highest in V1 and fell by 0.100" in text  # over-optimisation is told, not hidden
    assert "missed" not in markdown


def test_the_report_tells_what_training_saw_of_held_out_text_and_the_speed_of_every_stage(tmp_path):
    results = good_results()
    _, markdown, _ = report_of(results, tmp_path)
    assert "| reference | 1.500 | 2.000 | 25 % fewer |  |" in markdown and "lines of programs stay" not in markdown
    assert "seconds of an iteration" not in markdown
    results["pretrain"]["held_out_lines_seen"] = {"reference": 0.031}
    results["seconds"] |= {"v1/ppo": 100.0, "v1/short": 2.0}  # which was over before its pace could be measured
    results |= {"speed": {"v1/ppo": {"tokens_per_second": 1234.0, "matmul_share": 0.125}, "v1/short": {}},
                "ppo_seconds": {"rollout": 2.5, "score": 0.75}}  # fmt: skip
    _, markdown, _ = report_of(results, tmp_path)
    assert "| reference | 1.500 | 2.000 | 25 % fewer | 3.1 % |" in markdown and "lines of programs stay" in markdown
    assert "| v1/ppo | 100 s | 12 % | 1,234 | 12.5 % |" in markdown and "| v1/short | 2 s | 0 % |  |  |" in markdown
    assert "| PPO, seconds of an iteration | 2.50 | 0.75 |  |" in markdown


def test_reward_models_stand_beside_each_other_on_the_pairs_of_both(tmp_path):
    results = good_results()
    _, markdown, _ = report_of(results, tmp_path)
    assert "| helpfulness pairs, helpfulness reward model | 90.0 % |" in markdown
    assert "| helpfulness pairs, safety reward model |" not in markdown  # of a run that did not measure it
    cells = {degree: {"share": share} for degree, share in (("significantly", 0.7), ("all", 0.61))}
    one_source, several = {"a": cells, "longer": {}}, {"a": {}, "all": cells, "b": {}, "longer": {}}
    for track, others in (("helpfulness", one_source), ("safety", several)):
        (tmp_path / track).mkdir()
        written = {"others": others, "safety": {"unsafe_recall": {"share": 0.42}} if track == "safety" else {}}
        (tmp_path / track / "reward_report.json").write_text(json.dumps(written))
        results["reward"][track] |= summary.reward_report(tmp_path / track)
    _, markdown, _ = report_of(results, tmp_path)
    for track, other in (("helpfulness", "safety"), ("safety", "helpfulness")):
        assert f"| {track} pairs, {other} reward model | 70.0 % | no pairs | no pairs | no pairs | 61.0 % |" in markdown
    assert "| safety reward model | unsafe recall | 42.0 % |" in markdown
    assert "helpfulness reward model | unsafe" not in markdown


def test_ppos_seconds_are_medians_of_what_was_logged(tmp_path):
    assert summary.ppo_seconds(tmp_path) == {}
    rows = [{"step": 0, "seconds/rollout": 2.0, "seconds/score": 1.0}, {"step": 1},
            {"step": 2, "seconds/rollout": 4.0, "seconds/score": 1.0, "seconds/train": 3.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert summary.ppo_seconds(tmp_path) == {"rollout": 3.0, "score": 1.0, "train": 3.0}


@pytest.mark.parametrize(
    ("path", "value", "stage"),
    [
        ("pretrain.bits_per_byte.reference", 2.1, "pretrain"),
        ("sft.true_utility.low", 0.2, "sft"),
        ("reward.safety.accuracy.significantly", 0.84, "reward (safety)"),
        ("reward.helpfulness.accuracy.all", 0.69, "reward (helpfulness)"),
        ("rejection.win_rate.low", 0.5, "rejection"),
        ("ppo.win_rate.mean", 0.59, "ppo"),
        ("ppo.safety_violations", 0.03, "ppo"),
        ("seconds.corpus", 60.1, "corpus"),
        ("seconds.total", 1201.0, "recipe"),
    ],
)
def test_each_target_can_be_missed(tmp_path, path, value, stage):
    results, _, _ = report_of(good_results(), tmp_path)
    *parents, key = path.split(".")
    place = results
    for parent in parents:
        place = place[parent]
    place[key] = value
    assert [t.stage for t in check_targets(results) if t.met is False] == [stage]


def test_the_five_versions_may_take_longer_than_the_demo():
    def of_time(**changes):
        return next(t for t in check_targets({**good_results(), **changes}) if t.stage == "recipe")

    assert of_time(minutes=60, seconds={"total": 3599.0}).met and not of_time(minutes=60, seconds={"total": 3601.0}).met
    assert of_time(minutes=60).asked == "at most 60 minutes on 2 CPU cores"


def test_missing_values_are_not_run(tmp_path):
    document, markdown, html = report_of({}, tmp_path)
    assert all(t["met"] is None for t in document["targets"])
    assert document["reward"]["safety"]["accuracy"]["negligibly"] is None
    assert document["ppo"]["win_rate"] == {"mean": None, "low": None, "high": None}
    assert markdown.count("not run") > 20 and html.count("not run") > 20
    half = {"ppo": None, "sft": {"true_utility": float("nan")}, "pretrain": {"bits_per_byte": {"reference": 1.0}}}
    document, markdown, _ = report_of(half, tmp_path)
    assert document["sft"]["true_utility"] is None and "reference 1.000 vs not run" in markdown


def test_report_escapes_what_models_wrote_and_inlines_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from llama_jax.evals import figures as plots

    sample = {
        "prompt": [{"role": "system", "content": "<b>Be brief</b>"}, {"role": "user", "content": "What is `a|b`?"}],
        "reference": "either",
        "is_safety": True,
        "answers": {"ppo": "<script>alert(1)</script>", "base": "# no heading\n\n| x |"},
        "utility": {"ppo": 0.75},
    }
    figures = {
        "verdict": plots.verdict({"SFT": {"mean": 0.5}}, {"PPO": {"mean": 0.6}}),
        "my_own": plots.loss_curve({"a": ([0, 1], [2.0, 1.0])}, name="my_own"),
    }
    _, markdown, html = report_of(good_results(), tmp_path, samples=[sample], figures=figures)
    assert "<script>" not in html and "&lt;script&gt;" in html and "&lt;b&gt;Be brief" in html
    assert html.count("data:image/svg+xml;base64,") == 4 and "http" not in html  # light and dark
    assert html.index(">Base<") < html.index("<h4>PPO<span>utility 0.750")
    assert "    # no heading" in markdown and f"![{figures['verdict'].alt}](figures/verdict.png)" in markdown
    assert "More figures" in markdown and (tmp_path / "figures" / "my_own.png").read_bytes() == figures["my_own"].png()
    assert not list(tmp_path.rglob("*.tmp"))


class Letters:
    """A tokenizer whose pieces are characters."""

    def encode(self, text, *, bos):
        return [1] * bos + [ord(letter) for letter in text]


def asked(question, reference, kind, *, is_safety=False):
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "reference": reference, "kind": kind, "is_safety": is_safety}


def test_the_base_model_is_shown_whole_examples_one_refusal_first():
    rows = [
        asked("a long question?", "b", "what"), asked("q?", "b", "what"), asked("where?", "here", "module"),
        asked("rob?", "I can't help with that.", "refusal", is_safety=True), asked("z?", "z", "harmless"),
    ]  # fmt: skip
    examples = verdict.short_examples(rows)
    # The kind that is asked twice comes before those asked once, with its shortest question.
    assert [(row["kind"], row["messages"][0]["content"]) for row in examples] == [
        ("refusal", "rob?"), ("what", "q?"), ("harmless", "z?"), ("module", "where?"),
    ]  # fmt: skip
    turns = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "so"}, {"role": "user", "content": "it?"}]
    shown = lambda limit: verdict.few_shot_prompt({"messages": turns}, examples, Letters(), limit=limit)  # noqa: E731
    refusal = "Question: rob?\nAnswer: I can't help with that.\n\n"
    question = "Question: and?\nAnswer: so\nQuestion: it?\nAnswer:"
    assert shown(1000)[0] == 1 and len(shown(1000)) > 150
    for limit in (len(shown(1000)) - 1, 100, 1 + len(question)):
        ids = shown(limit)
        text = "".join(map(chr, ids[1:]))
        assert ids[0] == 1 and len(ids) <= limit and text.endswith(question)
        assert text.startswith(refusal) or text == question
    with pytest.raises(ValueError, match="without any example, does not fit into 20"):
        shown(20)


def test_lookup_and_formats():
    results = {"a": {"b": 1.5, "interval": {"mean": 0.5, "low": 0.1}, "bad": float("nan"), "text": "x", "yes": True}}
    names = ("a.b", "a.interval", "a.interval.low", "a.bad", "a.text", "a.yes", "a.none.b", "a.b.c")
    assert [lookup(results, name) for name in names] == [1.5, 0.5, 0.1, None, None, None, None, None]
    assert (percent(None), percent(0.857), number(7), number(0.12345)) == ("not run", "85.7 %", "7", "0.123")
    assert (share(3), share(0.03), share(None)) == ("3", "3.0 %", "not run")


def test_figures_are_pngs_and_the_same_numbers_give_the_same_bytes():
    pytest.importorskip("matplotlib")
    from llama_jax.evals import figures, plots, reward_figures

    steps = np.arange(120)
    accuracy = {"helpfulness": {"all": 0.8, "significantly": 0.9}, "safety": {"all": None}}
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    log = {"step": steps, "reward": np.sqrt(steps), "kl": np.where(steps % 2, np.nan, 0.1), "other": steps}
    draw = [
        figures.loss_curve({"train": (steps, 5 / (1 + steps)), "held-out": ([0, 60], [5.0, 1.0])}),
        figures.bits_per_byte({"reference": 1.4, "source_code": 1.2}, {"reference": 1.9}),
        reward_figures.accuracy(accuracy),
        model_figures.best_of_n({"SFT": best_of.expected_max_of_n(np.random.default_rng(0).random((4, 8)))}),
        figures.ppo_curves(log),
        figures.ppo_curves({"step": steps}),
        figures.verdict({"SFT": interval, "PPO": {"mean": 0.6}}, {"PPO": interval}),
        figures.over_optimisation(["SFT", "PPO"], [0.1, 0.5], [0.4, 0.3]),
    ]
    for plot in draw:
        assert plot.png().startswith(PNG) and plot.svg(plots.DARK).startswith(b"<?xml")
        assert plot.title.split(" (")[0] in plot.alt
    assert draw[1].png() == draw[1].png() and draw[1].svg() != draw[1].svg(plots.DARK)
    assert "train from 5 to 0.0417; held-out from 5 to 1" in draw[0].alt
    assert "SFT: score 0.100, true utility 0.400" in draw[-1].alt
    assert "helpfulness: significantly 90.0 %, all 80.0 %" in draw[2].alt and "an answer) from 0.1 to 0.1" in draw[4].alt


def test_every_series_can_be_told_apart_by_every_kind_of_colour_vision():
    pytest.importorskip("matplotlib")
    from llama_jax.evals import plots

    # What the eyes without one kind of cone see (Machado et al. 2009), of linear red, green, blue; then CIE Lab.
    seen = {
        "all cones": np.eye(3),
        "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]

    def lab(colour, eyes):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        xyz = np.array(to_xyz) @ np.clip(np.array(eyes) @ linear, 0, 1) / [0.95047, 1, 1.08883]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    assert np.linalg.norm(lab("#3b6fd4", seen["protanopia"]) - lab("#8a63c9", seen["protanopia"])) < 5  # a pair that is not
    for theme in (plots.LIGHT, plots.DARK):
        assert len(theme.cycle) == 8  # SFT, V1 to V5, PPO, base
        for kind, eyes in seen.items():
            points = [lab(colour, eyes) for colour in (*theme.cycle, theme.grey)]
            apart = min(np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2))
            assert apart > 15, (theme.page, kind, apart)
        assert len({(style["color"], style["marker"]) for style in plots.styles(theme, 72)}) == 72
    curves = {f"V{i}": best_of.expected_max_of_n(np.random.default_rng(i).random((2, 4))) for i in range(10)}
    (ax,) = model_figures.best_of_n(curves).draw(plots.LIGHT).axes
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor()) for line in ax.get_lines()]
    assert len(set(looks)) == len(looks) == 20


def test_limits_hold_every_curve_of_a_figure():
    pytest.importorskip("matplotlib")
    from llama_jax.evals import figures, plots

    steps = np.arange(400.0)
    high, low = (steps, np.linspace(0.9, 0.6, 400)), (steps, np.linspace(0.2, 0.1, 400))
    # The second one must not push the first out of sight.
    bottom, top = figures.loss_curve({"high": high, "low": low}).draw(plots.LIGHT).axes[0].get_ylim()
    assert bottom < 0.1 and top > 0.9


def test_figures_say_what_their_lines_and_axes_are():
    pytest.importorskip("matplotlib")
    from llama_jax.evals import figures, plots, reward_figures

    def named(plot):
        (ax,) = plot.draw(plots.LIGHT).axes
        return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []

    long, short = (np.arange(120), np.ones(120)), (np.arange(5), np.ones(5))
    assert named(figures.loss_curve({"pretraining": long})) == ["as logged", "running mean"]
    assert named(figures.loss_curve({"a": long, "b": short})) == ["a", "b", "as logged", "running mean"]
    assert named(figures.loss_curve({"pretraining": short})) == []
    steps = np.arange(4)
    axes = figures.ppo_curves({"step": steps, **dict.fromkeys(list(figures.PPO_PANELS)[:4], steps)}).draw(plots.LIGHT).axes
    assert [ax.get_xlabel() for ax in axes] == ["", *["optimizer step"] * 3, "", ""]  # the lowest of each column
    share = {"share": 0.75, "low": 0.6, "high": 0.85, "n": 40}
    bars = reward_figures.accuracy({"held-out": {"better": share, "all": 0.5}})
    assert named(bars) == [] and "better 75.0 % (60 to 85), all 50.0 %" in bars.alt  # the axis says what is held out
    (ax,) = bars.draw(plots.LIGHT).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["better\nn = 40", "all"]
    assert [text.xy[1] for text in ax.texts if text.get_text() == "75"] == [85]  # above the whisker
    curve = {"reward model": [{"rating": 1, "mean": 0.4, "std": 0.1}]}
    assert named(model_figures.calibration(curve)) == [] and named(model_figures.calibration({"other": curve["reward model"]}))


def test_scores_before_and_after_have_histograms_at_the_margins():
    pytest.importorskip("matplotlib")
    from llama_jax.evals import figures, plots

    before, after = np.array([0.1, 0.1, 0.5, 0.9]), np.array([0.1, 0.9, 0.93, 0.95])
    plot = figures.score_scatter({"safety": (before, after)}, before="old", after="new")
    assert "safety: 75 % above the diagonal, mean 0.400 to 0.720" in plot.alt
    (ax,) = plot.draw(plots.LIGHT).axes
    above, beside = ax.child_axes
    assert above.get_title() == "safety reward model" and not ax.get_title()
    width = 1 / 25  # of a bin
    for margin, size, start, values in ((above, "get_height", "get_x", before), (beside, "get_width", "get_y", after)):
        counts = {round(getattr(bar, start)() / width): getattr(bar, size)() for bar in margin.patches}
        assert {place: count for place, count in counts.items() if count} == (
            {2: 2, 12: 1, 22: 1} if values is before else {2: 1, 22: 1, 23: 2}
        )
    assert above.get_xlim() == ax.get_xlim() and beside.get_ylim() == ax.get_ylim()


def pretraining_run(directory, *, losses, batch_size, block_length=16, stage="pretrain"):
    corpus = directory / "corpus"
    write_json(corpus / "manifest.json", {**dict.fromkeys(FIELDS), "sources": {}, "block_length": block_length})
    config = {"stage": stage, "data": {"corpus": str(corpus)}, "loop": {"steps": 999, "batch_size": batch_size}}
    write_json(directory / "config.json", config)
    write_jsonl(directory / "metrics.jsonl", [{"step": step, "loss": loss} for step, loss in losses.items()])
    return str(directory)


def test_losses_of_several_sizes_by_tokens(tmp_path):
    pytest.importorskip("matplotlib")
    from llama_jax.evals import loss_by_tokens, plots

    small = pretraining_run(tmp_path / "s", losses={0: 4.0, 9: 3.0, 19: 2.0}, batch_size=4)
    large = pretraining_run(tmp_path / "l", losses={0: 3.5, 9: 2.5}, batch_size=2, block_length=64)
    runs = {"7b": loss_by_tokens.read(small), "mine": loss_by_tokens.read(large)}
    # A step is 4 rows of 16 tokens, or 2 of 64; the log's step 0 is the first.
    assert runs["7b"].tokens.tolist() == [64, 640, 1280] and runs["mine"].tokens.tolist() == [128, 1280]
    assert (runs["7b"].steps, runs["7b"].reached, runs["mine"].reached) == (20, 3.0, 3.0)
    plot = loss_by_tokens.curves(runs)
    (ax,) = plot.draw(plots.LIGHT).axes
    assert ax.get_xlabel() == "tokens" and "7b from 4 to 2; mine from 3.5 to 2.5" in plot.alt and "70B 1.50" in plot.alt
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert lines["7b"].get_xdata().tolist() == [64, 640, 1280] and lines["mine"].get_ydata().tolist() == [3.5, 2.5]
    papers = lines["the paper's 7B at 2T: 1.74"]
    assert papers.get_color() == lines["7b"].get_color() and papers.get_xdata().tolist() == [1.0]  # the edge of the axes
    low, high = ax.get_ylim()
    assert low < 1.5 and high > 4.0 and ax.get_xlim()[1] < 2000
    long = {"70B": loss_by_tokens.Run(np.array([1e11, 1e12, 2e12]), np.array([1.9, 1.6, 1.5]), steps=3)}
    (ax,) = loss_by_tokens.curves(long).draw(plots.LIGHT).axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert ax.get_xlabel() == "tokens (billions)" and lines["70B"].get_xdata().tolist() == [100, 1000, 2000]
    assert lines["the paper's 70B at 2T: 1.50"].get_xdata().tolist() == [2000]


def test_the_command_draws_losses_by_tokens_and_refuses_in_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    first = pretraining_run(tmp_path / "a", losses={0: 4.0, 9: 3.0}, batch_size=4)
    second = pretraining_run(tmp_path / "b", losses={0: 5.0}, batch_size=4)

    def run_with(*arguments):
        done = subprocess.run([sys.executable, "-m", "llama_jax.drawn", *arguments], capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    output = f"--output={tmp_path / 'out'}"
    table = [line.split() for line in run_with(f"--curves=7b={first},b={second}", output).splitlines()]
    assert table[1:] == [["7b", "10", "640", "3.500", "1.74"], ["b", "1", "64", "5.000", "-"]]
    assert (tmp_path / "out" / "loss_by_tokens.png").read_bytes().startswith(PNG)
    assert (tmp_path / "out" / "loss_by_tokens.dark.svg").exists()
    found = json.loads((tmp_path / "out" / "loss_by_tokens.json").read_text())
    assert found["runs"]["7b"] == {"steps": 10, "tokens": 640, "loss": 3.5} and found["paper"]["loss"]["34B"] == 1.57
    assert run_with(f"--curves=7b={first}").startswith("error: --output: missing")
    assert run_with().startswith("error: expected either --workdir")
    sft = pretraining_run(tmp_path / "sft", losses={0: 1.0}, batch_size=4, stage="sft")
    assert run_with(f"--curves=x={sft}", output).endswith("sft/config.json: stage: expected pretrain, got sft")
    empty = pretraining_run(tmp_path / "empty", losses={}, batch_size=4)
    assert run_with(f"--curves=x={empty}", output).endswith("loss: its log has none yet; expected a run of at least one step")
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    assert run_with(f"--curves=x={empty}", output) == f"error: {empty}: has no log yet; expected a run of at least one step"
    assert run_with(f"--curves=x={first},x={second}", output).startswith("error: --curves: two are named 'x'")


def test_figures_without_matplotlib_name_the_extra(monkeypatch):
    from llama_jax.evals import figures

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"\[eval\]', or \[notebooks\]"):
        figures.bits_per_byte({"a": 1.0}, {"a": 2.0}).png()
