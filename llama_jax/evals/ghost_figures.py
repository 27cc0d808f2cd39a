"""Table 30 as a table and a figure: how often an instruction of the first turn is obeyed later, without and with GAtt.

Beside the shares stand a few of the dialogs that they count, with the answers of both models (Figs. 9, 28).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.evals.plots import MARKERS, Plot, Theme, canvas, legend
from llama_jax.markdown import Table, markdown_table, verbatim

LABELS = {"baseline": "baseline", "ghost": "Ghost Attention"}
# Table 30: attributes kept, asked by people about hobbies and public figures, in percent.
PAPER = {"baseline": {2: 100, 4: 10, 6: 0, 20: 0}, "ghost": {2: 100, 4: 100, 6: 100, 20: 100}}

Recalls = Mapping[str, Mapping[str, Mapping[str, float]]]  # {model: {turn: {"mean", "low", "high"}}}

_OBEYED = {True: "\u2713", False: "\u2717"}
DIALOGS_NOTE = (
    "Side by side: the first dialogs that were measured, not chosen by what they show (as Figs. 9 and 28). The instruction "
    "stands before the first question only, and each model goes on from its own answers; a hobby or a name is asked for beside "
    f"the dialog. {_OBEYED[True]} obeys, {_OBEYED[False]} does not."
)


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


def papers() -> Table:
    """The paper's alone, beside models of other names."""
    cells = [[str(turn), *(f"{PAPER[name][turn]} %" for name in LABELS)] for turn in PAPER["baseline"]]
    return Table(["the paper's (Table 30), turn", *LABELS.values()], cells)


def markdown(values: Mapping[str, Any]) -> str:
    """study.md."""
    table = markdown_table(columns(), rows(values["recall"]))
    obeyed = f"The policy obeys in {100 * values['policy_obeys']:.0f} % of the samples of Ghost Attention."
    blocks = ["# Ghost Attention", "Obeyed by turn, with 95 % intervals (Table 30).", table, obeyed]
    return "\n\n".join([*blocks, *dialog_blocks(values.get("examples") or [])]) + "\n"


def examples(
    instructions: Sequence[str], answers: Mapping[str, Sequence[Mapping[str, Any]]], *, most: int = 3
) -> list[dict[str, Any]]:
    """The first dialogs with what each model answered, {"instruction", "turns": [{"turn", "question", "answers"}]}.

    Args:
      instructions: of each dialog, by its number.
      answers: rows with the fields of `evals.ghost.Recall`, by model.
    """
    found = []
    for number, instruction in enumerate(instructions):
        asked: dict[tuple[int, str], dict[str, Any]] = {}
        for name, judged in answers.items():
            for row in judged:
                if row["context"] == number:
                    said = {"answer": row["answer"], "obeyed": row["obeyed"]}
                    asked.setdefault((row["turn"], row["question"]), {})[name] = said
        turns = [{"turn": turn, "question": question, "answers": asked[turn, question]} for turn, question in sorted(asked)]
        if turns and len(found) < most:
            found.append({"instruction": instruction, "turns": turns})
    return found


def dialog_columns(dialogs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Titles of `dialog_rows`."""
    return ["turn", "user", *(LABELS.get(name, name) for name in _models(dialogs))]


def dialog_rows(dialogs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of each of `examples` a row with its instruction, then a row a turn with the models' answers side by side."""
    names, found = _models(dialogs), []
    for dialog in dialogs:
        found.append(["", f"Instruction: {one_line(dialog['instruction'])}", *("" for _ in names)])
        for turn in dialog["turns"]:
            said = (turn["answers"].get(name) for name in names)
            cells = ["" if s is None else f"{_OBEYED[s['obeyed']]} {one_line(s['answer'])}" for s in said]
            found.append([str(turn["turn"]), one_line(turn["question"]), *cells])
    return found


def dialog_blocks(dialogs: Sequence[Mapping[str, Any]]) -> list[str]:
    """`examples` as blocks of Markdown, none without them; what a model wrote cannot end its cell."""
    if not dialogs:
        return []
    columns, *rows = ([verbatim(cell) for cell in cells] for cells in (dialog_columns(dialogs), *dialog_rows(dialogs)))
    return ["## The same dialogs, side by side", DIALOGS_NOTE, markdown_table(columns, rows)]


def one_line(text: str, most: int = 160) -> str:
    """A text for a table; of a long one the beginning and the end, with [...] between: an instruction may be about either."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))  # a NUL would make the file a binary one
    if len(text) <= most:
        return text
    head, tail = text[: most // 2], text[-most // 3 :]  # whole words, where there are any
    return f"{head.rpartition(' ')[0] or head} [...] {tail.partition(' ')[2] or tail}"


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


def _models(dialogs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for dialog in dialogs for turn in dialog["turns"] for name in turn["answers"]))


def _reach(means: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> list[list[float]]:
    """Error bars downwards and upwards."""
    return [[max(m - low, 0) for m, low in zip(means, lows)], [max(high - m, 0) for m, high in zip(means, highs)]]


def _percent(cell: Mapping[str, float] | None) -> str:
    return "" if cell is None else f"{100 * cell['mean']:.0f} % ({100 * cell['low']:.0f} to {100 * cell['high']:.0f})"
