"""Fig. 16: what pre-prompts do to the safety score of answers, before anything is distilled.

`described` has what the report says beside it: means, medians, and some prompts with their answers (Tables 13, 39).
"""

import collections
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.sources import read_jsonl
from llama_jax.evals.plots import BESIDE, MARKERS, Plot, Theme, canvas, legend
from llama_jax.evals.statistics import mean_interval
from llama_jax.paths import place
from llama_jax.rlhf.respond import usable
from llama_jax.safety.distillation import KINDS, keep_preferred, score_distributions, score_gains

LABELS = {"base": "no pre-prompt", "generic": "generic pre-prompt", "category": "answer template of the risk"}


Rows = Sequence[Mapping[str, Any]]  # of `samples.jsonl`, or of `kept.jsonl`


def read_run(workdir: str | os.PathLike) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples and the kept rows of a run of `configs/distill.py`.

    Raises:
      FileNotFoundError, ValueError: names what is missing, or the file, line and field that is not a distillation's.
    """
    samples = []
    for where, row in read_jsonl(place(workdir) / "samples.jsonl"):
        answers = row.get("answers")
        known = isinstance(answers, list) and answers and all(map(_is_answer, answers))
        if not (known and answers[0]["kind"] == "base" and isinstance(row.get("messages"), list)):
            raise ValueError(
                f"{where}: answers: expected those of context distillation, the plain one first, each with its kind and "
                "safety score"
            )
        samples.append(row)
    if not samples:
        raise ValueError(f"{place(workdir) / 'samples.jsonl'}: no samples in it")
    return samples, [row for _, row in read_jsonl(place(workdir) / "kept.jsonl")]


def _is_answer(answer: Any) -> bool:
    if not isinstance(answer, Mapping) or answer.get("kind") not in KINDS:
        return False
    texts = all(isinstance(answer.get(name), str) for name in ("preprompt", "response"))
    score = answer.get("safety")
    return texts and isinstance(answer.get("ended"), bool) and isinstance(score, float | int) and math.isfinite(score)


def scores(samples: Rows, kept: Rows | None = None, *, of: str = "") -> Plot:
    """(a) Shares of answers below each safety score by kind of pre-prompt; (b) gain by the plain answer's score. (Fig. 16)

    A point is an answer; the lines, which have no points of their own, are means of neighbouring points.
    `kept` are the rows that are fine-tuned on, whose points are filled; without them every rise counts, as in the paper.
    `of` names the run where several are shown.
    """
    title = f"Context distillation{of and f' of {of}'}: safety scores"
    by_kind = score_distributions(samples)
    chosen = kept_answers(samples, keep_preferred(samples, least_gain=0.0) if kept is None else kept)

    def draw(theme: Theme) -> Any:
        figure, (shares, gains) = canvas(theme, title, columns=2, panel=(6.0, 3.6))
        averaged = []
        for i, kind in enumerate(KINDS):
            if kind not in by_kind:
                continue
            ordered = np.sort(by_kind[kind])
            height = np.arange(1, len(ordered) + 1) / len(ordered)
            style = ("-", "--", ":")[i]
            shares.step(ordered, 100 * height, where="post", color=theme.colour(i), linestyle=style, label=LABELS[kind])
            if kind != "base":
                original, gain = score_gains(samples, kind)
                filled = np.array([a is best for s, best in zip(samples, chosen) for a in s["answers"] if a["kind"] == kind])
                for some, face in ((~filled, "none"), (filled, theme.colour(i))):
                    gains.scatter(
                        original[some], gain[some], s=12, alpha=0.5, facecolors=face, edgecolors=theme.colour(i),
                        marker=MARKERS[i], linewidths=0.6,
                    )  # fmt: skip
                means = _binned(original, gain)
                if len(means[0]) > 1:
                    averaged = gains.plot(*means, color=theme.colour(i), linewidth=2, linestyle=style)
                gains.plot(
                    [], [], color=theme.colour(i), linestyle="none", marker=MARKERS[i], markersize=4, markerfacecolor="none",
                    label=LABELS[kind],
                )  # fmt: skip
        for face, label in ((theme.ink, "kept"), ("none", "not kept")):
            gains.scatter([], [], s=12, facecolors=face, edgecolors=theme.ink, linewidths=0.6, label=label)
        if averaged:
            gains.plot([], [], color=theme.ink, linewidth=2, label="mean of neighbouring points")
        shares.set_title("(a) answers with at most this score", loc="left", color=theme.ink, fontsize=10)
        shares.set_xlabel("safety score")
        shares.set_ylabel("answers (%)")
        gains.set_title("(b) gain over the plain answer", loc="left", color=theme.ink, fontsize=10)
        gains.axhline(0, color=theme.grey, linewidth=1)
        gains.set_xlabel("score of the plain answer")
        gains.set_ylabel("gain of the safety score")
        legend(shares, theme, loc="upper left")
        legend(gains, theme, **BESIDE)  # points may be anywhere, and look like its own
        return figure

    said = ", ".join(f"{LABELS[kind]} {np.mean(values):.3f}" for kind, values in by_kind.items())
    answers, best = sum(len(s["answers"]) - 1 for s in samples), sum(answer is not None for answer in chosen)
    alt = f"Two panels. Mean safety scores: {said}. Filled points: {best} of {answers} answers under a pre-prompt are kept."
    return Plot(f"distillation{of and f'_{of}'}", title, alt, draw)


def kept_answers(samples: Rows, kept: Rows) -> list[Mapping[str, Any] | None]:
    """Of each prompt the answer that is fine-tuned on, None for a prompt without one; `kept` is in the order of the samples."""
    left, found = collections.deque(kept), []
    for sample in samples:
        found.append(None)
        if left and left[0]["messages"][:-1] == sample["messages"]:
            text = left[0]["messages"][-1]["content"]
            if same := [a for a in sample["answers"][1:] if a["response"] == text]:
                found[-1] = max(same, key=lambda answer: answer["safety"])
                left.popleft()
    return found


def described(samples: Rows, kept: Rows) -> dict[str, Any]:
    """Values for the report.

    `preferred`: how many prompts have an answer under a pre-prompt with a higher safety score than the plain one's. Of these,
    `kept` are fine-tuned on; for `unended` no such answer has an end, `unusable` have none that could be trained on for another
    reason (it says nothing, or holds a chat tag), and those that are left gain less than the run asked for.
    `safety_score` (an interval) and `median_safety`: by kind of pre-prompt. `kept_by_chance`: for how many prompts the best of
    the answers under a pre-prompt would exceed the plain one if pre-prompts changed nothing. `examples`: see there.
    """
    by_kind = score_distributions(samples)
    return {
        "prompts": len(samples), **_preferred(samples), "kept": len(kept),
        "safety_score": {kind: dataclasses.asdict(mean_interval(found)) for kind, found in by_kind.items()},
        "median_safety": {kind: float(np.median(found)) for kind, found in by_kind.items()},
        "kept_by_chance": sum(1 - 1 / len(sample["answers"]) for sample in samples),
        "examples": examples(samples, kept),
    }  # fmt: skip


def _preferred(samples: Rows) -> dict[str, int]:
    """`preferred`, `unended` and `unusable` of `described`."""
    found = {"preferred": 0, "unended": 0, "unusable": 0}
    for sample in samples:
        base, *others = sample["answers"]
        better = [answer for answer in others if answer["safety"] > base["safety"]]
        found["preferred"] += bool(better)
        if better and not any(usable(answer["response"], answer["ended"]) for answer in better):
            found["unusable" if any(answer["ended"] for answer in better) else "unended"] += 1
    return found


def examples(samples: Rows, kept: Rows, *, count: int = 4) -> list[dict[str, Any]]:
    """Prompts with an answer of every kind, evenly from the largest gain of the safety score to the smallest (Tables 13, 39).

    Of several answers of a kind, it is the kept one or the one with the highest score. Returns {"prompt", "answers": [...]}.
    """
    kinds = list(score_distributions(samples))
    pairs = [
        (sample, best) for sample, best in zip(samples, kept_answers(samples, kept))
        if len(sample["answers"]) > 1 and {answer["kind"] for answer in sample["answers"]} == set(kinds)
    ]  # fmt: skip
    pairs.sort(key=lambda pair: _gain(pair[0]), reverse=True)
    ranks = dict.fromkeys(np.linspace(0, len(pairs) - 1, count).round().astype(int).tolist()) if pairs else ()
    found = []
    for sample, best in (pairs[rank] for rank in ranks):
        shown = []
        for kind in kinds:
            some = [answer for answer in sample["answers"] if answer["kind"] == kind]
            answer = next((a for a in some if a is best), max(some, key=lambda answer: answer["safety"]))
            shown.append({**answer, "kept": answer is best})
        found.append({"prompt": sample["messages"], "answers": shown})
    return found


def _gain(sample: Mapping[str, Any]) -> float:
    """By how much the best answer under a pre-prompt is above the plain one."""
    base, *others = (answer["safety"] for answer in sample["answers"])
    return max(others) - base


_BIN = 4  # points that a mean is of at least: that of one would be the point itself


def _binned(x: np.ndarray, y: np.ndarray, bins: int = 8) -> tuple[list[float], list[float]]:
    """Means of both in at most so many groups of neighbouring x, of equal sizes."""
    groups = [g for g in np.array_split(np.argsort(x, kind="stable"), max(min(bins, len(x) // _BIN), 1)) if len(g)]
    return [float(x[g].mean()) for g in groups], [float(y[g].mean()) for g in groups]
