"""Dialogs, prompts and comparisons from data sets (paper sections 3.1, 3.2.1 and 3.2.3), read strictly.

Rows come from JSONL, Parquet, Hugging Face and TFDS (`data.rows`), in the shapes that TRL and its neighbours write. The readers
return plain dicts in the first shape of each kind with every known field filled in; fields they do not know are kept, unless
they look like a known one, misspelt, which the row lacks. Whatever is wrong ends in one ValueError that names file, row and
field.

    dialog      {"messages": [...], "source": str, "is_safety": bool, "prompt_messages": int, "train_on": "all" | "last" |
                null}, the last message from the assistant; {"prompt": str | [...], "completion": str | [...]} may stand for
                `messages`: then answers inside the prompt are not trained on
    prompt      {"messages": [...], "reference": str | null, "is_safety": bool, "source": str, "kind": str,
                "object": str}, the last message from the user; `prompt` may stand for `messages`, and so may what the whole
                dialogs `chosen` and `rejected` of a comparison have in common
    comparison  {"prompt": [...], "chosen": str, "rejected": str, "rating", "margin", "is_safety", "safety_bin", "source",
                "batch"}; `messages` or `conversations` may stand for `prompt`, messages for texts, and without a prompt
                `chosen` and `rejected` are two whole dialogs that differ in the last answer

A text that stands for messages is one user message (or one answer). A message is {"role", "content"} or ShareGPT's {"from",
"value"}, and `conversations` is another name of `messages`. An answer with OpenAI's "weight": 0 is not trained on. A field that
is null is missing. A missing reference, rating, margin, batch, safety bin or `train_on` is None, a missing flag False, and a
missing string "".

No text that a model learns to write is empty: not an answer that is trained on, not `chosen`; nor is what a user says. An
earlier answer may be, and so may `rejected`: that nothing was said is a reason to prefer the other. Noisy sets, whose other
pairs are to be left out and counted, go through `python -m llama_jax.preferences` first, as those with ties do.
"""

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.data.dialog import check_messages, trained_answers
from llama_jax.data.rows import read_jsonl, read_rows, without_nulls, write_jsonl

__all__ = [
    "RATINGS", "REJECTED_SAFE", "SAFETY_BINS", "read_comparisons", "read_dialogs", "read_jsonl", "read_prompts", "write_jsonl",
]  # fmt: skip

RATINGS = ("significantly", "better", "slightly", "negligibly")  # degrees of preference, section 3.2.1
SAFETY_BINS = ("chosen_safe", "both_safe", "both_unsafe")
# An unsafe answer was chosen over a safe one. Rows may say so; they are counted and left out, since the paper holds that safer
# answers are the preferred ones (section 3.2.1).
REJECTED_SAFE = "rejected_safe"

_OPTIONAL = {  # field -> (type, value when missing, allowed values)
    "source": (str, "", None),
    "is_safety": (bool, False, None),
    "reference": (str, None, None),
    "kind": (str, "", None),
    "object": (str, "", None),
    "prompt_messages": (int, 0, None),
    "train_on": (str, None, ("all", "last")),
    "rating": (str, None, RATINGS),
    "margin": (float, None, None),
    "safety_bin": (str, None, (*SAFETY_BINS, REJECTED_SAFE)),
    "batch": (int | str, None, None),  # of the weekly collection
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def read_dialogs(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All dialogs of a data set, for fine-tuning; each ends with an answer, which is not empty, nor is any that is trained on.

    `prompt_messages` of a row says how many of its messages are a prompt, whose answers are not trained on (0: none).
    """
    rows = []
    for where, row in read_rows(path):
        row = _one_name(without_nulls(row), "messages", ("conversations",), where)
        if "completion" in row and "messages" not in row:
            row = _prompt_and_completion(row, where)
        row = _fields(row, where, required=("messages",), optional=("source", "is_safety", "prompt_messages", "train_on"))
        row["messages"] = _messages(row["messages"])
        check_messages(row["messages"], where)
        for i, message in enumerate(row["messages"]):
            if message.get("weight") not in (None, 0, 1):
                raise ValueError(f"{where}: messages[{i}].weight: expected 0 or 1, got {message['weight']!r}")
        last = len(row["messages"]) - 1
        if row["messages"][last]["role"] != "assistant":
            raise ValueError(f"{where}: messages[{last}].role: expected 'assistant' at the end of a dialog, got 'user'")
        _check_asked(row["messages"], where)
        _check_answered(row, where)
        rows.append(row)
    return _not_empty(rows, path, "dialogs")


def read_prompts(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All prompts of a data set, for sampling; each ends with an open user turn."""
    rows = []
    for where, row in read_rows(path):
        row, optional = without_nulls(row), ("reference", "is_safety", "source", "kind", "object")
        if "prompt" in row:  # chat data sets carry the whole dialog beside it
            row = {key: value for key, value in row.items() if key not in ("messages", "conversations")}
        row = _one_name(row, "messages", ("prompt", "conversations"), where)
        if "messages" not in row and (shared := _shared_prompt(row)):
            row["messages"] = shared
        row = _fields(row, where, required=("messages",), optional=optional, called="prompt or messages")
        row["messages"] = _messages(row["messages"], text_from="user")
        check_messages(row["messages"], where)
        if row["messages"][-1]["role"] != "user":
            last = len(row["messages"]) - 1
            raise ValueError(f"{where}: messages[{last}].role: expected 'user' at the end of a prompt, got 'assistant'")
        _check_asked(row["messages"], where)
        rows.append(row)
    return _not_empty(rows, path, "prompts")


def read_comparisons(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All comparisons of a data set: `prompt` becomes a list of messages, `chosen` and `rejected` texts."""
    return _not_empty([comparison(row, where) for where, row in read_rows(path)], path, "comparisons")


def comparison(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One comparison in the shape that `read_comparisons` returns; ValueError beginning with `where` if it is none."""
    row, optional = without_nulls(row), ("rating", "margin", "is_safety", "safety_bin", "source", "batch")
    if not row.keys() >= {"prompt", "chosen", "rejected"}:  # beside all three, `messages` are the chosen dialog once more
        row = _one_name(row, "prompt", ("messages", "conversations"), where)
    if "prompt" not in row and (shared := _shared_prompt(row)):
        row["prompt"] = shared
    row = _fields(row, where, required=("prompt", "chosen", "rejected"), optional=optional)
    if row["margin"] is not None and not (math.isfinite(row["margin"]) and row["margin"] >= 0):
        raise ValueError(f"{where}: margin: expected a number of at least 0, got {row['margin']}")
    row["prompt"] = _messages(row["prompt"], text_from="user")
    check_messages(row["prompt"], f"{where}: prompt")
    if row["prompt"][-1]["role"] != "user":
        raise ValueError(f"{where}: prompt: expected to end with the user, got {row['prompt'][-1]['role']!r}")
    _check_asked(row["prompt"], f"{where}: prompt")
    for side in ("chosen", "rejected"):
        row[side] = _answer(row[side], row["prompt"], f"{where}: {side}")
    if not row["chosen"].strip():
        raise ValueError(f"{where}: chosen: expected a text, found an empty one, which a model would learn to prefer")
    if row["chosen"].strip() == row["rejected"].strip():  # the chat format strips them
        raise ValueError(f"{where}: chosen: the same text as rejected; the ranking loss has no ties")
    return row


def _check_asked(messages: Sequence[Mapping[str, str]], where: str) -> None:
    """ValueError for a user who says nothing."""
    for i, message in enumerate(messages):
        if message["role"] == "user" and not message["content"].strip():
            raise ValueError(f"{where}: messages[{i}].content: expected what the user says, found an empty text")


def _check_answered(row: Mapping[str, Any], where: str) -> None:
    """ValueError for an answer of a dialog that is empty, if it is trained on (unless the row says otherwise, all are) or the
    last."""
    messages, last = row["messages"], len(row["messages"]) - 1
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = trained_answers(messages, train_on=row["train_on"] or "all", prompt_messages=row["prompt_messages"])
    for i, trains in zip(answers, trained, strict=True):
        if (trains or i == last) and not messages[i]["content"].strip():
            raise ValueError(f"{where}: messages[{i}].content: the answer is empty, nothing to train on")


def _one_name(row: Mapping[str, Any], name: str, others: tuple[str, ...], where: str) -> dict[str, Any]:
    """A copy in which `name` holds what any of the other names held; at most one of them may be there."""
    found = [key for key in (name, *others) if key in row]
    if len(found) > 1:
        raise ValueError(f"{where}: {found[1]}: a row has this field or {found[0]}, got both")
    row = dict(row)
    if found:
        row[name] = row.pop(found[0])
    return row


def _messages(value: Any, *, text_from: str | None = None) -> Any:
    """A list of role/content messages from any of its shapes; anything else as it is, for `check_messages` to refuse."""
    if isinstance(value, str) and text_from:
        return [{"role": text_from, "content": value}]
    if isinstance(value, Mapping):
        columns = list(value.values())
        if columns and all(isinstance(column, list) for column in columns):  # TFDS and old datasets: a list by columns
            if len({len(column) for column in columns}) != 1:
                return value
            value = [dict(zip(value, items)) for items in zip(*columns)]
        else:
            value = [value]
    if not isinstance(value, list):
        return value
    return [_message(message) for message in value]


def _message(message: Any) -> Any:
    if isinstance(message, Mapping) and "from" in message and "value" in message and "role" not in message:
        return {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
    return message


def _prompt_and_completion(row: dict[str, Any], where: str) -> dict[str, Any]:
    """TRL's prompt/completion as messages."""
    if "prompt" not in row:
        raise ValueError(f"{where}: prompt: missing beside completion")
    prompt = _messages(row.pop("prompt"), text_from="user")
    check_messages(prompt, f"{where}: prompt")
    completion = _messages(row.pop("completion"), text_from="assistant")
    if not isinstance(completion, list):
        raise ValueError(f"{where}: completion: expected a string or a list of messages, got {type(completion).__name__}")
    return {**row, "messages": [*prompt, *completion], "prompt_messages": len(prompt)}


def _shared_prompt(row: Mapping[str, Any]) -> list[Any]:
    """The messages with which two whole dialogs begin alike; [] if the row holds no such dialogs."""
    chosen, rejected = (_messages(row.get(side)) for side in ("chosen", "rejected"))
    if not (isinstance(chosen, list) and isinstance(rejected, list) and min(len(chosen), len(rejected)) > 1):
        return []
    shared = [a for a, b in zip(chosen[:-1], rejected[:-1]) if a == b]
    return shared if shared == chosen[:-1] == rejected[:-1] else []


def _fields(row: dict, where: str, *, required: tuple[str, ...], optional: tuple[str, ...], called: str = "") -> dict[str, Any]:
    """A copy with every known field; checks names, types and values of the optional ones.

    Other fields are carried along. One that is like a known field, which the row lacks, is taken for that field misspelt.
    `called` is what a required field that is missing could have been called.
    """
    known = (*required, *optional)
    for key, value in row.items():
        if key not in known and (near := _misspelt(key, value, [name for name in known if name not in row])):
            raise ValueError(f"{where}: {key}: unknown field, did you mean {near!r}?")
    for key in required:
        if key not in row:
            raise ValueError(f"{where}: {called or key}: missing; the row has {', '.join(map(str, row)) or 'no field'}")
    filled = dict(row)
    for key in optional:
        kind, default, allowed = _OPTIONAL[key]
        value = filled.setdefault(key, default)
        if value is None and default is None:
            continue
        if kind is float and type(value) is int:
            value = filled[key] = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{where}: {key}: expected {_name(kind)}, got {type(value).__name__}")
        if allowed and value not in allowed:
            raise ValueError(f"{where}: {key}: expected one of {', '.join(allowed)}, got {value!r}")
    return filled


def _misspelt(key: str, value: Any, missing: Sequence[str]) -> str | None:
    """Which of the missing fields is meant; none by names such as `prompt_id`, nor by a list in the place of a text."""
    for name in difflib.get_close_matches(key, missing, n=1, cutoff=0.8):
        kind = _OPTIONAL[name][0] if name in _OPTIONAL else object
        if not key.startswith(f"{name}_") and isinstance(value, (int, float) if kind is float else kind):
            return name
    return None


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind).replace(" | ", " or ")


def _answer(value: Any, prompt: list[dict[str, str]], where: str) -> str:
    """Text of an answer given as text, as one assistant message, or as the whole dialog that ends with it."""
    value = _messages(value)
    if isinstance(value, list):
        messages = value if value[: len(prompt)] == prompt else [*prompt, *value]
        if len(messages) != len(prompt) + 1:
            raise ValueError(f"{where}: expected one message after the prompt, got {len(messages) - len(prompt)}")
    elif isinstance(value, str):
        messages = [*prompt, {"role": "assistant", "content": value}]
    else:
        raise ValueError(f"{where}: expected a string or a list of messages, got {type(value).__name__}")
    check_messages(messages, where)
    return messages[-1]["content"]


def _not_empty(rows: list, path: str | os.PathLike, what: str) -> list:
    if not rows:
        raise ValueError(f"{path}: no {what}: the file is empty")
    return rows
