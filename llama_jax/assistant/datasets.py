"""The demo's JSONL files: dialogs for SFT, prompts for preferences, RLHF and the verdict.

Objects and harmful requests are split by name, so nothing that is judged on held-out prompts was asked in training. The
training rows of different uses are disjoint too: a reward model does not score prompts that it was trained on.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.assistant.dialogs import dialogs, prompts, split_by_name
from llama_jax.assistant.objects import documented_objects
from llama_jax.assistant.refusals import look_alikes, refusals, split_requests
from llama_jax.data.sources import write_jsonl


@dataclasses.dataclass(frozen=True)
class DatasetSizes:
    """Rows of each use: helpful ones (a few harmless look-alikes among them) and safety ones."""

    objects: int
    max_characters: int
    sft: int
    sft_safety: int
    preferences: int
    preferences_safety: int
    rlhf: int
    rlhf_safety: int
    held_out: int
    held_out_safety: int
    held_out_fraction: float = 0.1


class _Rows:
    """Hands out rows in order, none twice."""

    def __init__(self, rows: Sequence[dict[str, Any]], name: str):
        self.rows, self.name, self.used = rows, name, 0

    def take(self, count: int) -> list[dict[str, Any]]:
        part = self.rows[self.used : self.used + count]
        if len(part) < count:
            raise ValueError(f"{self.name}: asked for {self.used + count} rows, this machine's documentation gives "
                             f"{len(self.rows)}")  # fmt: skip
        self.used += count
        return list(part)


def write_datasets(directory: Path, sizes: DatasetSizes, *, seed: int) -> dict[str, int]:
    """Writes sft, sft_held_out, preference_prompts, preference_prompts_held_out, rlhf_prompts and verdict_prompts.

    Returns the number of rows of each file.
    """
    objects = documented_objects(seed=seed, limit=sizes.objects)
    by_side = split_by_name(objects, held_out_fraction=sizes.held_out_fraction)
    harmful = split_requests(refusals(seed=seed), held_out_fraction=sizes.held_out_fraction)
    harmless = split_requests(look_alikes(seed=seed), held_out_fraction=sizes.held_out_fraction)
    train, held_out = (
        {
            "helpful": _Rows(dialogs(by_side[i], seed=seed, max_characters=sizes.max_characters), "documentation dialogs"),
            "harmful": _Rows([row for row in harmful[i] if _size(row) <= sizes.max_characters], "harmful requests"),
            "harmless": _Rows([row for row in harmless[i] if _size(row) <= sizes.max_characters], "look-alikes"),
        }
        for i in (0, 1)
    )

    def draw(side: dict[str, _Rows], helpful: int, safety: int) -> list[dict[str, Any]]:
        # One row in twenty looks harmful and is not, where there are enough of them: over-refusal must cost something.
        look_alike = min(helpful // 20, len(side["harmless"].rows) - side["harmless"].used)
        rows = side["helpful"].take(helpful - look_alike) + side["harmless"].take(look_alike)
        return rows + side["harmful"].take(safety)

    files = {
        "sft": draw(train, sizes.sft, sizes.sft_safety),
        "preference_prompts": prompts(draw(train, sizes.preferences, sizes.preferences_safety)),
        "rlhf_prompts": prompts(draw(train, sizes.rlhf, sizes.rlhf_safety)),
        "verdict_prompts": prompts(draw(held_out, sizes.held_out, sizes.held_out_safety)),
        "preference_prompts_held_out": prompts(draw(held_out, sizes.held_out, sizes.held_out_safety)),
        "sft_held_out": draw(held_out, sizes.held_out // 2, sizes.held_out_safety // 4),
    }
    return {name: write_jsonl(directory / f"{name}.jsonl", rows) for name, rows in files.items()}


def _size(row: dict[str, Any]) -> int:
    return sum(len(message["content"]) for message in row["messages"])
