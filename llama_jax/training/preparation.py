"""Rows that become a stage's data before its first step: some at a time, with progress, and stopped by SIGTERM in between."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

from llama_jax.training.attempt import waypoint
from llama_jax.training.metrics import Progress

AT_ONCE = 4096  # enough for many cores, few enough to be held as lists of integers
T = TypeVar("T")


def in_parts(rows: Iterable[T], *, label: str, unit: str, total: int | None = None, size: int = AT_ONCE) -> Iterator[list[T]]:
    """Rows, at most `size` at a time. From the second part on there is a bar: of small sets nothing is said.

    All hosts prepare the same rows (see `waypoint`).

    Args:
      total: how many there are, where that is known without reading them.
    """
    rows = iter(rows)
    if not (part := list(itertools.islice(rows, size))):
        return
    yield part
    done = len(part)
    if not (part := list(itertools.islice(rows, size))):
        return
    with Progress(total, label, unit, done=done, quiet=jax.process_index() > 0) as progress:
        while part:
            waypoint()
            yield part
            progress.update(len(part))
            part = list(itertools.islice(rows, size))
