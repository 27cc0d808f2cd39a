"""Checkpoints: Orbax writes them whole or not at all; `fingerprint` tells whether they still are.

Items of a step: `params`, `optimizer` (moments and counters), `source` (what an RL source holds), `meta` (JSON: config,
model, tokenizer, seconds, fingerprints, and a digest of all that). Any stage starts from any other's `params`, on any mesh.

Wherever a checkpoint is read, `WORKDIR` means its newest one and `WORKDIR@STEP` another (`named`).
"""

import contextlib
import functools
import logging
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from llama_jax.files import read_json, write_json
from llama_jax.parallel.axes import abstract
from llama_jax.parallel.hosts import first_problem, from_host_0, on_host_0
from llama_jax.paths import absolute, first_line, is_remote, move, place, untaken
from llama_jax.training.fingerprint import (
    CONVERTED,
    CheckpointError,
    as_stored,
    cast,
    check_fingerprints,
    damages,
    fingerprints,
    is_out_of_memory,
    is_outage,
    open_meta,
    sealed,
)
from llama_jax.training.state import TrainState

log = logging.getLogger(__name__)

POLICY = "policy"  # the model that other stages start from, where a stage trains several
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
        with self._told("the last checkpoint could not be written"):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        with self._told("the last checkpoint could not be written"):
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

    def newest(self) -> int | None:
        """The newest step that has been written."""
        return max(self.manager.all_steps(), default=None)

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

    def make_newest(self, step: int) -> None:
        """Moves all checkpoints after `step` into `after_best/`: the next stage takes the newest one."""
        if step not in self.manager.all_steps():
            raise CheckpointError(f"{self.directory}: checkpoint {step}, the best by {self.best}, is gone")
        self._set_aside([later for later in self.manager.all_steps() if later > step], "after_best")

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


def named(workdir: str | Path) -> tuple[Path, int | None]:
    """A workdir and the step of the checkpoint that is meant: 200 in `runs/sft@200`, in `runs/sft` None, the newest."""
    path = place(workdir)
    text, at, step = path.name.rpartition("@")
    if text and at and step.isdecimal() and not path.exists():
        return path.with_name(text), int(step)
    return path, None


def newest_step(workdir: str | Path) -> Path:
    """The directory of a stage's checkpoint: of the newest finished one, or of the one that is named.

    Which one that is says host 0: all hosts must read the same, and so must ask together.
    """
    path, chosen = named(workdir)
    directory = path / "checkpoints"
    steps = from_host_0(lambda: [step for step in steps_in(directory) if (directory / str(step) / "meta").exists()])
    if chosen is not None and chosen not in steps:
        raise CheckpointError(f"{path}: has no checkpoint {chosen}; it holds {', '.join(map(str, steps)) or 'none'}")
    if not steps:
        raise CheckpointError(f"{workdir}: expected a stage's workdir with checkpoints, found none{_conversion(path)}")
    return directory / str(steps[-1] if chosen is None else chosen)


def _conversion(path: Path) -> str:
    """How to make a stage's start of released weights, for the end of an error; "" if none lie here."""
    with contextlib.suppress(OSError, ValueError):
        config = path / "config.json"  # a run of ours has one too, which names no type
        said = read_json(config) if config.is_file() else {}
        if (
            (isinstance(said, dict) and "model_type" in said) or (path / "params.json").is_file()
            or (path.suffix == ".gguf" and path.is_file()) or any(path.glob("*.gguf"))
        ):  # fmt: skip
            copied, held = ("copied to this machine and ", path.name) if is_remote(path) else ("", str(path))
            output = f"{held.removesuffix('.gguf')}-llama_jax"
            return (
                f"; these weights are of another format, and are {copied}converted first: python -m llama_jax.convert "
                f"--input={shlex.quote(held)} --output={shlex.quote(output)} --to=llama_jax"
            )
    return ""


def warn_of_unfinished(workdir: str | Path) -> None:
    """Warns, once, of a model whose run has not ended: its newest checkpoint is just the last one so far.

    Nothing is said of `WORKDIR@STEP`, which is meant as it is, nor of converted weights. All hosts must ask together.
    """
    path, chosen = named(workdir)
    if chosen is None:
        on_host_0(_warn_of_unfinished, path, int(newest_step(path).name))


@functools.cache
def _warn_of_unfinished(path: Path, step: int) -> None:
    if not (path / "done.json").exists() and open_meta(path / "checkpoints" / str(step)).get("stage") != CONVERTED:
        log.warning(
            "%s: NOT FINISHED, it has no done.json: its newest checkpoint, of step %d, is taken as it is; wait for the end of "
            "that run, or say that this one is meant: %s@%d", path, step, path, step,
        )  # fmt: skip


def read_meta(workdir: str | Path) -> dict[str, Any]:
    """The JSON stored with a stage's checkpoint."""
    return _meta_of(newest_step(workdir))


def _meta_of(path: Path) -> dict[str, Any]:
    """The JSON in the directory of a checkpoint."""
    try:
        return open_meta(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}{instead(path)}") from None


def resumed_meta(workdir: str | Path) -> dict[str, Any]:
    """The JSON stored with the newest checkpoint of a run that can be read, from which the run goes on; {} if there is none."""
    for step in reversed(written_steps(workdir)):
        with contextlib.suppress(CheckpointError):  # the run will take an older one, too
            return open_meta(place(workdir) / "checkpoints" / str(step))
    return {}


def instead(path: Path) -> str:
    """What to read in place of a damaged checkpoint, for the end of an error; "" if its parameters turn out to be whole.

    Looks at whole checkpoints, so it may take a while. Of several hosts none looks: the others would wait for it.
    """
    workdir, broken = path.parent.parent, int(path.name)
    if jax.process_count() > 1:
        return f"; python -m llama_jax.verify --workdir={workdir} tells which checkpoints are whole, {workdir}@STEP means one"
    if not damages(workdir, broken, items=("params",)):
        return ""
    for step in reversed(written_steps(workdir)):
        if step != broken and not damages(workdir, step, items=("params",)):
            return f"; checkpoint {step} is whole: {workdir}@{step} means it"
    return "; there is no other that is whole"


def restore_params(workdir: str | Path, specs: Any, mesh: Mesh) -> Any:
    """Parameters of a table from a checkpoint of another stage, verified and laid out on this mesh.

    `specs` may be a part of what was saved: the trunk for a new head, or one model of several. Its types need not be those that
    were saved: what was is verified, and then cast.
    """
    path = newest_step(workdir)  # asked once: of a run that goes on the answer may be another one in a moment
    meta = _meta_of(path)
    expected, target = meta["fingerprints"], abstract(specs, mesh)
    saved = {name.removeprefix("['params']") for name in expected if name.startswith("['params']")}
    for leaf_path, _ in jax.tree_util.tree_leaves_with_path(target):
        if jax.tree_util.keystr(leaf_path) not in saved:
            raise CheckpointError(
                f"{path}: has no parameter {jax.tree_util.keystr(leaf_path)}; it holds {', '.join(sorted(saved))}"
            )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            stored = _counted(target, path / "params", meta)
            params = checkpointer.restore(
                absolute(path / "params"),
                args=ocp.args.PyTreeRestore(
                    item=stored,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
                    partial_restore=True,
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{path}: cannot be read: {first_line(error)}{instead(path)}") from None
    try:
        check_fingerprints({"params": params}, expected, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}{instead(path)}") from None
    return cast(params, target)


def _counted(target: Any, item: Path, meta: Mapping[str, Any]) -> Any:
    """`target` in the types that the fingerprints of a checkpoint are of."""
    if meta.get("stage") != CONVERTED:
        return as_stored(target, item)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), target)


def restore_model(workdir: str | Path, specs: Any, mesh: Mesh) -> Any:
    """Parameters of one model from a stage's checkpoint; of a stage that trains several (PPO), those of its policy."""
    if POLICY in saved_parts(workdir):
        return restore_params(workdir, {POLICY: specs}, mesh)[POLICY]
    return restore_params(workdir, specs, mesh)


def saved_parts(workdir: str | Path) -> dict[str, set[str]]:
    """The two upper levels of a stage's saved parameters: {"trunk": ..., "lm_head": ...} or {"policy": {"trunk", ...}}."""
    parts: dict[str, set[str]] = {}
    for name in read_meta(workdir)["fingerprints"]:
        item, upper, lower, *_ = [*name.removeprefix("['").removesuffix("']").split("']['"), "", ""]
        if item == "params":
            parts.setdefault(upper, set()).add(lower)
    return parts


def written_steps(workdir: str | Path) -> list[int]:
    """The steps of a stage's workdir that have a finished checkpoint, whole or not."""
    return steps_in(place(workdir) / "checkpoints")


def steps_in(directory: Path) -> list[int]:
    """The finished checkpoints in a directory, by step. (In a bucket the last file of a checkpoint says that it is.)"""
    found = [path for path in directory.glob("*") if path.name.isdigit()]
    return sorted(int(path.name) for path in found if ocp.path.step.is_path_finalized(place(path)))
