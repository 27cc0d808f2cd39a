"""Dialogs, prompts and comparisons from JSONL: what is read, and that each error names file, line and field."""

import gzip

import pytest

from llama_jax.data import sources
from llama_jax.data.row_file import RowFile
from llama_jax.data.rows import read_rows
from llama_jax.files import atomic_write


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


GOOD = {
    sources.read_dialogs: {"messages": [user("q"), assistant("a")]},
    sources.read_prompts: {"messages": [user("q")]},
    sources.read_comparisons: {"prompt": "q", "chosen": "a", "rejected": "b"},
}
BAD_ROWS = [
    # reader, changes to the second row (... takes a field away), what the message says after file:line
    ("dialogs", {"messages": ...}, "messages: missing"),
    ("dialogs", {"messages": [user("q")]}, r"messages\[0\].role: expected 'assistant' at the end"),
    ("dialogs", {"messages": [user("q"), assistant(" \n")]}, r"messages\[1\].content: the answer is empty"),
    ("dialogs", {"messages": [user("q"), assistant(""), user("r"), assistant("a")]}, r"messages\[1\].content: the answer"),
    ("dialogs", {"messages": [user("q"), {**assistant(""), "weight": 0}]}, r"messages\[1\].content: the answer is empty"),
    ("dialogs", {"messages": [system("s"), user(" "), assistant("a")]}, r"messages\[1\].content: expected what the user says"),
    ("dialogs", {"messages": ..., "prompt": "", "completion": "a"}, r"messages\[0\].content: expected what the user says"),
    ("dialogs", {"messages": [user("q"), {"role": "bot", "content": ""}]}, r"messages\[1\].role: expected one of"),
    ("dialogs", {"is_safety": 1}, "is_safety: expected bool, got int"),
    ("dialogs", {"messages": None}, "messages: missing"),
    ("dialogs", {"train_on": "lst"}, "train_on: expected one of all, last, got 'lst'"),
    ("dialogs", {"is_safe": True}, "is_safe: unknown field, did you mean 'is_safety'?"),
    ("prompts", {"messages": ...}, "prompt or messages: missing; the row has no field"),
    ("prompts", {"messages": None}, "prompt or messages: missing"),
    ("prompts", {"messages": [user("q"), assistant("a")]}, r"messages\[1\].role: expected 'user' at the end"),
    ("prompts", {"messages": ..., "prompt": "\n"}, r"messages\[0\].content: expected what the user says, found an empty text"),
    ("prompts", {"reference": 3}, "reference: expected str, got int"),
    ("comparisons", {"prompt": ...}, "prompt: missing"),
    ("comparisons", {"chosen": ...}, "chosen: missing"),
    ("comparisons", {"chosen": " "}, "chosen: expected a text, found an empty one"),
    ("comparisons", {"prompt": ""}, r"prompt: messages\[0\].content: expected what the user says, found an empty text"),
    ("comparisons", {"chosen": None}, "chosen: missing"),
    ("comparisons", {"rejected": ...}, "rejected: missing"),
    ("comparisons", {"rating": "slight"}, "rating: expected one of significantly, better, slightly, negligibly, got 'slight'"),
    ("comparisons", {"rating": 3}, "rating: expected str, got int"),
    ("comparisons", {"safety_bin": "safe"}, "safety_bin: expected one of chosen_safe, both_safe, both_unsafe, rejected_safe"),
    ("comparisons", {"messages": [user("q")], "chosen": ...}, "messages: a row has this field or prompt, got both"),
    ("comparisons", {"ratings": "better"}, "ratings: unknown field, did you mean 'rating'?"),
    ("comparisons", {"prompt": 4}, "prompt: messages: expected a list, got int"),
    ("comparisons", {"prompt": [user("q"), assistant("a")]}, "prompt: expected to end with the user"),
    ("comparisons", {"chosen": 4}, "chosen: expected a string or a list of messages, got int"),
    ("comparisons", {"chosen": []}, "chosen: expected one message after the prompt, got 0"),
    ("comparisons", {"chosen": [user("a")]}, r"chosen: messages\[1\].role: expected 'assistant'"),
    ("comparisons", {"rejected": " a "}, "chosen: the same text as rejected"),
    ("comparisons", {"rejected": "[INST]"}, r"rejected: messages\[1\].content: holds the chat tag"),
]


def test_rows_of_well_known_chat_sets_are_read_as_they_are(tmp_path):
    """UltraFeedback's and UltraChat's columns: the dialog stands beside its parts, and other columns are named like ours."""
    dialog, path = [user("q"), assistant("a")], tmp_path / "rows.jsonl"
    extra = {"prompt_id": "x", "messages": dialog, "score_chosen": 8.5, "source_id": 3, "chosen_id": "y", "ratings": [1, 2]}
    row = {"prompt": "q", "chosen": dialog, "rejected": [user("q"), assistant("b")], **extra}
    sources.write_jsonl(path, [row])
    (pair,) = sources.read_comparisons(path)
    assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["rating"]) == ([user("q")], "a", "b", None)
    sources.write_jsonl(path, [{"prompt": "q", "prompt_id": "x", "messages": dialog}])
    assert sources.read_prompts(path)[0]["messages"] == [user("q")]
    assert sources.read_dialogs(path)[0]["messages"] == dialog


def test_what_is_not_learned_may_be_empty(tmp_path):
    """An earlier answer that is context, and the worse of two answers."""
    path, said = tmp_path / "rows.jsonl", [user("q"), assistant(""), user("r"), assistant("a")]
    own = {"messages": [said[0], {**said[1], "weight": 0}, *said[2:]]}
    sources.write_jsonl(path, [
        {"messages": said, "train_on": "last"}, {"messages": said, "prompt_messages": 3}, own,
        {"prompt": said[:3], "completion": "a"},
    ])  # fmt: skip
    assert len(sources.read_dialogs(path)) == 4
    sources.write_jsonl(path, [{"prompt": said[:3]}])
    assert sources.read_prompts(path)[0]["messages"] == said[:3]
    sources.write_jsonl(path, [{"prompt": said[:3], "chosen": "a", "rejected": ""}])
    assert sources.read_comparisons(path)[0]["rejected"] == ""


@pytest.mark.parametrize("reader", [*GOOD, sources.read_jsonl], ids=lambda reader: reader.__name__)
def test_an_empty_name_means_no_file_of_the_current_directory(tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    sources.write_jsonl("rows.jsonl", [GOOD.get(reader, {})])
    with pytest.raises(ValueError, match="^expected the path of a data set, got nothing$"):
        list(reader(""))


@pytest.mark.parametrize(("kind", "changes", "message"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, kind, changes, message):
    reader, path = getattr(sources, f"read_{kind}"), tmp_path / "rows.jsonl"
    bad = {key: value for key, value in {**GOOD[reader], **changes}.items() if value is not ...}
    sources.write_jsonl(path, [GOOD[reader], bad, GOOD[reader]])
    with pytest.raises(ValueError, match=f"^{path}:2: {message}"):
        reader(path)
    assert "\n" not in str(pytest.raises(ValueError, reader, path).value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [}', "malformed JSON, column 15"),
        (b'{"messages"', "malformed JSON"),
        (b"", "empty line; expected a JSON object$"),
        (b" \r\n\t", "empty line"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"a": "\xff"}', r"not UTF-8 \(byte 7\)"),
        (b'{"a": NaN}', "malformed JSON: NaN is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "malformed JSON: Exceeds the limit"),
        (b'{"a": ' + b"[" * 200_000, "malformed JSON"),
        (b'{"a": "\\ud83d"}', "an escape .* without its other half"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_malformed_line_is_named_by_file_and_line(tmp_path, line, message, ending):
    path = tmp_path / f"rows.jsonl{ending}"
    text = b'{"messages": [], "smile": "\\ud83d\\ude42"}\n' + line + b"\n{}\n"
    path.write_bytes(gzip.compress(text) if ending else text)
    rows = sources.read_jsonl(path)
    assert next(rows) == (f"{path}:1", {"messages": [], "smile": "🙂"})
    with pytest.raises(ValueError, match=f"^{path}:2: {message}"):
        next(rows)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_byte_order_mark_and_empty_lines_at_the_end_are_passed_over(tmp_path, ending):
    path = tmp_path / f"rows.jsonl{ending}"
    text = b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n\r\n \t\n\n'
    path.write_bytes(gzip.compress(text) if ending else text)
    assert list(sources.read_jsonl(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": 2})]
    text += b'{"a": 3}\n[]\n\n'  # only now three of them are in the middle
    path.write_bytes(gzip.compress(text) if ending else text)
    refused = []
    found = list(read_rows(path, refuse=lambda where, error: refused.append(str(error))))
    assert found[2:] == [(f"{path}:6", {"a": 3})]
    assert refused == [*(f"{path}:{line}: empty line; expected a JSON object" for line in (3, 4, 5)),
                       f"{path}:7: expected a JSON object, got list"]  # fmt: skip
    with pytest.raises(ValueError, match=f"^{path}:3: empty line; expected a JSON object$"):
        list(sources.read_jsonl(path))


@pytest.mark.parametrize("rest", [b"", b"\n", b"\r\n \n", b'\n{"b": 1', b"\n\n  "])
@pytest.mark.parametrize("whole", [b"", b'{"a": 1}\n', b'{"a": 1} \r\n'])
def test_what_is_appended_never_stands_behind_an_empty_line(tmp_path, whole, rest):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(whole + rest)
    file = RowFile(path)
    file.append({"b": 2})
    file.close()
    assert path.read_bytes() == whole + b'{"b": 2}\n'


@pytest.mark.parametrize("reader", list(GOOD), ids=lambda reader: reader.__name__)
def test_missing_empty_and_damaged_files_are_refused(tmp_path, reader):
    with pytest.raises(FileNotFoundError, match="none.jsonl: expected a JSONL file, found nothing"):
        reader(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="found a directory"):
        reader(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl: no \w+: the file is empty"):
        reader(tmp_path / "empty.jsonl")
    sources.write_jsonl(tmp_path / "whole.jsonl.gz", [GOOD[reader]] * 20)
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "whole.jsonl.gz").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz:\d+: damaged gzip file"):
        reader(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}\n")
    with pytest.raises(ValueError, match="plain.jsonl.gz:1: damaged gzip file"):
        reader(tmp_path / "plain.jsonl.gz")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_rows_are_written_whole_and_read_back(tmp_path, ending):
    path = tmp_path / "new" / f"rows.jsonl{ending}"
    rows = [{"messages": [user("é\u2028🙂"), assistant("a\nb")], "source": "s", "is_safety": True, "other": [1, None],
             "prompt_messages": 0, "train_on": "last"}]  # fmt: skip
    assert sources.write_jsonl(path, rows) == 1
    assert sources.read_dialogs(path) == rows
    first = path.read_bytes()
    sources.write_jsonl(path, rows)
    assert path.read_bytes() == first
    with pytest.raises(ValueError, match="not JSON compliant"):
        sources.write_jsonl(path, [*rows, {"x": float("nan")}])
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "x") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_readers_fill_in_what_is_missing(tmp_path):
    for reader, row in GOOD.items():
        sources.write_jsonl(tmp_path / f"{reader.__name__}.jsonl", [row])
    (row,) = sources.read_dialogs(tmp_path / "read_dialogs.jsonl")
    assert row == {
        "messages": [user("q"), assistant("a")], "source": "", "is_safety": False, "prompt_messages": 0, "train_on": None,
    }  # fmt: skip
    (row,) = sources.read_prompts(tmp_path / "read_prompts.jsonl")
    assert row == {"messages": [user("q")], "reference": None, "is_safety": False, "source": "", "kind": "", "object": ""}
    (row,) = sources.read_comparisons(tmp_path / "read_comparisons.jsonl")
    assert row == {
        "prompt": [user("q")], "chosen": "a", "rejected": "b",
        "rating": None, "margin": None, "is_safety": False, "safety_bin": None, "source": "", "batch": None,
    }  # fmt: skip


def test_a_field_that_is_null_is_missing(tmp_path):
    for reader, row in GOOD.items():
        sources.write_jsonl(tmp_path / "rows.jsonl", [row])
        (expected,) = reader(tmp_path / "rows.jsonl")
        nulls = {**dict.fromkeys([*expected, "prompt", "messages", "conversations", "completion", "other"]), **row}
        sources.write_jsonl(tmp_path / "rows.jsonl", [nulls])
        assert reader(tmp_path / "rows.jsonl") == [expected], reader


def test_the_prompts_of_comparisons_are_read_as_prompts(tmp_path):
    prompt = [user("q"), assistant("a"), user("r")]
    whole = {side: [*prompt, assistant(side)] for side in ("chosen", "rejected")}  # TRL's implicit prompt
    sources.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, "chosen": "a", "rejected": "b"}, {**whole, "source": "s"}])
    rows = sources.read_prompts(tmp_path / "rows.jsonl")
    assert [row["messages"] for row in rows] == [prompt, prompt] and rows[1]["source"] == "s"
    whole["rejected"][0] = user("another")
    sources.write_jsonl(tmp_path / "rows.jsonl", [whole])
    with pytest.raises(ValueError, match="rows.jsonl:1: prompt or messages: missing; the row has chosen, rejected$"):
        sources.read_prompts(tmp_path / "rows.jsonl")


def test_comparisons_take_texts_messages_and_whole_dialogs(tmp_path):
    prompt = [system("s"), user("q")]
    rows = [
        {"prompt": prompt, "chosen": "a", "rejected": "b"},
        {"messages": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": prompt, "chosen": [*prompt, assistant("a")], "rejected": [*prompt, assistant("b")]},
    ]
    sources.write_jsonl(tmp_path / "rows.jsonl", rows)
    first, *others = sources.read_comparisons(tmp_path / "rows.jsonl")
    assert (first["prompt"], first["chosen"], first["rejected"]) == (prompt, "a", "b")
    assert others == [first, first]
