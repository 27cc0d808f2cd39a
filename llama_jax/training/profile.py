"""`--profile_steps=10:13`: a trace of a few steps for TensorBoard's profiler or Perfetto, into the workdir."""

import logging
from pathlib import Path

import jax

from llama_jax.config import ConfigError
from llama_jax.paths import Mirror

log = logging.getLogger(__name__)


def check_steps(steps: tuple[int, int] | None, *, count: int) -> None:
    """ConfigError for a span that begins behind the last of so many steps."""
    if steps is not None and steps[0] >= count:
        first, end = steps
        raise ConfigError(f"--profile_steps={first}:{end}: expected some of the steps 0 to {count - 1} (loop.steps={count})")


class Profile:
    """Traces the steps first .. end - 1, of a run that goes on from `done` those that are left of them; every host its own."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None, *, done: int):
        self.workdir, self.steps, self.mirror = workdir, steps, None
        if steps is not None and steps[1] <= done:
            # No error: a launcher starts a run again with the flags that it had before these steps.
            log.warning("--profile_steps=%d:%d: nothing to trace, the run goes on from step %d, behind them", *steps, done)

    def turn(self) -> None:
        """Begins or ends the trace; to be called where it is `due`, when the steps before are finished."""
        if self.mirror is not None:
            self.close()
        else:
            self.mirror = Mirror(self.workdir / "profile")
            jax.profiler.start_trace(str(self.mirror.local))

    def due(self, step: int) -> bool:
        """Whether the trace begins or ends before this step."""
        traced = self.steps is not None and self.steps[0] <= step < self.steps[1]
        return traced != (self.mirror is not None)

    def close(self) -> None:
        """Ends the trace if it is running."""
        if self.mirror is not None:
            jax.profiler.stop_trace()
            self.mirror.close()
            self.mirror = None
