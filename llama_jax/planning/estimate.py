"""From a compiled program to what a run of it will need: memory, arithmetic, communication, time, and the paper's 2T tokens.

What is read from the compiler: memory; the schedule, in cycles, of every fusion; every collective with its devices, its bytes
and whether arithmetic runs beside it. What is assumed is in `ASSUMPTIONS`, and printed with the result.
"""

import dataclasses
import functools
import re
import typing
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from llama_jax.parallel.topology import Topology, ring_width
from llama_jax.planning.flops import device_bytes, kernels, traced_flops
from llama_jax.planning.hlo import Collective, Module, mesh_axes
from llama_jax.planning.memory import hbm_bytes, moved_bytes
from llama_jax.planning.programs import Program

# Share of the peak that attention kernels reach: the compiler does not schedule what is written in Pallas.
KERNEL_EFFICIENCY = 0.5
ASSUMPTIONS = (
    "compiled, not run: the program is the TPU compiler's, no TPU took part",
    "fusions take the cycles that the compiler schedules for them, at peak / (operations a cycle) as the clock",
    f"attention kernels reach {KERNEL_EFFICIENCY:.0%} of the peak on the tiles that they visit; those of decoding read all of "
    "the cache, filled or not, as fast as memory can be read",
    "collectives move at the speed of the links that their devices span (two a closed dimension, one an open one); those "
    "that run beside arithmetic cost nothing until they outlast it",
    "input, checkpoints and failures cost nothing",
)
_GRID_INTENSITY = 0.385  # tCO2eq a MWh and power usage effectiveness: those that reproduce the paper's Table 2
_PUE = 1.1


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Communication over one combination of mesh axes, a step and device."""

    axes: str
    kind: str
    dtype: str
    count: int
    bytes: int
    seconds: float
    overlapped: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """Per chip and step, if not said otherwise. None where the program does not fit and was therefore not compiled."""

    program: str
    model: str
    topology: str
    chips: int
    mesh: dict[str, int]
    remat: str
    microbatches: int
    batch_size: int
    tokens_per_step: int
    fits: bool
    hbm_bytes_per_chip: int
    hbm_capacity_bytes: int
    memory: dict[str, int]
    model_flops_per_step: int  # of all chips
    full_attention_flops_per_step: int
    executed_flops_per_step: int | None
    memory_traffic_bytes: int | None
    traffic: tuple[Traffic, ...] | None
    fusion_seconds: float | None
    kernel_seconds: float | None
    exposed_seconds: float | None  # communication that nothing hides
    step_seconds: float | None
    roofline_seconds: float | None
    tokens_per_second_per_chip: float | None
    mfu: float | None
    mfu_full_attention: float | None

    @property
    def collective_bytes(self) -> dict[str, int]:
        """Bytes a device and step by the mesh axes that they travel."""
        found: dict[str, int] = {}
        for part in self.traffic or ():
            found[part.axes] = found.get(part.axes, 0) + part.bytes
        return found

    def run(self, tokens: float, *, price: float = 0.0, watts: float = 0.0) -> dict[str, float]:
        """Days, chip hours, US dollars (at `price` a chip hour) and tCO2eq (at `watts` a chip; Table 2) of so many tokens."""
        if self.tokens_per_second_per_chip is None:
            return {}
        hours = tokens / self.tokens_per_second_per_chip / 3600
        result = {"tokens": tokens, "days": hours / self.chips / 24, "chip_hours": hours}
        if price:
            result["dollars"] = hours * price
        if watts:
            result["tco2eq"] = hours * watts / 1e6 * _PUE * _GRID_INTENSITY
        return result


class DoesNotFit(Exception):
    """The compiler found no way to keep the program in the chip's memory."""

    def __init__(self, used: int, capacity: int):
        super().__init__(f"needs {used / 2**30:.1f} of {capacity / 2**30:.1f} GiB")
        self.used, self.capacity = used, capacity


def compile_program(program: Program) -> tuple[Any, Any]:
    """(its jaxpr, compiled); DoesNotFit if the compiler says so."""
    with jax.set_mesh(program.mesh):
        traced = program.trace()
        lowered = traced.lower()
    try:
        return traced.jaxpr, lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # Two wordings: at assignment ("Used 118.09G of 95.74G hbm"), or before it ("(800.00G) exceeds available HBM (95.74G)").
        number = r"([\d.]+)([KMGT])"
        found = re.search(f"Used {number} of {number} hbm", str(error)) or re.search(
            rf"\({number}\) exceeds available HBM \({number}\)", str(error)
        )
        if found is None:
            raise
        sizes = [float(found.group(i)) * 1024 ** ("KMGT".index(found.group(i + 1)) + 1) for i in (1, 3)]
        raise DoesNotFit(*(int(size) for size in sizes)) from None


def capacity(topology: Topology) -> int:
    """Bytes of main memory that the compiler gives a program on one device: asked by wanting too much."""
    device = topology.devices[0]
    much = jax.ShapeDtypeStruct((2**12, 2**30), "int8", sharding=SingleDeviceSharding(device))
    mesh = Mesh(np.array([device]), ("one",))
    try:
        compile_program(Program("probe", functools.partial(jax.jit(lambda x: x + 1).trace, much), mesh, 0, 0, 0, 0, {}))
    except DoesNotFit as error:
        return error.capacity
    raise RuntimeError(f"{topology.name}: the compiler fits 4 TiB into a chip")


def make_plan(
    program: Program, topology: Topology, mesh: Mesh, *, model: str, remat: str, microbatches: int
) -> tuple[Plan, str | None]:
    """Compiles a program and reads the plan from it; with it comes the compiled text, for those who want to look."""
    chip = topology.chip
    state, beside = (
        {name: device_bytes(tree) * chip.devices for name, tree in trees.items()} for trees in (program.state, program.beside)
    )
    facts = {
        "program": program.name, "model": model, "topology": topology.name, "chips": topology.chips,
        "mesh": dict(mesh.shape), "remat": remat, "microbatches": microbatches, "batch_size": program.rows,
        "tokens_per_step": program.tokens, "model_flops_per_step": program.model_flops,
        "full_attention_flops_per_step": program.full_attention_flops,
    }  # fmt: skip
    try:
        jaxpr, compiled = compile_program(program)
    except DoesNotFit as error:
        unknown = {name: None for name, hint in typing.get_type_hints(Plan).items() if type(None) in typing.get_args(hint)}
        used = error.used * chip.devices + sum(beside.values())
        sizes = {"hbm_bytes_per_chip": used, "hbm_capacity_bytes": error.capacity * chip.devices}
        return Plan(**facts, **sizes, fits=False, memory={**state, **beside}, **unknown), None
    text = compiled.as_text()
    module = Module(text, trips=program.trips)
    analysis = compiled.memory_analysis()
    peak = analysis.peak_memory_in_bytes * chip.devices
    activations = saved_bytes(module) * chip.devices
    memory = {**state, "activations": activations, "temporaries": peak - sum(state.values()) - activations, **beside}
    peak += sum(beside.values())
    available = capacity(topology) * chip.devices

    fusions = sum(i.cycles * count for i, count in module if i.computation not in module.fused) / chip.clock
    peak_device = chip.peak / chip.devices
    bandwidth = chip.hbm_bandwidth / chip.devices
    attention = kernels(module)
    kernel = sum(
        count * max(flops / peak_device / KERNEL_EFFICIENCY, moved_bytes(module, instruction) / bandwidth)
        for instruction, flops, count in attention
    )
    traffic = tuple(_priced(collective, topology, mesh) for collective in module.collectives())
    exposed = sum(part.seconds for part in traffic if not part.overlapped)
    hidden = sum(part.seconds for part in traffic if part.overlapped)
    step = max(fusions + kernel, hidden) + exposed
    executed = traced_flops(jaxpr, trips=program.trips)
    executed += sum(count * flops for _, flops, count in attention) * len(topology.devices)
    moved = hbm_bytes(module) * chip.devices
    roofline = max(
        executed / topology.chips / chip.peak, moved / chip.hbm_bandwidth, sum(part.seconds for part in traffic)
    )
    plan = Plan(
        **facts, fits=peak <= available, hbm_bytes_per_chip=peak, hbm_capacity_bytes=available, memory=memory,
        executed_flops_per_step=executed, memory_traffic_bytes=moved, traffic=_added(traffic),
        fusion_seconds=fusions, kernel_seconds=kernel, exposed_seconds=exposed + max(hidden - fusions - kernel, 0.0),
        step_seconds=step, roofline_seconds=roofline,
        tokens_per_second_per_chip=program.tokens / step / topology.chips,
        mfu=program.model_flops / step / topology.chips / chip.peak,
        mfu_full_attention=program.full_attention_flops / step / topology.chips / chip.peak,
    )  # fmt: skip
    return plan, text


def saved_bytes(module: Module) -> int:
    """What the forward pass keeps for the backward pass: the buffers that its loops fill, on one device."""
    total = 0
    for loop, _ in module:
        if loop.opcode != "while" or "jvp(" not in loop.op_name or "transpose(" in loop.op_name:
            continue
        carried = module.operand(loop, 0)
        made = (module.operand(carried, i) for i in range(len(carried.operands))) if carried is not None else ()
        total += sum(i.bytes for i in made if i is not None and '"AllocateBuffer"' in i.attributes)
    return total


def _priced(collective: Collective, topology: Topology, mesh: Mesh) -> Traffic:
    """A collective's time: its bytes over the links that its devices span."""
    chip, group = topology.chip, [mesh.devices.flat[i] for i in collective.group]
    n = len(group)
    axes = "+".join(mesh_axes(collective, dict(mesh.shape))) or "one device"
    links, longest = ring_width(topology, group)
    # Where a chip has several devices and not all are of the group, the others have groups of their own on the same wires.
    link = chip.link * n / len({tuple(device.coords) for device in group}) / chip.devices
    if links:
        bandwidth = links * link
    else:  # the cores of one chip talk through its memory
        across = len({getattr(device, "slice_index", 0) for device in group}) > 1
        bandwidth = chip.dcn if across else chip.hbm_bandwidth / 2
    share = (n - 1) / n
    seconds = {
        "all-reduce": 2 * share * collective.bytes / bandwidth,
        "all-gather": share * collective.bytes / bandwidth,
        "reduce-scatter": share * collective.bytes / bandwidth,
        # Each device sends all but its own piece, on average a quarter around the longest ring.
        "all-to-all": share * collective.bytes * max(longest, 1) / 4 / bandwidth,
        "collective-permute": collective.bytes / (link if links else bandwidth),
    }.get(collective.kind, collective.bytes / bandwidth)
    total = collective.bytes * collective.count
    return Traffic(
        axes, collective.kind, collective.dtype, collective.count, total, seconds * collective.count, collective.overlapped
    )


def _added(traffic: tuple[Traffic, ...]) -> tuple[Traffic, ...]:
    """Those of a kind together, the slowest first."""
    sums: dict[tuple, list] = {}
    for part in traffic:
        entry = sums.setdefault((part.axes, part.kind, part.dtype, part.overlapped), [0, 0, 0.0])
        entry[0] += part.count
        entry[1] += part.bytes
        entry[2] += part.seconds
    merged = (Traffic(*key[:3], *entry, key[3]) for key, entry in sums.items())
    return tuple(sorted(merged, key=lambda part: -part.seconds))
