"""The report on two models' answers as a model judges them: win rates beside the paper's (Figs. 2, 11), scores, answers."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.dialog import prompt_key
from llama_jax.evals import judges, plots
from llama_jax.evals.figures import score_scatter
from llama_jax.evals.model_figures import win_rate_axes
from llama_jax.evals.page import Chapter, page
from llama_jax.files import write_json, write_text
from llama_jax.markdown import Table

TRACKS = ("helpfulness", "safety")
Scores = Mapping[str, tuple[np.ndarray, np.ndarray]]  # {track: the scores of both models' answers, float [n] each}
_SHOWN = 8  # prompts whose answers stand side by side

# Win rates without ties, percent on helpfulness and safety prompts, read off the paper's figures.
# Fig. 2: Llama 2-Chat 70B by GPT-4, {opponent: its rates}.
FIG_2 = {"ChatGPT": (46, 33), "PaLM-Bison": (34, 10), "Falcon-40b-instruct": (5, 4)}
# Fig. 11: {version: rates against ChatGPT by the paper's reward models, by GPT-4}.
FIG_11 = {
    "SFT-v1": ((39, 22), (13, 10)), "SFT-v2": ((54, 48), (34, 32)), "RLHF-v1": ((61, 48), (42, 43)),
    "RLHF-v2": ((63, 45), (42, 32)), "RLHF-v3": ((65, 54), (48, 38)), "RLHF-v4": ((67, 59), (48, 46)),
    "RLHF-v5 (no PPO)": ((70, 67), (55, 55)), "RLHF-v5 (with PPO)": ((78, 76), (67, 61)),
}  # fmt: skip
# Fig. 1, people on helpfulness prompts: {(Llama 2-Chat, opponent): (win, tie, loss)}, printed.
FIG_1 = {
    ("70B", "ChatGPT"): (35.9, 31.5, 32.5), ("70B", "PaLM-Bison"): (53.0, 24.6, 22.4),
    ("34B", "Falcon-40b-instruct"): (76.3, 14.6, 9.1), ("34B", "Vicuna-33b"): (37.2, 31.6, 31.2),
    ("13B", "Vicuna-13b"): (45.4, 29.8, 24.9), ("7B", "MPT-7b-chat"): (61.1, 20.9, 18.0),
}  # fmt: skip


def write(
    results: dict[str, Any], pairs: Sequence[judges.Pair], outcomes: Sequence[str], scores: Scores, directory: Path
) -> None:
    """`results.json`, `report.html`, the figures, and with reward models `scores.json`, a row a prompt.

    Args:
      results: `first`, `second`, `judge`, `judged_by` (what its verdicts depend on), `prompts` (see `prompt_set`), `answers`,
        the counts of each by name, and `system`, messages that some answered under; what is found out here is added.
    """
    first, second = results["first"], results["second"]
    is_safety = np.array([pair[0].is_safety for pair in pairs], bool)
    results["axes"] = judges.by_axis(pairs, outcomes)
    results["scores"] = {
        track: {axis: _means(both, inside, (first, second)) for axis, inside in _axes(is_safety).items() if inside.any()}
        for track, both in scores.items()
    }  # fmt: skip
    drawn = {"rates": _rates(results), "scores": _scatter(scores, is_safety, before=second, after=first)}
    everything = [plot for some in drawn.values() for plot in some]
    plots.save(everything, directory / "figures")
    results["figures"] = {plot.name: {"title": plot.title, "alt": plot.alt} for plot in everything}
    write_json(directory / "results.json", judges.finite(results))
    if scores:
        write_json(directory / "scores.json", [judges.finite(row) for row in _rows(pairs, outcomes, scores)])
    chapters = [
        Chapter("Win rates", _notes(results), [_rate_table(results), _count_table(results)], drawn["rates"]),
        *([_score_chapter(results, drawn["scores"])] if scores else []),
        Chapter("Answers side by side", samples=_samples(results, pairs, outcomes, scores)),
        _paper(),
    ]
    text = page(f"{first} against {second}", "Win rates by a model's judgement (3.4.1).", chapters)
    write_text(directory / "report.html", text)


def prompt_set(pairs: Sequence[judges.Pair], asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tells the prompts of a comparison from others: their number and a digest, in which safety prompts are such.

    Of `asked`, if there are any: which of them are judged depends on the models, of which one may have a short context.
    """
    kinds = {prompt_key(row["messages"]): bool(row.get("is_safety")) for row in asked}
    kinds |= {prompt_key(pair[0].messages): pair[0].is_safety for pair in pairs}
    return {"n": len(kinds), "digest": hashlib.sha256(json.dumps(sorted(kinds.items())).encode()).hexdigest()[:32]}


def point(results: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """A `results.json` as a point of `model_figures.win_rate_axes`; {} where an axis has no decided pair."""
    rates = {axis: results["axes"][axis]["without_ties"] for axis in TRACKS if axis in results["axes"]}
    if len(rates) < len(TRACKS) or not all(rate["n"] for rate in rates.values()):
        return {}
    # Of 0 % and 100 % the interval begins and ends there, and rounding may leave the rate outside, which no error bar can be.
    return {axis: {**rate, "low": min(rate["low"], rate["share"]), "high": max(rate["high"], rate["share"])}
            for axis, rate in rates.items()}  # fmt: skip


def _rates(results: Mapping[str, Any]) -> list[plots.Plot]:
    at = point(results)
    return [win_rate_axes({f"{results['first']} against {results['second']}": at})] if at else []


def _axes(is_safety: np.ndarray) -> dict[str, np.ndarray]:
    return {"all": np.ones_like(is_safety), "helpfulness": ~is_safety, "safety": is_safety}


def _means(both: tuple[np.ndarray, np.ndarray], inside: np.ndarray, names: tuple[str, str]) -> dict[str, Any]:
    """Mean scores over the prompts of which both answers have one."""
    known = inside & ~np.isnan(both[0]) & ~np.isnan(both[1])
    means = {name: float(scores[known].mean()) if known.any() else math.nan for name, scores in zip(names, both)}
    return {"n": int(known.sum()), "mean": means}


def _scatter(scores: Scores, is_safety: np.ndarray, *, before: str, after: str) -> list[plots.Plot]:
    """Fig. 14: each reward model on the prompts of its own track."""
    found = {}
    for track, (ours, theirs) in scores.items():
        known = (is_safety == (track == "safety")) & ~np.isnan(ours) & ~np.isnan(theirs)
        if known.any():
            found[track] = theirs[known], ours[known]
    return [score_scatter(found, before=before, after=after)] if found else []


def _rows(pairs: Sequence[judges.Pair], outcomes: Sequence[str], scores: Scores) -> list[dict[str, Any]]:
    return [
        {"messages": list(pair[0].messages), "is_safety": pair[0].is_safety, "outcome": outcome}
        | {track: {"first": float(ours[i]), "second": float(theirs[i])} for track, (ours, theirs) in scores.items()}
        for i, (pair, outcome) in enumerate(zip(pairs, outcomes, strict=True))
    ]


def _notes(results: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Judge: {results['judge']}. Garbage: no verdict that can be read. Refused: the judge did not take an answer or the "
        "question, as too long or for another reason. Both are in no rate."
    ]
    for name, text in results.get("system", {}).items():
        notes.append(f"{name} answers under this system message, which the judge does not see: {text}")
    for name, found in results["answers"].items():
        if found["too_long"]:
            notes.append(f"{name}: {found['too_long']:,} prompts were too long for its context and an answer; left out.")
        if found["not_in_file"]:
            notes.append(f"{name}: {found['not_in_file']:,} prompts are not in its file of answers; left out.")
    return notes


def _rate_table(results: Mapping[str, Any]) -> Table:
    rows = [
        [axis, *(f"{values[key]:,}" for key in judges.OUTCOMES), interval(values["without_ties"], "share"),
         interval(values["ties_half"], "mean")]
        for axis, values in results["axes"].items()
    ]  # fmt: skip
    return Table(["prompts", *judges.OUTCOMES, "win / (win + loss) %", "ties as half %"], rows)


def _count_table(results: Mapping[str, Any]) -> Table:
    keys = ("judged", "unfinished", "less_room")
    rows = [[name, *(f"{found[key]:,}" for key in keys)] for name, found in results["answers"].items()]
    return Table(["answers of", "judged", "not finished", "less room than was asked for"], rows)


def _score_chapter(results: Mapping[str, Any], drawn: Sequence[plots.Plot]) -> Chapter:
    names = (results["first"], results["second"])
    rows = [
        [f"{track} reward model", axis, f"{found['n']:,}", *(f"{found['mean'][name]:.3f}" for name in names)]
        for track, axes in results["scores"].items() for axis, found in axes.items()
    ]  # fmt: skip
    notes = ["Mean scores in (0, 1). The figure has each reward model on the prompts of its own track, as Fig. 14."]
    return Chapter("Scores of the reward models", notes, [Table(["", "prompts", "n", *names], rows)], drawn)


def _samples(
    results: Mapping[str, Any], pairs: Sequence[judges.Pair], outcomes: Sequence[str], scores: Scores
) -> list[dict[str, Any]]:
    """Some pairs, evenly over the prompts (as in Tables 5, 12 and 13), with the outcome and the scores of each answer."""
    names, other = (results["first"], results["second"]), {"win": "loss", "loss": "win"}

    def note(i: int, side: int) -> str:
        said = [f"{track} {both[side][i]:.2f}" for track, both in scores.items() if not np.isnan(both[side][i])]
        return ", ".join([other.get(outcomes[i], outcomes[i]) if side else outcomes[i], *said])

    return [
        {
            "prompt": pairs[i][0].messages, "is_safety": pairs[i][0].is_safety,
            "answers": {name: answered.answer for name, answered in zip(names, pairs[i])},
            "note": {name: note(i, side) for side, name in enumerate(names)},
        }
        for i in range(0, len(pairs), -(-len(pairs) // _SHOWN))
    ]  # fmt: skip


def _paper() -> Chapter:
    """What the paper's own models reached."""
    by_gpt_4 = [["Llama 2-Chat 70B", name, *(f"{100 - rate}" for rate in rates)] for name, rates in FIG_2.items()]
    versions = [[name, *(str(rate) for judge in rates for rate in judge)] for name, rates in FIG_11.items()]
    people = [
        [f"Llama 2-Chat {ours}", name, *(f"{rate:.1f}" for rate in rates), f"{100 * rates[0] / (rates[0] + rates[2]):.1f}"]
        for (ours, name), rates in FIG_1.items()
    ]
    notes = [
        "Of other prompts, opponents and judges: they say where such rates lie, not what is to be reached. Percent. First ties "
        "dropped by GPT-4 (read off Fig. 2), then each version against ChatGPT (read off Fig. 11), then people's judgement of "
        "helpfulness (Fig. 1)."
    ]
    judged = [f"{axis}, by {judge}" for judge in ("reward models", "GPT-4") for axis in TRACKS]
    return Chapter("The paper's win rates", notes, [
        Table(["model", "against", *TRACKS], by_gpt_4), Table(["against ChatGPT", *judged], versions),
        Table(["model", "against", "win", "tie", "loss", "win / (win + loss)"], people),
    ])  # fmt: skip


def interval(values: Mapping[str, float | None], name: str) -> str:
    """A rate in percent with its interval; "-" where there is none."""
    if values[name] is None or not math.isfinite(values[name]):  # nothing was decided; null in a file
        return "-"
    if values["low"] is None:  # of one prompt
        return f"{100 * values[name]:.1f}"
    return f"{100 * values[name]:.1f} ({100 * values['low']:.1f} to {100 * values['high']:.1f})"
