"""Table 30 as a table and a figure: how often an instruction of the first turn is obeyed later, without and with GAtt."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.evals.plots import MARKERS, Plot, Theme, canvas, legend

LABELS = {"baseline": "baseline", "ghost": "Ghost Attention"}
# Table 30: attributes kept, asked by people about hobbies and public figures, in percent.
PAPER = {"baseline": {2: 100, 4: 10, 6: 0, 20: 0}, "ghost": {2: 100, 4: 100, 6: 100, 20: 100}}

Recalls = Mapping[str, Mapping[str, Mapping[str, float]]]  # {model: {turn: {"mean", "low", "high"}}}


def rows(recall: Recalls) -> list[list[str]]:
    """One row a turn: the models with their 95 % intervals, then the paper's."""
    turns = sorted({int(turn) for found in recall.values() for turn in found})
    return [
        [str(turn), *(_percent(recall[name].get(str(turn))) for name in LABELS),
         *(f"{PAPER[name][turn]} %" if turn in PAPER[name] else "" for name in LABELS)]
        for turn in turns
    ]  # fmt: skip


def columns() -> list[str]:
    """Titles of `rows`."""
    return ["turn", *LABELS.values(), *(f"paper, {label}" for label in LABELS.values())]


def markdown(values: Mapping[str, Any]) -> str:
    """study.md."""
    lines = [columns(), ["---"] * len(columns()), *rows(values["recall"])]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    obeyed = f"The policy obeys in {100 * values['policy_obeys']:.0f} % of the samples of Ghost Attention."
    return f"# Ghost Attention\n\nObeyed by turn, with 95 % intervals (Table 30).\n\n{table}\n\n{obeyed}\n"


def recall(found: Recalls) -> Plot:
    """Share of answers that obey by turn, a line a model with its intervals. (Table 30)"""

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, "An instruction of the first turn, obeyed later", panel=(7.0, 3.4))
        turns = sorted({int(turn) for table in found.values() for turn in table})
        for i, (name, table) in enumerate(found.items()):
            shown = [turn for turn in turns if str(turn) in table]
            means, lows, highs = ([100 * table[str(turn)][key] for turn in shown] for key in ("mean", "low", "high"))
            places = [turns.index(turn) + 0.06 * (i - (len(found) - 1) / 2) for turn in shown]
            ax.errorbar(
                places, means, yerr=_reach(means, lows, highs), color=theme.colour(i), marker=MARKERS[i], linewidth=1.8,
                capsize=3, label=LABELS.get(name, name),
            )  # fmt: skip
        ax.set_xticks(range(len(turns)), labels=[str(turn) for turn in turns])
        ax.set_ylim(-4, 104)
        ax.set_xlabel("turn")
        ax.set_ylabel("obeyed (%)")
        legend(ax, theme, loc="best")
        return figure

    said = "; ".join(
        f"{LABELS.get(name, name)}: " + ", ".join(f"turn {turn} {_percent(cell)}" for turn, cell in table.items())
        for name, table in found.items()
    )
    return Plot("ghost_recall", "An instruction of the first turn, obeyed later", f"Line plot. {said}.", draw)


def _reach(means: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> list[list[float]]:
    """Error bars downwards and upwards."""
    return [[max(m - low, 0) for m, low in zip(means, lows)], [max(high - m, 0) for m, high in zip(means, highs)]]


def _percent(cell: Mapping[str, float] | None) -> str:
    return "" if cell is None else f"{100 * cell['mean']:.0f} % ({100 * cell['low']:.0f} to {100 * cell['high']:.0f})"
