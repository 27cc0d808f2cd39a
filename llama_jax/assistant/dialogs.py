"""Questions about documented objects with answers from their documentation (paper section 3.1: SFT wants few,
good examples).

Four kinds: `what`, `signature`, `module`, `example`. An answer repeats what the question names (learned as
form and copying) and adds what only the documentation says (learned as knowledge), so that a better model is
measurably better. Later turns of a dialog say "it". Objects, not questions, are split into train and
held-out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llama_jax.assistant.objects import DocumentedObject
from llama_jax.assistant.stable import stable_choice, stable_order, stable_unit

KINDS = ("what", "signature", "module", "example")
SOURCE = "documentation"
SYSTEM_MESSAGES = (
    "You are a documentation assistant. Answer briefly.",
    "You answer questions about Python. Be brief.",
    "You are a helpful assistant for Python programmers.",
    "Answer in one or two short sentences.",
    "You know the Python documentation. Be short and exact.",
    "Answer from the documentation.",
)
SYSTEM_SHARE = 0.3  # of the dialogs open with a system message
MULTI_TURN_SHARE = 0.3  # of the dialogs have two or three questions

# {name} is the qualified name; the last component alone would be ambiguous between the two sides of a split.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "what": (
        "What does `{name}` do?",
        "What is `{name}` for?",
        "Explain `{name}` in one sentence.",
        "Tell me briefly about `{name}`.",
        "Can you describe `{name}`?",
        "I found `{name}` in some code. What is it?",
        "What is the purpose of `{name}`?",
        "Please summarise `{name}`.",
    ),
    "signature": (
        "What is the signature of `{name}`?",
        "How do I call `{name}`?",
        "Which arguments does `{name}` take?",
        "What are the parameters of `{name}`?",
        "Show me the signature of `{name}`.",
        "I want to call `{name}`. What do I pass?",
        "Give me the argument list of `{name}`.",
    ),
    "module": (
        "Which module is `{name}` in?",
        "Where do I find `{name}`?",
        "What module does `{name}` belong to?",
        "From which module does `{name}` come?",
        "In which module is `{name}` defined?",
        "Where is `{name}` documented?",
        "Which module do I import for `{name}`?",
        "Where does `{name}` live?",
    ),
    "example": (
        "Show an example of `{name}`.",
        "Give me a short example of `{name}`.",
        "How is `{name}` used?",
        "Can you show me a call of `{name}`?",
        "What does a call of `{name}` look like?",
        "I need one line that uses `{name}`.",
    ),
}
FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "what": ("What does it do?", "And what is it for?", "Explain it in one sentence.", "Please describe it."),
    "signature": (
        "What is its signature?",
        "How do I call it?",
        "Which arguments does it take?",
        "And its parameters?",
    ),
    "module": (
        "Which module is it in?",
        "Where do I find it?",
        "What module does it belong to?",
        "And where is it defined?",
    ),
    "example": (
        "Show an example of it.",
        "How is it used?",
        "Can you show me a call of it?",
        "And a short example?",
    ),
}


def answer(item: DocumentedObject, kind: str) -> str | None:
    """The reference answer, or None where the documentation does not say."""
    if kind == "what":
        return f"`{item.short}` is a {item.kind} of `{owner(item)}`. {item.summary}"
    if kind == "signature":
        return item.signature and f"The signature is `{item.signature}`."
    if kind == "module":
        return f"`{item.short}` is in the module `{item.module}`."
    if kind == "example":
        return item.example and f"An example of `{item.short}`: `{item.example}`."
    raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")


def owner(item: DocumentedObject) -> str:
    """What the object belongs to: the class of a method (`deque`), else the module."""
    return item.name.split(".")[-2] if item.kind == "method" else item.module


def split_by_name(
    objects: Iterable[DocumentedObject], *, held_out_fraction: float
) -> tuple[list[DocumentedObject], list[DocumentedObject]]:
    """(train, held-out) by hash of the name: an object keeps its side when others come or go."""
    if not 0.0 <= held_out_fraction <= 1.0:
        raise ValueError(f"held_out_fraction: expected a number from 0 to 1, got {held_out_fraction}")
    train, held_out = [], []
    for item in objects:
        (held_out if stable_unit("split", item.name) < held_out_fraction else train).append(item)
    return train, held_out


def dialogs(
    objects: Sequence[DocumentedObject], *, seed: int, per_object: int = 3, max_characters: int | None = None
) -> list[dict[str, Any]]:
    """Dialog rows, up to `per_object` different ones for each object, in an order given by the seed.

    `kind` and `object` tell what the last question asks. `max_characters` leaves out dialogs whose messages
    are longer in all (about 3 characters a token for a vocabulary of 4k).
    """
    rows: dict[str, dict[str, Any]] = {}  # by text: an object with few kinds may draw one dialog twice
    for item in objects:
        kinds = [kind for kind in KINDS if answer(item, kind) is not None]
        for number in range(per_object):
            row = _dialog(item, kinds, (seed, item.name, number))
            length = sum(len(message["content"]) for message in row["messages"])
            if max_characters is None or length <= max_characters:
                rows.setdefault(_text(row), row)
    return [rows[text] for text in stable_order(rows, "dialogs", seed)]


def prompts(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompt rows: the messages before the last answer, and that answer as `reference`; other fields are
    kept.

    Rows with the same messages and the same reference appear once.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(
            _text(row), {**row, "messages": row["messages"][:-1], "reference": row["messages"][-1]["content"]}
        )
    return list(found.values())


def message(role: str, content: str) -> dict[str, str]:
    """One message of a dialog row."""
    return {"role": role, "content": content}


def with_system(messages: list[dict[str, str]], key: tuple[str | int, ...]) -> list[dict[str, str]]:
    """The messages, for a share of the keys opened by a system message."""
    if stable_unit("system", *key) < SYSTEM_SHARE:
        return [message("system", stable_choice(SYSTEM_MESSAGES, "which system", *key)), *messages]
    return messages


def _dialog(item: DocumentedObject, kinds: list[str], key: tuple) -> dict[str, Any]:
    # Consecutive numbers walk through the kinds, so that one object's dialogs differ.
    *name, number = key
    ordered = stable_order(kinds, "kinds", *name)
    ordered = ordered[number % len(ordered) :] + ordered[: number % len(ordered)]
    turns = 1
    if stable_unit("turns", *key) < MULTI_TURN_SHARE:
        turns = min(2 + int(stable_unit("three turns", *key) < 0.3), len(ordered))
    asked = ordered[:turns][::-1]  # the kind of this number is asked last
    messages = []
    for turn, kind in enumerate(asked):
        if turn == 0:
            question = stable_choice(QUESTIONS[kind], "question", *key).format(name=item.name)
        else:
            question = stable_choice(FOLLOW_UPS[kind], "follow-up", turn, *key)
        messages += [message("user", question), message("assistant", answer(item, kind))]
    return {
        "messages": with_system(messages, key),
        "source": SOURCE,
        "is_safety": False,
        "kind": asked[-1],
        "object": item.name,
    }


def _text(row: dict[str, Any]) -> str:
    return "\n".join(f"{part['role']}: {part['content']}" for part in row["messages"])
