"""Tensors that lie in files: where they lie, how they are read, checked and cast.

Reading takes a tensor's bytes by offset, never a memory map: mapped pages count as resident memory of the process, and a
conversion must stay small while gigabytes pass through it.
"""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

_CHUNK = 1 << 22  # elements that a check looks at at once: its temporaries stay in the cache


@dataclasses.dataclass(frozen=True)
class Stored:
    """A row-major array in a file, not yet read."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def check_inside(self, name: str, size: int) -> None:
        """ValueError if the file, of `size` bytes, ends before the tensor does."""
        if self.offset + self.nbytes > size:
            raise ValueError(
                f"{self.file}: truncated: tensor {name} should end at byte {self.offset + self.nbytes:,}, the file has {size:,}"
            )

    def read(self) -> np.ndarray:
        """The array."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.fromfile(self.file, self.dtype, count, offset=self.offset).reshape(self.shape)


def check_finite(x: np.ndarray, name: str, where: object) -> None:
    """ValueError naming the tensor and the first element that is NaN or infinite."""
    flat = x.reshape(-1)
    exponent = {"float32": 0x7F80_0000, "bfloat16": 0x7F80, "float16": 0x7C00}[x.dtype.name]
    bits = flat.view(f"u{x.dtype.itemsize}")  # the bits' test is far faster than isfinite of the small types
    for start in range(0, flat.size, _CHUNK):
        wrong = (bits[start : start + _CHUNK] & exponent) == exponent
        if wrong.any():
            at = np.unravel_index(start + int(np.argmax(wrong)), x.shape)
            raise ValueError(f"{where}: tensor {name} holds {x[at]} at {[int(i) for i in at]}")


def cast(x: np.ndarray, dtype: np.dtype, name: str, where: object) -> np.ndarray:
    """The array in another type; ValueError where a finite number becomes infinite (float16 ends at 65,504)."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        result = x.astype(dtype)
    if dtype.itemsize < x.dtype.itemsize or dtype == np.float16:
        finite = np.isfinite(result)
        if not finite.all():
            at = np.unravel_index(int(np.argmin(finite)), x.shape)
            raise ValueError(f"{where}: tensor {name} holds {x[at]} at {[int(i) for i in at]}, too large for {dtype.name}")
    return result
