"""Checkpoints: Orbax writes them whole or not at all; a fingerprint of every leaf tells whether they are still whole.

Items of a step: `params`, `optimizer` (moments and counters), `source` (what an RL source holds), `meta` (JSON: config,
model, tokenizer, seconds, fingerprints). Any stage starts from any other's `params`, on any mesh.
"""

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from llama_jax.parallel.axes import abstract
from llama_jax.training.state import TrainState

log = logging.getLogger(__name__)

POLICY = "policy"  # the model that other stages start from, where a stage trains several


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another shape."""


def fingerprints(tree: Any, *, dtype: str | None = None) -> dict[str, int]:
    """A 32-bit checksum of every leaf's bits, by path; the same on any sharding, and a changed word always changes it.

    With `dtype`, of the bits that the leaves have in that type.

    It is the sum of word * (2 * index + 1) modulo 2^32. An odd factor has an inverse there, so no single word can change
    unseen; and integer addition knows no order, so devices add their own parts.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    values = jax.device_get(_checksums([leaf for _, leaf in leaves], dtype))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, values, strict=True)}


@functools.partial(jax.jit, static_argnums=1)
def _checksums(leaves: list[jax.Array], dtype: str | None) -> list[jax.Array]:
    def checksum(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x, dtype)
        if x.dtype == jnp.bool_:
            words = x.astype(jnp.uint32)
        else:
            words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        # The row-major index, built elementwise from the indices of each dimension: every device makes its own part.
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            index = index * jnp.uint32(x.shape[axis] % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)

    return [checksum(leaf) for leaf in leaves]


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
    """The checkpoints of one stage's workdir."""

    def __init__(self, directory: Path, *, keep: int):
        self.manager = ocp.CheckpointManager(
            directory.resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True),
        )

    def save(self, step: int, state: TrainState, source: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving; returns once the arrays may be changed again."""
        items = _items(state, source)
        meta = {**meta, "step": step, "fingerprints": fingerprints(items)}
        self.manager.save(
            step,
            args=ocp.args.Composite(
                meta=ocp.args.JsonSave(meta), **{name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            ),
        )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        self.manager.close()

    def restore(self, target: TrainState, source_target: Any) -> tuple[TrainState, Any, dict[str, Any]] | None:
        """The newest step that passes its fingerprints, laid out as `target` asks, or None if there is none at all.

        Damaged steps are reported, and removed once an older whole one is found, so that the run can write them again.

        Raises:
          CheckpointError: if there are checkpoints but none that is whole; nothing is removed then.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        damaged, reason = [], ""
        for step in steps:
            try:
                items = _items(target, source_target)
                args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
                restored = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **args))
                found = {name: restored[name] for name in items}
                check_fingerprints(found, restored["meta"]["fingerprints"], f"checkpoint {step}")
                if restored["meta"]["step"] != step:
                    raise CheckpointError(f"checkpoint {step}: meta says step {restored['meta']['step']}")
            except Exception as error:  # Orbax and TensorStore raise many types for damaged files
                reason = _first_line(error)
                log.warning("checkpoint %d of %s is damaged: %s", step, self.manager.directory, reason)
                damaged.append(step)
                continue
            for newer in damaged:
                self.manager.delete(newer)
            optimizer = found["optimizer"]
            state = TrainState(
                step=optimizer["step"], params=found["params"], opt_state=optimizer["state"],
                skipped=optimizer["skipped"], skipped_in_a_row=optimizer["skipped_in_a_row"],
            )  # fmt: skip
            return state, found.get("source", {}), restored["meta"]
        if steps:
            raise CheckpointError(f"{self.manager.directory}: none of the checkpoints {steps} is whole: {reason}")
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def check_fingerprints(tree: Any, expected: Mapping[str, int], where: str) -> None:
    """CheckpointError naming the first leaf whose bits are not those that were saved."""
    for name, value in fingerprints(tree).items():
        if expected.get(name) != value:
            raise CheckpointError(f"{where}: {name} has checksum {value:#010x}, saved was {expected.get(name)}")


def newest_step(workdir: str | Path) -> Path:
    """The directory of the newest finished checkpoint of a stage's workdir."""
    directory = Path(workdir) / "checkpoints"
    steps = [path for path in directory.glob("*") if path.name.isdigit() and (path / "meta").exists()]
    if not steps:
        raise CheckpointError(f"{workdir}: expected a stage's workdir with checkpoints, found none")
    return max(steps, key=lambda path: int(path.name))


def read_meta(workdir: str | Path) -> dict[str, Any]:
    """The JSON stored with the newest checkpoint of a stage's workdir."""
    files = list((newest_step(workdir) / "meta").glob("metadata"))
    if not files:
        raise CheckpointError(f"{newest_step(workdir)}: expected meta/metadata, found nothing")
    try:
        return json.loads(files[0].read_text())
    except ValueError as error:
        raise CheckpointError(f"{files[0]}: expected JSON: {error}") from None


def restore_params(workdir: str | Path, specs: Any, mesh: Mesh) -> Any:
    """Parameters of a table from the newest checkpoint of another stage, verified and laid out on this mesh.

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
                (path / "params").resolve(),
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            raise CheckpointError(f"{path}: cannot be read: {_first_line(error)}") from None
    check_fingerprints({"params": params}, expected, str(path))
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
