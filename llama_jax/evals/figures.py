"""The plots of the recipe's report: training curves (Fig. 5), reward models (Table 8), PPO, versions (Figs. 6, 11, 14, 20).

Each function takes numbers and returns the bytes of a PNG, on the canvas and in the light theme of `plots.py`.
What scored samples show (Figs. 7, 8, 21, 29) is drawn in `model_figures.py`. Needs the extra [eval].
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.evals.plots import LIGHT, MARKERS, canvas, dress, legend, note

BLUE, ORANGE, GREEN, _, RED, _ = LIGHT.cycle
INK, FAINT, GREY = LIGHT.ink, LIGHT.faint, LIGHT.grey
DEGREES = ("significantly", "better", "slightly", "negligibly", "all")
# Metric name -> panel title, for the small multiples of PPO; a run that lacks one gets one panel less.
PPO_PANELS = {
    "reward": "reward model score",
    "kl": "KL to the start",
    "entropy": "entropy (nats a token)",
    "clip_fraction": "clip fraction",
    "explained_variance": "explained variance",
    "length": "answer length (tokens)",
    "eos_rate": "answers that end",
    "loss": "loss",
}

Curve = tuple[Sequence[float], Sequence[float]]
_LONG = 100  # points from which a curve is smoothed


def loss_curve(
    curves: Mapping[str, Curve], *, title: str = "Training loss", ylabel: str = "loss (nats a token)", xlabel: str = "step"
) -> bytes:
    """Lines over optimiser steps, {label: (steps, losses)}; long ones with a running mean on top. (Fig. 5)"""
    figure, axes = canvas(LIGHT, title)
    for (label, curve), colour in zip(curves.items(), _cycle(len(curves))):
        _line(axes[0], curve, colour=colour, label=label)
    _limit(axes[0], curves.values())
    axes[0].set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    if len(curves) > 1:
        legend(axes[0], LIGHT)
    return _png(figure)


def bits_per_byte(model: Mapping[str, float], xz: Mapping[str, float]) -> bytes:
    """Bars per source: the model's bits per byte on held-out documents beside those of `xz -9e`."""
    sources = list(model)
    figure, axes = canvas(LIGHT, "Bits per byte on held-out documents (lower is better)")
    series = {"model": [model[s] for s in sources], "xz -9e": [xz.get(s, np.nan) for s in sources]}
    _bars(axes[0], sources, series, colours=[BLUE, GREY], number="{:.2f}")
    axes[0].set_ylabel("bits per byte")
    legend(axes[0], LIGHT, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    return _png(figure)


def reward_accuracy(accuracy: Mapping[str, Mapping[str, float]]) -> bytes:
    """Bars per degree of preference and reward model, {"helpfulness": {"all": 0.8, ...}, ...}. (Table 8)"""
    figure, axes = canvas(LIGHT, "Reward model accuracy by degree of preference")
    degrees = [d for d in DEGREES if any(d in of_model for of_model in accuracy.values())]
    series = {name: [100 * _nan(of_model.get(d)) for d in degrees] for name, of_model in accuracy.items()}
    _bars(axes[0], degrees, series, colours=[BLUE, GREEN], number="{:.0f}")
    axes[0].axhline(50, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes[0].annotate("chance", (1.005, 50), xycoords=("axes fraction", "data"), va="center", color=INK, fontsize=9)
    axes[0].set_ylim(0, 108)
    axes[0].set_ylabel("held-out accuracy (%)")
    legend(axes[0], LIGHT, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(series))
    return _png(figure)


def ppo_curves(metrics: Mapping[str, np.ndarray], *, panels: Mapping[str, str] = PPO_PANELS) -> bytes:
    """Small multiples over PPO iterations from `read_metrics`: those metrics of `panels` that were logged."""
    names = [name for name in panels if name in metrics and np.isfinite(metrics[name]).any()]
    columns = min(3, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure, axes = canvas(LIGHT, "PPO", rows=rows, columns=columns, panel=(3.5, 2.3))
    for ax, name in zip(axes, names):
        _line(ax, (metrics["step"], metrics[name]), colour=BLUE)
        _limit(ax, [(metrics["step"], metrics[name])])
        ax.set_title(panels[name])
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    return _png(figure)


def verdict(utility: Mapping[str, Mapping[str, float]], win_rate: Mapping[str, Mapping[str, float]]) -> bytes:
    """True utility per version and win rate against SFT, each {label: {"mean", "low", "high"}}."""
    figure, axes = canvas(
        LIGHT, "Verdict on held-out prompts (simulated annotator, 95 % intervals)", columns=2, panel=(4.4, 3.5), grid="x"
    )
    _dots(axes[0], utility, scale=1.0, title="true utility", colour=BLUE)
    _dots(axes[1], win_rate, scale=100.0, title="win rate against SFT (%)", colour=GREEN)
    axes[1].axvline(50, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    low, high = axes[1].get_xlim()
    axes[1].set_xlim(min(low, 45), max(high, 65))
    return _png(figure)


def over_optimisation(iterations: Sequence[float], reward: Sequence[float], utility: Sequence[float]) -> bytes:
    """Reward model score and true utility over PPO on two axes: where they part, the score is being gamed."""
    figure, axes = canvas(LIGHT, "Is the reward model being over-optimised?")
    left, right = axes[0], axes[0].twinx()
    dress(right, LIGHT)
    right.grid(False)
    left.plot(iterations, reward, color=ORANGE, marker="o", markersize=4)
    right.plot(iterations, utility, color=BLUE, marker="s", markersize=4)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("PPO iteration")
    left.set_ylabel("reward model score", color=ORANGE)
    right.set_ylabel("true utility", color=BLUE)
    return _png(figure)


def rating_shares(shares: Mapping[str, Mapping[str, float]]) -> bytes:
    """Share of each degree of preference by batch, {batch: {rating: share}}. (Fig. 25)"""
    figure, axes = canvas(LIGHT, "Degrees of preference by batch")
    ratings = list(next(iter(shares.values())))
    for rating, style in zip(ratings, _styles(len(ratings))):
        values = [100 * of_batch[rating] for of_batch in shares.values()]
        axes[0].plot(range(len(shares)), values, label=rating, **style)
    _batch_axis(axes[0], list(shares))
    axes[0].set_ylabel("comparisons (%)")
    return _png(figure)


def best_of_batches(scores: Mapping[str, Mapping[str, float]]) -> bytes:
    """Mean over prompts of the largest and the median score among sampled answers, {batch: {"max", "median"}}. (Fig. 26)"""
    figure, axes = canvas(LIGHT, "Reward among sampled answers by batch")
    for name, style in zip(("max", "median"), _styles(2)):
        values = [of_batch[name] for of_batch in scores.values()]
        axes[0].plot(range(len(scores)), values, label=name, **style)
    _batch_axis(axes[0], list(scores))
    axes[0].set_ylabel("reward model score")
    return _png(figure)


def best_by_temperature(curves: Mapping[str, Mapping[str, Sequence[float]]], *, title: str = "") -> bytes:
    """Expected maximum among N answers by temperature, {temperature: {"maximum": [K]}}. (Fig. 8)"""
    figure, axes = canvas(LIGHT, title or "Best of N answers by temperature")
    for (label, curve), style in zip(curves.items(), _styles(len(curves))):
        counts = range(1, len(curve["maximum"]) + 1)
        axes[0].plot(counts, curve["maximum"], label=f"T = {label}", **style)
    axes[0].set_xlabel("N")
    axes[0].set_ylabel("expected reward of the best")
    legend(axes[0], LIGHT)
    return _png(figure)


def accuracy_by_batch(accuracy: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Accuracy on one held-out set of reward models trained on ever more batches, {track: {degree: [versions]}}. (Fig. 6)"""
    figure, axes = canvas(LIGHT, "Reward models by batches of comparisons", columns=max(len(accuracy), 1), panel=(4.4, 3.5))
    for ax, (track, curves) in zip(axes, accuracy.items()):
        for (label, values), style in zip(curves.items(), _styles(len(curves))):
            batches = range(1, len(values) + 1)
            ax.plot(batches, [100 * _nan(v) for v in values], label=label, **style)
        ax.set_title(track)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("batches trained on")
        legend(ax, LIGHT)
    axes[0].set_ylabel("accuracy on the first held-out batch (%)")
    return _png(figure)


def version_progress(judges: Mapping[str, Mapping[str, Mapping[str, float]]]) -> bytes:
    """Win rates against SFT, {judge: {version: {"helpfulness", "safety"}}}: a panel a judge, versions in order. (Fig. 11)"""
    figure, axes = canvas(LIGHT, "Versions against SFT", columns=max(len(judges), 1), panel=(4.4, 4.0))
    for ax, (judge, points) in zip(axes, judges.items()):
        x, y = ([100 * _nan(point.get(key)) for point in points.values()] for key in ("helpfulness", "safety"))
        ax.plot(x, y, color=BLUE, marker="o", markersize=5, linewidth=1)
        for label, *place in zip(points, x, y):
            note(ax, LIGHT, label, tuple(place), xytext=(5, 5))
        for line in (ax.axhline, ax.axvline):
            line(50, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_title(f"judge: {judge}")
        ax.set_xlabel("helpfulness win rate (%)")
        ax.set_ylabel("safety win rate (%)")
    return _png(figure)


def score_shift(scores: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
    """Density of reward model scores in (0, 1), a panel a track and a line a version, {track: {version: [n]}}. (Fig. 20)"""
    figure, axes = canvas(LIGHT, "Scores of the answers from version to version", columns=max(len(scores), 1), panel=(4.4, 3.5))
    edges = np.linspace(0, 1, 21)
    for ax, (track, versions) in zip(axes, scores.items()):
        for (label, values), colour in zip(versions.items(), _cycle(len(versions))):
            density, _ = np.histogram(values, edges, density=True)
            ax.plot((edges[1:] + edges[:-1]) / 2, density, color=colour, label=label)
        ax.set_title(f"{track} reward model")
        ax.set_xlabel("score")
        legend(ax, LIGHT)
    axes[0].set_ylabel("density")
    return _png(figure)


def score_scatter(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], *, before: str, after: str) -> bytes:
    """Scores of two models' answers to the same prompts, {track: ([n], [n])}: above the diagonal, better after. (Fig. 14)"""
    figure, axes = canvas(LIGHT, f"{after} against {before}, prompt by prompt", columns=max(len(pairs), 1), panel=(4.0, 3.9))
    for ax, (track, (x, y)) in zip(axes, pairs.items()):
        ax.plot(x, y, linestyle="", marker="o", markersize=3, alpha=0.5, color=BLUE)
        ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_title(f"{track} reward model")
        ax.set_xlabel(f"score of {before}")
        ax.set_ylabel(f"score of {after}")
    return _png(figure)


def margin_histograms(histograms: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Shares of scores by margin, {margin: {"edges": n + 1, "shares": n}}: larger margins push scores outwards. (Fig. 27)"""
    figure, axes = canvas(LIGHT, "Scores by margin of the ranking loss")
    for (name, histogram), colour in zip(histograms.items(), _cycle(len(histograms))):
        axes[0].stairs(100 * np.asarray(histogram["shares"]), histogram["edges"], color=colour, linewidth=1.8, label=name)
    axes[0].set_xlabel("reward model score")
    axes[0].set_ylabel("answers (%)")
    legend(axes[0], LIGHT)
    return _png(figure)


def accuracy_scaling(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Accuracy by number of batches, a line a size, on all and on "significantly better" pairs. (Fig. 6)

    Args:
      curves: {size: [{"batch", "accuracy": {degree: {"share", "low", "high"}}}]}.
    """
    figure, axes = canvas(LIGHT, "Accuracy by data and size", columns=2)
    for ax, (degree, title) in zip(axes, (("all", "all pairs"), ("significantly", "significantly better"))):
        for (name, points), style in zip(curves.items(), _styles(len(curves))):
            known = [point for point in points if degree in point["accuracy"]]
            x = [point["batch"] for point in known]
            mean, low, high = ([100 * p["accuracy"][degree][key] for p in known] for key in ("share", "low", "high"))
            ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            ax.plot(x, mean, label=name, **style)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_title(title)
        ax.set_xlabel("batches of pairs")
        ax.set_ylabel("accuracy (%)")
    legend(axes[0], LIGHT)
    return _png(figure)


def score_conflict(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Both models' scores of safe and of unsafe answers, {"safe" | "unsafe": {"safety", "helpfulness"}}. (Fig. 32)"""
    figure, axes = canvas(LIGHT, "Helpfulness against safety", columns=2, panel=(4.2, 3.8))
    for ax, (kind, colour) in zip(axes, (("safe", BLUE), ("unsafe", RED))):
        found = scores[kind]
        size = max(2.0, 12 - len(found["safety"]) ** 0.4)
        ax.scatter(found["safety"], found["helpfulness"], s=size, color=colour, alpha=0.4, linewidths=0)
        for line in (ax.axhline, ax.axvline):
            line(0.5, color=GREY, linewidth=1, linestyle=(0, (4, 2)))
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.02, 1.02)
        ax.set_title(f"{kind} answers")
        ax.set_xlabel("safety score")
        ax.set_ylabel("helpfulness score")
    return _png(figure)


def _batch_axis(ax, batches: list[str]) -> None:
    ax.set_xticks(range(len(batches)), labels=batches)
    ax.set_xlabel("batch")
    legend(ax, LIGHT, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)


def _line(ax, curve: Curve, *, colour: str, label: str | None = None) -> None:
    x, y = (np.asarray(values, np.float64) for values in curve)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) == 0:
        return
    ax.xaxis.get_major_locator().set_params(integer=True)  # steps and iterations are counted
    if len(y) < _LONG:
        ax.plot(x, y, color=colour, linewidth=1.8, label=label, marker="o" if len(y) < 25 else None, markersize=3)
        return
    window = max(5, len(y) // 50)
    smooth = np.convolve(y, np.full(window, 1 / window), mode="valid")
    ax.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
    ax.plot(x[window // 2 :][: len(smooth)], smooth, color=colour, linewidth=1.8, label=label)


def _limit(ax, curves: Iterable[Curve]) -> None:
    """Limits that hold every curve; the first steps of a long one tower over the rest, which it is about."""
    finite = [y[np.isfinite(y)] for y in (np.asarray(values, np.float64) for _, values in curves)]
    finite = [y for y in finite if len(y)]
    if not any(len(y) >= _LONG for y in finite):
        return
    low = min(y.min() for y in finite)
    high = max(np.quantile(y, 0.99) if len(y) >= _LONG else y.max() for y in finite)
    if high > low:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _bars(ax, groups: list[str], series: Mapping[str, list[float]], *, colours: list[str], number: str) -> None:
    width = 0.8 / max(1, len(series))
    for index, ((label, values), colour) in enumerate(zip(series.items(), colours)):
        centres = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        ax.bar(centres, values, width * 0.92, color=colour, label=label)
        for centre, value in zip(centres, values):
            if np.isfinite(value):
                note(ax, LIGHT, number.format(value), (centre, value), xytext=(0, 3), ha="center")
    ax.set_xticks(np.arange(len(groups)), labels=[g.replace("_", " ") for g in groups])


def _dots(ax, rows: Mapping[str, Mapping[str, float]], *, scale: float, title: str, colour: str) -> None:
    for position, row in enumerate(rows.values()):
        mean, low, high = (scale * _nan(row.get(key, row.get("mean"))) for key in ("mean", "low", "high"))
        ax.plot([low, high], [position, position], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        ax.plot([mean], [position], color=colour, marker="o", markersize=8)
        text = f"{mean:.3f}" if scale == 1.0 else f"{mean:.0f}"
        note(ax, LIGHT, text, (mean, position), xytext=(0, 9), ha="center")
    ax.set_yticks(range(len(rows)), labels=list(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_title(title)


def _styles(count: int) -> list[dict[str, Any]]:
    """A colour and a marker for each series: no figure says anything by colour alone."""
    return [{"color": LIGHT.colour(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 4} for i in range(count)]


def _cycle(count: int) -> list[str]:
    return [LIGHT.colour(i) for i in range(count)]


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    # No software version or date in the file: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
