"""From bytes of the web to text: extraction from HTML, mojibake undone, and the Unicode rules of the corpus.

The tokenizer normalises nothing (paper section 2.2: what goes in comes out), so whatever should look the same must already be
the same here: NFC, line feeds, plain spaces, no control characters, and no U+2581, by which SentencePiece stands for a space.
"""

import functools
import re
import unicodedata

from llama_jax.corpus_build.extras import extra

# C0 and C1 controls but tab and line feed; lone surrogates, byte order marks, soft hyphens, zero-width spaces, bidirectional
# overrides and noncharacters. Zero-width joiners stay: Indic scripts and emoji are spelt with them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufdd0-\ufdef\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\ud800-\udfff]"
)
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LINE_ENDS = re.compile("\r\n?|\x85|\u2028|\u2029|\x0b|\x0c")
_TRAILING = re.compile(r"(?<![ \t])[ \t]++(?=\n|\Z)")  # in one pass over a long run that ends otherwise
_MANY_LINES = re.compile(r"\n{4,}")
_ASCII_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
META_SYMBOL = "\u2581"
_MARKUP = re.compile(r"\s*<[a-zA-Z!?]")


def is_markup(text: str) -> bool:
    """Whether a document begins as HTML or XML does: with a tag, a declaration or a comment."""
    return _MARKUP.match(text) is not None


def extract_text(html: str, *, extractor: str = "resiliparse") -> str:
    """The main text of an HTML page, without navigation and other boilerplate; "" if there is none.

    `resiliparse` takes milliseconds a page; `trafilatura` is slower by an order of magnitude and more precise.
    """
    if extractor == "resiliparse":
        return extra("resiliparse.extract.html2text").extract_plain_text(html, main_content=True, alt_texts=False)
    if extractor == "trafilatura":
        return extra("trafilatura").extract(html, include_comments=False, include_tables=True, favor_precision=True) or ""
    raise ValueError(f"extractor: expected resiliparse or trafilatura, got {extractor!r}")


def fix_mojibake(text: str) -> str:
    """UTF-8 that was read as another encoding, put right line by line (ftfy); other lines keep every character."""
    if text.isascii():
        return text
    ftfy, is_bad = _ftfy()
    if not is_bad(text):
        return text
    return "\n".join(ftfy.fix_encoding(line) if is_bad(line) else line for line in text.split("\n"))


@functools.cache
def _ftfy():
    return extra("ftfy"), extra("ftfy.badness").is_bad


def normalise(text: str) -> str:
    """The text under the Unicode rules above; normalise(normalise(text)) == normalise(text)."""
    if "\r" in text or not text.isascii() or _ASCII_CONTROLS.search(text):
        text = _LINE_ENDS.sub("\n", text)
        text = _INVISIBLE.sub("", text)
        if not text.isascii():
            text = _SPACES.sub(" ", text).replace(META_SYMBOL, "_")
            text = unicodedata.normalize("NFC", text)
    return _MANY_LINES.sub("\n\n\n", _TRAILING.sub("", text))
