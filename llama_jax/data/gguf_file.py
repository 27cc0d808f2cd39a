"""The header of a GGUF file: its fields and where its tensors lie.

The `gguf` package reads headers too, but maps the whole file, fails on a short one without naming a tensor, and takes seconds
for a vocabulary; its dequantisation is what we use (`interop.gguf.read_tensor`).
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

# The format's types of values, in the order of their codes; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_STRING, _MAX_DIMENSIONS = 1 << 28, 4
# Elements and bytes of a block by type code; the sizes of ggml's types that model files use.
_BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A tensor in a GGUF file, not yet read. `shape` is in numpy's order, the reverse of the file's."""

    file: Path
    offset: int
    kind: int  # code of ggml
    kind_name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What stands before the tensors' bytes."""

    fields: dict[str, Any]
    tensors: dict[str, Quantised]


class _Cursor:
    def __init__(self, path: Path, file: BinaryIO, size: int):
        self._path, self._file, self._size = path, file, size

    def take(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise ValueError(f"{self._path}: truncated inside its header")
        return self._file.read(count)

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        if length > _MAX_STRING:
            raise ValueError(f"{self._path}: damaged: a string of {length:,} bytes")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("I"), self.scalar("Q")
            if item in _SCALARS:
                width = struct.calcsize(f"<{_SCALARS[item]}")
                return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * width)))
            if item != _STRING:  # arrays of arrays are allowed, and used by no model
                raise ValueError(f"{self._path}: damaged: an array of values of type {item}")
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{self._path}: damaged: a value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def position(self) -> int:
        return self._file.tell()


def read_header(path: Path) -> Header:
    """Fields and tensors of a file; ValueError if it is none, damaged, or ends before one of its tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        cursor = _Cursor(path, file, size)
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF of version {version}, expected 2 or 3 (little-endian)")
        tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
        fields = {}
        for _ in range(field_count):
            name = cursor.string()
            fields[name] = cursor.value(cursor.scalar("I"))
        entries = {}
        for _ in range(tensor_count):
            name, dimensions = cursor.string(), cursor.scalar("I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"{path}: damaged: tensor {name} has {dimensions:,} dimensions")
            shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
            entries[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{path}: general.alignment is {alignment!r}, expected a positive int")
        start = -(-cursor.position() // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        if kind not in _BLOCKS:
            raise ValueError(f"{path}: tensor {name} has ggml type {kind}, which is unknown here")
        kind_name, block, block_bytes = _BLOCKS[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"{path}: tensor {name} of shape {list(shape)} is not cut into {kind_name} blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if start + offset + nbytes > size:
            raise ValueError(
                f"{path}: truncated: tensor {name} should end at byte {start + offset + nbytes:,}, the file has {size:,}"
            )
        tensors[name] = Quantised(path, start + offset, kind, kind_name, shape, nbytes)
    return Header(fields, tensors)
