"""A report as one HTML file that needs nothing beside it: sections of notes, tables and plots, in the look of `report_html`."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape

from llama_jax.evals.plots import Plot
from llama_jax.evals.report_html import dialogue_html, document, header, table_html
from llama_jax.markdown import Table

_OWN = "td:first-child { font-weight: 600; }"


@dataclasses.dataclass(frozen=True)
class Chapter:
    """What one section of the page shows; `samples` are prompts with answers side by side, as `report_html` takes them."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    samples: Sequence[Mapping] = ()


def page(title: str, lead: str, chapters: Sequence[Chapter]) -> str:
    """The whole page; every text is escaped."""
    return document(title, [header(title, lead), *map(_chapter, chapters)], style=_OWN)


def _chapter(chapter: Chapter) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in chapter.notes)
    tables = "".join(map(table_html, chapter.tables))
    plots = "".join(plot.html() for plot in chapter.plots)
    samples = "".join(map(dialogue_html, chapter.samples))
    return f"<section><h2>{escape(chapter.title)}</h2>{notes}{plots}{tables}{samples}</section>"
