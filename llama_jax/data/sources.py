"""Dialogs, prompts and comparisons from JSONL files (paper sections 3.1, 3.2.1 and 3.2.3), read strictly.

A row is one JSON object a line, UTF-8, gzip where the name ends in `.gz`. The readers return plain dicts
with every known field filled in; fields they do not know are kept, unless they look like a misspelt known
one. Whatever is wrong ends in one ValueError that names file, line and field.

    dialog      {"messages": [...], "source": str, "is_safety": bool}, the last message from the assistant
    prompt      {"messages": [...], "reference": str | null, "is_safety": bool, "source": str, "kind": str,
    "object": str},
                the last message from the user
    comparison  {"prompt": str | [...], "chosen": str | [...], "rejected": same, "rating", "safety_bin",
    "is_safety", "source"}; `messages` may stand for `prompt`

A missing reference, rating or safety bin is None, a missing flag False, a missing string "".
"""

import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.data.dialog import check_messages
from llama_jax.files import atomic_write

RATINGS = ("significantly", "better", "slightly", "negligibly")  # degrees of preference, section 3.2.1
SAFETY_BINS = ("chosen_safe", "both_safe", "both_unsafe")

_OPTIONAL = {  # field -> (type, value when missing, allowed values)
    "source": (str, "", None),
    "is_safety": (bool, False, None),
    "reference": (str, None, None),
    "kind": (str, "", None),
    "object": (str, "", None),
    "rating": (str, None, RATINGS),
    "safety_bin": (str, None, SAFETY_BINS),
}


def read_jsonl(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs ("file:line", row) of a JSONL file. An empty line is malformed JSON."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSONL file, found {'a directory' if path.is_dir() else 'nothing'}")
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", _row(line, f"{path}:{number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: damaged gzip file ({error})") from None


def read_dialogs(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All dialogs of a file, for fine-tuning; each ends with an answer that is not empty."""
    rows = []
    for where, row in read_jsonl(path):
        row = _fields(row, where, required=("messages",), optional=("source", "is_safety"))
        check_messages(row["messages"], where)
        last = len(row["messages"]) - 1
        if row["messages"][last]["role"] != "assistant":
            raise ValueError(f"{where}: messages[{last}].role: expected 'assistant' at the end of a dialog, got 'user'")
        if not row["messages"][last]["content"].strip():
            raise ValueError(f"{where}: messages[{last}].content: the answer is empty, nothing to train on")
        rows.append(row)
    return _not_empty(rows, path, "dialogs")


def read_prompts(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All prompts of a file, for sampling; each ends with an open user turn."""
    rows = []
    for where, row in read_jsonl(path):
        optional = ("reference", "is_safety", "source", "kind", "object")
        row = _fields(row, where, required=("messages",), optional=optional)
        check_messages(row["messages"], where)
        if row["messages"][-1]["role"] != "user":
            last = len(row["messages"]) - 1
            raise ValueError(f"{where}: messages[{last}].role: expected 'user' at the end of a prompt, got 'assistant'")
        rows.append(row)
    return _not_empty(rows, path, "prompts")


def read_comparisons(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All comparisons of a file: `prompt` becomes a list of messages, `chosen` and `rejected` texts."""
    rows = []
    for where, row in read_jsonl(path):
        optional = ("rating", "is_safety", "safety_bin", "source")
        if "messages" in row:
            if "prompt" in row:
                raise ValueError(f"{where}: messages: a comparison has this field or prompt, got both")
            row["prompt"] = row.pop("messages")
        row = _fields(row, where, required=("prompt", "chosen", "rejected"), optional=optional)
        if isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        check_messages(row["prompt"], f"{where}: prompt")
        if row["prompt"][-1]["role"] != "user":
            raise ValueError(f"{where}: prompt: expected to end with the user, got {row['prompt'][-1]['role']!r}")
        for side in ("chosen", "rejected"):
            row[side] = _answer(row[side], row["prompt"], f"{where}: {side}")
        if row["chosen"].strip() == row["rejected"].strip():  # the chat format strips them
            raise ValueError(f"{where}: chosen: the same text as rejected; the ranking loss has no ties")
        rows.append(row)
    return _not_empty(rows, path, "comparisons")


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows, gzipped where the name ends in `.gz`, whole or not at all; returns their number."""
    count = 0
    with atomic_write(path) as file:
        # No name and no time in the gzip header: the same rows give the same bytes.
        gz = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) if str(path).endswith(".gz") else None
        for row in rows:
            (gz or file).write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))
            count += 1
        if gz:
            gz.close()
    return count


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        if b"\\u" in line:  # an escape can hold half a character, which no UTF-8 and so no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where}: an escape \\ud800 to \\udfff without its other half is no character") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: malformed JSON, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # NaN, a number of 5,000 digits, 5,000 brackets
        raise ValueError(f"{where}: malformed JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _fields(row: dict, where: str, *, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """A copy with every known field; checks names, types and values of the optional ones."""
    known = (*required, *optional)
    for key in row:
        if key not in known and (near := difflib.get_close_matches(key, known, n=1, cutoff=0.8)):
            raise ValueError(f"{where}: {key}: unknown field, did you mean {near[0]!r}?")
    for key in required:
        if key not in row:
            raise ValueError(f"{where}: {key}: missing")
    filled = dict(row)
    for key in optional:
        kind, default, allowed = _OPTIONAL[key]
        value = filled.setdefault(key, default)
        if value is None and default is None:
            continue
        if not isinstance(value, kind):
            raise ValueError(f"{where}: {key}: expected {kind.__name__}, got {type(value).__name__}")
        if allowed and value not in allowed:
            raise ValueError(f"{where}: {key}: expected one of {', '.join(allowed)}, got {value!r}")
    return filled


def _answer(value: Any, prompt: list[dict[str, str]], where: str) -> str:
    """Text of an answer given as text, as one assistant message, or as the whole dialog that ends with it."""
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
