"""Reward models: the paper's formulas by hand, scoring by mask, and a model that learns to rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logit

from llama_jax.config import ConfigError
from llama_jax.data.mixture import mix
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.parallel.axes import shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.reward.comparisons import Comparison, blank, collate
from llama_jax.reward.ranking import MARGINS, centring_loss, last_token_scores, margin_table, ranking_loss, safety_loss
from llama_jax.reward.score import combined_logit, scorer, whiten
from llama_jax.reward.stage import PairData, RewardData, mixed_pairs, reward_loss
from llama_jax.training.step import put_batch

MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=24, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=32
)
TREE = params.init(params.table(MODEL, head="reward_head"), jax.random.key(0))


def test_ranking_loss_by_hand():
    loss = ranking_loss(jnp.array([2.0, 1.0]), jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-1.0)), np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(ranking_loss([2, 1], [0.0, 1.0], np.array([1, 0])), loss)  # lists and whole numbers
    assert ranking_loss(2.0, 0.0, 1.0) == loss[0]
    with pytest.raises(ValueError, match="must have one shape"):
        ranking_loss(jnp.zeros((2, 1)), jnp.zeros((2, 1)), jnp.zeros(2))


def test_margins_of_table_27():
    assert list(MARGINS["large"].values()) == [3, 2, 1, 0]
    assert list(MARGINS["small"].values()) == [1, 2 / 3, 1 / 3, 0]
    assert margin_table("small") is MARGINS["small"]
    with pytest.raises(ValueError, match="margin: expected one of none, small, large, got 'medium'"):
        margin_table("medium")


def test_safety_loss_by_hand():
    found = safety_loss(jnp.array([0.0, 2.0, 2.0]), jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(found, [np.log(2), np.log1p(np.exp(-2)), np.log1p(np.exp(2))], rtol=1e-6)


def test_the_gate_of_the_paper():
    helpful, safe = jnp.array([0.9, 0.9, 0.9, 0.9]), jnp.array([0.8, 0.14, 0.15, 0.8])
    is_safety = jnp.array([False, False, False, True])
    logits = combined_logit(logit(helpful), logit(safe), is_safety)  # of R_c = 0.9, 0.14, 0.9, 0.8
    np.testing.assert_allclose(logits, np.log([9, 0.14 / 0.86, 9, 4]), rtol=1e-5)


def test_scores_of_which_float32_has_one_sigmoid_are_different_rewards():
    """sigmoid(17) is 1 in float32, and so is that of 20."""
    helpful, safe = jnp.array([14.0, 17.0, 20.0, 20.0, 5.0]), jnp.array([3.0, 3.0, 3.0, -20.0, -30.0])
    found = combined_logit(helpful, safe, jnp.array([False] * 4 + [True]))
    assert found.tolist() == [14, 17, 20, -20, -30]
    assert len(set(jax.nn.sigmoid(jnp.array([17.0, 20.0, 30.0])).tolist())) == 1


def test_whitening_is_over_the_mask():
    np.testing.assert_allclose(whiten(jnp.array([1.0, 3.0])), [-1, 1], rtol=1e-5)
    assert not whiten(jnp.full(512, 1000.3)).any()  # the mean of these in float32 is not one of them
    large = whiten(jnp.array([1000.25, 1000.75, 1e6]), jnp.array([True, True, False]))
    np.testing.assert_allclose(large, [-1, 1, 0], rtol=1e-5)
    assert whiten(jnp.array([7.0, 9.0]), jnp.zeros(2, bool)).tolist() == [0, 0]
    masked = whiten(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False]))
    np.testing.assert_allclose(masked, [-1, 1, 0], rtol=1e-5)


def test_the_score_stands_at_the_last_real_token():
    scores = jnp.array([[1.0, 2.0, 3.0, 4.0]] * 3)
    segments = jnp.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    assert last_token_scores(scores, segments).tolist() == [2, 3, 4]


def test_scores_do_not_depend_on_padding_or_its_side():
    score = jax.jit(scorer(MODEL, FLOAT32))
    ids = [1, 5, 9, 13, 2]
    right = np.zeros((1, 12), np.int32)
    left, long = right.copy(), np.zeros((1, 20), np.int32)
    right[0, :5], left[0, -5:], long[0, 3:8] = ids, ids, ids
    found = [float(score(TREE, row, (row > 0).astype(np.int32))[0]) for row in (right, left, long)]
    np.testing.assert_allclose(found, found[0], atol=1e-5)


def pairs(number, *, seed=0):
    """The chosen response holds token 7, the rejected one another."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(number):
        a, b = rng.choice(np.arange(8, 24), 2).tolist()
        made.append(Comparison([1, a, 7, 2], [1, a, b, 2], margin=0.0, degree=i % 4, safety_bin="chosen_safe"))
    return made


def test_the_loss_counts_pairs_and_degrees_and_ignores_filling():
    loss = reward_loss(MODEL, FLOAT32, safety_weight=1.0)
    four = pairs(4)
    objective, metrics = loss(TREE, collate(four, length=8))
    filled, filled_metrics = loss(TREE, collate([*four, blank(four[0]), blank(four[1])], length=8))
    np.testing.assert_allclose(filled.sum, objective.sum, rtol=1e-5)
    assert filled.weight == objective.weight == 4
    assert [float(metrics[f"accuracy/{d}"].weight) for d in ("significantly", "negligibly")] == [1, 1]
    assert metrics["unsafe_recall"].weight == filled_metrics["unsafe_recall"].weight == 4


def test_a_model_that_scores_all_alike_is_right_as_often_as_a_coin():
    same = {**TREE, "reward_head": jax.tree.map(jnp.zeros_like, TREE["reward_head"])}
    _, metrics = reward_loss(MODEL, FLOAT32, safety_weight=0.0)(same, collate([*pairs(4), blank(pairs(1)[0])], length=8))
    assert float(metrics["accuracy/all"].mean()) == float(metrics["accuracy/better"].mean()) == 0.5


def test_centring_leads_the_mean_of_the_scores_to_zero():
    assert centring_loss(jnp.array([2.0, -1.0]), jnp.array([1.0, 1.0])).tolist() == [9.0, 0.0]
    batch, losses = collate(pairs(16), length=8), {}
    for weight in (0.0, 0.5):
        loss = reward_loss(MODEL, FLOAT32, safety_weight=0.0, center_weight=weight)
        losses[weight] = jax.jit(loss)(TREE, batch)[0].mean()
    scores = jax.jit(scorer(MODEL, FLOAT32))(TREE, batch.tokens.reshape(32, 8), batch.segment_ids.reshape(32, 8)).reshape(16, 2)
    np.testing.assert_allclose(losses[0.5] - losses[0.0], 0.5 * jnp.mean(jnp.sum(scores, axis=1) ** 2), rtol=1e-4)


def test_a_reward_model_learns_to_rank():
    loss = reward_loss(MODEL, FLOAT32, safety_weight=0.0)
    tree, batch = TREE, collate(pairs(64), length=8)

    @jax.jit
    def step(tree):
        gradient = jax.grad(lambda p: loss(p, batch)[0].mean())(tree)
        return jax.tree.map(lambda p, g: p - 0.3 * g, tree, gradient)

    for _ in range(60):
        tree = step(tree)
    _, metrics = loss(tree, collate(pairs(64, seed=1), length=8))
    assert metrics["accuracy/all"].mean() > 0.85


def test_the_mixes_of_the_paper(caplog):
    own, other, names = pairs(90), pairs(200), ("own.jsonl", "other.jsonl")
    files = dict(zip(names, (own, other)))
    assert len(mix([own, other], [0.0, 0.1], names=names, seed=0, unit="pairs")) == 100

    def made(seed=0, **data):
        return mixed_pairs(PairData(held_out=(), length=8, **data), files.__getitem__, seed=seed)

    mixed = made(train=names, shares=(0.0, 0.5))
    assert len(mixed) == 180 and mixed[:90] == own and not caplog.records
    drawn = [other.index(pair) for pair in mixed[90:]]
    assert len(set(drawn)) == 90 and 80 < np.mean(drawn) < 120  # out of the whole file, which may be sorted
    assert mixed == made(train=names, shares=(0.0, 0.5)) == made(train=names[:1], rest=names[1:])
    assert mixed != made(train=names, shares=(0.0, 0.5), seed=1)
    assert len(mix([own, other[:30]], [0.0, 0.5], names=names, seed=0, unit="pairs")) == 120
    assert "other.jsonl: a share of 0.5 is 90 pairs, and it has 30: all are taken" in caplog.text
    assert len(made(train=names)) == 290
    # The rest is drawn from all its files as if they were one: a large file gives more than a small one.
    files |= {"large.jsonl": pairs(900, seed=1), "small.jsonl": pairs(100, seed=2)}
    mixed = made(train=("own.jsonl",), rest=("large.jsonl", "small.jsonl"), rest_share=0.1)
    assert len(mixed) == 100 and sum(pair in files["large.jsonl"] for pair in mixed[90:]) >= 7
    with pytest.raises(ConfigError, match=r"data.rest_share: expected less than 1 together with data.shares, got 0.5 \+ 0.5"):
        made(train=names, shares=(0.0, 0.5), rest=("large.jsonl",))
    for field, value in (("rest_share", 1.0), ("buckets", 0)):
        with pytest.raises(ValueError, match=f"data.{field}: expected"):
            made(train=names, **{field: value})


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.4), (0.0, 1.0), (0.0, -0.1), (0.0, 0.9999999999999999)])
def test_shares_that_make_no_mix_are_refused_before_a_file_is_read(shares):
    with pytest.raises(ConfigError, match=r"data.shares: expected 0 for a file that is taken whole"):
        mixed_pairs(PairData(("a.jsonl", "b.jsonl"), (), 8, shares), None, seed=0)
    with pytest.raises(ConfigError, match="data.shares: expected one for each of the 1 files of data.train, got 2"):
        mixed_pairs(PairData(("a.jsonl",), (), 8, shares), None, seed=0)


def test_a_rest_that_leaves_nothing_is_refused_before_a_file_is_read():
    with pytest.raises(ConfigError, match=r"data.rest_share: expected less than 1 together with data.shares, got 0.5 \+ 0.6"):
        mixed_pairs(PairData(("a.jsonl", "b.jsonl"), (), 8, (0.0, 0.6), rest=("c.jsonl",)), None, seed=0)


def test_pairs_of_another_track_need_held_out_ones_beside_them():
    with pytest.raises(ValueError, match="data.others: expected data.held_out too, beside whose report it stands; got none"):
        RewardData(("a.jsonl",), (), 8, others=("b.jsonl",))


def test_labels_of_the_safety_bins():
    rows = [dataclasses.replace(pairs(1)[0], safety_bin=name) for name in ("chosen_safe", "both_safe", "both_unsafe", None)]
    batch = collate(rows, length=8)
    assert batch.safe.tolist() == [[1, 0], [1, 1], [0, 0], [0, 0]] and batch.safe_known.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 8, 1, 1), (1, 2, 4, 1)])
def test_eight_devices_give_the_loss_and_gradient_of_one(sizes):
    loss, batch = reward_loss(MODEL, FLOAT32, safety_weight=0.5), collate(pairs(8), length=8)
    specs = params.table(MODEL, head="reward_head")

    def run(mesh):
        with jax.set_mesh(mesh):
            tree = jax.device_put(TREE, shardings(specs, mesh))
            return jax.jit(jax.value_and_grad(lambda p, b: loss(p, b)[0].sum))(tree, put_batch(batch, mesh))

    eight = run(make_mesh(MeshConfig(*sizes)))
    one = run(make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), eight, one)
