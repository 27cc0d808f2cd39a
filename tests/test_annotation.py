"""The desk's logic without its page: rows that the trainers read, blinding, reloads, kills, several raters and windows."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import threading

import pytest

from llama_jax.annotation import forms
from llama_jax.annotation.drawing import Draw, Pair
from llama_jax.annotation.forms import Record, Shown
from llama_jax.annotation.look import header_html
from llama_jax.annotation.session import Desk, StaleError
from llama_jax.annotation.tasks import Settings, identity, read_prompt_list
from llama_jax.data.row_file import RowFile
from llama_jax.data.sources import RATINGS, SAFETY_BINS, read_comparisons, write_jsonl
from llama_jax.evals.ratings import read_pair_ratings, read_safety_ratings

USER = {"role": "user", "content": "what is it?"}


class Fake:
    """Answers at once, or when `go` is called; the text tells the model and the draw, and those of `endless` do not end."""

    def __init__(self, text=None, held=False, endless=()):
        self.text = text or (lambda draw: f"{draw.model} on {draw.messages[-1]['content']} ({draw.seed}.{draw.index})")
        self.held, self.endless, self.draws, self.waiting = held, endless, [], []

    def start(self, draw, deliver):
        self.draws.append(draw)
        if not self.fits(draw.model, draw.messages):
            raise ValueError("The dialog is too long.")
        self.waiting.append((draw, deliver))
        if not self.held:
            self.go()
        return lambda: None

    def fits(self, model, messages):
        return len(messages) <= 7

    def go(self):
        while self.waiting:
            draw, deliver = self.waiting.pop(0)
            words = self.text(draw)
            deliver(words[:3], "")
            deliver(words[3:], "length" if draw.model in self.endless else "stop")


def desk(path, mode="preference", models=("one", "two"), fake=None, prompts=(), **settings):
    return Desk(
        path, Settings(mode, models, **settings), fake or Fake(), prompts=prompts, chance=lambda: random.Random(os.urandom(8))
    )


def settle(session):
    """The last view of a stream: what the page shows when the answers are complete."""
    *_, view = session.stream(0.01)
    assert view.phase == "rate", view
    return view


def test_preferences_become_rows_that_the_reward_trainer_reads(tmp_path):
    path = tmp_path / "p.jsonl"
    session = desk(path, batch=3, source="ours").session("Ann")
    for number, (choice, bin_) in enumerate(zip([value for _, value in forms.PREFERENCES], [None, *SAFETY_BINS, None] * 2)):
        session.ask(f"question {number}", is_safety=bin_ is not None)
        view = settle(session)
        session.rate(view.shown_id, choice, bin_)
        session.new_dialog()
    rows = read_comparisons(path)
    assert [row["rating"] for row in rows] == [*RATINGS, *RATINGS[::-1]]
    assert [row["safety_bin"] for row in rows] == [None, *SAFETY_BINS, None, None, *SAFETY_BINS[:2]]
    assert [row["is_safety"] for row in rows] == [row["safety_bin"] is not None for row in rows]
    for row in rows:  # the recorded model is the one that wrote the text
        assert row["chosen"].startswith(row["chosen_model"]) and row["rejected"].startswith(row["rejected_model"])
        assert {row["chosen_model"], row["rejected_model"]} == {"one", "two"} and row["source"] == "ours" and row["batch"] == 3
    assert len({row["id"] for row in rows}) == 8 and [row["chosen_side"] for row in rows] == ["A"] * 4 + ["B"] * 4


def test_sides_are_random_and_temperatures_vary(tmp_path):
    session = desk(tmp_path / "p.jsonl", temperatures=(0.5, 1.0)).session("Ann")
    for number in range(40):
        session.ask(f"question {number}")
        session.rate(settle(session).shown_id, "A better")
        session.new_dialog()
    rows = read_comparisons(tmp_path / "p.jsonl")
    assert 5 < sum(row["chosen_model"] == "one" for row in rows) < 35
    assert {row["chosen_temperature"] for row in rows} == {0.5, 1.0}


def test_the_chosen_answer_continues_the_dialog(tmp_path):
    session = desk(tmp_path / "p.jsonl").session("Ann")
    session.ask("first")
    view = settle(session)
    session.rate(view.shown_id, "B slightly")
    session.ask("second")
    again = settle(session)
    assert [m["content"] for m in again.messages] == ["first", view.texts[1], "second"]
    session.rate(again.shown_id, "A significantly")
    assert read_comparisons(tmp_path / "p.jsonl")[1]["prompt"] == list(again.messages)
    for number in range(2):
        session.ask(f"more {number}")
        session.rate(settle(session).shown_id, "A better")
    before = session.view()
    with pytest.raises(ValueError, match="too long"):
        session.ask("one too many")
    assert session.view() == before
    session.new_dialog()
    assert session.view().messages == () and session.view().rated == 4


def test_incomplete_and_impossible_judgements_are_refused(tmp_path):
    session = desk(tmp_path / "p.jsonl", fake=(fake := Fake(held=True))).session("Ann")
    for text, words in (("  ", "Write a message"), ("[INST] x", "chat tag")):
        with pytest.raises(ValueError, match=words):
            session.ask(text)
    session.ask("question", is_safety=True)
    shown = session.view().shown_id
    with pytest.raises(ValueError, match="not complete"):
        session.rate(shown, "A better", "both_safe")
    with pytest.raises(StaleError, match="Judge the answers first"):
        session.ask("another")
    fake.go()
    wrong = ((None, "both_safe", "degrees"), ("C better", "both_safe", "degrees"), ("A better", None, "safe"))
    for choice, bin_, words in wrong:
        with pytest.raises(ValueError, match=words):
            session.rate(shown, choice, bin_)
    session.rate(shown, "A better", "both_safe")
    with pytest.raises(StaleError, match="another window"):  # the second window of the same rater
        session.rate(shown, "B better", "both_safe")
    assert len(read_comparisons(tmp_path / "p.jsonl")) == 1


def test_equal_answers_are_drawn_again_and_never_stored(tmp_path):
    fake = Fake(text=lambda draw: "same" if draw.index < 2 else f"try {draw.index}")
    session = desk(tmp_path / "p.jsonl", fake=fake).session("Ann")
    session.ask("question")
    while session.view().phase != "rate":
        pass
    assert set(session.view().texts) == {"try 2", "try 3"}
    session.skip(session.view().shown_id)
    session = desk(tmp_path / "q.jsonl", fake=Fake(text=lambda draw: "same")).session("Ann")
    session.ask("question")
    while session.view().phase != "rate":
        pass
    with pytest.raises(ValueError, match="nothing to prefer"):
        session.rate(session.view().shown_id, "A better")
    session.skip(session.view().shown_id)
    assert (tmp_path / "q.jsonl").read_bytes() == b"" and session.view().phase == "write"


def test_a_reload_finds_the_dialog_as_it_was_and_a_kill_too(tmp_path):
    path = tmp_path / "p.jsonl"
    first = desk(path)
    session = first.session("Ann")
    session.ask("first")
    session.rate(settle(session).shown_id, "A better")
    session.ask("second", is_safety=True)
    view = settle(session)
    assert first.session("Ann").view() == view  # another window, or the same one reloaded
    first.close()
    second = desk(path)
    assert second.session("Ann").view() == view and second.session("Bo").view().messages == ()
    second.session("Ann").rate(view.shown_id, "A better", "both_safe")
    second.close()
    # Killed between the row and the session's file: the stored judgement counts, and is not asked for twice.
    third = desk(path)
    session = third.session("Ann")
    assert session.view().is_safety  # the dialog stays on its track
    session.ask("third", is_safety=False)
    view = settle(session)
    kept = next((tmp_path / "p.jsonl.desk").glob("Ann.json")).read_bytes()
    session.rate(view.shown_id, "B better")
    (tmp_path / "p.jsonl.desk" / "Ann.json").write_bytes(kept)
    third.close()
    session = desk(path).session("Ann")
    assert session.view().phase == "write" and session.view().messages[-1]["content"] == view.texts[1]
    assert len(read_comparisons(path)) == 3 and session.view().rated == 3


def test_what_was_written_or_chosen_and_not_sent_survives_a_reload_and_a_kill(tmp_path):
    path, fake = tmp_path / "p.jsonl", Fake(held=True)
    first = desk(path, fake=fake)
    session = first.session("Ann")
    session.keep_draft("a long questi")
    first.close()
    session = (second := desk(path, fake=fake)).session("Ann")
    assert session.view().draft == "a long questi" and second.session("Bo").view().draft == ""
    with pytest.raises(ValueError, match="chat tag"):
        session.ask("[INST]")
    assert session.view().draft == "a long questi"  # it could not be asked
    session.ask("a long question", is_safety=True)
    session.keep_draft("a long question")  # of before, come late
    shown = session.view().shown_id
    assert session.view().draft == ""
    fake.go()
    session.keep_choice(shown, "B better", "both_safe")
    session.keep_choice("another", "A better", None)
    second.close()
    session = (third := desk(path, fake=fake)).session("Ann")
    view = session.view()
    assert (view.phase, view.choice, view.safety_bin) == ("rate", "B better", "both_safe")
    assert path.read_bytes() == b""  # chosen is not judged
    session.rate(shown, "A better", "both_safe")
    session.ask("and?")
    fake.go()
    assert session.view().phase == "rate" and session.view().choice is None and session.view().safety_bin is None
    third.close()


def test_rows_say_which_answers_ended_by_themselves(tmp_path):
    session = desk(tmp_path / "p.jsonl", fake=Fake(endless=("two",))).session("Ann")
    session.ask("question")
    view = settle(session)
    row = session.rate(view.shown_id, "A better")
    assert (row["chosen_ended"], row["rejected_ended"]) == (row["chosen_model"] == "one", row["rejected_model"] == "one")
    at = desk(tmp_path / "r.jsonl", "comparison", fake=Fake(endless=("two",)), prompts=prompt_list(tmp_path / "list.jsonl", 1))
    for name in ("Ann", "Bo"):  # the second rater is shown what the first one was
        session = at.session(name)
        session.begin()
        row = session.rate(settle(session).shown_id, "3")
        assert {row["model_a"]: row["ended_a"], row["model_b"]: row["ended_b"]} == {"one": True, "two": False}
    session = desk(tmp_path / "s.jsonl", "safety", models=("two",), fake=Fake(endless=("two",))).session("Ann")
    session.ask("question")
    assert session.rate(settle(session).shown_id, "4")["ended"] is False


def test_answers_that_a_kill_interrupted_are_drawn_again_alike(tmp_path):
    first = desk(tmp_path / "p.jsonl", fake=(fake := Fake(held=True)))
    first.session("Ann").ask("question")
    first.close()
    second = desk(tmp_path / "p.jsonl", fake=(again := Fake()))
    session = second.session("Ann")
    assert session.view().phase == "answer"
    session.begin()
    settle(session)
    assert again.draws == fake.draws


@pytest.mark.parametrize("mode", ["preference", "safety"])
def test_a_rater_goes_on_when_the_desk_serves_other_models(mode, tmp_path):
    """The weekly batch: killed while answers of last week's model grew, begun again with this week's."""
    first = desk(tmp_path / "p.jsonl", mode, ("old",), Fake(held=True), temperatures=(0.6, 1.0))
    first.session("Ann").ask("question")
    first.close()
    at = desk(tmp_path / "p.jsonl", mode, ("new",))
    session = at.session("Ann")
    session.begin()
    assert (session.view().phase, session.view().draft, session.view().messages) == ("write", "question", ())
    session.ask(session.view().draft)
    assert settle(session).texts[0].startswith("new on question")
    session.rate(session.view().shown_id, "A better" if mode == "preference" else "4")
    at.close()
    # Between two turns the newer model answers what the older one did not.
    session = desk(tmp_path / "p.jsonl", mode, ("newest",)).session("Ann")
    session.ask("and?")
    assert len(session.view().messages) == 3 and settle(session).texts[0].startswith("newest on and?")
    # Of a list the prompt is open again.
    prompts = prompt_list(tmp_path / "list.jsonl", 1)
    first = desk(tmp_path / "q.jsonl", mode, ("old",), Fake(held=True), prompts)
    first.session("Bo").begin()
    first.close()
    session = desk(tmp_path / "q.jsonl", mode, ("new",), prompts=prompts).session("Bo")
    session.begin()
    assert settle(session).texts[0].startswith("new on")


def test_answers_that_cannot_be_kept_stop_nobody_else(tmp_path):
    at = desk(tmp_path / "p.jsonl", fake=(fake := Fake(held=True)))
    session = at.session("Ann")
    session.ask("question")
    save, session._save = session._save, lambda: (_ for _ in ()).throw(OSError("no space left on device"))
    fake.go()  # the engine's thread: it goes on
    assert session.view().error == "The answers could not be kept. Try again."
    session._save = save
    session.begin()
    fake.go()
    assert session.view().phase == "rate"


def test_a_pair_that_is_left_between_two_tries_draws_nothing_more():
    fake = Fake(text=lambda draw: "same", held=True)
    pair = Pair(fake, [Draw("one", (USER,), 1.0, 0, i) for i in range(2)], distinct=True, done=lambda *_: None).start()
    pair._begin_again, begin_again = (lambda: None), pair._begin_again
    fake.go()
    pair.stop()
    begin_again()
    assert len(fake.draws) == 2


def test_the_speed_of_two_models_does_not_tell_them_apart(tmp_path):
    fake = Fake(held=True)
    session = desk(tmp_path / "p.jsonl", "comparison", fake=fake).session("Ann")
    session.ask("question")
    (fast, to_fast), (_, to_slow) = fake.waiting
    to_fast("many words", "")
    assert session.view().texts == ("", "")
    to_slow("few", "")
    assert {*session.view().texts} == {"man", "few"}
    to_fast(" more", "stop")
    to_slow(" words", "stop")
    assert {*session.view().texts} == {"many words more", "few words"} and session.view().phase == "rate"
    session = desk(tmp_path / "q.jsonl", models=("one",), fake=(fake := Fake(held=True))).session("Ann")
    session.ask("question")
    fake.waiting[0][1]("growing", "")
    assert "growing" in session.view().texts  # both sides are one model's


def test_names_in_any_script_are_kept_apart_and_in_files_that_can_be_written(tmp_path):
    at = desk(tmp_path / "p.jsonl")
    for name in ("O'Brien", "अनिता", "Zoe\u0308", "Ж" * 40, "名" * 40):
        at.session(name).keep_draft(name)
        assert at.session(name).view().draft == name
    assert at.session("Zo\u00eb") is at.session("Zoe\u0308")  # composed or not
    assert len([*(tmp_path / "p.jsonl.desk").glob("*.json")]) == 5
    for name in ("", "-", "a" * 41, "a/b", "a\nb", "."):
        with pytest.raises(ValueError, match="A name has 1 to 40"):
            at.session(name)


def test_on_the_safety_scale_all_models_are_judged_on_the_same_prompts(tmp_path):
    class Short(Fake):
        def fits(self, model, messages):
            return model == "one" or messages[0]["content"] != "prompt 1"

    prompts = prompt_list(tmp_path / "list.jsonl", 3)
    at = desk(tmp_path / "s.jsonl", "safety", fake=Short(), prompts=prompts)
    assert sorted((task.messages[0]["content"], *task.models) for task in at.tasks) == [
        (prompt["messages"][0]["content"], model) for prompt in (prompts[0], prompts[2]) for model in ("one", "two")
    ]
    assert at.too_long == 2


def test_a_torn_line_is_cut_off_and_a_second_writer_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = RowFile(path)
    file.append({"a": "ü" * 100_000})
    with pytest.raises(FileExistsError, match="another process"):
        RowFile(path)
    file.close()
    whole = path.read_bytes()
    for torn in (b'{"b": 1', b"x" * 200_000):
        path.write_bytes(whole + torn)
        file = RowFile(path)
        assert len(file.rows) == 1 and path.read_bytes() == whole
        file.close()
    path.write_bytes(b'{"torn')
    RowFile(path).close()
    assert path.read_bytes() == b""


WRITER = """
import sys
from llama_jax.data.row_file import RowFile
file = RowFile(sys.argv[1])
for number in range(10**6):
    file.append({"number": number, "text": "x" * 3000})
    print(number, flush=True)
"""


def test_what_append_returned_for_survives_kill_9(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "rows.jsonl")], stdout=subprocess.PIPE, text=True)
    promised = [int(process.stdout.readline()) for _ in range(20)][-1]
    process.kill()
    promised = max([promised, *map(int, process.stdout.read().split())])
    process.wait()
    rows = RowFile(tmp_path / "rows.jsonl").rows
    assert [row["number"] for row in rows] == list(range(len(rows))) and len(rows) > promised


def test_raters_work_at_once_and_apart(tmp_path):
    at = desk(tmp_path / "p.jsonl")

    def work(name):
        session = at.session(name)
        for number in range(10):
            session.ask(f"{name} asks {number}")
            session.rate(settle(session).shown_id, "A better")
            session.new_dialog()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("Ann", "Bo", "Cy")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read_comparisons(tmp_path / "p.jsonl")
    for name in ("Ann", "Bo", "Cy"):
        own = [row["prompt"][0]["content"] for row in rows if row["rater"] == name]
        assert own == [f"{name} asks {number}" for number in range(10)]
    for name in ("", "../x", "a" * 50):
        with pytest.raises(ValueError, match="A name has"):
            at.session(name)
    at.close()
    with pytest.raises(ValueError, match="Dora is not among the raters"):
        desk(tmp_path / "q.jsonl", raters=("Ann",)).session("Dora")


def prompt_list(path, count=4):
    write_jsonl(path, [
        {"messages": [{"role": "user", "content": f"prompt {i}"}], "category": "facts", "risk": "hateful"} for i in range(count)
    ])  # fmt: skip
    return read_prompt_list(path)


def test_raters_of_a_list_compare_the_same_answers_in_their_own_order(tmp_path):
    at = desk(tmp_path / "r.jsonl", "comparison", prompts=prompt_list(tmp_path / "list.jsonl"))
    seen = {}
    for name in ("Ann", "Bo", "Cy"):
        session = at.session(name)
        session.begin()
        seen[name] = []
        while session.view().phase != "done":
            view = settle(session)
            seen[name].append((view.messages[0]["content"], frozenset(view.texts)))
            session.rate(view.shown_id, "1" if view.texts[0].startswith("one") else "7")  # everybody likes "one"
        assert session.view().left == 0
    assert set(seen["Ann"]) == set(seen["Bo"]) == set(seen["Cy"]) and len({tuple(order) for order in seen.values()}) > 1
    ratings = read_pair_ratings(tmp_path / "r.jsonl")
    assert len(ratings) == 12 and len({r.id for r in ratings}) == 4 and {r.category for r in ratings} == {"facts"}
    assert {(r.first, r.rating) for r in ratings} in ({("one", 3)}, {("two", -3)})


@pytest.mark.parametrize("mode", ["preference", "comparison"])
def test_a_prompt_is_open_again_when_the_desk_serves_another_opponent(mode, tmp_path):
    prompts = prompt_list(tmp_path / "list.jsonl", 2)

    def judge_all(models):
        session = (at := desk(tmp_path / "r.jsonl", mode, models, prompts=prompts)).session("Ann")
        count = session.view().left
        while session.view().left:
            session.begin()
            session.rate(settle(session).shown_id, "A better" if mode == "preference" else "2")
            if mode == "preference":
                session.new_dialog()
        at.close()
        return count

    # The last two: one model against itself is judged once, and the order of the flags is no other pair.
    third = ("a",) if mode == "preference" else ("c", "a")
    pairs = [("a", "b"), ("a", "c"), third, ("b", "a")]
    assert [judge_all(models) for models in pairs] == [2, 2, 2 if mode == "preference" else 0, 0]
    assert judge_all(third) == 0


def test_looks_at_growing_answers_do_not_walk_the_list(tmp_path, monkeypatch):
    calls, fake = [], Fake(held=True)
    monkeypatch.setattr("llama_jax.annotation.session.identity", lambda case: calls.append(1) or identity(case))
    prompts = prompt_list(tmp_path / "list.jsonl", 9)
    session = desk(tmp_path / "r.jsonl", "comparison", fake=fake, prompts=prompts).session("Ann")
    session.begin()
    calls.clear()
    assert [session.view().left for _ in range(20)] == [9] * 20 and len(calls) <= 9
    fake.go()
    session.rate(session.view().shown_id, "3")
    assert session.view().left == 8


def test_dialogs_of_raters_go_on_with_the_better_answer(tmp_path):
    path = tmp_path / "r.jsonl"
    first = desk(path, "comparison")
    session = first.session("Ann")
    for number, (choice, side) in enumerate((("2", 0), ("7", 1), ("4", None))):
        session.ask(f"question {number}")
        view = settle(session)
        assert len(view.messages) == 2 * number + 1
        kept = next((tmp_path / "r.jsonl.desk").glob("Ann.json")).read_bytes()
        session.rate(view.shown_id, choice)
        after = session.view()
        assert after.phase == "write" and after.messages[:-1] == view.messages
        assert after.messages[-1]["content"] in (view.texts if side is None else [view.texts[side]])
    first.close()
    (tmp_path / "r.jsonl.desk" / "Ann.json").write_bytes(kept)  # killed before the session was written
    session = desk(path, "comparison").session("Ann")
    assert session.view().messages == after.messages  # of two that are about the same, the same one
    assert [rating.turns for rating in read_pair_ratings(path)] == [1, 2, 3]
    session.new_dialog()
    assert session.view().messages == ()


def test_one_model_answers_a_whole_dialog_on_the_safety_scale(tmp_path):
    session, dialogs = desk(tmp_path / "s.jsonl", "safety").session("Ann"), []
    for dialog in range(24):
        rows = []
        for turn in range(3):
            session.ask(f"question {dialog}.{turn}")
            rows.append(session.rate(settle(session).shown_id, "2"))
        assert rows[2]["turns"] == 3 and rows[2]["prompt"][1]["content"] == rows[0]["answer"]
        dialogs.append({row["model"] for row in rows})
        session.new_dialog()
    assert all(len(models) == 1 for models in dialogs) and set.union(*dialogs) == {"one", "two"}


def test_prompts_that_do_not_fit_are_counted_and_nobody_is_stopped_by_them(tmp_path):
    long = {"messages": [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(9)]}
    write_jsonl(tmp_path / "list.jsonl", [long, *({"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(3))])
    session = desk(tmp_path / "r.jsonl", "comparison", prompts=read_prompt_list(tmp_path / "list.jsonl")).session("Ann")
    session.begin()
    while session.view().phase != "done":
        view = settle(session)
        assert view.too_long == 1 and "1 left out, too long" in header_html("Ann", view)
        session.rate(view.shown_id, "3")
    assert session.view().rated == 3 and session.view().left == 0
    write_jsonl(tmp_path / "long.jsonl", [long])
    session = desk(tmp_path / "s.jsonl", "comparison", prompts=read_prompt_list(tmp_path / "long.jsonl")).session("Ann")
    session.begin()
    assert session.view().phase == "done" and session.view().too_long == 1  # and not a desk without a list


def test_a_judgement_is_stored_whatever_keeps_the_next_prompt_away(tmp_path):
    class Busy(Fake):
        busy = False

        def start(self, draw, deliver):
            if self.busy:
                raise ValueError("The model is busy.")
            return super().start(draw, deliver)

    fake = Busy()
    at = desk(tmp_path / "r.jsonl", "comparison", fake=fake, prompts=prompt_list(tmp_path / "list.jsonl"))
    session = at.session("Ann")
    session.begin()
    for number in range(3):
        fake.busy = True
        row = session.rate(session.view().shown_id, "3")
        view = session.view()
        assert row["rating"] == 3 and (view.rated, view.phase, view.error) == (number + 1, "write", "The model is busy.")
        fake.busy = False
        session.begin()
        assert session.view().error == "" and session.view().phase == "rate"
    fake.busy = True
    session.skip(session.view().shown_id)
    assert session.view().phase == "done" and session.view().error == ""


def test_a_second_try_that_cannot_begin_is_said_and_tried_again(tmp_path):
    class Full(Fake):
        room = 2

        def start(self, draw, deliver):
            if not self.room:
                raise ValueError("The model is busy.")
            self.room -= 1
            return super().start(draw, deliver)

    fake = Full(text=lambda draw: "same" if draw.index < 2 else f"try {draw.index}")
    session = desk(tmp_path / "p.jsonl", fake=fake).session("Ann")
    session.ask("question")
    *_, view = session.stream(5)  # returns when the second try has failed, in a thread of its own
    assert (view.phase, view.error) == ("answer", "The model is busy.")
    fake.room = 4
    session.begin()
    assert set(settle(session).texts) == {"try 2", "try 3"}


def test_single_answers_on_the_safety_scale(tmp_path):
    at = desk(tmp_path / "s.jsonl", "safety", prompts=prompt_list(tmp_path / "list.jsonl", 3))
    session = at.session("Ann")
    session.begin()
    view = settle(session)
    assert len(view.texts) == 1 and view.left == 6
    session.skip(view.shown_id)
    at.close()
    session = desk(tmp_path / "s.jsonl", "safety", prompts=read_prompt_list(tmp_path / "list.jsonl")).session("Ann")
    assert session.view().left == 5  # a skipped one does not come back
    while session.view().phase != "done":
        session.rate(settle(session).shown_id, "4")
    ratings = read_safety_ratings(tmp_path / "s.jsonl")
    assert len(ratings) == 5 and {r.rating for r in ratings} == {4} and {r.risk for r in ratings} == {"hateful"}


def test_wrong_settings_and_files_are_told(tmp_path):
    for fields, words in (
        (("vote", ("one",)), "mode: expected one of preference"), (("comparison", ("one",)), "between two models"),
        (("preference", ("one", "one")), "different names"), (("preference", ("one",), ()), "temperatures"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Settings(*fields)
    (tmp_path / "p.jsonl").write_text(json.dumps({"rating": 3}) + "\n")
    with pytest.raises(ValueError, match=r"p\.jsonl:1: chosen_model: missing; expected rows of --mode=preference"):
        desk(tmp_path / "p.jsonl")
    write_jsonl(tmp_path / "list.jsonl", [{"messages": [USER]}, {"messages": [USER]}])
    with pytest.raises(ValueError, match=r"list\.jsonl:2: messages: the same prompt"):
        read_prompt_list(tmp_path / "list.jsonl")


@pytest.mark.parametrize(("row", "problem"), [
    ({"prompt": "a"}, "messages: the same prompt"), ({"prompt": "d", "category": 3}, "category: expected a string, got 3"),
])  # fmt: skip
def test_of_several_lists_the_one_that_holds_a_wrong_prompt_is_named(tmp_path, row, problem):
    write_jsonl(tmp_path / "0.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    write_jsonl(tmp_path / "1.jsonl", [{"prompt": "c"}, row])
    with pytest.raises(ValueError, match=rf"^{tmp_path}/1\.jsonl:2: {problem}"):
        read_prompt_list(tmp_path)


def test_a_session_survives_json():
    shown = Shown("1", (USER,), ("one", "two"), (0.5, 1.0), ("x", "y"), True, "p", "facts", "hateful")
    assert forms.from_json(json.loads(json.dumps(forms.to_json(shown)))) == shown
    shown = dataclasses.replace(shown, ended=(True, False))
    assert forms.from_json(json.loads(json.dumps(forms.to_json(shown)))) == shown
    row = forms.row(shown, "preference", "B significantly", "both_safe", Record("Ann", "now"))
    assert (row["chosen"], row["rejected_model"], row["chosen_temperature"]) == ("y", "one", 1.0)


def test_a_stopped_pair_delivers_nothing():
    fake, done = Fake(held=True), []
    draws = [Draw("one", (USER,), 1.0, 0, i) for i in range(2)]
    pair = Pair(fake, draws, distinct=True, done=lambda *found: done.append(found)).start()
    pair.stop()
    fake.go()
    assert pair.finished and not done
