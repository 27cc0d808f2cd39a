"""TPU slices that are described, not there: their devices for ahead-of-time compilation, and the facts of their chips.

With libtpu installed (`pip install 'llama_jax[tpu]'`, on any Linux machine) JAX compiles for such devices with the real TPU
compiler. Two things decide whether the program is the one of a real pod: the slice must be described with its wrap-around
links, and the mesh must follow its wires (`mesh.make_mesh` does). With either missing every all-gather becomes an all-reduce
of twice the traffic.
"""

import dataclasses
import math
import os
import re
from typing import Any

import numpy as np

from llama_jax.parallel.mesh import has_tpu_chips


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip, from Google Cloud's documentation of its versions; per chip, in SI units.

    clock: cycles a second of the compiler's estimates: peak / (operations a cycle of all matrix units).
    link: bytes a second of one link to a neighbour, in one direction. The torus has `dimensions` of them, twice each.
    dcn: bytes a second to other slices, over the data-centre network (a host's share for each of its chips).
    devices: how many devices JAX sees in a chip.
    """

    name: str
    peak: float  # bfloat16 operations a second
    hbm_bandwidth: float
    link: float
    dimensions: int
    clock: float
    devices: int = 1
    config: str | None = None  # libtpu's name of the way to join a chip's cores
    dcn: float = 6.25e9


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1.228e12, 4.5e10, 3, 1.05e9, config="megacore"),
        Chip("v5e", 197e12, 0.819e12, 4.5e10, 2, 1.50e9, dcn=3.125e9),
        Chip("v5p", 459e12, 2.765e12, 9.0e10, 3, 1.75e9),
        Chip("v6e", 918e12, 1.640e12, 9.0e10, 2, 1.75e9, dcn=1.25e10),
        Chip("tpu7x", 2307e12, 7.380e12, 9.0e10, 3, 2.20e9, devices=2, dcn=1.25e10),
    )
}
# Slices of these are named after their cores (two a chip), the others after their chips.
_CORES = {"v4": 2, "v5p": 2, "tpu7x": 2}
_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
        1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of `shape` chips."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        """The number of chips, of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As it is given on the command line."""
        shape = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return shape if self.slices == 1 else f"{self.slices} x {shape}"

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which dimensions close to a ring."""
        return _wrap(self.chip, self.shape)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the slice's shape of `v5p:8x8x8` or of a product name such as `v5p-1024`; ValueError otherwise."""
    found = re.fullmatch(r"(\w+?)(?::([\dx]+)|-(\d+))", name)
    chip = CHIPS.get(found.group(1)) if found else None
    if chip is None:
        raise ValueError(f"topology {name!r}: expected <chip>:<shape> or <chip>-<number>, chip one of {', '.join(CHIPS)}")
    shapes = _SHAPES[chip.dimensions]
    if found.group(3):
        cores = _CORES.get(chip.name, 1)
        number = int(found.group(3))
        if number % cores or number // cores not in shapes:
            known = ", ".join(f"{chip.name}-{chips * cores}" for chips in shapes)
            raise ValueError(f"topology {name!r}: no such slice; expected one of {known}")
        found_shape = shapes[number // cores]
    else:
        found_shape = found.group(2)
    shape = tuple(int(n) for n in found_shape.split("x") if n)
    if len(shape) != chip.dimensions or 0 in shape:
        raise ValueError(f"topology {name!r}: a {chip.name} slice has {chip.dimensions} dimensions, as in {shapes[16]}")
    return chip, shape


def _wrap(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    # Cubes of 4 are joined by optical switches, which close every dimension; in two dimensions only the full pod is closed.
    return tuple(size % 4 == 0 and min(shape) >= 4 if chip.dimensions == 3 else size == 16 for size in shape)


def describe(name: str, *, slices: int = 1) -> Topology:
    """The topology of that name, with devices to compile for.

    Raises:
      ValueError: for a name or shape that does not exist, and without libtpu.
    """
    chip, shape = parse(name)
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ask no cloud what machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so several processes may describe some
    if not has_tpu_chips():  # libtpu prints errors when nothing says which host of which slice this is
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{chip.name}-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_WORKER_ID", "0")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError("compiling for a TPU needs libtpu: pip install 'llama_jax[tpu]'") from None
    wrap = _wrap(chip, shape)
    settings: dict[str, Any] = {}
    if any(wrap):
        settings["wrap"] = (*wrap, *(False,) * (3 - len(wrap)))
    if chip.config:
        settings["chip_config_name"] = chip.config
    if slices > 1:
        settings["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{'x'.join(map(str, shape))}", **settings
        )
    except Exception as error:  # the runtime's own classes
        raise ValueError(f"topology {name!r}: libtpu refuses it: {str(error).splitlines()[0]}") from None
    return Topology(chip=chip, shape=shape, slices=slices, devices=tuple(found.devices))


def ring_width(topology: Topology, group: list[Any]) -> tuple[float, int]:
    """(links that a collective over these devices can use at once, in each chip; longest dimension it spans).

    A dimension that closes to a ring has two links that way, an open one only one that every chip has. (0, 0): the group
    spans slices and has no links, or it is one chip.
    """
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return 0.0, 0
    coords = np.array([device.coords[: len(topology.shape)] for device in group])
    links, longest = 0.0, 1
    for dimension, (size, wrap) in enumerate(zip(topology.shape, topology.wrap, strict=True)):
        extent = len(set(coords[:, dimension].tolist()))
        if extent > 1:
            links += 2 if wrap and extent == size else 1
            longest = max(longest, extent)
    return links, longest if links else 0
