"""Benchmarks from local files: `--data_dir` holds JSONL files, and each becomes what the harness's own task reads from the hub.

A layout names the files, the columns they must have, and how a row becomes the document that prompt and metric know. Files may
end in `.jsonl`, `.jsonl.gz` or, as some are published, `.json`; a missing column is an error that names file, line and column.
"""

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.data.rows import Row, read_jsonl
from llama_jax.evals import long_context, quac
from llama_jax.evals.groups import plain

Document = dict[str, Any]
_ENDINGS = (".jsonl", ".jsonl.gz", ".json")
MBPP_FIRST = 2  # of the ten tasks for prompts; its paper's, and everybody's, are 2, 3 and 4


@dataclasses.dataclass(frozen=True)
class File:
    """A file of rows: its name without ending, the columns they need, and the document that a row becomes.

    A column "text|prompt" may have either name.
    """

    name: str
    columns: tuple[str, ...]
    document: Callable[[Row], Document | list[Document]] = dict
    only: tuple[str, str] = ()  # a column and the value that rows of this task have in it
    part: bool = False  # by its name it holds some of the set's rows, which a report has to say


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rows that are scored, and those of the examples before them.

    `test`: of several files, the first that is there.
    `unit`: without a file of examples, the first scored rows become examples, one of each unit (a passage, a dialog), and the
      unit's other rows are left out of the score too: they tell of its answers.
    `fewer`: a task may have fewer examples than are asked for, and then takes all (AGIEval has 3 to 5).
    `prepared`: rows are the hub's own, and are prepared as those are (MATH: the answer out of the solution).
    """

    test: File | tuple[File, ...]
    shots: File | None = None
    unit: Callable[[Document], str] | None = None
    fewer: bool = False
    prepared: bool = False


def whole_or_part(whole: str, part: str, *how: Any) -> tuple[File, File]:
    """A set under its own name, else the part of it that is published under another; `how`: what both have of `File`."""
    return File(whole, *how), dataclasses.replace(File(part, *how), part=True)


def find(data_dir: str | Path, *names: str) -> Path:
    """The file of the first of these names that is there. FileNotFoundError saying what was expected."""
    for name in names:
        for ending in _ENDINGS:
            if (path := Path(data_dir) / (name + ending)).is_file():
                return path
    expected = ", ".join(name + ending for name in names for ending in _ENDINGS[:-1])
    raise FileNotFoundError(f"{data_dir}: expected {expected} or {names[-1]}{_ENDINGS[-1]} in it")


def pick(data_dir: str | Path, files: File | tuple[File, ...]) -> File:
    """Of several layouts of one set, the one whose file is there. FileNotFoundError."""
    files = files if isinstance(files, tuple) else (files,)
    name = find(data_dir, *(file.name for file in files)).name
    return next(file for file in files if name in [file.name + ending for ending in _ENDINGS])


def read(data_dir: str | Path, files: File | tuple[File, ...]) -> list[Document]:
    """The documents of a file, in order.

    Raises:
      ValueError: a row without one of the columns, or one that cannot be read as this benchmark's.
    """
    file = pick(data_dir, files)
    path = find(data_dir, file.name)
    found = documents(read_jsonl(path) if path.suffix != ".json" else json_rows(path), file)
    if not found:
        kind = f" with {file.only[0]} {file.only[1]!r}" if file.only else ""
        raise ValueError(f"{path}: expected rows{kind}, found none")
    return found


def documents(rows: Iterable[tuple[str, Row]], file: File) -> list[Document]:
    """The documents of (where, row) pairs, wherever they come from. ValueError as for `read`."""
    out: list[Document] = []
    for where, row in rows:
        for column in file.columns:
            if not any(name in row for name in column.split("|")):
                expected, missing = (text.replace("|", " or ") for text in (", ".join(file.columns), column))
                raise ValueError(f"{where}: {missing}: missing; expected the columns {expected}, found {', '.join(row)}")
        if file.only and row[file.only[0]] != file.only[1]:
            continue
        try:
            found = file.document(row)
        except (KeyError, IndexError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{where}: cannot be read as a row of {file.name}: {type(error).__name__}: {error}") from None
        out += found if isinstance(found, list) else [found]
    return out


def json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file that is one JSON list, or has it as "data"."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, or an object with one as \"data\"")
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def hold_out(
    rows: list[Document], count: int, unit: Callable[[Document], str], where: str
) -> tuple[list[Document], list[Document]]:
    """(examples, scored): the last document of each of the first units, and the documents of all other units.

    Raises:
      ValueError: nothing would be left to score.
    """
    last = {unit(document): document for document in rows}
    shown = list(last)[:count]
    if len(last) <= count:
        raise ValueError(f"{where}: expected more than {count} passages to take {count} examples from, found {len(last)}")
    return [last[key] for key in shown], [document for document in rows if unit(document) not in shown]


def settings(data_dir: str | Path, layout: Layout, shots: int) -> dict[str, Any]:
    """What a task's settings need to read the files in place of the hub's data set."""
    datasets = {"test": read(data_dir, layout.test)}
    if shots and layout.shots is not None:
        datasets["shots"] = read(data_dir, layout.shots)
        if len(datasets["shots"]) < shots and not layout.fewer:
            name = find(data_dir, layout.shots.name)
            raise ValueError(f"{name}: expected at least {shots} examples, found {len(datasets['shots'])}")
    elif shots and layout.unit is not None:
        where = str(find(data_dir, pick(data_dir, layout.test).name))
        datasets["shots"], datasets["test"] = hold_out(datasets["test"], shots, layout.unit, where)

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset  # an extra

        return {split: Dataset.from_list(rows) for split, rows in datasets.items()}

    few = {"fewshot_split": None}
    if "shots" in datasets:
        count = min(shots, len(datasets["shots"]))
        few = {"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": count}
    return {
        "custom_dataset": load, "dataset_kwargs": None, "test_split": "test", "validation_split": None, "training_split": None,
        "metadata": None, **({} if layout.prepared else {"process_docs": None}), **few,
    }  # fmt: skip


def layout(task: str) -> Layout | None:
    """The layout of a task of `evals/tasks.py`; None where there is none."""
    family, _, part = plain(task).partition(":")
    return _LAYOUTS[family](part) if callable(_LAYOUTS.get(family)) else _LAYOUTS.get(family)


# ---- rows to documents ----


def _arc(row: Row) -> Document:
    question = row["question"]
    choices = question["choices"]
    return {
        "question": question["stem"], "answerKey": row["answerKey"],
        "choices": {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]},
    }  # fmt: skip


def _openbookqa(row: Row) -> Document:
    pieces = re.split(r"\s*\(([A-D])\) ", " " + row["Choices"].strip())
    labels, texts = pieces[1::2], pieces[2::2]
    if labels != ["A", "B", "C", "D"]:
        raise ValueError(f"expected choices (A) to (D), found {labels}")
    return {"question_stem": row["Question Stem"], "choices": {"text": texts, "label": labels}, "answerKey": row["Answer Key"]}


def _commonsense_shot(row: Row) -> Document:
    match = re.fullmatch(r"Question: (.*?)\n((?: ?[A-E]\. .*\n)+)Answer:", row["query"], re.DOTALL)
    texts = [line.strip()[3:] for line in match.group(2).splitlines()] if match else []
    if len(texts) != 5:
        raise ValueError(f"query: expected a question with choices A to E, found {row['query'][:80]!r}")
    choices = {"label": list("ABCDE"), "text": texts}
    return {"question": match.group(1), "choices": choices, "answerKey": "ABCDE"[row["gold"]]}


def _hellaswag(row: Row) -> Document:
    return {"query": row["query"], "choices": row["choices"], "label": int(row["gold"])}


def _boolq(row: Row) -> Document:
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer: expected true or false, found {row['answer']!r}")
    return {"passage": row["passage"], "question": row["question"], "label": int(row["answer"])}


def _mmlu(row: Row) -> Document:
    return {"question": row["question"], "choices": row["choices"], "answer": "ABCD".index(row["answer"])}


def _mbpp_shot(row: Row) -> list[Document]:
    return [] if row["task_id"] < MBPP_FIRST else [dict(row)]


def _squad(row: Row) -> Document:
    texts = row["answers"]["text"]
    return {"title": row["title"], "context": row["context"], "question": row["question"], "answers": list(texts)}


def _trivia(row: Row) -> Document:
    answer = row["Answer"]
    return {"question": asked(row["Question"]), "answer": {"aliases": aliases(answer.get("Value"), answer["Aliases"])}}


def asked(question: str) -> str:
    """A question of TriviaQA without the mark at its end, which the prompt has."""
    return question.rstrip("?")


def aliases(value: str | None, others: Sequence[str]) -> list[str]:
    """What TriviaQA takes for an answer, the answer itself first."""
    return list(dict.fromkeys(name for name in (value, *others) if name is not None))


def _agieval(row: Row) -> Document:
    """The columns of the hub's copies, with the prompt of AGIEval's own code."""
    options = row["options"]
    passage = f"{row['passage']}\n" if row.get("passage") else ""
    letters = f"A through {'ABCDE'[len(options) - 1]}"
    query = f"{passage}Q: {row['question']} Answer Choices: {' '.join(options)}\nA: Among {letters}, the answer is"
    return {"query": query, "choices": list(options), "gold": ["ABCDE".index(row["label"])]}


def _agieval_shot(row: Row) -> list[Document]:
    if not row["row"].startswith("sample") or not row["text"]:
        return []  # explanations stand in rows of their own
    return [_agieval(ast.literal_eval(row["text"]))]


def _bbh(row: Row) -> Document:
    return {"input": row["input"], "target": row["target"]}


_ARC_COLUMNS = ("question", "answerKey")
_LAYOUTS: dict[str, Layout | Callable[[str], Layout]] = {
    "hellaswag": Layout(File("hellaswag_val", ("query", "choices", "gold"), _hellaswag)),
    "piqa": Layout(File("piqa_valid", ("goal", "sol1", "sol2", "label"))),
    "siqa": Layout(File("siqa_valid", ("context", "question", "answerA", "answerB", "answerC", "label"))),
    "winogrande": Layout(File("winogrande_xl_valid", ("sentence", "option1", "option2", "answer"))),
    "arc_easy": Layout(File("arc_easy_test", _ARC_COLUMNS, _arc)),
    "arc_challenge": Layout(File("arc_challenge_test", _ARC_COLUMNS, _arc)),
    "openbookqa": Layout(File("openbookqa_test", ("Question Stem", "Choices", "Answer Key"), _openbookqa)),
    "commonsense_qa": Layout(
        File("commonsenseqa_valid", ("question", "choices", "answerKey")),
        File("commonsenseqa_train_exemplars", ("query", "gold"), _commonsense_shot),
    ),
    "boolq": Layout(File("boolq_valid", ("question", "answer", "passage"), _boolq)),
    "squad": Layout(
        File("squad_v2_dev", ("title", "context", "question", "answers"), _squad), unit=lambda document: document["context"]
    ),
    "quac": Layout(
        (File("quac_val_v0.2", ("title", "paragraphs"), quac.article),
         File("quac_sample", ("title", "context", "qas"), quac.turns, part=True)),
        unit=lambda document: document["context"],
    ),
    "nq_open": Layout(File("nq_open_dev", ("question", "answer")), File("nq_open_exemplars_64", ("question", "answer"))),
    "triviaqa": Layout(
        whole_or_part("triviaqa", "triviaqa_sample", ("Question", "Answer"), _trivia),
        unit=lambda document: document["question"],
    ),
    "gsm8k": Layout(File("gsm8k_test", ("question", "answer"))),
    "math": lambda subject: Layout(
        File("math_test", ("subject", "problem", "solution"), only=("subject", subject)), prepared=True
    ),
    "mmlu": lambda subject: Layout(
        whole_or_part(
            "mmlu", "mmlu_test_20_per_subject", ("subject", "question", "choices", "answer"), _mmlu, ("subject", subject)
        ),
        File("mmlu_dev_5shot", ("subject", "question", "choices", "answer"), _mmlu, ("subject", subject)),
    ),
    "bbh": lambda task: Layout(whole_or_part("bbh", "bbh_25_per_task", ("task", "input", "target"), _bbh, ("task", task))),
    "agieval": lambda task: Layout(
        whole_or_part(
            "agieval", "agieval_english_60_per_task", ("task", "question", "options", "label"), _agieval, ("task", task)
        ),
        File(
            "agieval_few_shot_prompts", ("task", "row", "text"), _agieval_shot,
            ("task", task.removesuffix("-without-passage")),
        ),
        fewer=True,
    ),
    "humaneval": Layout(File("humaneval", ("task_id", "prompt", "entry_point", "test"))),
    "mbpp": Layout(
        whole_or_part("mbpp_test", "mbpp_test_11_310", ("text", "code", "test_list")),
        File("mbpp_prompt_tasks_1_10", ("task_id", "text", "code", "test_list"), _mbpp_shot),
    ),
    **{
        part: Layout(File(f"scrolls_{part}", long_context.COLUMNS, long_context.checked(part)), prepared=True)
        for part in long_context.PARTS
    },
    "truthfulqa": Layout(File("truthfulqa", ("question", "best_answer", "correct_answers", "incorrect_answers"))),
}  # fmt: skip
