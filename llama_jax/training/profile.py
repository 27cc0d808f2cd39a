"""`--profile_steps=10:13`: a trace of a few steps for TensorBoard's profiler or Perfetto, into the workdir."""

from pathlib import Path

import jax

from llama_jax.paths import Mirror


class Profile:
    """Traces the steps first .. end - 1; every host its own."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self.workdir, self.steps, self.mirror = workdir, steps, None

    def before(self, step: int) -> None:
        """Begins or ends the trace; to be called where it is `due`, when the steps before are finished."""
        if step == self.steps[0]:
            self.mirror = Mirror(self.workdir / "profile")
            jax.profiler.start_trace(str(self.mirror.local))
        elif step == self.steps[1]:
            self.close()

    def due(self, step: int) -> bool:
        """Whether the trace begins or ends before this step."""
        return self.steps is not None and step in self.steps

    def close(self) -> None:
        """Ends the trace if it is running."""
        if self.mirror is not None:
            jax.profiler.stop_trace()
            self.mirror.close()
            self.mirror = None
