"""SIGTERM, the notice that a machine will be taken away, becomes a stop of all hosts at the same point of the run."""

import signal
import threading

import jax

from llama_jax.parallel.hosts import stop_agreed

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: nothing is wrong, try again. Launchers start the same command again, as after any failure


class Preempted(SystemExit):
    """SIGTERM came; what there is is saved and the process ends with EXIT_PREEMPTED, since the run is not finished."""

    def __init__(self):
        super().__init__(EXIT_PREEMPTED)


class Terminate:
    """Takes the signal while inside `with`."""

    def __init__(self):
        self.requested = False
        # Of several processes JAX's coordination service takes the signal, and they agree on a point.
        self.alone = jax.process_count() == 1
        self.handled = self.alone and threading.current_thread() is threading.main_thread()

    def here(self) -> bool:
        """Whether to stop here; to be asked after every step and wherever else a run can stop, by every host."""
        # The service says it at one point alone, where a spike may still take the run back to an earlier step.
        self.requested = self.requested or (not self.alone and stop_agreed())
        return self.requested

    def __enter__(self) -> "Terminate":
        if self.handled:
            self.previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_) -> None:
        self.requested = True

    def __exit__(self, *exc_info) -> None:
        if self.handled:
            signal.signal(signal.SIGTERM, self.previous)
