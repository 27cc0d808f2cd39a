"""The arrays of a checkpoint, read and written a few layers at a time.

Orbax hands over whole leaves, and a leaf of all layers can be larger than a host's memory. The arrays lie as it would have laid
them: zarr in one OCDBT store, and it restores them, whole or in shards.
"""

import itertools
import json
import math
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
    size = array.chunk_layout.read_chunk.shape[0] if array.rank else 1
    for start, end in itertools.pairwise([*range(0, array.shape[0], size), array.shape[0]]):
        yield slice(start, end)


def _spec(params: Path, keys: Sequence[str], driver: str, *, ocdbt: bool = True) -> dict[str, Any]:
    name = ".".join(keys)
    if not ocdbt:
        return {"driver": driver, "kvstore": store(absolute(params) / name)}
    return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": store(absolute(params)), "path": f"{name}/"}}
