"""Drawing tokens and generating: hand-computed choices, and the sampler against the model's own forward pass."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import heads, params
from llama_jax.model.config import FLOAT32, SIZES, Compute
from llama_jax.model.decode import prepare
from llama_jax.model.transformer import hidden_states
from llama_jax.sampling.choose import (
    Choice,
    count_drawn,
    count_prompt,
    draw,
    inverse_draw,
    min_p_filter,
    penalise,
    top_k_filter,
    top_p_filter,
)
from llama_jax.sampling.generate import generate, make_sampler, pad_left
from llama_jax.sampling.keys import key_data, row_keys, small_seed

MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=24, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=32
)
SPECS = params.table(MODEL, head="lm_head")
TREE = jax.tree.map(lambda x: 4 * x, params.init(SPECS, jax.random.key(0)))
EOS = 2


def sampler(temperature=1.0, new=8, stop_ids=()):
    return make_sampler(
        MODEL, SPECS, compute=FLOAT32, eos_id=EOS, max_new_tokens=new, temperature=temperature, stop_ids=stop_ids
    )


def kept(logits):
    return (np.asarray(logits) > -1e20).tolist()


def test_weights_laid_out_beforehand_draw_the_same():
    tokens, valid = pad_left([[1, 5, 7], [1, 9]], 4)
    sample, keys = sampler(), row_keys(0, range(2))
    ready = prepare(TREE, SPECS, compute=FLOAT32)
    np.testing.assert_array_equal(sample(ready, tokens, valid, keys).tokens, sample(TREE, tokens, valid, keys).tokens)


def test_top_p_keeps_the_token_that_crosses_the_border():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.3, 0.5, 0.05, 0.15])), (4, 4))
    assert kept(top_p_filter(logits, jnp.array([0.6, 0.0, 0.85, 1.0]))) == [
        [True, True, False, False], [False, True, False, False], [True, True, False, True], [True] * 4,
    ]  # fmt: skip


def test_top_k_min_p_and_repetition_penalty_by_hand():
    logits = jnp.broadcast_to(jnp.array([0.5, -2.0, 3.0, 1.0]), (3, 4))
    assert kept(top_k_filter(logits, jnp.array([1, 2, 0]))) == [
        [False, False, True, False], [False, False, True, True], [True] * 4,
    ]  # fmt: skip
    # exp(1 - 3) = 0.135, exp(0.5 - 3) = 0.082
    assert kept(min_p_filter(logits, jnp.array([0.0, 0.1, 0.5]))) == [
        [True] * 4, [False, False, True, True], [False, False, True, False],
    ]  # fmt: skip
    seen = count_prompt(jnp.zeros((3, 4), jnp.int32), jnp.array([[1, 0, 3, 1]] * 3), jnp.array([[True, True, False, True]] * 3))
    assert seen.tolist() == [[1, 1, 0, 0]] * 3
    lowered = penalise(logits, seen, Choice(repetition_penalty=jnp.array([1.0, 2.0, 4.0])).rows(3))
    np.testing.assert_allclose(lowered[:, :2], [[0.5, -2.0], [0.25, -4.0], [0.125, -8.0]])
    np.testing.assert_array_equal(lowered[:, 2:], logits[:, 2:])


def test_presence_and_frequency_count_what_was_drawn_by_hand():
    logits = jnp.broadcast_to(jnp.array([0.5, -2.0, 3.0, 1.0]), (3, 4))
    counts = count_prompt(jnp.zeros((3, 4), jnp.int32), jnp.array([[0, 1]] * 3), jnp.ones((3, 2), bool))
    for token in (1, 2, 2, 2):  # the last row has ended
        counts = count_drawn(counts, jnp.full(3, token), jnp.array([True, True, False]))
    choice = Choice(presence_penalty=jnp.array([0.5, 0.0, 1.0]), frequency_penalty=jnp.array([0.0, -0.25, 1.0]))
    expected = [[0.5, -2.5, 2.5, 1.0], [0.5, -1.75, 3.75, 1.0], [0.5, -2.0, 3.0, 1.0]]  # the prompt's own tokens: as they were
    np.testing.assert_allclose(penalise(logits, counts, choice.rows(3)), expected)


@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
def test_filters_without_a_sort_equal_those_with_one(spread):
    logits = spread * np.random.default_rng(0).normal(size=(64, 501)).astype(np.float32)
    ranked = -np.sort(-logits.astype(np.float64), axis=1)
    k = np.arange(1, 65) * 7
    np.testing.assert_array_equal(
        top_k_filter(jnp.asarray(logits), jnp.asarray(k)) > -1e20, logits >= ranked[np.arange(64), k - 1][:, None]
    )
    p = np.linspace(0.01, 0.99, 64).astype(np.float32)
    mass = np.exp(ranked - ranked[:, :1])
    mass /= mass.sum(axis=1, keepdims=True)
    before = np.cumsum(mass, axis=1) - mass
    border = np.min(np.where(before <= p[:, None], ranked, np.inf), axis=1)
    np.testing.assert_array_equal(top_p_filter(jnp.asarray(logits), jnp.asarray(p)) > -1e20, logits >= border[:, None])


def test_draws_follow_the_distribution_at_a_temperature():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.6, 0.3, 0.1])), (20_000, 3))
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = draw(logits, keys, Choice(temperature=0.5))
    tokens, expected = np.asarray(drawn.tokens), np.array([0.36, 0.09, 0.01]) / 0.46
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / 20_000, expected, atol=0.01)
    np.testing.assert_allclose(drawn.log_probs, np.log(expected)[tokens], rtol=1e-5)
    np.testing.assert_allclose(drawn.model_log_probs, np.log([0.6, 0.3, 0.1])[tokens], rtol=1e-5)


def test_keys_are_those_of_seed_and_number_in_any_company():
    key = jax.random.key(7)
    expected = [jax.random.key_data(jax.random.fold_in(key, i)).tolist() for i in (0, 3, 150)]
    assert key_data(7, range(151))[[0, 3, 150]].tolist() == key_data(7, [0, 3, 150]).tolist() == expected
    assert jax.random.key_data(row_keys(7, [0, 3, 150])).tolist() == expected and key_data(7, []).shape == (0, 2)
    # Seeds of 64 bits are no less different than small ones.
    assert small_seed(2**31 - 1) == 2**31 - 1
    large = [small_seed(seed) for seed in (-1, 2**31, 2**32, 2**32 + 1, -(2**63), 2**63 - 1)]
    assert len({0, 1, *large}) == 8 and all(0 <= seed < 2**31 for seed in large)
    for wrong in (2**63, 1.5, True, "1"):
        with pytest.raises(ValueError, match="seed: expected an integer of 64 bits, got "):
            small_seed(wrong)


def test_the_inverse_of_the_cumulative_distribution_by_hand():
    """Tokens without mass are never drawn, at neither end, wherever the blocks of the sum lie."""
    logits = np.full((5, 300), -1e30, np.float32)
    for row, tokens in enumerate(([7], [299], [127, 128], [0, 150, 299], [5, 6])):
        logits[row, tokens] = 0.0
    almost_one = np.nextafter(np.float32(1), np.float32(0))
    for uniform, expected in (
        (0.0, [7, 299, 128, 299, 6]), (0.4, [7, 299, 128, 150, 6]), (0.6, [7, 299, 127, 150, 5]),
        (almost_one, [7, 299, 127, 0, 5]),
    ):  # fmt: skip
        tokens, log_normaliser = inverse_draw(jnp.asarray(logits), jnp.full(5, uniform, jnp.float32))
        np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(log_normaliser, np.log([1, 1, 2, 3, 2]), rtol=1e-6)


def test_draws_are_those_of_a_sum_in_float64():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 5000)).astype(np.float32) * 3
    uniform = rng.random(64).astype(np.float32)
    cumulative = np.cumsum(np.exp(logits.astype(np.float64)), axis=1)
    expected = np.sum(cumulative < (1 - uniform[:, None].astype(np.float64)) * cumulative[:, -1:], axis=1)
    np.testing.assert_array_equal(inverse_draw(jnp.asarray(logits), jnp.asarray(uniform))[0], expected)


def test_every_row_has_settings_of_its_own():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.6, 0.3])), (2000, 3))
    keys = jax.random.split(jax.random.key(1), 2000)
    third = jnp.arange(2000) % 3  # greedy, the two likeliest, everything but the likeliest seen
    choice = Choice(
        temperature=jnp.where(third == 0, 0.0, 1.0), top_k=jnp.where(third == 1, 2, 0),
        repetition_penalty=jnp.where(third == 2, 1e4, 1.0),
    )  # fmt: skip
    seen = jnp.broadcast_to(jnp.array([1, 0, 1]), (2000, 3))
    drawn = jax.jit(draw)(logits, keys, choice, counts=seen)
    tokens, log_p = drawn.tokens, drawn.log_probs
    drawn = [set(np.asarray(tokens[third == i]).tolist()) for i in range(3)]
    assert drawn == [{1}, {1, 2}, {1}]
    np.testing.assert_allclose(log_p[third == 0], np.log(0.6), rtol=1e-6)
    np.testing.assert_allclose(np.unique(log_p[third == 1]), np.log([1 / 3, 2 / 3]), rtol=1e-5)


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", 10**40), ("top_k", -1),
    ("top_k", 1.5), ("top_k", float("inf")), ("top_k", float("nan")), ("top_k", 2**31), ("top_p", 0.0), ("top_p", 1.1),
    ("min_p", 2.0), ("repetition_penalty", 0.0), ("presence_penalty", -2.5), ("frequency_penalty", 3.0),
])  # fmt: skip
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value}"):
        dataclasses.replace(Choice(), **{field: value}).check()


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


def test_other_stops_end_a_response_too():
    tokens, valid = pad_left([[1, 4]] * 64, 4)
    keys = row_keys(1, range(64))
    plain = jax.device_get(sampler(new=12)(TREE, tokens, valid, keys))
    stopped = jax.device_get(sampler(new=12, stop_ids=(5, 9))(TREE, tokens, valid, keys))
    for row in range(64):
        response = plain.tokens[row][plain.mask[row]].tolist()
        stop = next((i for i, token in enumerate(response) if token in (EOS, 5, 9)), len(response))
        assert stopped.tokens[row][stopped.mask[row]].tolist() == response[: stop + 1]
        assert stopped.ended[row] == (stop < len(response))


def test_a_row_does_not_depend_on_its_neighbours_bitwise():
    run, prompt, key = sampler(new=10), [1, 5, 7, 11, 3], row_keys(0, [3])[0]
    found = []
    for row, seed in ((0, 1), (2, 5), (7, 9)):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(3, 24, size=rng.integers(1, 9)).tolist() for _ in range(8)]
        prompts[row] = prompt
        tokens, valid = pad_left(prompts, 8)
        samples = jax.device_get(run(TREE, tokens, valid, row_keys(seed, range(8)).at[row].set(key)))
        found.append((samples.tokens[row].tolist(), samples.log_probs[row].tobytes()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("matmul", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_token_copies_neither_the_cache_nor_a_matrix_nor_widens_one(rows, matmul):
    """Each of the three was in the program of a single row once, and cost at least a seventh of its time."""
    compute = Compute(matmul, "float32")
    sample = make_sampler(MODEL, SPECS, compute=compute, eos_id=EOS, max_new_tokens=8, temperature=0.0)
    ready = jax.eval_shape(lambda tree: prepare(tree, SPECS, compute=compute), TREE)
    tokens, valid = pad_left([[1, 5, 7]] * rows, 8)
    text = sample.lower(ready, tokens, valid, row_keys(0, range(rows))).compile().as_text()
    loop = re.search(r"body=(%[\w.-]+)", text)[1]
    body = next(part for part in re.split(r"\n(?=%|ENTRY)", text) if part.startswith(f"{loop} "))
    assert body.count("\n") > 100
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|convert)\(", body) + re.findall(
        r"%(?:copy|transpose|convert)[\w.-]* = \w+\[([\d,]+)\]", body
    )
    H, K, E, S, D = MODEL.heads, MODEL.kv_heads, MODEL.head_size, 15, MODEL.width
    large = {f"{rows},{K},{E},{S}", f"{rows},{K},{S},{E}", f"{H * E},{D}", f"{D},{H * E}", f"{H},{E},{D}"}
    assert not large & set(moved)
    if matmul == "bfloat16":  # the loop's own matrices are those that it was given
        assert f"bf16[{MODEL.width},{MODEL.ffn}]" in body and f"f32[{MODEL.width},{MODEL.ffn}]" not in body


def test_padding_changes_nothing_but_rounding():
    found = []
    for padding in (0, 11):
        tokens, valid = pad_left([[1, 5, 7, 11, 3], [1, 4]], 5 + padding)
        found.append(jax.device_get(sampler(new=10)(TREE, tokens, valid, row_keys(0, [0, 1]))))
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].log_probs, found[1].log_probs, atol=2e-5)


def test_rows_with_their_own_settings_equal_those_run_alone():
    prompts = [[1, 5, 7], [1, 9], [1, 5, 3, 3], [1, 4]]
    rows = [
        Choice(temperature=0.0), Choice(temperature=1.5, top_k=4), Choice(top_p=0.7),
        Choice(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=1.0, min_p=0.1),
    ]  # fmt: skip
    tokens, valid = pad_left(prompts, 4)
    run = sampler(new=10)

    def stack(*values):
        return jnp.asarray(values)

    together = run(TREE, tokens, valid, row_keys(5, range(4)), jax.tree.map(stack, *rows))
    for row, choice in enumerate(rows):
        alone = run(TREE, tokens, valid, row_keys(5, range(4)), jax.tree.map(stack, *[choice] * 4))
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[row])
        np.testing.assert_array_equal(together.log_probs[row], alone.log_probs[row])


def test_the_repetition_penalty_sees_prompt_and_response():
    tokens, valid = pad_left([[1, 5, 7]], 3)
    penalty = Choice(temperature=jnp.zeros(1), repetition_penalty=jnp.full(1, 1e6))
    samples = sampler(new=10)(TREE, tokens, valid, row_keys(0, [0]), penalty)
    whole = [1, 5, 7, *samples.tokens[0][samples.mask[0]].tolist()]
    assert len(whole) > 5 and len(set(whole)) == len(whole)


def test_batching_does_not_change_what_is_drawn():
    prompts = [[1, i] for i in range(3, 10)]
    results = [
        generate(sampler(), TREE, prompts, prompt_length=4, batch_size=size, seed=7) for size in (2, 4, 7)
    ]
    assert results[0] == results[1] == results[2]


def test_a_prompt_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="prompt 1: expected 1 to 3 tokens, got 4"):
        pad_left([[1], [1, 2, 3, 4]], 3)
