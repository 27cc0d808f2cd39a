"""Text as tokens come, dialogs, requests in files: with a small random model and a real tokenizer."""

import contextlib
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llama_jax import batch, chat, requests
from llama_jax import lines as lines_of
from llama_jax.data.text_stream import TextStream
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.interop import ours
from llama_jax.lines import Interrupts
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, Compute, ModelConfig
from llama_jax.model.decode import prepare
from llama_jax.parallel import host
from llama_jax.parallel.mesh import make_mesh
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import EngineConfig, Request
from llama_jax.serve_answer import Spelling

ROOT = Path(__file__).parents[1]
PIECES = 320
MODEL = ModelConfig(
    name="small", vocab_size=PIECES, layers=1, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=128
)
TEXTS = ["the loop reads a line of text and counts tokens, [INST] what is it? [/INST] <<SYS>> be kind <</SYS>>"] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("chat") / "tokenizer.model", vocab_size=PIECES)


@pytest.fixture(scope="module")
def engine():
    specs = params.table(MODEL, head="lm_head")
    tree = jax.tree.map(lambda x: 3 * x, params.init(specs, jax.random.key(0)))
    settings = EngineConfig(slots=3, max_length=96, chunks=((64, 2),), steps=4, alternatives=requests.ALTERNATIVES)
    return Engine(MODEL, prepare(tree, specs, compute=FLOAT32), settings, compute=FLOAT32).warm_up()


@pytest.mark.parametrize("text", ["the loop reads", " two  spaces\n\tand lines ", "naïve 漢字 🙂 end", "a line of text"])
def test_pieces_add_up_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)  # characters of several bytes come whole
    assert sum(map(bool, pieces)) > 1


def test_nothing_of_a_stop_string_is_shown(tokenizer):
    ids = tokenizer.encode("the loop reads a line of text")
    for stops, expected in ((["reads"], "the loop "), (["loops", "li"], "the loop reads a "), (["text!"], None)):
        stream, shown = TextStream(tokenizer, stops), ""
        for token in ids:
            shown += stream.push(token)
            assert (expected or "the loop reads a line of text").startswith(shown)
        shown += stream.finish()
        assert shown == (expected or "the loop reads a line of text") and stream.stopped == bool(expected)
    assert TextStream(tokenizer, ["x"]).finish() == ""
    cut = TextStream(tokenizer)
    first, *_ = tokenizer.encode("漢")[1:]  # the first byte of a character whose others never come
    assert cut.push(first) == "" and "\ufffd" in cut.finish()


class Script:
    """An engine that draws given tokens, one a step."""

    settings = EngineConfig(slots=1, max_length=96)

    def __init__(self, ids):
        self.ids, self.request = list(ids), None

    def submit(self, prompt, *, max_tokens, choice, seed, index, stop_ids, on_token, alternatives=0):
        self.request = Request(prompt, max_tokens, choice, np.zeros(2), tuple(stop_ids), on_token)
        return self.request

    def step(self):
        request = self.request
        request.tokens.append(self.ids[len(request.tokens)])
        request.finish = "length" if len(request.tokens) == len(self.ids) else ""
        request.on_token(request, request.tokens[-1])

    def cancel(self, request):
        request.finish = request.finish or "cancelled"


def new_dialog(engine, tokenizer, **changes):
    how = {"system": "", "max_tokens": 6, "choice": Choice(temperature=0.0), "seed": 1, **changes}
    return chat.Dialog(engine, tokenizer, **how)


def test_a_dialog_keeps_its_history_and_takes_commands(engine, tokenizer, tmp_path):
    out = io.StringIO()
    dialog = new_dialog(engine, tokenizer)
    lines = ["what is it?", "a line [INST]", "and text?", f"/save {tmp_path / 'dialog.json'}", "/what", "/system be kind", "it"]
    chat.talk(dialog, lines, out, rates=True)
    saved = json.loads((tmp_path / "dialog.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2
    assert [message["content"] for message in saved[::2]] == ["what is it?", "and text?"]
    assert [message["role"] for message in dialog.messages] == ["system", "user", "assistant"]
    shown = out.getvalue()
    assert shown.count("tokens/s") == 3 and "chat tag" in shown and "/what is unknown" in shown
    assert saved[1]["content"] in shown
    # The second question goes on where the first answer ended, so the history is in the slot already.
    again = new_dialog(engine, tokenizer)
    again.ask("what is it?", lambda text: None)
    assert again.messages[-1]["content"] == saved[1]["content"]
    chat.talk(dialog, ["/reset", "x" * 300, "\udcff"], out, rates=False)
    assert "the context 96" in out.getvalue() and len(dialog.messages) == 1
    assert out.getvalue().endswith("(the question holds a byte that is no UTF-8)\n") and "(dialog: messages[2]" in shown


def test_a_question_is_taken_back_and_an_answer_that_was_cut_off_says_so(tokenizer, tmp_path):
    out = io.StringIO()
    dialog = new_dialog(Script(tokenizer.encode("a line of text")), tokenizer, system="be kind", max_tokens=4)
    lines = ["/undo", "what is it?", "naïve?", "/undo", "/reset", "漢", f"/save {tmp_path / 'd.json'}"]
    chat.talk(dialog, lines, out, rates=True)
    said = out.getvalue()
    assert said.startswith("(there is no question to take back)\n")
    assert "(the last question and its answer are taken back)" in said
    assert said.count("tokens/s; cut off by max_tokens=4)") == 3
    assert [message["content"] for message in dialog.messages] == ["be kind", "漢", "a line of text"]
    assert '"漢"' in (tmp_path / "d.json").read_text(encoding="utf-8")  # as it was typed
    out = io.StringIO()
    dialog = new_dialog(Script(tokenizer.encode("a line of text")), tokenizer, max_tokens=500)
    chat.talk(dialog, [f"/save {tmp_path / 'mistyped/d.json'}", "what is it?", "x" * 300], out, rates=True)
    refused, *_ = out.getvalue().splitlines()
    assert refused == f"({tmp_path}/mistyped/d.json: there is no directory {tmp_path}/mistyped; expected one that exists)"
    assert not (tmp_path / "mistyped").exists() and "tokens/s; cut off by the context, which is full)" in out.getvalue()
    assert "/reset begins anew, /undo takes back the last question" in out.getvalue()
    dialog.engine = Script(tokenizer.encode("a line"))
    dialog.engine.step = lambda: setattr(dialog.engine.request, "finish", "stop")
    dialog.ask("it", lambda text: None)
    assert dialog.cut == ""


def test_an_answer_with_a_chat_tag_is_left_out_and_the_dialog_goes_on(tokenizer):
    out = io.StringIO()
    dialog = new_dialog(Script(tokenizer.encode("it is [INST] a line")), tokenizer)
    chat.talk(dialog, ["what is it?"], out, rates=False)
    assert out.getvalue().startswith("it is [INST] a line\n(question and answer are left out of the dialog: ")
    assert "holds the chat tag '[INST]'" in out.getvalue() and dialog.messages == []
    dialog.engine = Script(tokenizer.encode("a line of text"))
    chat.talk(dialog, [None, "and then?"], out, rates=False)
    assert [message["content"] for message in dialog.messages] == ["and then?", "a line of text"]
    asked = iter([False, True])
    how = {"listening": lambda: contextlib.nullcontext(lambda: next(asked))}
    dialog = new_dialog(Script(tokenizer.encode("a line of text")), tokenizer, **how)
    assert dialog.ask("what is it?", lambda text: None)[0] == 1 and dialog.messages[-1]["content"] == "a"


def test_ctrl_c_ends_an_answer_between_two_steps(tokenizer):
    class Interrupted(Script):
        def step(self):
            os.kill(os.getpid(), signal.SIGINT)
            super().step()  # not broken off: the engine gives its buffers away before it has the new ones

    before = signal.getsignal(signal.SIGINT)
    dialog = new_dialog(Interrupted(tokenizer.encode("a line of text")), tokenizer, listening=Interrupts)
    assert dialog.ask("what is it?", lambda text: None)[0] == 1 and dialog.messages[-1]["content"] == "a"
    assert signal.getsignal(signal.SIGINT) is before


def ask(engine, tokenizer, lines, *, done=(), **how):
    out = io.StringIO()
    how = {"defaults": {"temperature": 0.0, "seed": 1}, "max_tokens": 5, "where": "in.jsonl", **how}
    errors = batch.answer_lines(engine, tokenizer, lines, out, done=done, **how)
    return [json.loads(line) for line in out.getvalue().splitlines()], errors


def test_requests_are_answered_in_order_and_a_killed_run_goes_on(engine, tokenizer, tmp_path):
    lines = [json.dumps({"id": i, "prompt": f"the loop {i}", "max_tokens": 1 + i % 7}) for i in range(20)]
    lines[3] = '{"prompt": 3}'
    lines[4] = "no json"
    lines[5] = json.dumps({"messages": [{"role": "user", "content": "what is it?"}], "temperature": 1.0, "n": 3})
    rows, errors = ask(engine, tokenizer, lines)
    assert [row["line"] for row in rows] == list(range(1, 21)) and errors == 2
    assert "in.jsonl:4: prompt: expected a text" in rows[3]["error"] and "in.jsonl:5:" in rows[4]["error"]
    assert rows[7]["id"] == 7 and rows[7]["tokens"] <= 1 and len(rows[5]["answers"]) == 3
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:9]) + '{"line": 10, "te')
    done = batch.resume(path)
    assert done == [(row["request"], "error" in row) for row in rows[:9]] and len(set(done)) == 9
    assert path.read_text().count("\n") == 9 and path.read_text().endswith("}\n")
    assert batch.resume(tmp_path / "none.jsonl") == []
    rest, errors = ask(engine, tokenizer, lines, done=done)
    assert rest == rows[9:] and errors == 2  # what could not be answered stays so
    # The answers to other requests are no answers to these.
    lines[2] = json.dumps({"prompt": "another loop"})
    with pytest.raises(ValueError, match="^in.jsonl:3: is not the request that was answered before"):
        ask(engine, tokenizer, lines, done=done)
    for other in ({"defaults": {"temperature": 0.0, "seed": 2}}, {"system": "Be brief."}, {"max_tokens": 6},
                  {"model": {"weights": "another"}}):  # fmt: skip
        with pytest.raises(ValueError, match="^in.jsonl:1: .*or not by the model and under the settings of then"):
            ask(engine, tokenizer, [json.dumps({"id": 0, "prompt": "the loop 0", "max_tokens": 1})], done=done, **other)
    path.write_text('{"line": 1, "text": "a"}\n')
    with pytest.raises(ValueError, match="out.jsonl:1: expected an answer that names its request"):
        batch.resume(path)


def test_requests_in_a_file_have_their_options(engine, tokenizer, monkeypatch):
    question = [{"role": "user", "content": "what is it?"}]
    prompts = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda prompt, **how: prompts.append(prompt) or submit(prompt, **how))
    own = [{"role": "developer", "content": "count"}, *question]
    lines = [json.dumps({"messages": messages}) for messages in (question, own)] + [json.dumps({"prompt": "the loop"})]
    ask(engine, tokenizer, lines, system="be kind")
    under = [{"role": "system", "content": "be kind"}, *question], [{"role": "system", "content": "count"}, *question]
    expected = [chat.encode_chat(messages, tokenizer) for messages in under]
    assert prompts == [*expected, tokenizer.encode("the loop", bos=True)]
    # Log-probs are written where they are asked for.
    ((row,), _) = ask(engine, tokenizer, [json.dumps({"prompt": "the loop", "logprobs": 0, "stop_token_ids": []})])
    told = row["logprobs"]  # in the form that a server gives
    assert told.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"} and told["top_logprobs"] is None
    assert len(told["token_logprobs"]) == row["tokens"] and all(p <= 0 for p in told["token_logprobs"])
    assert "".join(told["tokens"]) == row["text"] and not any("\u2581" in token for token in told["tokens"])
    ((row,), _) = ask(engine, tokenizer, [json.dumps({"prompt": "the loop", "logprobs": 2, "stop_token_ids": []})])
    best = [max(likely.values()) for likely in row["logprobs"]["top_logprobs"]]
    np.testing.assert_allclose(best, row["logprobs"]["token_logprobs"], atol=1e-5)  # greedy
    ((row,), _) = ask(engine, tokenizer, [json.dumps({"messages": question, "logprobs": True, "top_logprobs": 2})])
    assert "".join(token["token"] for token in row["logprobs"]["content"]).strip() == row["text"]
    assert all(1 <= len(token["top_logprobs"]) <= 2 for token in row["logprobs"]["content"])
    # Rows that fill up the embedding have no text to tell of.
    (asked,) = requests.parse({"prompt": "the loop", "logprobs": 2}, tokenizer, context=96, default_tokens=1)
    spelling = Spelling(tokenizer, asked)
    spelling.add(5, -0.5, [(5, -0.5), (tokenizer.vocab_size, -1.0)])
    assert list(spelling.told("prompt")["top_logprobs"][0].values()) == [-0.5]
    # A seed of its own gives one answer on every line; another draws otherwise there.
    drawn = {"prompt": "the loop", "temperature": 1.0, "max_tokens": 20}
    line, other = json.dumps({**drawn, "seed": 7}), json.dumps(drawn)
    texts = [row["text"] for row in ask(engine, tokenizer, [line, other, line, other])[0]]
    assert texts[0] == texts[2] and texts[1] != texts[3]
    assert "logprobs" not in ask(engine, tokenizer, ['{"prompt": "the loop"}'])[0][0]
    # Two answers to one prompt are two draws, whether asked for by n or by saying it twice.
    for body in ({"prompt": ["the loop"] * 2}, {"prompt": "the loop", "n": 2}):
        ((row,), _) = ask(engine, tokenizer, [json.dumps({**body, "temperature": 1.0, "max_tokens": 20})])
        assert row["answers"][0]["text"] != row["answers"][1]["text"]


def test_lines_of_openais_batch_files_are_answered_under_their_custom_id(engine, tokenizer):
    def line(**changes):
        body = {"model": "small", "prompt": "the loop", "max_tokens": 3}
        return json.dumps({"custom_id": "a-1", "method": "POST", "url": "/v1/completions", "body": body} | changes)

    bare = json.dumps({"prompt": "the loop", "max_tokens": 3})
    wrong = {"url": "/v1/embeddings", "method": "GET", "body": [1], "bdy": 1}
    lines = [bare, line(), *(line(**{name: value}) for name, value in wrong.items()), line(body={"messages": []})]
    rows, errors = ask(engine, tokenizer, lines, name="small")
    assert errors == 5 and rows[1]["text"] == rows[0]["text"] and all(row["custom_id"] == "a-1" for row in rows[1:])
    for row, words in zip(rows[2:], (
        "url: expected one of /v1/chat/completions, /v1/completions, got '/v1/embeddings'",
        "method: expected 'POST', got 'GET'",
        "body: expected a JSON object, got list", "bdy: is unknown beside body", "prompt: missing from the body of a request",
    ), strict=True):  # fmt: skip
        assert words in row["error"]


def test_a_line_that_names_another_model_is_an_error(engine, tokenizer):
    fine = {"prompt": "the loop", "max_tokens": 1}
    lines = [json.dumps({**fine, **named}) for named in ({"model": "gpt-4"}, {"model": "small"}, {})]
    rows, errors = ask(engine, tokenizer, lines, name="small")
    assert errors == 1 and rows[0]["error"] == "in.jsonl:1: model: 'gpt-4' does not exist; there is 'small'"
    assert [row.get("tokens") for row in rows] == [None, 1, 1]
    assert requests.model_name("", "runs/demo/ppo/") == "ppo" and requests.model_name("mine", "runs/demo/ppo") == "mine"


def test_slots_do_not_wait_for_a_long_answer(tokenizer):
    class Slots(Script):
        """Three at a time, one token a step; `max_tokens` of each."""

        def __init__(self):
            self.queue, self.busy, self.waited = [], [], 0
            self.settings = EngineConfig(slots=3, max_length=96)

        def submit(self, prompt, **how):
            self.queue.append(super().submit(prompt, **{name: how[name] for name in (
                "max_tokens", "choice", "seed", "index", "stop_ids", "on_token"
            )}))  # fmt: skip
            return self.request

        def step(self):
            self.busy = [request for request in self.busy if not request.finish]
            while self.queue and len(self.busy) < 3:
                self.busy.append(self.queue.pop(0))
            self.waited += 3 - len(self.busy) if asked else 0
            for request in self.busy:
                request.tokens.append(5)
                request.finish = "length" if len(request.tokens) == request.max_tokens else ""
                request.on_token(request, 5)

    asked = [json.dumps({"prompt": "the loop", "max_tokens": n}) for n in (60, *[1] * 110)]

    def lines():
        while asked:
            yield asked.pop(0)

    engine = Slots()
    rows, errors = ask(engine, tokenizer, lines())
    assert not errors and [row["tokens"] for row in rows] == [60, *[1] * 110] and engine.waited == 0


def test_an_empty_line_is_no_question_and_no_end(tokenizer):
    out = io.StringIO()
    dialog = new_dialog(Script(tokenizer.encode("a line of text")), tokenizer)
    chat.talk(dialog, ["what is it?", "", "  ", "and then?", "/quit", "never"], out, rates=False)
    assert [message["content"] for message in dialog.messages[::2]] == ["what is it?", "and then?"]


def test_completions_continue_their_prompt_and_answers_are_stripped(tokenizer):
    ids = tokenizer.encode("a line")
    for body, expected in (
        ({"prompt": "the loop"}, " a line"), ({"messages": [{"role": "user", "content": "what is it?"}]}, "a line"),
        ({"prompt": "the loop", "stop": ["in"]}, " a l"),
    ):  # fmt: skip
        ((row,), _) = ask(Script(ids), tokenizer, [json.dumps(body)])
        assert row["text"] == expected and row["finish_reason"] == ("stop" if "stop" in body else "length")


def test_stop_strings_end_the_drawing(engine, tokenizer):
    ((whole,), _) = ask(engine, tokenizer, ['{"prompt": "the loop", "max_tokens": 80}'])
    stop, before = whole["text"][5:8], engine.drawn_tokens
    ((row,), _) = ask(engine, tokenizer, [json.dumps({"prompt": "the loop", "max_tokens": 80, "stop": stop})])
    assert row["text"] == whole["text"][: whole["text"].index(stop)] and row["finish_reason"] == "stop"
    assert row["tokens"] <= engine.drawn_tokens - before < 24 < whole["tokens"]


@pytest.mark.parametrize(("line", "words"), [
    ('{"prompt": "the", "id": 7, "stop_token_ids": [1099511627776]}', "stop_token_ids: expected at most 8 ids in 0..319"),
    ('{"prompt": "the", "id": 7, "top_k": 1099511627776}', "top_k: expected an integer in 0..2147483647"),
    ('{"prompt": "the", "id": 7, "temperature": 1' + "0" * 400 + "}", "temperature: expected a number"),
    ('{"prompt": "the", "id": 7, "max_tokens": 0}', "max_tokens: expected an integer"),
    ('{"prompt": "the", "top_k": Infinity}', "body: not JSON: Out of range float"),
    ('{"prompt": "the", "id": 1e400}', "body: not JSON: Out of range float"),
    ('{"prompt": "\\ud800"}', "body: holds a lone surrogate"),
    ('{"prompt": "the", "id": "\\ud800"}', "body: holds a lone surrogate"),
    ('{"prompt": "\udcff"}', "body: holds a lone surrogate or a byte outside UTF-8"),
    ("[" * 100_000, "body: not JSON: nested too deeply"),
    ("", "body: not JSON: Expecting value"),
])  # fmt: skip
def test_a_line_that_is_no_request_is_an_error_row_with_its_id_and_the_others_go_on(engine, tokenizer, line, words):
    fine = '{"prompt": "the loop", "max_tokens": 1}'
    rows, errors = ask(engine, tokenizer, [fine, line, fine])
    assert errors == 1 and [row.get("tokens") for row in rows] == [1, None, 1]
    assert rows[1]["error"].startswith(f"in.jsonl:2: {words}") and rows[1].get("id") == (7 if '"id": 7' in line else None)
    json.dumps(rows[1], ensure_ascii=False).encode()


def test_lines_of_a_file_end_at_newlines_alone(tmp_path):
    texts = ["the loop", "a line\u2028of text", "a\x85b", "counts"]
    rows = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "in.jsonl").write_text("\r\n".join(rows) + "\r\n\r\n \n", encoding="utf-8", newline="")
    found = lines_of.open_input(str(tmp_path / "in.jsonl"), "-", waits=True)
    assert found.total == 4 and [json.loads(line)["prompt"] for line in found.lines] == texts
    (tmp_path / "none.jsonl").write_text("")
    assert lines_of.open_input(str(tmp_path / "none.jsonl"), "-", waits=True).total == 0


def test_a_live_pipe_is_answered_line_by_line(engine, tokenizer):
    reading, writing = os.pipe()
    out = io.StringIO()
    how = {"defaults": {"temperature": 0.0}, "max_tokens": 2}
    lines = lines_of.arriving(lines_of._piped(reading))
    thread = threading.Thread(target=batch.answer_lines, args=(engine, tokenizer, lines, out), kwargs=how, daemon=True)
    thread.start()
    for count in range(1, 4):
        os.write(writing, b'{"prompt": "a\xc2\x85b"}\n{"pro')
        limit = time.monotonic() + 60
        while out.getvalue().count("\n") < count:  # before anything else is written
            assert time.monotonic() < limit
            time.sleep(0.01)
        os.write(writing, b'mpt": "the loop"}\n')
    os.close(writing)
    thread.join(60)
    assert not thread.is_alive() and out.getvalue().count('"tokens": 2') == 6
    os.close(reading)
    with pytest.raises(OSError):
        list(lines_of.arriving(lines_of._piped(reading)))


def workdir(path, tokenizer, *, head="lm_head"):
    """A checkpoint of ours with its tokenizer; values of the size that sampling needs."""
    tree = jax.tree.map(lambda x: 3 * x, params.init(params.table(MODEL, head=head), jax.random.key(0)))
    ours.write(path, tree, MODEL, tokenizer=tokenizer.fingerprint, origin={})
    (path / "tokenizer.model").write_bytes(tokenizer.serialized())
    return str(path)


def test_what_cannot_talk_is_refused_before_it_is_loaded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "load", lambda *_, **__: pytest.fail("loaded"))
    reward = workdir(tmp_path / "reward", tokenizer, head="reward_head")
    with pytest.raises(ValueError, match="reward: this is a reward model: it has `score.weight` and no `lm_head`"):
        chat.open_engine(reward, lambda model: Script.settings, tokenizer=None)
    (tmp_path / "reward/tokenizer.model").unlink()
    mute = tmp_path / "mute"
    workdir(mute, tokenizer)
    (mute / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="mute: missing tokenizer: --tokenizer names one"):
        chat.open_engine(str(mute), lambda model: Script.settings, tokenizer=None)
    # So is a place where answers cannot go.
    (tmp_path / "in.jsonl").write_text("{}\n")
    given = {"temperature": 0.0, "top_p": 1.0, "checkpoint": str(mute), "workdir": None, "requests": str(tmp_path / "in.jsonl")}
    given |= {"answers": str(tmp_path / "nowhere/out.jsonl"), "tokenizer": None, "int8_weights": False}
    monkeypatch.setattr(chat.flags, "FLAGS", SimpleNamespace(**given))
    monkeypatch.setattr(chat, "keep_heap", lambda: None)
    monkeypatch.setattr(chat.command, "join_cluster", lambda: None, raising=False)
    with pytest.raises(FileNotFoundError, match="nowhere/out.jsonl"):
        chat.main()


@pytest.mark.parametrize("int8", [False, True])
def test_the_engines_weights_are_all_that_is_held_of_a_model(tokenizer, tmp_path, monkeypatch, int8):
    load, place = chat.load, workdir(tmp_path / "chat", tokenizer)

    class Held:
        def __init__(self, config, weights, settings, *, compute):
            self.weights, self.kinds = weights, {leaf.dtype.name for leaf in jax.tree.leaves(weights)}
            self.bytes = held()

        def warm_up(self):
            return self

    def held():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    monkeypatch.setattr(chat, "Engine", Held)
    monkeypatch.setattr(chat, "load", lambda *args, **how: load(*args, compute=Compute("bfloat16"), **how))
    before = held()
    engine, model = chat.open_engine(place, lambda model: Script.settings, tokenizer=None, int8=int8)
    assert engine.kinds == {"float32", "int8" if int8 else "bfloat16"}
    assert engine.bytes - before == sum(x.nbytes for x in jax.tree.leaves(engine.weights))
    engine.weights = None  # others of a better model come in their place
    assert model.params == {} and held() == before


COMMAND = ["--temperature=0.0", "--max_tokens=12", "--max_length=64", "--slots=3"]


def talk_in(processes, place, *more, typed=""):
    """Runs the command in some processes; [(code, output, errors)]. All but the first have no standard input."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(processes):
        cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes),
                   "JAX_PROCESS_ID": str(index)} if processes > 1 else {}  # fmt: skip
        line = [sys.executable, "-m", "llama_jax.chat", f"--checkpoint={place}", *COMMAND, *more]
        started.append(subprocess.Popen(
            line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **cluster},
        ))  # fmt: skip
    texts = [process.communicate(typed if not index else "", timeout=300) for index, process in enumerate(started)]
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


@pytest.mark.slow
def test_two_processes_answer_as_one(tokenizer, tmp_path):
    place = workdir(tmp_path / "chat", tokenizer)
    lines = [json.dumps({"id": i, "prompt": f"the loop {i}", "n": 1 + i % 2}) for i in range(9)]
    lines[2], lines[4] = "no json", json.dumps({"prompt": "a line\u2028", "stop": ["e", "4"]}, ensure_ascii=False)
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    rows = {}
    for count in (1, 2):
        out = tmp_path / f"{count}.jsonl"
        files = [f"--requests={tmp_path / 'in.jsonl'}", f"--answers={out}"]
        done = talk_in(count, place, *files)
        assert [code for code, *_ in done] == [1] * count, done
        assert "1 requests could not be answered" in done[0][2]
        rows[count] = [json.loads(line) for line in out.read_text().splitlines()]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[2][:5]))  # killed, it goes on
    assert [code for code, *_ in talk_in(2, place, *files)] == [0, 0]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows[2]
    assert rows[1] == rows[2] and [row["line"] for row in rows[1]] == list(range(1, 10))
    said = {}
    for count in (1, 2):
        done = talk_in(count, place, typed="what is it?\nand then?\n/what\n/quit\n")
        assert [code for code, *_ in done] == [0] * count, done
        said[count], *others = [[line for line in out.splitlines() if "[Gloo]" not in line] for _, out, _ in done]
        assert others == [[]] * (count - 1)
    assert said[1] == said[2] and len(said[1]) >= 3 and "/what is unknown" in said[1][-1]
    done = talk_in(2, place, "--requests=nowhere.jsonl")  # what fails in the first ends both
    assert [code for code, *_ in done] == [1, 1] and all("nowhere.jsonl" in errors for _, _, errors in done)


@pytest.mark.parametrize(("body", "words"), [
    ([], "body: expected a JSON object, got list"),
    ({}, "body: expected either messages or prompt"),
    ({"prompt": "a", "messages": []}, "body: expected either"),
    ({"prompt": []}, "prompt: expected a text, a list of ids"),
    ({"prompt": [5, PIECES]}, "prompt: expected texts or ids in 0..319"),
    ({"prompt": "a", "temperature": -1}, "temperature: expected at least 0, got -1"),
    ({"prompt": "a", "temperature": "hot"}, "temperature: expected a number, got 'hot'"),
    ({"prompt": "a", "top_p": 0}, "top_p: expected above 0"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens: expected an integer of at least 1, got 0"),
    ({"prompt": "a", "max_tokens": 100}, "max_tokens: expected at most .* got 100"),
    ({"prompt": "the loop " * 60}, "prompt: has .* leaves no room"),
    ({"prompt": "a", "n": 9}, "n: expected at most 8 answers a request, got 9"),
    ({"prompt": "a", "stop": [1]}, "stop: expected a text or a list of texts"),
    ({"prompt": "a", "stop_token_ids": [PIECES]}, r"stop_token_ids: expected at most 8 ids in 0..319, got \[320\]"),
    ({"prompt": "a", "stop_token_ids": [True]}, r"stop_token_ids: expected at most 8 ids in 0..319, got \[True\]"),
    ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids: expected at most 8"),
    ({"prompt": "a", "top_k": 2**31}, "top_k: expected an integer in 0..2147483647, got 2147483648"),
    ({"prompt": "a", "top_k": float("inf")}, "top_k: expected a finite number, an integer"),
    ({"prompt": "a", "temperature": 10**400}, "temperature: expected a number"),
    ({"prompt": "\ud800"}, "prompt: encode: lone surrogate"),
    ({"prompt": "a", "stream_options": "x"}, "stream_options: expected an object, got 'x'"),
    ({"prompt": "a", "stream_options": {"include_usage": 1}}, "include_usage: expected true or false, got 1"),
    ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty: expected -2 to 2, got 2.5"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias: is not supported"),
    ({"prompt": "a", "tempratur": 0.5}, "tempratur: is unknown"),
    ({"prompt": "a", "max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens: expected either it or max_tokens"),
    ({"prompt": "a", "max_completion_tokens": 100}, "max_completion_tokens: expected at most .* got 100"),
    ({"prompt": [True, False]}, "prompt: expected texts or ids"),
    ({"prompt": "a", "logprobs": -1}, "logprobs: expected an integer of at least 0, got -1"),
    ({"prompt": "a", "logprobs": "yes"}, "logprobs: expected an integer of at least 0, got 'yes'"),
    ({"prompt": "a", "logprobs": 21}, "logprobs: expected at most 20, got 21"),
    ({"prompt": "a", "logprobs": 2, "top_logprobs": 2}, "top_logprobs: belongs to chats; expected their number in logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs: expected logprobs: true beside it"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, "echo: is offered with logprobs by llama_jax.serve --score_prompts only"),
    ({"messages": [{"role": "user", "content": "a"}], "echo": True}, "echo: is offered for completions only"),
    ({"messages": [{"role": "user", "content": "a"}], "logprobs": 3}, "logprobs: expected true or false, got 3"),
    ({"messages": [{"role": "user", "content": "the loop " * 60}]}, "^messages: has .* leaves no room"),
    ({"messages": []}, "^messages: expected at least one, got an empty list"),
    ({"messages": [{"role": "user"}]}, r"^messages\[0\].content: missing"),
    ({"messages": [{"role": "user", "content": "[INST]"}]}, "chat tag"),
])  # fmt: skip
def test_wrong_requests_name_the_field(tokenizer, body, words):
    with pytest.raises(requests.RequestError, match=words):
        requests.parse(body, tokenizer, context=96, default_tokens=16)


def test_what_common_clients_send_is_understood(tokenizer):
    def asked(**body):
        return requests.parse(body, tokenizer, context=96, default_tokens=16)[0]

    plain = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is it?"}]
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "is it?"}]
    sent = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    neutral = {
        "response_format": {"type": "text"}, "logit_bias": {}, "tools": [], "tool_choice": "auto", "presence_penalty": 0.0,
        "parallel_tool_calls": True,
    }  # fmt: skip
    assert asked(messages=sent, **neutral) == asked(messages=plain)
    assert asked(messages=plain, seed=2**31 - 1).seed == 2**31 - 1
    seeds = [asked(messages=plain, seed=seed).seed for seed in (2**31, 2**40, -1, 2**63 - 1)]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**31 for seed in seeds)
    for body, words in (
        ({"response_format": {"type": "json_object"}}, "response_format: is not supported"),
        ({"tools": [{"type": "function"}]}, "tools: is not supported"),
        ({"seed": 2**63}, "seed: expected an integer of 64 bits"), ({"seed": "1"}, "seed: expected an integer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0..content: expected parts of type"),
    ):  # fmt: skip
        with pytest.raises(requests.RequestError, match=words):
            asked(**{"messages": plain, **body})


def test_an_answer_ends_at_every_stop_id_of_the_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "stop_ids", (2, 17))
    (found,) = requests.parse({"prompt": "a", "stop_token_ids": [5]}, tokenizer, context=96, default_tokens=1)
    assert found.stop_ids == (2, 17, 5)
    many = tuple(range(17))  # a request has room for eight beside them, however many they are
    monkeypatch.setattr(tokenizer, "stop_ids", many)
    (found,) = requests.parse({"prompt": "a", "stop_token_ids": [5] * 8}, tokenizer, context=96, default_tokens=1)
    assert found.stop_ids == (*many, *[5] * 8)
    for count, room in ((17, EngineConfig.stops), (60, 68)):
        words = SimpleNamespace(stop_ids=tuple(range(count)))
        model = SimpleNamespace(mesh=make_mesh(devices=jax.devices()[:1]), config=MODEL, tokenizer=words)
        assert chat.settings_of(model, slots=1).stops == room >= count + requests.STOP_IDS
    monkeypatch.setattr(tokenizer, "stop_ids", (2, 17))
    engine = Script(tokenizer.encode("a line"))
    new_dialog(engine, tokenizer).ask("what is it?", lambda text: None)
    assert engine.request.stop_ids == (2, 17)


def test_requests_have_the_defaults_of_the_api(tokenizer):
    (found,) = requests.parse({"prompt": "the loop", "top_p": None}, tokenizer, context=96, default_tokens=1000)
    assert found.prompt == tokenizer.encode("the loop", bos=True) and found.max_tokens == 96 - len(found.prompt)
    assert found.choice == Choice() and found.stop_ids == (tokenizer.eos_id,) and found.seed is None
    several = requests.parse(
        {"prompt": ["a", "b"], "max_completion_tokens": 3, "stop": "x", "n": 2}, tokenizer, context=96, default_tokens=9
    )
    assert [(one.max_tokens, one.stops, one.n) for one in several] == [(3, ("x",), 2)] * 2


def test_programs_are_kept_in_the_users_cache_by_kind_of_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before, found = jax.config.jax_compilation_cache_dir, []
    try:
        for instructions in ("avx2", "avx2 avx512f", "avx2"):
            monkeypatch.setattr(host, "_cpu_flags", lambda instructions=instructions: instructions)
            jax.config.update("jax_compilation_cache_dir", None)
            host.keep_compiled_at_home()
            found.append(jax.config.jax_compilation_cache_dir)
        host.keep_compiled("elsewhere")  # a cache that is chosen already stays
        assert jax.config.jax_compilation_cache_dir == found[2] == found[0] != found[1]
        assert all(path.startswith(f"{tmp_path}/llama_jax/") for path in found)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
