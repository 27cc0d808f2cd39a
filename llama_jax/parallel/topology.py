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
    largest: chips of the largest slice.
    devices: how many devices JAX sees in a chip.
    """

    name: str
    peak: float  # bfloat16 operations a second
    hbm_bandwidth: float
    link: float
    dimensions: int
    clock: float
    largest: int
    devices: int = 1
    config: str | None = None  # libtpu's name of the way to join a chip's cores
    dcn: float = 6.25e9


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1.228e12, 4.5e10, 3, 1.05e9, 4096, config="megacore"),
        Chip("v5e", 197e12, 0.819e12, 4.5e10, 2, 1.50e9, 256, dcn=3.125e9),
        Chip("v5p", 459e12, 2.765e12, 9.0e10, 3, 1.75e9, 6144),
        Chip("v6e", 918e12, 1.640e12, 9.0e10, 2, 1.75e9, 256, dcn=1.25e10),
        Chip("tpu7x", 2307e12, 7.380e12, 9.0e10, 3, 2.20e9, 9216, devices=2, dcn=1.25e10),
    )
}
# Slices of these are named after their cores (two a chip), the others after their chips.
_CORES = {"v4": 2, "v5p": 2, "tpu7x": 2}
# In two dimensions all slices, in three those that are less than cubes of 4x4x4; of cubes there is every cuboid.
_SMALL = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
}


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
    if found.group(3):
        cores = _CORES.get(chip.name, 1)
        shapes = _named(chip)
        chips, over = divmod(int(found.group(3)), cores)
        if over or chips not in shapes:
            known = [f"{chip.name}-{known * cores}" for known in shapes]
            some = ", ".join(known if len(known) <= 8 else (*known[:8], f"... up to {known[-1]}"))
            raise ValueError(f"topology {name!r}: no such slice; expected one of {some}")
        return chip, shapes[chips]
    shape = tuple(int(n) for n in found.group(2).split("x") if n)
    if len(shape) != chip.dimensions:
        example = "x".join(map(str, _named(chip)[16]))
        raise ValueError(f"topology {name!r}: a {chip.name} slice has {chip.dimensions} dimensions, as in {example}")
    cubes = chip.dimensions == 3 and all(size and size % 4 == 0 for size in shape)
    if math.prod(shape) > chip.largest or not (cubes or shape in _SMALL[chip.dimensions]):
        known = ", ".join("x".join(map(str, small)) for small in _SMALL[chip.dimensions])
        more = f" or multiples of 4, up to {chip.largest} chips" if chip.dimensions == 3 else ""
        raise ValueError(f"topology {name!r}: no such slice; expected {known}{more}")
    return chip, shape


def _named(chip: Chip) -> dict[int, tuple[int, ...]]:
    """{chips: shape} of the slices that have a product name; of cuboids with as many cubes the most compact one has it."""
    shapes = {math.prod(shape): shape for shape in _SMALL[chip.dimensions]}
    cubes = chip.largest // 64 if chip.dimensions == 3 else 0
    for a in range(1, math.isqrt(cubes) + 1):
        for b in range(a, cubes // a + 1):
            for c in range(b, cubes // (a * b) + 1):
                shape = (4 * a, 4 * b, 4 * c)
                shapes[64 * a * b * c] = min(shapes.get(64 * a * b * c, shape), shape, key=sum)
    return dict(sorted(shapes.items()))


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
    if math.prod(shape) == 1:
        settings["chips_per_host_bounds"] = (1, 1, 1)  # libtpu expects hosts of 2x2
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
