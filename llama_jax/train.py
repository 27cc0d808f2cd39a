"""Runs one stage: `python -m llama_jax.train --config=configs/sft.py:7b --workdir=... [--config.optim.lr=1e-5]`."""

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from llama_jax import command
from llama_jax.config import ConfigError, describe, leaves, parse
from llama_jax.data.rows import rows_fact, several_files
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop.tokenizer_files import keep
from llama_jax.parallel.host import keep_compiled, keep_heap
from llama_jax.parallel.hosts import HostsDiffer, file_fact, from_host_0, on_host_0, preflight
from llama_jax.paths import place
from llama_jax.pretrain.base import tokenizer_place
from llama_jax.training.attempt import start
from llama_jax.training.fingerprint import CheckpointError
from llama_jax.training.loop import Diverged, train
from llama_jax.training.options import RunOptions, parse_steps
from llama_jax.training.saved import named, newest_step
from llama_jax.training.step import mesh_for
from llama_jax.training.workdir import check_inputs, claim, finished, go_back, own

# stage -> (module with `make_stage`, its config class)
STAGES = {
    "pretrain": ("llama_jax.pretrain.stage", "PretrainConfig"),
    "sft": ("llama_jax.sft.stage", "SftConfig"),
    "reward": ("llama_jax.reward.stage", "RewardConfig"),
    "rejection": ("llama_jax.rlhf.rejection", "RejectionConfig"),
    "ppo": ("llama_jax.rlhf.ppo", "PpoConfig"),
    "grpo": ("llama_jax.rlhf.grpo", "GrpoConfig"),
    "dpo": ("llama_jax.rlhf.dpo", "DpoConfig"),
    "ghost": ("llama_jax.rlhf.ghost", "GhostConfig"),
    "distill": ("llama_jax.safety.distillation", "DistillConfig"),
}

WORKDIR = "directory of checkpoints and logs; gs://bucket/... too"
_LONGEST_NAME = 255  # characters of a file's name; a config may hold whole sentences
# Fields whose strings name rows: a file, a directory or a pattern. Words of others may happen to be a directory here.
ROWS = {"train", "held_out", "rest", "others", "validation", "prompts", "contexts"}
_MEASURED = ("data.held_out", "data.others", "data.validation")  # rows that change no batch
EXPECTED = (Diverged, HostsDiffer)  # ends of a run that one line tells


def parse_stage(values: Mapping[str, Any]) -> Any:
    """The frozen config of whichever stage `values["stage"]` names."""
    name = values["stage"] if "stage" in values else None
    if name not in STAGES:
        raise ConfigError(f"config.stage: expected one of {', '.join(STAGES)}, got {name!r}")
    module, class_name = STAGES[name]
    return parse(getattr(importlib.import_module(module), class_name), values)


def shared_facts(config: Any) -> dict[str, str]:
    """What all hosts of a run must have in common beside code and devices: the config, and all files and stages it names."""
    fields = dict(leaves(describe(config)))
    # Host 0 says what there is, and which checkpoint of a stage is meant, as it does when they are read.
    texts = {field: value for field, value in fields.items() if isinstance(value, str)}
    files = from_host_0(lambda: {field: file for field, text in texts.items() if (file := _telling_file(field, text))})
    facts = {f"{field} {file}": (rows_fact if _holds_rows(field) else file_fact)(file) for field, file in files.items()}
    return {**{f"config.{field}": json.dumps(value) for field, value in fields.items()}, **facts}


def _holds_rows(field: str) -> bool:
    return not ROWS.isdisjoint(field.split("."))


def rows_read(facts: Mapping[str, str]) -> dict[str, str]:
    """Of `shared_facts` the files whose rows are trained on. What samples are drawn from is known to `rlhf.drawn`."""
    return {name: fact for name, fact in facts.items() if name.startswith("data.") and not name.startswith(_MEASURED)}


def _telling_file(field: str, text: str) -> str:
    """The file, directory with a manifest or files of rows that a field of a config names; for a stage's workdir the meta of
    the checkpoint that is meant, in which its fingerprints are; "" for words that name nothing."""
    if not text or max(map(len, text.split("/"))) > _LONGEST_NAME:
        return ""
    if (named(text)[0] / "checkpoints").is_dir():
        try:
            return str(newest_step(text) / "meta" / "metadata")
        except CheckpointError:  # the stage will say what it misses
            return ""
    path = place(text)
    is_file = path.is_file() or (path / "manifest.json").is_file()
    return text if is_file or (_holds_rows(field) and several_files(text)) else ""


def run(values: Mapping[str, Any], workdir: str | Path, options: RunOptions | None = None) -> dict[str, Any]:
    """Runs a stage, or goes on with it, or does nothing if it is finished; returns its summary."""
    workdir, options = place(workdir), options or RunOptions()
    config = parse_stage(values)
    with start(options) as attempt:  # watched from here on: data that one host cannot read to their end keep all others waiting
        facts = shared_facts(config)
        preflight({**facts, "--restart_from": str(options.restart_from)})
        with own(workdir):
            if options.restart_from is not None:
                go_back(workdir, options.restart_from, describe(config))
            claim(workdir, describe(config), kind=type(config))
            if (summary := finished(workdir)) is not None:
                return summary
            attempt.begin(workdir)
            check_inputs(workdir, rows_read(facts))
            mesh = mesh_for(config.mesh, config.loop)
            made = importlib.import_module(STAGES[config.stage][0]).make_stage(config, mesh, workdir)
            attempt.stop_if_asked()
            keep_tokenizer(config, workdir)
            stage, loop = made if isinstance(made, tuple) else (made, config.loop)
            return train(stage, loop, mesh=mesh, workdir=workdir, options=options, attempt=attempt)


def keep_tokenizer(config: Any, workdir: Path) -> None:
    """The stage's tokenizer lies beside its checkpoints."""
    on_host_0(lambda: keep(Tokenizer(tokenizer_place(config)), workdir))


def define_options() -> None:
    """Defines the flags of how a run is carried out, and by which processes."""
    defaults = RunOptions()
    command.define_cluster()
    flags.DEFINE_integer("restart_from", None, "go back to the checkpoint of this step, also under a changed config")
    flags.DEFINE_string("profile_steps", "", "FIRST:END, trace these steps into WORKDIR/profile")
    for name, meaning in (
        ("step_seconds", "the longest that a step, an evaluation or a rollout may take"),
        ("start_seconds", "the longest until the end of the first step, which compiles"),
        ("peer_seconds", "the longest that another host may be silent"),
    ):
        flags.DEFINE_float(name, getattr(defaults, name), f"{meaning}, until the run ends with an error")
    flags.DEFINE_bool("keep_compiled", True, "keep compiled programs in WORKDIR/compiled: a restart begins in seconds")


def read_options() -> RunOptions:
    """The flags of `define_options`."""
    values = flags.FLAGS
    return RunOptions(
        restart_from=values.restart_from, profile_steps=parse_steps(values.profile_steps), step_seconds=values.step_seconds,
        start_seconds=values.start_seconds, peer_seconds=values.peer_seconds,
    )  # fmt: skip


def main() -> None:
    """Flags to config to call."""
    keep_heap()
    options = read_options()
    if flags.FLAGS.keep_compiled:
        keep_compiled(flags.FLAGS.workdir)
    command.join_cluster()
    summary = run(flags.FLAGS.config, flags.FLAGS.workdir, options)
    held_out = "".join(f", {name} {value:.4g}" for name, value in summary["held_out"].items())
    print(f"finished {summary['steps']} steps in {summary['seconds']:.0f} s{held_out}", file=sys.stderr)


if __name__ == "__main__":
    command.define("configs/<stage>.py:<size>", buckets=True, workdir=WORKDIR)
    define_options()
    command.launch(main, expected=EXPECTED)
