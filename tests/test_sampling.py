"""Drawing tokens and generating: hand-computed choices, and the sampler against the model's own forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import heads, params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.model.transformer import hidden_states
from llama_jax.sampling.choose import draw, top_p_filter
from llama_jax.sampling.generate import generate, make_sampler, pad_left, row_keys

MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=24, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=32
)
SPECS = params.table(MODEL, head="lm_head")
TREE = jax.tree.map(lambda x: 4 * x, params.init(SPECS, jax.random.key(0)))
EOS = 2


def sampler(temperature=1.0, new=8, top_p=1.0):
    return make_sampler(
        MODEL, SPECS, compute=FLOAT32, eos_id=EOS, max_new_tokens=new, temperature=temperature, top_p=top_p
    )


def test_top_p_keeps_the_token_that_crosses_the_border():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = np.asarray(top_p_filter(logits, 0.6)[0]) > -1e20
    assert kept.tolist() == [True, True, False, False]
    assert (np.asarray(top_p_filter(logits, 0.0)[0]) > -1e20).tolist() == [True, False, False, False]


def test_draws_follow_the_distribution_at_a_temperature():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.6, 0.3, 0.1])), (20_000, 3))
    tokens, log_p = draw(logits, jax.random.split(jax.random.key(0), 20_000), temperature=0.5)
    expected = np.array([0.36, 0.09, 0.01]) / 0.46
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / 20_000, expected, atol=0.01)
    np.testing.assert_allclose(log_p, np.log(expected)[np.asarray(tokens)], rtol=1e-5)
    greedy, _ = draw(logits[:2], jax.random.split(jax.random.key(0), 2), temperature=0)
    assert greedy.tolist() == [0, 0]


def test_log_probs_of_the_sampler_are_those_of_the_trainer():
    prompts = [[1, 5, 7], [1, 9, 3, 4, 8, 11]]
    tokens, valid = pad_left(prompts, 6)
    samples = sampler(temperature=0.7)(TREE, tokens, valid, row_keys(0, [0, 1]))
    whole = jnp.concatenate([tokens, samples.tokens], axis=1)
    segments = jnp.concatenate([valid, samples.mask], axis=1).astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    hidden = hidden_states(TREE, whole, segments, positions, config=MODEL, compute=FLOAT32)[:, 5:-1]
    expected, _ = heads.log_probabilities(TREE, hidden, samples.tokens, temperature=0.7, compute=FLOAT32)
    np.testing.assert_allclose(samples.log_probs, jnp.where(samples.mask, expected, 0), atol=2e-5)


def test_greedy_decoding_equals_repeated_forward_passes():
    tokens, valid = pad_left([[1, 5, 7]], 5)
    samples = sampler(temperature=0)(TREE, tokens, valid, row_keys(0, [0]))
    sequence = [1, 5, 7]
    for _ in range(8):
        row = jnp.array([sequence])
        hidden = hidden_states(
            TREE, row, jnp.ones_like(row), jnp.arange(len(sequence))[None], config=MODEL, compute=FLOAT32
        )
        sequence.append(int(jnp.argmax(heads.logits(TREE, hidden, compute=FLOAT32)[0, -1])))
        if sequence[-1] == EOS:
            break
    assert samples.tokens[0][samples.mask[0]].tolist() == sequence[3:]


def test_responses_end_with_eos_and_nothing_follows_it():
    tokens, valid = pad_left([[1, 4]] * 64, 4)
    samples = jax.device_get(sampler(new=12)(TREE, tokens, valid, row_keys(1, range(64))))
    assert 0 < samples.ended.sum() < 64  # both kinds occur
    for row in range(64):
        response = samples.tokens[row][samples.mask[row]]
        assert (response == EOS).sum() == samples.ended[row]
        assert not samples.ended[row] or response[-1] == EOS
        assert not samples.tokens[row][~samples.mask[row]].any()


def test_batching_does_not_change_what_is_drawn():
    prompts = [[1, i] for i in range(3, 10)]
    results = [
        generate(sampler(), TREE, prompts, prompt_length=4, batch_size=size, seed=7) for size in (2, 4, 7)
    ]
    assert results[0] == results[1] == results[2]


def test_a_prompt_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="prompt 1: expected 1 to 3 tokens, got 4"):
        pad_left([[1], [1, 2, 3, 4]], 3)
