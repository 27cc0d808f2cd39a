"""Continuous batching: the static sampler's tokens whatever the traffic, no compilation after warm-up, reuse, cancelling."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llama_jax.model import params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.model.decode import prepare
from llama_jax.parallel.axes import TRAIN, shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine, EngineConfig
from llama_jax.sampling.generate import generate, make_sampler

MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=24, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=64
)
SPECS = params.table(MODEL, head="lm_head")
TREE = jax.tree.map(lambda x: 4 * x, params.init(SPECS, jax.random.key(0)))
EOS = 2
SETTINGS = EngineConfig(slots=4, max_length=40, chunks=((4, 3), (8, 1)), steps=3, reuse=0)
RNG = np.random.default_rng(0)
PROMPTS = [[1, *RNG.integers(3, 24, size=n).tolist()] for n in (2, 9, 4, 1, 19, 7, 3, 12, 5, 2, 8, 1)]


@pytest.fixture(scope="module")
def weights():
    return prepare(TREE, SPECS, compute=FLOAT32)


@pytest.fixture(scope="module")
def engine(weights):
    return Engine(MODEL, weights, SETTINGS, compute=FLOAT32).warm_up()


@pytest.fixture(scope="module")
def expected():
    """What the static sampler draws for PROMPTS with seed 3."""
    sampler = make_sampler(MODEL, SPECS, compute=FLOAT32, eos_id=EOS, max_new_tokens=10, temperature=1.0)
    return generate(sampler, TREE, PROMPTS, prompt_length=20, batch_size=6, seed=3)


def submit(engine, prompts=PROMPTS, **changes):
    how = {"max_tokens": 10, "seed": 3, "stop_ids": (EOS,), **changes}
    return [engine.submit(prompt, index=i, **how) for i, prompt in enumerate(prompts)]


def test_any_traffic_gives_the_tokens_of_the_static_sampler_and_compiles_nothing(engine, expected):
    compiled = engine.compilations
    finished = []
    requests = engine.run(submit(engine), progress=finished.append)
    assert [request.tokens for request in requests] == expected
    assert {request.finish for request in requests} == {"stop", "length"}
    assert all((request.finish == "stop") == (request.tokens[-1] == EOS) for request in requests)
    assert sum(finished) == len(PROMPTS)
    # In another order, some of them late.
    order = np.random.default_rng(1).permutation(len(PROMPTS))
    late = {}
    for i in order:
        late[i] = engine.submit(PROMPTS[i], index=int(i), max_tokens=10, seed=3, stop_ids=(EOS,))
        if i % 3 == 0:
            engine.step()
    engine.run(late.values())
    assert [late[i].tokens for i in range(len(PROMPTS))] == expected
    assert engine.compilations == compiled > 0  # engines of other shapes in this process count too


def test_log_probs_do_not_depend_on_the_neighbours_bitwise(engine):
    def log_probs(around):
        before = submit(engine, around, seed=9)
        (request,) = submit(engine, [PROMPTS[4]])
        engine.run([*before, request])
        return np.array(request.log_probs, np.float32).tobytes()

    assert log_probs([]) == log_probs(PROMPTS[:3]) == log_probs(PROMPTS[5:])


def test_a_known_beginning_is_taken_over(weights, expected):
    engine = Engine(MODEL, weights, dataclasses.replace(SETTINGS, reuse=3), compute=FLOAT32).warm_up()
    compiled = engine.compilations
    # K answers to one prompt: computed once, though they arrive together.
    answers = engine.run([engine.submit(PROMPTS[4], index=i, max_tokens=6, seed=3) for i in range(6)])
    assert engine.prefilled_tokens == len(PROMPTS[4]) + 5
    alone = Engine(MODEL, weights, SETTINGS, compute=FLOAT32)
    for i, answer in enumerate(answers):
        (request,) = alone.run([alone.submit(PROMPTS[4], index=i, max_tokens=6, seed=3)])
        assert request.tokens == answer.tokens
        np.testing.assert_allclose(request.log_probs, answer.log_probs, atol=2e-5)
    # A dialog goes on: question and answer are there already.
    dialog = [*PROMPTS[4], *answers[-1].tokens, 5, 7]
    (turn,) = engine.run([engine.submit(dialog, max_tokens=4)])
    assert turn.reused == len(PROMPTS[4]) + 5  # the last token drawn never entered the cache
    (again,) = alone.run([alone.submit(dialog, max_tokens=4)])
    assert again.tokens == turn.tokens
    assert [request.tokens for request in engine.run(submit(engine))] == expected
    assert engine.compilations == compiled


def test_eight_bits_change_little(weights):
    """Weights and cache in int8: the log-probabilities of forced tokens stay close, and the state is that much smaller."""
    small = prepare(TREE, SPECS, compute=FLOAT32, int8=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(small))
    assert size < 0.4 * sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    settings = dataclasses.replace(SETTINGS, int8_cache=True)
    plain = Engine(MODEL, weights, SETTINGS, compute=FLOAT32)
    rounded = Engine(MODEL, small, settings, compute=FLOAT32)
    log_probs = []
    for engine in (plain, rounded):
        # The first token after each prompt: one that is forced by the key, where the two agree on it.
        requests = engine.run(submit(engine, max_tokens=1))
        log_probs.append({(i, request.tokens[0]): request.log_probs[0] for i, request in enumerate(requests)})
    same = log_probs[0].keys() & log_probs[1].keys()
    assert len(same) >= 10
    differences = np.array([abs(log_probs[0][key] - log_probs[1][key]) for key in same])
    assert 0 < differences.max() < 0.2


def test_tokens_stream_as_they_are_drawn_and_a_callback_may_cancel(engine, expected):
    seen = []

    def stop_after_three(request, token):
        seen.append(token)
        if len(seen) == 3:
            engine.cancel(request)

    longest = max(range(len(PROMPTS)), key=lambda i: len(expected[i]))
    cancelled = engine.submit(
        PROMPTS[longest], index=longest, max_tokens=10, seed=3, stop_ids=(EOS,), on_token=stop_after_three
    )
    others = submit(engine)
    engine.run(others)
    assert cancelled.finish == "cancelled" and cancelled.tokens == seen == expected[longest][:3]
    assert [request.tokens for request in others] == expected
    waiting = [engine.submit([1, 2], max_tokens=30) for _ in range(6)]
    engine.step()
    engine.cancel(waiting[0])
    engine.cancel(waiting[-1])
    engine.run(waiting)
    assert [request.finish for request in waiting] == ["cancelled", *["length"] * 4, "cancelled"]
    assert not waiting[-1].tokens and not engine.step() and engine.active == 0


def test_requests_have_settings_of_their_own(engine):
    settings = [
        Choice(temperature=0.0), Choice(temperature=2.0), Choice(top_k=2), Choice(top_p=0.5, min_p=0.05),
        Choice(temperature=0.0, repetition_penalty=1e6),
    ]  # fmt: skip
    together = engine.run([engine.submit([1, 5, 7], max_tokens=12, choice=choice) for choice in settings])
    for request, choice in zip(together, settings):
        (alone,) = engine.run([engine.submit([1, 5, 7], max_tokens=12, choice=choice)])
        assert alone.tokens == request.tokens
    whole = [1, 5, 7, *together[-1].tokens]
    assert len(set(whole)) == len(whole)


def test_what_does_not_fit_is_refused(engine, weights):
    with pytest.raises(ValueError, match="prompt: has 31 tokens; expected 1 to 30, since the context of 40 also holds"):
        engine.submit([1] * 31, max_tokens=10)
    with pytest.raises(ValueError, match="prompt: has 0 tokens"):
        engine.submit([], max_tokens=10)
    with pytest.raises(ValueError, match=r"ids in 0..23, got 1..24"):
        engine.submit([1, 24], max_tokens=10)
    with pytest.raises(ValueError, match="top_p: expected above 0"):
        engine.submit([1], max_tokens=10, choice=Choice(top_p=0.0))
    with pytest.raises(ValueError, match="max_length 65 exceeds the model's context of 64"):
        Engine(MODEL, weights, EngineConfig(max_length=65), compute=FLOAT32)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 1, 1, 4)])
def test_several_devices_give_the_tokens_of_one(expected, sizes):
    mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        tree = jax.device_put(TREE, shardings(SPECS, mesh, TRAIN))
        spread = jax.jit(lambda tree: prepare(tree, SPECS, compute=FLOAT32))(tree)
        engine = Engine(MODEL, spread, SETTINGS, compute=FLOAT32).warm_up()
        compiled = engine.compilations
        assert [request.tokens for request in engine.run(submit(engine))] == expected
        assert engine.compilations == compiled > 0  # engines of other shapes in this process count too
