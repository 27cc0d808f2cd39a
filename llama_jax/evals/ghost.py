"""How well a model keeps an instruction over many turns (paper section 3.3, A.3.5: Table 30), decided by programs.

The instruction stands in the first turn only, as a user would give it. The model's own answers fill the dialog, so an answer
that drops the instruction is there for the next ones to follow. A constraint that only asking can show (a hobby, a name) is asked
for beside the dialog: neither the question nor its answer stays in it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama_jax.evals.statistics import Interval, mean_interval
from llama_jax.rlhf.constraints import Constraint, obeyed
from llama_jax.rlhf.ghost import Context, Messages, in_first_turn
from llama_jax.rlhf.respond import usable

TURNS = (2, 4, 6, 20)  # of Table 30


@dataclasses.dataclass(frozen=True)
class Recall:
    """An answer at one of the measured turns, 1 being the first, and whether it obeys all that can be decided."""

    context: int
    turn: int
    question: str
    answer: str
    obeyed: bool


def follow(
    contexts: Sequence[Context], respond: Callable[..., list[tuple[str, bool]]], *, turns: Sequence[int] = TURNS,
    place: str = "user", seed: int = 0, progress: Callable[[int], None] | None = None,
) -> list[Recall]:  # fmt: skip
    """Goes through the contexts turn by turn and checks the answers at `turns`.

    Args:
      contexts: each with at least `max(turns)` user messages; its answers stand in only for drawn ones that cannot enter a
        dialog (no end, nothing said, a chat tag).
      respond: (conversations, seed=, progress=) -> [(text, ended)], see `rlhf.respond.Responder`.
      place: of the instruction, as in training.
    """
    for number, context in enumerate(contexts):
        users = sum(m["role"] == "user" for m in context.messages)
        if users < max(turns):
            raise ValueError(f"context {number}: expected at least {max(turns)} user messages, got {users}")
    dialogs = [[dict(m) for m in context.messages] for context in contexts]
    found: list[Recall] = []
    for turn in range(1, max(turns) + 1):
        until = 2 * turn - 1  # the dialog up to the user's message of this turn
        asked = [
            in_first_turn(dialog[:until], c.instruction, place=place) for dialog, c in zip(dialogs, contexts, strict=True)
        ]
        drawn = respond(asked, seed=seed + turn, progress=progress)
        if turn in turns:
            found += _judge(contexts, dialogs, drawn, turn)
            found += _probe(contexts, dialogs, respond, turn=turn, place=place, seed=seed + turn, progress=progress)
        for dialog, (text, ended) in zip(dialogs, drawn, strict=True):
            if usable(text, ended) and len(dialog) > until:
                dialog[until]["content"] = text
    return found


def _judge(contexts: Sequence[Context], dialogs: Sequence[Messages], drawn: Sequence[tuple[str, bool]], turn: int) -> list[Recall]:
    """The answers to the dialogs' own questions."""
    rows = []
    for number, (context, dialog, (text, _)) in enumerate(zip(contexts, dialogs, drawn, strict=True)):
        question = dialog[2 * turn - 2]["content"]
        if (holds := obeyed([c for c in context.constraints if not c.probe], text, question)) is not None:
            rows.append(Recall(number, turn, question, text, holds))
    return rows


def _probe(
    contexts: Sequence[Context], dialogs: Sequence[Messages], respond: Callable[..., list[tuple[str, bool]]], *, turn: int,
    place: str, seed: int, progress: Callable[[int], None] | None,
) -> list[Recall]:  # fmt: skip
    """The answers to questions that ask for a constraint in place of the dialog's own question of this turn."""
    asked: list[tuple[int, Constraint, Messages]] = []
    for number, (context, dialog) in enumerate(zip(contexts, dialogs, strict=True)):
        for constraint in context.constraints:
            if constraint.probe:
                messages = [*dialog[: 2 * turn - 2], {"role": "user", "content": constraint.probe}]
                asked.append((number, constraint, in_first_turn(messages, context.instruction, place=place)))
    if not asked:
        return []
    drawn = respond([messages for _, _, messages in asked], seed=seed, progress=progress)
    return [
        Recall(number, turn, constraint.probe, text, bool(constraint.holds(text)))
        for (number, constraint, _), (text, _) in zip(asked, drawn, strict=True)
    ]


def recall_table(found: Sequence[Recall]) -> dict[int, Interval]:
    """The share of answers that obey, by turn, with its 95 % interval."""
    turns = sorted({row.turn for row in found})
    return {turn: mean_interval(np.array([float(row.obeyed) for row in found if row.turn == turn])) for turn in turns}


def recall_rows(tables: dict[str, dict[int, Interval]]) -> list[list[Any]]:
    """Rows of Table 30: a header, then one row a turn with one column a model."""
    turns = sorted({turn for table in tables.values() for turn in table})
    rows: list[list[Any]] = [["turn", *tables]]
    for turn in turns:
        rows.append([turn, *(_shown(table.get(turn)) for table in tables.values())])
    return rows


def _shown(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{100 * interval.mean:.0f} % ({100 * interval.low:.0f} to {100 * interval.high:.0f})"
