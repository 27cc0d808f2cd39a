"""Loss spikes: a loss far above those before it is reported, and on request the run goes back and leaves the batch out.

As in PaLM (section 5.1 there): restart from a checkpoint before the spike and skip the batches around it; what makes a
spike is a batch met by one state of the parameters, so without it the spike does not come again.

Everything in here is a function of the losses since the last checkpoint and of what that checkpoint holds (`state`), so a
run that is killed goes on to the same decisions.
"""

import bisect
import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """When a loss counts as a spike, and what happens then."""

    sigma: float = 0.0  # standard deviations above the mean of the window; 0: nothing is looked for
    window: int = 128  # losses that are compared with
    rewind: bool = False  # go back to a checkpoint and leave batches out, instead of only reporting
    skip: int = 1  # how many batches are left out, the last one being that of the spike
    limit: int = 3  # rewinds of a run; then it stops

    def __post_init__(self):
        if self.sigma < 0 or self.window < 2 or self.skip < 1 or self.limit < 1:
            raise ValueError(f"loop.spike: expected sigma >= 0, window >= 2, skip >= 1 and limit >= 1, got {self}")


class Spike(Exception):  # noqa: N818 - an event for the loop, not an error of the run
    """The loss of a step was a spike, and the config asks to go back."""

    def __init__(self, step: int, report: str):
        super().__init__(report)
        self.step = step


class Spikes:
    """The losses of the window, and the batches that are left out."""

    def __init__(self, config: SpikeConfig):
        self.config = config
        self.losses: list[float] = []
        self.skipped: list[int] = []  # sorted indices of batches that no step trains on
        self.rewinds = 0

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint."""
        return {"losses": list(self.losses), "skipped": list(self.skipped), "rewinds": self.rewinds}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint. What was left out since it was written stays so: going back must not forget why."""
        self.losses = list(state["losses"])
        self.skipped = sorted({*self.skipped, *state["skipped"]})
        self.rewinds = max(self.rewinds, state["rewinds"])

    def index(self, step: int) -> int:
        """The batch that a step trains on: batches in order, without those that are left out."""
        index = step
        for skipped in self.skipped:
            index += skipped <= index
        return index

    def see(self, step: int, loss: float) -> str | None:
        """Takes the loss of a step; says so if it is a spike.

        The window never holds what is not finite, and a spike only up to its threshold: one outlier neither hides the next
        nor makes a spike of everything after it.
        """
        if not self.config.sigma or not math.isfinite(loss):
            return None
        report = None
        if len(self.losses) >= self.config.window:
            mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
            highest = mean + self.config.sigma * deviation
            if loss > highest:
                report = (
                    f"step {step}, batch {self.index(step)}: loss {loss:.4g} is a spike; the {len(self.losses)} losses before "
                    f"are {mean:.4g} +- {deviation:.2g}"
                )
                loss = highest
        self.losses = [*self.losses, loss][-self.config.window :]
        return report

    def go_back_to(self, step: int, checkpoints: Sequence[int]) -> int:
        """Of checkpoints in order, the newest whose steps have trained on nothing that a spike in `step` leaves out; the oldest
        where there is none, and 0, the start, without any."""
        first = self.index(step) - self.config.skip + 1
        return max((saved for saved in checkpoints if self.index(saved) <= first), default=min(checkpoints, default=0))

    def leave_out(self, step: int, first: int) -> list[int]:
        """The batches that are left out because of a spike in `step`, when the run goes back to `first`."""
        end = self.index(step)
        batches = [i for i in range(max(end - self.config.skip + 1, self.index(first)), end + 1) if i not in self.skipped]
        for index in batches:
            bisect.insort(self.skipped, index)
        self.rewinds += 1
        return batches
