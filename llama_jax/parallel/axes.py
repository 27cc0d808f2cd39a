"""Logical axes and the two tables that map them to mesh axes: TRAIN and DECODE.

Every array of the project names *logical* axes ("width", "heads", "batch"); the tables below, and nothing else, say where
those live on the mesh. A layout is changed by editing one line here.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Initialiser = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # (key, shape, dtype) -> array
Rules = Mapping[str, str | tuple[str, ...] | None]

# Parameters are split over fsdp along their width and over tensor along heads, feed-forward and vocabulary; activations
# are split over the batch and the length, and between the two matrices of a block over tensor.
TRAIN: Rules = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffn": "tensor",
    "rank": None,  # of adapters: small, so that their other axis alone is split
    # activations
    "batch": ("data", "fsdp"),
    "pair": None,  # the chosen and the rejected response
    "length": "sequence",
    "residual": ("sequence", "tensor"),  # the length of what lies between blocks: norms and sums, never whole on a device
    "act_width": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_ffn": "tensor",
    "act_vocab": "tensor",
    "cache_rows": ("data", "fsdp"),
}

# What each part along `data` computes by itself: `jax.vmap(..., spmd_axis_name="data")` carries that axis.
WITHIN_DATA: Rules = {**TRAIN, "batch": "fsdp"}

# Generation reads every weight once a token: gathering them each time made it about 20x slower for the paper (section
# 3.2.3). So the width is not split; the weights are gathered once a rollout, and the freed axes carry more rows.
DECODE: Rules = {**TRAIN, "width": None, "length": None, "residual": None}

# A few prompts that enter some rows of a running batch are too few to split; the rows of the cache stay where they are.
ENTER: Rules = {**DECODE, "batch": None}

# What does not divide some of these by all of their mesh axes leaves the last ones out. With grouped-query attention there
# may be fewer key-value heads than tensor shards; then each shard holds a copy, as the paper does for multi-query attention
# (section A.2.1). A short row is divided between blocks as it is within them.
_REPLICATED_IF_INDIVISIBLE = {"kv_heads", "act_kv_heads", "residual"}

_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=TRAIN)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical axis of each dimension and its initialiser; stored as float32."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initialiser
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"parameter of shape {self.shape} has {len(self.axes)} axis names: {self.axes}")


def partition(shape: tuple[int, ...], axes: tuple[str | None, ...], rules: Rules, mesh: Any) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; ValueError if a dimension does not divide."""
    entries = []
    for size, axis in zip(shape, axes, strict=True):
        mesh_axes = rules[axis] if axis is not None else None
        names = (mesh_axes,) if isinstance(mesh_axes, str) else (mesh_axes or ())
        kept = names
        while size % math.prod(mesh.shape[name] for name in kept) and axis in _REPLICATED_IF_INDIVISIBLE:
            kept = kept[:-1]
        shards = math.prod(mesh.shape[name] for name in kept)
        if size % shards:
            raise ValueError(
                f"axis {axis!r} of shape {shape} has size {size}, which the mesh cannot divide into {shards} "
                f"shards ({' x '.join(f'{name}={mesh.shape[name]}' for name in names)})"
            )
        entries.append(mesh_axes if kept == names else kept or None)
    return PartitionSpec(*entries)


def shardings(specs: Any, mesh: Mesh, rules: Rules = TRAIN) -> Any:
    """The tree of NamedShardings of a tree of ParamSpecs."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, partition(spec.shape, spec.axes, rules, mesh)), specs, is_leaf=is_spec
    )


def abstract(specs: Any, mesh: Mesh | None = None, rules: Rules = TRAIN) -> Any:
    """The tree of ShapeDtypeStructs (with shardings, given a mesh) of a tree of ParamSpecs: a restore target."""
    if mesh is None:
        return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs, is_leaf=is_spec)
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding),
        specs,
        shardings(specs, mesh, rules),
        is_leaf=is_spec,
    )


def is_spec(leaf: Any) -> bool:
    """Whether a node of a tree is a ParamSpec (for `is_leaf`)."""
    return isinstance(leaf, ParamSpec)


@contextlib.contextmanager
def layout(rules: Rules) -> Iterator[None]:
    """Traces the code inside under another rule table. Enter it *inside* a jitted function, so that it is part of it."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def current_rules() -> Rules:
    """The rule table in force where it is called: TRAIN, or that of the `layout` around it."""
    return _rules.get()


def shards_of(axis: str) -> int:
    """Into how many parts the mesh of `jax.set_mesh` divides a logical axis; 1 without a mesh."""
    mesh, names = jax.sharding.get_abstract_mesh(), current_rules()[axis]
    if mesh.empty or names is None:
        return 1
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays an activation out by its logical axes, under the mesh of `jax.set_mesh`; without a mesh, does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, axes, _rules.get(), mesh))


def per_device(
    function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], axes: tuple[tuple[str | None, ...], ...],
    out_axes: tuple[str | None, ...],
) -> jax.Array:  # fmt: skip
    """`function(*arrays)` on each device's own part of arrays with these logical axes: for kernels, which the compiler cannot
    divide. Each part must be independent of the others, and the result have the size of the first array."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    specs = tuple(partition(x.shape, names, _rules.get(), mesh) for x, names in zip(arrays, axes, strict=True))
    out = partition(arrays[0].shape, out_axes, _rules.get(), mesh)
    # Kernels in Pallas do not tell along which axes their results vary, hence no check of it.
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*arrays)


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """The sharding of a batch array `[B, T, ...]`: rows over the data axes, length over the sequence axis."""
    return NamedSharding(mesh, PartitionSpec(TRAIN["batch"], *([TRAIN["length"]] if ndim > 1 else [])))


def batch_field(*axes: str | None) -> Any:
    """A field of a batch's dataclass whose array is not `[B, T, ...]`: it names its logical axes, as a parameter does."""
    return dataclasses.field(metadata={"axes": axes})


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """The tree of NamedShardings of a batch: by the axes that its fields name, else those of `[B, T, ...]`."""
    if not dataclasses.is_dataclass(batch):
        return jax.tree.map(lambda x: batch_sharding(mesh, x.ndim), batch)

    def of_field(field: dataclasses.Field) -> Any:
        value, axes = getattr(batch, field.name), field.metadata.get("axes")
        if axes is None or value is None:
            return batch_shardings(value, mesh)
        return NamedSharding(mesh, PartitionSpec(*(TRAIN[axis] if axis else None for axis in axes)))

    return dataclasses.replace(batch, **{field.name: of_field(field) for field in dataclasses.fields(batch)})


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh divides the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@functools.cache
def _held(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """The shards of a batch's rows that each process holds, ascending."""
    shards, held = batch_shards(mesh), {}
    for device, (rows,) in batch_sharding(mesh, 1).devices_indices_map((shards,)).items():
        held.setdefault(device.process_index, set()).add(rows.indices(shards)[0])
    return {process: tuple(sorted(own)) for process, own in held.items()}


@functools.cache
def row_groups(mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """The processes that hold the same rows of a batch, group by group in the order of the rows.

    Where `tensor` or `sequence` is wider than a host, several hosts compute on the same rows and must be given the same.

    Raises:
      ValueError: processes share a part of their rows, so that no slice of a batch is theirs.
    """
    shards, held = batch_shards(mesh), _held(mesh)
    groups: dict[tuple[int, ...], list[int]] = {}
    for process in sorted(held):
        groups.setdefault(held[process], []).append(process)
    if sum(map(len, groups)) != shards or len(set(map(len, groups))) > 1:
        sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ValueError(f"mesh: hosts share only a part of their rows ({sizes}); choose other sizes of tensor or sequence")
    return tuple(tuple(groups[rows]) for rows in sorted(groups))


def held_shards(mesh: Mesh) -> tuple[int, ...]:
    """Which of the `batch_shards` of each global batch this process holds; ValueError as of `row_groups`."""
    row_groups(mesh)
    return _held(mesh)[jax.process_index()]


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the group of processes that this one is of, by the rows they hold, and how many there are."""
    groups = row_groups(mesh)
    return next(i for i, processes in enumerate(groups) if jax.process_index() in processes), len(groups)
