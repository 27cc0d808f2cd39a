"""The HTTP endpoint through OpenAI's own client: answers, streams, limits, a full queue, clients that leave."""

import threading
import time

import jax
import pytest

from llama_jax.data.tokenizer import train_tokenizer
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, ModelConfig
from llama_jax.model.decode import prepare
from llama_jax.parallel.mesh import make_mesh
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import EngineConfig

openai = pytest.importorskip("openai", reason="needs openai (extra [test])")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client")

PIECES = 320
MODEL = ModelConfig(
    name="small", vocab_size=PIECES, layers=1, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=4096
)
TEXTS = ["the loop reads a line of text and counts tokens, [INST] what is it? [/INST] <<SYS>> be kind <</SYS>>"] * 20
QUESTION = [{"role": "user", "content": "what is it?"}]
LONG = {"prompt": "the loop", "max_tokens": 4000, "temperature": 0.0, "extra_body": {"stop_token_ids": []}}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A running server with two slots and two places in the queue: (base URL, its worker)."""
    from llama_jax.sampling.worker import Worker
    from llama_jax.serve import Server

    tokenizer = train_tokenizer(TEXTS, tmp_path_factory.mktemp("serve") / "tokenizer.model", vocab_size=PIECES)
    specs, mesh = params.table(MODEL, head="lm_head"), make_mesh(devices=jax.devices()[:1])
    tree = jax.tree.map(lambda x: 3 * x, params.init(specs, jax.random.key(0)))
    # EOS is made unlikely, so that long answers stay long.
    tree["lm_head"]["kernel"] = tree["lm_head"]["kernel"].at[:, tokenizer.eos_id].set(0.0)
    with jax.set_mesh(mesh):
        weights = prepare(tree, specs, compute=FLOAT32)
        settings = EngineConfig(slots=2, max_length=4096, chunks=((64, 2),), steps=4)
        engine = Engine(MODEL, weights, settings, compute=FLOAT32).warm_up()
    worker = Worker(engine, mesh, queue=2)
    app = Server(worker, tokenizer, name="small", api_key="secret", default_tokens=8, body_limit=20_000).app()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    worker.compiled = engine.compilations
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


def idle(worker):
    wait(lambda: worker.engine.active == 0 and worker.waiting == 0)


def test_chat_answers_and_streams_the_same_text(client):
    how = {"model": "small", "messages": QUESTION, "temperature": 0.0, "max_tokens": 12}
    whole = client.chat.completions.create(**how, logprobs=True)
    answer = whole.choices[0]
    assert whole.usage.completion_tokens == 12 and answer.finish_reason == "length" and answer.message.role == "assistant"
    assert len(answer.logprobs.content) == 12 and all(token.logprob <= 0 for token in answer.logprobs.content)
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
    head = {"Authorization": "Bearer secret"}
    assert httpx.post(f"{served[0]}/v1/completions", content="{", headers=head).status_code == 400
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served[0]}/v1", api_key="wrong", max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == ["small"]


def test_a_client_that_leaves_frees_its_slot_and_a_full_queue_is_429(client, served, monkeypatch):
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


def test_health_and_metrics(client, served):
    client.completions.create(model="small", prompt="a", max_tokens=3)
    assert httpx.get(f"{served[0]}/health").json() == {"status": "ok"}
    lines = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{served[0]}/metrics").text.splitlines() if not line.startswith("#")
    )
    assert float(lines["llama_jax_generated_tokens_total"]) >= 3
    assert float(lines['llama_jax_requests_total{outcome="length"}']) >= 1
    assert float(lines["llama_jax_active"]) == 0
    assert float(lines["llama_jax_compilations"]) == served[1].compiled == 7  # nothing was compiled for the traffic


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
