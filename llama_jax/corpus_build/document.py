"""The one record that every corpus source yields and every corpus step takes (paper section 2.1)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit


@dataclasses.dataclass(frozen=True)
class Document:
    """One text of the corpus.

    `id` names the document to people and does not change from run to run; it comes from the row if that has one, so it may
    repeat, and documents are told apart by their texts. `metadata` is the row's own, plain JSON values only; what the pipeline
    learns stands in `findings`, which no row can fill in: the `language`, and how much is `private` by kind.
    """

    id: str
    text: str
    source: str
    url: str = ""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    findings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Removed:
    """A document that a step left out, and why."""

    document: Document
    step: str
    rule: str  # the one that failed first
    detail: str = ""  # the value that broke it


_SCHEME = re.compile(r"(?:[a-zA-Z][a-zA-Z0-9+.-]*:)?//")
# A step of cleaning: a pure function, so that a loop, a process pool and Beam can carry it alike.
Step = Callable[[Document], Document | Removed]


def host_of(url: str) -> str:
    """The host of an address, also of one without a scheme; "" for what is no address."""
    try:
        return urlsplit(url if _SCHEME.match(url) else f"//{url}").hostname or ""
    except ValueError:  # of brackets, and of characters that look like others
        return ""
