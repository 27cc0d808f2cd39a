"""Pieces of a self-contained HTML page: style, tables, bars and histograms as inline SVG. Readable on a phone and in the dark.

Charts are drawn here, so that a page needs no plotting library, in the colours of the figures of evaluation, light and dark.
Every value is also text, in a label or for those who cannot see the chart: nothing depends on colour or on hovering.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import log10

from llama_jax.palette import DARK, LIGHT, Theme

DASHES = ("", "9 4", "2 3", "9 3 2 3")  # of lines: with the colours no two of 32 look alike


def _on(colour: str) -> str:
    """Black or white, whichever reads better on a colour (WCAG 2.1: from this luminance on black does)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return "#000" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 else "#fff"


def _variables(theme: Theme) -> str:
    """The colours of a page, and what is readable on those of parts."""
    parts = {**{str(i): colour for i, colour in enumerate(theme.cycle)}, "grey": theme.grey}
    colours = "".join(f" --part-{name}: {colour}; --on-{name}: {_on(colour)};" for name, colour in parts.items())
    return f"--ink: {theme.ink}; --line: {theme.faint}; --card: {theme.page};{colours}"


_PARTS = "\n".join(f".part-{i} {{ background: var(--part-{i}); color: var(--on-{i}); }}" for i in range(len(LIGHT.cycle)))
STYLE = f"""
:root {{ color-scheme: light dark; --soft: #5b6578; --page: #f6f7f9; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --soft: #9aa5b8; --page: #12161f; {_variables(DARK)} }} }}
{_PARTS}
""" + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 20px 80px; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; margin: 0 0 .3em; letter-spacing: -.02em; }
h2 { font-size: 1.2rem; margin: 0 0 .4em; letter-spacing: -.01em; }
h3 { font-size: .95rem; margin: 1.4em 0 .5em; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 22px 24px; margin-top: 20px; }
p { margin: 0 0 1em; color: var(--soft); max-width: 80ch; }
ul { margin: 0; padding-left: 1.2em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin-top: 20px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 14px 18px; }
.tile b { display: block; white-space: nowrap; font-size: 1.45rem; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; font-size: .8rem; vertical-align: bottom; }
.bars th, th:first-child { white-space: nowrap; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.bar { width: 38%; min-width: 120px; }
td.bar div { height: 12px; border-radius: 3px; background: var(--part-0); min-width: 1px; }
tr:last-child td { border-bottom: 0; }
tr.part td:first-child { padding-left: 18px; color: var(--soft); }
.stacks { margin-bottom: 22px; }
.stack { display: flex; height: 24px; border-radius: 5px; overflow: hidden; background: var(--line); }
.stack i { display: block; height: 100%; overflow: hidden; white-space: nowrap; text-align: center;
  font: 12px/24px system-ui, sans-serif; }
.part-grey { color: var(--on-grey);
  background: repeating-linear-gradient(135deg, var(--part-grey) 0 3px, var(--card) 3px 5px); }
@media (max-width: 900px) { .stack span { display: none; } }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .84rem; color: var(--soft); margin: 12px 0 18px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.legend svg { display: inline-block; width: 30px; height: 10px; margin-right: 6px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 26px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .value { fill: var(--part-0); } svg .axis { stroke: var(--line); } svg .mark { stroke: var(--ink); stroke-dasharray: 4 3; }
svg .number { fill: var(--ink); font-size: 9.5px; }
details { border-top: 1px solid var(--line); padding: 8px 0; } summary { cursor: pointer; font-weight: 600; }
summary span { color: var(--soft); font-weight: 400; }
line.range { stroke: var(--part-0); stroke-width: 6; stroke-linecap: round; opacity: .35; }
pre { font: 12px/1.45 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 4px 0 14px; padding: 10px 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--page); max-height: 12em; overflow-y: auto; }
.note { font-size: .84rem; color: var(--soft); }
"""


def page(title: str, lead: str, tiles: Sequence[tuple[str, str]], sections: Sequence[str]) -> str:
    """The whole document; `lead`, `tiles` are text, `sections` HTML."""
    boxes = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in tiles)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><main><h1>{escape(title)}</h1><p>{escape(lead)}</p>"
        f'<div class="tiles">{boxes}</div>{"".join(sections)}</main></html>\n'
    )


def section(title: str, note: str, *parts: str) -> str:
    """A card with a heading and a sentence that says how to read it."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(note)}</p>{''.join(parts)}</section>"


def bullets(lines_: Sequence[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines_)}</ul>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, parts: Sequence[int] = ()) -> str:
    """A table of text; the rows numbered in `parts` are parts of the one before, and set in."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr{' class=part' if i in parts else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bars(heads: Sequence[str], rows: Sequence[tuple[str, float, Sequence[str]]]) -> str:
    """A table with a bar in each row: (name, length of the bar, cells behind it)."""
    most = max((value for _, value, _ in rows), default=0) or 1
    head = "".join(f"<th>{escape(name)}</th>" for name in (heads[0], "", *heads[1:]))
    body = "".join(
        f'<tr><td>{escape(name)}</td><td class="bar"><div style="width:{100 * value / most:.1f}%"></div></td>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, value, cells in rows
    )
    return f'<div class="scroll bars"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def stacks(rows: Mapping[str, Mapping[str, float]], names: Sequence[str], *, striped: str = "") -> str:
    """One bar of parts a row, each as long as the whole, with a legend of the parts that occur and their sums.

    Parts have colours in the order of `names`; one that is neither good nor bad may be `striped`, without a colour.
    """
    coloured = [name for name in names if name != striped]
    if len(coloured) > len(LIGHT.cycle):
        raise ValueError(f"names: expected at most {len(LIGHT.cycle)} parts beside a striped one, got {len(coloured)}")
    slot = {**{name: str(i) for i, name in enumerate(coloured)}, striped: "grey"}
    used = [name for name in names if any(row.get(name) for row in rows.values())]
    sums = {name: sum(row.get(name, 0) for row in rows.values()) for name in used}
    legend = "".join(
        f'<span><i class="part-{slot[name]}"></i>{escape(_part(name, sums[name], sum(sums.values())))}</span>'
        for name in used
    )
    body = ""
    for label, row in rows.items():
        whole = sum(row.values()) or 1
        parts = [(name, row[name]) for name in used if row.get(name)]
        pieces = "".join(
            f'<i class="part-{slot[name]}" style="width:{100 * value / whole:.2f}%" '
            f'title="{escape(_part(name, value, whole))}">{_inside(name, value / whole)}</i>'
            for name, value in parts
        )
        words = escape(f"{label}: " + ", ".join(_part(name, value, whole) for name, value in parts))
        bar = f'<div class="stack" role="img" aria-label="{words}">{pieces}</div>'
        body += f'<tr><td>{escape(label)}</td><td style="width:80%">{bar}</td></tr>'
    return f'<div class="legend">{legend}</div><table class="stacks"><tbody>{body}</tbody></table>'


def _part(name: str, value: float, whole: float) -> str:
    return f"{name} {value:,.0f} ({value / (whole or 1):.1%})"


def _inside(name: str, share: float) -> str:
    """What has room in a part of a bar of some 850 pixels; a narrow screen hides the name."""
    if share < 0.05:
        return ""
    return (f"<span>{escape(name)} </span>" if share > 0.009 * (len(name) + 4) else "") + f"{share:.0%}"


def histogram(
    title: str, bins: Sequence[tuple[str, str, float]], *, log: bool = False, mark: int | None = None, mark_text: str = "",
    width: int = 460,
) -> str:  # fmt: skip
    """Columns with their values over bins (label on the axis or "", name, value); `mark` draws a line before a bin."""
    height, left, top, bottom = 190, 46, 24, 26
    values = [log10(value + 1) if log else value for *_, value in bins]
    most = max(values, default=0) or 1
    step = (width - left) / max(len(bins), 1)
    shapes = [f'<line class="axis" x1="{left}" x2="{width}" y1="{height - bottom}" y2="{height - bottom}"/>']
    for share in (0.5, 1.0):
        y = height - bottom - share * (height - top - bottom)
        value = round(10 ** (share * most) - 1) if log else share * most
        shapes.append(f'<line class="axis" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if value == int(value):  # there is no half a document
            shapes.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for i, ((label, name, value), drawn) in enumerate(zip(bins, values, strict=True)):
        tall = drawn / most * (height - top - bottom)
        x, y = left + i * step, height - bottom - tall
        shapes.append(
            f'<rect class="value" x="{x + 1:.1f}" y="{y:.1f}" width="{max(step - 2, 1):.1f}" height="{tall:.1f}">'
            f"<title>{escape(name)}: {value:,.0f}</title></rect>"
        )
        if value and len(text := short(value)) * 5.5 < step:  # a number that has room
            shapes.append(f'<text class="number" x="{x + step / 2:.1f}" y="{y - 3:.1f}" text-anchor="middle">{text}</text>')
        if label:
            shapes.append(f'<text x="{x:.1f}" y="{height - 9}">{escape(label)}</text>')
    if mark is not None:
        x = left + mark * step
        shapes.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 14}" y2="{height - bottom}"/>')
        shapes.append(f'<text x="{x + 5:.1f}" y="{top - 6}">{escape(mark_text)}</text>')
    scale = " (log scale)" if log else ""
    words = f"{title}: " + "; ".join(f"{name} {value:,.0f}" for _, name, value in bins if value)
    return f'<figure style="margin:0"><h3>{escape(title)}{scale}</h3>{_svg(width, height, words, shapes)}</figure>'


def interval_text(row: Mapping[str, float]) -> str:
    """A gain with its interval: `+0.0120 (+0.0100 to +0.0140)`."""
    return f"{row['mean']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"


def intervals(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Means with their 95 % intervals about a line at 0: (name, {mean, low, high})."""
    width, right, step = 720, 190, 26
    left = 20 + 6.2 * max(len(name) for name, _ in rows)
    height = step * len(rows) + 30
    low, high = min(0.0, *(row["low"] for _, row in rows)), max(0.0, *(row["high"] for _, row in rows))
    space = (high - low) * 0.06 or 1.0

    def at(value: float) -> float:
        return left + (value - low + space) / (high - low + 2 * space) * (width - left - right)

    shapes = [f'<line class="mark" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="4" y2="{height - 24}"/>',
              f'<text x="{at(0):.1f}" y="{height - 8}" text-anchor="middle">0</text>']  # fmt: skip
    for i, (name, row) in enumerate(rows):
        y = step * i + 18
        shapes.append(
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
            f'<line class="range" x1="{at(row["low"]):.1f}" x2="{at(row["high"]):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="value" cx="{at(row["mean"]):.1f}" cy="{y}" r="4.5"/>'
            f'<text x="{width}" y="{y + 4}" text-anchor="end" style="fill:var(--ink)">{interval_text(row)}</text>'
        )
    words = "means with 95 % intervals: " + "; ".join(f"{name} {interval_text(row)}" for name, row in rows)
    return _svg(width, height, words, shapes)


def lines(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str,
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> str:  # fmt: skip
    """Curves over one axis, with a legend; `bands` are (low, high) at each point of a curve."""
    bands = bands or {}
    width, height, left, top, bottom = 720, 280, 52, 14, 40
    points = [point for curve in curves.values() for point in curve]
    heights = [point[1] for point in points] + [end for band in bands.values() for ends in band for end in ends]
    last, low, high = max(point[0] for point in points) or 1, min(heights), max(heights)
    space = (high - low) * 0.05 or 0.5
    low, high = low - space, high + space

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = left + point[0] / last * (width - left - 10)
        return across, top + (high - point[1]) / (high - low) * (height - top - bottom)

    def path(points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in map(place, points))

    shapes = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        down = place((0, value))[1]
        shapes.append(f'<line class="axis" x1="{left}" x2="{width}" y1="{down:.1f}" y2="{down:.1f}"/>')
        shapes.append(f'<text x="{left - 6}" y="{down + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        across = place((share * last, 0))[0]
        anchor = "end" if share == 1 else "middle"
        shapes.append(f'<text x="{across:.1f}" y="{height - 22}" text-anchor="{anchor}">{short(share * last)}</text>')
    shapes.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 5}" text-anchor="middle">{escape(x)}</text>')
    legend, words = "", []
    for number, (name, curve) in enumerate(curves.items()):
        again, place_in_cycle = divmod(number, len(LIGHT.cycle))
        colour, dashes = f"var(--part-{place_in_cycle})", DASHES[(number + again) % len(DASHES)]
        pen = f'fill="none" stroke-width="2.2" stroke-dasharray="{dashes}" style="stroke:{colour}"'
        if band := bands.get(name):
            across = [point[0] for point in curve]
            outline = [*zip(across, (least for least, _ in band)), *reversed([*zip(across, (most for _, most in band))])]
            shapes.append(f'<polygon points="{path(outline)}" opacity="0.18" style="fill:{colour}"/>')
        shapes.append(f'<polyline points="{path(curve)}" {pen}/>')
        shapes += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" style="fill:{colour}"/>' for a, b in map(place, curve)]
        line = f'<svg viewBox="0 0 30 10" aria-hidden="true"><line x1="0" x2="30" y1="5" y2="5" {pen}/></svg>'
        legend += f"<span>{line}{escape(name)} {curve[-1][1]:.3f}</span>"
        words.append(f"{name} from {curve[0][1]:.3f} at {short(curve[0][0])} to {curve[-1][1]:.3f} at {short(curve[-1][0])}")
    drawing = _svg(width, height, f"{y} over {x}: " + "; ".join(words), shapes)
    return f'<div class="legend"><span>{escape(y)}, at the end:</span>{legend}</div>{drawing}'


def _svg(width: int, height: int, words: str, shapes: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}">{"".join(shapes)}</svg>'


def samples(summary: str, detail: str, texts: Sequence[tuple[str, str]]) -> str:
    """Excerpts behind a fold: (heading, text) each."""
    body = "".join(f'<div class="note">{escape(head)}</div><pre>{escape(text)}</pre>' for head, text in texts)
    return f"<details><summary>{escape(summary)} <span>{escape(detail)}</span></summary>{body}</details>"


def short(value: float) -> str:
    """A number in few characters: 1.23k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
