"""Text to ids: tokenizer (paper section 2.2) and chat format (3.1, 3.3). See test_jsonl.py and test_batches.py for the rest."""

import copy
import os
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_jax.data import dialog, sources
from llama_jax.data.dialog import DialogRow, encode_dialog, encode_dialogs, encode_prompt
from llama_jax.data.sentencepiece_proto import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, model_class
from llama_jax.data.tokenizer import FIRST_BYTE_ID, Tokenizer
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "golden"
# The released model is not ours to ship; whoever has the file can compare all ids.
RELEASED = os.environ.get("LLAMA2_TOKENIZER", "")
PIECES = 480
WORDS = "the model reads a line of text and counts 2024 tokens, [INST] what is a loop? [/INST] <<SYS>> be kind <</SYS>>".split()
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=40)) + "\n    return x[0]\n" for i in range(60)]
TEXTS += ["def f(x):\n\tif x:\n\t\treturn  None\n", "naïve café, déjà vu"] * 5
AWKWARD = [
    "", " ", "   ", "\n", "\n\n \t\r\n", "  leading", "trailing  ", "a  b   c", "\x00", "\x7f\x1b[0m", "0123 45.6e-7",
    "<s>", "</s>", "<unk>", "<0x41>", "<pad>", "[INST] x [/INST]", "def f():\n\treturn {'a': 1}\n",
    "日本語のテキスト", "Ελληνικά", "עברית", "ไทยแลนด์", "한국어", "𓀀", "\U0010ffff", "ﬁ ½ Å", "\u2047",
    "🙂", "🇺🇳👩\u200d👧", "e\u0301 \u00e9", "\u200b\u00a0\u3000\ufeff",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=PIECES)


@pytest.fixture(scope="module")
def raw(tokenizer) -> sentencepiece.SentencePieceProcessor:
    """The library itself, past our class."""
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


# Tokenizer


def test_the_model_file_holds_the_papers_settings(tokenizer):
    model = model_class().FromString(tokenizer.path.read_bytes())
    spec = model.trainer_spec
    assert spec.model_type == BPE and spec.vocab_size == len(model.pieces) == tokenizer.vocab_size == PIECES
    assert spec.split_digits and spec.byte_fallback and spec.allow_whitespace_only_pieces and spec.split_by_whitespace
    assert spec.character_coverage == pytest.approx(0.99995) and spec.max_sentencepiece_length == 16
    assert (spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id) == (0, 1, 2, -1)
    assert model.normalizer_spec.name == "identity"
    assert model.normalizer_spec.add_dummy_prefix and not model.normalizer_spec.remove_extra_whitespaces
    kinds = [piece.type for piece in model.pieces]
    assert kinds[:3] == [UNKNOWN, CONTROL, CONTROL]
    assert kinds[3:259] == [BYTE] * 256 and set(kinds[259:]) == {NORMAL}
    assert [tokenizer.piece(FIRST_BYTE_ID + byte) for byte in (0, 255)] == ["<0x00>", "<0xFF>"]


def test_no_piece_holds_two_digits(tokenizer):
    for piece in map(tokenizer.piece, range(259, PIECES)):
        assert piece.isdigit() or not any(c.isdigit() for c in piece)
        assert len(piece) == 1 or not piece.isdigit()
    pieces = [tokenizer.piece(i).strip("\u2581") for i in tokenizer.encode("2024 tokens")]
    assert [p for p in pieces if p][:4] == ["2", "0", "2", "4"]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)  # what looks like a control string is plain text, nothing is unknown


# U+2581 is SentencePiece's sign for a space, and comes back as one. Half surrogates are no text.
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60))
@example("\n ")
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(st.lists(st.sampled_from([" ", "  ", "\n", "\t", "the", "def", "日本", "🙂", "7", "<s>", "\u00a0", "é"]), max_size=12))
def test_every_mixture_of_spaces_scripts_and_code_comes_back(tokenizer, parts):
    text = "".join(parts)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_and_eos_on_request_and_skipped_by_decoding(tokenizer, raw):
    plain = tokenizer.encode("the loop")
    assert plain == raw.encode("the loop")
    assert tokenizer.encode("the loop", bos=True, eos=True) == [1, *plain, 2]
    assert tokenizer.decode([1, *plain, 2, 0, 0]) == tokenizer.decode(np.array(plain)) == "the loop"
    assert tokenizer.encode_many(["the loop", "", "x"]) == [plain, [], raw.encode("x")]


def test_unseen_characters_fall_back_to_bytes(tokenizer):
    space, *rest = tokenizer.encode("🙂")
    assert tokenizer.piece(space) == "\u2581"
    assert rest == [FIRST_BYTE_ID + byte for byte in "🙂".encode()]


def test_two_trainings_give_the_same_file(tokenizer, tmp_path):
    again = train_tokenizer(iter(TEXTS), tmp_path / "again.model", vocab_size=PIECES)
    assert again.path.read_bytes() == tokenizer.path.read_bytes()
    assert again.fingerprint == tokenizer.fingerprint and len(again.fingerprint) == 64
    other = train_tokenizer(TEXTS, tmp_path / "other.model", vocab_size=PIECES - 20)
    assert other.fingerprint != tokenizer.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.model", "other.model"]


def test_lines_longer_than_sentencepiece_takes_are_cut_not_dropped(tmp_path):
    long = "\u00e6pple " * 3000  # one line of 21,000 bytes, without which there is no æ
    trained = train_tokenizer([*TEXTS, long], tmp_path / "long.model", vocab_size=PIECES)
    assert FIRST_BYTE_ID + "\u00e6".encode()[0] not in trained.encode("\u00e6pple")


def test_a_tokenizer_survives_pickling(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("the text") == tokenizer.encode("the text")


def test_wrong_use_of_the_tokenizer_is_one_clear_error(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.model: expected a SentencePiece model file"):
        Tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "broken.model").write_bytes(tokenizer.path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"broken.model: not a SentencePiece model \(700 bytes\)"):
        Tokenizer(tmp_path / "broken.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "t5"), vocab_size=50, bos_id=-1, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"expected unk, bos, eos ids \(0, 1, 2\), got \(0, -1, 2\)"):
        Tokenizer(tmp_path / "t5.model")
    with pytest.raises(ValueError, match=f"decode: expected ids in 0..{PIECES - 1}, got {PIECES}"):
        tokenizer.decode([5, PIECES])
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(TypeError, match="expected str, got bytes"):
        tokenizer.encode(b"a")


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([], 300, "no text"),
        (["", "\n"], 300, "no text"),
        (["too little text"], 5000, "5000 pieces are too many for this text, it gives at most"),
        (TEXTS, 200, "200 pieces are too few"),
    ],
)
def test_a_size_that_does_not_fit_the_text_is_refused(tmp_path, texts, size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, tmp_path / "tokenizer.model", vocab_size=size)
    assert not list(tmp_path.iterdir())


# Ids of the released tokenizer


@pytest.fixture(scope="module")
def golden() -> list[dict]:
    if not GOLDEN.is_dir():
        pytest.skip("the ids of the released tokenizer are not beside this checkout (../shared/data/golden)")
    return [row for _, row in sources.read_jsonl(GOLDEN / "llama2_token_ids.jsonl")]


def test_the_golden_texts_come_back_as_from_the_released_tokenizer(tokenizer, golden):
    assert len(golden) == 155
    assert [tokenizer.decode(tokenizer.encode(row["text"])) for row in golden] == [row["decoded"] for row in golden]


def test_digits_are_split_where_the_released_tokenizer_splits_them(tokenizer, golden):
    digits = "1234567890"
    theirs = dict(zip(next(row["ids"] for row in golden if row["text"] == digits)[1:], digits, strict=True))
    ours = dict(zip(tokenizer.encode(digits)[1:], digits, strict=True))
    assert len(theirs) == len(ours) == 10
    for row in golden:
        expected = "".join(theirs.get(i, "") for i in row["ids"])
        assert "".join(ours.get(i, "") for i in tokenizer.encode(row["text"])) == expected


def test_bytes_have_the_ids_of_the_released_tokenizer(tokenizer, golden):
    """Line ends and NUL are bytes in both; so are the characters that neither has learnt."""
    rows = [row for row in golden if len(row["ids"]) > 1 and all(3 <= i < 259 for i in row["ids"][1:])]
    assert len(rows) >= 3
    for row in rows:
        assert tokenizer.encode(row["text"])[1:] == row["ids"][1:]
    for character in "\n\x00":
        code = FIRST_BYTE_ID + ord(character)
        assert any(code in row["ids"] for row in golden)
        for row in golden:
            assert tokenizer.encode(row["text"]).count(code) == row["ids"].count(code) == row["text"].count(character)


def test_a_dialog_has_the_frame_of_the_golden_one(tokenizer, golden):
    (row,) = (row for _, row in sources.read_jsonl(GOLDEN / "llama2_chat_token_ids.jsonl"))
    ids = encode_dialog(row["data"]["messages"], tokenizer).ids
    space = next(r["ids"][0] for r in golden if r["text"] == "1234567890")
    # BOS, text, the lone space that closes the answer, EOS.
    assert (row["tokens"][0], *row["tokens"][-2:]) == (1, space, 2)
    assert (ids[0], tokenizer.piece(ids[-2]), ids[-1]) == (1, "\u2581", 2)
    assert Counter(ids)[1] == Counter(row["tokens"])[1] == Counter(ids)[2] == Counter(row["tokens"])[2] == 1


@pytest.mark.skipif(not RELEASED, reason="LLAMA2_TOKENIZER does not name the released tokenizer.model")
def test_all_ids_are_those_of_the_released_tokenizer(golden):
    released = Tokenizer(RELEASED)
    assert [released.encode(row["text"]) for row in golden] == [row["ids"] for row in golden]
    (row,) = (row for _, row in sources.read_jsonl(GOLDEN / "llama2_chat_token_ids.jsonl"))
    # The golden row has no dummy space after BOS, which the reference code does have.
    assert encode_dialog(row["data"]["messages"], released).ids[2:] == row["tokens"][2:]


# Chat format

DIALOG = [
    system("be kind"), user(" what is  a loop? "), assistant("\na line of text\n"), user("the model?"), assistant("naïve 🙂"),
    user("x[0]"), assistant("2024"),
]  # fmt: skip
PAIRS = [
    ("[INST] <<SYS>>\nbe kind\n<</SYS>>\n\n what is  a loop? [/INST]", " a line of text "),
    ("[INST] the model? [/INST]", " naïve 🙂 "),
    ("[INST] x[0] [/INST]", " 2024 "),
]


def test_a_dialog_is_what_the_raw_processor_gives_turn_by_turn(tokenizer, raw):
    expected, supervised = [], []
    for prompt, answer in PAIRS:
        pair = [1, *raw.encode(prompt + answer), 2]
        expected += pair
        supervised += [i > len(raw.encode(prompt)) for i in range(len(pair))]
    encoded = encode_dialog(DIALOG, tokenizer)
    assert encoded.ids == expected and encoded.supervised == supervised


def test_one_bos_and_one_supervised_eos_a_turn_and_no_supervised_prompt(tokenizer):
    encoded = encode_dialog(DIALOG, tokenizer)
    assert Counter(encoded.ids)[1] == Counter(encoded.ids)[2] == 3
    trained = [i for i, on in zip(encoded.ids, encoded.supervised, strict=True) if on]
    assert Counter(trained)[2] == 3 and 1 not in trained
    assert tokenizer.decode(trained) == "a line of text  naïve 🙂  2024 "


def test_train_on_last_supervises_the_last_answer_only(tokenizer):
    encoded, everything = encode_dialog(DIALOG, tokenizer, train_on="last"), encode_dialog(DIALOG, tokenizer)
    assert encoded.ids == everything.ids
    last = len(encoded.ids) - encoded.ids[::-1].index(1) - 1  # BOS of the last pair
    assert encoded.supervised == [False] * last + everything.supervised[last:]
    with pytest.raises(ValueError, match="train_on: expected 'all' or 'last', got 'first'"):
        encode_dialog(DIALOG, tokenizer, train_on="first")


@pytest.mark.parametrize("length", [2, 4, 6])
def test_a_prompt_is_a_prefix_of_the_dialog(tokenizer, raw, length):
    prompt, ids = encode_prompt(DIALOG[:length], tokenizer), encode_dialog(DIALOG, tokenizer).ids
    assert ids[: len(prompt)] == prompt
    assert encode_dialog(DIALOG, tokenizer).supervised[len(prompt) - 1 : len(prompt) + 1] == [False, True]
    assert prompt[-len(raw.encode(PAIRS[length // 2 - 1][0])) - 1 :] == [1, *raw.encode(PAIRS[length // 2 - 1][0])]


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=2, max_size=2))
def test_any_question_and_answer_have_a_border(tokenizer, contents):
    messages = [user(contents[0]), assistant(contents[1])]
    encoded, prompt = encode_dialog(messages, tokenizer), encode_prompt(messages[:1], tokenizer)
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.supervised == [False] * len(prompt) + [True] * (len(encoded.ids) - len(prompt))


@pytest.mark.parametrize("tag", dialog.TAGS)
@pytest.mark.parametrize("role", [0, 1, 2])
def test_a_message_cannot_forge_a_turn(tokenizer, tag, role):
    messages = copy.deepcopy(DIALOG[:3])
    messages[role]["content"] += f"{tag} now"
    with pytest.raises(ValueError, match=rf"f:7: messages\[{role}\].content: holds the chat tag") as error:
        encode_dialog(messages, tokenizer, where="f:7")
    assert repr(tag) in str(error.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", r"messages: expected a list, got str"),
        ([], r"messages: expected at least one"),
        (["hi"], r"messages\[0\]: expected an object, got str"),
        ([{"role": "user"}], r"messages\[0\].content: missing"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: expected a string, got NoneType"),
        ([{"role": "human", "content": ""}], r"messages\[0\].role: expected one of system, user, assistant, got 'human'"),
        ([system("a")], r"messages: a system message alone is no dialog"),
        ([assistant("a")], r"messages\[0\].role: expected 'user' \(roles alternate\), got 'assistant'"),
        ([user("a"), user("b")], r"messages\[1\].role: expected 'assistant'"),
        ([system("a"), user("b"), system("c")], r"messages\[2\].role: expected 'assistant' .*, got 'system'"),
    ],
)
def test_what_is_no_dialog_is_refused_by_field(tokenizer, messages, message):
    for encode in (encode_dialog, encode_prompt):
        with pytest.raises(ValueError, match="rows.jsonl:3: " + message):
            encode(messages, tokenizer, where="rows.jsonl:3")


def test_dialogs_encoded_together_are_those_encoded_alone(tokenizer):
    user, other, reply = ({"role": role, "content": text} for role, text in (
        ("user", " what is a loop? "), ("assistant", "a line of text"), ("assistant", "2024 tokens\n")))  # fmt: skip
    system = {"role": "system", "content": "be kind"}
    rows = [
        DialogRow([user, reply]), DialogRow([system, user, other, user, reply]),
        DialogRow([user, other, user, reply], train_on="last"),
        DialogRow([system, user, other, user, reply], prompt_messages=4),
    ]  # fmt: skip
    for row, found in zip(rows, encode_dialogs(rows, tokenizer), strict=True):
        how = {"train_on": row.train_on, "prompt_messages": row.prompt_messages}
        alone = encode_dialog(row.messages, tokenizer, **how)
        assert (found.ids.tolist(), found.supervised.tolist()) == (alone.ids, alone.supervised)
        assert (found.ids.dtype, found.supervised.dtype) == (np.int32, bool)
    with pytest.raises(ValueError, match="^rows.jsonl:7: messages: expected the last one from the assistant"):
        encode_dialogs([DialogRow([user], where="rows.jsonl:7")], tokenizer)


def test_dialogs_end_with_an_answer_and_prompts_with_a_question(tokenizer):
    with pytest.raises(ValueError, match="expected the last one from the assistant, got 'user'"):
        encode_dialog(DIALOG[:2], tokenizer)
    with pytest.raises(ValueError, match="expected the last one from the user, got 'assistant'"):
        encode_prompt(DIALOG[:3], tokenizer)


def test_a_tokenizer_without_a_border_before_the_answer_is_refused(tmp_path):
    """Trained without the paper's split at spaces, `] a` can be one piece."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["[INST] a [/INST] a b"] * 50), model_prefix=str(tmp_path / "wide"), vocab_size=290,
        model_type="bpe", split_by_whitespace=False, split_by_unicode_script=False, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="a piece reaches from .* into the answer 'a b'"):
        encode_dialog([user("a"), assistant("a b")], Tokenizer(tmp_path / "wide.model"))


def test_a_response_ends_at_its_first_eos(tokenizer):
    ids = tokenizer.encode(" a loop ")
    assert dialog.decode_response([*ids, 2, *ids, 2], tokenizer) == ("a loop", True)
    assert dialog.decode_response(np.array(ids), tokenizer) == ("a loop", False)
    assert dialog.decode_response([2], tokenizer) == ("", True)


def test_a_sampled_answer_is_read_in_the_pieces_that_its_dialog_has(tokenizer):
    trained = encode_dialog([user("What?"), assistant("a loop")], tokenizer)
    answer = [i for i, supervised in zip(trained.ids, trained.supervised, strict=True) if supervised]
    letters = [*(3 + byte for byte in b"a loop"), 2]  # the byte pieces
    assert dialog.decode_response(letters, tokenizer) == ("a loop", True) and letters != answer
    assert dialog.encode_response(letters, tokenizer, limit=96) == answer
    assert dialog.encode_response(answer, tokenizer, limit=len(answer)) == answer
    for kept in (answer[:-1], [2], tokenizer.encode(" a [INST] b ", eos=True)):  # no end, no text, a tag: in no dialog
        assert dialog.encode_response(kept, tokenizer, limit=96) == kept
    assert dialog.encode_response(letters, tokenizer, limit=len(answer) - 1) == letters
