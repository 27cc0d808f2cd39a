"""Chat format to ids and loss mask: the encoding of Llama 2-Chat (sections 3.1 and 3.3).

A finished pair of turns is the one string `[INST] {user} [/INST] {answer} ` between BOS and EOS; the open
last turn is `[INST] {user} [/INST]` after BOS. A system message stands inside the first user turn. Pairs are
encoded one by one and their ids joined, so every pair has its own BOS and its own SentencePiece leading
space. The tags are plain text, no vocabulary entries, hence a message that contains one could forge a turn
and is refused.

Loss: zero on the prompt (section 3.1), so what trains is `answer`, its closing space and EOS.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llama_jax.data.tokenizer import Tokenizer

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
TAGS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>")
ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]


@dataclass(frozen=True)
class EncodedDialog:
    """Ids of a finished dialog and, for each, whether it is a target of the loss: lists, or arrays, which many dialogs need."""

    ids: Sequence[int] | np.ndarray
    supervised: Sequence[bool] | np.ndarray


def check_messages(messages: Any, where: str = "messages", *, tags: Sequence[str] = TAGS, in_turn: bool = True) -> None:
    """Refuses what is no dialog: ValueError beginning with `where` (say "file:line"), naming the field.

    A dialog is an optional system message, then user and assistant in turn, beginning with user, at least
    one. For the chat formats of other models: `tags` are what no message may hold, and with `in_turn` False the order of the
    roles is free.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f"{where}: messages: expected a list, got {type(messages).__name__}")
    if not messages:
        raise ValueError(f"{where}: messages: expected at least one, got an empty list")
    for i, message in enumerate(messages):
        field = f"{where}: messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{field}: expected an object, got {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"{field}.{key}: missing")
            if not isinstance(message[key], str):
                raise ValueError(f"{field}.{key}: expected a string, got {type(message[key]).__name__}")
        if message["role"] not in ROLES:
            raise ValueError(f"{field}.role: expected one of {', '.join(ROLES)}, got {message['role']!r}")
        if (tag := find_tag(message["content"], tags)) is not None:
            raise ValueError(f"{field}.content: holds the chat tag {tag!r}, which could forge a turn")
    if not in_turn:
        return
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    offset = len(messages) - len(turns)
    if not turns:
        raise ValueError(f"{where}: messages: a system message alone is no dialog, expected a user message after it")
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn["role"] != expected:
            raise ValueError(
                f"{where}: messages[{i + offset}].role: expected {expected!r} (roles alternate), got {turn['role']!r}"
            )


def check_finished(messages: Any, train_on: str, where: str) -> None:
    """`check_messages` of a dialog to be trained on: it ends with the assistant."""
    if train_on not in ("all", "last"):
        raise ValueError(f"train_on: expected 'all' or 'last', got {train_on!r}")
    check_messages(messages, where)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: messages: expected the last one from the assistant, got {messages[-1]['role']!r}")


def find_tag(text: str, tags: Sequence[str] = TAGS) -> str | None:
    """The first chat tag inside `text`, or None. A sampled answer with one cannot enter a dialog."""
    return next((tag for tag in tags if tag in text), None)


def encode_dialog(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    train_on: Literal["all", "last"] = "all",
    prompt_messages: int = 0,
    where: str = "messages",
) -> EncodedDialog:
    """Encodes a dialog that ends with the assistant; `trained_answers` says what is supervised.

    An answer may be empty, as a comparison's `rejected` may. That none is which a model learns to write is seen to by the
    readers of files (`data.sources`), which can name the row.
    """
    check_finished(messages, train_on, where)
    turns = _merge_system(messages)
    pairs = [_encode_pair(turns[i], turns[i + 1], tokenizer) for i in range(0, len(turns), 2)]
    return _joined(pairs, trained_answers(messages, train_on=train_on, prompt_messages=prompt_messages))


def trained_answers(messages: Sequence[Message], *, train_on: str, prompt_messages: int) -> list[bool]:
    """Whether each answer of a dialog is trained on: the "last" alone, or "all" behind the first `prompt_messages` messages.

    Never one whose message has "weight": 0, as OpenAI's fine-tuning data say it.
    """
    last = len(messages) - 1
    return [
        message.get("weight") != 0 and (i >= prompt_messages if train_on == "all" else i == last)
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


@dataclass(frozen=True)
class DialogRow:
    """A dialog and what `encode_dialog` is told of it."""

    messages: Sequence[Message]
    train_on: Literal["all", "last"] = "all"
    prompt_messages: int = 0
    where: str = "messages"


def encode_dialogs(rows: Sequence[DialogRow], tokenizer: Tokenizer) -> list[EncodedDialog]:
    """`encode_dialog` of each row, as arrays, on all of this machine's cores."""
    dialogs = []
    for row in rows:
        check_finished(row.messages, row.train_on, row.where)
        dialogs.append(_merge_system(row.messages))
    texts = [text for turns in dialogs for i in range(0, len(turns), 2) for text in _pair_texts(turns[i], turns[i + 1])]
    encoded = iter(tokenizer.encode_many(texts, threads=os.cpu_count() or 1))
    found = []
    for row, turns in zip(rows, dialogs, strict=True):
        pairs = [_checked_pair(next(encoded), next(encoded), turns[i + 1], tokenizer) for i in range(0, len(turns), 2)]
        trained = trained_answers(row.messages, train_on=row.train_on, prompt_messages=row.prompt_messages)
        dialog = _joined(pairs, trained)
        found.append(EncodedDialog(np.array(dialog.ids, np.int32), np.array(dialog.supervised, bool)))
    return found


def _joined(pairs: Sequence[tuple[list[int], int]], trained: Sequence[bool]) -> EncodedDialog:
    """Encoded pairs of turns as one dialog, and whether the answer of each is trained on."""
    ids, supervised = [], []
    for (pair, answer_start), trains in zip(pairs, trained, strict=True):
        ids += pair
        supervised += [False] * answer_start + [trains] * (len(pair) - answer_start)
    return EncodedDialog(ids, supervised)


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer, *, where: str = "messages") -> list[int]:
    """Ids to answer: finished pairs, then BOS and the open user turn. The messages must end with the user."""
    check_messages(messages, where)
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: messages: expected the last one from the user, got {messages[-1]['role']!r}")
    turns = _merge_system(messages)
    ids = []
    for i in range(0, len(turns) - 1, 2):
        ids += _encode_pair(turns[i], turns[i + 1], tokenizer)[0]
    return ids + tokenizer.encode(_open_turn(turns[-1]), bos=True)


def prompt_key(messages: Sequence[Message]) -> str:
    """What makes two prompts the same one."""
    return json.dumps([[message["role"], message["content"].strip()] for message in messages], ensure_ascii=False)


def decode_response(ids: Iterable[int], tokenizer: Tokenizer) -> tuple[str, bool]:
    """Text of a sampled answer, stripped, cut at the first EOS or other end of the tokenizer; and whether there was one."""
    ids = [int(i) for i in ids if i < tokenizer.vocab_size]  # rows that fill up an embedding have no text
    length = next((place for place, token in enumerate(ids) if token in tokenizer.stop_ids), len(ids))
    return tokenizer.decode(ids[:length]).strip(), length < len(ids)


def encode_response(ids: Sequence[int], tokenizer: Tokenizer, *, limit: int) -> list[int]:
    """Ids that the text of a sampled answer has in a dialog; a model also spells words in pieces no encoder would choose.

    Reward models have seen only the encoder's pieces, and fine-tuning sees only them, so what is kept by its reward is scored
    so. An answer without EOS, without text or with a chat tag cannot be in a dialog and keeps its ids, as does one of more
    than `limit`.
    """
    text, ended = decode_response(ids, tokenizer)
    if not ended or not text or find_tag(text) is not None:
        return list(ids)
    pair, start = _encode_pair("", text, tokenizer)
    return pair[start:] if len(pair) - start <= limit else list(ids)


def _merge_system(messages: Sequence[Message]) -> list[str]:
    """Contents of the turns, system text inside the first; stripped after the merge, as the reference does."""
    if messages[0]["role"] == "system":
        first = B_SYS + messages[0]["content"] + E_SYS + messages[1]["content"]
        contents = [first, *(message["content"] for message in messages[2:])]
    else:
        contents = [message["content"] for message in messages]
    return [content.strip() for content in contents]


def _open_turn(user: str) -> str:
    return f"{B_INST} {user} {E_INST}"


def _encode_pair(user: str, answer: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Ids of one finished pair with BOS and EOS, and the index of the first id of the answer."""
    prompt, pair = (tokenizer.encode(text) for text in _pair_texts(user, answer))
    return _checked_pair(prompt, pair, answer, tokenizer)


def _pair_texts(user: str, answer: str) -> tuple[str, str]:
    """The open turn alone, and with its answer."""
    return _open_turn(user), f"{_open_turn(user)} {answer} "


def _checked_pair(prompt: list[int], pair: list[int], answer: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The ids of `_pair_texts` as `_encode_pair` returns them."""
    # Pieces end before a space, so the prompt's ids begin the pair's. A tokenizer that merges across spaces
    # would move the border between prompt and answer and train on (or hide) the wrong tokens.
    if pair[: len(prompt)] != prompt:
        raise ValueError(
            f"tokenizer {tokenizer.path}: a piece reaches from {E_INST!r} into the answer {answer[:20]!r}, "
            "so prompt and answer have no common border"
        )
    return [tokenizer.bos_id, *pair, tokenizer.eos_id], 1 + len(prompt)
