"""The files of `torch.save`, read without executing what they say and written without torch.

Such a file is a zip archive of uncompressed records: `data.pkl`, a pickle that describes the tensors, and `data/0`, `data/1`,
... with their bytes. Pickle can call any function; the reader below knows five names, which it
replaces by inert ones, and refuses every other.
"""

import dataclasses
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.interop.storage import Stored

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
}
# What reading a damaged archive or pickle raises: a seek outside the file, a record that claims to be encrypted, ...
_DAMAGE = (
    pickle.UnpicklingError, EOFError, TypeError, ValueError, IndexError, AttributeError, KeyError, OSError, RuntimeError,
    OverflowError, MemoryError, zlib.error, struct.error,
)  # fmt: skip
_MAX_PICKLE = 1 << 28  # bytes; the description of the largest model has less than one percent of it
_ALIGN = 64


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    elements: int


@dataclasses.dataclass(frozen=True)
class _Described:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """What a name in the pickle becomes: it can be called or named where tensors are described, and changed by nothing."""

    __slots__ = ("_name",)

    def __init__(self, name: str):
        object.__setattr__(self, "_name", name)

    def __setattr__(self, *_):
        raise pickle.UnpicklingError("it changes what it was given")

    def __setstate__(self, _):
        raise pickle.UnpicklingError("it changes what it was given")

    def __call__(self, *arguments: Any) -> Any:
        if self._name == "OrderedDict":
            return _Dictionary()
        if self._name != "_rebuild_tensor_v2" or len(arguments) < 4 or not isinstance(arguments[0], _Storage):
            raise pickle.UnpicklingError(f"it calls {self._name} as nothing else does")
        storage, offset, shape, stride = arguments[:4]
        if not all(isinstance(i, int) and i >= 0 for i in (offset, *shape, *stride)):
            raise pickle.UnpicklingError("a tensor of no shape")
        return _Described(storage, offset, tuple(shape), tuple(stride))


class _Dictionary(dict):
    """An OrderedDict; the attributes that torch hangs on a state dict (`_metadata`) are not needed."""

    def __setstate__(self, _):
        pass


class _Reader(pickle.Unpickler):
    """Builds descriptions; whatever else the pickle wants to call does not exist."""

    def find_class(self, module: str, name: str) -> Any:
        known = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")}
        if (module, name) in known or (module == "torch" and name in _STORAGES):
            return _Inert(name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of weights does not need")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, elements = pid
        if kind != "storage" or not isinstance(storage, _Inert) or storage._name not in _STORAGES:
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return _Storage(str(key), _STORAGES[storage._name], elements)


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> tensor of a file of `torch.save`; ValueError if it is none, damaged, or wants code to be run."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                records = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
                if "data.pkl" not in records or records["data.pkl"].file_size > _MAX_PICKLE:
                    raise pickle.UnpicklingError("there is no data.pkl inside")
                state = _Reader(io.BytesIO(archive.read(records["data.pkl"]))).load()
                if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                    raise pickle.UnpicklingError("its tensors are big-endian")
        except (zipfile.BadZipFile, NotImplementedError):  # as is a version or a compression that no such file has
            raise ValueError(
                f"{path}: truncated, or not a file of torch.save since version 1.6 (a zip archive of {size:,} bytes)"
            ) from None
        except _DAMAGE as error:
            raise ValueError(f"{path}: is refused, its pickle is no plain description of tensors: {error}") from None
        if not isinstance(state, Mapping):
            raise ValueError(f"{path}: expected a dictionary of tensors, got a {type(state).__name__}")
        return {name: _locate(path, file, name, value, records, size) for name, value in state.items()}


def _locate(path: Path, file: io.BufferedReader, name: str, value: Any, records: dict, size: int) -> Stored:
    if not isinstance(value, _Described):
        raise ValueError(f"{path}: entry {name} is no tensor but a {type(value).__name__}")
    record = records.get(f"data/{value.storage.key}")
    if record is None or record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: the bytes of tensor {name} are missing (data/{value.storage.key})")
    expected = tuple(math.prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
    if value.stride != expected:
        raise ValueError(f"{path}: tensor {name} is not stored row by row (strides {value.stride}, expected {expected})")
    itemsize = value.storage.dtype.itemsize
    if record.file_size < (value.offset + math.prod(value.shape)) * itemsize:
        raise ValueError(
            f"{path}: tensor {name} of shape {list(value.shape)} needs {math.prod(value.shape) * itemsize:,} bytes, "
            f"its storage has {record.file_size:,}"
        )
    # The name and extra field before a record may differ in length from those in the directory at the end.
    file.seek(max(record.header_offset, 0))
    header = file.read(30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise ValueError(f"{path}: the record of tensor {name} is damaged")
    start = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])) + value.offset * itemsize
    stored = Stored(path, start, value.storage.dtype, value.shape)
    stored.check_inside(name, size)
    return stored


class TorchWriter:
    """Writes tensors of planned names, shapes and types as `torch.save` would write their dictionary, in that order."""

    def __init__(self, path: Path, plan: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._plan = list(plan.items())
        self._folder, self._next = path.stem, 0
        self._record("data.pkl", _pickled(plan))
        self._record("byteorder", b"little")

    def add(self, name: str, x: np.ndarray) -> None:
        """Writes the next tensor."""
        expected, (shape, dtype) = self._plan[self._next]
        if (name, x.shape, x.dtype) != (expected, shape, dtype):
            raise ValueError(f"expected tensor {expected} {shape} {dtype}, got {name} {x.shape} {x.dtype}")
        self._record(f"data/{self._next}", memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8)))
        self._next += 1

    def _record(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._folder}/{name}")
        # torch aligns the bytes of a record to 64, by an extra field; zip64's own sizes (20 bytes) come after it.
        start = self._archive.fp.tell() + 30 + len(info.filename.encode()) + 20 + 4
        padding = -start % _ALIGN
        info.extra = struct.pack("<HH", 0x4246, padding) + b"\0" * padding
        with self._archive.open(info, "w", force_zip64=True) as record:
            record.write(data)

    def close(self) -> None:
        """Ends the file; all planned tensors must be there."""
        if self._next != len(self._plan):
            raise ValueError(f"tensor {self._plan[self._next][0]} was not written")
        self._record("version", b"3\n")
        self._archive.close()


def _pickled(plan: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """The pickle of {name: tensor}, written opcode by opcode, since Python's pickler would have to import torch."""
    out = [b"\x80\x02", b"}", b"("]  # protocol 2, an empty dict, a mark
    for index, (name, (shape, dtype)) in enumerate(plan.items()):
        storage = next(name for name, known in _STORAGES.items() if known == dtype)
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        out += [
            _string(name), b"ctorch._utils\n_rebuild_tensor_v2\n", b"(",
            # the persistent id ("storage", type, key, device, elements)
            b"(", _string("storage"), b"ctorch\n", storage.encode(), b"\n", _string(str(index)), _string("cpu"),
            _integer(math.prod(shape)), b"t", b"Q",
            # offset, shape, stride, requires_grad, hooks
            _integer(0), _tuple(shape), _tuple(stride), b"\x89", b"ccollections\nOrderedDict\n", b")", b"R",
            b"t", b"R",
        ]  # fmt: skip
    return b"".join([*out, b"u", b"."])  # set the items; stop


def _string(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(_integer(value) for value in values) + b"t"
