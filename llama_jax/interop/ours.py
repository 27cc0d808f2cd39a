"""Checkpoints of our own stages as sources, and converted weights as checkpoints that every stage can start from."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from llama_jax.config import describe, parse
from llama_jax.files import write_json
from llama_jax.interop import layered, names
from llama_jax.interop.names import Tensor, leaves
from llama_jax.interop.restore import adapter_config, base_of, model_parts
from llama_jax.interop.source import Source
from llama_jax.model.config import ModelConfig
from llama_jax.model.lora import adapter_specs, product
from llama_jax.model.params import Head, Params
from llama_jax.parallel.axes import ParamSpec, is_spec
from llama_jax.paths import first_line
from llama_jax.training.fingerprint import CONVERTED, CheckpointError, fingerprint_part, sealed
from llama_jax.training.saved import POLICY, instead, named, newest_step, read_meta, saved_parts

TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def open_source(workdir: Path) -> Source:
    """Opens the newest checkpoint of a stage's workdir (of PPO: the policy) or the one of `WORKDIR@STEP`, or a converted one.

    Leaves are compared with their fingerprints before any of their layers is given out. A process holds what is stored in one
    piece of a leaf (all of it, where a stage wrote it from one device) or one layer of it, whichever is more.
    """
    meta = read_meta(workdir)
    config = parse(ModelConfig, meta["model"], where=str(workdir))
    head: Head = "reward_head" if "reward_head" in model_parts(workdir) else "lm_head"
    # Our own layout has no names of its own: those of Hugging Face stand in errors.
    rows = names.tensors(config, head, "huggingface")
    reader = _reader(workdir, leaves(config, head))
    directory, _ = named(workdir)
    tokenizer = next((directory / name for name in TOKENIZERS if (directory / name).is_file()), None)
    return Source(
        path=workdir, format="llama_jax", config=config, head=head, tensors=tuple(rows),
        dtype_of=lambda row: reader.dtype(row.path), fetch=lambda row: row.from_ours(reader.read(row)), tokenizer=tokenizer,
        words=meta["tokenizer"], chat=meta.get("chat", ""),
    )  # fmt: skip


def _reader(workdir: Path, specs: Mapping[str, ParamSpec]) -> "_LeafReader | _MergedReader":
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


_IN_MEMORY = 256 << 20  # bytes of layers that lie together and are read together; see `layered.Layers`


class _LeafReader:
    """Reads one leaf at a time, layer by layer, and remembers the last."""

    def __init__(self, step: Path, expected: Mapping[str, int], prefix: tuple[str, ...], specs: Mapping[str, Any]):
        self._step, self._expected, self._prefix, self.specs = step, expected, prefix, specs
        self._dtypes: dict[str, np.dtype] = {}
        self._path, self._layers = "", None
        for path in specs:
            if _name(self._keys(path)) not in expected:
                raise CheckpointError(f"{step}: has no parameter {path}")

    def read(self, row: Tensor) -> np.ndarray:
        """One parameter of one layer."""
        if row.layer is None:
            return self.leaf(row.path)
        if row.path != self._path:
            self._open(row.path)
        return self._read(row.path, row.layer)

    def dtype(self, path: str) -> np.dtype:
        """The type that a parameter is stored in."""
        if path not in self._dtypes:
            self._dtypes[path] = self._opened(path).dtype.numpy_dtype
        return self._dtypes[path]

    def leaf(self, path: str) -> np.ndarray:
        """One parameter of all layers."""
        self._close()
        array = self._opened(path)
        try:
            whole = layered.read(array)
        except (ValueError, OSError) as error:
            raise self._unreadable(path, error) from None
        self._check(path, fingerprint_part(whole, 0))
        return whole

    def _keys(self, path: str) -> tuple[str, ...]:
        return (*self._prefix, *path.split("/"))

    def _open(self, path: str) -> None:
        """Opens a leaf of layers and compares it with its fingerprint."""
        self._close()
        array = self._opened(path)
        try:
            self._layers = layered.Layers(array, in_memory=_IN_MEMORY)
        except (ValueError, OSError) as error:
            raise self._unreadable(path, error) from None
        size = math.prod(array.shape[1:])
        self._check(path, sum(fingerprint_part(self._read(path, layer), layer * size) for layer in range(array.shape[0])))
        self._path = path

    def _close(self) -> None:
        if self._layers is not None:
            self._layers.close()
        self._path, self._layers = "", None

    def _check(self, path: str, found: int) -> None:
        if found % 2**32 != self._expected[_name(self._keys(path))]:
            problem = f"{self._step}: {path} has another checksum than when it was saved"
            raise CheckpointError(f"{problem}{instead(self._step)}")

    def _opened(self, path: str) -> Any:
        try:
            array = layered.open_array(self._step / "params", self._keys(path))
        except (ValueError, OSError) as error:
            raise self._unreadable(path, error) from None
        if array.shape != self.specs[path].shape:
            shape = list(self.specs[path].shape)
            raise CheckpointError(f"{self._step}: {path} has shape {list(array.shape)}, expected {shape}")
        return array

    def _read(self, path: str, layer: int) -> np.ndarray:
        try:
            return self._layers[layer]
        except (ValueError, OSError) as error:
            raise self._unreadable(path, error) from None

    def _unreadable(self, path: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self._step}: {path} cannot be read: {first_line(error)}{instead(self._step)}")


class _MergedReader:
    """Reads the parameters of a base with a checkpoint's adapters added."""

    def __init__(self, adapters: _LeafReader, base: "_LeafReader | _MergedReader", scale: float):
        self._adapters, self._base, self._scale = adapters, base, scale
        self._path, self._pair = "", None

    def read(self, row: Tensor) -> np.ndarray:
        """One parameter of one layer."""
        if row.path in self._adapters.specs:
            return self._adapters.read(row)
        weight = self._base.read(row)
        if row.path != self._path:
            self._path, self._pair = row.path, self._adapters_of(row.path)
        if self._pair is None:
            return weight
        a, b = (part[row.layer : row.layer + 1] for part in self._pair)
        return weight + np.asarray(product(a, b, self._scale))[0]

    def dtype(self, path: str) -> np.dtype:
        """The type that a parameter is given out in; adapters are added in float32."""
        if path in self._adapters.specs:
            return self._adapters.dtype(path)
        return np.dtype(np.float32) if self._names_of(path) else self._base.dtype(path)

    def _adapters_of(self, path: str) -> tuple[np.ndarray, np.ndarray] | None:
        found = self._names_of(path)
        return found and (self._adapters.leaf(found[0]), self._adapters.leaf(found[1]))

    def _names_of(self, path: str) -> tuple[str, str] | None:
        a, b = (f"lora/layers/{path.split('/')[-1]}/{part}" for part in "ab")
        return (a, b) if a in self._adapters.specs and path.startswith("trunk/layers/") else None


def _name(keys: Sequence[str]) -> str:
    """A leaf as fingerprints name it."""
    return "".join(f"['{part}']" for part in ("params", *keys))


class Writer:
    """Streams tensors into checkpoint 0 of a workdir, which every stage can start from.

    They are stored in their own type (see `names.kinds`; of layers that differ in theirs, as float32); stages read them as
    float32, and the fingerprints are those of the float32 numbers (which hold a bfloat16 or float16 exactly). `tokenizer` is
    its fingerprint, `chat` the `Source.chat` of what it was.
    """

    format = "llama_jax"

    def __init__(
        self, directory: Path, config: ModelConfig, head: Head, dtype: names.Kind, *, tokenizer: str,
        origin: Mapping[str, Any], chat: str = "",
    ):  # fmt: skip
        self.tensors = names.tensors(config, head, "huggingface")
        self.kinds = names.kinds(self.tensors, dtype)
        for rows in names.by_leaf(self.tensors).values():
            if len({self.kinds[row.name] for row in rows}) > 1:
                self.kinds |= names.kinds(rows, np.dtype(np.float32))
        shapes = {path: spec.shape for path, spec in leaves(config, head).items()}
        self._checkpoint = _Checkpoint(directory, config, shapes, tokenizer, origin, chat)

    def add(self, tensor: Tensor, x: np.ndarray) -> None:
        """Writes the next tensor of `self.tensors`, in our layout."""
        self._checkpoint.add(tensor.path, x, tensor.layer, self.kinds[tensor.name])

    def close(self) -> None:
        """Writes what the checkpoint says of itself."""
        self._checkpoint.close()


def write(directory: Path, params: Params, config: ModelConfig, *, tokenizer: str, origin: Mapping[str, Any]) -> None:
    """Writes parameters that are in memory as checkpoint 0 of a workdir; see `Writer`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    checkpoint = _Checkpoint(directory, config, {path: leaf.shape for path, leaf in flat.items()}, tokenizer, origin)
    for path, leaf in flat.items():
        whole = np.asarray(leaf)
        parts = enumerate(whole) if "layers" in path.split("/") else [(None, whole)]
        for layer, part in parts:
            checkpoint.add(path, part, layer, whole.dtype)
    checkpoint.close()


class _Checkpoint:
    """A checkpoint that is being written, leaf by leaf, and each whole or layer by layer."""

    def __init__(
        self, directory: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], tokenizer: str,
        origin: Mapping[str, Any], chat: str = "",
    ):  # fmt: skip
        self._shapes, self._dtypes, self._open = dict(shapes), set(), ("", None)
        self._sums = dict.fromkeys(shapes, 0)
        self._meta = {
            "stage": CONVERTED, "model": describe(config), "tokenizer": tokenizer, "step": 0, "seconds": 0.0,
            "origin": dict(origin), **({"chat": chat} if chat else {}),
        }  # fmt: skip
        json.dumps(self._meta)  # before anything is written
        self._step = directory / "checkpoints" / "0"
        self._params = layered.make_frame(self._step, [path.split("/") for path in shapes])

    def add(self, path: str, x: np.ndarray, layer: int | None, dtype: np.dtype) -> None:
        """Writes a leaf, or one layer of it; the layers of a leaf follow each other."""
        if self._open[0] != path:
            array = layered.create_array(self._params, path.split("/"), self._shapes[path], dtype, layered=layer is not None)
            self._open = path, array
            self._dtypes.add(dtype.name)
        place = ... if layer is None else layer
        self._open[1][place].write(x).result()
        part = fingerprint_part(x, (layer or 0) * x.size)
        self._sums[path] = (self._sums[path] + part) % 2**32

    def close(self) -> None:
        """Writes the meta."""
        dtype = " and ".join(sorted(self._dtypes))
        sums = {_name(path.split("/")): value for path, value in self._sums.items()}
        write_json(self._step / "meta" / "metadata", sealed(self._meta | {"fingerprints": sums, "dtype": dtype}))
