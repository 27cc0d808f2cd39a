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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.parallel.hosts import gather_numbers
from llama_jax.paths import absolute, first_line, place

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

    It is the sum, modulo 2^32, of each word mixed with its index (`_mixed`). The mixing has an inverse, so no single word can
    change unseen, and after it every bit counts in all places, so of several one in 2^32 does: of plain multiples of the words
    two flipped signs cancelled. Integer addition knows no order, so devices add up their own parts, and hosts what their
    devices have.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    totals = dict.fromkeys(names, 0)
    here: dict[str, Any] = {}
    on_meshes: dict[Mesh, dict[str, jax.Array]] = {}
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            on_meshes.setdefault(leaf.sharding.mesh, {})[name] = leaf
        else:
            here[name] = leaf
    totals |= zip(here, jax.device_get(_whole(list(here.values()), dtype)), strict=True)
    for mesh, found in on_meshes.items():
        parts = _parts(list(found.values()), mesh, tuple(leaf.sharding.spec for leaf in found.values()), dtype)
        rows = [np.asarray(shard.data) for shard in parts.addressable_shards]
        sums = np.sum(np.concatenate(rows), axis=0, dtype=np.uint32)
        if not parts.is_fully_addressable:
            sums = np.sum(gather_numbers(sums), axis=0, dtype=np.uint32)
        totals |= zip(found, sums, strict=True)
    return {name: int(value) for name, value in totals.items()}


def fingerprint_part(x: np.ndarray, start: int) -> int:
    """What elements from number `start` on (row-major) add to their leaf's fingerprint in float32; parts add modulo 2^32.

    On the host and in pieces, for leaves that are larger than memory.
    """
    flat, total = x.reshape(-1), 0
    for first in range(0, flat.size, _PIECE):
        words = np.ascontiguousarray(flat[first : first + _PIECE], np.float32).view(np.uint32)
        index = np.arange(words.size, dtype=np.uint32) + np.uint32((start + first) % 2**32)
        total += int(np.sum(_mixed(words, index, np.uint32), dtype=np.uint32))
    return total % 2**32


@functools.partial(jax.jit, static_argnums=1)
def _whole(leaves: list[jax.Array], dtype: str | None) -> list[jax.Array]:
    return [_checksum(jnp.asarray(x, dtype), jnp.uint32(0), _strides(x.shape)) for x in leaves]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _parts(leaves: list[jax.Array], mesh: Mesh, specs: tuple[PartitionSpec, ...], dtype: str | None) -> jax.Array:
    """What each device adds to the fingerprint of each leaf, [devices, leaves].

    The sums over devices are the hosts' business: between processes on CPUs independent reductions of scalars may meet in
    another order on each side, and then the part of one leaf is added to that of another.
    """

    def here(*parts: jax.Array) -> jax.Array:
        sums = []
        for x, spec, leaf in zip(parts, specs, leaves, strict=True):
            strides = _strides(leaf.shape)
            start, counts, used = jnp.uint32(0), jnp.bool_(True), set()
            for axis, names in enumerate(spec):
                names = () if names is None else names if isinstance(names, tuple) else (names,)
                if names:
                    number = jax.lax.axis_index(names).astype(jnp.uint32)
                    start += number * jnp.uint32(x.shape[axis] * strides[axis] % 2**32)
                    used |= set(names)
            for name in mesh.axis_names:  # of devices that hold the same part the first one counts
                if name not in used:
                    counts &= jax.lax.axis_index(name) == 0
            sums.append(jnp.where(counts, _checksum(jnp.asarray(x, dtype), start, strides), 0))
        return jnp.stack(sums)[None]

    return jax.shard_map(
        here, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(mesh.axis_names), check_vma=False
    )(*leaves)  # fmt: skip


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart, in a row-major array, two neighbours along each dimension are."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _checksum(x: jax.Array, start: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """The sum over a part of an array that begins with element number `start` of the whole."""
    if x.ndim > 2:  # matrix by matrix: XLA's CPU backend holds all the words that it adds up

        def add(total, layer):
            first = start + layer.astype(jnp.uint32) * jnp.uint32(strides[0] % 2**32)
            return total + _checksum(x[layer], first, strides[1:]), None

        return jax.lax.scan(add, jnp.uint32(0), jnp.arange(x.shape[0]))[0]
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    # Built elementwise from the indices of each dimension: an array of them would be as large as the leaf.
    index = jnp.full(x.shape, start)
    for axis, stride in enumerate(strides):
        index += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(_mixed(words.astype(jnp.uint32), index, jnp.uint32), dtype=jnp.uint32)


def _mixed(words: Any, index: Any, uint32: Any) -> Any:
    """Words of 32 bits with their index in every bit: murmur3's finaliser, which has an inverse, of NumPy's arrays or JAX's."""
    words = words ^ (index * uint32(0x9E3779B9))  # 2^32 over the golden ratio: neighbours lie far apart
    words = (words ^ (words >> uint32(16))) * uint32(0x85EBCA6B)
    words = (words ^ (words >> uint32(13))) * uint32(0xC2B2AE35)
    return words ^ (words >> uint32(16))


def check_fingerprints(tree: Any, expected: Mapping[str, int], where: str) -> None:
    """CheckpointError naming the first leaf whose bits are not those that were saved."""
    for name, value in fingerprints(tree).items():
        if expected.get(name) != value:
            raise CheckpointError(f"{where}: {name} has checksum {value:#010x}, saved was {expected.get(name)}")


def as_stored(target: Any, item: Path) -> Any:
    """A restore target with the types that its arrays are stored in: those whose bits were counted when they were saved.

    `item` is the directory of the tree. What is not stored there keeps its type, and Orbax says that it is missing.
    """
    tree = ocp.PyTreeCheckpointHandler().metadata(absolute(item)).tree
    types = {_keys(jax.tree_util.keystr(at)): leaf.dtype for at, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def typed(at: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        dtype = types.get(_keys(jax.tree_util.keystr(at)), leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(typed, target)


def cast(tree: Any, target: Any) -> Any:
    """The arrays of a tree in the types of `target`, where they lie."""
    return jax.tree.map(lambda x, wanted: x if x.dtype == wanted.dtype else x.astype(wanted.dtype), tree, target)


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
    lines, handler = [], ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            tree = handler.metadata(path).tree  # the checkpointer's would warn of a file that only whole checkpoints have
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


# As TensorStore says it; 2 and 20 are the system's numbers for a file that is not there.
_OUTAGE = re.compile(
    r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)\b|\[OS error (?!2:|20:)\d+:"
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the devices had no room for what was read. XLA says it with the word of a service that is asked too often."""
    if error is None:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError) and "out of memory" in str(error).lower():
        return True
    return is_out_of_memory(error.__cause__ or error.__context__)


def is_outage(error: BaseException | None) -> bool:
    """Whether an error of a read says that a disk or a service failed, and nothing of what lies there."""
    if error is None or is_out_of_memory(error):
        return False
    code = getattr(error, "code", None)  # HTTP's, of a bucket's clients
    return (
        isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, NotADirectoryError))
        or isinstance(code, int) and code >= 400 and code != 404
        or bool(_OUTAGE.search(str(error)))
        or is_outage(error.__cause__ or error.__context__)
    )  # fmt: skip
