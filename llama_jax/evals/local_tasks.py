"""Benchmarks from local files: `--data_dir` holds JSONL files, and each becomes what the harness's own task reads from the hub.

A layout names the files, the columns they must have, and how a row becomes the document that prompt and metric know. Files may
end in `.jsonl`, `.jsonl.gz` or, as some are published, `.json`; a missing column, or a value that cannot be scored
(`local_rows.py`), is an error that names file, line and column.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.data.rows import Row, read_jsonl
from llama_jax.evals import local_rows, long_context, quac
from llama_jax.evals.groups import plain

Document = dict[str, Any]
_KINDS = {str: "a text", bool: "true or false", int | float: "a number", list: "a list", dict: "an object"}
_ENDINGS = (".jsonl", ".jsonl.gz", ".json")


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
    kinds: dict[str, str] = {}
    for where, row in rows:
        for column in file.columns:
            if not any(name in row for name in column.split("|")):
                expected, missing = (text.replace("|", " or ") for text in (", ".join(file.columns), column))
                raise ValueError(f"{where}: {missing}: missing; expected the columns {expected}, found {', '.join(row)}")
        if file.only and row[file.only[0]] != file.only[1]:
            continue
        try:
            found = file.document(row)
            found = found if isinstance(found, list) else [found]
            for document in found:
                _check_kinds(document, kinds)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{where}: cannot be read as a row of {file.name}: {type(error).__name__}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        out += found
    return out


def _check_kinds(document: Document, kinds: dict[str, str]) -> None:
    """Refuses a field that is a number in one row and a text in another, which no table can hold; `kinds` is filled."""
    for name, value in document.items():
        kind = next((words for of, words in _KINDS.items() if isinstance(value, of)), None)
        if kind and kinds.setdefault(name, kind) != kind:
            raise ValueError(f"{name}: expected {kinds[name]} as in the rows before, got {value!r:.80}")


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


# ---- the table ----

_ARC_COLUMNS = ("question", "answerKey")
_LAYOUTS: dict[str, Layout | Callable[[str], Layout]] = {
    "hellaswag": Layout(File("hellaswag_val", ("query", "choices", "gold"), local_rows.hellaswag)),
    "piqa": Layout(File("piqa_valid", ("goal", "sol1", "sol2", "label"), local_rows.piqa)),
    "siqa": Layout(File("siqa_valid", ("context", "question", "answerA", "answerB", "answerC", "label"), local_rows.siqa)),
    "winogrande": Layout(File("winogrande_xl_valid", ("sentence", "option1", "option2", "answer"), local_rows.winogrande)),
    "arc_easy": Layout(File("arc_easy_test", _ARC_COLUMNS, local_rows.arc)),
    "arc_challenge": Layout(File("arc_challenge_test", _ARC_COLUMNS, local_rows.arc)),
    "openbookqa": Layout(File("openbookqa_test", ("Question Stem", "Choices", "Answer Key"), local_rows.openbookqa)),
    "commonsense_qa": Layout(
        File("commonsenseqa_valid", ("question", "choices", "answerKey"), local_rows.commonsense),
        File("commonsenseqa_train_exemplars", ("query", "gold"), local_rows.commonsense_shot),
    ),
    "boolq": Layout(File("boolq_valid", ("question", "answer", "passage"), local_rows.boolq)),
    "squad": Layout(
        File("squad_v2_dev", ("title", "context", "question", "answers"), local_rows.squad),
        unit=lambda document: document["context"],
    ),
    "quac": Layout(
        (File("quac_val_v0.2", ("title", "paragraphs"), quac.article),
         File("quac_sample", ("title", "context", "qas"), quac.turns, part=True)),
        unit=lambda document: document["context"],
    ),
    "nq_open": Layout(
        File("nq_open_dev", ("question", "answer"), local_rows.nq_open),
        File("nq_open_exemplars_64", ("question", "answer"), local_rows.nq_open),
    ),
    "triviaqa": Layout(
        whole_or_part("triviaqa", "triviaqa_sample", ("Question", "Answer"), local_rows.trivia),
        unit=lambda document: document["question"],
    ),
    "gsm8k": Layout(File("gsm8k_test", ("question", "answer"), local_rows.gsm8k)),
    "math": lambda subject: Layout(
        File("math_test", ("subject", "problem", "solution"), local_rows.math, only=("subject", subject)), prepared=True
    ),
    "mmlu": lambda subject: Layout(
        whole_or_part(
            "mmlu", "mmlu_test_20_per_subject", ("subject", "question", "choices", "answer"), local_rows.mmlu,
            ("subject", subject),
        ),
        File("mmlu_dev_5shot", ("subject", "question", "choices", "answer"), local_rows.mmlu, ("subject", subject)),
    ),
    "bbh": lambda task: Layout(
        whole_or_part(
            "bbh", "bbh_25_per_task", ("task", "input", "target"), local_rows.texts_of("input", "target"), ("task", task)
        )
    ),
    "agieval": lambda task: Layout(
        whole_or_part(
            "agieval", "agieval_english_60_per_task", ("task", "question", "options", "label"), local_rows.agieval,
            ("task", task),
        ),
        File(
            "agieval_few_shot_prompts", ("task", "row", "text"), local_rows.agieval_shot,
            ("task", task.removesuffix("-without-passage")),
        ),
        fewer=True,
    ),
    "humaneval": Layout(File("humaneval", ("task_id", "prompt", "entry_point", "test"), local_rows.humaneval)),
    "mbpp": Layout(
        whole_or_part("mbpp_test", "mbpp_test_11_310", ("text", "code", "test_list"), local_rows.mbpp),
        File("mbpp_prompt_tasks_1_10", ("task_id", "text", "code", "test_list"), local_rows.mbpp_shot),
    ),
    **{
        part: Layout(File(f"scrolls_{part}", long_context.COLUMNS, long_context.checked(part)), prepared=True)
        for part in long_context.PARTS
    },
    "truthfulqa": Layout(
        File("truthfulqa", ("question", "best_answer", "correct_answers", "incorrect_answers"), local_rows.truthfulqa)
    ),
}  # fmt: skip
