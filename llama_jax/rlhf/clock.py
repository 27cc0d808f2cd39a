"""What the steps of reinforcement learning take, between the rollouts."""


class StepClock:
    """Seconds of the steps between two rollouts, without the evaluations and saves between them.

    It is told when batches are handed out and when metrics of a step were read, one step late; nobody waits for it.
    """

    def __init__(self):
        self._begun: dict[int, float] = {}  # steps whose end is not known yet
        self._end, self._seconds = 0.0, 0.0

    def begins(self, step: int, at: float) -> None:
        """The batch of a step is handed out."""
        self._begun[step] = at

    def ends(self, step: int, at: float) -> None:
        """A step is done, and so are those before it."""
        begun = [self._begun.pop(number) for number in sorted(self._begun) if number <= step]
        if begun:  # a step waits in line for the one before
            self._seconds += max(at - max(begun[0], self._end), 0.0)
            self._end = at

    def take(self, at: float) -> float:
        """All steps are done; the seconds since the last take."""
        if self._begun:
            self.ends(max(self._begun), at)
        seconds, self._seconds = self._seconds, 0.0
        return seconds
