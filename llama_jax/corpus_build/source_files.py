"""Which files the reader of a source names: a path, a pattern or a directory, local or of any file system that fsspec knows."""

import glob
import re
from pathlib import Path
from typing import Any

from llama_jax.corpus_build import storage, tfds
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.formats import FORMATS, PLAIN, format_of

_TEXT_OPTION = re.compile(r"\?text=([^?&=/]+)$")


def expand(pattern: str) -> list[str]:
    """The files of a path or a pattern, sorted; a directory stands for every file of a known format below it.

    Raises:
      FileNotFoundError: there is none.
    """
    if tfds.is_name(pattern):
        return [pattern]
    pattern, option = (plain := plain_path(pattern)), pattern[len(plain) :]
    if storage.is_address(pattern):
        system, path = extra("fsspec").core.url_to_fs(pattern)
        found = system.find(path) if system.isdir(path) else system.glob(path)
        scheme = pattern.partition("://")[0]
        names = [f"{scheme}://{name.removeprefix(f'{scheme}://')}" for name in found]
    elif Path(pattern).is_dir():
        names = [str(path) for path in Path(pattern).rglob("*") if path.is_file()]
    else:
        names = glob.glob(pattern, recursive=True) or [pattern] * Path(pattern).is_file()
    many = len(names) != 1 or names[0] != pattern
    names = sorted(name for name in names if not many or format_of(name))
    if not names:
        raise FileNotFoundError(f"{pattern}: expected files to read ({', '.join(sorted(FORMATS))}), found nothing")
    return [name + option for name in names]


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


def file_size(path: str) -> int:
    """Bytes of a file as it lies there; 0 for a data set of TFDS, which tells how many examples it has instead."""
    return 0 if tfds.is_name(path) else storage.facts(plain_path(path))[0]


def most_text(path: str) -> int | None:
    """Bytes of text that a file holds at most, by its size; None where only reading it tells."""
    plain = not tfds.is_name(path) and Path(plain_path(path)).suffix.lower()[1:] in PLAIN
    return file_size(path) if plain else None
