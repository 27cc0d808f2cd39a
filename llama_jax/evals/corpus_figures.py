"""The figures of a corpus as files beside its report, for papers and slides: toxicity (Fig. 13)."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.corpus_build.report import PAPER_TOXIC
from llama_jax.corpus_build.report_page import short
from llama_jax.evals.plots import Plot, Theme, canvas, note, save
from llama_jax.paths import place


def corpus_figures(manifest: Mapping[str, Any]) -> list[Plot]:
    """What the manifest of a corpus has figures for."""
    scored = [row["toxicity"] for row in manifest["sources"].values() if "toxicity" in row]
    return [toxicity(np.sum(scored, axis=0).tolist())] if scored else []


def toxicity(counts: Sequence[int]) -> Plot:
    """Documents by score of toxicity, in bins of one width from 0 to 1. (Fig. 13)"""
    title, width = "Documents by score of toxicity (Fig. 13)", 1 / len(counts)
    toxic = 100 * sum(counts[len(counts) // 2 :]) / sum(counts)

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title)
        for i, count in enumerate(counts):
            if count:
                centre, text = (i + 0.5) * width, f"{count:,}" if count < 10_000 else short(count)
                ax.bar(centre, count, 0.9 * width, color=theme.colour(0))
                note(ax, theme, text, (centre, count), xytext=(0, 3), ha="center", fontsize=7.5)
        ax.set_yscale("log")
        ax.minorticks_off()
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.set_ylim(0.6, 2 * max(counts))  # one document is a bar too, and the highest has a number above it
        ax.set_xlim(0, 1)
        ax.axvline(0.5, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
        of_paper = f"0.5 or more: {toxic:.2f} % (paper {PAPER_TOXIC} %)"
        note(ax, theme, of_paper, (0.5, 1), xycoords=("data", "axes fraction"), xytext=(5, -9))
        ax.set_xlabel("score")
        ax.set_ylabel("documents (log scale)")
        return figure

    words = "; ".join(f"{i * width:g} to {(i + 1) * width:g}: {count:,}" for i, count in enumerate(counts) if count)
    return Plot("toxicity", title, f"Bars. {title}. {toxic:.2f} % of {sum(counts):,} at 0.5 or more. {words}.", draw)


def save_figures(plots: Sequence[Plot], directory: str | os.PathLike) -> None:
    """Writes the plots into `directory`/figures where matplotlib is there; the reports do without."""
    if importlib.util.find_spec("matplotlib"):
        save(plots, place(directory) / "figures")
