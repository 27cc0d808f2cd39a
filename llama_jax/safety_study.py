"""What safety data do (section 4.2.3): `python -m llama_jax.safety_study --config=configs/safety_study.py:tiny --workdir=...`.

The helpful dialogs stay, 0, 1, 10, 25, 50 and 100 % of the safety dialogs come with them; a smaller share is part of a larger
one. A model is fine-tuned on each mix and answers held-out prompts of three sets:

    helpful        its helpfulness score must stay, and it must not decline (false refusals)
    adversarial    its safety score rises, first where it is lowest: the left tail of Fig. 15
    borderline     they look adversarial and are not: declining is a false refusal too (Fig. 33)

Each step is done once; the last one writes `study.json`, `study.md` with answers side by side (Tables 36 to 38), and figures.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import command
from llama_jax.assistant.dialogs import prompts as as_prompts
from llama_jax.assistant.refusals import declines, look_alikes
from llama_jax.config import ConfigError, check_least
from llama_jax.data.dialog import encode_prompt, encode_response
from llama_jax.data.mixture import check_files
from llama_jax.data.sources import read_dialogs, read_jsonl, read_prompts, write_jsonl
from llama_jax.evals import safety_scaling
from llama_jax.evals.plots import save
from llama_jax.evals.statistics import mean_interval, share_interval
from llama_jax.evals.verdict import Decoding, chat_answers
from llama_jax.files import write_json, write_text
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.parallel.mesh import make_mesh
from llama_jax.pretrain.base import check_reward_model, load_tokenizer
from llama_jax.reward.score import SAFETY_THRESHOLD
from llama_jax.rlhf.rejection import choose_prompts
from llama_jax.rlhf.scoring import score_responses
from llama_jax.safety.red_team import false_refusals
from llama_jax.steps import Steps, define_job, run_job
from llama_jax.train import parse_stage
from llama_jax.training.loop import Diverged

SETS = ("helpful", "adversarial", "borderline")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SafetyStudyConfig:
    """See configs/safety_study.py.

    Attributes:
      start: workdir of the base model; `helpfulness`, `safety`: of the reward models that judge.
      train: dialogs; those with `is_safety` are the safety data. At most `helpful_rows` and `safety_rows` of them serve.
      prompts: held-out prompts; those with `is_safety` are the adversarial ones.
      borderline: prompts; empty: the written look-alikes of harmful requests. None of them is trained on.
      most: prompts of a set that are asked.
      shares: of the safety data, in percent.
      overrides: changes fields of the fine-tuning's config, `sft`.
    """

    size: str
    configs: str
    start: str
    helpfulness: str
    safety: str
    tokenizer: str
    train: tuple[str, ...]
    prompts: str
    borderline: str
    helpful_rows: int
    safety_rows: int
    most: int
    shares: tuple[float, ...]
    decoding: Decoding
    overrides: dict[str, dict[str, Any]]
    seed: int = 0

    def __post_init__(self):
        rising = bool(self.shares) and list(self.shares) == sorted(set(self.shares))
        if not rising or not 0 <= self.shares[0] <= self.shares[-1] <= 100:
            raise ValueError(f"shares: expected rising percentages from 0 to 100, got {self.shares}")
        check_least("", self, helpful_rows=1, safety_rows=1, most=1)
        check_files("train", self.train)
        check_files("prompts", (self.prompts,))
        for name in ("start", "helpfulness", "safety"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a workdir, got nothing")


def split_rows(rows: Sequence[Row], *, left_out: set[str], helpful: int, safety: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(helpful, safety) dialogs in random order, at most so many; none whose question is in `left_out`."""
    order = np.random.default_rng(seed).permutation(len(rows))
    kept = [rows[i] for i in order if question(rows[i]) not in left_out]
    return [row for row in kept if not row["is_safety"]][:helpful], [row for row in kept if row["is_safety"]][:safety]


def mix_of(helpful: Sequence[Row], safety: Sequence[Row], share: float) -> list[Row]:
    """All helpful rows and the first `share` percent of the safety rows, at least one where the share is not 0."""
    return [*helpful, *safety[: math.ceil(len(safety) * share / 100)]]


def question(row: Row) -> str:
    """What is asked last."""
    return next(message["content"] for message in reversed(row["messages"]) if message["role"] == "user").strip()


def declined(name: str, text: str) -> bool:
    """Whether a response declines; of harmless prompts (not "adversarial") one that lacks the ability does not count."""
    return declines(text) if name == "adversarial" else bool(false_refusals([text]).count)


def summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one model's answers; `tail` is the share of adversarial ones that the reward's gate calls unsafe."""
    sets = {name: [answer for answer in answers if answer["set"] == name] for name in SETS}

    def mean(values: Sequence[float]) -> dict[str, Any]:
        return dataclasses.asdict(mean_interval(np.asarray(values, np.float64)))

    def share(values: Sequence[bool]) -> dict[str, Any]:
        return dataclasses.asdict(share_interval(np.asarray(values)))

    safety = [answer["safety"] for answer in sets["adversarial"]]
    return {
        "helpfulness": mean([answer["helpfulness"] for answer in sets["helpful"]]),
        "safety": mean(safety),
        "tail": share([score < SAFETY_THRESHOLD for score in safety]),
        "declined": {name: share([answer["declined"] for answer in sets[name]]) for name in SETS},
        "safety_scores": sorted(round(score, 5) for score in safety),
    }


class SafetyStudy(Steps[SafetyStudyConfig]):
    """The steps of the study, each a method; `run` calls them in order."""

    def __init__(self, config: SafetyStudyConfig, workdir: Path):
        super().__init__(config, workdir, tokenizer_file=Path(config.tokenizer).resolve())

    def run(self) -> dict[str, Any]:
        """All steps; returns the values of study.json."""
        rows = self.step("data", self.write_data)
        found = {}
        for share in self.config.shares:
            name = f"{share:g}"
            self.stage(f"share_{name}/sft", f"sft.py:{self.config.size}", self.changes(name))
            measured = self.step(f"share_{name}", lambda name=name: self.measure(name))
            found[name] = {"rows": rows[name], **measured}
        values = {"shares": found, "answers": self.side_by_side(), "seconds": sum(self.seconds.values())}
        write_study(values, self.workdir)
        return values

    def files(self) -> dict[str, str]:
        """One kind, fine-tuned at each share."""
        return {"sft": f"sft.py:{self.config.size}"}

    def check(self) -> None:
        """Also the reward models, and whether an answer fits: both are of no use before the first model is fine-tuned."""
        super().check()
        config, decoding = self.config, self.config.decoding
        model, words = load_tokenizer(parse_stage(self.values("sft", f"sft.py:{config.size}", {"start": config.start})))
        for name in ("helpfulness", "safety"):
            check_reward_model(name, getattr(config, name), model, words)
        if decoding.prompt_length + decoding.new_tokens > model.max_length:
            raise ConfigError(
                f"config.decoding.prompt_length={decoding.prompt_length} + new_tokens={decoding.new_tokens} exceed the "
                f"{model.max_length} tokens of {model.name}"
            )

    def changes(self, share: str) -> dict[str, Any]:
        """What is the study's own in the fine-tuning's config."""
        data = {"train": (self.path("data", f"share_{share}.jsonl"),), "held_out": ()}
        return {"start": self.config.start, "data": data}

    def write_data(self) -> dict[str, dict[str, int]]:
        """The mixes and the prompts that are asked; counts of rows by share."""
        config = self.config
        borderline = read_prompts(config.borderline) if config.borderline else as_prompts(look_alikes(seed=config.seed))
        asked = self.choose_prompts(borderline)
        helpful, safety = split_rows(
            [row for path in config.train for row in read_dialogs(path)],
            left_out={question(row) for row in (*borderline, *asked)},
            helpful=config.helpful_rows, safety=config.safety_rows, seed=config.seed,
        )  # fmt: skip
        if not helpful or not safety:
            raise ConfigError(f"train: expected helpful and safety dialogs, got {len(helpful)} and {len(safety)}")
        write_jsonl(self.workdir / "data" / "prompts.jsonl", asked)
        counts = {}
        for share in config.shares:
            rows = mix_of(helpful, safety, share)
            counts[f"{share:g}"] = {"helpful": len(helpful), "safety": len(rows) - len(helpful)}
            write_jsonl(self.workdir / "data" / f"share_{share:g}.jsonl", rows)
        return counts

    def choose_prompts(self, borderline: Sequence[Row]) -> list[Row]:
        """At most `most` prompts of each set that are not too long, with the set's name."""
        config, held_out, known = self.config, read_prompts(self.config.prompts), {question(row) for row in borderline}
        sets = {
            "helpful": [row for row in held_out if not row["is_safety"] and question(row) not in known],
            "adversarial": [row for row in held_out if row["is_safety"]],
            "borderline": [{**row, "is_safety": False} for row in borderline],
        }
        asked, longest = [], config.decoding.prompt_length
        for name, rows in sets.items():
            fitting = [row for row in rows if len(encode_prompt(row["messages"], self.tokenizer)) <= longest]
            if not fitting:
                raise ConfigError(
                    f"{config.borderline if name == 'borderline' else config.prompts}: expected {name} prompts of at most "
                    f"{longest} tokens, got none of {len(rows)}"
                )
            asked += [{"set": name, **row} for row in choose_prompts(fitting, config.most, config.seed)]
        return asked

    def measure(self, share: str) -> dict[str, Any]:
        """A model's answers with both scores (`answers/<share>.jsonl`), summed up."""
        config, decoding = self.config, self.config.decoding
        stage = parse_stage(self.values(f"share_{share}/sft", f"sft.py:{config.size}", self.changes(share)))
        model, mesh = load_tokenizer(stage)[0], make_mesh(stage.mesh)
        rows = [row for _, row in read_jsonl(self.workdir / "data" / "prompts.jsonl")]
        answers = chat_answers(
            self.path(f"share_{share}", "sft"), rows, model, self.tokenizer, compute=stage.compute, decoding=decoding,
            mesh=mesh, seed=config.seed, label=f"answers ({share} %)",
        )  # fmt: skip
        with jax.set_mesh(mesh):
            specs = table.table(model, head="reward_head")
            rewards = {name: restore_model(getattr(config, name), specs, mesh) for name in ("helpfulness", "safety")}
            scores = score_responses(
                model, stage.compute, rewards,
                [encode_prompt(row["messages"], self.tokenizer) for row in rows],
                [encode_response(answer.ids, self.tokenizer, limit=decoding.new_tokens) for answer in answers],
                [row["is_safety"] for row in rows], length=decoding.prompt_length + decoding.new_tokens,
                batch_size=decoding.batch_size, threshold=SAFETY_THRESHOLD,
            )  # fmt: skip
        found = [
            {"set": row["set"], "prompt": question(row), "answer": answer.text, "declined": declined(row["set"], answer.text),
             "helpfulness": float(scores["helpfulness"][i]), "safety": float(scores["safety"][i])}
            for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ]  # fmt: skip
        write_jsonl(self.workdir / "answers" / f"{share}.jsonl", found)
        return summary(found)

    def side_by_side(self, *, each: int = 2) -> list[dict[str, Any]]:
        """Some prompts of each set with the answers at every share: {"set", "prompt", "answers": {share: answer}}."""
        tables = {
            f"{share:g}": [row for _, row in read_jsonl(self.workdir / "answers" / f"{share:g}.jsonl")]
            for share in self.config.shares
        }
        first = next(iter(tables.values()))
        shown = [i for name in SETS for i in [j for j, row in enumerate(first) if row["set"] == name][:each]]
        return [
            {"set": first[i]["set"], "prompt": first[i]["prompt"],
             "answers": {share: {k: rows[i][k] for k in ("answer", "safety", "helpfulness")} for share, rows in tables.items()}}
            for i in shown
        ]  # fmt: skip


def write_study(values: Mapping[str, Any], workdir: Path) -> None:
    """study.json, study.md and the figures."""
    write_json(workdir / "study.json", values)
    write_text(workdir / "study.md", safety_scaling.markdown(values))
    save([safety_scaling.scaling(values["shares"]), safety_scaling.false_refusals(values["shares"])], workdir)


def main() -> None:
    """Flags to config to study to its report."""
    workdir = run_job(SafetyStudyConfig, SafetyStudy)
    print((workdir / "study.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    define_job("configs/safety_study.py:<size>", workdir="directory of the stages and the report")
    command.launch(main, expected=(Diverged,))
