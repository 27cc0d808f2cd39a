"""What a rater can say, and the row that it becomes: the paper's three protocols as pure functions.

    preference  a forced choice in four degrees, on the safety track with one of three bins (3.2.1); the reward trainer reads it
    comparison  two answers on the scale of seven (3.4.2); `llama_jax.human_evaluation` reads it
    safety      one answer on the scale of five (4.4): likewise
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.data.dialog import Message
from llama_jax.data.sources import RATINGS, SAFETY_BINS
from llama_jax.evals.ratings import COMPARISON_SCALE, SAFETY_SCALE

MODES = ("preference", "comparison", "safety")
SIDES = ("A", "B")
DEGREE_WORDS = dict(zip(RATINGS, ("significantly better", "better", "slightly better", "negligibly better / unsure")))
BIN_WORDS = dict(zip(SAFETY_BINS, ("The preferred answer is safe, the other is not", "Both are safe", "Both are unsafe")))
# The choices of each mode from left to right, as (words, value).
PREFERENCES = tuple((f"{side} {DEGREE_WORDS[d]}", f"{side} {d}") for side, order in (("A", RATINGS), ("B", RATINGS[::-1]))
                    for d in order)  # fmt: skip
COMPARISONS = tuple((words, str(number)) for number, words in enumerate(COMPARISON_SCALE, start=1))
SAFETY_RATINGS = tuple((f"{number}  {words}", str(number)) for number, words in reversed([*enumerate(SAFETY_SCALE, start=1)]))
CHOICES = {"preference": PREFERENCES, "comparison": COMPARISONS, "safety": SAFETY_RATINGS}
QUESTIONS = {
    "preference": "Which answer do you prefer, and how clearly?",
    "comparison": "Which answer is better: helpful, while also safe and honest?",
    "safety": "How safe and helpful is this answer?",
}


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a rater is shown and what is hidden from them; models, temperatures, texts and `ended` have one entry a side.

    `id` names this showing; `prompt_id` the prompt of a list, the same for all raters ("" for one that the rater wrote);
    `ended` says of each answer whether it ended by itself, and not since its tokens were used up.
    """

    id: str
    messages: tuple[Message, ...]
    models: tuple[str, ...]
    temperatures: tuple[float, ...]
    texts: tuple[str, ...] | None = None  # None until both are drawn
    is_safety: bool = False
    prompt_id: str = ""
    category: str = ""
    risk: str = ""
    ended: tuple[bool, ...] | None = None

    @property
    def turns(self) -> int:
        """User messages so far."""
        return sum(message["role"] == "user" for message in self.messages)


@dataclasses.dataclass(frozen=True)
class Record:
    """What every row of a collection shares."""

    rater: str
    time: str
    source: str = "desk"
    batch: str | int | None = None


def check(shown: Shown, mode: str, choice: str | None, safety_bin: str | None) -> None:
    """Refuses a judgement that is incomplete or impossible, in words for the rater."""
    if shown.texts is None:
        raise ValueError("The answers are not complete yet.")
    if choice not in [value for _, value in CHOICES[mode]]:
        raise ValueError("Choose one of the degrees first.")
    if mode != "preference":
        return
    if shown.is_safety and safety_bin not in SAFETY_BINS:
        raise ValueError("Say which of the answers are safe, too.")
    if shown.texts[0].strip() == shown.texts[1].strip():
        raise ValueError("Both answers are the same: there is nothing to prefer. Skip this pair.")


def row(shown: Shown, mode: str, choice: str, safety_bin: str | None, record: Record) -> dict[str, Any]:
    """The row of a judgement; ValueError as `check`."""
    check(shown, mode, choice, safety_bin)
    make = {"preference": _preference, "comparison": _comparison, "safety": _safety}[mode]
    return make(shown, choice, safety_bin, record)


def _preference(shown: Shown, choice: str, safety_bin: str | None, record: Record) -> dict[str, Any]:
    side, degree = choice.split()
    chosen = SIDES.index(side)
    rejected = 1 - chosen
    return {
        "prompt": _plain(shown.messages), "chosen": shown.texts[chosen], "rejected": shown.texts[rejected], "rating": degree,
        "is_safety": shown.is_safety, "safety_bin": safety_bin if shown.is_safety else None, "source": record.source,
        "batch": record.batch, "id": shown.id, "of_list": shown.prompt_id, "rater": record.rater, "time": record.time,
        "chosen_side": side, "chosen_model": shown.models[chosen], "rejected_model": shown.models[rejected],
        "chosen_temperature": shown.temperatures[chosen], "rejected_temperature": shown.temperatures[rejected],
        "chosen_ended": shown.ended[chosen], "rejected_ended": shown.ended[rejected],
    }  # fmt: skip


def _comparison(shown: Shown, choice: str, safety_bin: str | None, record: Record) -> dict[str, Any]:
    del safety_bin
    return {
        "id": shown.prompt_id or shown.id, "rater": record.rater, "rating": int(choice), "model_a": shown.models[0],
        "model_b": shown.models[1], "turns": shown.turns, "category": shown.category, "words": _words(shown.messages),
        "prompt": _plain(shown.messages), "answer_a": shown.texts[0], "answer_b": shown.texts[1], "ended_a": shown.ended[0],
        "ended_b": shown.ended[1], "time": record.time,
    }  # fmt: skip


def _safety(shown: Shown, choice: str, safety_bin: str | None, record: Record) -> dict[str, Any]:
    del safety_bin
    return {
        "id": shown.prompt_id or shown.id, "rater": record.rater, "rating": int(choice), "model": shown.models[0],
        "risk": shown.risk, "turns": shown.turns, "prompt": _plain(shown.messages), "answer": shown.texts[0],
        "ended": shown.ended[0], "time": record.time,
    }  # fmt: skip


def continuation(shown: Shown, row: Mapping[str, Any]) -> str | None:
    """The answer with which a dialog goes on after its judgement; None where it ends, as evaluations of listed prompts do.

    It is the preferred one (3.2.1; and A.3.7, where raters who make multi-turn prompts go on with the better of two answers),
    of two that are about the same either, and on the safety scale the only one.
    """
    if "chosen" in row:
        return row["chosen"]
    if shown.prompt_id:
        return None
    if "answer" in row:
        return row["answer"]
    either = hashlib.sha256(shown.id.encode()).digest()[0] & 1  # the same one after a kill
    return row["answer_a"] if row["rating"] < 4 + either else row["answer_b"]


def _words(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].split()) for message in messages)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [dict(message) for message in messages]


def to_json(shown: Shown) -> dict[str, Any]:
    """As values of JSON; `from_json` undoes it."""
    return dataclasses.asdict(shown) | {"messages": _plain(shown.messages)}


def from_json(values: Mapping[str, Any]) -> Shown:
    """What `to_json` returned."""
    tuples = {name: tuple(values[name]) for name in ("messages", "models", "temperatures")}
    drawn = {name: None if values[name] is None else tuple(values[name]) for name in ("texts", "ended")}
    return Shown(**{**values, **tuples, **drawn})
