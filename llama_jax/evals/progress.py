"""From SFT to the last version: the answers of all models to the same held-out prompts (paper 3.4.1, Figs. 11, 14, 20).

In a recipe's workdir `answers/<name>.jsonl` holds a model's answers with their true utility, `scores/<name>.jsonl` the scores
of the newest reward models, a row a prompt, in the order of the prompts. The paper judges its versions by its own reward models
and by GPT-4; here the second judge is the simulated annotator.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.assistant.annotator import SimulatedAnnotator
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.evals.statistics import win_rate
from llama_jax.evals.verdict import Answer, Prompt, utility

TRACKS = ("helpfulness", "safety")


def write_answers(path: Path, rows: Sequence[Prompt], answers: Sequence[Answer], annotator: SimulatedAnnotator) -> None:
    """A model's answers, each with its true utility and whether its prompt is one of safety."""
    utilities = utility(rows, answers, annotator)
    write_jsonl(path, [
        {**dataclasses.asdict(answer), "utility": float(value), "is_safety": row["is_safety"]}
        for row, answer, value in zip(rows, answers, utilities, strict=True)
    ])  # fmt: skip


def read_answers(path: Path) -> list[dict[str, Any]]:
    """What `write_answers` wrote."""
    return [row for _, row in read_jsonl(path)]


def write_scores(workdir: Path, names: Sequence[str], score: Callable[[list[list[int]]], Mapping[str, np.ndarray]]) -> None:
    """The scores of some models' answers, `score` of their ids. # [P] each"""
    for name in names:
        columns = {key: values.tolist() for key, values in score(
            [answer["ids"] for answer in read_answers(workdir / "answers" / f"{name}.jsonl")]
        ).items()}  # fmt: skip
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        write_jsonl(workdir / "scores" / f"{name}.jsonl", rows)


def win_rates_by_track(
    ours: np.ndarray, theirs: np.ndarray, is_safety: np.ndarray
) -> dict[str, dict[str, float]]:
    """Win rates on the prompts of each track; a track without prompts is left out. # [P] x 2, bool [P]"""
    found = {}
    for track, inside in zip(TRACKS, (~is_safety, is_safety), strict=True):
        if inside.any():
            found[track] = dataclasses.asdict(win_rate(ours[inside], theirs[inside]))
    return found


def win_rates(workdir: Path, name: str, other: str) -> dict[str, Any]:
    """Win rates of one model's answers against another's by true utility: `win_rate`, and `win_rate_by_track`."""
    ours, theirs = (read_answers(workdir / "answers" / f"{n}.jsonl") for n in (name, other))
    a, b = (np.array([row["utility"] for row in rows]) for rows in (ours, theirs))
    is_safety = np.array([row["is_safety"] for row in ours], bool)
    return {"win_rate": dataclasses.asdict(win_rate(a, b)), "win_rate_by_track": win_rates_by_track(a, b, is_safety)}


def judge_scores(scores: Mapping[str, np.ndarray], is_safety: np.ndarray) -> np.ndarray:
    """What the reward models, as judges, go by: the model of the prompt's own track. # {track: [P]}, bool [P] -> [P]"""
    return np.where(is_safety, scores["safety"], scores["helpfulness"])


def compare(workdir: Path, name: str, other: str = "sft") -> dict[str, Any]:
    """What the report says of a model beside the annotator's judgement; against itself and for the base model no win rates."""
    path = workdir / "scores" / f"{name}.jsonl"
    if not path.exists():
        return {}
    ours, theirs = scores_of(workdir, name), scores_of(workdir, other)
    found: dict[str, Any] = {"reward_score": float(np.mean(ours["reward"]))}
    if name == other:
        return found
    is_safety = np.array([row["is_safety"] for row in read_answers(workdir / "answers" / f"{name}.jsonl")], bool)
    by_rewards = win_rates_by_track(judge_scores(ours, is_safety), judge_scores(theirs, is_safety), is_safety)
    return {**found, **win_rates(workdir, name, other), "win_rate_by_reward_models": by_rewards}


def scores_of(workdir: Path, name: str) -> dict[str, np.ndarray]:
    """Scores of a model's answers. # {"helpfulness", "safety", "reward": [P]}"""
    rows = [row for _, row in read_jsonl(workdir / "scores" / f"{name}.jsonl")]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def samples(rows: Sequence[Prompt], workdir: Path, names: Mapping[str, str], *, most: int = 16) -> list[dict[str, Any]]:
    """Some prompts with the answers of several models, to read. `names`: label in the report -> model."""
    answers = {label: read_answers(workdir / "answers" / f"{name}.jsonl") for label, name in names.items()}
    return [
        {
            "prompt": rows[i]["messages"], "reference": rows[i]["reference"], "is_safety": rows[i]["is_safety"],
            "answers": {label: found[i]["text"] for label, found in answers.items()},
            "utility": {label: found[i]["utility"] for label, found in answers.items()},
        }
        for i in range(0, len(rows), max(len(rows) // most, 1))
    ]  # fmt: skip
