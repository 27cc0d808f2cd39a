"""How a run is carried out, not what it computes: nothing in here changes a number, so it is no part of the config."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The flags of one start of a run.

    Attributes:
      restart_from: go back to the checkpoint of this step, also under a changed config.
      profile_steps: (first, end): trace the steps from first to end - 1 into `profile/` of the workdir.
      step_seconds: the longest that a step, an evaluation or a rollout may take until the run counts as hanging.
      start_seconds: the same until the end of the first step, which compiles.
      peer_seconds: the longest that another host may be silent.
    """

    restart_from: int | None = None
    profile_steps: tuple[int, int] | None = None
    step_seconds: float = 1800.0
    start_seconds: float = 7200.0
    peer_seconds: float = 30.0

    def __post_init__(self):
        for name in ("step_seconds", "start_seconds", "peer_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}: expected a positive number of seconds, got {getattr(self, name)}")
        if self.restart_from is not None and self.restart_from < 0:
            raise ValueError(f"--restart_from: expected a step of 0 or more, got {self.restart_from}")


def parse_steps(text: str) -> tuple[int, int] | None:
    """'10:13' -> (10, 13); '' -> None; ValueError for anything else."""
    if not text:
        return None
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise ValueError(f"--profile_steps: expected FIRST:END with FIRST < END, as 10:13, got {text!r}")
    return int(first), int(end)
