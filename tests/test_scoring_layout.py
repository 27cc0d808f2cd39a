"""Scoring of many answers to a prompt, compiled for a TPU: the weights of one layer are gathered at a time, and what attention
needs fits beside them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tpu_compiler import needs_libtpu

from llama_jax.model import params
from llama_jax.model.config import SIZES, Compute
from llama_jax.parallel import topology
from llama_jax.parallel.axes import abstract
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.planning.hlo import Module, mesh_axes
from llama_jax.reward.score import tree_scorer
from llama_jax.rlhf.scoring import row_length, rows_at_once


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("split", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 4, "sequence": 2}], ids=str)
def test_a_reward_model_scores_trees_with_one_layers_weights_at_a_time(split, monkeypatch):
    monkeypatch.setattr("llama_jax.rlhf.scoring.platform", lambda: "tpu")
    model = dataclasses.replace(SIZES["7b"], layers=4, max_length=2048)
    mesh = make_mesh(MeshConfig(**split), devices=topology.describe("v5e:2x4").devices)
    compute = Compute("bfloat16", "bfloat16")
    with jax.set_mesh(mesh):
        row = row_length(2048)
        batch = rows_at_once(row, length=2048, batch_size=256, shards=mesh.shape["fsdp"])
        rows = [jax.ShapeDtypeStruct((batch, row), jnp.int32)] * 4
        lowered = jax.jit(tree_scorer(model, compute)).lower(abstract(params.table(model, head="reward_head"), mesh), *rows)
        compiled = lowered.compile()
    found = Module(compiled.as_text(), trips=model.layers).collectives()
    gathers = [c for c in found if c.kind == "all-gather" and "fsdp" in mesh_axes(c, dict(mesh.shape))]
    widest = 2 * model.width * model.ffn  # bytes of the largest matrix of a layer
    assert gathers and max(c.bytes for c in gathers) <= widest
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 2**30  # of a chip's 16
