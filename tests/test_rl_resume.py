"""The stages of alignment killed by SIGKILL at random points of rollout, scoring, update and save, and begun again: the same
parameters to the bit as without kills. What test_synthesis_resume.py kills it kills by this, too.

One process imports the library and forks a child for every start, before it has touched a device; programs come from a compile
cache. A child kills itself a random moment after a random event of its run, from another thread.
"""

import collections
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs

from llama_jax.model.config import SIZES

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

DRIVER = """
import os, random, signal, sys, threading, time
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
import test_rl_resume as tests
from llama_jax.rlhf import reinforce, rejection, respond, rollout
from llama_jax.safety import distillation
from llama_jax.training import checkpoint, loop

directory, cache, stage, kills = sys.argv[1:4] + [int(sys.argv[4])]


def run(workdir, kill=None):
    '''One start of the stage in a child; with `kill`, a generator that says when it dies. True if it came to its end.'''
    child = os.fork()
    if not child:
        if kill:
            arm(workdir, kill)
        tests.start(directory, stage, workdir)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert status == 0, f"a child ended with status {status}"
    return True


def arm(workdir, rng):
    '''Kills this process a moment after one of its events.'''
    left = [rng.randrange(1, 14)]
    delay = rng.uniform(0, 0.03)

    def event(name):
        left[0] -= 1
        if left[0] == 0:
            with open(workdir + ".kills", "a") as file:
                file.write(name + "\\n")
            threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()

    def told(name, function):
        def call(*arguments, **named):
            event(name)
            return function(*arguments, **named)
        return call

    def roller(**fields):
        watched = {"sample": told("rollout", fields["sample"]), "judge": told("scoring", fields["judge"])}
        return rollout.Roller(**{**fields, **watched})

    reinforce.Roller = roller
    respond.Responder.ids = told("rollout", respond.Responder.ids)
    rejection.Round.score = told("scoring", rejection.Round.score)
    distillation.sigmoid_scores = told("scoring", distillation.sigmoid_scores)
    loop.Programs.__call__ = told("update", loop.Programs.__call__)
    checkpoint.Checkpoints.save = told("save", checkpoint.Checkpoints.save)


run(directory + "/whole")
rng = random.Random(0)
while kills:
    if run(directory + "/killed", random.Random(rng.random())):
        sys.exit("the run came to its end before it was killed often enough: more steps")
    kills -= 1
run(directory + "/killed")
"""


def steps_of(stage: str) -> int:
    """More than twenty starts get through, fewer where they have much to sample before."""
    return 60 if stage in ("ghost", "distill") else 120


def start(directory: str, stage: str, workdir: str) -> None:
    """One start of the stage: what `python -m llama_jax.train` does after its flags."""
    from llama_jax.rlhf import respond
    from llama_jax.train import run

    SIZES["tiny"] = dataclasses.replace(small_runs.MODEL, name="tiny")
    # Prompts that a kill draws again; stages that sample few are to be killed while they do.
    respond.write_in_portions.__kwdefaults__["size"] = 1 if stage in ("ghost", "distill") else 2
    loop = {"checkpoint_every": 1, "batch_size": 8, "keep": 2}
    changes = {
        "ppo": {"ppo": {"epochs": 2, "kl_target": 0.05, "kl_horizon": 100.0, "sampling_batch": 4}, "lora": {"rank": 2}},
        "grpo": {"grpo": {"sampling_batch": 6}},
        "ghost": {"ghost": {"resample": True}},
    }
    run(small_runs.values(Path(directory), stage, steps=steps_of(stage), loop=loop, **changes.get(stage, {})), Path(workdir))


def final(workdir: Path, *, steps: int) -> dict:
    """Fingerprints of everything that the last checkpoint holds: parameters, moments, the source's state."""
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    meta = json.loads((newest / "meta" / "metadata").read_text())
    assert meta["step"] == steps and (workdir / "done.json").exists()
    return meta["fingerprints"]


def kill_again_and_again(kills: int, stage: str, directory: Path, events: set[str]) -> None:
    """The stage without and with that many kills after such events: the same parameters, moments, rows and steps."""
    small_runs.prepare(directory)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(directory), str(directory / "cache"), stage, str(kills)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    at = collections.Counter((directory / "killed.kills").read_text().split())
    assert sum(at.values()) == kills and set(at) <= events, at
    assert kills < 20 or set(at) == events, at
    count = steps_of(stage)
    assert final(directory / "killed", steps=count) == final(directory / "whole", steps=count)
    rows = [json.loads(line) for line in (directory / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(count))  # the others are held-out measurements
    drawn = {path.name for path in (directory / "whole").glob("*.jsonl")} - {"metrics.jsonl", "attempts.jsonl"}
    for name in drawn:
        assert (directory / "killed" / name).read_bytes() == (directory / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rejection", "sft", "reward", "dpo"])
def test_killed_again_and_again_it_ends_with_the_same_bits(stage, kills, tmp_path):
    drawing = {"rollout", "scoring"} if stage in ("ppo", "grpo", "rejection") else set()
    kill_again_and_again(kills, stage, tmp_path, {"update", "save"} | drawing)
