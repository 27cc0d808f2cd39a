"""Ends a run that no longer gets anywhere, saying which host is to blame: nothing is worse than a pod that waits in silence.

Three things are watched: that this process goes from step to step, that the other hosts are alive, and that the
interpreter itself still runs. In each case the stacks of all threads go to stderr and to `logs/host-<n>.log` in the
workdir, and the process ends with a code on which launchers start again.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import jax

from llama_jax.parallel.abort import EXIT_HOST_LOST, on_abort
from llama_jax.parallel.peers import Peers, Word, lost, places
from llama_jax.paths import Mirror, first_line

log = logging.getLogger(__name__)

EXIT_HANGS = 70  # this host made no progress (EX_SOFTWARE)
_STOPPED = 60.0  # seconds without a look of the watchdog that count as no time of the run
_SENDING = 15.0  # seconds for the upload of a log
_STUCK = 300.0  # seconds without the interpreter's lock until the watchdog of the watchdog acts
_GRACE = 3.0  # seconds in which a host may come to the same error as another one by itself


class Watchdog:
    """Watches a run from inside `with`, which the hosts enter right after they have met.

    Whoever carries the run out says `at(phase, number)` whenever it gets somewhere.

    Attributes:
      step_seconds: a phase may last that long; before the end of the first step `start_seconds`, for compilation.
      peer_seconds: another host may be silent for that long.
    """

    def __init__(self, *, step_seconds: float, start_seconds: float, peer_seconds: float):
        self.step_seconds, self.start_seconds, self.peer_seconds = step_seconds, start_seconds, peer_seconds
        self.host, self.hosts = jax.process_index(), jax.process_count()
        self.peers = Peers() if self.hosts > 1 else None
        self.place, self.since, self.limit = "the start", time.monotonic(), start_seconds
        self.first: int | None = None
        self.failed: str | None = None  # what our own error says
        self.code = 1  # what it ends the process with
        self.logs: Mirror | None = None
        self.file: TextIO | None = None
        self.done = threading.Event()
        self.ending = threading.Lock()

    def begin(self, first: int) -> None:
        """The steps begin with this one: up to the end of the next, programs are compiled."""
        self.first = first

    def at(self, phase: str, number: int, *, of: str = "step") -> None:
        """The run enters a phase of a step, or of what is done before there are any."""
        self.place, self.since = f"{phase} of {of} {number}", time.monotonic()
        self.limit = self.start_seconds if self.first is None or number <= self.first + 1 else self.step_seconds

    def moves(self) -> None:
        """The run gets on within its phase."""
        self.since = time.monotonic()

    def write_to(self, directory: Path) -> None:
        """Keeps the warnings and the end of this host in a directory that belongs to this run, from here on."""
        logs = Mirror(directory)
        logs.local.mkdir(parents=True, exist_ok=True)
        self.file = open(logs.fetch(f"host-{self.host}.log"), "a", encoding="utf-8")
        self.logs, self.handler = logs, logging.StreamHandler(self.file)
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.handler.setLevel(logging.WARNING)
        logging.getLogger().addHandler(self.handler)

    def __enter__(self) -> "Watchdog":
        self.threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self.peers is not None:
            with contextlib.suppress(Exception):  # as in `_pulse`
                self._tell()
            self.threads.append(threading.Thread(target=self._pulse, name="pulse", daemon=True))
            self._on_abort()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self._report_failure(error)
        self.done.set()
        for thread in self.threads:
            thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        if self.peers is not None and self.failed is None:
            self.restore_abort()
            with contextlib.suppress(Exception):  # the service may be gone; then nobody is listening
                self.peers.leave()
        if self.file is not None:
            logging.getLogger().removeHandler(self.handler)
            with contextlib.suppress(OSError):
                self.file.close()
        self._send_logs()

    def _report_failure(self, error: BaseException) -> None:
        """Keeps an error in the host's log; of several hosts, finds out whose it was, or tells the others that it is ours."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # the error may be that nothing can be written
                self.file.write("".join(traceback.format_exception(error)))
                self.file.flush()
        if self.peers is None:
            return
        if _comes_from_outside(error):
            # The watching thread ends the process as soon as it knows whom to name.
            limit = time.monotonic() + self.peer_seconds + 10
            while time.monotonic() < limit:
                time.sleep(0.1)
        self.failed, self.code = first_line(error), getattr(error, "exit_code", 1)
        with contextlib.suppress(Exception):
            self._tell()
        log.error("host %d failed in %s: %s", self.host, self.place, self.failed)
        # What is still to be closed may wait for hosts that will not come any more.
        timer = threading.Timer(15, os._exit, args=(self.code,))
        timer.daemon = True
        timer.start()

    def _tell(self) -> None:
        failed = {} if self.failed is None else {"failed": self.failed, "code": self.code}
        self.peers.tell(at=self.place, **failed)

    def _pulse(self) -> None:
        while not self.done.wait(min(2.0, self.peer_seconds / 10)):
            with contextlib.suppress(Exception):  # `answered` grows old, and the watching thread sees it
                self._tell()
                self.peers.ask()

    def _watch(self) -> None:
        interval = min(1.0, self.step_seconds / 10, self.peer_seconds / 10)
        before = time.monotonic()
        while not self.done.wait(interval):
            stood, before = time.monotonic() - before - interval, time.monotonic()
            if stood > _STOPPED:  # the whole process was stopped, as by Ctrl-Z: no step is to blame
                self.since += stood
            if self.peers is not None:
                # If no Python code runs any more this is not put off any longer, and C code dumps the stacks. One host alone
                # keeps nobody waiting.
                faulthandler.dump_traceback_later(_STUCK, exit=True, file=self.file or sys.__stderr__)
                service_silent = time.monotonic() - self.peers.answered
                words = self.peers.words()
                blame = lost(words, service_silent=service_silent, me=self.host, limit=self.peer_seconds, grace=_GRACE)
                if blame:
                    self._end(f"host {self.host}, in {self.place}, stops: {blame}", _code(words))
            waited = time.monotonic() - self.since
            if waited > self.limit:
                others = f"; {places(self.peers.words())}" if self.peers is not None else ""
                self._end(
                    f"host {self.host} hangs: no progress for {waited:.0f} s, in {self.place}{others}", EXIT_HANGS
                )

    def _end(self, message: str, code: int) -> None:
        with self.ending:
            if self.done.is_set():
                return
            for stream in filter(None, (self.file, sys.__stderr__)):
                with contextlib.suppress(Exception):  # a full disk must not keep this process alive
                    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} error: {message}", file=stream, flush=True)
                    faulthandler.dump_traceback(file=stream, all_threads=True)
                    print(f"error: {message}", file=stream, flush=True)  # once more, where a reader looks first
            self._send_logs()
            os._exit(code)

    def _send_logs(self) -> None:
        """Uploads this host's log into a bucket; a network that answers no more may be what ends the run."""

        if self.logs is None:
            return

        def send() -> None:
            with contextlib.suppress(Exception):
                self.logs.close()

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        sender.join(timeout=_SENDING)

    def _on_abort(self) -> None:
        """JAX's service aborts the process when host 0 has gone; its message may not say so, ours does."""

        def aborted() -> None:
            if self.failed is not None:  # our error made the others end, and the service with them; it has been told
                os._exit(self.code)
            words = self.peers.words()
            # That something is wrong is certain now; a host need not have been silent for as long as usual.
            blame = lost(words, service_silent=0.0, me=self.host, limit=min(5.0, self.peer_seconds))
            # It may have been this process itself, as where a check of XLA's fails, which prints what was wrong.
            who = "see the message above"
            if self.host:
                who += "; if it names nothing, host 0, the coordinator, died or cannot be reached"
            self._end(f"host {self.host}, in {self.place}, was aborted: {blame or who}", _code(words))

        self.restore_abort = on_abort(aborted)


def _code(words: Mapping[int, Word]) -> int:
    """What a process ends with because of others: the code of one that failed where launchers are to do something else than
    after any error, as not to start a run again that diverged (65)."""
    codes = [word.status.get("code", 1) for word in words.values() if "failed" in word.status]
    return next((code for code in codes if code != 1), EXIT_HOST_LOST)


def _comes_from_outside(error: BaseException) -> bool:
    """Whether an error is the kind that the death of another host causes: a failed collective or barrier."""
    return isinstance(error, jax.errors.JaxRuntimeError) or any(
        word in str(error) for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "barrier", "Barrier")
    )
