"""Reads the metrics of steps one step late, logs them, and stops a run that diverges."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from llama_jax.files import write_json
from llama_jax.training.metrics import MetricWriter, Progress
from llama_jax.training.spikes import Spike, Spikes
from llama_jax.training.stage import LoopConfig, Stage

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """Too many updates in a row were not finite, or too many losses were spikes. From the same checkpoint it would come again,
    so its code tells launchers not to try."""

    exit_code = 65


class Pace:
    """Steps a second of this process. The first two are left out, since they compile, and so is what was skipped."""

    def __init__(self):
        self.steps, self.skipped = 0, 0.0
        self.first: tuple[int, float] | None = None  # after the second step: its number, and when it was done
        self.asked: tuple[int, float] | None = None  # the newest when `lately` was asked last
        self.newest: tuple[int, float] | None = None

    def step(self, now: float) -> None:
        """One more is done, at that time in seconds."""
        self.steps += 1
        if self.steps >= 2:
            self.newest = (self.steps, now - self.skipped)
            self.first = self.first or self.newest
            self.asked = self.asked or self.newest

    def skip(self, seconds: float) -> None:
        """So many passed between two steps with something else: an evaluation, a save."""
        self.skipped += seconds

    def mean(self) -> float | None:
        """Since the second step."""
        return self._between(self.first, self.newest)

    def lately(self) -> float | None:
        """Since it was asked last: a slow hour shows in its hour."""
        rate, self.asked = self._between(self.asked, self.newest), self.newest
        return rate

    @staticmethod
    def _between(first: tuple[int, float] | None, last: tuple[int, float] | None) -> float | None:
        if first is None or last is None or first[0] == last[0]:
            return None
        return (last[0] - first[0]) / max(last[1] - first[1], 1e-9)


class Recorder:
    """What the loop hands over after each step, on its way to the log, the progress bar and the judgement of spikes.

    Beside the metrics of steps it logs
      tokens_seen: real tokens of the batches, since step 0 of the run, that updates were made of: padding is none, skipped
        batches were not learned from, and a batch that comes again (an epoch) counts again. Of batches that do not tell,
        `Stage.tokens_per_step` stands for theirs. Checkpoints hold it with the last metrics.
      epoch: how often the examples (of RL: the prompts) have been seen, batches that were skipped included; absent where
        sources of a mixture come round each in its own time.
      tokens_per_second: steps a second since the last line x `Stage.tokens_per_step`, which has the padding of rows; absent
        in the first lines, before which no step was timed.
    """

    def __init__(
        self,
        writer: MetricWriter,
        progress: Progress,
        config: LoopConfig,
        stage: Stage,
        logged: Mapping[str, Any],
        *,
        spikes: Spikes,
        workdir: Path,
        extra: Callable[[], Mapping[str, float]],
    ):
        self.writer, self.progress, self.config, self.stage = writer, progress, config, stage
        self.spikes, self.workdir, self.extra = spikes, workdir, extra
        self.pending: tuple | None = None
        self.last: dict[str, float] = dict(logged["metrics"])
        self.rate_before: float | None = logged.get("tokens_per_second")
        self.pace = Pace()

    def push(self, step: int, means: Mapping[str, jax.Array], source_metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step that may still be running, and reads those of the step before."""
        self.flush()
        self.pending = (step, means, source_metrics)

    def flush(self) -> None:
        """Waits for the step that was pushed last and records it."""
        if self.pending is None:
            return
        step, means, source_metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(means)).items()} | dict(source_metrics)
        values |= self._tokens_seen(values.pop("tokens", None), skipped=values["skipped_in_a_row"] > 0) | self._epoch(step)
        self.pace.step(time.monotonic())
        if self.stage.check is not None and not values["skipped_in_a_row"]:
            self.stage.check(step, values)
        self.last |= {name: value for name, value in values.items() if math.isfinite(value)}
        shown = {self.stage.show: self.last[self.stage.show]} if self.stage.show in self.last else {}
        self.progress.update(1, **shown)
        due = step % self.config.log_every == 0 or step == self.config.steps - 1 or source_metrics
        if due or values["skipped_in_a_row"]:
            self.writer.write(step, {**values, **self._rate(self.pace.lately()), **self.extra()})
        if values["skipped_in_a_row"] >= self.config.max_skipped_in_a_row:
            self._diverged(step, int(values["skipped_in_a_row"]))
        if report := self.spikes.see(step, values["loss"]):
            log.warning("%s: %s; its rows are %s", self.stage.name, report, self.rows(range(step, step + 1)))
            if self.config.spike.rewind:
                raise Spike(step, report)

    def rows(self, steps: range) -> dict[str, Any]:
        """Which batches, and which of their rows, the steps trained on: JSON for whoever looks for what was wrong in them."""
        rows = getattr(self.stage.source, "rows", lambda batch: None)  # an RL source makes its rows as it goes
        batches = {step: self.spikes.index(step) for step in steps}
        return {str(step): {"batch": batch, "rows": rows(batch)} for step, batch in batches.items()}

    def _diverged(self, step: int, count: int) -> None:
        path = self.workdir / "diverged.json"
        if self.writer.enabled:
            write_json(path, {"steps": self.rows(range(max(step - count + 1, 0), step + 1))})
        raise Diverged(
            f"{self.stage.name}: {count} updates in a row were not finite, the last at step {step}; the newest checkpoint is "
            f"from before them or holds their unchanged parameters; their rows are listed in {path}"
        )

    def logged(self) -> dict[str, Any]:
        """What the summary tells; a checkpoint holds it too, for a run that is killed after its last step."""
        return {"metrics": self.last, **self._rate(self.pace.mean())}

    def _rate(self, steps_per_second: float | None) -> dict[str, float]:
        """Tokens a second of this process's steps; before any is timed that of the process before, or nothing."""
        measured = None if steps_per_second is None else self.stage.tokens_per_step * steps_per_second
        rate = self.rate_before if measured is None else measured
        return {"tokens_per_second": rate} if rate else {}

    def _tokens_seen(self, tokens: float | None, *, skipped: bool) -> dict[str, float]:
        """Those of all steps up to one with so many real tokens (None: its batch does not tell)."""
        if tokens is None and not self.stage.tokens_per_step:
            return {}
        if tokens is None:
            tokens = 0 if skipped else self.stage.tokens_per_step
        return {"tokens_seen": self.last.get("tokens_seen", 0.0) + tokens}  # float64 counts one by one up to 9e15

    def _epoch(self, step: int) -> dict[str, float]:
        epoch = getattr(self.stage.source, "epoch", lambda batch: None)(self.spikes.index(step))
        return {} if epoch is None else {"epoch": epoch}
