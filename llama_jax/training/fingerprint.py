"""Whether a checkpoint is whole: fingerprints of its leaves, taken on the devices when it was saved, and a digest of its meta.

`meta` is a checkpoint's JSON; `damages` reads all that it names again, one leaf at a time.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from llama_jax.paths import absolute, place

_PIECE = 1 << 18  # elements that are added up at once: they stay in the cache
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
        raise CheckpointError(f"meta/metadata: cannot be read: {first_line(error)}") from None
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


def check_fingerprints(tree: Any, expected: Mapping[str, int], where: str) -> None:
    """CheckpointError naming the first leaf whose bits are not those that were saved."""
    for name, value in fingerprints(tree).items():
        if expected.get(name) != value:
            raise CheckpointError(f"{where}: {name} has checksum {value:#010x}, saved was {expected.get(name)}")


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
            return [f"{item}: cannot be read: {first_line(error)}"]
        leaves = {_keys(jax.tree_util.keystr(at)): at for at, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for keys, name in names.items():
            if keys not in leaves:
                lines.append(f"{name}: missing")
                continue
            try:
                leaf = _read_leaf(checkpointer, path, tree, leaves[keys])
            except Exception as error:
                lines.append(f"{name}: cannot be read: {first_line(error)}")
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


def first_line(error: Exception) -> str:
    """What an error of Orbax or TensorStore says, in one line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    # TensorStore tells what the system said after a long path.
    reason = re.search(r"\[OS error \d+: ([^\]]*)\]", str(error))
    return f"{reason[1]}: {text[:300]}" if reason else text[:300]
