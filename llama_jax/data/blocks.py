"""The record format of token blocks on disk: what `corpus_build` writes and `loader.BlockSource` reads.

A record is a tf.train.Example, so that TFDS reads the files too (`tfds.data_source`), with three features:

    item_size  2 or 4, bytes of an id
    length     n, the ids that count; only the last block of a shard has n < T+1
    tokens     T+1 ids, little-endian, as one byte string

Each record says how to read itself, so a reader needs no manifest. The first two features come first and have a fixed width,
which lets `block_ids` find the ids without a parser of protocol buffers.
"""

from collections.abc import Sequence

import numpy as np


def block_record(ids: Sequence[int] | np.ndarray, block_length: int, vocab_size: int) -> bytes:
    """Record of 1 to `block_length` + 1 ids, all below `vocab_size`; two bytes an id where that does."""
    ids = np.asarray(ids, np.int64)
    if not 1 <= len(ids) <= block_length + 1:
        raise ValueError(f"block: expected 1 to {block_length + 1} ids, got {len(ids)}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"block: expected ids in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
    item = item_type(vocab_size)
    padded = np.zeros(block_length + 1, item)
    padded[: len(ids)] = ids
    tokens = _field(1, _field(1, b"tokens") + _field(2, _field(1, _field(1, padded.tobytes()))))
    return _field(1, _ITEM + bytes([item.itemsize]) + _LENGTH + _fixed(len(ids)) + tokens)


def item_type(vocab_size: int) -> np.dtype:
    """How ids below `vocab_size` are stored."""
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")


def block_ids(record: bytes) -> np.ndarray:
    """The valid ids of a record, an array [n] of uint16 or uint32."""
    item_size, valid, start, _ = _layout(record)
    return np.frombuffer(record, f"<u{item_size}", count=valid, offset=start)


def block_length_of(record: bytes) -> int:
    """T of a record of T+1 ids."""
    return _layout(record)[3] - 1


def _layout(record: bytes) -> tuple[int, int, int, int]:
    """Bytes of an id, valid ids, where they begin, and T+1."""
    try:
        at = _varint(record, 1)[1]
        item_size = record[at + len(_ITEM)]
        length = at + len(_ITEM) + 1
        valid = int.from_bytes(record[length + len(_LENGTH) : length + len(_LENGTH) + 5], "little")
        valid = sum((valid >> 8 * i & 127) << 7 * i for i in range(5))
        start = length + len(_LENGTH) + 5
        for tag in (b"\n", b"\n\x06tokens\x12", b"\n", b"\n"):
            if not record.startswith(tag, start):
                raise IndexError
            size, start = _varint(record, start + len(tag))
        fine = record.startswith(_ITEM, at) and record.startswith(_LENGTH, length) and item_size in (2, 4)
        if not fine or start + size != len(record) or not 1 <= valid <= size // item_size:
            raise IndexError
    except IndexError:
        problem = f"block: not a record of tokens ({len(record)} bytes); is the file damaged or of another kind?"
        raise ValueError(problem) from None
    return item_size, valid, start, size // item_size


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size, head = len(content), bytearray([number << 3 | 2])
    while size >= 128:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + content


def _varint(record: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = record[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fixed(value: int) -> bytes:
    """A varint of five bytes, whatever the value: leading zeros are allowed."""
    return bytes([*((value >> 7 * i & 127) | 128 for i in range(4)), value >> 28])


def _scalar(name: bytes, width: int) -> bytes:
    """An int64 feature up to its value of `width` bytes."""
    return _field(1, _field(1, name) + _field(2, _field(3, _field(1, bytes(width)))))[:-width]


_ITEM, _LENGTH = _scalar(b"item_size", 1), _scalar(b"length", 5)
