"""How far raters agree beyond chance: Gwet's AC1 and AC2 with intervals (paper sections 3.4.2 and 4.4).

The formulas are those of Gwet, "Handbook of Inter-Rater Reliability" (4th edition, chapters 3 to 5), for any number of raters,
any of whom may have skipped an item. The packages that compute AC2 with intervals pin versions of scipy that exclude today's
numpy, hence these lines; `tests/test_agreement.py` holds them against the Handbook's example and irrCAC's results.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

Weights = Literal["identity", "ordinal", "linear", "quadratic"]
WEIGHTS = ("identity", "ordinal", "linear", "quadratic")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """An agreement coefficient, 1 for perfect agreement and 0 for no more than chance, with its 95 % interval."""

    coefficient: float
    low: float | None  # None: one item has no interval
    high: float | None
    observed: float  # share of agreement among pairs of ratings, disagreements weighted by how far they are
    by_chance: float
    items: int
    ratings: int


def gwet(ratings: np.ndarray, categories: int, *, weights: Weights = "identity") -> Agreement | None:
    """AC1 (weights "identity") or AC2 (any other) of a rating matrix; None if no item has two ratings.

    Args:
      ratings: 0..categories-1, or NaN where a rater did not rate. # float [n items, R raters]
      categories: how many degrees the scale has, whether they occur or not.
      weights: what a disagreement is worth: nothing, or less the farther apart the degrees are.

    Raises:
      ValueError: ratings outside the scale.
    """
    ratings = np.asarray(ratings, np.float64)
    given = ~np.isnan(ratings)
    if ratings.ndim != 2 or categories < 2:
        raise ValueError(f"agreement: expected [items, raters] and at least two degrees, got {ratings.shape}, {categories}")
    if not np.isin(ratings[given], np.arange(categories)).all():
        raise ValueError(f"agreement: expected ratings 0..{categories - 1}, got {np.unique(ratings[given])}")
    counts = np.stack([(ratings == k).sum(axis=1) for k in range(categories)], axis=1).astype(np.float64)  # [n, Q]
    counts = counts[counts.sum(axis=1) > 0]
    raters = counts.sum(axis=1)  # [n]
    several = raters >= 2
    n, n_several = len(counts), int(several.sum())
    if n_several < 1:
        return None
    w = weight_matrix(categories, weights)
    agreeing = (counts * (counts @ w - 1)).sum(axis=1)
    per_item = np.where(several, agreeing / np.maximum(raters * (raters - 1), 1), 0.0)
    observed = per_item.sum() / n_several
    share = (counts / raters[:, None]).mean(axis=0)  # [Q]
    scale = w.sum() / (categories * (categories - 1))
    by_chance = scale * float(share @ (1 - share))
    coefficient = (observed - by_chance) / (1 - by_chance)
    # The variance of the mean of each item's contribution, the chance term's included.
    own = np.where(several, n / n_several * (per_item - by_chance) / (1 - by_chance), 0.0)
    own_chance = scale * (counts / raters[:, None]) @ (1 - share)
    own = own - 2 * (1 - coefficient) * (own_chance - by_chance) / (1 - by_chance)
    low, high = _interval(coefficient, own)
    return Agreement(float(coefficient), low, high, float(observed), by_chance, n, int(raters.sum()))


def weight_matrix(categories: int, weights: Weights) -> np.ndarray:
    """What a pair of degrees counts as agreement, 1 on the diagonal. # float [Q, Q]"""
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    distance = np.abs(np.subtract.outer(np.arange(categories), np.arange(categories))).astype(np.float64)
    if weights == "identity":
        return np.eye(categories)
    if weights == "ordinal":  # pairs of degrees that lie between the two, of all pairs
        distance, most = distance * (distance + 1) / 2, categories * (categories - 1) / 2
        return 1 - distance / most
    return 1 - (distance / (categories - 1)) ** (1 if weights == "linear" else 2)


def _interval(coefficient: float, contributions: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Student's 95 % interval; one item has none."""
    from scipy.stats import t  # comes with jax

    n = len(contributions)
    if n < 2:
        return None, None
    error = math.sqrt(((contributions - coefficient) ** 2).sum() / (n * (n - 1)))
    half = float(t.ppf(0.975, n - 1)) * error
    return max(coefficient - half, -1.0), min(coefficient + half, 1.0)
