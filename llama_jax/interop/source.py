"""A checkpoint of any format, opened: the model's shape and where each tensor lies, none of them read yet."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_jax.interop.names import Tensor
from llama_jax.model.config import SIZES, ModelConfig
from llama_jax.model.params import Head


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint, whose names and shapes have been checked against its config.

    Attributes:
      path, format: where it lies and what it is.
      config, head: the model.
      tensors: every tensor, leaf by leaf.
      dtype_of: the type that one of them is stored in; float32 for quantised ones.
      fetch: reads one of them, in the file's layout.
      tokenizer: the file of its tokenizer, if there is one.
      words: the fingerprint of the tokenizer that it was trained with, where the format says it.
      chat: the format in which it was trained to chat, where the checkpoint says it: "llama2", or its tokenizer's "template".
      token_ids: what Hugging Face's config says of BOS, EOS and padding, by its fields; None in other formats.
    """

    path: Path
    format: Literal["huggingface", "meta", "gguf", "llama_jax"]
    config: ModelConfig
    head: Head
    tensors: tuple[Tensor, ...]
    dtype_of: Callable[[Tensor], np.dtype]
    fetch: Callable[[Tensor], np.ndarray]
    tokenizer: Path | None = None
    words: str = ""
    chat: str = ""
    token_ids: Mapping[str, Any] | None = None

    def read(self, tensor: Tensor) -> np.ndarray:
        """One parameter (of one layer), in our layout and the file's type."""
        return tensor.to_ours(self.fetch(tensor))


def require_language_model(source: Source) -> None:
    """ValueError, as a sentence, if the checkpoint is no language model."""
    if source.head != "lm_head":
        raise ValueError(f"{source.path}: this is a reward model: it has `score.weight` and no `lm_head`")


def named(config: ModelConfig, *, any_length: bool = False) -> ModelConfig:
    """The preset of that shape if there is one (`any_length`: whatever its max_length), else the config itself."""
    ignored = ("name", "max_length") if any_length else ("name",)
    for preset in SIZES.values():
        if dataclasses.replace(config, **{field: getattr(preset, field) for field in ignored}) == preset:
            return preset
    return config


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a config file; ValueError for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def check_fields(found: dict, expected: dict, where: Path) -> None:
    """ValueError naming the first field whose value is none of those that this architecture has."""
    for field, values in expected.items():
        if field in found and found[field] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise ValueError(f"{where}: {field} is {found[field]!r}; the Llama architecture here has {wanted}")


def number(found: dict, field: str, kind: type, where: Path, default: float | None = None):
    """A positive number of a JSON config; ValueError naming the field."""
    value = found.get(field)
    if value is None:
        if default is None:
            raise ValueError(f"{where}: {field} is missing, expected a positive {kind.__name__}")
        return default
    plain = not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < 1e300  # so neither NaN nor infinite
    if not plain or kind(value) != value:
        raise ValueError(f"{where}: {field} is {value!r}, expected a positive {kind.__name__}")
    return kind(value)


def key_heads(found: dict, field: str, where: Path, heads: int) -> int:
    """How many key-value heads a config has, without the field one for each head; ValueError if they cannot share the heads."""
    found_heads = number(found, field, int, where, heads)
    if heads % found_heads:
        raise ValueError(f"{where}: {field} is {found_heads}, expected a divisor of the {heads} heads")
    return found_heads
