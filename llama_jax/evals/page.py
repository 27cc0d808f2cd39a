"""A report as one HTML file that needs nothing beside it: sections of notes, tables and plots, in the look of `report_html`."""

import dataclasses
from collections.abc import Sequence
from html import escape

from llama_jax.evals.plots import Plot
from llama_jax.evals.report_html import STYLE
from llama_jax.evals.report_sections import Table

_OWN = "figure img { background: none; padding: 0; width: auto; } td:first-child { font-weight: 600; }"


@dataclasses.dataclass(frozen=True)
class Chapter:
    """What one section of the page shows, in this order."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()


def page(title: str, lead: str, chapters: Sequence[Chapter]) -> str:
    """The whole page; every text is escaped."""
    body = "\n".join(map(_chapter, chapters))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_OWN}</style></head>\n<body><main>\n"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>\n{body}\n</main></body></html>\n'
    )


def _chapter(chapter: Chapter) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in chapter.notes)
    tables = "".join(map(_table, chapter.tables))
    plots = "".join(plot.html() for plot in chapter.plots)
    return f"<section><h2>{escape(chapter.title)}</h2>{notes}{plots}{tables}</section>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
