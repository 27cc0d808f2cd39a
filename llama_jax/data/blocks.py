"""The record format of token blocks on disk: what `corpus_build` writes and `loader.BlockSource` reads.

A record is `item size (2 or 4), valid tokens n` as two little-endian uint32, then T+1 ids, of which the
first n count. Only the last block of a source has n < T+1. Each record says how to read itself, so a reader
needs no manifest.
"""

from collections.abc import Sequence

import numpy as np

_HEADER = np.dtype("<u4")
_HEADER_BYTES = 2 * _HEADER.itemsize


def block_record(ids: Sequence[int] | np.ndarray, block_length: int, vocab_size: int) -> bytes:
    """Record of 1 to `block_length` + 1 ids, all below `vocab_size`; two bytes an id where that does."""
    ids = np.asarray(ids, np.int64)
    if not 1 <= len(ids) <= block_length + 1:
        raise ValueError(f"block: expected 1 to {block_length + 1} ids, got {len(ids)}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"block: expected ids in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
    item = np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")
    padded = np.zeros(block_length + 1, item)
    padded[: len(ids)] = ids
    return np.array([item.itemsize, len(ids)], _HEADER).tobytes() + padded.tobytes()


def block_ids(record: bytes) -> np.ndarray:
    """The valid ids of a record, an array [n] of uint16 or uint32."""
    item_size, valid = np.frombuffer(record, _HEADER, count=2) if len(record) >= _HEADER_BYTES else (0, 0)
    if item_size not in (2, 4) or (len(record) - _HEADER_BYTES) // item_size < max(valid, 2):
        raise ValueError(f"block: not a record of tokens ({len(record)} bytes); is the file damaged or of another kind?")
    return np.frombuffer(record, f"<u{item_size}", count=valid, offset=_HEADER_BYTES)


def block_length_of(record: bytes) -> int:
    """T of a record of T+1 ids."""
    block_ids(record)
    return (len(record) - _HEADER_BYTES) // int.from_bytes(record[:4], "little") - 1
