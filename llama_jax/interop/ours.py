"""Checkpoints of our own stages as sources, and converted weights as checkpoints that every stage can start from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from llama_jax.config import describe, parse
from llama_jax.interop import names
from llama_jax.interop.names import Tensor, leaves
from llama_jax.interop.restore import adapter_config, base_of, model_parts
from llama_jax.interop.source import Source
from llama_jax.model.config import ModelConfig
from llama_jax.model.lora import adapter_specs, product
from llama_jax.model.params import Head, Params
from llama_jax.parallel.axes import ParamSpec, is_spec
from llama_jax.paths import absolute
from llama_jax.training.checkpoint import (
    POLICY,
    CheckpointError,
    fingerprints,
    newest_step,
    read_meta,
    saved_parts,
)

_CHUNK_BYTES = 256 << 20  # of the stored arrays: a reader of one shard need not decode the whole

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer.gguf")


def open_source(workdir: Path) -> Source:
    """Opens the newest checkpoint of a stage's workdir (of PPO: the policy), or a converted one.

    Parameters are read leaf by leaf and compared with their fingerprints; a process holds one leaf of all layers at a time.
    """
    meta = read_meta(workdir)
    config = parse(ModelConfig, meta["model"], where=str(workdir))
    head: Head = "reward_head" if "reward_head" in model_parts(workdir) else "lm_head"
    # Our own layout has no names of its own: those of Hugging Face stand in errors.
    rows = names.tensors(config, head, "huggingface")
    reader = _reader(workdir, leaves(config, head))
    tokenizer = next((workdir / name for name in TOKENIZERS if (workdir / name).is_file()), None)
    return Source(
        path=workdir, format="llama_jax", config=config, head=head, dtype=np.dtype(jnp.dtype(meta.get("dtype", "float32"))),
        tensors=tuple(rows), fetch=lambda row: row.from_ours(reader.read(row)), tokenizer=tokenizer,
    )  # fmt: skip


def _reader(workdir: Path, specs: Mapping[str, ParamSpec]) -> "_LeafReader":
    """Of the leaves of a workdir's model; of adapters, merged with the leaves of their base."""
    meta, parts = read_meta(workdir), saved_parts(workdir)
    prefix = (POLICY,) if POLICY in parts else ()
    if "lora" not in meta:
        return _LeafReader(newest_step(workdir), meta["fingerprints"], prefix, specs)
    own = parts[POLICY] if prefix else parts.keys()
    base = _reader(base_of(workdir), {path: spec for path, spec in specs.items() if path.split("/")[0] not in own})
    config = adapter_config(meta["lora"])
    tree = traverse_util.unflatten_dict(dict(specs), sep="/")
    adapters = traverse_util.flatten_dict(
        {"lora": adapter_specs(tree, config)}, sep="/", is_leaf=lambda _, node: is_spec(node)
    )
    saved = {path: spec for path, spec in specs.items() if path.split("/")[0] in own} | adapters
    reader = _LeafReader(newest_step(workdir), meta["fingerprints"], prefix, saved)
    return _MergedReader(reader, base, config.alpha / config.rank)


class _LeafReader:
    """Reads one leaf at a time and remembers the last."""

    def __init__(self, step: Path, expected: Mapping[str, int], prefix: tuple[str, ...], specs: Mapping[str, Any]):
        self._step, self._expected, self._prefix, self.specs = step, expected, prefix, specs
        self._path, self._leaf = "", np.empty(0)
        for path in specs:
            if self._key(path) not in expected:
                raise CheckpointError(f"{step}: has no parameter {path}")

    def _key(self, path: str) -> str:
        return "".join(f"['{part}']" for part in ("params", *self._prefix, *path.split("/")))

    def read(self, row: Tensor) -> np.ndarray:
        """One parameter of one layer."""
        if row.path != self._path:
            self._path, self._leaf = row.path, np.empty(0)  # the old leaf goes before the new one comes
            self._leaf = self.leaf(row.path)
        return self._leaf if row.layer is None else self._leaf[row.layer]

    def leaf(self, path: str) -> np.ndarray:
        """One parameter of all layers."""
        keys = (*self._prefix, *path.split("/"))
        spec = self.specs[path]
        item: Any = jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            item, how = {key: item}, {key: how}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                leaf = checkpointer.restore(
                    absolute(self._step / "params"),
                    args=ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True),
                )
            except Exception as error:  # Orbax and TensorStore raise many types for damaged files
                text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                raise CheckpointError(f"{self._step}: {path} cannot be read: {text}") from None
        for key in keys:
            leaf = leaf[key]
        (found,) = fingerprints(leaf, dtype="float32").values()
        if found != self._expected[self._key(path)]:
            raise CheckpointError(f"{self._step}: {path} has another checksum than when it was saved")
        return leaf


class _MergedReader(_LeafReader):
    """Reads the leaves of a base with a checkpoint's adapters added."""

    def __init__(self, adapters: _LeafReader, base: _LeafReader, scale: float):
        self._adapters, self._base, self._scale = adapters, base, scale
        self._path, self._leaf = "", np.empty(0)

    def leaf(self, path: str) -> np.ndarray:
        """One parameter of all layers."""
        if path in self._adapters.specs:
            return self._adapters.leaf(path)
        weight = self._base.leaf(path)
        a, b = (f"lora/layers/{path.split('/')[-1]}/{part}" for part in "ab")
        if a not in self._adapters.specs or not path.startswith("trunk/layers/"):
            return weight
        return weight + np.asarray(product(self._adapters.leaf(a), self._adapters.leaf(b), self._scale))


def write(directory: Path, params: Params, config: ModelConfig, *, tokenizer: str, origin: Mapping[str, Any]) -> None:
    """Writes parameters as checkpoint 0 of a workdir.

    They are stored in their own type; stages read them as float32, and the fingerprints are those of the float32 numbers
    (which hold a bfloat16 or float16 exactly). `tokenizer` is its fingerprint.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    checks: dict[str, int] = {}
    for path, leaf in flat.items():
        checks |= fingerprints({"params": traverse_util.unflatten_dict({path: leaf}, sep="/")}, dtype="float32")
    dtypes = {np.dtype(leaf.dtype).name for leaf in flat.values()}
    meta = {
        "stage": "convert", "model": describe(config), "tokenizer": tokenizer, "step": 0, "seconds": 0.0,
        "fingerprints": checks, "dtype": dtypes.pop() if len(dtypes) == 1 else "float32", "origin": dict(origin),
    }  # fmt: skip
    json.dumps(meta)  # before anything is written
    # Orbax would hold a copy of everything that it writes; so it holds a gigabyte, or the largest leaf.
    largest = max(shard.data.nbytes for leaf in flat.values() for shard in leaf.addressable_shards)
    arrays = ocp.PyTreeCheckpointHandler(save_concurrent_gb=-(-max(largest, 1) // 10**9))
    handler = ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler(), params=arrays)
    how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            absolute(directory / "checkpoints" / "0"),
            args=ocp.args.Composite(
                meta=ocp.args.JsonSave(meta), params=ocp.args.PyTreeSave(params, save_args=how),
            ),
        )  # fmt: skip
