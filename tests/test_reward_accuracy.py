"""Reward models side by side: both tables by hand, through the real command, killed, and refused."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_runs import MODEL, prepare

import llama_jax
from llama_jax import reward_accuracy
from llama_jax.config import ConfigError
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.evals import reward_figures
from llama_jax.evals.reward_scores import score_dialogs
from llama_jax.reward_accuracy import by_source, tables_of
from llama_jax.rlhf import respond

DEGREES = ("significantly", "slightly")
LONG = "no " * 99


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Random reward models, and two sets: `rated` of two sources with a pair too long and one unsafe, `plain` with neither."""
    root = tmp_path_factory.mktemp("accuracy")
    prepare(root)
    write_jsonl(root / "rated.jsonl", [
        *({"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no", "rating": DEGREES[i % 2], "source": "ab"[i % 3 == 0]}
          for i in range(9)),
        {"prompt": "q", "chosen": LONG, "rejected": "no", "source": "a"},
        {"prompt": "q", "chosen": "yes", "rejected": "no", "source": "a", "safety_bin": "rejected_safe"},
    ])  # fmt: skip
    write_jsonl(root / "plain.jsonl", [{"prompt": f"q{i}", "chosen": "a", "rejected": f"b{i} c"} for i in range(4)])
    return root


def places_of(root):
    return {name: str(root / name) for name in ("helpfulness", "safety")}


def data_of(root):
    return {name: str(root / f"{name}.jsonl") for name in ("rated", "plain")}


def run(root, output, **changes):
    given = {"checkpoints": places_of(root), "data": data_of(root), **changes}
    tokenizer = str(root / "tokenizer.model")
    return reward_accuracy.run(given["checkpoints"], given["data"], output, tokenizer=tokenizer)


def run_command(*arguments, **environment):
    line = [sys.executable, "-m", "llama_jax.reward_accuracy", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu", **environment})


def test_accuracies_by_source_and_degree_by_hand():
    rows = [
        {"chosen": c, "rejected": r, "source": source, "rating": rating, "safety_bin": None, "longer_by": longer}
        for c, r, source, rating, longer in (
            (2.0, 1.0, "b", "significantly", 3), (0.0, 0.0, "b", "slightly", -1), (-1.0, -2.0, "a", None, 0)
        )
    ]  # fmt: skip
    own, longer = by_source(rows)
    shares = [{s: {d: v["share"] for d, v in row.items()} for s, row in of.items()} for of in (own, longer)]
    assert shares == [
        {"b": {"significantly": 1.0, "slightly": 0.5, "all": 0.75}, "a": {"all": 1.0},  # a tie counts half
         "all": {"significantly": 1.0, "slightly": 0.5, "all": pytest.approx(2.5 / 3)}},
        {"b": {"significantly": 1.0, "slightly": 0.0, "all": 0.5}, "a": {"all": 0.5},  # a coin where both have as many
         "all": {"significantly": 1.0, "slightly": 0.0, "all": 0.5}},
    ]  # fmt: skip
    assert list(by_source(rows[:2])[0]) == ["b"]  # one source: no "all" beside it
    values = {
        "accuracy": {"ours": own}, "longer": longer,
        "data": {"b": {"compared": 2, "pairs": 3, "unsafe_chosen": 1, "too_long": {"ours": 1}}},
    }  # fmt: skip
    tables = tables_of(values)
    seven, eight, pairs = tables.values()
    assert seven.columns == ["", "b", "a", "all"] and seven.rows[-1] == ["pairs", "2", "1", "3"]
    assert [row[0] for row in seven.rows] == ["ours", "the longer response", "pairs"]
    assert seven.rows[0][1] == "75.0 (19.8 to 97.3)"  # Wilson's interval of 1 1/2 of 2
    assert eight.columns == ["", "model", *DEGREES, "all"] and {row[0] for row in eight.rows} == {"b", "all"}
    assert pairs.columns == ["", "compared", "of", "too long for ours", "unsafe answer chosen"]
    assert pairs.rows == [["b", "2", "4", "1", "1"]]


def test_bars_of_many_models_have_a_colour_each():
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    drawn = reward_figures.accuracy_by_source({f"model {i}": {"a": 0.5, "b": 0.25 + i / 10} for i in range(5)})
    assert drawn.png().startswith(b"\x89PNG") and "model 4: a 50.0 %, b 65.0 %" in drawn.alt


def test_the_command_scores_and_reports_and_goes_on(root, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    out = tmp_path / "out"
    line = [
        f"--checkpoint={','.join(f'{name}={place}' for name, place in places_of(root).items())}",
        f"--data={','.join(f'{name}={file}' for name, file in data_of(root).items())}",
        f"--output={out}", f"--tokenizer={root / 'tokenizer.model'}",
    ]  # fmt: skip
    done = run_command(*line)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(out / "report.html"), done.stderr[-2000:]
    values = json.loads((out / "results.json").read_text())
    assert values["data"]["rated"] == {
        "file": str(root / "rated.jsonl"), "pairs": 10, "compared": 9, "unsafe_chosen": 1,
        "too_long": {"helpfulness": 1, "safety": 1},
    }  # fmt: skip
    assert list(values["longer"]) == ["rated: b", "rated: a", "plain", "all"]  # in the order of the files
    assert values["longer"]["plain"]["all"]["share"] == 0.0 and values["longer"]["all"]["all"]["n"] == 13
    model = llama_jax.load(places_of(root)["safety"], tokenizer=root / "tokenizer.model")
    dialogs = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        for _, row in read_jsonl(root / "plain.jsonl") for side in ("chosen", "rejected")
    ]  # fmt: skip
    alone = score_dialogs(model.params, model.config, model.tokenizer, dialogs, compute=model.compute, mesh=model.mesh)
    alone = alone.reshape(-1, 2)
    kept = [[row["chosen"], row["rejected"]] for _, row in read_jsonl(out / "scores/safety/plain/scores.jsonl")]
    np.testing.assert_allclose(kept, alone, atol=1e-4)
    assert values["accuracy"]["safety"]["plain"]["all"]["share"] == np.mean(alone[:, 0] > alone[:, 1])
    text, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    for shown in (text, html):
        assert all(words in shown for words in ("By degree of preference (Table 8)", "the longer response", "Helpfulness RM"))
    assert 'src="data:image/svg+xml' in html and "http" not in html.replace("http://www.w3.org", "")
    assert {path.name for path in (out / "figures").glob("*.png")} == {"reward_accuracy.png", "reward_accuracy_sources.png"}
    before = {path: path.stat().st_mtime_ns for path in (out / "scores").rglob("scores.jsonl")}
    again = run_command(*line)
    assert again.returncode == 0 and len(before) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((out / "results.json").read_text()) == values


def test_scores_and_report_lie_in_a_bucket(root):
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("needs gcsfs (extra [gcs])")
    from bucket_server import BucketServer  # needs what gcsfs brings

    line = [
        f"--checkpoint=ours={root / 'safety'}", f"--data=plain={root / 'plain.jsonl'}",
        f"--tokenizer={root / 'tokenizer.model'}",
    ]  # fmt: skip
    with BucketServer("bucket") as server:
        done = run_command("--output=gs://bucket/accuracy", *line, **server.environment())
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "gs://bucket/accuracy/report.html", done.stderr[-2000:]
        kept = dict(server.buckets["bucket"])
        scores = "accuracy/scores/ours/plain/scores.jsonl"
        assert {f"accuracy/{name}" for name in ("results.json", "report.md", "report.html")} | {scores} <= set(kept)
        assert kept[scores][0].count(b"\n") == 4
        # Other scores in their place: the second run goes on from those of the bucket.
        ranked = b"".join(json.dumps({"chosen": 1.0 + i, "rejected": 0.0}).encode() + b"\n" for i in range(4))
        server.put("bucket", scores, ranked)
        assert run_command("--output=gs://bucket/accuracy", *line, **server.environment()).returncode == 0
        values = json.loads(server.buckets["bucket"]["accuracy/results.json"][0])
        assert values["accuracy"]["ours"]["plain"]["all"]["share"] == 1.0
        assert server.buckets["bucket"][scores][0] == ranked
    refused = run_command("--output=s3://bucket/accuracy", *line)
    assert refused.returncode and "--output=s3://bucket/accuracy: expected a directory, or gs://bucket" in refused.stderr


def test_a_killed_run_scores_only_what_is_missing(root, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    monkeypatch.setattr(reward_accuracy, "_PORTION", 4)
    written, real = [], respond.write_jsonl

    def write(path, rows):
        if len(written) == 5:
            raise RuntimeError("killed")
        written.append(f"{path.parent.name}/{path.name}")
        real(path, rows)

    monkeypatch.setattr(respond, "write_jsonl", write)
    with pytest.raises(RuntimeError, match="killed"):
        run(root, tmp_path / "killed")
    assert written == ["scores/0-4.jsonl", "scores/4-8.jsonl", "scores/8-9.jsonl", "rated/scores.jsonl", "scores/0-4.jsonl"]
    monkeypatch.setattr(respond, "write_jsonl", lambda path, rows: (written.append(f"{path.parent.name}/{path.name}"),
                                                                     real(path, rows)))  # fmt: skip
    found = run(root, tmp_path / "killed")
    assert written[5] == "plain/scores.jsonl"  # all of its portions were there
    monkeypatch.setattr(reward_accuracy, "load_judge", lambda *_: pytest.fail("a model was loaded"))
    assert run(root, tmp_path / "killed") == found
    monkeypatch.undo()
    assert run(root, tmp_path / "whole")["accuracy"] == found["accuracy"]


def test_degrees_may_be_corrected_other_pairs_and_models_are_refused(root, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    pairs = [row for _, row in read_jsonl(root / "plain.jsonl")]
    file, models = tmp_path / "plain.jsonl", {"ours": places_of(root)["safety"]}
    write_jsonl(file, pairs)
    found = run(root, tmp_path / "out", checkpoints=models, data={"plain": str(file)})
    assert set(found["accuracy"]["ours"]) == {"plain"} and set(found["accuracy"]["ours"]["plain"]) == {"all"}
    assert "Table 8" not in (tmp_path / "out/report.md").read_text()
    monkeypatch.setattr(reward_accuracy, "load_judge", lambda *_: pytest.fail("a model was loaded"))
    write_jsonl(file, [{**row, "rating": "better"} for row in pairs])
    rated = run(root, tmp_path / "out", checkpoints=models, data={"plain": str(file)})
    assert rated["accuracy"]["ours"]["plain"]["better"] == found["accuracy"]["ours"]["plain"]["all"]
    with pytest.raises(ConfigError, match="results under this name are of another model.*weights"):
        run(root, tmp_path / "out", checkpoints={"ours": places_of(root)["helpfulness"]}, data={"plain": str(file)})
    write_jsonl(file, pairs[:3])
    with pytest.raises(ConfigError, match="results under this name are of another model.*pairs"):
        run(root, tmp_path / "out", checkpoints=models, data={"plain": str(file)})


def test_a_pair_that_one_model_cannot_hold_is_left_out_of_all(root, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    opened = reward_accuracy.open_judges

    def one_token_less(*given):  # than the longer pair has, for one of the models
        judges = opened(*given)
        some = judges["safety"]
        longest = max(pair.tokens for pair in some.sets["plain"].pairs)
        return {**judges, "safety": dataclasses.replace(some, max_length=longest - 1)}

    monkeypatch.setattr(reward_accuracy, "open_judges", one_token_less)
    data = {"plain": str(tmp_path / "plain.jsonl")}
    write_jsonl(data["plain"], [
        {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a " * 9, "rejected": "b"}
    ])  # fmt: skip
    values = run(root, tmp_path / "out", data=data)
    assert values["data"]["plain"]["too_long"] == {"helpfulness": 0, "safety": 1}
    assert [of["plain"]["all"]["n"] for of in (*values["accuracy"].values(), values["longer"])] == [1, 1, 1]


def test_what_is_wrong_is_said_before_a_model_is_loaded(root, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_accuracy, "load_judge", lambda *_: pytest.fail("a model was loaded"))
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "q", "chosen": LONG, "rejected": "no"}])

    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            run(root, tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()

    refused(ValueError, "expected a reward model, found a language model", checkpoints={"chat": str(root / "chat")})
    refused(FileNotFoundError, "nowhere", checkpoints={"gone": str(root / "nowhere")})
    refused(FileNotFoundError, "nowhere", data={"gone": str(root / "nowhere.jsonl")})
    refused(ValueError, "--data: 'a/b': expected a name that a directory can have", data={"a/b": str(root / "plain.jsonl")})
    refused(ValueError, "--data: 'all' is the name of all sets together", data={"all": str(root / "plain.jsonl")})
    refused(ValueError, f"long.jsonl: none of 1 pairs fits into the {MODEL.max_length} tokens of helpfulness",
            data={"long": str(tmp_path / "long.jsonl")})  # fmt: skip
    refused(ValueError, "expected at least one --checkpoint", checkpoints={})


def test_scores_that_are_no_numbers_are_refused(root, tmp_path, monkeypatch):
    load = reward_accuracy.load_judge

    def broken(*given):
        model = load(*given)
        return dataclasses.replace(model, params=jax.tree.map(lambda x: x * np.nan, model.params))

    monkeypatch.setattr(reward_accuracy, "load_judge", broken)
    with pytest.raises(ValueError, match="returned nan for response 0, expected a finite number"):
        run(root, tmp_path / "out")
