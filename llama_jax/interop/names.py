"""The name tables: which tensor of which file is which part of which parameter, derived from the parameter table.

Files hold one tensor a layer and store a matrix as [out, in]; we stack layers and keep the axes of heads apart. Besides that,
formats differ in the order of the rows of the query and key projections, in which each head's elements are rotated in pairs:

    Hugging Face and we   element i with element i + E/2    ("split halves")
    Meta and GGUF         element 2i with element 2i + 1    ("adjacent")

`Tensor.to_ours` and `Tensor.from_ours` are the only place where rows are permuted, transposed or reshaped.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from flax import traverse_util

from llama_jax.model.config import ModelConfig
from llama_jax.model.params import Head, table
from llama_jax.parallel.axes import ParamSpec, is_spec

Format = Literal["huggingface", "meta", "gguf"]

# our leaf -> (Hugging Face, Meta, GGUF); {} is the layer. Fact sheet 1.4; llama.cpp's names for GGUF. A reward model's head
# has no name at Meta; it takes Hugging Face's.
NAMES: dict[str, tuple[str, str, str]] = {
    "trunk/embedding": ("model.embed_tokens.weight", "tok_embeddings.weight", "token_embd.weight"),
    "trunk/layers/attention_norm": (
        "model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight", "blk.{}.attn_norm.weight",
    ),
    "trunk/layers/query": (
        "model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.wq.weight", "blk.{}.attn_q.weight",
    ),
    "trunk/layers/key": (
        "model.layers.{}.self_attn.k_proj.weight", "layers.{}.attention.wk.weight", "blk.{}.attn_k.weight",
    ),
    "trunk/layers/value": (
        "model.layers.{}.self_attn.v_proj.weight", "layers.{}.attention.wv.weight", "blk.{}.attn_v.weight",
    ),
    "trunk/layers/output": (
        "model.layers.{}.self_attn.o_proj.weight", "layers.{}.attention.wo.weight", "blk.{}.attn_output.weight",
    ),
    "trunk/layers/ffn_norm": (
        "model.layers.{}.post_attention_layernorm.weight", "layers.{}.ffn_norm.weight", "blk.{}.ffn_norm.weight",
    ),
    "trunk/layers/gate": (
        "model.layers.{}.mlp.gate_proj.weight", "layers.{}.feed_forward.w1.weight", "blk.{}.ffn_gate.weight",
    ),
    "trunk/layers/up": (
        "model.layers.{}.mlp.up_proj.weight", "layers.{}.feed_forward.w3.weight", "blk.{}.ffn_up.weight",
    ),
    "trunk/layers/down": (
        "model.layers.{}.mlp.down_proj.weight", "layers.{}.feed_forward.w2.weight", "blk.{}.ffn_down.weight",
    ),
    "trunk/final_norm": ("model.norm.weight", "norm.weight", "output_norm.weight"),
    "lm_head/kernel": ("lm_head.weight", "output.weight", "output.weight"),
    "reward_head/kernel": ("score.weight", "score.weight", "cls.output.weight"),
}  # fmt: skip

FORMATS: tuple[Format, ...] = ("huggingface", "meta", "gguf")
ADJACENT_PAIRS: tuple[Format, ...] = ("meta", "gguf")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, and the parameter (of one layer, where it has layers) that it is.

    Attributes:
      name, shape: in the file.
      path: of our leaf, as "trunk/layers/query"; layer: its index in the stack, or None.
      ours, axes: shape and logical axes of the parameter, without the axis of layers.
      paired_heads: number of heads whose rows lie in adjacent pairs; 0 if the rows lie as ours.
      split: the dimension that Meta cuts among tensor-parallel shards; None: each shard holds a copy.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    ours: tuple[int, ...]
    axes: tuple[str | None, ...]
    paired_heads: int
    split: int | None

    @property
    def _lies_as_ours(self) -> bool:
        """Vectors and the embedding do; matrices are [out, in] in files, which a square one's shape does not tell."""
        return len(self.shape) == 1 or self.path == "trunk/embedding"

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """The file's tensor as our parameter; a view where that is possible."""
        if self.paired_heads:
            x = x.reshape(self.paired_heads, -1, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        return x if self._lies_as_ours else x.T.reshape(self.ours)

    def from_ours(self, x: np.ndarray) -> np.ndarray:
        """Our parameter as the file's tensor: the inverse of `to_ours`."""
        if not self._lies_as_ours:
            x = x.reshape(self.shape[::-1]).T
        if self.paired_heads:
            x = x.reshape(self.paired_heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        return x


def leaves(config: ModelConfig, head: Head) -> dict[str, ParamSpec]:
    """The flat parameter table of a model: path -> spec."""
    specs = table(config, head=head)
    return traverse_util.flatten_dict(specs, sep="/", is_leaf=lambda _, node: is_spec(node))


def tensors(config: ModelConfig, head: Head, file_format: Format) -> list[Tensor]:
    """Every tensor that a file of a format holds for a model, leaf by leaf in the order of the table."""
    column = FORMATS.index(file_format)
    rows = []
    for path, spec in leaves(config, head).items():
        layered = spec.axes[0] == "layers"
        shape, axes = (spec.shape[1:], spec.axes[1:]) if layered else (spec.shape, spec.axes)
        file_shape, split = _layout(path, shape, axes)
        paired = file_format in ADJACENT_PAIRS and path in ("trunk/layers/query", "trunk/layers/key")
        for layer in range(spec.shape[0]) if layered else (None,):
            rows.append(
                Tensor(
                    name=NAMES[path][column].format(layer), shape=file_shape, path=path, layer=layer, ours=shape, axes=axes,
                    paired_heads=shape[1] if paired else 0, split=split,
                )
            )  # fmt: skip
    return rows


Kind = np.dtype | Callable[[Tensor], np.dtype]  # of all tensors, or of each


def kinds(rows: Iterable[Tensor], dtype: Kind) -> dict[str, np.dtype]:
    """The type of each tensor, by its name."""
    return {row.name: dtype if isinstance(dtype, np.dtype) else dtype(row) for row in rows}


def _layout(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[tuple[int, ...], int | None]:
    """The shape [out, in] in files, and the dimension that Meta splits: the one that is not the width, but of the
    embedding the width."""
    if path == "trunk/embedding":
        return shape, 1
    if path == "reward_head/kernel":
        return (1, *shape), None
    if len(shape) == 1:
        return shape, None
    if axes[0] == "width":  # reads the residual stream
        return (math.prod(shape[1:]), shape[0]), 0
    return (shape[-1], math.prod(shape[:-1])), 1  # writes into it


def by_leaf(rows: list[Tensor]) -> dict[str, list[Tensor]]:
    """The tensors of each leaf, in the order of the layers."""
    groups: dict[str, list[Tensor]] = {}
    for row in rows:
        groups.setdefault(row.path, []).append(row)
    return groups


def check(rows: list[Tensor], found: dict[str, tuple[int, ...]], where: Any) -> None:
    """ValueError naming the first tensor that is missing, of another shape, or not the model's."""
    missing = [row for row in rows if row.name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{where}: tensor {missing[0].name} of shape {list(missing[0].shape)} is missing{more}")
    for row in rows:
        if tuple(found[row.name]) != row.shape:
            raise ValueError(
                f"{where}: tensor {row.name} has shape {list(found[row.name])}, the config asks for {list(row.shape)}"
            )
    extra = sorted(found.keys() - {row.name for row in rows})
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ValueError(f"{where}: tensor {extra[0]} of shape {list(found[extra[0]])} is not part of this model{more}")
