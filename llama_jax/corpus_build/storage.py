"""The bytes of source files, on a disk or in any file system that fsspec knows; storage that fails is asked again.

What fails there says nothing of the file, so it is never taken for damage (`damage`): it ends the run.
"""

import contextlib
import contextvars
import dataclasses
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from llama_jax.corpus_build.extras import extra

_PAUSES = (1.0, 4.0)  # seconds before storage is asked again


class StorageError(OSError):
    """A file could not be read from where it lies, though it was tried several times."""


def is_address(path: str) -> bool:
    """Whether a path is of a file system of fsspec: `gs://bucket/...`."""
    return "://" in path


def found(address: str) -> list[str]:
    """The files below an address, or those that it is a pattern of."""
    with _asking(address):
        system, path = extra("fsspec").core.url_to_fs(address)
        names = system.find(path) if system.isdir(path) else system.glob(path)
    scheme = address.partition("://")[0]
    return [f"{scheme}://{name.removeprefix(f'{scheme}://')}" for name in names]


@contextlib.contextmanager
def _asking(address: str) -> Iterator[None]:
    """StorageError, one sentence, for what a file system of fsspec says in errors of its own: no package, network or right."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise StorageError(f"{address}: its storage could not be asked ({type(error).__name__}: {said})") from error


def facts(path: str) -> tuple[int | None, Any]:
    """Size of a file and the time of its last change, as far as its file system tells."""
    if is_address(path):
        with _asking(path):
            system, name = extra("fsspec").core.url_to_fs(path)
            info = system.info(name)
        return info.get("size"), str(info.get("mtime") or info.get("updated") or info.get("LastModified"))
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def stored(path: str) -> io.BufferedReader:
    """The bytes of a file as they lie there."""
    return io.BufferedReader(_Storage(path), 2**18)


@dataclasses.dataclass
class Watch:
    """How much was read of files while it was watched."""

    bytes: int = 0


_WATCH: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("_WATCH", default=None)


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Counts what is read of files, as they lie there, until the block ends."""
    token = _WATCH.set(watch := Watch())
    try:
        yield watch
    finally:
        _WATCH.reset(token)


class _Storage(io.RawIOBase):
    """The bytes of a file. A read that fails is tried again from the same place, after a while, with the file opened anew."""

    def __init__(self, path: str):
        self._path, self._at, self._file = path, 0, None
        self._seekable = self._try(lambda file: file.seekable())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = offset + self._at, io.SEEK_SET
        self._at = self._try(lambda file: file.seek(offset, whence))
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._try(lambda file: file.read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        if watch := _WATCH.get():
            watch.bytes += len(data)
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _try(self, act: Callable[[BinaryIO], Any]) -> Any:
        failures = Exception if is_address(self._path) else OSError  # file systems of fsspec have errors of their own
        for pause in (*_PAUSES, None):
            try:
                if self._file is None:
                    self._file = _open(self._path)
                    if self._at:
                        self._file.seek(self._at)
                return act(self._file)
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                raise
            except failures as error:
                if pause is None:
                    raise StorageError(f"{self._path}: could not be read ({type(error).__name__}: {error})") from error
                self._file = None
                time.sleep(pause)


def _open(path: str) -> BinaryIO:
    return extra("fsspec").open(path, "rb").open() if is_address(path) else open(path, "rb", buffering=0)


@contextlib.contextmanager
def local_copy(path: str, suffix: str) -> Iterator[str]:
    """A local file with the content of `path`, for a library that reads local files by offset; itself if it is one."""
    if not is_address(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=suffix) as copy, stored(path) as file:
        shutil.copyfileobj(file, copy)
        copy.flush()
        yield copy.name
