"""Dialogs that teach a model to obey an instruction in its own turn, and those that recall is measured on."""

import numpy as np
import pytest

from llama_jax.data.sources import read_jsonl
from llama_jax.rlhf.constraints import Constraint, instruction
from llama_jax.rlhf.ghost import read_values
from llama_jax.rlhf.instructions import VALUES, contexts_of, obedience_rows, obedient, plain_rows, write_instruction_data

DIALOGS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]
    for n in ("one", "two", "three")
]


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (Constraint("opening", "Sure"), ("What is one?", "Sure: It is one.")),
        (Constraint("closing", "thanks"), ("What is one?", "It is one. thanks")),
        (Constraint("hobby", "chess"), ("What is your hobby?", "My hobby is chess.")),
    ],
)
def test_an_obedient_answer_holds_by_its_own_check(constraint, expected):
    question, answer = obedient(constraint, "What is one?", "It is one.")
    assert (question, answer) == expected and constraint.holds(answer)
    assert not constraint.holds("It is one.")


def test_a_family_without_a_way_to_obey_is_named():
    with pytest.raises(ValueError, match="constraint capitals: expected one of opening, closing, hobby"):
        obedient(Constraint("capitals"), "What is one?", "It is one.")


def test_only_the_last_turn_holds_an_instruction_and_obeys_it():
    rows = obedience_rows(DIALOGS, VALUES, 200, earlier_share=0.3, most_turns=4, rng=np.random.default_rng(0))
    constraints = [Constraint(family, value) for family, values in VALUES.items() for value in values]
    texts = {instruction([c], terse=terse): c for c in constraints for terse in (False, True)}
    turns, found = [], set()
    for row in rows:
        *earlier, last, answer = row["messages"]
        assert all(message in [m for dialog in DIALOGS for m in dialog] for message in earlier)
        (constraint,) = (c for text, c in texts.items() if last["content"].startswith(f"{text} "))
        assert constraint.holds(answer["content"])
        turns.append(len(row["messages"]) // 2)
        found.add(constraint.family)
    assert found == set(VALUES) and set(turns) == {1, 2, 3, 4}
    assert 0.2 < np.mean(np.array(turns) > 1) < 0.4


def test_plain_rows_and_contexts_have_their_turns():
    rng = np.random.default_rng(0)
    assert {len(row["messages"]) for row in plain_rows(DIALOGS, 60, most_turns=4, rng=rng)} == {4, 6, 8}
    contexts = contexts_of(DIALOGS, VALUES, 12, turns=5, rng=rng)
    assert all(len(context.messages) == 10 for context in contexts)
    assert [context.constraints[0].family for context in contexts] == sorted(VALUES) * 4
    # The wording changes after each round of the families, and so does the value.
    assert [context.instruction for context in contexts[:4]] == [
        "End every answer with thanks.", "You enjoy chess.", "Begin every answer with Sure.", "End: cheers.",
    ]  # fmt: skip


def test_the_files_are_what_the_stages_read(tmp_path):
    how = {"rows": 10, "plain": 3, "most_turns": 4, "seed": 0}
    files = write_instruction_data(tmp_path, DIALOGS, VALUES, **how)
    assert {name: sum(1 for _ in read_jsonl(path)) for name, path in files.items()} == {
        "instructions": 10, "plain": 3, "contexts": 3, "values": 24,
    }  # fmt: skip
    assert read_values(files["values"], tuple(VALUES)) == {name: list(values) for name, values in VALUES.items()}
    again = write_instruction_data(tmp_path / "again", DIALOGS, VALUES, **how)
    assert all(open(files[name]).read() == open(again[name]).read() for name in files)
