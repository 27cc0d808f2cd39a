"""Tables of a corpus as text: what became of its documents, and what a run has drawn of them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def cleaning_table(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """What became of the documents of each source, and what the held-out ones have in common with those to train on."""
    columns = (
        ("read", "documents_read"), ("bad rows", "bad_rows"), ("bad files", "bad_files"),
        ("filtered", "filtered"), ("exact", "duplicates"),
        ("near", "near_duplicates"), ("leaks", "leaks"), ("eval", "evaluation"), ("repeats", "repeats"),
        ("withheld", "withheld_documents"), ("train", "documents"), ("held out", "held_out_documents"),
    )  # fmt: skip
    # A column of nothing but zeros says nothing.
    shown = [(name, key) for name, key in columns if any(row[key] for row in counts.values())]
    rows = [["source", *(name for name, _ in shown), "cut kB", "lines seen"]]
    for source, row in counts.items():
        cut = sum(row[f"{kind}_bytes"] for kind in ("leaks", "evaluation", "repeats"))
        numbers = [f"{row[key]:,}" for _, key in shown]
        rows.append([source, *numbers, f"{cut / 1000:,.0f}", f"{row['held_out_lines_seen']:.1%}"])
    return aligned(rows)


def drawn_table(sources: Mapping[str, Mapping[str, Any]], epochs: Mapping[str, float]) -> str:
    """What was planned of each source of a manifest beside what was drawn, by how often its text was seen; 0 for one not named.

    Documents, megabytes and tokens count each time that they are seen.
    """
    heads = (f"{what} planned" for what in ("documents", "MB", "tokens", "epochs"))
    rows = [["source", *itertools.chain(*((head, "drawn") for head in heads))]]
    for name, source in sources.items():
        both = source["epochs"], epochs.get(name, 0.0)
        amounts = ((source["documents"], 0), (source["bytes"] / 1e6, 1), (source["tokens"], 0), (1, 2))
        rows.append([name, *(f"{times * amount:,.{digits}f}" for amount, digits in amounts for times in both)])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length in columns as wide as they need: names on the left, numbers, which end together."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
