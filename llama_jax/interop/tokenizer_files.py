"""The tokenizer's files beside exported weights: as `transformers`, Meta's code or our own stages look for them."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from llama_jax.data.chat_template import check_template
from llama_jax.data.sentencepiece_proto import BPE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, model_class
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from llama_jax.files import TOKENIZER_FILES, atomic_write
from llama_jax.interop.huggingface import write_json
from llama_jax.interop.source import Source
from llama_jax.model.params import Head

# Rows of the embedding beyond the last piece: models pad their vocabulary to a round number.
_PADDING_ROWS = 1024
# Texts in which two tokenizers that are not the same differ: spaces, digits, bytes, capitals, code.
_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs; don't!", "  two  spaces\n\ttabs\n", "x = [f(3.14159)] # 2024-07-18",
    "naïve café Ελληνικά 漢字 🙂", "<s>[INST] what? [/INST]</s>", "",
)  # fmt: skip
# Files that travel with a tokenizer.json.
_COMPANIONS = tuple(name for name in TOKENIZER_FILES if name != "tokenizer.json")

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


def check_vocabulary(tokenizer: Tokenizer, source: Source) -> None:
    """ValueError if the tokenizer has more pieces than the model has embeddings, or far fewer, or is known to be another."""
    config = source.config
    spare = config.vocab_size - tokenizer.vocab_size
    if not 0 <= spare < _PADDING_ROWS:
        raise ValueError(
            f"vocabulary mismatch: tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, model {config.name} has "
            f"{config.vocab_size} embeddings"
        )
    if source.words and source.words != tokenizer.fingerprint:
        raise ValueError(
            f"{source.path}: was trained with tokenizer {source.words[:12]}, {tokenizer.path} is {tokenizer.fingerprint[:12]}"
        )


def open_tokenizer(source: Source, place: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model, with no chat template where the model was trained to chat in Llama 2's format.

    Raises:
      ValueError: it is not the model's (`check_vocabulary`), or its chat template is none.
    """
    words = Tokenizer(place)
    check_vocabulary(words, source)
    if source.chat == "llama2":
        words.chat_template = None
    check_template(words)
    return words


def keep(tokenizer: Tokenizer, workdir: Path) -> None:
    """Leaves a tokenizer's files in a run's workdir, and none of another: what reads its checkpoints finds them there."""
    with tempfile.TemporaryDirectory() as made:
        write(tokenizer, Path(made), to="llama_jax")
        for name in TOKENIZER_FILES:
            if not (Path(made) / name).exists():
                (workdir / name).unlink(missing_ok=True)
        for path in sorted(Path(made).iterdir()):
            target, content = workdir / path.name, path.read_bytes()
            if not target.exists() or target.read_bytes() != content:
                with atomic_write(target) as file:
                    file.write(content)


def sentencepiece_beside(tokenizer: Tokenizer) -> Tokenizer:
    """The SentencePiece model beside a `tokenizer.json`, if both are one tokenizer; else the given one.

    Hugging Face's directories of Llama 2 have both, and Meta's layout holds only the model.
    """
    path = tokenizer.path.parent / "tokenizer.model"
    if isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.path.suffix != ".json" or not path.is_file():
        return tokenizer
    try:
        model = Tokenizer(path)
    except ValueError:
        return tokenizer
    same = model.vocab_size == tokenizer.vocab_size and (model.bos_id, model.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    return model if same and model.encode_many(_PROBES) == tokenizer.encode_many(_PROBES) else tokenizer


def padding(tokenizer: Tokenizer, head: Head) -> int:
    """The id that rows are padded with.

    `transformers` scores a row at its last token that is not padding. Where padding is EOS (as SmolLM2 has it) that would be
    the one before EOS, so a reward model takes another control piece.

    Raises:
      ValueError: a reward model, and there is no other.
    """
    if head != "reward_head":
        return tokenizer.pad_id
    others = [i for i in tokenizer.special_pieces().values() if i != tokenizer.bos_id]
    # BOS last: it stands only where rows begin.
    for candidate in (tokenizer.pad_id, tokenizer.unk_id, *others, tokenizer.bos_id):
        if candidate not in tokenizer.stop_ids:
            return candidate
    raise ValueError(
        f"tokenizer {tokenizer.path}: has no control piece but EOS; a reward model's rows are scored at EOS, so another must "
        "pad them"
    )


def write(
    tokenizer: Tokenizer, directory: Path, *, to: Literal["huggingface", "meta", "llama_jax"], pad_id: int | None = None,
    chat: str = "",
) -> Path:  # fmt: skip
    """Writes the files of a tokenizer for a format; returns the one that our `Tokenizer` opens.

    `pad_id` is what `padding` gives, where it is not the tokenizer's own; `chat` is the model's `Source.chat`: trained to chat
    in Llama 2's format, it goes out with that as its template, whatever the tokenizer came with.

    Raises:
      ValueError: the format has no place for it.
    """
    written = _write(tokenizer, directory, to)
    if chat == "llama2" and to == "huggingface":
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        _add(directory / "tokenizer_config.json", {"chat_template": LLAMA2_TEMPLATE})
    if len(tokenizer.stop_ids) > 1 and to != "meta":
        _add(directory / "generation_config.json", {"eos_token_id": list(tokenizer.stop_ids)})
    if pad_id not in (None, tokenizer.pad_id):
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (directory / name).is_file():
                _add(directory / name, {"pad_token": tokenizer.piece(pad_id)})
    return written


def _add(path: Path, fields: dict[str, Any]) -> None:
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, said | fields)


def _write(tokenizer: Tokenizer, directory: Path, to: Literal["huggingface", "meta", "llama_jax"]) -> Path:
    sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
    if sentencepiece and to in ("meta", "llama_jax"):
        (directory / "tokenizer.model").write_bytes(tokenizer.serialized())
        if to == "llama_jax" and (tokenizer.chat_template is not None or not tokenizer.adds_bos):
            own = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
            write_json(directory / "tokenizer_config.json", {"add_bos_token": tokenizer.adds_bos, **own})
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
                    (directory / name).write_bytes((tokenizer.path.parent / name).read_bytes())  # a bucket's, too
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
            "pad_token": "<unk>", "add_bos_token": tokenizer.adds_bos, "add_eos_token": False,
            "clean_up_tokenization_spaces": False, "chat_template": tokenizer.chat_template or LLAMA2_TEMPLATE,
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
            "id": i, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for i, piece in enumerate(model.pieces) if piece.type in (CONTROL, UNKNOWN)
    ]  # fmt: skip
    bos = model.pieces[1].piece
    before = [{"SpecialToken": {"id": bos, "type_id": 0}}] if tokenizer.adds_bos else []
    between = [{"SpecialToken": {"id": bos, "type_id": 1}}] if tokenizer.adds_bos else []
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
            "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                *before, {"Sequence": {"id": "A", "type_id": 0}}, *between, {"Sequence": {"id": "B", "type_id": 1}},
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

