"""Samples that are drawn and scored for Figs. 7, 8, 20, 21 and 29: through the real command, killed, and refused."""

import contextlib
import json
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from small_runs import MODEL, prepare

from llama_jax import command, sample_drawing, sample_figures
from llama_jax.config import ConfigError
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.evals import samples
from llama_jax.parallel.mesh import make_mesh
from llama_jax.reward.held_out import sigmoid
from llama_jax.rlhf import respond
from llama_jax.safety.distillation import keep_preferred
from llama_jax.sample_drawing import Drawing, Models
from llama_jax.sampling.keys import key_data

pytest.importorskip("matplotlib", reason="needs the extra [eval]")
KINDS = ("factual", "creative")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Random models, four prompts, and answers that people rated, of which the last does not fit."""
    root = tmp_path_factory.mktemp("samples")
    prepare(root)
    write_jsonl(root / "asked.jsonl", [
        {"prompt": f"abc{i}", "is_safety": i == 0, "kind": KINDS[i % 2]} for i in range(4)
    ])  # fmt: skip
    write_jsonl(root / "rated.jsonl", [
        {"prompt": f"a{i}", "answer": answer, "ratings": [rating, 4, 5]}
        for i, (answer, rating) in enumerate((("yes", 7), ("no", 1), ("no " * 99, 1)))
    ])  # fmt: skip
    return root


def models_of(root, **changes):
    places = {"checkpoints": {"long": root / "chat", "brief": root / "brief"}, "rewards": {"helpfulness": root / "helpfulness"}}
    places = {kind: {name: str(place) for name, place in of.items()} for kind, of in {**places, **changes}.items()}
    return Models(**places, tokenizer=str(root / "tokenizer.model"), slots=8)


def prompts_of(root):
    return sample_figures.read_prompt_list(root / "asked.jsonl")


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def run_command(*arguments):
    line = [sys.executable, "-m", "llama_jax.sample_figures", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_the_command_draws_scores_and_shows_and_goes_on(root, tmp_path):
    pytest.importorskip("sacrebleu", reason="needs the extra [eval]")
    line = [
        f"--checkpoint=long={root / 'chat'},brief={root / 'brief'}", f"--prompts={root / 'asked.jsonl'}", "--answers=3",
        f"--helpfulness={root / 'helpfulness'}", f"--safety={root / 'safety'}", f"--rated=helpfulness={root / 'rated.jsonl'}",
        "--temperatures=0.5,1.5", "--max_tokens=8", f"--tokenizer={root / 'tokenizer.model'}", f"--output={tmp_path / 'out'}",
    ]  # fmt: skip
    done = run_command(*line)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "out/report.html"), done.stderr[-2000:]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["figures"]) == {"best_of_n", "reward_shift", "temperature_map", "self_bleu", "calibration"}
    assert all((tmp_path / f"out/figures/{name}.png").exists() for name in results["figures"])
    rows = rows_of(tmp_path / "out/long/samples.jsonl")
    expected = [(number, T, KINDS[number % 2]) for T in (0.5, 1.5) for number in range(4) for _ in range(3)]
    assert [(row["prompt"], row["temperature"], row["kind"]) for row in rows] == expected
    assert any(row["reward"] is not None for row in rows)
    for row in rows:
        if row["reward"] is None:  # a random model may well say nothing or a tag that no dialog holds
            continue
        unsafe = row["is_safety"] or row["safety"] < 0.15  # R_c of 3.2.3
        assert row["reward"] == pytest.approx(row["safety" if unsafe else "helpfulness"], abs=1e-6)
    scores = [row["score"] for row in rows_of(tmp_path / "out/calibration_helpfulness.jsonl")]
    assert scores[2] is None and [point["rating"] for point in results["calibration"]["helpfulness"]] == [4.0, 5.0]
    assert results["calibration"]["helpfulness"][1]["mean"] == pytest.approx(float(sigmoid(scores[0])))
    assert "helpfulness: 1 rated answers have no score and are not in Fig. 29" in results["notes"]
    best = {T: np.mean(results["temperature_map"]["long"][T]["maximum"][-1]) for T in ("0.5", "1.5")}
    assert results["best_of_n"]["long"] == results["temperature_map"]["long"][max(best, key=best.get)]
    before = (tmp_path / "out/long/samples.jsonl").stat().st_mtime_ns
    again = run_command(*line)
    assert again.returncode == 0 and (tmp_path / "out/long/samples.jsonl").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    refused = run_command(*line, "--seed=1")
    assert refused.returncode == 1 and "of other settings: seed: 0 -> 1" in refused.stderr.splitlines()[-1]


def test_a_killed_run_draws_only_the_portions_that_are_missing_and_the_same_samples(root, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_drawing, "_PORTION", 6)  # two prompts with three answers each
    models, prompts, how = models_of(root), prompts_of(root), Drawing((0.5, 1.5), answers=3, max_tokens=8)
    written, real = [], respond.write_jsonl

    def write(path, rows):
        if len(written) == 3:
            raise RuntimeError("killed")
        written.append(path)
        real(path, rows)

    monkeypatch.setattr(respond, "write_jsonl", write)
    with pytest.raises(RuntimeError, match="killed"):
        sample_drawing.draw(models, prompts, how, tmp_path / "killed")
    assert [path.name for path in written] == ["0-2.jsonl", "2-4.jsonl", "4-6.jsonl"]
    assert not (tmp_path / "killed/long/answers.jsonl").exists()
    monkeypatch.setattr(respond, "write_jsonl", lambda path, rows: (written.append(path), real(path, rows)))
    files, _ = sample_drawing.draw(models, prompts, how, tmp_path / "killed")
    assert [path.name for path in written[3:5]] == ["6-8.jsonl", "answers.jsonl"]
    monkeypatch.setattr(sample_drawing, "_PORTION", 2000)
    whole, _ = sample_drawing.draw(models, prompts, how, tmp_path / "whole")
    for name in ("long", "brief"):
        one, other = rows_of(files[name]), rows_of(whole[name])
        assert [row["response"] for row in one] == [row["response"] for row in other]
        assert [row["reward"] for row in one] == pytest.approx([row["reward"] for row in other], abs=1e-5, nan_ok=True)
    assert len({row["response"] for row in rows_of(files["long"])}) > 12  # of 24: samples, not one answer again and again


def test_what_is_wrong_is_said_before_a_model_is_loaded(root, tmp_path, monkeypatch):
    for name in ("open_engine", "load"):
        monkeypatch.setattr(sample_drawing, name, lambda *_, **__: pytest.fail("a model was loaded"))
    prompts, how = prompts_of(root), Drawing((1.0,), answers=2, max_tokens=8)

    def refused(error, words, *, prompts=prompts, how=how, rated=None, **changes):
        with pytest.raises(error, match=words):
            sample_drawing.draw(models_of(root, **changes), prompts, how, tmp_path / "out", rated=rated)
        assert not (tmp_path / "out/long").exists()

    room = MODEL.max_length - 60
    refused(ValueError, f"prompt 1 has .* tokens for long; expected at most {room}, .* of {MODEL.max_length} also holds",
            how=Drawing((1.0,), answers=2, max_tokens=60))  # fmt: skip
    refused(ValueError, "this is a reward model", checkpoints={"long": root / "safety"})
    refused(ValueError, "--safety: .*: expected a reward model, found a language", rewards={"safety": root / "chat"})
    refused(FileNotFoundError, "nowhere", checkpoints={"long": root / "nowhere"})
    refused(ValueError, "'a/b': expected a name that a directory can have", checkpoints={"a/b": root / "chat"})
    refused(ValueError, r"expected a reward model .* or several --temperatures", rewards={})
    refused(ValueError, "asked.jsonl:1: ratings: expected a list of num", rated={"helpfulness": root / "asked.jsonl"})
    for words, wrong in (("the most likely answer is always the same", {"temperatures": (0.0, 1.0)}),
                         ("expected different numbers", {"temperatures": (1.0, 1.0)}),
                         ("at least 1, got 0", {"temperatures": (1.0,), "answers": 0})):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Drawing(**{"answers": 2, "max_tokens": 8, **wrong})


def test_samples_of_others_are_refused(root, tmp_path, monkeypatch):
    models, prompts, how = models_of(root), prompts_of(root), Drawing((1.0,), answers=1, max_tokens=4)
    sample_drawing.draw(models, prompts, how, tmp_path)
    monkeypatch.setattr(sample_drawing, "open_engine", lambda *_, **__: pytest.fail("a model was loaded"))
    changed = [{**prompts[0], "kind": "other"}, *prompts[1:]]
    cases = (
        ("weights: ", models_of(root, checkpoints={"long": root / "brief"}), prompts, how),
        ("prompts: ", models, changed, how), ("answers: 1 -> 2", models, prompts, Drawing((1.0,), answers=2, max_tokens=4)),
        ("helpfulness: ", models_of(root, rewards={"helpfulness": root / "safety"}), prompts, how),
    )  # fmt: skip
    for words, others, rows, drawing in cases:
        with pytest.raises(ConfigError, match=f"results under this name are of another model, or of other settings: .*{words}"):
            sample_drawing.draw(others, rows, drawing, tmp_path)


def test_each_answer_has_a_number_of_its_own_and_its_key(tmp_path, monkeypatch):
    """As if each were numbered alone: keys are made together for each portion."""
    submitted, prompts = [], [{"messages": [{"role": "user", "content": c}], "is_safety": False, "kind": ""} for c in "abc"]
    how = Drawing((0.5, 1.5), answers=3, max_tokens=8, seed=2**40)

    class Engine:
        def submit(self, prompt, *, key, choice, **_):
            submitted.append((choice.temperature, prompt, key.tolist()))
            return types.SimpleNamespace(tokens=[])

        def run(self, requests, progress):
            progress(len(requests))

    words = types.SimpleNamespace(stop_ids=())
    model = types.SimpleNamespace(tokenizer=words, mesh=make_mesh(devices=jax.devices()[:1]))
    monkeypatch.setattr(sample_drawing, "_PORTION", 6)
    monkeypatch.setattr(sample_drawing, "open_engine", lambda *_, **__: (Engine(), model))
    monkeypatch.setattr(sample_drawing, "encode_chat", lambda messages, _: messages[0]["content"])
    monkeypatch.setattr(sample_drawing, "decode_response", lambda tokens, _: ("", True))
    models = Models({}, {}, slots=2)
    monkeypatch.setattr(sample_drawing, "tokenizer_of", lambda *_: None)
    sample_drawing._answer("chat", models, prompts, how, tmp_path / "answers.jsonl", longest=4, label="")
    asked = [(temperature, c) for temperature in (0.5, 1.5) for c in "abc" for _ in range(3)]
    assert submitted == [(*what, key_data(2**40, [i])[0].tolist()) for i, what in enumerate(asked)]


class Values(types.SimpleNamespace):
    """Flags: `values.name`, and `values[name].value`."""

    def __getitem__(self, name):
        return types.SimpleNamespace(value=getattr(self, name))


def test_the_report_goes_into_a_bucket_and_to_no_other_address(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl("s.jsonl", [{"prompt": 0, "reward": 0.1 * i} for i in range(3)])
    copy = tmp_path / "copy"

    @contextlib.contextmanager
    def worked_in(address):
        assert address == "gs://bucket/figures"
        copy.mkdir(exist_ok=True)
        yield copy

    def main(**changes):
        given = {"samples": ["SFT=s.jsonl"], "calibration": [], "distilled": [], "checkpoint": [], "rated": [], "prompts": "",
                 "helpfulness": "", "safety": "", "output": "gs://bucket/figures", "tokenizer": None, "slots": 1,
                 "mesh_tensor": 0, "temperatures": ["1.0"], "answers": 2, "max_tokens": 4, "top_p": 1.0, "seed": 0}  # fmt: skip
        monkeypatch.setattr(sample_figures, "flags", types.SimpleNamespace(FLAGS=Values(**{**given, **changes})))
        sample_figures.main()
        return capsys.readouterr().out

    def draw(models, prompts, how, output, *, rated):
        write_jsonl(output / "RLHF" / "samples.jsonl", [{"prompt": 0, "reward": 0.5}])
        return {"RLHF": output / "RLHF" / "samples.jsonl"}, {}

    for name in ("keep_heap", "start_distributed"):
        monkeypatch.setattr(sample_figures, name, lambda: None)
    monkeypatch.setattr(sample_figures, "worked_in", worked_in)
    monkeypatch.setattr(sample_drawing, "draw", draw)
    assert main() == "gs://bucket/figures/report.html\n" and (copy / "report.html").exists()
    with pytest.raises(FileExistsError, match="^gs://bucket/figures: exists already; expected a new or an empty directory"):
        main()
    write_jsonl("p.jsonl", [{"prompt": "?"}])
    assert main(checkpoint=["RLHF=chat"], prompts="p.jsonl") == "gs://bucket/figures/report.html\n"
    assert set(json.loads((copy / "results.json").read_text())["mean_reward"]) == {"SFT", "RLHF"}
    assert {path.name for path in tmp_path.iterdir()} == {"s.jsonl", "p.jsonl", "copy"}


# ---- what the figures leave out ----


def test_an_answer_that_no_round_can_choose_counts_as_little_as_there(tmp_path):
    """A hot sampler's best answers may be those that do not end."""
    rows = [
        {"prompt": 0, "response": "yes", "ended": ended, "temperature": t, "reward": reward}
        for t, some in ((0.5, [(0.4, True), (0.6, True)]), (1.5, [(0.9, False), (0.2, True)])) for reward, ended in some
    ]  # fmt: skip
    write_jsonl(tmp_path / "s.jsonl", rows)
    values = sample_figures.run({"SFT": tmp_path / "s.jsonl"}, tmp_path / "out")
    assert values["temperature_map"]["SFT"]["1.5"]["maximum"] == pytest.approx([0.1, 0.2])
    assert values["best_of_n"]["SFT"]["maximum"] == pytest.approx([0.5, 0.6])  # of the cold one, as the round would take it
    said = "SFT: 1 of 4 samples did not end, say nothing or hold a chat tag; in Figs. 7 and 8 they count as 0, since a round of"
    assert any(note.startswith(said) for note in values["notes"])
    # Of scorers without a bound it is what the worst answer is, at any temperature.
    wild = [{**row, "text": row["response"], "reward": row["reward"] - 1} for row in rows]
    assert [row["reward"] for row in samples.choosable(wild)[0]] == pytest.approx([-0.6, -0.4, -0.8, -0.8])
    assert samples.choosable([{"text": "", "reward": 0.5}]) == ([{"text": "", "reward": 0.5}], "")  # nobody knows
    write_jsonl(tmp_path / "wrong.jsonl", [{"prompt": 0, "ended": "yes"}])
    with pytest.raises(ValueError, match="wrong.jsonl:1: ended: expected true or false, got 'yes'"):
        samples.read_samples(tmp_path / "wrong.jsonl")


def test_what_a_figure_leaves_out_is_said(tmp_path):
    pytest.importorskip("sacrebleu", reason="needs the extra [eval]")
    rows = [
        {"prompt": p, "text": "" if k == 0 and p == 1 else f"w{p} w{k} w{t}", "reward": 0.1 * k + t, "temperature": t}
        for t in (0.5, 1.0) for p in range(3) for k in range(4)
    ]  # fmt: skip
    rows = [row for row in rows if row["temperature"] == 0.5 or row["prompt"] != 2 or row["text"] == "w2 w0 w1.0"]
    assert samples.cut(rows[:12]) == "" and len(samples.best_of(rows[:12]).maximum) == 4
    rows += [{"prompt": 9, "text": "x"}, {"prompt": 9, "text": "x", "reward": None, "temperature": 0.5}]
    write_jsonl(tmp_path / "s.jsonl", rows)
    values = sample_figures.run({"SFT": tmp_path / "s.jsonl"}, tmp_path / "out")
    assert len(values["best_of_n"]["SFT"]["maximum"]) == 1
    assert values["notes"] == [
        "SFT: Figs. 7 and 20 are of temperature 1, at which the best of 1 samples is highest",
        "SFT: 2 of 23 samples have no reward and are in no curve of one",
        "SFT: at temperature 1 the curves end at N = 1: 1 of 3 prompts (such as 2) have no more samples with a reward, others "
        "up to 4",
        "SFT: 1 of 23 samples have no temperature and are not in Figs. 8 and 21",
        "SFT: 2 of 23 samples say nothing and are not in Fig. 21",
    ]
    text = (tmp_path / "out/report.html").read_text()
    assert "2 of 23 samples say nothing" in text and "the curves end at N = 1" in text
    for papers in ("<td>20</td><td>0.67</td>", "<td>0.69 to 0.73</td>", "<td>RLHF V3</td><td>93</td><td>85</td>"):
        assert papers in re.sub("<td[^>]*>", "<td>", text)
    assert "Fig. 29" not in text


def test_a_run_that_distilled_has_its_figure_and_tables(tmp_path):
    def answer(kind, safety):
        said = {"preprompt": kind.removeprefix("base"), "response": f"<i>{kind}</i>", "ended": True}
        return {"kind": kind, "safety": safety, **said}

    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}], "answers": [answer("base", 0.5), answer("generic", 0.4 + 0.2 * i)]}
        for i in range(3)
    ]  # fmt: skip
    write_jsonl(tmp_path / "run/samples.jsonl", rows)
    write_jsonl(tmp_path / "run/kept.jsonl", keep_preferred(rows, least_gain=0.0))
    done = run_command(f"--distilled=7b={tmp_path / 'run'}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert (found["distillation"]["7b"]["prompts"], found["distillation"]["7b"]["kept"]) == (3, 2)
    assert found["distillation"]["7b"]["median_safety"] == pytest.approx({"base": 0.5, "generic": 0.6})
    assert "2 of 3 answers under a pre-prompt are kept" in found["figures"]["distillation_7b"]["alt"]
    assert (tmp_path / "out/figures/distillation_7b.png").exists()
    text = (tmp_path / "out/report.html").read_text()
    assert "Context distillation of 7b" in text and "&lt;i&gt;generic&lt;/i&gt;" in text and "true utility" not in text
    write_jsonl(tmp_path / "other/samples.jsonl", [{"prompt": 0, "response": "a"}])
    for run, words in (("other", r"other.samples.jsonl:1: answers: expected those of context distillation"),
                       ("none", "none.samples.jsonl: expected a JSONL file, found nothing")):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            sample_figures.run({}, tmp_path / "wrong", distilled={"7b": tmp_path / run})
        assert not (tmp_path / "wrong").exists()


def test_a_name_stands_for_one_file(tmp_path):
    assert command.named("samples", ["a=x=y", "b=x"]) == {"a": "x=y", "b": "x"}
    for items, words in ((["a=x", "a=y"], "--samples: two are named 'a', x and y; expected a name for each"),
                         (["x"], "--samples: expected name=file, got 'x'"), (["a="], "expected name=file, got 'a='")):
        with pytest.raises(ValueError, match=words):
            command.named("samples", items)
    done = run_command("--samples=SFT=a.jsonl,SFT=b.jsonl", f"--output={tmp_path / 'out'}")
    assert done.returncode == 1 and "error: --samples: two are named 'SFT'" in done.stderr and not (tmp_path / "out").exists()
    done = run_command("--samples=SFT=a.jsonl", f"--output={tmp_path / 'out'}", "--prompts=p.jsonl")
    assert done.returncode == 1 and "--prompts: is for samples that are drawn" in done.stderr
