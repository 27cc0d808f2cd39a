"""Figs. 15 and 33: mean scores, the left tail of the safety scores, and false refusals by the share of safety data."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.evals.plots import MARKERS, Plot, Theme, canvas, legend
from llama_jax.markdown import markdown_table, verbatim

# The paper's points, read off its figures: mean safety and helpfulness score (Fig. 15), false refusals in percent of
# helpful and of borderline prompts (Fig. 33).
PAPER = {
    "0": (0.680, 0.586, 0.006, 15.0), "1": (0.693, None, 0.013, 16.7), "10": (0.724, None, 0.026, 17.8),
    "25": (0.739, None, 0.026, 21.7), "50": (0.762, None, 0.051, 23.3), "100": (0.773, 0.583, 0.051, 27.2),
}  # fmt: skip
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))

Shares = Mapping[str, Mapping[str, Any]]  # {share: what `safety_study.summary` found}


def scaling(shares: Shares) -> Plot:
    """(a) Mean scores of both reward models by share; (b) how many answers are at most so safe, a line a share. (Fig. 15)"""

    def draw(theme: Theme) -> Any:
        figure, (means, tails) = canvas(theme, "Safety data: scores", columns=2, panel=(5.4, 3.8))
        for i, (key, label) in enumerate((("safety", "adversarial"), ("helpfulness", "helpful"))):
            _line(means, theme, i, [found[key] for found in shares.values()], f"{key}, {label} prompts")
        _by_share(means, shares)
        means.set_title("(a) mean reward model score", loc="left", color=theme.ink, fontsize=10)
        means.set_ylabel("score")
        legend(means, theme, loc="best")
        for i, (share, found) in enumerate(shares.items()):
            ordered = np.asarray(found["safety_scores"])
            height = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
            tails.step(
                ordered, height, where="post", color=theme.colour(i), linestyle=_STYLES[i % len(_STYLES)], linewidth=1.8,
                label=f"{share} %",
            )  # fmt: skip
        tails.set_title("(b) answers with at most this safety score", loc="left", color=theme.ink, fontsize=10)
        tails.set_xlim(0, 1)
        tails.set_xlabel("safety score, adversarial prompts")
        tails.set_ylabel("answers (%)")
        legend(tails, theme, loc="upper left", title="safety data", title_fontsize=9)
        tails.get_legend().get_title().set_color(theme.ink)
        return figure

    said = ", ".join(f"{share} % {found['safety']['mean']:.3f}" for share, found in shares.items())
    return Plot("safety_scaling", "Safety data: scores", f"Two panels. Mean safety scores by share of the data: {said}.", draw)


def false_refusals(shares: Shares) -> Plot:
    """Declined helpful and borderline prompts by share. (Fig. 33)"""

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, "Safety data: false refusals", panel=(6.4, 3.6))
        for i, name in enumerate(("borderline", "helpful")):
            _line(ax, theme, i, [found["declined"][name] for found in shares.values()], f"{name} prompts", scale=100)
        _by_share(ax, shares)
        ax.set_ylim(bottom=-1)
        ax.set_ylabel("declined (%)")
        legend(ax, theme, loc="best")
        return figure

    said = ", ".join(f"{share} % {100 * found['declined']['borderline']['mean']:.1f} %" for share, found in shares.items())
    return Plot("false_refusals", "Safety data: false refusals", f"Line plot. Declined borderline prompts: {said}.", draw)


def _line(ax: Any, theme: Theme, i: int, cells: list[Mapping[str, float]], label: str, *, scale: float = 1.0) -> None:
    means, lows, highs = (scale * np.array([cell[key] for cell in cells], np.float64) for key in ("mean", "low", "high"))
    ax.errorbar(
        np.arange(len(cells)) + 0.05 * i, means, yerr=[np.maximum(means - lows, 0), np.maximum(highs - means, 0)],
        color=theme.colour(i), marker=MARKERS[i], linewidth=1.8, capsize=3, label=label,
    )  # fmt: skip


def _by_share(ax: Any, shares: Shares) -> None:
    ax.set_xticks(range(len(shares)), labels=[str(share) for share in shares])
    ax.set_xlabel("share of the safety data (%)")


def markdown(values: Mapping[str, Any]) -> str:
    """study.md."""
    shares = values["shares"]
    scores = [
        [f"{share} %", f"{found['rows']['safety']:,} + {found['rows']['helpful']:,}", _score(found["safety"]),
         f"{100 * found['tail']['mean']:.1f} %", _score(found["helpfulness"]), *_paper(share, (0, 1), "{:.3f}")]
        for share, found in shares.items()
    ]  # fmt: skip
    refusals = [
        [f"{share} %", *(_percent(found["declined"][name]) for name in ("adversarial", "borderline", "helpful")),
         *_paper(share, (3, 2), "{:g} %")]
        for share, found in shares.items()
    ]  # fmt: skip
    columns = ["share", "safety + helpful", "safety", "tail", "helpfulness", "paper, safety", "paper, helpfulness"]
    return "\n\n".join((
        "# Safety data",
        "Mean scores with 95 % intervals (Fig. 15); the tail are adversarial prompts' answers below the gate of the reward.",
        markdown_table(columns, scores),
        "Declined prompts; of borderline and helpful ones these are false refusals (Fig. 33).",
        markdown_table(["share", "adversarial", "borderline", "helpful", "paper, borderline", "paper, helpful"], refusals),
        "## Answers by share (Tables 36 to 38)",
        *(_answers(example) for example in values["answers"]),
    )) + "\n"  # fmt: skip


def _answers(example: Mapping[str, Any]) -> str:
    cells = [[f"{share} %", f"{found['safety']:.2f}", f"{found['helpfulness']:.2f}", verbatim(found["answer"])]
             for share, found in example["answers"].items()]  # fmt: skip
    table = markdown_table(["share", "safety", "helpfulness", "answer"], cells)
    return f"{example['set']}: {verbatim(example['prompt'])}\n\n{table}"


def _paper(share: str, columns: tuple[int, ...], form: str) -> list[str]:
    values = PAPER.get(share, (None,) * 4)
    return ["" if values[i] is None else form.format(values[i]) for i in columns]


def _score(cell: Mapping[str, float]) -> str:
    if cell["low"] is None:  # of one answer
        return f"{cell['mean']:.3f}"
    return f"{cell['mean']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})"


def _percent(cell: Mapping[str, float]) -> str:
    return f"{100 * cell['mean']:.1f} % ({100 * cell['low']:.1f} to {100 * cell['high']:.1f})"
