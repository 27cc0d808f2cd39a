"""Meshes, rule tables and what must not depend on them: any factorisation of the devices trains like one device."""

import collections
import dataclasses
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
from llama_jax.model.decode import prepare
from llama_jax.model.decode_attention import round_up
from llama_jax.parallel import axes
from llama_jax.parallel.axes import DECODE, TRAIN, ParamSpec, abstract, constrain, layout, partition, shardings
from llama_jax.parallel.mesh import AXES, MeshConfig, make_mesh, start_distributed
from llama_jax.planning.hlo import Module, mesh_axes
from llama_jax.pretrain.base import fresh
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.sampling import slots as device
from llama_jax.sampling.generate import make_sampler
from llama_jax.sampling.request import EngineConfig
from llama_jax.training import optimizer
from llama_jax.training import step as train_step
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
    monkeypatch.setattr("llama_jax.parallel.mesh.on_abort", lambda end: None)  # of the process that runs the tests
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
    # A host that died is noticed in less than a minute.
    assert [call.pop("heartbeat_timeout_seconds") < 60 for call in calls] == [True, True]
    assert [call.pop("initialization_timeout") for call in calls] == [300, 300]
    assert calls == [{}, {"coordinator_address": "one:1234", "num_processes": 2, "process_id": 1}]


def test_a_cluster_named_by_flags_wins_and_a_part_of_one_is_refused(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr("llama_jax.parallel.mesh.on_abort", lambda end: None)  # of the process that runs the tests
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "one:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    cluster = {"coordinator": "two:5", "processes": 4, "process_id": 3}
    start_distributed(**cluster, meet_seconds=20)
    calls[0].pop("heartbeat_timeout_seconds")
    assert calls[0].pop("initialization_timeout") == 20
    assert calls == [{"coordinator_address": "two:5", "num_processes": 4, "process_id": 3}]
    for changes, words in (
        (dict.fromkeys(cluster), "^JAX_COORDINATOR_ADDRESS=one:1234 and JAX_NUM_PROCESSES=2: expected JAX_PROCESS_ID too; "),
        ({"processes": None, "process_id": None}, "^--coordinator=two:5: expected --processes and --process_id too; "),
        ({"process_id": 4}, "--processes=4, --process_id=4: expected --process_id from 0 to --processes - 1"),
        ({"coordinator": "two"}, "--coordinator: expected HOST:PORT, got 'two'"),
    ):
        with pytest.raises(ValueError, match=words):
            start_distributed(**cluster | changes)
    assert len(calls) == 1


@pytest.mark.parametrize("workers", ["one:0:10.0.0.1", "one:0:10.0.0.1,two:1:10.0.0.2"])
def test_a_tpu_vm_finds_the_others_in_its_metadata(monkeypatch, workers):
    from jax._src import hardware_utils
    from jax._src.clusters import cloud_tpu_cluster

    said = {"agent-worker-number": "1", "worker-network-endpoints": workers}
    calls, asked = [], []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr("llama_jax.parallel.mesh.on_abort", lambda end: None)  # of the process that runs the tests
    monkeypatch.setattr(
        cloud_tpu_cluster, "get_metadata", lambda key: (asked.append(key) or said.get(key, ""), "200" if key in said else "404")
    )
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "metadata_response_code_success", "200")
    cluster = ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")
    for name in (*cluster, "JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    start_distributed()
    assert not asked and not calls  # no chips here: a laptop with libtpu waits for no metadata server
    monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, "v5p"))
    start_distributed()
    assert len(calls) == ("," in workers) and "worker-network-endpoints" in asked


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


def lowered(config, mesh, *, microbatches=1, loss_chunks=1):
    """(specs, optimizer, jitted step, abstract state) of a language model's training."""
    specs = table.table(config, head="lm_head")
    optim = optimizer.make(
        optimizer.OptimConfig(lr=1e-2, schedule="constant"), steps=STEPS, decay=table.decay_mask(specs)
    )
    target = abstract_state(specs, optim, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, target)
    loss = language_model_loss(config, dataclasses.replace(FLOAT32, loss_chunks=loss_chunks))
    step = make_step(loss, optim, microbatches=microbatches, layout=layout)
    return specs, optim, step, target


def adam(state):
    (found,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return found


def run(config, mesh, *, microbatches=1):
    """Losses of the first steps, the gradient of the first (as Adam's first moment keeps it) and the last state."""
    with jax.set_mesh(mesh):
        specs, optim, step, _ = lowered(config, mesh, microbatches=microbatches)
        state = born_sharded(lambda: jax.device_put(drawn(config), shardings(specs, mesh)), specs, optim, mesh)
        losses = []
        for number in range(STEPS):
            state, means = step(state, put_batch(token_batch(0), mesh))
            losses.append([float(means[name]) for name in ("loss", "accuracy", "gradient_norm")])
            if number == 0:
                gradient = jax.device_get(adam(state).mu)
    assert step._cache_size() == 1
    return np.array(losses), gradient, state


@pytest.fixture(scope="module")
def eight_heads(tiny):
    """Query heads for every factorisation; still only two key-value heads."""
    return dataclasses.replace(tiny, heads=8, head_size=4)


@pytest.fixture(scope="module")
def one_device(eight_heads):
    return run(eight_heads, mesh_of())


def test_training_on_one_device_learns(one_device):
    losses = one_device[0]
    assert abs(losses[0, 0] - np.log(96)) < 0.2 and losses[-1, 0] < losses[0, 0] - 0.02


FACTORISATIONS = [
    (data, fsdp, sequence, 8 // (data * fsdp * sequence))
    for data in (1, 2, 4, 8) for fsdp in (1, 2, 4, 8) for sequence in (1, 2, 4, 8) if 8 % (data * fsdp * sequence) == 0
]  # fmt: skip
FAST = {(2, 2, 1, 2): 2, (1, 2, 2, 2): 1, (8, 1, 1, 1): 2}  # -> microbatches


def test_these_are_all_factorisations():
    assert len(set(FACTORISATIONS)) == 20 and set(FAST) < set(FACTORISATIONS)  # 6 choose 3 ways to share 2 * 2 * 2


@pytest.mark.parametrize("sizes", [
    pytest.param(sizes, marks=() if sizes in FAST else pytest.mark.slow) for sizes in FACTORISATIONS
], ids=str)  # fmt: skip
def test_sharded_training_equals_one_device(eight_heads, one_device, sizes):
    mesh = mesh_of(*sizes)
    losses, gradient, state = run(eight_heads, mesh, microbatches=FAST.get(sizes, 1))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(losses, one_device[0])
    # The moment is a tenth of the clipped gradient, whose largest entries are around 0.1.
    jax.tree.map(functools.partial(close, atol=1e-7), gradient, one_device[1])
    jax.tree.map(close, jax.device_get(state.params), jax.device_get(one_device[2].params))
    # Every leaf of the parameters and of both moments lies where the table says, after a step too.
    specs = table.table(eight_heads, head="lm_head")
    for tree in (state.params, adam(state).mu, adam(state).nu):
        jax.tree.map(_lies, tree, shardings(specs, mesh))
    for x in (state.step, state.skipped, adam(state).count):
        assert x.sharding.is_fully_replicated
    # ... and the table splits what it should: no device holds more than its share of a matrix.
    gate = state.params["trunk"]["layers"]["gate"]
    assert gate.addressable_shards[0].data.size * sizes[1] * sizes[3] == gate.size


def test_slices_that_add_up_apart_equal_one_device(eight_heads, one_device, monkeypatch):
    monkeypatch.setattr(train_step, "slice_count", lambda devices: 2)
    losses, _, state = run(eight_heads, mesh_of(2, 1, 2, 2), microbatches=4)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(losses, one_device[0])
    jax.tree.map(close, jax.device_get(state.params), jax.device_get(one_device[2].params))


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


# ---- what the devices say to each other ----

# The layers; bytes of the head, of a token's state and of one of its heads; the program is float32.
L, HEAD, WIDTH, ONE_HEAD = 2, 4 * 32 * 96, 4 * 32, 4 * 4


def model_on(sizes, tiny):
    """Eight heads, and as few key-value heads as the mesh can divide."""
    return dataclasses.replace(tiny, heads=8, head_size=4, kv_heads=max(2, sizes[3]))


def layer_bytes(keys):
    """Of a layer's matrices, where a token's keys take so many."""
    return 4 * (2 * 32 * 32 + 3 * 32 * 64) + 2 * 32 * keys


def traffic(sizes, loss_chunks=1):
    """{(collective, axes): bytes a step} that the rule tables mean, on 16 rows of 16 tokens. Sizes are of whole results.

    fsdp: every matrix is gathered for the forward and for the backward pass (the head for both at once), and its gradient is
      reduced, that of the head in each part of the loss. Ids are gathered for the embedding, and its rows exchanged, forward
      and backward.
    data, sequence: gradients are reduced, each device's part over both at once (but where fsdp divides nothing, all but the
      embedding's over the one and then the other), and nothing else but the ring.
    ring: in each layer keys and values go from neighbour to neighbour, n - 1 times forward and again backward, and their
      gradients n times, home. So do ids: once for all layers, but those of the backward pass's loop in each. Into the ring's
      order go ids, segments and positions, back the states, and there their gradient: half of a device's tokens on two ways,
      of which on two devices one leads nowhere.
    tensor: a product that ends a half-block is reduced, its input was gathered from the devices that share the residual
      stream; backward the same the other way around, for each of the matrices that read the input.
    """
    data, fsdp, sequence, tensor = sizes
    rows, length, keys = 16 // (data * fsdp), 16 // sequence, max(2, tensor) * ONE_HEAD
    matrices, head = layer_bytes(keys) // tensor, HEAD // tensor
    gradients = L * matrices + loss_chunks * head
    state = rows * length * WIDTH  # the residual stream of a device, before tensor divides it
    moved = collections.Counter()
    if fsdp > 1:
        moved["all-gather", "fsdp"] = 2 * L * matrices + head + fsdp * rows * length * 4
        moved["all-to-all", "fsdp"] = 2 * state // tensor
        moved["all-reduce", "fsdp"] = gradients  # the embedding's is complete
    others = [axis for axis, size in (("data", data), ("sequence", sequence)) if size > 1]
    if len(others) == 2 and fsdp == 1:
        moved |= {("all-reduce", axis): gradients for axis in others}
        moved["all-reduce", "data+sequence"] = head
    elif others:
        moved["all-reduce", "+".join(others)] = (gradients + head) // fsdp
    if sequence > 1:
        tokens, ways = rows * length, 1 if sequence == 2 else 2
        moved["collective-permute", "sequence"] = (
            L * 2 * (2 * (sequence - 1) + sequence) * tokens * keys // tensor
            + (1 + (sequence - 2) * (1 + L)) * tokens * 4
            + ways * (tokens // 2) * (3 * 4 + 2 * WIDTH)
        )
    if tensor > 1:
        moved["reduce-scatter", "tensor"] = state  # rows of the embedding
        moved["all-gather", "tensor"] = L * 4 * state + 2 * state
        moved["all-reduce", "tensor"] = L * (1 + 1 + 3 + 2) * state + state
    return moved


def communication(text, mesh, key=lambda collective: ()):
    """{(*key, collective, axes): bytes a step} of a compiled program; a loop that ends when it may counts once."""
    found = collections.Counter()
    for c in Module(text, trips=1).collectives():
        found[*key(c), c.kind, "+".join(mesh_axes(c, dict(mesh.shape)))] += c.bytes * c.count
    return found


def check_traffic(found, expected, *, small):
    for key in {*found, *expected}:
        assert 0 <= found[key] - expected[key] <= small, (key, found, expected)


# -> into how many parts the tokens of the loss are cut
QUICK = {(1, 8, 1, 1): 2, (8, 1, 1, 1): 1, (1, 4, 1, 2): 2, (1, 2, 2, 2): 1}
SLOW = {sizes: 1 for sizes in FACTORISATIONS if sizes not in QUICK} | {(2, 2, 2, 1): 2, (1, 1, 1, 8): 4}


@pytest.mark.parametrize(("sizes", "loss_chunks"), [
    *QUICK.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())
], ids=str)  # fmt: skip
def test_the_collectives_of_a_train_step_are_those_of_the_rules(tiny, sizes, loss_chunks):
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        _, _, step, state = lowered(model_on(sizes, tiny), mesh, loss_chunks=loss_chunks)
        ids, weights = (jax.ShapeDtypeStruct((16, 16), dtype, sharding=axes.batch_sharding(mesh, 2))
                        for dtype in (jnp.int32, jnp.float32))  # fmt: skip
        text = step.lower(state, TokenBatch(ids, ids, weights, ids, ids)).compile().as_text()
    # Beside those: gradients of norms, whole on every device and summed up over what divides tokens, in any grouping; sums of
    # losses, a number a device; and four numbers for each token of a loss over a divided vocabulary.
    data, fsdp, sequence, tensor = sizes
    small = (2 * L + 1) * WIDTH + 256 + (4 * 4 * 16 * 16 // (data * fsdp * sequence) if tensor > 1 else 0)
    check_traffic(communication(text, mesh), traffic(sizes, loss_chunks), small=small)


@pytest.mark.parametrize("sizes", [
    (2, 4, 1, 1), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(8, 1, 1, 1), (2, 2, 2, 1), (2, 1, 1, 4)])
], ids=str)  # fmt: skip
def test_gradients_cross_slices_once_a_step_whatever_the_microbatches(tiny, sizes, monkeypatch):
    monkeypatch.setattr(train_step, "slice_count", lambda devices: sizes[0])
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        _, _, step, state = lowered(model_on(sizes, tiny), mesh, microbatches=4)
        ids, weights = (jax.ShapeDtypeStruct((64, 16), dtype, sharding=axes.batch_sharding(mesh, 2))
                        for dtype in (jnp.int32, jnp.float32))  # fmt: skip
        text = step.lower(state, TokenBatch(ids, ids, weights, ids, ids)).compile().as_text()
    data, fsdp, sequence, tensor = sizes
    gradients = (L * layer_bytes(max(2, tensor) * ONE_HEAD) + 2 * HEAD) // (fsdp * tensor)
    small = (2 * L + 1) * WIDTH + 1024  # norms, and sums of losses
    found = {key: moved for key, moved in communication(text, mesh).items() if "data" in key[1]}
    assert {kind for kind, _ in found} == {"all-reduce"} and 0 <= sum(found.values()) - gradients <= small, (found, gradients)


def rollout_traffic(sizes, *, prompt, new):
    """{(when, collective, axes): bytes} of drawing `new` tokens for 16 rows in the layout DECODE.

    fsdp: every matrix is gathered once, before the first token; so is the embedding.
    tensor: the embedding's rows and the two products that end half-blocks are reduced, of the prompt and then of each token;
      and, for each draw, the block of 128 tokens of the vocabulary in which it falls.
    data, sequence: nothing, but whether all rows have ended.
    """
    data, fsdp, _, tensor = sizes
    rows = 16 // (data * fsdp)
    moved = collections.Counter()
    if fsdp > 1:
        moved["once", "all-gather", "fsdp"] = (L * layer_bytes(2 * 4 * 8) + 2 * HEAD) // tensor  # two heads of `tiny`, of 8
    if tensor > 1:
        moved["once", "all-reduce", "tensor"] = rows * ((2 * L + 1) * prompt * WIDTH + 4 * 128)
        moved["a token", "all-reduce", "tensor"] = new * rows * ((2 * L + 1) * WIDTH + 4 * 128)
    return moved


@pytest.mark.parametrize("sizes", [
    (1, 4, 1, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(1, 8, 1, 1), (8, 1, 1, 1), (1, 2, 2, 2)])
], ids=str)  # fmt: skip
def test_the_collectives_of_a_rollout_are_those_of_the_rules(tiny, sizes):
    mesh, specs, prompt, new = mesh_of(*sizes), table.table(tiny, head="lm_head"), 8, 5
    sample = make_sampler(tiny, specs, compute=FLOAT32, eos_id=2, max_new_tokens=new, temperature=1.0)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16))
    with jax.set_mesh(mesh):
        ids, valid, keys = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=axes.batch_sharding(mesh, len(shape)))
            for shape, dtype in (((16, prompt), jnp.int32), ((16, prompt), bool), (keys.shape, keys.dtype))
        )
        text = sample.lower(abstract(specs, mesh), ids, valid, keys).compile().as_text()
    found = communication(text, mesh, lambda c: ("a token" if "while/body" in c.op_name else "once",))
    # Beside those: a few numbers for each row and draw, and the prompts' ids, which are divided over sequence as they come.
    check_traffic(found, rollout_traffic(sizes, prompt=prompt, new=new), small=1024)


def engine_traffic(sizes, *, slots, steps, chunk, held):
    """{(when, collective, axes): bytes} of the engine's programs in the layout DECODE: of decoding, and of a chunk's way in.

    `chunk` is (length, prompts); `held` tokens fit into a slot.

    decode: tensor as in `rollout_traffic`, a token; and, where some request cuts its distribution, 32 halvings in each of two
      searches for where to cut, a number a row. What was drawn is gathered from all rows' devices, once: a token, two
      log-probabilities and whether it counts for each step, and whether the slot goes on.
    extend: the few rows of a chunk are whole on every device of the batch: the cache of their slots is fetched from where it
      lies, layer by layer, and with it how much of it is filled. The last layer's attention is not computed, since nobody
      reads its result: that layer's keys and values are all that enters.
    """
    data, fsdp, _, tensor = sizes
    rows, (length, prompts), batch = slots // (data * fsdp), chunk, "+".join(axis_names(data=data, fsdp=fsdp))
    decode, extend = collections.Counter(), collections.Counter()
    if batch:
        decode["once", "all-gather", batch] = slots * (steps * (3 * 4 + 1) + 1)
        heads = 2 // tensor
        extend["once", "all-reduce", batch] = (L - 1) * 2 * prompts * heads * 8 * held * 4 + prompts * 4
    if tensor > 1:
        decode["a token", "all-reduce", "tensor"] = rows * ((2 * L + 1) * WIDTH + 4 * 128)
        decode["a cut", "all-reduce", "tensor"] = rows * 2 * 32 * 4
        extend["once", "all-reduce", "tensor"] = (2 * (L - 1) + 1) * prompts * length * WIDTH
    return decode, extend


def axis_names(**sizes):
    return [axis for axis, size in sizes.items() if size > 1]


@pytest.mark.parametrize("sizes", [
    (1, 4, 1, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(2, 2, 1, 2), (1, 8, 1, 1)])
], ids=str)  # fmt: skip
def test_the_collectives_of_the_engine_are_those_of_the_rules(tiny, sizes):
    mesh, specs, chunk = mesh_of(*sizes), table.table(tiny, head="lm_head"), (8, 4)
    settings = EngineConfig(slots=16, max_length=24, chunks=(chunk,), steps=3)
    with jax.set_mesh(mesh):
        run = device.programs(tiny, FLOAT32, settings, mesh)
        prepared = jax.jit(lambda tree: prepare(tree, specs, compute=FLOAT32)).lower(abstract(specs, mesh)).compile()
        weights = jax.tree.map(placed, prepared.out_info, prepared.output_shardings)
        slots = run.empty.eval_shape()
        slots = jax.tree.map(placed, slots, device.shardings(slots, mesh))
        decode = run.decode.lower(weights, slots, np.int32(3), np.int32(0), np.bool_(False)).compile().as_text()
        extend = run.extend.lower(weights, slots, device.pieces([], chunk, nowhere=16)).compile().as_text()

    def when(c):
        # What `choose.draw` does for requests that cut their distribution stands in a branch of its own.
        return ("a cut" if "/cond/branch" in c.op_name else "a token" if "/while/" in c.op_name else "once",)

    expected = engine_traffic(sizes, slots=16, steps=3, chunk=chunk, held=round_up(24))
    # Beside those: up to sixteen numbers for each row and draw, less than a row's state; of a chunk nothing.
    check_traffic(communication(decode, mesh, when), expected[0], small=16 * 4 * 16 // (sizes[0] * sizes[1]))
    assert communication(extend, mesh, when) == expected[1]


def placed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
