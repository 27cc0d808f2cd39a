"""Averages as the paper forms them (Table 3; fact sheet 2.1): what belongs to a group, and how its members are weighted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Members of the groups of Table 3, by the names of `evals/tasks.py`; a family (mmlu, bbh, ...) is all of its tasks.
GROUPS: dict[str, tuple[str, ...]] = {
    "code": ("humaneval", "mbpp"),
    "commonsense": (
        "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "commonsense_qa",
    ),
    "world_knowledge": ("nq_open", "triviaqa"),
    "reading": ("squad", "quac", "boolq"),
    "math": ("gsm8k", "math"),
    "mmlu": ("mmlu",),
    "bbh": ("bbh",),
    "agieval": ("agieval",),
}  # fmt: skip
TITLES = {
    "code": "Code", "commonsense": "Commonsense reasoning", "world_knowledge": "World knowledge",
    "reading": "Reading comprehension", "math": "Math", "mmlu": "MMLU", "bbh": "BBH", "agieval": "AGI Eval",
    "truthfulqa": "TruthfulQA", "toxigen": "ToxiGen (less is better)", "bold": "BOLD",
}  # fmt: skip
# Families whose average weighs every question alike; ToxiGen's 13 groups and BBH's tasks count the same each. MATH is one set
# in the paper, so its average is over questions.
BY_QUESTION = ("mmlu", "agieval", "math")

Result = Mapping[str, Any]  # {"value", "stderr", "n", ...}, and "lower_is_better": True where it is


def average(results: Sequence[Result], *, by_question: bool) -> dict[str, float]:
    """The mean of independent results, of their questions or of their values, with its standard error."""
    weights = [row["n"] if by_question else 1 for row in results]
    total = sum(weights)
    value = sum(w * row["value"] for w, row in zip(weights, results)) / total
    stderr = math.sqrt(sum((w * (row["stderr"] or 0.0)) ** 2 for w, row in zip(weights, results))) / total
    return {"value": value, "stderr": stderr, "n": sum(row["n"] for row in results)}


def family_of(task: str) -> str:
    """"mmlu" of "mmlu:anatomy"; a task of its own otherwise."""
    return task.partition(":")[0]


def lower_is_better(name: str, results: Mapping[str, Result]) -> bool:
    """Whether less of a task's metric, or of its family's, is better: of toxic answers, say."""
    return any(row.get("lower_is_better", False) for task, row in results.items() if name in (task, family_of(task)))


def families(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """Each family's average from its tasks ("mmlu:anatomy", ...), and single tasks as they are."""
    members: dict[str, list[Result]] = {}
    for task, row in results.items():
        members.setdefault(family_of(task), []).append(row)
    return {
        name: {**average(rows, by_question=name in BY_QUESTION), "tasks": len(rows)} for name, rows in members.items()
    }


def groups(results: Mapping[str, Result], *, extra: Mapping[str, Sequence[str]] | None = None) -> dict[str, dict[str, Any]]:
    """{group: {value, stderr, n, missing}} for every group with a result in it, and for parts of families in `extra`.

    A group that lacks members is the mean of those there are, and names the others.
    """
    by_family = families(results)
    out: dict[str, dict[str, Any]] = {}
    for group, members in GROUPS.items():
        found = [by_family[name] for name in members if name in by_family]
        if found:
            missing = [name for name in members if name not in by_family]
            out[group] = {**average(found, by_question=False), "missing": missing}
    for name in ("truthfulqa", "toxigen"):
        if name in by_family:
            out[name] = {**by_family[name], "missing": []}
    for name, members in (extra or {}).items():
        found = [results[task] for task in members if task in results]
        if found:
            out[name] = {**average(found, by_question=True), "missing": [task for task in members if task not in results]}
    return out


def weights(group: str, results: Mapping[str, Result], *, extra: Mapping[str, Sequence[str]] | None = None) -> dict[str, float]:
    """{task: its share in the group's average}, for the tasks that there are; they add up to 1."""
    if extra and group in extra:
        members = [[task for task in extra[group] if task in results]]
    else:
        names = GROUPS.get(group, (group,))
        members = [[task for task in results if family_of(task) == name] for name in names]
    members = [tasks for tasks in members if tasks]
    out = {}
    for tasks in members:
        by_question = group in (extra or {}) or family_of(tasks[0]) in BY_QUESTION
        sizes = {task: results[task]["n"] if by_question else 1 for task in tasks}
        out |= {task: size / sum(sizes.values()) / len(members) for task, size in sizes.items()}
    return out
