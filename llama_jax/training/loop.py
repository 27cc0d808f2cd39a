"""The only training loop. It is given a Stage and knows no model, no task and no data.

In order of precedence a run (1) is already finished and not run again, (2) resumes from its newest whole checkpoint, or
(3) starts with the stage's `init`, which is fresh or takes another stage's parameters. After a loss spike it may do the
same once more without ending the process.
"""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import ConfigError
from llama_jax.files import write_json
from llama_jax.training import attempt as attempts
from llama_jax.training.attempt import Attempt
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.feed import Feed
from llama_jax.training.metrics import HELD_OUT, Compilations, MetricWriter, Progress
from llama_jax.training.options import RunOptions
from llama_jax.training.patience import Patience, Rule
from llama_jax.training.preemption import Preempted
from llama_jax.training.profile import Profile
from llama_jax.training.recorder import Diverged, Recorder
from llama_jax.training.spikes import Spike, Spikes
from llama_jax.training.stage import LoopConfig, Stage
from llama_jax.training.state import TrainState, abstract_state, born_sharded
from llama_jax.training.step import Programs, check_batch, make_step, put_batch
from llama_jax.training.workdir import claim, finished

__all__ = ["Diverged", "Preempted", "claim", "finished", "train"]

log = logging.getLogger(__name__)


def train(
    stage: Stage, config: LoopConfig, *, mesh: Mesh, workdir: Path, options: RunOptions | None = None,
    attempt: Attempt | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs a stage to its end and returns its summary (also in `done.json`): seconds, final metrics, compilations, devices.

    `attempt` is the start that the stage was made in, if that is watched already.
    """
    options = options or RunOptions()
    _check(stage, config, mesh)
    with contextlib.ExitStack() as entered:
        if attempt is None:
            attempt = entered.enter_context(attempts.start(options))
            attempt.begin(workdir)
        entered.enter_context(jax.set_mesh(mesh))
        compilations = entered.enter_context(Compilations())
        run = _Run(stage, config, options, mesh, workdir, attempt, compilations)
        # Closing waits for a save that is under way, also when an error ends the run.
        with contextlib.closing(run.checkpoints):
            while True:
                try:
                    return run.to_the_end()
                except Spike as spike:
                    run.rewind(spike)


def _check(stage: Stage, config: LoopConfig, mesh: Mesh) -> None:
    check_batch(config, mesh)
    if not config.steps:
        raise ConfigError("loop.steps: expected at least 1, got 0")
    if config.spike.rewind and stage.source.looks_at_params:
        raise ConfigError(f"loop.spike.rewind: {stage.name} makes its batches with its own parameters; none can be left out")
    if config.keep_best and stage.evaluate is None:
        raise ConfigError(f"loop.keep_best={config.keep_best}: {stage.name} measures nothing on held-out data")


class _Run:
    """What stays when a run goes back to a checkpoint: the compiled step, the checkpoints, the batches that are left out."""

    def __init__(
        self,
        stage: Stage,
        config: LoopConfig,
        options: RunOptions,
        mesh: Mesh,
        workdir: Path,
        attempt: Attempt,
        compilations: Compilations,
    ):
        self.stage, self.config, self.options, self.mesh, self.workdir = stage, config, options, mesh, workdir
        self.watchdog, self.terminate, self.goodput = attempt.watchdog, attempt.terminate, attempt.goodput
        self.compilations = compilations
        self.begun, self.is_first_process = time.monotonic(), jax.process_index() == 0
        self.spikes = Spikes(config.spike)
        self.stopping = Rule(config.keep_best, config.keep_best_mode, config.patience, config.least_gain)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints", keep=config.keep, keep_every=config.keep_every, best=config.keep_best,
            best_is_lowest=config.keep_best_mode == "min",
        )  # fmt: skip
        self.target = abstract_state(stage.specs, stage.optimizer, mesh)
        layout = jax.tree.map(lambda leaf: leaf.sharding, self.target)
        self.programs = Programs(make_step(stage.loss, stage.optimizer, microbatches=config.microbatches, layout=layout))
        self.schedule = jax.device_put(getattr(stage.optimizer, "schedule", None), NamedSharding(mesh, PartitionSpec()))

    def start(self) -> tuple[TrainState, dict[str, Any]]:
        """The state to go on from and its meta data: of the newest whole checkpoint, or new."""
        restored = self.checkpoints.restore(self.target, self.stage.source.state())
        if restored is not None:
            state, source_state, meta = restored
            self.stage.source.restore(source_state)
            self.spikes.restore(meta["spikes"])
            return state, meta
        self.spikes.losses = []
        state = born_sharded(self.stage.init, self.stage.specs, self.stage.optimizer, self.mesh)
        logged = {"metrics": {}, "tokens_per_second": 0.0}
        return state, {"step": 0, "seconds": 0.0, "productive": 0.0, "logged": logged}

    def compile_for_examples(self, state: TrainState) -> None:
        """Where batches have several shapes, a program for each, before the first step."""
        examples = getattr(self.stage.source, "examples", lambda: ())
        for batch in [] if self.programs.compiled else examples():
            self.programs.compile(state, put_batch(batch, self.mesh), self.stage.frozen, self.schedule)

    def rewind(self, spike: Spike) -> None:
        """After a spike: notes which batches are left out from the newest checkpoint on."""
        if self.spikes.rewinds >= self.config.spike.limit:
            raise Diverged(f"{self.stage.name}: {spike}; loop.spike.limit={self.config.spike.limit} rewinds are used up")
        self.goodput.note(spike.step + 1)
        self.checkpoints.wait()
        first = self.checkpoints.newest() or 0
        left_out = self.spikes.leave_out(spike.step, first)
        log.warning("%s: back to step %d, without batches %s", spike, first, left_out)

    def to_the_end(self) -> dict[str, Any]:
        """Trains from the newest checkpoint to the last step; the summary."""
        stage, config = self.stage, self.config
        self.begun = time.monotonic()  # a run that went back to a checkpoint takes the seconds before from that
        state, meta = self.start()
        first, seconds_before = int(meta["step"]), float(meta["seconds"])
        writes, patience = self.is_first_process, Patience(self.stopping)
        patience.restore(meta.get("patience", patience.state()))  # a checkpoint may be older than this field
        unmeasured = meta.get("unmeasured", False)
        self.watchdog.begin(first)
        goodput = self.goodput
        goodput.steps_from(first, meta["productive"])
        writer = MetricWriter(self.workdir, enabled=writes, resume_step=first, remeasure=unmeasured)
        progress = Progress(config.steps, stage.name, done=first, quiet=not writes)
        feed = Feed(stage.source, self.mesh, config.steps, self.spikes.index)
        profile = Profile(self.workdir, self.options.profile_steps)
        recorder = Recorder(
            writer, progress, config, stage, meta["logged"],
            spikes=self.spikes, workdir=self.workdir, extra=goodput.metrics,
        )  # fmt: skip

        def evaluate(done: int) -> dict[str, float]:
            if stage.evaluate is None:
                return {}
            self.watchdog.at("evaluation", done)
            held_out = dict(stage.evaluate(stage.whole(state.params)))
            writer.write(done - 1, {f"{HELD_OUT}{name}": value for name, value in held_out.items()})
            return held_out

        def rank(held_out: dict[str, float], best: bool) -> dict[str, float]:
            return patience.rank(best=best) if patience.on else held_out

        def about(done: int) -> dict[str, Any]:
            """What a checkpoint says that depends on the measurements so far."""
            result = done == (config.steps if patience.step is None else patience.step)  # as far as is known
            measured = stage.measure(stage.whole(state.params)) if stage.measure and result else {}
            return {**measured, "patience": patience.state()}

        def save(done: int, ranked: dict[str, float], *, unmeasured: bool = False) -> None:
            self.watchdog.at("saving", done)
            writer.sync()  # a run that goes on from here must find the lines before
            run = {
                "seconds": seconds_before + time.monotonic() - self.begun, "productive": goodput.productive,
                "logged": recorder.logged(), "spikes": self.spikes.state(), "unmeasured": unmeasured,
            }  # fmt: skip
            self.checkpoints.save(done, state, stage.source.state(), {**stage.meta, **about(done), **run}, ranked)
            nonlocal saved
            saved = done

        def leave(done: int, *, measures: bool) -> NoReturn:
            """SIGTERM: saves what is not saved yet and ends. A machine that is about to go has no time for an evaluation: it
            comes first when the run goes on."""
            recorder.flush()
            if done > saved:
                unranked = {config.keep_best: math.nan} if config.keep_best else {}
                save(done, unranked, unmeasured=measures and stage.evaluate is not None)
            raise Preempted

        held_out: dict[str, float] = {}
        done = saved = first
        with writer, progress, feed, contextlib.closing(profile):
            if patience.on and first == 0 and not patience.seen:
                save(0, rank({}, patience.see(0, evaluate(0))))
            if unmeasured:
                held_out = evaluate(first)
                best = patience.on and patience.see(first, held_out)
                self.checkpoints.amend(first, {**about(first), "unmeasured": False}, rank(held_out, best))
            for step in range(first, config.steps):
                if patience.exhausted:
                    break
                if profile.due(step):
                    recorder.flush()
                    profile.before(step)
                begun = time.monotonic()
                with self.compilations.of_step(step - first):
                    self.watchdog.at("batch", step)
                    try:
                        batch, source_metrics = feed.batch(step, stage.whole(state.params))
                    except Preempted:  # in the middle of a rollout, which is drawn again
                        leave(done, measures=False)
                    self.watchdog.at("update", step)
                    if step == first:
                        self.compile_for_examples(state)
                    state, means = self.programs(state, batch, stage.frozen, self.schedule)
                del batch
                recorder.push(step, means, source_metrics)  # reads the step before: the host never waits for this one
                done, last = step + 1, step + 1 == config.steps
                stop = self.terminate.here() and not last
                saves, best = done % config.checkpoint_every == 0 or last, False
                due = bool(config.eval_every) and done % config.eval_every == 0 and not last and done > stage.still
                # What a checkpoint is ranked by belongs to its own parameters; what patience sees, to the config alone.
                measures = due or bool(saves and config.keep_best and (last or not patience.on))
                if stop or saves or measures:
                    recorder.flush()  # waits for this step: its time is a step's, and not that of what follows
                goodput.step(done, time.monotonic() - begun)
                if stop:
                    leave(done, measures=measures)
                if saves or measures:
                    try:
                        held_out = evaluate(done) if measures else {}
                    except Preempted:
                        leave(done, measures=True)
                    best = patience.on and bool(held_out) and patience.see(done, held_out)
                if saves or best:
                    save(done, rank(held_out, best))
            recorder.flush()
            held_out = patience.held_out or held_out or evaluate(done)
        self.watchdog.at("the end", done)
        self.checkpoints.wait()  # a stage is done only when its checkpoint is on disk
        if patience.step is not None:
            log.warning("%s: %s", stage.name, patience.report(done))
            self.checkpoints.make_newest(patience.step)
        summary = {
            "seconds": seconds_before + time.monotonic() - self.begun,
            "steps": done,
            **({"best_step": patience.step} if patience.on else {}),
            **recorder.logged(),
            "held_out": held_out,
            "compilations": self.compilations.count,
            "compilations_after_warm_up": self.compilations.after_warm_up,
            **goodput.metrics(),
            "jax": jax.__version__,  # of this start, as the devices; all hosts have the same
            "device_kind": self.mesh.devices.flat[0].device_kind,
        }
        if self.is_first_process:
            write_json(self.workdir / "done.json", summary)
        return summary
