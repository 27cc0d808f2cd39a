"""Runs one stage: `python -m llama_jax.train --config=configs/sft.py:7b --workdir=... [--config.optim.lr=1e-5]`."""

import dataclasses
import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from llama_jax import command
from llama_jax.config import ConfigError, describe, parse
from llama_jax.parallel.host import keep_compiled, keep_heap
from llama_jax.parallel.hosts import HostsDiffer, file_fact, preflight
from llama_jax.parallel.mesh import make_mesh
from llama_jax.paths import place
from llama_jax.training.attempt import start
from llama_jax.training.loop import Diverged, train
from llama_jax.training.options import RunOptions, parse_steps
from llama_jax.training.workdir import claim, finished, go_back, own

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
EXPECTED = (Diverged, HostsDiffer)  # ends of a run that one line tells


def parse_stage(values: Mapping[str, Any]) -> Any:
    """The frozen config of whichever stage `values["stage"]` names."""
    name = values["stage"] if "stage" in values else None
    if name not in STAGES:
        raise ConfigError(f"config.stage: expected one of {', '.join(STAGES)}, got {name!r}")
    module, class_name = STAGES[name]
    return parse(getattr(importlib.import_module(module), class_name), values)


def shared_facts(config: Any) -> dict[str, str]:
    """What all hosts of a run must have in common beside code and devices: the config, and the data it names."""
    data = getattr(config, "data", None)
    named = {"tokenizer": config.tokenizer}
    for field in dataclasses.fields(data) if data is not None else ():
        value = getattr(data, field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, str) and path and place(path).exists():
                named[f"data.{field.name} {path}"] = path
    files = {name: file_fact(path) for name, path in named.items()}
    return {"config": hashlib.sha256(json.dumps(describe(config), sort_keys=True).encode()).hexdigest()[:16], **files}


def run(values: Mapping[str, Any], workdir: str | Path, options: RunOptions | None = None) -> dict[str, Any]:
    """Runs a stage, or goes on with it, or does nothing if it is finished; returns its summary."""
    workdir, options = place(workdir), options or RunOptions()
    config = parse_stage(values)
    preflight(shared_facts(config))
    with start(options) as attempt, own(workdir):
        if options.restart_from is not None:
            go_back(workdir, options.restart_from, describe(config))
        claim(workdir, describe(config), kind=type(config))
        if (summary := finished(workdir)) is not None:
            return summary
        attempt.begin(workdir)
        mesh = make_mesh(config.mesh)
        made = importlib.import_module(STAGES[config.stage][0]).make_stage(config, mesh, workdir)
        attempt.stop_if_asked()
        stage, loop = made if isinstance(made, tuple) else (made, config.loop)
        return train(stage, loop, mesh=mesh, workdir=workdir, options=options, attempt=attempt)


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
