"""Hosts whose mesh is wider than they are: `tensor` and `sequence` over several processes, which then share their rows."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small_runs import prepare

from llama_jax.parallel.axes import row_groups
from llama_jax.parallel.mesh import AXES
from llama_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh needs to know of a device that is not there."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "none"


def described(sizes: tuple[int, int, int, int], per_host: int) -> Mesh:
    """A mesh (data, fsdp, sequence, tensor) of hosts with `per_host` devices, in their order."""
    devices = [Device(i, i // per_host) for i in range(np.prod(sizes))]
    return Mesh(np.array(devices, object).reshape(sizes), AXES)


@pytest.mark.parametrize(
    ("sizes", "per_host", "groups"),
    [
        ((1, 4, 1, 1), 2, ((0,), (1,))),
        ((1, 2, 1, 4), 4, ((0,), (1,))),
        ((1, 2, 1, 8), 4, ((0, 1), (2, 3))),  # as the 70B's reward model on v5p: tensor over two hosts
        ((1, 2, 4, 1), 2, ((0, 1), (2, 3))),
        ((2, 1, 2, 2), 1, ((0, 1, 2, 3), (4, 5, 6, 7))),
        ((1, 1, 1, 2), 1, ((0, 1),)),
    ],
)
def test_hosts_that_hold_the_same_rows_are_of_one_group(sizes, per_host, groups):
    assert row_groups(described(sizes, per_host)) == groups


def test_hosts_that_share_a_part_of_their_rows_are_refused():
    with pytest.raises(ValueError, match="hosts share only a part of their rows .*tensor=3.*; choose other sizes of tensor"):
        row_groups(described((1, 2, 1, 3), 2))


RUN = """
import sys
import jax
from small_runs import MODEL, values
from llama_jax import train
from llama_jax.model.config import SIZES
from llama_jax.parallel.mesh import start_distributed

start_distributed()
SIZES["tiny"] = MODEL
from pathlib import Path
directory, stage, mesh, name = Path(sys.argv[1]), *sys.argv[2:]
sizes = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | ({mesh: 2} if mesh != "none" else {})
more = {
    "reward": {"scorers": ("reward_models", "test_mesh_hosts:moody"), "weights": (1.0, 0.1)},
    "ppo": {"sampling_batch": 4 if jax.process_count() > 1 else 0},  # in slots, or all rows by one program
} if stage == "ppo" else {}
train.run(values(directory, stage, steps=4, mesh=sizes, **more), directory / name)
"""


def moody(rows, responses):
    """A scorer that says something else in every process, as a remote model would."""
    return [len(response) + 5.0 * jax.process_index() for response in responses]


def run(directory: Path, stage: str, mesh: str, *, count: int) -> np.ndarray:
    """The losses of a stage's four steps in `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name, processes = f"{stage}-{mesh}", []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    for host in range(count):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(host),
        }  # fmt: skip
        with open(directory / f"{name}.{host}.txt", "w") as output:
            processes.append(subprocess.Popen(
                [sys.executable, "-c", RUN, str(directory), stage, mesh, name], cwd=ROOT, stdout=output,
                stderr=subprocess.STDOUT, env=environment | (cluster if count > 1 else {}),
            ))  # fmt: skip
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(OSError):
                process.kill()
    assert codes == [0] * count, (directory / f"{name}.0.txt").read_text()[-3000:]
    log = read_metrics(directory / name)
    return log["loss"][np.argsort(log["step"])]


@pytest.mark.slow
def test_tensor_and_sequence_over_processes_compute_what_one_does(tmp_path):
    prepare(tmp_path)
    alone = run(tmp_path, "sft", "none", count=1)
    for mesh in ("tensor", "sequence"):
        np.testing.assert_allclose(run(tmp_path, "sft", mesh, count=2), alone, rtol=1e-5, err_msg=mesh)


@pytest.mark.slow
def test_ppo_over_processes_that_share_their_rows_has_one_reward_a_response(tmp_path):
    prepare(tmp_path)
    alone = run(tmp_path, "ppo", "none", count=1)
    np.testing.assert_allclose(run(tmp_path, "ppo", "tensor", count=2), alone, rtol=1e-4, atol=1e-6)
