"""What cannot be read of a file, as values to be counted: one torn line must not end a run over a billion.

A row that is wrong is one `BadRow`, and so is all of a file that lies beyond damage to it, or that is another than its source
says: this one is no damage, and no limit lets a run go on without it.
"""

import dataclasses
import gzip
import lzma
import struct
import zlib
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row, or the rest of a file, that could not be read."""

    where: str  # file:line or file:record
    problem: str
    rest: bool = False  # whether it is the rest of a file, however many rows
    foreign: bool = False  # whether it is a file or a data set that the source should not have named (SourceError)


class SourceError(ValueError):
    """A source that names what is not there: a column, a data set."""


# What a format gives of a file: where each row stands, and the row.
Rows = Iterator[tuple[str, "dict[str, Any] | BadRow"]]
# What reading a damaged or foreign file raises.
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError, struct.error)


def until_damage(path: str, rows: Rows) -> Rows:
    """The rows of a file as far as it can be read, then a `BadRow` for its rest if there is more."""
    where = f"{path}:0"
    try:
        for where, row in rows:
            yield where, row
    except SourceError as error:
        yield where, BadRow(where, str(error), rest=True, foreign=True)
    except _DAMAGE as error:
        yield where, _rest(where, error)
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        yield where, _rest(where, error)  # so bz2's and Parquet's decoders complain, and nothing else does


def _rest(where: str, error: Exception) -> BadRow:
    return BadRow(where, f"the file cannot be read beyond this ({type(error).__name__}: {error})", rest=True)


def not_utf8(where: str, error: UnicodeDecodeError) -> BadRow:
    """The row that is no text."""
    return BadRow(where, f"not UTF-8 (byte {error.start})")
