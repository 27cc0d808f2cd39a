"""The open preference sets of the paper's Table 6, read in the layouts in which they were published (section 3.2.1), and ours.

`read_open_set` yields comparisons in our own shape. Human data are noisy: a row without a usable comparison (a tie, an empty
answer, turns that do not alternate, a chat tag in the text) is left out and counted by reason, as the paper's counts leave
ties out too. A file of another layout is an error that names file, row and field.

`read_our_set` yields those of a file of ours, where every such row is an error. With `leave_out` either leaves out whatever is
no comparison, down to a line that is no JSON, and counts it; a set of which nothing is left is an error still.

What the published sets leave open, and what is done here:
1. Only Anthropic's and Meta's sets have several turns. The prompt is everything that chosen and rejected share up to the last
   answer; a pair that differs before it is left out.
2. OpenAI's summaries: the post in the layout of Stiennon et al. (2020), ending in `TL;DR:`.
3. StackExchange as published by H4 has many answers with a score each: the best is compared with the worst.
4. None of them has a four-point rating, so rows have none (margin 0). Safety prompts are those of Anthropic Harmless.
"""

import collections
import dataclasses
import html
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llama_jax.data.rows import Row, read_rows
from llama_jax.data.sources import REJECTED_SAFE, comparison

_DETAIL = re.compile(r", got |; found |; the row has |, found |, column | \(byte |(?<=malformed JSON): ")  # ends a complaint
_INDEX = re.compile(r"\[\d+\]")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_TAG = re.compile(r"<[^>]*>")
_BLOCK = re.compile(r"</?(?:p|pre|br|li|ul|ol|blockquote|h[1-6]|hr|div|table|tr)\b[^>]*>", re.IGNORECASE)


class LeftOut(Exception):
    """A row of a known layout that holds no usable comparison; the message is the reason."""


@dataclasses.dataclass
class ComparisonSet:
    """Iterates over the comparisons of a data set once; then says how many rows had none.

    Attributes:
      path: the data set.
      read: a row, and where it stands, to the comparison in it.
      leave_out: whether rows that `read` refuses by a ValueError are left out, too.
      rows: how many there were.
      left_out: reason -> how many of them had no comparison.
      first: reason -> where the first of those stands.
    """

    path: str
    read: Callable[[Row, str], Row]
    leave_out: bool = False
    rows: int = 0
    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        for where, row in read_rows(self.path, refuse=self._refuse):
            try:
                made = self.read(row, where)
            except LeftOut as reason:
                self._count(str(reason), where)
            except ValueError as error:
                self._refuse(where, error)
            else:
                self.rows += 1
                yield made
        if self.leave_out and self.rows and self.rows == self.left_out.total():
            ((reason, count),) = self.left_out.most_common(1)
            raise ValueError(
                f"{self.path}: expected comparisons, none of its {self.rows} rows holds one; {count} of them: {reason} "
                f"(the first is {self.first[reason]})"
            )

    def _refuse(self, where: str, error: ValueError) -> None:
        if not self.leave_out:
            raise ValueError(f"{error} (--leave_out leaves such rows out and counts them)") from None
        self._count(_reason(error, where), where)

    def _count(self, reason: str, where: str) -> None:
        self.rows += 1
        self.left_out[reason] += 1
        self.first.setdefault(reason, where)


def read_open_set(path: str | os.PathLike, layout: str, *, leave_out: bool = False) -> ComparisonSet:
    """The comparisons of a file, directory, pattern or TFDS name in one of the LAYOUTS.

    Raises:
      ValueError: of an unknown layout; while iterating, of a row of another layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; expected one of {', '.join(LAYOUTS)}")

    def read(row: Row, where: str) -> Row:
        made = {"source": layout, "is_safety": layout == "anthropic_harmless", **LAYOUTS[layout](row, where)}
        try:
            return comparison(made, where)
        except ValueError as error:
            raise LeftOut(_reason(error, where)) from None

    return ComparisonSet(os.fspath(path), read, leave_out)


def read_our_set(path: str | os.PathLike, source: str, *, leave_out: bool = False) -> ComparisonSet:
    """The comparisons of a data set of ours; `source` is the one of rows that name none.

    Raises:
      ValueError: while iterating, of a row that is no comparison.
    """

    def read(row: Row, where: str) -> Row:
        made = comparison(row, where)
        if made["safety_bin"] == REJECTED_SAFE:
            raise LeftOut("an unsafe answer is preferred to a safe one")
        return {**made, "source": made["source"] or source}

    return ComparisonSet(os.fspath(path), read, leave_out)


def _reason(error: ValueError, where: str) -> str:
    """The kind of a complaint of the readers, without what is special to the row."""
    text = str(error).removeprefix(f"{where}: ")
    if "same text" in text:
        return "chosen and rejected are the same"
    if "chat tag" in text:
        return "a chat tag in the text"
    if "roles alternate" in text or "expected to end with the user" in text:
        return "turns do not alternate"
    return _INDEX.sub("[]", _DETAIL.split(text)[0])


def _anthropic(row: Row, where: str) -> Row:
    """`chosen` and `rejected`: whole dialogs as one text of `\\n\\nHuman: ...\\n\\nAssistant: ...` turns."""
    chosen, rejected = (_hh_messages(_text(row, side, where), f"{where}: {side}") for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise LeftOut("the dialogs differ before the last answer")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise LeftOut("the dialog does not end with an answer")
    if not all(message["content"] for message in [*chosen, rejected[-1]]):
        raise LeftOut("an empty turn")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _hh_messages(text: str, where: str) -> list[dict[str, str]]:
    head, *parts = _HH_TURN.split(text)
    if head.strip() or not parts:
        raise ValueError(f"{where}: expected turns that begin with '\\n\\nHuman:', got {text[:40]!r}")
    return [{"role": _HH_ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def _summarize(row: Row, where: str) -> Row:
    """`info` (a Reddit post or an article), two `summaries` with `text`, and the number of the better one as `choice`."""
    info, summaries = _get(row, "info", Mapping, where), _get(row, "summaries", list, where)
    choice = _get(row, "choice", int, where)
    if len(summaries) != 2 or choice not in (0, 1):
        raise ValueError(f"{where}: choice: expected 0 or 1 of two summaries, got {choice} of {len(summaries)}")
    texts = [_text(summary, "text", f"{where}: summaries[{i}]").strip() for i, summary in enumerate(summaries)]
    if not all(texts):
        raise LeftOut("an empty turn")
    parts = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"), ("ARTICLE: ", "article")]
    known = {name: _text(info, name, f"{where}: info").strip() for _, name in parts if info.get(name)}
    prompt = "\n\n".join(f"{label}{known[name]}" for label, name in parts if name in known)
    if not prompt:
        raise ValueError(f"{where}: info: expected a post or an article, found {sorted(info)}")
    batch = {"batch": row["batch"]} if isinstance(row.get("batch"), str | int) else {}
    return {"prompt": f"{prompt}\n\nTL;DR:", "chosen": texts[choice], "rejected": texts[1 - choice], **batch}


def _webgpt(row: Row, where: str) -> Row:
    """`question.full_text`, `answer_0` and `answer_1`, and `score_0` = -`score_1`, 0 for a tie."""
    question = _text(_get(row, "question", Mapping, where), "full_text", f"{where}: question")
    answers = [_text(row, f"answer_{i}", where).strip() for i in (0, 1)]
    scores = [_number(row, f"score_{i}", where) for i in (0, 1)]
    return _better(question, answers, scores)


def _stackexchange(row: Row, where: str) -> Row:
    """`question` and either `response_j` (better), `response_k` (paired), or `answers` with `text` and `pm_score` (H4)."""
    question = _text(row, "question", where)
    if "answers" not in row:
        return {"prompt": question, "chosen": _some(row, "response_j", where), "rejected": _some(row, "response_k", where)}
    answers = _get(row, "answers", list, where)
    if len(answers) < 2:
        raise LeftOut("fewer than two answers")
    ranked = sorted(
        ((_number(a, "pm_score", f"{where}: answers[{i}]"), _text(a, "text", f"{where}: answers[{i}]"))
         for i, a in enumerate(answers)), key=lambda pair: pair[0],
    )  # fmt: skip
    texts, scores = [_plain(ranked[-1][1]), _plain(ranked[0][1])], [ranked[-1][0], ranked[0][0]]
    return _better(_plain(question), texts, scores)


def _plain(markup: str) -> str:
    """Text of a post's HTML: tags out, block tags become line ends, entities become characters."""
    text = html.unescape(_TAG.sub("", _BLOCK.sub("\n", markup)))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _shp(row: Row, where: str) -> Row:
    """`history` (a Reddit post), comments `human_ref_A` and `human_ref_B`, and `labels`: 1 where A is preferred."""
    label = _get(row, "labels", int, where)
    if label not in (0, 1):
        raise ValueError(f"{where}: labels: expected 1 (A is preferred) or 0, got {label}")
    a, b = _some(row, "human_ref_A", where), _some(row, "human_ref_B", where)
    return {"prompt": _some(row, "history", where), "chosen": a if label else b, "rejected": b if label else a}


def _gptj(row: Row, where: str) -> Row:
    """`prompt`, `chosen`, `rejected`: one question and two answers, plain texts."""
    return {key: _some(row, key, where) for key in ("prompt", "chosen", "rejected")}


def _better(prompt: str, answers: list[str], scores: list[float]) -> Row:
    if scores[0] == scores[1]:
        raise LeftOut("a tie")
    if not (prompt.strip() and all(answers)):
        raise LeftOut("an empty turn")
    best = int(scores[1] > scores[0])
    return {"prompt": prompt.strip(), "chosen": answers[best], "rejected": answers[1 - best]}


def _get(row: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
    if key not in row:
        raise ValueError(f"{where}: {key}: missing; found {', '.join(sorted(row))}")
    if not isinstance(row[key], kind) or (isinstance(row[key], bool) and kind is not bool):
        raise ValueError(f"{where}: {key}: expected {kind.__name__}, got {type(row[key]).__name__}")
    return row[key]


def _text(row: Any, key: str, where: str) -> str:
    return _get(row, key, str, where)


def _some(row: Mapping[str, Any], key: str, where: str) -> str:
    text = _text(row, key, where).strip()
    if not text:
        raise LeftOut("an empty turn")
    return text


def _number(row: Any, key: str, where: str) -> float:
    is_whole = isinstance(row, Mapping) and isinstance(row.get(key), int)
    return float(_get(row, key, int if is_whole else float, where))


# Name -> reader of one row. The order is Table 6's.
LAYOUTS: dict[str, Callable[[Row, str], Row]] = {
    "anthropic_helpful": _anthropic,
    "anthropic_harmless": _anthropic,
    "openai_summarize": _summarize,
    "openai_webgpt": _webgpt,
    "stackexchange": _stackexchange,
    "stanford_shp": _shp,
    "synthetic_gptj": _gptj,
}
