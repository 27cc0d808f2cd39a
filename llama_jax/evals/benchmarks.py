"""Runs benchmarks on a model of the harness and keeps what each question scored; what is finished is not run again."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.evals import safety
from llama_jax.evals.harness import HarnessModel
from llama_jax.evals.tasks import TaskChoice
from llama_jax.files import write_json

Record = dict[str, Any]  # {"metric", "value", "stderr", "n", "scores", ...}: one finished task, a `groups.Result`


def summary(metric: str, scores: Sequence[float], **more: Any) -> Record:
    """A record from the scores of single questions: mean, and its standard error as the harness has it."""
    n, spread = len(scores), float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    return {
        "metric": metric, "value": float(np.mean(scores)), "stderr": spread / math.sqrt(n), "n": n, **more,
        "scores": [float(score) for score in scores],
    }  # fmt: skip


def run_task(lm: Any, name: str, task: Any, choice: TaskChoice, *, limit: int | None) -> Record:
    """One task of the harness on one model, with the scores of each question.

    Raises:
      ValueError: a metric or filter that the task does not have.
    """
    from lm_eval import evaluator

    quiet_harness()
    cut = sum(getattr(lm, "cut", {}).values())
    found = evaluator.evaluate(
        lm=lm, task_dict={"tasks": {task.config.task: task}, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0,
        log_samples=True, confirm_run_unsafe_code=True,
    )  # fmt: skip
    rows = found["samples"][task.config.task]
    scores = [row[choice.metric] for row in rows if row["filter"] == choice.filter and choice.metric in row]
    if not scores:
        known = sorted({f"{metric} (filter {row['filter']})" for row in rows for metric in row["metrics"]})
        raise ValueError(f"{name}: has no {choice.metric} (filter {choice.filter}); expected one of {', '.join(known)}")
    more = {"cut": sum(getattr(lm, "cut", {}).values()) - cut, "shots": task.config.num_fewshot}
    if not task.higher_is_better().get(choice.metric, True):
        more["lower_is_better"] = True
    judged = [row for row in rows if row["filter"] == choice.filter]
    others = {name for row in judged for name in row["metrics"] if isinstance(row[name], int | float)} - {choice.metric}
    more |= {name: float(np.mean([row[name] for row in judged])) for name in sorted(others)}
    return summary(choice.metric, scores, **more)


def run_safety(
    lm: Any, name: str, decoding: safety.Decoding, judges: Mapping[str, safety.Judge], *, data_dir: str, limit: int | None,
    answers: Path,
) -> tuple[dict[str, Record], list[str]]:  # fmt: skip
    """{task: record} of a safety benchmark, and notes. The answers are written to a file and taken from there afterwards, so
    that they can be judged again without the model."""
    wanted = safety.items(name, data_dir=data_dir, limit=limit)

    def draw():
        cut = sum(getattr(lm, "cut", {}).values())
        texts = safety.answer(lm, wanted, decoding)
        cut = sum(getattr(lm, "cut", {}).values()) - cut
        return {"prompts": [item.prompt for item in wanted], "answers": texts, "cut": cut}

    drawn = kept(answers, draw)
    if drawn["prompts"] != [item.prompt for item in wanted]:
        raise ValueError(f"{answers}: holds answers to other prompts; remove it to draw them again")
    scored, notes = safety.score(name, wanted, drawn["answers"], judges)
    return {task: summary(**found, cut=drawn["cut"]) for task, found in scored.items()}, notes


def kept(path: Path, run: Callable[[], Any]) -> Any:
    """The JSON value at a path; made, and put there whole, if there is none."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    value = run()
    write_json(path, value)
    return value


def with_cache(lm: Any, path: Path) -> Any:
    """The model with its finished requests kept in a file: by itself if it is ours, else by the harness's cache."""
    from lm_eval.api.model import CachingLM
    from sqlitedict import SqliteDict

    quiet_harness()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(lm, HarnessModel):
        return CachingLM(lm, str(path))
    lm.kept = SqliteDict(str(path), autocommit=True)
    return lm


def quiet_harness() -> None:
    """Leaves out the harness's notes on its own settings; ours are in the report."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


# ---- differences between two models ----


def difference(
    first: Mapping[str, Record], second: Mapping[str, Record], weights: Mapping[str, float], *, resamples: int, seed: int
) -> dict[str, float]:
    """Second minus first of a weighted sum of tasks, with its paired bootstrap interval (95 %).

    Both models answered the same questions, so the questions of each task are drawn again with both scores together.

    Args:
      weights: {task: its share of the average}; a single task has 1.
    """
    total, mean = np.zeros(resamples), 0.0
    rng = np.random.default_rng(seed)
    for task, weight in weights.items():
        a, b = (np.asarray(records[task]["scores"], np.float64) for records in (first, second))
        if a.shape != b.shape:
            raise ValueError(f"{task}: expected scores of the same questions, got {len(a)} and {len(b)}")
        gains = b - a
        mean += weight * float(gains.mean())
        for start in range(0, resamples, 1000):  # [1000, n] at once
            drawn = rng.integers(len(gains), size=(min(1000, resamples - start), len(gains)))
            total[start : start + len(drawn)] += weight * gains[drawn].mean(axis=1)
    low, high = np.quantile(total, [0.025, 0.975])
    return {"difference": mean, "low": float(low), "high": float(high)}
