"""The train command with one more stage, a regression that compiles at once, as processes for tests of hosts and faults.

    python tests/toy_run.py --workdir=DIRECTORY [--steps=8] [--pause=0.1] [--peer_seconds=5] ...
"""

import dataclasses
import os
import signal
import sys
import time

import jax
import orbax.checkpoint as ocp
from absl import flags
from test_training import SPECS, loss, parameters, points

from llama_jax import command
from llama_jax import train as train_command
from llama_jax.config import ConfigError
from llama_jax.parallel.mesh import MeshConfig
from llama_jax.training import attempt, optimizer
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.recorder import Recorder
from llama_jax.training.stage import LoopConfig, Stage, Supervised

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    loop: LoopConfig
    tokenizer: str
    stage: str = "toy"
    lr: float = 0.05
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009 - frozen


class Rows:
    """This process's rows of a batch that is a pure function of the step; slow and faulty as the flags say."""

    def batch(self, step):
        time.sleep(FLAGS.pause)
        mine = jax.process_index() == FLAGS.on_host
        while step == FLAGS.hang_at and mine:
            time.sleep(1)
        if step == FLAGS.fail_at and mine:
            raise OSError(f"cannot read the rows of step {step}")
        share = 16 // jax.process_count()
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        bad = float("nan") if 0 <= FLAGS.diverge_at <= step else 1.0
        return jax.tree.map(lambda x: bad * x[rows], points(step))


def make_stage(config, mesh, workdir):
    del workdir
    if FLAGS.start_fails and FLAGS.on_host in (-1, jax.process_index()):
        if FLAGS.start_fails == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ConfigError("start: expected a workdir, found nothing")
    for portion in range(FLAGS.portions):  # what is drawn before there are steps
        attempt.waypoint("sampling", portion, of="portion")
        time.sleep(FLAGS.pause)
    decay = jax.tree.map(lambda spec: False, SPECS, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return Stage(
        name="toy", specs=SPECS, init=lambda: parameters(mesh), loss=loss, tokens_per_step=16, meta={"model": "toy"},
        optimizer=optimizer.make(OptimConfig(lr=config.lr, warmup=2), steps=1000, decay=decay), source=Supervised(Rows()),
    )  # fmt: skip


def main():
    options = train_command.read_options()
    train_command.keep_tokenizer = lambda config, workdir: None  # it has none
    if FLAGS.keep_compiled:
        train_command.keep_compiled(FLAGS.workdir)
    command.join_cluster()
    if FLAGS.within:
        os.chdir(FLAGS.within)
    if FLAGS.clock_off and jax.process_index() == FLAGS.on_host:
        right = time.time
        time.time = lambda: right() + FLAGS.clock_off
    values = {
        "stage": "toy", "tokenizer": FLAGS.tokenizer, "lr": FLAGS.lr,
        "loop": {"steps": FLAGS.steps, "batch_size": 16, "checkpoint_every": 3, "log_every": 1, "keep": FLAGS.keep,
                 "max_skipped_in_a_row": 3},
    }  # fmt: skip
    if FLAGS.unreadable >= 0 and jax.process_index() == FLAGS.on_host:
        read = Checkpoints._read

        def torn(self, step, items):
            if step == FLAGS.unreadable:
                raise (OSError if FLAGS.unreadable_now else ValueError)(f"cannot read this host's part of {step}")
            return read(self, step, items)

        Checkpoints._read = torn
    if FLAGS.unseen >= 0 and jax.process_index() == FLAGS.on_host:
        kind = ocp.path.step._StandardNameFormat
        whole = kind._glob_step_paths
        kind._glob_step_paths = lambda *given: [path for path in whole(*given) if path.name != str(FLAGS.unseen)]
    if FLAGS.late and jax.process_index() == FLAGS.on_host:
        diverged = Recorder._diverged
        Recorder._diverged = lambda *given: (time.sleep(FLAGS.late), diverged(*given))
    train_command.STAGES["toy"] = ("__main__", "ToyConfig")
    train_command.run(values, FLAGS.workdir, options)
    print("finished", file=sys.stderr)


if __name__ == "__main__":
    train_command.define_options()
    flags.DEFINE_string("workdir", None, "")
    flags.DEFINE_string("tokenizer", "none", "")
    flags.DEFINE_string("within", "", "the directory that paths of the config are seen from")
    flags.DEFINE_integer("steps", 8, "")
    flags.DEFINE_integer("keep", 2, "")
    flags.DEFINE_integer("unreadable", -1, "a checkpoint that `on_host` cannot read")
    flags.DEFINE_bool("unreadable_now", False, "whether that is the disk's fault")
    flags.DEFINE_integer("unseen", -1, "a checkpoint that the listing of `on_host` does not show yet")
    flags.DEFINE_float("lr", 0.05, "")
    flags.DEFINE_float("pause", 0.0, "seconds that each batch takes")
    flags.DEFINE_integer("on_host", 1, "the host that is faulty; -1: all")
    flags.DEFINE_string("start_fails", "", "before the first step: error or killed")
    flags.DEFINE_integer("portions", 0, "what is drawn before the first step, each with a pause")
    flags.DEFINE_integer("hang_at", -1, "")
    flags.DEFINE_integer("fail_at", -1, "")
    flags.DEFINE_integer("diverge_at", -1, "from this step on no update is finite")
    flags.DEFINE_float("late", 0.0, "seconds by which `on_host` says later than the others that the run diverged")
    flags.DEFINE_float("clock_off", 0.0, "")
    command.launch(main, expected=train_command.EXPECTED)
