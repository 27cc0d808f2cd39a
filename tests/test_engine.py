"""Continuous batching: the static sampler's tokens whatever the traffic, no compilation after warm-up, reuse, cancelling."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import heads, params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.model.decode import prepare, row_logits
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel.axes import TRAIN, shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.sampling.answers import Answerer
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.generate import generate, make_sampler
from llama_jax.sampling.prompt_scores import PromptScorer
from llama_jax.sampling.request import EngineConfig

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


def test_any_traffic_gives_the_tokens_of_the_static_sampler_and_compiles_nothing(engine, expected, compiled):
    before, programs = compiled(), engine.compilations
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
    assert engine.compilations == programs > 0 and compiled() == before  # nothing else compiled either


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
    assert engine.prefilled_tokens == len(PROMPTS[4]) - 1
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


def test_dialogs_under_one_system_message_keep_a_slot_each(weights):
    settings = EngineConfig(slots=3, max_length=64, chunks=((8, 1),), steps=3, reuse=4)
    engine = Engine(MODEL, weights, settings, compute=FLOAT32).warm_up()
    dialogs = [[*PROMPTS[1], 5], [*PROMPTS[1], 7]]
    for turn in range(3):
        for dialog in dialogs:
            (request,) = engine.run([engine.submit(dialog, max_tokens=8)])
            # All but what is new: the last token drawn, which never entered the cache, and what was asked since.
            assert turn == 0 or request.reused == len(dialog) - 4
            assert turn or dialog is dialogs[0] or request.reused == len(PROMPTS[1])
            dialog += [*request.tokens, 3, 4, 6]


def test_whole_prompts_are_computed_once_beside_the_slots(weights, expected):
    settings = dataclasses.replace(SETTINGS, whole=((6, 3), (12, 2)))
    engine = Engine(MODEL, weights, settings, compute=FLOAT32).warm_up()
    compiled = engine.compilations
    # PROMPTS[4] is longer than all whole shapes and enters in chunks.
    assert [request.tokens for request in engine.run(submit(engine))] == expected
    engine.prefilled_tokens = 0
    asked = [(prompt, i) for i in range(5) for prompt in PROMPTS[:4]]
    drawn = engine.run([engine.submit(prompt, index=i, max_tokens=6, seed=3) for prompt, i in asked])
    assert engine.prefilled_tokens == sum(len(prompt) - 1 for prompt in PROMPTS[:4])
    for (prompt, i), request in zip(asked, drawn):  # bitwise what it draws alone
        (alone,) = engine.run([engine.submit(prompt, index=i, max_tokens=6, seed=3)])
        assert (alone.tokens, alone.log_probs) == (request.tokens, request.log_probs)
    # A request that waits beside the slots can be cancelled.
    some = [engine.submit(PROMPTS[1], index=i, max_tokens=6) for i in range(9)]
    engine.step()
    assert some[-1].slot < 0 and engine.queued
    engine.cancel(some[-1])
    engine.run(some)
    assert [request.finish for request in some] == [*["length"] * 8, "cancelled"] and not engine.step()
    assert engine.compilations == compiled


def test_answers_do_not_depend_on_what_is_asked_beside_them(expected, compiled):
    answerer = Answerer(TREE, MODEL, compute=FLOAT32, prompt_length=20, new_tokens=10, eos_id=EOS, slots=4)
    told = []
    before = compiled()
    answers = answerer(PROMPTS, choice=Choice(), seed=3, progress=told.append)
    assert [answer.tokens for answer in answers] == expected and sum(told) == len(PROMPTS)
    assert [answer.ended for answer in answers] == [tokens[-1] == EOS for tokens in expected]
    for number in (1, 5, len(PROMPTS)):
        assert answerer(PROMPTS[:number], choice=Choice(), seed=3) == answers[:number]
    assert compiled() == before
    for answer, forced in zip(answers, teacher_forced(answers), strict=True):
        np.testing.assert_allclose(answer.log_probs, forced, atol=5e-5)
    # Another model of the same shape compiles nothing.
    other = Answerer(
        jax.tree.map(lambda x: -x, TREE), MODEL, compute=FLOAT32, prompt_length=20, new_tokens=10, eos_id=EOS, slots=4
    )
    assert other(PROMPTS, choice=Choice(), seed=3) != answers
    assert answerer.compilations_after_warm_up == other.compilations_after_warm_up == 0
    with pytest.raises(ValueError, match="prompt: has 21 tokens; expected 1 to 20"):
        answerer([[1] * 21], choice=Choice(), seed=3)


def teacher_forced(answers):
    """Log-probabilities of answers to PROMPTS by the trainer's forward pass."""
    rows = np.zeros((len(PROMPTS), 30), np.int32)
    for row, prompt, answer in zip(rows, PROMPTS, answers, strict=True):
        row[: len(prompt) + len(answer.tokens)] = [*prompt, *answer.tokens]
    positions = jnp.broadcast_to(jnp.arange(30), rows.shape)
    hidden = hidden_states(TREE, rows, jnp.ones_like(rows), positions, config=MODEL, compute=FLOAT32)
    log_p = np.asarray(jax.nn.log_softmax(heads.logits(TREE, hidden, compute=FLOAT32)))
    return [
        row[np.arange(len(answer.tokens)) + len(prompt) - 1, answer.tokens]
        for row, prompt, answer in zip(log_p, PROMPTS, answers, strict=True)
    ]


@pytest.mark.parametrize(
    "choice",
    [
        Choice(temperature=0.5), Choice(top_p=0.3), Choice(top_k=1), Choice(temperature=0.0, repetition_penalty=1.5),
        Choice(frequency_penalty=1.0), Choice(),
    ],  # fmt: skip
)
def test_the_models_own_log_probs_are_the_teacher_forced_ones_whatever_was_drawn_from(engine, choice):
    requests = engine.run(submit(engine, choice=choice))
    for request, forced in zip(requests, teacher_forced(requests), strict=True):
        np.testing.assert_allclose(request.model_log_probs, forced, atol=5e-5)
    same = all(request.log_probs == request.model_log_probs for request in requests)
    assert same == (choice == Choice())


def test_the_most_likely_tokens_come_where_they_are_asked_for(weights):
    engine = Engine(MODEL, weights, dataclasses.replace(SETTINGS, alternatives=3), compute=FLOAT32).warm_up()
    programs = engine.compilations
    asked, plain = (engine.submit(PROMPTS[4], max_tokens=8, seed=3, alternatives=n) for n in (2, 0))
    engine.run([asked, plain])
    assert asked.tokens == plain.tokens and not plain.most_likely and engine.compilations == programs
    row = np.array([[*PROMPTS[4], *asked.tokens]])
    positions = jnp.arange(row.shape[1])[None]
    hidden = hidden_states(TREE, row, jnp.ones_like(row), positions, config=MODEL, compute=FLOAT32)
    log_p = np.asarray(jax.nn.log_softmax(heads.logits(TREE, hidden, compute=FLOAT32)))[0, len(PROMPTS[4]) - 1 : -1]
    for found, expected in zip(asked.most_likely, log_p, strict=True):
        best = np.argsort(-expected)[:2]
        assert [token for token, _ in found] == best.tolist()
        np.testing.assert_allclose([p for _, p in found], expected[best], atol=5e-5)
    with pytest.raises(ValueError, match="alternatives: expected 0 to 3 of this engine, got 4"):
        engine.submit([1], max_tokens=1, alternatives=4)


def test_an_answer_that_the_callback_of_another_ends_gets_no_further_token(engine):
    requests, finished = [], engine.finished

    def end_the_other(request, token):
        engine.cancel(requests[1])

    requests += [engine.submit([1, 5], max_tokens=1, on_token=end_the_other), engine.submit([1, 7], max_tokens=1)]
    engine.run(requests)
    assert [(request.finish, len(request.tokens)) for request in requests] == [("length", 1), ("cancelled", 0)]
    assert engine.finished == finished + 2 and not engine.step() and engine.active == 0


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
        Choice(temperature=0.0, frequency_penalty=0.25), Choice(temperature=0.0, repetition_penalty=1e6),
    ]  # fmt: skip
    together = engine.run([engine.submit([1, 5, 7], max_tokens=12, choice=choice) for choice in settings])
    for request, choice in zip(together, settings):
        (alone,) = engine.run([engine.submit([1, 5, 7], max_tokens=12, choice=choice)])
        assert alone.tokens == request.tokens
    whole = [1, 5, 7, *together[-1].tokens]
    assert len(set(whole)) == len(whole)
    # A slot that another request with a penalty had before counts from the beginning.
    assert check_frequency(together[-2].tokens)


def test_any_of_many_stop_ids_ends_an_answer(weights, expected):
    settings = dataclasses.replace(SETTINGS, stops=20)
    engine = Engine(MODEL, weights, settings, compute=FLOAT32).warm_up()
    compiled, (tokens, i) = engine.compilations, max((tokens, i) for i, tokens in enumerate(expected))
    last = tokens[len(tokens) // 2]
    others = [token for token in range(24) if token not in tokens]
    ends = [*others, *others, *others][:19] + [last]
    (request,) = engine.run([engine.submit(PROMPTS[i], index=i, max_tokens=10, seed=3, stop_ids=ends)])
    assert request.tokens == tokens[: tokens.index(last) + 1] and request.finish == "stop"
    with pytest.raises(ValueError, match="stop_ids: expected at most 20 of this engine, got 21"):
        engine.submit([1], max_tokens=10, stop_ids=[*ends, 1])
    assert engine.compilations == compiled


def check_frequency(tokens):
    """Whether greedy tokens are those of the teacher-forced logits less a quarter of their earlier counts."""
    row = jnp.array([[1, 5, 7, *tokens]])
    hidden = hidden_states(
        TREE, row, jnp.ones_like(row), jnp.arange(row.shape[1])[None], config=MODEL, compute=FLOAT32
    )
    scores = np.array(heads.logits(TREE, hidden, compute=FLOAT32))[0, 2:-1]
    for i in range(len(tokens)):
        np.subtract.at(scores[i], tokens[:i], 0.25)
    assert len(set(tokens)) < len(tokens), "no token came twice: frequency was not tested"
    return tokens == scores.argmax(-1).tolist()


def test_what_does_not_fit_is_refused(engine, weights):
    with pytest.raises(ValueError, match="prompt: has 31 tokens; expected 1 to 30, since the context of 40 also holds"):
        engine.submit([1] * 31, max_tokens=10)
    with pytest.raises(ValueError, match="prompt: has 0 tokens"):
        engine.submit([], max_tokens=10)
    with pytest.raises(ValueError, match=r"ids in 0..23, got 1..24"):
        engine.submit([1, 24], max_tokens=10)
    with pytest.raises(ValueError, match="top_p: expected above 0"):
        engine.submit([1], max_tokens=10, choice=Choice(top_p=0.0))
    with pytest.raises(ValueError, match=r"top_k: expected an integer in 0..2147483647, got 1099511627776"):
        engine.submit([1], max_tokens=10, choice=Choice(top_k=2**40))
    for wrong in (2**40, 24, -1):
        with pytest.raises(ValueError, match=rf"stop_ids: expected ids in 0..23, got \[2, {wrong}\]"):
            engine.submit([1], max_tokens=10, stop_ids=(2, wrong))
    with pytest.raises(ValueError, match="max_length 65 exceeds the model's context of 64"):
        Engine(MODEL, weights, EngineConfig(max_length=65), compute=FLOAT32)


def drawn_in_int8(weights):
    engine = Engine(MODEL, weights, dataclasses.replace(SETTINGS, int8_cache=True), compute=FLOAT32).warm_up()
    compiled = engine.compilations
    tokens = [request.tokens for request in engine.run(submit(engine))]
    assert engine.compilations == compiled
    assert {leaf.dtype for leaf in jax.tree.leaves(engine._slots.cache.layers) if leaf.ndim == 4} == {jnp.dtype("int8")}
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 1, 1, 4)])
def test_several_devices_give_the_tokens_of_one_in_8_bits_too(expected, sizes):
    mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        tree = jax.device_put(TREE, shardings(SPECS, mesh, TRAIN))
        found = drawn_in_int8(jax.jit(lambda tree: prepare(tree, SPECS, compute=FLOAT32, int8=True))(tree))
    assert found == drawn_in_int8(prepare(TREE, SPECS, compute=FLOAT32, int8=True)) != expected


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 1, 1, 4)])
def test_several_devices_give_the_tokens_of_one(expected, sizes):
    mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        tree = jax.device_put(TREE, shardings(SPECS, mesh, TRAIN))
        spread = jax.jit(lambda tree: prepare(tree, SPECS, compute=FLOAT32))(tree)
        engine = Engine(MODEL, spread, SETTINGS, compute=FLOAT32).warm_up()
        compiled = engine.compilations
        assert [request.tokens for request in engine.run(submit(engine))] == expected
        assert engine.compilations == compiled > 0
        answerer = Answerer(tree, MODEL, compute=FLOAT32, prompt_length=20, new_tokens=10, eos_id=EOS, slots=3)
        answers = answerer(PROMPTS, choice=Choice(), seed=3)
        assert [answer.tokens for answer in answers] == expected
        assert answerer.compilations_after_warm_up == 0
        penalised = engine.run(submit(engine, choice=FREQUENCY))
        scorer = PromptScorer(MODEL, compute=FLOAT32, longest=40, alternatives=2).warm_up(spread)
        check_scores(scorer, spread)
        assert scorer.compilations == len(scorer.lengths) == 1
    reusing = dataclasses.replace(SETTINGS, reuse=4)
    one = Engine(MODEL, prepare(TREE, SPECS, compute=FLOAT32), reusing, compute=FLOAT32).warm_up()
    assert [request.tokens for request in one.run(submit(one, choice=FREQUENCY))] == [r.tokens for r in penalised]


FREQUENCY = Choice(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.5)


def check_scores(scorer, weights):
    """Against next-token logits of whole rows."""
    prompt = PROMPTS[4]
    scored = scorer(weights, prompt, alternatives=2)
    rows = np.array([prompt] * 8)  # as many as devices can share
    log_p = np.asarray(jax.nn.log_softmax(row_logits(weights, rows, config=MODEL, compute=FLOAT32)))[0]
    np.testing.assert_allclose(scored.log_probs, log_p[np.arange(len(prompt) - 1), prompt[1:]], atol=2e-5)
    for found, expected in zip(scored.most_likely, log_p[:-1], strict=True):
        np.testing.assert_allclose([p for _, p in found], np.sort(expected)[::-1][:2], atol=2e-5)


def test_prompts_are_scored_with_weights_in_int8_and_long_ones_are_refused():
    small = prepare(TREE, SPECS, compute=FLOAT32, int8=True)
    scorer = PromptScorer(MODEL, compute=FLOAT32, longest=200, alternatives=2)
    check_scores(scorer, small)
    assert scorer.lengths == [128, 256] and scorer(small, [5]).log_probs == []
    with pytest.raises(ValueError, match="prompt: expected 1 to 256 tokens and at most 2 alternatives, got 257 and 0"):
        scorer(small, [5] * 257)


def test_new_weights_take_over_nothing_that_the_old_ones_computed(weights):
    reusing = dataclasses.replace(SETTINGS, slots=1, reuse=4)
    other = jax.tree.map(lambda x: 1.3 * x, weights)

    def drawn(engine):
        request = engine.submit(PROMPTS[4], max_tokens=8, seed=3, stop_ids=(EOS,))
        if request.slot < 0 and engine.weights is not other:
            engine.step()
            with pytest.raises(RuntimeError, match="1 requests are under way; new weights come between two runs"):
                engine.weights = other
        engine.run([request])
        return request

    engine, fresh = (Engine(MODEL, w, reusing, compute=FLOAT32).warm_up() for w in (weights, other))
    drawn(engine)
    engine.weights = other
    again = drawn(engine)
    assert again.reused == 0 and again.tokens == drawn(fresh).tokens
    assert drawn(engine).reused > 0
