"""lm-evaluation-harness's own client of such servers says of a served model what the harness says of the model itself."""

import threading
import time

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop import ours
from llama_jax.model import params

pytest.importorskip("lm_eval", reason="needs the extra [eval]")
pytest.importorskip("tenacity", reason="needs tenacity (extra [test])")
pytest.importorskip("transformers", reason="the harness's client counts with transformers' tokenizer")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client")

from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402
from test_evaluate import MODEL, SPECS, TEXTS, one_device, requests_of, write_words  # noqa: E402

from llama_jax import requests  # noqa: E402
from llama_jax.chat import make_engine  # noqa: E402
from llama_jax.evals.harness import HarnessModel  # noqa: E402
from llama_jax.sampling.prompt_scores import PromptScorer  # noqa: E402
from llama_jax.sampling.request import EngineConfig  # noqa: E402
from llama_jax.sampling.worker import Worker  # noqa: E402
from llama_jax.serve import Server  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    write_words(root / "model")
    tree = jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params.init(SPECS, jax.random.key(0)))
    ours.write(root / "model", tree, MODEL, tokenizer=Tokenizer(root / "model").fingerprint, origin={})
    return root / "model", llama_jax.load(root / "model", mesh=one_device())


@pytest.fixture(scope="module")
def address(model):
    _, served = model
    with jax.set_mesh(served.mesh):
        engine = make_engine(served, EngineConfig(slots=2, max_length=128, steps=4, alternatives=requests.ALTERNATIVES))
    scorer = PromptScorer(served.config, compute=served.compute, longest=128, alternatives=requests.ALTERNATIVES)
    worker = Worker(engine, served.mesh, queue=16, scorer=scorer)
    server = uvicorn.Server(
        uvicorn.Config(Server(worker, served.tokenizer, name="small").app(), host="127.0.0.1", port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    limit = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < limit
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/completions"
    server.should_exit = True
    thread.join(timeout=30)


def test_likelihoods_and_answers_through_the_server_are_the_models_own(model, address):
    path, loaded = model
    client = LocalCompletionsAPI(
        base_url=address, model="small", tokenizer=str(path), tokenizer_backend="huggingface", batch_size=2, max_length=128,
        max_retries=1, add_bos_token=True,
    )  # fmt: skip
    own = HarnessModel(loaded)
    pairs = [(text, ending) for text in TEXTS[:3] for ending in (" and it is", " tokens of text", " 5")]
    asked = requests_of("loglikelihood", pairs)
    found, expected = client.loglikelihood(asked), own.loglikelihood(asked)
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in expected], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    how = {"until": ["\n"], "max_gen_toks": 6, "temperature": 0.0}
    asked = requests_of("generate_until", [(text, how) for text in TEXTS[:3]])
    assert client.generate_until(asked) == own.generate_until(asked)
