"""The tokenizer's files beside exported weights: as `transformers`, Meta's code or our own stages look for them."""

import shutil
from pathlib import Path
from typing import Any, Literal

from llama_jax.data.sentencepiece_proto import BPE, NORMAL, USER_DEFINED, model_class
from llama_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from llama_jax.interop.huggingface import write_json
from llama_jax.model.config import ModelConfig

# Rows of the embedding beyond the last piece: models pad their vocabulary to a round number.
_PADDING_ROWS = 1024
# Files that travel with a tokenizer.json.
_COMPANIONS = (
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip

# Llama 2's chat format (data/dialog.py) in the language of chat templates. Messages are stripped as the reference does.
LLAMA2_TEMPLATE = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('expected user and assistant in turn, beginning with user') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- set content = (system if loop.first else '') + message['content'] -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """ValueError if the tokenizer has more pieces than the model has embeddings, or far fewer."""
    spare = config.vocab_size - tokenizer.vocab_size
    if not 0 <= spare < _PADDING_ROWS:
        raise ValueError(
            f"vocabulary mismatch: tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, model {config.name} has "
            f"{config.vocab_size} embeddings"
        )


def write(tokenizer: Tokenizer, directory: Path, *, to: Literal["huggingface", "meta", "llama_jax"]) -> Path:
    """Writes the files of a tokenizer for a format; returns the one that our `Tokenizer` opens.

    Raises:
      ValueError: the format has no place for it.
    """
    sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
    if sentencepiece and to in ("meta", "llama_jax"):
        (directory / "tokenizer.model").write_bytes(tokenizer.serialized())
        return directory / "tokenizer.model"
    if to == "meta":
        raise ValueError(
            f"tokenizer {tokenizer.path}: Meta's layout holds a SentencePiece tokenizer.model, which this one is not; "
            "--tokenizer=none leaves it out"
        )
    if not sentencepiece:
        if tokenizer.path.suffix == ".json":
            for name in _COMPANIONS:
                if (tokenizer.path.parent / name).is_file():
                    shutil.copyfile(tokenizer.path.parent / name, directory / name)
        if not (directory / "tokenizer_config.json").is_file():
            write_json(directory / "tokenizer_config.json", tokenizer.declaration())
        (directory / "tokenizer.json").write_bytes(tokenizer.serialized())
        return directory / "tokenizer.json"
    (directory / "tokenizer.model").write_bytes(tokenizer.serialized())
    write_json(directory / "tokenizer.json", from_sentencepiece(tokenizer))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "pad_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
            "chat_template": LLAMA2_TEMPLATE,
        },
    )  # fmt: skip
    return directory / "tokenizer.json"


def from_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """A SentencePiece BPE as a `tokenizer.json`, with the same ids.

    The file holds no list of merges: SentencePiece merges the pair whose joined piece has the best score. So the merges are
    all pairs of pieces that join to a piece, in the order of its score.

    Raises:
      ValueError: another kind of model, one that normalises text, or one with user-defined pieces.
    """
    model = model_class().FromString(tokenizer.serialized())
    if model.trainer_spec.model_type != BPE:
        raise ValueError(f"tokenizer {tokenizer.path}: is no BPE model, so tokenizer.json cannot hold it")
    normalizer = model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        raise ValueError(f"tokenizer {tokenizer.path}: normalises text, which the exported tokenizer.json would not")
    if own := [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]:
        raise ValueError(
            f"tokenizer {tokenizer.path}: its piece {own[0]!r} is user-defined, which comes before all merges; the exported "
            "tokenizer.json would give other ids, and --tokenizer=none leaves it out"
        )
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = sorted(
        (-scores[piece], ids[piece], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
         for piece in scores for cut in range(1, len(piece)) if piece[:cut] in scores and piece[cut:] in scores
    )  # fmt: skip
    special = [
        {
            "id": i, "content": model.pieces[i].piece, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for i in range(3)
    ]  # fmt: skip
    bos = model.pieces[1].piece
    space = "\u2581"
    prefix = [{"type": "Prepend", "prepend": space}] if normalizer.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if normalizer.add_dummy_prefix else []
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": space}],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, *strip,
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": model.pieces[0].piece, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False, "vocab": ids, "merges": [[left, right] for *_, left, right in merges],
        },
    }  # fmt: skip

