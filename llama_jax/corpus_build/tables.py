"""The tables that a build prints: what became of the documents, and the mixture (corpus_build/mixture.py)."""

from collections.abc import Mapping
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
    lines = [f"{'source':<16}" + "".join(f"{name:>10}" for name, _ in shown) + f"{'cut kB':>9}{'lines seen':>12}"]
    for source, row in counts.items():
        cut = sum(row[f"{kind}_bytes"] for kind in ("leaks", "evaluation", "repeats"))
        numbers = "".join(f"{row[key]:>10,}" for _, key in shown)
        lines.append(f"{source:<16}{numbers}{cut / 1000:>9,.0f}{row['held_out_lines_seen']:>12.1%}")
    return "\n".join(lines)
