"""Averages as the paper forms them (Table 3; fact sheet 2.1): what belongs to a group, and how its members are weighted.

A task whose name ends in "@" and a number is run with so many examples, beside its own of Table 3, and belongs to no group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Members of the groups of Table 3, by the names of `evals/task_names.py`; a family (mmlu, bbh, ...) is all of its tasks.
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
_ACCURACY, _MATCH = ("acc", "acc_norm", "acc_mutual_info"), ("exact_match",)
# With how many examples, and by which readings of its metric, the paper has a task (Tables 3 and 16).
SHOTS_AND_METRICS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "humaneval": ((0,), ("pass@1",)), "mbpp": ((3,), ("pass@1",)),
    **dict.fromkeys((*GROUPS["commonsense"], "boolq", "quality"), ((0,), _ACCURACY)), "commonsense_qa": ((7,), _ACCURACY),
    "nq_open": ((5,), _MATCH), "triviaqa": ((5,), _MATCH), "squad": ((0,), _MATCH), "quac": ((0,), ("f1",)),
    "gsm8k": ((8,), _MATCH), "math": ((4,), ("math_verify", "exact_match")), "mmlu": ((5,), _ACCURACY),
    "bbh": ((3,), _MATCH), "agieval": ((3, 4, 5), _ACCURACY),
    "narrative_qa": ((0,), ("f1",)), "qasper": ((0,), ("f1",)), "qmsum": ((0,), ("rouge1",)), "contract_nli": ((0,), _MATCH),
}  # fmt: skip
MMLU_PARTS = ("mmlu_humanities", "mmlu_stem", "mmlu_social_sciences", "mmlu_other")  # the columns of Table 19
TITLES = {
    "code": "Code", "commonsense": "Commonsense reasoning", "world_knowledge": "World knowledge",
    "reading": "Reading comprehension", "math": "Math", "mmlu": "MMLU", "bbh": "BBH", "agieval": "AGI Eval",
    "truthfulqa": "TruthfulQA", "toxigen": "ToxiGen (less is better)", "bold": "BOLD", "mmlu_humanities": "MMLU humanities",
    "mmlu_stem": "MMLU STEM", "mmlu_social_sciences": "MMLU social sciences", "mmlu_other": "MMLU other",
}  # fmt: skip
# Families whose average weighs every question alike; ToxiGen's 13 groups and BBH's tasks count the same each. MATH is one set
# in the paper, so its average is over questions.
BY_QUESTION = ("mmlu", "agieval", "math")

# {"value", "stderr", "n", ...}; "metric" and "shots" where they are known, "lower_is_better": True where it is.
Result = Mapping[str, Any]


def average(results: Sequence[Result], *, by_question: bool) -> dict[str, float]:
    """The mean of independent results, of their questions or of their values, with its standard error."""
    weights = [row["n"] if by_question else 1 for row in results]
    total = sum(weights)
    value = sum(w * row["value"] for w, row in zip(weights, results)) / total
    stderr = math.sqrt(sum((w * (row["stderr"] or 0.0)) ** 2 for w, row in zip(weights, results))) / total
    return {"value": value, "stderr": stderr, "n": sum(row["n"] for row in results)}


def plain(task: str) -> str:
    """"nq_open" of "nq_open@1"."""
    return task.partition("@")[0]


def family_of(task: str) -> str:
    """"mmlu" of "mmlu:anatomy", "mmlu@0" of "mmlu:anatomy@0"; a task of its own otherwise."""
    name, at, shots = task.partition("@")
    return name.partition(":")[0] + at + shots


def as_the_paper(task: str, result: Result) -> bool:
    """Whether a task was run with the examples and the metric that Table 3 has of it, as far as its result names them."""
    if "@" in task or family_of(task) not in SHOTS_AND_METRICS:
        return False
    shots, metrics = SHOTS_AND_METRICS[family_of(task)]
    return result.get("shots", shots[0]) in shots and result.get("metric", metrics[0]) in metrics


def lower_is_better(name: str, results: Mapping[str, Result]) -> bool:
    """Whether less of a task's metric, or of its family's, is better: of toxic answers, say."""
    return any(row.get("lower_is_better", False) for task, row in results.items() if name in (task, family_of(task)))


def families(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """Each family's average from its tasks ("mmlu:anatomy", ...), and single tasks as they are."""
    members: dict[str, list[Result]] = {}
    for task, row in results.items():
        members.setdefault(family_of(task), []).append(row)
    return {
        name: {**average(rows, by_question=plain(name) in BY_QUESTION), "tasks": len(rows)} for name, rows in members.items()
    }


def groups(
    results: Mapping[str, Result], *, extra: Mapping[str, Sequence[str]] | None = None,
    whole: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """{group: {value, stderr, n, missing}} for every group with a result in it, and for parts of families in `extra`.

    A group that lacks members is the mean of those there are, and names the others; of families in `whole`, {name: all of its
    tasks}, it says how many tasks it lacks. What was run with other examples than Table 3's, or by another metric, is none.
    """
    by_family = families({task: row for task, row in results.items() if as_the_paper(task, row)})
    out: dict[str, dict[str, Any]] = {}
    for group, members in GROUPS.items():
        found = [by_family[name] for name in members if name in by_family]
        if found:
            missing = [text for name in members if (text := _lacking(name, by_family, results, (whole or {}).get(name, ())))]
            out[group] = {**average(found, by_question=False), "missing": missing}
    for name, row in families(results).items():
        if name in ("truthfulqa", "toxigen"):
            out[name] = {**row, "missing": []}
    for name, members in (extra or {}).items():
        found = [results[task] for task in members if task in results]
        if found:
            out[name] = {**average(found, by_question=True), "missing": [task for task in members if task not in results]}
    return out


def _lacking(name: str, by_family: Mapping[str, Any], results: Mapping[str, Result], tasks: Sequence[str]) -> str:
    """What is missing of a member of a group, in words; "" if nothing is."""
    if name not in by_family:
        return name
    absent = sum(task not in results for task in tasks)
    return f"{absent} of the {len(tasks)} tasks of {name}" if absent else ""


def weights(group: str, results: Mapping[str, Result], *, extra: Mapping[str, Sequence[str]] | None = None) -> dict[str, float]:
    """{task: its share in the group's average}, for the tasks that there are; they add up to 1."""
    if extra and group in extra:
        members = [[task for task in extra[group] if task in results]]
    else:
        names, among = GROUPS.get(group, (group,)), [t for t in results if group not in GROUPS or as_the_paper(t, results[t])]
        members = [[task for task in among if family_of(task) == name] for name in names]
    members = [tasks for tasks in members if tasks]
    out = {}
    for tasks in members:
        by_question = group in (extra or {}) or plain(family_of(tasks[0])) in BY_QUESTION
        sizes = {task: results[task]["n"] if by_question else 1 for task in tasks}
        out |= {task: size / sum(sizes.values()) / len(members) for task, size in sizes.items()}
    return out
