"""Dialogs that teach a model to obey an instruction in its own turn, written by a program (paper section 3.3).

Ghost Attention makes an instruction last; it presupposes a model that obeys one where it stands. The paper's chat models do by
their SFT data. A small model of ours learns it from these rows: `obedience_rows` end with a turn that holds an instruction and
obeys it, and `plain_rows` hold none. No answer obeys an instruction of an earlier turn: that is left to Ghost Attention.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.dialog import encode_dialog
from llama_jax.data.sources import read_dialogs, write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.rlhf.constraints import Constraint, instruction
from llama_jax.rlhf.ghost import Context, Messages, in_first_turn

# Values that a model of the demo's size can learn to write in the few rows it is shown: short and frequent words.
VALUES: dict[str, tuple[str, ...]] = {
    "opening": ("Sure", "Well", "Right", "Indeed", "Listen", "Look", "Greetings", "Certainly"),
    "closing": ("thanks", "cheers", "goodbye", "over", "done", "friend", "amen", "okay"),
    "hobby": ("chess", "painting", "cooking", "fishing", "dancing", "running", "reading", "music"),
}


def obedient(constraint: Constraint, question: str, answer: str) -> tuple[str, str]:
    """A question and an answer to it that obeys; a hobby shows only where it is asked for."""
    if constraint.family == "hobby":
        return constraint.probe, f"My hobby is {constraint.value}."
    if constraint.family == "opening":
        return question, f"{constraint.value}: {answer}"
    if constraint.family == "closing":
        return question, f"{answer} {constraint.value}"
    raise ValueError(f"constraint {constraint.family}: expected one of {', '.join(VALUES)}")


def obedience_rows(
    dialogs: Sequence[Messages], values: Mapping[str, Sequence[str]], count: int, *, earlier_share: float,
    most_turns: int, rng: np.random.Generator,
) -> list[dict[str, Any]]:  # fmt: skip
    """Dialogs whose last turn holds an instruction and obeys it.

    Args:
      dialogs: of one turn each: question and answer.
      earlier_share: of the rows, stand behind 1 to `most_turns` - 1 turns without instruction.
    """
    rows = []
    for _ in range(count):
        family = str(rng.choice(sorted(values)))
        constraint = Constraint(family, str(rng.choice(values[family])))
        question, answer = (m["content"] for m in dialogs[rng.integers(len(dialogs))])
        question, answer = obedient(constraint, question, answer)
        text = instruction([constraint], terse=bool(rng.random() < 0.5))
        last = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        earlier = rng.integers(len(dialogs), size=rng.integers(1, most_turns)) if rng.random() < earlier_share else []
        rows.append({"messages": [*_joined(dialogs, earlier), *in_first_turn(last, text, place="user")],
                     "source": "instructions"})  # fmt: skip
    return rows


def plain_rows(dialogs: Sequence[Messages], count: int, *, most_turns: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Dialogs of 2 to `most_turns` turns without instruction."""
    return [
        {"messages": _joined(dialogs, rng.integers(len(dialogs), size=rng.integers(2, most_turns + 1))), "source": "plain"}
        for _ in range(count)
    ]


def contexts_of(
    dialogs: Sequence[Messages], values: Mapping[str, Sequence[str]], count: int, *, turns: int, rng: np.random.Generator
) -> list[Context]:
    """Dialogs to measure recall on: `turns` turns and one constraint each, families, values and wordings in turn."""
    families, contexts = sorted(values), []
    for number in range(count):
        name = families[number % len(families)]
        some = values[name] or [""]  # a family without values
        constraint = Constraint(name, some[number // len(families) % len(some)])
        messages = _joined(dialogs, rng.integers(len(dialogs), size=turns))
        contexts.append(Context(messages, (constraint,), instruction([constraint], terse=bool(number // len(families) % 2))))
    return contexts


def single_turns(path: str, tokenizer: Tokenizer, *, longest: int) -> list[Messages]:
    """The dialogs of one turn, without system message, of at most `longest` tokens."""
    rows = (row["messages"] for row in read_dialogs(path))
    return [m for m in rows if len(m) == 2 and len(encode_dialog(m, tokenizer).ids) <= longest]


def write_instruction_data(
    directory: Path, dialogs: Sequence[Messages], values: Mapping[str, Sequence[str]], *, rows: int, plain: int,
    most_turns: int, earlier_share: float = 0.15, seed: int,
) -> dict[str, str]:  # fmt: skip
    """Writes what the stages read; returns the files: `instructions`, `plain` (SFT), `contexts`, `values` (Ghost Attention)."""
    rng = np.random.default_rng(seed)
    made = {
        "instructions": obedience_rows(dialogs, values, rows, earlier_share=earlier_share, most_turns=most_turns, rng=rng),
        "plain": plain_rows(dialogs, plain, most_turns=most_turns, rng=rng),
        "contexts": [{"messages": dialog} for dialog in dialogs],
        "values": [{"kind": kind, "value": value} for kind, some in values.items() for value in some],
    }
    files = {name: directory / f"{name}.jsonl" for name in made}
    for name, some in made.items():
        write_jsonl(files[name], some)
    return {name: str(path) for name, path in files.items()}


def _joined(dialogs: Sequence[Messages], indices: Sequence[int]) -> Messages:
    return [message for i in indices for message in dialogs[i]]
