"""Files and directories that appear whole or not at all; a file may lie in a bucket, where objects do so by nature."""

import contextlib
import glob
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llama_jax.paths import is_remote, place, upload

# The files of a tokenizer, as they lie beside weights.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


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


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text in UTF-8 whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def read_json(path: str | os.PathLike) -> Any:
    """The JSON in a file; ValueError that names the file if it holds none, as after a flipped bit."""
    try:
        return json.loads(place(path).read_bytes())
    except ValueError as error:  # of JSON, or of its encoding
        raise ValueError(f"{path}: expected JSON: {error}") from None


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty directory beside `path` that takes its place when the block ends well, and else disappears."""
    if is_remote(path):
        raise ValueError(f"{path}: expected a local directory; copy it into the bucket when it is finished")
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: exists already; expected a new or an empty directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        try:
            unfinished.mkdir()
        except OSError as error:  # that of the directory which the caller named
            raise type(error)(error.errno, error.strerror, str(path)) from None
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


def _unfinished(path: Path) -> Path:
    """Where this process makes the directory that will be `path`; what killed ones of this machine left there goes."""
    host = socket.gethostname()
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(host)}.*.tmp"):
        if not _runs(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True
