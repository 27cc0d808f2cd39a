"""Runs benchmarks on a model of the harness and keeps what each question scored; what is finished is not run again.

On several hosts all run them together; the first one reads and writes.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax.data.sources import write_jsonl
from llama_jax.evals import safety
from llama_jax.evals.request_file import RequestFile
from llama_jax.evals.task_names import sets_of
from llama_jax.evals.tasks import TaskChoice
from llama_jax.files import write_json
from llama_jax.parallel.hosts import from_host_0, on_host_0
from llama_jax.reward.held_out import mean_difference

# What of a task's settings decides how a row is asked and judged.
_ASKED = (
    "output_type", "description", "doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "gen_prefix",
    "target_delimiter", "fewshot_delimiter", "num_fewshot", "generation_kwargs", "repeats", "filter_list", "metric_list",
)  # fmt: skip
_LOST = ("cut", "less_room")  # what a model counts: requests without their beginning, answers with less room than asked for
_ROUNDING = 1e-12  # of sums of scores
Record = dict[str, Any]  # {"metric", "value", "stderr", "n", "scores", ...}: one finished task, a `groups.Result`


def summary(metric: str, scores: Sequence[float], **more: Any) -> Record:
    """A record from the scores of single questions: mean, and its standard error as the harness has it."""
    n, spread = len(scores), float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    return {
        "metric": metric, "value": float(np.mean(scores)), "stderr": spread / math.sqrt(n), "n": n, **more,
        "scores": [float(score) for score in scores],
    }  # fmt: skip


def check(name: str, task: Any, choice: TaskChoice) -> None:
    """Refuses a metric or a filter that a task of the harness does not have, before anything is run.

    Raises:
      ValueError: names what it has.
    """
    filters = [each.name for each in getattr(task, "_filters", [])] or ["none"]
    if choice.filter not in filters:
        raise ValueError(f"{name}: has no filter {choice.filter!r}; expected one of {', '.join(filters)}")
    metrics = list(task.higher_is_better())
    judge = task.config.process_results
    if choice.metric.startswith("acc") and task.OUTPUT_TYPE == "generate_until" and callable(judge):
        # `tasks.build` puts accuracies into any task's list; what this one says of an answer tells whether it has them.
        metrics = list(judge(next(iter(task.eval_docs)), [""]))
    if choice.metric not in metrics:
        raise ValueError(f"{name}: has no metric {choice.metric!r}; expected one of {', '.join(metrics)}")


@dataclasses.dataclass(frozen=True)
class Built:
    """The harness's object of a task, how it is run, and a digest of the questions that it asks."""

    task: Any
    choice: TaskChoice
    questions: str


def prepare(name: str, task: Any, choice: TaskChoice, *, limit: int | None) -> Built:
    """A checked task, with the digest of what it scores, of the rows that its examples are taken from, and of how it asks: the
    data behind a name, or the harness, may be exchanged between two commands."""
    check(name, task, choice)
    digest = hashlib.sha256(json.dumps(asked_how(task), sort_keys=True).encode() + b"\n")
    for docs in (itertools.islice(task.eval_docs, limit), task.fewshot_docs() if choice.shots else ()):
        for doc in docs:
            digest.update(json.dumps(doc, sort_keys=True, default=lambda value: type(value).__name__).encode() + b"\n")
        digest.update(b"\n")
    return Built(task, choice, digest.hexdigest()[:32])


def asked_how(task: Any) -> dict[str, Any]:
    """Templates, stop strings, filters and metrics of a task as JSON values, and the version of the harness, whose functions
    they name. Where its rows come from does not count, nor does whether programs may run."""

    def told(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): told(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [told(item) for item in value]
        if value is None or isinstance(value, str | int | float):
            return value
        return getattr(value, "__qualname__", type(value).__qualname__)  # a function's name: its address is another each time

    config, shots = task.config, task.config.fewshot_config
    return {
        "lm_eval": importlib.metadata.version("lm_eval"), **{name: told(getattr(config, name, None)) for name in _ASKED},
        "examples": {name: told(getattr(shots, name, None)) for name in ("sampler", "fewshot_indices", *_ASKED)},
    }  # fmt: skip


def run_task(
    lm: Any, name: str, task: Any, choice: TaskChoice, *, limit: int | None, samples: Path | None = None
) -> Record:
    """One task of the harness on one model, with the scores of each question; its questions go to the file `samples`.

    Raises:
      ValueError: a metric or filter that the task does not have.
    """
    from lm_eval import evaluator

    quiet_harness()
    task.set_fewshot_seed(1234)  # as it was built: a model before has drawn its examples, and all are asked with the same
    before = lost(lm)
    found = evaluator.evaluate(
        lm=lm, task_dict={"tasks": {task.config.task: task}, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0,
        log_samples=True, confirm_run_unsafe_code=True,
    )  # fmt: skip
    rows = found["samples"][task.config.task]
    scored = [row for row in rows if row["filter"] == choice.filter and choice.metric in row]
    scores = [row[choice.metric] for row in scored]
    if not scores:
        known = sorted({f"{metric} (filter {row['filter']})" for row in rows for metric in row["metrics"]})
        raise ValueError(f"{name}: has no {choice.metric} (filter {choice.filter}); expected one of {', '.join(known)}")
    more = {**_since(before, lm), "shots": task.config.num_fewshot}
    if not task.higher_is_better().get(choice.metric, True):
        more["lower_is_better"] = True
    judged = [row for row in rows if row["filter"] == choice.filter]
    others = {name for row in judged for name in row["metrics"] if isinstance(row[name], int | float)} - {choice.metric}
    more |= {name: float(np.mean([row[name] for row in judged])) for name in sorted(others)}
    if samples is not None:
        larger = sets_of(name)
        on_host_0(write_jsonl, samples, [
            {"id": f"{name}/{row['doc_id']}", "text": verbalised(task, row),
             "score": float(score) if math.isfinite(score) else None, "groups": larger, **answered(task, row)}
            for row, score in zip(scored, scores, strict=True)
        ])  # fmt: skip
    return summary(choice.metric, scores, **more)


def verbalised(task: Any, row: Mapping[str, Any]) -> str:
    """A question of the harness's log as a model reads it, with its gold answer (of several, the first): what the analysis of
    contamination looks for (paper appendix A.6). Description and examples, which all questions share, are left out."""
    doc, arguments, gold = row["doc"], row["arguments"], row["target"]
    context, own = arguments[0][0], task.doc_to_text(doc)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return context
    choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else []
    if isinstance(own, int) and own < len(choices):  # the choices are prompts, and the gold one's number is the text
        gold, own = own, choices[own]
    if isinstance(gold, list | tuple):
        gold = gold[0] if gold else ""
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if task.OUTPUT_TYPE == "loglikelihood":
        answer = arguments[0][1]
    elif isinstance(gold, int) and 0 <= gold < len(choices):
        context, answer = arguments[gold][:2]
    else:
        answer = f"{task.config.target_delimiter}{gold}"
    if isinstance(own, str) and own:
        context = context[max(context.rfind(own), 0) :]
    return context + answer


def answered(task: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a model made of a question of the harness's log: the text that it wrote, or the log-likelihood of each choice.

    Of many samples nothing: those of code are kept in `answers/`.
    """
    said = [each[0] for each in row["resps"]]
    if task.OUTPUT_TYPE == "generate_until":
        return {"answer": said[0]} if isinstance(said[0], str) and task.config.repeats == 1 else {}
    likelihoods = [float(one[0] if isinstance(one, tuple | list) else one) for one in said]
    if task.OUTPUT_TYPE == "multiple_choice":  # behind them may stand those without the question
        likelihoods = likelihoods[: len(task.doc_to_choice(row["doc"]))]
    return {"log_likelihoods": likelihoods}


def overview(tasks: Mapping[str, Built], safety: Mapping[str, int], *, limit: int | None) -> str:
    """What a run would ask, a line each: the rows of tasks, and of safety benchmarks, {name: prompts}."""
    rows = [["task", "rows", "shots", "metric"]]
    for name, built in tasks.items():
        count = len(list(itertools.islice(built.task.eval_docs, limit)))
        rows.append([name, f"{count:,}", str(built.task.config.num_fewshot), built.choice.metric])
    rows += [[name, f"{count:,}", "", ""] for name, count in safety.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A safety benchmark's prompts, a model's answers to them, and how many lost something."""

    items: list[safety.Item]
    answers: list[str]
    lost: dict[str, int]


def draw_safety(
    lm: Any, name: str, decoding: safety.Decoding, *, data_dir: str, limit: int | None, answers: Path
) -> Drawn:
    """A model's answers to a safety benchmark. They are written to a file and taken from there afterwards, so that they can be
    judged again without the model."""
    rows = from_host_0(
        lambda: [dataclasses.asdict(item) for item in safety.items(name, data_dir=data_dir, limit=limit)]
    )
    wanted = [safety.Item(**row) for row in rows]
    prompts = [item.prompt for item in wanted]

    def draw():
        before = lost(lm)
        return {"prompts": prompts, "answers": safety.answer(lm, wanted, decoding), **_since(before, lm)}

    found = kept(answers, draw)
    if found["prompts"] != prompts:
        raise ValueError(f"{answers}: holds answers to other prompts; remove it to draw them again")
    return Drawn(wanted, found["answers"], {how: found[how] for how in _LOST})


def judge_safety(
    name: str, drawn: Drawn, judges: Mapping[str, safety.Judge], *, model: str
) -> tuple[dict[str, Record], list[str]]:
    """{task: record} of a model's answers to a safety benchmark, and notes."""
    scored, notes = safety.score(name, drawn.items, drawn.answers, judges, model=model)
    records = {}
    for task, found in scored.items():
        if read := [value for value in found["scores"] if not math.isnan(value)]:
            # All of them are kept: questions of two models are paired by their places.
            records[task] = {**summary(**{**found, "scores": read}), "scores": found["scores"]}
    return records, notes


def lost(lm: Any) -> dict[str, int]:
    """How many requests a model has cut so far, and how many answers had less room than was asked for."""
    return {how: sum(getattr(lm, how, {}).values()) for how in _LOST}


def _since(before: Mapping[str, int], lm: Any) -> dict[str, int]:
    return {how: count - before[how] for how, count in lost(lm).items()}


def kept(path: Path, run: Callable[[], Any]) -> Any:
    """The JSON value at a path; made, and put there whole, if there is none. On several hosts, as the first one has it."""
    held = from_host_0(lambda: [json.loads(path.read_text(encoding="utf-8"))] if path.exists() else [])
    if held:
        return held[0]
    value = run()
    on_host_0(write_json, path, value)
    return from_host_0(lambda: value)


def with_cache(lm: Any, path: Path) -> Any:
    """The model with its finished requests kept in a file, on host 0."""
    quiet_harness()
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        lm.kept = RequestFile(path)
    return lm


def quiet_harness() -> None:
    """Leaves out the harness's notes on its own settings; ours are in the report."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


# ---- differences between two models ----


def comparable(first: Mapping[str, Record], second: Mapping[str, Record]) -> dict[str, Record]:
    """The first model's records of tasks in which a question has a score of both."""
    return {
        task: row for task, row in first.items()
        if task in second and not np.isnan(np.add(row["scores"], second[task]["scores"])).all()
    }  # fmt: skip


def difference(
    first: Mapping[str, Record], second: Mapping[str, Record], weights: Mapping[str, float], *, resamples: int, seed: int
) -> dict[str, float]:
    """Second minus first of a weighted sum of tasks, with its paired bootstrap interval (95 %).

    Both models answered the same questions, so the questions of each task are drawn again with both scores together; those
    without a score of one of them are left out. Where all questions differ alike, as where both models fail at everything, all
    resamples are the same: the interval is that of `mean_difference` then.

    Args:
      weights: {task: its share of the average}; a single task has 1.
    """
    total, mean = np.zeros(resamples), 0.0
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for task, weight in weights.items():
        a, b = (np.asarray(records[task]["scores"], np.float64) for records in (first, second))
        if a.shape != b.shape:
            raise ValueError(f"{task}: expected scores of the same questions, got {len(a)} and {len(b)}")
        gains = (b - a)[~np.isnan(b - a)]
        found.append(gains)
        mean += weight * float(gains.mean())
        for start in range(0, resamples, 1000):  # [1000, n] at once
            drawn = rng.integers(len(gains), size=(min(1000, resamples - start), len(gains)))
            total[start : start + len(drawn)] += weight * gains[drawn].mean(axis=1)
    low, high = np.quantile(total, [0.025, 0.975])
    if np.ptp(every := np.concatenate(found)) == 0 and abs(every[0]) <= 1:
        low, high = (mean_difference(every)[end] for end in ("low", "high"))
    ends = {"difference": mean, "low": low, "high": high}
    # A sum that is 0 but for rounding would leave 0 out of the interval: "(-28.2 to -0.0)" would be clear.
    return {name: 0.0 if abs(value) < _ROUNDING else float(value) for name, value in ends.items()}
