"""What a run needs on a TPU slice, found without a TPU.

    python -m llama_jax.plan --config=configs/pretrain.py:70b --topology=v5p:8x8x8 [--search] [--json] [--dump_hlo=DIR]

Compiles the stage's real train step with the real TPU compiler and prints memory, arithmetic, communication and time per
chip, and what the paper's tokens of pretraining (2T, Llama 1's 1.0T or 1.4T, or --tokens) take. A PPO or GRPO config is
planned with the reward models that it names (their workdirs need not exist; both, if it names none), and --program=rollout
plans its generation. Needs libtpu (`pip install 'llama_jax[tpu]'`), 2 GB and a few minutes a program.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from llama_jax import command
from llama_jax.config import ConfigError
from llama_jax.files import write_text
from llama_jax.parallel.topology import Topology, describe
from llama_jax.planning import calibration, report
from llama_jax.planning.estimate import Plan, make_plan
from llama_jax.planning.programs import rollout_program, train_program
from llama_jax.planning.search import Setting, space
from llama_jax.train import parse_stage
from llama_jax.training.step import mesh_for

# Of pretraining, Table 1.
PAPER_TOKENS = {"llama1-7b": 1.0e12, "llama1-13b": 1.0e12, "llama1-33b": 1.4e12, "llama1-65b": 1.4e12}
LLAMA2_TOKENS = 2e12


def plan(config: Any, topology: Topology, *, program: str = "train", dump_hlo: str | None = None) -> Plan:
    """The plan of a stage's config (`program="rollout"`: of the generation of PPO or GRPO) on a topology."""
    mesh = mesh_for(config.mesh, config.loop, devices=topology.devices)
    made = train_program(config, mesh) if program == "train" else rollout_program(config, mesh)
    result, text = make_plan(
        made, topology, mesh, model=config.model, remat=config.compute.remat,
        microbatches=config.loop.microbatches if program == "train" else 1,
    )  # fmt: skip
    if dump_hlo and text is not None:
        name = re.sub(r"\W+", "_", made.name)
        path = Path(dump_hlo) / f"{name}-{config.model}-{topology.name.replace(' ', '')}.hlo"
        write_text(path, text)
        print(f"compiled text: {path}", file=sys.stderr)
    return result


def search(config: Any, topology: Topology, *, compilations: int, keep: int = 5) -> list[tuple[Setting, Plan]]:
    """Compiles up to so many settings and returns the best that fit, the fastest first."""
    devices = len(topology.devices)
    settings = space(config, devices=devices, slices=topology.slices)
    if not settings.meshes:
        raise ConfigError(f"no mesh of the {devices} devices divides {config.model} and {settings.rows} rows a batch")
    known: dict[Setting, float | None] = {}
    plans: dict[Setting, Plan] = {}
    while len(known) < compilations:
        setting = settings.next(known, compilations=compilations)
        if setting is None:
            break
        head = f"[{len(known) + 1}/{compilations}]"
        try:
            result = plan(setting.of(config), topology)
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # a width that so many devices cannot divide, say
            known[setting] = None if isinstance(error, ValueError) else math.inf
            print(f"{head} {_overrides(setting)}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            continue
        print(f"{head} {report.one_line(result)}", file=sys.stderr, flush=True)
        fits = result.fits and result.step_seconds is not None
        known[setting] = result.step_seconds if fits else math.inf
        if fits:
            plans[setting] = result
    return sorted(plans.items(), key=lambda pair: pair[1].step_seconds)[:keep]


def run(values: Mapping[str, Any], settings: Any) -> None:
    """The command, from its flags."""
    config, tokens = parse_stage(values), settings.tokens
    if tokens is None:
        pretrains = config.stage == "pretrain" and settings.program == "train"
        tokens = PAPER_TOKENS.get(config.model, LLAMA2_TOKENS) if pretrains else 0
        if not tokens and (settings.price or settings.carbon):
            raise ConfigError(f"--price, --carbon: expected --tokens, how many the run of {config.stage!r} has, got nothing")
    topology = describe(settings.topology, slices=settings.slices)
    if settings.search:
        if settings.program != "train" or settings.dump_hlo:
            raise ConfigError("--search compares train steps and keeps no text; give neither --program=rollout nor --dump_hlo")
        best = search(config, topology, compilations=settings.search_compilations)
        if not best:
            tried = settings.search_compilations
            raise ConfigError(f"none of up to {tried} settings fits on {topology.name}; allow more, or take more chips")
        results = [result for _, result in best]
    else:
        results = [plan(config, topology, program=settings.program, dump_hlo=settings.dump_hlo)]
    runs = [result.run(tokens, price=settings.price, watts=settings.carbon) if tokens else {} for result in results]
    if settings.json:
        found = [report.as_json(result, length) for result, length in zip(results, runs, strict=True)]
        print(json.dumps({"best": found} if settings.search else found[0], indent=1))
        return
    print(report.as_text(results[0], runs[0]))
    if settings.search:
        print("\nthe best of the search")
        for setting, result in best:
            print(f"  {report.one_line(result)}\n    {_overrides(setting)}")
    print(f"\n{report.assumptions()}\n\n{calibration.as_text()}")


def _overrides(setting: Setting) -> str:
    mesh = " ".join(f"--config.mesh.{name}={size}" for name, size in dataclasses.asdict(setting.mesh).items())
    return f"{mesh} --config.compute.remat={setting.remat} --config.loop.microbatches={setting.microbatches}"


def main() -> None:
    """Flags to config to call."""
    if flags.FLAGS.calibrate:
        found = calibration.measure(plan)
        print(json.dumps(calibration.as_json(found), indent=1) if flags.FLAGS.json else calibration.as_text(found))
    elif flags.FLAGS.config is None or flags.FLAGS.topology is None:
        raise ConfigError("expected --config and --topology, or --calibrate")
    else:
        run(flags.FLAGS.config, flags.FLAGS)


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "configs/<stage>.py:<size>")
    flags.DEFINE_string("topology", None, "a slice: v5p:8x8x8 or v5p-1024")
    flags.DEFINE_integer("slices", 1, "how many such slices, joined by the data-centre network", lower_bound=1)
    flags.DEFINE_enum("program", "train", ["train", "rollout"], "the train step, or the generation of a PPO or GRPO config")
    flags.DEFINE_bool("json", False, "print JSON")
    flags.DEFINE_bool("search", False, "try meshes, remat policies and microbatches, and print the best few")
    flags.DEFINE_integer("search_compilations", 12, "programs that a search compiles at most", lower_bound=1)
    flags.DEFINE_string("dump_hlo", None, "directory for the compiled text")
    flags.DEFINE_float("tokens", None, "tokens of the whole run; none given: the paper's for pretraining", lower_bound=0)
    flags.DEFINE_float("price", 0.0, "US dollars a chip hour, to print the run's price", lower_bound=0)
    flags.DEFINE_float("carbon", 0.0, "watts a chip, to print the run's tCO2eq as in Table 2", lower_bound=0)
    flags.DEFINE_bool("calibrate", False, "estimate what others have published, and print the error")
    command.launch(main)
