"""How a desk collects, and the prompts that it is given to be judged."""

import dataclasses
import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.annotation import forms
from llama_jax.annotation.forms import Shown
from llama_jax.data.dialog import Message, prompt_key
from llama_jax.data.rows import read_rows
from llama_jax.data.sources import read_prompts

# The fields of a row that name the models of its answers.
_MODELS = {"preference": ("chosen_model", "rejected_model"), "comparison": ("model_a", "model_b"), "safety": ("model",)}


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt of the list, with the models whose answers to it are judged together."""

    prompt_id: str
    messages: tuple[Message, ...]
    models: tuple[str, ...]
    is_safety: bool = False
    category: str = ""
    risk: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a desk collects.

    models: one or two names; with one, both answers of a pair are its.
    temperatures: one is drawn for each answer of a preference (the paper varies it); others use the first.
    """

    mode: str
    models: tuple[str, ...]
    temperatures: tuple[float, ...] = (0.6, 1.0)
    source: str = "desk"
    batch: str | int | None = None
    raters: tuple[str, ...] = ()  # who may take part; nobody named: everybody
    safety_track: bool = False  # of prompts that raters write

    def __post_init__(self):
        if self.mode not in forms.MODES:
            raise ValueError(f"mode: expected one of {', '.join(forms.MODES)}, got {self.mode!r}")
        if not 1 <= len(self.models) <= 2 or len(set(self.models)) != len(self.models):
            raise ValueError(f"checkpoint: expected one or two, with different names, got {', '.join(self.models) or 'none'}")
        if self.mode == "comparison" and len(self.models) != 2:
            raise ValueError("checkpoint: a comparison (3.4.2) is between two models; got one")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures: expected numbers of at least 0, got {self.temperatures}")


def read_prompt_list(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Prompts as `data.sources.read_prompts` reads them, with `category`, `risk` and `where` they stand, each prompt once."""
    rows, seen = [], set()
    for (where, _), row in zip(read_rows(path), read_prompts(path), strict=True):
        for name in ("category", "risk"):
            if not isinstance(row.setdefault(name, ""), str):
                raise ValueError(f"{where}: {name}: expected a string, got {row[name]!r}")
        if (key := prompt_key(row["messages"])) in seen:
            raise ValueError(f"{where}: messages: the same prompt stands above; expected each once")
        seen.add(key)
        rows.append({**row, "where": where})
    return rows


def tasks_of(row: Mapping[str, Any], settings: Settings) -> list[Task]:
    """What is to be judged of a prompt: both answers together, or on the safety scale each by itself."""
    prompt_id = hashlib.sha256(prompt_key(row["messages"]).encode()).hexdigest()[:16]
    together = [(name,) for name in settings.models] if settings.mode == "safety" else [pair_of(settings)]
    known = {name: row[name] for name in ("is_safety", "category", "risk")}
    return [Task(prompt_id, tuple(row["messages"]), models, **known) for models in together]


def pair_of(settings: Settings) -> tuple[str, ...]:
    """The models of the two sides; one model gives both."""
    return settings.models if len(settings.models) == 2 else settings.models * 2


def own_prompt(
    messages: Sequence[Message], settings: Settings, *, is_safety: bool, before: Sequence[str], chance: random.Random
) -> Task:
    """What is to be judged of a message that the rater wrote; `before` answered the messages before it, if there are any.

    On the safety scale one model answers a whole dialog: what leads it astray may take several turns.
    """
    if settings.mode != "safety":
        return Task("", tuple(messages), pair_of(settings), is_safety)
    return Task("", tuple(messages), tuple(before) or (chance.choice(settings.models),), is_safety)


def identity(case: Task | Shown) -> tuple[str, str]:
    """What a rater has judged once it was judged: the prompt with its models, whichever stood left; others are open again."""
    return case.prompt_id, "\n".join(sorted(case.models))


def judged(row: Mapping[str, Any], settings: Settings) -> tuple[str, str]:
    """`identity` of a stored row."""
    prompt_id = row.get("of_list", "") if settings.mode == "preference" else row["id"]
    return prompt_id, "\n".join(sorted(row[name] for name in _MODELS[settings.mode]))


def check_rows(rows: Sequence[Mapping[str, Any]], settings: Settings, where: str) -> None:
    """Refuses to add judgements of one protocol to those of another."""
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in _MODELS[settings.mode] if name not in row]:
            raise ValueError(f"{where}:{number}: {missing[0]}: missing; expected rows of --mode={settings.mode}")
