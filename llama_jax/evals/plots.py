"""One style for the figures of an evaluation: light and dark, PNG and SVG, with alt text. Needs matplotlib (extra [eval]).

A `Plot` is a title, a sentence for those who cannot see it, and a function that draws it in a theme; nothing is drawn before it
is asked for. The colours tell apart with the common colour-vision deficiencies; no figure says anything by colour alone.
"""

import base64
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llama_jax.files import atomic_write
from llama_jax.palette import DARK, LIGHT, Theme

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*")  # one more than colours: a pair comes again after 72 series only
_DPI = 160


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure to be drawn; `draw` takes a theme and returns a matplotlib figure."""

    name: str
    title: str
    alt: str
    draw: Callable[[Theme], Any]

    def png(self, theme: Theme = LIGHT) -> bytes:
        """Pixels; the same numbers give the same bytes."""
        buffer = io.BytesIO()
        self.draw(theme).savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        return buffer.getvalue()

    def svg(self, theme: Theme = LIGHT) -> bytes:
        """Vectors; the same numbers give the same bytes."""
        return _svg(self, theme)

    def html(self) -> str:
        """A figure element with the image inside, in the reader's theme."""
        light, dark = (base64.b64encode(self.svg(theme)).decode() for theme in (LIGHT, DARK))
        return (
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/svg+xml;base64,{dark}">'
            f'<img alt="{escape(self.alt)}" src="data:image/svg+xml;base64,{light}"></picture></figure>'
        )


@functools.lru_cache(maxsize=64)
def _svg(plot: Plot, theme: Theme) -> bytes:
    """Kept, since a report shows what is also written beside it."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "llama_jax"}):
        plot.draw(theme).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": plot.alt})
    return buffer.getvalue()


def require() -> None:
    """A ModuleNotFoundError that names the extra, if figures cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        problem = f"figures need the package {error.name}: pip install 'llama_jax[eval]', or [notebooks]"
        raise ModuleNotFoundError(problem) from None


def save(plots: Iterable[Plot], directory: Path) -> None:
    """Writes `name.png`, `name.svg` and `name.dark.svg` of each plot, each file whole or not at all."""
    for plot in plots:
        for ending, data in (("png", plot.png()), ("svg", plot.svg()), ("dark.svg", plot.svg(DARK))):
            with atomic_write(directory / f"{plot.name}.{ending}") as file:
                file.write(data)


def canvas(
    theme: Theme, title: str, *, rows: int = 1, columns: int = 1, panel: tuple[float, float] = (7.0, 3.8), grid: str = "y",
    share_x: bool = False, share_y: bool = False,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """A figure with its title, which it is wide enough for, and `rows * columns` dressed axes; without pyplot, so without any
    global state."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (panel[0] * columns, panel[1] * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor=theme.page)
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    head = figure.suptitle(title, color=theme.ink, fontsize=12, fontweight="bold", x=0.01, horizontalalignment="left")
    figure.set_figwidth(max(size[0], 1.03 * head.get_window_extent().width / figure.dpi))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y).flat)
    for ax in axes:
        dress(ax, theme, grid)
    return figure, axes


def dress(ax: Any, theme: Theme, grid: str = "y") -> None:
    """Takes away what says nothing, and colours the rest."""
    ax.set_facecolor(theme.page)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(theme.grey)
    ax.grid(True, axis=grid, color=theme.faint, linewidth=1)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, colors=theme.ink, labelsize=9)
    ax.xaxis.label.set(color=theme.ink, fontsize=10)
    ax.yaxis.label.set(color=theme.ink, fontsize=10)
    ax.title.set(color=theme.ink, fontsize=10)


BESIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}  # options of a legend to the right of its axes


def legend(ax: Any, theme: Theme, **options: Any) -> None:
    """A legend without a frame; none for a single series whose name an axis has in its label."""
    labels = ax.get_legend_handles_labels()[1]
    if len(labels) == 1 and any(labels[0] in said for said in (ax.get_xlabel(), ax.get_ylabel())):
        return
    ax.legend(frameon=False, labelcolor=theme.ink, fontsize=9, **options)


def note(ax: Any, theme: Theme, text: str, xy: tuple[float, float], **options: Any) -> None:
    """A small label at a point of the data."""
    style = {"color": theme.ink, "fontsize": 8.5, "textcoords": "offset points", "xytext": (0, 0), **options}
    ax.annotate(text, xy, **style)


def styles(theme: Theme, count: int, *, size: float = 4) -> list[dict[str, Any]]:
    """A colour and a marker for each series: no figure says anything by colour alone."""
    return [{"color": theme.colour(i), "marker": MARKERS[i % len(MARKERS)], "markersize": size} for i in range(count)]


def bars(
    ax: Any, theme: Theme, groups: Sequence[str], series: Mapping[str, Sequence[float]], *, colours: Sequence[str], number: str,
    intervals: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
) -> None:  # fmt: skip
    """Bars side by side in each group, {label: a value a group}, with their values above; one that is not finite is missing.

    Args:
      intervals: {label: (low, high) a group, or None}, drawn as whiskers.
    """
    width = 0.8 / max(1, len(series))
    for index, ((label, values), colour) in enumerate(zip(series.items(), colours)):
        for place, value in enumerate(values):
            centre = place + (index - (len(series) - 1) / 2) * width
            ax.bar(centre, value, width * 0.92, color=colour, label=label if place == 0 else None)
            if math.isfinite(value):
                low, high = (intervals[label][place] if intervals else None) or (value, value)
                if high > low:
                    ax.errorbar(centre, value, [[value - low], [high - value]], color=theme.ink, linewidth=1, capsize=3)
                note(ax, theme, number.format(value), (centre, high), xytext=(0, 3), ha="center")
    ax.set_xticks(range(len(groups)), labels=[group.replace("_", " ") for group in groups])
