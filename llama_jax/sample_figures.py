"""Figures of scored samples of models (paper Figs. 7, 8, 20, 21, 29): `python -m llama_jax.sample_figures`.

    python -m llama_jax.sample_figures --samples=SFT=sft/samples.jsonl,RLHF=rlhf/samples.jsonl --output=/tmp/figures

Rows are those of rejection sampling, with a `temperature` for Figs. 8 and 21 (`evals/samples.py`). `--calibration=name=file`
takes rows with a reward model's `score` (logit) and the `ratings` that people gave the answer. The output directory appears
whole or not at all: `results.json`, `report.html`, and as PNG and SVG those figures for which the files have what they
need.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from llama_jax import command
from llama_jax.evals import model_figures, plots, samples
from llama_jax.evals.page import Chapter, page
from llama_jax.files import whole_directory, write_json


def run(
    files: Mapping[str, str | os.PathLike], output: str | os.PathLike, *, rated: Mapping[str, str | os.PathLike] | None = None
) -> dict[str, Any]:
    """Writes the report of {name: file of samples} and {name: file of `rated` answers}, and returns its values.

    Raises:
      ValueError, FileNotFoundError: wrong files, or nothing to show in them; nothing is at `output` then.
    """
    rows = {name: samples.read_samples(path) for name, path in files.items()}
    scored = {name: some for name, some in rows.items() if any(row.get("reward") is not None for row in some)}
    heated = {name: some for name, some in rows.items() if len({row.get("temperature") for row in some} - {None}) > 1}
    drawn, values = [], {}
    if scored:
        best = {name: samples.best_of(some) for name, some in scored.items()}
        rewards = {name: samples.rewards(some) for name, some in scored.items()}
        drawn += [model_figures.best_of_n(best), model_figures.reward_shift(rewards)]
        values["best_of_n"] = {name: _lists(of) for name, of in best.items()}
        values["mean_reward"] = {name: float(of.mean()) for name, of in rewards.items()}
    if maps := {name: samples.best_of_by_temperature(rows[name]) for name in heated if name in scored}:
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
        drawn.append(model_figures.calibration(values["calibration"]))
    if not drawn:
        raise ValueError(f"{', '.join(map(str, files.values()))}: expected rows with rewards, or with texts at temperatures")
    values["figures"] = {plot.name: {"title": plot.title, "alt": plot.alt} for plot in drawn}
    with whole_directory(output) as directory:
        plots.save(drawn, directory / "figures")
        write_json(directory / "results.json", values)
        text = page("Samples", "What scored samples show.", [Chapter(plot.title, plots=[plot]) for plot in drawn])
        (directory / "report.html").write_text(text, encoding="utf-8")
    return values


def _lists(best: Any) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in dataclasses.asdict(best).items()}


def main() -> None:
    """Flags to call."""
    run(_named("samples"), flags.FLAGS.output, rated=_named("calibration"))
    print(Path(flags.FLAGS.output) / "report.html")


def _named(flag: str) -> dict[str, str]:
    files = {}
    for item in flags.FLAGS[flag].value:
        name, found, path = item.partition("=")
        if not found:
            raise ValueError(f"--{flag}: expected name=file, got {item!r}")
        files[name] = path
    return files


if __name__ == "__main__":
    flags.DEFINE_list("samples", [], "name=file of each model's samples")
    flags.DEFINE_list("calibration", [], "name=file of each reward model's scores beside human ratings")
    flags.DEFINE_string("output", None, "directory to be made")
    flags.mark_flags_as_required(["output"])
    command.launch(main)
