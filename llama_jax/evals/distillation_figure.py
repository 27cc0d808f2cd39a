"""Fig. 16: what pre-prompts do to the safety score of answers, before anything is distilled."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.evals.plots import MARKERS, Plot, Theme, canvas, legend
from llama_jax.safety.distillation import KINDS, score_distributions, score_gains

LABELS = {"base": "no pre-prompt", "generic": "generic pre-prompt", "category": "answer template of the risk"}


def scores(samples: Sequence[Mapping[str, Any]]) -> Plot:
    """(a) Shares of answers below each safety score by kind of pre-prompt; (b) gain by the plain answer's score. (Fig. 16)"""
    by_kind = score_distributions(samples)

    def draw(theme: Theme) -> Any:
        figure, (shares, gains) = canvas(theme, "Context distillation: safety scores", columns=2, panel=(5.2, 3.6))
        for i, kind in enumerate(KINDS):
            if kind not in by_kind:
                continue
            ordered = np.sort(by_kind[kind])
            height = np.arange(1, len(ordered) + 1) / len(ordered)
            style = ("-", "--", ":")[i]
            shares.step(ordered, 100 * height, where="post", color=theme.colour(i), linestyle=style, label=LABELS[kind])
            if kind != "base":
                original, gain = score_gains(samples, kind)
                gains.scatter(original, gain, s=10, alpha=0.4, color=theme.colour(i), marker=MARKERS[i], linewidths=0)
                gains.plot(*_binned(original, gain), color=theme.colour(i), linewidth=2, marker=MARKERS[i], label=LABELS[kind])
        shares.set_title("(a) answers with at most this score", loc="left", color=theme.ink, fontsize=10)
        shares.set_xlabel("safety score")
        shares.set_ylabel("answers (%)")
        gains.set_title("(b) gain over the plain answer", loc="left", color=theme.ink, fontsize=10)
        gains.axhline(0, color=theme.grey, linewidth=1)
        gains.set_xlabel("score of the plain answer")
        gains.set_ylabel("gain of the safety score")
        legend(shares, theme, loc="upper left")
        legend(gains, theme, loc="best")
        return figure

    said = ", ".join(f"{LABELS[kind]} {np.mean(values):.3f}" for kind, values in by_kind.items())
    return Plot("distillation", "Context distillation: safety scores", f"Two panels. Mean safety scores: {said}.", draw)


def _binned(x: np.ndarray, y: np.ndarray, bins: int = 8) -> tuple[list[float], list[float]]:
    """Means of both in as many groups of neighbouring x, of equal sizes."""
    groups = [g for g in np.array_split(np.argsort(x, kind="stable"), min(bins, len(x))) if len(g)]
    return [float(x[g].mean()) for g in groups], [float(y[g].mean()) for g in groups]
