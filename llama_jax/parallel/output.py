"""Where a command writes that knows of disks alone, when its results shall lie in a bucket."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import jax

from llama_jax.parallel.hosts import first_problem
from llama_jax.paths import Mirror, check_bucket, is_remote, may_fail, reason, seconds_between_writes

_DATABASE = ".db"  # in the names of SQLite's files, its journals too


@contextlib.contextmanager
def worked_in(directory: str | os.PathLike) -> Iterator[Path]:
    """The directory of `--output` that a command works in, on this machine: a local one is that itself.

    Of one in a bucket it is a copy, with what an earlier run left there, and host 0 sends what changes twice a minute and in
    the end: what is killed loses that much. Databases are sent in the end alone, since a copy of one at work may be torn.

    Raises:
      ValueError: it is an address of another service.
      OSError: on all hosts, if host 0 cannot read what is there.
    """
    if "://" in os.fspath(directory) and not is_remote(directory):  # of which a path would make a directory "s3:"
        raise ValueError(f"--output={directory}: expected a directory, or gs://bucket/directory")
    mirror = Mirror(directory)
    if not mirror.remote:
        yield mirror.local
        return
    first, done, failure = jax.process_index() == 0, threading.Event(), None

    def send() -> None:
        while not done.wait(seconds_between_writes(directory)):
            with may_fail(directory):  # the next one may come through, and the last one says why not
                mirror.send(but=_DATABASE)

    thread = threading.Thread(target=send, name="mirror", daemon=True)
    try:
        if first:
            try:
                check_bucket(directory)
                mirror.fetch_all()
            except Exception as error:
                failure = error
        if problem := first_problem("" if failure is None else f"{directory}: {reason(failure)}"):
            raise failure or OSError(problem)
        if first:
            thread.start()
        yield mirror.local
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
        if first and failure is None:
            mirror.close()
        else:
            shutil.rmtree(mirror.local, ignore_errors=True)
