"""Checkpoints: Orbax writes them whole or not at all; `fingerprint` tells whether they still are.

Items of a step: `params`, `optimizer` (moments and counters), `source` (what an RL source holds), `meta` (JSON: config,
model, tokenizer, seconds, fingerprints, and a digest of all that). What other stages read of them is `training.saved`.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from llama_jax.files import write_json
from llama_jax.parallel.hosts import first_problem, on_host_0
from llama_jax.paths import absolute, first_line, move, untaken
from llama_jax.training.fingerprint import (
    CheckpointError,
    as_stored,
    cast,
    check_fingerprints,
    fingerprints,
    is_out_of_memory,
    is_outage,
    open_meta,
    sealed,
)
from llama_jax.training.saved import steps_in
from llama_jax.training.state import TrainState

log = logging.getLogger(__name__)

_PAUSES = (1.0, 5.0, 20.0)  # seconds before each further try to read from a disk or a service that fails
_OUTAGE = "the disk or the service fails, which says nothing of what it holds"


def _items(state: TrainState, source: Any) -> dict[str, Any]:
    items = {
        "params": state.params,
        "optimizer": {
            "state": state.opt_state, "step": state.step, "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        },
    }  # fmt: skip
    return {**items, "source": source} if jax.tree.leaves(source) else items


class Checkpoints:
    """The checkpoints of one stage's workdir: the newest `keep`, each multiple of `keep_every`, and the best by a metric."""

    def __init__(
        self, directory: Path, *, keep: int, keep_every: int = 0, best: str = "", best_is_lowest: bool = True
    ):  # fmt: skip
        policies: list[Any] = [preservation.LatestN(keep)]
        if keep_every:
            policies.append(preservation.EveryNSteps(keep_every))
        self.directory, self.best = absolute(directory), best
        self.writing: int | None = None  # the newest step whose writing was begun
        worst = math.inf if best_is_lowest else -math.inf

        def measured(metrics: Mapping[str, float]) -> float:
            value = metrics.get(best, math.nan)  # absent where the run was begun under another metric
            return value if math.isfinite(value) else worst

        ranking: dict[str, Any] = {}
        if best:
            # Orbax keeps the last of the order. A checkpoint without a measurement, or with NaN, is never the best.
            policies.append(
                preservation.BestN(
                    get_metric_fn=measured, reverse=best_is_lowest, n=1, keep_checkpoints_without_metrics=False
                )
            )
            # Without `best_fn` Orbax writes no measurement, and a resumed run would not know its best checkpoint.
            ranking = {"best_fn": measured, "best_mode": "min" if best_is_lowest else "max"}
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation.AnyPreservationPolicy(policies), create=True,
                enable_async_checkpointing=True,
                # Network disks may show hosts listings of different age; those that go on from different steps hang.
                single_host_load_and_broadcast=True, **ranking,
            ),
        )  # fmt: skip
        # Orbax would ask by the number of each checkpoint, of past ones too, whether a stop was agreed on; JAX would take it
        # for the point that this host is at (`hosts.stop_agreed`).
        self.manager.reached_preemption = lambda step: False

    def save(
        self, step: int, state: TrainState, source: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving; returns once the arrays may be changed again. `metrics` must hold the one to rank by."""
        items = _items(state, source)
        meta = sealed({**meta, "step": step, "fingerprints": fingerprints(items)})
        self.wait()  # Orbax would, and tell of the checkpoint before in the name of this one
        self.writing = step
        with self._told(f"checkpoint {step} could not be written"):
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(meta), **{name: ocp.args.StandardSave(tree) for name, tree in items.items()}
                ),
                metrics={self.best: float(metrics[self.best])} if self.best else None,
            )

    def amend(self, step: int, meta: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Puts what was measured of a finished checkpoint only later into its meta, and ranks it."""
        path = self.directory / str(step)

        def write() -> None:
            if self.best:
                write_json(path / "metrics" / "metrics", {self.best: float(metrics[self.best])})
            write_json(path / "meta" / "metadata", sealed({**open_meta(path), **meta}))

        with self._told(f"checkpoint {step} could not be changed"):
            on_host_0(write)
            self.manager.reload()

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._told(f"checkpoint {self.writing} could not be written"):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        with self._told(f"checkpoint {self.writing} could not be written"):
            self.manager.close()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turns the many errors of a write that fails (also of one begun earlier) into one line with what is left."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types
            if isinstance(error, CheckpointError) or isinstance(error, jax.errors.JaxRuntimeError):
                raise
            steps = steps_in(self.directory)
            left = f"the newest whole one is {steps[-1]}" if steps else "there is none before it"
            raise CheckpointError(f"{self.directory}: {what}; {left}: {first_line(error)}") from error

    def steps(self) -> list[int]:
        """The steps that have been written, in order."""
        return sorted(self.manager.all_steps())

    def restore(self, target: TrainState, source_target: Any) -> tuple[TrainState, Any, dict[str, Any]] | None:
        """The newest step that passes its fingerprints, laid out as `target` asks, or None if there is none at all.

        Damaged steps are reported, and moved into `damaged/` beside the checkpoints once an older whole one is found, so
        that the run can write them again.

        Raises:
          CheckpointError: if there are checkpoints but none that is whole, or one that cannot be read now; nothing is moved
            then.
          JaxRuntimeError: it does not fit into the memory of the devices; as JAX says it.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        damaged, reason = [], ""
        for step in steps:
            found, reason = None, ""
            try:
                found, meta = self._read_patiently(step, _items(target, source_target))
            except Exception as error:  # Orbax and TensorStore raise many types for damaged files
                if is_out_of_memory(error):
                    raise
                reason = f"{_OUTAGE}: {first_line(error)}" if is_outage(error) else first_line(error)
            reason = first_problem(reason)
            if _OUTAGE in reason:
                raise CheckpointError(f"{self.directory}: checkpoint {step} cannot be read: {reason}")
            if not reason:  # all hosts have read their parts, so all can add them up
                try:
                    check_fingerprints(found, meta["fingerprints"], f"checkpoint {step}")
                except CheckpointError as error:  # the same on every host
                    reason = str(error)
            if reason:
                log.warning("checkpoint %d of %s is damaged: %s", step, self.directory, reason)
                damaged.append(step)
                continue
            self._set_aside(damaged, "damaged")
            wanted = _items(target, {})
            params, optimizer = (cast(found[name], wanted[name]) for name in ("params", "optimizer"))
            state = TrainState(
                step=optimizer["step"], params=params, opt_state=optimizer["state"],
                skipped=optimizer["skipped"], skipped_in_a_row=optimizer["skipped_in_a_row"],
            )  # fmt: skip
            return state, found.get("source", {}), meta
        if steps:
            raise CheckpointError(f"{self.directory}: none of the checkpoints {steps} is whole: {reason}")
        return None

    def _read_patiently(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """`_read`, tried again while it is the disk or the service that fails."""
        for pause in _PAUSES:
            try:
                return self._read(step, items)
            except Exception as error:
                if not is_outage(error):
                    raise
                log.warning("checkpoint %d of %s: %s; again in %g s", step, self.directory, first_line(error), pause)
            time.sleep(pause)
        return self._read(step, items)

    def _read(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """This host's part of a checkpoint. The hosts do not meet in here, as they would in Orbax's manager: one that cannot
        read its own files would leave the others waiting for it."""
        path = self.directory / str(step)
        meta, handler, found = open_meta(path), ocp.StandardCheckpointHandler(), {}
        for name, tree in items.items():
            found[name] = handler.restore(path / name, args=ocp.args.StandardRestore(as_stored(tree, path / name)))
        return found, meta

    def make_newest(self, step: int, aside: str) -> None:
        """Moves all checkpoints after `step` into the directory `aside` of the workdir: what restores takes the newest one."""
        if step not in self.steps():
            raise CheckpointError(f"{self.directory}: checkpoint {step} is gone, which the run is to go on from")
        self._set_aside([later for later in self.steps() if later > step], aside)

    def _set_aside(self, steps: Sequence[int], where: str) -> None:
        """Moves checkpoints out of the way. They are not deleted: what cannot be read today may be whole tomorrow."""
        if not steps:
            return

        def act() -> None:
            aside = self.directory.parent / where
            aside.mkdir(exist_ok=True)
            for step in steps:
                move(self.directory / str(step), untaken(aside / str(step)))

        on_host_0(act)
        self.manager.reload()
