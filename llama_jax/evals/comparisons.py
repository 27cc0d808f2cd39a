"""Several finished comparisons in one figure and one table, beside the paper's points (section 3.4.1, Figs. 2 and 11).

One model against several others is Fig. 2; several models against the same one, as versions against ChatGPT, Fig. 11. Rates
are those of the first model of each comparison, ties dropped. They stand side by side only if the same judge saw the same
prompts: what a model's context was too short for is left out of its own comparison alone, so numbers are told with the rates.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import differences
from llama_jax.evals import plots
from llama_jax.evals.comparison_report import FIG_2, FIG_11, TRACKS, interval, point
from llama_jax.evals.page import Chapter, page
from llama_jax.evals.plots import BESIDE, MARKERS, Plot, Theme, canvas, legend, styles
from llama_jax.files import read_json, write_json, write_text
from llama_jax.markdown import Table, text_table, verbatim
from llama_jax.paths import place

RESULTS = "results.json"
_FIELDS = ("first", "second", "judge", "judged_by", "prompts", "axes")
Points = Mapping[str, Mapping[str, Mapping[str, float]]]  # {label: {axis: {"share", "low", "high"}}}


def read(places: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The results of finished comparisons by name, {name: directory}.

    Raises:
      FileNotFoundError, ValueError: one is not finished, or two of them had other prompts or another judge.
    """
    found = {}
    for name, directory in places.items():
        file = place(directory) / RESULTS
        if not file.exists():
            raise FileNotFoundError(f"{file}: expected the results of the finished comparison {name!r}, found nothing")
        results = read_json(file)
        for field in _FIELDS:
            if not isinstance(results, dict) or field not in results:
                raise ValueError(
                    f"{file}: {field}: missing; expected what llama_jax.compare writes now: run that comparison again, "
                    "which asks nothing anew that it has kept"
                )
        found[name] = results
    name, *others = found
    for other in others:
        _check_alike(found[name], found[other], said=f"{name!r} ({places[name]})", file=place(places[other]) / RESULTS)
    return found


def _check_alike(one: Mapping[str, Any], other: Mapping[str, Any], *, said: str, file: Path) -> None:
    if one["prompts"] != other["prompts"]:
        ours, theirs = (results["prompts"]["n"] for results in (one, other))
        how = f"{theirs:,} others" if ours == theirs else f"{theirs:,}"
        raise ValueError(f"{file}: prompts: expected the {ours:,} of {said}, got {how}")
    if changed := differences(one["judged_by"], other["judged_by"]):
        raise ValueError(
            f"{file}: judge: expected that of {said}, {one['judge']}, got {other['judge']}; they differ in {', '.join(changed)}"
        )


@dataclasses.dataclass(frozen=True)
class Paper:
    """What the paper has of comparisons like ours.

    figure: "2", where all share the first model; "11", where all share the second; "", where they share neither.
    judge: GPT-4, or in Fig. 11 reward models, if ours are such.
    rates: of the first model, {the opponent, or the version: percent on helpfulness and safety prompts}.
    """

    figure: str
    judge: str
    rates: Mapping[str, tuple[float, float]]


def paper_of(found: Mapping[str, Mapping[str, Any]]) -> Paper:
    """What stands beside these results."""
    first, second = ({results[side] for results in found.values()} for side in ("first", "second"))
    if len(first) == 1:  # the figure has the opponents' rates
        return Paper("2", "GPT-4", {name: tuple(100.0 - rate for rate in rates) for name, rates in FIG_2.items()})
    if len(second) > 1:
        return Paper("", "", {})
    by_reward_models = all(set(results["judged_by"]) <= set(TRACKS) for results in found.values())
    rates = {name: by_models if by_reward_models else by_gpt_4 for name, (by_models, by_gpt_4) in FIG_11.items()}
    return Paper("11", "reward models" if by_reward_models else "GPT-4", rates)


def win_rates(points: Points, paper: Mapping[str, tuple[float, float]], *, title: str, of: str) -> Plot:
    """Points with intervals on the two axes, and the paper's as hollow ones, in the colour and form of ours of that name."""

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(8.2, 5.0), grid="both")
        for line in (ax.axhline, ax.axvline):
            line(50, color=theme.grey, linewidth=1, linestyle=(0, (4, 3)))
        looks = dict(zip(points, styles(theme, len(points), size=8)))
        for label, style in looks.items():
            (x, left, right), (y, low, high) = (
                [100 * points[label][axis][key] for key in ("share", "low", "high")] for axis in TRACKS
            )
            ends = {"xerr": [[x - left], [right - x]], "yerr": [[y - low], [high - y]]}
            ax.errorbar(x, y, **ends, color=style["color"], capsize=3, linestyle="")
            ax.plot(x, y, **style, linestyle="", label=label)  # in the legend before the paper's, and without whiskers
        for number, (label, at) in enumerate(paper.items(), start=len(points)):
            own = {"color": theme.ink, "marker": MARKERS[number % len(MARKERS)]}
            look = next((looks[name] for name in looks if alike(name, label)), own)
            style = {"color": look["color"], "marker": look["marker"], "markersize": 7, "markerfacecolor": "none"}
            ax.plot(*at, **style, linestyle="", label=f"the paper's {label}")
        ax.set_xlim(-3, 103)
        ax.set_ylim(-3, 103)
        ax.set_xlabel(f"helpfulness win rate {of} (%)")
        ax.set_ylabel(f"safety win rate {of} (%)")
        legend(ax, theme, **BESIDE)
        return figure

    words = [f"{label}: helpfulness {100 * at['helpfulness']['share']:.1f} %, safety {100 * at['safety']['share']:.1f} %"
             for label, at in points.items()]  # fmt: skip
    words += [f"the paper's {label}: {helpful:g} %, {safe:g} %" for label, (helpful, safe) in paper.items()]
    return Plot("win_rates", title, f"Points with 95 % intervals. {title}. {'; '.join(words)}.", draw)


def alike(name: str, papers: str) -> bool:
    """Whether a name means a model of the paper: one of both begins with the other, as PaLM and PaLM-Bison."""
    one, other = name.casefold(), papers.casefold()
    return bool(one) and (one.startswith(other) or other.startswith(one))


def write(found: Mapping[str, Mapping[str, Any]], places: Mapping[str, str], directory: Path) -> dict[str, Any]:
    """`report.json`, `report.md`, `report.html` and the figure of results that `read` gave; returns what the first one has."""
    results, paper = next(iter(found.values())), paper_of(found)
    of, who = {
        "2": (f"of {results['first']}", f"{results['first']} against others"),
        "11": (f"against {results['second']}", f"Models against {results['second']}"),
        "": ("of the first", "Comparisons"),
    }[paper.figure]
    title = f"{who}: win rates, ties dropped" + (f" (Fig. {paper.figure})" if paper.figure else "")
    points = {label: at for label, of_one in found.items() if (at := point(of_one))}
    drawn = [win_rates(points, paper.rates, title=title, of=of)] if points else []
    notes, table = _notes(found, points, paper), _table(found, paper)
    values = {
        "figure": paper.figure, "judge": results["judge"], "judged_by": results["judged_by"], "prompts": results["prompts"],
        "comparisons": {label: {"place": places[label], **{field: of_one[field] for field in ("first", "second", "axes")}}
                        for label, of_one in found.items()},
        "paper": {label: dict(zip(TRACKS, rates)) for label, rates in paper.rates.items()}, "notes": notes,
        "figures": {plot.name: {"title": plot.title, "alt": plot.alt} for plot in drawn},
    }  # fmt: skip
    plots.save(drawn, directory / "figures")
    write_json(directory / "report.json", values)
    images = [f"![{verbatim(plot.alt)}](figures/{plot.name}.png)" for plot in drawn]
    cells = text_table(table.columns, table.rows)
    texts = {
        "md": "\n\n".join([f"# {verbatim(title)}", *map(verbatim, notes), *images, cells]) + "\n",
        "html": page(title, "Win rates by a model's judgement (3.4.1).", [Chapter("Win rates", notes, [table], drawn)]),
    }
    for ending, text in texts.items():
        write_text(directory / f"report.{ending}", text)
    return values


def _notes(found: Mapping[str, Mapping[str, Any]], points: Points, paper: Paper) -> list[str]:
    results = next(iter(found.values()))
    notes = [f"Judge: {results['judge']}. All comparisons asked the same {results['prompts']['n']:,} prompts."]
    for label, of_one in found.items():
        for name in of_one.get("system", {}):
            notes.append(f"{label}: {name} answered under a system message of its own, see its results.json.")
    if missing := [label for label in found if label not in points]:
        notes.append(f"Not in the figure, since nothing was decided on one of the axes: {', '.join(missing)}.")
    if paper.figure:
        who = "Llama 2-Chat 70B against each" if paper.figure == "2" else "each version against ChatGPT"
        notes.append(
            f"The paper's points are read off its Fig. {paper.figure} ({who}, by {paper.judge}), of other prompts and another "
            "judge: they say where such rates lie, not what is to be reached."
        )
    return notes


def _table(found: Mapping[str, Mapping[str, Any]], paper: Paper) -> Table:
    rows = []
    for label, results in found.items():
        rates = [results["axes"].get(axis, {}).get("without_ties", {"share": None, "n": 0}) for axis in TRACKS]
        cells = [cell for rate in rates for cell in (interval(rate, "share"), f"{rate['n']:,}")]
        rows.append([label, results["first"], results["second"], *cells])
    for label, rates in paper.rates.items():
        pair = ("Llama 2-Chat 70B", label) if paper.figure == "2" else (label, "ChatGPT")
        rows.append([f"the paper's, by {paper.judge}", *pair, *(cell for rate in rates for cell in (f"{rate:g}", "-"))])
    return Table(["", "first", "second", *(name for axis in TRACKS for name in (f"{axis} %", "decided"))], rows)
