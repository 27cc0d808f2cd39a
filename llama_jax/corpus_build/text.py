"""From bytes of the web to text: extraction from HTML, mojibake undone, and the Unicode rules of the corpus.

The tokenizer normalises nothing (paper section 2.2: what goes in comes out), so whatever should look the same must already be
the same here: NFC, line feeds, plain spaces, no control characters, and no U+2581, by which SentencePiece stands for a space.
"""

import functools
import re
import unicodedata
from collections import Counter

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
_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9:-]*")
_LONG_TAG = re.compile(r"<[a-zA-Z][^<>]{2000,}+")
_ATTRIBUTE = re.compile(r"[^\s=]+(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"']+))?")
# Elements that hold nothing, those that the next of their kind closes, and the shapes of SVG, which close themselves.
_FLAT = frozenset(
    "area base br col embed hr img input link meta param source track wbr p li dt dd tr td th thead tbody tfoot option "
    "optgroup colgroup html body head path circle ellipse line polygon polyline rect stop use image".split()
)
# Elements that a parser opens again in every block until they are closed.
_REOPENED = frozenset("a b big code em font i nobr s small strike strong tt u".split())
_REOPENING = re.compile(rf"<(?:{'|'.join(sorted(_REOPENED))})(?![a-zA-Z0-9:-])[^<>]*+", re.IGNORECASE)
MOST_PARSING, MOST_SEARCH = 1e6, 5e6  # about a second each; pages that authors and programs write are far below


def is_markup(text: str) -> bool:
    """Whether a document begins as HTML or XML does: with a tag, a declaration or a comment."""
    return _MARKUP.match(text) is not None


def parsing_cost(html: str) -> tuple[float, float]:
    """Steps beyond one pass that a page costs a parser, and that the search for its main part costs then; bounds from above.

    Malformed pages cost minutes: an element that is never closed stands again in each block after it, a tag's attributes are
    compared with each other, and the search climbs from each element to the root. All three are counted here in one pass.
    """
    tags = _TAG.findall(html)
    # Attributes that a tag names are compared in some 10 ns, elements are made in 0.5 us.
    attributes = sum(len(_ATTRIBUTE.findall(tag)) ** 2 for tag in _LONG_TAG.findall(html)) / 50
    counts = Counter(tags)
    kinds = {tag: tag.lstrip("</").lower() for tag in counts}
    flat = {tag for tag, name in kinds.items() if name in _FLAT}
    opened = {tag: count for tag, count in counts.items() if tag[1] != "/" and tag not in flat}
    most, deepest = sum(count for tag, count in opened.items() if kinds[tag] in _REOPENED), sum(opened.values())
    if most * len(tags) + attributes <= MOST_PARSING and deepest * len(tags) <= MOST_SEARCH:
        return most * len(tags) + attributes, deepest * len(tags)  # as if nothing were closed: true of most pages, and fast
    open_: Counter[str] = Counter()
    depth = deepest = reopened = most = 0
    for tag in tags:
        if tag in flat:
            continue
        name = kinds[tag]
        if tag[1] != "/":
            open_[name] += 1
            depth += 1
            if depth > deepest:
                deepest = depth
            if name in _REOPENED:
                reopened += 1
                if reopened > most:
                    most = reopened
        elif open_[name]:
            open_[name] -= 1
            depth -= 1
            reopened -= name in _REOPENED
    if most * len(tags) > MOST_PARSING:
        most = min(most, 3 * len(set(_REOPENING.findall(html))))  # of equal ones no more than three are opened again
    return most * len(tags) + attributes, deepest * len(tags)


def extract_text(html: str, *, extractor: str = "resiliparse") -> str | None:
    """The main text of an HTML page, without navigation and other boilerplate; "" if there is none.

    `resiliparse` takes milliseconds a page; `trafilatura` is slower by an order of magnitude and more precise. Where the search
    for the main part would take too long all text comes, and None for a page that cannot be parsed in time (`parsing_cost`).
    """
    parsing, search = parsing_cost(html)
    if parsing > MOST_PARSING:
        return None
    if extractor == "resiliparse":
        return all_text(html, main_content=search <= MOST_SEARCH)
    if extractor == "trafilatura":
        return extra("trafilatura").extract(html, include_comments=False, include_tables=True, favor_precision=True) or ""
    raise ValueError(f"extractor: expected resiliparse or trafilatura, got {extractor!r}")


def all_text(html: str, *, main_content: bool = False) -> str:
    """The text of a page, or of its main part; of one that can be parsed in time (`parsing_cost`)."""
    return extra("resiliparse.extract.html2text").extract_plain_text(html, main_content=main_content, alt_texts=False)


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
