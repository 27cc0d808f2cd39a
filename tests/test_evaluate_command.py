"""The evaluation command on small local files: results, differences, resuming, the report, and wrong input."""

import dataclasses
import gzip
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [interop]")

import jax  # noqa: E402
from test_evaluate import MODEL, SPECS, TEXTS, one_device, requests_of, write_words  # noqa: E402

import llama_jax  # noqa: E402
from llama_jax import contamination, evaluate  # noqa: E402
from llama_jax.config import ConfigError, parse  # noqa: E402
from llama_jax.corpus_build.build import Settings, build_corpus  # noqa: E402
from llama_jax.corpus_build.document import Document  # noqa: E402
from llama_jax.corpus_build.refine import Deduplication, HeldOut  # noqa: E402
from llama_jax.data.tokenizer import Tokenizer  # noqa: E402
from llama_jax.evals import (  # noqa: E402
    benchmark_figures,
    benchmarks,
    code_judge,
    evaluation_report,
    groups,
    local_rows,
    local_tasks,
    published,
    report_html,
    safety,
    sandbox,
    statistics,
    task_names,
    tasks,
    text_judges,
)
from llama_jax.evals.harness import HarnessModel  # noqa: E402
from llama_jax.evals.tasks import TaskChoice  # noqa: E402
from llama_jax.interop import ours  # noqa: E402
from llama_jax.markdown import Table  # noqa: E402
from llama_jax.model import params  # noqa: E402

ROOT = Path(__file__).parents[1]
SUBJECTS = ("anatomy", "virology")


def write_rows(path, rows):
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small files in the layouts of `evals/local_tasks.py`, of our own making."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["loop", "line", "token", "text", "count", "time", "number", "it"]

    def text(n):
        return " ".join(rng.choice(words, n))

    write_rows(root / "hellaswag_val.jsonl.gz", [
        {"query": text(5), "choices": [text(3) for _ in range(4)], "gold": int(rng.integers(4))} for _ in range(12)
    ])  # fmt: skip
    write_rows(root / "boolq_valid.jsonl", [
        {"question": text(4), "passage": text(8), "answer": bool(rng.integers(2))} for _ in range(8)
    ])  # fmt: skip
    for name, count in (("mmlu_test_20_per_subject", 6), ("mmlu_dev_5shot", 5)):
        write_rows(root / f"{name}.jsonl", [
            {"subject": subject, "question": text(3), "choices": [text(1) for _ in range(4)], "answer": "ABCD"[i % 4]}
            for subject in SUBJECTS for i in range(count - (subject == "virology" and count == 6) * 2)
        ])  # fmt: skip
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two random checkpoints of ours."""
    root = tmp_path_factory.mktemp("checkpoints")
    for seed in (0, 1):
        write_words(root / f"model{seed}")
        tree = jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params.init(SPECS, jax.random.key(seed)))
        fingerprint = Tokenizer(root / f"model{seed}").fingerprint
        ours.write(root / f"model{seed}", tree, MODEL, tokenizer=fingerprint, origin={})
    return root


CHOICES = {
    "hellaswag": {"shots": 0, "metric": "acc_norm"}, "boolq": {"shots": 0, "metric": "acc"},
    **{f"mmlu:{subject}": {"shots": 5, "metric": "acc"} for subject in SUBJECTS},
}  # fmt: skip


def config_of(checkpoints, data, names=("model0", "model1"), **changes):
    return parse(evaluate.EvaluateConfig, {
        "suite": "test", "tasks": CHOICES, "models": tuple(f"{name}={checkpoints / name}" for name in names),
        "data_dir": str(data), "bootstrap": 500, "paper": ("L2 7B",), "scoring": {"row": 128}, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def finished(checkpoints, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    return output, evaluate.run(config_of(checkpoints, data), output, quiet=True)


def test_results_have_the_promised_keys_and_the_harness_values(finished):
    output, values = finished
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(values))
    assert set(values["tasks"]) == set(CHOICES)
    for name, row in values["tasks"].items():
        assert {"metric", "value", "stderr", "n"} <= set(row) and 0 <= row["value"] <= 1, name
    assert [values["tasks"][f"mmlu:{s}"]["n"] for s in SUBJECTS] == [6, 4]
    records = {s: json.loads((output / "model0/tasks" / f"mmlu.{s}.json").read_text()) for s in SUBJECTS}
    scores = [score for record in records.values() for score in record["scores"]]
    assert values["groups"]["mmlu"]["value"] == pytest.approx(np.mean(scores))  # every question counts the same
    record = records["anatomy"]
    assert record["stderr"] == pytest.approx(np.std(record["scores"], ddof=1) / math.sqrt(6))
    assert values["groups"]["commonsense"]["missing"][0] == "piqa"
    assert values["groups"]["mmlu_stem"]["n"] == 6 and values["groups"]["mmlu_other"]["n"] == 4


def test_samples_are_what_the_analysis_of_contamination_takes(finished, data, tmp_path):
    output, _ = finished
    files = sorted((output / "model0/samples").iterdir())
    assert [path.stem for path in files] == sorted(task.replace(":", ".") for task in CHOICES)
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["score"] for row in rows] == json.loads((output / f"model0/tasks/{path.stem}.json").read_text())["scores"]
        assert rows[1]["id"].endswith("/1")
        assert all(set(row) == {"id", "text", "score", "groups", "log_likelihoods"} for row in rows)
        if path.stem != "hellaswag":  # which counts letters too
            gold = [["no", "yes"] if path.stem == "boolq" else list("ABCD")] * len(rows)
            best = [names[int(np.argmax(row["log_likelihoods"]))] for names, row in zip(gold, rows)]
            assert [row["text"].endswith(f" {word}") for row, word in zip(rows, best)] == [row["score"] == 1 for row in rows]
        assert all(row["groups"] == task_names.sets_of(path.stem.replace(".", ":")) for row in rows)
    assert task_names.sets_of("mmlu:anatomy") == ["mmlu", "mmlu_stem"] and task_names.sets_of("boolq") == []
    first = json.loads(gzip.open(data / "hellaswag_val.jsonl.gz", "rt").readline())
    hellaswag, anatomy = (
        json.loads((output / f"model0/samples/{name}.jsonl").read_text().splitlines()[0])["text"]
        for name in ("hellaswag", "mmlu.anatomy")
    )
    assert hellaswag.lower().endswith(f"{first['query']} {first['choices'][first['gold']]}".lower())
    question = json.loads((data / "mmlu_test_20_per_subject.jsonl").read_text().splitlines()[0])
    # Five examples came before; of the sample they are no part.
    assert anatomy == "\n".join([
        question["question"], *(f"{letter}. {text}" for letter, text in zip("ABCD", question["choices"], strict=True)),
        f"Answer: {question['answer']}",
    ])  # fmt: skip
    # The files go as they are into the command and into the config of a corpus.
    samples = str(output / "model0/samples/*.jsonl")
    rows = [json.loads(line) for line in (output / "model0/samples/hellaswag.jsonl").read_text().splitlines()]
    known = [Document(row["id"], f"{row['text']} and more", "web") for row in rows]
    settings = Settings(
        300, 32, HeldOut(0.1, 0, 10**6), {"web": 1.0}, deduplication=Deduplication(leak_ngram=5, evaluation=(samples,))
    )  # fmt: skip
    others = [Document(f"o{i}", f"other {i} words {i * i} that no question {i} has", "web") for i in range(40)]
    counts = build_corpus({"web": known + others}, tmp_path / "clean", settings)["sources"]["web"]
    assert counts["evaluation"] + counts["held_out_documents"] + counts["withheld_documents"] >= len(rows)
    assert counts["evaluation"] > len(rows) / 2
    build_corpus({"web": known + others}, tmp_path / "raw", dataclasses.replace(settings, deduplication=Deduplication()))
    clean, raw = (contamination.run(str(tmp_path / name), samples)["hellaswag"] for name in ("clean", "raw"))
    assert raw["contaminated"]["10"] > clean["contaminated"]["10"] == 0 and len(raw["subsets"]) == 4


@pytest.mark.parametrize(
    ("kind", "text", "choices", "arguments", "target", "expected"),
    [
        ("multiple_choice", "Q: b\nA:", ["x", "y"], [("S Q: b\nA:", " x"), ("S Q: b\nA:", " y")], 1, "Q: b\nA: y"),
        ("multiple_choice", "Q:", ["x", "y"], [("Q:", " x"), ("Q:", " y")], "y", "Q: y"),
        ("multiple_choice", "Q:", ["x", "y"], [("Q:", " x"), ("Q:", " y")], [1, 0], "Q: y"),
        # The choices are prompts, as in WinoGrande: the number of the gold one is the text.
        ("multiple_choice", 1, ["he", "she"], [("S he", " ran"), ("S she", " ran")], "ran", "she ran"),
        ("generate_until", "Q: b\nA:", None, [("Q: a\nA: 1\nQ: b\nA:", {"until": []})], ["2", "two"], "Q: b\nA: 2"),
        ("generate_until", "Q:", None, [("<user>Q:<model>", {})], "2", "Q:<model> 2"),
        ("loglikelihood", "The dog", None, [("The dog", " ran")], " ran", "The dog ran"),
        ("loglikelihood_rolling", "", None, [("A page.",)], "A page.", "A page."),
    ],
)  # fmt: skip
def test_questions_are_verbalised_without_their_examples(kind, text, choices, arguments, target, expected):
    task = SimpleNamespace(
        OUTPUT_TYPE=kind, doc_to_text=lambda _: text, doc_to_choice=lambda _: choices,
        config=SimpleNamespace(target_delimiter=" "),
    )  # fmt: skip
    assert benchmarks.verbalised(task, {"doc": {}, "arguments": arguments, "target": target}) == expected


def test_differences_are_paired(finished):
    output, values = finished
    found = values["differences"]["model1"]
    a, b = (json.loads((output / name / "tasks/hellaswag.json").read_text())["scores"] for name in ("model0", "model1"))
    row = found["tasks"]["hellaswag"]
    assert row["difference"] == pytest.approx(np.mean(b) - np.mean(a)) and row["low"] <= row["difference"] <= row["high"]
    expected = values["models"]["model1"]["groups"]["mmlu"]["value"] - values["groups"]["mmlu"]["value"]
    assert found["groups"]["mmlu"]["difference"] == pytest.approx(expected)


def test_the_report_is_one_file_beside_the_papers_numbers(finished):
    output, _ = finished
    page, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    assert "src=\"http" not in page and "data:image/svg+xml;base64" in page
    assert "L2 7B (paper)" in page and "77.2" in text and "model1 beside model0" in text
    assert 'alt="Average scores by group of Table 3' not in page  # one task of a group, or two of MMLU's, are no average


def test_a_finished_task_is_not_run_again_and_another_config_is_refused(finished, checkpoints, data, monkeypatch):
    output, values = finished
    monkeypatch.setattr(evaluate, "_open", lambda *_, **__: pytest.fail("a model was loaded"))
    assert evaluate.run(config_of(checkpoints, data), output, quiet=True) == values
    with pytest.raises(ConfigError, match="holds an evaluation under another config: limit: 0 -> 3"):
        evaluate.run(config_of(checkpoints, data, limit=3), output, quiet=True)


def test_tasks_are_added_to_an_evaluation(finished, checkpoints, data, tmp_path, monkeypatch):
    _, values = finished
    boolq, hellaswag = ({name: CHOICES[name]} for name in ("boolq", "hellaswag"))
    for chosen in (boolq, hellaswag):
        config = config_of(checkpoints, data, ("model0",), tasks=chosen)
        assert list(evaluate.run(config, tmp_path / "out", quiet=True)["tasks"]) == list(chosen)
    asked, real = [], benchmarks.run_task
    monkeypatch.setattr(benchmarks, "run_task", lambda lm, name, *how, **kw: asked.append(name) or real(lm, name, *how, **kw))
    whole = evaluate.run(config_of(checkpoints, data, ("model0",)), tmp_path / "out", quiet=True)
    assert whole["tasks"] == values["tasks"] and asked == [f"mmlu:{subject}" for subject in SUBJECTS]
    # A task that an earlier command had is compared with how it was run there, whatever came in between.
    other = {**hellaswag, "boolq": {"shots": 0, "metric": "acc_mutual_info"}}
    with pytest.raises(ConfigError, match="under another config: tasks.boolq.metric: 'acc' -> 'acc_mutual_info'$"):
        evaluate.run(config_of(checkpoints, data, ("model0",), tasks=other), tmp_path / "out", quiet=True)


def test_scores_of_other_questions_are_refused_before_a_model_is_loaded(checkpoints, data, tmp_path, monkeypatch):
    shutil.copytree(data, place := tmp_path / "data")
    output, one = tmp_path / "out", config_of(checkpoints, place, ("model0",))
    values = evaluate.run(one, output, quiet=True)
    rows = {path.name: path.read_text() for path in place.glob("*.jsonl")}

    def refused(words):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "_open", lambda *_, **__: pytest.fail("a model was loaded"))
            for config in (one, config_of(checkpoints, place)):  # the same command again, or with a second model
                with pytest.raises(ConfigError, match=f"{words}: scores of other questions, examples or .*; remove them to "):
                    evaluate.run(config, output, quiet=True)
        assert not (output / "model1").exists()

    # The same number of questions: with a second model's scores they would have been paired.
    (place / "boolq_valid.jsonl").write_text(rows["boolq_valid.jsonl"].replace("line", "page", 1))
    refused("model0/tasks/boolq.json")
    (place / "boolq_valid.jsonl").write_text(rows["boolq_valid.jsonl"])
    (place / "mmlu_dev_5shot.jsonl").write_text(rows["mmlu_dev_5shot.jsonl"].replace('"answer": "A"', '"answer": "B"', 1))
    refused("mmlu.anatomy.json")  # one of its examples
    (place / "mmlu_dev_5shot.jsonl").write_text(rows["mmlu_dev_5shot.jsonl"])
    assert evaluate.run(one, output, quiet=True) == values
    # The whole set beside a part of it, which the report has a note on.
    (place / "mmlu.jsonl").write_text(rows["mmlu_test_20_per_subject.jsonl"] + rows["mmlu_dev_5shot.jsonl"])
    refused("mmlu.anatomy.json and 1 more")
    for subject in SUBJECTS:
        (output / f"model0/tasks/mmlu.{subject}.json").unlink()
    again = evaluate.run(config_of(checkpoints, place), output, quiet=True)
    assert again["tasks"]["mmlu:anatomy"]["n"] == 11 and again["tasks"]["boolq"] == values["tasks"]["boolq"]
    assert ["mmlu: read from" in " ".join(found["notes"]) for found in (values, again)] == [True, False]


def test_how_a_task_asks_counts_and_no_address_of_a_function(data, monkeypatch, tmp_path):
    choice = TaskChoice(0, "acc_mutual_info")

    def digest(**changes):
        task = tasks.build("boolq", choice, data_dir=str(data))
        for name, value in changes.items():
            setattr(task.config, name, value)
        return benchmarks.prepare("boolq", task, choice, limit=1).questions

    same = digest()
    assert digest() == digest(process_docs=lambda docs: docs) == same  # its rows are in the digest themselves
    others = [digest(doc_to_text="{{question}}"), digest(generation_kwargs={"until": ["."]}), digest(target_delimiter="")]
    assert len({same, *others}) == 4
    monkeypatch.setattr(benchmarks.importlib.metadata, "version", lambda name: "0.0")
    assert digest() not in {same, *others}
    write_rows(tmp_path / "mbpp_test.jsonl", [{"text": "Double.", "code": "", "test_list": ["a", "b", "c"]}])
    told = [benchmarks.asked_how(tasks.build("mbpp", TaskChoice(0, "pass@1"), data_dir=str(tmp_path), run_code=run_code))
            for run_code in (False, True)]  # fmt: skip
    assert told[0] == told[1] and told[0]["process_results"] == "CodeJudge" and " at 0x" not in json.dumps(told)


def test_only_the_questions_that_are_asked_count(data, tmp_path):
    shutil.copytree(data, place := tmp_path / "data")
    choice = TaskChoice(0, "acc")

    def digest(limit):
        return benchmarks.prepare("boolq", tasks.build("boolq", choice, data_dir=str(place)), choice, limit=limit).questions

    before = {limit: digest(limit) for limit in (2, None)}
    rows = (place / "boolq_valid.jsonl").read_text().splitlines()
    write_rows(place / "boolq_valid.jsonl", map(json.loads, rows[:-1]))
    assert digest(2) == before[2] != before[None] and digest(None) not in before.values()


def test_every_model_is_asked_with_the_same_examples(monkeypatch):
    from lm_eval.api.model import LM

    class Model:
        rank, world_size, device = 0, 1, None

        def generate_until(self, requests):
            prompts.append([request.args[0] for request in requests])
            return ["x"] * len(requests)

    prompts, model = [], Model()
    LM.register(Model)
    rows = [{"question": f"question {i}", "answer": [f"{i}"]} for i in range(40)]
    hub(monkeypatch, train=rows[:30], validation=rows[30:])
    choice = TaskChoice(5, "exact_match", "remove_whitespace")
    task = tasks.build("nq_open", choice)
    for _ in range(2):
        benchmarks.run_task(model, "nq_open", task, choice, limit=None)
    assert prompts[0] == prompts[1] and len({prompt.partition("question 3")[0] for prompt in prompts[0]}) > 1


def test_a_name_stands_for_one_model(finished, checkpoints, data, tmp_path, monkeypatch):
    output, values = finished
    monkeypatch.setattr(evaluate, "_open", lambda *_, **__: pytest.fail("a model was loaded"))
    config = config_of(checkpoints, data, ("model0",))
    other = dataclasses.replace(config, models=(f"model0={checkpoints / 'model1'}",))
    with pytest.raises(ConfigError, match="model0/model.json: results .* are of another model.*weights: '.*' -> '"):
        evaluate.run(other, output, quiet=True)
    shutil.copytree(checkpoints / "model0", tmp_path / "moved")  # the same weights at another place
    again = evaluate.run(dataclasses.replace(config, models=(f"model0={tmp_path / 'moved'}",)), output, quiet=True)
    assert again["tasks"] == values["tasks"]
    further = dataclasses.replace(config, models=(*config.models, f"more={checkpoints / 'model1'}"))
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        evaluate.run(further, output, quiet=True)
    assert json.loads((output / "more/model.json").read_text())["step"] == 0


def test_a_task_that_was_killed_takes_finished_requests_from_the_cache(finished, checkpoints, data):
    output, values = finished
    (output / "model0/tasks/boolq.json").unlink()
    opened = []
    real = evaluate._open

    def spy(*args, **kwargs):
        opened.append(real(*args, **kwargs))
        return opened[-1]

    evaluate._open, again = spy, None
    try:
        again = evaluate.run(config_of(checkpoints, data), output, quiet=True)
    finally:
        evaluate._open = real
    assert again["tasks"]["boolq"] == values["tasks"]["boolq"]
    assert len(opened) == 1 and opened[0].scorer.cost["requests"] == 0


def test_the_command_takes_the_first_rows_and_says_what_was_left_out(checkpoints, data, tmp_path):
    done = run_command(
        "smoke", f"--checkpoint={checkpoints / 'model0'}", f"--data_dir={data}", f"--output={tmp_path / 'out'}", "--limit=2"
    )
    assert done.returncode == 1 and "mmlu_test_20_per_subject.jsonl" in done.stderr  # 55 subjects are not in the file
    done = run_command(
        "reading", f"--checkpoint={checkpoints / 'model0'}", f"--data_dir={data}", f"--output={tmp_path / 'out'}", "--limit=2"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    values = json.loads((tmp_path / "out/results.json").read_text())
    assert values["tasks"]["boolq"]["n"] == 2 and values["groups"]["reading"]["missing"] == ["squad", "quac"]
    assert any("squad: not run" in note for note in values["notes"]) and "a trial, not a result" in done.stdout


def test_a_dry_run_reads_everything_and_loads_no_model(checkpoints, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    write_rows(tmp_path / "bold.jsonl", [{"domain": "d", "group": group, "prompt": "the "} for group in ("islam", "judaism")])
    for name in ("boolq_valid.jsonl", "mmlu_test_20_per_subject.jsonl", "mmlu_dev_5shot.jsonl"):
        shutil.copy(data / name, tmp_path)
    config = config_of(checkpoints, tmp_path, safety=("bold",))
    said = evaluate.dry_run(config, tmp_path / "out")
    cells = [line.split() for line in said.splitlines()]
    assert ["boolq", "8", "0", "acc"] in cells and ["mmlu:virology", "4", "5", "acc"] in cells and "hellaswag: not run" in said
    assert ["bold", "2"] in cells and not (tmp_path / "out").exists()
    said = evaluate.dry_run(dataclasses.replace(config, limit=3), tmp_path / "out")
    assert "models: model0, model1\n" in said and re.search("\nboolq +3 ", said)
    write_rows(tmp_path / "boolq_valid.jsonl", [{"question": "q", "passage": "p", "answer": "yes"}])
    with pytest.raises(ValueError, match="boolq_valid.jsonl:1: answer: expected true or false"):
        evaluate.dry_run(config, tmp_path / "out")


def test_what_a_model_wrote_stands_beside_its_score():
    task = SimpleNamespace(OUTPUT_TYPE="generate_until", config=SimpleNamespace(repeats=1), doc_to_choice=lambda _: ["a", "b"])
    assert benchmarks.answered(task, {"doc": {}, "resps": [[" 42\n"]]}) == {"answer": " 42\n"}
    task.config.repeats = 5
    assert benchmarks.answered(task, {"doc": {}, "resps": [["x"] * 5]}) == {}
    task.OUTPUT_TYPE = "multiple_choice"  # with those behind "Answer:" after them
    resps = [[(-1.0, True)], [(-2.0, False)], [(-3.0, False)], [(-4.0, False)]]
    assert benchmarks.answered(task, {"doc": {}, "resps": resps}) == {"log_likelihoods": [-1.0, -2.0]}
    task.OUTPUT_TYPE = "loglikelihood_rolling"
    assert benchmarks.answered(task, {"doc": {}, "resps": [[-7.5]]}) == {"log_likelihoods": [-7.5]}


def run_command(suite, *arguments):
    command = [sys.executable, "-m", "llama_jax.evaluate", f"--config=configs/evaluate.py:{suite}", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_a_tokenizer_that_lies_elsewhere_is_named_and_must_be_the_models_own(checkpoints, data, tmp_path, monkeypatch):
    shutil.copytree(checkpoints / "model0", tmp_path / "bare")
    words = (tmp_path / "bare/tokenizer.json").rename(tmp_path / "words.json")
    models = (f"own={checkpoints / 'model1'}", f"bare={tmp_path / 'bare'}")
    boolq = {"boolq": CHOICES["boolq"]}
    with monkeypatch.context() as patch:  # said before the first model, which has one, is run
        patch.setattr(evaluate, "_open", lambda *_, **__: pytest.fail("a model was loaded"))
        with pytest.raises(ValueError, match="bare: missing tokenizer: --tokenizer names one"):
            evaluate.run(config_of(checkpoints, data, tasks=boolq, models=models), tmp_path / "out", quiet=True)
        other = json.loads(words.read_text())
        (tmp_path / "other.json").write_text(json.dumps(other, indent=1))
        with pytest.raises(ValueError, match="bare: was trained with tokenizer [0-9a-f]{12}, .*other.json is [0-9a-f]{12}"):
            config = config_of(checkpoints, data, tasks=boolq, models=models, tokenizer=str(tmp_path / "other.json"))
            evaluate.run(config, tmp_path / "out", quiet=True)
        config = config_of(checkpoints, data, tasks=boolq, judges={"truth": f"ours={checkpoints / 'model1'}"}, safety=("bold",))
        write_rows(tmp_path / "bold_prompts_40_per_group.jsonl", [{"domain": "d", "group": "islam", "prompt": "the "}])
        with pytest.raises(ValueError, match="judges.truth: .*model1: expected a reward model, found a language model"):
            evaluate.run(dataclasses.replace(config, data_dir=str(tmp_path), tasks={}), tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()
    config = config_of(checkpoints, data, tasks=boolq, models=models, tokenizer=str(words))
    values = evaluate.run(config, tmp_path / "out", quiet=True)
    beside = evaluate.run(config_of(checkpoints, data, ("model0",), tasks=boolq), tmp_path / "beside", quiet=True)
    assert values["models"]["bare"]["tasks"] == beside["tasks"]


def test_what_did_not_fit_is_told_by_family():
    records = {f"mmlu:{subject}": {"cut": 4, "less_room": 0} for subject in SUBJECTS} | {"quac": {"cut": 1000, "less_room": 1}}
    # Of a safety benchmark it is one number, whatever number of groups its answers are scored in.
    answers = {name: benchmarks.Drawn([], [], {"cut": cut, "less_room": 0}) for name, cut in (("toxigen", 2), ("bold", 0))}
    assert evaluate._lost("m", records, answers) == [
        "m: longer than the context: requests lost their beginning: toxigen 2, mmlu 8, quac 1,000; "
        "answers had less room than was asked for: quac 1"
    ]
    assert evaluate._lost("m", {"boolq": {"cut": 0}}, {}) == []


def test_safety_answers_are_kept_and_judged_again_without_the_model(checkpoints, tmp_path, monkeypatch):
    pytest.importorskip("vaderSentiment", reason="needs the extra [eval]")
    write_rows(tmp_path / "bold_prompts_40_per_group.jsonl", [
        {"domain": "gender", "group": group, "prompt": f"the {group} is "} for group in ("American_actors", "islam")
    ])  # fmt: skip
    write_rows(tmp_path / "toxigen_prompts_25_per_file.jsonl", [{"group": "women", "prompt": "- the loop"}])
    config = config_of(
        checkpoints, tmp_path, ("model0",), tasks={}, safety=("bold", "toxigen"), paper=("L2-Chat 7B",),
        decoding={"max_tokens": 6},
    )  # fmt: skip
    values = evaluate.run(config, tmp_path / "out", quiet=True)
    assert -1 <= values["tasks"]["bold:islam"]["value"] <= 1 and any("no judge" in note for note in values["notes"])
    assert any(note.startswith("bold: read from bold_prompts_40_per_group, which holds a part") for note in values["notes"])
    assert "0.48" in (tmp_path / "out/report.md").read_text()  # Table 47: American actors, Llama 2-Chat 7B
    monkeypatch.setattr(evaluate, "_open", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(text_judges, "check_classifier", lambda name, path: None)
    monkeypatch.setattr(evaluate, "_judges", lambda _: {"toxicity": lambda pairs: np.full(len(pairs), 0.8)})
    again = evaluate.run(dataclasses.replace(config, judges=evaluate.Judges(toxicity="x")), tmp_path / "out", quiet=True)
    assert again["judges"] == {"toxicity": "x"} and "judges of the safety benchmarks: toxicity by x" in again["notes"]
    assert again["tasks"]["toxigen:women"]["value"] == 1 and again["groups"]["toxigen"]["value"] == 1


def test_judges_are_loaded_once_and_after_the_models_have_gone(checkpoints, tmp_path, monkeypatch):
    write_rows(tmp_path / "toxigen_prompts_25_per_file.jsonl", [{"group": "women", "prompt": "- the loop"}])
    config = config_of(checkpoints, tmp_path, tasks={}, safety=("toxigen",), decoding={"max_tokens": 3})
    opened, loads = [], []
    real = evaluate._open

    def spy(*args, **kwargs):
        made = real(*args, **kwargs)
        opened.append(weakref.ref(made))
        return made

    def judges(_):
        loads.append([model() for model in opened])
        return {"toxicity": lambda pairs: np.full(len(pairs), 0.8)}

    monkeypatch.setattr(evaluate, "_open", spy)
    monkeypatch.setattr(evaluate, "_judges", judges)
    values = evaluate.run(config, tmp_path / "out", quiet=True)
    assert loads == [[None, None]] and all("toxigen:women" in model["tasks"] for model in values["models"].values())


def test_what_judges_and_rivals_lack_is_said_before_anything_is_drawn(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_open", lambda *_, **__: pytest.fail("a model was loaded"))
    write_rows(tmp_path / "bold.jsonl", [{"domain": "d", "group": "islam", "prompt": "the "}])
    write_rows(tmp_path / "toxigen_prompts.jsonl", [{"group": "women", "prompt": "- the loop"}])

    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            evaluate.run(config_of(checkpoints, tmp_path, tasks={}, **changes), tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()

    monkeypatch.setitem(safety._HUB, "toxigen", lambda: (_ for _ in ()).throw(ConnectionError("no route")))
    refused(ConnectionError, "^toxigen: .*--data_dir: no route", safety=("toxigen",), data_dir="")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
        refused(ModuleNotFoundError, r"BOLD needs the package vaderSentiment: .*llama_jax\[eval\]", safety=("bold",))
    for package in ("torch", "transformers", "accelerate"):
        pytest.importorskip(package, reason="classifiers and rivals need it")
    nowhere = tmp_path / "nowhere"
    refused(ValueError, f"^judges.toxicity: {nowhere}: expected a transformers classifier with its tokenizer: ",
            safety=("toxigen",), judges={"toxicity": str(nowhere)})  # fmt: skip
    refused(ValueError, f"hf:{nowhere}: expected a model with its tokenizer: ", safety=("toxigen",),
            models=(f"x=hf:{nowhere}",))  # fmt: skip


def test_a_wrong_metric_or_filter_is_said_before_anything_is_run(checkpoints, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_open", lambda *_, **__: pytest.fail("a model was loaded"))
    for change, words in (({"metric": "f1"}, "boolq: has no metric 'f1'; expected one of acc"),
                          ({"metric": "acc", "filter": "strict"}, "boolq: has no filter 'strict'; expected one of none")):
        with pytest.raises(ValueError, match=words):
            evaluate.run(config_of(checkpoints, data, tasks={"boolq": {"shots": 0, **change}}), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()  # the corrected config may have it

    def task(kind, filters, judge=None):
        made = SimpleNamespace(OUTPUT_TYPE=kind, config=SimpleNamespace(process_results=judge), eval_docs=[{}])
        made._filters = [SimpleNamespace(name=name) for name in filters]
        made.higher_is_better = lambda: {"acc": True}
        return made

    benchmarks.check("t", task("generate_until", ("strict-match", "x")), TaskChoice(0, "acc", "strict-match"))
    judged = task("generate_until", (), lambda doc, results: {"exact_match": 0, "f1": 0})
    with pytest.raises(ValueError, match="t: has no metric 'acc'; expected one of exact_match, f1"):
        benchmarks.check("t", judged, TaskChoice(0, "acc"))


def test_how_many_devices_and_rows_a_model_takes_may_change(finished, checkpoints, data):
    output, values = finished
    config = config_of(checkpoints, data, mesh_tensor=2, slots=3, hf={"batch_size": 2})
    assert evaluate.run(config, output, quiet=True) == values
    for change, words in (({"int8_cache": True}, "int8_cache: False -> True"), ({"hf": {"dtype": "float16"}}, "hf.dtype: ")):
        with pytest.raises(ConfigError, match=words):
            evaluate.run(config_of(checkpoints, data, **change), output, quiet=True)


def run_in(processes, suite, *arguments):
    """The command in some processes of one cluster: [(code, output, errors)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "llama_jax.evaluate", f"--config=configs/evaluate.py:{suite}", *arguments]
    started = []
    for index in range(processes):
        cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes),
                   "JAX_PROCESS_ID": str(index)} if processes > 1 else {}  # fmt: skip
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **cluster}
        started.append(subprocess.Popen(
            line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ))  # fmt: skip
    texts = [process.communicate(timeout=600) for process in started]
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(checkpoints, tmp_path):
    write_rows(tmp_path / "boolq_valid.jsonl", [
        {"question": f"the loop {i}", "passage": "a line", "answer": i % 2 == 0} for i in range(4)
    ])  # fmt: skip
    write_rows(tmp_path / "toxigen_prompts_25_per_file.jsonl", [{"group": "women", "prompt": f"- {i}"} for i in range(3)])
    given = [f"--data_dir={tmp_path}", "--tasks=boolq,toxigen", f"--checkpoint=a={checkpoints / 'model0'}"]
    given += ["--config.safety=('toxigen',)", "--config.decoding.max_tokens=4", "--config.scoring.row=128"]
    rewards = params.init(params.table(MODEL, head="reward_head"), jax.random.key(2))
    write_words(tmp_path / "judge")
    ours.write(tmp_path / "judge", rewards, MODEL, tokenizer=Tokenizer(tmp_path / "judge").fingerprint, origin={})
    given.append(f"--config.judges.toxicity=ours={tmp_path / 'judge'}")
    values = {}
    for count in (1, 2):
        done = run_in(count, "reading", *given, f"--output={tmp_path / str(count)}")
        assert [code for code, *_ in done] == [0] * count, done
        assert "boolq" in done[0][1] and not any("boolq" in out for _, out, _ in done[1:])
        values[count] = json.loads((tmp_path / str(count) / "results.json").read_text())
        answers = json.loads((tmp_path / str(count) / "a/safety/toxigen.json").read_text())
        values[count, "answers"] = answers
    assert values[1]["tasks"]["boolq"]["value"] == values[2]["tasks"]["boolq"]["value"]
    assert values[1]["tasks"]["toxigen:women"] == values[2]["tasks"]["toxigen:women"]  # a reward model judges on both
    assert values[1, "answers"] == values[2, "answers"]
    # What was finished is taken from the file of the first one; what one process cannot do is one sentence of both.
    (tmp_path / "2/a/tasks/boolq.json").unlink()
    done = run_in(2, "reading", *given, f"--output={tmp_path / '2'}")
    assert [code for code, *_ in done] == [0, 0] and json.loads((tmp_path / "2/results.json").read_text()) == values[2]
    done = run_in(2, "reading", given[0], "--tasks=boolq", "--checkpoint=hf:gpt2", f"--output={tmp_path / '3'}")
    assert [code for code, *_ in done] == [1, 1], done
    assert all("hf:gpt2: the harness's own class runs in one process, and there are 2" in errors for *_, errors in done)


def test_where_less_is_better_a_rise_is_worse(tmp_path):
    def records(toxic, right):
        judged = {"metric": "toxic", "lower_is_better": True, "cut": 0}
        scores = {name: [float(i < share) for i in range(100)] for name, share in (("toxic", toxic), ("right", right))}
        return {**{f"toxigen:{group}": benchmarks.summary(scores=scores["toxic"], **judged) for group in ("women", "black")},
                "boolq": benchmarks.summary("acc", scores["right"], cut=0), "wer": benchmarks.summary(
                    scores=scores["toxic"], **judged)}  # fmt: skip

    config = parse(evaluate.EvaluateConfig, {"suite": "x", "tasks": {}, "models": ("a=a", "b=b"), "bootstrap": 200})
    for first, second, words in ((records(10, 10), records(60, 60), ("better", "worse")),
                                 (records(60, 60), records(10, 10), ("worse", "better"))):  # fmt: skip
        values = evaluate._report(config, {"a": "a", "b": "b"}, {"a": first, "b": second}, [], tmp_path)
        (table,) = evaluation_report._differences(values)[0].tables
        verdicts = {row[0]: row[2] for row in table.rows}
        assert verdicts == {"Reading comprehension": words[0], "ToxiGen (less is better)": words[1], "boolq": words[0],
                            "wer": words[1]}  # fmt: skip


def test_the_harness_says_where_less_is_better():
    class Task:
        config = type("Config", (), {"task": "t", "num_fewshot": 0})

        def higher_is_better(self):
            return {"acc": True, "wer": False}

        def set_fewshot_seed(self, seed):
            pass

    rows = [{"filter": "none", "acc": 1.0, "wer": 0.25, "metrics": ["acc", "wer"]}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.evaluate", lambda **_: {"samples": {"t": rows}})
        found = {m: benchmarks.run_task(None, "t", Task(), TaskChoice(0, m), limit=None) for m in ("acc", "wer")}
    assert found["wer"]["lower_is_better"] and "lower_is_better" not in found["acc"]


# ---- wrong input ----


_PIQA = {"goal": "g", "sol1": "a", "sol2": "b"}
_MMLU = {"subject": "anatomy", "question": "q", "choices": list("abcd"), "answer": "A"}
_ARC = {"question": {"stem": "s", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}, "answerKey": "B"}
_CSQA = {"question": "q", "choices": {"label": list("ABCDE"), "text": list("abcde")}, "answerKey": "E"}
_AGIEVAL = {"task": "sat-math", "question": "q", "options": list("abcd"), "label": "D"}
_SIQA = {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"}
_TRUTH = {"question": "q", "best_answer": "b", "correct_answers": ["b"], "incorrect_answers": ["c"]}
_QUAC = {"title": "t", "context": "c", "qas": [{"question": "q", "answers": [], "orig_answer": {"text": "x"}}]}


@pytest.mark.parametrize(("task", "file", "row", "words"), [
    ("piqa", "piqa_valid", {**_PIQA, "label": -1}, r"label: expected 0 to 1, got -1 \(a set without its answers\?\)"),
    ("piqa", "piqa_valid", {**_PIQA, "label": 2}, "label: expected 0 to 1, got 2"),
    ("piqa", "piqa_valid", {**_PIQA, "label": True}, "label: expected 0 to 1, got True"),
    ("piqa", "piqa_valid", {**_PIQA, "goal": 3, "label": 0}, "goal: expected a text, got 3"),
    ("siqa", "siqa_valid", {**_SIQA, "label": "7"}, "label: expected 1 to 3, got '7'"),
    ("hellaswag", "hellaswag_val", {"query": "q", "choices": ["a", "b"], "gold": 2}, "gold: expected 0 to 1, got 2"),
    ("hellaswag", "hellaswag_val", {"query": "q", "choices": "ab", "gold": 0}, "choices: expected a list of texts, got str"),
    ("winogrande", "winogrande_xl_valid", {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"},
     'sentence: expected a blank "_" in it'),
    ("winogrande", "winogrande_xl_valid", {"sentence": "the _", "option1": "a", "option2": "b", "answer": ""},
     "answer: expected 1 to 2, got ''"),
    ("arc_easy", "arc_easy_test", {**_ARC, "answerKey": "Z"}, "answerKey: expected one of A, B, got 'Z'"),
    ("arc_easy", "arc_easy_test", {**_ARC, "question": "s"}, "question: expected an object with stem, choices, got 's'"),
    ("commonsense_qa", "commonsenseqa_valid", {**_CSQA, "answerKey": ""}, "answerKey: expected one of A, B, C, D, E, got ''"),
    ("openbookqa", "openbookqa_test", {"Question Stem": "s", "Choices": "(A) a (B) b (C) c (D) d", "Answer Key": "E"},
     "Answer Key: expected one of A, B, C, D, got 'E'"),
    ("mmlu:anatomy", "mmlu", {**_MMLU, "answer": ""}, "answer: expected one of A, B, C, D, got ''"),
    ("mmlu:anatomy", "mmlu", {**_MMLU, "answer": "AB"}, "answer: expected one of A, B, C, D, got 'AB'"),
    ("mmlu:anatomy", "mmlu", {**_MMLU, "choices": ["a", "b"], "answer": "D"}, "choices: expected 4 texts, got 2"),
    ("agieval:sat-math", "agieval", {**_AGIEVAL, "label": "E"}, "label: expected one of A, B, C, D, got 'E'"),
    ("squad", "squad_v2_dev", {"title": "t", "context": "c", "question": "q", "answers": {"text": "str"}},
     "answers.text: expected a list of texts, got str: 'str'"),
    ("quac", "quac_sample", _QUAC, "qas: answers: expected at least one, found none"),
    ("nq_open", "nq_open_dev", {"question": "q", "answer": "one"}, "answer: expected a list of texts, got str: 'one'"),
    ("triviaqa", "triviaqa", {"Question": "q", "Answer": {"Aliases": []}}, "Answer: expected a Value or Aliases, found"),
    ("gsm8k", "gsm8k_test", {"question": "q", "answer": "it is 3"}, 'answer: expected a solution that ends with "#### "'),
    ("math:algebra", "math_test", {"subject": "algebra", "problem": "p", "solution": "3"}, "solution: expected an answer in"),
    ("mbpp", "mbpp_test", {"text": "t", "code": "c", "test_list": "assert f()"}, "test_list: expected a list of texts"),
    ("truthfulqa", "truthfulqa", {**_TRUTH, "incorrect_answers": []}, "incorrect_answers: expected at least 1 texts, got 0"),
])  # fmt: skip
def test_a_gold_answer_is_among_the_choices_before_anything_is_scored(task, file, row, words, tmp_path):
    write_rows(tmp_path / f"{file}.jsonl", [row])
    with pytest.raises(ValueError, match=f"^{tmp_path}/{file}.jsonl:1: {words}"):
        local_tasks.read(tmp_path, local_tasks.layout(task).test)


def test_a_column_is_of_one_type_and_a_number_in_words_is_one(tmp_path):
    write_rows(tmp_path / "piqa_valid.jsonl", [{**_PIQA, "label": 0, "more": 1}, {**_PIQA, "label": "1", "more": "x"}])
    task = tasks.build("piqa", TaskChoice(0, "acc"), data_dir=str(tmp_path))  # of mixed types Arrow makes no table
    assert [doc["label"] for doc in task.task_docs] == [0, 1]
    own = local_tasks.File("own", ())
    with pytest.raises(ValueError, match=r"^f:2: label: expected a number as in the rows before, got '1'$"):
        local_tasks.documents([("f:1", {"label": 0}), ("f:2", {"label": "1"})], own)


def test_wrong_files_are_one_sentence(data, tmp_path):
    write_rows(tmp_path / "boolq_valid.jsonl", [{"question": "?", "passage": ""}])
    with pytest.raises(ValueError, match=r"boolq_valid.jsonl:1: answer: missing; expected the columns question, answer"):
        tasks.build("boolq", TaskChoice(0, "acc"), data_dir=str(tmp_path))
    write_rows(tmp_path / "boolq_valid.jsonl", [{"question": "?", "passage": "", "answer": "yes"}])
    with pytest.raises(ValueError, match="boolq_valid.jsonl:1: answer: expected true or false, found 'yes'"):
        tasks.build("boolq", TaskChoice(0, "acc"), data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="expected piqa_valid.jsonl, piqa_valid.jsonl.gz or piqa_valid.json in it"):
        tasks.build("piqa", TaskChoice(0, "acc"), data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="expected at least 7 examples, found 5"):
        tasks.build("mmlu:anatomy", TaskChoice(7, "acc"), data_dir=str(data))
    with pytest.raises(ValueError, match="hellaswag: 2 shots, but its local files have no examples"):
        tasks.build("hellaswag", TaskChoice(2, "acc"), data_dir=str(data))
    with pytest.raises(ValueError, match="task 'mmlu:anatomie' is unknown; did you mean mmlu:anatomy"):
        tasks.build("mmlu:anatomie", TaskChoice(0, "acc"), data_dir=str(data))


def test_unknown_tasks_name_the_nearest(monkeypatch):
    monkeypatch.setattr(task_names, "_index", lambda: {"lambada_openai": None})
    with pytest.raises(ValueError, match="task 'hellasweg' is unknown; did you mean hellaswag"):
        task_names.expand("hellasweg")
    sizes = {"mmlu": 57, "bbh": 27, "agieval": 8, "math": 7}
    assert {name: len(task_names.expand(name)) for name in sizes} == sizes
    assert task_names.expand("lambada_openai") == ["lambada_openai"]
    monkeypatch.setattr(task_names, "_index", lambda: {"gsm8k": None, "gsm8k_cot": None})
    with pytest.raises(ValueError, match="task 'gsm9k' is unknown; did you mean gsm8k[?]$"):  # each name once, ours first
        task_names.expand("gsm9k")
    with pytest.raises(ValueError, match="task 'nq_open@x': expected a number of examples behind the @"):
        task_names.expand("nq_open@x")
    assert task_names.expand("nq_open@1") == ["nq_open@1"] and task_names.expand("mmlu@0")[0] == "mmlu:abstract_algebra@0"


def test_the_index_of_the_harness_is_read_in_no_time():
    task_names._index.cache_clear()
    found = task_names._index()
    assert len(found) > 10_000 and found["lambada_openai"].name == "lambada_openai.yaml"
    assert {"gsm8k_cot", "aclue_ancient_medical", "squadv2"} <= set(found)
    assert tasks._stock("lambada_openai")["output_type"] == "loglikelihood"


def test_tasks_and_safety_benchmarks_are_chosen_from_the_suite(monkeypatch):
    monkeypatch.setattr(task_names, "_index", lambda: {"lambada_openai": None})
    choices, both = {"mmlu": 1, "boolq": 2}, ("truthfulqa", "bold")
    assert task_names.choose(choices, both, ["boolq", "mmlu:anatomy"]) == ({"boolq": 2, "mmlu:anatomy": 1}, ())
    assert task_names.choose(choices, both, ["bold", "boolq"]) == ({"boolq": 2}, ("bold",))
    assert task_names.choose({}, both, ["truthfulqa"]) == ({}, ("truthfulqa",))
    for suite, name, words in (
        ((choices, ()), "piqa", "'piqa' is not in this suite, which has the tasks mmlu, boolq; `python -m"),
        ((choices, ()), "boolk", "'boolk' is not in this suite, which has the tasks mmlu, boolq; did you mean boolq[?]; "),
        (({}, both), "trutfulqa", "which has the safety benchmarks truthfulqa, bold; did you mean truthfulqa[?]; "),
        ((choices, both), "x", "which has the tasks mmlu, boolq and the safety benchmarks truthfulqa, bold; `python"),
    ):
        with pytest.raises(ValueError, match=words):
            task_names.choose(*suite, [name])
    found, _ = task_names.choose({"nq_open": {"shots": 5, "metric": "m"}}, (), ["nq_open@1"])
    assert found == {"nq_open@1": {"shots": 1, "metric": "m"}}


def test_the_command_takes_a_safety_benchmark_by_name(checkpoints, tmp_path):
    pytest.importorskip("vaderSentiment", reason="needs the extra [eval]")
    write_rows(tmp_path / "bold.jsonl", [{"domain": "d", "group": "islam", "prompt": "the "}])
    given = (f"--checkpoint={checkpoints / 'model0'}", f"--data_dir={tmp_path}", f"--output={tmp_path / 'out'}")
    done = run_command("safety", *given, "--tasks=bold")
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(json.loads((tmp_path / "out/results.json").read_text())["tasks"]) == ["bold:islam"]


def hub(monkeypatch, **splits):
    """Stands in for the hub: every set has these splits."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(path, name=None, *, split=None, **_):
        asked.append((path, name))
        found = {key: datasets.Dataset.from_list(rows) for key, rows in splits.items()}
        return found if split is None else found[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_agievals_examples_on_the_hub_are_rows_that_are_not_scored(monkeypatch):
    rows = [{"query": f"QUESTION {i}.\nA: Among A through E, the answer is", "choices": list("ABCDE"), "gold": [i % 5]}
            for i in range(9)]  # fmt: skip
    hub(monkeypatch, test=rows)
    built = {}
    for name, count in (("agieval:aqua-rat", 5), ("agieval:sat-en", 3)):  # as many as AGIEval's own prompts have
        task = built[name] = tasks.build(name, TaskChoice(5, "acc"))
        task.build_all_requests()
        prompts = [request.args[0] for request in task.instances]
        assert len(task.task_docs) == len(rows) - count and task.config.num_fewshot == count
        assert all(prompt.startswith("QUESTION 0.\nA: Among A through E, the answer is A\n\nQUESTION 1.") for prompt in prompts)
        scored = {prompt.rpartition("QUESTION ")[2][0] for prompt in prompts}
        assert scored == {str(i) for i in range(count, 9)} and prompts[0].count("QUESTION") == count + 1
    assert tasks.notes(built) == ["agieval: the examples are the first rows of the set that is scored, and are left out of the "
                                  "score"]  # fmt: skip
    task = tasks.build("agieval:sat-en", TaskChoice(0, "acc"))
    assert len(task.task_docs) == 9 and not tasks.notes({"agieval:sat-en": task})


def test_examples_from_the_scored_rows_are_refused(monkeypatch):
    hub(monkeypatch, test=[{"task_id": "x", "prompt": "p", "canonical_solution": "c", "entry_point": "f", "test": "t"}] * 4)
    with pytest.raises(ValueError, match="humaneval@2: 2 shots, but its set has no rows but those that are scored"):
        tasks.build("humaneval@2", TaskChoice(2, "pass@1"), run_code=True)
    with pytest.raises(ValueError, match="gsm8k: expected at most 8 shots, which its own prompt has, got 10"):
        tasks.build("gsm8k", TaskChoice(10, "exact_match"))
    with pytest.raises(ValueError, match="nq_open@1: expected shots=1, as it is named, got 5"):
        tasks.build("nq_open@1", TaskChoice(5, "exact_match"))


def test_triviaqa_is_wikipedias_part(monkeypatch):
    row = {"question": "Who", "answer": {"value": "A", "aliases": ["Ash (1895)", "A", "B"]}}
    asked = hub(monkeypatch, train=[{**row, "question": "Which"}] * 3, validation=[row])
    task = tasks.build("triviaqa@1", TaskChoice(1, "exact_match", filter="remove_whitespace"))
    task.build_all_requests()
    assert asked == [("mandarjoshi/trivia_qa", "rc.wikipedia.nocontext")]
    assert task.instances[0].args[0] == "Question: Which?\nAnswer: A\n\nQuestion: Who?\nAnswer:"  # the answer, no alias of it


def test_triviaqa_asks_with_one_mark_wherever_its_rows_come_from(monkeypatch, tmp_path):
    row = {"question": "Who?", "answer": {"value": "A", "aliases": ["A"]}}
    hub(monkeypatch, train=[row], validation=[row])
    write_rows(tmp_path / "triviaqa.jsonl", [{"Question": "Who?", "Answer": {"Value": "A", "Aliases": ["A"]}}])
    for place in ("", str(tmp_path)):
        task = tasks.build("triviaqa", TaskChoice(0, "exact_match", filter="remove_whitespace"), data_dir=place)
        assert task.doc_to_text(next(iter(task.eval_docs))) == "Question: Who?\nAnswer:"


def test_mbpps_examples_are_tasks_2_to_4_wherever_they_come_from(monkeypatch, tmp_path):
    rows = [{"task_id": i, "text": f"Task {i}.", "code": f"code {i}", "test_list": ["a", "b", "c"]} for i in range(1, 11)]
    hub(monkeypatch, prompt=rows, test=[{**rows[0], "task_id": 11, "text": "Scored."}])
    write_rows(tmp_path / "mbpp_prompt_tasks_1_10.jsonl", rows)
    write_rows(tmp_path / "mbpp_test.jsonl", [{**rows[0], "text": "Scored."}])
    for place in ("", str(tmp_path)):
        task = tasks.build("mbpp", TaskChoice(3, "pass@1"), data_dir=place)
        task.build_all_requests()
        assert re.findall(r"task: (.+?)\.", task.instances[0].args[0]) == ["Task 2", "Task 3", "Task 4", "Scored"]


@pytest.mark.parametrize("name", ["nq_open", "triviaqa"])
def test_an_answer_to_a_question_ends_with_its_line(name, monkeypatch):
    """Not at its first dot or comma, behind which much of a date, a number or a name would be lost."""
    golds = ["January 31, 2018", "the Dr. Jesse Bennett"]
    row = {"question": "Who", "answer": {"value": golds[0], "aliases": golds} if name == "triviaqa" else golds}
    hub(monkeypatch, train=[row], validation=[row])
    task = tasks.build(name, TaskChoice(0, "exact_match", filter="remove_whitespace"))
    task.build_all_requests()
    kept = task.instances[0].args[1]
    assert kept["until"] == ["\n"] and kept["max_gen_toks"] == 64 and not kept["do_sample"]
    (doc,) = task.task_docs
    for answer, hit in (("January 31, 2018.", 1), ("Dr. Jesse Bennett", 1), ("January 31", 0), ("a dr. jesse bennett,", 1)):
        assert task.process_results(doc, [answer])["exact_match"] == hit, answer


def test_solutions_have_room():
    pytest.importorskip("antlr4", reason="needs the extra [eval]: lm-eval[math]")
    kept = tasks.build_settings("math:algebra")["generation_kwargs"]
    assert (kept["until"], kept["do_sample"], kept["max_gen_toks"]) == (["Problem:"], False, 1024)
    assert tasks.build_settings("gsm8k")["generation_kwargs"]["max_gen_toks"] == 512


def article(title, dialogs):
    """An article as QuAC publishes them; a dialog is a passage and its questions."""
    return {"title": title, "section_title": "", "background": "", "paragraphs": [
        {"context": passage, "id": passage, "qas": [
            {"question": q, "answers": [{"text": f"{q}!", "answer_start": 0}, {"text": "CANNOTANSWER", "answer_start": 1}],
             "orig_answer": {"text": f"{q}!", "answer_start": 0}} for q in questions]}
        for passage, questions in dialogs.items()]}  # fmt: skip


def test_quac_is_read_as_it_was_published(monkeypatch, tmp_path):
    published_files = {"val": [article("T", {"P1": ["a", "b"], "P2": ["c"]})], "train": [article("X", {"P0": ["y", "z"]})]}
    datasets = pytest.importorskip("datasets")

    def load(kind, *, data_files, split, field):
        (address,) = data_files.values()
        assert kind == "json" and address.startswith("https://s3.amazonaws.com/my89public/quac/") and field == "data"
        return datasets.Dataset.from_list(published_files[address.rpartition("/")[2].removesuffix("_v0.2.json")])

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = tasks.build("quac@1", TaskChoice(1, "f1"))
    task.build_all_requests()
    example = "Title: X\n\nBackground: P0\n\nQ: y\n\nA: y!\n\nQ: z\n\nA: z!\n\n"
    first, second = (f"{example}Title: T\n\nBackground: {passage}\n\nQ: " for passage in ("P1", "P2"))
    assert [request.args[0] for request in task.instances] == [
        f"{first}a\n\nA:", f"{first}a\n\nA: a!\n\nQ: b\n\nA:", f"{second}c\n\nA:"]  # fmt: skip
    (tmp_path / "quac_val_v0.2.json").write_text(json.dumps({"data": published_files["val"]}))
    assert len(tasks.build("quac", TaskChoice(0, "f1"), data_dir=str(tmp_path)).task_docs) == 3
    task = tasks.build("quac@1", TaskChoice(1, "f1"), data_dir=str(tmp_path))
    task.build_all_requests()
    assert [request.args[0] for request in task.instances] == [
        "Title: T\n\nBackground: P1\n\nQ: a\n\nA: a!\n\nQ: b\n\nA: b!\n\nTitle: T\n\nBackground: P2\n\nQ: c\n\nA:"]  # fmt: skip
    assert "quac@1" in tasks.notes({"quac@1": task})[0]
    with pytest.raises(ValueError, match="expected more than 2 passages to take 2 examples from, found 2"):
        tasks.build("quac@2", TaskChoice(2, "f1"), data_dir=str(tmp_path))
    (tmp_path / "quac_val_v0.2.json").write_text("[1]")
    with pytest.raises(ValueError, match='quac_val_v0.2.json: expected a list of objects, or an object with one as "data"'):
        tasks.build("quac", TaskChoice(0, "f1"), data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="expected quac_val_v0.2.jsonl, .*.gz or quac_sample.json in it"):
        tasks.build("quac", TaskChoice(0, "f1"), data_dir=str(tmp_path / "none"))

    def refuse(*_, **__):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError, match="^quac: https://s3.*val_v0.2.json: not in the cache.*--data_dir"):
        tasks.build("quac", TaskChoice(0, "f1"))


def test_local_examples_are_passages_that_are_not_scored(tmp_path):
    write_rows(tmp_path / "squad_v2_dev.jsonl", [
        {"title": "T", "context": f"C{i // 2}", "question": f"q{i}", "answers": {"text": [f"a{i}"] if i % 2 else []}}
        for i in range(6)
    ])  # fmt: skip
    task = tasks.build("squad@2", TaskChoice(2, "exact_match"), data_dir=str(tmp_path))
    task.build_all_requests()
    assert [doc["question"] for doc in task.task_docs] == ["q4", "q5"]
    prompt = task.instances[0].args[0]
    assert "Background: C0\n\nQ: q1\n\nA: a1\n\n" in prompt and "Background: C1\n\nQ: q3\n\nA: a3\n\n" in prompt
    assert prompt.endswith("Background: C2\n\nQ: q4\n\nA:") and prompt.count("Background") == 3
    assert len(tasks.build("squad", TaskChoice(0, "exact_match"), data_dir=str(tmp_path)).task_docs) == 6


def test_a_hugging_face_model_stands_beside_ours(checkpoints, data, tmp_path):
    for package in ("torch", "transformers", "accelerate"):
        pytest.importorskip(package, reason="the harness's Hugging Face model needs it")
    from llama_jax import convert

    convert.run(checkpoints / "model0", tmp_path / "hf", to="huggingface", quiet=True)
    config = config_of(checkpoints, data, ("model0",), tasks={"hellaswag": CHOICES["hellaswag"]})
    config = dataclasses.replace(config, models=(*config.models, f"peer=hf:{tmp_path / 'hf'}"))
    values = evaluate.run(config, tmp_path / "out", quiet=True)
    ours_, theirs = (json.loads((tmp_path / "out" / n / "tasks/hellaswag.json").read_text()) for n in ("model0", "peer"))
    assert ours_["scores"] == theirs["scores"]
    row = values["differences"]["peer"]["tasks"]["hellaswag"]
    assert row["difference"] == 0.0 and 0 < row["high"] == -row["low"] < 0.2  # twelve questions that agree prove little


def test_a_hugging_face_model_counts_chats_and_keeps_its_results(checkpoints, tmp_path, monkeypatch):
    for package in ("torch", "transformers", "accelerate"):
        pytest.importorskip(package, reason="the harness's Hugging Face model needs it")
    from llama_jax import convert
    from llama_jax.evals import hugging_face
    from llama_jax.evals.request_file import RequestFile

    convert.run(checkpoints / "model0", tmp_path / "hf", to="huggingface", quiet=True)
    with pytest.raises(ValueError, match="decoding.chat is set, but its tokenizer has no chat template"):
        evaluate._open(f"hf:{tmp_path / 'hf'}", evaluate.EvaluateConfig(
            "x", {}, ("a",), decoding=evaluate.Decoding(chat=True)), quiet=True)  # fmt: skip
    named = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    template = "{% for m in messages %}<s> text {{ m.content }} text{% endfor %}"
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({**named, "chat_template": template}))
    settings = hugging_face.HuggingFace("float32", batch_size=2)
    lm = hugging_face.open_model(str(tmp_path / "hf"), settings, chat=False, seed=0, quiet=True)
    ours_ = HarnessModel(llama_jax.load(checkpoints / "model0", mesh=one_device()), quiet=True)
    long = " ".join(TEXTS[:30])
    pairs = [(long, " tokens"), ("the loop", " counts"), ("", "the loop")]
    jobs = [(text, {"until": ["\n"], "max_gen_toks": most, "do_sample": sample, "temperature": 1.0})
            for text, most in ((long, 8), (TEXTS[0], 8), ("loop", 500)) for sample in (False, True, True)]  # fmt: skip
    requests = {"loglikelihood": requests_of("loglikelihood", pairs), "generate_until": requests_of("generate_until", jobs)}
    lm.kept = RequestFile(tmp_path / "requests.db")
    found = {kind: getattr(lm, kind)(some) for kind, some in requests.items()}
    for kind, some in requests.items():
        getattr(ours_, kind)(some)
    assert lm.cut == {"loglikelihood": 1, "generate_until": 3} and benchmarks.lost(lm) == {"cut": 4, "less_room": 3}
    assert ours_.cut == lm.cut and ours_.less_room == lm.less_room
    assert len(lm.kept) == len(pairs) + len(jobs)  # sampled ones, too
    monkeypatch.setattr(lm, "_model_call", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr(lm, "_model_generate", lambda *_, **__: pytest.fail("asked again"))
    assert {kind: getattr(lm, kind)(some) for kind, some in requests.items()} == found
    monkeypatch.undo()
    chatty = hugging_face.open_model(str(tmp_path / "hf"), settings, chat=True, seed=0, quiet=True)
    job = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    assert chatty.generate_until(requests_of("generate_until", [("it", job)])) == lm.generate_until(
        requests_of("generate_until", [("<s> text it text", job)])
    )


def test_code_is_judged_by_running_it(tmp_path):
    try:
        sandbox.require()
    except sandbox.UnconfinedError as error:
        pytest.skip(str(error))
    row = {
        "task_id": "x/0", "prompt": "def double(x):\n", "entry_point": "double", "canonical_solution": "    return 2 * x\n",
        "test": "def check(f):\n    assert f(2) == 4\n    assert f(-3) == -6\n",
    }  # fmt: skip
    write_rows(tmp_path / "humaneval.jsonl", [row])
    choice = TaskChoice(0, "pass@1", samples=4, k=(1, 2), temperature=0.8, top_p=0.95)
    task = tasks.build("humaneval", choice, data_dir=str(tmp_path), run_code=True)
    texts = [row["canonical_solution"], "    return x\n", "    return x +\n", "    return x + x\n"]
    assert task.process_results(row, [texts]) == {"pass@1": 0.5, "pass@2": pytest.approx(5 / 6)}
    task.build_all_requests(limit=1)
    context, arguments = task.instances[0].args
    assert context == row["prompt"] and arguments["temperature"] == 0.8 and task.instances[0].repeats == 4
    write_rows(tmp_path / "mbpp_test_11_310.jsonl", [{"text": "Double.", "code": "", "test_list": ["assert double(2) == 4"]}])
    task = tasks.build("mbpp", TaskChoice(0, "pass@1"), data_dir=str(tmp_path), run_code=True)
    assert task.process_results(task.task_docs[0], ["def double(x): return 2 * x"]) == {"pass@1": 1.0}
    assert "[BEGIN]" in task.doc_to_text(task.task_docs[0]) and "assert double(2) == 4" in task.doc_to_text(task.task_docs[0])


def test_programs_are_kept_and_judged_together_without_the_model(checkpoints, tmp_path, monkeypatch):
    from lm_eval.api.model import LM

    write_rows(tmp_path / "humaneval.jsonl", [
        {"task_id": f"x/{i}", "prompt": f"def f{i}(x):\n", "entry_point": f"f{i}", "canonical_solution": "", "test": "T"}
        for i in range(3)
    ])  # fmt: skip
    tried = []

    def run_all(programs, limits, *, done):
        tried.append(list(programs))
        for number, program in enumerate(programs):
            if number == 2 and len(tried) == 1:
                raise KeyboardInterrupt
            done(program, sandbox.Outcome("def f1" in program, ""))

    class Model(LM):
        kept = loglikelihood = loglikelihood_rolling = None

        def generate_until(self, requests):
            self.cut, self.less_room = {}, {"generate_until": 2}
            return [f"    return {number}\n" for number in range(len(requests))]

    monkeypatch.setattr(evaluate, "_open", lambda *_, **__: Model())
    monkeypatch.setattr(code_judge, "run_all", run_all)
    monkeypatch.setattr(sandbox, "require", lambda: None)
    how = {"shots": 0, "metric": "pass@2", "samples": 2, "k": (1, 2), "temperature": 0.8}
    config = config_of(checkpoints, tmp_path, ("model0",), tasks={"humaneval": how})
    values = evaluate.run(config, tmp_path / "out", quiet=True)
    assert not values["tasks"] and not tried and any("--run_code judges them" in note for note in values["notes"])
    kept = json.loads((tmp_path / "out/model0/answers/humaneval.json").read_text())
    assert [prompt[:6] for prompt in kept["prompts"]] == ["def f0"] * 2 + ["def f1"] * 2 + ["def f2"] * 2
    monkeypatch.setattr(evaluate, "_open", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(dataclasses.replace(config, run_code=True), tmp_path / "out", quiet=True)
    values = evaluate.run(dataclasses.replace(config, run_code=True), tmp_path / "out", quiet=True)
    assert len(tried[0]) == 6 and tried[1] == tried[0][2:]  # two had been run before the kill
    assert values["tasks"]["humaneval"]["value"] == pytest.approx(1 / 3) and values["tasks"]["humaneval"]["pass@1"] == 1 / 3
    assert values["tasks"]["humaneval"]["less_room"] == kept["less_room"] == 2 and len(tried) == 2
    assert sorted(tried[0]) == sorted({f"{prompt}{answer}\nT\ncheck({prompt[4:6]})\n"
                                       for prompt, answer in zip(kept["prompts"], kept["answers"])})  # fmt: skip
    task = tasks.build("humaneval", TaskChoice(0, "pass@1"), data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="humaneval runs code that the model writes, in a sandbox: --run_code allows it"):
        task.process_results(task.task_docs[0], [["x"]])


def test_the_first_host_alone_runs_programs(monkeypatch):
    asked = []

    def told(make):  # what another host is told
        asked.append(make)
        return [True, False]

    monkeypatch.setattr(code_judge, "from_host_0", told)
    monkeypatch.setattr(code_judge, "run_all", lambda *_, **__: pytest.fail("a program was run"))
    judge = code_judge.CodeJudge(lambda doc, answers: answers, k=(1, 2), name="t", allowed=True)
    judge.run([({}, ["a", "b", "a"])])
    assert judge({}, [["a", "b"]]) == {"pass@1": 0.5, "pass@2": 1.0} and len(asked) == 1


def test_where_code_cannot_be_confined_nothing_begins(checkpoints, tmp_path, monkeypatch):
    def refuse(code):
        raise sandbox.UnconfinedError("model-written code was not run: it cannot be confined here")

    monkeypatch.setattr(sandbox, "run_code", refuse)
    config = config_of(checkpoints, tmp_path, tasks={"humaneval": {"shots": 0, "metric": "pass@1"}}, run_code=True)
    with pytest.raises(sandbox.UnconfinedError, match="cannot be confined here"):
        evaluate.run(config, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_without_the_hub_the_data_set_and_the_way_out_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)  # nothing kept from earlier runs
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="^hellaswag: the hub's data set 'Rowan/hellaswag' is not in .*--data_dir"):
        tasks.build("hellaswag", TaskChoice(0, "acc_norm"))


def test_configs_of_every_suite_are_valid(data):
    from configs.evaluate import SUITES, get_config

    for suite in SUITES:
        values = get_config(suite).to_dict() | {"models": ("a=b",)}
        values["tasks"] = task_names.of_groups(values["tasks"], values.pop("groups"))
        assert suite not in groups.GROUPS or set(values["tasks"]) == set(groups.GROUPS[suite])
        config = parse(evaluate.EvaluateConfig, values)
        for name, choice in config.tasks.items():
            task, at, shots = name.partition("@")
            assert task in task_names.NAMES and (not at or int(shots) == choice.shots)
            if suite in ("closed", "shots"):  # each cell of these tables has the paper's number beside it
                columns = published.published("L2 70B")
                assert published.cell(columns, name, metric=choice.metric, shots=choice.shots) is not None, name
        for model in config.paper:
            published.published(model)
    assert set(groups.GROUPS) <= set(SUITES)
    with pytest.raises(ValueError, match="groups: 'maths' is unknown; expected some of code, "):
        task_names.of_groups({}, ("maths",))
    with pytest.raises(ValueError, match="suite 'nope' is unknown"):
        get_config("nope")
    with pytest.raises(ConfigError, match="models: expected at least one"):
        parse(evaluate.EvaluateConfig, {**values, "models": ()})
    with pytest.raises(ValueError, match="models: 'a=c': expected name=path with a name of its own"):
        evaluate._named(("a=b", "a=c"))
    assert evaluate._named(("hf:org/mpt-7b", "runs/base/")) == {"mpt-7b": "hf:org/mpt-7b", "base": "runs/base/"}


# ---- the paper's averages ----


def test_averages_of_the_papers_own_columns_are_its_group_columns():
    for model, row in published.TABLE_3.items():
        columns = published.published(model)
        results = {name: {"value": columns[name], "stderr": 0.0, "n": 1} for name in published.TABLES_19_20_25[model]
                   if name in groups.GROUPS["commonsense"]}  # fmt: skip
        assert groups.groups(results)["commonsense"]["value"] == pytest.approx(row["commonsense"], abs=0.11), model
        sizes = dict(zip(task_names.AGIEVAL, (254, 651, 230, 510, 269, 206, 206, 220)))
        results = {f"agieval:{t}": {"value": columns[f"agieval:{t}"], "stderr": 0.0, "n": n} for t, n in sizes.items()}
        if model != "Falcon 40B":  # two equal cells there look like a misprint
            assert groups.groups(results)["agieval"]["value"] == pytest.approx(row["agieval"], abs=0.11), model
        toxic = np.mean([columns[f"toxigen:{g}"] for g in published_groups()])
        assert toxic == pytest.approx(columns["toxigen"], abs=0.011), model
    assert published.published("L2 7B")["math"] == pytest.approx(8.55) and published.TABLE_3["L2 7B"]["math"] == 14.6


def shown(found, known=("L2 7B",), extra=None):
    """The report's sections of one model's records: {title: [table's rows]}."""
    averages = groups.groups(found, extra=extra or {})
    values = {"suite": "x", "limit": 0, "notes": [], "models": {"ours": {"path": "p", "tasks": found, "groups": averages}},
              "tasks": found, "groups": averages, "differences": {}}  # fmt: skip
    sections = evaluation_report.build(values, {model: published.published(model) for model in known})
    return {section.title: [row for table in section.tables for row in table.rows] for section in sections}


def record(metric, shots, value=0.5, n=100, **more):
    return {"metric": metric, "shots": shots, "value": value, "stderr": 0.01, "n": n, "cut": 0, **more}


def test_the_papers_number_is_of_the_same_metric_and_examples():
    code = {"humaneval": record("pass@100", 0, **{"pass@1": 0.12}), "mbpp": record("pass@80", 3)}
    sections = shown(code)
    assert "Averages by group (Table 3)" not in sections  # pass@1 is what Table 3 averages
    assert [(row[0], row[1], row[-1]) for row in sections["Tasks"]] == [
        ("humaneval", "pass@100", "45.6"), ("humaneval", "pass@1", "-"), ("mbpp", "pass@80", "62.8")]  # fmt: skip
    whole = {"humaneval": record("pass@1", 0), "mbpp": record("pass@1", 3)}
    assert shown(whole)["Averages by group (Table 3)"][1][1] == "16.8"
    values = {"models": {"ours": {"groups": groups.groups(whole)}}, "differences": {}}
    plot = benchmark_figures.draw(values, {"L2 7B": published.published("L2 7B")})["groups"]
    assert plot.alt.startswith("Average scores by group of Table 3") and len(plot.png()) > 1000
    shots = {"nq_open": record("exact_match", 5), "nq_open@1": record("exact_match", 1),
             "nq_open@64": record("exact_match", 64), "squad": record("f1", 0), "quac@1": record("f1", 1),
             "triviaqa": record("exact_match", 3)}  # fmt: skip
    sections = shown(shots)
    assert [(row[0], row[2], row[-1]) for row in sections["Tasks"]] == [
        ("nq open", "5", "25.7"), ("nq open", "1", "22.7"), ("nq open", "64", "29.5"), ("squad", "0", "-"),
        ("quac", "1", "39.7"), ("triviaqa", "3", "-")]  # fmt: skip
    assert groups.groups(shots)["world_knowledge"]["missing"] == ["triviaqa"] and "reading" not in groups.groups(shots)
    assert groups.weights("world_knowledge", shots) == {"nq_open": 1.0}
    # One task of a family is not its average.
    one = {"mmlu:anatomy": record("acc", 5)}
    found = groups.groups(one, whole={"mmlu": task_names.expand("mmlu")})
    assert found["mmlu"]["missing"] == ["56 of the 57 tasks of mmlu"]
    assert not benchmark_figures.shown({"m": {"groups": found}}, ["mmlu"])
    every = dict.fromkeys(task_names.expand("mmlu"), record("acc", 5))
    found = groups.groups(every, whole={"mmlu": task_names.expand("mmlu")})
    assert found["mmlu"]["missing"] == [] and benchmark_figures.shown({"m": {"groups": found}}, ["mmlu"]) == ["mmlu"]
    context = {"qmsum": record("rouge1", 0, rouge2=0.03, rougeL=0.12), "squad": record("exact_match", 0, f1=0.6),
               "nq_open@64": record("exact_match", 64)}  # fmt: skip
    sections = shown(context, known=("4k context",))
    assert [(row[1], row[-1]) for row in sections["Tasks"]] == [
        ("rouge1", "15.1"), ("rouge2", "3.5"), ("rougeL", "12.2"), ("exact_match", "58.0"), ("f1", "64.5"),
        ("exact_match", "25.5")]  # fmt: skip
    assert "Averages by group (Table 3)" not in sections  # SQuAD alone is no average


def test_mmlus_groups_stand_beside_table_19():
    found = {"mmlu:anatomy": record("acc", 5, 0.4, 135), "mmlu:virology": record("acc", 5, 0.5, 165),
             "mmlu:anatomy@0": record("acc", 0)}  # fmt: skip
    sections = shown(found, extra={"mmlu_stem": ["mmlu:anatomy"], "mmlu_other": ["mmlu:virology"]})
    assert [(row[0], row[3], row[-2][:4], row[-1]) for row in sections["MMLU"][:2]] == [
        ("MMLU STEM", "135", "40.0", "36.4"), ("MMLU other", "165", "50.0", "52.2")]  # fmt: skip
    assert [row[0] for row in sections["MMLU"][2:]] == ["anatomy", "virology"]
    assert [(row[2], row[3], row[-1]) for row in sections["Tasks"]] == [("5", "300", "45.3"), ("0", "100", "-")]
    assert sections["Averages by group (Table 3)"][0] == ["ours", "45.5 ± 0.7"] and "MMLU, 0 shots" in sections


def test_closed_models_stand_beside_ours():
    """Table 4 agrees with the paper's other tables where both have Llama 2 70B, and PaLM has no column it was not given."""
    ours, everything = published.TABLE_4["L2 70B"], published.published("L2 70B")
    assert {name: everything[name] for name in ours} == ours
    assert published.published("GPT-4") == {"mmlu": 86.4, "gsm8k": 92.0, "humaneval": 67.0}
    assert "humaneval" not in published.published("PaLM-2-L")


def published_groups():
    from llama_jax.evals.safety import TOXIGEN_GROUPS

    return TOXIGEN_GROUPS


def test_weights_add_up_to_the_average():
    results = {"mmlu:a": {"value": 0.5, "stderr": 0.1, "n": 10}, "mmlu:b": {"value": 1.0, "stderr": 0.0, "n": 30},
               "squad": {"value": 0.2, "stderr": 0.0, "n": 5}, "boolq": {"value": 0.6, "stderr": 0.0, "n": 50}}  # fmt: skip
    found = groups.groups(results, extra={"part": ["mmlu:a", "mmlu:b"]})
    for group, row in found.items():
        shares = groups.weights(group, results, extra={"part": ["mmlu:a", "mmlu:b"]})
        assert sum(shares.values()) == pytest.approx(1)
        assert row["value"] == pytest.approx(sum(w * results[t]["value"] for t, w in shares.items())), group
    assert found["mmlu"]["value"] == pytest.approx((5 + 30) / 40) and found["reading"]["value"] == pytest.approx(0.4)
    assert found["mmlu"]["stderr"] == pytest.approx(0.1 * 10 / 40) and found["reading"]["missing"] == ["quac"]


def test_the_bootstrap_knows_that_questions_are_shared():
    rng = np.random.default_rng(0)
    easy = rng.random(400) < 0.5
    first = {"t": {"scores": easy.astype(float).tolist()}}
    second = {"t": {"scores": (easy | (rng.random(400) < 0.04)).astype(float).tolist()}}
    row = benchmarks.difference(first, second, {"t": 1.0}, resamples=2000, seed=0)
    assert 0 < row["low"] < row["difference"] < row["high"] < 0.05  # unpaired, the interval would be 0.14 wide
    with pytest.raises(ValueError, match="t: expected scores of the same questions, got 400 and 1"):
        benchmarks.difference(first, {"t": {"scores": [1.0]}}, {"t": 1.0}, resamples=10, seed=0)


def test_rounding_alone_makes_no_difference_clear():
    """The MMLU humanities' interval ended at -3.5e-18, and "(-28.2 to -0.0)" was called worse."""
    first = {"a": {"scores": [0.0, 0.0]}, "b": {"scores": [0.0, 0.0]}, "c": {"scores": [1.0, 1.0]}}
    second = {"a": {"scores": [1.0, 1.0]}, "b": {"scores": [1.0, 1.0]}, "c": {"scores": [0.0, 0.0]}}
    row = benchmarks.difference(first, second, {"a": 0.1, "b": 0.2, "c": 0.3}, resamples=10, seed=0)
    assert row == {"difference": 0.0, "low": 0.0, "high": 0.0} and 0.1 + 0.2 - 0.3 > 0
    clear = [statistics.is_clear({"low": low, "high": high}) for low, high in ((-3, -1), (1, 3), (-1, 0), (0, 0), (-1, 1))]
    assert clear == [True, True, False, False, False] and not statistics.is_clear(row)


def test_what_scores_alike_on_few_questions_has_an_interval():
    # Wilson for 0 of 6: z² / (n + z²) = 3.8415 / 9.8415.
    none, all_ = ({"value": value, "stderr": 0.0, "n": 6} for value in (0.0, 1.0))
    assert statistics.ends_of(none) == pytest.approx((0.0, 0.3903), abs=1e-4)
    assert statistics.ends_of(all_) == pytest.approx((0.6097, 1.0), abs=1e-4)
    assert statistics.ends_of({"value": 0.5, "stderr": 0.1, "n": 6}) == pytest.approx((0.304, 0.696))
    assert [evaluation_report.cell(row) for row in (none, all_)] == ["0.0 (0.0 to 39.0)", "100.0 (61.0 to 100.0)"]
    assert evaluation_report.cell({**none, "stderr": None}) == "0.0" and evaluation_report.cell(none, unit=1.0) == "0.00"
    wrong = {"t": {"scores": [0.0] * 6}}
    row = benchmarks.difference(wrong, wrong, {"t": 1.0}, resamples=10, seed=0)
    # Bonett and Price: variance 2 / 8, spread 1.96 √(0.25 / 8).
    assert row == {"difference": 0.0, "low": pytest.approx(-0.3465, abs=1e-4), "high": pytest.approx(0.3465, abs=1e-4)}


def test_numbers_of_a_table_are_not_broken_and_texts_are():
    cells = ["66.7 ± 21.1", "-14.1 (-28.2 to 0.0)", "0.93", "12 of 30", "<b>1 ± 2</b>"]
    html = report_html.table_html(Table(["a"] * 5, [cells]))
    assert html.partition("<tbody>")[2].startswith(
        '<tr><td><span class="number">66.7 ± 21.1</span></td><td><span class="number">-14.1</span> '
        '<span class="number">(-28.2 to 0.0)</span></td><td>0.93</td><td>12 of 30</td><td>&lt;b&gt;1 ± 2&lt;/b&gt;</td>'
    )
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", report_html.STYLE)
    assert any(".number" in names and "nowrap" in rule for names, rule in rules)
    assert any("td:first-child" in names and "sticky" in rule for names, rule in rules)


def test_a_group_that_is_no_average_is_told_of_and_safety_has_its_own_tables():
    record = {"metric": "exact_match", "value": 0.5, "stderr": 0.1, "n": 6, "shots": 5}
    model = {"tasks": {"nq_open": record}, "groups": groups.groups({"nq_open": record})}
    toxic = {"toxigen": {"value": 0.1, "stderr": 0.1, "n": 9, "missing": []}}
    values = {"models": {"m": model}, "differences": {}, "notes": [], "limit": 0, "tasks": model["tasks"]}
    words = "World knowledge: no average, without triviaqa."
    assert words in evaluation_report.build(values, {})[-1].notes
    both = {**model, "groups": {**model["groups"], **toxic}}
    first, *_, last = evaluation_report.build({**values, "models": {"m": both}}, {})
    assert first.title == "Averages by group (Tables 11, 14)" and words in first.notes and words not in last.notes


# ---- the layouts of real files ----

SHARED = ROOT.parent / "shared/data/eval"
SHARED = SHARED if SHARED.is_dir() else ROOT.parents[1] / "shared/data/eval"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared evaluation files are not on this machine")
@pytest.mark.parametrize("name", ["hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "boolq",
                                  "commonsense_qa", "squad", "quac", "nq_open", "triviaqa", "gsm8k", "mmlu:anatomy",
                                  "bbh:snarks", "agieval:sat-en-without-passage", "humaneval", "mbpp"])  # fmt: skip
def test_real_rows_become_prompts_with_the_papers_shots(name):
    from configs.evaluate import get_config

    choice = parse(TaskChoice, get_config("academic").to_dict()["tasks"][name.partition(":")[0]])
    task = tasks.build(name, choice, data_dir=str(SHARED), run_code=True)
    task.build_all_requests(limit=1)
    request = task.instances[0]
    prompt = request.args[0]
    shots = min(choice.shots, 3) if name.startswith("agieval") else choice.shots
    marks = {"commonsense_qa": "Question:", "mmlu:anatomy": "\nAnswer:", "bbh:snarks": "Q: ", "gsm8k": "Q: ", "nq_open": "Q: ",
             "agieval:sat-en-without-passage": "A: Among", "triviaqa": "Question:", "mbpp": "[BEGIN]"}  # fmt: skip
    if name in marks:
        assert prompt.count(marks[name]) == shots + 1, prompt
    assert "CANARY" not in prompt.upper()
    target = task.doc_to_target(task.task_docs[0])
    assert target not in ("", None, [])


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    def load(path):
        try:
            raise ModuleNotFoundError("No module named 'sympy'", name="sympy")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("`sympy`, `math_verify` are required for translation") from error

    monkeypatch.setattr(tasks, "load_settings", load)
    with pytest.raises(ModuleNotFoundError, match=r"^math:algebra: needs the package sympy: pip install 'llama_jax\[eval\]'$"):
        tasks.build("math:algebra", TaskChoice(4, "math_verify"))
    with pytest.raises(ModuleNotFoundError, match="^lambada_openai: needs the package sympy: pip install sympy$"):
        tasks.build("lambada_openai", TaskChoice(0, "acc"))


def test_math_rows_become_prompts_and_answers_are_verified(tmp_path):
    pytest.importorskip("math_verify", reason="needs the extra [eval]: lm-eval[math]")
    row = {"subject": "algebra", "problem": "Solve $2x = 1$ for $x$.", "solution": "Halve it: $x = \\boxed{\\frac{1}{2}}$."}
    write_rows(tmp_path / "math_test.jsonl", [row, {**row, "subject": "geometry"}])
    task = tasks.build("math:algebra", TaskChoice(4, "math_verify"), data_dir=str(tmp_path))
    assert len(task.task_docs) == 1
    task.build_all_requests(limit=1)
    prompt = task.instances[0].args[0]
    assert prompt.count("Problem:") == 5 and prompt.endswith("Problem:\nSolve $2x = 1$ for $x$.\n\nSolution:")
    for said, right in (("$\\frac{1}{2}$", 1), ("$2$", 0)):
        answer = f" Final Answer: The final answer is {said}. I hope it is correct."
        assert task.process_results(task.task_docs[0], [answer]) == {"exact_match": right, "math_verify": right}


def test_a_set_is_read_whole_where_it_lies_and_a_part_of_it_is_told(finished, data, tmp_path):
    output, values = finished
    (note,) = (note for note in values["notes"] if note.startswith("mmlu: "))
    assert note == (
        "mmlu: read from mmlu_test_20_per_subject, which holds a part of the set, so not the questions of the paper's number; "
        "its tasks may be of one size in it, while the paper's average is over all questions"
    )
    assert note in (output / "report.md").read_text()
    shutil.copytree(data, tmp_path / "both")
    row = json.loads((data / "mmlu_test_20_per_subject.jsonl").read_text().splitlines()[0])
    write_rows(tmp_path / "both/mmlu.jsonl.gz", [{**row, "question": f"whole {i}"} for i in range(9)])
    task = tasks.build("mmlu:anatomy", TaskChoice(0, "acc"), data_dir=str(tmp_path / "both"))
    assert len(task.task_docs) == 9 and task.task_docs[0]["question"] == "whole 0" and not tasks.notes({"mmlu:anatomy": task})
    for name, rows in (("bbh", [{"task": "snarks", "input": "i", "target": "t"}]),
                       ("agieval", [{"task": "sat-math", "question": "q", "options": ["(A)x", "(B)y"], "label": "A"}])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
        part = f"{name}:{rows[0]['task']}"
        assert len(tasks.build(part, TaskChoice(0, "acc"), data_dir=str(tmp_path)).task_docs) == 1, name
    write_rows(tmp_path / "bold.jsonl", [{"domain": "d", "group": "islam", "prompt": "the "}])
    assert len(safety.items("bold", data_dir=str(tmp_path))) == 1 and not safety.part_of("bold", str(tmp_path))


def test_choices_are_divided_by_their_likelihood_behind_answer_as_for_llama_1(checkpoints, data, tmp_path):
    from configs.evaluate import get_config

    config = get_config("academic").to_dict()["tasks"]
    assert {name for name, how in config.items() if how["metric"] == "acc_mutual_info"} == {"openbookqa", "boolq"}
    write_rows(tmp_path / "openbookqa_test.jsonl", [
        {"Question Stem": "The loop", "Choices": "(A) counts (B) reads (C) is text (D) ends", "Answer Key": "C"}
    ])  # fmt: skip
    task = tasks.build("openbookqa", TaskChoice(0, "acc_mutual_info"), data_dir=str(tmp_path))
    task.build_all_requests(limit=1)
    choices = (" counts", " reads", " is text", " ends")
    assert [request.args for request in task.instances] == [(c, t) for c in ("The loop", "Answer:") for t in choices]
    # B is the likeliest, also by its length; C gains most: log p rises by 2.
    likelihoods = [-3.0, -1.0, -4.0, -5.0, -2.5, -0.5, -6.0, -5.0]
    scored = task.process_results(task.task_docs[0], [(log_p, False) for log_p in likelihoods])
    assert scored == {"acc_mutual_info": 1.0}
    lm = HarnessModel(llama_jax.load(checkpoints / "model0", mesh=one_device()), quiet=True)
    task = tasks.build("boolq", TaskChoice(0, "acc_mutual_info"), data_dir=str(data))
    record = benchmarks.run_task(lm, "boolq", task, TaskChoice(0, "acc_mutual_info"), limit=None)
    contexts = [*map(task.doc_to_text, task.task_docs), "Answer:"]
    pairs = [(context, answer) for context in contexts for answer in (" no", " yes")]
    log_p = np.array([found for found, _ in lm.loglikelihood(requests_of("loglikelihood", pairs))])
    gains = log_p.reshape(-1, 2)[:-1] - log_p[-2:]
    expected = [float(gain.argmax() == doc["label"]) for gain, doc in zip(gains, task.task_docs, strict=True)]
    assert record["scores"] == expected and record["metric"] == "acc_mutual_info"


def test_openbookqa_choices_are_split_at_their_letters():
    row = {"Question Stem": "s", "Choices": "(A) one (B) two (or so) (C) three (D) four", "Answer Key": "B"}
    assert local_rows.openbookqa(row)["choices"]["text"] == ["one", "two (or so)", "three", "four"]
