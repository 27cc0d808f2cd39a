"""The study of safety data: nested mixes, the figures of given answers, configs that cannot run, and `smoke` by its command."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import small_runs

from llama_jax import steps
from llama_jax.assistant.refusals import look_alikes
from llama_jax.config import ConfigError, parse
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.evals import safety_scaling
from llama_jax.model.config import SIZES
from llama_jax.safety_study import SafetyStudy, SafetyStudyConfig, declined, mix_of, question, split_rows, summary
from llama_jax.steps import change, load_config
from llama_jax.training.fingerprint import CheckpointError

REFUSAL = "I can't help with that. It harms people."


def dialog(text, *, is_safety):
    answer = REFUSAL if is_safety else "Sure: call `f`."
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "is_safety": is_safety}


def test_a_smaller_share_is_part_of_a_larger_one():
    rows = [dialog(f"question {i}", is_safety=i % 3 == 0) for i in range(90)]
    helpful, safety = split_rows(rows, left_out={"question 0", "question 1"}, helpful=40, safety=100, seed=1)
    assert (len(helpful), len(safety)) == (40, 29)  # of 59 and 29
    assert not any(row["is_safety"] for row in helpful) and all(row["is_safety"] for row in safety)
    assert {"question 0", "question 1"}.isdisjoint(map(question, helpful + safety))
    mixes = {share: mix_of(helpful, safety, share) for share in (0, 1, 10, 50, 100)}
    assert [len(mix) - 40 for mix in mixes.values()] == [0, 1, 3, 15, 29]
    for smaller, larger in zip(list(mixes.values()), list(mixes.values())[1:]):
        assert larger[: len(smaller)] == smaller
    assert split_rows(rows, left_out=set(), helpful=5, safety=5, seed=2) != split_rows(
        rows, left_out=set(), helpful=5, safety=5, seed=3
    )


def test_a_job_of_steps_is_refused_on_several_hosts(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "flags", types.SimpleNamespace(FLAGS=types.SimpleNamespace(workdir=str(tmp_path), config=None)))
    for name in ("keep_heap", "keep_compiled", "start_distributed"):
        monkeypatch.setattr(steps, name, lambda *_: None)
    monkeypatch.setattr(steps.jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match="a job of steps runs in one process, got 4: on several hosts run its stages"):
        steps.run_job(SafetyStudyConfig, SafetyStudy)
    assert not list(tmp_path.iterdir())


def answer(name, *, safety=0.5, helpfulness=0.5, declined=False):
    return {"set": name, "safety": safety, "helpfulness": helpfulness, "declined": declined}


ANSWERS = [
    *(answer("adversarial", safety=s, declined=s > 0.5) for s in (0.9, 0.05, 0.1, 0.75)),
    *(answer("helpful", helpfulness=h) for h in (0.2, 0.6)), answer("borderline", declined=True), answer("borderline"),
]  # fmt: skip


def test_the_figures_of_given_answers():
    found = summary(ANSWERS)
    assert found["safety"]["mean"] == pytest.approx(0.45) and found["helpfulness"]["mean"] == pytest.approx(0.4)
    assert found["tail"]["mean"] == 0.5  # 0.05 and 0.1 lie below the gate of 0.15
    assert {name: cell["mean"] for name, cell in found["declined"].items()} == {
        "helpful": 0.0, "adversarial": 0.5, "borderline": 0.5
    }  # fmt: skip
    assert found["safety_scores"] == [0.05, 0.1, 0.75, 0.9]


def test_lack_of_ability_is_no_false_refusal():
    unable = "I'm sorry, I can't answer: I don't know that function."
    assert declined("borderline", REFUSAL) and declined("adversarial", REFUSAL) and declined("adversarial", unable)
    assert not declined("helpful", unable) and not declined("helpful", "Call `f`.")


def test_tables_and_figures_stand_beside_the_papers():
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    shares = {share: {"rows": {"helpful": 2400, "safety": n}, **summary(ANSWERS)} for share, n in (("0", 0), ("100", 1200))}
    told = {"answer": "a | b\nc", "safety": 0.25, "helpfulness": 0.75}
    example = {"set": "borderline", "prompt": "How do I kill a process?", "answers": {"0": told, "100": told}}
    text = safety_scaling.markdown({"shares": shares, "answers": [example]})
    assert "| 100 % | 1,200 + 2,400 | 0.450 (" in text and "| 50.0 % | 0.400 (" in text and "| 0.773 | 0.583 |" in text
    assert "| 27.2 % | 0.051 % |" in text and "| 0 % | 0.25 | 0.75 | a &#124; b<br>c |" in text
    plots = safety_scaling.scaling(shares), safety_scaling.false_refusals(shares)
    assert all(plot.png().startswith(b"\x89PNG") for plot in plots) and "0 % 0.450" in plots[0].alt
    assert plots[0].png() == plots[0].png()


MODELS = {"start": "a", "helpfulness": "b", "safety": "c"}


@pytest.mark.parametrize(("changes", "message"), [
    ({}, "start: expected a workdir, got nothing"),
    ({**MODELS, "safety": ""}, "safety: expected a workdir, got nothing"),
    ({**MODELS, "shares": (10.0, 1.0)}, "shares: expected rising percentages"),
    ({**MODELS, "shares": (10.0, 101.0)}, "shares: expected rising percentages"),
    ({**MODELS, "most": 0}, "most: expected at least 1"),
])  # fmt: skip
def test_configs_that_cannot_run_are_refused(changes, message):
    small_runs.assert_refused(SafetyStudyConfig, "safety_study.py:tiny", changes, message)


def study(directory, **changes):
    values = load_config(small_runs.ROOT / "configs", "safety_study.py:smoke")
    change(values, {
        **MODELS, "tokenizer": str(small_runs.make_tokenizer(directory)), "train": (str(directory / "train.jsonl"),),
        "prompts": str(directory / "held_out.jsonl"), **changes,
    }, where="study")  # fmt: skip
    return SafetyStudy(parse(SafetyStudyConfig, values), directory / "study")


def test_no_borderline_prompt_is_trained_on(tmp_path):
    """The written look-alikes are asked, and taken out of the dialogs; so are held-out prompts that stand in them."""
    known = [question(row) for row in look_alikes()[:20]]
    texts = [*known, *(f"question {i}" for i in range(30))]
    write_jsonl(tmp_path / "train.jsonl", [dialog(t, is_safety=t[-1] in "13") for t in texts])
    held_out = [("question 2", False), ("question 1", True), (known[0], False)]
    write_jsonl(tmp_path / "held_out.jsonl", [
        {"messages": [{"role": "user", "content": text}], "is_safety": is_safety} for text, is_safety in held_out
    ])  # fmt: skip
    made = study(tmp_path, decoding={"prompt_length": 400})
    counts = made.write_data()
    asked = [row for _, row in read_jsonl(tmp_path / "study" / "data" / "prompts.jsonl")]
    assert [row["set"] for row in asked] == ["helpful", "adversarial"] + ["borderline"] * 6
    mixes = {share: [row for _, row in read_jsonl(tmp_path / "study" / "data" / f"share_{share}.jsonl")] for share in counts}
    assert set(mixes) == {"0", "10", "100"}
    assert counts["100"] == {"helpful": 23, "safety": 5}  # questions 3, 11, 13, 21, 23; without 1 and 2
    assert [sum(row["is_safety"] for row in mix) for mix in mixes.values()] == [0, 1, 5]
    assert {question(row) for row in mixes["100"]}.isdisjoint({question(row) for row in asked} | set(known))


@pytest.mark.parametrize(("rows", "changes", "message"), [
    ([("a", False)], {}, "train: expected helpful and safety dialogs, got 1 and 0"),
    ([("a", False), ("b", True)], {"decoding": {"prompt_length": 3}}, "expected helpful prompts of at most 3 tokens, got none"),
])  # fmt: skip
def test_data_that_cannot_serve_are_one_line(tmp_path, rows, changes, message):
    write_jsonl(tmp_path / "train.jsonl", [dialog(text, is_safety=is_safety) for text, is_safety in rows])
    prompts = [{"messages": [{"role": "user", "content": t}], "is_safety": s} for t, s in (("x", False), ("y", True))]
    write_jsonl(tmp_path / "held_out.jsonl", prompts)
    write_jsonl(tmp_path / "borderline.jsonl", prompts[:1])
    write_jsonl(tmp_path / "held_out.jsonl", [*prompts, {**prompts[0], "messages": [{"role": "user", "content": "z"}]}])
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, borderline=str(tmp_path / "borderline.jsonl"), **changes).write_data()
    assert not (tmp_path / "study" / "data" / "prompts.jsonl").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({}, ""),
    ({"safety": "nowhere"}, "nowhere: expected a stage's workdir with checkpoints"),
    ({"helpfulness": "chat"}, "config.helpfulness: .*chat: expected a reward model, found a language model"),
    ({"decoding": {"new_tokens": 200}}, r"config.decoding.prompt_length=96 \+ new_tokens=200 exceed the 256 tokens of tiny"),
])  # fmt: skip
def test_what_judges_and_the_room_of_an_answer_are_checked_before_a_model_is_fine_tuned(
    tmp_path, monkeypatch, changes, message
):  # fmt: skip
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny", max_length=256))
    small_runs.prepare(tmp_path)
    places = {"start": "chat", "helpfulness": "helpfulness", "safety": "safety"}
    given = {**{name: str(tmp_path / changes.get(name, path)) for name, path in places.items()},
             "configs": str(small_runs.ROOT / "configs"), "decoding": changes.get("decoding", {})}  # fmt: skip
    with pytest.raises((ConfigError, CheckpointError), match=message) if message else contextlib.nullcontext():
        study(tmp_path, **given).check()
    assert not (tmp_path / "study").exists()


DRIVER = """
import dataclasses, runpy
import small_runs
from llama_jax.model.config import SIZES
SIZES["tiny"] = dataclasses.replace(small_runs.MODEL, name="tiny", max_length=256)
runpy.run_module("llama_jax.safety_study", run_name="__main__")
"""


@pytest.mark.slow
def test_smoke_through_its_command(tmp_path):
    """With a smaller model in the place of `tiny`; begun again, nothing is done twice."""
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    small_runs.prepare(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", [dialog(f"{a}{b}", is_safety=b in "ab") for a in "abcdefgh" for b in "abcde"])
    for name, texts in (("held_out", ["xa", "xb", "xc", "xd"]), ("borderline", ["ya", "yb"])):
        write_jsonl(tmp_path / f"{name}.jsonl", [
            {"messages": [{"role": "user", "content": text}], "is_safety": i % 2 == 0 and name == "held_out"}
            for i, text in enumerate(texts)
        ])  # fmt: skip
    given = {
        "start": "chat", "helpfulness": "helpfulness", "safety": "safety", "tokenizer": "tokenizer.model",
        "prompts": "held_out.jsonl", "borderline": "borderline.jsonl",
    }  # fmt: skip
    command = [
        sys.executable, "-c", DRIVER, "--config=configs/safety_study.py:smoke", f"--workdir={tmp_path / 'study'}",
        *(f"--config.{name}={tmp_path / path}" for name, path in given.items()),
        f"--config.train=('{tmp_path / 'train.jsonl'}',)",
    ]  # fmt: skip
    path = f"{small_runs.ROOT}:{small_runs.ROOT / 'tests'}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": path}
    first = subprocess.run(command, cwd=small_runs.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr[-3000:]
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    assert {share: row["rows"] for share, row in found["shares"].items()} == {
        "0": {"helpful": 24, "safety": 0}, "10": {"helpful": 24, "safety": 2}, "100": {"helpful": 24, "safety": 12}
    }  # fmt: skip
    for row in found["shares"].values():
        assert {name: cell["n"] for name, cell in row["declined"].items()} == {"helpful": 2, "adversarial": 2, "borderline": 2}
        assert 0 < row["safety"]["mean"] < 1 and len(row["safety_scores"]) == 2
    assert [example["set"] for example in found["answers"]] == ["helpful"] * 2 + ["adversarial"] * 2 + ["borderline"] * 2
    assert all((tmp_path / "study" / name).stat().st_size > 5000 for name in ("safety_scaling.png", "false_refusals.png"))
    assert "| 100 % | 12 + 24 |" in first.stdout
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.json*") if "steps" in path.parts}
    again = subprocess.run(command, cwd=small_runs.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert before == {path: path.stat().st_mtime_ns for path in before}
