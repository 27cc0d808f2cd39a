"""Hosts whose mesh is wider than they are: parameters over several processes, and `tensor` and `sequence`, which then share
their rows."""

import contextlib
import dataclasses
import json
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

from llama_jax.parallel.axes import held_shards, row_groups
from llama_jax.parallel.mesh import AXES
from llama_jax.pretrain.base import process_share
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


@pytest.mark.parametrize(("process", "held"), [(0, (0, 2)), (1, (1, 3))])
def test_a_host_may_hold_rows_that_are_no_neighbours(process, held, monkeypatch):
    """As on a pod, whose chips a mesh orders by their links: two by two, and not host after host."""
    devices = np.array([Device(i, i % 2) for i in range(4)], object)
    mesh = Mesh(devices.reshape(1, 4, 1, 1), AXES)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert row_groups(mesh) == ((0,), (1,)) and held_shards(mesh) == held
    assert process_share(mesh).places(8) == [2 * piece + i for piece in held for i in range(2)]


RUN = """
import sys
import jax
import numpy as np
from small_runs import MODEL, values
from llama_jax import train
from llama_jax.model.config import SIZES
from llama_jax.parallel.mesh import start_distributed

start_distributed()
SIZES["tiny"] = MODEL
from pathlib import Path
directory, stage, mesh, name = Path(sys.argv[1]), *sys.argv[2:]
sizes = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
if mesh == "interleaved":  # every other shard of a batch is the other process's
    from jax.experimental import mesh_utils
    def in_turns(sizes, devices, **_):
        of = [[d for d in devices if d.process_index == process] for process in range(jax.process_count())]
        return np.array([d for turn in zip(*of) for d in turn]).reshape(sizes)
    mesh_utils.create_device_mesh = in_turns
    sizes["fsdp"] = 4
elif mesh != "none":
    sizes[mesh] = 2
more = {
    "reward": {"scorers": ("reward_models", "test_mesh_hosts:moody"), "weights": (1.0, 0.1)},
    # In four slots, or all rows by one program.
    "ppo": {"sampling_batch": 4 // sizes["fsdp"] // sizes["data"] if jax.process_count() > 1 else 0},
} if stage == "ppo" else {"grpo": {"answers": 8}} if stage == "grpo" else {}
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
    environment["JAX_NUM_CPU_DEVICES"] = "2" if mesh == "interleaved" else "1"
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
def test_each_axis_over_processes_computes_what_one_does(tmp_path):
    prepare(tmp_path)
    alone = run(tmp_path, "sft", "none", count=1)
    for mesh in ("fsdp", "tensor", "sequence"):
        np.testing.assert_allclose(run(tmp_path, "sft", mesh, count=2), alone, rtol=1e-5, err_msg=mesh)


@pytest.mark.slow
def test_ppo_over_processes_that_share_their_rows_has_one_reward_a_response(tmp_path):
    prepare(tmp_path)
    alone = run(tmp_path, "ppo", "none", count=1)
    np.testing.assert_allclose(run(tmp_path, "ppo", "tensor", count=2), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_groups_answers_stand_together_where_hosts_hold_every_other_shard(tmp_path):
    """GRPO compares the eight answers to a prompt, which lie on two shards of four rows, one of each host."""
    prepare(tmp_path)
    alone = run(tmp_path, "grpo", "none", count=1)
    np.testing.assert_allclose(run(tmp_path, "grpo", "interleaved", count=2), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_reward_models_report_is_of_the_right_pairs_where_hosts_hold_every_other_shard(tmp_path):
    prepare(tmp_path)
    scores = []
    for mesh, count in (("none", 1), ("interleaved", 2)):
        run(tmp_path, "reward", mesh, count=count)
        rows = (tmp_path / f"reward-{mesh}" / "held_out_scores.jsonl").read_text().splitlines()
        scores.append([[json.loads(row)[name] for name in ("chosen", "rejected")] for row in rows])
    assert np.std(scores[0]) > 1e-3
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3, atol=1e-5)
