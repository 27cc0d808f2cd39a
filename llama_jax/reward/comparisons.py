"""Preference rows to batches: both responses of a pair in one forward pass (paper section 3.2.1)."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import numpy as np

from llama_jax.data.dialog import DialogRow, encode_dialogs
from llama_jax.data.rows import read_rows
from llama_jax.data.sources import RATINGS, REJECTED_SAFE, comparison
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.parallel.axes import batch_field
from llama_jax.reward.held_out import SAFE
from llama_jax.reward.ranking import margin_table
from llama_jax.training.preparation import in_parts

log = logging.getLogger(__name__)


@flax.struct.dataclass
class ComparisonBatch:
    """Pairs; index 0 of the second axis is the chosen response."""

    tokens: Any = batch_field("batch", "pair", "length")  # [B, 2, T] int32: the whole dialog
    segment_ids: Any = batch_field("batch", "pair", "length")  # [B, 2, T] int32: 1 where real
    margin: Any  # [B] float32
    weight: Any  # [B] float32: 0 for filling
    degree: Any  # [B] int32: index in RATINGS, -1 unknown
    safe: Any = batch_field("batch", "pair")  # [B, 2] float32: the response's safety label
    safe_known: Any  # [B] float32: 1 where there is one


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """One encoded pair."""

    chosen: np.ndarray  # [n] int32: a list of Python's integers would take nine times the memory
    rejected: np.ndarray  # [n] int32
    margin: float
    degree: int
    safety_bin: str | None
    weight: float = 1.0
    source: str = ""
    response_start: int = 1  # index of the first token after the prompt, which both sides share

    @property
    def tokens(self) -> int:
        """Length of the longer side."""
        return max(len(self.chosen), len(self.rejected))


def encode_comparisons(path: str, tokenizer: Tokenizer, *, length: int, margin: str) -> list[Comparison]:
    """Reads and encodes a preference set. Pairs longer than `length` are dropped whole, never cut, and counted; so are pairs
    that prefer an unsafe answer to a safe one, as in the paper.

    Rows are read some thousands at a time, and encoded on all cores: a set of millions is held as ids alone.
    """
    comparisons, rows, unsafe, first = [], 0, 0, ""  # the first that is too long
    for some in in_parts(read_rows(path), label=f"encode {path}", unit="comparison"):
        known = [(where, comparison(raw, where)) for where, raw in some]
        safe = [(where, row) for where, row in known if row["safety_bin"] != REJECTED_SAFE]
        rows, unsafe = rows + len(known), unsafe + len(known) - len(safe)
        for (where, row), (chosen, rejected, response_start) in zip(safe, encode_sides(safe, tokenizer), strict=True):
            if (tokens := max(chosen.size, rejected.size)) > length:
                first = first or f"{where} ({tokens} tokens)"
                continue
            rating = row["rating"]
            comparisons.append(
                Comparison(
                    chosen=chosen, rejected=rejected, margin=margin_of(row, margin),
                    degree=RATINGS.index(rating) if rating else -1,
                    safety_bin=row["safety_bin"], source=row["source"], response_start=response_start,
                )
            )  # fmt: skip
    if not rows:
        raise ValueError(f"{path}: no comparisons: the file is empty")
    if unsafe:
        log.warning("%s: %d of %d pairs prefer an unsafe answer to a safe one and are dropped", path, unsafe, rows)
    if long := rows - unsafe - len(comparisons):
        log.warning(
            "%s: %d of %d pairs are longer than %d tokens and dropped; the first is %s", path, long, rows, length, first
        )
    if not comparisons:
        raise ValueError(f"{path}: none of {rows} comparisons is left: {long} do not fit into {length} tokens")
    return comparisons


def encode_sides(
    rows: Sequence[tuple[str, Mapping[str, Any]]], tokenizer: Tokenizer
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Of each comparison (where it stands, its row) the ids of the dialogs that end with the chosen and with the rejected
    answer, and where their answers begin.

    Finished turns are the same before both and encoded once: each has a BOS of its own, so the ids are those of whole dialogs.
    """
    parts: list[DialogRow] = []
    finished = []
    for where, row in rows:
        prompt = row["prompt"]
        turn = len(prompt) - 1 if len(prompt) > 2 else 0  # where the open turn begins; a system message is part of the first
        finished.append(bool(turn))
        parts += [DialogRow(prompt[:turn], where=where)] if turn else []
        parts += [
            DialogRow([*prompt[turn:], {"role": "assistant", "content": row[side]}], where=where)
            for side in ("chosen", "rejected")
        ]
    encoded, found = iter(encode_dialogs(parts, tokenizer)), []
    for turn in finished:
        earlier = next(encoded).ids if turn else np.zeros(0, np.int32)
        chosen, rejected = next(encoded), next(encoded)
        ids = (np.concatenate([earlier, last.ids]) for last in (chosen, rejected))
        found.append((*ids, len(earlier) + int(np.argmax(chosen.supervised))))
    return found


def margin_of(row: Mapping[str, Any], margin: str) -> float:
    """m(r) of a row: by its rating and the table of that name, or its own `margin`; without either, or with "none", 0."""
    if margin != "none" and row.get("margin") is not None:
        return row["margin"]
    return margin_table(margin)[row["rating"]] if row.get("rating") else 0.0


def collate(comparisons: Sequence[Comparison], *, length: int) -> ComparisonBatch:
    """Pairs to arrays, padded on the right."""
    tokens = np.zeros((len(comparisons), 2, length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for i, pair in enumerate(comparisons):
        for side, ids in enumerate((pair.chosen, pair.rejected)):
            tokens[i, side, : len(ids)] = ids
            segment_ids[i, side, : len(ids)] = 1
    return ComparisonBatch(
        tokens=tokens,
        segment_ids=segment_ids,
        margin=np.array([pair.margin for pair in comparisons], np.float32),
        weight=np.array([pair.weight for pair in comparisons], np.float32),
        degree=np.array([pair.degree for pair in comparisons], np.int32),
        safe=np.array([SAFE.get(pair.safety_bin, (False, False)) for pair in comparisons], np.float32),
        safe_known=np.array([pair.safety_bin is not None for pair in comparisons], np.float32),
    )


def blank(pair: Comparison) -> Comparison:
    """A filling pair of weight 0."""
    return dataclasses.replace(pair, weight=0.0, safety_bin=None)
