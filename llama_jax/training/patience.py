"""Early stopping: the best held-out measurement so far, and how long there has been no better one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from llama_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a run stops early.

    Attributes:
      metric: the held-out metric that counts; `mode` says whether less or more of it is better.
      evaluations: in a row without a better one; then the run stops. 0: it never does.
      least: by how much a measurement must be better to count as one.
    """

    metric: str
    mode: Literal["min", "max"]
    evaluations: int
    least: float = 0.0

    def check(self, held_out: Mapping[str, float]) -> None:
        """ConfigError if the metric is not among those that are measured."""
        if self.metric and self.metric not in held_out:
            raise ConfigError(f"loop.keep_best={self.metric}: no such held-out metric; there are {', '.join(held_out)}")


class Patience:
    """What has been measured, in order. Its state is JSON of a checkpoint: a resumed run stops where the whole one does.

    The start, step 0, is measured too: a run that only makes it worse ends with what it began with.
    """

    def __init__(self, rule: Rule):
        self.rule = rule
        self.on = rule.evaluations > 0
        self.step: int | None = None  # of the best measurement
        self.held_out: dict[str, float] = {}  # that measurement
        self.since = 0  # measurements after it

    def see(self, step: int, held_out: Mapping[str, float]) -> bool:
        """Takes a measurement; whether it is the best so far. NaN never is."""
        name = self.rule.metric
        value, sign = held_out[name], 1 if self.rule.mode == "max" else -1
        better = math.isfinite(value) and (self.step is None or sign * (value - self.held_out[name]) > self.rule.least)
        if better:
            self.step, self.held_out, self.since = step, dict(held_out), 0
        else:
            self.since += 1
        return better

    def rank(self, *, best: bool) -> dict[str, float]:
        """What the checkpoint of a step is ranked by: only one that was the best when it was measured stays for it."""
        return {self.rule.metric: self.held_out[self.rule.metric] if best else math.nan}

    def report(self, done: int) -> str:
        """One line of what came out after `done` steps."""
        best = f"the best held-out {self.rule.metric} is {self.held_out[self.rule.metric]:.4g}, of step {self.step}"
        return f"stopped at step {done}: {best}" if self.exhausted else best

    @property
    def seen(self) -> bool:
        """Whether anything has been measured."""
        return self.step is not None or self.since > 0

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return self.on and self.since >= self.rule.evaluations

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "metric": self.rule.metric, "mode": self.rule.mode, "step": self.step, "since": self.since,
            "held_out": {name: value if math.isfinite(value) else None for name, value in self.held_out.items()},
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint, unless it was made under another metric."""
        if (state["metric"], state["mode"]) != (self.rule.metric, self.rule.mode):
            return
        self.step, self.since = state["step"], state["since"]
        self.held_out = {name: math.nan if value is None else value for name, value in state["held_out"].items()}
