"""GRPO and what it shares with PPO: groups by hand, the loss against float64 NumPy, scorers, importance weights, KL control."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.loader import IndexedBatches
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.parallel.axes import batch_sharding
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.reward.scorers import HostScorers, RewardMix, check_scores, load_scorer
from llama_jax.rlhf import grpo
from llama_jax.rlhf.grpo import GroupRollout, GrpoSettings, group_advantages, grpo_loss, k3, make_group_judge, token_weights
from llama_jax.rlhf.judge import RewardRule, empty_rollout, importance_weights, make_judge, response_states
from llama_jax.rlhf.reinforce import collate_prompts
from llama_jax.rlhf.rollout import KlControl, Roller, RolloutSource
from llama_jax.sampling.generate import make_sampler
from llama_jax.sampling.keys import row_keys

MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=24, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=32
)
RULE = RewardRule(
    beta=0.1, gamma=1.0, lam=1.0, safety_threshold=0.15, missing_eos_penalty=1.0, temperature=0.8, importance_cap=2.0
)
SETTINGS = GrpoSettings(rollout_size=12, answers=4, new_tokens=6, beta=0.05, temperature=0.8)


def tree(head, seed):
    return jax.tree.map(lambda x: 3 * x, params.init(params.table(MODEL, head=head), jax.random.key(seed)))


POLICY = {"policy": tree("lm_head", 0)}
FROZEN = {"reference": tree("lm_head", 2), "helpfulness": tree("reward_head", 3), "safety": tree("reward_head", 4)}


def one_device():
    return make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])


def source(mesh, *, judge=None, frozen=None, score=None, empty=grpo.empty_rollout, answers=4, **more):
    roll = Roller(
        sample=make_sampler(
            MODEL, params.table(MODEL, head="lm_head"), compute=FLOAT32, eos_id=2, max_new_tokens=6, temperature=0.8
        ),
        judge=judge or make_group_judge(MODEL, FLOAT32, RULE, SETTINGS),
        frozen=FROZEN if frozen is None else frozen,
        keys=functools.partial(row_keys, 0),
        score=score,
    )  # fmt: skip
    examples = [(i % 3 == 0, [1, 3 + i, 4 + i][: 2 + i % 2], i) for i in range(7)]
    batches = IndexedBatches(examples, lambda rows: collate_prompts(rows, length=4), 12 // answers, 0)
    how = {"size": 12, "rows": 6, "control": KlControl(0.05), "seed": 0, **more}
    return RolloutSource(batches, roll, mesh=mesh, empty=empty(12, 4, 6), answers=answers, **how)


def test_advantages_of_groups_by_hand():
    scores = jnp.array([1.0, 3.0, 5.0, 5.0, 2.0, 2.0])
    found = group_advantages(scores, 2, divide_by_std=True)
    np.testing.assert_allclose(found, [-1, 1, 0, 0, 0, 0], atol=2e-4)
    np.testing.assert_allclose(group_advantages(scores, 3, divide_by_std=False), [-2, 0, 2, 2, -1, -1], atol=1e-6)
    some = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    wide = some.astype(np.float64)
    expected = [(score - group.mean()) / (group.std() + 1e-4) for group in wide for score in group]
    found = group_advantages(jnp.asarray(some.reshape(-1)), 4, divide_by_std=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_k3_and_weights_by_hand():
    # pi_0 / pi = 2: 2 - 1 - log 2; equal: 0
    np.testing.assert_allclose(k3(jnp.zeros(2), jnp.array([np.log(2.0), 0.0])), [1 - np.log(2), 0], atol=1e-6)
    mask = jnp.array([[True, True, False], [True, True, True]])
    np.testing.assert_allclose(token_weights(mask, "token"), [[1, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(token_weights(mask, "response"), [[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("normalise", ["token", "response"])
def test_the_loss_is_that_of_the_formula_in_float64(normalise):
    settings = dataclasses.replace(SETTINGS, normalise=normalise, clip=0.1)
    rng = np.random.default_rng(0)
    B, N = 4, 6
    lengths = np.array([6, 3, 1, 5])
    mask = np.arange(N) < lengths[:, None]
    tokens = rng.integers(3, 24, (B, 4 + N)).astype(np.int32)
    segment_ids = np.concatenate([np.ones((B, 4)), mask], axis=1).astype(np.int32)
    # log pi by NumPy from the hidden states, then the published objective, sequence by sequence.
    hidden = np.asarray(response_states(POLICY["policy"], tokens, segment_ids, N, config=MODEL, compute=FLOAT32), np.float64)
    scores = hidden @ np.asarray(POLICY["policy"]["lm_head"]["kernel"], np.float64) / settings.temperature
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    drawn = np.take_along_axis(log_p, tokens[:, 4:, None], axis=2)[..., 0]

    def near(width):
        return (drawn + rng.normal(0, width, (B, N))).astype(np.float32)

    batch = GroupRollout(
        tokens=tokens, mask=mask, segment_ids=segment_ids, log_probs=near(0.2), reference=near(0.5),
        importance=rng.uniform(0.5, 2, (B, N)).astype(np.float32), advantages=rng.normal(size=B).astype(np.float32),
    )  # fmt: skip
    found, metrics = grpo_loss(MODEL, FLOAT32, settings)(POLICY, batch)
    total, weight, clipped = 0.0, 0.0, 0.0
    for i in range(B):
        share = 1.0 if normalise == "token" else 1 / lengths[i]
        for t in range(lengths[i]):
            now = drawn[i, t]
            ratio = np.exp(now - np.float64(batch.log_probs[i, t]))
            advantage = np.float64(batch.advantages[i])
            surrogate = min(ratio * advantage, np.clip(ratio, 0.9, 1.1) * advantage)
            gap = np.float64(batch.reference[i, t]) - now
            kl = np.exp(gap) - gap - 1
            total += share * (-surrogate * batch.importance[i, t] + settings.beta * kl)
            weight += share
            clipped += share * (np.clip(ratio, 0.9, 1.1) * advantage < ratio * advantage)
    np.testing.assert_allclose([found.sum / found.weight, found.weight], [total / weight, weight], rtol=1e-6, atol=1e-6)
    assert 0 < clipped < weight
    np.testing.assert_allclose(metrics["clip_fraction"].sum, clipped, rtol=1e-5)


def test_a_rollout_has_groups_in_consecutive_rows_and_the_first_step_is_on_policy():
    mesh = one_device()
    with jax.set_mesh(mesh):
        made = source(mesh)
        batch, metrics = made.batch(0, POLICY)
        objective, found = jax.jit(grpo_loss(MODEL, FLOAT32, SETTINGS))(POLICY, batch)
    rollout = jax.device_get(made.rollout)
    prompts = rollout.tokens[:, :4].reshape(3, 4, 4)
    assert (prompts == prompts[:, :1]).all() and len({row.tobytes() for row in prompts[:, 0]}) == 3
    assert len({row.tobytes() for row in rollout.tokens[:4, 4:]}) > 1  # answers of one prompt differ
    np.testing.assert_allclose(rollout.advantages.reshape(3, 4).sum(axis=1), 0, atol=1e-4)
    assert float(found["ratio_deviation"].mean()) < 1e-5 and float(found["clip_fraction"].mean()) == 0
    assert metrics["sampler_drift"] < 1e-4 and metrics["importance"] == pytest.approx(1, abs=1e-3)
    assert objective.weight == batch.mask.sum() and "critic" not in POLICY


def test_groups_are_judged_together_though_models_read_them_in_parts():
    mesh = one_device()
    with jax.set_mesh(mesh):
        whole, parts = (source(mesh, judge=make_group_judge(MODEL, FLOAT32, RULE, SETTINGS, most=most)) for most in (0, 3))
        (_, expected), (_, found) = whole.batch(0, POLICY), parts.batch(0, POLICY)
    for name, value in jax.device_get(whole.rollout).__dict__.items():
        np.testing.assert_allclose(getattr(parts.rollout, name), value, atol=1e-5, err_msg=name)
    assert all("seconds" in name or found[name] == pytest.approx(expected[name], abs=1e-5) for name in expected)


def test_without_kl_there_is_no_reference():
    settings = dataclasses.replace(SETTINGS, beta=0.0)
    mesh, frozen = one_device(), {name: FROZEN[name] for name in ("helpfulness", "safety")}
    with jax.set_mesh(mesh):
        made = source(mesh, judge=make_group_judge(MODEL, FLOAT32, RULE, settings), frozen=frozen)
        batch, metrics = made.batch(0, POLICY)
        _, found = grpo_loss(MODEL, FLOAT32, settings)(POLICY, batch)
    assert "kl" not in metrics and "kl_loss" not in found and not np.any(batch.reference)


def test_epochs_pass_over_the_rollout_again_in_another_order():
    mesh = one_device()
    with jax.set_mesh(mesh):
        made = source(mesh, epochs=2)
        parts = [made.batch(step, POLICY) for step in range(4)]
        again = source(mesh, epochs=2)
        again.batch(0, POLICY)
        again.restore(made.state())
        resumed, _ = again.batch(3, None)
    assert made.minibatches == 4 and [bool(metrics) for _, metrics in parts] == [True, False, False, False]
    rows = [np.asarray(batch.tokens) for batch, _ in parts]
    first, second = np.concatenate(rows[:2]), np.concatenate(rows[2:])
    assert sorted(map(bytes, first)) == sorted(map(bytes, second)) and (first != second).any()
    np.testing.assert_array_equal(resumed.tokens, rows[3])


def longest(rows, responses):
    return [len(response) + row["bonus"] for row, response in zip(rows, responses)]


class Words:
    """As much of a tokenizer as a scorer needs."""

    eos_id, stop_ids, vocab_size = 2, (2,), 100

    def decode(self, ids):
        return " ".join(f"w{token}" for token in ids if token != 2)


def test_a_scorer_of_ones_own_takes_the_reward_models_place():
    rows = [{"bonus": 1000.0 * i} for i in range(7)]
    mix = RewardMix(scorers=("test_grpo:longest",), weights=(0.5,))
    mesh = one_device()
    with jax.set_mesh(mesh):
        score = HostScorers({"longest": (longest, 0.5)}, rows, Words())
        made = source(mesh, score=score, frozen={"reference": FROZEN["reference"]})
        batch, metrics = made.batch(0, POLICY)
        prompts = made._prompts(0)
    rollout = jax.device_get(made.rollout)
    texts = [Words().decode(row[4:][inside].tolist()) for row, inside in zip(rollout.tokens, rollout.mask)]
    expected = np.array([0.5 * (len(text) + 1000 * row) for text, row in zip(texts, prompts.row)])
    assert metrics["reward"] == pytest.approx(expected.mean(), rel=1e-5) and "score/helpfulness" not in metrics
    assert metrics["score/other"] == metrics["reward"]
    assert metrics["score/longest"] == pytest.approx(2 * metrics["reward"])  # as the scorer gave it, without its weight
    whitened = (expected - expected.mean()) / expected.std() - np.array([2 not in row[4:] for row in rollout.tokens])
    advantages = group_advantages(jnp.asarray(whitened, jnp.float32), 4, divide_by_std=True)
    np.testing.assert_allclose(rollout.advantages, advantages, atol=0.02)  # the bonus of the prompt drowns the lengths
    assert load_scorer("test_grpo:longest")([{"bonus": 1}], ["ab"]) == [3] and mix.weighted() == {"test_grpo:longest": 0.5}


def test_of_several_scorers_the_sum_is_weighted_and_each_is_told_by_its_name():
    functions = {"length": lambda rows, texts: [len(t.split()) for t in texts], "bonus": lambda rows, _: [r["b"] for r in rows]}
    weights, mesh = {"length": 2.0, "bonus": -1.0}, one_device()
    score = HostScorers({name: (scorer, weights[name]) for name, scorer in functions.items()}, [{"b": 5}, {"b": 7}], Words())
    numbers = jax.device_put(np.array([1, 0], np.int32), batch_sharding(mesh, 1))
    tokens = jax.device_put(np.full((2, 4), 9), batch_sharding(mesh, 1))
    mask = jax.device_put(np.arange(4) < np.array([[4], [1]]), batch_sharding(mesh, 1))
    found = score(numbers, tokens, mask)
    assert {name: values.tolist() for name, values in found.each.items()} == {"length": [4, 1], "bonus": [7, 5]}
    assert found.total.tolist() == [2 * 4 - 7, 2 * 1 - 5]


def test_scorers_are_given_whole_answers_where_a_mesh_divides_their_length():
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=4))
    tokens = np.arange(3, 35).reshape(4, 8)
    seen = []

    def scorer(rows, responses):
        seen.extend(responses)
        return [float(len(response.split())) for response in responses]

    score = HostScorers({"words": (scorer, 1.0)}, [{}] * 4, Words())
    numbers = jax.device_put(np.arange(4, dtype=np.int32), batch_sharding(mesh, 1))
    divided = [jax.device_put(x, batch_sharding(mesh, 2)) for x in (tokens, np.ones((4, 8), bool))]
    assert not divided[0].sharding.is_fully_replicated and np.asarray(score(numbers, *divided).total).tolist() == [8.0] * 4
    assert seen == [Words().decode(row.tolist()) for row in tokens]


def test_beta_waits_for_the_critic():
    mesh, control = one_device(), KlControl(0.1, target=0.01, horizon=100.0, warm_up=2)
    how = {"judge": make_judge(MODEL, FLOAT32, RULE), "empty": empty_rollout, "answers": 1, "control": control}
    models = {**POLICY, "critic": tree("value_head", 1)}
    with jax.set_mesh(mesh):
        made = source(mesh, **how)
        told = [made.batch(step, models)[1]["beta"] for step in range(0, 4 * made.minibatches, made.minibatches)]
    assert told[:3] == [pytest.approx(0.1)] * 3 and told[3] != pytest.approx(0.1)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: RewardMix(scorers=()), "expected at least one"),
    (lambda: RewardMix(scorers=("rules",)), "expected 'reward_models' or 'module:function', got 'rules'"),
    (lambda: RewardMix(weights=(1.0, 2.0)), "expected one for each of 1 scorers"),
    (lambda: RewardMix(("reward_models", "math:floor"), (1.0, float("nan"))), "weights: expected finite numbers, .* nan"),
    (lambda: RewardMix(weights=(0.0,)), r"reward.weights: expected finite numbers, not all of them 0, got \(0.0,\)"),
    (lambda: load_scorer("no_such_module:score"), "cannot load 'no_such_module:score'"),
    (lambda: load_scorer("math:no_such"), "cannot load 'math:no_such'"),
    (lambda: load_scorer("math:pi"), "is a float, expected a function"),
    (lambda: check_scores([1.0, float("nan")], 2, "rule"), "scorer rule returned nan for response 1"),
    (lambda: check_scores([[1.0], [2.0]], 2, "rule"), r"shape \(2, 1\) for 2 responses"),
    *[(lambda found=found: check_scores(found, 2, "rule"), f"scorer rule returned {shown}, expected one finite number for each")
      for found, shown in ((["1.5", "no"], r"\['1.5', 'no'\]"), ({"score": 1.0}, "{'score': 1.0}"), (None, "None"),
                           ([{"score": 1.0}, {}], r"\[{'score': 1.0}, {}\]"), ([[1.0], []], r"\[\[1.0\], \[\]\]"))],
    (lambda: check_scores(1.0, 2, "rule"), r"shape \(\) for 2 responses"),
    (lambda: GrpoSettings(rollout_size=8, answers=3, new_tokens=4, beta=0.1), "a divisor of rollout_size=8, got 3"),
    (lambda: GrpoSettings(rollout_size=8, answers=2, new_tokens=4, beta=0.1, importance_cap=0.5), "at least 1, got 0.5"),
    (lambda: GrpoSettings(rollout_size=8, answers=2, new_tokens=4, beta=0.1, clip=1.5), "grpo.clip: expected .* got 1.5"),
])  # fmt: skip
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("scores", [
    [True, 0], (1, 0.0), np.array([1, 0]), jnp.array([1, 0], jnp.bfloat16), [np.float64(1), jnp.zeros(())],
])  # fmt: skip
def test_scores_are_numbers_of_any_type(scores):
    found = check_scores(scores, 2, "rule")
    assert found.dtype == np.float32 and found.tolist() == [1.0, 0.0]


def test_importance_weights_by_hand():
    old, sampled = jnp.log(jnp.array([[0.2, 0.9, 0.5]])), jnp.log(jnp.array([[0.4, 0.1, 0.1]]))
    mask = jnp.array([[True, True, False]])
    np.testing.assert_allclose(importance_weights(old, sampled, mask, cap=2.0), [[0.5, 2.0, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(importance_weights(old, sampled, mask, cap=0.0), np.ones((1, 3)))


def test_kl_control_by_hand_and_its_state_resumes():
    assert KlControl(0.1).after(0.1, 50.0, 512) == 0.1  # fixed, as in the paper
    control = KlControl(0.1, target=6.0, horizon=10_000.0)
    assert control.after(0.1, 12.0, 500) == pytest.approx(0.1 * (1 + 0.2 * 0.05))  # twice the target: the bound acts
    assert control.after(0.1, 5.4, 500) == pytest.approx(0.1 * (1 - 0.1 * 0.05))
    mesh = one_device()
    models = {**POLICY, "critic": tree("value_head", 1)}
    how = {"judge": make_judge(MODEL, FLOAT32, RULE), "empty": empty_rollout, "answers": 1,
           "control": KlControl(0.1, target=0.01, horizon=100.0)}  # fmt: skip
    with jax.set_mesh(mesh):
        made, again = source(mesh, **how), source(mesh, **how)
        _, first = made.batch(0, models)
        again.restore(jax.device_get(made.state()))
        _, second = made.batch(2, models)
        _, resumed = again.batch(2, models)
    assert first["beta"] == pytest.approx(0.1) and second["beta"] == pytest.approx(0.1 * 1.024)
    assert resumed["beta"] == second["beta"] and resumed["reward"] == second["reward"]
