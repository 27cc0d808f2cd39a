"""Rows of the benchmarks' local files as documents, with every value that decides a score checked.

The harness takes what it gets: a gold answer of -1 is the last choice, a text in place of a list is its letters. So a document
has the fields that prompt and metric read, each of one type, and a gold answer that is among the choices. A ValueError says
field, expectation and finding; `local_tasks.documents` puts file and line before it.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Document = dict[str, Any]
Row = Mapping[str, Any]
MBPP_FIRST = 2  # of the ten tasks for prompts; its paper's, and everybody's, are 2, 3 and 4
_SHOWN = 80  # characters of a value in an error


# ---- what a value has to be ----


def text(value: Any, field: str) -> str:
    """A string as it is."""
    if not isinstance(value, str):
        raise ValueError(f"{field}: expected a text, got {value!r:.{_SHOWN}}")
    return value


def texts(value: Any, field: str, *, least: int = 0, most: int | None = None) -> list[str]:
    """A list of strings, of so many."""
    found = "a list" if isinstance(value, list) else type(value).__name__
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{field}: expected a list of texts, got {found}: {value!r:.{_SHOWN}}")
    if not least <= len(value) <= (len(value) if most is None else most):
        count = f"at least {least}" if most is None else f"{least}" if most == least else f"{least} to {most}"
        raise ValueError(f"{field}: expected {count} texts, got {len(value)}")
    return value


def member(value: Any, field: str, options: Sequence[str]) -> int:
    """The place of a string among the strings that it may be."""
    options = list(options)  # of letters in one text, two in a row are none
    if value not in options:
        raise ValueError(f"{field}: expected one of {', '.join(options)}, got {value!r:.{_SHOWN}}")
    return options.index(value)


def number(value: Any, field: str, first: int, last: int) -> int:
    """A whole number within bounds, which may be written as text."""
    found = int(value) if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}\s*", value) else value
    if isinstance(found, bool) or not isinstance(found, int) or not first <= found <= last:
        unlabelled = " (a set without its answers?)" if found in (-1, "") else ""
        raise ValueError(f"{field}: expected {first} to {last}, got {value!r:.{_SHOWN}}{unlabelled}")
    return found


def fields(value: Any, field: str, *names: str) -> Row:
    """An object with these fields."""
    if not isinstance(value, dict) or any(name not in value for name in names):
        raise ValueError(f"{field}: expected an object with {', '.join(names)}, got {value!r:.{_SHOWN}}")
    return value


def objects(value: Any, field: str, *names: str) -> list[Row]:
    """A list of objects with these fields."""
    if not isinstance(value, list):
        raise ValueError(f"{field}: expected a list, got {value!r:.{_SHOWN}}")
    return [fields(item, f"{field}[{i}]", *names) for i, item in enumerate(value)]


def texts_of(*names: str, optional: Sequence[str] = ()) -> Callable[[Row], Document]:
    """Documents of these fields, all of them texts; an optional one that is missing is ""."""

    def document(row: Row) -> Document:
        more = {name: text(row.get(name) or "", name) for name in optional}
        return {**{name: text(row[name], name) for name in names}, **more}

    return document


# ---- commonsense and reading ----


def piqa(row: Row) -> Document:
    """Two solutions, the right one 0 or 1; -1 is a row of the test set, whose answers are not published."""
    return {**texts_of("goal", "sol1", "sol2")(row), "label": number(row["label"], "label", 0, 1)}


def siqa(row: Row) -> Document:
    """Three answers, the right one "1" to "3"."""
    found = texts_of("context", "question", "answerA", "answerB", "answerC")(row)
    return {**found, "label": str(number(row["label"], "label", 1, 3))}


def hellaswag(row: Row) -> Document:
    """Endings of a query, the right one by its place."""
    choices = texts(row["choices"], "choices", least=2)
    gold = number(row["gold"], "gold", 0, len(choices) - 1)
    return {"query": text(row["query"], "query"), "choices": choices, "label": gold}


def winogrande(row: Row) -> Document:
    """A sentence with a blank, and the option "1" or "2" that fills it."""
    found = texts_of("sentence", "option1", "option2")(row)
    if "_" not in found["sentence"]:
        raise ValueError(f"sentence: expected a blank \"_\" in it, got {found['sentence']!r:.{_SHOWN}}")
    return {**found, "answer": str(number(row["answer"], "answer", 1, 2))}


def arc(row: Row) -> Document:
    """ARC's own layout; choices have letters, or numbers in some rows."""
    question = fields(row["question"], "question", "stem", "choices")
    choices = objects(question["choices"], "question.choices", "text", "label")
    labels = [text(choice["label"], "question.choices: label") for choice in choices]
    member(row["answerKey"], "answerKey", labels)
    return {
        "question": text(question["stem"], "question.stem"), "answerKey": row["answerKey"],
        "choices": {"text": [text(choice["text"], "question.choices: text") for choice in choices], "label": labels},
    }  # fmt: skip


def openbookqa(row: Row) -> Document:
    """Choices in one text, "(A) ... (B) ..."."""
    pieces = re.split(r"\s*\(([A-D])\) ", " " + text(row["Choices"], "Choices").strip())
    labels, choices = pieces[1::2], pieces[2::2]
    if labels != ["A", "B", "C", "D"]:
        raise ValueError(f"Choices: expected choices (A) to (D), found {labels}")
    key = text(row["Answer Key"], "Answer Key").strip()
    member(key, "Answer Key", labels)
    stem = text(row["Question Stem"], "Question Stem")
    return {"question_stem": stem, "choices": {"text": choices, "label": labels}, "answerKey": key}


def commonsense(row: Row) -> Document:
    """Five choices A to E, which the prompt names so."""
    choices = fields(row["choices"], "choices", "label", "text")
    if choices["label"] != list("ABCDE"):
        raise ValueError(f"choices.label: expected A to E, got {choices['label']!r:.{_SHOWN}}")
    member(row["answerKey"], "answerKey", "ABCDE")
    return {
        "question": text(row["question"], "question"), "answerKey": row["answerKey"],
        "choices": {"label": list("ABCDE"), "text": texts(choices["text"], "choices.text", least=5, most=5)},
    }  # fmt: skip


def commonsense_shot(row: Row) -> Document:
    """The same out of a finished prompt, as examples are published."""
    query = text(row["query"], "query")
    match = re.fullmatch(r"Question: (.*?)\n((?: ?[A-E]\. .*\n)+)Answer:", query, re.DOTALL)
    found = [line.strip()[3:] for line in match.group(2).splitlines()] if match else []
    if len(found) != 5:
        raise ValueError(f"query: expected a question with choices A to E, found {query!r:.{_SHOWN}}")
    choices = {"label": list("ABCDE"), "text": found}
    return {"question": match.group(1), "choices": choices, "answerKey": "ABCDE"[number(row["gold"], "gold", 0, 4)]}


def boolq(row: Row) -> Document:
    """A passage, and a question that is true or false."""
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer: expected true or false, found {row['answer']!r:.{_SHOWN}}")
    return {**texts_of("passage", "question")(row), "label": int(row["answer"])}


def squad(row: Row) -> Document:
    """All references of a question; none, where the passage does not answer it."""
    answers = fields(row["answers"], "answers", "text")
    return {**texts_of("title", "context", "question")(row), "answers": texts(answers["text"], "answers.text")}


# ---- knowledge, mathematics, exams ----


def nq_open(row: Row) -> Document:
    """A question with all answers that count."""
    return {"question": text(row["question"], "question"), "answer": texts(row["answer"], "answer", least=1)}


def trivia(row: Row) -> Document:
    """TriviaQA's own layout, with the answer first among its aliases."""
    answer = fields(row["Answer"], "Answer", "Aliases")
    value = answer.get("Value")
    names = aliases(None if value is None else text(value, "Answer.Value"), texts(answer["Aliases"], "Answer.Aliases"))
    if not names:
        raise ValueError("Answer: expected a Value or Aliases, found neither")
    return {"question": asked(text(row["Question"], "Question")), "answer": {"aliases": names}}


def asked(question: str) -> str:
    """A question of TriviaQA without the mark at its end, which the prompt has."""
    return question.rstrip("?")


def aliases(value: str | None, others: Sequence[str]) -> list[str]:
    """What TriviaQA takes for an answer, the answer itself first."""
    return list(dict.fromkeys(name for name in (value, *others) if name is not None))


def gsm8k(row: Row) -> Document:
    """A solution whose last line is "#### " and a number."""
    found = texts_of("question", "answer")(row)
    if not re.search(r"#### -?\$?[\d.,]*\d", found["answer"]):
        last = found["answer"][-_SHOWN:]
        raise ValueError(f"answer: expected a solution that ends with \"#### \" and a number, got {last!r}")
    return found


def math(row: Row) -> Document:
    """A solution with its answer in a box."""
    found = texts_of("problem", "solution")(row)
    if not re.search(r"\\(boxed|fbox)", found["solution"]):
        raise ValueError(f"solution: expected an answer in \\boxed{{...}}, got {found['solution'][-_SHOWN:]!r}")
    return found


def mmlu(row: Row) -> Document:
    """Four choices, which the prompt calls A to D."""
    choices = texts(row["choices"], "choices", least=4, most=4)
    answer = member(row["answer"], "answer", "ABCD")
    return {"question": text(row["question"], "question"), "choices": choices, "answer": answer}


def agieval(row: Row) -> Document:
    """The columns of the hub's copies, with the prompt of AGIEval's own code."""
    options = texts(row["options"], "options", least=2, most=5)
    passage = f"{text(row['passage'], 'passage')}\n" if row.get("passage") else ""
    letters = "ABCDE"[: len(options)]
    question = text(row["question"], "question")
    query = (
        f"{passage}Q: {question} Answer Choices: {' '.join(options)}\nA: Among A through {letters[-1]}, the answer is"
    )
    return {"query": query, "choices": options, "gold": [member(row["label"], "label", letters)]}


def agieval_shot(row: Row) -> list[Document]:
    """The same out of a Python literal, as examples are published."""
    if not text(row["row"], "row").startswith("sample") or not row["text"]:
        return []  # explanations stand in rows of their own
    try:
        found = ast.literal_eval(text(row["text"], "text"))
    except (SyntaxError, ValueError):
        raise ValueError(f"text: expected a Python literal, got {row['text']!r:.{_SHOWN}}") from None
    return [agieval(fields(found, "text", "question", "options", "label"))]


# ---- code, safety ----


def humaneval(row: Row) -> Document:
    """A function's head, and the tests that its body has to pass."""
    return texts_of("task_id", "prompt", "entry_point", "test", optional=("canonical_solution",))(row)


def mbpp(row: Row) -> Document:
    """A task with its tests, and a solution for examples."""
    found = texts_of("text", "code", optional=("test_setup_code",))(row)
    return {**found, "test_list": texts(row["test_list"], "test_list", least=1)}


def mbpp_shot(row: Row) -> list[Document]:
    """The same, of the tasks that examples are taken from."""
    return [] if number(row["task_id"], "task_id", 1, 10**6) < MBPP_FIRST else [mbpp(row)]


def truthfulqa(row: Row) -> Document:
    """A question with its true and false references."""
    lists = {name: texts(row[name], name, least=1) for name in ("correct_answers", "incorrect_answers")}
    return {**texts_of("question", "best_answer")(row), **lists}
