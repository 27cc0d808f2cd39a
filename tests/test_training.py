"""The loop and what it promises: sums that add up, skipped steps, checkpoints that are whole, resume to the bit."""

import dataclasses
import json
import logging
import os
import re
import signal
import threading
import types
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from llama_jax import train as train_command
from llama_jax.config import ConfigError
from llama_jax.data.loader import IndexedBatches
from llama_jax.evals.speed import speed
from llama_jax.interop import ours
from llama_jax.model import params as table
from llama_jax.parallel.axes import ParamSpec
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.training import checkpoint, fingerprint, optimizer, recorder, saved
from llama_jax.training import loop as loop_module
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.feed import Feed
from llama_jax.training.fingerprint import CheckpointError, fingerprints
from llama_jax.training.loop import Diverged, Preempted, claim, finished, train
from llama_jax.training.metrics import read_metrics
from llama_jax.training.optimizer import OptimConfig, clip_each_model, gradient_norms, schedule
from llama_jax.training.recorder import Pace
from llama_jax.training.saved import newest_step, read_meta, restore_params
from llama_jax.training.stage import LoopConfig, Stage, Supervised, Weighted, evaluation
from llama_jax.training.state import abstract_state, create
from llama_jax.training.step import make_step, put_batch


def mesh_of(data=1, fsdp=1, sequence=1, tensor=1):
    config = MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    return make_mesh(config, devices=jax.devices()[: data * fsdp * sequence * tensor])


# ---- a task that compiles at once: regression with one hidden layer and ragged weights ----


@flax.struct.dataclass
class Points:
    x: np.ndarray  # [B, 4]
    y: np.ndarray  # [B]
    weight: np.ndarray  # [B]


def normal(key, shape, dtype):
    return 0.5 * jax.random.normal(key, shape, dtype)


SPECS = {
    "trunk": {"matrix": ParamSpec((4, 8), ("width", "ffn"), normal), "bias": ParamSpec((8,), ("ffn",), normal)},
    "reward_head": {"kernel": ParamSpec((8,), (None,), normal)},
}
DECAY = {"trunk": {"matrix": True, "bias": False}, "reward_head": {"kernel": False}}


def points(step, rows=16):
    draw = np.random.default_rng((5, step))
    x = draw.normal(size=(rows, 4)).astype(np.float32)
    weight = draw.integers(0, 4, rows).astype(np.float32) * 0.5
    return Points(x, np.sin(x.sum(1)).astype(np.float32), weight)


def loss(params, batch):
    hidden = jnp.tanh(batch.x @ params["trunk"]["matrix"] + params["trunk"]["bias"])
    error = hidden @ params["reward_head"]["kernel"] - batch.y
    weight = batch.weight.sum()
    absolute = Weighted(jnp.sum(batch.weight * jnp.abs(error)), weight)
    return Weighted(jnp.sum(batch.weight * error**2), weight), {"error": absolute}


class Batches:
    """Pure function of the step; the steps in `poisoned` hold a NaN; `interrupt` is called at a step."""

    def __init__(self, *, poisoned=(), interrupt=None, at=None):
        self.poisoned, self.interrupt, self.at = poisoned, interrupt, at

    def batch(self, step):
        if step == self.at:
            self.interrupt()
        batch = points(step)
        return batch.replace(y=np.full_like(batch.y, np.nan)) if step in self.poisoned else batch


class Rollouts:
    """As an RL source: looks at the parameters, and holds a buffer and a count that the next batches depend on."""

    looks_at_params = True

    def __init__(self, **batches):
        self.batches = Batches(**batches)
        self.held = {"buffer": np.zeros(16, np.float32), "count": np.zeros((), np.int32)}

    def batch(self, step, params):
        batch = self.batches.batch(step)
        if step % 4 == 0:  # the checkpoints after 3 and 6 steps fall inside a rollout
            shift = np.float32(np.asarray(params["trunk"]["bias"]).mean())
            self.held = {"buffer": batch.x[:, 0] + shift, "count": self.held["count"] + 1}
        return batch.replace(y=batch.y + 0.1 * np.asarray(self.held["buffer"])), {"rollouts": float(self.held["count"])}

    def state(self):
        return self.held

    def restore(self, state):
        self.held = jax.tree.map(np.asarray, state)


def parameters(mesh, scale=1.0):
    draw = np.random.default_rng(0)
    values = jax.tree.map(lambda s: scale * draw.normal(size=s.shape).astype(np.float32), SPECS, is_leaf=_is_spec)
    return jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), values, abstract_state(SPECS, optax.sgd(1), mesh).params)


def _is_spec(leaf):
    return isinstance(leaf, ParamSpec)


def stage(mesh, *, source=None, evaluate=None):
    return Stage(
        name="toy", specs=SPECS, init=lambda: parameters(mesh), loss=loss, evaluate=evaluate,
        optimizer=optimizer.make(OptimConfig(lr=0.05, warmup=2), steps=8, decay=DECAY),
        source=source or Supervised(Batches()), tokens_per_step=16, meta={"model": "toy"},
    )  # fmt: skip


def loop(**changes):
    return LoopConfig(**{"steps": 8, "batch_size": 16, "checkpoint_every": 3, "log_every": 1, **changes})


# ---- batches one step ahead ----


class Asked:
    """A source that writes down which batches it was asked for, and with which parameters."""

    def __init__(self, *, looks_at_params):
        self.looks_at_params = looks_at_params
        self.calls, self.call = [], threading.Condition()

    def batch(self, step, params):
        with self.call:
            self.calls.append((step, params))
            self.call.notify_all()
        return points(step), {"asked": float(step)}

    def wait(self, count):
        with self.call:
            assert self.call.wait_for(lambda: len(self.calls) >= count, timeout=60), self.calls


def test_batches_are_made_one_step_ahead_and_none_beyond_the_last():
    source = Asked(looks_at_params=False)
    with Feed(source, mesh_of(data=2), 3, lambda step: step + 10) as feed:  # the batches of steps may be others
        for step in range(3):
            batch, metrics = feed.batch(step, "parameters")
            source.wait(min(step + 2, 3))  # the next one, while this one is still to be trained on
            assert source.calls == [(10 + number, None) for number in range(min(step + 2, 3))]
            np.testing.assert_array_equal(batch.x, points(10 + step).x)
            assert metrics == {"asked": 10 + step} and len(batch.x.sharding.device_set) == 2
    assert len(source.calls) == 3 and not feed.next  # none is on its way


def test_a_source_that_looks_at_the_parameters_is_asked_with_those_of_the_step():
    source = Asked(looks_at_params=True)
    with Feed(source, mesh_of(), 3, lambda step: step) as feed:
        for step in range(3):
            batch, _ = feed.batch(step, f"after {step} steps")
            assert source.calls == [(number, f"after {number} steps") for number in range(step + 1)]
            np.testing.assert_array_equal(batch.x, points(step).x)


def final(workdir, mesh):
    """Everything in the newest checkpoint but the seconds, as bits."""
    meta = read_meta(workdir)
    return restore_params(workdir, SPECS, mesh), meta["fingerprints"], meta["step"]


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def mesh():
    return mesh_of()


# ---- one update ----


def one_step(mesh, state, batch, *, microbatches=1, optim=None):
    optim = optim or optax.adam(0.1)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(SPECS, optim, mesh))
    with jax.set_mesh(mesh):
        return make_step(loss, optim, microbatches=microbatches, layout=layout)(state, put_batch(batch, mesh))


def test_one_microbatch_equals_many_with_ragged_weights(mesh):
    optim = optax.sgd(1.0)  # the new parameters are the gradient
    batch = points(0)
    batch.weight[[0, 4, 8, 12]] = 0.0  # the first of four microbatches has no weight at all
    expected = None
    for microbatches in (1, 2, 4, 16):
        state, means = one_step(mesh, create(parameters(mesh), optim), batch, microbatches=microbatches, optim=optim)
        found = {"params": state.params, "means": means}
        expected = expected or found
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)
    params = parameters(mesh)
    mean = lambda p: loss(p, batch)[0].mean()  # noqa: E731
    np.testing.assert_allclose(expected["means"]["loss"], mean(params), rtol=1e-6)
    by_hand = jax.tree.map(lambda p, g: p - g, params, jax.grad(mean)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected["params"], by_hand)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(mesh):
    optim = optax.adam(0.1)
    state, _ = one_step(mesh, create(parameters(mesh), optim), points(0))
    before = jax.tree.map(np.array, state)
    for value, weight in ((np.nan, 1.0), (np.inf, 1.0)):
        bad = points(1)
        bad.y[3], bad.weight[3] = value, weight
        state, means = one_step(mesh, state, bad)
        assert not np.isfinite(means["loss"])
    assert_equal((state.params, state.opt_state), (before.params, before.opt_state))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 2, 2)
    state, means = one_step(mesh, state, points(2))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 0)
    assert int(means["skipped"]) == 2


def test_the_tokens_of_a_step_are_the_real_ones_that_it_learned_from(mesh):
    @flax.struct.dataclass
    class Rows(Points):
        segment_ids: np.ndarray  # [B, T]

    optim, batch = optax.adam(0.1), points(0)
    segment_ids = np.array([[1, 1, 2, 0], *[[1, 0, 0, 0]] * 15], np.int32)
    rows = Rows(batch.x, batch.y, batch.weight, segment_ids)
    for microbatches in (1, 4):
        _, means = one_step(mesh, create(parameters(mesh), optim), rows, microbatches=microbatches)
        assert int(means["tokens"]) == 3 + 15
    _, means = one_step(mesh, create(parameters(mesh), optim), rows.replace(y=np.full_like(batch.y, np.nan)))
    assert int(means["tokens"]) == 0
    _, means = one_step(mesh, create(parameters(mesh), optim), batch)
    assert "tokens" not in means and "learning_rate" not in means  # a batch, and an optimizer, that do not tell


def test_a_gradient_of_one_model_that_is_not_finite_skips_the_update_of_both(mesh):
    specs = {name: {"trunk": {"w": ParamSpec((1,), (None,), normal)}} for name in ("policy", "critic")}

    def root(params, batch):  # whose derivative at 0 is infinite, while it is 0 itself
        policy, critic = (params[name]["trunk"]["w"][0] for name in ("policy", "critic"))
        return Weighted(3.0 * policy + jnp.sqrt(critic) + 0.0 * batch.weight.sum(), jnp.ones(())), {}

    optim = optax.sgd(1.0)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(specs, optim, mesh))
    for critic, norm, policy in ((0.0, np.inf, 1.0), (0.25, 1.0, -2.0)):
        values = {"policy": {"trunk": {"w": jnp.array([1.0])}}, "critic": {"trunk": {"w": jnp.array([critic])}}}
        with jax.set_mesh(mesh):
            state, means = make_step(root, optim, microbatches=1, layout=layout)(
                create(values, optim), put_batch(points(0), mesh)
            )
        assert (float(means["gradient_norm/policy"]), float(means["gradient_norm/critic"])) == (3.0, norm)
        assert "gradient_norm" not in means and int(state.skipped) == (norm == np.inf)
        assert float(state.params["policy"]["trunk"]["w"][0]) == policy


@pytest.mark.parametrize("sizes", [(), (2, 2, 1, 2)])
def test_the_state_is_donated_and_the_frozen_parameters_are_not(sizes):
    mesh, optim = mesh_of(*sizes), optax.adam(0.1)
    target = abstract_state(SPECS, optim, mesh)
    step = make_step(loss, optim, microbatches=1, layout=jax.tree.map(lambda leaf: leaf.sharding, target))
    with jax.set_mesh(mesh):
        state, frozen, batch = create(parameters(mesh), optim), {"base": parameters(mesh)}, put_batch(points(0), mesh)
        state, _ = step(state, batch, frozen)  # from here on the state lies as the step leaves it
        after, _ = step(state, batch, frozen)
    assert all(x.is_deleted() for x in jax.tree.leaves(state)), "an update holds parameters and moments twice"
    assert not any(x.is_deleted() for x in jax.tree.leaves((after, frozen, batch)))


# ---- the optimizer ----


def test_schedule_of_the_paper():
    rate = schedule(OptimConfig(lr=3e-4, warmup=2000), 476_837)  # 7B, section 2.2
    np.testing.assert_allclose([rate(0), rate(1000), rate(2000)], [0, 1.5e-4, 3e-4], rtol=1e-5)
    middle = 2000 + (476_837 - 2000) / 2
    np.testing.assert_allclose([rate(middle), rate(476_837)], [0.55 * 3e-4, 3e-5], rtol=1e-4)
    np.testing.assert_allclose(rate(600_000), 3e-5, rtol=1e-5)
    quarter = 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(rate(2000 + (476_837 - 2000) / 4), quarter * 3e-4, rtol=1e-4)


def test_schedules_without_warmup_and_constant_ones():
    rate = schedule(OptimConfig(lr=2e-5), 100)
    np.testing.assert_allclose([rate(0), rate(100)], [2e-5, 2e-6], rtol=1e-5)
    constant = schedule(OptimConfig(lr=1e-6, schedule="constant"), 100)
    np.testing.assert_allclose([constant(0), constant(1000)], [1e-6, 1e-6], rtol=1e-6)
    warm = schedule(OptimConfig(lr=1e-6, schedule="constant", warmup=4), 100)
    np.testing.assert_allclose([warm(0), warm(2), warm(4), warm(99)], [0, 5e-7, 1e-6, 1e-6], rtol=1e-5)
    with pytest.raises(ValueError, match="optim.warmup=100 leaves nothing of loop.steps=100"):
        schedule(OptimConfig(lr=1.0, warmup=100), 100)
    for field, value in (
        ("lr", 0.0), ("lr", np.inf), ("warmup", -1), ("final", -0.1), ("clip", -1.0), ("weight_decay", np.nan), ("beta2", 1.0),
        ("warmup_share", 1.5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"optim.{field}: expected"):
            OptimConfig(**{"lr": 1.0, field: value})


def test_a_share_of_the_steps_warms_up_however_many_they_are():
    reward = OptimConfig(lr=1e-5, warmup=5, warmup_share=0.03)  # section 3.2.2
    assert [reward.warmup_of(steps) for steps in (5700, 86, 11, 3, 1)] == [171, 5, 5, 1, 0]
    assert all(schedule(reward, steps).warmup < steps for steps in range(1, 20))
    np.testing.assert_allclose(schedule(reward, 5700)(171), 1e-5, rtol=1e-6)


def test_no_limit_clips_nothing():
    gradient = {"trunk": {"w": jnp.array([30.0, 40.0])}}
    for limit, expected in ((0.0, [30.0, 40.0]), (1.0, [0.6, 0.8])):
        updates, _ = clip_each_model(limit).update(gradient, optax.EmptyState())
        np.testing.assert_allclose(updates["trunk"]["w"], expected, rtol=1e-6)


def test_weight_decay_is_felt_where_the_mask_says(mesh):
    params = parameters(mesh)
    optim = optimizer.make(OptimConfig(lr=0.5, schedule="constant", weight_decay=0.1), steps=1, decay=DECAY)
    updates, _ = optim.update(jax.tree.map(jnp.zeros_like, params), optim.init(params), params)
    np.testing.assert_allclose(updates["trunk"]["matrix"], -0.5 * 0.1 * params["trunk"]["matrix"], rtol=1e-6)
    assert not np.any(updates["trunk"]["bias"]) and not np.any(updates["reward_head"]["kernel"])


def test_adamw_by_hand():
    optim = optimizer.make(OptimConfig(lr=0.1, schedule="constant"), steps=1, decay={"trunk": {"w": True}})
    params = {"trunk": {"w": jnp.array([2.0])}}
    updates, _ = optim.update({"trunk": {"w": jnp.array([0.5])}}, optim.init(params), params)
    # After bias correction both moments of the first step are the gradient itself: lr * (g / (|g| + eps) + 0.1 w).
    np.testing.assert_allclose(updates["trunk"]["w"], -0.1 * (0.5 / (0.5 + 1e-5) + 0.1 * 2.0), rtol=1e-5)


def test_stages_of_other_lengths_and_rates_share_one_program(mesh):
    def lowered(config, steps):
        optim = optimizer.make(config, steps=steps, decay=DECAY)
        target = abstract_state(SPECS, optim, mesh)
        step = make_step(loss, optim, microbatches=1, layout=jax.tree.map(lambda leaf: leaf.sharding, target))
        return step.lower(target, put_batch(points(0), mesh), None, optim.schedule).as_text()

    short = lowered(OptimConfig(lr=0.1, warmup=2), 8)
    assert short == lowered(OptimConfig(lr=0.2, warmup=20, final=0.2), 800)
    assert short == lowered(OptimConfig(lr=0.1, schedule="constant"), 8)
    assert short != lowered(OptimConfig(lr=0.1, warmup=2, weight_decay=0.2), 8)


def test_a_schedule_is_that_of_optax():
    ours = schedule(OptimConfig(lr=3e-4, warmup=7, final=0.1), 50)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 7, 50, end_value=3e-5)
    counts = np.arange(60)
    np.testing.assert_allclose([ours(n) for n in counts], [theirs(n) for n in counts], rtol=2e-6, atol=1e-10)


def test_each_model_is_clipped_by_its_own_norm():
    clip = clip_each_model(1.0)
    one = {"trunk": {"a": jnp.array([3.0])}, "lm_head": {"b": jnp.array([4.0])}}
    clipped, _ = clip.update(one, clip.init(one))
    np.testing.assert_allclose([clipped["trunk"]["a"][0], clipped["lm_head"]["b"][0]], [0.6, 0.8], rtol=1e-6)
    two = {"policy": {"trunk": {"a": jnp.array([0.5])}}, "critic": {"trunk": {"a": jnp.array([30.0, 40.0])}}}
    clipped, _ = clip.update(two, clip.init(two))
    np.testing.assert_allclose(clipped["policy"]["trunk"]["a"], [0.5])  # the critic's size does not reach it
    np.testing.assert_allclose(clipped["critic"]["trunk"]["a"], [0.6, 0.8], rtol=1e-6)
    assert {name: float(norm) for name, norm in gradient_norms(one).items()} == {"gradient_norm": 5.0}
    named = {name: float(norm) for name, norm in gradient_norms(two).items()}  # as each is clipped
    assert named == {"gradient_norm/policy": 0.5, "gradient_norm/critic": 50.0}
    zero = jax.tree.map(jnp.zeros_like, one)
    assert_equal(clip.update(zero, clip.init(zero))[0], zero)


# ---- checkpoints ----


def test_fingerprints_see_every_single_bit_and_no_sharding():
    draw = np.random.default_rng(0)
    tree = {
        "float32": draw.normal(size=(8, 6)).astype(np.float32), "bfloat16": np.asarray(jnp.ones((4, 3), jnp.bfloat16)),
        "int32": np.arange(5, dtype=np.int32), "uint8": np.zeros((2, 2, 2), np.uint8), "scalar": np.float32(1.5).reshape(()),
        "bool": np.array([True, False, True]), "empty": np.zeros((0, 3), np.float32),
    }  # fmt: skip
    before = fingerprints(tree)
    assert len(before) == len(tree)
    for name, leaf in tree.items():
        for index in range(leaf.size):
            changed = np.array(leaf)
            raw = changed.reshape(-1).view(np.uint8) if leaf.dtype != bool else changed.reshape(-1)
            width = leaf.dtype.itemsize if leaf.dtype != bool else 1
            bit = 1 if leaf.dtype == bool else 1 << int(draw.integers(8))
            raw[index * width + int(draw.integers(width))] ^= bool(bit) if leaf.dtype == bool else bit
            after = fingerprints({**tree, name: changed})
            assert [key for key in before if before[key] != after[key]] == [f"['{name}']"]
    swapped = {**tree, "int32": tree["int32"][[1, 0, 2, 3, 4]]}
    assert fingerprints(swapped) != before


def test_fingerprints_see_changes_that_would_cancel_in_a_sum_of_multiples():
    """Negated leaves, and pairs of flips of the upper bits of two words, as the sum of word * (2 * index + 1) did not."""
    draw = np.random.default_rng(0)
    leaf = draw.normal(size=(64, 64)).astype(np.float32)
    broken = [-leaf]
    for bit in range(24, 32):
        for _ in range(25):
            changed = leaf.copy()
            changed.reshape(-1).view(np.uint32)[draw.choice(leaf.size, 2, replace=False)] ^= np.uint32(1 << bit)
            broken.append(changed)
    before, after = fingerprints({"leaf": leaf}), fingerprints(dict(enumerate(broken)))
    assert before["['leaf']"] not in after.values() and len(set(after.values())) == len(broken)
    assert [fingerprint.fingerprint_part(leaf, 0), fingerprint.fingerprint_part(-leaf, 0)] == [
        before["['leaf']"], after["[0]"],
    ]  # fmt: skip


def test_fingerprints_do_not_depend_on_the_sharding():
    trees = [parameters(m) for m in (mesh_of(), mesh_of(2, 2, 1, 2), mesh_of(1, 4, 1, 2), mesh_of(8))]
    assert len({json.dumps(fingerprints(tree)) for tree in trees}) == 1
    # Nor are they added up by the devices: processes may reduce independent scalars in different orders.
    leaves = jax.tree.leaves(trees[1])
    specs = tuple(leaf.sharding.spec for leaf in leaves)
    text = fingerprint._parts.lower(leaves, leaves[0].sharding.mesh, specs, None).compile().as_text()
    assert not re.findall(r" (all-\w+|reduce-scatter|collective-\w+)\(", text)


def saved_steps(tmp_path, mesh, steps=(1, 2)):
    """A directory with checkpoints of different parameters; their states, and the restore target."""
    optim = optax.adam(0.1)
    states = {}
    for step in steps:
        state = create(parameters(mesh, scale=float(step)), optim)
        states[step] = state.replace(opt_state=jax.tree.map(lambda x, n=step: x + n, state.opt_state))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5)
    for step, state in states.items():
        checkpoints.save(step, state, {"buffer": np.full(3, step, np.float32)}, {"seconds": float(step)})
    checkpoints.close()
    return states, abstract_state(SPECS, optim, mesh)


def restore(tmp_path, target):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5)
    try:
        return checkpoints.restore(target, {"buffer": np.zeros(3, np.float32)})
    finally:
        checkpoints.close()


def test_a_checkpoint_comes_back_to_the_bit_with_all_its_items(tmp_path, mesh):
    states, target = saved_steps(tmp_path, mesh)
    state, source, meta = restore(tmp_path, target)
    assert_equal(state, states[2])
    np.testing.assert_array_equal(source["buffer"], [2, 2, 2])
    assert (meta["step"], meta["seconds"]) == (2, 2.0)
    checkpoints = Checkpoints(tmp_path / "empty", keep=1)
    assert checkpoints.restore(target, {}) is None
    checkpoints.close()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[len(data) // 2] ^= 0x10
    elif how == "zeroed":
        data = bytearray(len(data))
    path.write_bytes(data)
    if how == "gone":
        path.unlink()


def data_files(directory: Path) -> list[Path]:
    # All of them: Orbax merges what it wrote first, and which of the files a reader then needs depends on timing.
    return [path for path in directory.rglob("d/*") if path.is_file()]


@pytest.mark.parametrize("how", ["truncated", "flipped", "zeroed", "gone"])
@pytest.mark.parametrize("part", ["params", "optimizer", "source", "meta"])
def test_a_damaged_checkpoint_is_reported_and_the_older_one_used(tmp_path, mesh, caplog, part, how):
    states, target = saved_steps(tmp_path, mesh)
    directory = tmp_path / "checkpoints" / "2" / part
    for path in [directory / "metadata"] if part == "meta" else data_files(directory):
        damage(path, how)
    with caplog.at_level(logging.WARNING):
        state, source, meta = restore(tmp_path, target)
    assert (meta["step"], float(source["buffer"][0])) == (1, 1.0)
    assert_equal(state, states[1])
    assert "checkpoint 2 of" in caplog.text and "damaged" in caplog.text
    assert not (tmp_path / "checkpoints" / "2").exists()  # so that the run can write it again


class Refused(Exception):
    """As a bucket's client says it."""

    code = 403


@pytest.mark.parametrize("error", [
    PermissionError(13, "Permission denied"), TimeoutError("timed out"), Refused("no"),
    ValueError('PERMISSION_DENIED: Error reading "gs://bucket/run": HTTP response code: 403'),
    ValueError("Error reading local file [OS error 5: Input/output error]"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_disk_that_fails_is_no_damage(tmp_path, mesh, monkeypatch, caplog, error):
    states, target = saved_steps(tmp_path, mesh)
    read, tries = Checkpoints._read, []

    def fails(times):
        def torn(self, step, items):
            tries.append(step)
            if len(tries) <= times:
                raise CheckpointError("as `open_meta` tells it") from error
            return read(self, step, items)

        tries.clear()
        monkeypatch.setattr(Checkpoints, "_read", torn)

    monkeypatch.setattr(checkpoint, "_PAUSES", (0.0, 0.0))
    fails(2)
    assert_equal(restore(tmp_path, target)[0], states[2])
    assert tries == [2, 2, 2] and caplog.text.count("again in") == 2
    fails(3)
    with pytest.raises(CheckpointError, match="checkpoint 2 cannot be read: the disk or the service fails"):
        restore(tmp_path, target)
    assert tries == [2, 2, 2] and (tmp_path / "checkpoints" / "2").exists() and not (tmp_path / "damaged").exists()


def test_too_little_memory_is_neither_damage_nor_an_outage(tmp_path, mesh, monkeypatch):
    _, target = saved_steps(tmp_path, mesh)
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.")

    def full(*_, **__):
        raise ValueError("while reading params") from error

    assert fingerprint.is_outage(ValueError("RESOURCE_EXHAUSTED: too many requests")) and not fingerprint.is_outage(error)
    monkeypatch.setattr(Checkpoints, "_read", full)
    with pytest.raises(ValueError, match="^while reading params$"):
        restore(tmp_path, target)
    monkeypatch.setattr(ocp.Checkpointer, "restore", full)
    with pytest.raises(ValueError, match="^while reading params$"):
        restore_params(tmp_path, SPECS, mesh)
    assert not (tmp_path / "damaged").exists() and len(list((tmp_path / "checkpoints").glob("[12]"))) == 2


def test_each_damaged_checkpoint_of_a_step_is_kept(tmp_path, mesh):
    for _ in range(3):
        _, target = saved_steps(tmp_path, mesh)
        (tmp_path / "checkpoints" / "2" / "meta" / "metadata").unlink()
        assert restore(tmp_path, target)[2]["step"] == 1
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["2", "2.2", "2.3"]


def test_hosts_meet_only_when_each_has_read_its_part(tmp_path, mesh, monkeypatch):
    """One that cannot read must not leave the others in a barrier: what it does until all know has no collective in it."""
    states, target = saved_steps(tmp_path, mesh)
    for path in data_files(tmp_path / "checkpoints" / "2" / "params"):
        damage(path, "truncated")
    met, checkpoints = [], Checkpoints(tmp_path / "checkpoints", keep=2)
    meetings = (
        (checkpoint, "first_problem"), (checkpoint, "check_fingerprints"), (ocp.multihost, "sync_global_processes")
    )  # fmt: skip
    for module, name in meetings:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real, **k: met.append(name) or real(*a, **k))
    assert_equal(checkpoints.restore(target, {"buffer": np.zeros(3)})[0], states[1])
    checkpoints.close()
    assert met[:3] == ["first_problem", "first_problem", "check_fingerprints"]  # of 2, of 1


def test_if_no_checkpoint_is_whole_the_run_stops_and_nothing_is_removed(tmp_path, mesh):
    _, target = saved_steps(tmp_path, mesh)
    for step in (1, 2):
        for path in data_files(tmp_path / "checkpoints" / str(step) / "params"):
            damage(path, "truncated")
    for _ in range(2):  # a second attempt must not start from scratch either
        with pytest.raises(CheckpointError, match=r"none of the checkpoints \[2, 1\] is whole"):
            restore(tmp_path, target)
    assert (tmp_path / "checkpoints" / "2").exists()


def test_parameters_saved_on_eight_devices_restore_on_one_to_the_bit(tmp_path):
    wide, one = mesh_of(2, 2, 1, 2), mesh_of()
    states, _ = saved_steps(tmp_path, wide)
    state, _, _ = restore(tmp_path, abstract_state(SPECS, optax.adam(0.1), one))
    assert_equal(jax.device_get(state), jax.device_get(states[2]))
    params = restore_params(tmp_path, SPECS, one)
    assert params["trunk"]["matrix"].sharding.device_set == {jax.devices()[0]}
    back = restore_params(tmp_path, SPECS, wide)
    assert len(back["trunk"]["matrix"].sharding.device_set) == 8
    for found in (params, back):
        assert_equal(jax.device_get(found), jax.device_get(states[2].params))


HALF = jax.tree.map(lambda spec: dataclasses.replace(spec, dtype=jnp.bfloat16), SPECS, is_leaf=_is_spec)


def assert_cast(found, whole):
    """Both trees, the first in bfloat16."""
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    assert_equal(jax.device_get(found), jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), jax.device_get(whole)))


def test_what_was_saved_is_verified_and_then_cast(tmp_path):
    mesh, optim = mesh_of(2, 2, 1, 2), optax.adam(0.1)
    states, _ = saved_steps(tmp_path, mesh)
    params = restore_params(tmp_path, HALF, mesh)
    assert_cast(params, states[2].params)
    target = abstract_state(HALF, optim, mesh)
    jax.tree.map(lambda x, wanted: x.sharding.is_equivalent_to(wanted.sharding, x.ndim) or pytest.fail(), params, target.params)
    state, _, meta = restore(tmp_path, target)
    assert meta["step"] == 2 and not (tmp_path / "damaged").exists()
    assert_cast((state.params, state.opt_state[0].mu), (states[2].params, states[2].opt_state[0].mu))
    assert int(state.step) == int(states[2].step)
    for path in data_files(tmp_path / "checkpoints" / "2" / "params"):
        damage(path, "flipped")
    with pytest.raises(CheckpointError, match="checkpoints/2"):
        restore_params(tmp_path, HALF, mesh)
    assert restore(tmp_path, target)[2]["step"] == 1


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_converted_weights_restore_in_any_type(tmp_path, tiny, mesh, stored):
    specs = table.table(tiny, head="lm_head")
    half = jax.tree.map(lambda spec: dataclasses.replace(spec, dtype=jnp.bfloat16), specs, is_leaf=_is_spec)
    tree = jax.tree.map(lambda x: np.asarray(x.astype(stored)), table.init(specs, jax.random.key(0)))
    ours.write(tmp_path, tree, tiny, tokenizer="", origin={})
    whole = restore_params(tmp_path, specs, mesh)
    assert_equal(jax.device_get(whole), jax.tree.map(lambda x: x.astype(np.float32), tree))
    assert_cast(restore_params(tmp_path, half, mesh), whole)


def test_a_part_restores_alone_and_what_is_missing_is_named(tmp_path, mesh):
    states, _ = saved_steps(tmp_path, mesh)
    trunk = restore_params(tmp_path, {"trunk": SPECS["trunk"]}, mesh)
    assert_equal(trunk, {"trunk": states[2].params["trunk"]})
    with pytest.raises(CheckpointError, match=r"no parameter \['value_head'\]\['kernel'\]; it holds .*reward_head"):
        restore_params(tmp_path, {**SPECS, "value_head": SPECS["reward_head"]}, mesh)
    larger = {"trunk": {**SPECS["trunk"], "matrix": ParamSpec((8, 8), ("width", "ffn"), normal)}}
    with pytest.raises(CheckpointError, match="checkpoints/2"):
        restore_params(tmp_path, larger, mesh)
    with pytest.raises(CheckpointError, match="expected a stage's workdir with checkpoints, found none"):
        newest_step(tmp_path / "elsewhere")
    for path in data_files(tmp_path / "checkpoints" / "2" / "params"):
        damage(path, "truncated")
    with pytest.raises(CheckpointError, match="checkpoints/2"):
        restore_params(tmp_path, SPECS, mesh)


@pytest.mark.parametrize(("file", "content", "start", "input_", "output"), [
    ("hf/config.json", '{"model_type": "llama"}', "hf", "hf", "hf-llama_jax"),
    ("meta/params.json", "{}", "meta", "meta", "meta-llama_jax"),
    ("my files/x.Q4_0.gguf", "", "my files/x.Q4_0.gguf", "'my files/x.Q4_0.gguf'", "'my files/x.Q4_0-llama_jax'"),
    ("gguf/x.gguf", "", "gguf", "gguf", "gguf-llama_jax"),
    ("run/config.json", '{"stage": "sft", "model": "7b"}', "run", "", ""),  # of ours, before its first checkpoint
    ("job/config.json", '{"size": "tiny"}', "job", "", ""),
    ("damaged/config.json", "{", "damaged", "", ""),
    ("list/config.json", '["model_type"]', "list", "", ""),
    ("nothing/readme.txt", "", "nothing", "", ""),
])  # fmt: skip
def test_weights_of_another_format_are_met_with_the_command_that_converts_them(
    tmp_path, monkeypatch, file, content, start, input_, output
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path(file).parent.mkdir()
    Path(file).write_text(content)
    plain = f"{start}: expected a stage's workdir with checkpoints, found none"
    with pytest.raises(CheckpointError) as error:
        newest_step(start)
    command = f"python -m llama_jax.convert --input={input_} --output={output} --to=llama_jax"
    said = f"; these weights are of another format, and are converted first: {command}" if input_ else ""
    assert str(error.value) == plain + said
    if input_:  # it reads the disks of its machine alone
        monkeypatch.setattr(saved, "is_remote", lambda path: True)
        with pytest.raises(CheckpointError, match=r"copied to this machine and converted first: .* --input=(hf|meta|x|gguf)"):
            newest_step(start)


def test_checkpoints_written_while_training_goes_on_are_whole(tmp_path, mesh):
    # Saving is asynchronous and the step donates its state: each checkpoint must hold its own step all the same.
    train(stage(mesh), loop(steps=5, checkpoint_every=1, keep=5), mesh=mesh, workdir=tmp_path)
    target = abstract_state(SPECS, stage(mesh).optimizer, mesh)
    for step in range(5, 0, -1):
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5)
        state, _, meta = checkpoints.restore(target, {})
        checkpoints.manager.delete(step)
        checkpoints.close()
        assert (int(state.step), meta["step"]) == (step, step)


# ---- the loop ----


def test_the_log_tells_the_rate_since_its_last_line_and_the_summary_the_mean():
    pace = Pace()
    for now in (50.0, 100.0):  # both compile
        assert (pace.step(now), pace.lately(), pace.mean()) == (None, None, None)
    for now in (101.0, 102.0):
        pace.step(now)
    assert pace.lately() == pace.mean() == 1.0
    for now in (112.0, 122.0):
        pace.step(now)
    assert pace.lately() == 0.1 and pace.mean() == pytest.approx(4 / 22)
    assert pace.lately() is None  # nothing since
    pace.skip(1000.0)  # an evaluation
    pace.step(1124.0)
    assert pace.lately() == 0.5 and pace.mean() == pytest.approx(5 / 24)


def test_what_is_measured_and_saved_between_steps_takes_no_part_in_the_rate(tmp_path, mesh, monkeypatch):
    now = 0.0

    def takes(seconds, act):
        def later(*arguments, **named):
            nonlocal now
            now += seconds
            return act(*arguments, **named)

        return later

    for module in (loop_module, recorder):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Checkpoints, "save", takes(1000.0, Checkpoints.save))
    source = Rollouts()
    source.batch = takes(1.0, source.batch)  # a step of 16 tokens is one second
    run = stage(mesh, source=source, evaluate=takes(1000.0, lambda params: {"loss": 0.0}))
    summary = train(run, loop(eval_every=2), mesh=mesh, workdir=tmp_path)
    assert summary["tokens_per_second"] == pytest.approx(16.0)
    assert np.nanmin(read_metrics(tmp_path)["tokens_per_second"][2:]) >= 8.0  # a step is read late, so two may be one line's


def test_a_run_from_end_to_end(tmp_path, mesh):
    batches = lambda: iter([points(100), points(101)])  # noqa: E731
    evaluate = evaluation(loss, batches, lambda batch: put_batch(batch, mesh))
    summary = train(stage(mesh, evaluate=evaluate), loop(eval_every=4), mesh=mesh, workdir=tmp_path)
    assert summary["compilations_after_warm_up"] == 0 < summary["compilations"]
    assert summary["steps"] == 8 and summary["tokens_per_second"] > 0
    assert finished(tmp_path) == summary
    log = read_metrics(tmp_path)
    rows = ~np.isnan(log["loss"])
    np.testing.assert_array_equal(log["step"][rows], np.arange(8))
    np.testing.assert_array_equal(np.isnan(log["tokens_per_second"][rows]), [True] * 2 + [False] * 6)  # not 0, which it is not
    assert log["loss"][rows][-1] < log["loss"][rows][0]
    np.testing.assert_array_equal(log["step"][~np.isnan(log["held_out/loss"])], [3, 7])
    # The mean over all held-out rows at once is that over batches: sums and weights.
    params = restore_params(tmp_path, SPECS, mesh)
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), points(100), points(101))
    np.testing.assert_allclose(summary["held_out"]["loss"], loss(params, both)[0].mean(), rtol=1e-5)
    assert read_meta(tmp_path)["model"] == "toy" and newest_step(tmp_path).name == "8"


def test_a_run_that_is_over_before_its_pace_is_measured_claims_none(tmp_path, mesh):
    summary = train(stage(mesh), loop(steps=2), mesh=mesh, workdir=tmp_path)
    assert "tokens_per_second" not in summary and "tokens_per_second" not in finished(tmp_path)
    assert "tokens_per_second" not in read_metrics(tmp_path) and speed(summary, 10, 1.0) == {}


SOURCES = {"supervised": lambda **batches: Supervised(Batches(**batches)), "rl": Rollouts}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdirs of uninterrupted runs."""
    mesh, directory = mesh_of(), tmp_path_factory.mktemp("whole")
    for name, make in SOURCES.items():
        train(stage(mesh, source=make()), loop(), mesh=mesh, workdir=directory / name)
    return directory


@pytest.mark.parametrize(("name", "at"), [("supervised", 2), ("supervised", 7), ("rl", 5), ("rl", 7)])
def test_interrupted_and_run_again_equals_uninterrupted_to_the_bit(tmp_path, mesh, whole, name, at):
    make = SOURCES[name]

    class Kill(Exception):
        pass

    def kill():
        raise Kill

    with pytest.raises(Kill):
        train(stage(mesh, source=make(interrupt=kill, at=at)), loop(), mesh=mesh, workdir=tmp_path / "parts")
    assert finished(tmp_path / "parts") is None
    summary = train(stage(mesh, source=make()), loop(), mesh=mesh, workdir=tmp_path / "parts")
    assert summary["compilations_after_warm_up"] == 0
    assert_equal(final(tmp_path / "parts", mesh), final(whole / name, mesh))
    expected, found = read_metrics(whole / name), read_metrics(tmp_path / "parts")
    for column in ("step", "loss", "gradient_norm", "learning_rate", "tokens_seen"):
        np.testing.assert_array_equal(found[column], expected[column])


def test_a_run_goes_on_from_the_older_checkpoint_if_the_newest_is_damaged(tmp_path, mesh, caplog):
    train(stage(mesh), loop(), mesh=mesh, workdir=tmp_path)
    expected = final(tmp_path, mesh)
    for path in data_files(tmp_path / "checkpoints" / "8" / "params"):
        damage(path, "flipped")
    train(stage(mesh), loop(), mesh=mesh, workdir=tmp_path)
    assert "checkpoint 8" in caplog.text and "damaged" in caplog.text
    assert_equal(final(tmp_path, mesh), expected)


def test_sigterm_saves_ends_with_the_code_for_again_and_resumes(tmp_path, mesh, whole):
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as exit_:
        train(stage(mesh, source=Rollouts(interrupt=terminate, at=4)), loop(), mesh=mesh, workdir=tmp_path / "parts")
    assert exit_.value.code == 75 and signal.getsignal(signal.SIGTERM) == before
    assert newest_step(tmp_path / "parts").name == "5"  # the step was finished and saved
    train(stage(mesh, source=Rollouts()), loop(), mesh=mesh, workdir=tmp_path / "parts")
    assert_equal(final(tmp_path / "parts", mesh), final(whole / "rl", mesh))


def test_a_poisoned_batch_is_skipped_and_counted_and_n_in_a_row_stop_the_run(tmp_path, mesh):
    source = Supervised(Batches(poisoned=(2, 3, 6)))
    summary = train(stage(mesh, source=source), loop(max_skipped_in_a_row=3), mesh=mesh, workdir=tmp_path / "fine")
    assert summary["metrics"]["skipped"] == 3 and np.isfinite(summary["metrics"]["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restore_params(tmp_path / "fine", SPECS, mesh)))
    source = Supervised(Batches(poisoned=(4, 5, 6)))
    with pytest.raises(Diverged, match="toy: 3 updates in a row were not finite, the last at step 6"):
        train(stage(mesh, source=source), loop(max_skipped_in_a_row=3), mesh=mesh, workdir=tmp_path / "stopped")
    assert finished(tmp_path / "stopped") is None
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restore_params(tmp_path / "stopped", SPECS, mesh)))


def test_a_skipped_step_moves_neither_the_learning_rate_nor_the_count_of_tokens(tmp_path, mesh):
    train(stage(mesh, source=Supervised(Batches(poisoned=(1, 4)))), loop(), mesh=mesh, workdir=tmp_path)
    log, rate = read_metrics(tmp_path), schedule(OptimConfig(lr=0.05, warmup=2), 8)
    updates = [0, 1, 1, 2, 3, 3, 4, 5]  # made before each step: that of a skipped one is that of the next
    np.testing.assert_allclose(log["learning_rate"], [rate(count) for count in updates], rtol=1e-6)
    np.testing.assert_array_equal(log["tokens_seen"], 16.0 * np.array([1, 1, 2, 3, 3, 4, 5, 6]))
    np.testing.assert_array_equal(log["skipped"], [0, 1, 1, 1, 2, 2, 2, 2])


def test_the_log_tells_how_often_the_examples_have_been_seen(tmp_path, mesh):
    source = Supervised(IndexedBatches(range(40), lambda rows: points(rows[0]), 16, seed=0))
    train(stage(mesh, source=source), loop(), mesh=mesh, workdir=tmp_path / "examples")
    np.testing.assert_allclose(read_metrics(tmp_path / "examples")["epoch"], 0.4 * np.arange(1, 9))
    train(stage(mesh), loop(), mesh=mesh, workdir=tmp_path / "endless")
    assert "epoch" not in read_metrics(tmp_path / "endless")


def test_a_run_that_made_no_update_is_no_success_also_when_it_is_started_again(tmp_path, mesh):
    source = Supervised(Batches(poisoned=range(4)))
    for _ in range(2):  # the second start finds the checkpoint of the last step
        with pytest.raises(Diverged, match="toy: none of its 4 updates was finite, so the parameters are those that it began"):
            train(stage(mesh, source=source), loop(steps=4), mesh=mesh, workdir=tmp_path)
        assert newest_step(tmp_path).name == "4" and finished(tmp_path) is None


def test_no_skipped_steps_at_all_is_no_limit_that_a_run_could_keep():
    with pytest.raises(ValueError, match="loop.max_skipped_in_a_row: expected at least 1, got 0"):
        loop(max_skipped_in_a_row=0)


def test_host_0_claims_a_workdir_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    claim(tmp_path, {"lr": 1.0})  # another host: they would write one file at the same moment
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sizes", "batch_size", "microbatches"), [((8,), 12, 1), ((2, 2, 1, 2), 8, 4), ((1, 8), 16, 4)])
def test_a_batch_that_does_not_divide_is_refused_before_anything_happens(tmp_path, sizes, batch_size, microbatches):
    mesh = mesh_of(*sizes)
    config = loop(batch_size=batch_size, microbatches=microbatches)
    with pytest.raises(ConfigError, match=rf"loop.batch_size={batch_size} cannot be divided into \d shards .*{microbatches}"):
        train(stage(mesh), config, mesh=mesh, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({"steps": -1}, "loop.steps: expected at least 0, got -1"),
    ({"keep": 0}, "loop.keep: expected at least 1"),
    ({"microbatches": 3}, "loop.batch_size=16 is no multiple of microbatches=3"),
])  # fmt: skip
def test_a_loop_that_cannot_run_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        loop(**changes)


def test_steps_of_epochs_by_hand():
    free, most = loop(steps=0, batch_size=8), loop(steps=5, batch_size=8)
    assert [free.steps_of(rows, 2.0) for rows in (0, 1, 20, 21, 40)] == [1, 1, 5, 6, 10]
    assert [most.steps_of(rows, 2.0) for rows in (0, 1, 20, 21, 40)] == [1, 1, 5, 5, 5]
    assert [most.steps_of(rows, 0.0) for rows in (0, 40)] == [5, 5] and free.steps_of(10, 0.25) == 1
    assert free.over(40, 2.0) == dataclasses.replace(free, steps=10) and most.over(40, 2.0) == most
    assert free.reckoned(40, 2.0) == "epochs=2 of 40 rows, in steps of loop.batch_size=8"
    assert most.reckoned(10, 2.0) and [most.reckoned(40, 2.0), most.reckoned(10, 0.0)] == ["", ""]  # loop.steps says how many


# ---- the train command: claim, finished, refused ----


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    loop: LoopConfig
    stage: str = "toy"
    tokenizer: str = "tokenizer.model"
    lr: float = 0.05
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009 - frozen


def test_a_finished_stage_is_not_run_again_and_a_changed_config_is_refused(tmp_path, mesh, monkeypatch):
    made = []

    def make_stage(config, mesh_, workdir):
        if config.lr > 1:
            raise ConfigError("lr: too much")
        made.append(config)
        return stage(mesh)

    monkeypatch.setattr(train_command, "parse_stage", lambda values: values)
    monkeypatch.setitem(train_command.STAGES, "toy", (__name__, "ToyConfig"))
    monkeypatch.setattr(train_command, "mesh_for", lambda config, loop: mesh)
    monkeypatch.setattr(train_command, "keep_tokenizer", lambda config, workdir: None)
    monkeypatch.setitem(globals(), "make_stage", make_stage)
    workdir = tmp_path / "run"
    good = ToyConfig(loop=loop())
    with pytest.raises(ConfigError, match="too much"):
        train_command.run(dataclasses.replace(good, lr=2.0), workdir)
    # That run never began, so its workdir takes the corrected config.
    summary = train_command.run(good, workdir)
    assert train_command.run(good, workdir) == summary and len(made) == 1
    with pytest.raises(ConfigError) as error:
        train_command.run(dataclasses.replace(good, lr=0.1, loop=loop(steps=9)), workdir)
    assert "lr: 0.05 -> 0.1" in str(error.value) and "loop.steps: 8 -> 9" in str(error.value)
    assert len(made) == 1


def test_claim_writes_once_and_names_what_differs(tmp_path):
    claim(tmp_path, {"a": 1, "files": ("x",)})
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, {"a": 2, "files": ("x",)})  # it ended before its first checkpoint: there is nothing to go on from
    (tmp_path / "checkpoints" / "3").mkdir()
    claim(tmp_path, {"a": 2, "files": ("x",)})
    with pytest.raises(ConfigError, match=r"begun with another config(?s:.*)a: 2 -> 3"):
        claim(tmp_path, {"a": 3, "files": ("x",)})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 2, "files": ["x"]}
