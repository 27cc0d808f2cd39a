"""Plans by the real TPU compiler: topologies with their wires, the command, its search, long rows on a ring."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tpu_compiler import needs_libtpu, plan

from llama_jax.model.config import SIZES
from llama_jax.model.params import count, flops_per_token, table
from llama_jax.parallel import topology
from llama_jax.parallel.mesh import make_mesh
from llama_jax.planning.flops import kernels
from llama_jax.planning.hlo import Module


@needs_libtpu
def test_gathers_stay_gathers_only_on_a_pod_described_with_its_wires():
    from jax.experimental import topologies

    def collectives(devices, order):
        mesh = Mesh(order(devices), ("fsdp",), axis_types=(AxisType.Auto,))
        x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
                for shape in ((64 * 2048, 4096), (4096, 4096)))  # fmt: skip
        text = jax.jit(lambda x, w: x @ w).lower(x, w).compile().as_text()
        return {c.kind for c in Module(text).collectives()}

    found = topology.describe("v5p:4x4x4")
    ordered = make_mesh(devices=found.devices).devices.flatten()
    assert collectives(found.devices, lambda _: ordered) == {"all-gather"}
    assert "all-reduce" in collectives(found.devices, np.array)
    open_ends = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4")
    ordered = make_mesh(devices=open_ends.devices).devices.flatten()
    assert "all-reduce" in collectives(open_ends.devices, lambda _: ordered)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e-1", "v6e-1", "v5p-12288"])
def test_the_smallest_and_the_largest_slices_are_described(name):
    found = topology.describe(name)
    assert len(found.devices) == found.chips == {"v5e-1": 1, "v6e-1": 1, "v5p-12288": 6144}[name]


@needs_libtpu
@pytest.mark.slow
def test_the_command_plans_a_slice_and_says_what_does_not_fit(tmp_path):
    arguments = ("--config=configs/pretrain.py:7b", "--config.loop.batch_size=8", "--topology=v5p-16", "--json")
    found = json.loads(plan(*arguments, f"--dump_hlo={tmp_path}"))
    assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert found["model_flops_per_step"] == 8 * 4096 * flops_per_token(SIZES["7b"], length=4096)
    assert found["hbm_capacity_bytes"] == pytest.approx(95.74 * 2**30, rel=1e-3)
    assert 0.2 < found["mfu"] < 0.9 and found["step_seconds"] >= found["roofline_seconds"]
    assert sum(found["memory"].values()) == found["hbm_bytes_per_chip"]
    # fsdp brings every matrix for the forward and again for the backward pass, in bfloat16: gathered whole, or in turn around
    # the ring beside the products that need the parts.
    matrices = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008))
    brought = [t for t in found["traffic"] if t["kind"] in ("all-gather", "collective-permute") and t["dtype"] == "bf16"]
    assert sum(t["bytes"] for t in brought) >= 2 * matrices and {t["axes"] for t in brought} == {"fsdp"}
    (text,) = tmp_path.iterdir()
    assert kernels(Module(text.read_text()))
    tight = json.loads(plan("--config=configs/pretrain.py:7b", "--config.loop.batch_size=64", "--topology=v5e-8", "--json"))
    assert not tight["fits"] and tight["hbm_bytes_per_chip"] > tight["hbm_capacity_bytes"] and tight["mfu"] is None


@needs_libtpu
@pytest.mark.slow
def test_rows_that_the_tiles_of_splash_do_not_divide_are_planned_too():
    arguments = ("--config=configs/sft.py:7b", "--config.data.length=3000", "--config.loop.batch_size=8", "--topology=v5p-16")
    found = json.loads(plan(*arguments, "--json"))
    assert found["fits"] and found["step_seconds"] >= found["roofline_seconds"]
    assert 1.0 < found["executed_flops_per_step"] / found["model_flops_per_step"] < 1.5


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "flags", "program"), [
    ("reward", (), "reward step"), ("ppo", ("--config.safety=rm",), "ppo step"), ("dpo", (), "dpo step"),
])  # fmt: skip
def test_the_updates_of_the_other_stages_compile_for_a_slice(stage, flags, program):
    found = json.loads(plan(f"--config=configs/{stage}.py:tiny", *flags, "--topology=v5e-4", "--json"))
    assert found["fits"] and found["program"] == program and found["mesh"]["fsdp"] == 4
    assert found["step_seconds"] > 0 and set(found["collective_bytes"]) == {"fsdp"}


@needs_libtpu
@pytest.mark.slow
def test_on_a_small_slice_no_product_is_cut_into_windows():
    found = json.loads(plan("--config=configs/sft.py:7b", "--topology=v5p-32", "--json"))
    assert "collective-permute" not in {part["kind"] for part in found["traffic"]}
    assert found["fits"] and found["mfu"] > 0.45  # with windows 0.27


@needs_libtpu
@pytest.mark.slow
def test_over_two_slices_gradients_alone_cross():
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.loop.batch_size=16")
    found = json.loads(plan("--config=configs/pretrain.py:tiny", *mesh, "--topology=v5e-4", "--slices=2", "--json"))
    assert found["fits"] and found["chips"] == 8 and found["mesh"]["data"] == 2
    kinds = {part["kind"] for part in found["traffic"] if "data" in part["axes"]}
    assert kinds == {"all-reduce"}  # weights are gathered inside of a slice
    gradients = 4 * count(table(SIZES["tiny"], head="lm_head")) / 4  # bytes of a device's part, in float32
    # Once, in tiles of 128 columns, to which the parts of so small a model are filled up: 64 of the embedding, 176 of the FFN.
    assert gradients <= sum(part["bytes"] for part in found["traffic"] if "data" in part["axes"]) < 1.5 * gradients


@needs_libtpu
@pytest.mark.slow
def test_the_command_plans_a_rollout_by_its_slots():
    arguments = ("--config=configs/ppo.py:tiny", "--config.ppo.sampling_batch=4", "--config.safety=rm", "--topology=v5e-4")
    found = json.loads(plan(*arguments, "--program=rollout", "--json"))
    assert found["fits"] and found["program"] == "rollout, 16 slots" and found["batch_size"] == 16
    assert {"weights", "slots", "prompts", "parameters", "critic", "reference", "safety"} < set(found["memory"])
    assert "helpfulness" not in found["memory"]
    # The loop is counted to its last step, although it ends as soon as all slots have.
    assert 1 < found["executed_flops_per_step"] / found["model_flops_per_step"] < 1.1
    assert found["run"] == {} and found["step_seconds"] > 0


@needs_libtpu
@pytest.mark.slow
def test_a_rollout_of_the_7b_reads_weights_and_cache_and_moves_nothing_else():
    found = json.loads(plan("--config=configs/ppo.py:7b", "--topology=v5p-16", "--program=rollout", "--json"))
    assert found["fits"] and found["program"] == "rollout, 128 slots"
    # Weights lie whole on every chip. What was drawn goes to all of them, and nothing else.
    assert sum(part["bytes"] for part in found["traffic"]) < 2**16
    read = 16 * (found["memory"]["weights"] + found["memory"]["slots"])  # in so many steps
    assert 1 < found["memory_traffic_bytes"] / read < 1.1
    assert found["kernel_seconds"] > 0 and found["step_seconds"] > found["roofline_seconds"]
    assert found["memory"]["temporaries"] < 0.25 * found["memory"]["slots"]  # there is one cache


@needs_libtpu
@pytest.mark.slow
def test_the_command_searches():
    tiny = ("--config=configs/pretrain.py:tiny", "--config.loop.batch_size=8")
    arguments = (*tiny, "--topology=v5e-4", "--search", "--search_compilations=3")
    best = json.loads(plan(*arguments, "--json"))["best"]
    seconds = [found["step_seconds"] for found in best]
    assert len(best) == 3 and seconds == sorted(seconds) and all(found["fits"] for found in best)
    assert len({(found["remat"], found["microbatches"], *found["mesh"].values()) for found in best}) == 3


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("length", "sequence", "method"), [(32_768, 4, "all_to_all"), (131_072, 16, "ring")])
def test_long_rows_are_divided_on_a_pod(length, sequence, method):
    rows = 64 // sequence  # 8192 tokens a chip
    found = json.loads(plan(
        "--config=configs/pretrain.py:7b", f"--config.context={length}", f"--config.loop.batch_size={rows}",
        f"--config.mesh.sequence={sequence}", f"--config.compute.sequence={method}", "--topology=v5p-128", "--json",
    ))  # fmt: skip
    assert found["fits"] and found["tokens_per_step"] == rows * length and found["kernel_seconds"] > 0
    large = {part["kind"] for part in found["traffic"] if part["axes"] == "sequence" and part["bytes"] > 2**26}
    assert ("collective-permute" if method == "ring" else "all-to-all") in large and "all-gather" not in large
