"""Files that lose nothing when the process is killed: rows appended whole and synced, one writer, a torn end cut off."""

import fcntl
import json
import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.data.rows import read_jsonl
from llama_jax.paths import is_remote


class RowFile:
    """A JSONL file that this process alone appends to.

    A row is on the disk when `append` returns. A line torn by a kill stands at the end at most and is cut off on opening, as
    are empty lines there; any other malformed line is a ValueError with its number.
    """

    def __init__(self, path: str | os.PathLike):
        if is_remote(path):
            raise ValueError(f"{path}: expected a local file: rows are appended to it, which a bucket cannot do")
        self.path = Path(path)
        if self.path.suffix == ".gz":
            raise ValueError(f"{self.path}: expected a plain JSONL file, since rows are appended to it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        new = not self.path.exists()
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise FileExistsError(f"{self.path}: another process writes to it; expected one at a time") from None
        if new:
            _sync_directory(self.path.parent)
        self._cut_end()
        self.rows: list[dict[str, Any]] = [row for _, row in read_jsonl(self.path)]

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row; it is on the disk when this returns."""
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        with self._lock:
            end = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, line)
                if written != len(line):
                    raise OSError(f"{self.path}: wrote {written} of {len(line)} bytes; is the disk full?")
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, end)  # the next row must not join half a line
                raise
            self.rows.append(dict(row))

    def close(self) -> None:
        """Lets others write."""
        os.close(self._file)

    def _cut_end(self) -> None:
        size = os.fstat(self._file).st_size
        if not size:
            return
        with mmap.mmap(self._file, size, access=mmap.ACCESS_READ) as data:  # from behind: the file may be large
            end = data.rfind(b"\n") + 1
            while end and not data[(before := data.rfind(b"\n", 0, end - 1) + 1) : end].strip():
                end = before  # an empty line, behind which no row may be appended
        if end < size:
            os.ftruncate(self._file, end)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
