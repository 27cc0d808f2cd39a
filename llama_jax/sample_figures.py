"""Figures of scored samples of models (paper Figs. 7, 8, 16, 20, 21, 29): `python -m llama_jax.sample_figures`.

    python -m llama_jax.sample_figures --samples=SFT=sft/samples.jsonl,RLHF=rlhf/samples.jsonl --output=/tmp/figures
    python -m llama_jax.sample_figures --checkpoint=SFT=runs/sft,RLHF=runs/v5 --prompts=prompts.jsonl --answers=20 \\
        --temperatures=0.6,0.8,1.0,1.2 --helpfulness=runs/helpfulness --safety=runs/safety --output=/tmp/samples

Rows are those of rejection sampling, with a `temperature` for Figs. 8 and 21 (`evals/samples.py`). `--checkpoint` draws them
first and scores them by the reward models (`sample_drawing.py`); a run that is stopped goes on with the same command. The
`kind` of a prompt ("factual", "creative") gives Fig. 21 its panels. `--calibration=name=file` takes rows with a reward model's
`score` (logit) and the `ratings` that people gave the answer; `--rated=helpfulness=file` has rated answers scored by it.
`--distilled=name=workdir` shows a run of `configs/distill.py`: Fig. 16, its medians, and answers to read (Tables 13, 39).

`results.json`, `report.html`, and as PNG and SVG those figures for which the files have what they need. Without `--checkpoint`
a local output directory appears whole or not at all.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from llama_jax import command, sample_drawing
from llama_jax.annotation.tasks import read_prompt_list
from llama_jax.evals import distillation_figure, model_figures, plots, report_sections, samples
from llama_jax.evals.page import Chapter, page
from llama_jax.evals.published_alignment import FIGURE_7, FIGURE_8, FIGURE_21, FIGURE_29
from llama_jax.files import whole_directory, write_json
from llama_jax.kept_answers import define_engines
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.hosts import from_host_0, on_host_0
from llama_jax.parallel.mesh import start_distributed
from llama_jax.parallel.output import worked_in
from llama_jax.paths import is_remote

Files = Mapping[str, str | os.PathLike]

_PAPER = {"best_of_n": FIGURE_7, "temperature_map": FIGURE_8, "self_bleu": FIGURE_21, "calibration": FIGURE_29}


def run(
    files: Files, output: str | os.PathLike, *, rated: Files | None = None, distilled: Files | None = None
) -> dict[str, Any]:
    """Writes the report of {name: file of samples}, {name: file of `rated` answers} and {name: workdir} of runs that
    `distilled`, and returns its values.

    Raises:
      ValueError, FileNotFoundError: wrong files, or nothing to show in them; nothing is at `output` then.
    """
    values, drawn = figures_of(files, rated=rated, distilled=distilled)
    with whole_directory(output) as directory:
        write(values, drawn, directory)
    return values


def figures_of(
    files: Files, *, rated: Files | None = None, distilled: Files | None = None
) -> tuple[dict[str, Any], list[plots.Plot]]:
    """What the files show, as numbers with notes on what they leave out, and as figures. Raises as `run`."""
    rows = {name: samples.read_samples(path) for name, path in files.items()}
    scored = {name: some for name, some in rows.items() if any(row.get("reward") is not None for row in some)}
    heated = {name: some for name, some in rows.items() if len({row.get("temperature") for row in some} - {None}) > 1}
    drawn, values, notes = [], {}, []
    worth = {name: samples.choosable(some)[0] for name, some in scored.items()}
    curves = {name: samples.best_of_by_temperature(worth[name]) for name in heated if name in scored}
    maps = {name: of for name, of in curves.items() if of}
    if scored:
        chosen, scores = dict(worth), dict(scored)
        for name, of in maps.items():
            best, n = model_figures.best_temperature(of)
            chosen[name], scores[name] = (samples.by_temperature(some[name])[best] for some in (worth, scored))
            notes.append(f"{name}: Figs. 7 and 20 are of temperature {best:g}, at which the best of {n} samples is highest")
        best = {name: samples.best_of(some) for name, some in chosen.items()}
        rewards = {name: samples.rewards(some) for name, some in scores.items()}
        drawn += [model_figures.best_of_n(best), model_figures.reward_shift(rewards)]
        values["best_of_n"] = {name: _lists(of) for name, of in best.items()}
        values["mean_reward"] = {name: float(of.mean()) for name, of in rewards.items()}
    if maps:
        drawn.append(model_figures.temperature_map(maps))
        values["temperature_map"] = {name: {str(t): _lists(b) for t, b in of.items()} for name, of in maps.items()}
    texts = {name: [row for row in rows[name] if row.get("text")] for name in heated}
    if bleu := {name: found for name, some in texts.items() if (found := samples.self_bleu_by_temperature(some))}:
        drawn.append(model_figures.self_bleu(bleu))
        values["self_bleu"] = {
            name: {kind: {str(t): of for t, of in points.items()} for kind, points in kinds.items()}
            for name, kinds in bleu.items()
        }
    if rated:
        values["calibration"] = {name: samples.calibration_of(path) for name, path in rated.items()}
        counts = {name: samples.unread(path) for name, path in rated.items()}
        notes += [f"{name}: {n:,} rated answers have no score and are not in Fig. 29" for name, n in counts.items() if n]
        drawn.append(model_figures.calibration(values["calibration"]))
    if distilled:
        runs = {name: distillation_figure.read_run(workdir) for name, workdir in distilled.items()}
        values["distillation"] = {name: distillation_figure.described(*run) for name, run in runs.items()}
        drawn += [distillation_figure.scores(*run, of=name) for name, run in runs.items()]
    if not drawn:
        raise ValueError(f"{', '.join(map(str, files.values()))}: expected rows with rewards, or with texts at temperatures")
    for name, some in rows.items():
        notes += [f"{name}: {said}" for said in _left_out(some, scored=name in scored, heated=name in heated)]
    values["notes"] = notes
    values["figures"] = {plot.name: {"title": plot.title, "alt": plot.alt} for plot in drawn}
    return values, drawn


def _left_out(rows: list[dict[str, Any]], *, scored: bool, heated: bool) -> list[str]:
    """Which samples a figure does not show, and where curves are cut for want of some."""

    def count(words: str, kept: Any) -> list[str]:
        missing = sum(not kept(row) for row in rows)
        return [f"{missing:,} of {len(rows):,} samples {words}"] if missing else []

    said = []
    if scored:
        said += [found] if (found := samples.choosable(rows)[1]) else []
        said += count("have no reward and are in no curve of one", lambda row: row.get("reward") is not None)
        by_temperature = samples.by_temperature(rows) if heated else {None: rows}
        said += [
            found if temperature is None else f"at temperature {temperature:g} {found}"
            for temperature, some in by_temperature.items() if (found := samples.cut(some))
        ]  # fmt: skip
    if heated:
        said += count("have no temperature and are not in Figs. 8 and 21", lambda row: row.get("temperature") is not None)
        said += count("say nothing and are not in Fig. 21", lambda row: row.get("text"))
    return said


def write(values: dict[str, Any], drawn: list[plots.Plot], directory: Path) -> None:
    """The figures, `results.json` and `report.html`."""
    plots.save(drawn, directory / "figures")
    write_json(directory / "results.json", values)
    chapters = [_chapter(plot, values.get("distillation", {})) for plot in drawn]
    if values["notes"]:
        chapters.append(Chapter("Notes", notes=values["notes"]))
    (directory / "report.html").write_text(page("Samples", "What scored samples show.", chapters), encoding="utf-8")


def _chapter(plot: plots.Plot, distilled: Mapping[str, Any]) -> Chapter:
    """A figure with the paper's numbers, and of a run that distilled what the recipe's report says too."""
    found = next((found for name, found in distilled.items() if plot.name == f"distillation_{name}"), None)
    if found is None:
        return Chapter(plot.title, tables=[_PAPER[plot.name]] if plot.name in _PAPER else [], plots=[plot])
    section = report_sections.distillation(found)
    return Chapter(plot.title, section.notes, section.tables, [plot])


def _lists(best: Any) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in dataclasses.asdict(best).items()}


def main() -> None:
    """Flags to calls."""
    values = flags.FLAGS
    files, calibrated = command.named("samples", values.samples), command.named("calibration", values.calibration)
    distilled = command.named("distilled", values.distilled, "workdir")
    command.check_directories("distilled", distilled)  # figures are named after them
    if values.checkpoint or values.rated:
        draw(files, calibrated, distilled, values)
        return
    if given := [flag for flag in ("prompts", *sample_drawing.TRACKS) if values[flag].value]:
        raise ValueError(f"--{given[0]}: is for samples that are drawn; expected --checkpoint or --rated beside it")
    with worked_in(values.output) as output:
        if is_remote(values.output) and any(output.iterdir()):  # `run` would name the copy of it on this machine
            raise FileExistsError(f"{values.output}: exists already; expected a new or an empty directory")
        run(files, output, rated=calibrated, distilled=distilled)
    print(os.path.join(values.output, "report.html"))


def draw(files: dict[str, str], calibrated: dict[str, str], distilled: dict[str, str], values: Any) -> None:
    """Draws samples by the flags and shows them beside those of `files` and of runs that `distilled`."""
    models = sample_drawing.Models(
        command.named("checkpoint", values.checkpoint, "checkpoint"),
        {track: values[track].value for track in sample_drawing.TRACKS if values[track].value},
        values.tokenizer, values.slots, values.mesh_tensor,
    )  # fmt: skip
    rated = command.named("rated", values.rated)
    for flag, more, known in (("samples", models.checkpoints, files), ("calibration", rated, calibrated)):
        if twice := sorted(more.keys() & known.keys()):
            raise ValueError(f"--{flag}: {twice[0]!r} is drawn here too; expected a name for each")
    if unknown := rated.keys() - models.rewards.keys():
        raise ValueError(f"--rated: {min(unknown)!r}: expected the name of a reward model that is given: helpfulness or safety")
    if models.checkpoints and not values.prompts:
        raise ValueError("--prompts: missing; checkpoints need prompts to answer")
    how = sample_drawing.Drawing(
        tuple(map(_number, values.temperatures)), values.answers, values.max_tokens, values.top_p, values.seed
    )
    keep_heap()
    start_distributed()
    for path in files.values():
        from_host_0(lambda path=path: len(samples.read_samples(path)))  # before hours of drawing
    for workdir in distilled.values():
        from_host_0(lambda workdir=workdir: len(distillation_figure.read_run(workdir)))
    prompts = from_host_0(lambda: read_prompt_list(values.prompts)) if models.checkpoints else []
    with worked_in(values.output) as output:
        made, scored = sample_drawing.draw(models, prompts, how, output, rated=rated)

        def finish() -> None:
            write(*figures_of({**files, **made}, rated={**calibrated, **scored}, distilled=distilled), output)

        on_host_0(finish)
    on_host_0(print, os.path.join(values.output, "report.html"))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--temperatures: expected numbers, got {text!r}") from None


if __name__ == "__main__":
    flags.DEFINE_list("samples", [], "name=file of each model's samples")
    flags.DEFINE_list("calibration", [], "name=file of each reward model's scores beside human ratings")
    flags.DEFINE_list("distilled", [], "name=workdir of each run of configs/distill.py (Fig. 16)")
    flags.DEFINE_string("output", None, "directory to be made, gs://bucket/... too; with --checkpoint an old one is continued")
    flags.DEFINE_list("checkpoint", [], "name=checkpoint of each model whose samples are drawn")
    flags.DEFINE_string("prompts", "", "JSONL file of prompts for --checkpoint, with a `kind` each for Fig. 21")
    flags.DEFINE_string("helpfulness", "", "reward model that scores what is drawn")
    flags.DEFINE_string("safety", "", "the same; with both, a sample's reward is the combined one of 3.2.3")
    flags.DEFINE_list("rated", [], "helpfulness=file, safety=file: answers with people's `ratings`, to be scored (Fig. 29)")
    flags.DEFINE_list("temperatures", ["1.0"], "of the samples; Fig. 8 has 0.6 to 1.5, Fig. 21 0.1 to 1.5")
    flags.DEFINE_integer("answers", 20, "samples of each prompt at each temperature; Fig. 8 has 100, Fig. 21 has 25")
    flags.DEFINE_integer("max_tokens", 512, "longest sample")
    flags.DEFINE_float("top_p", 1.0, "nucleus")
    flags.DEFINE_integer("seed", 0, "of the samples")
    define_engines("samples drawn together")
    flags.mark_flags_as_required(["output"])
    command.launch(main)
