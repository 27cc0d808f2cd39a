"""The plots of an evaluation: groups beside the paper's models (Table 3), differences between two models with intervals."""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from llama_jax.evals import figures
from llama_jax.evals.groups import GROUPS, TITLES

# Models of the paper are hollow, ours are filled; shape and colour both tell them apart.
_MARKS = ("o", "s", "D", "^", "v", "P", "X", "<")


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot in both forms, and what it shows in words."""

    png: bytes
    svg: bytes
    text: str


def draw(values: Mapping[str, Any], known: Mapping[str, Mapping[str, float]]) -> dict[str, Plot]:
    """The plots that these values allow, by name."""
    plots = {}
    names = [name for name in GROUPS if any(name in row["groups"] for row in values["models"].values())]
    if names:
        plots["groups"] = _groups(values["models"], known, names)
    for other, found in values["differences"].items():
        if found["groups"]:
            plots[f"difference_{other}"] = _difference(other, found["to"], found["groups"])
    return plots


def _groups(models, known, names) -> Plot:
    figure, (ax,) = figures._figure(1, 1, "Averages by group (%), with 95 % intervals", panel=(8.2, 0.62 * len(names) + 1.2))
    for index, (model, columns) in enumerate(known.items()):
        points = [(columns[name], y) for y, name in enumerate(names) if name in columns]
        if points:
            x, y = zip(*points)
            ax.plot(
                x, y, linestyle="", marker=_MARKS[index % len(_MARKS)], markersize=7, markerfacecolor="none",
                markeredgecolor=figures.GREY, markeredgewidth=1.4, label=f"{model} (paper)",
            )  # fmt: skip
    for index, ((model, row), colour) in enumerate(zip(models.items(), figures._cycle(len(models)))):
        found = [(y, row["groups"][name]) for y, name in enumerate(names) if name in row["groups"]]
        beside = 0.14 * (index - (len(models) - 1) / 2)  # so that equal values do not hide each other
        ax.errorbar(
            [100 * value["value"] for _, value in found], [y + beside for y, _ in found],
            xerr=[196 * value["stderr"] for _, value in found], linestyle="", marker=_MARKS[index % len(_MARKS)],
            markersize=8, color=colour, elinewidth=2, label=model,
        )  # fmt: skip
    _rows(ax, [TITLES[name] for name in names])
    ax.set_xlim(0, min(ax.get_xlim()[1], 100))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=9)
    words = []
    for model, row in models.items():
        found = [f"{TITLES[name]} {100 * row['groups'][name]['value']:.1f}" for name in names if name in row["groups"]]
        words.append(f"{model}: {', '.join(found)}")
    text = f"Average scores by group of Table 3, in percent. {'; '.join(words)}. Hollow grey marks are the paper's models."
    return _plot(figure, text)


def _difference(other: str, first: str, found: Mapping[str, Mapping[str, float]]) -> Plot:
    figure, (ax,) = figures._figure(1, 1, f"{other} minus {first} (points)", panel=(7.2, 0.45 * len(found) + 0.9))
    for y, row in enumerate(found.values()):
        clear = row["low"] > 0 or row["high"] < 0
        colour = figures.BLUE if clear else figures.GREY
        ax.plot([100 * row["low"], 100 * row["high"]], [y, y], color=colour, linewidth=4, alpha=0.5, solid_capstyle="round")
        ax.plot([100 * row["difference"]], [y], marker="o" if clear else "s", color=colour, markersize=8)
    ax.axvline(0, color=figures.INK, linewidth=1, linestyle=(0, (4, 3)))
    _rows(ax, [TITLES.get(name, name.replace("_", " ")) for name in found])
    words = ", ".join(f"{TITLES.get(name, name)} {100 * row['difference']:+.1f}" for name, row in found.items())
    return _plot(figure, f"Differences between {other} and {first} by group with 95 % intervals, in points: {words}.")


def _rows(ax, labels) -> None:
    ax.set_yticks(range(len(labels)), labels=labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(True, axis="x", color=figures.FAINT)
    ax.grid(False, axis="y")


def _plot(figure, text: str) -> Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(figures._png(figure), buffer.getvalue(), text)
