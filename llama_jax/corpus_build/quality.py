"""Quality rules of Gopher (Rae et al. 2021, A.1.1) and C4 (Raffel et al. 2020, 2.2), with their published limits.

The paper calls its cleaning "more robust" and names no rules; these two sets are what open reproductions build on. Words are
what white space separates, as in Gopher's paper. Both sets were made for English. Gopher's rule on stop words takes those of
the document's language here, and is not asked of a language without a list; in a language that is written without spaces the
other rules on words are not asked either. C4's rules (end marks, words of a line) stay as published: leave the step out of
sources in scripts with marks of their own. C4's list of bad words is left out on purpose: the paper filters no toxicity,
so that the model can recognise it and no group of people is erased (section 4.1).

Each function returns the name of the first rule that fails, with the value that broke it, or None.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from llama_jax.corpus_build.shingles import UNSPACED

Failure = tuple[str, float]  # rule, value

# Gopher's for English; elsewhere articles, prepositions and conjunctions as frequent, of which any prose has two.
STOP_WORDS: Mapping[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the be to of and that have with",
        "de": "der die das und in zu den mit von ist nicht ein eine",
        "fr": "le la les de des et un une à en que est dans pour",
        "es": "el la los de que y en un una por con para del se",
        "it": "il la di che e un una per in non con del sono",
        "pt": "o a os de que e do da em um uma para com não",
        "nl": "de het een en van in is dat op te met voor",
        "sv": "och i att det som en på är av för med",
        "da": "og i at det er en til på som af med",
        "no": "og i å det som en er på til av med",
        "pl": "i w na z do się że nie to jest o",
        "cs": "a v se na je že s z do o to",
        "ro": "și de în la a cu pe o din că nu",
        "hu": "a az és hogy nem is egy ez",
        "fi": "ja on ei se että oli mutta kun myös",
        "ca": "el la de i que a en un per amb les els",
        "ru": "и в не на что с по как это к из у",
        "uk": "і в не на що з у до як та за",
        "bg": "и на в за се да не от с че по",
        "id": "yang dan di dengan untuk dari ini itu tidak pada",
        "vi": "và của là có không một trong được cho những",
        "tr": "ve bir bu da de için ile çok ne daha",
    }.items()
}
_WITH_LETTER = re.compile(r"[^\W\d_]\S*")  # from its first letter on: one match a word
_BULLETS = ("-", "*", "•", "●", "‣", "·", "▪", "◦")
_PARAGRAPH = re.compile(r"\n{2,}")
_MULTIPLIER = np.int64(6364136223846793005)


@dataclasses.dataclass(frozen=True)
class GopherLimits:
    """Gopher's Table A1 and A.1.1."""

    words: tuple[int, int] = (50, 100_000)
    word_length: tuple[float, float] = (3.0, 10.0)
    symbols: float = 0.1  # hashes or ellipses a word
    bullets: float = 0.9  # share of lines
    ellipses: float = 0.3  # share of lines that end in one
    with_letter: float = 0.8  # share of words
    stop_words: int = 2
    duplicate_lines: float = 0.30
    duplicate_paragraphs: float = 0.30
    duplicate_line_characters: float = 0.20
    duplicate_paragraph_characters: float = 0.20
    top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)  # characters in the most frequent 2-, 3-, 4-gram
    duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)  # characters in repeated 5- to 10-grams


@dataclasses.dataclass(frozen=True)
class C4Limits:
    """C4 as its authors describe it."""

    line_words: int = 5
    sentences: int = 3


def gopher_quality(text: str, limits: GopherLimits = GopherLimits(), language: str = "en") -> Failure | None:
    """Rules on words, symbols and lines of a text in a language (ISO 639 code)."""
    if language in UNSPACED:
        return _gopher_lines(text, limits)
    words = text.split()
    count = len(words)
    if not limits.words[0] <= count <= limits.words[1]:
        return "words", count
    length = sum(map(len, words)) / count
    if not limits.word_length[0] <= length <= limits.word_length[1]:
        return "word_length", length
    for symbols in (text.count("#"), text.count("...") + text.count("…")):
        if symbols / count > limits.symbols:
            return "symbols", symbols / count
    if failure := _gopher_lines(text, limits):
        return failure
    if (share := len(_WITH_LETTER.findall(text)) / count) < limits.with_letter:
        return "with_letter", share
    stop_words = STOP_WORDS.get(language)
    if stop_words and (found := len(stop_words.intersection(text.lower().split()))) < limits.stop_words:
        return "stop_words", found
    return None


def _gopher_lines(text: str, limits: GopherLimits) -> Failure | None:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if (share := sum(line.startswith(_BULLETS) for line in lines) / len(lines)) > limits.bullets:
        return "bullets", share
    if (share := sum(line.endswith(("...", "…")) for line in lines) / len(lines)) > limits.ellipses:
        return "ellipses", share
    return None


def gopher_repetition(text: str, limits: GopherLimits = GopherLimits()) -> Failure | None:
    """Rules on repeated lines, paragraphs and n-grams. A repeat is every occurrence but the first."""
    paragraphs = _PARAGRAPH.split(text.strip())
    if failure := _repeated_parts(
        paragraphs, len(text), limits.duplicate_paragraphs, limits.duplicate_paragraph_characters, "paragraph"
    ):
        return failure
    lines = [line for line in text.split("\n") if line]
    if failure := _repeated_parts(lines, len(text), limits.duplicate_lines, limits.duplicate_line_characters, "line"):
        return failure

    words = text.split()
    # Python's hashes differ between processes, but which words are equal does not.
    hashes = np.fromiter(map(hash, words), np.int64, len(words))
    ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
    characters = int(ends[-1]) if len(words) else 0
    grams = hashes
    for n in range(2, 5 + len(limits.duplicate_ngrams)):
        if len(words) < n:
            return None
        grams = grams[:-1] * _MULTIPLIER + hashes[n - 1 :]
        if n < 2 + len(limits.top_ngrams):
            share = _top_ngram(grams, ends, n) / characters
            if share > limits.top_ngrams[n - 2]:
                return f"top_{n}_gram", share
        elif n >= 5:
            share = _repeated_ngrams(grams, ends, n) / characters
            if share > limits.duplicate_ngrams[n - 5]:
                return f"duplicate_{n}_grams", share
            if share <= min(limits.duplicate_ngrams):
                return None  # what longer n-grams repeat is part of this
    return None


def c4_lines(text: str, limits: C4Limits = C4Limits()) -> tuple[str, Failure | None]:
    """The lines that C4 keeps, and the rule by which it drops the page."""
    lowered = text.lower()
    if "lorem ipsum" in lowered:
        return text, ("lorem_ipsum", 1)
    if "{" in text:
        return text, ("curly_bracket", 1)
    kept = []
    for line in text.split("\n"):
        line = _CITATION.sub("", line).strip()
        if not line.endswith(_TERMINAL) or line.endswith("...") or len(line.split()) < limits.line_words:
            continue
        low = line.lower()
        if "javascript" in low or any(phrase in low for phrase in _POLICY):
            continue
        kept.append(line)
    result = "\n".join(kept)
    if (sentences := len(_SENTENCE_END.findall(result))) < limits.sentences:
        return result, ("sentences", sentences)
    return result, None


_TERMINAL = (".", "?", "!", '"', "'")
_POLICY = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"
)  # fmt: skip
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.?!][\"')\]]*(?=\s|\Z)")


def _repeated_parts(parts: Sequence[str], characters: int, share: float, of_characters: float, name: str) -> Failure | None:
    unique = set(parts)
    if len(unique) == len(parts):
        return None
    if (value := 1 - len(unique) / len(parts)) > share:
        return f"duplicate_{name}s", value
    value = (sum(map(len, parts)) - sum(map(len, unique))) / characters
    return (f"duplicate_{name}_characters", value) if value > of_characters else None


def _length(ends: np.ndarray, start: int, n: int) -> int:
    """Characters of the words start .. start + n."""
    return int(ends[start + n - 1] - (ends[start - 1] if start else 0))


def _top_ngram(grams: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Characters in all occurrences of the most frequent n-gram (of several, the first); 0 if none repeats."""
    _, index, counts = np.unique(grams, return_index=True, return_counts=True)
    most = int(counts.max())
    return most * _length(ends, int(index[counts == most].min()), n) if most > 1 else 0


def _repeated_ngrams(grams: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Characters of the words that lie in a repeat of an n-gram, each counted once."""
    _, index = np.unique(grams, return_index=True)
    if len(index) == len(grams):
        return 0
    repeat = np.ones(len(grams), bool)
    repeat[index] = False
    starts = np.flatnonzero(repeat)
    covered = np.zeros(len(ends) + 1, np.int64)
    np.add.at(covered, starts, 1)
    np.add.at(covered, starts + n, -1)
    lengths = np.diff(ends, prepend=0)
    return int(lengths[np.cumsum(covered)[:-1] > 0].sum())
