"""Checkpoints: Orbax writes them whole or not at all; a fingerprint of every leaf tells whether they are still whole.

Items of a step: `params`, `optimizer` (moments and counters), `source` (what an RL source holds), `meta` (JSON: config,
model, tokenizer, seconds, fingerprints, and a digest of all that). Any stage starts from any other's `params`, on any mesh.

Wherever a checkpoint is read, `WORKDIR` means its newest one and `WORKDIR@STEP` another (`named`).
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from llama_jax.config import ConfigError
from llama_jax.files import write_json
from llama_jax.parallel.axes import abstract
from llama_jax.parallel.hosts import first_problem, on_host_0
from llama_jax.paths import absolute, move, place, remove_tree
from llama_jax.training.state import TrainState

log = logging.getLogger(__name__)

_PIECE = 1 << 18  # elements that are added up at once: they stay in the cache
POLICY = "policy"  # the model that other stages start from, where a stage trains several
CONVERTED = "convert"  # the stage of converted weights, whose fingerprints are those of float32 whatever they are stored in


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another shape."""


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint's meta with a digest of its values, which `open_meta` compares."""
    # Through JSON and back: what is read has lists for tuples, and is written later, when the values may have changed.
    values = json.loads(json.dumps({name: value for name, value in meta.items() if name != "digest"}))
    return {**values, "digest": _digest(values)}


def open_meta(step: Path) -> dict[str, Any]:
    """The meta of the checkpoint in a directory.

    Raises:
      CheckpointError: it cannot be read, or is not what was written.
    """
    path = step / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text())
        dict(meta["fingerprints"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"meta/metadata: cannot be read: {_first_line(error)}") from None
    # Without the name of the digest nothing else can have changed by one bit, and checkpoints of other writers have none.
    if "digest" in meta and meta["digest"] != _digest(meta):
        raise CheckpointError("meta/metadata: has another digest than when it was saved")
    if str(meta.get("step", step.name)) != step.name:
        raise CheckpointError(f"meta/metadata: says step {meta['step']}")
    return meta


def _digest(meta: Mapping[str, Any]) -> str:
    values = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def fingerprints(tree: Any, *, dtype: str | None = None) -> dict[str, int]:
    """A 32-bit checksum of every leaf's bits, by path; the same on any sharding, and a changed word always changes it.

    With `dtype`, of the bits that the leaves have in that type.

    It is the sum of word * (2 * index + 1) modulo 2^32. An odd factor has an inverse there, so no single word can change
    unseen; and integer addition knows no order, so devices add their own parts.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    values = jax.device_get(_checksums([leaf for _, leaf in leaves], dtype))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, values, strict=True)}


def fingerprint_part(x: np.ndarray, start: int) -> int:
    """What elements from number `start` on (row-major) add to their leaf's fingerprint in float32; parts add modulo 2^32.

    On the host and in pieces, for leaves that are larger than memory.
    """
    flat, total = x.reshape(-1), 0
    for first in range(0, flat.size, _PIECE):
        words = np.ascontiguousarray(flat[first : first + _PIECE], np.float32).view(np.uint32)
        factors = np.arange(words.size, dtype=np.uint32) * np.uint32(2) + np.uint32((2 * (start + first) + 1) % 2**32)
        total += int(np.sum(words * factors, dtype=np.uint32))
    return total % 2**32


@functools.partial(jax.jit, static_argnums=1)
def _checksums(leaves: list[jax.Array], dtype: str | None) -> list[jax.Array]:
    def checksum(x: jax.Array, start: jax.Array) -> jax.Array:
        x = jnp.asarray(x, dtype)
        if x.dtype == jnp.bool_:
            words = x.astype(jnp.uint32)
        else:
            words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        # The row-major index, built elementwise from the indices of each dimension: every device makes its own part.
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            index = index * jnp.uint32(x.shape[axis] % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(words * (2 * (index + start) + 1), dtype=jnp.uint32)

    def by_layers(x: jax.Array) -> jax.Array:
        """A stack of matrices one by one: XLA's CPU backend holds all the words that it adds up."""
        size = jnp.uint32(math.prod(x.shape[1:]) % 2**32)

        def add(total, layer):
            return total + checksum(x[layer], layer * size), None

        return jax.lax.scan(add, jnp.uint32(0), jnp.arange(x.shape[0], dtype=jnp.uint32))[0]

    return [by_layers(x) if x.ndim > 2 else checksum(x, jnp.uint32(0)) for x in leaves]


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
                enable_async_checkpointing=True, **ranking,
            ),
        )  # fmt: skip
        # Orbax would ask by the number of each checkpoint, of past ones too, whether a stop was agreed on; JAX would take it
        # for the point that this host is at (`hosts.stop_agreed`).
        self.manager.reached_preemption = lambda step: False

    def save(
        self, step: int, state: TrainState, source: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving; returns once the arrays may be changed again. `metrics` must hold the one to rank by."""
        if self.best and self.best not in (metrics or {}):
            raise ConfigError(f"loop.keep_best={self.best}: no such held-out metric; there are {', '.join(metrics or {})}")
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
            raise CheckpointError(f"{self.directory}: {what}; {left}: {_first_line(error)}") from error

    def newest(self) -> int | None:
        """The newest step that has been written."""
        return max(self.manager.all_steps(), default=None)

    def restore(self, target: TrainState, source_target: Any) -> tuple[TrainState, Any, dict[str, Any]] | None:
        """The newest step that passes its fingerprints, laid out as `target` asks, or None if there is none at all.

        Damaged steps are reported, and moved into `damaged/` beside the checkpoints once an older whole one is found, so
        that the run can write them again.

        Raises:
          CheckpointError: if there are checkpoints but none that is whole; nothing is moved then.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        damaged, reason = [], ""
        for step in steps:
            found, reason = None, ""
            try:
                found, meta = self._read(step, _items(target, source_target))
            except Exception as error:  # Orbax and TensorStore raise many types for damaged files
                reason = _first_line(error)
            if not (reason := first_problem(reason)):  # all hosts have read their parts, so all can add them up
                try:
                    check_fingerprints(found, meta["fingerprints"], f"checkpoint {step}")
                except CheckpointError as error:  # the same on every host
                    reason = str(error)
            if reason:
                log.warning("checkpoint %d of %s is damaged: %s", step, self.directory, reason)
                damaged.append(step)
                continue
            self._set_aside(damaged, "damaged")
            optimizer = found["optimizer"]
            state = TrainState(
                step=optimizer["step"], params=found["params"], opt_state=optimizer["state"],
                skipped=optimizer["skipped"], skipped_in_a_row=optimizer["skipped_in_a_row"],
            )  # fmt: skip
            return state, found.get("source", {}), meta
        if steps:
            raise CheckpointError(f"{self.directory}: none of the checkpoints {steps} is whole: {reason}")
        return None

    def _read(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """This host's part of a checkpoint. The hosts do not meet in here, as they would in Orbax's manager: one that cannot
        read its own files would leave the others waiting for it."""
        path = self.directory / str(step)
        meta = open_meta(path)
        handler = ocp.StandardCheckpointHandler()
        return {name: handler.restore(path / name, args=ocp.args.StandardRestore(tree)) for name, tree in items.items()}, meta

    def make_newest(self, step: int) -> None:
        """Moves all checkpoints after `step` into `after_best/`: the next stage takes the newest one."""
        if step not in self.manager.all_steps():
            raise CheckpointError(f"{self.directory}: checkpoint {step}, the best by {self.best}, is gone")
        self._set_aside([later for later in self.manager.all_steps() if later > step], "after_best")

    def _set_aside(self, steps: Sequence[int], where: str) -> None:
        """Moves checkpoints out of the way. They are not deleted: what cannot be read today may be whole tomorrow."""
        if not steps:
            return
        if jax.process_index() == 0:
            aside = self.directory.parent / where
            aside.mkdir(exist_ok=True)
            for step in steps:
                remove_tree(aside / str(step))
                move(self.directory / str(step), aside / str(step))
        first_problem("")  # all hosts wait for the move
        self.manager.reload()


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    # TensorStore tells what the system said after a long path.
    reason = re.search(r"\[OS error \d+: ([^\]]*)\]", str(error))
    return f"{reason[1]}: {text[:300]}" if reason else text[:300]


def check_fingerprints(tree: Any, expected: Mapping[str, int], where: str) -> None:
    """CheckpointError naming the first leaf whose bits are not those that were saved."""
    for name, value in fingerprints(tree).items():
        if expected.get(name) != value:
            raise CheckpointError(f"{where}: {name} has checksum {value:#010x}, saved was {expected.get(name)}")


def named(workdir: str | Path) -> tuple[Path, int | None]:
    """A workdir and the step of the checkpoint that is meant: 200 in `runs/sft@200`, in `runs/sft` None, the newest."""
    path = place(workdir)
    text, at, step = path.name.rpartition("@")
    if text and at and step.isdecimal() and not path.exists():
        return path.with_name(text), int(step)
    return path, None


def newest_step(workdir: str | Path) -> Path:
    """The directory of a stage's checkpoint: of the newest finished one, or of the one that is named."""
    path, chosen = named(workdir)
    directory = path / "checkpoints"
    steps = steps_in(directory)
    if chosen is not None and chosen not in steps:
        raise CheckpointError(f"{path}: has no checkpoint {chosen}; it holds {', '.join(map(str, steps)) or 'none'}")
    for step in reversed(steps) if chosen is None else [chosen]:
        if (directory / str(step) / "meta").exists():
            return directory / str(step)
    raise CheckpointError(f"{workdir}: expected a stage's workdir with checkpoints, found none")


def read_meta(workdir: str | Path) -> dict[str, Any]:
    """The JSON stored with a stage's checkpoint."""
    path = newest_step(workdir)
    try:
        return open_meta(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}{instead(path)}") from None


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

    `specs` may be a part of what was saved: the trunk for a new head, or one model of several.
    """
    path = newest_step(workdir)
    expected = read_meta(workdir)["fingerprints"]
    target = abstract(specs, mesh)
    saved = {name.removeprefix("['params']") for name in expected if name.startswith("['params']")}
    for leaf_path, _ in jax.tree_util.tree_leaves_with_path(target):
        if jax.tree_util.keystr(leaf_path) not in saved:
            raise CheckpointError(
                f"{path}: has no parameter {jax.tree_util.keystr(leaf_path)}; it holds {', '.join(sorted(saved))}"
            )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            params = checkpointer.restore(
                absolute(path / "params"),
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            raise CheckpointError(f"{path}: cannot be read: {_first_line(error)}{instead(path)}") from None
    try:
        check_fingerprints({"params": params}, expected, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}{instead(path)}") from None
    return params


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


def damages(workdir: str | Path, step: int, *, items: Sequence[str] = ()) -> list[str]:
    """What is wrong with a checkpoint, or with these items of it, a line for each leaf.

    Reads one leaf at a time and needs no stage.
    """
    path = absolute(place(workdir) / "checkpoints" / str(step))
    try:
        meta = open_meta(path)
    except CheckpointError as error:
        return [str(error)]
    expected, dtype = meta["fingerprints"], "float32" if meta.get("stage") == CONVERTED else None
    lines: list[str] = []
    by_item: dict[str, dict[tuple[str, ...], str]] = {}
    for name in expected:
        item, *keys = _keys(name)
        if not items or item in items:
            by_item.setdefault(item, {})[tuple(keys)] = name
    for item, names in by_item.items():
        lines += _damaged_leaves(path / item, item, names, expected, dtype)
    return lines


def _damaged_leaves(
    path: Path, item: str, names: Mapping[tuple[str, ...], str], expected: Mapping[str, int], dtype: str | None
) -> list[str]:
    lines = []
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            tree = checkpointer.metadata(path).item_metadata.tree
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            return [f"{item}: cannot be read: {_first_line(error)}"]
        leaves = {_keys(jax.tree_util.keystr(at)): at for at, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for keys, name in names.items():
            if keys not in leaves:
                lines.append(f"{name}: missing")
                continue
            try:
                leaf = _read_leaf(checkpointer, path, tree, leaves[keys])
            except Exception as error:
                lines.append(f"{name}: cannot be read: {_first_line(error)}")
                continue
            (found,) = fingerprints([leaf], dtype=dtype).values()
            if found != expected[name]:
                lines.append(f"{name}: has checksum {found:#010x}, saved was {expected[name]:#010x}")
    return lines


def _read_leaf(checkpointer: ocp.Checkpointer, path: Path, tree: Any, at: Any) -> Any:
    target = jax.tree_util.tree_map_with_path(lambda here, _: 0 if here == at else ocp.PLACEHOLDER, tree)
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target, is_leaf=lambda x: x is ocp.PLACEHOLDER)
    restored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=target, restore_args=kinds))
    (leaf,) = [leaf for here, leaf in jax.tree_util.tree_leaves_with_path(restored) if here == at]
    return leaf


def _keys(name: str) -> tuple[str, ...]:
    """The keys of a path as JAX writes it, however a container spells its own: ['a'][0].mu -> ('a', '0', 'mu')."""
    return tuple("".join(groups) for groups in re.findall(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)", name))
