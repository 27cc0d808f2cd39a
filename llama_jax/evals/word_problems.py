"""Word problems with a number for an answer, as ASDiv, SVAMP and MAWPS are published, and the numbers in answers (Table 15).

    SVAMP    Body, Question, Answer, as a JSON list or on the hub
    ASDiv    body, question, answer ("9 (apples)")
    MAWPS    Question with N_00 for its first number, Numbers, Answer; or sQuestion, lSolutions
    others   question, answer

A file is one JSON list, or what `data.rows` reads: JSONL, Parquet, directories of them or of `datasets`, TFDS. The first row
says which layout it is. Problems whose answer is no single number (a name, a ratio, several numbers) are counted and left out.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.data.dialog import find_tag
from llama_jax.data.rows import Row, read_rows
from llama_jax.evals.local_tasks import json_rows
from llama_jax.evals.tool_calls import readable

TOLERANCE = 1e-3  # as in PAL (Gao et al. 2022): how far an answer may be from the reference
PHRASE = "the answer is"

_NUMBER = re.compile(r"(?<![\w.,/])(-?)\$?(-?)((?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:/([1-9]\d*))?")
_SENTENCE = re.compile(r"[\s:*]*.*?(?:[.!?](?=\s|$)|\n|$)", re.DOTALL)
_UNIT = re.compile(r"\s*\([^()]*\)\s*$")
_PLACE = re.compile(r"\bN_(\d\d)\b")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and the number that answers it."""

    question: str
    answer: float


@dataclasses.dataclass(frozen=True)
class Problems:
    """A set: the problems that are asked, of how many found, and how many of these have no single number for an answer."""

    asked: tuple[Problem, ...]
    found: int
    not_numeric: int


@dataclasses.dataclass(frozen=True)
class _Layout:
    name: str
    fields: tuple[str, ...]
    question: Callable[[Row, str], str]
    answer: str


def read(path: str | Path, *, limit: int = 0) -> Problems:
    """The problems of a file, of a limit above 0 the first so many.

    Raises:
      ValueError, FileNotFoundError: no such rows; names file, row and field, and what was expected.
    """
    layout, problems, found = None, [], 0
    for where, row in _rows(path):
        layout = layout or _layout(row, where)
        for field in layout.fields:
            if field not in row:
                expected = ", ".join(layout.fields)
                raise ValueError(f"{where}: {field}: missing; expected {expected} ({layout.name}), found {', '.join(row)}")
        question = " ".join(layout.question(row, where).split())
        if (tag := find_tag(question)) is not None:
            raise ValueError(f"{where}: the question holds the chat tag {tag!r}, which could forge a turn")
        found += 1
        if (answer := _reference(row[layout.answer], f"{where}: {layout.answer}")) is not None:
            problems.append(Problem(question, answer))
    if not problems:
        raise ValueError(f"{path}: expected problems with a number for an answer, found none in {found:,} rows")
    return Problems(tuple(problems[:limit] if limit else problems), found, found - len(problems))


def read_number(answer: str) -> float | None:
    """The number that an answer gives; None if there is none.

    The last number in the sentence of the last "the answer is"; where no number is, the last of the whole answer. Of a call
    of a tool its result counts, if it has one. Commas of thousands, $ and % are dropped, a fraction is divided out.
    """
    text = readable(answer)
    at = text.lower().rfind(PHRASE)
    said = _SENTENCE.match(text, at + len(PHRASE))[0] if at >= 0 else ""
    numbers = list(_NUMBER.finditer(said)) or list(_NUMBER.finditer(text))
    return _float(numbers[-1]) if numbers else None


def is_correct(value: float | None, answer: float) -> bool:
    """Whether a number is the reference, within TOLERANCE; none is wrong."""
    return value is not None and abs(value - answer) <= TOLERANCE


def _float(number: re.Match[str]) -> float:
    value = float(number[3].replace(",", "")) / float(number[4] or 1)
    return -value if number[1] or number[2] else value


def _rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    file = Path(path)
    if file.suffix == ".json" and file.is_file():
        with file.open("rb") as opened:
            if opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                return json_rows(file)
    return read_rows(path)


def _reference(value: Any, where: str) -> float | None:
    """The number of a published answer; None if it is none, or not one alone."""
    if isinstance(value, list):  # MAWPS: the solutions of an equation
        if len(value) != 1:
            return None
        value = value[0]
    if type(value) in (int, float):
        return float(value) if math.isfinite(value) else None
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a number or a text, got {type(value).__name__}")
    number = _NUMBER.fullmatch(_UNIT.sub("", value).strip().removesuffix("%").strip())
    return _float(number) if number else None


def _layout(row: Row, where: str) -> _Layout:
    for layout in _LAYOUTS:
        if all(field in row for field in layout.fields):
            return layout
    nearest = max(_LAYOUTS, key=lambda layout: sum(field in row for field in layout.fields))
    missing = next(field for field in nearest.fields if field not in row)
    expected = "; or ".join(f"{', '.join(layout.fields)} ({layout.name})" for layout in _LAYOUTS)
    raise ValueError(f"{where}: {missing}: missing; expected {expected}; found {', '.join(row) or 'no field'}")


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(row[field], str) or not row[field].strip():
        raise ValueError(f"{where}: {field}: expected a text, got {row[field]!r}")
    return row[field]


def _joined(*fields: str) -> Callable[[Row, str], str]:
    """A question that stands in several fields."""
    return lambda row, where: " ".join(_text(row, field, where) for field in fields)


def _filled(row: Row, where: str) -> str:
    """A question with its numbers in their places."""
    given = row["Numbers"]
    numbers = given.split() if isinstance(given, str) else given
    if not isinstance(numbers, list):
        raise ValueError(f"{where}: Numbers: expected a text or a list, got {given!r}")

    def number(place: re.Match[str]) -> str:
        if int(place[1]) >= len(numbers):
            raise ValueError(f"{where}: Question: names {place[0]}, but Numbers has {len(numbers)}")
        return re.sub(r"(?<=\d)\.0+$", "", str(numbers[int(place[1])]))

    return _PLACE.sub(number, _text(row, "Question", where))


# A layout whose fields are among another's comes after it.
_LAYOUTS = (
    _Layout("SVAMP", ("Body", "Question", "Answer"), _joined("Body", "Question"), "Answer"),
    _Layout("ASDiv", ("body", "question", "answer"), _joined("body", "question"), "answer"),
    _Layout("MAWPS", ("Question", "Numbers", "Answer"), _filled, "Answer"),
    _Layout("MAWPS", ("sQuestion", "lSolutions"), _joined("sQuestion"), "lSolutions"),
    _Layout("plain", ("question", "answer"), _joined("question"), "answer"),
)
