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
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.hosts import HostsDiffer, file_fact, preflight
from llama_jax.parallel.mesh import make_mesh, start_distributed
from llama_jax.training.loop import Diverged, claim, finished, train

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
            if isinstance(path, str) and Path(path).exists():
                named[f"data.{field.name} {path}"] = path
    files = {name: file_fact(path) for name, path in named.items()}
    return {"config": hashlib.sha256(json.dumps(describe(config), sort_keys=True).encode()).hexdigest()[:16], **files}


def run(values: Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
    """Runs a stage, or goes on with it, or does nothing if it is finished; returns its summary."""
    workdir = Path(workdir)
    config = parse_stage(values)
    preflight(shared_facts(config))
    claim(workdir, describe(config))
    if (summary := finished(workdir)) is not None:
        return summary
    mesh = make_mesh(config.mesh)
    made = importlib.import_module(STAGES[config.stage][0]).make_stage(config, mesh, workdir)
    stage, loop = made if isinstance(made, tuple) else (made, config.loop)
    return train(stage, loop, mesh=mesh, workdir=workdir)


def main() -> None:
    """Flags to config to call."""
    keep_heap()
    start_distributed()
    summary = run(flags.FLAGS.config, flags.FLAGS.workdir)
    held_out = ", ".join(f"{name} {value:.4g}" for name, value in summary["held_out"].items())
    print(f"finished {summary['steps']} steps in {summary['seconds']:.0f} s; {held_out}", file=sys.stderr)


if __name__ == "__main__":
    command.define("configs/<stage>.py:<size>", workdir="directory of checkpoints and logs")
    command.launch(main, expected=(Diverged, HostsDiffer))
