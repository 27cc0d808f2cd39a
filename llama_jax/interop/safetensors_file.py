"""The safetensors format, read by offset and written as a stream.

The `safetensors` library maps files into memory and writes a file from a dictionary of all its arrays; a shard of the usual
5 GB would break our bound on memory, and its errors name no tensor. The format is a length, a JSON header and bytes.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path

import ml_dtypes
import numpy as np

from llama_jax.interop.storage import Stored

_CODES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_MAX_HEADER = 100_000_000  # bytes, the library's own limit


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> tensor of a file; ValueError if the header is damaged or a tensor lies outside the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path}: not a safetensors file, or truncated: its header should have {length:,} bytes")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file: its header is no JSON object")
    found, last = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            integers = all(isinstance(i, int) and i >= 0 for i in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            integers = False
        if not integers:
            raise ValueError(f"{path}: damaged: the header's entry of tensor {name} is {entry!r}")
        if code not in _CODES:
            raise ValueError(f"{path}: tensor {name} has type {code}, expected one of {', '.join(_CODES)}")
        stored = Stored(path, 8 + length + begin, _CODES[code], shape)
        if end - begin != stored.nbytes:
            raise ValueError(
                f"{path}: tensor {name} of shape {list(stored.shape)} and type {code} needs {stored.nbytes:,} "
                f"bytes, the header gives it {end - begin:,}"
            )
        stored.check_inside(name, size)
        found[name], last = stored, max(last, end)
    if (behind := size - (8 + length + last)) > 0:
        raise ValueError(f"{path}: mis-sized: {behind:,} bytes lie behind its last tensor; damaged?")
    return found


class SafetensorsWriter:
    """Takes the tensors of one file in the order in which they were planned."""

    def __init__(self, file: FileIO, plan: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        self._file, self._plan = file, iter(plan.items())
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, (shape, dtype) in plan.items():
            code = next(code for code, known in _CODES.items() if known == dtype)
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, x: np.ndarray) -> None:
        """Writes the next tensor."""
        expected, (shape, dtype) = next(self._plan)
        if (name, x.shape, x.dtype) != (expected, shape, dtype):
            raise ValueError(f"expected tensor {expected} {shape} {dtype}, got {name} {x.shape} {x.dtype}")
        self._write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)

    def _write(self, data: bytes | memoryview) -> None:
        """All of it, or an OSError with the file's name and the reason; NumPy's own `tofile` tells neither of a full disk."""
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None


@contextlib.contextmanager
def write_file(path: Path, plan: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Iterator[SafetensorsWriter]:
    """Yields a writer of the planned tensors (name -> shape and type)."""
    with open(path, "wb", buffering=0) as file:  # a buffer that could not be written would be tried again at the end
        yield SafetensorsWriter(file, plan)
