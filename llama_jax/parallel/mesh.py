"""The device mesh: four axes, for one CPU as for a pod of TPU slices (paper section 2.2, "Training Hardware").

    data      pure replicas; across slices this axis runs over the data-centre network
    fsdp      parameters, optimizer state and batch split together (ZeRO-3)
    sequence  the length of each row
    tensor    heads, feed-forward width and vocabulary
"""

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.parallel.abort import EXIT_HOST_LOST, on_abort

AXES = ("data", "fsdp", "sequence", "tensor")

# Seconds until JAX itself gives up on a silent host. The watchdog of a training run is quicker and says more.
_HEARTBEAT = 50

MEET_SECONDS = 300.0  # until all processes have come; those of a pod begin minutes apart


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; at most one may be -1, "whatever is left"."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1

    def sizes(self, devices: int) -> tuple[int, int, int, int]:
        """The axis sizes on `devices` devices, in the order of AXES; ValueError if they do not multiply to that number."""
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise ValueError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, and one may be -1")
        if -1 in sizes:
            sizes[sizes.index(-1)] = max(devices // math.prod(size for size in sizes if size > 0), 1)
        if math.prod(sizes) != devices:
            raise ValueError(
                f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} devices, there are {devices}"
            )
        return tuple(sizes)


def slice_count(devices: Iterable[jax.Device]) -> int:
    """How many slices of TPUs devices lie in; all others are one."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh(config: MeshConfig | None = None, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all hosts (or the given ones), with Auto axes: GSPMD propagates, we constrain.

    Devices are ordered so that neighbours on an axis are neighbours on the wires of a TPU. Over several slices, `data` alone
    crosses from one to the other.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (config or MeshConfig()).sizes(len(devices))
    slices = slice_count(devices)
    if slices > 1:
        if sizes[0] % slices:
            raise ValueError(
                f"mesh data={sizes[0]} is no multiple of the {slices} slices, which data alone may cross: "
                f"give --config.mesh.data={slices} or a multiple"
            )
        within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
        order = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        # An axis may need a part of one dimension of the torus, for example fsdp=128 x tensor=4 on 8x8x8.
        order = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(order, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fitting_mesh(config: MeshConfig, *, devices: int, rows: int) -> MeshConfig:
    """A mesh that divides `rows`: where `fsdp` is all that is left (-1), what they do not fill goes to `tensor`."""
    data, fsdp, _, tensor = config.sizes(devices)
    wide = math.gcd(fsdp, rows // data)
    if config.fsdp != -1 or wide == fsdp:
        return config
    return dataclasses.replace(config, fsdp=wide, tensor=tensor * fsdp // wide)


def platform() -> str:
    """What the program being traced is compiled for: the platform of the mesh of `jax.set_mesh`, else JAX's default.

    They differ when a program is compiled ahead of time for a pod that is described but not there.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def cores() -> int:
    """Into how many cores a kernel is divided on a device of `platform()`: two on TPUs whose cores work as one."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


def start_distributed(
    *, coordinator: str | None = None, processes: int | None = None, process_id: int | None = None,
    meet_seconds: float = MEET_SECONDS,
) -> None:  # fmt: skip
    """Joins this process to the others when a cluster is described; a single process goes on alone.

    What is given here (the flags of `command.define_cluster`) wins over `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` in the environment. Without either, TPU pods are recognised as JAX does it, by GKE's environment or a TPU
    VM's metadata. Must run before anything touches a device.

    If not all have come after about `meet_seconds`, or one dies later while no watchdog runs, the process ends with one line
    and EXIT_HOST_LOST, on which launchers start again.

    Raises:
      ValueError: a part of a cluster is described, or one that cannot be.
    """
    if jax.distributed.is_initialized():
        return
    given = {"--coordinator": coordinator, "--processes": processes, "--process_id": process_id}
    described = _described(given) or _described({
        name: os.environ.get(name) or None for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    })  # fmt: skip
    if described:
        address, count, index = described
        cluster = {"coordinator_address": address, "num_processes": count, "process_id": index}
        who, where = f"process {index} of {count}", f" to {address}"
    elif (
        len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or _is_one_of_many_tpu_vms()
    ):
        cluster, who, where = {}, "a process of this pod", ""
    else:
        return
    met = False

    def end() -> None:
        late = f"not all others came{where} within {meet_seconds:.0f} s"
        lost = "another has died or the coordinator cannot be reached, if the message above names nothing else"
        print(f"error: {who} ends: {lost if met else late}", file=sys.stderr, flush=True)
        os._exit(EXIT_HOST_LOST)

    on_abort(end)
    jax.distributed.initialize(
        **cluster, initialization_timeout=max(round(meet_seconds), 1), heartbeat_timeout_seconds=_HEARTBEAT
    )
    met = True


def _described(given: Mapping[str, str | int | None]) -> tuple[str, int, int] | None:
    """The cluster that three values describe (its coordinator, number of processes, this one's); None if all are missing."""
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    names, there = list(given), [f"{name}={value}" for name, value in given.items() if value is not None]
    if missing:
        raise ValueError(f"{' and '.join(there)}: expected {' and '.join(missing)} too; a cluster needs {', '.join(names)}")
    address, *numbers = map(str, given.values())
    if not all(number.isdecimal() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
        raise ValueError(f"{', '.join(there)}: expected {names[2]} from 0 to {names[1]} - 1")
    if not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"{names[0]}: expected HOST:PORT, got {address!r}")
    return address, int(numbers[0]), int(numbers[1])


def _is_one_of_many_tpu_vms() -> bool:
    """Whether the metadata server names other workers of this TPU; machines without TPU chips do not ask it."""
    if not has_tpu_chips():
        return False
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster  # what JAX's own initialisation asks; no public name

    return GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1


def has_tpu_chips() -> bool:
    """Whether there are TPU chips in this machine for JAX to use; starts no backend."""
    from jax._src import hardware_utils  # JAX has no public name for it

    return os.environ.get("JAX_PLATFORMS") != "cpu" and hardware_utils.num_available_tpu_chips_and_device_id()[0] > 0
