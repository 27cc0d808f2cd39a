"""Hugging Face's `tokenizer.json`, through the `tokenizers` package (extra `[interop]`)."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.data.tokenizer import Tokenizer, checked_text, declared_beside, find_tokenizer, is_mark, piece_name, read_content

# Where the special pieces are not declared beside the file: the names that models of this family give them.
_USUAL = {
    "bos": ("<s>", "<|begin_of_text|>", "<|im_start|>"),
    "eos": ("</s>", "<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>"),
}


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, with the special pieces that `tokenizer_config.json` beside it declares; or a GGUF's BPE.

    Text is never control here, unlike in `transformers`, where `encode("</s>")` ends the text; `encode_rendered` is for chat
    templates, whose control pieces are meant.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = find_tokenizer(path)
        if self.path.suffix == ".gguf":
            from llama_jax.data.tokenizer_gguf import json_tokenizer

            content, declared = json_tokenizer(self.path)
        else:
            content, declared = read_content(self.path, "a tokenizer.json"), declared_beside(self.path)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._content, self.chat_template = content, declared.get("chat_template")
        self._marked = content  # with all that is control as special pieces
        self._plain = _parse(content, self.path)
        if words := self._control_words(declared):
            self._marked = _with_special(content, words)
            self._plain = _parse(self._marked, self.path)
        self._plain.encode_special_tokens = True  # that is: as text, not as control
        self._rendered = None
        self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._special(declared, "bos")
        self.eos_id = self._special(declared, "eos")
        unknown, padding = piece_name(declared, "unk_token"), piece_name(declared, "pad_token")
        self.unk_id = self._id(unknown) if unknown else self.eos_id
        self.pad_id = self._id(padding) if padding else self.unk_id
        self.stop_ids = self._ends(declared)
        self.adds_bos = self._plain.encode("a").ids[:1] == [self.bos_id]  # by its post-processor

    def _control_words(self, declared: dict[str, Any]) -> set[str]:
        """The ends and the chat template's marks that the file has as words."""
        named, ends = {piece_name(declared, "bos_token"), piece_name(declared, "eos_token")}, declared.get("eos_token_id")
        ids = ends if isinstance(ends, list) else [ends]
        return {
            piece.content for i, piece in self._plain.get_added_tokens_decoder().items()
            if not piece.special and (piece.content in named or i in ids or is_mark(piece.content, self.chat_template))
        }  # fmt: skip

    def _id(self, piece: str) -> int:
        found = self._plain.token_to_id(piece)
        if found is None:
            raise ValueError(f"tokenizer {self.path}: its config names {piece!r}, which is not in the vocabulary")
        return found

    def _special(self, declared: dict[str, Any], kind: str) -> int:
        if name := piece_name(declared, f"{kind}_token"):
            return self._id(name)
        for name in _USUAL[kind]:
            if (found := self._plain.token_to_id(name)) is not None:
                return found
        raise ValueError(f"tokenizer {self.path}: no {kind} piece is declared in tokenizer_config.json beside it")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after when asked for."""
        ids = self._plain.encode(checked_text(text), add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat template, in which the names of special pieces are those pieces."""
        if self._rendered is None:
            self._rendered = _parse(self._marked, self.path)
        return self._rendered.encode(checked_text(text), add_special_tokens=False).ids

    def special_pieces(self) -> dict[str, int]:
        """Its control pieces and their ids; a chat message may not contain one."""
        return {piece.content: i for i, piece in self._plain.get_added_tokens_decoder().items() if piece.special}

    def encode_many(self, texts: Sequence[str], *, threads: int = 2) -> list[list[int]]:
        """`encode` of each text, without BOS or EOS; `tokenizers` decides the number of threads."""
        del threads
        batch = self._plain.encode_batch([checked_text(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control pieces are skipped. ValueError for ids outside the vocabulary."""
        return self._plain.decode(self._checked_ids(ids), skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """The piece behind an id, for reports."""
        return self._plain.id_to_token(int(token_id))

    def serialized(self) -> bytes:
        """The content of a tokenizer.json."""
        return self._content

    def declaration(self) -> dict[str, Any]:
        """The `tokenizer_config.json` that goes with it."""
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        found: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            **{name: self.piece(token) for name, token in named.items()},
        }  # fmt: skip
        return {**found, "chat_template": self.chat_template} if self.chat_template else found


def _with_special(content: bytes, pieces: Collection[str]) -> bytes:
    """The file with these added tokens as special ones."""
    said = json.loads(content)
    for token in said["added_tokens"]:
        token["special"] |= token["content"] in pieces
    return json.dumps(said, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _parse(content: bytes, path: Path) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"tokenizer {path}: reading it needs the package tokenizers: pip install 'llama_jax[interop]'"
        ) from None
    try:
        words = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"tokenizer {path}: not a tokenizer.json: {error}") from None
    # What a training once asked for is saved with it; transformers too asks for it anew in each call.
    words.no_truncation()
    words.no_padding()
    return words
