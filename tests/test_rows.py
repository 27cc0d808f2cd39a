"""Rows in the formats and shapes of the ecosystem: Parquet, Hugging Face data sets, TFDS; TRL's and ShareGPT's rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from llama_jax.data import rows, sources
from llama_jax.data.dialog import encode_dialog
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.sft import stage
from llama_jax.sft.stage import packed_dialogs

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


def test_a_saved_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([COMPARISON, {**COMPARISON, "rating": None}])
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(str(tmp_path / "set"))
    (first, second) = sources.read_comparisons(tmp_path / "set" / "train")
    (held_out,) = sources.read_comparisons(tmp_path / "set" / "test")
    assert first["prompt"] == [USER] and (first["rating"], second["rating"]) == ("slightly", None) and held_out == second
    with pytest.raises(ValueError, match="set: holds the splits test, train; expected one of them"):
        sources.read_comparisons(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="without the state.json"):
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
