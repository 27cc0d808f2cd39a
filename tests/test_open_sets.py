"""The open preference sets: each published layout by hand, what is left out and why, and the shared samples."""

from pathlib import Path

import pytest

from llama_jax.data.sources import read_comparisons, write_jsonl
from llama_jax.reward.open_sets import LAYOUTS, read_open_set

SHARED = Path(__file__).parents[2] / "shared" / "data" / "preference"
needs_samples = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/preference")


def read(tmp_path, layout, *rows):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = read_open_set(tmp_path / "rows.jsonl", layout)
    return list(found), dict(found.left_out)


def triple(row):
    return [message["content"] for message in row["prompt"]], row["chosen"], row["rejected"]


def test_anthropic_dialogs(tmp_path):
    head = "\n\nHuman: hi\n\nAssistant: hello: what?\n\nHuman: more"
    rows, left_out = read(
        tmp_path, "anthropic_harmless",
        {"chosen": f"{head}\n\nAssistant: yes\n\nreally", "rejected": f"{head}\n\nAssistant: no"},
        {"chosen": f"{head}\n\nAssistant: yes", "rejected": "\n\nHuman: other\n\nAssistant: no"},
        {"chosen": f"{head}\n\nAssistant: yes", "rejected": f"{head}\n\nAssistant: yes "},
        {"chosen": f"{head}\n\nAssistant: yes", "rejected": f"{head}\n\nAssistant:"},
        {"chosen": f"{head}\n\nHuman: x\n\nAssistant: a", "rejected": f"{head}\n\nHuman: x\n\nAssistant: b"},
        {"chosen": f"{head}\n\nAssistant: [INST]", "rejected": f"{head}\n\nAssistant: no"},
        {"chosen": head, "rejected": head},
    )  # fmt: skip
    (row,) = rows
    assert triple(row) == (["hi", "hello: what?", "more"], "yes\n\nreally", "no")
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert (row["source"], row["is_safety"], row["rating"]) == ("anthropic_harmless", True, None)
    assert left_out == {
        "the dialogs differ before the last answer": 1, "chosen and rejected are the same": 1, "an empty turn": 1,
        "turns do not alternate": 1, "a chat tag in the text": 1, "the dialog does not end with an answer": 1,
    }  # fmt: skip


def test_openai_summaries(tmp_path):
    post = {"id": "t3_x", "post": "I ran. ", "title": "Running", "subreddit": "fitness"}
    summaries = [{"text": " short", "policy": "ref"}, {"text": "shorter", "policy": "sup1"}]
    row = {"info": post, "summaries": summaries, "choice": 1, "worker": "w", "batch": "batch3", "extra": {"confidence": 4}}
    news = {**row, "info": {"id": "c", "article": "News."}, "choice": 0}
    rows, left_out = read(tmp_path, "openai_summarize", row, news)
    assert triple(rows[0]) == (["SUBREDDIT: r/fitness\n\nTITLE: Running\n\nPOST: I ran.\n\nTL;DR:"], "shorter", "short")
    assert triple(rows[1]) == (["ARTICLE: News.\n\nTL;DR:"], "short", "shorter")
    assert rows[0]["batch"] == "batch3" and not left_out


def test_webgpt_leaves_ties_out(tmp_path):
    row = {"question": {"full_text": "Why?", "id": "1"}, "answer_0": "a [1]", "answer_1": "b", "score_0": -0.5, "score_1": 0.5}
    rows, left_out = read(tmp_path, "openai_webgpt", row, {**row, "score_0": 0, "score_1": 0})
    assert [triple(row) for row in rows] == [(["Why?"], "b", "a [1]")] and left_out == {"a tie": 1}


def test_stackexchange_paired_and_as_published(tmp_path):
    answers = [{"text": "<p>worst</p>", "pm_score": 0}, {"text": "<pre>a &lt; b</pre><br>end", "pm_score": 5},
               {"text": "x", "pm_score": 2}]  # fmt: skip
    rows, left_out = read(
        tmp_path, "stackexchange",
        {"question": "Q", "response_j": "good", "response_k": "bad"},
        {"question": "<p>Is <b>a</b> smaller?</p>", "answers": answers},
        {"question": "Q", "answers": answers[:1]},
        {"question": "Q", "answers": [answers[0], {**answers[0], "text": "other"}]},
    )  # fmt: skip
    assert triple(rows[0]) == (["Q"], "good", "bad")
    assert triple(rows[1]) == (["Is a smaller?"], "a < b\n\nend", "worst")
    assert left_out == {"fewer than two answers": 1, "a tie": 1}


def test_shp_and_gptj(tmp_path):
    row = {"history": "post", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 2}
    rows, _ = read(tmp_path, "stanford_shp", row, {**row, "labels": 0})
    assert [triple(row) for row in rows] == [(["post"], "a", "b"), (["post"], "b", "a")]
    rows, left_out = read(tmp_path, "synthetic_gptj", {"prompt": "p", "chosen": "a", "rejected": "b"},
                          {"prompt": "p", "chosen": " ", "rejected": "b"})  # fmt: skip
    assert [triple(row) for row in rows] == [(["p"], "a", "b")] and left_out == {"an empty turn": 1}


@pytest.mark.parametrize(("layout", "row", "message"), [
    ("anthropic_helpful", {"chosen": "x", "rejected": "y"}, r"chosen: expected turns that begin with '\\n\\nHuman:', got 'x'"),
    ("anthropic_helpful", {"chosen": 3, "rejected": "y"}, "chosen: expected str, got int"),
    ("openai_summarize", {"info": {}, "summaries": []}, "choice: missing; found info, summaries"),
    ("openai_summarize", {"info": {}, "summaries": [{}], "choice": 0}, "choice: expected 0 or 1 of two summaries, got 0 of 1"),
    ("openai_summarize", {"info": {"post": 5}, "summaries": [{"text": "a"}] * 2, "choice": 0}, "info: post: expected str"),
    ("openai_summarize", {"info": {}, "summaries": ["a", "b"], "choice": 0}, r"summaries\[0\]: expected an object, got str"),
    ("stackexchange", {"question": "Q", "answers": [1, 2]}, r"answers\[0\]: expected an object, got int"),
    ("openai_webgpt", {"question": "Why?"}, "question: expected Mapping, got str"),
    ("stackexchange", {"question": "Q", "answers": [{"text": "a"}, {"text": "b"}]}, r"answers\[0\]: pm_score: missing"),
    ("stanford_shp", {"labels": 2}, r"labels: expected 1 \(A is preferred\) or 0, got 2"),
    ("synthetic_gptj", {"prompt": "p"}, "chosen: missing; found prompt"),
])  # fmt: skip
def test_another_layout_is_refused_by_row_and_field(tmp_path, layout, row, message):
    with pytest.raises(ValueError, match=f"^{tmp_path / 'rows.jsonl'}:1: {message}"):
        read(tmp_path, layout, row)


def test_rows_of_another_layout_may_be_left_out(tmp_path):
    row = {"history": "post", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "labels": 2}, row, {"history": "post"}, {**row, "labels": 3}])
    found = read_open_set(tmp_path / "rows.jsonl", "stanford_shp", leave_out=True)
    assert [triple(row) for row in found] == [(["post"], "a", "b")] and found.rows == 4
    assert found.left_out == {"labels: expected 1 (A is preferred) or 0": 2, "labels: missing": 1}
    assert list(found.first.values()) == [f"{tmp_path / 'rows.jsonl'}:{line}" for line in (1, 3)]


def test_wrong_types_may_be_left_out_too(tmp_path):
    good = {"question": "Q", "response_j": "good", "response_k": "bad"}
    write_jsonl(tmp_path / "rows.jsonl", [good, {"question": "Q", "answers": [1, 2]}])
    found = read_open_set(tmp_path / "rows.jsonl", "stackexchange", leave_out=True)
    assert len(list(found)) == 1 and found.left_out == {"answers[]: expected an object": 1}


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"layout 'shp' is unknown; expected one of {', '.join(LAYOUTS)}"):
        read_open_set(tmp_path, "shp")


# Layout and number of rows (`zcat ... | wc -l`).
SAMPLES = {
    "hh_helpful_base_test.jsonl.gz": ("anthropic_helpful", 1854),
    "hh_helpful_online_test.jsonl.gz": ("anthropic_helpful", 887),
    "hh_helpful_rejection_sampled_test.jsonl.gz": ("anthropic_helpful", 2249),
    "hh_harmless_base_test.jsonl.gz": ("anthropic_harmless", 1812),
    "stackexchange_paired_tiny.jsonl": ("stackexchange", 25),
}


@needs_samples
@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_are_read_and_read_back(tmp_path, name):
    layout, rows = SAMPLES[name]
    found = read_open_set(SHARED / name, layout)
    kept = list(found)
    assert found.rows == rows == len(kept) + sum(found.left_out.values())
    assert len(kept) > 0.97 * rows, found.left_out
    write_jsonl(tmp_path / "ours.jsonl.gz", kept)
    assert read_comparisons(tmp_path / "ours.jsonl.gz") == kept
