"""The lock of a workdir in a bucket, where no kernel holds one: an object that its owner writes anew every few seconds.

Who finds it waits until it changes (its owner lives: refused) or for `PATIENCE` without a change (its owner is dead: taken
over). No two clocks are compared. An owner that was taken over, because it stood still for so long, ends itself.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from llama_jax.paths import create, reason

log = logging.getLogger(__name__)

PERIOD, PATIENCE = 5.0, 25.0  # seconds


class Lease:
    """One try of this process to own an object."""

    def __init__(self, path: Path, *, period: float = PERIOD, patience: float = PATIENCE):
        self.path, self.period, self.patience = path, period, patience
        self.name = uuid.uuid4().hex
        self.beats, self.done = 0, threading.Event()
        self.thread: threading.Thread | None = None

    def take(self) -> str:
        """Takes it; "" or, if another process holds it, which one."""
        seen, since = "", time.monotonic()
        while True:
            try:
                create(self.path, self._text())
                break
            except FileExistsError:
                found = self._read()
            if not found:
                continue
            if seen and found != seen:
                return json.loads(found)["owner"]
            if not seen:
                log.warning("%s is held by %s; waiting to see whether that still runs", self.path, json.loads(found)["owner"])
                seen = found
            if _is_dead(json.loads(found)) or time.monotonic() - since > self.patience:
                self.path.unlink(missing_ok=True)
            else:
                time.sleep(self.period / 5)
        self.thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.thread.start()
        return ""

    def release(self) -> None:
        """Gives it back, if it was taken."""
        self.done.set()
        if self.thread is not None:
            self.thread.join(timeout=60)
            with contextlib.suppress(Exception):  # the network's many; without a beat it is soon free anyway
                if self._is_ours():
                    self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.done.wait(self.period):
            try:
                if not self._is_ours():
                    print(f"error: {self.path}: another run has taken this workdir over", file=sys.stderr, flush=True)
                    os._exit(1)
                self.beats += 1
                self.path.write_text(self._text())
            except Exception as error:  # the network's many; the next beat may get through
                log.warning("%s cannot be renewed: %s", self.path, reason(error))

    def _text(self) -> str:
        host = socket.gethostname()
        owner = {"host": host, "pid": os.getpid(), "owner": f"pid {os.getpid()} on {host}"}
        return json.dumps({**owner, "name": self.name, "beat": self.beats})

    def _read(self) -> str:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return ""

    def _is_ours(self) -> bool:
        found = self._read()
        return bool(found) and json.loads(found)["name"] == self.name


def _is_dead(owner: dict) -> bool:
    """Whether the owner was a process of this machine that has ended: then there is nothing to wait for."""
    if owner["host"] != socket.gethostname():
        return False
    if owner["pid"] == os.getpid():  # of a container that was here before: each begins with the same number
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
