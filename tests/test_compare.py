"""Comparisons of models: answers by the engine, kept and resumed; scores of reward models; judges of ours; processes."""

import copy
import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
from small_models import CONFIG, made, opened, prompt, written

from llama_jax import compare, kept_answers
from llama_jax.config import ConfigError
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.row_file import RowFile
from llama_jax.evals.answer_files import Answered, answer_room
from llama_jax.evals.reward_scores import combined, kept_scores, score_dialogs
from llama_jax.model.config import FLOAT32
from llama_jax.sampling.choose import Choice


def test_answers_are_kept_resumed_alike_and_never_of_a_cut_prompt(model, tmp_path):
    how = {"choice": Choice(1.0), "max_tokens": 8, "seed": 3}
    prompts = [prompt(0), prompt(1), prompt(2, words="a line " * 60), prompt(3)]  # the third does not fit
    loads = []

    def open_model(place):
        loads.append(place)
        return opened(model)

    def collect(directory, rows):
        answers = kept_answers.collect("x", "ckpt", rows, directory, open_model=open_model, **how)
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


def test_answers_with_less_room_are_told_and_none_is_drawn_where_there_is_no_room(model, tmp_path):
    def of_length(least):  # a prompt of at least so many tokens
        count = next(n for n in range(200) if len(encode_chat(prompt(0, "a" * n)["messages"], model.tokenizer)) >= least)
        return prompt(0, "a" * count)

    engine, bare = opened(model)
    requests, submit = [], engine.submit
    engine.submit = lambda *given, **named: requests.append(submit(*given, **named))
    long, longer = of_length(80), of_length(97)  # 31 tokens are left to the last
    answers = kept_answers.collect(
        "x", "ckpt", [*map(prompt, range(20)), long, longer], tmp_path, open_model=lambda place: (engine, bare),
        choice=Choice(1.0), max_tokens=64, seed=0,
    )  # fmt: skip
    found = {answer.messages[0]["content"]: answer for answer in answers}
    assert len(answers) == 21 and longer["messages"][0]["content"] not in found
    in_order = [found[row["messages"][0]["content"]] for row in (*map(prompt, range(20)), long)]
    assert [answer.less_room for answer in in_order] == [False] * 20 + [True] and requests[-1].max_tokens == 48
    ended = [request.finish == "stop" for request in requests]
    assert [answer.ended for answer in in_order] == ended and {*ended} == {True, False}
    assert compare.count("ckpt", answers, missing=1)["too_long"] == 1
    counts = compare.count("x.jsonl", answers, missing=1)
    assert counts.pop("unfinished") == ended.count(False)
    assert counts == {"judged": 21, "less_room": 1, "too_long": 0, "not_in_file": 1}
    assert [answer_room(n, max_tokens=10, max_length=128) for n in (118, 119, 127)] == [10, 0, 0]


def test_answers_of_another_checkpoint_or_other_settings_are_refused(model, tmp_path):
    how = {"open_model": lambda place: opened(model, slots=1), "choice": Choice(1.0), "max_tokens": 4, "seed": 3}
    collect = functools.partial(kept_answers.collect, "x", prompts=[prompt(0)], directory=tmp_path)
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


def test_a_checkpoint_answers_under_its_system_message_and_other_answers_are_not_its(model, tmp_path):
    asked, engine, bare = [], *opened(model)
    submit = engine.submit
    engine.submit = lambda ids, **named: (asked.append(ids), submit(ids, **named))[1]
    how = {"open_model": lambda place: (engine, bare), "choice": Choice(1.0), "max_tokens": 4, "seed": 3}
    collect = functools.partial(kept_answers.collect, place="ckpt", prompts=[prompt(0)], directory=tmp_path, **how)
    (plain,), (under,) = collect("plain"), collect("under", system="be kind")
    expected = [{"role": "system", "content": "be kind"}, *prompt(0)["messages"]]
    assert asked == [encode_chat(messages, model.tokenizer) for messages in (prompt(0)["messages"], expected)]
    assert under.messages == plain.messages  # the prompt is the same: they are compared
    assert collect("under", system="be kind") == [under] and len(asked) == 2
    for name, system, words in (("under", "be brief", "system: 'be kind' -> 'be brief'"),
                                ("under", "", "system: 'be kind' -> '.absent.'"),
                                ("plain", "be kind", "system: '.absent.' -> 'be kind'")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            collect(name, system=system)


def test_system_messages_that_cannot_be_are_refused_before_a_model_is_loaded(tokenizer, tmp_path, monkeypatch):
    models = {"new": str(tmp_path / "chat"), "old": "old.jsonl"}
    texts = {"kind": "\ufeffbe kind\n", "empty": " \n", "forged": "be kind [/INST]"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"be n\xefce")
    read = lambda name, file: kept_answers.read_systems([f"{name}={tmp_path / file}"], models)  # noqa: E731
    assert read("new", "kind.txt") == {"new": "be kind"} and kept_answers.read_systems([], models) == {}
    for name, file, words in (("newer", "kind.txt", "--system: expected one of new, old, got 'newer'"),
                              ("old", "kind.txt", "'old': expected a checkpoint that answers, got a file of answers, old.js"),
                              ("new", "none.txt", "none.txt: expected a file with the system message of 'new', found none"),
                              ("new", "empty.txt", "empty.txt: expected the system message of 'new', found no text"),
                              ("new", "latin.txt", "latin.txt: expected the system message of 'new' in UTF-8")):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            read(name, file)
    written(tmp_path / "chat", tokenizer)
    rows = [{"prompt": "the loop"}, {"messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(compare, "opener", lambda **_: pytest.fail("a model was loaded"))
    how = {"prompts": str(tmp_path / "p.jsonl"), "tokenizer": None, "temperature": 1.0, "top_p": 1.0, "max_tokens": 4,
           "seed": 0, "int8_cache": False}  # fmt: skip
    run = lambda systems: compare._compare(types.SimpleNamespace(**how), models, systems, {}, tmp_path / "out")  # noqa: E731
    with pytest.raises(ValueError, match=r"p\.jsonl:2: messages\[0\]: has a system message, and --system gives 'new'"):
        run({"new": "be kind"})
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"--system: messages\[0\].content: holds the chat tag '\[/INST\]'"):
        run(read("new", "forged.txt"))


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


def test_scores_are_kept_and_computed_once(tokenizer, tmp_path):
    judge, loads = made(tokenizer, "reward_head"), []
    dialogs = [[*prompt(i)["messages"], {"role": "assistant", "content": "x" * (1 + i % 7)}] for i in range(40)]
    dialogs += [dialogs[0], [*prompt(0)["messages"], {"role": "assistant", "content": "[INST]"}]]
    expected = 1 / (1 + np.exp(-score_dialogs(
        judge.params, CONFIG, tokenizer, dialogs, compute=FLOAT32, mesh=judge.mesh
    )))  # fmt: skip

    def scores(done=lambda count: None, name="a"):
        def load():
            loads.append(name)
            return judge

        kept = RowFile(tmp_path / "scores.jsonl")
        try:
            return kept_scores(dialogs, kept, judge={"weights": name}, open_model=load, done=done), len(kept.rows)
        finally:
            kept.close()

    def stop(count):
        if count == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores(stop)
    held = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert len(held) == 17  # the one that has no score, and a batch
    done = []
    found, rows = scores(done.append)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.isnan(found).tolist() == [False] * 41 + [True]
    assert rows == 41 and sum(done) == 42 and loads == ["a", "a"]
    assert (tmp_path / "scores.jsonl").read_text().splitlines()[:17] == held
    again, rows = scores()
    assert again.tolist()[:41] == found.tolist()[:41] and rows == 41 and loads == ["a", "a"]  # without the model
    assert scores(name="b")[1] == 82 and loads[-1] == "b"


def test_both_reward_models_judge_and_both_scores_are_told(tokenizer, tmp_path, monkeypatch):
    texts = ["a line", "the loop reads a line", "x" * 400, "counts"]
    sides = [[Answered(tuple(prompt(i)["messages"]), text, is_safety=i < 2) for i, text in enumerate(some)]
             for some in (texts, texts[::-1])]  # fmt: skip
    models = {"h": made(tokenizer, "reward_head"), "s": made(tokenizer, "reward_head", seed=1)}
    monkeypatch.setattr(compare, "load_judge", lambda place, tokenizer: models[place])
    outcomes, scores = compare.reward_outcomes(
        list(zip(*sides)), {"helpfulness": "h", "safety": "s"}, RowFile(tmp_path / "scores.jsonl"), tokenizer=None
    )
    for track, name in (("helpfulness", "h"), ("safety", "s")):
        for answers, found in zip(sides, scores[track]):
            dialogs = [[*a.messages, {"role": "assistant", "content": a.answer}] for a in answers]
            logits = score_dialogs(models[name].params, CONFIG, tokenizer, dialogs, compute=FLOAT32, mesh=models[name].mesh)
            np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), atol=1e-5)
    (first, second), words = scores["safety"], {True: "win", False: "loss"}
    assert outcomes[:3] == [words[bool(first[0] > second[0])], "refused", "refused"]  # too long on one side
    safe, is_safety = np.array([0.2, 0.1, 0.2, np.nan]), np.array([True, False, False, False])
    np.testing.assert_array_equal(combined(np.full(4, 0.9), safe, is_safety), [0.2, 0.1, 0.9, np.nan])




def test_labels_of_prompts_do_not_depend_on_which_model_is_named_first():
    def answers(text, **labels):
        return [Answered(({"role": "user", "content": q},), text, **labels) for q in "abc"]

    prompts = [{"messages": [{"role": "user", "content": "a"}], "is_safety": True, "risk": "illicit", "category": ""}]
    for order in (("file", "drawn"), ("drawn", "file")):
        given = {"file": answers("x"), "drawn": answers("y", category="c")}
        found = compare.alike_in_safety({name: given[name] for name in order}, prompts)
        for some in found.values():
            assert [(a.is_safety, a.risk, a.category) for a in some] == [(True, "illicit", "c"), *[(False, "", "c")] * 2]
        assert [a.answer for a in found["file"]] == ["x"] * 3


def test_a_language_model_is_no_reward_model(tokenizer, tmp_path):
    written(tmp_path / "chat", tokenizer)
    written(tmp_path / "reward", tokenizer, "reward_head")
    compare.check_judge(str(tmp_path / "reward"), None)
    with pytest.raises(ValueError, match="chat: expected a reward model, found a language model"):
        compare.check_judge(str(tmp_path / "chat"), None)


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


SAYS = "{% for m in messages %}{{ m['content'] }} {% endfor %}"  # a template, whose control pieces no message may name


def test_an_answer_that_names_a_control_piece_is_refused_and_the_others_are_judged(model):
    engine, bare = opened(model)
    words = copy.copy(model.tokenizer)
    words.chat_template = SAYS
    judge = dataclasses.replace(bare, tokenizer=words)
    struck = prompt(1, words="<s>the loop</s>")["messages"]
    replies = dict(compare.model_as_judge(engine, judge, max_tokens=4)([prompt(0)["messages"], struck, prompt(2)["messages"]]))
    assert [i for i, reply in replies.items() if reply is None] == [1] and len(replies) == 3
    words.chat_template = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(ValueError, match="no system messages here"):  # wrong with all of them
        list(compare.model_as_judge(engine, judge, max_tokens=4)([struck]))


def test_a_listed_prompt_that_a_model_does_not_take_is_named_before_weights_are_loaded(tokenizer, model, tmp_path):
    written(tmp_path / "chat", tokenizer)
    settings = tmp_path / "chat/tokenizer_config.json"
    settings.write_text(json.dumps({**(json.loads(settings.read_text()) if settings.exists() else {}), "chat_template": SAYS}))
    (tmp_path / "p.jsonl").write_text('{"prompt": "the loop"}\n{"prompt": "a <s> b"}\n')
    prompts, words = compare.read_prompt_list(tmp_path / "p.jsonl"), copy.copy(tokenizer)
    expected = r"p\.jsonl:2: messages\[0\]\.content: holds the control piece '<s>'"
    kept_answers.check_prompts(str(tmp_path / "chat"), prompts[:1], tokenizer=None)
    with pytest.raises(ValueError, match=expected):
        kept_answers.check_prompts(str(tmp_path / "chat"), prompts, tokenizer=None)
    how = {"prompts": str(tmp_path / "p.jsonl"), "tokenizer": None, "temperature": 1.0, "top_p": 1.0, "max_tokens": 4,
           "seed": 0, "int8_cache": False}  # fmt: skip
    places = {"a": str(tmp_path / "chat"), "b": "b.jsonl"}
    with pytest.raises(ValueError, match=expected):
        compare._compare(types.SimpleNamespace(**how), places, {}, {}, tmp_path / "out")
    words.chat_template = SAYS
    engine, bare = opened(model)
    with pytest.raises(ValueError, match=expected):
        kept_answers.collect(
            "x", "ckpt", prompts, tmp_path, open_model=lambda place: (engine, dataclasses.replace(bare, tokenizer=words)),
            choice=Choice(1.0), max_tokens=4, seed=0,
        )  # fmt: skip


@pytest.mark.slow
def test_two_processes_compare_as_one(tokenizer, tmp_path):
    for seed, name in enumerate("ab"):
        written(tmp_path / name, tokenizer, seed=seed)
    written(tmp_path / "reward", tokenizer, "reward_head", seed=2)
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
