"""Pieces of a self-contained HTML page: style, tables, bars and histograms as inline SVG. Readable on a phone and in the dark.

Charts are drawn in the page's own colours, which a picture of a plotting library could not follow; every value is also text,
so nothing depends on hovering.
"""

from collections.abc import Mapping, Sequence
from html import escape

# Distinguishable with the common colour-vision deficiencies; the order of the parts of a funnel.
COLOURS = ("#2a9d76", "#3b6fd4", "#86acf5", "#9aa3b2", "#e08a1e", "#f0b968", "#cf4b4b", "#8a63c9", "#5fb3c9", "#b0793c")

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5b6578; --line: #e3e7ee; --page: #f6f7f9; --card: #ffffff;
  --accent: #3b6fd4; --bar: #3b6fd4; --ghost: #b9c2d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #9aa5b8; --line: #2c3444; --page: #12161f;
  --card: #1a202c; --accent: #86acf5; --bar: #6d97ee; --ghost: #4a556b; } }
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
th { color: var(--soft); font-weight: 600; font-size: .8rem; white-space: nowrap; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.bar { width: 38%; min-width: 120px; }
td.bar div { height: 12px; border-radius: 3px; background: var(--bar); min-width: 1px; }
tr:last-child td { border-bottom: 0; }
tr.part td:first-child { padding-left: 18px; color: var(--soft); }
.stack { display: flex; height: 22px; border-radius: 5px; overflow: hidden; background: var(--line); }
.stack i { display: block; height: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .84rem; color: var(--soft); margin: 12px 0 18px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 26px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .value { fill: var(--bar); } svg .axis { stroke: var(--line); } svg .mark { stroke: #cf4b4b; stroke-dasharray: 4 3; }
details { border-top: 1px solid var(--line); padding: 8px 0; } summary { cursor: pointer; font-weight: 600; }
summary span { color: var(--soft); font-weight: 400; }
line.range { stroke: var(--bar); stroke-width: 6; stroke-linecap: round; opacity: .35; }
circle.value { fill: var(--bar); }
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
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def stacks(rows: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str:
    """One bar of parts a row, each as long as the whole, with a legend of the parts that occur."""
    colour = dict(zip(names, COLOURS, strict=False))
    used = [name for name in names if any(row.get(name) for row in rows.values())]
    legend = "".join(f'<span><i style="background:{colour[name]}"></i>{escape(name)}</span>' for name in used)
    body = ""
    for label, row in rows.items():
        whole = sum(row.values()) or 1
        pieces = "".join(
            f'<i style="width:{100 * row[name] / whole:.2f}%;background:{colour[name]}" '
            f'title="{escape(name)}: {row[name]:,.0f} ({row[name] / whole:.1%})"></i>'
            for name in used
            if row.get(name)
        )
        body += f'<tr><td>{escape(label)}</td><td style="width:80%"><div class="stack">{pieces}</div></td></tr>'
    return f'<div class="legend">{legend}</div><table><tbody>{body}</tbody></table>'


def histogram(
    title: str, bins: Sequence[tuple[str, float]], *, log: bool = False, mark: int | None = None, mark_text: str = ""
) -> str:
    """Columns over labelled bins, an empty label for a bin that needs none; `mark` draws a line before a bin."""
    from math import log10

    width, height, left, top, bottom = 460, 190, 46, 16, 26
    values = [log10(value + 1) if log else value for _, value in bins]
    most = max(values, default=0) or 1
    step = (width - left) / max(len(bins), 1)
    shapes = [f'<line class="axis" x1="{left}" x2="{width}" y1="{height - bottom}" y2="{height - bottom}"/>']
    for share in (0.5, 1.0):
        y = height - bottom - share * (height - top - bottom)
        value = 10 ** (share * most) - 1 if log else share * most
        shapes.append(f'<line class="axis" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if log or value == int(value):  # there is no half a document
            shapes.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for i, ((label, value), drawn) in enumerate(zip(bins, values, strict=True)):
        tall = drawn / most * (height - top - bottom)
        x = left + i * step
        shapes.append(
            f'<rect class="value" x="{x + 1:.1f}" y="{height - bottom - tall:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{tall:.1f}"><title>{escape(label)}: {value:,.0f}</title></rect>'
        )
        if label:
            shapes.append(f'<text x="{x:.1f}" y="{height - 9}">{escape(label)}</text>')
    if mark is not None:
        x = left + mark * step
        shapes.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        shapes.append(f'<text x="{x + 5:.1f}" y="{top + 10}">{escape(mark_text)}</text>')
    scale = " (log scale)" if log else ""
    return (
        f'<figure style="margin:0"><h3>{escape(title)}{scale}</h3>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(shapes)}</svg></figure>'
    )


def intervals(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Means with their intervals about a line at 0: (name, {mean, low, high})."""
    width, left, step = 720, 190, 30
    height = step * len(rows) + 30
    low, high = min(0.0, *(row["low"] for _, row in rows)), max(0.0, *(row["high"] for _, row in rows))
    space = (high - low) * 0.12 or 1.0

    def at(value: float) -> float:
        return left + (value - low + space) / (high - low + 2 * space) * (width - left)

    shapes = [f'<line class="mark" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="4" y2="{height - 24}"/>',
              f'<text x="{at(0):.1f}" y="{height - 8}" text-anchor="middle">0</text>']  # fmt: skip
    for i, (name, row) in enumerate(rows):
        y = step * i + 20
        label = f"{row['mean']:+.4f}"
        shapes.append(
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
            f'<line class="range" x1="{at(row["low"]):.1f}" x2="{at(row["high"]):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="value" cx="{at(row["mean"]):.1f}" cy="{y}" r="4.5"/>'
            f'<text x="{at(row["mean"]):.1f}" y="{y - 8}" text-anchor="middle">{label}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="means and intervals">{"".join(shapes)}</svg>'


def lines(curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """Curves over one axis, with a legend."""
    width, height, left, top, bottom = 720, 280, 52, 14, 40
    points = [point for curve in curves.values() for point in curve]
    last = max(point[0] for point in points) or 1
    low, high = min(point[1] for point in points), max(point[1] for point in points)
    space = (high - low) * 0.05 or 0.5
    low, high = low - space, high + space

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = left + point[0] / last * (width - left - 10)
        return across, top + (high - point[1]) / (high - low) * (height - top - bottom)

    shapes = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        down = place((0, value))[1]
        shapes.append(f'<line class="axis" x1="{left}" x2="{width}" y1="{down:.1f}" y2="{down:.1f}"/>')
        shapes.append(f'<text x="{left - 6}" y="{down + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        across = place((share * last, 0))[0]
        anchor = "end" if share == 1 else "middle"
        shapes.append(f'<text x="{across:.1f}" y="{height - 22}" text-anchor="{anchor}">{_short(share * last)}</text>')
    shapes.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 5}" text-anchor="middle">{escape(x)}</text>')
    order = (1, 4, 0, 7, 6, 8, 9, 2, 3, 5)  # of COLOURS: neighbours that differ most come first
    legend = ""
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[order[number % len(order)]]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(place, curve))
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        shapes += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in map(place, curve)]
        legend += f'<span><i style="background:{colour}"></i>{escape(name)} {curve[-1][1]:.3f}</span>'
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y)}">{"".join(shapes)}</svg>'
    return f'<div class="legend"><span>{escape(y)}, at the end:</span>{legend}</div>{drawing}'


def samples(summary: str, detail: str, texts: Sequence[tuple[str, str]]) -> str:
    """Excerpts behind a fold: (heading, text) each."""
    body = "".join(f'<div class="note">{escape(head)}</div><pre>{escape(text)}</pre>' for head, text in texts)
    return f"<details><summary>{escape(summary)} <span>{escape(detail)}</span></summary>{body}</details>"


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
