"""The vocabulary inside a GGUF, rebuilt as the tokenizer that it was taken from.

"llama" vocabularies become a SentencePiece model again, "gpt2" ones a byte-level BPE `tokenizer.json`. How the latter cut text
into words is named in the file (`tokenizer.ggml.pre`) and known for the models of the Llama architecture below; another
name is refused, since a wrong cut gives wrong ids without any other sign.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

from llama_jax.data.gguf_file import read_header
from llama_jax.data.sentencepiece_proto import BPE, BYTE, CONTROL, USER_DEFINED, model_class

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By what names llama.cpp knows the ends of turns and messages.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
# tokenizer.ggml.pre -> the pre-tokenizer of the original's tokenizer.json
_CUTS: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    "gpt-2": [_BYTE_LEVEL],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
        {**_BYTE_LEVEL, "use_regex": False},
    ],
}


def _vocabulary(path: Path) -> dict[str, Any]:
    """The fields `tokenizer.*` of a file."""
    stat = os.stat(path)
    return _fields(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _fields(path: Path, changed: int, size: int) -> dict[str, Any]:
    del changed, size  # a file that was written anew is read anew
    fields = read_header(path).fields
    found = {name.removeprefix("tokenizer."): value for name, value in fields.items() if name.startswith("tokenizer.")}
    for name in ("ggml.model", "ggml.tokens", "ggml.token_type"):
        if name not in found:
            raise ValueError(f"{path}: missing tokenizer: the file has no field tokenizer.{name}")
    if len(found["ggml.tokens"]) != len(found["ggml.token_type"]):
        raise ValueError(f"{path}: tokenizer.ggml.token_type and tokenizer.ggml.tokens differ in length")
    if found["ggml.model"] not in ("llama", "gpt2"):
        raise ValueError(f"{path}: tokenizer.ggml.model is {found['ggml.model']!r}, expected 'llama' or 'gpt2'")
    for name, value in found.items():
        if name.endswith("_token_id") and not 0 <= value < len(found["ggml.tokens"]):
            raise ValueError(f"{path}: tokenizer.{name} is {value}, expected an id in 0..{len(found['ggml.tokens']) - 1}")
    return found


def is_sentencepiece(path: Path) -> bool:
    """Whether the vocabulary came from a SentencePiece model."""
    return _vocabulary(path)["ggml.model"] == "llama"


def sentencepiece_model(path: Path) -> bytes:
    """A SentencePiece model of a "llama" vocabulary."""
    fields = _vocabulary(path)
    model = model_class()()
    scores = fields.get("ggml.scores")
    if scores is None or len(scores) != len(fields["ggml.tokens"]):
        raise ValueError(f"{path}: tokenizer.ggml.scores is missing, or differs in length from tokenizer.ggml.tokens")
    for piece, score, kind in zip(fields["ggml.tokens"], scores, fields["ggml.token_type"], strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = BYTE in fields["ggml.token_type"]
    trainer.unk_id = fields.get("ggml.unknown_token_id", 0)
    trainer.bos_id = fields.get("ggml.bos_token_id", 1)
    trainer.eos_id = fields.get("ggml.eos_token_id", 2)
    trainer.pad_id = -1
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = (
        fields["ggml.tokens"][i] for i in (trainer.unk_id, trainer.bos_id, trainer.eos_id)
    )
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = fields.get("ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)


def json_tokenizer(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The `tokenizer.json` of a "gpt2" vocabulary, and what its `tokenizer_config.json` declares."""
    fields = _vocabulary(path)
    if "ggml.pre" not in fields:  # files of before the spring of 2024, of models with different cuts
        raise ValueError(f"{path}: has no field tokenizer.ggml.pre; expected a newer file, or --tokenizer=...")
    cut = fields["ggml.pre"]
    if cut not in _CUTS:
        raise ValueError(f"{path}: tokenizer.ggml.pre is {cut!r}, expected one of {', '.join(_CUTS)}")
    if "ggml.merges" not in fields:
        raise ValueError(f"{path}: missing tokenizer: the file has no field tokenizer.ggml.merges")
    tokens, kinds = fields["ggml.tokens"], fields["ggml.token_type"]
    added = [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind == CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    said = declared(path)
    processor: dict[str, Any] = {**_BYTE_LEVEL, "trim_offsets": False}
    # Where the field is missing, llama.cpp goes by the pre-tokenizer: Llama 3's files come without it.
    if fields.get("ggml.add_bos_token", cut == "llama-bpe"):
        if "ggml.bos_token_id" not in fields:
            raise ValueError(f"{path}: BOS comes before its texts, but the file has no field tokenizer.ggml.bos_token_id")
        bos = said["bos_token"]
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {bos: {"id": bos, "ids": [fields["ggml.bos_token_id"]], "tokens": [bos]}}
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        processor = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": cut == "llama-bpe",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in fields["ggml.merges"]],
    }  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _CUTS[cut]}, "post_processor": processor,
        "decoder": _BYTE_LEVEL, "model": model,
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False).encode("utf-8"), said


def declared(path: Path) -> dict[str, Any]:
    """What a file says about its tokenizer, in the fields of a `tokenizer_config.json` and a `generation_config.json`."""
    fields = _vocabulary(path)
    tokens = fields["ggml.tokens"]
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found: dict[str, Any] = {
        f"{short}_token": tokens[fields[f"ggml.{long}_token_id"]]
        for short, long in ids.items() if f"ggml.{long}_token_id" in fields
    }  # fmt: skip
    for field, name in (("chat_template", "chat_template"), ("ggml.add_bos_token", "add_bos_token")):
        if field in fields:
            found[name] = fields[field]
    # The ends of a turn and of a message, where they are not EOS itself; of files without the fields they are known by name.
    said = [fields[f"ggml.{end}_token_id"] for end in ("eot", "eom") if f"ggml.{end}_token_id" in fields]
    named = [i for i, token in enumerate(tokens) if token in _ENDS and fields["ggml.token_type"][i] in (CONTROL, USER_DEFINED)]
    found["eos_token_id"] = [*said, *named]
    return found
