"""The figures of model-based evaluation: win rates on two axes (2, 11), what scored answers show (7, 8, 20, 21, 29)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.evals.plots import BESIDE, DARK, Plot, Theme, canvas, legend, note, styles
from llama_jax.rlhf.best_of import BestOf


def win_rate_axes(points: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Plot:
    """Win rates of each model, ties dropped, {label: {"helpfulness": share, "safety": share}}. (Figs. 2, 11)"""
    title = "Win rate, ties dropped (Figs. 2, 11)"

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(5.4, 5.0), grid="both")
        ax.axhline(50, color=theme.grey, linewidth=1, linestyle=(0, (4, 3)))
        ax.axvline(50, color=theme.grey, linewidth=1, linestyle=(0, (4, 3)))
        for (label, axes), style in zip(points.items(), styles(theme, len(points), size=8)):
            (x, *x_ends), (y, *y_ends) = (_percents(axes[name]) for name in ("helpfulness", "safety"))
            errors = {"xerr": [[x - x_ends[0]], [x_ends[1] - x]], "yerr": [[y - y_ends[0]], [y_ends[1] - y]]}
            ax.errorbar(x, y, **errors, **style, capsize=3)
            note(ax, theme, label, (x, y), xytext=(9, 9))
        ax.set_xlim(-3, 103)  # a mark at the end is whole
        ax.set_ylim(-3, 103)
        ax.set_xlabel("helpfulness win rate (%)")
        ax.set_ylabel("safety win rate (%)")
        return figure

    words = "; ".join(
        f"{label}: helpfulness {100 * of['helpfulness']['share']:.1f} %, safety {100 * of['safety']['share']:.1f} %"
        for label, of in points.items()
    )
    return Plot("win_rate_axes", title, f"Points with 95 % intervals. {title}. {words}.", draw)


def best_of_n(curves: Mapping[str, BestOf]) -> Plot:
    """Expected best and median reward of N samples, N on a log axis. (Fig. 7)"""
    title = "Best and median reward of N samples (Fig. 7)"

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title)
        for (label, best), style in zip(curves.items(), styles(theme, len(curves), size=5)):
            counts = np.arange(1, len(best.maximum) + 1)
            style |= {"linewidth": 1.8, "markevery": [n - 1 for n in _ticks(len(counts))]}
            ax.plot(counts, best.maximum, label=f"{label}: best", **style)
            ax.plot(counts, best.median, label=f"{label}: median", linestyle=(0, (4, 2)), markerfacecolor=theme.page, **style)
        _log_counts(ax, curves.values())
        ax.set_ylabel("reward model score")
        legend(ax, theme, **(BESIDE if len(curves) > 2 else {}))  # where so many lines leave no room
        return figure

    words = "; ".join(
        f"{label}: best from {best.maximum[0]:.3f} to {best.maximum[-1]:.3f} at N = {len(best.maximum)}"
        for label, best in curves.items()
    )
    return Plot("best_of_n", title, f"Lines over N. {title}. {words}.", draw)


def best_temperature(curves: Mapping[float, BestOf]) -> tuple[float, int]:
    """The temperature with the best maximum of N samples, and N: the most samples that all of them have."""
    n = min(len(best.maximum) for best in curves.values())
    return max(curves, key=lambda temperature: curves[temperature].maximum[n - 1]), n


def temperature_map(models: Mapping[str, Mapping[float, BestOf]]) -> Plot:
    """Expected best reward of N samples at each temperature, one panel a model, {model: {temperature: BestOf}}. (Fig. 8)"""
    title = "Best reward of N samples by temperature (Fig. 8)"

    def draw(theme: Theme) -> Any:
        from matplotlib import colormaps

        # Dark blue to yellow: ordered also in grey and for every kind of colour vision. The end like the page is left out.
        colours, (low, high) = colormaps["cividis"], (0.3, 1.0) if theme is DARK else (0.0, 0.85)
        columns = min(len(models), 3)  # more would be too small to read on a page
        rows = -(-len(models) // columns)
        figure, axes = canvas(theme, title, rows=rows, columns=columns, panel=(4.6 if rows == 1 else 3.6, 3.8), share_y=True)
        for ax in axes[len(models) :]:
            ax.remove()
        for ax, (model, curves) in zip(axes, models.items()):
            for index, (temperature, best) in enumerate(sorted(curves.items())):
                colour = colours(low + (high - low) * index / max(len(curves) - 1, 1))
                counts = np.arange(1, len(best.maximum) + 1)
                ax.plot(counts, best.maximum, color=colour, linewidth=1.8, label=f"T = {temperature:g}")
            _log_counts(ax, curves.values())
            ax.set_title(model)
        for ax in axes[: len(models) : columns]:
            ax.set_ylabel("reward model score")
        legend(axes[columns - 1], theme, **BESIDE)
        return figure

    found = {model: best_temperature(curves) for model, curves in models.items()}
    words = "; ".join(f"{model}: best temperature at N = {n} is {best:g}" for model, (best, n) in found.items())
    return Plot("temperature_map", title, f"Lines over N, one for each temperature. {title}. {words}.", draw)


def reward_shift(
    versions: Mapping[str, np.ndarray], *, name: str = "reward_shift",
    title: str = "Reward of the samples of each version (Fig. 20)",
) -> Plot:  # fmt: skip
    """Density of the scores of each version, one ridge above the other, with its mean. (Fig. 20)"""

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(7.0, 0.8 * len(versions) + 1.2), grid="x")
        everything = np.concatenate(list(versions.values()))
        edges = np.linspace(everything.min(), everything.max() + 1e-9, 81)
        centres = (edges[1:] + edges[:-1]) / 2
        for index, scores in enumerate(versions.values()):
            density = _smooth(np.histogram(scores, edges)[0] / len(scores))
            base = len(versions) - 1 - index
            ridge = base + 0.85 * density / max(density.max(), 1e-12)
            ax.fill_between(centres, base, ridge, color=theme.colour(index), alpha=0.55, linewidth=0, zorder=3 + index)
            ax.plot(centres, ridge, color=theme.colour(index), linewidth=1.4, zorder=3 + index)
            ax.plot([scores.mean()] * 2, [base, base + 0.85], color=theme.ink, linewidth=1, linestyle=(0, (3, 2)), zorder=20)
            note(ax, theme, f"{scores.mean():.3f}", (scores.mean(), base + 0.86), xytext=(0, 1), ha="center", zorder=21)
        ax.set_yticks([len(versions) - 1 - i for i in range(len(versions))], labels=list(versions))
        ax.set_ylim(-0.08, len(versions))
        ax.set_xlabel("reward model score (dashed: mean)")
        return figure

    words = ", ".join(f"{label} {scores.mean():.3f}" for label, scores in versions.items())
    return Plot(name, title, f"Ridges of densities. {title}. Means: {words}.", draw)


def self_bleu(models: Mapping[str, Mapping[str, Mapping[float, Mapping[str, float]]]]) -> Plot:
    """Self-BLEU against temperature, one panel a kind of prompt, {model: {kind: {T: {"mean", "std"}}}}. (Fig. 21)"""
    title = "Diversity of the samples by temperature (Fig. 21)"
    kinds = sorted({kind for of_model in models.values() for kind in of_model})

    def draw(theme: Theme) -> Any:
        figure, axes = canvas(theme, title, columns=len(kinds), panel=(4.4, 3.6), share_y=True)
        for ax, kind in zip(axes, kinds):
            for (model, of_model), style in zip(models.items(), styles(theme, len(models), size=4.5)):
                points = sorted(of_model.get(kind, {}).items())
                x = np.array([temperature for temperature, _ in points])
                mean, std = (np.array([point[name] for _, point in points]) for name in ("mean", "std"))
                ax.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
                ax.plot(x, mean, label=model, **style)
            ax.set_title({"all": "all prompts"}.get(kind, f"{kind} prompts"))
            ax.set_xlabel("temperature")
        axes[0].set_ylabel("Self-BLEU (100: all alike)")
        legend(axes[-1], theme, **(BESIDE if len(models) > 4 else {}))
        return figure

    words = "; ".join(
        f"{model}, {kind}: {points[max(points)]['mean']:.1f} at T = {max(points):g}"
        for model, of_model in models.items() for kind, points in of_model.items()
    )  # fmt: skip
    return Plot("self_bleu", title, f"Lines with bands of one deviation. {title}. {words}.", draw)


def calibration(
    curves: Mapping[str, Sequence[Mapping[str, float]]], *, title: str = "Reward model score by median human rating (Fig. 29)",
    xlabel: str = "median rating", ylabel: str = "reward model score",
) -> Plot:  # fmt: skip
    """Mean score at each median human rating with a band of one deviation, {label: [{"rating", "mean", "std"}]}. (Fig. 29)"""

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title)
        for (label, points), style in zip(curves.items(), styles(theme, len(curves), size=5)):
            x, mean, std = (np.array([point[name] for point in points]) for name in ("rating", "mean", "std"))
            ax.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
            ax.plot(x, mean, label=label, **style)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        legend(ax, theme, loc="upper left")
        return figure

    words = "; ".join(
        f"{label}: {points[0]['mean']:.3f} at {points[0]['rating']:g} to {points[-1]['mean']:.3f} at {points[-1]['rating']:g}"
        for label, points in curves.items()
    )
    return Plot("calibration", title, f"Lines with bands of one deviation. {title}. {words}.", draw)


def _percents(share: Mapping[str, float]) -> tuple[float, float, float]:
    return tuple(100 * share[name] for name in ("share", "low", "high"))


def _log_counts(ax: Any, curves: Any) -> None:
    ticks = _ticks(max(len(best.maximum) for best in curves))
    ax.set_xscale("log")
    ax.set_xticks(ticks, labels=[str(n) for n in ticks])
    ax.minorticks_off()
    ax.set_xlabel("N")


def _ticks(largest: int) -> list[int]:
    """Round numbers, and the largest, where the curves end; one that its label would touch gives way to it."""
    return [*(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if 1.2 * n < largest), largest]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A light Gaussian over the bins. # [n] -> [n]"""
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2) ** 2)
    return np.convolve(values, kernel / kernel.sum(), mode="same")
