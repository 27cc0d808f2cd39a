"""Goodput: which share of the time since a run's first start went into steps that count.

A step counts if it is part of the state in the end: the seconds are kept in the checkpoint, so those of lost steps go with
them. What is left is start, compilation, evaluation, saving, lost steps and waiting for machines.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

from llama_jax.files import write_json
from llama_jax.paths import append, seconds_between_writes


class Goodput:
    """Keeps `attempts.jsonl` (one line a start) and `reached.json` (the last step seen) in the workdir."""

    def __init__(
        self, workdir: Path, *, first: int, productive: float, enabled: bool, clock: Callable[[], float] = time.time
    ):
        self.first, self.productive, self.enabled, self.clock = first, productive, enabled, clock
        self.path, self.reached_path, self.reported = workdir / "attempts.jsonl", workdir / "reached.json", 0.0
        attempts = _rows(self.path)
        attempt = {"started": clock(), "from": first, "reached_before": self._reached() if attempts else first}
        if enabled:
            append(self.path, json.dumps(attempt) + "\n")
        attempts.append(attempt)
        self.begun = attempts[0]["started"]
        self.restarts = len(attempts) - 1
        self.lost = sum(max(row["reached_before"] - row["from"], 0) for row in attempts)

    def _reached(self) -> int:
        try:
            return int(json.loads(self.reached_path.read_text())["step"])
        except (OSError, ValueError, KeyError):  # never written, or damaged: a statistic is not worth a run
            return 0

    def step(self, done: int, seconds: float) -> None:
        """`done` steps are done, the last in so many seconds; the first of a start compiles and does not count."""
        if done > self.first + 1:
            self.productive += seconds
        if self.clock() - self.reported >= seconds_between_writes(self.reached_path):
            self.note(done)

    def note(self, done: int) -> None:
        """Writes down how far the run has come, so that a later start can tell what was lost."""
        if self.enabled:
            self.reported = self.clock()
            write_json(self.reached_path, {"step": done})

    def metrics(self) -> dict[str, float]:
        """goodput (a share), restarts, lost_steps."""
        wall = max(self.clock() - self.begun, 1e-9)
        return {"goodput": min(self.productive / wall, 1.0), "restarts": self.restarts, "lost_steps": self.lost}


def _rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # torn by a kill
            continue
    return rows
