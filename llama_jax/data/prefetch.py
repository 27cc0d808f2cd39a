"""Batches computed ahead: the host prepares step k + 1 while the device runs step k."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any


class Prefetcher:
    """Computes batch(first_step), batch(first_step + 1), ... ahead on a background thread.

    `get(step)` hands them out in order and raises what `batch` raised. A context manager; `close` stops the
    thread.
    """

    def __init__(self, batch: Callable[[int], Any], first_step: int, *, stop_step: int | None = None, depth: int = 2):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._next = first_step
        self._stop_step = stop_step
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(batch, first_step, stop_step), name="prefetch", daemon=True)
        self._thread.start()

    def get(self, step: int) -> Any:
        """Batch `step`; steps must be asked for one after the other."""
        if self._closed.is_set():
            raise RuntimeError("prefetcher: closed")
        if step != self._next or (self._stop_step is not None and step >= self._stop_step):
            raise ValueError(f"prefetcher: expected step {self._next} (of {self._stop_step}), got {step}")
        if self._failure is not None:
            raise self._failure
        value, self._failure = self._queue.get()
        if self._failure is not None:
            raise self._failure
        self._next += 1
        return value

    def close(self) -> None:
        """Stops the thread and waits for it; may be called again."""
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # a full queue would hold the thread in its put
                self._queue.get_nowait()
            self._thread.join(timeout=0.01)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _work(self, batch: Callable[[int], Any], step: int, stop_step: int | None) -> None:
        while not self._closed.is_set() and (stop_step is None or step < stop_step):
            try:
                item = (batch(step), None)
            except BaseException as error:  # noqa: BLE001 - handed to the reader, who raises it
                item = (None, error)
            self._put(item)
            if item[1] is not None:
                return
            step += 1

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
