"""Means and win rates with confidence intervals (paper 3.4.2).

Everything here is numpy on the host and deterministic for a seed. Intervals are percentile bootstraps over
prompts: the prompts are what was drawn from a larger population, the answers to one prompt stay together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.reward.held_out import share

_CHUNK = 4_000_000  # resampled values held at once; 32 MB in float64


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over `n` prompts and the ends of its confidence interval."""

    mean: float
    low: float | None  # None: one prompt has no interval
    high: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class WinRate:
    """Share of prompts won by the first of two models, ties counting one half, with its interval."""

    mean: float
    low: float | None  # None: one prompt, and a tie
    high: float | None
    wins: int
    ties: int
    losses: int
    n: int


def is_clear(interval: Mapping[str, float]) -> bool:
    """Whether an interval, {"low", "high"}, of a difference leaves out 0: what tables put a word to, and figures a colour."""
    return interval["low"] > 0 or interval["high"] < 0


def ends_of(record: Mapping[str, Any]) -> tuple[float, float]:
    """The ends of a benchmark record's 95 % interval: 1.96 standard errors, and Wilson's where all questions scored 0, or all
    scored 1, of which the standard error is 0 however few they are."""
    value, stderr = record["value"], record["stderr"] or 0.0
    if not stderr and value in (0.0, 1.0) and record.get("n"):
        found = share(np.full(record["n"], value))
        return min(found["low"], value), max(found["high"], value)
    return value - 1.96 * stderr, value + 1.96 * stderr


def mean_interval(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of one value a prompt (`[P]`) with its bootstrap interval, which one prompt has not; a ValueError if empty or not
    finite."""
    values = _checked(values, "values")
    if len(values) == 1:
        return Interval(mean=float(values[0]), low=None, high=None, n=1)
    means = _bootstrap_means(values, resamples=resamples, seed=seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high), n=len(values))


def share_interval(values: np.ndarray) -> Interval:
    """The share of true values (`[P]`, one a prompt) with Wilson's 95 % interval: of none or all, a bootstrap says nothing."""
    values = _checked(np.asarray(values, np.float64), "values")
    found = share(values > 0.5)
    return Interval(mean=found["share"], low=found["low"], high=found["high"], n=len(values))


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """sum(numerator) / sum(denominator), both `[P]`, with the bootstrap interval over their pairs.

    For figures such as bits per byte, where a long document counts for more than a short one.
    """
    numerator, denominator = _checked(numerator, "numerator"), _checked(denominator, "denominator")
    if numerator.shape != denominator.shape or not (denominator > 0).all():
        raise ValueError(
            f"denominator: expected {len(numerator)} numbers above 0, got {len(denominator)} from {denominator.min():g}"
        )
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(numerator))
    ratios = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(len(numerator), size=(min(rows, resamples - start), len(numerator)))
        ratios.append(numerator[drawn].sum(axis=1) / denominator[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(numerator.sum() / denominator.sum()), low=float(low), high=float(high), n=len(numerator))


def win_rate(
    a: np.ndarray, b: np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> WinRate:
    """How often model `a` beats model `b` on the same prompts: paired utilities `[P]`, larger is better.

    The 95 % interval resamples prompts with both utilities together; of wins alone, or losses alone, it is Wilson's, since all
    resamples are the same. The paper drops ties (Fig. 2) or shows them
    apart (Fig. 1); counting one half keeps the rate comparable with 50 % whatever their share.
    """
    a, b = _checked(a, "a"), _checked(b, "b")
    if a.shape != b.shape:
        raise ValueError(
            f"win_rate: expected one pair of utilities a prompt, got {len(a)} and {len(b)} values"
        )
    outcomes = np.where(a > b, 1.0, np.where(a < b, 0.0, 0.5))
    if (outcomes == outcomes[0]).all() and outcomes[0] != 0.5:
        interval = share_interval(outcomes)
    else:
        interval = mean_interval(outcomes, resamples=resamples, seed=seed)
    return WinRate(
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        wins=int((a > b).sum()),
        ties=int((a == b).sum()),
        losses=int((a < b).sum()),
        n=len(a),
    )


@dataclasses.dataclass(frozen=True)
class OverOptimisation:
    """Where true utility peaked while training chased the reward model, and what was lost since."""

    peak: int  # index of the highest true utility
    utility_drop: float  # peak minus last true utility
    reward_gain: float  # last minus peak's reward-model score
    detected: bool


def over_optimisation(
    reward: np.ndarray, utility: np.ndarray, *, tolerance: float = 0.02
) -> OverOptimisation:
    """Reads two curves over training (`[N]` each): does the score still rise while the truth gets worse?

    Detected when true utility lies more than `tolerance` below its peak although the reward model's score is
    higher than at that peak (the divergence that section 3.4.1 guards against).
    """
    reward, utility = _checked(reward, "reward"), _checked(utility, "utility")
    if reward.shape != utility.shape:
        raise ValueError(
            f"over_optimisation: expected curves of one length, got {len(reward)} and {len(utility)}"
        )
    peak = int(utility.argmax())
    drop, gain = float(utility[peak] - utility[-1]), float(reward[-1] - reward[peak])
    return OverOptimisation(
        peak=peak, utility_drop=drop, reward_gain=gain, detected=drop > tolerance and gain > 0
    )


def _bootstrap_means(values: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` draws with replacement; `[resamples]`."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(values))
    chunks = [
        values[rng.integers(len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(chunks)


def _checked(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name}: expected one value a prompt, got an array of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name}: expected finite numbers, got {int((~np.isfinite(values)).sum())} that are not"
        )
    return values
