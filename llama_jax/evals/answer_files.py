"""Answers of models to a prompt set, as files: what people and judges compare (paper section 3.4).

    {"messages": [...], "answer": str, "is_safety": bool, "category": str, "risk": str, "ended": bool, "less_room": bool}

`prompt` (a text or messages) may stand for `messages`; all but messages and answer may be missing. `ended` is false for an
answer that was still going on when its tokens were used up, `less_room` true where the context left it fewer than was asked.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.data.dialog import Message, check_messages, prompt_key
from llama_jax.data.sources import read_jsonl


@dataclasses.dataclass(frozen=True)
class Answered:
    """A prompt and one model's answer to it."""

    messages: tuple[Message, ...]
    answer: str
    is_safety: bool = False
    category: str = ""
    risk: str = ""
    ended: bool = True
    less_room: bool = False

    @property
    def turns(self) -> int:
        """User messages of the prompt."""
        return sum(message["role"] == "user" for message in self.messages)

    @property
    def words(self) -> int:
        """Words of the prompt."""
        return sum(len(message["content"].split()) for message in self.messages)


def read_answers(path: str | os.PathLike) -> list[Answered]:
    """All answers of a file; a ValueError names file, line and field."""
    answers, places = [], {}
    for where, row in read_jsonl(path):
        answer = answered(row, where)
        if (before := places.setdefault(prompt_key(answer.messages), where)) != where:
            raise ValueError(f"{where}: messages: the same prompt as {before}; expected one answer to each")
        answers.append(answer)
    if not answers:
        raise ValueError(f"{path}: no answers in it")
    return answers


def answered(row: Mapping[str, Any], where: str) -> Answered:
    """One row as `Answered`, checked."""
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    check_messages(messages, where)
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: messages: expected to end with the user; the answer stands in `answer`")
    fields = {"answer": str, "is_safety": bool, "category": str, "risk": str, "ended": bool, "less_room": bool}
    values = {}
    for name, kind in fields.items():
        value = row.get(name)
        if value is None and name != "answer":
            continue
        if not isinstance(value, kind):
            raise ValueError(f"{where}: {name}: expected a {kind.__name__}, got {value!r}")
        values[name] = value
    return Answered(tuple(messages), **values)


def under(system: str, messages: Sequence[Message]) -> list[Message]:
    """A prompt under the system message of who answers it, unless that is empty."""
    return [{"role": "system", "content": system}, *messages] if system else list(messages)


def answer_room(prompt: int, *, max_tokens: int, max_length: int) -> int:
    """How many tokens an answer may have after a prompt of so many; 0 where that is too long.

    Where `max_tokens` do not fit, a quarter of the context has to be left, as in `evals/harness.py`: an answer that cannot be
    given says nothing of a model (the paper drops longer prompts, A.3.7).
    """
    room = min(max_tokens, max_length - prompt)
    return room if room >= min(max_tokens, max(max_length // 4, 1)) else 0


def pair_up(first: Sequence[Answered], second: Sequence[Answered], names: tuple[str, str]) -> list[tuple[Answered, Answered]]:
    """Both answers to each prompt, in the first's order; ValueError if the prompts differ."""
    other = {prompt_key(answer.messages): answer for answer in second}
    missing = [a for a in first if prompt_key(a.messages) not in other]
    if missing or len(first) != len(second):
        example = repr(missing[0].messages[-1]["content"][:60]) if missing else f"{len(first)} prompts against {len(second)}"
        raise ValueError(f"{names[1]}: expected answers to the same prompts as {names[0]}; differs in {example}")
    return [(answer, other[prompt_key(answer.messages)]) for answer in first]
