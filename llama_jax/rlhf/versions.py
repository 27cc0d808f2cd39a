"""Versions V1..V5 of the chat model (paper section 3.2): what each is made of, and the ledger of what it was made from.

Each version collects fresh comparisons with the newest two policies, trains both reward models again on all comparisons so far,
samples from the newest policy, and fine-tunes on the best samples of all versions. V4 and V5 also learn from Ghost Attention's
dialogs, and PPO goes on from V5's checkpoint. The recipe (`llama_jax.recipe`) runs a list of such plans.

The ledger is one JSON file, written anew whenever a version is finished: of each version the data files (rows and hash), the
checkpoints (step and hash of the parameters) and the scores. Those of reward models join them at the end: as in the paper, the
newest ones judge all versions.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llama_jax.config import check_least
from llama_jax.files import write_json
from llama_jax.interop.restore import fingerprint
from llama_jax.training.saved import newest_step

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class VersionPlan:
    """One version.

    Attributes:
      preferences: prompts of its fresh comparisons; 0: none are collected, and the reward models stay those of before.
      prompts: RLHF prompts that its round of rejection sampling answers.
      answers: K of that round.
      ghost: its mix holds Ghost Attention's dialogs, drawn from the policy before it.
      ppo: PPO goes on from its checkpoint.
    """

    preferences: int
    prompts: int
    answers: int
    ghost: bool = False
    ppo: bool = False

    def __post_init__(self):
        check_least("", self, preferences=0, prompts=1, answers=1)


def check_plans(plans: Sequence[VersionPlan], *, preference_prompts: int) -> None:
    """ValueError if the versions cannot follow each other, or need more prompts for comparisons than there are."""
    if not plans:
        raise ValueError("versions: expected at least one")
    if not plans[0].preferences:
        raise ValueError("versions[0].preferences: expected at least 1, since no reward model is there yet")
    if plans[0].ghost:
        raise ValueError("versions[0].ghost: expected False, since no version is there yet to sample from")
    if (wanted := sum(plan.preferences for plan in plans)) > preference_prompts:
        raise ValueError(f"versions: their preferences add up to {wanted} prompts, expected at most {preference_prompts}")


def portion(items: Sequence[T], counts: Sequence[int], number: int, *, seed: int) -> list[T]:
    """Part `number` of a shuffled sequence that is dealt out in parts of `counts` items: no item is in two parts."""
    start = sum(counts[:number])
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in order[start : start + counts[number]]]


def file_entry(path: Path, *, root: Path) -> dict[str, Any]:
    """A data file in the ledger: where, how many rows, and the hash of its bytes."""
    data = path.read_bytes()
    return {"file": str(path.relative_to(root)), "rows": data.count(b"\n"), "sha256": hashlib.sha256(data).hexdigest()}


def checkpoint_entry(workdir: Path, *, root: Path) -> dict[str, Any]:
    """A stage's newest checkpoint in the ledger: where, its step, the fingerprint of its parameters (that pools name too), and
    what it was trained from ("": random parameters)."""
    step, start = newest_step(workdir), json.loads((workdir / "config.json").read_text()).get("start", "")
    return {
        "workdir": str(workdir.relative_to(root)), "start": start.removeprefix(f"{root}/"), "step": int(step.name),
        "parameters": fingerprint(workdir),
    }  # fmt: skip


def record(path: Path, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Writes what is known of a version into the ledger, in the place of what was there of it; returns the ledger."""
    ledger = json.loads(path.read_text()) if path.exists() else {}
    ledger[name] = dict(entry)
    write_json(path, ledger)
    return ledger


def complete(path: Path, scores: Mapping[str, Mapping[str, Any]], *, judges: Mapping[str, str]) -> None:
    """Adds to the ledger what is known when all versions are there: of each model that it scores its `scores`, by name, and the
    reward models, `judges`, that gave them."""
    ledger = json.loads(path.read_text())
    for entry in ledger.values():
        entry["scores"] = {name: {**found, **scores[name]} for name, found in entry["scores"].items()}
        entry["scored_by"] = dict(judges)
    write_json(path, ledger)
