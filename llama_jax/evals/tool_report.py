"""The report on tools and time: accuracy with a calculator and without beside Table 15, answers to read (Figs. 22, 23)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.evals import plots, tool_prompts
from llama_jax.evals.page import Chapter, page
from llama_jax.evals.plots import MARKERS, Plot, Theme, canvas, legend
from llama_jax.evals.published import TABLE_15
from llama_jax.evals.tool_scores import WAYS
from llama_jax.evals.word_problems import PHRASE, TOLERANCE
from llama_jax.files import write_json, write_text
from llama_jax.markdown import Table, markdown_table, text_table, verbatim
from llama_jax.reward.held_out import percent

_PAPERS_TOOLS = ("Toolformer", "Llama 2-Chat")
_TITLE = "Tools and time"
_LEAD = "A calculator, a search and the date, told of in a system message and never trained (section 5.1)."
_HOW = (
    "Percent, with Wilson's 95 % intervals; greedy, zero-shot. The number of an answer is the last one in the sentence of its "
    f"last “{PHRASE}”, or else its last one; the result of a call counts where the call stands. It is right within "
    f"{TOLERANCE:g} of the reference. An answer without a number is wrong.",
    "Added: right with the calculator less right without, in points, over the same problems; its interval resamples problems.",
    "The paper states neither size nor prompt of its Llama 2-Chat, and takes the other rows from Schick et al. (2023): they "
    "say where such rates lie, not what is to be reached.",
)


def accuracy_figure(accuracy: Mapping[str, Mapping[str, Any]]) -> Plot:
    """Accuracy by set with intervals, filled with the calculator and hollow without it, beside Llama 2-Chat's in the paper."""
    sets, title = list(next(iter(accuracy.values()))), "Word problems with a calculator and without it (Table 15)"
    paper = TABLE_15["Llama 2-Chat"]

    def draw(theme: Theme) -> Any:
        series = [(model, way) for model in accuracy for way in WAYS]
        width = 0.8 / len(series)
        figure, (ax,) = canvas(theme, title, panel=(max(6.4, 0.5 * len(series) * len(sets)), 3.8))
        for index, (model, way) in enumerate(series):
            number = index // len(WAYS)
            colour, x = theme.colour(number), np.arange(len(sets)) + (index - (len(series) - 1) / 2) * width
            found = [accuracy[model][name][way] for name in sets]
            y, low, high = (100 * np.array([of[key] for of in found]) for key in ("share", "low", "high"))
            ax.errorbar(x, y, [np.maximum(y - low, 0), np.maximum(high - y, 0)], color=colour, capsize=3, linestyle="")
            look = {"marker": MARKERS[number % len(MARKERS)], "markersize": 8, "color": colour}
            face = colour if way == "calculator" else theme.page
            ax.plot(x, y, **look, markerfacecolor=face, linestyle="", label=f"{model}, {WAYS[way]}")
        known = [place for place, name in enumerate(sets) if name.lower() in paper]
        for place in known:
            label = "the paper's Llama 2-Chat, with a calculator" if place == known[0] else None
            ax.hlines(paper[sets[place].lower()], place - 0.42, place + 0.42, color=theme.ink, linewidth=1.2,
                      linestyle=(0, (4, 3)), label=label)  # fmt: skip
        ax.set_xticks(range(len(sets)), labels=sets)
        ax.set_xlim(-0.5, len(sets) - 0.5)
        ax.set_ylim(-3, 103)
        ax.set_ylabel("right answers (%), 95 % intervals")
        legend(ax, theme, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
        return figure

    words = [f"{model} on {name} {WAYS[way]}: {100 * accuracy[model][name][way]['share']:.1f} %"
             for model in accuracy for name in sets for way in WAYS]  # fmt: skip
    words += [f"the paper's Llama 2-Chat on {name}: {paper[name.lower()]:g} %" for name in sets if name.lower() in paper]
    return Plot("tool_accuracy", title, f"Points with 95 % intervals. {title}. {'; '.join(words)}.", draw)


def chapters_of(values: Mapping[str, Any]) -> list[Chapter]:
    """What the report shows of the values that `tool_use.run` gives."""
    examples = [{**one, "prompt": f"{one['set']}: {one['prompt']}"} for one in values["examples"]]
    searched = values["search"]
    return [
        Chapter("Word problems (Table 15)", _HOW, [_accuracy_table(values)], [accuracy_figure(values["accuracy"])]),
        Chapter("Answers and calls", _call_notes(values), [_call_table(values), _data_table(values)]),
        Chapter("First problems of each set", ["Calls stand as «calculator: what was asked → its result»."], samples=examples),
        Chapter(
            "Time (Fig. 22)",
            ["Questions about an event under several dates; before the event they make no sense. Nobody judges these answers."],
            samples=_by_question(values["times"]),
        ),
        Chapter(
            "A chain of tools (Fig. 23)",
            [f"Questions that take a search and then the calculator; {searched['documents']:,} documents are searched by BM25. "
             "Nobody judges these answers." if searched else
             "Not run: without --search there are no documents to search."],
            samples=values["chains"],
        ),
        Chapter("Prompts", ["The paper prints none for Table 15; these are ours."], [Table(["", "system message"], [
            ["with the calculator", tool_prompts.WITH_CALCULATOR], ["without", tool_prompts.WITHOUT_TOOLS],
            ["time", " Or: ".join(tool_prompts.TIMES)], ["chain of tools", tool_prompts.WITH_SEARCH],
        ])]),
    ]  # fmt: skip


def _accuracy_table(values: Mapping[str, Any]) -> Table:
    sets, rows = list(values["data"]), []
    for model, of in values["accuracy"].items():
        rows += [[model, words, *(percent(of[name][way]) for name in sets)] for way, words in WAYS.items()]
        added = [of[name]["added"] for name in sets]
        rows.append([model, "added", *(
            f"{100 * one['mean']:+.1f}" if one["low"] is None  # of one problem
            else f"{100 * one['mean']:+.1f} ({100 * one['low']:+.1f} to {100 * one['high']:+.1f})" for one in added
        )])  # fmt: skip
    for model, scores in TABLE_15.items():
        tool = WAYS["calculator" if model in _PAPERS_TOOLS else "plain"]
        cells = [scores.get(name.lower()) for name in sets]
        rows.append([f"the paper's {model}", tool, *("-" if cell is None else f"{cell:.1f}" for cell in cells)])
    return Table(["", "", *sets], rows)


def _call_notes(values: Mapping[str, Any]) -> list[str]:
    return [
        f"Answers have at most {values['max_tokens']:,} tokens beside the results, and {values['max_calls']} calls. "
        "Unfinished: these tokens or the context were used up. Too long: the context has no room for prompt and answer; such "
        "problems are counted as wrong.",
        "Answers with a call: of all. Malformed: the end of a call without its beginning or a beginning without an end, of all "
        "calls that were tried. Failed: well-formed calls that the calculator could not carry out, of these.",
    ]


def _call_table(values: Mapping[str, Any]) -> Table:
    def part(count: int, of: int) -> str:
        return f"{100 * count / of:.1f} % ({count:,} of {of:,})" if of else "-"

    rows = []
    for model, sets in values["accuracy"].items():
        for name, of in sets.items():
            for way, words in WAYS.items():
                one = of[way]
                ends = [f"{one[key]:,}" for key in ("n", "no_number", "unfinished", "too_many_calls", "too_long")]
                calls = [part(one["with_call"], one["n"]), part(one["malformed"], one["calls"] + one["malformed"]),
                         part(one["failed"], one["calls"])]  # fmt: skip
                rows.append([model, name, words, *ends, *(calls if way == "calculator" else "---")])
    return Table(["", "set", "", "problems", "no number", "unfinished", "too many calls", "too long", "answers with a call",
                  "malformed", "failed"], rows)  # fmt: skip


def _data_table(values: Mapping[str, Any]) -> Table:
    rows = [[name, of["file"], *(f"{of[key]:,}" for key in ("problems", "not_numeric", "asked"))]
            for name, of in values["data"].items()]  # fmt: skip
    return Table(["set", "file", "problems", "left out: no single number for an answer", "asked"], rows)


def _by_question(times: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each question once, with the answers of all models under all dates."""
    found: dict[str, dict[str, Any]] = {}
    for one in times:
        event = "" if one["event"] is None else f" (The event: {one['event']}.)"
        of = found.setdefault(one["question"], {"prompt": one["question"] + event, "answers": {}})
        of["answers"] |= {f"{model}. {one['said']}": answer for model, answer in one["answers"].items()}
    return list(found.values())


def write(values: Mapping[str, Any], output: Path) -> None:
    """results.json, report.md, report.html and the figure."""
    chapters = chapters_of(values)
    write_json(output / "results.json", {**values, "paper": TABLE_15})
    plots.save([plot for chapter in chapters for plot in chapter.plots], output / "figures")
    lead = f"{_LEAD} {'; '.join(f'{name}: {place}' for name, place in values['checkpoints'].items())}."
    for ending, text in (("md", _markdown(lead, chapters)), ("html", page(_TITLE, lead, chapters))):
        write_text(output / f"report.{ending}", text)


def _markdown(lead: str, chapters: Sequence[Chapter]) -> str:
    parts = [f"# {_TITLE}", verbatim(lead)]
    for chapter in chapters:
        parts += [f"## {chapter.title}", *map(verbatim, chapter.notes)]
        parts += [f"![{verbatim(plot.alt)}](figures/{plot.name}.png)" for plot in chapter.plots]
        for table in chapter.tables:
            parts.append(text_table(table.columns, table.rows))
        for sample in chapter.samples:
            reference = f" (reference: {sample['reference']})" if "reference" in sample else ""
            parts.append(f"**{verbatim(sample['prompt'])}**{reference}")
            notes = sample.get("note", {})
            rows = [[verbatim(f"{model}: {notes[model]}" if model in notes else model), verbatim(answer)]
                    for model, answer in sample["answers"].items()]  # fmt: skip
            parts.append(markdown_table(["model", "answer"], rows))
    return "\n\n".join(parts) + "\n"
