"""SentencePiece models, read and trained: Llama 1's and 2's, and ours.

Ours have the paper's settings (section 2.2): BPE, single digits, byte fallback, no normalisation.

Round trip: `decode(encode(text)) == text` for every text without U+2581 (the sign by which SentencePiece
stands for a space, so it comes back as one). The dummy leading space that encoding adds is taken off again
by decoding, also when the text begins with spaces of its own. Newlines and tabs are byte pieces, because
training sees one line at a time.

Differences from the released tokenizer: it was trained on text we do not have, so only the settings are the
same.
"""

import functools
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from llama_jax.data.tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    Tokenizer,
    checked_text,
    declared_beside,
    find_tokenizer,
    is_mark,
    json_object,
    piece_name,
    read_content,
)
from llama_jax.files import atomic_write

log = logging.getLogger(__name__)

_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/=]+ \d+\n")  # a line of its files: a piece in base64, and its rank

# What people read out of the released model file (fact sheet 1.5).
PAPER_SETTINGS = {
    "model_type": "bpe",
    "split_digits": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "allow_whitespace_only_pieces": True,
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "character_coverage": 0.99995,
    "max_sentencepiece_length": 16,
    "max_sentence_length": 4192,  # bytes; our lines are cut there, since SentencePiece would drop longer ones
    "unk_surface": " \u2047 ",
    "unk_id": UNK_ID,
    "bos_id": BOS_ID,
    "eos_id": EOS_ID,
    "pad_id": -1,
    "shuffle_input_sentence": True,
    "num_threads": 4,  # fixed, not the machine's: the model file and so its fingerprint hold it
    "minloglevel": 2,
}


class SentencePieceTokenizer(Tokenizer):
    """A trained model file: Llama 1's and 2's, ours, or the one rebuilt from a GGUF's vocabulary.

    Its chat template, and whether BOS comes before a text, are what the GGUF or a `tokenizer_config.json` beside it says.
    """

    bos_id = BOS_ID
    eos_id = EOS_ID
    unk_id = UNK_ID
    pad_id = PAD_ID

    def __init__(self, path: str | os.PathLike):
        self.path = find_tokenizer(path)
        if self.path.suffix == ".gguf":
            from llama_jax.data.tokenizer_gguf import declared, sentencepiece_model

            model, said = sentencepiece_model(self.path), declared(self.path)
        else:
            model, said = read_content(self.path, "a SentencePiece model file"), declared_beside(self.path)
        # Kept: SentencePiece may write the fields of a model in another order than its file has.
        self._content, self.fingerprint = model, hashlib.sha256(model).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError):
            kind = f"not a SentencePiece model ({len(model):,} bytes); damaged?"
            if _TIKTOKEN.match(model):
                kind = "a file of tiktoken, as Llama 3 has; expected the tokenizer.json of the same model"
            raise ValueError(f"tokenizer {self.path}: {kind}") from None
        found = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id())
        if found != (UNK_ID, BOS_ID, EOS_ID):
            raise ValueError(f"tokenizer {self.path}: expected unk, bos, eos ids {(UNK_ID, BOS_ID, EOS_ID)}, got {found}")
        self.vocab_size = self._model.get_piece_size()
        self.chat_template = said.get("chat_template")
        self.adds_bos = bool(said.get("add_bos_token", True))
        self.stop_ids = self._ends(said)
        if (end := piece_name(said, "eos_token")) is not None and end != self.piece(EOS_ID):
            self._check_known(end)
            self.stop_ids = tuple(dict.fromkeys((*self.stop_ids, self._model.piece_to_id(end))))
        for piece in json_object(self.path.parent / "added_tokens.json") if self.path.suffix != ".gguf" else ():
            if piece in (self.chat_template or ""):
                self._check_known(piece)

    def _check_known(self, piece: str) -> None:
        if self._model.id_to_piece(self._model.piece_to_id(piece)) != piece:
            raise ValueError(
                f"tokenizer {self.path}: the files beside it add {piece!r}, which it does not have; expected the "
                "tokenizer.json of the same model"
            )

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after when asked for."""
        return [BOS_ID] * bos + self._model.encode(checked_text(text)) + [EOS_ID] * eos

    def encode_many(self, texts: Sequence[str], *, threads: int = 2) -> list[list[int]]:
        """`encode` of each text, without BOS or EOS, on several threads (for whole corpora)."""
        return self._model.encode([checked_text(text) for text in texts], num_threads=threads)

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat template: cut at the names of control pieces, and what lies between is encoded by itself."""
        control, ids = self.special_pieces(), []
        for part in re.split(self._border, checked_text(text)):
            ids += [control[part]] if part in control else self._model.encode(part)
        return ids

    @functools.cached_property
    def _border(self) -> str:
        longest_first = sorted(self.special_pieces(), key=len, reverse=True)
        return f"({'|'.join(map(re.escape, longest_first))})"

    def special_pieces(self) -> dict[str, int]:
        """Its control pieces (and that of what is unknown) and their ids; a chat message may not contain one."""
        return self._control

    @functools.cached_property
    def _control(self) -> dict[str, int]:
        is_control, is_unknown = self._model.is_control, self._model.is_unknown
        pieces = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        return {
            piece: i for piece, i in pieces.items()
            if is_control(i) or is_unknown(i) or i in self.stop_ids or is_mark(piece, self.chat_template)
        }  # fmt: skip

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; BOS, EOS and padding are skipped. ValueError for ids outside the vocabulary."""
        return self._model.decode([i for i in self._checked_ids(ids) if i > EOS_ID])

    def piece(self, token_id: int) -> str:
        """The piece behind an id, for reports (U+2581 marks a space)."""
        return self._model.id_to_piece(int(token_id))

    def serialized(self) -> bytes:
        """The model file's content, of which its fingerprint is."""
        return self._content


@functools.cache
def stands_for(model: Path, words: Path) -> bool:
    """Whether a SentencePiece model has the pieces of a `tokenizer.json`, which is said once."""
    try:
        said, processor = json.loads(words.read_text(encoding="utf-8")), sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(model.read_bytes())
        pieces = said["model"]["vocab"] | {piece["content"]: piece["id"] for piece in said["added_tokens"]}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return False
    if pieces != {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}:
        return False
    log.warning("tokenizer %s: the package tokenizers is not installed; %s, of the same pieces, serves", words, model.name)
    return True


def train_tokenizer(
    texts: Iterable[str],
    model_path: str | os.PathLike,
    *,
    vocab_size: int,
    seed: int = 0,
    max_lines: int = 200_000_000,
) -> Tokenizer:
    """Trains with PAPER_SETTINGS and writes `model_path` whole or not at all.

    Deterministic: the same texts, size and seed give the same file, byte for byte. `max_lines` caps the
    lines that SentencePiece keeps in memory (drawn at random with `seed`); 2e8 is the released model's
    setting. ValueError when there is no text, or when it is too small for `vocab_size` or `vocab_size` too
    small for it.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, PAPER_SETTINGS["max_sentence_length"]),
            model_writer=model,
            vocab_size=vocab_size,
            input_sentence_size=max_lines,
            **PAPER_SETTINGS,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None

    with atomic_write(model_path) as file:
        file.write(model.getvalue())
    return Tokenizer(model_path)


def _lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines that are not empty, longer ones cut at `max_bytes` (on a character border)."""
    longest = max_bytes // 4  # characters: UTF-8 needs at most four bytes for one
    for text in texts:
        for line in checked_text(text).split("\n"):
            for start in range(0, len(line), longest):
                yield line[start : start + longest]


def _explain(message: str, vocab_size: int) -> str:
    if largest := re.search(r"size too high .* value <= (\d+)", message):
        return f"vocab_size: {vocab_size} pieces are too many for this text, it gives at most {largest.group(1)}"
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size: {vocab_size} pieces are too few, the characters and bytes of this text alone need {needed.group(1)}"
        )
    if "sentences_.empty()" in message:
        return "tokenizer training: no text (every document is empty)"
    return f"tokenizer training failed: {message}"
