"""`--profile_steps=10:13`: a trace of a few steps for TensorBoard's profiler or Perfetto, into the workdir."""

from pathlib import Path

import jax


class Profile:
    """Traces the steps first .. end - 1; every host its own."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self.directory, self.steps, self.running = workdir / "profile", steps, False

    def before(self, step: int) -> None:
        """Begins or ends the trace; to be called where it is `due`, when the steps before are finished."""
        if step == self.steps[0]:
            jax.profiler.start_trace(str(self.directory))
            self.running = True
        elif step == self.steps[1]:
            self.close()

    def due(self, step: int) -> bool:
        """Whether the trace begins or ends before this step."""
        return self.steps is not None and step in self.steps

    def close(self) -> None:
        """Ends the trace if it is running."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
