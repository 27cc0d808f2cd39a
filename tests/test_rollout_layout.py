"""Generation gathers the weights once a rollout, not once a token (section 3.2.3: otherwise about 20x slower): read from the
compiled program, on 8 virtual devices and for a TPU."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import pytest
import small_runs

from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.parallel import topology
from llama_jax.parallel.axes import DECODE, is_spec, partition
from llama_jax.parallel.mesh import make_mesh
from llama_jax.planning.hlo import Collective, Module, mesh_axes
from llama_jax.planning.programs import rollout_program
from llama_jax.train import parse_stage


def config_of(model, monkeypatch, *, mesh, compute=None, rows=16):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(model, name="tiny"))
    changes = {"mesh": mesh, "ppo": {"rollout_size": rows}, "compute": compute or {}}
    return parse_stage(small_runs.values(Path("nowhere"), "ppo", steps=1, **changes))


def gathers(config, mesh) -> tuple[list[Collective], list[Collective]]:
    """All-gathers of weights' kind of the rollout's program: before the loop over tokens, and inside it."""
    with jax.set_mesh(mesh):
        text = rollout_program(config, mesh).trace().lower().compile().as_text()
    found = [c for c in Module(text).collectives() if c.kind == "all-gather"]
    inside = [c for c in found if "while/body" in c.op_name]
    return [c for c in found if "while/body" not in c.op_name], inside


def matrices(config, mesh) -> list[int]:
    """Bytes of each layer's matrices, and of the head, on one device in the layout of decoding."""
    specs = params.table(SIZES["tiny"], head="lm_head")
    width = config.compute.matmul_dtype.itemsize
    sizes = []
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        axes, shape = (spec.axes[1:], spec.shape[1:]) if spec.axes[0] == "layers" else (spec.axes, spec.shape)
        if len(axes) > 1:
            place = partition(shape, axes, DECODE, mesh)
            split = [mesh.shape[axis] for axis in place if axis]
            sizes.append(width * int(jax.numpy.prod(jax.numpy.array(shape))) // (split[0] if split else 1))
    return sizes


def check(config, mesh):
    outside, inside = gathers(config, mesh)
    shape, sizes = dict(mesh.shape), matrices(config, mesh)
    # Weights are divided over fsdp alone, so this is where a gather of them would be.
    assert not [c for c in inside if "fsdp" in mesh_axes(c, shape)], inside
    assert all(c.bytes < min(sizes) for c in inside), (inside, sizes)
    layers = SIZES["tiny"].layers
    once = sizes[0] + layers * sum(sizes[2:])  # head and layers; the embedding is looked up where it lies
    assert sum(c.bytes for c in outside if "fsdp" in mesh_axes(c, shape)) >= 0.9 * once


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_the_loop_over_tokens_gathers_no_weights(sizes, monkeypatch):
    config = config_of(small_runs.MODEL, monkeypatch, mesh=sizes)
    check(config, make_mesh(config.mesh))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'")
def test_the_loop_over_tokens_gathers_no_weights_on_a_tpu(monkeypatch):
    model = dataclasses.replace(SIZES["7b"], layers=2, max_length=2048)
    compute = {"matmul": "bfloat16", "activations": "bfloat16"}
    config = config_of(model, monkeypatch, mesh={"fsdp": 4, "tensor": 2}, compute=compute, rows=64)
    check(config, make_mesh(config.mesh, devices=topology.describe("v5e:2x4").devices))
