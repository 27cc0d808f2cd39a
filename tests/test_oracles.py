"""Losses and rewards as a whole against plain float64 NumPy: packed rows, a reward model's loss, PPO's judgement of a rollout.

The models' hidden states are taken as they are; all that is made of them is computed once more, token by token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.dialog import EncodedDialog
from llama_jax.data.loader import stack_rows
from llama_jax.data.packing import pack_dialogs, packed_row
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.model.transformer import hidden_states
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.reward.comparisons import Comparison, blank, collate
from llama_jax.reward.held_out import SAFE, ScoreStatistics
from llama_jax.reward.scorers import OtherScores
from llama_jax.reward.stage import reward_loss
from llama_jax.rlhf.judge import PromptBatch, RewardRule, make_judge
from llama_jax.sampling.generate import Samples, pad_left

MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=24, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=32
)


def tree(head, seed):
    return jax.tree.map(lambda x: 3 * x, params.init(params.table(MODEL, head=head), jax.random.key(seed)))


def states(model, tokens, segment_ids):
    """# int32 [B, T] x 2 -> float64 [B, T, D]"""
    positions = np.maximum(np.cumsum(segment_ids > 0, axis=1) - 1, 0)
    found = hidden_states(model, tokens, segment_ids, positions, config=MODEL, compute=FLOAT32)
    return np.asarray(found, np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_loss_of_packed_rows_is_that_of_each_dialog_alone():
    rng, policy = np.random.default_rng(0), tree("lm_head", 0)
    dialogs = []
    for length in (9, 4, 7, 3, 12, 5, 2, 6):
        supervised = [bool(flag) for flag in rng.random(length) < 0.6]
        dialogs.append(EncodedDialog(rng.integers(3, 24, length).tolist(), [*supervised[:-1], True]))
    loss, packed = jax.jit(language_model_loss(MODEL, FLOAT32)), pack_dialogs(dialogs, 16)
    together, metrics = loss(policy, stack_rows(packed.rows))
    alone = [loss(policy, stack_rows([packed_row([dialog], 16)])) for dialog in dialogs]
    assert len(packed.rows) < len(dialogs) and together.weight == packed.supervised
    expected = sum(float(found.sum) for found, _ in alone) / packed.supervised
    assert float(together.mean()) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["accuracy"].sum) == sum(float(found["accuracy"].sum) for _, found in alone)


def test_the_loss_of_a_reward_model_is_that_of_the_formulas_in_float64():
    """Ranking with margins, the safety term on the pairs that have a label, centring; filling weighs nothing."""
    rng, model, pairs = np.random.default_rng(1), tree("reward_head", 1), []
    margins, bins = (1.0, 2 / 3, 0.0, 3.0, 1 / 3, 2.0), (*SAFE, None, "chosen_safe", None)
    for number, (margin, label) in enumerate(zip(margins, bins, strict=True)):
        chosen, rejected = (rng.integers(3, 24, 3 + (number + side) % 5).astype(np.int32) for side in (0, 2))
        pairs.append(Comparison(chosen, rejected, margin=margin, degree=number % 5 - 1, safety_bin=label))
    batch = collate([*pairs, blank(pairs[0]), blank(pairs[3])], length=8)
    weights = {"safety_weight": 0.7, "center_weight": 0.2}
    found, metrics = jax.jit(reward_loss(MODEL, FLOAT32, **weights))(model, batch)
    hidden = states(model, batch.tokens.reshape(16, 8), batch.segment_ids.reshape(16, 8)).reshape(8, 2, 8, -1)
    total, right, unsafe, recalled = 0.0, [], 0, 0
    for i, pair in enumerate(pairs):
        scores = [hidden[i, side, len(ids) - 1] @ np.asarray(model["reward_head"]["kernel"], np.float64)
                  for side, ids in enumerate((pair.chosen, pair.rejected))]  # fmt: skip
        total += -np.log(sigmoid(scores[0] - scores[1] - pair.margin)) + 0.2 * sum(scores) ** 2
        right.append(scores[0] > scores[1])
        for score, safe in zip(scores, SAFE.get(pair.safety_bin, ())):
            total += 0.7 * -np.log(sigmoid(score if safe else -score)) / 2
            unsafe, recalled = unsafe + (not safe), recalled + (not safe and score < 0)
    assert float(found.weight) == 6 and float(found.mean()) == pytest.approx(total / 6, rel=1e-6)
    assert float(metrics["accuracy/all"].mean()) == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
    assert (float(metrics["unsafe_recall"].weight), float(metrics["unsafe_recall"].sum)) == (unsafe, recalled)


# A rollout of six responses: two of the safety track, lengths from one token to all, two that did not end.
RULE = RewardRule(
    beta=9.0, gamma=0.9, lam=0.8, safety_threshold=0.4, missing_eos_penalty=0.7, temperature=0.8, model_weight=1.5,
    importance_cap=1.1, warm_up=2,
)  # fmt: skip
P, LENGTHS, IS_SAFETY = 4, (6, 3, 1, 5, 6, 2), (True, False, False, True, False, False)
ENDED = (False, True, True, True, False, True)


def rolled_out(rng):
    """(prompts, samples) of random tokens."""
    B, N = len(LENGTHS), max(LENGTHS)
    tokens, valid = pad_left([rng.integers(3, 24, 1 + i % P).tolist() for i in range(B)], P)
    mask = np.arange(N) < np.array(LENGTHS)[:, None]
    drawn = np.where(mask, rng.integers(3, 24, (B, N)), 0)
    drawn[np.arange(B), np.array(LENGTHS) - 1] = np.where(ENDED, 2, 5)
    index = np.arange(B, dtype=np.uint32)
    prompts = PromptBatch(tokens, valid, np.array(IS_SAFETY), index, index.astype(np.int32))
    log_probs = np.where(mask, rng.normal(-2.5, 0.5, (B, N)), 0).astype(np.float32)
    return prompts, Samples(drawn.astype(np.int32), log_probs, mask, np.array(ENDED))


def test_the_judgement_of_a_rollout_is_that_of_the_paper_in_float64():
    """The gate, the inverse sigmoid, whitening, the penalty without EOS, the KL of every token, GAE, whitened advantages."""
    rng, scale, beta = np.random.default_rng(2), ScoreStatistics(0.3, 1.7), 0.15
    models = {"policy": tree("lm_head", 0), "critic": tree("value_head", 1)}
    frozen = {"reference": tree("lm_head", 2), "helpfulness": tree("reward_head", 3), "safety": tree("reward_head", 4)}
    (prompts, samples), other = rolled_out(rng), rng.normal(0, 0.5, len(LENGTHS)).astype(np.float32)
    judge = make_judge(MODEL, FLOAT32, RULE, scale)
    on_device = jax.tree.map(jnp.asarray, (prompts, samples, OtherScores(other, {"own": 2 * other})))
    rollout, metrics = jax.device_get(judge(models, frozen, *on_device, np.float32(beta)))

    tokens = np.concatenate([prompts.tokens, samples.tokens], axis=1)
    segment_ids = np.concatenate([prompts.valid, samples.mask], axis=1).astype(np.int32)

    def log_probs(model):  # [B, N]
        logits = states(model, tokens, segment_ids)[:, P - 1 : -1] @ np.asarray(model["lm_head"]["kernel"], np.float64)
        logits /= RULE.temperature
        normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(normal, samples.tokens[..., None], axis=2)[..., 0]

    def scalars(model, head):  # [B, S]
        return states(model, tokens, segment_ids) @ np.asarray(model[head]["kernel"], np.float64)

    old, initial = log_probs(models["policy"]), log_probs(frozen["reference"])
    values = (scalars(models["critic"], "value_head")[:, P - 1 : -1] - scale.mean) / scale.std
    last = [P + length - 1 for length in LENGTHS]
    helpful, safe = (scalars(frozen[name], "reward_head")[range(6), last] for name in ("helpfulness", "safety"))
    combined = [
        sigmoid(s) if track or sigmoid(s) < RULE.safety_threshold else sigmoid(h)
        for h, s, track in zip(helpful, safe, IS_SAFETY, strict=True)
    ]
    gated = [r == sigmoid(s) for r, s in zip(combined, safe)]
    assert any(gated[i] for i in range(6) if not IS_SAFETY[i]) and not all(gated)  # the gate acts, and lets through
    score = np.array([RULE.model_weight * np.log(r / (1 - r)) + o for r, o in zip(combined, other)])
    score = (score - score.mean()) / score.std() - np.where(ENDED, 0, RULE.missing_eos_penalty)

    advantages = np.zeros(samples.mask.shape)
    for i, length in enumerate(LENGTHS):
        following = 0.0
        for t in reversed(range(length)):
            reward = -beta * (old[i, t] - initial[i, t]) + (score[i] if t == length - 1 else 0.0)
            after = values[i, t + 1] if t + 1 < length else 0.0
            following = reward + RULE.gamma * after - values[i, t] + RULE.gamma * RULE.lam * following
            advantages[i, t] = following
    inside = advantages[samples.mask]
    whitened = np.where(samples.mask, (advantages - inside.mean()) / inside.std(), 0)
    ratio = np.minimum(np.exp(old - samples.log_probs), RULE.importance_cap)
    expected = {
        "log_probs": np.where(samples.mask, old, 0), "values": np.where(samples.mask, values, 0), "advantages": whitened,
        "returns": np.where(samples.mask, advantages + values, 0), "importance": np.where(samples.mask, ratio, 1),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(rollout, name), value, rtol=2e-6, atol=2e-6, err_msg=name)
    assert rollout.warm_up.tolist() == [True] * 2 + [False] * 4
    kl = np.where(samples.mask, old - initial, 0).sum(axis=1)
    assert metrics["kl"] == pytest.approx(kl.mean(), rel=1e-5)
    assert metrics["score/own"] == pytest.approx(2 * other.mean()) == 2 * metrics["score/other"]
    before = RULE.model_weight * np.log(np.divide(combined, np.subtract(1, combined))) + other
    assert (metrics["reward"], metrics["reward_std"]) == pytest.approx((before.mean(), before.std()), rel=1e-5)
    after = (metrics["reward_after_kl"], metrics["reward_after_kl_std"])
    assert after == pytest.approx((np.mean(score - beta * kl), np.std(score - beta * kl)), rel=1e-5)
