"""The pool of best samples (paper section 3.2.3): what each version's policy answered best, kept for all later versions.

Fine-tuning on the newest samples alone lost skills of earlier versions (the paper: rhyming in poems), so later rounds take
the best samples of *all* earlier ones. A row of a pool (JSONL) names who answered and what it was worth then:

    {"messages", "is_safety", "response", "reward", "helpfulness", "safety", "version", "policy", "temperature"}

`policy` is the fingerprint of the parameters that were sampled from. A later version scores the rows again with its own reward
models and scorers; what scorers may look at of a prompt (`reference`, any field of its row) stays with it. "scorers" is what
each of them gave, by name, and "other" their weighted sum.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.data.dialog import check_messages, prompt_key
from llama_jax.data.sources import read_jsonl
from llama_jax.rlhf.respond import usable

Row = dict[str, Any]
SCORES = ("reward", "helpfulness", "safety", "other", "scorers")
_FIELDS = {"messages": list, "is_safety": bool, "response": str, "reward": float, "version": str, "policy": str}


def least_reward(rewards: Sequence[float]) -> float:
    """What an answer counts as that no choice shall fall on: 0 of R_c, and of scorers that know no such bound the worst."""
    return 0.0 if all(0 <= reward <= 1 for reward in rewards) else min(rewards)


def choosable_rewards(samples: Sequence[Mapping[str, Any]], *, least: float) -> list[float]:
    """The reward of each sample, and `least` for one that cannot be trained on: no choice falls on it, whatever its reward."""
    return [row["reward"] if usable(row["response"], row["ended"]) else least for row in samples]


def best_samples(samples: Iterable[Mapping[str, Any]], *, version: str, policy: str, temperature: float) -> list[Row]:
    """The best usable sample of each prompt as a pool row, in the order of the prompts.

    Answers that did not end, say nothing or hold a chat tag cannot win.
    """
    best: dict[int, Mapping[str, Any]] = {}
    for sample in samples:
        number = sample["prompt"]
        if usable(sample["response"], sample["ended"]) and (number not in best or sample["reward"] > best[number]["reward"]):
            best[number] = sample
    about = {"version": version, "policy": policy, "temperature": temperature}
    return [
        {**{name: value for name, value in sample.items() if name not in ("prompt", "ended")}, **about}
        for _, sample in sorted(best.items())
    ]


def of_prompt(row: Mapping[str, Any]) -> Row:
    """What a prompt's row has beside its messages, under names that a sample and a pool do not use themselves."""
    taken = ("messages", "is_safety", "prompt", "response", "ended", "version", "policy", "temperature", *SCORES)
    return {name: value for name, value in row.items() if name not in taken}


def select(pools: Sequence[Sequence[Row]]) -> list[Row]:
    """The best row of each prompt over all pools, in the order in which the prompts first come; of equals the newest.

    `pools` stand from the oldest to the newest, with rewards of the same reward models.
    """
    best: dict[str, Row] = {}
    for pool in pools:
        for row in pool:
            key = prompt_key(row["messages"])
            if key not in best or row["reward"] >= best[key]["reward"]:
                best[key] = row
    return list(best.values())


def dialogs(rows: Sequence[Row]) -> list[Row]:
    """Pool rows as dialogs for fine-tuning; the answers inside a prompt are not the policy's, so only the last one trains."""
    return [
        {
            "messages": [*row["messages"], {"role": "assistant", "content": row["response"]}],
            "source": "rejection_sampling", "is_safety": row["is_safety"], "version": row["version"], "train_on": "last",
        }
        for row in rows
    ]  # fmt: skip


def read_pool(path: str) -> list[Row]:
    """The rows of a pool file, perhaps none: a young policy may not end one answer. ValueError with file, line and field."""
    rows = []
    for where, row in read_jsonl(path):
        for name, kind in _FIELDS.items():
            value = row.get(name)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, kind):
                raise ValueError(f"{where}: {name}: expected a {kind.__name__}, got {value!r}")
        if not math.isfinite(row["reward"]):
            raise ValueError(f"{where}: reward: expected a finite number, got {row['reward']}")
        if not usable(row["response"], True):
            raise ValueError(f"{where}: response: expected an answer without chat tags, got {row['response']!r}")
        check_messages(row["messages"], where)
        rows.append(row)
    return rows
