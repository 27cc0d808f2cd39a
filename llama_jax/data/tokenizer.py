"""Tokenizers behind one interface: `Tokenizer(path)` opens a SentencePiece model, a `tokenizer.json` or a GGUF's vocabulary.

Which file of a directory that is, and what the files beside it say of control pieces, stands here; each format has a module.
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.paths import place

# Ids that every Llama tokenizer shares; the 256 byte pieces follow at 3..258. There is no pad piece (its id
# is -1 in the model file): padding is id 0 with weight 0.
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
PAD_ID = UNK_ID
FIRST_BYTE_ID = 3

TEMPLATE = "chat_template.jinja"
_MARK = re.compile(r"<[|｜][^<>\s]*[|｜]>")


class Tokenizer:
    """Ids of text and text of ids. `Tokenizer(path)` gives the class that reads what lies there.

    A path is a SentencePiece `.model`, a Hugging Face `tokenizer.json`, a `.gguf`, or a directory with one of them.

    Text is never control: `encode("<s>")` gives ordinary pieces, whatever the format.

    Attributes:
      path, fingerprint: the file, and the SHA-256 of its content.
      vocab_size: number of pieces.
      bos_id, eos_id, unk_id, pad_id: ids of the control pieces.
      stop_ids: what ends an answer: EOS, and other ids that the model's files name beside it.
      adds_bos: whether its models expect BOS before a text.
      chat_template: Jinja source of the chat format it came with; None: Llama 2's (data/dialog.py).
    """

    path: Path
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    adds_bos: bool = True
    chat_template: str | None = None

    def __new__(cls, path: str | os.PathLike, *arguments):
        """Dispatches on what the file is, as `pathlib.Path` does on the system."""
        if cls is Tokenizer:
            cls = _reader_of(find_tokenizer(path))
        return super().__new__(cls)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after when asked for."""
        raise NotImplementedError

    def encode_many(self, texts: Sequence[str], *, threads: int = 2) -> list[list[int]]:
        """`encode` of each text, without BOS or EOS, on several threads (for whole corpora)."""
        raise NotImplementedError

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat template, in which the names of control pieces are those pieces."""
        raise NotImplementedError

    def special_pieces(self) -> dict[str, int]:
        """Its control pieces and their ids; a chat message may not contain one."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; BOS, EOS and padding are skipped. ValueError for ids outside the vocabulary."""
        raise NotImplementedError

    def piece(self, token_id: int) -> str:
        """The piece behind an id, for reports (U+2581 marks a space)."""
        raise NotImplementedError

    def _ends(self, declared: dict[str, Any]) -> tuple[int, ...]:
        """EOS, and what the files beside the tokenizer name as further ends."""
        named = declared.get("eos_token_id")
        more = [i for i in (named if isinstance(named, list) else [named]) if type(i) is int and 0 <= i < self.vocab_size]
        return tuple(dict.fromkeys((self.eos_id, *more)))

    def _checked_ids(self, ids: Iterable[int]) -> list[int]:
        kept = [int(i) for i in ids]
        wrong = [i for i in kept if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"decode: expected ids in 0..{self.vocab_size - 1}, got {wrong[0]}")
        return kept

    def __reduce__(self):  # so that Beam and process pools can carry it: the file is the state
        return Tokenizer, (self.path,)


def find_tokenizer(path: str | os.PathLike) -> Path:
    """The tokenizer's file at a path: itself, or the one inside a directory.

    Raises:
      FileNotFoundError: a directory without one.
    """
    path = place(path)
    if not path.is_dir():
        return path
    if (found := tokenizer_in(path)) is not None:
        return found
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"{path}: missing tokenizer: expected tokenizer.json, tokenizer.model or one .gguf file in it")
    return files[0]


def tokenizer_in(directory: Path) -> Path | None:
    """The `tokenizer.json` or `tokenizer.model` in a directory, or None. Of both it is the first, unless the package that reads
    it is not installed and the second is the same vocabulary, as in Hugging Face's directories of Llama 2."""
    words, model = directory / "tokenizer.json", directory / "tokenizer.model"
    if not words.is_file():
        return model if model.is_file() else None
    if importlib.util.find_spec("tokenizers") is None and model.is_file():
        from llama_jax.data.tokenizer_sentencepiece import stands_for

        return model if stands_for(model, words) else words
    return words


def _reader_of(path: Path) -> type[Tokenizer]:
    """The class that reads a file; each is imported when it is wanted, since their packages may be extras."""
    from llama_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer

    if path.suffix == ".gguf":
        from llama_jax.data.tokenizer_gguf import is_sentencepiece

        if is_sentencepiece(path):
            return SentencePieceTokenizer
    elif path.suffix != ".json":
        return SentencePieceTokenizer
    from llama_jax.data.tokenizer_json import JsonTokenizer

    return JsonTokenizer


def read_content(path: Path, expected: str) -> bytes:
    """The bytes of a tokenizer's file; FileNotFoundError saying what was expected there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"tokenizer {path}: expected {expected}, {error.strerror}") from None


def piece_name(declared: dict[str, Any], field: str) -> str | None:
    """A piece that a tokenizer's config names, as text or as an object with its `content`."""
    value = declared.get(field)
    return value["content"] if isinstance(value, dict) else value


def is_mark(piece: str, chat_template: str | None) -> bool:
    """Whether a piece, `<|im_end|>`, is one of the marks of a chat template. Such pieces are control, also where their file
    does not say so: a message that holds one would forge a turn."""
    return _MARK.fullmatch(piece) is not None and piece in (chat_template or "")


def declared_beside(path: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say about its special pieces, its chat format and the ids that end an answer."""
    declared: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        declared |= json_object(path.parent / name)
    declared["chat_template"] = _chat_template(path.parent, declared.get("chat_template"))
    for name in ("config.json", "generation_config.json"):  # the second is the one that generation goes by
        if (ends := json_object(path.parent / name).get("eos_token_id")) is not None:
            declared["eos_token_id"] = ends
    return declared


def _chat_template(directory: Path, declared: Any) -> str | None:
    """The chat template of a tokenizer's directory: that of a file of its own, or what its config declares, of several the one
    that is named "default".

    Raises:
      ValueError: it is no text, or several without that name: any of them would be a guess, and Llama 2's format too.
    """
    if (own := directory / TEMPLATE).is_file():
        try:
            return own.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{own}: expected a chat template in UTF-8: {error}") from None
    if declared is None or isinstance(declared, str):
        return declared
    try:
        several = dict(declared) if isinstance(declared, dict) else {one["name"]: one["template"] for one in declared}
    except (TypeError, KeyError):
        several = {}
    if not isinstance(template := several.get("default"), str):
        names = ", ".join(map(repr, several)) or "none"
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: chat_template: expected a text, or several with one named 'default'; "
            f"the names there are {names}"
        )
    return template


def json_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def checked_text(text: str) -> str:
    """The text, if it is one that UTF-8 can write; TypeError or ValueError else."""
    if not isinstance(text, str):
        raise TypeError(f"encode: expected str, got {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"encode: lone surrogate at character {error.start} cannot be written as UTF-8") from None
    return text
