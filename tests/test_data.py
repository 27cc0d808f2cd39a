"""Text to ids and back, the chat format, JSONL sources: what enters training is exactly what the paper describes."""

import gzip
import hashlib
import json
import pickle
import pydoc_data.topics
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.dialog import TAGS, check_messages, decode_response, encode_dialog, encode_prompt
from llama_jax.data.sources import read_comparisons, read_dialogs, read_jsonl, read_prompts, write_jsonl
from llama_jax.data.tokenizer import BOS_ID, EOS_ID, FIRST_BYTE_ID, Tokenizer, train_tokenizer

GOLDEN = Path(__file__).parents[1].parent / "shared" / "data" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden ids of ../shared/data are not on this machine")

TEXTS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)][:40]
# Whatever UTF-8 can write, but not the sign that stands for a space inside SentencePiece.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=1024)


def golden(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines() if line]


class TestTokenizer:
    def test_special_and_byte_ids_are_those_of_llama(self, tokenizer):
        assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 1024)
        assert [tokenizer.piece(FIRST_BYTE_ID + byte) for byte in (0, 10, 255)] == ["<0x00>", "<0x0A>", "<0xFF>"]
        assert tokenizer.encode("x", bos=True, eos=True) == [1, *tokenizer.encode("x"), 2]

    @settings(max_examples=200, deadline=None)
    @given(text=ANY_TEXT)
    def test_every_text_comes_back(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text

    @pytest.mark.parametrize("text", ["", " ", "   a\tb\n\n\nc  d ", "\r\n\t", "👩‍💻 café 中文", "a\0b", "f():\n        a\n"])
    def test_white_space_and_rare_characters_come_back(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_the_space_sign_comes_back_as_a_space(self, tokenizer):
        assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"

    def test_every_digit_is_a_token(self, tokenizer):
        assert not [i for i in range(1024) if re.search(r"\d.*\d", tokenizer.piece(i)) and i >= FIRST_BYTE_ID + 256]
        assert len(tokenizer.encode("2048")) == 1 + 4  # the dummy space stands alone

    @pytest.mark.parametrize("control", ["<s>", "</s>", "<unk>", "<0x0A>"])
    def test_control_strings_are_text(self, tokenizer, control):
        ids = tokenizer.encode(control)
        assert min(ids) >= FIRST_BYTE_ID and 13 not in ids and tokenizer.decode(ids) == control

    def test_decode_skips_controls_and_padding(self, tokenizer):
        assert tokenizer.decode([1, *tokenizer.encode("one two"), 2, 0, 0]) == "one two"
        with pytest.raises(ValueError, match=r"expected ids in 0\.\.1023, got 1024"):
            tokenizer.decode([1024])

    def test_many_texts_at_once_are_single_texts(self, tokenizer):
        assert tokenizer.encode_many(TEXTS[:5], threads=2) == [tokenizer.encode(text) for text in TEXTS[:5]]

    def test_training_is_deterministic_and_leaves_one_file(self, tokenizer, tmp_path):
        for name in ("a", "b"):
            train_tokenizer(iter(TEXTS), tmp_path / name, vocab_size=1024, max_lines=500, seed=3)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
        again = train_tokenizer(TEXTS, tmp_path / "c", vocab_size=1024)
        assert again.fingerprint == tokenizer.fingerprint == hashlib.sha256((tmp_path / "c").read_bytes()).hexdigest()

    def test_pickle_carries_the_path(self, tokenizer):
        assert pickle.loads(pickle.dumps(tokenizer)).encode("a b") == tokenizer.encode("a b")

    @pytest.mark.parametrize(
        ("texts", "vocab_size", "message"),
        [
            (["hello world"], 4000, r"4000 pieces are too many for this text, it gives at most \d+$"),
            (["hello world"], 100, r"100 pieces are too few, .* need \d+$"),
            ([], 1000, "no text"),
            (["", "\n"], 1000, "no text"),
            (["a\ud800"], 1000, "lone surrogate at character 1"),
        ],
    )
    def test_training_errors_are_one_clear_line_and_write_nothing(self, tmp_path, texts, vocab_size, message):
        with pytest.raises(ValueError, match=message) as error:
            train_tokenizer(texts, tmp_path / "m.model", vocab_size=vocab_size)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())

    def test_missing_and_damaged_files_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none.model: expected a SentencePiece model"):
            Tokenizer(tmp_path / "none.model")
        (tmp_path / "bad.model").write_bytes(b"no model at all")
        with pytest.raises(ValueError, match="bad.model: not a SentencePiece model"):
            Tokenizer(tmp_path / "bad.model")

    @needs_golden
    def test_golden_texts_keep_the_facts_that_no_vocabulary_changes(self, tokenizer):
        """Decoded text and newline bytes, as the released tokenizer gives them; its other ids need its own pieces."""
        for row in golden("llama2_token_ids.jsonl"):
            ids = tokenizer.encode(row["text"])
            assert tokenizer.decode(ids) == row["decoded"]
            assert ids.count(13) == row["ids"].count(13) == row["text"].count("\n")


SYSTEM = {"role": "system", "content": " Be brief. "}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


class TestDialog:
    def test_each_pair_is_one_string_between_bos_and_eos(self, tokenizer):
        dialog = encode_dialog([SYSTEM, user(" Hi. "), assistant("\nHello. "), user("Who?"), assistant("Me.")], tokenizer)
        first = "[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hi. [/INST] Hello. "  # stripped after the merge only
        second = "[INST] Who? [/INST] Me. "
        assert dialog.ids == [1, *tokenizer.encode(first), 2, 1, *tokenizer.encode(second), 2]

    @pytest.mark.parametrize(("train_on", "trained"), [("all", ["One. ", "Two. "]), ("last", ["Two. "])])
    def test_answers_and_their_eos_are_supervised_and_nothing_else(self, tokenizer, train_on, trained):
        messages = [user("a"), assistant("One."), user("b"), assistant("Two.")]
        dialog = encode_dialog(messages, tokenizer, train_on=train_on)
        kept = [i for i, supervised in zip(dialog.ids, dialog.supervised, strict=True) if supervised]
        assert kept.count(EOS_ID) == len(trained) and BOS_ID not in kept
        answers, rest = [], kept
        while rest:
            end = rest.index(EOS_ID)
            answers, rest = [*answers, tokenizer.decode(rest[:end])], rest[end + 1 :]
        assert answers == trained

    @settings(max_examples=100, deadline=None)
    @given(texts=st.lists(ANY_TEXT.filter(lambda text: not any(tag in text for tag in TAGS)), min_size=4, max_size=4))
    def test_a_prompt_begins_its_dialog_and_the_answer_the_rest(self, tokenizer, texts):
        messages = [user(texts[0]), assistant(texts[1]), user(texts[2])]
        prompt = encode_prompt(messages, tokenizer)
        dialog = encode_dialog([*messages, assistant(texts[3])], tokenizer, train_on="last")
        assert dialog.ids[: len(prompt)] == prompt
        assert dialog.supervised == [False] * len(prompt) + [True] * (len(dialog.ids) - len(prompt))
        assert (prompt.count(BOS_ID), prompt.count(EOS_ID), dialog.ids.count(EOS_ID)) == (2, 1, 2)
        assert decode_response(dialog.ids[len(prompt) :], tokenizer) == (texts[3].strip(), True)

    def test_the_open_turn_has_no_eos_and_no_closing_space(self, tokenizer):
        assert encode_prompt([user("Hi")], tokenizer) == tokenizer.encode("[INST] Hi [/INST]", bos=True)

    def test_response_without_eos_has_not_ended(self, tokenizer):
        ids = tokenizer.encode(" an answer")
        assert decode_response(ids, tokenizer) == ("an answer", False)
        assert decode_response([*ids, 2, *ids], tokenizer) == ("an answer", True)
        assert decode_response([], tokenizer) == ("", False)

    @pytest.mark.parametrize("tag", TAGS)
    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_tags_in_any_message_are_refused(self, tokenizer, tag, position):
        messages = [dict(SYSTEM), user("u"), assistant("a")]
        messages[position]["content"] += f"x{tag}y"
        with pytest.raises(ValueError, match=rf"rows:7: messages\[{position}\].content: holds the chat tag"):
            encode_dialog(messages, tokenizer, where="rows:7")

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ("hi", "messages: expected a list, got str"),
            ([], "messages: expected at least one"),
            ([SYSTEM], "messages: a system message alone"),
            ([assistant("a")], r"messages\[0\].role: expected 'user'"),
            ([user("a"), user("b")], r"messages\[1\].role: expected 'assistant' .* got 'user'"),
            ([user("a"), SYSTEM], r"messages\[1\].role: expected 'assistant' .* got 'system'"),
            ([SYSTEM, assistant("a")], r"messages\[1\].role: expected 'user'"),
            ([{"role": "bot", "content": "a"}], r"messages\[0\].role: expected one of system, user, assistant, got 'bot'"),
            ([{"role": "user"}], r"messages\[0\].content: missing"),
            ([{"role": "user", "content": 3}], r"messages\[0\].content: expected a string, got int"),
            (["hi"], r"messages\[0\]: expected an object, got str"),
        ],
    )
    def test_what_is_no_dialog_is_refused_with_its_place(self, messages, message):
        with pytest.raises(ValueError, match=rf"^f.jsonl:3: {message}"):
            check_messages(messages, "f.jsonl:3")

    def test_ends_are_checked(self, tokenizer):
        with pytest.raises(ValueError, match="expected the last one from the assistant"):
            encode_dialog([user("a")], tokenizer)
        with pytest.raises(ValueError, match="expected the last one from the user"):
            encode_prompt([user("a"), assistant("b")], tokenizer)
        with pytest.raises(ValueError, match="train_on: expected 'all' or 'last', got 'some'"):
            encode_dialog([user("a"), assistant("b")], tokenizer, train_on="some")

    def test_a_tokenizer_that_merges_over_the_border_is_refused(self):
        class Pairs:  # two characters a token, whatever they are
            path = "pairs.model"

            def encode(self, text, *, bos=False, eos=False):
                return [text[i : i + 2] for i in range(0, len(text), 2)]

        with pytest.raises(ValueError, match=r"pairs.model: a piece reaches from '\[/INST\]' into the answer 'yes'"):
            encode_dialog([user("four"), assistant("yes")], Pairs())

    @needs_golden
    def test_golden_dialog_has_the_same_frame(self, tokenizer):
        """One BOS, one EOS, and the closing space as a token of its own before EOS (29871 in the released vocabulary)."""
        (row,) = golden("llama2_chat_token_ids.jsonl")
        ids = encode_dialog(row["data"]["messages"], tokenizer).ids
        for frame in (ids, row["tokens"]):
            assert (frame[0], frame[-1], frame.count(1), frame.count(2)) == (1, 2, 1, 1)
        assert (tokenizer.piece(ids[-2]), row["tokens"][-2]) == ("\u2581", 29871)


DIALOG = {"messages": [user("u"), assistant("a")], "source": "x", "is_safety": False}
PROMPT = {"messages": [user("u")], "reference": None, "is_safety": True, "source": "x", "kind": "k", "object": "o"}
COMPARISON = {"prompt": "u", "chosen": "a", "rejected": "b", "rating": "slightly", "safety_bin": "both_safe"}


class TestSources:
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
    def test_what_is_written_is_read(self, tmp_path, name):
        rows = [{"text": "é\n\u2028"}, {"n": 1}]
        assert write_jsonl(tmp_path / name, rows) == 2
        assert list(read_jsonl(tmp_path / name)) == [(f"{tmp_path / name}:{i}", row) for i, row in enumerate(rows, 1)]

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        def rows():
            yield {"a": 1}
            raise KeyError

        write_jsonl(tmp_path / "rows.jsonl", [{"old": 1}])
        with pytest.raises(KeyError):
            write_jsonl(tmp_path / "rows.jsonl", rows())
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
        assert (tmp_path / "rows.jsonl").read_text() == '{"old": 1}\n'

    def test_gzip_bytes_depend_on_the_rows_alone(self, tmp_path):
        for name in ("a.jsonl.gz", "b.jsonl.gz"):
            write_jsonl(tmp_path / name, [DIALOG])
        assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()

    def test_good_rows_come_with_every_field(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        write_jsonl(path, [{**DIALOG, "extra": 1}, {"messages": DIALOG["messages"]}])
        assert read_dialogs(path) == [{**DIALOG, "extra": 1}, {**DIALOG, "source": ""}]
        write_jsonl(path, [PROMPT, {"messages": [user("u")]}])
        assert read_prompts(path)[0] == PROMPT and read_prompts(path)[1]["reference"] is None
        write_jsonl(path, [{"prompt": "u", "chosen": "a", "rejected": "b"}])
        (row,) = read_comparisons(path)
        assert row["prompt"] == [user("u")] and (row["rating"], row["safety_bin"], row["is_safety"]) == (None, None, False)

    @pytest.mark.parametrize("chosen", ["a", [assistant("a")], [user("u"), assistant("a")]])
    @pytest.mark.parametrize("prompt", [{"prompt": "u"}, {"prompt": [user("u")]}, {"messages": [user("u")]}])
    def test_the_spellings_of_a_comparison_are_one(self, tmp_path, chosen, prompt):
        write_jsonl(tmp_path / "rows.jsonl", [{**prompt, "chosen": chosen, "rejected": "b"}])
        (row,) = read_comparisons(tmp_path / "rows.jsonl")
        assert (row["prompt"], row["chosen"], row["rejected"]) == ([user("u")], "a", "b") and "messages" not in row

    @pytest.mark.parametrize(
        ("read", "row", "message"),
        [
            (read_dialogs, {"source": "x"}, "messages: missing"),
            (read_dialogs, [1], "expected a JSON object, got list"),
            (read_dialogs, {**DIALOG, "is_safety": "no"}, "is_safety: expected bool, got str"),
            (read_dialogs, {**DIALOG, "is_saftey": True}, "is_saftey: unknown field, did you mean 'is_safety'"),
            (read_dialogs, {"messages": [user("u")]}, r"messages\[0\].role: expected 'assistant' at the end"),
            (read_dialogs, {"messages": [user("u"), assistant("  ")]}, r"messages\[1\].content: the answer is empty"),
            (read_dialogs, {"messages": [user("u"), user("u")]}, r"messages\[1\].role: expected 'assistant'"),
            (read_prompts, DIALOG, r"messages\[1\].role: expected 'user' at the end"),
            (read_prompts, {**PROMPT, "reference": 3}, "reference: expected str, got int"),
            (read_comparisons, {**COMPARISON, "rating": "much"}, "rating: expected one of significantly, .* got 'much'"),
            (read_comparisons, {**COMPARISON, "safety_bin": "x"}, "safety_bin: expected one of chosen_safe, .* got 'x'"),
            (read_comparisons, {"prompt": "u", "chosen": "a"}, "rejected: missing"),
            (read_comparisons, {**COMPARISON, "chosen": 1}, "chosen: expected a string or a list"),
            (read_comparisons, {**COMPARISON, "rejected": "a "}, "chosen: the same text as rejected"),
            (read_comparisons, {**COMPARISON, "prompt": [assistant("a")]}, r"prompt: messages\[0\].role: expected 'user'"),
            (read_comparisons, {**COMPARISON, "messages": [user("u")]}, "messages: .* got both"),
            (read_comparisons, {**COMPARISON, "chosen": [user("v"), assistant("a")]}, "chosen: expected one message"),
        ],
    )
    def test_errors_name_file_line_and_field(self, tmp_path, read, row, message):
        good = {read_dialogs: DIALOG, read_prompts: PROMPT, read_comparisons: COMPARISON}[read]
        path = tmp_path / "rows.jsonl"
        path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:2: {message}"):
            read(path)

    @pytest.mark.parametrize(
        ("data", "message"), [(b'{"a": 1}\n{"a": \n', "2: malformed JSON, column"), (b'{"a": 1}\n\xff\n', "2: not UTF-8")]
    )
    def test_malformed_lines_are_named(self, tmp_path, data, message):
        (tmp_path / "rows.jsonl").write_bytes(data)
        with pytest.raises(ValueError, match=rf"rows.jsonl:{message}"):
            list(read_jsonl(tmp_path / "rows.jsonl"))

    def test_empty_missing_and_damaged_files_are_named(self, tmp_path):
        (tmp_path / "rows.jsonl").touch()
        with pytest.raises(ValueError, match="rows.jsonl: no dialogs: the file is empty"):
            read_dialogs(tmp_path / "rows.jsonl")
        with pytest.raises(FileNotFoundError, match="none.jsonl: expected a JSONL file, found nothing"):
            read_prompts(tmp_path / "none.jsonl")
        whole = gzip.compress(b'{"a": 1}\n' * 5000)
        for damaged in (b"no gzip", whole[: len(whole) // 2]):
            (tmp_path / "rows.jsonl.gz").write_bytes(damaged)
            with pytest.raises(ValueError, match=r"rows.jsonl.gz:\d+: damaged gzip file"):
                list(read_jsonl(tmp_path / "rows.jsonl.gz"))
