"""Tables of Markdown, and the text of models and people in it: what they wrote is shown as it is and cannot be markup."""

import dataclasses
import re
from collections.abc import Sequence
from html import escape
from typing import Any

# An underscore within a word is no markup, and the names of metrics have many.
_MARKUP = re.compile(r"[\\`*{}\[\]#~$|]|(?<![^\W_])_|_(?![^\W_])")
# A number, its interval or error behind it; a dash where there is none.
_NUMBER = re.compile(r"(?:[-+]?[\d.,]+(?:e[-+]?\d+)? ?%?(?: (?:\([-+\d.,]+ to [-+\d.,]+\)|± [\d.,]+))?|-)?")


@dataclasses.dataclass(frozen=True)
class Table:
    """Column titles and rows of text."""

    columns: list[str]
    rows: list[list[str]]

    @classmethod
    def read(cls, text: str) -> "Table":
        """Of lines whose cells are parted by bars, titles first."""
        columns, *rows = ([cell.strip() for cell in line.split("|")] for line in text.strip().splitlines())
        if wrong := [row for row in rows if len(row) != len(columns)]:
            raise ValueError(f"expected rows of {len(columns)} cells, got {wrong[0]}")
        return cls(columns, rows)

    def markdown(self) -> str:
        """As `markdown_table` writes it."""
        return markdown_table(self.columns, self.rows)


def verbatim(text: str) -> str:
    """Text for a cell, or for a line that words of ours begin: it ends neither, and its own lines are parted by <br>."""
    # A NUL would make the file a binary one, a lone surrogate no file at all.
    lines = ["".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in line)
             for line in text.strip().splitlines()]  # fmt: skip
    # References: what a backslash does depends on what the text has before it.
    return "<br>".join(_MARKUP.sub(lambda found: f"&#{ord(found[0])};", escape(line, quote=False)) for line in lines)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, in which nothing is markup."""
    return markdown_table([*map(verbatim, columns)], [[*map(verbatim, row)] for row in rows])


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of cells that are Markdown (`verbatim` makes them of other text); columns of numbers stand to the right.

    A cell is one line: white space in it is one space, and bars are escaped.
    """
    head, *cells = ([" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (columns, *rows))
    marks = ["---:" if cells and all(_NUMBER.fullmatch(row[i]) for row in cells) else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, marks, *cells))
