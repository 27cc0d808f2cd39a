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
from llama_jax.training.profile import Profile, check_steps
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
    check_steps(options.profile_steps, count=config.steps)
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
        self.is_first_process = jax.process_index() == 0
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
        return state, {"step": 0, "seconds": 0.0, "productive": 0.0, "logged": {"metrics": {}}}

    def compile_for_examples(self, state: TrainState) -> None:
        """Where batches have several shapes, a program for each, before the first step."""
        examples = getattr(self.stage.source, "examples", lambda: ())
        for batch in [] if self.programs.compiled else examples():
            self.programs.compile(state, put_batch(batch, self.mesh), self.stage.frozen, self.schedule)

    def rewind(self, spike: Spike) -> None:
        """After a spike: goes back to the newest checkpoint that has seen none of the batches that are left out, or as far back
        as there is one."""
        if self.spikes.rewinds >= self.config.spike.limit:
            raise Diverged(f"{self.stage.name}: {spike}; loop.spike.limit={self.config.spike.limit} rewinds are used up")
        self.goodput.note(spike.step + 1)
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        first = self.spikes.go_back_to(spike.step, steps)
        if steps and first < steps[-1]:
            self.checkpoints.make_newest(first, "before_spike")
        left_out = self.spikes.leave_out(spike.step, first)
        fewer = len(left_out) < min(self.config.spike.skip, spike.step + 1)
        old = f"; no checkpoint is old enough to leave out {self.config.spike.skip}" if fewer else ""
        log.warning("%s: back to step %d, without batches %s%s", spike, first, left_out, old)

    def to_the_end(self) -> dict[str, Any]:
        """Trains from the newest checkpoint to the last step; the summary."""
        stage, config = self.stage, self.config
        passage = _Passage(self)
        first = done = passage.first
        feed = Feed(stage.source, self.mesh, config.steps, self.spikes.index)
        profile = Profile(self.workdir, self.options.profile_steps, done=first)
        with passage.writer, passage.progress, feed, contextlib.closing(profile):
            held_out = passage.measure_first()
            for step in range(first, config.steps):
                if passage.patience.exhausted:
                    break
                if profile.due(step):
                    passage.recorder.flush()
                    profile.turn()
                begun = time.monotonic()
                with self.compilations.of_step(step - first):
                    self.watchdog.at("batch", step)
                    try:
                        batch, source_metrics = feed.batch(step, stage.whole(passage.state.params))
                    except Preempted:  # in the middle of a rollout, which is drawn again
                        passage.leave(step, measures=False)
                    self.watchdog.at("update", step)
                    if step == first:
                        self.compile_for_examples(passage.state)
                    passage.state, means = self.programs(passage.state, batch, stage.frozen, self.schedule)
                del batch
                passage.recorder.push(step, means, source_metrics)  # reads the step before: the host never waits for this one
                done = step + 1
                held_out = passage.after(done, begun)
            passage.recorder.flush()
            passage.check_updated(done)
            held_out = passage.patience.held_out or held_out or passage.evaluate(done)
        self.watchdog.at("the end", done)
        self.checkpoints.wait()  # a stage is done only when its checkpoint is on disk
        if passage.patience.step is not None:
            log.warning("%s: %s", stage.name, passage.patience.report(done))
            self.checkpoints.make_newest(passage.patience.step, "after_best")
        summary = passage.summary(done, held_out)
        if self.is_first_process:
            write_json(self.workdir / "done.json", summary)
        return summary


class _Passage:
    """One way from a checkpoint towards the end, which a spike may cut short: the state, and what is told and kept of it."""

    def __init__(self, run: _Run):
        self.begun = time.monotonic()  # the seconds before are the checkpoint's
        self.run, self.stage, self.config = run, run.stage, run.config
        self.state, meta = run.start()
        self.first = self.saved = int(meta["step"])  # the steps that the newest checkpoint has seen
        self.seconds_before, self.unmeasured = float(meta["seconds"]), meta.get("unmeasured", False)
        self.patience = Patience(run.stopping)
        self.patience.restore(meta.get("patience", self.patience.state()))  # a checkpoint may be older than this field
        self.begins = bool(self.config.keep_best) and self.first == 0 and not self.patience.seen
        run.watchdog.begin(self.first)
        run.goodput.steps_from(self.first, meta["productive"])
        self.writer = MetricWriter(
            run.workdir, enabled=run.is_first_process, resume_step=self.first, remeasure=self.unmeasured or self.begins
        )
        self.progress = Progress(self.config.steps, self.stage.name, done=self.first, quiet=not run.is_first_process)
        self.recorder = Recorder(
            self.writer, self.progress, self.config, self.stage, meta["logged"],
            spikes=run.spikes, workdir=run.workdir, extra=run.goodput.metrics,
        )  # fmt: skip

    def measure_first(self) -> dict[str, float]:
        """Measures, before any step, the start that the best is compared with (so that a misspelt `keep_best` is told at once),
        or what SIGTERM left no time for; what was measured."""
        held_out: dict[str, float] = {}
        if self.begins:
            held_out = self.evaluate(0)
            if self.patience.on:
                self.save(0, self.patience.rank(best=self.patience.see(0, held_out)))
        if self.unmeasured:
            held_out = self.evaluate(self.first)
            ranked, _ = self.rank(self.first, held_out)
            self.run.checkpoints.amend(self.first, {**self.about(self.first), "unmeasured": False}, ranked)
        return held_out

    def evaluate(self, done: int) -> dict[str, float]:
        """What the stage measures on held-out data; in the log too."""
        if self.stage.evaluate is None:
            return {}
        self.run.watchdog.at("evaluation", done)
        held_out = dict(self.stage.evaluate(self.stage.whole(self.state.params)))
        self.patience.rule.check(held_out)
        self.writer.write(done - 1, {f"{HELD_OUT}{name}": value for name, value in held_out.items()})
        return held_out

    def after(self, done: int, begun: float) -> dict[str, float]:
        """Does what is due after a step that began at `begun`: measures and saves, or saves and ends; what was measured."""
        config, last = self.config, done == self.config.steps
        stop = self.run.terminate.here() and not last
        saves = done % config.checkpoint_every == 0 or last
        due = bool(config.eval_every) and done % config.eval_every == 0 and not last and done > self.stage.still
        # What a checkpoint is ranked by belongs to its own parameters; what patience sees, to the config alone.
        measures = due or bool(saves and config.keep_best and (last or not self.patience.on))
        if stop or saves or measures:
            self.recorder.flush()  # waits for this step: its time is a step's, and not that of what follows
        self.run.goodput.step(done, time.monotonic() - begun)
        if stop:
            self.leave(done, measures=measures)
        paused = time.monotonic()
        try:
            held_out = self.evaluate(done) if measures else {}
        except Preempted:
            self.leave(done, measures=True)
        ranked, best = self.rank(done, held_out)
        if saves or best:
            self.save(done, ranked)
        self.recorder.pace.skip(time.monotonic() - paused)
        return held_out

    def check_updated(self, done: int) -> None:
        """Diverged for a run that made none of its updates, of too few steps for the recorder to stop it: its result would be
        its start. Asked of the state, so that a start behind the last step hears it, too."""
        if int(jax.device_get(self.state.skipped)) == done:
            raise Diverged(
                f"{self.stage.name}: none of its {done} updates was finite, so the parameters are those that it began with"
            )

    def rank(self, done: int, held_out: dict[str, float]) -> tuple[dict[str, float], bool]:
        """What a checkpoint of these steps is ranked by, and whether patience has seen nothing better."""
        if not self.patience.on:
            return held_out, False
        best = bool(held_out) and self.patience.see(done, held_out)
        return self.patience.rank(best=best), best

    def about(self, done: int) -> dict[str, Any]:
        """What a checkpoint says that depends on the measurements so far."""
        step, stage = self.patience.step, self.stage
        result = done == (self.config.steps if step is None else step)  # as far as is known
        measured = stage.measure(stage.whole(self.state.params)) if stage.measure and result else {}
        return {**measured, "patience": self.patience.state()}

    def save(self, done: int, ranked: dict[str, float], *, unmeasured: bool = False) -> None:
        """Begins a checkpoint."""
        run, source = self.run, self.stage.source
        run.watchdog.at("saving", done)
        self.writer.sync()  # a run that goes on from here must find the lines before
        told = {
            "seconds": self.seconds(), "productive": run.goodput.productive, "logged": self.recorder.logged(),
            "spikes": run.spikes.state(), "unmeasured": unmeasured,
        }  # fmt: skip
        run.checkpoints.save(done, self.state, source.state(), {**self.stage.meta, **self.about(done), **told}, ranked)
        self.saved = done

    def leave(self, done: int, *, measures: bool) -> NoReturn:
        """SIGTERM: saves what is not saved yet and ends. A machine that is about to go has no time for an evaluation: it comes
        first when the run goes on."""
        self.recorder.flush()
        if done > self.saved:
            unranked = {self.config.keep_best: math.nan} if self.config.keep_best else {}
            self.save(done, unranked, unmeasured=measures and self.stage.evaluate is not None)
        self.run.goodput.note(done)
        raise Preempted

    def seconds(self) -> float:
        """Of the run so far."""
        return self.seconds_before + time.monotonic() - self.begun

    def summary(self, done: int, held_out: dict[str, float]) -> dict[str, Any]:
        """What `done.json` says."""
        return {
            "seconds": self.seconds(),
            "steps": done,
            **({"best_step": self.patience.step} if self.patience.on else {}),
            **self.recorder.logged(),
            "held_out": held_out,
            "compilations": self.run.compilations.count,
            "compilations_after_warm_up": self.run.compilations.after_warm_up,
            **self.run.goodput.metrics(),
            "jax": jax.__version__,  # of this start, as the devices; all hosts have the same
            "device_kind": self.run.mesh.devices.flat[0].device_kind,
        }
