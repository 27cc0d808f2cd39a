"""The one record that every corpus source yields and every corpus step takes (paper section 2.1)."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Document:
    """One text of the corpus.

    `id` is unique within its source and does not change from run to run; `metadata` holds plain JSON values
    only.
    """

    id: str
    text: str
    source: str
    url: str = ""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
