"""The HTTP endpoint through OpenAI's own client: answers, streams, limits, a full queue, clients that leave."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, ModelConfig
from llama_jax.model.decode import prepare, row_logits
from llama_jax.parallel.axes import shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.prompt_scores import PromptScorer
from llama_jax.sampling.request import EngineConfig

openai = pytest.importorskip("openai", reason="needs openai (extra [test])")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client")
from starlette.testclient import TestClient  # noqa: E402

from llama_jax import requests, serve  # noqa: E402
from llama_jax.sampling.worker import EngineStopped, Turns, Worker  # noqa: E402
from llama_jax.serve import Server  # noqa: E402

PIECES = 320
MODEL = ModelConfig(
    name="small", vocab_size=PIECES, layers=1, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=4096
)
TEXTS = ["the loop reads a line of text and counts tokens, [INST] what is it? [/INST] <<SYS>> be kind <</SYS>>"] * 20
QUESTION = [{"role": "user", "content": "what is it?"}]
LONG = {"prompt": "the loop", "max_tokens": 4000, "temperature": 0.0, "extra_body": {"stop_token_ids": []}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("serve") / "tokenizer.model", vocab_size=PIECES)


@pytest.fixture(scope="module")
def served(tokenizer):
    """A running server with two slots and two places in the queue: (base URL, its worker)."""
    specs, mesh = params.table(MODEL, head="lm_head"), make_mesh(devices=jax.devices()[:1])
    tree = jax.tree.map(lambda x: 3 * x, params.init(specs, jax.random.key(0)))
    # EOS is made unlikely, so that long answers stay long.
    tree["lm_head"]["kernel"] = tree["lm_head"]["kernel"].at[:, tokenizer.eos_id].set(0.0)
    with jax.set_mesh(mesh):
        weights = prepare(tree, specs, compute=FLOAT32)
        settings = EngineConfig(slots=2, max_length=4096, chunks=((64, 2),), steps=4, alternatives=requests.ALTERNATIVES)
        engine = Engine(MODEL, weights, settings, compute=FLOAT32).warm_up()
    scorer = PromptScorer(MODEL, compute=FLOAT32, longest=4096, alternatives=requests.ALTERNATIVES)
    worker = Worker(engine, mesh, queue=2, scorer=scorer)
    app = Server(worker, tokenizer, name="small", api_key="secret", default_tokens=8, body_limit=20_000, origins=["http://page"]).app()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    worker.compiled = engine.compilations + len(scorer.lengths)
    with jax.set_mesh(mesh):
        scorer.warm_up(engine.weights)
    yield f"http://127.0.0.1:{port}", worker
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive() and not worker.alive


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="secret", max_retries=0)


def wait(condition, seconds=60.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def ended(worker, outcome=None):
    """How many requests have ended so, or have a time from their beginning to their end."""
    if outcome is None:
        return worker.registry.get_sample_value("llama_jax_request_seconds_count")
    return worker.registry.get_sample_value("llama_jax_requests_total", {"outcome": outcome}) or 0


def idle(worker):
    wait(lambda: worker.engine.active == 0 and worker.waiting == 0)


def test_chat_answers_and_streams_the_same_text(client):
    how = {"model": "small", "messages": QUESTION, "temperature": 0.0, "max_tokens": 12}
    whole = client.chat.completions.create(**how, logprobs=True)
    answer = whole.choices[0]
    assert whole.usage.completion_tokens == 12 and answer.finish_reason == "length" and answer.message.role == "assistant"
    assert len(answer.logprobs.content) == 12 and all(token.logprob <= 0 for token in answer.logprobs.content)
    assert "".join(token.token for token in answer.logprobs.content).strip() == answer.message.content
    assert all(bytes(token.bytes).decode() == token.token for token in answer.logprobs.content)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == answer.message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_completions_of_several_prompts_seeds_and_stops(client):
    how = {"model": "small", "max_tokens": 20, "seed": 5}
    both = client.completions.create(prompt=["the loop", "a line"], n=2, **how)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text != both.choices[1].text
    again = client.completions.create(prompt="the loop", n=2, **how, logprobs=0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in both.choices[:2]]
    assert len(again.choices[0].logprobs.token_logprobs) == 20
    text = again.choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = client.completions.create(prompt="the loop", stop=[stop], **how).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    pieces = [chunk.choices[0].text for chunk in client.completions.create(prompt="the loop", stop=[stop], stream=True, **how)]
    assert "".join(pieces) == cut.text and len(pieces) > 2


def test_an_answer_that_has_stopped_leaves_its_slot_while_others_go_on(client, served, monkeypatch):
    worker = served[1]
    how = {"model": "small", "prompt": "the loop", "n": 2, "max_tokens": 600, "seed": 5}
    long, short = (choice.text for choice in client.completions.create(**how).choices)
    stop = next(short[i : i + 3] for i in range(60) if short[i : i + 3] not in long)
    idle(worker)
    step, active = worker.engine.step, []
    # Slow enough for the answer to be cancelled while the other one is drawn.
    monkeypatch.setattr(worker.engine, "step", lambda: time.sleep(0.01) or active.append(worker.engine.active) or step())
    before = ended(worker, "stop"), ended(worker, "cancelled"), ended(worker)
    answered = client.completions.create(**how, stop=[stop])
    assert [choice.text for choice in answered.choices] == [long, short.partition(stop)[0]]
    # They have ended as they should, and took their time.
    stopped = [choice.finish_reason for choice in answered.choices].count("stop")
    expected = before[0] + stopped, before[1], before[2] + 2
    wait(lambda: (ended(worker, "stop"), ended(worker, "cancelled"), ended(worker)) == expected)
    assert active.count(1) > active.count(2) > 0


def test_a_stream_counts_each_prompt_once(client, served):
    idle(served[1])  # an answer that a stop string ended may still have its slot
    how = {"model": "small", "prompt": ["the loop", "a line"], "n": 2, "max_tokens": 3, "temperature": 0.0}
    whole = client.completions.create(**how).usage
    *_, last = client.completions.create(**how, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole and whole.completion_tokens == 12


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(served, monkeypatch):
    port = int(served[0].rsplit(":", 1)[1])
    given = {"host": "127.0.0.1", "port": port, "api_key": ""}
    monkeypatch.setattr(serve.flags, "FLAGS", types.SimpleNamespace(**given))
    monkeypatch.setattr(serve, "keep_heap", lambda: None)
    monkeypatch.setattr(serve, "open_engine", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"^--host=127.0.0.1 --port={port}: cannot be listened on: .*in use"):
        serve.main()
    with serve.bound("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0


def test_wrong_requests_are_400_with_the_field(client, served):
    with pytest.raises(openai.BadRequestError, match="temperature: expected at least 0"):
        client.completions.create(model="small", prompt="a", temperature=-1.0)
    with pytest.raises(openai.BadRequestError, match="chat tag"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "[INST]"}])
    with pytest.raises(openai.BadRequestError, match="max_tokens: expected at most"):
        client.completions.create(model="small", prompt="a", max_tokens=5000)
    with pytest.raises(openai.APIStatusError, match="at most 20000 bytes") as large:
        client.completions.create(model="small", prompt="a" * 30_000)
    assert large.value.status_code == 413
    for content, words in (
        (b"{", "body: not JSON"), (b'{"prompt": "\xff"}', "body: not JSON"), (b'{"prompt": ' + b"[" * 9000, "body: not JSON"),
        (b'{"prompt": "\\ud800"}', "body: holds a lone surrogate"), (b'{"prompt": "a", "\\ud800": 1}', "body: holds a lone"),
        (b'{"prompt": "a", "top_k": Infinity}', "body: not JSON: Out of range"),
        (b'{"prompt": "a", "top_k": 1099511627776}', "top_k: expected an integer in 0..2147483647"),
        (b'{"prompt": "a", "stop_token_ids": [1099511627776]}', "stop_token_ids: expected at most 8 ids in 0..319"),
        (b'{"prompt": "a", "stream": true, "stream_options": "x"}', "stream_options: expected an object"),
        # Slots and queue hold four: more would be told to try again for ever.
        (b'{"prompt": ["a", "a", "a", "a", 5]}', "n: expected at most 4 answers a request, got 5"),
        (b'{"prompt": "a", "stop": [' + b'"x",' * 16 + b'"x"]}', "stop: expected at most 16 texts of at most 256 characters"),
        (b'{"prompt": "a", "stop": "' + b"x" * 257 + b'"}', "stop: expected at most 16 texts of at most 256 characters, got 1"),
    ):  # fmt: skip
        answer = httpx.post(f"{served[0]}/v1/completions", content=content, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(words), answer.text
    assert served[1].waiting == 0 and httpx.get(f"{served[0]}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served[0]}/v1", api_key="wrong", max_retries=0).models.list()
    (model,) = client.models.list()
    assert (model.id, model.max_model_len) == ("small", 4096) and client.models.retrieve("small") == model


def test_what_is_not_there_is_404_in_the_form_of_the_api(client, served):
    for ask in (
        lambda: client.completions.create(model="gpt-4", prompt="a"),
        lambda: client.chat.completions.create(model="gpt-4", messages=QUESTION), lambda: client.models.retrieve("gpt-4"),
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError, match="model: 'gpt-4' does not exist; there is 'small'"):
            ask()
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: Not Found"):
        client.embeddings.create(model="small", input="a")
    wrong = httpx.get(f"{served[0]}/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["message"] == "GET /v1/completions: Method Not Allowed"


def test_a_completion_repeats_its_prompt_where_it_shall(client, tokenizer):
    how = {"model": "small", "max_tokens": 4, "temperature": 0.0}
    for prompt in ("the loop", tokenizer.encode("the loop")):
        plain, echoed = (client.completions.create(prompt=prompt, echo=echo, **how) for echo in (False, True))
        assert echoed.choices[0].text == "the loop" + plain.choices[0].text and echoed.usage == plain.usage
    stream = client.completions.create(prompt="the loop", echo=True, stream=True, stop=["the"], **how)
    assert "".join(chunk.choices[0].text for chunk in stream).startswith("the loop")


def test_prompts_are_scored_where_their_log_probs_are_asked_for(client, served, tokenizer):
    prompt = "the loop reads a line of text"
    how = {"model": "small", "prompt": prompt, "echo": True, "logprobs": 3, "temperature": 0.0}
    found = client.completions.create(max_tokens=2, **how).choices[0]
    told, ids = found.logprobs, tokenizer.encode(prompt, bos=tokenizer.adds_bos)
    assert len(told.tokens) == len(ids) + 2 and "".join(told.tokens) == found.text and found.text.startswith(prompt)
    assert all(found.text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True))
    worker = served[1]
    scores = row_logits(worker.engine.weights, np.array([ids]), config=MODEL, compute=FLOAT32)[0]
    log_p = np.asarray(jax.nn.log_softmax(scores))
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[1 : len(ids)], log_p[np.arange(len(ids) - 1), ids[1:]], atol=1e-5)
    for top, expected in zip(told.top_logprobs[1:], log_p[:-1]):
        np.testing.assert_allclose(sorted(top.values(), reverse=True)[0], expected.max(), atol=1e-5)
    assert told.token_logprobs[len(ids)] == pytest.approx(log_p[-1].max(), abs=1e-5)  # drawn greedily
    # Nothing drawn; a stream; a prompt beyond the first length; several prompts, as lm-evaluation-harness asks.
    alone = client.completions.create(max_tokens=0, **how)
    assert alone.choices[0].text == prompt and alone.usage.completion_tokens == 0
    assert alone.choices[0].logprobs.token_logprobs == told.token_logprobs[: len(ids)]
    parts = [chunk.choices[0] for chunk in client.completions.create(max_tokens=2, stream=True, **how)]
    assert [p for part in parts if part.logprobs for p in part.logprobs.token_logprobs] == told.token_logprobs
    assert "".join(part.text for part in parts) == found.text
    long = client.completions.create(max_tokens=1, **{**how, "prompt": [ids * 40, ids]}).choices
    assert len(long[0].logprobs.tokens) == 40 * len(ids) + 1
    assert worker.engine.compilations + worker.scorer.compilations == worker.compiled
    assert long[1].logprobs.token_logprobs == pytest.approx([None, *told.token_logprobs[1 : len(ids) + 1]], abs=1e-5)
    # Ids without a text, and a prompt that fills the context: the engine's 4096 are the scorer's.
    alone = client.completions.create(model="small", prompt=[1], echo=True, logprobs=1, max_tokens=0).choices[0]
    assert alone.text == "" and alone.logprobs.token_logprobs == [None]
    full = client.completions.create(model="small", prompt=[5] * 4096, echo=True, logprobs=0, max_tokens=0, timeout=600)
    assert len(full.choices[0].logprobs.token_logprobs) == 4096
    plain = client.completions.create(model="small", prompt="the loop", echo=True, max_tokens=0)
    assert plain.choices[0].text == "the loop" and plain.choices[0].finish_reason == "length"
    idle(worker)


def test_answers_to_one_prompt_score_it_once_and_a_client_that_leaves_ends_it(client, served, monkeypatch):
    worker, scored, free = served[1], [], threading.Event()
    real = worker.scorer

    def slow(weights, prompt, *, alternatives):
        scored.append(list(prompt))
        assert free.wait(60)
        return real(weights, prompt, alternatives=alternatives)

    monkeypatch.setattr(worker, "scorer", slow)
    how = {"model": "small", "echo": True, "logprobs": 1}
    leaving = threading.Thread(target=lambda: pytest.raises(
        openai.APITimeoutError, client.completions.create, prompt=["a line", "a text"], max_tokens=3, timeout=1.0, **how
    ))  # fmt: skip
    leaving.start()
    leaving.join()
    wait(lambda: len(worker._leaving) == 2)
    free.set()
    idle(worker)
    assert len(scored) == 1  # the second one's prompt was not scored any more
    several = client.completions.create(prompt="the loop", n=3, max_tokens=2, seed=1, **how).choices
    assert len(scored) == 2 and len({tuple(x.logprobs.token_logprobs[1:3]) for x in several}) == 1
    idle(worker)


def test_penalties_are_those_of_the_api(client):
    how = {"model": "small", "prompt": "the loop", "max_tokens": 30, "temperature": 0.0}
    plain, punished = (client.completions.create(presence_penalty=p, **how).choices[0].text for p in (0.0, 2.0))
    favoured = client.completions.create(frequency_penalty=-2.0, logprobs=0, **how).choices[0].logprobs.tokens
    assert plain != punished and len(set(favoured)) < len(favoured) / 2
    with pytest.raises(openai.BadRequestError, match="frequency_penalty: expected -2 to 2, got 3"):
        client.completions.create(frequency_penalty=3.0, **how)


def test_a_prompt_that_cannot_be_scored_is_an_error_of_its_own(client, served, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no")

    how = {"model": "small", "prompt": "one that was not asked before", "echo": True, "logprobs": 1, "max_tokens": 1}
    with monkeypatch.context() as patch:
        patch.setattr(served[1], "scorer", fail)
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            client.completions.create(**how)
    assert client.completions.create(**how).choices[0].finish_reason == "length"


def test_streams_carry_the_log_probs_of_their_tokens(client):
    how = {"model": "small", "temperature": 0.0, "max_tokens": 9}
    whole = client.completions.create(prompt="the loop", logprobs=1, **how).choices[0].logprobs
    chunks = [chunk.choices[0] for chunk in client.completions.create(prompt="the loop", logprobs=1, stream=True, **how)]
    told = [chunk.logprobs for chunk in chunks if chunk.logprobs]
    for field in ("tokens", "token_logprobs", "text_offset"):
        assert [x for part in told for x in getattr(part, field)] == getattr(whole, field)
    text = "".join(chunk.text for chunk in chunks)
    assert "".join(whole.tokens) == text and len(set(whole.tokens)) > 2
    assert all(text[at:].startswith(token) for at, token in zip(whole.text_offset, whole.tokens, strict=True))
    whole = client.chat.completions.create(messages=QUESTION, logprobs=True, **how).choices[0].logprobs
    chunks = client.chat.completions.create(messages=QUESTION, logprobs=True, stream=True, **how)
    found = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert found == whole.content and len(found) == 9


def test_the_most_likely_tokens_are_told_beside_the_drawn_ones(client):
    how = {"model": "small", "temperature": 0.0, "max_tokens": 9}
    whole = client.completions.create(prompt="the loop", logprobs=3, **how).choices[0].logprobs
    for piece, log_p, likely in zip(whole.tokens, whole.token_logprobs, whole.top_logprobs, strict=True):
        (first, best), *_ = likely.items()  # greedy: the drawn one
        assert best == pytest.approx(log_p, abs=1e-5) and 2 <= len(likely) <= 3
        assert piece.endswith(first) or not piece  # a byte that is no whole character is told with the token that ends it
        assert list(likely.values()) == sorted(likely.values(), reverse=True)
    warm = {**how, "temperature": 3.0, "seed": 1}
    told = client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=20, **warm).choices[0].logprobs
    assert any(token.logprob < token.top_logprobs[0].logprob for token in told.content)
    for token in told.content:  # the model's own, whatever the temperature
        same = [other.logprob for other in token.top_logprobs if other.token == token.token and len(token.token) > 1]
        assert all(log_p == pytest.approx(token.logprob, abs=1e-5) for log_p in same)
        assert bytes(token.top_logprobs[0].bytes).decode() == token.top_logprobs[0].token
    plain = client.chat.completions.create(messages=QUESTION, logprobs=True, **warm).choices[0].logprobs
    assert [(t.token, t.logprob, t.top_logprobs) for t in plain.content] == [(t.token, t.logprob, []) for t in told.content]


def test_a_completion_continues_its_prompt(client, served):
    for seed in range(100):
        how = {"model": "small", "prompt": "the loop", "max_tokens": 2, "seed": seed, "logprobs": 1}
        choice = client.completions.create(**how).choices[0]
        first = choice.logprobs.tokens[0]
        if first.startswith(" ") and len(first) > 1:
            break
    assert choice.text.startswith(first.replace("\u2581", " "))
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**how, stream=True)) == choice.text


class Broken:
    """A worker whose engine fails at each request, or has ended."""

    def __init__(self, *, alive):
        self.alive, self.registry, self.scorer, self.capacity = alive, None, None, 1
        self.engine = types.SimpleNamespace(settings=EngineConfig(slots=1, max_length=64))

    def start(self):
        pass

    stop = start

    def cancel(self, ticket):
        pass

    def submit(self, jobs):
        if not self.alive:
            raise EngineStopped("the engine has stopped")
        for job in jobs:
            job["deliver"](None, 0.0, "error")
        return list(range(len(jobs)))


@pytest.mark.parametrize("alive", [True, False])
def test_an_engine_that_fails_is_no_answer_and_one_that_has_ended_asks_for_no_patience(tokenizer, alive):
    app = Server(Broken(alive=alive), tokenizer, name="small").app()
    with TestClient(app) as http:
        body = {"prompt": "the loop", "max_tokens": 2}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == (500 if alive else 503) and "retry-after" not in answer.headers
        assert answer.json()["error"]["type"] == "server_error" and http.get("/health").status_code == (200 if alive else 503)
        if alive:
            (event,) = http.post("/v1/completions", json={**body, "stream": True}).text.strip().split("\n\n")
            assert json.loads(event.removeprefix("data: "))["error"]["code"] == 500


def test_a_job_that_the_engine_cannot_take_leaves_the_others(client, served):
    told, failed = [], ended(served[1], "error")
    served[1].submit([{"prompt": [5], "max_tokens": 2, "seed": 2**70, "deliver": lambda *what: told.append(what)}])
    wait(lambda: told)
    assert told == [(None, 0.0, "error")] and ended(served[1], "error") == failed + 1
    assert client.completions.create(model="small", prompt="a", max_tokens=2).usage.completion_tokens == 2


def test_a_client_that_leaves_frees_its_slot_and_a_full_queue_is_429(client, served, monkeypatch, caplog):
    worker = served[1]
    idle(worker)
    step = worker.engine.step
    monkeypatch.setattr(worker.engine, "step", lambda: time.sleep(0.01) or step())  # 10 s for a long answer
    streams = [client.completions.create(model="small", stream=True, **LONG) for _ in range(4)]  # 2 slots, 2 waiting
    wait(lambda: worker.engine.active == 2 and worker.waiting == 2)
    with pytest.raises(openai.RateLimitError, match="waiting already"):
        client.completions.create(model="small", **LONG)
    for stream in streams:
        stream.close()
    idle(worker)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(model="small", **LONG)
    idle(worker)
    assert client.completions.create(model="small", prompt="a", max_tokens=2).usage.completion_tokens == 2
    gc.collect()  # asyncio tells of what nobody waited for when that is thrown away
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


def test_health_and_metrics(client, served):
    client.completions.create(model="small", prompt="a", max_tokens=3)
    assert httpx.get(f"{served[0]}/health").json() == {"status": "ok"}
    lines = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{served[0]}/metrics").text.splitlines() if not line.startswith("#")
    )
    assert float(lines["llama_jax_generated_tokens_total"]) >= 3
    assert float(lines['llama_jax_requests_total{outcome="length"}']) >= 1
    assert float(lines["llama_jax_active"]) == 0 and float(lines["llama_jax_reused_tokens_total"]) >= 0
    assert float(lines["llama_jax_first_token_seconds_count"]) >= float(lines["llama_jax_request_seconds_count"]) >= 1
    assert 0 < float(lines["llama_jax_first_token_seconds_sum"]) < float(lines["llama_jax_generated_tokens_total"]) * 60
    # Nothing was compiled for the traffic: 7 programs of the engine, and prompts' lengths of 128 to 4096.
    assert float(lines["llama_jax_compilations_total"]) == served[1].compiled == 7 + 6


def test_health_and_metrics_need_no_key_and_all_else_does(served):
    for path in ("/health", "/metrics"):
        assert httpx.get(f"{served[0]}{path}").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for path in ("/v1/models", "/v1/models/small"):
            assert httpx.get(f"{served[0]}{path}", headers=headers).status_code == 401
        for path, asked in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": QUESTION})):
            answer = httpx.post(f"{served[0]}/v1/{path}", json=asked, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"


def test_a_key_comes_under_the_scheme_bearer_however_it_is_written(served):
    for given, status in (
        ("Bearer secret", 200), ("bearer secret", 200), ("BEARER  secret", 200), ("secret", 401), ("Basic secret", 401),
        ("Bearer", 401), ("Bearer secrets", 401), ("Bearer sécret", 401),
    ):  # fmt: skip
        headers = {"Authorization": given.encode("latin-1")}
        assert httpx.get(f"{served[0]}/v1/models", headers=headers).status_code == status, given


def test_what_the_server_holds_is_told_with_the_reason():
    assert serve.context_told(2048, 2048) == serve.context_told(2048, 0) == "2048 tokens"
    assert serve.context_told(256, 4096) == "256 tokens: the model's context, which is less than --max_length=4096"


def test_scripts_of_allowed_pages_may_ask(served):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("http://page", "http://page"), ("http://other", None)):
        answer = httpx.options(f"{served[0]}/v1/chat/completions", headers={"Origin": origin, **asks})
        assert answer.headers.get("access-control-allow-origin") == allowed
    listed = httpx.get(f"{served[0]}/v1/models/", headers={"Authorization": "Bearer secret"}).json()
    assert [model["id"] for model in listed["data"]] == ["small"]


def test_many_at_once_are_each_answered_as_alone(client):
    def text(i):
        return client.completions.create(model="small", prompt=f"the loop {i}", seed=i, max_tokens=5 + i).choices[0].text

    alone = [text(i) for i in range(4)]
    found = [None] * 4
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, text(i))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_two_engines_over_the_same_devices_take_turns(tokenizer):
    """As at a desk with two models. Programs with collectives that two threads start in no common order may wait for ever."""
    specs, mesh = params.table(MODEL, head="lm_head"), make_mesh(MeshConfig(tensor=2), devices=jax.devices()[:2])
    tree, settings = params.init(specs, jax.random.key(0)), EngineConfig(slots=2, max_length=64, chunks=((8, 1),), steps=2)
    with jax.set_mesh(mesh):
        weights = prepare(jax.device_put(tree, shardings(specs, mesh)), specs, compute=FLOAT32)
        engines = [Engine(MODEL, weights, settings, compute=FLOAT32).warm_up() for _ in range(2)]
    workers = [Worker(engine, mesh, queue=20) for engine in engines]
    tokens = [[[] for _ in range(12)] for _ in workers]
    ended = [threading.Semaphore(0) for _ in workers]
    for worker, found, done in zip(workers, tokens, ended):
        worker.start()
        for row, own in enumerate(found):
            def deliver(token, log_p, finish, own=own, done=done):
                own.append(token)
                if finish:
                    done.release()

            job = {"prompt": [1, 5 + row], "max_tokens": 20, "seed": 3, "index": row, "choice": Choice(), "stop_ids": ()}
            worker.submit([{**job, "deliver": deliver}])
    for done in ended:
        assert all(done.acquire(timeout=60) for _ in range(12))
    for worker in workers:
        worker.stop()
    assert tokens[0] == tokens[1] and all(len(own) == 20 for own in tokens[0])


def test_turns_are_taken_in_the_order_in_which_they_were_asked_for():
    turns, order, waiting = Turns(), [], []
    with turns:
        for number in range(4):
            thread = threading.Thread(target=lambda number=number: enter(turns, order, number))
            thread.start()
            wait(lambda asked=number + 2: turns._asked == asked)
            waiting.append(thread)
    for thread in waiting:
        thread.join()
    assert order == [0, 1, 2, 3]


def enter(turns, order, number):
    with turns:
        order.append(number)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_are_let_in_with_a_key_alone(host):
    command = [sys.executable, "-m", "llama_jax.serve", "--checkpoint=nowhere", f"--host={host}"]
    environment = {name: value for name, value in os.environ.items() if name != "LLAMA_JAX_API_KEY"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        f"error: --host={host}: others can reach it, which needs an API key: --api_key or LLAMA_JAX_API_KEY"
    )
