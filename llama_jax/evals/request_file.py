"""Finished requests of a benchmark in a file (SQLite), so that a task that was killed goes on after them."""

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_PLACES = 900  # values of one query: SQLite before 3.32 takes 999
_SECONDS = 1.0  # results that a kill may cost


class RequestFile:
    """Results by key, as JSON. Those that are put in are on the disk about a second later, or after `commit`.

    A transaction for each would cost seven times as long. Without a path they are kept in memory only.
    """

    def __init__(self, path: str | Path = ":memory:", *, clock: Callable[[], float] = time.monotonic):
        # Each statement stands alone until "begin", and results of one second are one transaction.
        self._rows = sqlite3.connect(path, isolation_level=None)
        self._rows.execute("create table if not exists requests (key text primary key, result text)")
        self._clock, self._since = clock, clock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "RequestFile":
        """Itself: the harness copies the settings of a task, and a judge's file among them stays one."""
        return self

    def __len__(self) -> int:
        return self._rows.execute("select count(*) from requests").fetchone()[0]

    def known(self, keys: Sequence[str]) -> dict[str, Any]:
        """{key: result} of those that are there."""
        found = {}
        for start in range(0, len(keys), _PLACES):
            some = keys[start : start + _PLACES]
            marks = ",".join("?" * len(some))
            found.update(self._rows.execute(f"select key, result from requests where key in ({marks})", some))
        return {key: json.loads(text) for key, text in found.items()}

    def put(self, key: str, result: Any) -> None:
        """Keeps a result."""
        if not self._rows.in_transaction:
            self._rows.execute("begin")
            self._since = self._clock()
        self._rows.execute("insert or replace into requests values (?, ?)", (key, json.dumps(result)))
        if self._clock() - self._since >= _SECONDS:
            self.commit()

    def commit(self) -> None:
        """Writes what was put in."""
        if self._rows.in_transaction:
            self._rows.execute("commit")

    def close(self) -> None:
        """Writes what was put in, and lets go of the file."""
        self.commit()
        self._rows.close()


def key(kind: str, args: tuple, *more: Any) -> str:
    """Under what a request's result is kept."""
    return hashlib.sha256(json.dumps([kind, args, more], sort_keys=True, default=str).encode()).hexdigest()
