"""What Ghost Attention adds: `python -m llama_jax.ghost_study --config=configs/ghost_study.py:tiny --workdir=...` (Table 30).

1. A model of the demo's size knows no instructions. It is fine-tuned on dialogs of 1 to 20 turns, written by a program: most
   end with a turn that holds an instruction and obeys it, the others have none. No answer obeys an instruction of an earlier
   turn. This is the baseline, and the policy sampled from.
2. Ghost Attention samples from it with the instruction in every turn and trains on it in the first turn only.
3. Both answer held-out dialogs. Their instructions have values of the training rows: a model of this size does not copy
   others, not even in the turn that names them.

Each stage is resumed and not repeated; the last step writes `study.json`, `study.md` and the figures.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import command
from llama_jax.config import ConfigError, check_least
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.evals import drawings, ghost_figures
from llama_jax.evals.ghost import attention_map, check_contexts, fits_into, keeps_instructions, recall_table
from llama_jax.evals.plots import save
from llama_jax.files import write_json, write_text
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.model.config import ModelConfig
from llama_jax.parallel.mesh import make_mesh
from llama_jax.pretrain.base import load_tokenizer
from llama_jax.rlhf.ghost import Context, in_first_turn
from llama_jax.rlhf.instructions import VALUES, contexts_of, single_turns, write_instruction_data
from llama_jax.steps import Steps, define_job, run_job
from llama_jax.train import parse_stage
from llama_jax.training.loop import Diverged

MODELS = ("baseline", "ghost")


@dataclasses.dataclass(frozen=True)
class GhostStudyConfig:
    """See configs/ghost_study.py.

    Attributes:
      start: workdir of the chat model that both models come from.
      dialogs: its SFT data; every eighth of the dialogs that serve is held out.
      context: tokens of a dialog of all turns; `longest`: of one turn with its answer in the data.
      turns: where answers are measured.
      instructions: rows that teach to obey an instruction in its own turn; `samples`: of Ghost Attention.
      held_out: dialogs that each model is measured on.
      overrides: changes fields of the stages' configs, `baseline` and `ghost`.
    """

    size: str
    configs: str
    start: str
    tokenizer: str
    dialogs: str
    context: int
    turns: tuple[int, ...]
    longest: int
    instructions: int
    samples: int
    held_out: int
    new_tokens: int
    overrides: dict[str, dict[str, Any]]
    seed: int = 0

    def __post_init__(self):
        if not self.start:
            raise ValueError("start: expected the workdir of a chat model, got nothing")
        check_least("", self, context=1, longest=1, instructions=1, samples=1, held_out=1, new_tokens=1)
        if not self.turns or min(self.turns) < 1 or max(self.turns) < 2:  # in turn 1 the instruction stands right there
            raise ValueError(f"turns: expected turns from 1, and a later one among them, got {self.turns}")


class GhostStudy(Steps[GhostStudyConfig]):
    """The steps of the study, each a method; `run` calls them in order."""

    def __init__(self, config: GhostStudyConfig, workdir: Path):
        super().__init__(config, workdir, tokenizer_file=Path(config.tokenizer).resolve())

    def run(self) -> dict[str, Any]:
        """All steps; returns the values of study.json."""
        config = self.config
        files = self.step("data", self.write_data)
        data = {"train": (files["instructions"], files["plain"]), "length": config.context}
        common = {"context": config.context, "data": data}
        self.stage("baseline", f"sft.py:{config.size}", {**common, "start": config.start})
        self.stage("ghost", f"ghost.py:{config.size}", {
            **common, "start": self.path("baseline"), "policy": self.path("baseline"),
            "ghost": {"contexts": (files["contexts"],), "values": files["values"], "families": tuple(VALUES),
                      "turns": (1, max(config.turns)), "samples": config.samples, "new_tokens": config.new_tokens},
        })  # fmt: skip
        values = {
            "turns": list(config.turns),
            "recall": {name: self.step(f"recall_{name}", lambda name=name: self.recall(name)) for name in MODELS},
            "policy_obeys": self.policy_obeys(),
            "attention_by_turn": self.step("attention", self.attention),
            "examples": self.step("examples", self.examples),
        }
        write_study({**values, "seconds": self.seconds}, self.workdir)
        return values

    def files(self) -> dict[str, str]:
        """Both are fine-tuned."""
        return {"baseline": f"sft.py:{self.config.size}", "ghost": f"ghost.py:{self.config.size}"}

    def dialogs(self) -> tuple[list, list]:
        """Dialogs of one short turn: for training, and held out."""
        short = single_turns(self.config.dialogs, self.tokenizer, longest=self.config.longest)
        if len(short) < 16:
            raise ConfigError(
                f"{self.config.dialogs}: expected at least 16 dialogs of one turn and {self.config.longest} tokens, "
                f"got {len(short)}"
            )
        return [dialog for i, dialog in enumerate(short) if i % 8], short[::8]

    def write_data(self) -> dict[str, str]:
        """What the stages train on; the files by name."""
        config = self.config
        self.check_held_out()
        return write_instruction_data(
            self.workdir / "data", self.dialogs()[0], VALUES, rows=config.instructions, plain=max(1, config.instructions // 30),
            most_turns=max(config.turns), seed=config.seed,
        )  # fmt: skip

    def contexts(self, count: int) -> list[Context]:
        """Held-out dialogs with an instruction each."""
        rng = np.random.default_rng(self.config.seed + 1)
        return contexts_of(self.dialogs()[1], VALUES, count, turns=max(self.config.turns), rng=rng)

    def check_held_out(self) -> None:
        """ConfigError for held-out dialogs whose turns do not fit the context: both models would be trained in vain."""
        config = self.config
        room = self.shape()[1].max_length - config.new_tokens  # of a `Responder`
        try:
            check_contexts(
                self.contexts(config.held_out), turns=config.turns, fits=fits_into(room, self.tokenizer)
            )
        except ValueError as error:
            raise ConfigError(f"config.context={config.context}: {error}, or fewer config.new_tokens") from None

    def policy_obeys(self) -> float:
        """The share that obeys, of Ghost Attention's samples that a program can judge: a hobby shows where it is asked for."""
        samples = [row["obeyed"] for _, row in read_jsonl(self.workdir / "ghost" / "samples.jsonl")]
        decided = [obeyed for obeyed in samples if obeyed is not None]
        return float(np.mean(decided)) if decided else float("nan")

    def shape(self) -> tuple[Any, ModelConfig]:
        """The stages' common config and the model with their context."""
        changes = {"context": self.config.context, "start": self.config.start}
        stage = parse_stage(self.values("ghost", f"ghost.py:{self.config.size}", changes))
        return stage, load_tokenizer(stage)[0]

    def recall(self, name: str) -> dict[str, dict[str, Any]]:
        """How often a model obeys at each of the turns, {turn: interval}; its answers go to `recall/<name>.jsonl`."""
        config, (stage, model) = self.config, self.shape()
        found = keeps_instructions(
            self.path(name), self.contexts(config.held_out), model, self.tokenizer, compute=stage.compute,
            mesh=make_mesh(stage.mesh), turns=config.turns, new_tokens=config.new_tokens, batch_size=config.held_out,
            seed=config.seed, label=f"recall ({name})",
        )  # fmt: skip
        write_jsonl(self.workdir / "recall" / f"{name}.jsonl", map(dataclasses.asdict, found))
        return {str(turn): dataclasses.asdict(interval) for turn, interval in recall_table(found).items()}

    def examples(self) -> list[dict[str, Any]]:
        """A few of the dialogs with what both models answered (Fig. 9)."""
        instructions = [context.instruction for context in self.contexts(self.config.held_out)]
        answers = {name: [row for _, row in read_jsonl(self.workdir / "recall" / f"{name}.jsonl")] for name in MODELS}
        return ghost_figures.examples(instructions, answers)

    def attention(self) -> dict[str, list[float]]:
        """Fig. 10 for a held-out dialog with each model's answers at the measured turns; {model: its attention by turn}."""
        stage, model = self.shape()
        (context, *_), mesh, maps = self.contexts(1), make_mesh(stage.mesh), {}
        for name in MODELS:
            answers = {row["turn"]: row["answer"] for _, row in read_jsonl(self.workdir / "recall" / f"{name}.jsonl")
                       if row["context"] == 0}  # fmt: skip
            messages = [dict(message) for message in context.messages]
            for turn, answer in answers.items():
                if answer and 2 * turn - 1 < len(messages):
                    messages[2 * turn - 1]["content"] = answer
            while messages[-1]["role"] == "user":
                messages.pop()
            with jax.set_mesh(mesh):
                params = restore_model(self.path(name), table.table(model, head="lm_head"), mesh)
                maps[ghost_figures.LABELS[name]] = attention_map(
                    params, in_first_turn(messages, context.instruction, place="user"), context.instruction, self.tokenizer,
                    config=model, compute=stage.compute,
                )  # fmt: skip
        drawings.save_maps(self.workdir / "attention.npz", maps)
        return {name: [float(x) for x in maps[ghost_figures.LABELS[name]].by_turn] for name in MODELS}


def write_study(values: Mapping[str, Any], workdir: Path) -> None:
    """study.json, study.md and the figures."""
    write_json(workdir / "study.json", values)
    write_text(workdir / "study.md", ghost_figures.markdown(values))
    maps = drawings.load_maps(workdir / "attention.npz")
    save([ghost_figures.recall(values["recall"]), drawings.attention_maps(maps)], workdir)


def main() -> None:
    """Flags to config to study to its report."""
    workdir = run_job(GhostStudyConfig, GhostStudy)
    print((workdir / "study.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    define_job("configs/ghost_study.py:<size>", workdir="directory of the stages and the report")
    command.launch(main, expected=(Diverged,))
