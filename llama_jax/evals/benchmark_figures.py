"""The plots of an evaluation: groups beside the paper's models (Table 3), differences between two models with intervals."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llama_jax.evals.groups import GROUPS, TITLES
from llama_jax.evals.plots import MARKERS, Plot, Theme, canvas, legend, styles
from llama_jax.evals.statistics import ends_of, is_clear


def draw(values: Mapping[str, Any], known: Mapping[str, Mapping[str, float]]) -> dict[str, Plot]:
    """The plots that these values allow, by name."""
    plots = {}
    names = shown(values["models"], GROUPS)
    if names:
        plots["groups"] = _groups(values["models"], known, names)
    for other, found in values["differences"].items():
        if found["groups"]:
            plots[f"difference_{other}"] = _difference(other, found["to"], found["groups"])
    return plots


def shown(models: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """The groups that some model has; not those of which one task was run of several, which is no average."""

    def is_average(name: str, row: Mapping[str, Any]) -> bool:
        members = GROUPS.get(name, (name,))
        return name in row["groups"] and len(row["groups"][name]["missing"]) < max(len(members) - 1, 1)

    return [name for name in names if any(is_average(name, row) for row in models.values())]


def _groups(models, known, names) -> Plot:
    title = "Averages by group (%), with 95 % intervals"

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(8.2, 0.62 * len(names) + 1.2), grid="x")
        for index, (model, columns) in enumerate(known.items()):
            points = [(columns[name], y) for y, name in enumerate(names) if name in columns]
            if points:
                x, y = zip(*points)
                ax.plot(
                    x, y, linestyle="", marker=MARKERS[index % len(MARKERS)], markersize=7, markerfacecolor="none",
                    markeredgecolor=theme.grey, markeredgewidth=1.4, label=f"{model} (paper)",
                )  # fmt: skip
        for index, ((model, row), style) in enumerate(zip(models.items(), styles(theme, len(models), size=8))):
            found = [(y, row["groups"][name]) for y, name in enumerate(names) if name in row["groups"]]
            beside = 0.14 * (index - (len(models) - 1) / 2)  # so that equal values do not hide each other
            ax.errorbar(
                [100 * value["value"] for _, value in found], [y + beside for y, _ in found],
                xerr=np.transpose([_beside(value) for _, value in found]), linestyle="", elinewidth=2, label=model, **style,
            )  # fmt: skip
        _rows(ax, [TITLES[name] for name in names])
        ax.set_xlim(0, min(ax.get_xlim()[1], 100))
        legend(ax, theme, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
        return figure

    words = []
    for model, row in models.items():
        found = [f"{TITLES[name]} {100 * row['groups'][name]['value']:.1f}" for name in names if name in row["groups"]]
        words.append(f"{model}: {', '.join(found)}")
    alt = f"Average scores by group of Table 3, in percent. {'; '.join(words)}. Hollow grey marks are the paper's models."
    return Plot("groups", title, alt, draw)


def _beside(record: Mapping[str, Any]) -> tuple[float, float]:
    """How far the interval goes to the left and to the right of the value, in points."""
    low, high = ends_of(record)
    return 100 * (record["value"] - low), 100 * (high - record["value"])


def _difference(other: str, first: str, found: Mapping[str, Mapping[str, float]]) -> Plot:
    title = f"{other} minus {first} (points)"

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(7.2, 0.45 * len(found) + 0.9), grid="x")
        for y, row in enumerate(found.values()):
            clear = is_clear(row)
            colour = theme.colour(0) if clear else theme.grey
            ax.plot([100 * row["low"], 100 * row["high"]], [y, y], color=colour, linewidth=4, alpha=0.5, solid_capstyle="round")
            ax.plot([100 * row["difference"]], [y], marker="o" if clear else "s", color=colour, markersize=8)
        ax.axvline(0, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
        _rows(ax, [TITLES.get(name, name.replace("_", " ")) for name in found])
        return figure

    words = ", ".join(f"{TITLES.get(name, name)} {100 * row['difference']:+.1f}" for name, row in found.items())
    alt = f"Differences between {other} and {first} by group with 95 % intervals, in points: {words}."
    return Plot(f"difference_{other}", title, alt, draw)


def _rows(ax, labels) -> None:
    ax.set_yticks(range(len(labels)), labels=labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
