"""Writes what a run has shown: report.json for programs, report.md and a self-contained report.html to read.

The report is honest about two things: the annotator is a simulation, and a figure that was not measured is
shown as "not run". Every file is written beside its place and renamed, so a killed run leaves no half report.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.evals.plots import Plot, save
from llama_jax.evals.report_html import render_html
from llama_jax.evals.report_sections import (
    SIMULATION_NOTE,
    VERSIONS,
    Section,
    build_sections,
    prompt_text,
)
from llama_jax.evals.targets import Target, check_targets, number
from llama_jax.files import atomic_write
from llama_jax.markdown import markdown_table, text_table, verbatim

# Keys that report.json always has; null where the stage was not run.
_ACCURACY = dict.fromkeys(("all", "significantly", "better", "slightly", "negligibly"))
_VERSION = {"true_utility": None, "safety_violations": None}
_SCHEMA = {
    "seconds": {"total": None},
    "pretrain": {"bits_per_byte": {}, "xz_bits_per_byte": {}},
    "sft": _VERSION,
    "reward": {"helpfulness": {"accuracy": _ACCURACY}, "safety": {"accuracy": _ACCURACY}},
    "rejection": {**_VERSION, "win_rate": dict.fromkeys(("mean", "low", "high"))},
    "ppo": {**_VERSION, "win_rate": dict.fromkeys(("mean", "low", "high"))},
}


@dataclasses.dataclass(frozen=True)
class ReportPaths:
    """Where the three files of a report lie."""

    markdown: Path
    html: Path
    json: Path


def write_report(
    results: Mapping, workdir: str | os.PathLike, *, figures: Mapping[str, Plot], samples: Sequence[Mapping]
) -> ReportPaths:
    """Writes report.json, report.md (plots in `figures/`, each as PNG and SVG, light and dark) and report.html (plots inlined).

    results: nested dicts; the keys in `_SCHEMA`, and any others. Utilities and win rates are a number or an
      interval `{"mean", "low", "high"}` (also the dataclasses of `evals.statistics`); accuracies and rates
      lie in [0, 1]; safety violations are a count (int) or a share (float). Read where given: `size`; `base`
      (as `sft`, the model before it); `stop_rate`, `format_rate` and `reward_score` of a version;
      `speed.<stage>.tokens_per_second` and `.matmul_share`; `ppo_seconds.rollout`, `.score`, `.train`;
      `pretrain.held_out_lines_seen` by source.
    figures: by name. pretrain_loss, bits_per_byte, sft_loss, reward_accuracy, best_of_n, rejection_loss, ppo,
      over_optimisation and verdict have their place; others are shown at the end.
    samples: `{"prompt": str | messages, "reference": str, "is_safety": bool, "answers": {version: str},
      "utility": {version: float}}` with versions base, sft, rejection, ppo; all but prompt and answers
      optional.
    """
    results = _with_defaults(_plain(results), _SCHEMA)
    samples = [_plain(sample) for sample in samples]
    targets = check_targets(results)
    sections = build_sections(results, figures)
    title = (
        f"llama_jax: the recipe at size {results['size']}" if results.get("size") else "llama_jax: the recipe"
    )

    workdir = Path(workdir)
    paths = ReportPaths(workdir / "report.md", workdir / "report.html", workdir / "report.json")
    save(figures.values(), workdir / "figures")
    document = {**results, "annotator": "simulation", "targets": [dataclasses.asdict(t) for t in targets]}
    _write(paths.json, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    _write(paths.markdown, render_markdown(title, targets, sections, samples, figures=figures).encode())
    _write(paths.html, render_html(title, targets, sections, samples, figures=figures).encode())
    return paths


def render_markdown(
    title: str, targets: list[Target], sections: list[Section], samples: list[Mapping], *, figures: Mapping[str, Plot]
) -> str:
    """The report as Markdown; figures are links to `figures/<name>.png`."""
    marks = {True: "met", False: "**missed**", None: "not run"}
    rows = [[*map(verbatim, (t.stage, t.asked, t.measured)), marks[t.met]] for t in targets]
    blocks = [
        f"# {title}",
        f"> {SIMULATION_NOTE}",
        "## Targets",
        markdown_table(["stage", "target", "measured", ""], rows),
    ]
    blocks += _markdown_sections(sections, figures)
    if samples:
        blocks.append("## Sample dialogues")
    for index, sample in enumerate(samples, start=1):
        kind = " (safety)" if sample.get("is_safety") else ""
        blocks.append(f"### {index}{kind}\n\n{_quoted(prompt_text(sample['prompt']))}")
        if sample.get("reference"):
            blocks.append(f"Reference:\n\n{_quoted(sample['reference'])}")
        for version, answer in sample["answers"].items():
            utility = (sample.get("utility") or {}).get(version)
            score = "" if utility is None else f" (true utility {number(utility)})"
            blocks.append(f"{VERSIONS.get(version, version)}{score}:\n\n{_quoted(answer)}")
    return "\n\n".join(blocks) + "\n"


def markdown_sections(title: str, lead: str, sections: Sequence[Section], *, figures: Mapping[str, Plot]) -> str:
    """Any sections as Markdown; figures are links to `figures/<name>.png`."""
    return "\n\n".join([f"# {title}", lead, *_markdown_sections(sections, figures)]) + "\n"


def _markdown_sections(sections: Sequence[Section], figures: Mapping[str, Plot]) -> list[str]:
    blocks = []
    for section in sections:
        blocks += [f"## {section.title}", *section.notes, *(text_table(table.columns, table.rows) for table in section.tables)]
        blocks += [f"![{figures[name].alt}](figures/{name}.png)" for name in section.figures if name in figures]
    return blocks


def _quoted(text: str) -> str:
    """An indented block: the model's text is shown as it is, whatever Markdown it may contain."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _plain(value):
    """Dataclasses, numpy values and paths as JSON has them; a number that is not finite becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _with_defaults(results: Mapping, schema: Mapping) -> dict:
    merged = dict(results)
    for key, default in schema.items():
        if isinstance(default, Mapping):
            given = merged.get(key)
            # A number where an interval could stand is fine; an absent stage gets all its keys.
            if given is None or isinstance(given, Mapping):
                merged[key] = _with_defaults(given or {}, default)
        else:
            merged.setdefault(key, default)
    return merged


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)
