"""Word n-grams of a text as 64-bit hashes: what near duplicates and leaks are found by.

A word is a run of letters, digits and underscores, in lower case; punctuation and layout do not count. In scripts that are
written without white space between words (Chinese, Thai, ...) each character is a word: a run of theirs is a whole clause, and
two clauses of which one character differs would have nothing in common. The hashes are the same on every machine and in every
process.
"""

import hashlib
import re

import numpy as np

# Characters of scripts without white space between words, and the languages (ISO 639) that are written in them.
_SCRIPTS = (
    (  # Chinese characters and their marks, kana
        "zh wuu yue ja",
        "\u3005-\u3007\u3021-\u3029\u3031-\u303c\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
        "\U0001aff0-\U0001b16f\U00020000-\U0003ffff",
    ),
    ("th lo", "\u0e00-\u0eff"),
    ("bo dz", "\u0f00-\u0fff"),  # Tibetan
    ("my", "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"),
    ("km", "\u1780-\u17ff"),
)
UNSPACED = frozenset(language for languages, _ in _SCRIPTS for language in languages.split())
_CHARACTERS = "".join(characters for _, characters in _SCRIPTS)
_UNSPACED_CHARACTER = re.compile(f"[{_CHARACTERS}]")
_WORD = re.compile(r"\w+")
_WORD_OR_CHARACTER = re.compile(rf"[^\W{_CHARACTERS}]+|(?=\w)[{_CHARACTERS}]")
_MULTIPLIER = np.uint64(6364136223846793005)  # Knuth's MMIX: odd, so no information is lost
_LARGEST_CACHE = 1_000_000  # words: about 150 MB


class _WordHashes(dict):
    """Hash of a word, computed once for each word of the corpus; the frequent ones are nearly all of a text."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _LARGEST_CACHE:
            self.clear()
        value = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        self[word] = value
        return value


_HASHES = _WordHashes()


def word_hashes(text: str) -> np.ndarray:
    """The words of a text in order, as uint64 [W]."""
    # The second pattern finds the same words in a text without such characters, but is slower than a search for one.
    unspaced = not text.isascii() and _UNSPACED_CHARACTER.search(text)
    return _hashes((_WORD_OR_CHARACTER if unspaced else _WORD).findall(text.lower()))


def _hashes(words: list[str]) -> np.ndarray:
    return np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all runs of `n` words [W - n + 1], in order; a text of fewer words is one run, one of none has none."""
    if not len(words):
        return words
    n = min(n, len(words))
    hashes = np.zeros(len(words) - n + 1, np.uint64)
    for k in range(n):
        hashes = hashes * _MULTIPLIER + words[k : k + len(hashes)]
    return hashes


def shingles(text: str, n: int) -> np.ndarray:
    """The set of word n-grams of a text: sorted and without repeats.

    In a text without a single word (programs of signs alone, ornaments) what white space separates stands for words: with empty
    sets, all such texts would be one.
    """
    words = word_hashes(text)
    return np.unique(ngram_hashes(words if len(words) else _hashes(text.split()), n))
