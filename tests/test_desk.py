"""Models behind the desk: streams of answers, its command over HTTP, passwords, and what it refuses."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from small_models import CONFIG, prompt, written

from llama_jax import desk
from llama_jax.annotation.drawing import Draw, Pair
from llama_jax.annotation.session import Desk
from llama_jax.annotation.streams import Engines, Served
from llama_jax.annotation.tasks import Settings
from llama_jax.chat import make_engine
from llama_jax.config import ConfigError
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.row_file import RowFile
from llama_jax.model.config import FLOAT32
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.pretrained import Model
from llama_jax.sampling.engine import EngineConfig
from llama_jax.sampling.worker import Worker


def test_answers_stream_from_engines_and_the_same_draw_gives_the_same_text(model):
    pytest.importorskip("prometheus_client", reason="needs the extra [web] or [serve]")
    with jax.set_mesh(model.mesh):
        engine = make_engine(model, EngineConfig(slots=2, max_length=128, chunks=((64, 2),), steps=2))
    worker = Worker(engine, model.mesh, queue=4)
    worker.start()
    engines = Engines({"one": Served(worker, model.tokenizer)}, max_tokens=24, top_p=1.0)

    def pair():
        finished, found = threading.Event(), []

        def done(texts, ended):
            found.append((texts, ended))
            finished.set()

        draws = [Draw("one", tuple(prompt(0)["messages"]), 1.0, 7, i) for i in range(2)]
        Pair(engines, draws, distinct=True, done=done).start()
        assert finished.wait(60)
        return found[0]

    try:
        texts, ended = pair()
        assert len(set(texts)) == 2 and all(texts) and pair() == (texts, ended)
        assert engines.fits("one", prompt(0)["messages"]) and not engines.fits("one", prompt(0, "a line " * 60)["messages"])
        lengths = {n: len(encode_chat(prompt(0, "a" * n)["messages"], model.tokenizer)) for n in range(120)}
        for n, length in lengths.items():  # the context has 128 tokens, an answer up to 24
            assert engines.fits("one", prompt(0, "a" * n)["messages"]) == (length <= 104), length
        assert {True, False} == {length <= 104 for length in lengths.values()}
        engines.systems["one"] = "be kind"
        under = [{"role": "system", "content": "be kind"}, *prompt(0)["messages"]]
        assert engines._prompt("one", prompt(0)["messages"])[0] == encode_chat(under, model.tokenizer)
        engines.systems.clear()
        engines.max_tokens = 100  # of which a quarter of the context is enough
        for n, length in lengths.items():
            messages = prompt(0, "a" * n)["messages"]
            assert engines.fits("one", messages) == (length <= 96) and engines.less_room("one", messages) == (length > 28)
        engines.max_tokens = 24
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


class Page:
    """The desk's page without a browser: what Gradio's script sends and gets."""

    def __init__(self, address):
        self.http = pytest.importorskip("httpx").Client(base_url=address, timeout=60)

    def log_in(self, name, password):
        return self.http.post("/login", data={"username": name, "password": password}).status_code

    def do(self, elem_id, event, *data):
        """Fires an event of a component; returns all that the server sends until it has ended."""
        config = self.http.get("/config").json()
        (component,) = [c["id"] for c in config["components"] if c["props"].get("elem_id") == elem_id]
        events = [d for d in config["dependencies"] if [component, event] in map(list, d["targets"])]
        (event_id,) = [d["id"] for d in events if d["backend_fn"]]
        asked = {"data": data, "fn_index": event_id, "session_hash": "here", "event_data": None, "trigger_id": component}
        assert self.http.post("/gradio_api/queue/join", json=asked).status_code == 200
        found = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "here"}) as stream:
            for line in filter(None, stream.iter_lines()):
                found.append(json.loads(line.removeprefix("data: ")))
                if found[-1]["msg"] in ("close_stream", "unexpected_error"):
                    break
        assert found[-2]["msg"] == "process_completed" and found[-2]["success"], found[-2:]
        return json.dumps(found)


@pytest.mark.slow
def test_the_desk_answers_over_http_with_a_real_checkpoint(tokenizer, tmp_path):
    for package in ("gradio", "prometheus_client"):
        pytest.importorskip(package, reason="needs the extra [web]")
    for seed, name in enumerate("ab"):
        written(tmp_path / name, tokenizer, seed=seed)
    (tmp_path / "passwords").write_text("Ann:hers\nBo:his\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "p.jsonl"
    process = subprocess.Popen([
        sys.executable, "-m", "llama_jax.desk", f"--checkpoint={tmp_path / 'a'}", f"--checkpoint={tmp_path / 'b'}",
        f"--output={output}", f"--port={port}", f"--passwords={tmp_path / 'passwords'}", "--max_tokens=8", "--slots=2",
    ], env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})  # fmt: skip
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.2)
        page = Page(f"http://127.0.0.1:{port}")
        assert [page.log_in("Ann", "his"), page.log_in("Cy", "his"), page.log_in("Ann", "hers")] == [400, 400, 200]
        page.do("begin", "click", "Bo")  # what the browser calls itself is nothing
        assert "Answer A" in page.do("ask", "click", None, "the loop", "Safety")
        shown = json.loads((tmp_path / "p.jsonl.desk/Ann.json").read_text())["shown"]
        assert sorted(shown["models"]) == ["a", "b"] and len(set(shown["texts"])) == 2
        page.do("submit", "click", None, None, "B slightly", "both_safe")
        (row,) = map(json.loads, output.read_text().splitlines())
        assert (row["rater"], row["chosen"], row["rejected"]) == ("Ann", *shown["texts"][::-1])
        assert (row["chosen_model"], row["rating"], row["safety_bin"]) == (shown["models"][1], "slightly", "both_safe")
        assert row["chosen_ended"] == shown["ended"][1]
    finally:
        process.terminate()
        process.wait()


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


def test_each_rater_may_have_a_password_of_their_own(tmp_path):
    file = tmp_path / "passwords"
    file.write_text("Ann: one: two\n\nBo:b\n")
    assert desk.read_passwords(file) == {"Ann": "one: two", "Bo": "b"}
    file.write_text("Zoe\u0308: a\n", encoding="utf-8-sig")  # as some editors save it
    assert desk.read_passwords(file) == {"Zo\u00eb": "a"}
    file.write_text("Ann:a\n-:b\n")
    with pytest.raises(ValueError, match="passwords:2: '-': A name has 1 to 40 letters"):
        desk.read_passwords(file)
    for text, line in (("Ann:a\nBo\n", 2), ("Ann:a\nAnn:b\n", 2), ("Ann:\n", 1)):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"passwords:{line}: expected name:password"):
            desk.read_passwords(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="no names in it"):
        desk.read_passwords(file)


def test_the_desk_refuses_in_one_line_before_it_loads_anything(tmp_path):
    command = [sys.executable, "-m", "llama_jax.desk", "--checkpoint=nowhere", f"--output={tmp_path}/p.jsonl"]
    open_to_all = subprocess.run([*command, "--host=0.0.0.0"], capture_output=True, text=True)
    assert open_to_all.returncode == 1 and "needs --password" in open_to_all.stderr.splitlines()[-1]
    pytest.importorskip("gradio", reason="needs the extra [web]")
    (tmp_path / "kind.txt").write_text("be kind")
    for flag, words in ((f"--system=nowhere={tmp_path}/kind.txt", "--system: is for the evaluations of 3.4.2, 4.4: expected"),
                        ("--top_p=2", "top_p: expected above 0 and at most 1, got 2.0"), ("--max_tokens=0", "--max_tokens"),
                        ("--temperatures=nan", "temperature: expected a finite number, at least 0, got nan")):  # fmt: skip
        wrong = subprocess.run([*command, flag], capture_output=True, text=True)
        assert wrong.returncode == 1 and words in wrong.stderr.splitlines()[-1], wrong.stderr
    held = RowFile(tmp_path / "p.jsonl")
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and "another process writes to it" in second.stderr.splitlines()[-1]
    held.close()


def test_raters_are_not_shown_what_another_checkpoint_of_that_name_answered(tmp_path):
    at = Desk(tmp_path / "r.jsonl", Settings("comparison", ("a", "b")), None, prompts=[prompt(0)])
    desk.check_kept(at, {"a": "runs/1", "b": "runs/2"}, {"b": "be kind"}, top_p=0.9)
    desk.check_kept(at, {"a": "runs/1", "b": "runs/2"}, {"b": "be kind"}, top_p=0.9)
    for places, system, top_p, words in (({"a": "runs/1", "b": "runs/3"}, "be kind", 0.9, "path: 'runs/2' -> 'runs/3'"),
                                         ({"a": "runs/1"}, "be kind", 1.0, "top_p: 0.9 -> 1.0"),
                                         ({"b": "runs/2"}, "be brief", 0.9, "system: 'be kind' -> 'be brief'")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            desk.check_kept(at, places, {"b": system}, top_p=top_p)
