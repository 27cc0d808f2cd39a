"""Models behind the desk and comparisons: answers by the engine, kept and resumed; scores; streams; the commands' refusals."""

import dataclasses
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from llama_jax import compare, desk
from llama_jax.annotation.drawing import Draw, Pair
from llama_jax.annotation.session import Desk
from llama_jax.annotation.streams import Engines, Served
from llama_jax.annotation.tasks import Settings
from llama_jax.chat import make_engine
from llama_jax.config import ConfigError, describe
from llama_jax.data.row_file import RowFile
from llama_jax.data.tokenizer import Tokenizer, train_tokenizer
from llama_jax.evals.answer_files import Answered
from llama_jax.evals.origin import claim
from llama_jax.evals.reward_scores import score_dialogs
from llama_jax.interop import ours
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, ModelConfig
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.pretrained import Model
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import EngineConfig
from llama_jax.sampling.worker import Worker
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.state import TrainState

PIECES = 320
CONFIG = ModelConfig(
    name="small", vocab_size=PIECES, layers=1, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=128
)
TEXTS = ["the loop reads a line of text and counts tokens, [INST] what is it? [/INST] <<SYS>> be kind <</SYS>>"] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    train_tokenizer(TEXTS, path := tmp_path_factory.mktemp("compare") / "tokenizer.model", vocab_size=PIECES)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def model(tokenizer):
    return made(tokenizer, "lm_head")


def made(tokenizer, head):
    mesh = make_mesh(devices=jax.devices()[:1])
    tree = jax.tree.map(lambda x: 3 * x, params.init(params.table(CONFIG, head=head), jax.random.key(0)))
    return Model(tree, CONFIG, head, tokenizer, FLOAT32, mesh, "small")


def opened(model, slots=2):
    """An engine over a model, and the model without its parameters, as `chat.open_engine` gives them."""
    with jax.set_mesh(model.mesh):
        engine = make_engine(model, compare.settings_of(model, slots=slots, int8_cache=False))
    return engine, dataclasses.replace(model, params={})


def prompt(i, words="the loop"):
    return {"messages": [{"role": "user", "content": f"{words} {i}"}], "is_safety": i % 2 == 0, "category": "", "risk": ""}


def test_answers_are_kept_resumed_alike_and_never_of_a_cut_prompt(model, tmp_path):
    how = {"choice": Choice(1.0), "max_tokens": 8, "seed": 3}
    prompts = [prompt(0), prompt(1), prompt(2, words="a line " * 60), prompt(3)]  # the third does not fit
    loads = []

    def open_model(place):
        loads.append(place)
        return opened(model)

    def collect(directory, rows):
        answers = compare.collect("x", "ckpt", rows, directory, open_model=open_model, **how)
        return {answer.messages[0]["content"]: answer for answer in answers}

    whole = collect(tmp_path / "a", prompts)
    assert set(whole) == {"the loop 0", "the loop 1", "the loop 3"} and all(a.answer for a in whole.values())
    assert [whole[f"the loop {i}"].is_safety for i in (0, 1)] == [True, False]
    collect(tmp_path / "b", prompts[:2])
    assert collect(tmp_path / "b", prompts) == whole  # what a prompt draws does not depend on when
    before = len(loads)
    assert collect(tmp_path / "b", prompts[:2]).keys() == {"the loop 0", "the loop 1"} and len(loads) == before
    with pytest.raises(ValueError, match="--prompts: missing"):
        collect(tmp_path / "c", [])


def test_answers_of_another_checkpoint_or_other_settings_are_refused(model, tmp_path):
    how = {"open_model": lambda place: opened(model, slots=1), "choice": Choice(1.0), "max_tokens": 4, "seed": 3}
    collect = functools.partial(compare.collect, "x", prompts=[prompt(0)], directory=tmp_path)
    before = collect("runs/v2", **how)
    assert collect("runs/v2", **{**how, "open_model": lambda place: opened(model)}) == before
    changes = (
        ("runs/v3", {}, "path: 'runs/v2' -> 'runs/v3'"), ("runs/v2", {"choice": Choice(0.0)}, "temperature: 1.0 -> 0.0"),
        ("runs/v2", {"choice": Choice(1.0, top_p=0.5)}, "top_p: 1.0 -> 0.5"),
        ("runs/v2", {"max_tokens": 5}, "max_tokens: 4 -> 5"), ("runs/v2", {"seed": 4}, "seed: 3 -> 4"),
        ("runs/v2", {"int8_cache": True}, "int8_cache: False -> True"),
    )  # fmt: skip
    for place, change, words in changes:
        with pytest.raises(ConfigError, match=f"model_x.json: .* of other settings: {words}; give this one a name of its own"):
            collect(place, **how | change)


def test_a_checkpoint_that_was_trained_on_is_another_model(model, tmp_path):
    def train(step, seed, at="run"):
        tree = params.init(params.table(CONFIG, head="lm_head"), jax.random.key(seed))
        shutil.rmtree(tmp_path / at, ignore_errors=True)
        state = TrainState(step=np.int32(step), params=tree, opt_state={}, skipped=np.int32(0), skipped_in_a_row=np.int32(0))
        checkpoints = Checkpoints(tmp_path / at / "checkpoints", keep=1)
        checkpoints.save(step, state, {}, {"stage": "sft", "model": describe(CONFIG), "tokenizer": ""})
        checkpoints.close()

    file = tmp_path / "out/model.json"
    for at in ("run", "moved"):
        train(100, 0, at)
        claim(file, tmp_path / at)  # the same weights wherever they lie
    train(100, 1)
    with pytest.raises(ConfigError, match="other settings: weights: "):
        claim(file, tmp_path / "run")  # trained anew to the same step
    train(200, 1)
    with pytest.raises(ConfigError, match="other settings: step: 100 -> 200; weights: "):
        claim(file, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    claim(file, tmp_path / "run")  # its results outlive it


def test_scores_do_not_depend_on_padding_and_overlong_answers_have_none(tokenizer):
    judge = made(tokenizer, "reward_head")
    texts = ["a line", "the loop reads a line of text " * 3, "x" * 400, "[INST]", "counts"]
    dialogs = [[*prompt(0)["messages"], {"role": "assistant", "content": text}] for text in texts]
    score = lambda some: score_dialogs(judge.params, CONFIG, tokenizer, some, compute=FLOAT32, mesh=judge.mesh)  # noqa: E731
    scores = score(dialogs)
    assert np.isnan(scores).tolist() == [False, False, True, True, False]
    for dialog, expected in zip(dialogs[:2], scores):
        np.testing.assert_allclose(score([dialog]), expected, atol=1e-5)
        # The same by the whole row, without any padding.
        question, answer = (message["content"].strip() for message in dialog)
        ids = tokenizer.encode(f"[INST] {question} [/INST] {answer} ", bos=True, eos=True)
        np.testing.assert_allclose(judge.scores([ids])[0], expected, atol=1e-5)
    pairs = [(Answered(tuple(dialogs[0][:1]), a), Answered(tuple(dialogs[0][:1]), b)) for a, b in zip(texts, texts[1:])]
    outcomes, rows = compare.reward_outcomes(pairs, judge, None)
    assert outcomes[0] == ("win" if scores[0] > scores[1] else "loss") and outcomes[1:] == ["garbage"] * 3
    assert rows[0]["first"] == pytest.approx(1 / (1 + np.exp(-scores[0])), abs=1e-6)


def test_a_model_of_ours_judges_and_refuses_what_does_not_fit(model):
    engine, bare = opened(model)
    ask = compare.model_as_judge(engine, bare, max_tokens=12)
    dialogs = [prompt(i)["messages"] for i in range(5)] + [prompt(3, words="a line " * 60)["messages"]]
    compiled = engine.compilations
    replies = dict(ask(dialogs))
    assert sorted(replies) == [0, 1, 2, 3, 4, 5] and replies[5] is None and engine.compilations == compiled
    assert engine.finished == 5
    eos = model.tokenizer.eos_id
    for i in range(5):
        (expected,) = model.respond([compare.encode_chat(dialogs[i], model.tokenizer)], Choice(0.0), max_tokens=12)
        assert replies[i] == model.tokenizer.decode([token for token in expected if token != eos]).strip()


def test_answers_stream_from_engines_and_the_same_draw_gives_the_same_text(model):
    pytest.importorskip("prometheus_client", reason="needs the extra [web] or [serve]")
    with jax.set_mesh(model.mesh):
        engine = make_engine(model, EngineConfig(slots=2, max_length=128, chunks=((64, 2),), steps=2))
    worker = Worker(engine, model.mesh, queue=4)
    worker.start()
    engines = Engines({"one": Served(worker, model.tokenizer)}, max_tokens=24, top_p=1.0)

    def pair():
        finished, found = threading.Event(), []

        def done(texts):
            found.append(texts)
            finished.set()

        draws = [Draw("one", tuple(prompt(0)["messages"]), 1.0, 7, i) for i in range(2)]
        Pair(engines, draws, distinct=True, done=done).start()
        assert finished.wait(60)
        return found[0]

    try:
        texts = pair()
        assert len(set(texts)) == 2 and all(texts) and pair() == texts
        assert engines.fits("one", prompt(0)["messages"]) and not engines.fits("one", prompt(0, "a line " * 60)["messages"])
        with pytest.raises(ValueError, match="dialog has become too long"):
            engines.start(Draw("one", tuple(prompt(0, "a line " * 60)["messages"]), 1.0, 0, 0), lambda *_: None)
    finally:
        worker.stop()


def test_the_desk_holds_the_weights_once_in_as_many_slots_as_the_mesh_divides(monkeypatch):
    pytest.importorskip("prometheus_client", reason="needs the extra [web] or [serve]")
    asked = []

    def open_engine(place, settings, *, tokenizer, mesh_tensor):
        model = Model({}, CONFIG, "lm_head", tokenizer, FLOAT32, make_mesh(MeshConfig(tensor=2)), place)
        asked.append((place, settings(model), mesh_tensor))
        raise KeyboardInterrupt

    monkeypatch.setattr(desk, "open_engine", open_engine)  # whose model has no parameters
    monkeypatch.setattr(desk, "tokenizer_of", lambda place, tokenizer: tokenizer)
    with pytest.raises(KeyboardInterrupt):
        desk.serve_models({"a": "m"}, tokenizer=None, slots=5, max_length=64, int8_cache=True, mesh_tensor=2)
    ((place, settings, mesh_tensor),) = asked
    assert (place, mesh_tensor, settings.slots, settings.max_length, settings.int8_cache) == ("m", 2, 8, 64, True)


@pytest.mark.slow
def test_two_processes_compare_as_one(tokenizer, tmp_path):
    for seed, name in enumerate("ab"):
        tree = jax.tree.map(lambda x: 3 * x, params.init(params.table(CONFIG, head="lm_head"), jax.random.key(seed)))
        ours.write(tmp_path / name, tree, CONFIG, tokenizer=tokenizer.fingerprint, origin={})
        (tmp_path / name / "tokenizer.model").write_bytes(tokenizer.serialized())
    reward = params.init(params.table(CONFIG, head="reward_head"), jax.random.key(2))
    ours.write(tmp_path / "reward", reward, CONFIG, tokenizer=tokenizer.fingerprint, origin={})
    (tmp_path / "reward/tokenizer.model").write_bytes(tokenizer.serialized())
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"the loop {i}"}) + "\n" for i in range(5)))
    results = {}
    for count, judge in ((1, "helpfulness"), (2, "helpfulness"), (2, "judge")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        line = [sys.executable, "-m", "llama_jax.compare", f"--first=a={tmp_path / 'a'}", f"--second=b={tmp_path / 'b'}",
                f"--prompts={tmp_path / 'p.jsonl'}", f"--output={tmp_path / str(count)}", "--max_tokens=6", "--judge_tokens=4",
                f"--{judge}={tmp_path / ('reward' if judge == 'helpfulness' else 'a')}", "--slots=3"]  # fmt: skip
        started = []
        for index in range(count):
            cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
                       "JAX_PROCESS_ID": str(index)} if count > 1 else {}  # fmt: skip
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **cluster}
            started.append(subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment))
        done = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [0] * count, done
        assert "report.html" in done[0][0] and not any("report.html" in out for out, _ in done[1:])
        results[count, judge] = json.loads((tmp_path / str(count) / "results.json").read_text())["axes"]["all"]
    assert results[1, "helpfulness"] == results[2, "helpfulness"] and results[2, "judge"]["n"] == 5
    for name in ("answers_a.jsonl", "answers_b.jsonl"):
        rows = [sorted((tmp_path / count / name).read_text().splitlines()) for count in "12"]
        assert rows[0] == rows[1] and len(rows[0]) == 5
    assert len((tmp_path / "2/verdicts.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("command", ["desk", "human_evaluation"])
def test_what_runs_in_one_process_says_so_in_a_cluster(command, tmp_path):
    line = [sys.executable, "-m", f"llama_jax.{command}", f"--output={tmp_path / 'out'}", "--checkpoint=x", "--answers=a=b"]
    line.remove("--answers=a=b" if command == "desk" else "--checkpoint=x")
    cluster = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2"}
    done = [
        subprocess.run(line, capture_output=True, text=True, env={**os.environ, **cluster, "JAX_PROCESS_ID": index})
        for index in "01"
    ]
    assert [process.returncode for process in done] == [1, 1] and not (tmp_path / "out").exists()
    assert f"error: {command} runs in one process, and JAX_NUM_PROCESSES is 2" in done[0].stderr and not done[1].stderr


def test_checkpoints_have_names():
    assert desk.name_checkpoints(["runs/v1/", "new=runs/v2"]) == {"v1": "runs/v1/", "new": "runs/v2"}
    with pytest.raises(ValueError, match="two are named 'v1'"):
        desk.name_checkpoints(["a/v1", "b/v1"])


def test_the_desk_refuses_in_one_line_before_it_loads_anything(tmp_path):
    command = [sys.executable, "-m", "llama_jax.desk", "--checkpoint=nowhere", f"--output={tmp_path}/p.jsonl"]
    open_to_all = subprocess.run([*command, "--host=0.0.0.0"], capture_output=True, text=True)
    assert open_to_all.returncode == 1 and "needs --password" in open_to_all.stderr.splitlines()[-1]
    pytest.importorskip("gradio", reason="needs the extra [web]")
    held = RowFile(tmp_path / "p.jsonl")
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and "another process writes to it" in second.stderr.splitlines()[-1]
    held.close()


def test_raters_are_not_shown_what_another_checkpoint_of_that_name_answered(tmp_path):
    at = Desk(tmp_path / "r.jsonl", Settings("comparison", ("a", "b")), None, prompts=[prompt(0)])
    desk.check_kept(at, {"a": "runs/1", "b": "runs/2"}, top_p=0.9)
    desk.check_kept(at, {"a": "runs/1", "b": "runs/2"}, top_p=0.9)
    for places, top_p, words in (({"a": "runs/1", "b": "runs/3"}, 0.9, "path: 'runs/2' -> 'runs/3'"),
                                 ({"a": "runs/1"}, 1.0, "top_p: 0.9 -> 1.0")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            desk.check_kept(at, places, top_p=top_p)
