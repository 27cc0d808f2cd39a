"""Ghost Attention: checks by hand, where the instruction stands, what is trained, recall over turns, and the attention map."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ConfigError
from llama_jax.data.chat_template import encode_example
from llama_jax.data.dialog import EncodedDialog
from llama_jax.data.sources import read_dialogs, write_jsonl
from llama_jax.evals.ghost import (
    attention_by_turn,
    attention_map,
    bin_maxima,
    follow,
    instruction_span,
    recall_rows,
    recall_table,
    turn_begins,
)
from llama_jax.model import params
from llama_jax.model.attention_map import attention_weights, largest_attention
from llama_jax.model.config import FLOAT32
from llama_jax.parallel.axes import shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.rlhf import ghost
from llama_jax.rlhf.constraints import (
    FAMILIES,
    Constraint,
    begins_with,
    draw_constraints,
    ends_with,
    in_capitals,
    in_one_sentence,
    instruction,
    mentions,
    obeyed,
    parse_list,
)
from llama_jax.rlhf.ghost import (
    Context,
    GhostSettings,
    answer_contexts,
    ask_for_values,
    in_every_turn,
    in_first_turn,
    make_contexts,
    read_values,
    training_rows,
)
from llama_jax.training.stage import LoopConfig

SETTINGS = GhostSettings(
    contexts=("dialogs.jsonl",), join=True, turns=(2, 4), samples=40, families=("opening", "hobby", "capitals"), values="",
    most_constraints=2, terse_share=0.5, probe_share=0.5, place="user", resample=False, keep="all", new_tokens=8,
    temperature=1.0, sampling_batch=4,
)  # fmt: skip
VALUES = {"opening": ["red", "blue"], "hobby": ["chess"], "capitals": []}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def dialog(name, turns):
    return [m for t in range(turns) for m in (user(f"{name} q{t}"), assistant(f"{name} a{t}"))]


@pytest.mark.parametrize(("check", "answer", "value", "expected"), [
    (begins_with, "Red: the list.", "red", True),
    (begins_with, "  \"Red\", he said", "red", True),
    (begins_with, "Reduced.", "red", False),
    (begins_with, "Marie Curie here", "marie curie", True),
    (begins_with, "Marie", "marie curie", False),
    (begins_with, "", "red", False),
    (ends_with, "It is a list. RED!", "red", True),
    (ends_with, "It is a red list.", "red", False),
    (ends_with, "bored", "red", False),
    (mentions, "I like to play chess.", "chess", True),
    (mentions, "I am playing table tennis now", "table tennis", True),
    (mentions, "A table for tennis", "table tennis", False),
    (mentions, "chessboard", "chess", False),
    (in_capitals, "YES, 3 OF THEM!", "", True),
    (in_capitals, "YES, 3 of them", "", False),
    (in_capitals, "123.", "", False),
    (in_one_sentence, "It returns `a.b` at 3.5 percent.", "", True),
    (in_one_sentence, "It returns a list. It is new.", "", False),
    (in_one_sentence, "Use it, e.g. for lists.", "", True),
    (in_one_sentence, "One line\nand another", "", False),
    (in_one_sentence, "Mr. Smith wrote it.", "", True),
    (in_one_sentence, "Dr. Who is a series from the U.K. Government.", "", True),
    (in_one_sentence, "J. R. R. Tolkien and George W. Bush (e.g. Jr. Sr. Prof. X) met at No. 10 on Jan. 5.", "", True),
    (in_one_sentence, "MR. SMITH WROTE IT.", "", True),
    (in_one_sentence, "It is sold by Acme Inc. Boston, Smith Ltd. London, etc. Paris.", "", True),
    (in_one_sentence, "Mr. Smith wrote it. Dr. Who read it.", "", False),
    (in_one_sentence, "It is A. Then B.", "", False),
    (in_one_sentence, "It was made in the U.S. It is new.", "", False),
    (in_one_sentence, "It sorts lists, sets, etc. The order is kept.", "", False),
    (in_one_sentence, "No. Lists are sorted.", "", False),
    (in_one_sentence, "Who is Mr. X? Nobody knows.", "", False),
    (in_one_sentence, "It has version 3.5. Python reads it.", "", False),
    (in_one_sentence, "It says \"no.\" Then it ends.", "", False),
    (in_one_sentence, "", "", False),
])  # fmt: skip
def test_checks_by_hand(check, answer, value, expected):
    assert check(answer, value) is expected


def test_instructions_in_both_wordings():
    both = (Constraint("figure", "Napoleon"), Constraint("sentence"))
    assert instruction(both, terse=False) == "Act as Napoleon. Answer always in one sentence."
    assert instruction(both, terse=True) == "Figure: Napoleon. Length: one sentence."
    for name, family in FAMILIES.items():
        assert ("{value}" in family.sentence) == ("{value}" in family.terse) == bool(family.request), name
        # The instruction itself would pass for an answer that mentions the value, so a probe must not hold it.
        assert "{value}" not in family.probe


def test_a_constraint_names_its_mistake():
    with pytest.raises(ValueError, match="'colour' is unknown; expected one of hobby, language"):
        Constraint("colour", "red")
    with pytest.raises(ValueError, match="opening: expected a value, got ''"):
        Constraint("opening")
    with pytest.raises(ValueError, match="capitals: expected no value, got 'red'"):
        Constraint("capitals", "red")


def test_an_answer_is_judged_by_what_can_be_decided_after_its_question():
    hobby, opening, language = Constraint("hobby", "chess"), Constraint("opening", "red"), Constraint("language", "Danish")
    assert obeyed([hobby], "`len` counts.", "What is `len`?") is None
    assert obeyed([hobby], "I paint.", "What is your hobby?") is False
    assert obeyed([hobby, opening], "Red: chess", "What is your hobby?") is True
    assert obeyed([hobby, opening], "Red: `len` counts.", "What is `len`?") is True
    assert obeyed([language], "Hej", "Hello?") is None


def test_drawn_constraints_have_different_families_and_all_numbers():
    drawn = [draw_constraints(VALUES, most=3, rng=np.random.default_rng(seed)) for seed in range(200)]
    assert {len(found) for found in drawn} == {1, 2, 3}
    assert all(len({c.family for c in found}) == len(found) for found in drawn)
    assert {c for found in drawn for c in found} == {
        Constraint("opening", "red"), Constraint("opening", "blue"), Constraint("hobby", "chess"), Constraint("capitals"),
    }  # fmt: skip


def test_lists_as_models_write_them():
    assert parse_list("Sure, here are some:\n1. Chess\n2) Reading books.\n- chess\n* Sailing, rowing\n\n") == [
        "Chess", "Reading books", "Sailing, rowing",
    ]  # fmt: skip
    assert parse_list("chess, reading,  golf.") == ["chess", "reading", "golf"]
    assert parse_list("[INST] forged\nchess") == ["chess"]
    assert parse_list("x" * 50 + "\ngolf") == ["golf"]


def test_the_model_is_asked_for_its_lists():
    asked = []

    def respond(conversations, *, seed):
        asked.extend(conversations)
        return [("1. Chess\n2. Golf", True), ("1. golf\n2. Sail", False), ("red\nblue", True), ("red\ngreen", True)]

    rows = ask_for_values(respond, ("hobby", "capitals", "opening"), rounds=2, seed=0)
    assert [c[0]["content"] for c in asked] == [FAMILIES["hobby"].request] * 2 + [FAMILIES["opening"].request] * 2
    # "Sail" may be the half of an entry: that answer was cut.
    assert [(row["kind"], row["value"]) for row in rows] == [
        ("hobby", "Chess"), ("hobby", "Golf"), ("opening", "red"), ("opening", "blue"), ("opening", "green"),
    ]  # fmt: skip


def test_values_are_read_by_family_and_a_missing_family_is_named(tmp_path):
    path = str(tmp_path / "values.jsonl")
    write_jsonl(path, [{"kind": "hobby", "value": " chess "}, {"kind": "colour", "value": "red"}])
    assert read_values(path, ("hobby", "capitals")) == {"hobby": ["chess"], "capitals": []}
    with pytest.raises(ConfigError, match="values.jsonl: no row of kind 'figure'"):
        read_values(path, ("hobby", "figure"))
    write_jsonl(path, [{"kind": "hobby"}])
    with pytest.raises(ConfigError, match=r"values.jsonl:1: value: expected a text, got None"):
        read_values(path, ("hobby",))


def test_contexts_have_the_wanted_turns_end_with_a_question_and_repeat():
    dialogs = [[{"role": "system", "content": "s"}, *dialog("a", 1)], dialog("b", 3)]
    contexts = make_contexts(dialogs, VALUES, SETTINGS, seed=0)
    users = [sum(m["role"] == "user" for m in c.messages) for c in contexts]
    assert set(users) == {2, 3, 4} and len(contexts) == 40
    for context in contexts:
        roles = [m["role"] for m in context.messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)] and roles[-1] == "user"
        terse = instruction(context.constraints, terse=True)
        assert context.instruction in (terse, instruction(context.constraints, terse=False))
        probed = context.messages[-1]["content"] == "What is your hobby?"
        assert not probed or any(c.family == "hobby" for c in context.constraints)
    assert sum(c.messages[-1]["content"] == "What is your hobby?" for c in contexts) > 3
    assert contexts == make_contexts(dialogs, VALUES, SETTINGS, seed=0) != make_contexts(dialogs, VALUES, SETTINGS, seed=1)
    alone = make_contexts(dialogs, VALUES, dataclasses.replace(SETTINGS, join=False), seed=0)
    assert {m["content"][0] for c in alone for m in c.messages[:-1]} == {"b"}
    with pytest.raises(ConfigError, match="no dialog has 9 turns"):
        make_contexts(dialogs, VALUES, dataclasses.replace(SETTINGS, join=False, turns=(9, 9)), seed=0)


def test_the_instruction_stands_in_every_turn_for_sampling_and_in_the_first_for_training():
    messages = [*dialog("a", 2), user("last?")]
    sampled = [m["content"] for m in in_every_turn(messages, "Do.")]
    assert sampled == ["Do. a q0", "a a0", "Do. a q1", "a a1", "Do. last?"]
    trained = [m["content"] for m in in_first_turn(messages, "Do.", place="user")]
    assert trained == ["Do. a q0", "a a0", "a q1", "a a1", "last?"]
    assert in_first_turn(messages, "Do.", place="system") == [{"role": "system", "content": "Do."}, *messages]


def echo(conversations, *, seed, numbers, progress=None):
    """Answers with the number of messages and the last one."""
    return [(f"{len(c)}: {c[-1]['content']}", True) for c in conversations]


def always(conversation):
    return True


CONTEXTS = [
    Context([*dialog("a", 2), user("x?")], (Constraint("opening", "5"),), "I."),
    Context([*dialog("b", 1), user("y?")], (Constraint("opening", "5"),), "J."),
]


def test_one_sample_a_context_or_one_a_turn():
    contexts = CONTEXTS
    kept = answer_contexts(contexts, echo, fits=always, resample=False, seed=0)
    assert [row["response"] for row in kept] == ["5: I. x?", "3: J. y?"]
    assert [row["obeyed"] for row in kept] == [True, False]
    assert kept[0]["messages"] == contexts[0].messages
    drawn = answer_contexts(contexts, echo, fits=always, resample=True, seed=0)
    assert [m["content"] for m in drawn[0]["messages"]] == ["a q0", "1: I. a q0", "a q1", "3: I. a q1", "x?"]
    assert [m["content"] for m in drawn[1]["messages"]] == ["b q0", "1: J. b q0", "y?"]
    assert contexts[0].messages == [*dialog("a", 2), user("x?")]

    def cut(conversations, *, seed, numbers, progress=None):
        return [("half", False) for _ in conversations]

    assert answer_contexts(contexts, cut, fits=always, resample=True, seed=0)[0]["messages"] == contexts[0].messages


def test_an_earlier_answer_that_leaves_no_room_for_the_rest_is_not_taken(caplog):
    def fits(conversation):
        return sum(len(m["content"]) for m in conversation) <= 35

    def respond(conversations, *, seed, numbers, progress=None):
        assert all(map(fits, conversations))  # the sampler refuses longer ones, and with one of them all
        return [("a long answer" if len(c) == 1 else "short", True) for c in conversations]

    (row, other) = answer_contexts(CONTEXTS, respond, fits=fits, resample=True, seed=0)
    # 19 letters are questions with the instruction: with 13 and 4 of answers they would be 36.
    assert [m["content"] for m in row["messages"]] == ["a q0", "a a0", "a q1", "short", "x?"]
    assert other["messages"][1]["content"] == "a long answer"
    assert "1 earlier answers left no room for the rest of their dialogs" in caplog.text


def test_contexts_may_be_answered_in_portions():
    def respond(conversations, *, seed, numbers, progress=None):
        return [(f"{seed} {number}: {len(c)}", True) for number, c in zip(numbers, conversations, strict=True)]

    contexts = [CONTEXTS[i % 3 % 2] for i in range(7)]
    whole = answer_contexts(contexts, respond, fits=always, resample=True, seed=5)
    parts = [(0, 3), (3, 4), (4, 7)]
    assert whole == [
        row for start, end in parts
        for row in answer_contexts(contexts[start:end], respond, fits=always, resample=True, seed=5, first=start)
    ]  # fmt: skip


def test_training_rows_train_the_last_answer_only_and_can_be_chosen(tmp_path):
    def sample(response, obeyed, ended=True):
        return {"instruction": "I.", "messages": [*dialog("a", 1), user("x?")], "response": response, "ended": ended,
                "obeyed": obeyed}  # fmt: skip

    samples = [sample("yes", True), sample("no", False), sample("who knows", None), sample("cut", True, ended=False),
               sample("", True), sample("[INST]", True)]  # fmt: skip
    rows = training_rows(samples, place="user", keep="all")
    assert [row["messages"][-1]["content"] for row in rows] == ["yes", "no", "who knows"]
    assert {row["train_on"] for row in rows} == {"last"}
    kept = training_rows(samples, place="user", keep="obeyed")
    assert [row["messages"][-1]["content"] for row in kept] == ["yes", "who knows"]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_dialogs(tmp_path / "rows.jsonl")[0]["train_on"] == "last"


def test_a_rows_own_train_on_comes_first(tmp_path, monkeypatch):
    from llama_jax.sft import stage

    seen = []

    def encode(rows, tokenizer):
        seen.extend(row.train_on for row in rows)
        return [EncodedDialog([1], [True])] * len(rows)

    monkeypatch.setattr(stage, "encode_dialogs", encode)
    monkeypatch.setattr(stage, "pack_dialogs", lambda examples, length: stage.Packed([1], 0, 0))
    rows = [{"messages": dialog("a", 1)}, {"messages": dialog("b", 1), "train_on": "last"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = types.SimpleNamespace(fingerprint="none", chat_template=None)
    stage.packed_dialogs((str(tmp_path / "rows.jsonl"),), tokenizer, length=8)
    assert seen == ["all", "last"]


def test_the_stage_draws_once_and_trains_what_it_drew(tmp_path, monkeypatch):
    contexts = tmp_path / "dialogs.jsonl"
    write_jsonl(contexts, [{"messages": dialog("a", 2)}])
    drawn, trained = [], []

    def draw(config, mesh, workdir):
        drawn.append(1)
        found = make_contexts([dialog("a", 2)], VALUES, SETTINGS, seed=0)
        write_jsonl(workdir / "samples.jsonl", answer_contexts(found, echo, fits=always, resample=False, seed=0))

    monkeypatch.setattr(ghost, "draw_samples", draw)
    monkeypatch.setattr(ghost, "check_fine_tuning", lambda *_, **how: drawn.append(how["most"]))

    def fine_tune(config, data, mesh, workdir, *, name, epochs):
        trained.append(data.train)

    monkeypatch.setattr(ghost, "fine_tuning_stage", fine_tune)

    @dataclasses.dataclass(frozen=True)
    class Config:
        ghost: GhostSettings
        data: ghost.DialogData
        epochs: float = 1.0
        model: str = "tiny"
        context: int = 0
        tokenizer: str = "tokenizer.model"
        policy: str = ""  # `draw` needs none
        loop: LoopConfig = LoopConfig(steps=1, batch_size=1)

    config = Config(SETTINGS, ghost.DialogData(("sft.jsonl",), (), 64))
    for _ in range(2):
        ghost.make_stage(config, None, tmp_path)
    assert drawn == [40, 1] and trained == [("sft.jsonl", str(tmp_path / "ghost.jsonl"))] * 2
    rows = [json.loads(line) for line in (tmp_path / "ghost.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and rows[0]["messages"][0]["content"].endswith(" a q0")


def test_dialogs_of_too_few_turns_are_refused_before_the_policy_is_loaded(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "dialogs.jsonl", [{"messages": dialog("a", 2)}])
    for name in ("load_tokenizer", "check_language_model", "check_generates"):
        monkeypatch.setattr(ghost, name, lambda *_, **__: (types.SimpleNamespace(max_length=64), None))
    monkeypatch.setattr(ghost, "Responder", lambda *_, **__: pytest.fail("the policy was loaded"))
    settings = dataclasses.replace(SETTINGS, contexts=(str(tmp_path / "dialogs.jsonl"),), join=False, turns=(3, 4))
    config = types.SimpleNamespace(ghost=settings, policy="chat", compute=None, loop=LoopConfig(steps=1, batch_size=1))
    with pytest.raises(ConfigError, match="dialogs.jsonl: no dialog has 3 turns; ghost.join=True joins several"):
        ghost.draw_samples(config, None, tmp_path / "run")


def test_settings_name_their_mistakes():
    for change, words in (
        ({"turns": (3, 2)}, "fewest and the most turns"),
        ({"families": ("colour",)}, "expected some of hobby.*got colour"),
        ({"terse_share": 1.5}, "ghost.terse_share: expected a number from 0 to 1, got 1.5"),
        ({"samples": 0}, "ghost.samples: expected at least 1"),
        ({"temperature": -1.0}, "ghost.temperature: expected at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(SETTINGS, **change)


def test_recall_follows_the_models_own_answers():
    contexts = [
        Context(dialog("a", 4), (Constraint("opening", "red"),), "Begin: red."),
        Context(dialog("b", 4), (Constraint("hobby", "chess"),), "Hobby: chess."),
    ]
    seen = []

    def respond(conversations, *, seed, progress=None):
        """Obeys up to turn 2; remembers the hobby while there are fewer than 4 turns."""
        answers = []
        for c in conversations:
            seen.append([m["content"] for m in c])
            turn = (len(c) + 1) // 2
            if c[-1]["content"] == "What is your hobby?":
                answers.append(("My hobby is chess." if turn < 4 else "I have none.", True))
            else:
                answers.append((f"red {turn}" if turn <= 2 else f"plain {turn}", True))
        return answers

    found = follow(contexts, respond, turns=(2, 4))
    assert [(row.context, row.turn, row.obeyed) for row in found] == [(0, 2, True), (1, 2, True), (0, 4, False), (1, 4, False)]
    assert seen[-1] == ["Hobby: chess. b q0", "red 1", "b q1", "red 2", "b q2", "plain 3", "What is your hobby?"]
    table = recall_table(found)
    assert (table[2].mean, table[4].mean, table[2].n) == (1.0, 0.0, 2)
    assert recall_rows({"GAtt": table}) == [["turn", "GAtt"], [2, "100 % (34 to 100)"], [4, "0 % (0 to 66)"]]
    with pytest.raises(ValueError, match="context 0: expected at least 20 user messages, got 4"):
        follow(contexts, respond)


def test_an_answer_that_leaves_no_room_for_the_last_turn_is_not_followed(caplog):
    contexts = [
        Context(dialog("a", 4), (Constraint("opening", "red"),), "Begin: red."),
        Context(dialog("b", 4), (Constraint("hobby", "chess"),), "Hobby: chess."),
    ]
    asked = []

    def fits(messages):
        return sum(len(m["content"]) for m in messages) <= 70

    def respond(conversations, *, seed, progress=None):
        assert all(map(fits, conversations))  # the sampler refuses longer ones, and with one of them all
        asked.extend([m["content"] for m in c] for c in conversations)
        return [("x" * 15, True) for _ in conversations]

    follow(contexts, respond, turns=(2, 4), fits=fits)
    # Seven messages of 4 letters with the instruction's 12 or 14 are 40 and 42, an answer of 15 adds 11. Of the first dialog
    # two fit, of the second one: its last question may be the probe's, of 19.
    assert asked[-3] == ["Begin: red. a q0", "x" * 15, "a q1", "x" * 15, "a q2", "a a2", "a q3"]
    assert asked[-2] == ["Hobby: chess. b q0", "x" * 15, "b q1", "b a1", "b q2", "b a2", "b q3"]
    assert "3 answers left no room for the rest of their dialogs" in caplog.text
    with pytest.raises(ValueError, match="context 0: its 4 turns leave no room for an answer; expected shorter dialogs"):
        follow(contexts, respond, turns=(2, 4), fits=lambda messages: False)


def test_attention_weights_are_those_of_the_model(tiny):
    tree = params.init(params.table(tiny, head="lm_head"), jax.random.key(0))
    tree = jax.tree.map(lambda x: 3 * x, tree)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 3, 90)
    segment_ids = jnp.where(jnp.arange(12)[None] < jnp.array([[12], [9]]), 1, 0)
    weights = attention_weights(tree, tokens, segment_ids, config=tiny, compute=FLOAT32)
    assert weights.shape == (2, 2, 4, 12, 12)
    real = np.asarray(segment_ids, bool)
    sums = np.asarray(weights.sum(-1)).transpose(1, 3, 0, 2)[real]
    np.testing.assert_allclose(sums, 1, atol=1e-6)
    assert not np.triu(np.asarray(weights), 1).any()
    # The first layer's weights by hand, and what follows from all of them: the model's own final states.
    layer = jax.tree.map(lambda w: np.asarray(w[0], np.float64), tree["trunk"]["layers"])
    x = np.asarray(tree["trunk"]["embedding"], np.float64)[np.asarray(tokens[0])]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + tiny.norm_eps) * layer["attention_norm"]
    angles = np.arange(12)[:, None] * tiny.rope_theta ** (-np.arange(0, 8, 2) / 8)
    turn = np.exp(1j * angles)[:, None]

    def rotated(w):
        y = np.einsum("td,dhe->the", normed, w)
        z = (y[..., :4] + 1j * y[..., 4:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    query, key = rotated(layer["query"]), np.repeat(rotated(layer["key"]), 2, axis=1)
    scores = np.einsum("the,she->hts", query, key) / np.sqrt(8)
    scores = np.where(np.tril(np.ones((12, 12), bool)), scores, -np.inf)
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights[0, 0], expected, atol=1e-5)
    largest = largest_attention(tree, tokens, segment_ids, config=tiny, compute=FLOAT32)
    np.testing.assert_allclose(largest, weights.max((0, 2)), atol=1e-6)
    some = largest_attention(tree, tokens, segment_ids, config=tiny, compute=FLOAT32, layers=[1], heads=[0, 3])
    np.testing.assert_allclose(some, weights[1][:, [0, 3]].max(1), atol=1e-6)
    with pytest.raises(ValueError, match=r"layers: expected numbers from 0 to 1, got \[2\]"):
        largest_attention(tree, tokens, segment_ids, config=tiny, compute=FLOAT32, layers=[2])
    assert np.isfinite(largest).all()


def test_the_attention_of_one_row_on_a_mesh_is_that_of_one_device(tiny):
    tree = params.init(params.table(tiny, head="lm_head"), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 13), 3, 90)  # neither the row nor its length can be divided
    expected = largest_attention(tree, tokens, jnp.ones_like(tokens), config=tiny, compute=FLOAT32)
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))
    tree = jax.device_put(tree, shardings(params.table(tiny, head="lm_head"), mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(largest_attention, config=tiny, compute=FLOAT32))(tree, tokens, jnp.ones_like(tokens))
    assert found.is_fully_replicated
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bins_and_turns_of_the_attention_map_by_hand():
    weights = np.tril(np.arange(25, dtype=np.float32).reshape(5, 5))
    np.testing.assert_array_equal(bin_maxima(weights, 2), [[6, 0, 0], [16, 18, 0], [21, 23, 24]])
    begins = np.array([True, False, False, True, False])
    # Instruction at tokens 1 and 2 (columns). Turn 1 after it: no token, but for one that begins after token 2.
    np.testing.assert_allclose(attention_by_turn(weights, begins, (0, 2)), [11.0, (16 + 21) / 2])


class Letters:
    """A tokenizer of one id a character."""

    bos_id, eos_id, path, chat_template = 1, 2, "letters", None

    def encode(self, text, *, bos=False, eos=False):
        return [1] * bos + [3 + ord(c) % 90 for c in text] + [2] * eos

    def encode_rendered(self, text):
        return [{"<": 1, ">": 2}.get(c, 3 + ord(c) % 90) for c in text]

    def piece(self, token):
        return "?<>"[token]

    def special_pieces(self):
        return {"<": 1, ">": 2}


CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}:{{ m['content'] }}>\n{% endfor %}{% if add_generation_prompt %}<a:{% endif %}"
)


@pytest.mark.parametrize("place", ["user", "system"])
def test_a_chat_template_has_the_same_instruction_and_turns(place, monkeypatch):
    pytest.importorskip("jinja2", reason="needs the extra [interop]")
    monkeypatch.setattr(Letters, "chat_template", CHAT)
    messages = in_first_turn([*dialog("a", 3)], "Begin: red.", place=place)
    assert instruction_span(messages, "Begin: red.", Letters()) == (3, 14)  # behind "<u:" or "<s:"
    encoded = encode_example(messages, Letters())
    begins = np.flatnonzero(turn_begins(encoded.supervised))
    assert len(begins) == 3 and begins[0] == 0  # what the template writes behind the last answer is no turn
    assert [encoded.ids[place - 1] for place in begins[1:]] == [2, 2]  # each behind the end of an answer


@pytest.mark.parametrize("place", ["user", "system"])
def test_the_map_of_a_dialog_finds_the_instruction_and_every_turn(tiny, place):
    model = dataclasses.replace(tiny, max_length=256)
    tree = params.init(params.table(model, head="lm_head"), jax.random.key(0))
    messages = in_first_turn([*dialog("a", 3)], "Begin: red.", place=place)
    start, end = instruction_span(messages, "Begin: red.", Letters())
    first = "[INST] <<SYS>>\nBegin: red." if place == "system" else "[INST] Begin: red."
    assert end == 1 + len(first) and end - start in (11, 12)  # with or without the space before it
    found = attention_map(tree, messages, "Begin: red.", Letters(), config=model, compute=FLOAT32, bin_size=16)
    length = found.cells.shape[0]
    assert found.cells.shape == (length, length) and found.by_turn.shape == (3,)
    assert not np.triu(found.cells, 1).any() and (np.diagonal(found.cells) > 0).all()
    assert 0 < found.by_turn.min() <= found.by_turn.max() < 1
    with pytest.raises(ValueError, match="expected to begin with the instruction 'other'"):
        instruction_span(messages, "other", Letters())
