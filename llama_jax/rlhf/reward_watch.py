"""An alarm for reward hacking: the reward rises on the prompts that are trained on while it falls on held-out ones.

The paper stops PPO by held-out prompts (section 3.2.3), since a measure that is made a target measures no longer (3.4.1). These
prompts are always answered with the same random numbers, but other ones are trained on each time: that the two rewards move
apart may be chance, and three times in a row is told.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

# Evaluations in a row. Where both rewards are noise, three rise in a row, and three fall, with a chance of 1 in 24 each: in 80
# evaluations that happens 0.14 times. Two in a row (1 in 6 each) would be told 2.2 times.
TOLD = 3


class RewardWatch:
    """The mean training reward between two evaluations beside that of the interval before, and the held-out rewards."""

    def __init__(self):
        self.restore(np.array([0, 0, math.nan, math.nan, 0]))

    def trained(self, reward: float) -> None:
        """Takes the mean reward of a rollout."""
        self.sum, self.count = np.float32(self.sum + reward), self.count + 1

    def measured(self, held_out: float) -> int:
        """Takes the held-out reward; in how many evaluations in a row, this one included, the two moved apart."""
        if not self.count:  # nothing was rolled out since
            return 0
        training, held_out = self.sum / self.count, np.float32(held_out)
        apart = self.apart + 1 if training > self.training and held_out < self.held_out else 0
        self.restore(np.array([0, 0, training, held_out, apart]))
        return int(apart)

    def state(self) -> np.ndarray:
        """What a checkpoint holds. # float32 [5]"""
        return np.array([self.sum, self.count, self.training, self.held_out, self.apart])

    def restore(self, state: np.ndarray) -> None:
        """Goes on between two evaluations. In float32 throughout: what was saved is what was computed with."""
        self.sum, self.count, self.training, self.held_out, self.apart = np.asarray(state, np.float32)


def watched(
    evaluate: Callable[[Mapping[str, Any]], dict[str, float]] | None, watch: RewardWatch, name: str
) -> Callable[[Mapping[str, Any]], dict[str, float]] | None:
    """A stage's `evaluate`, if it has one, with the metric `reward_apart` and a warning where that is no chance any more."""
    if evaluate is None:
        return None

    def measure(params: Mapping[str, Any]) -> dict[str, float]:
        found, before = evaluate(params), watch.held_out
        apart = watch.measured(found["reward"])
        if apart >= TOLD:
            log.warning(
                "%s: for %d evaluations in a row the training reward rose, to %.4g, while that of held-out prompts fell, from "
                "%.4g to %.4g: the policy may please the scorers alone", name, apart, watch.training, before, found["reward"],
            )  # fmt: skip
        return {**found, "reward_apart": float(apart)}

    return measure
