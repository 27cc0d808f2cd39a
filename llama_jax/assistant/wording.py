"""Small text tools: markup out of docstrings, first sentences, balanced brackets. Pure functions of
strings."""

from __future__ import annotations

import re

_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`(~?)!?([^`<]+?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}")
_MARKDOWN_LINK = re.compile(r"\[([^\]]+)\]\([^)\s]*\)")
_LITERAL = re.compile(r"``([^`]+)``")
_REFERENCE = re.compile(r"`([^`]+)`_{1,2}")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w[^*\n]*?\w|\w)\*{1,2}(?![\w*])")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]?\s+(?=[A-Z`\"'(\[])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|vs|cf|etc|approx|resp|et al|Fig|Eq|No|incl|St|Mr|Dr)|\b[A-Z])\.$"
)
_CLOSING = {")": "(", "]": "[", "}": "{"}


def plain_markup(text: str) -> str:
    """reStructuredText and Markdown inline markup reduced to words and single backticks."""

    def role(match: re.Match) -> str:
        target = match[2].strip()
        return f"`{target.rpartition('.')[2] if match[1] else target}`"

    for pattern, replacement in (
        (_ROLE, role),
        (_LINK, r"\1"),
        (_MARKDOWN_LINK, r"\1"),
        (_LITERAL, r"`\1`"),
        (_REFERENCE, r"\1"),
        (_EMPHASIS, r"\1"),
    ):
        text = pattern.sub(replacement, text)
    return text


def first_sentence(paragraph: str) -> str:
    """The first sentence on one line; a paragraph without a full stop is one sentence."""
    line = " ".join(paragraph.split())
    start = 0
    for match in _SENTENCE_END.finditer(line):
        sentence = line[start : match.start()]
        if not _ABBREVIATION.search(sentence):
            return line[: match.end()].strip()
    return line


def is_balanced(text: str) -> bool:
    """Whether brackets nest and close, and backticks and double quotes come in pairs."""
    stack = []
    for character in text:
        if character in "([{":
            stack.append(character)
        elif character in _CLOSING and (not stack or stack.pop() != _CLOSING[character]):
            return False
    return not stack and text.count("`") % 2 == 0 and text.count('"') % 2 == 0
