"""Several dialogs in one row, none split and none lost (paper section 3.1).

Unlike plain concatenation, each dialog is a segment: its own positions, its own attention, and no target
that reaches into the next one, so the loss of a packed row is the sum of the losses of its dialogs.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.data.dialog import EncodedDialog
from llama_jax.data.loader import TokenBatch


@dataclass(frozen=True)
class Packed:
    """Rows [T] and what went into them."""

    rows: list[TokenBatch]
    tokens: int  # ids in the rows, padding not counted
    supervised: int  # of these, targets of the loss

    @property
    def padding(self) -> float:
        """Share of the rows that is padding."""
        return 1 - self.tokens / (len(self.rows) * self.rows[0].tokens.size) if self.rows else 0.0


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing: the examples of each row. ValueError for a length outside 1..row_length.

    The longest example goes first, into the row where it leaves the least room. Deterministic: ties by index.
    """
    for i, length in enumerate(lengths):
        if not 1 <= length <= row_length:
            raise ValueError(f"example {i}: expected 1 to {row_length} tokens, got {length}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        best = bisect.bisect_left(room, (lengths[i], -1))
        if best == len(room):
            free, row = row_length, len(rows)
            rows.append([])
        else:
            free, row = room.pop(best)
        rows[row].append(i)
        if free > lengths[i]:
            bisect.insort(room, (free - lengths[i], row))
    return rows


def packed_row(examples: Sequence[EncodedDialog], row_length: int) -> TokenBatch:
    """One row [T] of examples, in the order given. ValueError when they do not fit."""
    total = sum(len(example.ids) for example in examples)
    if total > row_length:
        raise ValueError(f"row: expected at most {row_length} tokens, got {total} in {len(examples)} examples")
    tokens, targets, segment_ids, positions = np.zeros((4, row_length), np.int32)
    weights = np.zeros(row_length, np.float32)
    start = 0
    for segment, example in enumerate(examples, start=1):
        end = start + len(example.ids)
        tokens[start:end] = example.ids
        # The last token of a segment has no target: the next id belongs to another dialog.
        targets[start : end - 1] = example.ids[1:]
        weights[start : end - 1] = example.supervised[1:]
        segment_ids[start:end] = segment
        positions[start:end] = np.arange(len(example.ids))
        start = end
    return TokenBatch(tokens=tokens, targets=targets, weights=weights, segment_ids=segment_ids, positions=positions)


def pack_dialogs(examples: Sequence[EncodedDialog], row_length: int) -> Packed:
    """Rows of all examples. ValueError for one that is longer than a row, which is never cut, or has nothing supervised."""
    for i, example in enumerate(examples):
        if len(example.ids) != len(example.supervised):
            raise ValueError(f"example {i}: {len(example.ids)} ids but {len(example.supervised)} supervised flags")
        if not np.any(example.supervised[1:]):
            raise ValueError(f"example {i}: no supervised token, it would train nothing")
    too_long = [i for i, example in enumerate(examples) if len(example.ids) > row_length]
    if too_long:
        raise ValueError(
            f"example {too_long[0]}: expected at most {row_length} tokens, got {len(examples[too_long[0]].ids)} "
            f"({len(too_long)} of {len(examples)} examples are too long)"
        )
    groups = pack([len(example.ids) for example in examples], row_length)
    return Packed(
        rows=[packed_row([examples[i] for i in group], row_length) for group in groups],
        tokens=sum(len(example.ids) for example in examples),
        supervised=sum(int(np.sum(example.supervised[1:])) for example in examples),
    )
