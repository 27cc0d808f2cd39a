"""Hugging Face checkpoints: `config.json` and safetensors, as `transformers` reads and writes them (and vLLM by its names)."""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.tokenizer import tokenizer_in
from llama_jax.interop import names
from llama_jax.interop.names import Tensor
from llama_jax.interop.safetensors_file import SafetensorsWriter, read_header, write_file
from llama_jax.interop.source import Source, check_fields, key_heads, named, number, read_object
from llama_jax.interop.storage import Stored
from llama_jax.model.config import ModelConfig
from llama_jax.model.params import Head
from llama_jax.model.rope import RopeScaling, stretched

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
SHARD_BYTES = 5 * 10**9  # transformers' own default

_ARCHITECTURES: dict[str, Head] = {"LlamaForCausalLM": "lm_head", "LlamaForSequenceClassification": "reward_head"}
# What a config may say beside the shape, and what the model here computes.
_FIXED = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    # Of models that call themselves "llama" and scale what Llama does not.
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The fields of each way to scale rotary positions, beside its factor, in the order of `RopeScaling`.
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_slow", "beta_fast", "attention_factor"),
}


def read_config(path: Path) -> tuple[ModelConfig, Head]:
    """The model that a `config.json` describes; ValueError naming the field that is not the Llama architecture."""
    found = read_object(path)
    check_fields(found, _FIXED, path)
    architectures = found.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in list(_ARCHITECTURES):
        raise ValueError(f"{path}: architectures is {architectures}, expected one of {', '.join(_ARCHITECTURES)}")
    head = _ARCHITECTURES[architectures[0]]
    # Without either field transformers has two.
    labels = found.get("num_labels") or len(_object(found, "id2label", path)) or 2
    if head == "reward_head" and labels != 1:
        raise ValueError(f"{path}: num_labels is {labels}; a reward model has 1")
    heads, width = number(found, "num_attention_heads", int, path), number(found, "hidden_size", int, path)
    if not isinstance(tied := found.get("tie_word_embeddings") or False, bool):
        raise ValueError(f"{path}: tie_word_embeddings is {tied!r}, expected true or false")
    config = ModelConfig(
        name=_name(path),
        vocab_size=number(found, "vocab_size", int, path),
        layers=number(found, "num_hidden_layers", int, path),
        width=width,
        heads=heads,
        kv_heads=key_heads(found, "num_key_value_heads", path, heads),
        head_size=number(found, "head_dim", int, path, width // heads),
        ffn=number(found, "intermediate_size", int, path),
        max_length=number(found, "max_position_embeddings", int, path, 2048),
        **_rope(found, path),
        norm_eps=number(found, "rms_norm_eps", float, path, 1e-6),
        tie_embeddings=tied,
    )
    return named(config), head


def _object(found: dict[str, Any], field: str, path: Path) -> dict[str, Any]:
    """An object inside a config, empty where there is none; ValueError naming the field."""
    value = found.get(field)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {field} is {value!r}, expected an object")
    return value or {}


def _name(path: Path) -> str:
    return path.parent.resolve().name or "llama"


def _rope(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """The base of the rotary frequencies and their scaling, as fields of the config; kinds not known here are refused."""
    given = {field: _object(found, field, path) for field in ("rope_scaling", "rope_parameters")}
    parameters = {**given["rope_scaling"], **given["rope_parameters"]}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ["default", *_ROPE_FIELDS]:
        known = ", ".join(map(repr, ("default", *_ROPE_FIELDS)))
        raise ValueError(f"{path}: rope_type is {kind!r}; rotary positions are computed here as one of {known}")
    if (partial := parameters.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is {partial}; whole heads are rotated here")
    if kind == "default":
        _check_unscaled(given, path)
    theta = number(parameters if parameters.get("rope_theta") is not None else found, "rope_theta", float, path, 10_000.0)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else _scaling(kind, parameters, found, path)}


def _check_unscaled(given: dict[str, dict[str, Any]], path: Path) -> None:
    """ValueError for a field, of rotary positions of no kind or the default one, that would change them: a factor, or others
    for each kind of layer."""
    for field, parameters in given.items():
        for name, value in parameters.items():
            if name in ("rope_type", "type", "rope_theta", "partial_rotary_factor") or value is None:
                continue
            if (name, value) != ("factor", 1.0):
                kinds = ", ".join(map(repr, _ROPE_FIELDS))
                raise ValueError(f"{path}: {field}.{name} is {value!r}, expected rope_type beside it to be one of {kinds}")


def _scaling(kind: str, parameters: dict[str, Any], found: dict[str, Any], path: Path) -> RopeScaling:
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", *_ROPE_FIELDS[kind]}
    values = {name: value for name, value in parameters.items() if value is not None and (name, value) != ("truncate", True)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{path}: {unknown[0]} is {values[unknown[0]]!r}, a feature of rope_type {kind!r} not computed here")
    factor = float(number(values, "factor", float, path))
    if kind == "linear":
        return RopeScaling(kind, factor)
    if kind == "dynamic":  # transformers takes the context itself for the old one
        return RopeScaling(kind, factor, number(found, "max_position_embeddings", int, path, 2048))
    length = number(found, "max_position_embeddings", int, path, 2048)
    original = number(values, "original_max_position_embeddings", int, path, length)
    if kind == "llama3":
        slow, fast = (float(number(values, name, float, path)) for name in ("low_freq_factor", "high_freq_factor"))
        return RopeScaling(kind, factor, original, slow, fast)
    slow, fast = number(values, "beta_slow", float, path, 1.0), number(values, "beta_fast", float, path, 32.0)
    magnitude = number(values, "attention_factor", float, path, 0.1 * math.log(factor) + 1)
    return RopeScaling(kind, factor, original, slow, fast, magnitude)


def rope_json(config: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` of a model: the inverse of `_rope`."""
    parameters: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        if scaling.kind == "dynamic" and scaling.original_length != config.max_length:
            raise ValueError(
                f"model {config.name}: Hugging Face's config takes max_length {config.max_length} for the old context of its "
                f"rotary positions, which is {scaling.original_length}"
            )
        parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
        values = (scaling.original_length, scaling.slow, scaling.fast, scaling.magnitude)
        parameters |= dict(zip(_ROPE_FIELDS[scaling.kind], values))
    return parameters


def open_source(directory: Path) -> Source:
    """Opens a directory with `config.json` and one or several safetensors files.

    Raises:
      ValueError: another architecture, or a tensor that is missing, left over, of another shape or cut off.
    """
    config, head = read_config(directory / CONFIG)
    said = read_object(directory / CONFIG)
    found = _headers(directory)
    shapes = {name: stored.shape for name, stored in found.items()}
    if head == "lm_head" and "score.weight" in found and "lm_head.weight" not in found:
        raise ValueError(
            f"{directory}: this is a reward model: it has `score.weight` and no `lm_head`, but {CONFIG} says LlamaForCausalLM"
        )
    rows = names.tensors(config, head, "huggingface")
    tied = head == "lm_head" and config.tie_embeddings and "lm_head.weight" in shapes
    if tied:  # some programs write both copies
        _check_same(found["lm_head.weight"], found["model.embed_tokens.weight"], directory)
        del shapes["lm_head.weight"]
    for name in [name for name in shapes if name.endswith("rotary_emb.inv_freq")]:
        _check_frequencies(found[name], config, name)
        del shapes[name]
    names.check(rows, shapes, directory)
    return Source(
        path=directory, format="huggingface", config=config, head=head, tensors=tuple(rows),
        dtype_of=lambda tensor: found[tensor.name].dtype, fetch=lambda tensor: found[tensor.name].read(),
        tokenizer=tokenizer_in(directory), token_ids={name: said[name] for name in _TOKEN_IDS if name in said},
    )  # fmt: skip


def _headers(directory: Path) -> dict[str, Stored]:
    if not (directory / INDEX).is_file():
        if not (directory / WEIGHTS).is_file():
            if list(directory.glob("pytorch_model*.bin")):
                raise ValueError(f"{directory}: holds pytorch_model.bin only; expected safetensors")
            raise FileNotFoundError(f"{directory}: expected {WEIGHTS} or {INDEX} beside {CONFIG}, found neither")
        return read_header(directory / WEIGHTS)
    places = read_object(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{directory / INDEX}: expected JSON with a weight_map, from names of tensors to files")
    found: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (directory / file).is_file():
            name = next(name for name, place in places.items() if place == file)
            raise FileNotFoundError(f"{directory / file}: missing; {INDEX} puts tensor {name} there")
        header = read_header(directory / file)
        for name, stored in header.items():
            if places.get(name) != file:
                raise ValueError(f"{directory / file}: tensor {name} is there, {INDEX} puts it in {places.get(name)}")
            found[name] = stored
    for name, file in places.items():
        if name not in found:
            raise ValueError(f"{directory / file}: tensor {name} is missing, {INDEX} puts it there")
    return found


def _check_same(a: Stored, b: Stored, where: Path) -> None:
    if a.shape != b.shape or not np.array_equal(a.read().view(np.uint8), b.read().view(np.uint8)):
        raise ValueError(
            f"{where}: tie_word_embeddings is true, but tensor lm_head.weight differs from model.embed_tokens.weight"
        )


def _check_frequencies(stored: Stored, config: ModelConfig, name: str) -> None:
    """Old files carry the rotary frequencies; ours come from the config and must be the same."""
    check_frequencies(stored.read().astype(np.float32), config, name, stored.file)


def check_frequencies(found: np.ndarray, config: ModelConfig, name: str, where: Path) -> None:
    """ValueError if rotary frequencies stored in a file are not those of the config. # [E/2]"""
    plain = RopeScaling("linear", 1.0)
    expected = stretched(config.head_size, config.rope_theta, config.rope_scaling or plain)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=0.01):
        raise ValueError(f"{where}: tensor {name} is not that of rope_theta {config.rope_theta}, head_size {config.head_size}")


def config_json(config: ModelConfig, head: Head, dtype: np.dtype, *, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model, for transformers 4 and 5; `token_ids` are its fields on BOS, EOS and padding."""
    rope = rope_json(config)
    extra = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}} if head == "reward_head" else {}
    return {
        "architectures": [next(name for name, known in _ARCHITECTURES.items() if known == head)],
        "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.width,
        "intermediate_size": config.ffn, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_size, "hidden_act": "silu",
        "max_position_embeddings": config.max_length, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None, "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
        "torch_dtype": dtype.name, "dtype": dtype.name,
        **token_ids, **extra,
    }  # fmt: skip


def readme_header(head: Head, *, license_: str = "", base_model: str = "") -> str:
    """The YAML between dashes that begins a README.md, by which the hub files a model."""
    reward = head == "reward_head"
    return "\n".join([
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-classification' if reward else 'text-generation'}",
        *([f"license: {json.dumps(license_)}"] if license_ else []),  # quoted: "no" and "1.0" are words here
        *([f"base_model: {json.dumps(base_model)}"] if base_model else []),
        "tags:", "- llama", *(["- reward-model"] if reward else []),
        "---", "", "",
    ])  # fmt: skip


class Writer:
    """Streams tensors into numbered safetensors files of at most `shard_bytes`; see `names.kinds` for `dtype`."""

    format = "huggingface"

    def __init__(
        self, directory: Path, config: ModelConfig, head: Head, dtype: names.Kind, *, shard_bytes: int = SHARD_BYTES
    ):
        self.tensors = names.tensors(config, head, "huggingface")
        self.kinds = names.kinds(self.tensors, dtype)
        self._directory, self._stack = directory, contextlib.ExitStack()
        self._shards = _plan(self.tensors, self.kinds, shard_bytes)
        self._names = [WEIGHTS] if len(self._shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors" for i in range(len(self._shards))
        ]  # fmt: skip
        self._places = {row.name: i for i, shard in enumerate(self._shards) for row in shard}
        self._open: tuple[int, SafetensorsWriter] | None = None

    def add(self, tensor: Tensor, x: np.ndarray) -> None:
        """Writes the next tensor of `self.tensors`, in our layout."""
        shard = self._places[tensor.name]
        if self._open is None or self._open[0] != shard:
            self._stack.close()
            plan = {row.name: (row.shape, self.kinds[row.name]) for row in self._shards[shard]}
            self._open = shard, self._stack.enter_context(write_file(self._directory / self._names[shard], plan))
        self._open[1].add(tensor.name, tensor.from_ours(x))

    def close(self) -> None:
        """Ends the files and writes their index."""
        self._stack.close()
        if len(self._shards) > 1:
            total = sum(_bytes(row, self.kinds[row.name]) for row in self.tensors)
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: self._names[shard] for name, shard in self._places.items()},
            }
            write_json(self._directory / INDEX, index)


def _bytes(row: Tensor, dtype: np.dtype) -> int:
    return int(np.prod(row.shape, dtype=np.int64)) * dtype.itemsize


def _plan(rows: Iterable[Tensor], kinds: Mapping[str, np.dtype], shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = []
    size = 0
    for row in rows:
        if not shards or size + _bytes(row, kinds[row.name]) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += _bytes(row, kinds[row.name])
    return shards


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a last newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
