"""GGUF files, as llama.cpp reads them, in: plain types by themselves, quantised ones through the `gguf` package."""

from pathlib import Path

import ml_dtypes
import numpy as np

from llama_jax.data.gguf_file import Header, Quantised, read_header
from llama_jax.interop import names
from llama_jax.interop.names import Tensor
from llama_jax.interop.source import Source, check_fields, key_heads, named, number
from llama_jax.model.config import ModelConfig
from llama_jax.model.params import Head
from llama_jax.model.rope import RopeScaling, stretched

_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# The fields of the architecture that are understood; another would be a feature that is not computed here.
_FIELDS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "vocab_size", "attention.causal",
    "expert_count", "expert_used_count", "tensor_data_layout",
)  # fmt: skip

_DIVISORS = "rope_freqs.weight"  # of the rotary frequencies, in files of Llama 3.1 and later
_LLAMA3_LENGTH = 8192  # the old context of all of them


def read_config(header: Header, path: Path) -> tuple[ModelConfig, Head]:
    """The model of a file; ValueError naming the field that is not the Llama architecture."""
    fields = header.fields
    check_fields(fields, {"general.architecture": ("llama",), "split.count": (0, 1)}, path)
    for name in fields:
        if name.startswith("llama.") and name.removeprefix("llama.") not in _FIELDS:
            raise ValueError(f"{path}: {name} is {fields[name]!r}, a feature that is not computed here")
    found = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    fixed = {
        "rope.scaling.type": ("none", "linear"), "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,),
    }  # fmt: skip
    check_fields(found, fixed, path)
    head: Head = "reward_head" if "cls.output.weight" in header.tensors else "lm_head"
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{path}: tensor token_embd.weight is missing")
    heads, width = number(found, "attention.head_count", int, path), number(found, "embedding_length", int, path)
    head_size = number(found, "attention.key_length", int, path, width // heads)
    check_fields(found, {"rope.dimension_count": (head_size,), "attention.value_length": (head_size,)}, path)
    theta = _decimal(number(found, "rope.freq_base", float, path, 10_000.0))
    factor = _decimal(number(found, "rope.scaling.factor", float, path, 1.0))
    linear = found.get("rope.scaling.type", "linear") == "linear" and factor != 1  # as llama.cpp reads a factor alone
    scaling = RopeScaling("linear", factor) if linear else None
    if (divisors := header.tensors.get(_DIVISORS)) is not None:
        scaling = _llama3(read_tensor(divisors), head_size, theta, path)
    config = ModelConfig(
        name=str(fields.get("general.name", path.stem)),
        vocab_size=embedding.shape[0],
        layers=number(found, "block_count", int, path),
        width=width,
        heads=heads,
        kv_heads=key_heads(found, "attention.head_count_kv", path, heads),
        head_size=head_size,
        ffn=number(found, "feed_forward_length", int, path),
        max_length=number(found, "context_length", int, path),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_decimal(number(found, "attention.layer_norm_rms_epsilon", float, path)),
        tie_embeddings=head == "lm_head" and "output.weight" not in header.tensors,
    )
    return named(config), head


def _llama3(divisors: np.ndarray, head_size: int, theta: float, path: Path) -> RopeScaling:
    """Llama 3.1's scaling, of which the file has only what each frequency is divided by. # float32 [E/2]"""
    scaling = RopeScaling("llama3", round(max(float(divisors.max()), 1.0)), _LLAMA3_LENGTH)
    expected = theta ** (-np.arange(0, head_size, 2) / head_size) / stretched(head_size, theta, scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{path}: {_DIVISORS} is not Llama 3.1's scaling of {_LLAMA3_LENGTH:,} tokens; expected the Hugging Face files of "
            "the same model, whose config names its scaling"
        )
    return scaling


def _decimal(value: float) -> float:
    """The decimal number that a float32 field was written from: 1e-5 is stored as 9.999999747e-06."""
    return float(f"{value:.7g}")


def open_source(path: Path) -> Source:
    """Opens a GGUF file.

    Raises:
      ValueError: another architecture, or a tensor that is missing, left over, of another shape or cut off.
    """
    header = read_header(path)
    config, head = read_config(header, path)
    rows = names.tensors(config, head, "gguf")
    names.check(rows, {name: stored.shape for name, stored in header.tensors.items() if name != _DIVISORS}, path)

    def dtype_of(tensor: Tensor) -> np.dtype:
        return _PLAIN.get(header.tensors[tensor.name].kind_name, np.dtype(np.float32))

    def fetch(tensor: Tensor) -> np.ndarray:
        return read_tensor(header.tensors[tensor.name]).reshape(tensor.shape)

    return Source(
        path=path, format="gguf", config=config, head=head, tensors=tuple(rows), dtype_of=dtype_of, fetch=fetch,
        tokenizer=path if "tokenizer.ggml.model" in header.fields else None,
    )  # fmt: skip


def read_tensor(stored: Quantised) -> np.ndarray:
    """A tensor's values: in their own type if it is a plain one, else dequantised to float32.

    Raises:
      ModuleNotFoundError: quantised, and the `gguf` package (extra `[interop]`) is not installed.
    """
    raw = np.fromfile(stored.file, np.uint8, stored.nbytes, offset=stored.offset)
    if stored.kind_name in _PLAIN:
        return raw.view(_PLAIN[stored.kind_name]).reshape(stored.shape)
    try:
        from gguf import GGMLQuantizationType, quants
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{stored.file}: its tensors are quantised ({stored.kind_name}); reading them needs the package gguf: "
            "pip install 'llama_jax[interop]'"
        ) from None
    try:
        values = quants.dequantize(raw.reshape(*stored.shape[:-1], -1), GGMLQuantizationType(stored.kind))
    except NotImplementedError:
        raise ValueError(f"{stored.file}: the package gguf cannot dequantise {stored.kind_name}") from None
    return values.reshape(stored.shape)
