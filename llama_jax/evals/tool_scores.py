"""What answers with tools and without are worth (section 5.1, Table 15), and which are shown (Figs. 22, 23)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.evals import tool_prompts
from llama_jax.evals.statistics import mean_interval
from llama_jax.evals.tool_answers import Answer
from llama_jax.evals.tool_calls import marked
from llama_jax.evals.word_problems import Problem, is_correct, read_number
from llama_jax.reward.held_out import share

WAYS = {"calculator": "with a calculator", "plain": "without"}
_SHOWN = 3  # problems of each set whose answers are shown


@dataclasses.dataclass(frozen=True)
class Solved:
    """A set's problems and a model's answers to them, with the calculator and without it; as many of each."""

    problems: Sequence[Problem]
    calculator: Sequence[Answer]
    plain: Sequence[Answer]

    def right(self, way: str) -> np.ndarray:
        """Which answers of a way of WAYS are right. # -> bool [n]"""
        pairs = zip(self.problems, getattr(self, way), strict=True)
        return np.array([is_correct(read_number(answer.text), problem.answer) for problem, answer in pairs], bool)


def values_of(solved: Mapping[str, Mapping[str, Solved]]) -> dict[str, Any]:
    """`accuracy` {model: {set: ...}} and `examples` of {set: {model: its answers}}."""
    models = list(next(iter(solved.values())))
    return {
        "accuracy": {model: {name: compared(of[model]) for name, of in solved.items()} for model in models},
        "examples": [example for name, of in solved.items() for example in _examples(name, of)],
    }


def compared(solved: Solved) -> dict[str, Any]:
    """A model's accuracy on a set in both ways with counts of answers and calls, and what the calculator adds (a share)."""
    right = {way: solved.right(way) for way in WAYS}
    found: dict[str, Any] = {way: share(right[way]) | _counts(getattr(solved, way)) for way in WAYS}
    added = mean_interval(right["calculator"].astype(float) - right["plain"])
    return found | {"added": dataclasses.asdict(added)}


def _counts(answers: Sequence[Answer]) -> dict[str, int]:
    return {
        "no_number": sum(read_number(answer.text) is None for answer in answers),
        "unfinished": sum(answer.end == "length" for answer in answers),
        "too_many_calls": sum(answer.end == "calls" for answer in answers),
        "too_long": sum(answer.end == "too long" for answer in answers),
        "with_call": sum(any(call.tool for call in answer.calls) for answer in answers),
        "calls": sum(bool(call.tool) for answer in answers for call in answer.calls),
        "malformed": sum(answer.malformed for answer in answers),
        "failed": sum(answer.failed for answer in answers),
    }


def _examples(name: str, of: Mapping[str, Solved]) -> list[dict[str, Any]]:
    """The first problems of a set with all models' answers, as `report_html.dialogue_html` takes them."""
    problems, found = next(iter(of.values())).problems[:_SHOWN], []
    for i, problem in enumerate(problems):
        answers, notes = {}, {}
        for model, solved in of.items():
            for way, words in WAYS.items():
                answer = getattr(solved, way)[i]
                value = read_number(answer.text)
                said = "no number" if value is None else "right" if is_correct(value, problem.answer) else f"wrong: {value:g}"
                answers[f"{model}, {words}"], notes[f"{model}, {words}"] = shown(answer), said
        found.append({"set": name, "prompt": problem.question, "reference": f"{problem.answer:g}", "answers": answers,
                      "note": notes})  # fmt: skip
    return found


def times(answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """The answers to the questions of Fig. 22, {model: one for each}, a row a question, system message and year."""
    return [{**asked, "answers": {model: some[i].text for model, some in answers.items()}}
            for i, asked in enumerate(tool_prompts.times())]  # fmt: skip


def chains(answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """The answers to the questions of Fig. 23, {model: one for each}; none where there was nothing to search."""
    return [
        {"prompt": question, "answers": {model: shown(some[i]) for model, some in answers.items()}}
        for i, question in enumerate(tool_prompts.CHAIN_QUESTIONS) if all(answers.values())
    ]  # fmt: skip


def shown(answer: Answer) -> str:
    """An answer with its calls marked, and how it ended if not by itself."""
    ends = {"length": "[not finished]", "calls": "[a call more than are allowed]", "too long": "[the prompt is too long]"}
    return " ".join(part for part in (marked(answer.text), ends.get(answer.end, "")) if part)
