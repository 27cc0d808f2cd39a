"""The arrays of a checkpoint, read and written a few layers at a time.

Orbax hands over whole leaves, and a leaf of all layers can be larger than a host's memory. The arrays lie as it would have laid
them: zarr in one OCDBT store, and it restores them, whole or in shards.
"""

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from llama_jax.paths import absolute, store

_CHUNK_BYTES = 256 << 20  # of the stored arrays: a reader of one shard need not decode the whole


def make_frame(step: Path, leaves: Sequence[Sequence[str]]) -> Path:
    """Writes a checkpoint with an empty meta and a placeholder for each leaf; returns where its arrays lie."""
    tree: dict[str, Any] = {}
    for keys in leaves:
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = np.zeros((1,), np.float32)
    handler = ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler(), params=ocp.PyTreeCheckpointHandler())
    with ocp.Checkpointer(handler) as checkpointer:
        arguments = ocp.args.Composite(meta=ocp.args.JsonSave({}), params=ocp.args.PyTreeSave(tree))
        checkpointer.save(absolute(step), args=arguments)
    return absolute(step) / "params"


def create_array(params: Path, keys: Sequence[str], shape: Sequence[int], dtype: np.dtype, *, layered: bool) -> Any:
    """A new array in the place of a leaf's placeholder; with `layered`, each index of its first axis is stored apart."""
    chunks = [1, *shape[1:]] if layered else list(shape)
    while math.prod(chunks) * dtype.itemsize > _CHUNK_BYTES:
        widest = chunks.index(max(chunks))
        chunks[widest] = -(-chunks[widest] // 2)
    # Zeros are stored too, so that what is missing is an error.
    spec = _spec(params, keys, "zarr") | {
        "metadata": {"chunks": chunks, "compressor": {"id": "zstd", "level": 1}}, "store_data_equal_to_fill_value": True,
    }  # fmt: skip
    return ts.open(spec, create=True, delete_existing=True, dtype=dtype.name, shape=shape).result()


def open_array(params: Path, keys: Sequence[str]) -> Any:
    """A leaf of a checkpoint of any stage, not yet read."""
    how = json.loads((params / "_METADATA").read_text())
    spec = _spec(params, keys, "zarr3" if how.get("use_zarr3") else "zarr", ocdbt=how.get("use_ocdbt", True))
    return ts.open(spec | {"fill_missing_data_reads": False}, open=True, read=True).result()


def blocks(array: Any) -> Iterator[slice]:
    """The parts of its first axis that are stored together, one after the other."""
    return _parts(array.shape[0], array.chunk_layout.read_chunk.shape[0] if array.rank else 1)


def read(array: Any, index: Any = ...) -> np.ndarray:
    """Some of an array, or all of it."""
    return array[index].read().result()


class Layers:
    """An array of all layers, read a layer at a time in little memory, however it is stored.

    A stage on many devices stores pieces that hold some columns of every layer, so that one layer is in all of them. Then each
    piece is read once, and its layers go to their places in a scratch file (in `TMPDIR`, as large as the array, gone when it
    is closed). What lies layer by layer, or has at most `in_memory` bytes, needs none.
    """

    def __init__(self, array: Any, *, in_memory: int):
        self._array, self.shape, self._dtype = array, array.shape, array.dtype.numpy_dtype
        self._blocks, self._at, self._block, self._scratch = list(blocks(array)), slice(0, 0), np.empty(0), None
        chunk = array.chunk_layout.read_chunk.shape
        longest = self._blocks[0].stop * math.prod(self.shape[1:]) * self._dtype.itemsize
        if longest > in_memory and chunk[1:] != self.shape[1:] and chunk[0] > 1:
            self._scratch = tempfile.TemporaryFile(prefix="llama_jax.")  # noqa: SIM115 - until `close`
            self._spill(chunk)

    def __getitem__(self, layer: int) -> np.ndarray:
        if self._scratch is not None:
            count = math.prod(self.shape[1:])
            self._scratch.seek(layer * count * self._dtype.itemsize)
            return np.fromfile(self._scratch, self._dtype, count).reshape(self.shape[1:])
        if not self._at.start <= layer < self._at.stop:
            self._block = np.empty(0)  # the old block goes before the new one comes
            self._at = next(at for at in self._blocks if at.start <= layer < at.stop)
            self._block = read(self._array, self._at)
        return self._block[layer - self._at.start]

    def close(self) -> None:
        """Gives memory and disk back."""
        self._at, self._block = slice(0, 0), np.empty(0)
        if self._scratch is not None:
            self._scratch.close()

    def _spill(self, chunk: Sequence[int]) -> None:
        size = math.prod(self.shape[1:]) * self._dtype.itemsize
        total, folder = self.shape[0] * size, tempfile.gettempdir()
        if (free := shutil.disk_usage(folder).free) < total:  # writing into a mapping of a full disk would end the process
            raise OSError(
                f"putting its layers together takes {total:,} bytes in {folder} (TMPDIR), which has {free:,}; TMPDIR=... names "
                "another place"
            )
        self._scratch.truncate(total)
        for index in itertools.product(*(_parts(*sizes) for sizes in zip(self.shape, chunk, strict=True))):
            piece = read(self._array, index)
            for layer, part in enumerate(piece, start=index[0].start):
                # Mapped for one layer and one piece only: pages of a mapping count as the process's memory.
                place = np.memmap(self._scratch, self._dtype, "r+", offset=layer * size, shape=self.shape[1:])
                place[index[1:]] = part
                del place
            del piece, part  # before the next one comes


def _parts(length: int, size: int) -> Iterator[slice]:
    for start, end in itertools.pairwise([*range(0, length, size), length]):
        yield slice(start, end)


def _spec(params: Path, keys: Sequence[str], driver: str, *, ocdbt: bool = True) -> dict[str, Any]:
    name = ".".join(keys)
    if not ocdbt:
        return {"driver": driver, "kvstore": store(absolute(params) / name)}
    return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": store(absolute(params)), "path": f"{name}/"}}
