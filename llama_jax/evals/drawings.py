"""Pictures of what goes into a run, for notebooks: loss masks, packed rows, layouts on a mesh, memory, attention (Fig. 10).

Numbers in, a `Plot` (or HTML) out.
"""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.data.dialog import EncodedDialog
from llama_jax.data.loader import TokenBatch
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.ghost import AttentionMap
from llama_jax.evals.plots import LIGHT, Plot, Theme, canvas, legend, styles
from llama_jax.files import atomic_write
from llama_jax.parallel.axes import ParamSpec, Rules, partition

_UNSEEN = {"layers", "head"}  # axes that no rule divides: a drawing of two dimensions leaves them out
_NAMED_TURNS = 8  # of more the names would touch
_SHADES = ("#dce6fa", "#fbe8cf", "#d3eee4", "#e6ddf5", "#f7dada", "#e9ecf1", "#c2d4f5", "#f5d3a3")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an array and who holds it; first and last + 1 index of each drawn dimension."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    devices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring tokens of a packed row: their dialog (0: padding), and whether they are targets of the loss."""

    start: int
    length: int
    segment: int
    supervised: bool


def loss_mask_html(dialog: EncodedDialog, tokenizer: Tokenizer) -> str:
    """A dialog's pieces, each in a box; those that the loss trains are green (section 3.1: "zero-out the loss")."""
    boxes = []
    for token, trains in zip(dialog.ids, dialog.supervised, strict=True):
        piece = tokenizer.piece(token)
        text = html.escape({"<0x0A>": "\u21b5"}.get(piece, piece.replace("\u2581", "\u00b7")))
        colour, edge = ("#c8ecdd", LIGHT.colour(2)) if trains else ("#eceef2", LIGHT.grey)
        boxes.append(
            f'<span title="id {token}" style="background:{colour};border-bottom:2px solid {edge};color:#1d2330;'
            f'padding:0 3px;margin:1px;display:inline-block;border-radius:3px">{text}</span>'
        )
        if piece == "<0x0A>" or token == tokenizer.eos_id:
            boxes.append("<br>")
    return f'<div style="font-family:monospace;font-size:13px;line-height:1.7">{"".join(boxes)}</div>'


def runs(row: TokenBatch) -> list[Run]:
    """A packed row [T], cut where its dialog or its loss weight changes. The weight of a token is that of its prediction."""
    segments = np.asarray(row.segment_ids)
    # weights[t] belongs to the prediction of token t + 1
    trained = np.concatenate([[False], np.asarray(row.weights)[:-1] > 0])
    changes = np.flatnonzero((np.diff(segments) != 0) | (np.diff(trained.astype(int)) != 0)) + 1
    borders = [0, *changes.tolist(), len(segments)]
    return [
        Run(a, b - a, int(segments[a]), bool(trained[a])) for a, b in zip(borders[:-1], borders[1:], strict=True)
    ]


def packed_rows(rows: Sequence[TokenBatch], *, title: str = "Packed rows") -> Plot:
    """One bar a row, one colour a dialog: strong where tokens are trained, pale where they are not, bare for padding."""
    found = [runs(row) for row in rows]

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(7.2, 0.6 + 0.3 * len(rows)))
        for y, (row, parts) in enumerate(zip(rows, found)):
            for run in parts:
                if run.segment:
                    colour = theme.colour((run.segment - 1) % 5)
                    alpha = 1.0 if run.supervised else 0.35
                    ax.barh(y, run.length, left=run.start, height=0.72, color=colour, alpha=alpha, linewidth=0)
            for start in np.flatnonzero(np.diff(np.asarray(row.segment_ids))) + 1:
                ax.plot([start, start], [y - 0.36, y + 0.36], color=theme.page, linewidth=1.5)
        ax.set_yticks(range(len(rows)), labels=[f"row {y}" for y in range(len(rows))])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlim(0, len(rows[0].segment_ids))
        ax.set_xlabel("token")
        ax.grid(False)
        return figure

    dialogs = sum(len({run.segment for run in parts if run.segment}) for parts in found)
    filled, trained = (
        sum(run.length for parts in found for run in parts if keep(run))
        for keep in (lambda run: run.segment, lambda run: run.supervised)
    )
    tokens = sum(len(row.segment_ids) for row in rows)
    filled, trained = (100 * part / tokens for part in (filled, trained))
    words = f"{dialogs} dialogs fill {filled:.0f} % of {len(rows)} rows; {trained:.0f} % is trained"
    return Plot("packed_rows", title, f"A bar a row. {title}. {words}.", draw)


def pieces(spec: ParamSpec, mesh: Mesh, rules: Rules) -> tuple[tuple[int, int], list[Piece]]:
    """((rows, columns), the pieces) of a parameter on a mesh, drawn by its first two axes that a rule may divide."""
    sharding = NamedSharding(mesh, partition(spec.shape, spec.axes, rules, mesh))
    drawn = [d for d, axis in enumerate(spec.axes) if axis not in _UNSEEN][:2]
    shape = tuple(spec.shape[d] for d in drawn)
    if len(drawn) < 2:
        shape = (1, *shape)
    holders: dict[tuple, list[int]] = {}
    for device, index in sharding.devices_indices_map(spec.shape).items():
        spans = [index[d].indices(spec.shape[d])[:2] for d in drawn]
        holders.setdefault(tuple([(0, 1)] * (2 - len(drawn)) + spans), []).append(device.id)
    return shape, [Piece(rows, columns, tuple(sorted(found))) for (rows, columns), found in sorted(holders.items())]


def layouts(specs: Mapping[str, ParamSpec], mesh: Mesh, tables: Mapping[str, Rules], *, title: str = "Layouts") -> Plot:
    """Which device holds which part of each parameter: a line of drawings for each rule table, {label: rules}."""
    found = {
        (label, name): pieces(spec, mesh, rules) for label, rules in tables.items() for name, spec in specs.items()
    }  # fmt: skip

    def draw(theme: Theme) -> Any:
        figure, axes = canvas(theme, title, rows=len(tables), columns=len(specs), panel=(7.6 / len(specs), 2.1))
        for ax, ((label, name), ((height, width), parts)) in zip(axes, found.items()):
            for piece in parts:
                (top, bottom), (left, right) = piece.rows, piece.columns
                x, w = left / width, (right - left) / width
                y, h = top / height, (bottom - top) / height
                ax.add_patch(_box(x, y, w, h, _SHADES[piece.devices[0] % len(_SHADES)]))
                held = _named(piece.devices)
                ax.text(x + w / 2, y + h / 2, held, ha="center", va="center", fontsize=8, color=LIGHT.ink)
            drawn = [axis for axis in specs[name].axes if axis not in _UNSEEN][:2]
            ax.set_title(f"{label}: {name}", fontsize=9)
            ax.set_xlabel(f"{drawn[-1]} ({width})")
            ax.set_ylabel(f"{drawn[0]} ({height})" if len(drawn) > 1 else "")
            ax.set_xlim(-0.01, 1.01)
            ax.set_ylim(1.01, -0.01)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines["bottom"].set_visible(False)
        return figure

    words = "; ".join(f"{label}, {name}: {len(parts)} pieces" for (label, name), (_, parts) in found.items())
    return Plot("layouts", title, f"Boxes with the numbers of the devices that hold them. {title}. {words}.", draw)


def stacked_bars(
    bars: Mapping[str, Mapping[str, float]], *, title: str, xlabel: str, limit: float | None = None,
    limit_label: str = "", number: str = "{:.2f}",
) -> Plot:  # fmt: skip
    """Horizontal bars made of parts, {label: {part: size}}, with their sums; `limit` is a line that they should not cross."""
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(7.2, 1.3 + 0.42 * len(bars)))
        small = {"textcoords": "offset points", "fontsize": 9, "color": theme.ink}
        for y, parts in enumerate(bars.values()):
            left = 0.0
            for index, name in enumerate(names):
                size = parts.get(name, 0.0)
                ax.barh(y, size, left=left, height=0.66, color=theme.colour(index), label=name if y == 0 else None)
                left += size
            ax.annotate(number.format(left), (left, y), xytext=(4, 0), va="center", **small)
        if limit is not None:
            ax.axvline(limit, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
            ax.annotate(limit_label, (limit, -0.5), xytext=(-4, 3), ha="right", **small)
        largest = max(sum(parts.values()) for parts in bars.values())
        ax.set_xlim(0, max(1.14 * largest, 1.05 * (limit or 0.0)))
        ax.set_yticks(range(len(bars)), labels=list(bars))
        ax.set_ylim(len(bars) - 0.4, -0.9 if limit is not None else -0.6)
        ax.grid(True, axis="x", color=theme.faint)
        ax.grid(False, axis="y")
        ax.set_xlabel(xlabel)
        shown = {"loc": "outside lower center", "ncols": min(len(names), 5), "frameon": False, "labelcolor": theme.ink}
        if names != [xlabel]:
            figure.legend(*ax.get_legend_handles_labels(), **shown)
        return figure

    words = "; ".join(f"{label} {number.format(sum(parts.values()))}" for label, parts in bars.items())
    bound = "" if limit is None else f" {limit_label}: {number.format(limit)}."
    return Plot("bars", title, f"Bars of {', '.join(dict.fromkeys([*names, xlabel]))}. {title}. {words}.{bound}", draw)


def attention_maps(maps: Mapping[str, AttentionMap], *, title: str = "Largest attention of all heads (Fig. 10)") -> Plot:
    """Fig. 10: one map a model, queries downwards; orange lines enclose the instruction's tokens, white ones part the turns."""

    def draw(theme: Theme) -> Any:
        figure, axes = canvas(theme, title, columns=len(maps), panel=(7.6 / len(maps), 3.3))
        for ax, (label, found) in zip(axes, maps.items()):
            Q, S = found.cells.shape
            right = S * found.bin_size
            image = ax.imshow(found.cells, cmap="cividis", vmin=0, vmax=1, extent=(0, right, Q * found.bin_size, 0))
            for number, start in enumerate(found.turns, start=1):
                if number > 1:
                    ax.axhline(start, color="white", linewidth=0.8, linestyle=(0, (4, 3)))
                if len(found.turns) <= _NAMED_TURNS:  # to the right of the diagonal, where no query sees a key
                    place = (0.98 * right, start)
                    small = {"color": "white", "fontsize": 7.5, "textcoords": "offset points", "xytext": (0, -2)}
                    ax.annotate(f"turn {number}", place, ha="right", va="top", **small)
            for token in found.instruction:
                ax.axvline(token, color=theme.colour(1), linewidth=1.2)
            ax.set_title(label, fontsize=10)
            ax.set_xlabel("key (token)")
            ax.set_ylabel("query (token)")
            ax.grid(False)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label="largest weight")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, colors=theme.ink, labelsize=9)
        bar.ax.yaxis.label.set(color=theme.ink, fontsize=10)
        return figure

    return Plot("attention", title, f"Maps of queries by keys. {title}. {_by_turn(maps)}.", draw)


def attention_by_turn(maps: Mapping[str, AttentionMap]) -> Plot:
    """How much each turn looks at the instruction; beside `attention_maps`."""
    title = "Attention to the instruction by turn"

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(7.2, 3.0))
        for (label, found), style in zip(maps.items(), styles(theme, len(maps))):
            ax.plot(range(1, len(found.by_turn) + 1), found.by_turn, label=label, **style)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("turn")
        ax.set_ylabel("mean of the largest weight")
        legend(ax, theme)
        return figure

    return Plot("attention_by_turn", title, f"Lines. {title}. {_by_turn(maps)}.", draw)


def save_maps(path: Path, maps: Mapping[str, AttentionMap]) -> None:
    """Keeps maps in one file, to be drawn again in any theme."""
    arrays = {
        f"{label}/{name}": np.asarray(value)
        for label, found in maps.items() for name, value in dataclasses.asdict(found).items()
    }  # fmt: skip
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def load_maps(path: Path) -> dict[str, AttentionMap]:
    """What `save_maps` has kept."""
    with np.load(path) as arrays:
        labels = dict.fromkeys(name.rpartition("/")[0] for name in arrays)
        return {
            label: AttentionMap(
                arrays[f"{label}/cells"], int(arrays[f"{label}/bin_size"]), tuple(arrays[f"{label}/instruction"].tolist()),
                arrays[f"{label}/by_turn"], tuple(arrays[f"{label}/turns"].tolist()) if f"{label}/turns" in arrays else (),
            )
            for label in labels
        }  # fmt: skip


def _by_turn(maps: Mapping[str, AttentionMap]) -> str:
    return "; ".join(
        f"{label}: {found.by_turn[0]:.2f} on the instruction in the first turn, {found.by_turn[-1]:.2f} in the last"
        for label, found in maps.items()
    )


def _named(devices: Sequence[int]) -> str:
    """0, or 0-3 for neighbours, or 0,4."""
    first, last = devices[0], devices[-1]
    if len(devices) > 2 and last - first == len(devices) - 1:
        return f"{first}-{last}"
    return ",".join(map(str, devices))


def _box(x: float, y: float, width: float, height: float, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1.5)
