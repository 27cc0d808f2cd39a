"""A thread that owns an engine, for callers on other threads: a bounded queue in, tokens out through callbacks, metrics."""

import collections
import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.sampling.engine import Engine
from llama_jax.sampling.prompt_scores import PromptScorer, Scored
from llama_jax.sampling.request import Request

log = logging.getLogger(__name__)

# (token, the model's log-probability of it, finish) and, where the job asks for alternatives, the most likely tokens with
# theirs; the last call has a finish, and no token if the request was cancelled, failed, or asked for none. A job's
# `deliver_prompt` is called before, with what the prompt's own tokens scored.
Deliver = Callable[..., None]


class QueueFull(RuntimeError):
    """There is no room for another request."""


class EngineStopped(QueueFull):
    """There never will be: the engine's thread has ended."""


class Turns:
    """A lock that is given in the order in which it was asked for."""

    def __init__(self):
        self._changed, self._asked, self._now = threading.Condition(), 0, 0

    def __enter__(self) -> None:
        with self._changed:
            mine, self._asked = self._asked, self._asked + 1
            self._changed.wait_for(lambda: self._now == mine)

    def __exit__(self, *exc_info) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()


class _Counted:
    """Counters whose values others keep, {name: (what it counts, its value)}, as a Prometheus registry asks for them."""

    def __init__(self, counters: dict[str, tuple[str, Callable[[], int]]]):
        self._counters = counters

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        for name, (described, value) in self._counters.items():
            yield CounterMetricFamily(name, described, value=value())


# Programs of several devices must be started on all of them in one order: two engines that share devices would else wait for
# each other, each on the devices that the other has not come to.
_TURNS = Turns()


class Worker:
    """Runs an engine in a thread of its own; engines over several devices take turns.

    At most `queue` requests wait for a slot; `scorer` scores the prompts of those that ask for it, between two steps of the
    engine; `registry` holds Prometheus metrics of the traffic (package
    prometheus_client, extra `[serve]`).
    """

    def __init__(self, engine: Engine, mesh: Mesh, *, queue: int, scorer: PromptScorer | None = None):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.engine, self.scorer, self._mesh, self._queue = engine, scorer, mesh, queue
        self._ready = threading.Condition()
        self._jobs: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self._unscored: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self._last: tuple[tuple[Any, ...], Scored] | None = None  # several answers to a prompt score it once
        self._leaving: list[tuple[int, str]] = []  # (ticket, outcome)
        self._live: dict[int, tuple[Request, Deliver, float]] = {}  # with when it came
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
        self.registry.register(_Counted({
            "llama_jax_compilations": (
                "Programs compiled", lambda: engine.compilations + (scorer.compilations if scorer else 0)
            ),
            "llama_jax_reused_tokens": ("Prompt tokens taken over", lambda: engine.reused_tokens),
        }))  # fmt: skip

    @property
    def capacity(self) -> int:
        """Requests that there can ever be at once, in slots and waiting."""
        return self.engine.settings.slots + self._queue

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._jobs) + len(self._unscored) + self.engine.queued

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

        Where it also has `deliver_prompt`, that gets the `Scored` prompt before any token is drawn. `max_tokens` may be 0.

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

    def cancel(self, ticket: int, *, outcome: str = "cancelled") -> None:
        """Ends a request, wherever it is; one that has ended already is none. `outcome` is what is counted: "stop" of an answer
        that is finished, since it came to a stop string."""
        with self._ready:
            self._leaving.append((ticket, outcome))
            self._ready.notify()

    # ---- in the thread ----

    def _run(self) -> None:
        turn = _TURNS if self._mesh.size > 1 else contextlib.nullcontext()
        try:
            with jax.set_mesh(self._mesh):
                while not self._stopping:
                    self._enter_and_leave()
                    with turn:
                        self._score_next()
                        busy = self.engine.step()
                    if not busy and not self._unscored:
                        with self._ready:
                            while not (self._jobs or self._leaving or self._stopping):
                                self._ready.wait()
        except Exception:
            log.exception("the engine failed")
            raise
        finally:
            self._stopping = True
            with self._ready:
                jobs, live = [*self._jobs, *self._unscored], list(self._live.values())
                self._jobs.clear()
                self._unscored.clear()
            failed = [(job["deliver"], job["prompt"], 0) for _, job in jobs]
            for deliver, prompt, drawn in failed + [(tell, request.prompt, len(request.tokens)) for request, tell, _ in live]:
                self._count("error", prompt, drawn)
                deliver(None, 0.0, "error")

    def _enter_and_leave(self) -> None:
        with self._ready:
            jobs, leaving = list(self._jobs), self._leaving
            self._jobs.clear()
            self._leaving = []
            for ticket, job in jobs:
                if "deliver_prompt" in job or not job["max_tokens"]:
                    self._unscored.append((ticket, job))
                else:
                    self._enter(ticket, **job)
        for ticket, outcome in leaving:
            if (unscored := [pair for pair in self._unscored if pair[0] == ticket]):
                self._unscored.remove(unscored[0])
                self._count("cancelled", unscored[0][1]["prompt"], 0)
                unscored[0][1]["deliver"](None, 0.0, "cancelled")
            if ticket in self._live:
                request, deliver, came = self._live.pop(ticket)
                self.engine.cancel(request)
                self._count(outcome, request.prompt, len(request.tokens))
                if outcome != "cancelled":
                    self._whole.observe(time.monotonic() - came)
                deliver(None, 0.0, "cancelled")

    def _score_next(self) -> None:
        """Scores the prompt of one request, which then waits for a slot as all do."""
        if not self._unscored:
            return
        ticket, job = self._unscored[0]
        tell = job.pop("deliver_prompt", None)
        try:
            if tell is not None:
                tell(self._scores(job["prompt"], job.get("alternatives", 0)))
        except Exception:  # the caller's checks should have found it; the requests of others go on
            log.exception("a prompt was not scored")
            self._count("error", job["prompt"], 0)
            job["deliver"](None, 0.0, "error")
        else:
            if job["max_tokens"]:
                self._enter(ticket, **job)
            else:
                self._count("length", job["prompt"], 0)
                job["deliver"](None, 0.0, "length")
        self._unscored.popleft()

    def _scores(self, prompt: Sequence[int], alternatives: int) -> Scored:
        asked = (*prompt, alternatives)
        if self._last is None or self._last[0] != asked:
            self._last = asked, self.scorer(self.engine.weights, prompt, alternatives=alternatives)
        return self._last[1]

    def _enter(self, ticket: int, *, deliver: Deliver, seed: int | None, came: float, **job: Any) -> None:
        def on_token(request: Request, token: int) -> None:
            self._drawn.inc()
            if len(request.tokens) == 1:
                self._first.observe(time.monotonic() - came)
            deliver(token, request.model_log_probs[-1], request.finish, *request.most_likely[-1:])
            if request.finish:
                self._live.pop(ticket, None)
                self._whole.observe(time.monotonic() - came)
                self._count(request.finish, request.prompt, len(request.tokens))

        seed = int.from_bytes(os.urandom(4)) if seed is None else seed
        try:
            request = self.engine.submit(seed=seed, on_token=on_token, **job)
        except Exception:  # the caller's checks should have found it; the requests of others go on
            log.exception("the engine refused a request")
            self._count("error", job["prompt"], 0)
            deliver(None, 0.0, "error")
        else:
            self._live[ticket] = request, deliver, came

    def _count(self, outcome: str, prompt: Sequence[int], drawn: int) -> None:
        self._requests.labels(outcome).inc()
        self._entered.inc(len(prompt))
        self._lengths.observe(drawn)
