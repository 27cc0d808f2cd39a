"""Meta's release layout: `params.json` and tensor-parallel shards `consolidated.NN.pth` (fact sheet 1.4)."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.interop import names
from llama_jax.interop.huggingface import check_frequencies, write_json
from llama_jax.interop.names import Tensor
from llama_jax.interop.source import Source, check_fields, key_heads, named, number, read_object
from llama_jax.interop.storage import Stored
from llama_jax.interop.torch_file import TorchWriter, read_header
from llama_jax.model.config import ModelConfig, ffn_size
from llama_jax.model.params import Head

log = logging.getLogger(__name__)
PARAMS, TOKENIZER = "params.json", "tokenizer.model"
# What the reference code reads from params.json; another field would be a feature that is not computed here.
_FIELDS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta",
    "use_scaled_rope", "max_seq_len", "max_batch_size",
)  # fmt: skip
# Released files carry the rotary frequencies as a buffer.
_BUFFER = "rope.freqs"
# The length is not in the files; of a shape that is no preset we take Llama 2's.
_LENGTH = 4096


def read_config(path: Path, *, vocab_size: int, ffn: int) -> ModelConfig:
    """The model that a `params.json` describes, where the tensors say the vocabulary and the feed-forward width."""
    found = read_object(path)
    unknown = sorted(found.keys() - set(_FIELDS))
    if unknown:
        raise ValueError(f"{path}: {unknown[0]} is a field of another architecture; expected {', '.join(_FIELDS)}")
    check_fields(found, {"use_scaled_rope": (False, None)}, path)
    width, heads = number(found, "dim", int, path), number(found, "n_heads", int, path)
    if found.get("vocab_size", -1) not in (-1, vocab_size):
        raise ValueError(f"{path}: vocab_size is {found['vocab_size']}, the tensors have {vocab_size}")
    factor = None if found.get("ffn_dim_multiplier") is None else number(found, "ffn_dim_multiplier", float, path)
    planned = ffn_size(width, multiplier=factor, multiple_of=number(found, "multiple_of", int, path, 256))
    if planned != ffn:
        raise ValueError(f"{path}: multiple_of and ffn_dim_multiplier give a feed-forward of {planned}, the tensors have {ffn}")
    config = ModelConfig(
        name=path.parent.resolve().name or "llama",
        vocab_size=vocab_size,
        layers=number(found, "n_layers", int, path),
        width=width,
        heads=heads,
        kv_heads=key_heads(found, "n_kv_heads", path, heads),
        head_size=width // heads,
        ffn=ffn,
        max_length=number(found, "max_seq_len", int, path, _LENGTH),
        rope_theta=number(found, "rope_theta", float, path, 10_000.0),
        norm_eps=number(found, "norm_eps", float, path, 1e-5),
    )
    if "max_seq_len" in found:
        return named(config)
    preset = named(config, any_length=True)
    if preset.name.startswith("llama1-"):  # a file of Llama-2-7b-chat said 1e-6 for some time, which is Llama 1's
        log.warning(
            "%s: norm_eps %g is Llama 1's, whose context has %d tokens; if this is Llama 2, write norm_eps 1e-5 there",
            path, config.norm_eps, preset.max_length,
        )  # fmt: skip
    return preset


def open_source(directory: Path) -> Source:
    """Opens a directory with `params.json` and `consolidated.NN.pth`; their tensors are joined as they are read.

    Raises:
      ValueError: another architecture, a missing shard, or a tensor that is missing, left over, of another shape or cut off.
    """
    shards = [read_header(file) for file in _shard_files(directory)]
    for name in shards[0]:
        for rank, shard in enumerate(shards):
            if name not in shard:
                raise ValueError(f"{directory}: tensor {name} is missing in shard {rank:02d} of {len(shards)}")
    for rank, shard in enumerate(shards):
        if extra := sorted(shard.keys() - shards[0].keys()):
            raise ValueError(f"{directory}: tensor {extra[0]} is in shard {rank:02d} but not in the first")
    head: Head = "reward_head" if "score.weight" in shards[0] else "lm_head"
    config = _config(directory, shards)
    rows = names.tensors(config, head, "meta")
    shapes = {name: stored.shape for name, stored in shards[0].items()}
    if _BUFFER in shapes:
        stored = shards[0][_BUFFER]
        check_frequencies(stored.read().astype(np.float32), config, _BUFFER, stored.file)
        del shapes[_BUFFER]
    joined = dict(shapes)
    splits = {}
    for row in rows:
        if row.name in shapes:
            joined[row.name], splits[row.name] = _joined(row, shapes[row.name], len(shards))
    names.check(rows, joined, directory)
    for row in rows:
        for rank, shard in enumerate(shards):
            if shard[row.name].shape != shapes[row.name] or shard[row.name].dtype != shards[0][row.name].dtype:
                raise ValueError(
                    f"{directory}: tensor {row.name} has shape {list(shard[row.name].shape)} in shard {rank:02d} and "
                    f"{list(shapes[row.name])} in the first"
                )

    def fetch(tensor: Tensor) -> np.ndarray:
        split = splits[tensor.name]
        parts = [shard[tensor.name].read() for shard in (shards if split is not None else shards[:1])]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=split)

    tokenizer = next(
        (folder / TOKENIZER for folder in (directory, directory.parent) if (folder / TOKENIZER).is_file()), None
    )
    return Source(
        path=directory, format="meta", config=config, head=head, tensors=tuple(rows),
        dtype_of=lambda tensor: shards[0][tensor.name].dtype, fetch=fetch, tokenizer=tokenizer,
    )  # fmt: skip


def _shard_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("consolidated.*.pth"))
    for index, file in enumerate(files):
        if not re.fullmatch(rf"consolidated\.0*{index}\.pth", file.name):
            raise FileNotFoundError(f"{directory}: expected consolidated.{index:02d}.pth next, found {file.name}")
    if not files:
        raise FileNotFoundError(f"{directory}: expected consolidated.00.pth beside {PARAMS}")
    return files


def _config(directory: Path, shards: list[dict[str, Stored]]) -> ModelConfig:
    """Vocabulary and feed-forward width come from the first tensors that have them, times the shards that split them."""
    def shape(name: str) -> tuple[int, ...]:
        if name not in shards[0]:
            raise ValueError(f"{directory}: tensor {name} is missing")
        return shards[0][name].shape

    width = number(read_object(directory / PARAMS), "dim", int, directory / PARAMS)
    expected = width // max(shape("layers.0.attention.wq.weight")[0], 1)
    if expected != len(shards):
        raise FileNotFoundError(f"{directory}: expected {expected} shards consolidated.NN.pth, found {len(shards)}")
    rows, columns = shape("tok_embeddings.weight")
    vocab_size = rows * (len(shards) if columns == width else 1)
    return read_config(
        directory / PARAMS, vocab_size=vocab_size, ffn=shape("layers.0.feed_forward.w1.weight")[0] * len(shards)
    )


def _joined(row: Tensor, shape: tuple[int, ...], shards: int) -> tuple[tuple[int, ...], int | None]:
    """The shape of a tensor's shards joined, and along which dimension; Llama 3 splits the embedding over its words."""
    split = row.split
    if row.path == "trunk/embedding" and shape[1] == row.shape[1]:
        split = 0
    if split is None or len(shape) <= split or shards == 1:
        return shape, None
    return tuple(size * shards if i == split else size for i, size in enumerate(shape)), split


def params_json(config: ModelConfig) -> dict[str, Any]:
    """The `params.json` of a model. ValueError for a shape that the reference code cannot have."""
    if config.head_size * config.heads != config.width:
        raise ValueError(
            f"model {config.name}: Meta's layout needs width = heads x head_size, got {config.width} = {config.heads} x "
            f"{config.head_size}"
        )
    if config.rope_scaling is not None:
        raise ValueError(f"model {config.name}: Meta's layout does not say how its rotary positions are scaled")
    found: dict[str, Any] = {"dim": config.width, "n_layers": config.layers, "n_heads": config.heads}
    if config.kv_heads != config.heads:
        found["n_kv_heads"] = config.kv_heads
    found |= {"norm_eps": config.norm_eps, "vocab_size": -1, **_ffn(config.width, config.ffn)}
    if config.rope_theta != 10_000.0:
        found["rope_theta"] = config.rope_theta
    return found


def _ffn(width: int, ffn: int) -> dict[str, Any]:
    """The fields that give a feed-forward width: those of the releases, else a multiplier that hits it exactly."""
    for multiple_of, multiplier in ((256, None), (4096, 1.3)):
        if ffn_size(width, multiplier=multiplier, multiple_of=multiple_of) == ffn:
            extra = {} if multiplier is None else {"ffn_dim_multiplier": multiplier}
            return {"multiple_of": multiple_of, **extra}
    return {"multiple_of": 1, "ffn_dim_multiplier": (ffn + 0.5) / int(2 * (4 * width) / 3)}


class Writer:
    """Streams tensors into `shards` files at once, each tensor cut as tensor parallelism cuts it.

    The layout knows no tied embeddings: the matrix of such a model is written twice, and read again as two. See
    `names.kinds` for `dtype`.
    """

    format = "meta"

    def __init__(self, directory: Path, config: ModelConfig, head: Head, dtype: names.Kind, *, shards: int = 1):
        self.tensors = names.tensors(config, head, "meta")
        self.kinds = names.kinds(self.tensors, dtype)
        self._shards = shards
        rows = list(self.tensors)
        self._copy: Tensor | None = None  # of the embedding, as the output
        if config.tie_embeddings and head == "lm_head":
            untied = names.tensors(dataclasses.replace(config, tie_embeddings=False), head, "meta")
            self._copy = next(row for row in untied if row.path == "lm_head/kernel")
            at, embedding = next((i, row) for i, row in enumerate(rows) if row.path == "trunk/embedding")
            rows.insert(at + 1, self._copy)
            self.kinds[self._copy.name] = self.kinds[embedding.name]
        write_json(directory / PARAMS, params_json(config))
        read = named(dataclasses.replace(config, max_length=_LENGTH), any_length=True).max_length
        if read != config.max_length:  # a field `max_seq_len` would end the reference code, which is given it twice then
            log.warning(
                "%s: the context of %d tokens is lost, since Meta's layout has no place for it; read again it is %d", PARAMS,
                config.max_length, read,
            )  # fmt: skip
        plan = {row.name: (self._part(row), self.kinds[row.name]) for row in rows}
        self._files = [TorchWriter(directory / f"consolidated.{i:02d}.pth", plan) for i in range(shards)]

    def _part(self, row: Tensor) -> tuple[int, ...]:
        """The shape of one shard's part; heads are not cut in two."""
        if row.split is None:
            return row.shape
        heads = [size for axis, size in zip(row.axes, row.ours) if axis in ("heads", "kv_heads")]
        for size in (row.shape[row.split], *heads):
            if size % self._shards:
                raise ValueError(
                    f"{self._shards} shards do not divide tensor {row.name} of shape {list(row.shape)}: {size} is no multiple"
                )
        return tuple(size // self._shards if i == row.split else size for i, size in enumerate(row.shape))

    def add(self, tensor: Tensor, x: np.ndarray) -> None:
        """Writes the next tensor of `self.tensors`, in our layout."""
        self._write(tensor, tensor.from_ours(x))
        if self._copy and tensor.path == "trunk/embedding":
            self._write(self._copy, x)

    def _write(self, tensor: Tensor, x: np.ndarray) -> None:
        parts = [x] * self._shards if tensor.split is None else np.split(x, self._shards, axis=tensor.split)
        for file, part in zip(self._files, parts, strict=True):
            file.add(tensor.name, part)

    def close(self) -> None:
        """Ends the files."""
        for file in self._files:
            file.close()
