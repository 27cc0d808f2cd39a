"""The plots of the recipe's report: training curves (Fig. 5), PPO, and from version to version (Figs. 6, 11, 14).

Each function takes numbers and returns a `Plot`. What scored samples show (Figs. 7, 8, 20, 21, 29) is drawn in
`model_figures.py`, what reward models know (Table 8, Figs. 6, 25 to 27, 32) in `reward_figures.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.evals.plots import MARKERS, Plot, Theme, bars, canvas, dress, legend, note, styles

# Metric name -> panel title, for the small multiples of PPO; a run that lacks one gets one panel less.
PPO_PANELS = {
    "reward": "combined reward R_c",
    "kl": "KL to the start (nats an answer)",
    "policy_entropy": "entropy (nats a token)",
    "clip_fraction": "clip fraction",
    "explained_variance": "explained variance",
    "response_length": "answer length (tokens)",
    "eos_rate": "answers that end",
    "approx_kl": "approximate KL of an update",
    "sampler_drift": "largest sampler drift (nats)",
}

Curve = tuple[Sequence[float], Sequence[float]]
SCORE_BINS = np.linspace(0, 1, 26)
_LONG = 100  # points from which a curve is smoothed
_DASHED = {"linewidth": 1, "linestyle": (0, (4, 3))}


def loss_curve(
    curves: Mapping[str, Curve], *, name: str = "loss", title: str = "Training loss", ylabel: str = "loss (nats a token)",
    xlabel: str = "step",
) -> Plot:  # fmt: skip
    """Lines over optimizer steps (or `xlabel`), {label: (steps, losses)}; long ones with a running mean on top. (Fig. 5)"""

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title)
        for index, (label, curve) in enumerate(curves.items()):
            _line(ax, curve, colour=theme.colour(index), label=label)
        explained = _explain(ax, theme) if any(_is_long(curve) for curve in curves.values()) else []
        _limit(ax, curves.values())
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        if len(curves) > 1 or explained:
            legend(ax, theme, **({"handles": explained} if len(curves) == 1 else {}))  # the title names a single one
        return figure

    words = "; ".join(f"{label} {_ends(curve)}" for label, curve in curves.items())
    return Plot(name, title, f"{ylabel} by {xlabel}. {title}. {words}.", draw)


def bits_per_byte(model: Mapping[str, float], xz: Mapping[str, float]) -> Plot:
    """Bars per source: the model's bits per byte on held-out documents beside those of `xz -9e`."""
    title, sources = "Bits per byte on held-out documents (lower is better)", list(model)
    series = {"model": [model[s] for s in sources], "xz -9e": [xz.get(s, np.nan) for s in sources]}

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title)
        bars(ax, theme, sources, series, colours=[theme.colour(0), theme.grey], number="{:.2f}")
        ax.set_ylabel("bits per byte")
        legend(ax, theme, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
        return figure

    words = "; ".join(f"{s} {model[s]:.2f} against {xz.get(s, np.nan):.2f}" for s in sources)
    return Plot("bits_per_byte", title, f"Bars. {title}, the model against xz: {words}.", draw)


def ppo_curves(metrics: Mapping[str, np.ndarray], *, panels: Mapping[str, str] = PPO_PANELS) -> Plot:
    """Small multiples over PPO's optimizer steps from `read_metrics`: those metrics of `panels` that were logged.

    An iteration has as many steps as its rollout has mini-batches; what is measured once a rollout stands at all of them.
    """
    names = [name for name in panels if name in metrics and np.isfinite(metrics[name]).any()]
    columns = min(3, max(1, len(names)))

    def draw(theme: Theme) -> Any:
        rows = max(1, -(-len(names) // columns))
        figure, axes = canvas(theme, "PPO", rows=rows, columns=columns, panel=(3.5, 2.3))
        for ax, name in zip(axes, names):
            curve = (metrics["step"], metrics[name])
            _line(ax, curve, colour=theme.colour(0))
            _limit(ax, [curve])
            ax.set_title(panels[name])
        for ax in axes[max(0, len(names) - columns) : len(names)]:  # the lowest one of each column
            ax.set_xlabel("optimizer step")
        if any(_is_long((metrics["step"], metrics[name])) for name in names):
            _explain(axes[0], theme)
            legend(axes[0], theme)
        for ax in axes[len(names) :]:
            ax.set_visible(False)
        return figure

    words = "; ".join(f"{panels[name]} {_ends((metrics['step'], metrics[name]))}" for name in names)
    return Plot("ppo", "PPO", f"Lines over the optimizer steps of PPO. {words}.", draw)


def verdict(utility: Mapping[str, Mapping[str, float]], win_rate: Mapping[str, Mapping[str, float]]) -> Plot:
    """True utility per version and win rate against SFT, each {label: {"mean", "low", "high"}}."""
    title = "Verdict on held-out prompts (simulated annotator, 95 % intervals)"

    def draw(theme: Theme) -> Any:
        figure, (left, right) = canvas(theme, title, columns=2, panel=(4.4, 3.5), grid="x")
        _dots(left, theme, utility, scale=1.0, title="true utility", colour=theme.colour(0))
        _dots(right, theme, win_rate, scale=100.0, title="win rate against SFT (%)", colour=theme.colour(2))
        right.axvline(50, color=theme.ink, **_DASHED)
        low, high = right.get_xlim()
        right.set_xlim(min(low, 45), max(high, 65))
        return figure

    words = "; ".join(
        [f"true utility of {label} {_nan(row.get('mean')):.3f}" for label, row in utility.items()]
        + [f"win rate of {label} {100 * _nan(row.get('mean')):.1f} %" for label, row in win_rate.items()]
    )
    return Plot("verdict", title, f"Points with intervals. {title}. {words}.", draw)


def over_optimisation(labels: Sequence[str], reward: Sequence[float], utility: Sequence[float]) -> Plot:
    """Reward model score and true utility from version to version: where they part, the score is being gamed."""
    title = "Is the reward model being over-optimised?"

    def draw(theme: Theme) -> Any:
        figure, (left,) = canvas(theme, title)
        right = left.twinx()
        dress(right, theme)
        right.grid(False)
        left.plot(range(len(labels)), reward, color=theme.colour(1), marker="o", markersize=5)
        right.plot(range(len(labels)), utility, color=theme.colour(0), marker="s", markersize=5)
        left.set_xticks(range(len(labels)), labels=labels)
        left.set_ylabel("reward model score (o)", color=theme.colour(1))
        right.set_ylabel("true utility (square)", color=theme.colour(0))
        return figure

    words = "; ".join(f"{label}: score {r:.3f}, true utility {u:.3f}" for label, r, u in zip(labels, reward, utility))
    return Plot("over_optimisation", title, f"Two lines. {title} {words}.", draw)


def accuracy_by_batch(accuracy: Mapping[str, Mapping[str, Sequence[float]]]) -> Plot:
    """Accuracy on one held-out set of reward models trained on ever more batches, {track: {degree: [versions]}}. (Fig. 6)"""
    title = "Reward models by batches of comparisons (Fig. 6)"

    def draw(theme: Theme) -> Any:
        figure, axes = canvas(theme, title, columns=max(len(accuracy), 1), panel=(4.4, 3.5))
        for ax, (track, curves) in zip(axes, accuracy.items()):
            for (label, values), style in zip(curves.items(), styles(theme, len(curves))):
                ax.plot(range(1, len(values) + 1), [100 * _nan(v) for v in values], label=label, **style)
            ax.set_title(track)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_xlabel("batches trained on")
            legend(ax, theme)
        axes[0].set_ylabel("accuracy on the first held-out batch (%)")
        return figure

    words = "; ".join(
        f"{track}, {degree}: {100 * _nan(values[0]):.1f} to {100 * _nan(values[-1]):.1f} %"
        for track, curves in accuracy.items() for degree, values in curves.items()
    )  # fmt: skip
    return Plot("accuracy_by_batch", title, f"Lines. {title}. {words}.", draw)


def version_progress(judges: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Plot:
    """Win rates against SFT, {judge: {version: {"helpfulness", "safety"}}}: a panel a judge, versions in order. (Fig. 11)"""
    title = "Versions against SFT (Fig. 11)"

    def draw(theme: Theme) -> Any:
        figure, axes = canvas(theme, title, columns=max(len(judges), 1), panel=(4.4, 4.0))
        for ax, (judge, points) in zip(axes, judges.items()):
            x, y = ([100 * _nan(point.get(key)) for point in points.values()] for key in ("helpfulness", "safety"))
            ax.plot(x, y, color=theme.colour(0), marker="o", markersize=5, linewidth=1)
            for label, *place in zip(points, x, y):
                note(ax, theme, label, tuple(place), xytext=(5, 5))
            for line in (ax.axhline, ax.axvline):
                line(50, color=theme.grey, **_DASHED)
            ax.set_title(f"judge: {judge}")
            ax.set_xlabel("helpfulness win rate (%)")
            ax.set_ylabel("safety win rate (%)")
        return figure

    words = "; ".join(
        f"{judge}: " + ", ".join(
            f"{label} {100 * _nan(at.get('helpfulness')):.0f} % helpful and {100 * _nan(at.get('safety')):.0f} % safe"
            for label, at in points.items()
        )
        for judge, points in judges.items()
    )  # fmt: skip
    return Plot("version_progress", title, f"Points joined in order, helpfulness by safety. {title}. {words}.", draw)


def score_scatter(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], *, before: str, after: str) -> Plot:
    """Scores of two models' answers to the same prompts, {track: ([n], [n])}, with the histograms of both: above the diagonal,
    better after. (Fig. 14)"""
    title = f"{after} against {before}, prompt by prompt (Fig. 14)"

    def draw(theme: Theme) -> Any:
        figure, axes = canvas(theme, title, columns=max(len(pairs), 1), panel=(4.4, 4.3), grid="both")
        for ax, (track, (x, y)) in zip(axes, pairs.items()):
            ax.plot(x, y, linestyle="", marker="o", markersize=3, alpha=0.5, color=theme.colour(0))
            ax.plot([0, 1], [0, 1], color=theme.ink, **_DASHED)
            _margins(ax, theme, x, y).set_title(f"{track} reward model")
            ax.set_xlabel(f"score of {before}")
            ax.set_ylabel(f"score of {after}")
        return figure

    words = "; ".join(
        f"{track}: {100 * np.mean(np.asarray(y) > np.asarray(x)):.0f} % above the diagonal, mean {np.mean(x):.3f} to "
        f"{np.mean(y):.3f}" for track, (x, y) in pairs.items()
    )  # fmt: skip
    return Plot("score_scatter", title, f"Points, with histograms of both axes. {title}. {words}.", draw)


def _margins(ax: Any, theme: Theme, x: np.ndarray, y: np.ndarray) -> Any:
    """Histograms of scores above and to the right of their scatter, with their means; returns the axes above."""
    above = ax.inset_axes([0, 1.02, 1, 0.16], sharex=ax)
    beside = ax.inset_axes([1.02, 0, 0.16, 1], sharey=ax)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # what reward models give
    for margin, scores, orientation in ((above, x, "vertical"), (beside, y, "horizontal")):
        dress(margin, theme)
        margin.grid(False)
        margin.hist(scores, bins=SCORE_BINS, orientation=orientation, color=theme.colour(0), alpha=0.55)
        line = margin.axvline if margin is above else margin.axhline
        line(np.mean(scores), color=theme.ink, linewidth=1)
        margin.tick_params(labelbottom=False, labelleft=False)
    beside.spines["bottom"].set_visible(False)
    beside.spines["left"].set(visible=True, color=theme.grey)
    return above


def _ends(curve: Curve) -> str:
    """The first and last finite values of a curve, in words."""
    y = np.asarray(curve[1], np.float64)
    y = y[np.isfinite(y)]
    return f"from {y[0]:.3g} to {y[-1]:.3g}" if len(y) else "not logged"


def _line(ax: Any, curve: Curve, *, colour: str, label: str | None = None) -> None:
    x, y = (np.asarray(values, np.float64) for values in curve)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) == 0:
        return
    ax.xaxis.get_major_locator().set_params(integer=True)  # steps and tokens are counted
    if not _is_long(curve):
        ax.plot(x, y, color=colour, linewidth=1.8, label=label, marker="o" if len(y) < 25 else None, markersize=3)
        return
    window = max(5, len(y) // 50)
    smooth = np.convolve(y, np.full(window, 1 / window), mode="valid")
    ax.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
    ax.plot(x[window // 2 :][: len(smooth)], smooth, color=colour, linewidth=1.8, label=label)


def _is_long(curve: Curve) -> bool:
    """Whether a curve is drawn with a running mean."""
    return int(np.isfinite(np.asarray(curve[1], np.float64)).sum()) >= _LONG


def _explain(ax: Any, theme: Theme) -> list[Any]:
    """What the two lines of a long curve are, as entries of the legend."""
    return [
        *ax.plot([], [], color=theme.ink, linewidth=0.8, alpha=0.4, label="as logged"),
        *ax.plot([], [], color=theme.ink, linewidth=1.8, label="running mean"),
    ]


def _limit(ax: Any, curves: Iterable[Curve]) -> None:
    """Limits that hold every curve; the first steps of a long one tower over the rest, which it is about."""
    finite = [y[np.isfinite(y)] for y in (np.asarray(values, np.float64) for _, values in curves)]
    finite = [y for y in finite if len(y)]
    if not any(len(y) >= _LONG for y in finite):
        return
    low = min(y.min() for y in finite)
    high = max(np.quantile(y, 0.99) if len(y) >= _LONG else y.max() for y in finite)
    if high > low:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _dots(ax: Any, theme: Theme, rows: Mapping[str, Mapping[str, float]], *, scale: float, title: str, colour: str) -> None:
    for position, row in enumerate(rows.values()):
        mean, low, high = (scale * _nan(row.get(key, row.get("mean"))) for key in ("mean", "low", "high"))
        ax.plot([low, high], [position, position], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        ax.plot([mean], [position], color=colour, marker=MARKERS[0], markersize=8)
        text = f"{mean:.3f}" if scale == 1.0 else f"{mean:.0f}"
        note(ax, theme, text, (mean, position), xytext=(0, 9), ha="center")
    ax.set_yticks(range(len(rows)), labels=list(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_title(title)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
