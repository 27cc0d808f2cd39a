"""Calls of tools in an answer, and the tools: a calculator and a search in given documents (section 5.1, Table 15, Fig. 23).

A call is `<calculator>3 * 4</calculator>`; behind it comes ` <result>12</result>`. A call that its tool cannot carry out has a
result that begins with "error:" and holds no digit, so that it is never read as an answer.
"""

import ast
import dataclasses
import logging
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.dialog import TAGS

Tool = Callable[[str], str]  # what stands in a call -> its result; CallError
NAMES = ("calculator", "search")
ERROR = "error: "

_LONGEST = 200  # characters of an expression, which also bounds its depth
_LARGEST, _EXPONENT = 1e15, 64  # of every number on the way: floats count exactly up to there
_SHOWN = 600  # characters of a document that a model is shown

_WRITTEN = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**"}
_ARITHMETIC = re.compile(r"(?:sqrt|round|[0-9.,+\-*/%()\s])*")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS = {"sqrt": (math.sqrt, 1), "round": (round, 2)}  # and how many arguments they have at most
_FINISHED = re.compile(r"<(calculator|search)>((?:(?!</?(?:calculator|search)>).)*)</\1> <result>(.*?)</result>", re.DOTALL)
_UNFINISHED = re.compile(r"<calculator>[0-9.,+\-*/%()$ ]*|</?(?:calculator|search|result)>")


class CallError(ValueError):
    """Why a call has no result, in words for the model."""


def opening(tool: str) -> str:
    """How a call begins."""
    return f"<{tool}>"


def closing(tool: str) -> str:
    """How it ends."""
    return f"</{tool}>"


def result_text(result: str) -> str:
    """What is put behind a call; tags in the result, of calls as of the chat format, are broken up."""
    tags = [form(name) for name in (*NAMES, "result") for form in (opening, closing)]
    for tag in (*TAGS, *tags):
        result = result.replace(tag, f"{tag[0]} {tag[1:]}")
    return f" <result>{result}</result>"


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that was made: well-formed, with its result, or malformed, and then without tool."""

    tool: str
    argument: str
    result: str

    @property
    def failed(self) -> bool:
        """Whether a well-formed call could not be carried out."""
        return bool(self.tool) and self.result.startswith(ERROR)


def first_end(text: str, tools: Sequence[str]) -> int:
    """Where the first call in a text has ended, with its tag; -1 where none has."""
    ends = [at + len(closing(tool)) for tool in tools if (at := text.find(closing(tool))) >= 0]
    return min(ends, default=-1)


def carry_out(text: str, tools: Mapping[str, Tool]) -> tuple[Call, int]:
    """The call that a text ends with, carried out, and how many beginnings of calls before it were never ended.

    An end without a beginning is malformed: the model is told so.
    """
    tool = next(name for name in tools if text.endswith(closing(name)))
    before, begins, argument = text.removesuffix(closing(tool)).rpartition(opening(tool))
    if not begins:
        return Call("", "", f"{ERROR}this call has no beginning"), unended(text, tools)
    try:
        result = tools[tool](argument)
    except CallError as error:
        result = f"{ERROR}{error}"
    return Call(tool, argument, result), unended(before + argument, tools)


def unended(text: str, tools: Sequence[str]) -> int:
    """How many calls begin in a text that ends none."""
    return sum(text.count(opening(tool)) for tool in tools)


def readable(answer: str) -> str:
    """An answer without its calls: results stand in their place, but for errors, and what a model asked is no answer."""
    said = _FINISHED.sub(lambda call: "" if call[3].startswith(ERROR) else call[3], answer)
    return _UNFINISHED.sub("", said)


def marked(answer: str) -> str:
    """An answer for people, with its calls as «calculator: 3 * 4 → 12»."""
    return _FINISHED.sub(lambda call: f"«{call[1]}: {call[2].strip()} → {call[3]}»", answer)


# ---- the calculator ----


def calculator(expression: str) -> str:
    """The value of an arithmetic expression with at most ten decimals. Numbers may have $ and thousands separators.

    Nothing is evaluated but numbers, + - * / // % **, parentheses, sqrt and round, up to 1e15 and to exponents of 64.

    Raises:
      CallError: it is no such expression, has no value, or a number on the way is too large.
    """
    text = expression.strip().rstrip("=").strip().replace("$", "")
    for written, meant in _WRITTEN.items():
        text = text.replace(written, meant)
    text = re.sub(r"(?<=\d)\s*x\s*(?=\d)", "*", text)
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    if not text or len(text) > _LONGEST or not _ARITHMETIC.fullmatch(text):
        raise CallError("not an arithmetic expression")
    try:
        value = _value(ast.parse(" ".join(text.split()), mode="eval").body)
    except ZeroDivisionError:
        raise CallError("division by zero") from None
    except OverflowError:
        raise CallError("a number is too large") from None
    except CallError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: of the parser, at thousands of brackets
        raise CallError("not an arithmetic expression") from None
    if isinstance(value, int):
        return str(value)
    decimals = f"{value:.10f}".rstrip("0").rstrip(".")
    return "0" if decimals == "-0" else decimals


def _value(node: ast.AST) -> int | float:
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return _bounded(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _value(left), _value(right)
            if isinstance(op, ast.Pow) and abs(b) > _EXPONENT:
                raise CallError("an exponent is too large")
            return _bounded(_BINARY[type(op)](a, b))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            function, most = _FUNCTIONS[name]
            if not 1 <= len(args) <= most:
                raise CallError(f"the wrong number of arguments for {name}")
            values = [_value(arg) for arg in args]
            if name == "sqrt" and values[0] < 0:
                raise CallError("the root of a negative number")
            try:
                return _bounded(function(*values))
            except TypeError:
                raise CallError("digits after the point are a whole number") from None
    raise CallError("not an arithmetic expression")


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex):
        raise CallError("the root of a negative number")
    if not math.isfinite(value) or abs(value) > _LARGEST:
        raise CallError("a number is too large")
    return value


# ---- the search ----


class Search:
    """The best of some documents for a query, by BM25 as Lucene counts it."""

    def __init__(self, documents: Sequence[Mapping[str, str]]):
        """`documents` have a `title` and a `text`. ModuleNotFoundError without the extra [tools]."""
        try:
            import bm25s  # asks JAX for a device while it is imported
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"searching documents needs the package {error.name}: pip install 'llama_jax[tools]'"
            ) from None
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG
        self._documents = list(documents)
        self._index = bm25s.BM25(method="lucene")
        self._index.index([_words(f"{row['title']} {row['text']}") for row in self._documents], show_progress=False)

    def __call__(self, query: str) -> str:
        """Title and beginning of the best document, on one line; of several, the first."""
        known = self._index.get_tokens_ids(_words(query))
        scores = self._index.get_scores_from_ids(known) if known else np.zeros(1)
        best = int(np.argmax(scores))
        if scores[best] <= 0:
            raise CallError("nothing was found")
        return " ".join(self._shown(self._documents[best]))

    @staticmethod
    def _shown(row: Mapping[str, str]) -> Iterator[str]:
        yield f"{row['title']}:"
        left = _SHOWN
        for word in row["text"].split():
            left -= len(word) + 1
            if left < 0:
                yield "..."
                return
            yield word


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
