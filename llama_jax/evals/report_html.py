"""Renders the report as one HTML file that needs nothing beside it: style, plots and dialogues are inside.

Readable on a phone and in the dark. Everything that a model, a data file or a config wrote is escaped.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape

from llama_jax.evals.plots import Plot
from llama_jax.evals.report_sections import SIMULATION_NOTE, VERSIONS, Section, prompt_text
from llama_jax.evals.targets import Target, lookup, number
from llama_jax.markdown import Table

# A number with what follows it: "66.7 ± 21.1", "-14.1 (-28.2 to 0.0)".
_NUMBER = re.compile(r"[-+]?[\d.,]+( ± [\d.,]+)?( \([-+]?[\d.,]+ to [-+]?[\d.,]+\))?")
STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5b6578; --line: #e3e7ee; --page: #f6f7f9; --card:
  #ffffff;
    --accent: #3b6fd4; --good: #1b7f5c; --good-back: #e2f4ec; --bad: #b23a3a; --bad-back: #fbe7e7;
    --idle-back: #eceff4; --edge: #1d243338; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #9aa5b8; --line: #2c3444; --page:
  #12161f;
    --card: #1a202c; --accent: #86acf5; --good: #6fd3a8; --good-back: #16352a; --bad: #f19a9a; --bad-back:
    #43201f;
  --idle-back: #272f3d; --edge: #000000b0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.2; margin: 0 0 .3em; letter-spacing: -.02em; }
h2 { font-size: 1.25rem; margin: 0 0 .5em; letter-spacing: -.01em; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 24px;
  margin-top: 20px; }
p { margin: 0 0 1em; color: var(--soft); max-width: 75ch; }
.lead { font-size: 1.05rem; }
.simulation { border-left: 4px solid var(--accent); padding: 2px 0 2px 14px; margin: 18px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); gap: 14px; margin-top:
  24px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 16px 18px; }
.tile b { display: block; white-space: nowrap; font-size: 1.5rem; line-height: 1.25; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .86rem; }
/* A shadow at an edge behind which a wide table goes on: the covers scroll with it, the shadows stay. */
.scroll { overflow-x: auto; margin-bottom: 18px; background:
    linear-gradient(to right, var(--card) 24px, transparent) left / 48px 100% no-repeat local,
    linear-gradient(to left, var(--card) 24px, transparent) right / 48px 100% no-repeat local,
    linear-gradient(to right, var(--edge), transparent) left / 14px 100% no-repeat scroll,
    linear-gradient(to left, var(--edge), transparent) right / 14px 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; min-width: 36rem; font-size: .92rem; font-variant-numeric:
  tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: .82rem; }
th, td { padding: 9px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { vertical-align: bottom; }
.number { white-space: nowrap; }
/* What a row is about stays in sight, and what scrolls away behind it fades. */
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; padding-left: 0; background: var(--card);
  max-width: min(22rem, 40vw); overflow-wrap: break-word; }
.scroll th:first-child::after, .scroll td:first-child::after { content: ""; position: absolute; top: 0; bottom: 0; left: 100%;
  width: 8px; background: linear-gradient(to right, var(--card), transparent); pointer-events: none; }
tr:last-child td { border-bottom: 0; }
.badge { display: inline-block; border-radius: 99px; padding: 1px 11px; font-size: .8rem; font-weight: 600;
  white-space: nowrap; }
.met { color: var(--good); background: var(--good-back); }
.missed { color: var(--bad); background: var(--bad-back); }
.idle, .absent { color: var(--soft); } .idle { background: var(--idle-back); }
figure { margin: 0 0 14px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
details > summary { cursor: pointer; font-weight: 600; font-size: 1.25rem; }
details[open] > summary { margin-bottom: 14px; }
.dialogue { border-top: 1px solid var(--line); padding-top: 18px; margin-top: 18px; }
.dialogue:first-of-type { border-top: 0; margin-top: 0; }
.prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; margin-bottom: 12px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; }
.answer { border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px; background: var(--page);
  min-width: 0; }
.answer h4 { margin: 0 0 6px; font-size: .82rem; display: flex; justify-content: space-between; color:
  var(--accent); }
.answer h4 span { color: var(--soft); font-weight: 500; }
.answer div, .reference { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 18em; overflow-y: auto; }
.reference { color: var(--soft); margin-bottom: 12px; }
"""


def render_html(
    title: str,
    targets: Sequence[Target],
    sections: Sequence[Section],
    samples: Sequence[Mapping],
    *,
    figures: Mapping[str, Plot],
) -> str:
    """The whole report; `figures` holds what the sections name."""
    body = [
        f"<header><h1>{escape(title)}</h1>",
        '<p class="lead">From raw text to an aligned chat model: what each stage shows on held-out data.</p>',
        f'<p class="simulation">{escape(SIMULATION_NOTE)}</p></header>',
        _tiles(targets),
        f"<section><h2>Targets</h2>{_targets_table(targets)}</section>",
        *(_section(section, figures) for section in sections[:-1]),
        _samples(samples),
        *(_folded(section) for section in sections[-1:]),
    ]
    return document(title, body)


def render_page(
    title: str, lead: str, sections: Sequence[Section], *, figures: Mapping[str, Plot], samples: Sequence[Mapping] = ()
) -> str:
    """A page of any sections, and of samples (`dialogue_html`), which are folded: some answers offend."""
    shown = "".join(map(dialogue_html, samples))
    body = [
        header(title, lead),
        *(_section(section, figures) for section in sections),
        shown and f"<section><details><summary>Answers side by side</summary>{shown}</details></section>",
    ]
    return document(title, body)


def header(title: str, lead: str) -> str:
    """The top of a page; both texts are escaped."""
    return f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>'


def document(title: str, body: Sequence[str], *, style: str = "") -> str:
    """A whole file around parts of HTML; `style` is added to the common one."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _tiles(targets: Sequence[Target]) -> str:
    counts = [
        (sum(t.met is True for t in targets), "targets met"),
        (sum(t.met is False for t in targets), "missed"),
        (sum(t.met is None for t in targets), "not run"),
    ]
    headline = [
        (t.measured.split(" (")[0], f"{VERSIONS[t.stage]}: win rate against SFT")
        for t in targets
        if "win rate" in t.asked
    ]
    headline += [(t.measured, "whole recipe") for t in targets if t.stage == "recipe"]
    tiles = [
        f'<div class="tile"><b>{escape(str(value))}</b><span>{escape(words)}</span></div>'
        for value, words in counts
    ]
    tiles += [
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>'
        for value, words in headline
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _targets_table(targets: Sequence[Target]) -> str:
    badges = {True: ("met", "met"), False: ("missed", "missed"), None: ("idle", "not run")}
    rows = []
    for target in targets:
        style, words = badges[target.met]
        texts = (target.stage, target.asked, target.measured)
        cells = "".join(f"<td>{_cell(text)}</td>" for text in texts)
        rows.append(f'<tr><td><span class="badge {style}">{words}</span></td>{cells}</tr>')
    return _grid(["", "stage", "target", "measured"], rows)


def _section(section: Section, figures: Mapping[str, Plot]) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in section.notes)
    tables = "".join(map(table_html, section.tables))
    plots = "".join(figures[name].html() for name in section.figures if name in figures)
    return f"<section><h2>{escape(section.title)}</h2>{notes}{tables}{plots}</section>"


def _folded(section: Section) -> str:
    tables = "".join(map(table_html, section.tables))
    return f"<section><details><summary>{escape(section.title)}</summary>{tables}</details></section>"


def table_html(table: Table) -> str:
    """A table whose every cell is escaped."""
    return _grid(
        table.columns,
        ["<tr>" + "".join(f"<td>{_cell(text)}</td>" for text in row) + "</tr>" for row in table.rows],
    )


def _grid(columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    if text in ("not run", "no pairs"):
        return f'<span class="absent">{text}</span>'
    if " " in text and _NUMBER.fullmatch(text):  # on one line, or the interval on a line of its own
        value, space, interval = text.partition(" (")
        parts = [value, f"({interval}"] if space else [value]
        return " ".join(f'<span class="number">{part}</span>' for part in parts)
    return escape(text)


def _samples(samples: Sequence[Mapping]) -> str:
    if not samples:
        return ""
    return f"<section><h2>Sample dialogues</h2>{''.join(map(dialogue_html, samples))}</section>"


def dialogue_html(sample: Mapping) -> str:
    """A prompt with the answers of several models side by side, {"prompt", "answers": {model: text}}; as far as it has them
    with its `reference`, and a `utility` or a `note` to each answer."""
    badge = ' <span class="badge idle">safety</span>' if sample.get("is_safety") else ""
    reference = sample.get("reference")
    shown = f'<div class="reference">Reference: {escape(reference)}</div>' if reference else ""
    given = sample["answers"]
    versions = [*(v for v in VERSIONS if v in given), *(v for v in given if v not in VERSIONS)]
    answers = []
    for version in versions:
        utility = lookup(sample, f"utility.{version}")
        said = sample.get("note", {}).get(version, "") if utility is None else f"utility {number(utility)}"
        score = f"<span>{escape(said)}</span>" if said else ""
        name = escape(VERSIONS.get(version, version))
        answers.append(f'<div class="answer"><h4>{name}{score}</h4><div>{escape(given[version])}</div></div>')
    return (
        f'<div class="dialogue"><div class="prompt">{escape(prompt_text(sample["prompt"]))}{badge}</div>'
        f'{shown}<div class="answers">{"".join(answers)}</div></div>'
    )
