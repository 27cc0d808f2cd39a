"""Goodput: which share of the time since a run's first start went into steps that count.

A step counts if it is part of the state in the end: the seconds are kept in the checkpoint, so those of lost steps go with
them. What is left is start, compilation, evaluation, saving, lost steps and waiting for machines.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

from llama_jax.files import write_json
from llama_jax.paths import append, may_fail, seconds_between_writes

ATTEMPTS = "attempts.jsonl"


class Goodput:
    """Keeps `attempts.jsonl` and `reached.json` (the last step seen) in the workdir.

    A line of the former is a start, made before anything else is, or from which step steps are taken and how far they had come
    before: after each start, and after going back because of a spike.
    """

    def __init__(self, workdir: Path, *, enabled: bool, clock: Callable[[], float] = time.time):
        self.enabled, self.clock = enabled, clock
        self.path, self.reached_path, self.reported = workdir / ATTEMPTS, workdir / "reached.json", 0.0
        self.first, self.productive = 0, 0.0
        rows = _rows(self.path)
        rows.append(self._note({"started": clock()}))
        starts = [row["started"] for row in rows if "started" in row]
        self.begun, self.restarts = starts[0], len(starts) - 1
        self.lost = sum(max(row["reached_before"] - row["from"], 0) for row in rows if "from" in row)

    def steps_from(self, first: int, productive: float) -> None:
        """Steps are taken from here, with the productive seconds of those before."""
        self.first, self.productive = first, productive
        row = self._note({"from": first, "reached_before": self._reached()})
        self.lost += max(row["reached_before"] - first, 0)

    def _note(self, row: dict[str, float]) -> dict[str, float]:
        if self.enabled:
            with may_fail(self.path):
                append(self.path, json.dumps(row) + "\n")
        return row

    def _reached(self) -> int:
        try:
            return int(json.loads(self.reached_path.read_text())["step"])
        except Exception:  # never written, damaged or out of reach: a statistic is not worth a run
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
            with may_fail(self.reached_path):
                write_json(self.reached_path, {"step": done})

    def metrics(self) -> dict[str, float]:
        """goodput (a share), restarts, lost_steps."""
        wall = max(self.clock() - self.begun, 1e-9)
        return {"goodput": min(self.productive / wall, 1.0), "restarts": self.restarts, "lost_steps": self.lost}


def _rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # torn by a kill, or damaged
            continue
    return rows
