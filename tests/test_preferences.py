"""The report on preference data: sums by hand, order of batches, and the command on open sets and files of ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.data.sources import read_comparisons, write_jsonl
from llama_jax.preferences import _stem, run
from llama_jax.reward.preference_report import best_of_batches, markdown, report, tally
from llama_jax.reward.split import parse_parts, part_of

ROOT = Path(__file__).parents[1]


def words(texts):
    return [len(text.split()) for text in texts]


def row(prompt, chosen, rejected, **more):
    roles = ("user", "assistant")
    return {"prompt": [{"role": roles[i % 2], "content": text} for i, text in enumerate(prompt)], "chosen": chosen,
            "rejected": rejected, **more}  # fmt: skip


ROWS = [
    row(["a b c"], "d e", "f", source="x", batch=2, rating="better", safety_bin="both_safe"),
    row(["a", "b c", "d e f"], "g h i", "j", source="x", batch=10, rating="slightly"),
    row(["a"], "b", "c c c", source="y", batch=10, rating="better"),
    row(["a"], "b", "c c c"),
]


def test_the_columns_of_table_6_by_hand():
    found = report(tally(ROWS, words))
    x = found["sources"]["x"]
    # 3 words + 1.5; 1 + 2 + 3 words + 2
    assert x["comparisons"] == 2 and x["tokens_per_example"] == (4.5 + 8) / 2
    assert x["turns_per_dialog"] == 1.5 and x["tokens_per_prompt"] == (3 + 1 + 3) / 3
    assert x["tokens_per_response"] == (2 + 1 + 3 + 1) / 4
    assert x["rating_shares"] == {"significantly": 0, "better": 0.5, "slightly": 0.5, "negligibly": 0}
    assert x["safety_bin_shares"]["both_safe"] == 1 and found["sources"][""]["rating_shares"] == {}
    assert list(found["batches"]) == ["2", "10"] and found["batches"]["10"]["comparisons"] == 2
    assert found["total"]["comparisons"] == 4 and found["batched"]["comparisons"] == 3
    single = found["sources"]["y"]
    assert single["tokens_per_example"] == single["tokens_per_prompt"] + single["tokens_per_response"]


def test_sums_do_not_depend_on_the_chunks(monkeypatch):
    whole = report(tally(ROWS, words))
    monkeypatch.setattr("llama_jax.reward.preference_report._CHUNK", 1)
    assert report(tally(ROWS, words)) == whole


def test_a_batch_may_be_a_number_in_one_file_and_text_in_another():
    found = report(tally([*ROWS, row(["a"], "b", "c", batch="10")], words))
    assert {name: of["comparisons"] for name, of in found["batches"].items()} == {"2": 1, "10": 3}
    assert found["batched"]["comparisons"] == 4


def test_best_of_batches_by_hand():
    samples = [{"prompt": 0, "reward": r} for r in (0.1, 0.5, 0.3)] + [{"prompt": 1, "reward": 0.7}]
    found = best_of_batches({"1": samples})["1"]
    assert found == {"max": pytest.approx(0.6), "median": pytest.approx(0.5), "prompts": 2, "samples": 2.0}
    with pytest.raises(ValueError, match="batch 2: expected at least one"):
        best_of_batches({"2": []})


def test_the_markdown_holds_every_table():
    values = report(tally(ROWS, words)) | {"split": {"train": 3, "held_out": 1}}
    values["left_out"] = {"f.jsonl": {"a tie": {"rows": 3, "first": "f.jsonl:7"}}}
    text = markdown(values)
    assert "| x | 2 | 1.5 | 6.2 | 2.3 | 1.8 |" in text and "| 10 | 2 |" in text
    assert "| f.jsonl | a tie | 3 | f.jsonl:7 |" in text
    # a table's last row adds up the rows above it, here of those that have a batch
    by_set, by_batch = text.split("## By batch")
    # the paper's own stand below ours
    assert "| Anthropic Helpful | 122,387 | 3.0 | 251.5 |" in by_set and "| Meta safety | 18 | 47 | 35 |" in by_set
    assert "| 14 | 249,356 | 4.3 | 1008.0 |" in by_batch and "| 1 | 18.3 | 27.7 | 28 to 33.5 | 25 |" in by_batch
    assert "Fig. 26" not in text
    values["best_of_batches"] = best_of_batches({"1": [{"prompt": 0, "reward": 0.5}]})
    assert "| 12 | 20 | 0.657 | 0.443 |" in markdown(values)
    assert "| total | 4 |" in by_set and "| total | 3 |" in by_batch and "| held_out.jsonl.gz | 1 |" in by_batch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import sentencepiece

    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.txt").write_text("some words of a question and an answer\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"), model_prefix=str(directory / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return directory / "tokenizer.model"


def test_the_command_reads_open_sets_and_ours_and_writes_rows(tmp_path, tokenizer):
    pytest.importorskip("matplotlib")
    head = "\n\nHuman: hi\n\nAssistant:"
    write_jsonl(tmp_path / "hh.jsonl.gz", [{"chosen": f"{head} a", "rejected": f"{head} b"},
                                           {"chosen": f"{head} a", "rejected": f"{head} a"}])  # fmt: skip
    write_jsonl(tmp_path / "ours.jsonl", [*ROWS, {**ROWS[0], "safety_bin": "rejected_safe"}])
    write_jsonl(tmp_path / "samples.jsonl", [{"prompt": 0, "reward": 0.5}])
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.preferences", f"--tokenizer={tokenizer}", f"--output={tmp_path / 'out'}", "--rows",
         f"--data=anthropic_helpful={tmp_path / 'hh.jsonl.gz'},{tmp_path / 'ours.jsonl'}",
         f"--samples=1={tmp_path / 'samples.jsonl'}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert values["total"]["comparisons"] == 5 and values["sources"]["anthropic_helpful"]["comparisons"] == 1
    assert list(values["left_out"].values()) == [
        {"chosen and rejected are the same": {"rows": 1, "first": f"{tmp_path / 'hh.jsonl.gz'}:2"}},
        {"an unsafe answer is preferred to a safe one": {"rows": 1, "first": f"{tmp_path / 'ours.jsonl'}:5"}},
    ]  # fmt: skip
    rows = read_comparisons(tmp_path / "out" / "comparisons.jsonl.gz")
    assert [found["source"] for found in rows] == ["anthropic_helpful", "x", "x", "y", "ours"]  # the last one's file
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.md", "report.json", "comparisons.jsonl.gz",
        *(f"{name}.{ending}" for name in ("rating_shares", "best_of_batches") for ending in ("png", "svg", "dark.svg")),
    }  # fmt: skip
    assert "## By batch (Table 26)" in done.stdout


@pytest.mark.parametrize(
    "name, stem",
    [("a/ours.jsonl.gz", "ours"), ("gs://bucket/ours.parquet", "ours"), ("saved/train/", "train"),
     ("tfds://webgpt:1.0.0?split=train&dir=/tmp/a", "webgpt"), ("set/data/train_prefs-*", "train_prefs"),
     ("set/data/train-[0-9]*", "train"), ("set/data/*.parquet", "data"), ("*.jsonl", "")],
)  # fmt: skip
def test_a_set_without_a_source_is_called_by_its_file(name, stem):
    assert _stem(name) == stem


BAD = {  # what may be wrong with ROWS[0], and the reason that is counted
    "chosen and rejected are the same": {"chosen": "f", "rejected": " f"},
    "a chat tag in the text": {"rejected": "[INST] f"},
    "turns do not alternate": {"prompt": [{"role": "assistant", "content": "a"}]},
    "rating: expected one of significantly, better, slightly, negligibly": {"rating": "good"},
    "prompt: messages[].role: expected one of system, user, assistant": {"prompt": [{"role": "tool", "content": "a"}]},
    "margin: expected a number of at least 0": {"margin": -1},
    "prompt: missing": {"prompt": None},
}


def test_rows_of_ours_that_are_no_comparison_are_left_out_when_asked(tmp_path, tokenizer):
    """Twice each, in two shards, and lines that are no rows at all."""
    pytest.importorskip("matplotlib")
    made = [{key: value for key, value in {**ROWS[0], **change}.items() if value is not None} for change in BAD.values()]
    for shard in (0, 1):
        write_jsonl(tmp_path / "set" / f"train-{shard}.jsonl", [ROWS[0], *made, ROWS[1]])
        with open(tmp_path / "set" / f"train-{shard}.jsonl", "ab") as file:
            file.write(b'{"prompt": \n{"prompt": "\xff"}\n')
    command = [sys.executable, "-m", "llama_jax.preferences", f"--tokenizer={tokenizer}", f"--output={tmp_path / 'out'}",
               "--rows", f"--data={tmp_path / 'set'}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    first = f"{tmp_path / 'set' / 'train-0.jsonl'}"
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.splitlines()[-1] == (
        f"error: {first}:2: chosen: the same text as rejected; the ranking loss has no ties (--leave_out leaves such rows out "
        "and counts them)"
    )
    done = subprocess.run([*command, "--leave_out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["left_out"].values()
    reasons = [*BAD, None, "malformed JSON", "not UTF-8"]
    assert found == {
        reason: {"rows": 2, "first": f"{first}:{line}"} for line, reason in enumerate(reasons, start=2) if reason
    }  # fmt: skip
    assert f"| {tmp_path / 'set'} | malformed JSON | 2 | {first}:10 |" in done.stdout
    rows = read_comparisons(tmp_path / "out" / "comparisons.jsonl.gz")
    assert [row["chosen"] for row in rows] == [ROWS[0]["chosen"], ROWS[1]["chosen"]] * 2


def test_wrong_samples_and_no_matplotlib_show_before_anything_is_read(tmp_path, tokenizer, monkeypatch):
    write_jsonl(tmp_path / "samples.jsonl", [{"prompt": 0}])
    for samples, message in ((["samples.jsonl"], "samples: expected batch=file"),
                             ([f"1={tmp_path / 'samples.jsonl'}"], "samples.jsonl:1: reward: missing")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(["nowhere.jsonl"], tmp_path / "out", tokenizer=tokenizer, samples=samples, quiet=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"figures need the package .*: pip install 'llama_jax\[eval\]'"):
        run(["nowhere.jsonl"], tmp_path / "out", tokenizer=tokenizer, quiet=True)


def test_a_set_of_another_layout_is_not_left_out_whole(tmp_path, tokenizer):
    pytest.importorskip("matplotlib")
    write_jsonl(tmp_path / "ours.jsonl", ROWS)
    write_jsonl(tmp_path / "shp.jsonl", [{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}] * 2)
    message = "shp.jsonl: expected comparisons, none of its 2 rows holds one; 2 of them: prompt: missing .the first is .*:1.$"
    with pytest.raises(ValueError, match=message):
        run([str(tmp_path / "ours.jsonl"), str(tmp_path / "shp.jsonl")], tmp_path / "out", tokenizer=tokenizer,
            leave_out=True, quiet=True)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_wrong_input_leaves_nothing_behind(tmp_path, tokenizer):
    pytest.importorskip("matplotlib")
    write_jsonl(tmp_path / "ours.jsonl", [ROWS[0], {**ROWS[0], "rating": "good"}])
    for data, message in (("ours.jsonl", "ours.jsonl:2: rating: expected one of"), ("hh=x.jsonl", "is no layout")):
        path = str(tmp_path / data) if data == "ours.jsonl" else data
        with pytest.raises(ValueError, match=message):
            run([path], tmp_path / "out", tokenizer=tokenizer, rows=True, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["ours.jsonl"]


def test_a_split_looks_at_what_was_asked_and_not_at_a_common_system_message():
    system = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": [system, {"role": "user", "content": f"q {i}"}]} for i in range(400)]
    parts = [part_of(row, {"held_out": 0.25}) for row in rows]
    assert 0.18 < parts.count("held_out") / 400 < 0.32
    assert parts == [part_of({"prompt": row["prompt"][1:]}, {"held_out": 0.25}) for row in rows]


def test_a_split_keeps_conversations_whole_and_does_not_depend_on_order():
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {i % 50}  of \n many"}, *more]}
        for i in range(100) for more in ([], [{"role": "assistant", "content": str(i)}])
    ]  # fmt: skip
    shares = parse_parts(["validation=0.1", "held_out=0.3"])
    parts = [part_of(row, shares) for row in rows]
    assert parts[:50] == parts[100:150] and parts == [part_of(row, shares) for row in rows[::-1]][::-1]
    assert part_of({"prompt": [{"role": "user", "content": " question 3 OF many "}]}, shares) == parts[6]
    counts = [parts.count(name) / len(parts) for name in ("validation", "held_out", "train")]
    assert all(abs(found - wanted) < 0.12 for found, wanted in zip(counts, (0.1, 0.3, 0.6)))
    # A smaller share takes rows from the larger one's part and from no other.
    less = parse_parts(["validation=0.1", "held_out=0.1"])
    assert {part_of(row, shares) for row in rows if part_of(row, less) == "held_out"} == {"held_out"}


@pytest.mark.parametrize(
    "parts, message",
    [(["train=0.5"], "expected a new name"), (["a=0.5", "a=0.1"], "expected a new name"), (["a"], "expected name=share"),
     (["a=1"], "between 0 and 1"), (["a=0.5", "b=0.5"], "leave nothing for train")],
)  # fmt: skip
def test_impossible_splits_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        parse_parts(parts)
