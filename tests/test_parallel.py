"""Meshes, rule tables and what must not depend on them: any factorisation of the devices trains like one device."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.data.loader import TokenBatch
from llama_jax.model import params as table
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.parallel import axes
from llama_jax.parallel.axes import DECODE, TRAIN, ParamSpec, abstract, constrain, layout, partition, shardings
from llama_jax.parallel.mesh import AXES, MeshConfig, make_mesh, start_distributed
from llama_jax.pretrain.base import fresh
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.training import optimizer
from llama_jax.training.state import abstract_state, born_sharded
from llama_jax.training.step import make_step, put_batch


def mesh_of(data=1, fsdp=1, sequence=1, tensor=1):
    config = MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    return make_mesh(config, devices=jax.devices()[: data * fsdp * sequence * tensor])


@pytest.mark.parametrize(("config", "devices", "sizes"), [
    (MeshConfig(), 8, (1, 8, 1, 1)),
    (MeshConfig(), 1, (1, 1, 1, 1)),
    (MeshConfig(data=2, tensor=2), 8, (2, 2, 1, 2)),
    (MeshConfig(data=-1, fsdp=4), 8, (2, 4, 1, 1)),
    (MeshConfig(data=2, fsdp=2, sequence=2, tensor=1), 8, (2, 2, 2, 1)),
])  # fmt: skip
def test_mesh_sizes(config, devices, sizes):
    assert config.sizes(devices) == sizes


@pytest.mark.parametrize(("config", "words"), [
    (MeshConfig(tensor=3), "needs 6 devices, there are 8"),
    (MeshConfig(tensor=16), "needs 16 devices, there are 8"),
    (MeshConfig(fsdp=4), "needs 4 devices, there are 8"),
    (MeshConfig(data=-1), "one may be -1"),
    (MeshConfig(tensor=0), "sizes are positive"),
    (MeshConfig(tensor=-2), "sizes are positive"),
])  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        config.sizes(8)


def test_make_mesh_names_the_axes_and_leaves_the_propagation_to_the_compiler():
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    assert mesh.axis_names == AXES and mesh.devices.shape == (2, 2, 1, 2)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert axes.batch_shards(mesh) == 4


def test_partition_follows_the_rules_and_names_what_does_not_divide():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert partition((4, 6), ("width", "heads"), TRAIN, mesh) == PartitionSpec("fsdp", "tensor")
    assert partition((4, 6), ("width", "heads"), DECODE, mesh) == PartitionSpec(None, "tensor")
    assert partition((8, 5, 3), ("batch", "length", None), TRAIN, mesh) == PartitionSpec(("data", "fsdp"), "sequence", None)
    # One key-value head for two shards: each holds a copy. No other axis may do that unnoticed.
    assert partition((4, 1), ("width", "kv_heads"), TRAIN, mesh) == PartitionSpec("fsdp", None)
    with pytest.raises(ValueError, match=r"axis 'heads' of shape \(4, 3\) has size 3.*2 shards \(tensor=2\)"):
        partition((4, 3), ("width", "heads"), TRAIN, mesh)
    with pytest.raises(ValueError, match=r"axis 'batch'.*size 6.*4 shards \(data=2 x fsdp=2\)"):
        partition((6, 8), ("batch", "length"), TRAIN, mesh)
    with pytest.raises(ValueError, match="2 axis names|has 1 axis names"):
        ParamSpec((4, 6), ("width",), table.ones)


@pytest.mark.parametrize("rules", [TRAIN, DECODE], ids=["TRAIN", "DECODE"])
@pytest.mark.parametrize("size", ["7b", "13b", "34b", "70b", "tiny"])
def test_every_parameter_of_every_size_has_a_layout_on_a_pod(size, rules):
    class Pod:  # partition looks at the sizes only
        shape = {"data": 2, "fsdp": 32, "sequence": 1, "tensor": 2 if size == "tiny" else 8}

    for head in ("lm_head", "reward_head", "value_head"):
        specs = table.table(SIZES[size], head=head)
        for spec in jax.tree.leaves(specs, is_leaf=axes.is_spec):
            entries = partition(spec.shape, spec.axes, rules, Pod)
            if rules is TRAIN and len(spec.shape) - ("layers" in spec.axes) > 1:
                assert "fsdp" in entries, (spec, entries)  # no matrix is left whole on every device


def test_every_logical_axis_stands_in_both_tables():
    assert set(TRAIN) == set(DECODE)
    named = {name for rules in (TRAIN, DECODE) for entry in rules.values() for name in np.atleast_1d(entry) if name}
    assert named <= set(AXES)


def test_constrain_needs_no_mesh_and_follows_the_table_in_force():
    x = jnp.zeros((8, 4, 4))
    assert constrain(x, "batch", "length", "act_width") is x
    mesh = mesh_of(data=2, fsdp=2, sequence=2)

    def laid_out(rules):
        def f(x):
            with layout(rules):
                return constrain(x, "batch", "length", "act_width")

        return jax.jit(f)(x).sharding

    with jax.set_mesh(mesh):
        train, decode = laid_out(TRAIN), laid_out(DECODE)
    assert train.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence")), 3)
    assert decode.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 3)


def test_keeping_the_heap_works_on_linux():
    # In a process of its own: the setting cannot be taken back.
    code = "from llama_jax.parallel.host import keep_heap; import sys; print(keep_heap()); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("True", "False")
    if sys.platform.startswith("linux"):
        assert done.stdout.strip() == "True"


def test_a_single_process_starts_alone_and_a_cluster_is_joined(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    for name in ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    start_distributed()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one")
    start_distributed()
    assert calls == []
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one,two")
    start_distributed()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "one:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    start_distributed()
    assert calls == [{}, {"coordinator_address": "one:1234", "num_processes": 2, "process_id": 1}]


# ---- sharded = one device ----

STEPS, B, T = 3, 16, 16


def token_batch(step):
    draw = np.random.default_rng(step)
    tokens = draw.integers(1, 96, (B, T + 1)).astype(np.int32)
    # Ragged: rows of different lengths, prompts without weight, two segments in some rows, one row of padding alone.
    lengths = draw.integers(2, T + 1, (B, 1))
    lengths[3] = 0
    columns = np.arange(T)
    start = np.where(np.arange(B)[:, None] % 3 == 0, lengths // 2, 0)
    segments = np.where(columns < lengths, 1 + (columns >= start), 0).astype(np.int32)
    positions = np.where(columns >= start, columns - start, columns).astype(np.int32)
    weights = (draw.random((B, T)) < 0.6).astype(np.float32) * (columns < lengths)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


@functools.cache
def drawn(config):
    """Parameters as fresh() draws them, on one device; drawn once, since that compiles longest of all."""
    return jax.device_get(fresh(table.table(config, head="lm_head"), mesh_of(), seed=0))


def run(config, mesh, *, microbatches=1):
    """Losses of the first steps and the last state."""
    specs = table.table(config, head="lm_head")
    optim = optimizer.make(
        optimizer.OptimConfig(lr=1e-2, schedule="constant"), steps=STEPS, decay=table.decay_mask(specs)
    )
    with jax.set_mesh(mesh):
        state = born_sharded(lambda: jax.device_put(drawn(config), shardings(specs, mesh)), specs, optim, mesh)
        target = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(specs, optim, mesh))
        step = make_step(language_model_loss(config, FLOAT32), optim, microbatches=microbatches, layout=target)
        losses = []
        for _ in range(STEPS):
            state, means = step(state, put_batch(token_batch(0), mesh))
            losses.append([float(means[name]) for name in ("loss", "accuracy", "gradient_norm")])
    assert step._cache_size() == 1
    return np.array(losses), state


@pytest.fixture(scope="module")
def one_device(tiny):
    return run(tiny, mesh_of())


def test_training_on_one_device_learns(one_device):
    losses, _ = one_device
    assert abs(losses[0, 0] - np.log(96)) < 0.2 and losses[-1, 0] < losses[0, 0] - 0.02


@pytest.mark.parametrize(("sizes", "microbatches"), [
    ((2, 2, 1, 2), 2), ((1, 4, 1, 2), 1), ((8, 1, 1, 1), 2), ((1, 8, 1, 1), 1), ((1, 1, 1, 2), 1), ((2, 1, 2, 2), 1),
], ids=str)  # fmt: skip
def test_sharded_training_equals_one_device(tiny, one_device, sizes, microbatches):
    mesh = mesh_of(*sizes)
    losses, state = run(tiny, mesh, microbatches=microbatches)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5, atol=1e-5)
    # Every leaf of the parameters and of both moments lies where the table says, after a step too.
    specs = table.table(tiny, head="lm_head")
    wanted = shardings(specs, mesh)
    (adam,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    for tree in (state.params, adam.mu, adam.nu):
        jax.tree.map(lambda x, s: _lies(x, s), tree, wanted)
    for x in (state.step, state.skipped, adam.count):
        assert x.sharding.is_fully_replicated
    # ... and the table splits what it should: no device holds more than its share of a matrix.
    gate = state.params["trunk"]["layers"]["gate"]
    assert gate.addressable_shards[0].data.size * sizes[1] * sizes[3] == gate.size


def _lies(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.shape, x.sharding, sharding)


def test_fresh_parameters_do_not_depend_on_the_mesh(tiny):
    specs = table.table(tiny, head="reward_head")
    specs = {"trunk": {"embedding": specs["trunk"]["embedding"]}, "reward_head": specs["reward_head"]}
    one, eight = fresh(specs, mesh_of(), seed=7), fresh(specs, mesh_of(2, 2, 1, 2), seed=7)
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    other = fresh(specs, mesh_of(), seed=8)
    jax.tree.map(lambda a, b: np.testing.assert_array_less(np.mean(a == b), 0.01), one, other)


def test_abstract_is_a_restore_target(tiny):
    specs = table.table(tiny, head="lm_head")
    mesh = mesh_of(1, 4, 1, 2)
    plain, placed = abstract(specs), abstract(specs, mesh)
    assert plain["lm_head"]["kernel"].shape == placed["lm_head"]["kernel"].shape == (32, 96)
    assert placed["lm_head"]["kernel"].sharding == NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    assert plain["lm_head"]["kernel"].sharding is None
