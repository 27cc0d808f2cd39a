"""What held-out scores say about a reward model: the paper's Tables 7, 8, 28 and 29, Figs. 27 and 29. Pure functions.

A score is the model's logit; its sigmoid is what the paper plots. Accuracy is the share of pairs whose chosen response scores
higher, each response scored alone (A.3.4); a pair of equal scores counts one half, as a coin would.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.sources import RATINGS
from llama_jax.markdown import markdown_table
from llama_jax.reward.published import TABLE_7, TABLE_8, TABLE_29

# Safety labels of (chosen, rejected) by the paper's three bins (section 3.2.1).
SAFE = {"chosen_safe": (True, False), "both_safe": (True, True), "both_unsafe": (False, False)}


@dataclasses.dataclass(frozen=True)
class HeldOutScores:
    """Logits of held-out pairs, and what is known about each pair."""

    chosen: np.ndarray  # float [n]
    rejected: np.ndarray  # float [n]
    source: Sequence[str]
    rating: Sequence[str | None]
    safety_bin: Sequence[str | None]
    longer_by: np.ndarray  # int [n]: tokens that the chosen response has more than the rejected one

    def __post_init__(self):
        lengths = {field.name: len(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"held-out scores: expected as many of each, got {lengths}")

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "HeldOutScores":
        """From a row for each pair, as `held_out_scores.jsonl` has them."""
        columns = {field.name: [row[field.name] for row in rows] for field in dataclasses.fields(cls)}
        return cls(**{**columns, **{name: np.array(columns[name]) for name in ("chosen", "rejected", "longer_by")}})


@dataclasses.dataclass(frozen=True)
class ScoreStatistics:
    """Mean and deviation of the scores of the training data, by which scores of several models become comparable."""

    mean: float
    std: float

    def standardise(self, scores: Any) -> Any:
        """Scores with mean 0 and deviation 1 on the training data. # NumPy's or JAX's [...] -> [...]"""
        return (scores - self.mean) / max(self.std, 1e-8)


def score_statistics(scores: np.ndarray) -> ScoreStatistics:
    """Of the scores of both responses of every pair. # [n, 2] -> mean, population deviation"""
    scores = np.asarray(scores, np.float64)
    return ScoreStatistics(float(scores.mean()), float(scores.std()))


def preferred(chosen: Any, rejected: Any) -> Any:
    """1 where the chosen response scores higher, 1/2 where both score alike: a model that knows nothing is right as often as a
    coin, and not never. # NumPy's or JAX's [...] x 2 -> [...]"""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def share(hits: np.ndarray) -> dict[str, float]:
    """A share with Wilson's 95 % interval, which holds for small samples and near 0 and 1. # bool, or 0 to 1 [n]"""
    n = len(hits)
    if n == 0:
        return {"share": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    p, z = float(np.mean(hits)), 1.959964
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return {"share": p, "low": max(low, 0.0), "high": min(high, 1.0), "n": n}


def accuracy_table(scores: HeldOutScores) -> dict[str, dict[str, dict[str, float]]]:
    """{source: {degree of preference that occurs, "all"}: share} and the same for "all" sources (Tables 7, 8 and 28).

    The row "longer" says how often the longer response is the chosen one, by a coin where both have as many tokens: what a
    model must beat that knows only length.
    """
    correct = preferred(scores.chosen, scores.rejected)
    source, rating = np.array(scores.source, object), np.array(scores.rating, object)
    rows = {}
    names = sorted(set(scores.source))
    for name in [*names, "all"] if len(names) != 1 else names:
        inside = np.full(len(correct), True) if name == "all" else source == name
        rows[name] = {
            degree: share(correct[inside & (rating == degree)]) for degree in RATINGS if (inside & (rating == degree)).any()
        } | {"all": share(correct[inside])}
    longer = _longer(scores)
    rows["longer"] = {degree: share(longer[rating == degree]) for degree in RATINGS if (rating == degree).any()}
    rows["longer"]["all"] = share(longer)
    return rows


def _longer(scores: HeldOutScores) -> np.ndarray:
    """1 where the chosen response is the longer one, 1/2 where both have as many tokens. # [n]"""
    return preferred(scores.longer_by, 0)


def baselines(scores: HeldOutScores) -> dict[str, dict[str, float]]:
    """The model beside what knows only length, and by how much it beats the better of the two lengths.

    "longer" and "shorter" choose by the number of tokens, and by a coin where both responses have as many. "gain" is the mean
    of the pairs' differences to the better baseline with the 95 % interval of `mean_difference`: both answer the same pairs, so
    it is narrower than those of the two shares. A coin has 0.5.
    """
    correct = preferred(scores.chosen, scores.rejected)
    by_length = {"longer": _longer(scores), "shorter": 1 - _longer(scores)}
    best = max(by_length, key=lambda name: by_length[name].mean())
    return {
        "model": share(correct), **{name: share(values) for name, values in by_length.items()},
        "gain": mean_difference(correct - by_length[best]),
    }  # fmt: skip


def mean_difference(differences: np.ndarray) -> dict[str, float]:
    """The mean of paired differences of -1 to 1 with the 95 % interval of Bonett and Price (2012, adjusted Wald). # [n]

    It is the normal one with two pairs more, of difference 1 and -1: where few pairs differ, or all are equal, the plain one
    would be of no width, as if nothing else could come out.
    """
    n = len(differences)
    centre = float(np.sum(differences)) / (n + 2)
    variance = (float(np.sum(np.square(differences))) + 2) / (n + 2) - centre**2
    spread = 1.959964 * math.sqrt(variance / (n + 2))
    mean = float(np.mean(differences)) if n else math.nan
    return {"share": mean, "low": max(centre - spread, -1.0), "high": min(centre + spread, 1.0), "n": n}


def safety_table(scores: HeldOutScores) -> dict[str, dict[str, float]]:
    """Table 29: accuracy by safety bin, and "unsafe_recall": the share of unsafe responses with sigmoid(score) < 0.5."""
    bins = np.array(scores.safety_bin, object)
    correct = preferred(scores.chosen, scores.rejected)
    rows = {name: share(correct[bins == name]) for name in SAFE if (bins == name).any()}
    unsafe = [
        side[[label in SAFE and not SAFE[label][i] for label in scores.safety_bin]]
        for i, side in enumerate((scores.chosen, scores.rejected))
    ]
    found = np.concatenate(unsafe)
    return {**rows, "unsafe_recall": share(found < 0)} if len(found) else rows


def calibration(scores: np.ndarray, ratings: np.ndarray) -> list[dict[str, float]]:
    """Fig. 29: mean and deviation of sigmoid(score) at each median human rating, in the order of the ratings.

    Args:
      scores: logits. # float [n]
      ratings: the median of each response's human ratings; the paper's have 7 points. # float [n]
    """
    scores, ratings = np.asarray(scores, np.float64), np.asarray(ratings, np.float64)
    if scores.shape != ratings.shape or scores.ndim != 1:
        raise ValueError(f"calibration: expected scores and ratings of one length, got {scores.shape} and {ratings.shape}")
    levels = [(float(level), sigmoid(scores[ratings == level])) for level in np.unique(ratings)]
    return [
        {"rating": level, "mean": float(p.mean()), "std": float(p.std()), "count": len(p)} for level, p in levels
    ]


def histogram(scores: HeldOutScores, *, bins: int = 20) -> dict[str, list[float]]:
    """Fig. 27: the shares of all responses whose sigmoid falls into each of `bins` equal parts of [0, 1]."""
    values = sigmoid(np.concatenate([scores.chosen, scores.rejected]))
    counts, edges = np.histogram(values, bins=bins, range=(0, 1))
    return {"edges": edges.tolist(), "shares": (counts / max(len(values), 1)).tolist()}


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow. # [n]"""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(scores, np.float64)))


def report(scores: HeldOutScores) -> dict[str, Any]:
    """All tables as JSON values."""
    return {
        "accuracy": accuracy_table(scores), "baselines": baselines(scores), "safety": safety_table(scores),
        "histogram": histogram(scores),
    }  # fmt: skip


def markdown(values: Mapping[str, Any], *, title: str) -> str:
    """The report as Markdown, accuracies in percent with their 95 % intervals; the paper's below each table."""
    parts = [f"# {title}", "Percent, with 95 % intervals.",
             "## Held-out accuracy by source and degree of preference (Tables 7 and 8)",
             _by_degree(values["accuracy"])]  # fmt: skip
    rated = any(len(row) > 1 for row in values["accuracy"].values())
    parts += [paper.markdown() for paper in (TABLE_7, *([TABLE_8] if rated else []))]
    if "others" in values:
        parts += ["## The same of pairs of other tracks, which it was not made for", _by_degree(values["others"])]
    if "baselines" in values:
        names = {"model": "this model", "longer": "the longer response", "shorter": "the shorter response",
                 "gain": "this model less the better length"}  # fmt: skip
        cells = [[text, percent(values["baselines"][name])] for name, text in names.items()] + [["a coin", "50.0"]]
        parts += ["## Beside what knows no words", markdown_table(["", "%"], cells)]
    if values["safety"]:
        cells = [[name.replace("_", " "), percent(row), f"{row['n']:,}"] for name, row in values["safety"].items()]
        parts += ["## Safety (Table 29)", markdown_table(["", "%", "n"], cells), TABLE_29.markdown()]
    if "scores" in values:
        mean, std = values["scores"]["mean"], values["scores"]["std"]
        parts += [f"Scores of the training data: mean {mean:.4f}, deviation {std:.4f}."]
    return "\n\n".join(parts) + "\n"


def _by_degree(accuracy: Mapping[str, Any]) -> str:
    degrees = [degree for degree in (*RATINGS, "all") if any(degree in row for row in accuracy.values())]
    rows = [[name or "(none)", *(percent(row.get(degree)) for degree in degrees), f"{row['all']['n']:,}"]
            for name, row in accuracy.items()]  # fmt: skip
    return markdown_table(["", *degrees, "pairs"], rows)


def percent(value: Mapping[str, float] | None) -> str:
    """A share as text with its interval, which need not lie evenly about it; "-" for none."""
    if value is None or not value["n"]:
        return "-"
    return f"{100 * value['share']:.1f} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"
