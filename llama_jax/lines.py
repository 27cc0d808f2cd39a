"""What a chat or a batch is told: lines of a file, a pipe or a terminal, on one host or the same on all of them."""

import dataclasses
import itertools
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import jax

from llama_jax.batch import resume
from llama_jax.parallel.hosts import from_host_0

_AHEAD = 1024  # lines of a pipe that are read before they are asked for


@dataclasses.dataclass(frozen=True)
class Input:
    """What is read, and where answers go."""

    kind: Literal["requests", "questions", "terminal"]
    lines: Iterable[str | None]
    out: TextIO
    total: int = 0  # lines, where that is known
    done: Sequence[tuple[str, bool]] = ()  # which were answered before; see `batch.resume`


def open_input(path: str, answers: str, *, waits: bool) -> Input:
    """The requests of a file or of standard input ("-"), or without a path what a terminal or a pipe says.

    `waits` says whether a reader may wait for the next line; otherwise a line is None while none has come.
    """
    if path and path != "-":
        # Lines end at "\n" alone: JSON may hold the other ends of lines that Python knows. Empty ones at the end ask nothing.
        whole = Path(path).read_bytes().decode("utf-8", "surrogateescape").rstrip(" \t\r\n")
        lines = whole.split("\n") if whole else []
        return _requests(lines, answers, total=len(lines))
    typed = _piped(0)
    if path == "-":
        return _requests(arriving(typed), answers)
    if sys.stdin.isatty():
        return Input("terminal", _typed() if waits else _prompted(arriving(typed)), sys.stdout)
    begin = list(itertools.islice(typed, 1))
    typed = itertools.chain(begin, typed)
    if begin and begin[0].startswith("{"):
        return _requests(arriving(typed), answers)
    return Input("questions", typed if waits else arriving(typed), sys.stdout)


def _requests(lines: Iterable[str | None], answers: str, *, total: int = 0) -> Input:
    if answers == "-":
        return Input("requests", lines, sys.stdout, total)
    done = resume(Path(answers))
    return Input("requests", lines, open(answers, "a", encoding="utf-8"), total, done)  # noqa: SIM115 - ends with the process


def _piped(descriptor: int) -> Iterator[str]:
    """Lines of a descriptor. Python's own file would stay locked by a thread that waits for it, and abort the exit."""
    begun = b""
    while data := os.read(descriptor, 1 << 16):
        *whole, begun = (begun + data).split(b"\n")
        yield from (line.decode("utf-8", "surrogateescape") for line in whole)
    if begun:
        yield begun.decode("utf-8", "surrogateescape")


def _typed() -> Iterator[str]:
    try:
        import readline  # noqa: F401 - history and editing, where the platform has it
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return


def _prompted(lines: Iterable[str | None]) -> Iterator[str | None]:
    print("> ", end="", flush=True)
    for line in lines:
        yield line
        if line is not None:
            print("> ", end="", flush=True)


def arriving(lines: Iterable[str]) -> Iterator[str | None]:
    """Lines as a thread reads them; None whenever none has come yet."""
    read: queue.Queue[str | Exception] = queue.Queue(_AHEAD)

    def fill() -> None:
        try:
            for line in lines:
                read.put(line)
            read.put(EOFError())
        except Exception as error:
            read.put(error)

    threading.Thread(target=fill, name="reader", daemon=True).start()
    while True:
        try:
            line = read.get_nowait()
        except queue.Empty:
            yield None
            continue
        if isinstance(line, EOFError):
            return
        if isinstance(line, Exception):
            raise line
        yield line


def shared(lines: Iterable[str | None], interrupted: Callable[[], bool], *, raises: bool) -> Iterator[str | None]:
    """Lines that process 0 reads, in every process, until their end or an interrupt, which `raises` KeyboardInterrupt in every
    process where work is left undone by it."""
    own = iter(lines)
    while (line := from_host_0(lambda: True if interrupted() else next(own, False))) is not False:
        if line is True:
            if raises:
                raise KeyboardInterrupt
            return
        yield line


class Interrupts:
    """Ctrl-C of process 0 as a question, asked where all processes are at one point; unasked, the second ends the process.

    As a context, until its end.
    """

    def __init__(self):
        self._came = False
        self._before = signal.signal(signal.SIGINT, self._note if jax.process_index() == 0 else signal.SIG_IGN)

    def __enter__(self) -> "Interrupts":
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: Any) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True

    def __call__(self) -> bool:
        came, self._came = self._came, False
        return came
