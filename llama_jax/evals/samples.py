"""What many scored samples of one or several models show: Figs. 7, 8, 20, 21 and 29 as numbers.

A row is `{"prompt": id, "text": str, "reward": number, "temperature": number, "kind": str}`, as rejection sampling writes them
(the last three as far as they are needed); `kind` is "factual" or "creative" in Fig. 21. Theirs, and those of `sample_drawing`,
also say whether the answer `ended` by itself.
"""

import collections
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.sources import read_jsonl
from llama_jax.reward.held_out import calibration
from llama_jax.rlhf.best_of import BestOf, expected_max_of_n
from llama_jax.rlhf.pool import choosable_rewards, least_reward
from llama_jax.rlhf.respond import usable

Row = Mapping[str, Any]


def read_samples(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All samples of a file; ValueError naming file, line and field."""
    rows = []
    for where, row in read_jsonl(path):
        if "prompt" not in row:
            raise ValueError(f"{where}: prompt: missing; expected what tells the prompts apart")
        row["text"] = row.get("text", row.get("response", row.get("answer")))
        for name, kinds in (("reward", (int, float)), ("temperature", (int, float)), ("text", str), ("kind", str)):
            value = row.get(name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(f"{where}: {name}: expected {'a string' if kinds is str else 'a number'}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where}: {name}: expected a finite number, got {value}")
        if not isinstance(row.get("ended", True), bool):
            raise ValueError(f"{where}: ended: expected true or false, got {row['ended']!r}")
        row["prompt"] = repr(row["prompt"])
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no samples in it")
    return rows


def calibration_of(path: str | os.PathLike) -> list[dict[str, float]]:
    """`held_out.calibration` of rows `{"score": logit, "ratings": [number, ...]}`, an answer each, by the median; null is the
    score of one that the reward model could not read, which `unread` counts. (Fig. 29)"""
    scores, medians = [], []
    for where, row in read_jsonl(path):
        ratings = ratings_of(row, where)
        if _has_none(row):
            continue
        if not _number(row.get("score")):
            raise ValueError(f"{where}: score: expected a finite number, got {row.get('score')!r}")
        scores.append(row["score"])
        medians.append(float(np.median(ratings)))
    if not scores:
        raise ValueError(f"{path}: no answers in it")
    return calibration(np.array(scores), np.array(medians))


def unread(path: str | os.PathLike) -> int:
    """How many answers of such a file have no score."""
    return sum(_has_none(row) for _, row in read_jsonl(path))


def _has_none(row: Row) -> bool:
    return row.get("score", math.nan) is None


def ratings_of(row: Row, where: str) -> list[float]:
    """What people gave an answer; ValueError for anything but numbers."""
    ratings = row.get("ratings")
    if not isinstance(ratings, list) or not ratings or not all(_number(rating) for rating in ratings):
        raise ValueError(f"{where}: ratings: expected a list of numbers, got {ratings!r}")
    return ratings


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def rewards(rows: Sequence[Row]) -> np.ndarray:
    """The scores of all samples, for their density. (Fig. 20) # float [n]"""
    return np.array([row["reward"] for row in rows if row.get("reward") is not None], np.float64)


def choosable(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The rows with the rewards of which a round of rejection sampling makes Figs. 7 and 8, and what was changed ("": nothing).

    Where a row tells whether its answer `ended`, one that cannot be trained on is worth `pool.least_reward`.
    """
    found, known = list(rows), [i for i, row in enumerate(rows) if "ended" in row and row.get("reward") is not None]
    scored = [{**rows[i], "response": rows[i]["text"] or ""} for i in known]
    least = least_reward([row["reward"] for row in scored])
    for i, reward in zip(known, choosable_rewards(scored, least=least), strict=True):
        found[i] = {**rows[i], "reward": reward}
    count = sum(not usable(row["response"], row["ended"]) for row in scored)
    said = (
        f"{count:,} of {len(rows):,} samples did not end, say nothing or hold a chat tag; in Figs. 7 and 8 they count as "
        f"{least:g}, since a round of rejection sampling cannot choose them"
    )
    return found, said if count else ""


def best_of(rows: Sequence[Row]) -> BestOf:
    """Expected best and median reward of N samples; every prompt gives as many as the one with the fewest, which `cut` tells.
    (Fig. 7)"""
    by_prompt = _scores(rows)
    if not by_prompt:
        raise ValueError("samples: no rewards among them")
    least = min(map(len, by_prompt.values()))
    return expected_max_of_n(np.array([scores[:least] for scores in by_prompt.values()]))


def cut(rows: Sequence[Row]) -> str:
    """Why the curves of `best_of` end before the last sample of some prompt; "" if they do not."""
    counts = {prompt: len(scores) for prompt, scores in _scores(rows).items()}
    least, most = min(counts.values(), default=0), max(counts.values(), default=0)
    if least == most:
        return ""
    few = [prompt for prompt, count in counts.items() if count == least]
    return (
        f"the curves end at N = {least}: {len(few):,} of {len(counts):,} prompts (such as {few[0]}) have no more samples with "
        f"a reward, others up to {most}"
    )


def _scores(rows: Sequence[Row]) -> dict[str, list[float]]:
    by_prompt = collections.defaultdict(list)
    for row in rows:
        if row.get("reward") is not None:
            by_prompt[row["prompt"]].append(row["reward"])
    return by_prompt


def best_of_by_temperature(rows: Sequence[Row]) -> dict[float, BestOf]:
    """`best_of` at each temperature that has rewards. (Fig. 8)"""
    return {temperature: best_of(some) for temperature, some in by_temperature(rows).items()}


def by_temperature(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """The rows with a reward at each temperature."""
    return _by([row for row in rows if row.get("reward") is not None], "temperature")


def self_bleu_by_temperature(rows: Sequence[Row]) -> dict[str, dict[float, dict[str, float]]]:
    """{kind: {temperature: mean and deviation over prompts of `self_bleu`}}, 100 where all samples are alike. (Fig. 21)"""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for kind, some in _by([{**row, "kind": row.get("kind") or "all"} for row in rows], "kind").items():
        for temperature, samples in _by(some, "temperature").items():
            texts = [[row["text"] for row in of] for of in _by(samples, "prompt").values()]
            values = [self_bleu(of_prompt) for of_prompt in texts if len(of_prompt) > 1]
            if values:
                measures = {"mean": float(np.mean(values)), "std": float(np.std(values)), "prompts": len(values)}
                found.setdefault(kind, {})[temperature] = measures
    return found


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against all the others (Zhu et al. 2018), by sacrebleu (extra [eval]); two texts at least."""
    try:
        from sacrebleu.metrics import BLEU
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Self-BLEU needs the package {error.name}: pip install 'llama_jax[eval]'") from None
    bleu = BLEU(effective_order=True)  # short answers have no 4-grams
    return float(np.mean([bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]))


def _by(rows: Sequence[Row], name: str) -> dict[Any, list[Row]]:
    found = collections.defaultdict(list)
    for row in rows:
        if row.get(name) is not None:
            found[row[name]].append(row)
    return {key: found[key] for key in sorted(found)}
