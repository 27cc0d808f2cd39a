"""One start of a run, from before its data are made to its end: watched, told of SIGTERM, and counted.

The loop is given it. What draws data from a model before there is a loop passes it with `waypoint`, through functions that
know nothing of runs.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax

from llama_jax.parallel.hosts import first_problem
from llama_jax.training.goodput import Goodput
from llama_jax.training.options import RunOptions
from llama_jax.training.preemption import Preempted, Terminate
from llama_jax.training.watchdog import Watchdog

_current: contextvars.ContextVar["Attempt | None"] = contextvars.ContextVar("attempt", default=None)


@dataclasses.dataclass
class Attempt:
    """What is there from the start of a run on; `goodput` from when its workdir is its own."""

    watchdog: Watchdog
    terminate: Terminate
    goodput: Goodput | None = None

    def begin(self, workdir: Path) -> None:
        """The workdir is this run's: from here on its logs and its start are kept there."""
        self.watchdog.write_to(workdir / "logs")
        self.goodput = Goodput(workdir, enabled=jax.process_index() == 0)

    def stop_if_asked(self) -> None:
        """Preempted on all hosts, if SIGTERM came to any. All must pass here."""
        if self.terminate.here():
            raise Preempted


@contextlib.contextmanager
def start(options: RunOptions) -> Iterator[Attempt]:
    """All hosts start at the same moment; an error of one inside `with` ends them all, naming it."""
    first_problem("")
    seconds = {name: getattr(options, name) for name in ("step_seconds", "start_seconds", "peer_seconds")}
    with Watchdog(**seconds) as watchdog, Terminate() as terminate:
        token = _current.set(attempt := Attempt(watchdog, terminate))
        try:
            yield attempt
        finally:
            _current.reset(token)


def waypoint(phase: str = "", number: int = 0, *, of: str = "") -> None:
    """A point that a run passes before its steps: into a phase, or on in the same one. SIGTERM stops it here.

    All hosts must pass it, as they do where every one draws the same answers. Outside of a run nothing happens.

    Raises:
      Preempted: on all hosts.
    """
    attempt = _current.get()
    if attempt is None:
        return
    if phase:
        attempt.watchdog.at(phase, number, of=of)
    else:
        attempt.watchdog.moves()
    attempt.stop_if_asked()
