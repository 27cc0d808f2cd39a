"""Generation gathers the weights once a rollout, not once a token (section 3.2.3: otherwise about 20x slower): read from the
compiled programs of both samplers, on 8 virtual devices and for a TPU."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import pytest
import small_runs

from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.model.decode import preparer
from llama_jax.parallel import topology
from llama_jax.parallel.axes import DECODE, is_spec, partition
from llama_jax.parallel.mesh import make_mesh
from llama_jax.planning.hlo import Collective, Module, mesh_axes
from llama_jax.planning.programs import rollout_program
from llama_jax.train import parse_stage


def config_of(model, monkeypatch, *, mesh, compute=None, rows=16, slots=0):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(model, name="tiny"))
    changes = {"mesh": mesh, "ppo": {"rollout_size": rows, "sampling_batch": slots // mesh["fsdp"]}, "compute": compute or {}}
    return parse_stage(small_runs.values(Path("nowhere"), "ppo", steps=1, **changes))


def all_gathers(lowered, *, trips) -> list[Collective]:
    return [c for c in Module(lowered.compile().as_text(), trips=trips).collectives() if c.kind == "all-gather"]


def gathers(config, mesh) -> tuple[list[Collective], list[Collective]]:
    """All-gathers of a rollout: before the loop over tokens, and inside it.

    The loop over slots is a program that is run many times a rollout, so all of it is inside; it is given weights that another
    program, which runs once, has laid out.
    """
    with jax.set_mesh(mesh):
        program = rollout_program(config, mesh)
        found = all_gathers(program.trace().lower(), trips=program.trips)
        if config.ppo.sampling_batch:
            lay_out = preparer(SIZES["tiny"], config.compute)
            return all_gathers(lay_out.lower(program.beside["parameters"]), trips=1), found
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
    # Weights are divided over fsdp alone, so this is where a gather of them would be. (What slots drew is made whole after the
    # loop, for every host to read.)
    assert not [c for c in inside if "while/body" in c.op_name and "fsdp" in mesh_axes(c, shape)], inside
    assert all(c.bytes < min(sizes) for c in inside), (inside, sizes)
    layers = SIZES["tiny"].layers
    once = sizes[0] + layers * sum(sizes[2:])  # head and layers; the embedding is looked up where it lies
    assert sum(c.bytes for c in outside if "fsdp" in mesh_axes(c, shape)) >= 0.9 * once


@pytest.mark.parametrize("slots", [0, 8], ids=["one_program", "slots"])
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_the_loop_over_tokens_gathers_no_weights(sizes, slots, monkeypatch):
    config = config_of(small_runs.MODEL, monkeypatch, mesh=sizes, slots=slots)
    check(config, make_mesh(config.mesh))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'")
@pytest.mark.parametrize("slots", [0, 32], ids=["one_program", "slots"])
def test_the_loop_over_tokens_gathers_no_weights_on_a_tpu(slots, monkeypatch):
    model = dataclasses.replace(SIZES["7b"], layers=2, max_length=2048)
    compute = {"matmul": "bfloat16", "activations": "bfloat16"}
    config = config_of(model, monkeypatch, mesh={"fsdp": 4, "tensor": 2}, compute=compute, rows=64, slots=slots)
    check(config, make_mesh(config.mesh, devices=topology.describe("v5e:2x4").devices))
