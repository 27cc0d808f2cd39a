"""What reward models know (Tables 7, 8, Figs. 6, 27, 32) and what they learn from (Figs. 25, 26)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.evals.plots import Plot, Theme, bars, canvas, legend, styles

# A share, alone or with its 95 % interval and number, {"share", "low", "high", "n"}; None: not measured.
Share = float | Mapping[str, float] | None

DEGREES = ("significantly", "better", "slightly", "negligibly", "all")


def accuracy(found: Mapping[str, Mapping[str, Share]]) -> Plot:
    """Bars per degree of preference and reward model, {"helpfulness": {"all": 0.8, ...}, ...}. (Table 8)

    Shares with intervals (rows of `reward.held_out.accuracy_table`) get whiskers, and their degrees the number of pairs.
    """
    degrees = [degree for degree in DEGREES if any(degree in of_model for of_model in found.values())]
    return _accuracy("reward_accuracy", "Reward model accuracy by degree of preference (Table 8)", degrees, found)


def accuracy_by_source(found: Mapping[str, Mapping[str, Share]]) -> Plot:
    """Bars per source of pairs and reward model, {model: {source: share}}. (Table 7)"""
    sources = list(dict.fromkeys(source for of_model in found.values() for source in of_model))
    return _accuracy("reward_accuracy_sources", "Reward model accuracy by source (Table 7)", sources, found)


def _accuracy(name: str, title: str, groups: Sequence[str], found: Mapping[str, Mapping[str, Share]]) -> Plot:
    known = {
        model: {g: value if isinstance(value, Mapping) else {"share": value} for g, value in row.items() if value is not None}
        for model, row in found.items()
    }
    series = {model: [100 * row.get(g, {}).get("share", np.nan) for g in groups] for model, row in known.items()}
    intervals = {
        model: [(100 * row[g]["low"], 100 * row[g]["high"]) if "low" in row.get(g, {}) else None for g in groups]
        for model, row in known.items()
    }
    counts = {g: {row[g]["n"] for row in known.values() if "n" in row.get(g, {})} for g in groups}
    labels = [f"{g}\nn = {next(iter(counts[g])):,}" if len(counts[g]) == 1 else g for g in groups]

    def draw(theme: Theme) -> Any:
        width = max(7.0, 0.4 * len(groups) * len(series))  # room for the numbers above the bars
        figure, (ax,) = canvas(theme, title, panel=(width, 3.8))
        colours = [theme.colour(i) for i in (0, 2, 1, *range(3, len(series)))]
        bars(ax, theme, labels, series, colours=colours, number="{:.0f}", intervals=intervals)
        ax.axhline(50, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate("chance", (1.005, 50), xycoords=("axes fraction", "data"), va="center", color=theme.ink, fontsize=9)
        ax.set_ylim(0, 108)
        ax.set_ylabel("held-out accuracy (%)")
        below = -0.18 if any(counts.values()) else -0.1
        legend(ax, theme, loc="upper center", bbox_to_anchor=(0.5, below), ncols=len(series))
        return figure

    def said(value: float, interval: tuple[float, float] | None) -> str:
        return f"{value:.1f} %" + (f" ({interval[0]:.0f} to {interval[1]:.0f})" if interval else "")

    words = "; ".join(
        f"{model}: " + ", ".join(
            f"{g} {said(value, interval)}" for g, value, interval in zip(groups, values, intervals[model]) if np.isfinite(value)
        )
        for model, values in series.items()
    )  # fmt: skip
    return Plot(name, title, f"Bars. {title}. {words}.", draw)


def rating_shares(shares: Mapping[str, Mapping[str, float]]) -> Plot:
    """Share of each degree of preference by batch, {batch: {rating: share}}. (Fig. 25)"""
    ratings = list(next(iter(shares.values())))
    series = {rating: [100 * of_batch[rating] for of_batch in shares.values()] for rating in ratings}
    return _by_batch("rating_shares", "Degrees of preference by batch (Fig. 25)", "comparisons (%)", list(shares), series)


def best_of_batches(scores: Mapping[str, Mapping[str, float]]) -> Plot:
    """Mean over prompts of the largest and the median score among sampled answers, {batch: {"max", "median"}}. (Fig. 26)"""
    series = {name: [of_batch[name] for of_batch in scores.values()] for name in ("max", "median")}
    return _by_batch(
        "best_of_batches", "Reward among sampled answers by batch (Fig. 26)", "reward model score", list(scores), series
    )


def margins(histograms: Mapping[str, Mapping[str, Sequence[float]]]) -> Plot:
    """Shares of scores by margin, {margin: {"edges": n + 1, "shares": n}}: larger margins push scores outwards. (Fig. 27)"""
    title = "Scores by margin of the ranking loss (Fig. 27)"

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title)
        for index, (name, histogram) in enumerate(histograms.items()):
            heights = 100 * np.asarray(histogram["shares"])
            dash = ("-", "--", ":", "-.")[index % 4]
            colour = theme.colour(index)
            ax.stairs(heights, histogram["edges"], color=colour, linewidth=1.8, linestyle=dash, label=name)
        ax.set_xlabel("reward model score")
        ax.set_ylabel("answers (%)")
        legend(ax, theme)
        return figure

    def outer(histogram: Mapping[str, Sequence[float]]) -> float:
        edges = np.asarray(histogram["edges"])
        centres = (edges[1:] + edges[:-1]) / 2
        return 100 * float(np.asarray(histogram["shares"])[(centres < 0.1) | (centres > 0.9)].sum())

    words = "; ".join(f"{name}: {outer(h):.0f} % of the scores below 0.1 or above 0.9" for name, h in histograms.items())
    return Plot("margins", title, f"Histograms. {title}. {words}.", draw)


def scaling(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Plot:
    """Accuracy by number of batches, a line a size, on all and on "significantly better" pairs. (Fig. 6)

    Args:
      curves: {size: [{"batch", "accuracy": {degree: {"share", "low", "high"}}}]}.
    """
    title = "Accuracy by data and size (Fig. 6)"

    def draw(theme: Theme) -> Any:
        figure, axes = canvas(theme, title, columns=2)
        for ax, (degree, panel) in zip(axes, (("all", "all pairs"), ("significantly", "significantly better"))):
            for (name, points), style in zip(curves.items(), styles(theme, len(curves))):
                known = [point for point in points if degree in point["accuracy"]]
                x = [point["batch"] for point in known]
                mean, low, high = ([100 * p["accuracy"][degree][key] for p in known] for key in ("share", "low", "high"))
                ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
                ax.plot(x, mean, label=name, **style)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_title(panel)
            ax.set_xlabel("batches of pairs")
            ax.set_ylabel("accuracy (%)")
        legend(axes[0], theme)
        return figure

    words = "; ".join(
        f"{name}: {100 * points[0]['accuracy']['all']['share']:.1f} % with {points[0]['batch']} to "
        f"{100 * points[-1]['accuracy']['all']['share']:.1f} % with {points[-1]['batch']} batches"
        for name, points in curves.items()
    )
    return Plot("scaling", title, f"Lines with bands of 95 % intervals. {title}. {words}.", draw)


def conflict(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> Plot:
    """Both models' scores of safe and of unsafe answers, {"safe" | "unsafe": {"safety", "helpfulness"}}. (Fig. 32)"""
    title = "Helpfulness against safety (Fig. 32)"

    def draw(theme: Theme) -> Any:
        figure, axes = canvas(theme, title, columns=2, panel=(4.2, 3.8))
        for ax, (kind, colour) in zip(axes, (("safe", theme.colour(0)), ("unsafe", theme.colour(4)))):
            found = scores[kind]
            size = max(2.0, 12 - len(found["safety"]) ** 0.4)
            ax.scatter(found["safety"], found["helpfulness"], s=size, color=colour, alpha=0.4, linewidths=0)
            for line in (ax.axhline, ax.axvline):
                line(0.5, color=theme.grey, linewidth=1, linestyle=(0, (4, 2)))
            ax.set_xlim(-0.02, 1.02)
            ax.set_ylim(-0.02, 1.02)
            ax.set_title(f"{kind} answers")
            ax.set_xlabel("safety score")
            ax.set_ylabel("helpfulness score")
        return figure

    words = "; ".join(
        f"{kind} answers: mean safety {np.mean(found['safety']):.2f}, mean helpfulness {np.mean(found['helpfulness']):.2f}"
        for kind, found in scores.items() if len(found["safety"])
    )  # fmt: skip
    return Plot("conflict", title, f"Points. {title}. {words}.", draw)


def _by_batch(name: str, title: str, ylabel: str, batches: list[str], series: Mapping[str, list[float]]) -> Plot:
    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title)
        for (label, values), style in zip(series.items(), styles(theme, len(series))):
            ax.plot(range(len(batches)), values, label=label, **style)
        ax.set_xticks(range(len(batches)), labels=batches)
        ax.set_xlabel("batch")
        ax.set_ylabel(ylabel)
        legend(ax, theme, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)
        return figure

    words = "; ".join(f"{label} from {values[0]:.3g} to {values[-1]:.3g}" for label, values in series.items())
    return Plot(name, title, f"Lines. {title}, {ylabel}: {words}.", draw)
