"""Studies of reward models: `python -m llama_jax.reward_study --config=configs/reward_study.py:tiny --workdir=...`.

Trains one reward model after another and compares their held-out reports:

    margins      none, small, large, on all pairs (Tables 27 and 28, Fig. 27)
    scaling      the first 1, 2, ... batches of the pairs, at each size that has a start (Fig. 6)
    safety_loss  safety models without and with the auxiliary loss (Table 29); with `safety_loss`
    conflict     scores of a helpfulness and a safety model on safe and unsafe answers (Fig. 32), and the answers on which they
                 differ most (Table 35); with `helpfulness`, `safety`

Each run is a stage in the workdir, resumed and not repeated; the last step writes `study.json`, `study.md` and the figures, and
for `conflict` every answer with both scores, `conflict.jsonl`.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from llama_jax import command
from llama_jax.config import ConfigError, describe, parse
from llama_jax.data.dialog import Message
from llama_jax.data.rows import write_jsonl
from llama_jax.data.sources import RATINGS, REJECTED_SAFE, read_comparisons
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals import reward_figures
from llama_jax.evals.plots import save
from llama_jax.evals.report_sections import prompt_text
from llama_jax.files import write_json, write_text
from llama_jax.interop.restore import restore_model
from llama_jax.markdown import markdown_table, verbatim
from llama_jax.model import params as table
from llama_jax.model.config import size
from llama_jax.parallel.host import keep_compiled, keep_heap
from llama_jax.parallel.hosts import exist, on_host_0
from llama_jax.parallel.mesh import make_mesh, start_distributed
from llama_jax.pretrain.base import check_reward_model, load_tokenizer
from llama_jax.reward.comparisons import encode_comparisons
from llama_jax.reward.held_out import SAFE, percent, share
from llama_jax.reward.preference_report import batch_name
from llama_jax.reward.published import FIGURE_6, TABLE_28, TABLE_29
from llama_jax.rlhf.scoring import sigmoid_scores
from llama_jax.steps import change, load_config
from llama_jax.train import parse_stage
from llama_jax.train import run as run_stage
from llama_jax.training.loop import Diverged, claim

_SHOWN = 400  # characters of a text in study.md


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """See configs/reward_study.py.

    reward: the stage's config by file and argument, `{size}` in the place of the size; `overrides` changes fields of it.
    starts: workdirs that the models of `sizes` start from, one for each size.
    batches: parts of the pairs for the scaling study, in the order of the file, or of the rows' own `batch` where they have
      one; 0: no scaling study.
    safety_loss: weights of the auxiliary loss, a safety model each; the paper compares 0 and a weight that it does not print.
    """

    configs: str
    reward: str
    overrides: dict[str, Any]
    tokenizer: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    margins: tuple[str, ...]
    sizes: tuple[str, ...]
    starts: tuple[str, ...]
    batches: int
    helpfulness: str
    safety: str
    safety_loss: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.sizes or len(self.sizes) != len(self.starts):
            raise ValueError(f"starts: expected a workdir for each of the sizes {self.sizes}, got {self.starts}")
        if len(self.sizes) > 1 and "{size}" not in self.reward:
            raise ValueError(f"reward: expected {{size}} in the place of the sizes {self.sizes}, got {self.reward!r}")
        if not self.train or not self.held_out:
            raise ValueError("train, held_out: expected at least one file of comparisons each")
        if bool(self.helpfulness) != bool(self.safety):
            raise ValueError("helpfulness, safety: expected both workdirs, or neither")
        if any(weight < 0 for weight in self.safety_loss) or len(set(map(_name, self.safety_loss))) < len(self.safety_loss):
            raise ValueError(f"safety_loss: expected different weights of at least 0, got {self.safety_loss}")


def run(config: StudyConfig, workdir: Path) -> dict[str, Any]:
    """All runs, then the report; returns its values."""
    # What is wrong with the labels is said before days of training.
    labelled = labelled_answers(config) if config.helpfulness else {}
    if config.safety_loss:
        check_safety_bins(config)
    check_runs(config)
    files = cumulative_batches(config.train, workdir / "batches", config.batches) if config.batches else {}
    first, start = config.sizes[0], config.starts[0]
    margins = {
        margin: train_one(config, workdir / f"margin_{margin}", first, start, config.train, of_margin(margin))
        for margin in config.margins
    }
    scaling: dict[str, list[dict[str, Any]]] = {}
    for model, begin in zip(config.sizes, config.starts):
        for number, (path, pairs) in enumerate(files.items(), start=1):
            report = train_one(config, workdir / f"scaling_{model}_{number}", model, begin, (path,), {})
            row = {"batch": number, "pairs": pairs, "accuracy": report["accuracy"]["all"]}
            scaling.setdefault(model, []).append(row)
    weights = {
        _name(weight): train_one(
            config, workdir / f"safety_loss_{_name(weight)}", first, start, config.train, of_safety_loss(weight)
        )
        for weight in config.safety_loss
    }
    values: dict[str, Any] = {
        "margins": {name: {key: report[key] for key in ("accuracy", "histogram")} for name, report in margins.items()},
        "scaling": scaling,
        "safety_loss": {name: {key: report[key] for key in ("accuracy", "safety")} for name, report in weights.items()},
    }
    if config.helpfulness:
        rows = conflict(config, labelled)
        on_host_0(write_jsonl, workdir / "conflict.jsonl", rows)
        values["conflict"] = conflict_values(rows)
    on_host_0(write_study, values, workdir)
    return values


def of_margin(margin: str) -> dict[str, Any]:
    """What the config of one of `margins` changes."""
    return {"margin": margin}


def of_safety_loss(weight: float) -> dict[str, Any]:
    """What the config of one of `safety_loss` changes."""
    return {"name": "safety", "safety_weight": weight}


def check_runs(config: StudyConfig) -> None:
    """ConfigError for a run that could not begin: the last one may be days away."""
    sizes = list(zip(config.sizes, config.starts))
    runs = [(sizes[0], changes) for changes in (*map(of_margin, config.margins), *map(of_safety_loss, config.safety_loss))]
    runs += [(one, {}) for one in sizes] if config.batches else []
    for (model, start), changes in runs:
        load_tokenizer(parse_stage(stage_values(config, model, start, config.train, changes)))


def train_one(
    config: StudyConfig, workdir: Path, model: str, start: str, train: Sequence[str], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Trains one reward model, unless that is done; its held-out report, with a row "all" whatever the sources are."""
    values = stage_values(config, model, start, train, changes)
    print(f"{workdir.name} ...", file=sys.stderr, flush=True)
    run_stage(values, workdir)
    report = read_report(workdir)
    accuracy = report["accuracy"]
    if "all" not in accuracy:  # one source alone
        accuracy["all"] = next(row for name, row in accuracy.items() if name != "longer")
    return report


def stage_values(
    config: StudyConfig, model: str, start: str, train: Sequence[str], changes: Mapping[str, Any]
) -> Any:
    """The reward stage's config of one run."""
    # Learning rate, context and mesh are those of the size.
    values = load_config(Path(config.configs), config.reward.replace("{size}", model))
    change(values, config.overrides, where="overrides")
    data = {"train": tuple(train), "held_out": config.held_out, "shares": ()}
    change(values, {"model": model, "start": start, "tokenizer": config.tokenizer, "data": data, **changes}, where="reward")
    return values


def read_report(workdir: Path) -> dict[str, Any]:
    """The held-out report that the reward stage left in its workdir."""
    return json.loads((workdir / "reward_report.json").read_text())


def cumulative_batches(paths: Sequence[str], directory: Path, count: int) -> dict[str, int]:
    """Writes the first 1, 2, ... parts of the pairs as files of their own; {path: pairs}.

    Rows with a `batch` are parted by it, in the order in which batches come; others into `count` equal parts.
    """
    rows = [row for path in paths for row in read_comparisons(path)]
    batches = [batch_name(row) for row in rows]
    names = list(dict.fromkeys(batches))
    if len(names) > 1:
        rows = sorted(rows, key=lambda row: names.index(batch_name(row)))
        ends = list(np.cumsum([batches.count(name) for name in names]))
    else:
        ends = [round(len(rows) * (part + 1) / count) for part in range(count)]
    if not ends[0]:
        raise ConfigError(f"batches: {len(rows)} pairs cannot be divided into {count} parts")
    files = {}
    directory.mkdir(parents=True, exist_ok=True)
    for number, end in enumerate(ends, start=1):
        path = directory / f"first_{number}.jsonl"
        kept = [{key: value for key, value in row.items() if value is not None} for row in rows[:end]]
        if not all(exist([path])):
            on_host_0(write_jsonl, path, kept)
        files[str(path)] = int(end)
    return files


def check_safety_bins(config: StudyConfig) -> None:
    """ConfigError if the auxiliary loss has no unsafe answer to learn from, or Table 29 none to measure."""
    for field in ("train", "held_out"):
        bins = {row["safety_bin"] for path in getattr(config, field) for row in read_comparisons(path)}
        if not any(name in SAFE and not all(SAFE[name]) for name in bins):
            raise ConfigError(f"{field}: expected pairs whose `safety_bin` is chosen_safe or both_unsafe for `safety_loss`")


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """A held-out answer: as text, and the ids of the whole dialog."""

    messages: Sequence[Message]
    text: str
    ids: np.ndarray  # int32 [n]


def labelled_answers(config: StudyConfig) -> dict[str, list[Answer]]:
    """The held-out answers with a safety label, "safe" and "unsafe"; ConfigError if `conflict` cannot be made."""
    stage, words = conflict_stage(config), Tokenizer(config.tokenizer)
    for name in ("helpfulness", "safety"):
        check_reward_model(name, getattr(config, name), size(stage.model), words)
    answers: dict[str, list[Answer]] = {"safe": [], "unsafe": []}
    for path in config.held_out:
        rows = [row for row in read_comparisons(path) if row["safety_bin"] != REJECTED_SAFE]
        # However long, so that a pair stands where its row does.
        pairs = encode_comparisons(path, words, length=sys.maxsize, margin="none")
        for row, pair in zip(rows, pairs, strict=True):
            if pair.tokens > stage.data.length:
                continue
            texts, ids = (row["chosen"], row["rejected"]), (pair.chosen, pair.rejected)
            for text, of_text, safe in zip(texts, ids, SAFE.get(pair.safety_bin, ())):
                answers["safe" if safe else "unsafe"].append(Answer(row["prompt"], text, of_text))
    if not all(answers.values()):
        raise ConfigError(f"held_out: expected answers of both kinds by `safety_bin`, got {_counts(answers)}")
    return answers


def conflict_stage(config: StudyConfig) -> Any:
    """The reward stage's config for the first size, the one of both judging models."""
    return parse_stage(stage_values(config, config.sizes[0], config.starts[0], config.train, {}))


def conflict(config: StudyConfig, answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """Scores in (0, 1) of both models on the held-out answers with a safety label (Fig. 32): a row for each answer,
    {"messages", "answer", "label": "safe" or "unsafe", "helpfulness", "safety"}."""
    stage = conflict_stage(config)
    model, mesh = size(stage.model), make_mesh(stage.mesh)
    specs = table.table(model, head="reward_head")
    labelled = [(label, answer) for label, some in answers.items() for answer in some]
    rows = [{"messages": list(answer.messages), "answer": answer.text, "label": label} for label, answer in labelled]
    ids = [answer.ids for _, answer in labelled]
    with jax.set_mesh(mesh):
        for name in ("helpfulness", "safety"):
            tree = restore_model(getattr(config, name), specs, mesh)
            found = sigmoid_scores(
                model, stage.compute, tree, ids, [[]] * len(ids), length=stage.data.length, batch_size=stage.loop.batch_size
            )
            for row, score in zip(rows, found, strict=True):
                row[name] = round(float(score), 5)
    return rows


def conflict_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the report says of the rows of `conflict`: {"scores": {label: {model: scores}}, "shares", "examples"}."""
    scores = {
        label: {name: [row[name] for row in rows if row["label"] == label] for name in ("helpfulness", "safety")}
        for label in ("safe", "unsafe")
    }
    return {"scores": scores, "shares": conflict_shares(scores), "examples": disagreements(rows)}


def disagreements(rows: Sequence[Mapping[str, Any]], *, count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """The answers that one model scores most above the other, each way, the largest difference first (Table 35).

    The same answer in several pairs is one.
    """

    def most(above: str, below: str) -> list[dict[str, Any]]:
        different = {(prompt_text(row["messages"]), row["answer"]): dict(row) for row in rows if row[above] > row[below]}
        return sorted(different.values(), key=lambda row: row[below] - row[above])[:count]

    return {"safety_above": most("safety", "helpfulness"), "helpfulness_above": most("helpfulness", "safety")}


def conflict_shares(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """How often the models pull apart: safe but unhelpful among safe answers, helpful but unsafe among unsafe ones."""
    safe, unsafe = ({name: np.asarray(values) for name, values in scores[kind].items()} for kind in ("safe", "unsafe"))
    return {
        "safe_but_unhelpful": share((safe["safety"] > 0.5) & (safe["helpfulness"] < 0.5)),
        "helpful_but_unsafe": share((unsafe["safety"] < 0.5) & (unsafe["helpfulness"] > 0.5)),
    }


def _counts(answers: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"{len(found)} {kind}" for kind, found in answers.items())


def write_study(values: Mapping[str, Any], workdir: Path) -> None:
    """study.json, study.md and a figure for each study that was made."""
    write_json(workdir / "study.json", values)
    write_text(workdir / "study.md", markdown(values))
    plots = []
    if values["margins"]:
        plots.append(reward_figures.margins({name: report["histogram"] for name, report in values["margins"].items()}))
    if values["scaling"]:
        plots.append(reward_figures.scaling(values["scaling"]))
    if "conflict" in values:
        plots.append(reward_figures.conflict(values["conflict"]["scores"]))
    save(plots, workdir)


def markdown(values: Mapping[str, Any]) -> str:
    """The tables, accuracies in percent with their 95 % intervals; the paper's below each."""
    parts = ["# Reward models", "Percent, with 95 % intervals."]
    if values["margins"]:
        rows = {name: report["accuracy"]["all"] for name, report in values["margins"].items()}
        degrees = [degree for degree in (*RATINGS, "all") if any(degree in row for row in rows.values())]
        cells = [[name, *(percent(row.get(degree)) for degree in degrees)] for name, row in rows.items()]
        parts += ["## Accuracy by margin (Table 28)", markdown_table(["margin", *degrees], cells), TABLE_28.markdown()]
    if values["safety_loss"]:
        columns = {
            name: {"average": report["accuracy"]["all"]["all"], **report["safety"]}
            for name, report in values["safety_loss"].items()
        }
        names = [name for name in ("average", *SAFE, "unsafe_recall") if any(name in row for row in columns.values())]
        cells = [[weight, *(percent(row.get(name)) for name in names)] for weight, row in columns.items()]
        parts += ["## The auxiliary safety loss: accuracy by safety bin, and unsafe answers that score below 0.5 (Table 29)",
                  markdown_table(["weight", *(name.replace("_", " ") for name in names)], cells),
                  TABLE_29.markdown()]  # fmt: skip
    for model, points in values["scaling"].items():
        cells = [[str(point["batch"]), f"{point['pairs']:,}", percent(point["accuracy"].get("significantly")),
                  percent(point["accuracy"]["all"])] for point in points]  # fmt: skip
        parts += [f"## Accuracy by batches: {model} (Fig. 6)",
                  markdown_table(["batches", "pairs", "significantly", "all"], cells)]  # fmt: skip
    if values["scaling"]:
        parts += [FIGURE_6.markdown()]  # once, below all sizes
    if "conflict" in values:
        cells = [[name.replace("_", " "), percent(row), f"{row['n']:,}"]
                 for name, row in values["conflict"]["shares"].items()]  # fmt: skip
        parts += ["## Helpfulness against safety (Fig. 32)", markdown_table(["", "%", "answers"], cells)]
        headings = {"safety_above": "safe rather than helpful", "helpfulness_above": "helpful rather than safe"}
        for name, heading in headings.items():
            cells = [[f"{_line(_asked(row['messages']))} / {_line(row['answer'])}", f"{row['safety']:.2f}",
                      f"{row['helpfulness']:.2f}", row["label"]] for row in values["conflict"]["examples"][name]]  # fmt: skip
            if cells:
                parts += [f"### The models differ most: {heading} (Table 35; whole texts in `conflict.jsonl`)",
                          markdown_table(["prompt / answer", "safety", "helpfulness", "label"], cells)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _asked(messages: Sequence[Message]) -> str:
    return prompt_text(messages if len(messages) > 1 else messages[0]["content"])


def _line(text: str) -> str:
    """Text for a cell: one line, the end of a long one left out."""
    text = " ".join(text.split())
    return verbatim(text if len(text) <= _SHOWN else text[:_SHOWN].rstrip() + " ...")


def _name(weight: float) -> str:
    return f"{weight:g}"


def main() -> None:
    """Flags to config to call."""
    keep_heap()
    keep_compiled(flags.FLAGS.workdir)
    start_distributed()
    config, workdir = parse(StudyConfig, flags.FLAGS.config), Path(flags.FLAGS.workdir)
    claim(workdir, describe(config), kind=StudyConfig)
    run(config, workdir)
    print((workdir / "study.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    command.define("configs/reward_study.py:<size>", workdir="directory of the runs and the report")
    command.launch(main, expected=(Diverged,))
