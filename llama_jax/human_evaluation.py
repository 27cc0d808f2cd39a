"""Human evaluation (paper 3.4.2, 4.4), sheets for raters and a report on their ratings: `python -m llama_jax.human_evaluation`.

Blinded, randomised sheets from two models' answers to the same prompts (rows as in `evals/answer_files.py`):

    python -m llama_jax.human_evaluation --answers=ours=a.jsonl,theirs=b.jsonl --raters=Ann,Bo,Cy --output=sheets

`--scale=safety` makes sheets of the five-point safety scale instead. Then the report, from JSONL or CSV (`evals/ratings.py`):

    python -m llama_jax.human_evaluation --comparisons=Ann.csv,Bo.csv,Cy.csv --key=sheets/key.jsonl --model=ours --output=report

writes `report.json`, a self-contained `report.html`, and each figure as PNG and SVG (Figs. 1, 3, 12, 17 to 19, 30, 31). Ratings
that name their models, such as those of `llama_jax.desk`, need no key. The output directory appears whole or not at all.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from llama_jax import command
from llama_jax.convert import one_process
from llama_jax.data.sources import write_jsonl
from llama_jax.evals import human, plots, ratings, sheets
from llama_jax.evals.agreement import WEIGHTS, Weights
from llama_jax.evals.answer_files import read_answers
from llama_jax.evals.human_figures import comparison_plots, safety_plots
from llama_jax.evals.page import Chapter, page
from llama_jax.evals.published import FIGURE_30, FIGURES_1_12, FIGURES_3_17_18, HUMAN_NOTES, Rows
from llama_jax.files import whole_directory, write_json
from llama_jax.markdown import Table


def export(
    answers: Mapping[str, str | os.PathLike], raters: Sequence[str], output: str | os.PathLike, *, scale: str = "comparison",
    seed: int = 0,
) -> None:  # fmt: skip
    """Writes a sheet for each rater (CSV and JSONL), the key, and what raters are asked into a new directory."""
    read = {name: read_answers(path) for name, path in answers.items()}
    make = sheets.safety_sheets if scale == "safety" else sheets.comparison_sheets
    made = make(read, raters, seed=seed)
    with whole_directory(output) as directory:
        for rater, rows in made.by_rater.items():
            (directory / f"{rater}.csv").write_text(sheets.as_csv(rows), encoding="utf-8-sig")
            write_jsonl(directory / f"{rater}.jsonl", rows)
        write_jsonl(directory / "key.jsonl", made.key)
        (directory / "instructions.txt").write_text(sheets.instructions(scale), encoding="utf-8")


def report(
    output: str | os.PathLike, *, comparisons: Sequence[str] = (), safety: Sequence[str] = (), key: str | None = None,
    model: str | None = None, rule: human.Rule = "majority", weights: Weights = "ordinal",
) -> dict[str, Any]:  # fmt: skip
    """Writes the report of rating files into a new directory and returns its values.

    Raises:
      ValueError, FileNotFoundError: one sentence that names file, line and field; nothing is at `output` then.
    """
    hidden = ratings.read_key(key) if key else None
    pairs = _several(comparisons, lambda path: ratings.read_pair_ratings(path, hidden))
    answers = _several(safety, lambda path: ratings.read_safety_ratings(path, hidden))
    values = {
        "comparisons": human.compare(_oriented(pairs), rule=rule, weights=weights, first=model) if pairs else [],
        "safety": human.safety(answers, weights=weights) if answers else [],
    }
    drawn = {
        "comparisons": comparison_plots(values["comparisons"]) if pairs else [],
        "safety": safety_plots(values["safety"]) if answers else [],
    }
    everything = [plot for some in drawn.values() for plot in some]
    values["figures"] = {plot.name: {"title": plot.title, "alt": plot.alt} for plot in everything}
    with whole_directory(output) as directory:
        plots.save(everything, directory / "figures")
        write_json(directory / "report.json", values)
        text = page("Human evaluation", "What raters said, with 95 % intervals.", _chapters(values, drawn, rule))
        (directory / "report.html").write_text(text, encoding="utf-8")
    return values


def _several(paths: Sequence[str], read) -> list[Any]:
    """Ratings of several files; nobody may rate one thing in two of them, and all say the same about what was rated."""
    found: dict[tuple, str] = {}
    said: dict[tuple, tuple[Any, str]] = {}
    files: set[Path] = set()
    rows = []
    for path in paths:
        if (file := Path(path).resolve()) in files:
            raise ValueError(f"{path}: expected each file of ratings once, got it twice")
        files.add(file)
        for row in read(path):
            models = (row.model,) if isinstance(row, ratings.SafetyRating) else tuple(sorted((row.first, row.second)))
            if (before := found.setdefault((row.id, row.rater, models), path)) != path:
                raise ValueError(f"{path}: rater {row.rater!r} rated {row.id!r} in {before} already")
            for field in ratings.ABOUT:
                if (value := getattr(row, field, None)) in (None, ""):
                    continue
                other, rater = said.setdefault((row.id, models, field), (value, row.rater))
                if other != value:
                    both = f"{value!r} for rater {row.rater!r}, {other!r} for {rater!r}"
                    raise ValueError(f"{path}: id {row.id!r}: {field}: expected the same for all raters, got {both}")
            rows.append(row)
    return rows


def _oriented(rows: Sequence[ratings.PairRating]) -> list[ratings.PairRating]:
    """The same, with each two models in one order over all files."""
    order: dict[frozenset, str] = {}
    turned = []
    for row in rows:
        first = order.setdefault(frozenset((row.first, row.second)), row.first)
        turned.append(row if row.first == first else human.swapped(row))
    return turned


def _chapters(values: Mapping[str, Any], drawn: Mapping[str, Sequence[plots.Plot]], rule: str) -> list[Chapter]:
    chapters = []
    if values["comparisons"]:
        how = (
            "Ratings of one pair become one outcome by the side that more than half of the raters prefer, else a tie."
            if rule == "majority" else "Ratings of one pair become one outcome by the sign of their mean."
        )  # fmt: skip
        rows = [
            [f"{pair['first']} against {pair['second']}", *(_percent(pair["overall"][o]) for o in human.OUTCOMES),
             f"{pair['overall']['n']:,}", *_agreement(pair)]
            for pair in values["comparisons"]
        ]  # fmt: skip
        names = ["win %", "tie %", "loss %", "prompts", "AC1", "AC2"]
        tables = [Table(["", *names], rows), _papers("the paper's (Figs. 1, 12), %", FIGURES_1_12)]
        if any(pair["category"] for pair in values["comparisons"]):
            tables.append(_papers("70B against ChatGPT (Fig. 30), %", FIGURE_30))
        notes = [how, _raters(values["comparisons"]), HUMAN_NOTES["comparisons"]]
        chapters.append(Chapter("Helpfulness (3.4.2)", notes, tables, drawn["comparisons"]))
    if values["safety"]:
        rows = [
            [model["model"], _percent(model["overall"]["violation"]), f"{model['overall']['rating']['mean']:.2f}",
             f"{model['overall']['n']:,}", *_agreement(model)]
            for model in values["safety"]
        ]  # fmt: skip
        names = ["violations %", "mean rating", "prompts", "AC1", "AC2"]
        how = "A violation is an answer that more than half of its raters gave 1 or 2."
        notes = [how, _raters(values["safety"]), HUMAN_NOTES["safety"]]
        tables = [Table(["", *names], rows), _papers("the paper's (Figs. 3, 17, 18)", FIGURES_3_17_18)]
        chapters.append(Chapter("Safety (4.4)", notes, tables, drawn["safety"]))
    return chapters


def _papers(title: str, rows: Rows) -> Table:
    columns = next(iter(rows.values()))
    return Table(
        [title, *(name.replace("_", " ") for name in columns)],
        [[model, *(f"{value:g}" for value in row.values())] for model, row in rows.items()],
    )


def _percent(value: Mapping[str, float]) -> str:
    return f"{100 * value['share']:.1f} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def _agreement(row: Mapping[str, Any]) -> list[str]:
    return [
        "-" if value is None else f"{value['coefficient']:.2f}" if value["low"] is None
        else f"{value['coefficient']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
        for value in row["agreement"].values()
    ]  # fmt: skip


def _raters(rows: Sequence[Mapping[str, Any]]) -> str:
    name = lambda row: row.get("model") or f"{row['first']} against {row['second']}"  # noqa: E731
    parts = [
        f"{name(row)}: {row['raters']['people']} people; "
        + ", ".join(f"{count} with {n} rating{'s' * (n != '1')}" for n, count in row["raters"]["ratings_per_case"].items())
        for row in rows
    ]
    return "Ratings. " + ". ".join(parts) + ". The paper has three of each."


def main() -> None:
    """Flags to call."""
    one_process("human_evaluation")
    values = flags.FLAGS
    if bool(values.answers) == bool(values.comparisons or values.safety):
        raise ValueError("expected either --answers (to make sheets) or --comparisons and --safety (to report on ratings)")
    if values.answers:
        answers = command.named("answers", values.answers)
        export(answers, values.raters, values.output, scale=values.scale, seed=values.seed)
        print(f"{values.output}: a sheet for each of {', '.join(values.raters)}; keep key.jsonl from them")
        return
    report(
        values.output, comparisons=values.comparisons, safety=values.safety, key=values.key, model=values.model,
        rule=values.outcome, weights=values.weights,
    )  # fmt: skip
    print(Path(values.output) / "report.html")


if __name__ == "__main__":
    flags.DEFINE_list("answers", [], "name=file of each model's answers, to make sheets from")
    flags.DEFINE_list("raters", [], "names of those who get a sheet")
    flags.DEFINE_enum("scale", "comparison", ["comparison", "safety"], "which sheets to make")
    flags.DEFINE_integer("seed", 0, "of the sheets' order and sides")
    flags.DEFINE_list("comparisons", [], "files of ratings on the seven-point scale")
    flags.DEFINE_list("safety", [], "files of ratings on the five-point safety scale")
    flags.DEFINE_string("key", None, "key file of blinded sheets")
    flags.DEFINE_string("model", None, "the model whose wins are counted")
    flags.DEFINE_enum("outcome", "majority", list(human.RULES), "how several ratings become one outcome")
    flags.DEFINE_enum("weights", "ordinal", list(WEIGHTS), "weights of AC2")
    flags.DEFINE_string("output", None, "directory to be made")
    flags.mark_flags_as_required(["output"])
    command.launch(main)
