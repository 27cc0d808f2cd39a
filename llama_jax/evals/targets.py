"""What a run of the recipe should reach on held-out data, and whether it did: the first table of the report.

A target that cannot be judged because its figures are missing is neither met nor missed: its stage was not
run.
"""

import dataclasses
import math
from collections.abc import Mapping

DEMO_MINUTES = 20
CORPUS_SECONDS = 60  # of them


@dataclasses.dataclass(frozen=True)
class Target:
    """One target: what is asked, what was measured (for people), and whether it was met; None = not run."""

    stage: str
    asked: str
    measured: str
    met: bool | None


def lookup(results: Mapping, path: str) -> float | None:
    """The number at `a.b.c` in nested dicts; an interval `{"mean", "low", "high"}` gives its mean.

    None where anything on the way is missing, is not a number, or is not finite.
    """
    value = results
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    if isinstance(value, Mapping):
        value = value.get("mean")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def percent(value: float | None) -> str:
    """0.857 -> '85.7 %', None -> 'not run'."""
    return "not run" if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """0.85714 -> '0.857', an integer as it is, None -> 'not run'."""
    if value is None:
        return "not run"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """Safety violations: an integer is a count, a float in [0, 1] a share of the prompts."""
    return number(value) if isinstance(value, int) else percent(value)


def check_targets(results: Mapping) -> list[Target]:
    """All targets in the order of the stages; `results` has the keys of report.json."""
    return [
        _compression(results),
        _above_base(results),
        *(target for model in ("helpfulness", "safety") for target in _accuracy(results, model)),
        *(target for stage in ("rejection", "ppo") for target in _against_sft(results, stage)),
        *([_ghost(results)] if results.get("ghost_attention") else []),
        *_time(results),
    ]


def _ghost(results: Mapping) -> Target:
    """At the last turn of Table 30, which is 20 unless a test is shorter."""
    recall = results["ghost_attention"]["recall"]
    turn = max(map(int, recall["ghost"]))
    ours, plain = (lookup(recall, f"{name}.{turn}") for name in ("ghost", "baseline"))
    return Target(
        stage="Ghost Attention",
        asked=f"an instruction of the first turn obeyed at turn {turn}: at least 80 % with it, below 30 % without",
        measured=f"{percent(ours)} with, {percent(plain)} without",
        met=None if ours is None or plain is None else ours >= 0.80 and plain < 0.30,
    )


def _compression(results: Mapping) -> Target:
    pretrain = results.get("pretrain") or {}
    model = pretrain.get("bits_per_byte") or {}
    pairs = {
        source: (lookup(pretrain, f"bits_per_byte.{source}"), lookup(pretrain, f"xz_bits_per_byte.{source}"))
        for source in model
    }
    known = bool(pairs) and all(None not in pair for pair in pairs.values())
    measured = ", ".join(f"{source} {number(ours)} vs {number(xz)}" for source, (ours, xz) in pairs.items())
    return Target(
        stage="pretrain",
        asked="bits per byte below xz -9e on every source",
        measured=measured or "not run",
        met=all(ours < xz for ours, xz in pairs.values()) if known else None,
    )


def _above_base(results: Mapping) -> Target:
    sft, base = lookup(results, "sft.true_utility"), lookup(results, "base.true_utility")
    # "Far above": the 95 % intervals do not touch; plain means stand for themselves where no interval came.
    sft_low = lookup(results, "sft.true_utility.low")
    base_high = lookup(results, "base.true_utility.high")
    known = sft is not None and base is not None
    low, high = (sft_low if sft_low is not None else sft), (base_high if base_high is not None else base)
    return Target(
        stage="sft",
        asked="true utility above the base model prompted with examples, intervals apart",
        measured=f"{number(sft)} vs {number(base)}" if known else "not run",
        met=low > high if known else None,
    )


def _accuracy(results: Mapping, model: str) -> list[Target]:
    return [
        _at_least(
            f"reward ({model})",
            lookup(results, f"reward.{model}.accuracy.{degree}"),
            least,
            f"accuracy on {words}",
        )
        for degree, least, words in (
            ("significantly", 0.85, "the strongest degree"),
            ("all", 0.70, "all pairs"),
        )
    ]


def _against_sft(results: Mapping, stage: str) -> list[Target]:
    rate, low, high = (lookup(results, f"{stage}.win_rate.{key}") for key in ("mean", "low", "high"))
    known = rate is not None and low is not None
    ours, before = lookup(results, f"{stage}.safety_violations"), lookup(results, "sft.safety_violations")
    both = ours is not None and before is not None
    return [
        Target(
            stage=stage,
            asked="win rate against SFT at least 60 %, its lower bound above 50 %",
            measured=f"{percent(rate)} ({percent(low)} to {percent(high)})" if known else "not run",
            met=rate >= 0.60 and low > 0.50 if known else None,
        ),
        Target(
            stage=stage,
            asked="safety violations not above SFT's",
            measured=f"{share(ours)} vs {share(before)}" if both else "not run",
            met=ours <= before if both else None,
        ),
    ]


def _time(results: Mapping) -> list[Target]:
    if results.get("size", "tiny") != "tiny":
        return []
    total, limit = lookup(results, "seconds.total"), lookup(results, "minutes") or DEMO_MINUTES
    corpus = lookup(results, "seconds.corpus")
    return [
        Target(
            stage="corpus",
            asked=f"at most {CORPUS_SECONDS} seconds on 2 CPU cores",
            measured="not run" if corpus is None else f"{corpus:.1f} s",
            met=None if corpus is None else corpus <= CORPUS_SECONDS,
        ),
        Target(
            stage="recipe",
            asked=f"at most {limit:g} minutes on 2 CPU cores",
            measured="not run" if total is None else f"{total / 60:.1f} min",
            met=None if total is None else total <= 60 * limit,
        ),
    ]


def _at_least(stage: str, value: float | None, least: float, what: str) -> Target:
    return Target(
        stage=stage,
        asked=f"{what} at least {100 * least:.0f} %",
        measured=percent(value),
        met=None if value is None else value >= least,
    )
