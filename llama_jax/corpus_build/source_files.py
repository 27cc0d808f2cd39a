"""Which files the reader of a source names: a path, a pattern or a directory, local or of any file system that fsspec knows.

Names that begin with a dot, and what lies below such directories, are left out (what version control, file managers and builds
that run keep there is no text) unless the reader spells the dot itself.
"""

import fnmatch
import glob
import os
import re
from pathlib import Path
from typing import Any

from llama_jax.corpus_build import storage, tfds
from llama_jax.corpus_build.formats import FORMATS, PLAIN, format_of
from llama_jax.corpus_build.unpack import compression

_TEXT_OPTION = re.compile(r"\?text=([^?&=/]+)$")


def expand(pattern: str) -> list[str]:
    """The files of a path or a pattern, sorted; a directory stands for every file of a known format below it.

    Raises:
      FileNotFoundError: there is none.
      StorageError: its file system cannot be asked.
    """
    if tfds.is_name(pattern):
        return [pattern]
    pattern, option = (plain := plain_path(pattern)), pattern[len(plain) :]
    known = ", ".join(sorted(FORMATS))
    if not pattern:
        raise FileNotFoundError(f"expected a path, a pattern or a directory of files ({known}), got {pattern!r}")
    if storage.is_address(pattern):
        names = storage.found(pattern)
    elif Path(pattern := os.path.expanduser(pattern)).is_dir():
        names = [str(path) for path in Path(pattern).rglob("*") if path.is_file()]
    else:
        names = glob.glob(pattern, recursive=True) or [pattern] * Path(pattern).is_file()
    readable = sorted(name for name in names if format_of(name) and not _is_hidden(name, pattern))
    if not readable:
        found = "nothing" if not names else "others" if len(names) > 1 else names[0]
        raise FileNotFoundError(f"{pattern}: expected files to read ({known}), found {found}")
    return [name + option for name in readable]


def _is_hidden(name: str, pattern: str) -> bool:
    """Whether a part of a name begins with a dot that the reader does not spell."""
    spelt = [part for part in pattern.split("/") if part.startswith(".")]
    return any(
        part.startswith(".") and part not in (".", "..") and not any(fnmatch.fnmatchcase(part, own) for own in spelt)
        for part in name.split("/")
    )


def plain_path(path: str) -> str:
    """The path of a file without the name of its text field."""
    return path if tfds.is_name(path) else _TEXT_OPTION.sub("", path)


def text_field(path: str) -> str:
    """The field that holds the text of a row."""
    option = None if tfds.is_name(path) else _TEXT_OPTION.search(path)
    return option[1] if option else "text"


def file_facts(path: str) -> list[Any]:
    """Name, size and time of a file, wherever it lies: cheap, and different after any honest change."""
    return [path] if tfds.is_name(path) else [path, *storage.facts(plain_path(path))]


def file_size(path: str) -> int | None:
    """Bytes of a file as it lies there; None if that is not told, as of a data set of TFDS."""
    return None if tfds.is_name(path) else storage.facts(plain_path(path))[0]


def most_text(path: str) -> int | None:
    """Bytes of text that a file holds at most, by its size; None where only reading it tells."""
    if tfds.is_name(path) or Path(plain := plain_path(path)).suffix.lower()[1:] not in PLAIN:
        return None
    with storage.stored(plain) as raw:
        return None if compression(plain, raw) else file_size(path)
