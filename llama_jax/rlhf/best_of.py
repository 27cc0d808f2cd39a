"""The best of N answers: its expected reward (paper Fig. 7), and the temperature at which it is highest (Fig. 8).

NumPy on the host; arrays of rewards in, numbers out.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class BestOf:
    """Expected reward of the best and of the median of n answers, mean over prompts; index n - 1."""

    maximum: np.ndarray  # [K]
    median: np.ndarray  # [K]


def expected_max_of_n(rewards: np.ndarray) -> BestOf:
    """Fig. 7 without sampling noise: from K scored answers to each prompt (`[P, K]`), for every n in 1..K.

    n of the K answers are drawn without replacement, each subset being equally likely. The r-th smallest of
    such a subset is the i-th smallest of all K with probability C(i-1, r-1) C(K-i, n-r) / C(K, n); the best
    is r = n, the median r = (n+1)/2, or the mean of the two in the middle for an even n.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or 0 in rewards.shape or not np.isfinite(rewards).all():
        raise ValueError(f"rewards: expected finite numbers [prompts, answers], got an array of shape {rewards.shape}")
    mean_sorted = np.sort(rewards, axis=1).mean(axis=0)  # [K]: weights are the same for all prompts
    total = rewards.shape[1]

    def expected(rank: int, n: int) -> float:
        return float(_rank_probabilities(rank, n, total) @ mean_sorted)

    counts = range(1, total + 1)
    return BestOf(
        maximum=np.array([expected(n, n) for n in counts]),
        median=np.array([(expected((n + 1) // 2, n) + expected(n // 2 + 1, n)) / 2 for n in counts]),
    )


def best_temperature(rewards: Mapping[float, np.ndarray]) -> tuple[float, dict[float, BestOf]]:
    """The temperature whose best of all K answers is expected highest, and the curve of each. # {T: [P, K]}

    The paper searches again for every version, since the best value moves with the model (Fig. 8). Of equals the lower
    temperature is taken.
    """
    curves = {temperature: expected_max_of_n(found) for temperature, found in sorted(rewards.items())}
    return max(curves, key=lambda temperature: curves[temperature].maximum[-1]), curves


def _rank_probabilities(rank: int, n: int, total: int) -> np.ndarray:
    """Probability that the rank-th smallest of n draws is the i-th smallest of all. # -> [total]"""
    subsets = math.comb(total, n)
    return np.array([math.comb(i - 1, rank - 1) * math.comb(total - i, n - rank) / subsets for i in range(1, total + 1)])
