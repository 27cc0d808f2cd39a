"""What a run has saved, for those that begin from it: any stage starts from any other's `params`, on any mesh.

Wherever a checkpoint is read, `WORKDIR` means its newest one and `WORKDIR@STEP` another (`named`).
"""

import contextlib
import functools
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from llama_jax.files import read_json
from llama_jax.parallel.axes import abstract
from llama_jax.parallel.hosts import from_host_0, on_host_0
from llama_jax.paths import absolute, first_line, is_remote, place
from llama_jax.training.fingerprint import (
    CONVERTED,
    CheckpointError,
    as_stored,
    cast,
    check_fingerprints,
    damages,
    is_out_of_memory,
    open_meta,
)

log = logging.getLogger(__name__)

POLICY = "policy"  # the model that other stages start from, where a stage trains several


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
