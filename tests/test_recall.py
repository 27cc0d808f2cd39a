"""Recall of two checkpoints: answers kept and resumed, the table, refusals; once through the real engine."""

import contextlib
import dataclasses
import json
import types

import jax
import pytest
import small_models
import small_runs

from llama_jax import recall
from llama_jax.chat import open_engine, settings_of
from llama_jax.config import ConfigError
from llama_jax.data.sources import write_jsonl
from llama_jax.evals.ghost import follow
from llama_jax.parallel.mesh import make_mesh


class Engine:
    """Obeys in the first turns: "Sure" begins an answer while the conversation has fewer than `until` messages."""

    settings = types.SimpleNamespace(max_length=600)

    def __init__(self, until, dies_after=10**9):
        self.until, self.left, self.queue, self.drawn = until, dies_after, [], 0

    def submit(self, ids, *, on_token, **_):
        self.queue.append((ids, on_token))

    def step(self):
        if not self.queue:
            return False
        if not self.left:
            raise KeyboardInterrupt
        ids, on_token = self.queue.pop(0)
        self.left, self.drawn = self.left - 1, self.drawn + 1
        text = "Sure: yes" if ids.count(1) < self.until else "no"
        on_token(types.SimpleNamespace(finish="stop", tokens=[*map(ord, text), 2]), 2)
        return True


class Letters:
    bos_id, eos_id, stop_ids, chat_template, vocab_size = 1, 2, (2,), None, 1000

    def encode(self, text, *, bos=False, eos=False):
        return [1] * bos + [*map(ord, text)] + [2] * eos

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def contexts(tmp_path):
    write_jsonl(tmp_path / "dialogs.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in range(9)]
                + [{"prompt": "q" * 400, "completion": "a"}])
    return recall.make_contexts(
        str(tmp_path / "dialogs.jsonl"), {"opening": ("Sure",)}, count=4, turns=4, longest=20, seed=0
    )


def measure(contexts, directory, engine, name="one", **changes):
    model = types.SimpleNamespace(tokenizer=Letters(), mesh=make_mesh(devices=jax.devices()[:1]))
    how = {"turns": (2, 4), "max_tokens": 16, "open_model": lambda place: (engine, model), **changes}
    return recall.measure(name, f"runs/{name}", contexts, directory, **how)


def test_a_stopped_run_goes_on_and_the_table_has_every_checkpoint(contexts, tmp_path):
    whole = measure(contexts, tmp_path / "whole", Engine(until=4))
    assert [(row.turn, row.obeyed) for row in whole] == [(2, True)] * 4 + [(4, False)] * 4
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        measure(contexts, out, Engine(until=4, dies_after=6))
    again = Engine(until=4)
    assert measure(contexts, out, again) == whole
    assert 0 < again.drawn <= 4 * 4 - 6  # the six of before are not asked again
    assert measure(contexts, out, None) == whole  # nor is a model loaded for what is there
    found = {"one": whole, "two": measure(contexts, out, Engine(until=99), "two")}
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    text = recall.report(found, {"one": "runs/one", "two": "runs/two"}, contexts, out, maps={})
    assert "| turn | one | two |" in text and "| 4 | 0 % (0 to 49) | 100 % (51 to 100) |" in text
    assert "| 4 | 10 % | 100 % |" in text and "| 20 | 0 % | 100 % |" in text  # the paper's
    assert "|  | Instruction: Begin every answer with Sure. |  |  |" in text and "| turn | user | one | two |" in text
    assert f"| 4 | {contexts[0].messages[6]['content']} | \u2717 no | \u2713 Sure: yes |" in text
    assert (out / "recall.md").read_text() == text and (out / "ghost_recall.png").exists()
    assert json.loads((out / "recall.json").read_text())["recall"]["two"]["4"]["mean"] == 1.0


def test_attention_is_drawn_for_the_first_dialogs_with_each_checkpoints_answers(contexts, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    monkeypatch.setattr(small_models, "CONFIG", dataclasses.replace(small_models.CONFIG, max_length=512))
    found, places = {}, {name: str(tmp_path / name) for name in ("one", "two")}
    for seed, (name, place) in enumerate(places.items()):
        small_models.written(tmp_path / name, tokenizer, seed=seed)
        recall.check_attention(name, place, contexts[0], tmp_path / "out", tokenizer=None)
        found[name] = measure(contexts, tmp_path / "out", Engine(until=4), name)
        recall.attend(name, place, contexts[:2], tmp_path / "out", tokenizer=None)
    monkeypatch.setattr(recall, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for count in (2, 1):
        recall.attend("one", "gone", contexts[:count], tmp_path / "out", tokenizer=None)
    recall.check_attention("one", "gone", contexts[0], tmp_path / "out", tokenizer=None)
    maps = {name: recall.kept_maps(name, tmp_path / "out", 2) for name in places}
    assert [list(some) for some in maps.values()] == [["1", "2"]] * 2
    assert list(recall.kept_maps("one", tmp_path / "out", 1)) == ["1"]
    text = recall.report(found, places, contexts, tmp_path / "out", maps=maps)
    shares = json.loads((tmp_path / "out/recall.json").read_text())["attention"]
    assert [[len(turns) for turns in some] for some in shares.values()] == [[4, 4]] * 2 and shares["one"] != shares["two"]
    assert f"| 2 | {shares['one'][1][0]:.2f}, {shares['one'][1][3]:.2f} |" in text and "| dialog | one | two |" in text
    assert all((tmp_path / f"out/attention_{number}.png").exists() for number in (1, 2))


def test_a_drawn_dialog_is_the_one_that_was_gone_through(contexts):
    context, answers = contexts[0], {}
    said = iter([("Sure: 1", True), ("no room", True), ("[INST]", True), ("cut", False)])

    def respond(conversations, *, seed, progress=None):
        for messages in conversations:
            answers[recall.digest(messages)] = next(said)
        return [answers[recall.digest(messages)] for messages in conversations]

    follow([context], respond, turns=(4,), fits=lambda messages: all("room" not in m["content"] for m in messages))
    dialog = recall.drawn_dialog(context, answers)
    assert [message["content"] for message in dialog[1::2]] == ["Sure: 1", "a", "a", "a"]
    assert dialog[0]["content"] == f"{context.instruction} {context.messages[0]['content']}" and len(dialog) == 8


def test_other_settings_other_dialogs_and_dialogs_that_do_not_fit_are_refused(contexts, tmp_path):
    measure(contexts, tmp_path, Engine(until=4))
    for changes in ({"turns": (1, 4)}, {"max_tokens": 8}):
        with pytest.raises(ConfigError, match="model_one.json: results under this name are of another model, or of other set"):
            measure(contexts, tmp_path, Engine(until=4), **changes)
    with pytest.raises(ConfigError, match="contexts: "):
        measure(contexts[:3], tmp_path, Engine(until=4))
    told = "two takes 600 tokens, which dialog 1 of 4 turns exceeds with an answer of --max_tokens=590; expected fewer --turns"
    with pytest.raises(ValueError, match=f"^{told}, or a smaller --longest or --max_tokens$"):
        measure(contexts, tmp_path, Engine(until=4), "two", max_tokens=590)
    with pytest.raises(ValueError, match="none of 10 is one"):
        recall.make_contexts(str(tmp_path / "dialogs.jsonl"), {"opening": ("Sure",)}, count=4, turns=4, longest=1, seed=0)


def test_what_shall_lie_in_a_bucket_is_worked_on_here(contexts, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def worked_in(directory):
        assert directory == "gs://bucket/recall"
        yield tmp_path / "here"

    values = {"checkpoint": ["one=runs/one"], "output": "gs://bucket/recall", "turns": ["2", "4"], "dialogs": "", "values": "",
              "families": ["hobby"], "count": 4, "longest": 20, "seed": 0, "max_tokens": 16, "attention": 0}  # fmt: skip
    monkeypatch.setattr(recall.flags, "FLAGS", types.SimpleNamespace(**values))
    monkeypatch.setattr(recall, "worked_in", worked_in)
    monkeypatch.setattr(recall, "make_contexts", lambda *_, **__: contexts)
    monkeypatch.setattr(recall, "opener", lambda: None)
    monkeypatch.setattr(recall, "start_distributed", lambda: None)
    monkeypatch.setattr(recall, "measure", lambda name, place, contexts, directory, **_: directory)
    seen = []
    monkeypatch.setattr(recall, "report", lambda found, places, contexts, directory, maps: seen.append((found, directory)))
    monkeypatch.chdir(tmp_path)
    recall.main()
    assert seen == [({"one": tmp_path / "here"}, tmp_path / "here")]
    values["attention"] = 5
    monkeypatch.setattr(recall.flags, "FLAGS", types.SimpleNamespace(**values))
    with pytest.raises(ValueError, match="--attention: expected at most --count=4 dialogs, got 5"):
        recall.main()


def test_values_are_ours_or_of_a_file(tmp_path):
    assert set(recall.values_of("", ("hobby", "capitals"))) == {"hobby", "capitals"}
    with pytest.raises(ValueError, match="--values: missing; there are no values of ours for figure"):
        recall.values_of("", ("figure",))
    with pytest.raises(ValueError, match="--families: expected some of hobby.*got colour"):
        recall.values_of("", ("colour",))
    write_jsonl(tmp_path / "values.jsonl", [{"kind": "figure", "value": "Napoleon"}])
    assert recall.values_of(str(tmp_path / "values.jsonl"), ("figure",)) == {"figure": ["Napoleon"]}


@pytest.mark.slow  # compiles an engine
def test_a_checkpoint_answers_through_the_engine(tmp_path, monkeypatch):
    model = dataclasses.replace(small_runs.MODEL, max_length=512)
    monkeypatch.setattr(small_runs, "MODEL", model)
    small_runs.prepare(tmp_path)
    contexts = recall.make_contexts(
        str(tmp_path / "dialogs.jsonl"), recall.values_of("", ("opening", "hobby", "capitals")), count=3, turns=3, longest=20,
        seed=0,
    )  # fmt: skip

    def open_model(place):
        return open_engine(
            place, lambda model: settings_of(model, slots=4, int8_cache=False), tokenizer=str(tmp_path / "tokenizer.model")
        )

    found = recall.measure(
        "chat", str(tmp_path / "chat"), contexts, tmp_path / "out", turns=(1, 3), open_model=open_model, max_tokens=4
    )
    assert [(row.context, row.turn) for row in found] == [(c, t) for t in (1, 3) for c in (0, 2, 1)]  # the hobby is asked for
