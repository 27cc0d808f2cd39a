"""A thread that owns an engine, for callers on other threads: a bounded queue in, tokens out through callbacks, metrics."""

import collections
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import Request

log = logging.getLogger(__name__)

# (token, its log-probability, finish); the last call has a finish, and no token if the request was cancelled or failed
Deliver = Callable[[int | None, float, str], None]


class QueueFull(RuntimeError):
    """There is no room for another request."""


class EngineStopped(QueueFull):
    """There never will be: the engine's thread has ended."""


class Worker:
    """Runs an engine in a thread of its own.

    At most `queue` requests wait for a slot; `registry` holds Prometheus metrics of the traffic (package
    prometheus_client, extra `[serve]`).
    """

    def __init__(self, engine: Engine, mesh: Mesh, *, queue: int):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.engine, self._mesh, self._queue = engine, mesh, queue
        self._ready = threading.Condition()
        self._jobs: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self._leaving: list[int] = []
        self._live: dict[int, tuple[Request, Deliver]] = {}
        self._tickets = itertools.count(1)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.registry = CollectorRegistry()
        self._requests = Counter("llama_jax_requests", "Requests by outcome", ["outcome"], registry=self.registry)
        self._drawn = Counter("llama_jax_generated_tokens", "Tokens drawn", registry=self.registry)
        self._entered = Counter("llama_jax_prompt_tokens", "Prompt tokens of finished requests", registry=self.registry)
        lengths = (1, 8, 32, 128, 512, 2048, 8192)
        self._lengths = Histogram("llama_jax_answer_tokens", "Answer lengths", buckets=lengths, registry=self.registry)
        seconds = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
        self._first, self._whole = (
            Histogram(f"llama_jax_{name}_seconds", f"From a request to {what}", buckets=seconds, registry=self.registry)
            for name, what in (("first_token", "its first token"), ("request", "the end of its answer"))
        )
        Gauge("llama_jax_waiting", "Requests without a slot", registry=self.registry).set_function(lambda: self.waiting)
        Gauge("llama_jax_active", "Requests in a slot", registry=self.registry).set_function(lambda: engine.active)
        Gauge("llama_jax_compilations", "Programs compiled", registry=self.registry).set_function(lambda: engine.compilations)
        Gauge("llama_jax_reused_tokens", "Prompt tokens taken over", registry=self.registry).set_function(
            lambda: engine.reused_tokens
        )

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._jobs) + self.engine.queued

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step; requests in it are told that they failed."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[dict[str, Any]]) -> list[int]:
        """Queues requests together, all or none; each job has the arguments of `Engine.submit` and `deliver`.

        Raises:
          QueueFull: if they do not all fit; EngineStopped, if no later try can succeed.
        """
        with self._ready:
            if not self.alive:
                raise EngineStopped("the engine has stopped")
            free = self.engine.settings.slots - self.engine.active
            if self.waiting + len(jobs) > self._queue + max(free, 0):
                self._requests.labels("refused").inc(len(jobs))
                raise QueueFull(f"{self.waiting} requests are waiting already; try again later")
            tickets = [next(self._tickets) for _ in jobs]
            now = time.monotonic()
            self._jobs.extend((ticket, {**job, "came": now}) for ticket, job in zip(tickets, jobs, strict=True))
            self._ready.notify()
        return tickets

    def cancel(self, ticket: int) -> None:
        """Ends a request, wherever it is; one that has ended already is none."""
        with self._ready:
            self._leaving.append(ticket)
            self._ready.notify()

    # ---- in the thread ----

    def _run(self) -> None:
        try:
            with jax.set_mesh(self._mesh):
                while not self._stopping:
                    self._enter_and_leave()
                    if not self.engine.step():
                        with self._ready:
                            while not (self._jobs or self._leaving or self._stopping):
                                self._ready.wait()
        except Exception:
            log.exception("the engine failed")
            raise
        finally:
            self._stopping = True
            with self._ready:
                jobs, live = list(self._jobs), list(self._live.values())
                self._jobs.clear()
            for deliver in [*(job["deliver"] for _, job in jobs), *(deliver for _, deliver in live)]:
                deliver(None, 0.0, "error")

    def _enter_and_leave(self) -> None:
        with self._ready:
            jobs, leaving = list(self._jobs), self._leaving
            self._jobs.clear()
            self._leaving = []
            for ticket, job in jobs:
                self._enter(ticket, **job)
        for ticket in leaving:
            if ticket in self._live:
                request, deliver = self._live.pop(ticket)
                self.engine.cancel(request)
                self._count(request)
                deliver(None, 0.0, "cancelled")

    def _enter(self, ticket: int, *, deliver: Deliver, seed: int | None, came: float, **job: Any) -> None:
        def on_token(request: Request, token: int) -> None:
            self._drawn.inc()
            if len(request.tokens) == 1:
                self._first.observe(time.monotonic() - came)
            deliver(token, request.log_probs[-1], request.finish)
            if request.finish:
                self._live.pop(ticket, None)
                self._whole.observe(time.monotonic() - came)
                self._count(request)

        seed = int.from_bytes(os.urandom(4)) if seed is None else seed
        try:
            request = self.engine.submit(seed=seed, on_token=on_token, **job)
        except Exception:  # the caller's checks should have found it; the requests of others go on
            log.exception("the engine refused a request")
            deliver(None, 0.0, "error")
        else:
            self._live[ticket] = request, deliver

    def _count(self, request: Request) -> None:
        self._requests.labels(request.finish).inc()
        self._entered.inc(len(request.prompt))
        self._lengths.observe(len(request.tokens))
