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
from jax.scipy.special import logit

from llama_jax.config import ConfigError
from llama_jax.data.loader import IndexedBatches
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import write_json
from llama_jax.model import branches, params
from llama_jax.model.config import FLOAT32, SIZES, Compute
from llama_jax.model.rope import RopeScaling
from llama_jax.parallel.axes import batch_sharding, shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.reward.held_out import ScoreStatistics
from llama_jax.reward.score import scorer
from llama_jax.reward.scorers import REWARD_MODELS, OtherScores, RewardMix
from llama_jax.rlhf import chips, drawn, ghost, reinforce, rejection, scoring
from llama_jax.rlhf.advantage import generalised_advantages, token_rewards
from llama_jax.rlhf.clock import StepClock
from llama_jax.rlhf.judge import UNSCALED, PromptBatch, RewardRule, answer_scores, empty_rollout, make_judge, response_states
from llama_jax.rlhf.parts import by_parts, part_size
from llama_jax.rlhf.pool import best_samples, of_prompt, read_pool
from llama_jax.rlhf.ppo import PpoSettings, clipped_value_loss, critic_scale, ppo_loss, warm_up_iterations
from llama_jax.rlhf.reinforce import (
    OffPolicy,
    Opening,
    StepCheck,
    check_rewards,
    clipped_policy_loss,
    collate_prompts,
    encode_prompts,
    ratio_metrics,
    rounding,
)
from llama_jax.rlhf.rejection import RejectionSettings, Round, check_models, choose_prompts, gather_pool, of_answer
from llama_jax.rlhf.respond import Responder, write_in_portions
from llama_jax.rlhf.rollout import KlControl, Roller, RolloutSource
from llama_jax.rlhf.scoring import logit_scores, row_length, rows_at_once, score_responses, sigmoid_scores
from llama_jax.safety import distillation
from llama_jax.sampling.answers import answering, make_slot_sampler
from llama_jax.sampling.generate import Samples, make_sampler, pad_left
from llama_jax.sampling.keys import row_keys
from llama_jax.sampling.slots import programs
from llama_jax.steps import change, load_config
from llama_jax.train import EXPECTED, parse_stage
from llama_jax.training import optimizer
from llama_jax.training.attempt import start
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.options import RunOptions
from llama_jax.training.preemption import Preempted
from llama_jax.training.stage import LoopConfig
from llama_jax.training.state import abstract_state, create
from llama_jax.training.step import make_step, put_batch

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


def source(mesh, *, rows=4, scale=UNSCALED, rule=RULE, slots=0, judge_batch=0, **more):
    specs = params.table(MODEL, head="lm_head")
    how = {"compute": FLOAT32, "eos_id": 2, "max_new_tokens": 6, "temperature": 0.8}
    roll = Roller(
        sample=make_slot_sampler(MODEL, slots=slots, **how) if slots else make_sampler(MODEL, specs, **how),
        judge=make_judge(MODEL, FLOAT32, rule, scale, most=judge_batch),
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


def test_gae_equals_a_plain_loop_in_float64():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 7)).astype(np.float32)
    mask = np.arange(7)[None] < np.array([7, 3, 1])[:, None]
    rewards = rewards * mask
    found, returns = generalised_advantages(
        jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask), gamma=0.9, lam=0.8
    )
    rewards, values = rewards.astype(np.float64), values.astype(np.float64)
    for row, length in enumerate((7, 3, 1)):
        advantage, expected = 0.0, np.zeros(7)
        for t in reversed(range(length)):
            following = values[row, t + 1] if t + 1 < length else 0.0
            advantage = rewards[row, t] + 0.9 * following - values[row, t] + 0.9 * 0.8 * advantage
            expected[t] = advantage
        np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(returns[row], (expected + values[row]) * mask[row], rtol=1e-6, atol=1e-6)


def test_gamma_and_lambda_one_give_the_papers_sequence_objective():
    score, beta = jnp.array([2.0, -1.0]), 0.3
    kl = jnp.array([[0.5, -0.2, 0.1], [0.4, 0.0, 9.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    rewards = token_rewards(score, kl, mask, beta=beta)
    np.testing.assert_allclose(rewards[1], [-0.12, -1.0, 0.0], atol=1e-6)  # the score at the last real token, not after it
    advantages, _ = generalised_advantages(rewards, jnp.zeros((2, 3)), mask, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(advantages[:, 0], score - beta * jnp.sum(kl * mask, axis=1), rtol=1e-5)
    assert rewards.dtype == jnp.float32


def test_scores_and_rewards_of_other_shapes_are_refused():
    mask = jnp.ones((2, 3), bool)
    for score, kl in (((2, 1), (2, 3)), ((3,), (2, 3)), ((2,), (2, 1))):
        with pytest.raises(ValueError, match=r"token_rewards: expected score \[B\], kl and mask \[B, N\]; got score"):
            token_rewards(jnp.zeros(score), jnp.zeros(kl), mask, beta=0.1)
    for rewards, values in (((3,), (3,)), ((2, 3), (2, 1))):
        with pytest.raises(ValueError, match=r"generalised_advantages: expected rewards, values and mask of one shape"):
            generalised_advantages(jnp.zeros(rewards), jnp.zeros(values), mask, gamma=1.0, lam=1.0)


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


def test_the_loss_is_that_of_the_formula_in_float64():
    """Policy, value, both clippings, importance, masks and the critic's warm-up, token by token in plain NumPy."""
    settings, scale = dataclasses.replace(SETTINGS, clip=0.1, value_clip=0.3, value_weight=0.5), ScoreStatistics(0.3, 1.7)
    rng, B, N = np.random.default_rng(0), 5, 6
    lengths, warm_up = np.array([6, 3, 1, 5, 4]), np.array([False, False, False, False, True])
    mask = np.arange(N) < lengths[:, None]
    tokens = rng.integers(3, 24, (B, 4 + N)).astype(np.int32)
    segment_ids = np.concatenate([np.ones((B, 4)), mask], axis=1).astype(np.int32)

    def states(name):
        found = response_states(MODELS[name], tokens, segment_ids, N, config=MODEL, compute=FLOAT32)
        return np.asarray(found, np.float64)

    logits = states("policy") @ np.asarray(MODELS["policy"]["lm_head"]["kernel"], np.float64) / settings.temperature
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    now = np.take_along_axis(log_p, tokens[:, 4:, None], axis=2)[..., 0]
    values = (states("critic") @ np.asarray(MODELS["critic"]["value_head"]["kernel"], np.float64) - 0.3) / 1.7

    def near(x, width):
        return (x + rng.normal(size=(B, N)) * width).astype(np.float32)

    batch = empty_rollout(B, 4, N).replace(
        tokens=tokens, segment_ids=segment_ids, mask=mask, warm_up=warm_up, log_probs=near(now, 0.2), values=near(values, 0.5),
        returns=near(values, 1.0), advantages=near(0.0, 1.0), importance=rng.uniform(0.5, 2, (B, N)).astype(np.float32),
    )  # fmt: skip
    found, metrics = jax.jit(ppo_loss(MODEL, FLOAT32, settings, scale))(MODELS, batch)
    sums = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "approx_kl"), 0.0)
    for i, length in enumerate(lengths):
        for t in range(length):
            old, advantage, target = (float(x[i, t]) for x in (batch.log_probs, batch.advantages, batch.returns))
            ratio = np.exp(now[i, t] - old)
            kept = min(max(ratio, 0.9), 1.1)
            if not warm_up[i]:
                sums["policy_loss"] -= float(batch.importance[i, t]) * min(ratio * advantage, kept * advantage)
            sums["clip_fraction"] += kept * advantage < ratio * advantage
            sums["approx_kl"] += ratio - 1 - np.log(ratio)
            before, value = float(batch.values[i, t]), values[i, t]
            near_old = min(max(value, before - 0.3), before + 0.3)
            errors = (value - target) ** 2, (near_old - target) ** 2
            sums["value_loss"] += 0.5 * (errors[0] if warm_up[i] else max(errors))
    count = lengths.sum()
    assert float(found.weight) == count and 0 < sums["clip_fraction"] < count
    for name, value in sums.items():
        assert float(metrics[name].mean()) == pytest.approx(value / count, abs=1e-6), name
    loss = (sums["policy_loss"] + settings.value_weight * sums["value_loss"]) / count
    assert float(found.sum / found.weight) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2, 1, 1)], ids=["one", "four"])
def test_a_rollout_drawn_in_slots_and_judged_in_parts_is_the_one_of_one_part(sizes):
    """Statistics are over all of it; and the critic alone learns from the first eight responses."""
    mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        whole, parts = (
            source(mesh, rule=dataclasses.replace(RULE, warm_up=8), **how)
            for how in ({}, {"slots": 4, "judge_batch": 4})
        )
        for step, warm_up in ((0, True), (2, False)):
            _, expected = whole.batch(step, MODELS)
            _, found = parts.batch(step, MODELS)
            assert np.all(np.asarray(parts.rollout.warm_up) == warm_up)
            for name, value in jax.device_get(whole.rollout).__dict__.items():
                rounding = 2e-6 * max(1.0, float(np.max(np.abs(value))))  # float32, summed in another order
                np.testing.assert_allclose(getattr(parts.rollout, name), value, rtol=0, atol=rounding, err_msg=name)
            for name, value in expected.items():
                assert "seconds" in name or found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 1, 2)], ids=["one", "four"])
def test_slots_draw_what_one_program_draws_and_compile_nothing_for_a_new_policy(sizes):
    """Rows of several lengths, of one token and of one asked three times; fewer slots than rows, and more."""
    mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: int(np.prod(sizes))])
    how = {"compute": FLOAT32, "eos_id": 2, "max_new_tokens": 20, "temperature": 0.8}
    tokens, valid = pad_left([[5], [1, 7, 8, 9], [1, 9], *[[1, 4, 6]] * 3, [1, 2, 3], [3, 1]], 4)
    with jax.set_mesh(mesh):
        arguments = [put_batch(tokens, mesh), put_batch(valid, mesh), row_keys(3, range(8))]
        expected = make_sampler(MODEL, params.table(MODEL, head="lm_head"), **how)(MODELS["policy"], *arguments)
        assert 0 < np.mean(expected.ended) < 1 or len(set(np.asarray(expected.mask).sum(1).tolist())) > 1
        for slots in (2, 3, 16):
            sample = make_slot_sampler(MODEL, slots=slots, **how)
            found = sample(MODELS["policy"], *arguments)
            for field in dataclasses.fields(Samples):
                ours, theirs = (np.asarray(getattr(x, field.name)) for x in (found, expected))
                np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=field.name)
                assert getattr(found, field.name).sharding.is_equivalent_to(batch_sharding(mesh, ours.ndim), ours.ndim)
            engine = answering(4, 20, slots=min(slots, 8), mesh=mesh)
            compiled = programs(MODEL, FLOAT32, engine, mesh).compilations
            sample(tree("lm_head", 5), *arguments)
            assert programs(MODEL, FLOAT32, engine, mesh).compilations == compiled > 0


def test_parts_have_as_many_rows_of_every_device():
    assert [part_size(512, most, 8) for most in (0, 512, 128, 100, 4)] == [512, 512, 128, 64, 8]  # 12 a device divide no 64
    assert part_size(24, 16, 4) == 12  # 4 a device do not divide 6

    def double(factor, rows):
        return {"doubled": factor * rows["x"], "n": jnp.sum(rows["x"], axis=1)}

    x = np.arange(16.0).reshape(8, 2)
    mesh = make_mesh(MeshConfig(fsdp=2), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = by_parts(jax.jit(double), 4, fixed=1)(2.0, {"x": x})
    np.testing.assert_array_equal(found["doubled"], 2 * x)
    np.testing.assert_array_equal(found["n"], x.sum(axis=1))


def test_the_clock_counts_steps_and_neither_evaluations_nor_rollouts():
    clock = StepClock()
    clock.begins(0, 10.0)
    clock.begins(1, 10.1)  # handed out while the device is at step 0
    clock.ends(0, 12.0)
    clock.ends(1, 14.0)  # an evaluation until 20 follows
    clock.begins(2, 20.0)
    assert clock.take(23.0) == 2 + 2 + 3
    clock.ends(2, 40.0)  # its metrics are read after the next rollout
    clock.begins(3, 41.0)
    clock.begins(4, 41.0)
    clock.ends(4, 43.0)  # step 3 was skipped, and nobody told
    assert clock.take(50.0) == 2 and clock.take(60.0) == 0


def test_each_rollout_reports_the_seconds_of_the_steps_before_it():
    mesh, N = one_device(), 6
    samples = Samples(*(jnp.zeros((8, N)) for _ in range(3)), jnp.zeros(8))
    roll = Roller(
        sample=lambda *_: samples, judge=lambda *_: (empty_rollout(8, 4, N), {"kl": jnp.zeros(())}), frozen={},
        keys=lambda index: index,
    )  # fmt: skip
    examples = [(False, [1, 3], i) for i in range(8)]
    batches = IndexedBatches(examples, lambda rows: collate_prompts(rows, length=4), 8, 0)
    with jax.set_mesh(mesh):
        made = RolloutSource(
            batches, roll, mesh=mesh, empty=empty_rollout(8, 4, N), size=8, rows=8, control=KlControl(0.1), seed=0
        )
        first, second = (made.batch(step, {"policy": jnp.zeros(2)})[1] for step in (0, 1))
    assert "seconds/train" not in first and 0 < second["seconds/train"] < 60
    assert {"seconds/rollout", "seconds/score"} <= set(first)


def first_step(compute, **metrics):
    values = {"ratio_off": 0.0, "approx_kl": 0.0, "ratio_deviation": 0.0, "sampler_drift_mean": 0.0, **metrics}
    check = StepCheck(StepClock(), 2, rounding(compute), "ppo")
    for step in (1, 0, 2):
        check(step, values if step != 1 else {})


def test_the_first_step_is_judged_exactly_in_float32_and_by_mean_and_quantile_in_bfloat16(caplog):
    bfloat16 = Compute("bfloat16", "bfloat16")
    first_step(FLOAT32, ratio_deviation=5e-5, approx_kl=5e-9)
    for compute, metrics in (
        (FLOAT32, {"ratio_off": 0.001, "ratio_deviation": 2e-4}), (FLOAT32, {"approx_kl": 2e-8}),
        (bfloat16, {"ratio_off": 0.06}), (bfloat16, {"approx_kl": 0.02, "ratio_off": 0.01}),
    ):  # fmt: skip
        with pytest.raises(OffPolicy, match="ppo: step 0 begins an iteration, but rollout and update do not give its tokens"):
            first_step(compute, **metrics)
    assert issubclass(OffPolicy, EXPECTED) and not caplog.records  # the command prints it as one line
    first_step(bfloat16, ratio_deviation=0.28, approx_kl=0.002, ratio_off=0.01)  # as a real model of 30 layers has it
    assert not caplog.records
    first_step(bfloat16, ratio_deviation=0.9, approx_kl=0.002, ratio_off=0.01)
    (record,) = caplog.records
    assert record.getMessage().startswith("ppo: at step 0, which begins an iteration, the ratio of one token is off 1 by 0.90")


@pytest.mark.parametrize("compute", [FLOAT32, Compute("bfloat16", "bfloat16")], ids=["float32", "bfloat16"])
def test_a_sampler_at_another_temperature_is_told_once(compute, caplog):
    mesh = one_device()
    check = StepCheck(StepClock(), 2, rounding(compute), "ppo")
    agreeing = {"ratio_off": 0.0, "approx_kl": 0.0, "ratio_deviation": 0.0}  # trainer and trainer
    with jax.set_mesh(mesh):
        rollouts = source(mesh)
        specs, judge = params.table(MODEL, head="lm_head"), make_judge(MODEL, compute, RULE)
        for step, temperature, told in ((0, 0.8, 0), (2, 1.0, 1), (4, 1.0, 1)):
            sample = make_sampler(MODEL, specs, compute=compute, eos_id=2, max_new_tokens=6, temperature=temperature)
            rollouts.roll = dataclasses.replace(rollouts.roll, sample=sample, judge=judge)
            metrics = rollouts.batch(step, MODELS)[1]
            check(step, {**agreeing, **metrics})
            assert len(caplog.records) == told, metrics["sampler_drift_mean"]
    message = caplog.records[0].getMessage()
    assert message.startswith("ppo: at step 2, which begins an iteration, the log-probabilities of sampler and trainer lie 0.")
    assert "another temperature" in message and f"rounding explains a mean of {rounding(compute).drift:g}." in message


def test_rounding_of_a_few_tokens_is_no_divergence():
    """ratio - 1 - log_ratio in float32 is off by 1e-7 wherever the two are nearly the same."""
    rng = np.random.default_rng(0)
    old = -rng.exponential(2, (500, 4)).astype(np.float32)
    new = (old + rng.normal(0, 2e-6, old.shape)).astype(np.float32)
    found = ratio_metrics(jnp.asarray(new), jnp.asarray(old), compute=FLOAT32)
    assert float(jnp.abs(found["approx_kl"].mean(axis=1)).max()) < 1e-8 and not found["ratio_off"].any()
    moved = ratio_metrics(jnp.log(jnp.array([1.5, 1.0])), jnp.zeros(2), compute=FLOAT32)
    np.testing.assert_allclose(moved["approx_kl"], [0.5 - np.log(1.5), 0], atol=1e-7)
    assert moved["ratio_off"].tolist() == [1, 0]


def test_one_reward_model_alone_is_the_reward_by_hand():
    is_safety, rule = jnp.array([False, True, False]), dataclasses.replace(RULE, model_weight=0.5)
    prompts = PromptBatch(None, None, is_safety, None, None)
    helpful, safe = logit(jnp.array([0.8, 0.7, 0.6])), logit(jnp.array([0.9, 0.3, 0.1]))
    both, parts = answer_scores({"helpfulness": helpful, "safety": safe}, prompts, None, rule)
    np.testing.assert_allclose(both, 0.5 * np.log([0.8 / 0.2, 0.3 / 0.7, 0.1 / 0.9]), rtol=1e-5)
    np.testing.assert_allclose(parts["reward"], [0.8, 0.3, 0.1], rtol=1e-5)
    for name, values, odds in (("helpfulness", helpful, [4, 7 / 3, 1.5]), ("safety", safe, [9, 3 / 7, 1 / 9])):
        total, parts = answer_scores({name: values}, prompts, None, rule)
        np.testing.assert_allclose(total, 0.5 * np.log(odds), rtol=1e-5)
        np.testing.assert_allclose(parts["reward"], np.array(odds) / (1 + np.array(odds)), rtol=1e-5)
    other = OtherScores(jnp.array([1.0, 2.0, 3.0]), {"rules:one": jnp.array([10.0, 20.0, 30.0])})
    total, parts = answer_scores({"safety": safe}, prompts, other, rule)
    np.testing.assert_allclose(total, 0.5 * np.log([9, 3 / 7, 1 / 9]) + [1, 2, 3], rtol=1e-5)
    assert set(parts) == {"safety", "other", "rules:one", "reward"} and parts["rules:one"].tolist() == [10, 20, 30]


def test_a_missing_reward_model_is_refused_only_if_none_is_there(monkeypatch):
    checked = []
    monkeypatch.setattr(reinforce, "check_reward_model", lambda name, path, *_: checked.append((name, path)))

    def used(scorers=(REWARD_MODELS,), **models):
        config = types.SimpleNamespace(reward=RewardMix(scorers), **{"helpfulness": "", "safety": "", **models})
        return check_rewards(config, None, None)

    assert used(safety="s") and used(helpfulness="h") and checked == [("safety", "s"), ("helpfulness", "h")]
    assert not used(scorers=("math:floor",))
    with pytest.raises(ConfigError, match="expected the workdir of one at least, got nothing"):
        used()


def test_a_critic_with_a_random_head_learns_alone_for_a_twentieth_of_the_iterations():
    def iterations(start, **ppo):
        settings = PpoSettings(rollout_size=64, new_tokens=4, beta=0.1, **ppo)
        config = types.SimpleNamespace(ppo=settings, loop=LoopConfig(steps=2 * 80, batch_size=32))
        return warm_up_iterations(config, start)

    assert [iterations(""), iterations("rewards"), iterations("rewards", critic_warmup=3)] == [4, 0, 3]
    assert iterations("", critic_warmup=0) == 0 and iterations("", epochs=2) == 2


@pytest.mark.parametrize(("changes", "message"), [
    ({"rollout_size": 1}, "ppo.rollout_size: expected at least 2, got 1: scores are whitened over the rollout"),
    ({"clip": -0.2}, "ppo.clip: expected a number between 0 and 1, got -0.2"),
    ({"lam": 9.5}, "ppo.lam: expected a number from 0 to 1, got 9.5"),
    ({"gamma": -1.0}, "ppo.gamma: expected a number from 0 to 1, got -1.0"),
    ({"value_clip": -1.0}, "ppo.value_clip: expected a positive number, got -1.0"),
    ({"value_weight": -1.0}, "ppo.value_weight: expected at least 0, got -1.0"),
    ({"safety_threshold": 15.0}, "ppo.safety_threshold: expected a number from 0 to 1, got 15.0"),
    ({"missing_eos_penalty": -5.0}, "ppo.missing_eos_penalty: expected at least 0, got -5.0"),
    ({"beta": float("nan")}, "ppo.beta: expected at least 0, got nan"),
    ({"sampling_batch": -1}, "ppo.sampling_batch: expected at least 0, got -1"),
    ({"kl_target": -1.0}, "ppo.kl_target, ppo.kl_horizon: expected 0 or more"),
    ({"kl_target": 6.0, "beta": 0.0}, "ppo.beta: expected more than 0 to begin with, since ppo.kl_target multiplies it, got 0"),
    ({"kl_target": 6.0, "rollout_size": 512, "kl_horizon": 100.0}, "ppo.kl_horizon: expected more than 102.4, .*, got 100"),
    ({"kl_target": 6.0, "rollout_size": 500, "kl_horizon": 100.0}, "ppo.kl_horizon: expected more than 100, .*, got 100"),
])  # fmt: skip
def test_settings_of_ppo_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_the_least_horizon_keeps_beta_positive():
    settings = dataclasses.replace(SETTINGS, beta=0.1, kl_target=6.0, rollout_size=512, kl_horizon=102.5)
    beta = KlControl(0.1, settings.kl_target, settings.kl_horizon).after(0.1, 0.0, settings.rollout_size)
    assert beta == pytest.approx(0.1 * (1 - 102.4 / 102.5))
    dataclasses.replace(settings, kl_target=0.0, kl_horizon=1.0, beta=0.0)  # a fixed one needs no horizon


ROUND = RejectionSettings("prompts.jsonl", 8, 4, 2, 8, 1.0, (0.9, 1.0), 2, 4, "v1")


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompt_length": 0}, "rejection.prompt_length: expected at least 1, got 0"),
    ({"temperature": -1.0}, "rejection.temperature: expected at least 0, got -1.0"),
    ({"temperatures": (0.5, -1.0)}, "rejection.temperatures: expected at least 0, got -1.0"),
    ({"temperatures": (0.0, 1.0)}, "rejection.temperature: expected a positive number for 2 answers, got 0.0"),
    ({"safety_threshold": 7.0}, "rejection.safety_threshold: expected a number from 0 to 1, got 7.0"),
    ({"search_prompts": 0}, "rejection.search_prompts: expected at least 1, got 0"),
])  # fmt: skip
def test_settings_of_a_round_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ROUND, **changes)


def test_the_critic_speaks_in_units_of_the_whitened_reward():
    """Rollout and loss take the same mean and deviation of the reward model's scores away."""
    mesh, scale = one_device(), ScoreStatistics(2.0, 4.0)
    with jax.set_mesh(mesh):
        plain, scaled = (source(mesh, scale=s).batch(0, MODELS)[0] for s in (ScoreStatistics(0.0, 1.0), scale))
        np.testing.assert_allclose(scaled.values, np.where(plain.mask, (plain.values - 2) / 4, 0), atol=1e-6)
        found = jax.jit(ppo_loss(MODEL, FLOAT32, SETTINGS, scale))(MODELS, scaled)[1]["value_loss"]
    square = np.square(scaled.values - scaled.returns) * scaled.mask  # nothing is clipped before the first update
    np.testing.assert_allclose(found.mean(), 0.5 * square.sum() / scaled.mask.sum(), rtol=1e-5)


def test_a_reward_model_without_statistics_is_told_of_with_its_file_and_the_setting(tmp_path, caplog):
    for step, more in ((100, {}), (200, {"scores": {"mean": 2.0, "std": 4.0, "pairs": 8}})):
        write_json(tmp_path / "reward" / "checkpoints" / str(step) / "meta" / "metadata", {"fingerprints": {}, **more})
    assert critic_scale(str(tmp_path / "reward")) == ScoreStatistics(2.0, 4.0) and critic_scale("") == UNSCALED
    assert not caplog.records
    assert critic_scale(f"{tmp_path}/reward@100") == UNSCALED
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}/reward/checkpoints/100/meta/metadata: holds no statistics of")
    assert "score_pairs" in record.getMessage()


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
    assert [12 * ppo.epoch(step) for step in range(4)] == [8, 8, 16, 16]  # prompts answered, of 12


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


def test_while_the_critic_warms_up_the_policy_does_not_move_by_one_bit():
    """Not by weight decay either, and after that both learn."""
    specs = {"policy": params.table(MODEL, head="lm_head"), "critic": params.table(MODEL, head="value_head")}
    config = OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.1)
    optimiser, mesh = optimizer.make(config, steps=4, decay=params.decay_mask(specs)), one_device()
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(specs, optimiser, mesh))
        state = jax.device_put(create(jax.tree.map(jnp.copy, MODELS), optimiser), layout)
        step = make_step(ppo_loss(MODEL, FLOAT32, SETTINGS), optimiser, microbatches=1, layout=layout)
        ppo = source(mesh, rule=dataclasses.replace(RULE, warm_up=8))

        def moved(number):  # which models' leaves are others after a step, bit by bit
            nonlocal state
            before = jax.tree.map(np.array, state.params)  # copies: the step donates its state
            state, means = step(state, ppo.batch(number, state.params)[0])
            norms = {name: float(value) for name, value in means.items() if name.startswith("gradient_norm")}
            assert norms["gradient_norm/critic"] > 0 and (norms["gradient_norm/policy"] > 0) == (number >= 2)
            assert len(norms) == 2 and float(means["learning_rate"]) == np.float32(1e-2)
            after = jax.tree.map(np.array, state.params)
            return {
                name: any(a.tobytes() != b.tobytes() for a, b in zip(*map(jax.tree.leaves, (before[name], after[name]))))
                for name in before
            }

        for number in range(2):  # both mini-batches of the first eight responses
            assert moved(number) == {"policy": False, "critic": True}
        assert moved(2) == {"policy": True, "critic": True}


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

    def answer(self, prompts, *, progress, **how):
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
    monkeypatch.setattr(drawn, "fingerprint", lambda workdir: "0123456789abcdef")
    drawn.note(tmp_path, "samples", {}, {"policy": "policy"})
    monkeypatch.setattr(rejection, "mixed_prompts", lambda settings, tokenizer, *, seed: [({"is_safety": False}, [1])] * 3)
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

    config = types.SimpleNamespace(policy="policy", rejection=ROUND, loop=LoopConfig(steps=1, batch_size=1))
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
    pool = read_pool(str(tmp_path / "pool.jsonl"))
    assert [(row["version"], row["temperature"], row["policy"]) for row in pool] == [("v1", 0.9, "0123456789abcdef")] * 3


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
    ({"epochs": 1.0, "optim": {"warmup": 3}}, "=3 leaves nothing of loop.steps=2 .*epochs=1 of 10 rows"),  # 8 drawn
    ({"loop": {"batch_size": 12}}, "loop.batch_size=12 cannot be divided into 8 shards"),
    ({"loop": {"keep_best": "loss"}}, "loop.keep_best=loss: expected dialogs in data.held_out"),
    ({"lora": {"rank": 4}}, "adapters .* need a model to adapt"),
    ({"data": {"shares": (0.1, 0.1)}}, "data.shares: expected one for each of the 2 files of data.train, got 3"),
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
    data = {"train": ("dialogs.jsonl",), "length": 64}
    common = {"start": "scratch", "tokenizer": "tokenizer.model", "epochs": 0.0, "optim": {"warmup": 1}}
    change(values, {**common, "data": data}, where=stage)
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


def test_rows_that_the_mesh_cannot_divide_are_scored_beside_empty_ones(tiny, monkeypatch):
    """A batch of 4 over 8 devices, and rows divided along their length: what a round would meet when all is drawn."""
    specs = params.table(tiny, head="reward_head")
    reward = params.init(specs, jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 96, n).tolist() for n in (3, 30, 9)]

    def scored(mesh, batch_size):
        with jax.set_mesh(mesh):
            placed = jax.device_put(reward, shardings(specs, mesh))
            return sigmoid_scores(tiny, FLOAT32, placed, prompts, [[5], [6], [7]], length=32, batch_size=batch_size)

    expected = scored(one_device(), 3)
    np.testing.assert_allclose(scored(make_mesh(MeshConfig(fsdp=8)), 4), expected, rtol=1e-5)
    np.testing.assert_allclose(scored(make_mesh(MeshConfig(fsdp=4, sequence=2)), 2), expected, rtol=1e-5)
    assert row_length(32) == 512 and row_length(513) == 1024
    assert rows_at_once(512, length=32, batch_size=64, shards=1) == 2  # a CPU's cache
    assert rows_at_once(512, length=32, batch_size=4, shards=8) == 8
    monkeypatch.setattr(scoring, "platform", lambda: "tpu")
    assert row_length(700) == 1024 and rows_at_once(1024, length=1024, batch_size=64, shards=8) == 64
    assert rows_at_once(512, length=144, batch_size=128, shards=8) == 40  # 36 rows hold as much as 128 texts
    assert rows_at_once(2048, length=2048, batch_size=256, shards=8) == 64
    monkeypatch.setattr(scoring, "shards_of", lambda axis: 3)
    assert row_length(700) == 1536


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("scaling", [None, "dynamic"])
@pytest.mark.parametrize("split", [{}, {"fsdp": 4, "tensor": 2}, {"fsdp": 4, "sequence": 2}], ids=["one", "tensor", "sequence"])
def test_answers_to_one_prompt_are_scored_as_if_each_stood_alone(tiny, split, scaling, blocks, monkeypatch):
    # Attention in several blocks of queries, as on accelerators, where rows are longer.
    monkeypatch.setattr(branches, "_QUERIES", 512 // blocks)
    scoring._jitted_scorer.cache_clear()
    if scaling:
        tiny = dataclasses.replace(tiny, rope_scaling=RopeScaling("dynamic", factor=2.0, original_length=8))
    specs = params.table(tiny, head="reward_head")
    # Large matrices, so that what a token sees changes its score by far more than rounding.
    reward = jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params.init(specs, jax.random.key(0)))
    rng = np.random.default_rng(1)
    stems = [rng.integers(3, 96, n).tolist() for n in (20, 3, 11)]
    answers = [rng.integers(3, 96, n).tolist() for n in rng.integers(1, 12, 90)]
    prompts = [stems[i % 3 if i < 30 else 0] for i in range(90)]  # those of the first one need two rows
    answers[7], answers[4], answers[10] = [], answers[1], answers[1] + [5]  # none, equal ones, one that goes on
    alone = jax.jit(scorer(tiny, FLOAT32))
    expected = []
    for prompt, answer in zip(prompts, answers):
        tokens, real = np.zeros((2, 1, 32), np.int32)
        tokens[0, : len(prompt + answer)], real[0, : len(prompt + answer)] = prompt + answer, 1
        expected.append(float(alone(reward, tokens, real)[0]))
    mesh = make_mesh(MeshConfig(**split)) if split else one_device()
    with jax.set_mesh(mesh):
        placed = jax.device_put(reward, shardings(specs, mesh))
        found = logit_scores(tiny, FLOAT32, placed, prompts, answers, length=32, batch_size=4)
        scoring._jitted_scorer.cache_clear()
        with pytest.raises(ValueError, match=r"text 1: expected a prompt and a response of at most 32 tokens .* got 30 \+ 3"):
            logit_scores(tiny, FLOAT32, placed, [[5], [5] * 30], [[6], [6] * 3], length=32, batch_size=4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.std(expected) > 0.1 and found[4] == found[1]


def test_a_round_takes_scorers_of_ones_own_and_one_reward_model(monkeypatch):
    scored = {"safety": np.array([0.2, 0.5]), "reward": np.array([0.2, 0.5]), "logit": np.log([0.25, 1.0])}
    monkeypatch.setattr(rejection, "score_responses", lambda *_, **how: dict(scored))
    rows = [{"is_safety": True, "reference": "ab"}, {"is_safety": False, "reference": "abc"}]

    def overlap(rows, texts):
        return [len(row["reference"]) - len(text) for row, text in zip(rows, texts)]

    def score(judges, scorers, weights):
        settings = types.SimpleNamespace(rejection=ROUND, compute=None)
        own = types.SimpleNamespace(
            config=settings, judges=judges, scorers=scorers, weights=weights, mesh=one_device(), reward=None, rewards={},
            length=8, others=lambda *given: Round.others(own, *given),
        )  # fmt: skip
        return Round.score(own, [[1], [1]], [[3], [3]], rows, ["a", "abcdef"])

    mixed = score({"safety": "s"}, {"rule": overlap}, {REWARD_MODELS: 0.5, "rule": 2.0})
    np.testing.assert_allclose(mixed["reward"], [0.5 * np.log(0.25) + 2 * 1, 0.0 + 2 * -3], rtol=1e-5)
    assert mixed["other"].tolist() == [2.0, -6.0] and set(mixed) == {"safety", "other", "scorers", "reward"}
    alone = score({}, {"rule": overlap}, {"rule": 2.0})
    assert alone["reward"].tolist() == [2.0, -6.0] and set(alone) == {"other", "scorers", "reward"}
    two = score({}, {"rule": overlap, "length": lambda _, texts: [len(text) for text in texts]}, {"rule": 2.0, "length": 0.5})
    assert of_answer(two, 1) == {"other": -3.0, "scorers": {"rule": -3.0, "length": 6.0}, "reward": -3.0}
    assert set(score({"safety": "s"}, {}, {REWARD_MODELS: 1.0})) == {"safety", "reward"}


def test_what_a_round_keeps_of_a_sample_and_which_models_it_needs(tmp_path):
    sample = {"prompt": 0, "messages": [{"role": "user", "content": "?"}], "is_safety": False, "reference": "yes",
              "response": "yes", "ended": True, "reward": -2.5, "other": -2.5, "scorers": {"a:b": -5.0}}  # fmt: skip
    write_jsonl(tmp_path / "pool.jsonl", best_samples([sample], version="1", policy="p", temperature=1.0))
    (row,) = read_pool(str(tmp_path / "pool.jsonl"))
    assert row["reference"] == "yes" and row["other"] == row["reward"] == -2.5 and "helpfulness" not in row
    assert row["scorers"] == {"a:b": -5.0} and of_prompt(row) == {"reference": "yes"}

    def check(scorers=(REWARD_MODELS,), answers=2, pools=(), **models):
        check_models(types.SimpleNamespace(
            rejection=dataclasses.replace(ROUND, answers=answers), reward=RewardMix(scorers), pools=pools,
            **{"policy": "p", "helpfulness": "", "safety": "", **models},
        ))  # fmt: skip

    check(safety="s")
    check(helpfulness="h")
    check(scorers=("math:floor",))
    check(answers=0, pools=("pool.jsonl",), policy="")
    for how, message in (
        ({}, "expected the workdir of one at least"), ({"policy": "", "safety": "s"}, "config.policy: expected the workdir"),
        ({"answers": 0, "scorers": (REWARD_MODELS, "math:floor"), "pools": ("x",)}, "expected the workdir of one at least"),
        ({"answers": 0, "safety": "s"}, "config.pools: expected at least one"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check(**how)


def test_an_answer_that_cannot_be_trained_on_is_worth_no_more_than_the_worst():
    def search(scorers, rewards):
        samples = [{"reward": r, "response": "yes", "ended": ended} for r, ended in rewards]
        own = types.SimpleNamespace(
            config=types.SimpleNamespace(rejection=dataclasses.replace(ROUND, temperatures=(0.9,)), loop=LoopConfig(1, 1)),
            scorers=scorers, samples=lambda *_, **__: samples,
        )  # fmt: skip
        return Round.search(own, [0, 1])["curves"]["0.9"]["maximum"]

    drawn_with_models = search({}, [(0.5, True), (0.9, False), (0.3, True), (0.1, True)])
    assert drawn_with_models[-1] == pytest.approx((0.5 + 0.3) / 2)
    with_a_rule = search({"rule": None}, [(-5.0, True), (9.0, False), (-4.0, True), (-7.0, True)])
    assert with_a_rule[-1] == pytest.approx((-5 - 4) / 2) and with_a_rule[0] == pytest.approx((-6 - 5.5) / 2)


@pytest.mark.parametrize(("module", "field"), [(rejection, "answers"), (ghost, "samples"), (distillation, "generic")],
                         ids=["rejection", "ghost", "distill"])  # fmt: skip
def test_what_was_drawn_under_other_settings_is_put_aside_and_drawn_anew(small, tmp_path, monkeypatch, caplog, module, field):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    monkeypatch.chdir(small)
    stage = {rejection: "rejection", ghost: "ghost", distillation: "distill"}[module]
    draws, parameters = [], ["as they were"]
    monkeypatch.setattr(drawn, "fingerprint", lambda workdir: f"{workdir} {parameters[-1]}")

    def draw(config, mesh, workdir):
        draws.append(getattr(getattr(config, stage), field))
        workdir = workdir.parent if workdir.suffix else workdir
        for name in ("samples", "pool", "best") if module is rejection else ("samples",):
            write_jsonl(workdir / f"{name}.jsonl", [])

    monkeypatch.setattr(module, "gather" if module is rejection else "draw_samples", draw)
    monkeypatch.setattr(module, "check_fine_tuning", lambda *_, **__: None)
    monkeypatch.setattr(module, "fine_tuning_stage", lambda *_, **__: None)

    def make(**changes):
        values = load_config(small_runs.ROOT / "configs", f"{stage}.py:tiny")
        own = {"prompts": "prompts.jsonl"} if module is not ghost else {}
        models = {"policy": "chat", "safety": "s"} if module is not ghost else {"policy": "chat"}
        change(values, {**models, stage: own, "data": {"train": ("dialogs.jsonl",)}}, where=stage)
        change(values, changes, where=stage)
        module.make_stage(parse_stage(values), one_device(), tmp_path)

    make(**{stage: {field: 2}})
    make(**{stage: {field: 2, "sampling_batch": 4}, "epochs": 1.0, "optim": {"lr": 1e-3}})  # nothing that draws depend on
    assert draws == [2] and not (tmp_path / "replaced").exists()
    make(**{stage: {field: 3}})
    assert draws == [2, 3] and f"{stage}.{field}: 2 -> 3" in caplog.text
    assert "samples.jsonl" in {path.name for path in (tmp_path / "replaced" / "1").iterdir()}
    make(**{stage: {field: 3}})
    assert draws == [2, 3]
    # The policy was trained on when all was drawn, and when half of it was.
    parameters.append("newer")
    make(**{stage: {field: 3}})
    assert draws == [2, 3] and not (tmp_path / "replaced" / "2").exists()
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    write_jsonl(tmp_path / "samples" / "0-2.jsonl", [])
    make(**{stage: {field: 3}})
    assert draws == [2, 3, 3] and (tmp_path / "replaced" / "2" / "samples").is_dir()
    assert "fingerprint of policy: 'chat as they were' -> 'chat newer'" in caplog.text


def test_other_pools_leave_the_samples_where_they_are(tmp_path):
    for name in ("samples.jsonl", "pool.jsonl", "best.jsonl"):
        write_jsonl(tmp_path / name, [])
    drawn.note(tmp_path, "best", {"pools": ["a"], "version": "1"}, {})
    drawn.put_aside(tmp_path, "samples", {"answers": 2}, {}, ("samples.jsonl",))  # nothing is known of these, so they stay
    drawn.put_aside(tmp_path, "best", {"pools": ["a", "b"], "version": "1"}, {}, ("pool.jsonl", "best.jsonl"))
    assert sorted(path.name for path in (tmp_path / "replaced" / "1").iterdir()) == ["best.jsonl", "pool.jsonl"]
    assert (tmp_path / "samples.jsonl").exists() and not list(read_jsonl(tmp_path / "samples.jsonl"))


def test_a_round_of_another_version_takes_no_samples_of_an_earlier_policy(tmp_path, monkeypatch):
    parameters, files = ["one"], {f"{name}.jsonl" for name in ("samples", "pool", "best")}
    monkeypatch.setattr(drawn, "fingerprint", lambda workdir: f"{workdir} {parameters[-1]}")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "?"}])

    def begin(version):
        """Which files of the round stay; the others are made."""
        values = load_config(small_runs.ROOT / "configs", "rejection.py:tiny")
        own = {"prompts": str(tmp_path / "prompts.jsonl"), "version": version}
        change(values, {"policy": "chat", "safety": "s", "rejection": own}, where="rejection")
        under = rejection.put_stale_aside(parse_stage(values), tmp_path / "run")
        there = {path.name for path in (tmp_path / "run").glob("*.jsonl")}
        if there != files:
            for name, of in under.items():
                drawn.note(tmp_path / "run", name, *of)
            for name in files - there:
                write_jsonl(tmp_path / "run" / name, [])
        return there

    assert begin("1") == set() and begin("1") == files
    assert begin("2") == {"samples.jsonl"}  # of the same policy
    parameters.append("two")
    assert begin("2") == files  # it is finished, whatever becomes of its policy
    assert begin("3") == set()
    assert drawn.fingerprints(tmp_path / "run", "samples")["policy"] == "chat two"


@pytest.mark.parametrize(("module", "own", "expected"), [
    (rejection, {"safety": "s", "rejection": {"prompts": "prompts.jsonl", "prompt_length": 40, "new_tokens": 9}}, 40 + 9),
    (ghost, {"context": 0, "ghost": {"contexts": ("dialogs.jsonl",)}}, 64),
    # The longest prompt has a pre-prompt before it.
    (distillation, {"safety": "s", "context": 512, "distill": {"prompts": "prompts.jsonl", "prompt_length": 40}}, None),
], ids=["rejection", "ghost", "distill"])  # fmt: skip
def test_the_keys_and_values_of_what_is_drawn_together_are_counted(small, monkeypatch, module, own, expected):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    monkeypatch.chdir(small)
    stage, asked = {rejection: "rejection", ghost: "ghost", distillation: "distill"}[module], {}
    values = load_config(small_runs.ROOT / "configs", f"{stage}.py:tiny")
    change(values, {"start": "scratch", "tokenizer": "tokenizer.model", "policy": "chat", **own}, where=stage)
    change(values, {stage: {"sampling_batch": 3}}, where=stage)
    config = parse_stage(values)
    for name in ("check_language_model", "check_reward_model"):
        monkeypatch.setattr(module, name, lambda *_: None, raising=module is not ghost)

    def check(model, compute, mesh, *, rows=0, length=0, hint=""):
        asked.update(rows=rows, length=length)
        raise ConfigError("too large")

    monkeypatch.setattr(module, "check_generates", check)
    with pytest.raises(ConfigError, match="too large"):
        Round(config, None) if module is rejection else module.draw_samples(config, None, small / "run")
    assert asked["rows"] == 3
    assert asked["length"] == expected if expected else 40 + config.distill.new_tokens < asked["length"] <= 512


@pytest.mark.parametrize(("changes", "message"), [
    ({"reward": {"scorers": ("reward_models", "math:flor")}}, "reward.scorers: cannot load 'math:flor'"),
    ({"data": {"held_out": "typo.jsonl"}}, "typo.jsonl: expected a JSONL file, found nothing"),
    ({"data": {"held_out": "damaged.jsonl", "prompt_length": 1}}, "none of .* prompts fits into 1 tokens"),
])  # fmt: skip
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_scorers_and_held_out_prompts_are_read_before_a_model_is(small, tmp_path, monkeypatch, stage, changes, message):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    monkeypatch.chdir(small)
    monkeypatch.setattr(reinforce, "begin", lambda *_, **__: pytest.fail("a model was loaded"))
    for name in ("load_tokenizer", "check_reward_model"):
        monkeypatch.setattr(reinforce, name, lambda *_: (SIZES["tiny"], Tokenizer("tokenizer.model")))
    values = load_config(small_runs.ROOT / "configs", f"{stage}.py:tiny")
    own = {"start": "chat", "tokenizer": "tokenizer.model", "helpfulness": "h", "safety": "s"}
    data = {"prompts": "prompts.jsonl", "prompt_length": 20}
    change(values, {**own, "data": data, stage: {"new_tokens": 8}}, where=stage)
    change(values, changes, where=stage)
    config = parse_stage(values)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Opening.of(config, getattr(config, stage), one_device(), tmp_path)


def test_the_mesh_of_distillation_holds_the_larger_model_and_one_that_does_not_is_refused(monkeypatch):
    config = load_config(small_runs.ROOT / "configs", "rejection.py:7b,70b")
    assert (config.model, config.policy_model, config.reward_model, config.mesh.tensor) == ("7b", "70b", "70b", 8)
    assert load_config(small_runs.ROOT / "configs", "rejection.py:7b").mesh.tensor == 1
    monkeypatch.setattr(chips, "device_memory", lambda: 95 * 2**30)

    def check(tensor):
        shape = {"data": 1, "fsdp": 256 // tensor, "sequence": 1, "tensor": tensor}
        chips.check_generates(SIZES["70b"], Compute(), types.SimpleNamespace(shape=shape))

    check(8)
    with pytest.raises(ConfigError, match="config.mesh: generation puts 128.5 GiB of 70b's weights on each chip, which holds"):
        check(1)
    # Eight rows of 2,048 tokens on each of 64 chips: 7B's weights are 12.6 GiB, and a row's keys and values 1 GiB.
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 64, "sequence": 1, "tensor": 1})
    bfloat16 = Compute(matmul="bfloat16", activations="bfloat16")
    chips.check_generates(SIZES["7b"], bfloat16, mesh, rows=512, length=2048)
    monkeypatch.setattr(chips, "device_memory", lambda: 16 * 2**30)
    chips.check_generates(SIZES["7b"], bfloat16, mesh)
    with pytest.raises(ConfigError, match=r"12.6 GiB of 7b's weights and 8.0 GiB of keys and values .* fewer rows at a time"):
        chips.check_generates(SIZES["7b"], bfloat16, mesh, rows=512, length=2048)
