"""Batches on the device: made one step ahead where that is possible."""

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from llama_jax.training.step import put_batch


class Feed:
    """Hands out batches on the device; a source that does not look at parameters is asked one step ahead.

    `index` gives the batch that a step trains on: its own number, but for batches that are left out.
    """

    def __init__(self, source: Any, mesh: Mesh, steps: int, index: Callable[[int], int]):
        self.source, self.mesh, self.steps, self.index = source, mesh, steps, index
        self.thread = None if source.looks_at_params else concurrent.futures.ThreadPoolExecutor(1)
        self.next: dict[int, concurrent.futures.Future] = {}

    def batch(self, step: int, params: Any) -> tuple[Any, Mapping[str, float]]:
        """The batch of a step, and metrics of its making."""
        if self.thread is None:
            batch, metrics = self.source.batch(step, params)
            return put_batch(batch, self.mesh), metrics
        future = self.next.pop(step, None) or self.thread.submit(self._make, step)
        if step + 1 < self.steps:
            self.next[step + 1] = self.thread.submit(self._make, step + 1)
        return future.result()

    def _make(self, step: int) -> tuple[Any, Mapping[str, float]]:
        batch, metrics = self.source.batch(self.index(step), None)
        return put_batch(batch, self.mesh), metrics

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exc_info) -> None:
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
