"""Files and directories that appear whole or not at all; a file may lie in a bucket, where objects do so by nature."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llama_jax.paths import is_remote, upload


@contextlib.contextmanager
def local_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields where a writer that needs a real file writes `path`: there, or on this machine for a bucket, from where it is
    uploaded when the block ends well."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="llama_jax_") as directory:
            local = Path(directory) / os.path.basename(path)
            yield local
            upload(local, path)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a file beside `path` that takes its place, synced to disk, when the block ends well."""
    if is_remote(path):
        with local_file(path) as local, open(local, "wb") as file:
            yield file
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode())


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty directory beside `path` that takes its place when the block ends well, and else disappears."""
    if is_remote(path):
        raise ValueError(f"{path}: expected a local directory; copy it into the bucket when it is finished")
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: exists already; expected a new or an empty directory")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        if path.exists():
            path.rmdir()
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
