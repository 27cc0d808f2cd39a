"""Text as tokens come, dialogs, requests in files: with a small random model and a real tokenizer."""

import io
import json

import jax
import pytest

from llama_jax import chat, requests
from llama_jax.data.text_stream import TextStream
from llama_jax.data.tokenizer import train_tokenizer
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, ModelConfig
from llama_jax.model.decode import prepare
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import EngineConfig

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
    settings = EngineConfig(slots=3, max_length=96, chunks=((64, 2),), steps=4)
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
    chat.talk(dialog, ["/reset", "x" * 300], out, rates=False)
    assert "the context 96" in out.getvalue() and len(dialog.messages) == 1


def ask(engine, tokenizer, lines, *, done=0):
    out = io.StringIO()
    errors = chat.answer_requests(
        engine, tokenizer, lines, out, done=done, defaults={"temperature": 0.0, "seed": 1}, max_tokens=5, where="in.jsonl"
    )
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
    assert chat.resume(path) == 9 and path.read_text().count("\n") == 9 and path.read_text().endswith("}\n")
    assert chat.resume(tmp_path / "none.jsonl") == 0
    rest, _ = ask(engine, tokenizer, lines, done=9)
    assert rest == rows[9:]


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
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty: is not supported"),
    ({"prompt": "a", "tempratur": 0.5}, "tempratur: is unknown"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\].content: missing"),
    ({"messages": [{"role": "user", "content": "[INST]"}]}, "chat tag"),
])  # fmt: skip
def test_wrong_requests_name_the_field(tokenizer, body, words):
    with pytest.raises(requests.RequestError, match=words):
        requests.parse(body, tokenizer, context=96, default_tokens=16)


def test_requests_have_the_defaults_of_the_api(tokenizer):
    (found,) = requests.parse({"prompt": "the loop", "top_p": None}, tokenizer, context=96, default_tokens=1000)
    assert found.prompt == tokenizer.encode("the loop", bos=True) and found.max_tokens == 96 - len(found.prompt)
    assert found.choice == Choice() and found.stop_ids == (tokenizer.eos_id,) and found.seed is None
    several = requests.parse(
        {"prompt": ["a", "b"], "max_completion_tokens": 3, "stop": "x", "n": 2}, tokenizer, context=96, default_tokens=9
    )
    assert [(one.max_tokens, one.stops, one.n) for one in several] == [(3, ("x",), 2)] * 2
