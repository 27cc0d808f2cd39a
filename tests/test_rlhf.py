"""PPO and rejection sampling: GAE against a loop, clipping by hand, the first inner step, one rollout's bookkeeping."""

import dataclasses
import os
import signal
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from llama_jax.config import ConfigError
from llama_jax.data.loader import IndexedBatches
from llama_jax.data.sources import write_jsonl
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.reward.held_out import ScoreStatistics
from llama_jax.rlhf import ghost, rejection
from llama_jax.rlhf.advantage import generalised_advantages, token_rewards
from llama_jax.rlhf.pool import read_pool
from llama_jax.rlhf.ppo import PpoSettings, clipped_value_loss, ppo_loss
from llama_jax.rlhf.reinforce import Opening, clipped_policy_loss, collate_prompts, encode_prompts
from llama_jax.rlhf.rejection import choose_prompts, gather_pool, score_responses
from llama_jax.rlhf.respond import Responder, write_in_portions
from llama_jax.rlhf.rollout import UNSCALED, KlControl, RewardRule, Roller, RolloutSource, empty_rollout, make_judge
from llama_jax.safety import distillation
from llama_jax.sampling.generate import make_sampler, row_keys
from llama_jax.steps import change, load_config
from llama_jax.train import parse_stage
from llama_jax.training import optimizer
from llama_jax.training.attempt import start
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.options import RunOptions
from llama_jax.training.preemption import Preempted
from llama_jax.training.stage import LoopConfig
from llama_jax.training.state import abstract_state, create
from llama_jax.training.step import make_step

MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=24, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=32
)
RULE = RewardRule(beta=0.1, gamma=1.0, lam=0.95, safety_threshold=0.15, missing_eos_penalty=1.0, temperature=0.8)
SETTINGS = PpoSettings(rollout_size=8, new_tokens=6, beta=0.1, temperature=0.8)


def tree(head, seed):
    made = params.init(params.table(MODEL, head=head), jax.random.key(seed))
    return jax.tree.map(lambda x: 3 * x, made)


MODELS = {"policy": tree("lm_head", 0), "critic": tree("value_head", 1)}
FROZEN = {"reference": tree("lm_head", 2), "helpfulness": tree("reward_head", 3), "safety": tree("reward_head", 4)}


def source(mesh, *, rows=4, scale=UNSCALED, **more):
    roll = Roller(
        sample=make_sampler(
            MODEL, params.table(MODEL, head="lm_head"), compute=FLOAT32, eos_id=2, max_new_tokens=6, temperature=0.8
        ),
        judge=make_judge(MODEL, FLOAT32, RULE, scale),
        frozen=FROZEN,
        keys=lambda index: row_keys(0, index),
    )
    examples = [(i % 3 == 0, [1, 3 + i, 4 + i][: 2 + i % 2], i) for i in range(12)]
    batches = IndexedBatches(examples, lambda rows: collate_prompts(rows, length=4), 8, 0)
    return RolloutSource(
        batches, roll, mesh=mesh, empty=empty_rollout(8, 4, 6), size=8, rows=rows, control=KlControl(0.1), seed=0, **more
    )


def one_device():
    return make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])


def test_gae_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 7)).astype(np.float32)
    mask = np.arange(7)[None] < np.array([7, 3, 1])[:, None]
    rewards = rewards * mask
    found, returns = generalised_advantages(
        jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask), gamma=0.9, lam=0.8
    )
    for row, length in enumerate((7, 3, 1)):
        advantage, expected = 0.0, np.zeros(7)
        for t in reversed(range(length)):
            following = values[row, t + 1] if t + 1 < length else 0.0
            advantage = rewards[row, t] + 0.9 * following - values[row, t] + 0.9 * 0.8 * advantage
            expected[t] = advantage
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
        np.testing.assert_allclose(returns[row], (expected + values[row]) * mask[row], atol=1e-5)


def test_gamma_and_lambda_one_give_the_papers_sequence_objective():
    score, beta = jnp.array([2.0, -1.0]), 0.3
    kl = jnp.array([[0.5, -0.2, 0.1], [0.4, 0.0, 9.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    rewards = token_rewards(score, kl, mask, beta=beta)
    np.testing.assert_allclose(rewards[1], [-0.12, -1.0, 0.0], atol=1e-6)  # the score at the last real token, not after it
    advantages, _ = generalised_advantages(rewards, jnp.zeros((2, 3)), mask, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(advantages[:, 0], score - beta * jnp.sum(kl * mask, axis=1), rtol=1e-5)
    assert rewards.dtype == jnp.float32


def test_clipped_losses_by_hand():
    new, old = jnp.log(jnp.array([[1.5, 1.5, 0.5, 1.0]])), jnp.zeros((1, 4))
    advantages = jnp.array([[1.0, -1.0, -1.0, 2.0]])
    loss, ratio, clipped = clipped_policy_loss(new, old, advantages, clip=0.2)
    np.testing.assert_allclose(ratio, [[1.5, 1.5, 0.5, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(loss, [[-1.2, 1.5, 0.8, -2.0]], rtol=1e-6)
    assert clipped.tolist() == [[1, 0, 1, 0]]
    value = clipped_value_loss(jnp.array([[1.0, 0.1]]), jnp.zeros((1, 2)), jnp.array([[1.0, 1.0]]), clip=0.2)
    np.testing.assert_allclose(value, [[0.5 * 0.8**2, 0.5 * 0.9**2]], rtol=1e-6)


def test_first_inner_step_has_ratio_one_and_no_kl_and_no_clipping():
    mesh = one_device()
    with jax.set_mesh(mesh):
        batch, metrics = source(mesh).batch(0, MODELS)
        objective, found = jax.jit(ppo_loss(MODEL, FLOAT32, SETTINGS))(MODELS, batch)
    assert float(found["ratio_deviation"].mean()) < 1e-5
    assert abs(float(found["approx_kl"].mean())) < 1e-9
    assert float(found["clip_fraction"].mean()) == 0
    assert metrics["sampler_drift"] < 1e-4
    assert objective.weight == batch.mask.sum()


def test_the_critic_speaks_in_units_of_the_whitened_reward():
    """Rollout and loss take the same mean and deviation of the reward model's scores away."""
    mesh, scale = one_device(), ScoreStatistics(2.0, 4.0)
    with jax.set_mesh(mesh):
        plain, scaled = (source(mesh, scale=s).batch(0, MODELS)[0] for s in (ScoreStatistics(0.0, 1.0), scale))
        np.testing.assert_allclose(scaled.values, np.where(plain.mask, (plain.values - 2) / 4, 0), atol=1e-6)
        found = jax.jit(ppo_loss(MODEL, FLOAT32, SETTINGS, scale))(MODELS, scaled)[1]["value_loss"]
    square = np.square(scaled.values - scaled.returns) * scaled.mask  # nothing is clipped before the first update
    np.testing.assert_allclose(found.mean(), 0.5 * square.sum() / scaled.mask.sum(), rtol=1e-5)


def test_a_rollout_keeps_its_books():
    mesh = one_device()
    with jax.set_mesh(mesh):
        ppo = source(mesh)
        ppo.batch(0, MODELS)
        rollout = jax.device_get(ppo.rollout)
    response = rollout.tokens[:, 4:]
    for row in range(8):
        length = rollout.mask[row].sum()
        assert rollout.mask[row, :length].all() and (response[row, length:] == 0).all()
        assert 2 not in response[row, : length - 1]
    weights = rollout.mask
    np.testing.assert_allclose((rollout.advantages * weights).sum() / weights.sum(), 0, atol=1e-5)
    np.testing.assert_allclose((rollout.advantages**2 * weights).sum() / weights.sum(), 1, atol=1e-3)


def test_minibatches_are_a_partition_of_the_rollout_and_the_state_resumes_inside_it():
    mesh = one_device()
    with jax.set_mesh(mesh):
        ppo, again = source(mesh), source(mesh)
        first, _ = ppo.batch(0, MODELS)
        saved = jax.device_get(ppo.state())
        second, metrics = ppo.batch(1, {"policy": None, "critic": None})  # no rollout: the parameters are not looked at
        again.restore(saved)
        resumed, _ = again.batch(1, {"policy": None, "critic": None})
    assert metrics == {}
    jax.tree.map(np.testing.assert_array_equal, resumed, second)
    rows = np.concatenate([first.tokens, second.tokens])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, np.asarray(saved["rollout"].tokens)))


def test_a_prompt_that_comes_again_is_answered_anew():
    mesh = one_device()
    with jax.set_mesh(mesh):
        ppo = source(mesh)
        tokens = []
        for step in (0, 2, 4):
            ppo.batch(step, MODELS)
            tokens.append(np.asarray(ppo.rollout.tokens))
    by_prompt = {}
    for row in np.concatenate(tokens):
        by_prompt.setdefault(bytes(row[:4]), set()).add(bytes(row[4:]))
    assert max(map(len, by_prompt.values())) > 1


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 4, 1, 2), (8, 1, 1, 1)])
def test_ppo_on_eight_devices_gives_the_losses_of_one(sizes):
    specs = {"policy": params.table(MODEL, head="lm_head"), "critic": params.table(MODEL, head="value_head")}
    optimiser = optimizer.make(OptimConfig(lr=1e-2, schedule="constant"), steps=4, decay=params.decay_mask(specs))
    rows = 8

    def losses(mesh):
        with jax.set_mesh(mesh):
            target = abstract_state(specs, optimiser, mesh)
            layout = jax.tree.map(lambda leaf: leaf.sharding, target)
            # A copy: the step donates its state, and device_put may share memory with what it was given.
            state = jax.device_put(create(jax.tree.map(jnp.copy, MODELS), optimiser), layout)
            step = make_step(ppo_loss(MODEL, FLOAT32, SETTINGS), optimiser, microbatches=1, layout=layout)
            ppo = source(mesh, rows=rows)
            found = []
            for number in range(3):
                batch, metrics = ppo.batch(number, state.params)
                state, means = step(state, batch)
                found.append([float(means[name]) for name in ("loss", "policy_loss", "value_loss", "policy_entropy")])
                found[-1] += [metrics[name] for name in ("reward", "kl", "response_length")]
            assert jax.tree.leaves(state.params["policy"])[0].sharding.mesh.size == mesh.size
            return found

    eight = losses(make_mesh(MeshConfig(*sizes)))
    np.testing.assert_allclose(eight, losses(one_device()), rtol=1e-5, atol=1e-5)


def test_a_rollout_must_divide_into_minibatches():
    with pytest.raises(ValueError, match="rollout_size=8 is no multiple"):
        RolloutSource(None, None, mesh=one_device(), empty=None, size=8, rows=3, control=KlControl(0.1), seed=0)


@pytest.mark.parametrize(("sizes", "counts", "message"), [
    ((1, 8), (12, 4), "rollout_size=12 cannot be divided into 8 shards"),
    ((2, 4), (16, 4), "loop.batch_size=4 cannot be divided into 8 shards"),
])  # fmt: skip
def test_a_rollout_that_the_mesh_cannot_divide_is_refused_before_a_model_is_loaded(sizes, counts, message):
    config = types.SimpleNamespace(start="chat", stage="ppo", loop=LoopConfig(steps=1, batch_size=counts[1]))
    settings = dataclasses.replace(SETTINGS, rollout_size=counts[0])
    with pytest.raises(ConfigError, match=message):
        Opening.of(config, settings, make_mesh(MeshConfig(*sizes)), None)


def test_prompts_that_are_too_long_are_counted_in_the_log(tmp_path, caplog):
    class Letters:
        def encode(self, text, *, bos):
            return [1] * bos + [3 + ord(letter) % 90 for letter in text]

    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a" * (1 if i % 4 else 40)} for i in range(8)])
    kept = encode_prompts(str(tmp_path / "prompts.jsonl"), Letters(), length=30)
    assert len(kept) == 6 and "prompts.jsonl: 2 of 8 prompts are longer than 30 tokens and left out" in caplog.text
    caplog.clear()
    assert len(encode_prompts(str(tmp_path / "prompts.jsonl"), Letters(), length=60)) == 8 and not caplog.records


def drawn_in_portions(path, *, dies_at=None):
    """Writes eight rows in portions of three; which of them were drawn, as (first item, items)."""
    drawn = []

    def draw(items, first, progress):
        if first == dies_at:
            raise KeyboardInterrupt
        drawn.append((first, len(items)))
        return [{"item": item, "number": first + i} for i, item in enumerate(items)]

    write_in_portions(path, "abcdefgh", draw, answers=lambda _: 2, label="test", size=3)
    return drawn


def test_a_killed_sampling_draws_no_portion_again(tmp_path):
    assert drawn_in_portions(tmp_path / "whole" / "samples.jsonl") == [(0, 3), (3, 3), (6, 2)]
    for dies_at, left in ((0, [(0, 3), (3, 3), (6, 2)]), (3, [(3, 3), (6, 2)]), (6, [(6, 2)])):
        path = tmp_path / str(dies_at) / "samples.jsonl"
        with pytest.raises(KeyboardInterrupt):
            drawn_in_portions(path, dies_at=dies_at)
        assert not path.exists() and drawn_in_portions(path) == left
        assert path.read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
        assert [file.name for file in path.parent.iterdir()] == ["samples.jsonl"]


class Answers:
    """In the place of an engine: finishes one answer, with SIGTERM on the way."""

    def submit(self, prompt, **how):
        return types.SimpleNamespace(tokens=[3])

    def run(self, requests, *, progress):
        os.kill(os.getpid(), signal.SIGTERM)
        progress(1)
        raise AssertionError("it goes on")


def test_sigterm_stops_a_sampling_at_the_next_answer(tmp_path):
    with mock.patch.object(Responder, "__init__", lambda self: None):
        respond = Responder()
    respond.mesh, respond.tokenizer = make_mesh(devices=jax.devices()[:1]), types.SimpleNamespace(eos_id=2)
    respond.room, respond._new_tokens, respond._choice = 4, 1, None
    respond._answerer, places = types.SimpleNamespace(engine=Answers()), []
    with pytest.raises(Preempted) as ended, start(RunOptions()) as attempt:

        def draw(items, first, progress):
            places.append(attempt.watchdog.place)
            return respond.ids([[1]], seed=0, progress=progress) if first else [{"item": item} for item in items]

        write_in_portions(tmp_path / "samples.jsonl", "abcdef", draw, answers=lambda _: 1, label="test", size=3)
    assert ended.value.code == 75 and places == ["sampling of portion 0", "sampling of portion 1"]
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["0-3.jsonl"]


def test_a_killed_round_repeats_no_step_whose_file_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "policy_hash", lambda workdir: "0123456789abcdef")
    monkeypatch.setattr(rejection, "encode_prompts", lambda path, tokenizer, *, length: [({"is_safety": False}, [1])] * 3)
    made, dies_in = [], ["search", "samples", "best"]

    def step(name, result):
        if name == dies_in[0]:
            raise KeyboardInterrupt
        made.append(name)
        return result

    def samples(prompts, *, temperature, seed, first, progress):
        assert temperature == 0.9
        return step("samples", [
            {"prompt": first + i, "messages": [{"role": "user", "content": "?"}], "is_safety": False, "response": "yes",
             "ended": True, "reward": 0.5, "helpfulness": 0.5, "safety": 0.9} for i in range(len(prompts))
        ])  # fmt: skip

    settings = rejection.RejectionSettings("prompts.jsonl", 8, 4, 2, 8, 1.0, (0.9, 1.0), 2, 4, "v1")
    config = types.SimpleNamespace(policy="policy", rejection=settings, loop=LoopConfig(steps=1, batch_size=1))
    models = types.SimpleNamespace(
        config=config, tokenizer=None, samples=samples, search=lambda _: step("search", {"temperature": 0.9})
    )
    best_samples = rejection.best_samples
    monkeypatch.setattr(rejection, "best_samples", lambda *a, **k: step("best", best_samples(*a, **k)))
    while dies_in[0]:
        with pytest.raises(KeyboardInterrupt):
            gather_pool(models, tmp_path)
        dies_in = dies_in[1:] or [""]
    gather_pool(models, tmp_path)
    assert made == ["search", "samples", "best"]
    assert [(row["version"], row["temperature"]) for row in read_pool(str(tmp_path / "pool.jsonl"))] == [("v1", 0.9)] * 3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer and data for stages of `small_runs.MODEL`."""
    path = tmp_path_factory.mktemp("small")
    small_runs.make_tokenizer(path)
    write_jsonl(path / "dialogs.jsonl", [{"prompt": a, "completion": "yes"} for a in "abcdefgh"])
    write_jsonl(path / "prompts.jsonl", [{"prompt": a, "is_safety": True} for a in "abcdefgh"])
    write_jsonl(path / "damaged.jsonl", [{"prompt": "a"}])
    return path


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": {"train": ("typo.jsonl",)}}, "typo.jsonl: expected a JSONL file, found nothing"),
    ({"data": {"held_out": ("damaged.jsonl",)}}, "damaged.jsonl:1: messages: missing"),
    ({"data": {"length": 128}}, "data.length=128, model tiny takes 64"),
    ({"data": {"length": 4}}, "no dialog fits into 4 tokens"),
    ({"optim": {"warmup": 2}}, "optim.warmup=2 leaves nothing of loop.steps=2"),
    ({"epochs": 1.0, "optim": {"warmup": 3}}, "optim.warmup=3 leaves nothing of loop.steps=2"),  # 8 prompts and one packed row
    ({"loop": {"batch_size": 12}}, "loop.batch_size=12 cannot be divided into 8 shards"),
    ({"loop": {"keep_best": "loss"}}, "loop.keep_best=loss: expected dialogs in data.held_out"),
    ({"lora": {"rank": 4}}, "adapters .* need a model to adapt"),
])  # fmt: skip
@pytest.mark.parametrize(("module", "own"), [
    (rejection, {"policy": "chat", "helpfulness": "h", "safety": "s", "rejection": {"prompts": "prompts.jsonl"}}),
    (ghost, {"policy": "chat", "context": 0, "ghost": {"contexts": ("dialogs.jsonl",), "samples": 8}}),
    (distillation, {"policy": "chat", "safety": "s", "context": 0, "distill": {"prompts": "prompts.jsonl"}}),
], ids=["rejection", "ghost", "distill"])  # fmt: skip
def test_what_fine_tuning_would_refuse_is_refused_before_anything_is_drawn(
    small, tmp_path, monkeypatch, module, own, changes, message
):  # fmt: skip
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    monkeypatch.chdir(small)
    for name in ("gather", "draw_samples"):
        monkeypatch.setattr(module, name, None, raising=False)
    stage = {rejection: "rejection", ghost: "ghost", distillation: "distill"}[module]
    values = load_config(small_runs.ROOT / "configs", f"{stage}.py:tiny")
    change(values, {"data": {"train": ("dialogs.jsonl",), "length": 64}, "epochs": 0.0, "optim": {"warmup": 1}}, where=stage)
    change(values, {"loop": {"steps": 2, "batch_size": 8}, **own}, where=stage)
    change(values, changes, where=stage)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module.make_stage(parse_stage(values), make_mesh(MeshConfig(fsdp=8)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_of_every_stage_fit_the_model_by_default():
    for stage in ("sft", "reward", "dpo", "rejection", "ghost", "distill", "ppo", "grpo"):
        for name in ("7b", "70b", "llama1-7b", "llama1-65b", "smollm2-135m", "tiny"):
            config = load_config(small_runs.ROOT / "configs", f"{stage}.py:{name}")
            most = config.context or SIZES[name].max_length
            own = config.get(stage, {})
            prompt = own.get("prompt_length", config.data.get("prompt_length", 0))
            assert config.data.get("length", 0) <= most and prompt + own.get("new_tokens", 0) <= most, (stage, name)


def test_scores_do_not_depend_on_which_rows_are_scored_together(tiny):
    reward = params.table(tiny, head="reward_head")
    models = {name: params.init(reward, jax.random.key(i)) for i, name in enumerate(("helpfulness", "safety"))}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 96, n).tolist() for n in (3, 20, 9, 1, 14)]
    responses = [rng.integers(3, 96, n).tolist() for n in (2, 4, 8, 1, 9)]
    is_safety = [False, True, False, True, False]

    def scored(rows, batch_size):
        return score_responses(
            tiny, FLOAT32, models, [prompts[i] for i in rows], [responses[i] for i in rows], [is_safety[i] for i in rows],
            length=24, batch_size=batch_size, threshold=0.15,
        )  # fmt: skip

    together = scored(range(5), 2)
    for i in range(5):
        for name, values in scored([i], 1).items():
            np.testing.assert_allclose(together[name][i], values[0], rtol=1e-5, err_msg=f"{name} of row {i}")


def test_a_limit_on_prompts_does_not_take_the_first_of_a_sorted_file():
    chosen = choose_prompts(list(range(1000)), 100, seed=0)
    assert len(set(chosen)) == 100 and 400 < np.mean(chosen) < 600
    assert chosen == choose_prompts(list(range(1000)), 100, seed=0)
    assert sorted(choose_prompts([1, 2, 3], 10, seed=0)) == [1, 2, 3]
