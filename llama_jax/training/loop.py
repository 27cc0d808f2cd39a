"""The only training loop. It is given a Stage and knows no model, no task and no data.

In order of precedence a run (1) is already finished and not run again, (2) resumes from its newest whole checkpoint, or
(3) starts with the stage's `init`, which is fresh or takes another stage's parameters.
"""

import concurrent.futures
import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.config import ConfigError, differences
from llama_jax.files import write_json
from llama_jax.parallel.axes import batch_shards
from llama_jax.parallel.hosts import stop_agreed
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.metrics import Compilations, MetricWriter, Progress
from llama_jax.training.stage import LoopConfig, Stage
from llama_jax.training.state import abstract_state, born_sharded
from llama_jax.training.step import make_step, put_batch


class Diverged(RuntimeError):
    """Too many updates in a row were not finite."""


class Preempted(SystemExit):
    """SIGTERM came; the state is saved and the process ends with code 0."""


def claim(workdir: Path, described: Mapping[str, Any]) -> None:
    """Writes the run's config into its workdir, or refuses to go on under another one, naming the fields that differ.

    A workdir that holds nothing but a config (a run that was refused before it began) is free to take another one.
    """
    path = workdir / "config.json"
    described = json.loads(json.dumps(described))
    if path.exists() and any(other != path for other in workdir.iterdir()):
        changed = differences(json.loads(path.read_text()), described)
        if changed:
            raise ConfigError(
                f"{workdir} was begun with another config; use a new workdir or undo:\n  " + "\n  ".join(changed)
            )
        return
    write_json(path, described)


def finished(workdir: Path) -> dict[str, Any] | None:
    """The summary of a stage that has run to its end, or None."""
    path = workdir / "done.json"
    return json.loads(path.read_text()) if path.exists() else None


def train(stage: Stage, config: LoopConfig, *, mesh: Mesh, workdir: Path) -> dict[str, Any]:
    """Runs a stage to its end and returns its summary (also in `done.json`): seconds, final metrics, compilations."""
    shards = batch_shards(mesh) * config.microbatches
    if config.batch_size % shards:
        raise ConfigError(
            f"loop.batch_size={config.batch_size} cannot be divided into {batch_shards(mesh)} shards of the mesh "
            f"x {config.microbatches} microbatches"
        )
    begun = time.monotonic()
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep)
    # Closing waits for a save that is under way, also when an error ends the run.
    with jax.set_mesh(mesh), _Terminate() as terminate, Compilations() as compilations, contextlib.closing(checkpoints):
        target = abstract_state(stage.specs, stage.optimizer, mesh)
        restored = checkpoints.restore(target, stage.source.state())
        if restored is not None:
            state, source_state, meta = restored
            stage.source.restore(source_state)
            first, seconds_before, logged = int(meta["step"]), float(meta["seconds"]), meta["logged"]
            del source_state, restored
        else:
            state = born_sharded(stage.init, stage.specs, stage.optimizer, mesh)
            first, seconds_before, logged = 0, 0.0, {"metrics": {}, "tokens_per_second": 0.0}
        layout = jax.tree.map(lambda leaf: leaf.sharding, target)
        step_function = make_step(stage.loss, stage.optimizer, microbatches=config.microbatches, layout=layout)
        is_first_process = jax.process_index() == 0
        writer = MetricWriter(workdir, enabled=is_first_process, resume_step=first)
        progress = Progress(config.steps, stage.name, done=first, quiet=not is_first_process)
        feed = _Feed(stage.source, mesh, config.steps)
        recorder = _Recorder(writer, progress, config, stage, logged)

        def save(step: int) -> None:
            measured = stage.measure(stage.whole(state.params)) if stage.measure and step == config.steps else {}
            seconds = seconds_before + time.monotonic() - begun
            meta = {**stage.meta, **measured, "seconds": seconds, "logged": recorder.logged()}
            checkpoints.save(step, state, stage.source.state(), meta)

        with writer, progress, feed:
            for step in range(first, config.steps):
                with compilations.of_step(step - first):
                    batch, source_metrics = feed.batch(step, stage.whole(state.params))
                    state, means = step_function(state, batch, stage.frozen)
                del batch
                recorder.push(step, means, source_metrics)  # reads the step before: the host never waits for this one
                done = step + 1
                if stage.evaluate and config.eval_every and done % config.eval_every == 0 and done < config.steps:
                    recorder.flush()
                    writer.write(step, {f"held_out/{k}": v for k, v in stage.evaluate(stage.whole(state.params)).items()})
                stop = terminate.before(done)
                if stop or done % config.checkpoint_every == 0 or done == config.steps:
                    recorder.flush()
                    save(done)
                if stop:
                    raise Preempted(0)
            recorder.flush()
            held_out = dict(stage.evaluate(stage.whole(state.params))) if stage.evaluate else {}
            if held_out:
                writer.write(config.steps - 1, {f"held_out/{k}": v for k, v in held_out.items()})
        checkpoints.wait()  # a stage is done only when its checkpoint is on disk
        summary = {
            "seconds": seconds_before + time.monotonic() - begun,
            "steps": config.steps,
            **recorder.logged(),
            "held_out": held_out,
            "compilations": compilations.count,
            "compilations_after_warm_up": compilations.after_warm_up,
        }
        if is_first_process:
            write_json(workdir / "done.json", summary)
        return summary


class _Feed:
    """Hands out batches on the device; a source that does not look at parameters is asked one step ahead."""

    def __init__(self, source: Any, mesh: Mesh, steps: int):
        self.source, self.mesh, self.steps = source, mesh, steps
        self.thread = None if source.looks_at_params else concurrent.futures.ThreadPoolExecutor(1)
        self.next: dict[int, concurrent.futures.Future] = {}

    def batch(self, step: int, params: Any) -> tuple[Any, Mapping[str, float]]:
        if self.thread is None:
            batch, metrics = self.source.batch(step, params)
            return put_batch(batch, self.mesh), metrics
        future = self.next.pop(step, None) or self.thread.submit(self._make, step)
        if step + 1 < self.steps:
            self.next[step + 1] = self.thread.submit(self._make, step + 1)
        return future.result()

    def _make(self, step: int) -> tuple[Any, Mapping[str, float]]:
        batch, metrics = self.source.batch(step, None)
        return put_batch(batch, self.mesh), metrics

    def __enter__(self) -> "_Feed":
        return self

    def __exit__(self, *exc_info) -> None:
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)


class _Recorder:
    """Reads metrics one step late, logs them, and stops a run that diverges."""

    def __init__(
        self, writer: MetricWriter, progress: Progress, config: LoopConfig, stage: Stage, logged: Mapping[str, Any]
    ):
        self.writer, self.progress, self.config, self.stage = writer, progress, config, stage
        self.pending: tuple | None = None
        self.last: dict[str, float] = dict(logged["metrics"])
        self.rate_before: float = logged["tokens_per_second"]
        self.times: list[float] = []

    def push(self, step: int, means: Mapping[str, jax.Array], source_metrics: Mapping[str, float]) -> None:
        self.flush()
        self.pending = (step, means, source_metrics)

    def flush(self) -> None:
        if self.pending is None:
            return
        step, means, source_metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(means)).items()} | dict(source_metrics)
        self.times.append(time.monotonic())
        if self.stage.check is not None and not values["skipped_in_a_row"]:
            self.stage.check(step, values)
        self.last |= {name: value for name, value in values.items() if math.isfinite(value)}
        shown = {self.stage.show: self.last[self.stage.show]} if self.stage.show in self.last else {}
        self.progress.update(1, **shown)
        due = step % self.config.log_every == 0 or step == self.config.steps - 1 or source_metrics
        if due or values["skipped_in_a_row"]:
            rate = {"tokens_per_second": self.tokens_per_second()} if self.stage.tokens_per_step else {}
            self.writer.write(step, {**values, **rate})
        if values["skipped_in_a_row"] >= self.config.max_skipped_in_a_row:
            raise Diverged(
                f"{self.stage.name}: {int(values['skipped_in_a_row'])} updates in a row were not finite, the last at "
                f"step {step}; the newest checkpoint is from before them or holds their unchanged parameters"
            )

    def logged(self) -> dict[str, Any]:
        """What the summary tells; a checkpoint holds it too, for a run that is killed after its last step."""
        return {"metrics": self.last, "tokens_per_second": self.tokens_per_second()}

    def tokens_per_second(self) -> float:
        """The rate of this process's steps, the first two (compilation) left out; before there are any, that of the last."""
        times = self.times[1:]
        if len(times) < 2:
            return self.rate_before
        return self.stage.tokens_per_step * (len(times) - 1) / max(times[-1] - times[0], 1e-9)


class _Terminate:
    """Turns SIGTERM, of any host, into a stop of all hosts between the same two steps."""

    def __init__(self):
        self.requested = False
        # Of several processes JAX's coordination service takes the signal, and they agree on a step.
        self.alone = jax.process_count() == 1
        self.handled = self.alone and threading.current_thread() is threading.main_thread()

    def before(self, step: int) -> bool:
        """Whether to stop before this step; to be asked for every step, by every host."""
        return self.requested if self.alone else stop_agreed(step)

    def __enter__(self) -> "_Terminate":
        if self.handled:
            self.previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_) -> None:
        self.requested = True

    def __exit__(self, *exc_info) -> None:
        if self.handled:
            signal.signal(signal.SIGTERM, self.previous)
