"""The report of an evaluation: tables beside the paper's own numbers, differences with intervals, plots.

Tables 3, 11, 14, 19 to 25 and 44 to 50. Written as results.json for programs, report.md, and a report.html that needs nothing
beside it and shows what the models answered to some prompts of the safety benchmarks, side by side.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.evals import benchmark_figures
from llama_jax.evals.groups import GROUPS, MMLU_PARTS, TITLES, families, family_of, lower_is_better, plain
from llama_jax.evals.plots import save
from llama_jax.evals.published import MATH_NOTE, published
from llama_jax.evals.published import cell as papers
from llama_jax.evals.report import markdown_sections
from llama_jax.evals.report_html import render_page
from llama_jax.evals.report_sections import Section
from llama_jax.evals.statistics import ends_of, is_clear
from llama_jax.files import atomic_write, write_json
from llama_jax.markdown import Table

_LEAD = (
    "Benchmarks of the Llama 2 paper, beside the paper's own numbers. Percent, unless a table says otherwise; ± is one "
    "standard error; where all answers are wrong, or all right, the 95 % interval stands in brackets."
)
_PROMPTS = (
    "The paper's prompts were never published. These are the prompts of lm-evaluation-harness (SQuAD and QuAC: of GPT-3's "
    "paper), so a few points of difference from the paper's numbers mean nothing; between the models of one report they do."
)
_FAMILY_TASKS = ("mmlu", "bbh", "agieval", "math", "toxigen", "bold")
_AVERAGED = ("mmlu", "bbh", "agieval", "math")  # families with a row of their own among the tasks
_NO_METRICS = ("value", "stderr")  # of a record's numbers
_SHOWN = 4  # prompts of a safety benchmark whose answers stand side by side


def write(values: Mapping[str, Any], output: Path, *, paper: Sequence[str]) -> None:
    """Writes the files of a report; `values` is what `evaluate.run` returns."""
    known = {model: published(model) for model in paper}
    sections = build(values, known)
    figures = benchmark_figures.draw(values, known)
    save(figures.values(), output / "figures")
    title = f"Evaluation: {values['suite']}"
    write_json(output / "results.json", values)
    _write(output / "report.md", markdown_sections(title, _LEAD, sections, figures=figures).encode())
    shown = samples(values["models"], output)
    _write(output / "report.html", render_page(title, _LEAD, sections, figures=figures, samples=shown).encode())


def samples(models: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Some prompts of each safety benchmark, evenly over it, with each model's answer, as `report_html` takes them.

    The examples before a question of TruthfulQA, which all have, are left out.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    for model in models:
        for path in sorted((output / model / "safety").glob("*.json")):
            kept = json.loads(path.read_text(encoding="utf-8"))
            for prompt, answer in zip(kept["prompts"], kept["answers"], strict=True):
                found.setdefault(path.stem, {}).setdefault(prompt, {})[model] = answer
    return [
        {"prompt": f"{TITLES[name].partition(' (')[0]}: " + prompt.rstrip().rpartition("\n\n")[2], "answers": prompts[prompt]}
        for name, prompts in found.items() for prompt in list(prompts)[:: -(-len(prompts) // _SHOWN)]
    ]  # fmt: skip


def build(values: Mapping[str, Any], known: Mapping[str, Mapping[str, float]]) -> list[Section]:
    """The report as titled sections."""
    models = values["models"]
    sections = [_groups(models, known), *_tasks(models, known), *_differences(values)]
    notes = [*values["notes"], *([] if sections[0] else _left_out(models, ())), _PROMPTS]
    if values["limit"]:
        notes.insert(0, f"The first {values['limit']} rows of each task only: a trial, not a result.")
    if "math" in benchmark_figures.shown(models, GROUPS):
        notes.append(MATH_NOTE)
    return [section for section in sections if section is not None] + [Section("Notes", notes=notes)]


def _groups(models, known) -> Section | None:
    names = benchmark_figures.shown(models, (*GROUPS, "truthfulqa", "toxigen"))
    if not names:
        return None
    rows, notes = [], []
    for model, row in models.items():
        rows.append([model, *(cell(row["groups"].get(name)) for name in names)])
    for name in names:
        if missing := _missing(models, name):
            notes.append(f"{TITLES[name]}: without {', '.join(missing)}, so not the paper's average.")
    notes += _left_out(models, names)
    for model, columns in known.items():
        rows.append([f"{model} (paper)", *(_number(columns.get(name)) for name in names)])
    table = Table(["model", *(TITLES[name] for name in names)], rows)
    tables = [*(["3"] if {*names} & {*GROUPS} else []), *(["11", "14"] if {*names} - {*GROUPS} else [])]
    title = f"Averages by group (Table{'s' * (len(tables) > 1)} {', '.join(tables)})"
    return Section(title, notes=notes, tables=[table], figures=["groups"])


def _left_out(models, names: Sequence[str]) -> list[str]:
    """Notes on groups of which a task was run, but too few for an average."""
    begun = [name for name in GROUPS if name not in names and any(name in row["groups"] for row in models.values())]
    return [f"{TITLES[name]}: no average, without {', '.join(_missing(models, name))}." for name in begun]


def _missing(models, name: str) -> list[str]:
    """The tasks of a group that at least one of the models lacks."""
    return list(dict.fromkeys(each for row in models.values() for each in row["groups"].get(name, {}).get("missing", ())))


def _tasks(models, known) -> list[Section]:
    """One table of single tasks and of families' averages, then one for each family."""
    columns = ["task", "metric", "shots", "n", *models, *(f"{model} (paper)" for model in known)]
    tasks = list(dict.fromkeys(task for row in models.values() for task in row["tasks"]))
    names = list(dict.fromkeys(map(family_of, tasks)))
    rows: list[list[str]] = []
    for task in (name for name in names if name in tasks):
        found = [row["tasks"].get(task) for row in models.values()]
        rows += [_row(task, found, known), *_other_metrics(task, found, known)]
    for family in (name for name in names if plain(name) in _AVERAGED and name not in tasks):
        rows.append(_row(family, _like_its_tasks(family, models, lambda row, f=family: families(row["tasks"]).get(f)), known))
    sections = [Section("Tasks", tables=[Table(columns, rows)])] if rows else []
    for family in (name for kind in _FAMILY_TASKS for name in names if plain(name) == kind):
        members = [task for task in tasks if family_of(task) == family and task != family]
        if not members:
            continue
        rows = [_row(task, [row["tasks"].get(task) for row in models.values()], known) for task in members]
        tables, notes = [Table(columns, rows)], []
        if family == "mmlu":
            parts = [part for part in MMLU_PARTS if any(part in row["groups"] for row in models.values())]
            averages = {part: _like_its_tasks(family, models, lambda row, p=part: row["groups"].get(p)) for part in parts}
            tables.insert(0, Table(columns, [_row(part, found, known) for part, found in averages.items()]))
            notes.append("First the averages of Table 19, over questions, then each of its tasks.")
        if family == "bold":
            notes.append("VADER's compound score, from -1 to 1.")
        title = TITLES[plain(family)] + (f", {family.partition('@')[2]} shots" if "@" in family else "")
        sections.append(Section(title, notes=notes, tables=tables))
    return sections


def _like_its_tasks(family: str, models, average) -> list[dict[str, Any] | None]:
    """Each model's average, with metric and shots of the tasks that it is over."""
    sample = next(record for row in models.values() for task, record in row["tasks"].items() if family_of(task) == family)
    about = {"metric": sample["metric"], "shots": sample.get("shots")}
    return [found and {**found, **about} for found in map(average, models.values())]


def _row(
    task: str, found: Sequence[Mapping[str, Any] | None], known: Mapping[str, Mapping[str, float]], *, beside: bool = True
) -> list[str]:  # fmt: skip
    """A task's row; the paper's cells are those of the same metric and number of examples, or "-"."""
    first = next(record for record in found if record)
    unit, digits = (1.0, 2) if family_of(task) == "bold" else (100.0, 1)
    metric, shots = str(first["metric"]), first.get("shots")
    theirs = []
    for columns in known.values():
        value = papers(columns, task, metric=metric, shots=shots) if beside else None
        theirs.append(_number(value if value is None else value * unit / 100, digits))
    name = TITLES[task] if task in MMLU_PARTS else plain(task).partition(":")[2] or plain(task)
    return [
        name.replace("_", " "), metric, "" if shots is None else str(shots), f"{first['n']:,}",
        *(cell(record, unit=unit) for record in found), *theirs,
    ]  # fmt: skip


def _other_metrics(task: str, found: Sequence[Mapping[str, Any] | None], known) -> list[list[str]]:
    """Rows of what else was measured of the same answers: SQuAD's F1, the other kinds of ROUGE, pass@k of fewer samples."""
    first = next(record for record in found if record)
    rows = []
    for name in (key for key, value in first.items() if isinstance(value, float) and key not in _NO_METRICS):
        same = [record and {**record, "metric": name, "value": record.get(name), "stderr": None} for record in found]
        # pass@1 beside pass@100 was drawn at another temperature than the paper's pass@1.
        rows.append(_row(task, same, known, beside=name != "pass@1"))
    return rows


def _differences(values) -> list[Section]:
    sections = []
    for other, found in values["differences"].items():
        rows = []
        for kind in ("groups", "tasks"):
            for name, row in found[kind].items():
                if kind == "tasks" and (family_of(name) != name or name in found["groups"]):
                    continue
                better = (row["low"] > 0) != lower_is_better(name, values["tasks"])
                clear = ("better" if better else "worse") if is_clear(row) else ""
                text = f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
                rows.append([TITLES.get(name, name.replace("_", " ")), text, clear])
        notes = [
            "Points, with the 95 % interval of a paired bootstrap over questions. A word stands where the interval leaves out "
            "0; with many rows, one in twenty does so by chance."
        ]
        title = f"{other} beside {found['to']}"
        table = Table(["", f"{other} minus {found['to']}", ""], rows)
        sections.append(Section(title, notes=notes, tables=[table], figures=[f"difference_{other}"]))
    return sections


def cell(record: Mapping[str, Any] | None, *, unit: float = 100.0) -> str:
    """A value with its standard error."""
    if not record or record["value"] is None or not math.isfinite(record["value"]):
        return "not run"
    digits = 1 if unit == 100.0 else 2
    error = f" ± {unit * record['stderr']:.{digits}f}" if record["stderr"] else ""
    if record["stderr"] == 0 and record["value"] in (0.0, 1.0) and unit == 100.0:
        low, high = ends_of(record)
        error = f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{unit * record['value']:.{digits}f}{error}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)
