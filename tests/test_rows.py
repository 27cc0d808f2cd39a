"""Rows in the formats and shapes of the ecosystem: Parquet, shards, Hugging Face data sets, TFDS; TRL's and ShareGPT's rows."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import ConfigError
from llama_jax.data import rows, sources
from llama_jax.data.dialog import encode_dialog
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.sft import stage
from llama_jax.sft.stage import DialogData, packed_dialogs

SHARED = Path(__file__).parents[2] / "shared" / "data" / "preference"
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
COMPARISON = {"prompt": "q", "chosen": "a", "rejected": "b", "rating": "slightly", "margin": 0.5, "batch": 3, "source": "s"}


def written(tmp_path, *rows_):
    sources.write_jsonl(tmp_path / "rows.jsonl", rows_)
    return tmp_path / "rows.jsonl"


def test_prompt_and_completion_is_a_dialog_whose_prompt_is_not_trained_on(tmp_path):
    turns = [USER, OTHER, {"role": "user", "content": "r"}]
    path = written(
        tmp_path, {"prompt": "q", "completion": "a"}, {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": turns, "completion": [ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    )  # fmt: skip
    found = sources.read_dialogs(path)
    assert [row["messages"] for row in found] == [[USER, ANSWER], [USER, ANSWER], [*turns, ANSWER], [USER, ANSWER]]
    assert [row["prompt_messages"] for row in found] == [1, 1, 3, 0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import sentencepiece

    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.txt").write_text("[INST] who asks what [/INST] an answer of some words\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"), model_prefix=str(directory / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(directory / "tokenizer.model")


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]], ids=["plain", "system"])
def test_answers_inside_a_prompt_are_not_supervised(tmp_path, tokenizer, system):
    prompt, completion = [*system, USER, OTHER, USER], [ANSWER]
    all_turns = encode_dialog([*prompt, *completion], tokenizer)
    last = encode_dialog([*prompt, *completion], tokenizer, train_on="last")
    assert encode_dialog([*prompt, *completion], tokenizer, prompt_messages=len(prompt)) == last != all_turns
    path = written(tmp_path, {"prompt": prompt, "completion": completion})
    assert packed_dialogs((str(path),), tokenizer, length=128).supervised == sum(last.supervised)


def test_answers_of_weight_0_are_not_supervised(tmp_path, tokenizer):
    """As OpenAI's fine-tuning data say it; Parquet fills in None where a message says nothing."""
    dialog = [{**USER, "weight": None}, {**OTHER, "weight": 0}, USER, {**ANSWER, "weight": 1}]
    last = encode_dialog([USER, OTHER, USER, ANSWER], tokenizer, train_on="last")
    assert encode_dialog(dialog, tokenizer) == last and sum(last.supervised) > 0
    path = written(tmp_path, {"messages": dialog})
    assert packed_dialogs((str(path),), tokenizer, length=128).supervised == sum(last.supervised)
    path = written(tmp_path, {"messages": [USER, {**ANSWER, "weight": 0}]})
    with pytest.raises(ValueError, match=f"^{path}:1: messages: expected an answer that is trained on, got none"):
        packed_dialogs((str(path),), tokenizer, length=128)
    path = written(tmp_path, {"messages": [USER, {**ANSWER, "weight": 0.5}]})
    with pytest.raises(ValueError, match=rf"^{path}:1: messages\[1\].weight: expected 0 or 1, got 0.5"):
        packed_dialogs((str(path),), tokenizer, length=128)


def test_a_dialog_that_is_all_prompt_is_an_error_with_its_line(tmp_path, tokenizer):
    path = written(tmp_path, {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "prompt_messages": 2})
    with pytest.raises(ValueError, match=rf"^{path}:2: messages: expected an answer that is trained on, got none: 2 of 2 are"):
        packed_dialogs((str(path),), tokenizer, length=128)


def test_of_several_files_the_one_that_holds_a_bad_dialog_is_named(tmp_path, tokenizer):
    for name, last in (("train-0", {}), ("train-1", {"prompt_messages": 2})):
        sources.write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], **last}])
    for name in (tmp_path, f"{tmp_path}/train-*"):
        with pytest.raises(ValueError, match=rf"^{tmp_path}/train-1.jsonl:2: messages: expected an answer that is trained on"):
            packed_dialogs((str(name),), tokenizer, length=128)


def test_dialogs_longer_than_a_row_are_left_out_whole_counted_and_the_first_is_named(tmp_path, tokenizer, caplog):
    lengths = {"a-0": [1, 1], "a-1": [1, 60, 1, 90], "b": [70]}
    for name, of_file in lengths.items():
        rows = [{"messages": [{"role": "user", "content": "7" * n}, ANSWER]} for n in of_file]
        sources.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    short = len(encode_dialog([{**USER, "content": "7"}, ANSWER], tokenizer).ids)
    paths = (f"{tmp_path}/a-*", f"{tmp_path}/b.jsonl")  # the second has nothing that fits
    packed = packed_dialogs(paths, tokenizer, length=short)
    assert packed.tokens == 4 * short  # each digit is a token: nothing of the long ones is left
    assert [record.getMessage() for record in caplog.records if "are longer than" in record.getMessage()] == [
        f"3 of 7 dialogs are longer than {short} tokens and left out; the first is {tmp_path}/a-1.jsonl:2 ({short + 59} tokens)"
    ]
    caplog.clear()
    assert packed_dialogs(paths, tokenizer, length=short + 89).tokens == 7 * short + 59 + 89 + 69
    assert "are longer than" not in caplog.text


def test_a_file_is_encoded_once_until_it_changes(tmp_path, tokenizer, monkeypatch):
    read = []
    monkeypatch.setattr(stage, "read_dialogs", lambda path: read.append(path) or sources.read_dialogs(path))
    path, again = str(written(tmp_path, {"messages": [USER, ANSWER]})), Tokenizer(tokenizer.path)
    first = packed_dialogs((path,), tokenizer, length=128)
    assert packed_dialogs((path, path), again, length=128).tokens == 2 * first.tokens and len(read) == 1
    packed_dialogs((path,), again, length=128, train_on="last")
    assert len(read) == 2
    written(tmp_path, {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]})
    assert packed_dialogs((path,), tokenizer, length=128).tokens == 2 * first.tokens and len(read) == 3


def test_files_that_fill_a_share_of_the_mix(tmp_path, tokenizer):
    for name, text, count in (("own", "a", 30), ("safety", "b", 40)):
        rows = [{"messages": [{"role": "user", "content": f"{text} {i}"}, ANSWER]} for i in range(count)]
        sources.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    paths = tuple(str(tmp_path / f"{name}.jsonl") for name in ("own", "safety"))
    data = DialogData(paths[:1], (), 128, shares=(0.0,)).joined(paths[0])
    assert data.train == (paths[0], paths[0]) and data.shares == (0.0, 0.0)

    def dialogs(**how):
        return sum(int(row.segment_ids.max()) for row in packed_dialogs(paths, tokenizer, length=4096, **how).rows)

    assert dialogs() == 70 and dialogs(shares=(0.0, 0.25)) == 40  # 10 of 40 are a quarter
    mixed = [packed_dialogs(paths, tokenizer, length=4096, shares=(0.0, 0.25), seed=seed).rows[0].tokens for seed in (0, 0, 1)]
    assert np.array_equal(mixed[0], mixed[1]) and not np.array_equal(mixed[0], mixed[2])
    # Too long dialogs are no part of a share.
    rows = [{"messages": [{"role": "user", "content": "b " * 3000 if i % 2 else f"b {i}"}, ANSWER]} for i in range(40)]
    sources.write_jsonl(tmp_path / "safety.jsonl", rows)
    assert dialogs(shares=(0.0, 0.25)) == 40
    with pytest.raises(ConfigError, match="data.shares: expected one for each of the 2 files of data.train, got 1"):
        dialogs(shares=(0.5,))
    with pytest.raises(ConfigError, match="^data.train: expected at least one file, got none$"):
        packed_dialogs((), tokenizer, length=128)
    for field in ("train", "held_out"):
        with pytest.raises(ConfigError, match=f"^data.{field}: expected a file, got nothing$"):
            dataclasses.replace(data, **{field: (paths[0], "")})


def test_a_prompt_may_be_a_text(tmp_path):
    found = sources.read_prompts(written(tmp_path, {"prompt": "q"}, {"prompt": [USER]}, {"messages": [USER]}))
    assert found[0] == found[1] == found[2] and found[0]["messages"] == [USER]


def test_every_shape_of_a_comparison_is_the_same_comparison(tmp_path):
    more = {key: COMPARISON[key] for key in ("rating", "margin", "batch", "source")}
    path = written(
        tmp_path, COMPARISON,
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER], **more},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER], **more},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}, **more},
        {"prompt": {"role": ["user"], "content": ["q"]}, "chosen": "a", "rejected": "b", **more},
    )  # fmt: skip
    first, *others = sources.read_comparisons(path)
    assert first["prompt"] == [USER] and others == [first] * 4
    assert (first["margin"], first["batch"]) == (0.5, 3)


@pytest.mark.parametrize(("reader", "row", "message"), [
    ("dialogs", {"completion": "a"}, "prompt: missing beside completion"),
    ("dialogs", {"prompt": "q", "completion": 3}, "completion: expected a string or a list of messages, got int"),
    ("dialogs", {"prompt": 3, "completion": "a"}, "prompt: messages: expected a list, got int"),
    ("dialogs", {"messages": [USER, ANSWER], "conversations": []}, "conversations: a row has this field or messages"),
    ("dialogs", {"prompt": "q", "completion": [ANSWER, USER]}, r"messages\[2\].role: expected 'assistant' at the end"),
    ("comparisons", {**COMPARISON, "margin": -1}, "margin: expected a number of at least 0, got -1.0"),
    ("comparisons", {**COMPARISON, "margin": "big"}, "margin: expected float, got str"),
    ("comparisons", {**COMPARISON, "batch": True}, "batch: expected int or str, got bool"),
    ("comparisons", {"chosen": [USER, ANSWER], "rejected": [ANSWER, OTHER]}, "prompt: missing"),
    ("comparisons", {"prompt": "q", "chosen": {"from": "human", "value": "a"}, "rejected": "b"}, r"chosen: messages\[1\]"),
])  # fmt: skip
def test_what_is_wrong_is_named_by_row_and_field(tmp_path, reader, row, message):
    path = written(tmp_path, row)
    with pytest.raises(ValueError, match=f"^{path}:1: {message}"):
        getattr(sources, f"read_{reader}")(path)


def test_parquet_gives_the_rows_of_jsonl(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    made = [COMPARISON, {**COMPARISON, "rating": None}]
    parquet.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet")
    found = sources.read_comparisons(tmp_path / "rows.parquet")
    without = {key: value for key, value in COMPARISON.items() if key != "rating"}
    assert found == sources.read_comparisons(written(tmp_path, COMPARISON, without))

    parquet.write_table(pa.Table.from_pylist([{"messages": [USER, ANSWER]}]), tmp_path / "dialogs.parquet")
    assert sources.read_dialogs(tmp_path / "dialogs.parquet")[0]["messages"] == [USER, ANSWER]
    parquet.write_table(pa.Table.from_pylist([COMPARISON, {**COMPARISON, "chosen": "b"}]), tmp_path / "tie.parquet")
    with pytest.raises(ValueError, match="tie.parquet:2: chosen: the same text"):
        sources.read_comparisons(tmp_path / "tie.parquet")
    data = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut.parquet:1: damaged Parquet file"):
        list(rows.read_rows(tmp_path / "cut.parquet"))
    with pytest.raises(FileNotFoundError, match="none.parquet: expected a Parquet file, found nothing"):
        list(rows.read_rows(tmp_path / "none.parquet"))


def numbered(path, *numbers):
    """A file of rows {"n": number}, of the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [{"n": number} for number in numbers]
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(made), path)
    else:
        sources.write_jsonl(path, made)
    return path


def found_in(name, **how):
    return [row["n"] for _, row in rows.read_rows(name, **how)]


def test_a_hub_snapshot_of_one_split_is_read_in_the_order_of_its_shards(tmp_path):
    for shard, numbers in ((2, [5]), (0, [1, 2]), (1, [3, 4])):
        numbered(tmp_path / "data" / f"train-0000{shard}-of-00003.parquet", *numbers)
    (tmp_path / "README.md").write_text("# a card")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    numbered(tmp_path / ".cache" / "huggingface" / "old.parquet", 9)
    for name in (tmp_path, tmp_path / "data", f"{tmp_path}/", f"{tmp_path}/data/train-*", f"{tmp_path}/**/*.parquet"):
        assert found_in(name) == [1, 2, 3, 4, 5], name
    assert [where for where, _ in rows.read_rows(tmp_path)][1:3] == [
        f"{tmp_path}/data/train-00000-of-00003.parquet:2", f"{tmp_path}/data/train-00001-of-00003.parquet:1",
    ]  # fmt: skip
    assert found_in(tmp_path / "data" / "train-00001-of-00003.parquet") == [3, 4]


def test_a_pattern_may_be_relative_and_a_name_may_look_like_one(tmp_path, monkeypatch):
    numbered(tmp_path / "a[1].jsonl", 1), numbered(tmp_path / "b.jsonl.gz", 2), numbered(tmp_path / "c" / "d.jsonl", 3)
    monkeypatch.chdir(tmp_path)
    assert found_in("a[1].jsonl") == [1] and found_in("?.jsonl*") == [2] and found_in("c/[a-d]*") == [3]
    assert found_in("*.jsonl*") == [1, 2] and [where for where, _ in rows.read_rows("*/*")] == ["c/d.jsonl:1"]


@pytest.mark.parametrize("names", [
    ["batch9.jsonl.gz"], ["0000.jsonl", "0001.jsonl"], ["x.json"],
    [f"part-0000{i}-2f1e3d4c-0a0b-4c4d-8e8f-0123456789ab-c000.snappy.parquet" for i in (0, 1)],  # Spark's
    ["train-00000-of-00002-0123456789abcdef.parquet", "train-00001-of-00002-f0f0f0f0f0f0f0f0.parquet"],
])  # fmt: skip
def test_names_of_shards(tmp_path, names):
    for number, name in enumerate(names):
        numbered(tmp_path / name, number)
    assert found_in(tmp_path) == list(range(len(names)))


def test_splits_are_not_mixed_unless_a_pattern_says_so(tmp_path):
    names = [f"{split}-0000{i}-of-00002" for split in ("train_prefs", "test_prefs", "train") for i in (0, 1)]
    for number, name in enumerate(names):
        numbered(tmp_path / "data" / f"{name}.jsonl", number)
    numbered(tmp_path / "extra.jsonl", 7)
    with pytest.raises(ValueError, match=f"^{tmp_path}: expected the files of one split, found those of 4; choose") as error:
        found_in(tmp_path)
    patterns = str(error.value).partition("matches: ")[2].split(", ")
    names = ("data/test_prefs-*", "data/train-*", "data/train_prefs-*", "extra.jsonl")
    assert patterns == [f"{tmp_path}/{name}" for name in names]
    assert [found_in(pattern) for pattern in patterns] == [[2, 3], [4, 5], [0, 1], [7]]
    assert found_in(f"{tmp_path}/data/train*") == [4, 5, 0, 1]


def test_a_choice_of_splits_takes_each_alone(tmp_path):
    """Where one name begins another, and where two downloads lie in one directory."""
    for number, name in enumerate(["train1", "train2", "training1", "c-0-of-1", "c-0-of-2", "c-1-of-2", "c"]):
        numbered(tmp_path / f"{name}.jsonl", number)
    numbered(tmp_path / "c.jsonl.gz", 7)
    with pytest.raises(ValueError) as error:
        found_in(tmp_path)
    patterns = str(error.value).partition("matches: ")[2].split(", ")
    assert sorted(found_in(pattern) for pattern in patterns) == [[0, 1], [2], [3], [4, 5], [6], [7]]


def test_formats_are_not_mixed(tmp_path):
    numbered(tmp_path / "a.jsonl", 1), numbered(tmp_path / "a.jsonl.gz", 1), numbered(tmp_path / "b.parquet", 1)
    found = rf"found 2 of .jsonl \({tmp_path}/a.jsonl\) and 1 of .parquet \({tmp_path}/b.parquet\)"
    for name in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(ValueError, match=rf"expected files of one format, {found}; .*: {tmp_path}/\*.jsonl\* or"):
            found_in(name)
    assert found_in(f"{tmp_path}/*.parquet") == [1]


@pytest.mark.parametrize(("names", "pattern"), [
    (("a.json", "b.jsonl"), "*.json"), (("a.json.gz", "b.jsonl"), "*.json.gz"), (("a.json", "b.parquet"), "*.json"),
])  # fmt: skip
def test_json_beside_another_format_is_left_out_only_if_it_describes_the_data(tmp_path, names, pattern):
    for name in ("dataset_infos.json", "dataset_info.json", "metadata.json", "train-metadata.json", "croissant.json"):
        (tmp_path / name).write_text("{}")
    for number, name in enumerate(names):
        numbered(tmp_path / name, number)
    found = rf"found 1 of .json \({tmp_path}/{names[0]}\) and 1 of"
    with pytest.raises(ValueError, match=rf"expected files of one format, {found} .*: {re.escape(f'{tmp_path}/{pattern} or')}"):
        found_in(tmp_path)
    assert found_in(f"{tmp_path}/{pattern}") == [0]
    (tmp_path / names[0]).unlink()
    assert found_in(tmp_path) == [1]


@pytest.mark.parametrize(("files", "found"), [
    ([], ""), (["README.md"], ""), (["a.csv", "b.jsonl.zst"], ".*/a.csv, .*/b.jsonl.zst"),
])  # fmt: skip
def test_a_directory_or_pattern_without_data(tmp_path, files, found):
    for file in files:
        (tmp_path / file).write_text("x")
    for name, nothing in ((tmp_path, "a directory without data"), (f"{tmp_path}/*", "nothing")):
        with pytest.raises(FileNotFoundError, match=rf"expected files \*.jsonl, \*.jsonl.gz, .*; found {found or nothing}$"):
            found_in(name)
    with pytest.raises(FileNotFoundError, match="found nothing$"):
        found_in(f"{tmp_path}/none/*.jsonl")


def test_half_a_download_is_noticed(tmp_path, caplog):
    for shard in (0, 2):
        numbered(tmp_path / f"train-0000{shard}-of-00003.jsonl", shard)
    with pytest.raises(ValueError, match=f"^{tmp_path}: found 2 of the 3 shards {tmp_path}/train-\\*$"):
        found_in(tmp_path)
    with caplog.at_level(logging.WARNING):  # of a pattern it may be meant
        assert found_in(f"{tmp_path}/train-0000[0-2]*") == [0, 2]
    assert "found 2 of the 3 shards" in caplog.text


@pytest.mark.parametrize("name", [
    "HuggingFaceH4/ultrafeedback_binarized", "hf://datasets/HuggingFaceH4/ultrafeedback_binarized/data/train-*",
    "https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized",
])  # fmt: skip
def test_a_name_of_the_hub_is_told_how_it_is_fetched(name):
    command = "hf download --repo-type dataset HuggingFaceH4/ultrafeedback_binarized --local-dir DIR"
    with pytest.raises(FileNotFoundError, match=f"{command}; then expected DIR, or one split of it, such as DIR/data/train-"):
        sources.read_comparisons(name)


@pytest.mark.parametrize("name", ["data/ours.jsonl", "/data/ours", "./none", "here/none", "a/b/c", "none"])
def test_a_path_is_no_name_of_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a JSONL file, found nothing$"):
        sources.read_dialogs(name)


def test_a_line_that_holds_no_row_may_be_told_and_passed_over(tmp_path):
    lines = [b'{"n": 1}', b'{"n": ', b"[2]", b'"\xff"', b"", b'{"n": 6}']
    for name in ("a1.jsonl", "a2.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join(lines))
    told = []
    assert found_in(tmp_path, refuse=lambda where, error: told.append((where, str(error)))) == [1, 6, 1, 6]
    lines = [f"{tmp_path}/{name}:{line}" for name in ("a1.jsonl", "a2.jsonl") for line in range(2, 6)]
    assert [where for where, _ in told] == lines
    for (where, text), kind in zip(told, ("malformed JSON", "expected a JSON object", "not UTF-8", "empty line")):
        assert text.startswith(f"{where}: {kind}")
    with pytest.raises(ValueError, match="a1.jsonl:2: malformed JSON"):
        found_in(tmp_path)


def test_shards_of_the_hub_are_comparisons_and_dialogs(tmp_path, tokenizer):
    """As `HuggingFaceH4/ultrafeedback_binarized` has them: answers as whole dialogs, and a training set of several shards."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    made = {"prompt": "q", "prompt_id": "x", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER],
            "score_chosen": 8.0, "score_rejected": 2.0}  # fmt: skip
    for shard in (0, 1):
        parquet.write_table(pa.Table.from_pylist([made]), tmp_path / f"train_prefs-0000{shard}-of-00002.parquet")
    first, second = sources.read_comparisons(tmp_path)
    assert first == second and (first["prompt"], first["chosen"], first["rejected"]) == ([USER], "a", "b")
    one, both = (packed_dialogs((f"{tmp_path}/train_prefs-0000{some}",), tokenizer, length=128).tokens for some in ("0*", "*"))
    assert both == 2 * one > 0


REMOTE = """
from llama_jax.data.rows import read_rows
def found_in(name):
    return [(where.removeprefix("gs://bucket/"), row["n"]) for where, row in read_rows(name)]
both = [("set/data/train-0.jsonl:1", 1), ("set/data/train-1.jsonl:1", 2)]
assert found_in("gs://bucket/set/data/train-*") == both
assert found_in("gs://bucket/set/data/") == found_in("gs://bucket/set") == both, found_in("gs://bucket/set")
for name, expected in (("two", "gs://bucket/two/test-*, gs://bucket/two/train-*"), ("set/**/*", "may not hold"),
                       ("none/*.jsonl", "found nothing"), ("none.jsonl", "expected a JSONL file, found nothing")):
    try:
        found_in(f"gs://bucket/{name}")
    except (ValueError, FileNotFoundError) as error:
        assert expected in str(error), error
    else:
        raise AssertionError(name)
"""


def test_shards_in_a_bucket():
    pytest.importorskip("google_crc32c")
    pytest.importorskip("gcsfs")
    from bucket_server import BucketServer

    with BucketServer("bucket") as server:
        for name, n in (("set/data/train-1", 2), ("set/data/train-0", 1), ("two/train-0", 3), ("two/test-0", 4)):
            server.put("bucket", f"{name}.jsonl", b'{"n": %d}\n' % n)
        server.put("bucket", "set/README.md", b"# a card")
        done = subprocess.run(
            [sys.executable, "-c", REMOTE], env={**os.environ, **server.environment()}, cwd=Path(__file__).parents[1],
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_saved_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([COMPARISON, {**COMPARISON, "rating": None}])
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(str(tmp_path / "set"))
    (first, second) = sources.read_comparisons(tmp_path / "set" / "train")
    (held_out,) = sources.read_comparisons(tmp_path / "set" / "test")
    assert first["prompt"] == [USER] and (first["rating"], second["rating"]) == ("slightly", None) and held_out == second
    with pytest.raises(ValueError, match="set: holds the splits test, train; expected one of them"):
        sources.read_comparisons(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"a directory with the state.json .* found .*set/test/data-.*\.arrow"):
        sources.read_comparisons(tmp_path)
    next((tmp_path / "set" / "train").glob("*.arrow")).write_bytes(b"torn")
    with pytest.raises(ValueError, match="train: damaged data set"):
        sources.read_comparisons(tmp_path / "set" / "train")


def test_a_tfds_name(tmp_path):
    import tensorflow_datasets as tfds

    class PreferencesOfTheTest(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
            features = {"messages": tfds.features.Sequence(message), "chosen": tfds.features.Text(),
                        "rejected": tfds.features.Text(), "batch": np.int32}  # fmt: skip
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"messages": [USER], "chosen": "a", "rejected": "b", "batch": 2}

    PreferencesOfTheTest(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    name = f"tfds://preferences_of_the_test?dir={tmp_path}"
    (row,) = sources.read_comparisons(name)
    assert (row["prompt"], row["chosen"], row["rejected"], row["batch"]) == ([USER], "a", "b", 2)
    with pytest.raises(ValueError, match="tfds://no_such_set: cannot be read"):
        sources.read_comparisons("tfds://no_such_set")
    with pytest.raises(ValueError, match="splits: unknown option; expected split or dir"):
        sources.read_comparisons("tfds://x?splits=train")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="pyarrow")

    monkeypatch.setattr(rows.importlib, "import_module", missing)
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match=r"pyarrow: pip install 'llama_jax\[data\]'"):
        list(rows.read_rows(tmp_path / "rows.parquet"))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared preference samples")
def test_a_sharegpt_file_of_others_is_read():
    found = sources.read_comparisons(SHARED / "synthetic_dpo_en.jsonl.gz")
    assert len(found) == 200 and json.dumps(found[0]["prompt"]).count("Angela") == 1
