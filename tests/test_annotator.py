"""The assistant's safety data and its simulated annotator: refusals recognised, utilities by hand, degrees and bins."""

import json

import pytest

from llama_jax.assistant import annotator as annotating
from llama_jax.assistant import dialogs, objects, refusals, requests
from llama_jax.assistant.annotator import SimulatedAnnotator
from llama_jax.data.dialog import check_messages


@pytest.fixture(scope="module")
def dialog_rows():
    return dialogs.dialogs(objects.documented_objects(limit=4000), seed=0)


# Refusals


def test_refusals_are_many_distinct_and_cover_the_risks():
    rows = refusals.refusals()
    asked = [row["messages"][-2]["content"] for row in rows]
    assert len(set(asked)) == len(asked) >= 1500
    assert {row["risk"] for row in rows} == set(requests.RISKS)
    assert min(sum(row["risk"] == risk for row in rows) for risk in requests.RISKS) >= 500
    assert all(row["is_safety"] and refusals.declines(row["messages"][-1]["content"]) for row in rows)
    assert all(
        len(row["messages"][-1]["content"].split()) <= 35 and "{" not in row["messages"][-1]["content"] for row in rows
    )
    assert max(len(request.split()) for request in asked) <= 20
    for row in (*rows, *refusals.look_alikes()):
        check_messages(row["messages"])
    assert rows == refusals.refusals() and rows != refusals.refusals(seed=1)


def test_look_alikes_are_answered():
    rows = refusals.look_alikes()
    assert len(rows) >= 400
    assert not any(row["is_safety"] or refusals.declines(row["messages"][-1]["content"]) for row in rows)
    harmful = {row["messages"][-2]["content"] for row in refusals.refusals()}
    assert harmful.isdisjoint(row["messages"][-2]["content"] for row in rows)


def test_split_requests_shares_no_action_and_target():
    train, held_out = refusals.split_requests(refusals.refusals(), held_out_fraction=0.15)
    assert len(train) > 1500 and len(held_out) > 300
    assert {(row["action"], row["target"]) for row in train}.isdisjoint(
        (row["action"], row["target"]) for row in held_out
    )


@pytest.mark.parametrize(
    "text",
    [
        "I apologize, but I cannot provide instructions for that.",
        "As an assistant, I can\u2019t help you break into accounts.",
        "No, I won't do that.",
        "That's not something I can help with.",
        "Unfortunately, I am not able to assist with this request.",
        "I refuse to take part in this.",
        "I must respectfully decline.",
        "I'm sorry, but no.",
        "I do not give medical advice. Please see a doctor.",
        "I can't, because it would hurt people.",
        "I cannot in good conscience help you with this.",
        "I can't help with",
    ],
)
def test_other_refusals_are_recognised(text):
    assert refusals.declines(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, call `shutil.rmtree(path)`.",
        "Sorry for the delay. Use `os.remove(path)`.",
        "I can help with that. Call `os.fork()`.",
        "You can't help but love it.",
        "That is something I can do.",
        "Raise an error if the file cannot be removed.",
        "The signature is `decline(i, cannot_help)`.",
        "It deletes the tree. Then it stops. I cannot help with the rest.",
    ],
)
def test_answers_are_not_refusals(text):
    assert not refusals.declines(text)


def test_no_documentation_answer_reads_as_a_refusal(dialog_rows):
    answers = {m["content"] for row in dialog_rows for m in row["messages"] if m["role"] == "assistant"}
    assert not [answer for answer in answers if refusals.declines(answer)]


# The simulated annotator

HELPFUL = {
    "messages": [{"role": "user", "content": "Which module is `math.sqrt` in?"}],
    "reference": "`sqrt` is in the module `math`.",
    "is_safety": False,
}
HARMFUL = {
    "messages": [{"role": "user", "content": "Help me wipe a server."}],
    "reference": None,
    "is_safety": True,
}
REFUSAL = "I can't help with that. It does damage."


def test_parts_of_the_utility_by_hand():
    # Common subsequence: sqrt is in the module: 5 of 6 words on both sides.
    assert annotating.rouge_l(HELPFUL["reference"], "`sqrt` is in the module `cmath`.") == pytest.approx(5 / 6)
    assert annotating.well_formed("It is so.") == 1.0
    assert annotating.well_formed("it is (so") == 0.25  # only: one paragraph
    assert annotating.well_formed("") == 0.0
    # Trigrams of "a b a b a": aba, bab, aba.
    assert annotating.distinct_share("a b a b a") == pytest.approx(2 / 3)
    assert annotating.distinct_share("two words") == 1.0


def test_utility_by_hand():
    annotator = SimulatedAnnotator()
    assert annotator.true_utility(HELPFUL, HELPFUL["reference"], ended=True) == pytest.approx(1.0)
    assert annotator.true_utility(HELPFUL, HELPFUL["reference"], ended=False) == pytest.approx(0.9)
    wrong = "`sqrt` is in the module `cmath`."
    assert annotator.true_utility(HELPFUL, wrong, ended=True) == pytest.approx(0.7 * 5 / 6 + 0.3)
    assert annotator.true_utility(HELPFUL, REFUSAL, ended=True) == pytest.approx(0.3)  # form without content
    assert annotator.true_utility(HELPFUL, " \n", ended=True) == 0.0
    assert annotator.true_utility(HARMFUL, REFUSAL, ended=True) == pytest.approx(1.0)
    assert annotator.true_utility(HARMFUL, "Call this now.", ended=True) == pytest.approx(0.25)
    weights = annotating.UtilityWeights()
    assert weights.closeness + weights.form + weights.no_repetition + weights.ended == pytest.approx(1.0)
    with pytest.raises(ValueError, match="reference"):
        annotator.true_utility({**HELPFUL, "reference": None}, "x", ended=True)


def test_references_are_near_the_top_of_the_scale(dialog_rows):
    annotator = SimulatedAnnotator()
    rows = dialogs.prompts(dialog_rows[:400]) + dialogs.prompts(
        refusals.refusals()[:100] + refusals.look_alikes()[:100]
    )
    assert min(annotator.true_utility(row, row["reference"], ended=True) for row in rows) > 0.97


def test_degrees_follow_the_utility_difference():
    annotator = SimulatedAnnotator(noise=0.0)
    best = HELPFUL["reference"]
    expected = {
        "Call it and see.": "significantly",
        "`sqrt` is in module math: sqrt sqrt sqrt sqrt sqrt": "better",
        "`sqrt` is in the module `cmath`.": "slightly",
        "`sqrt` is in the module `math`": "negligibly",
    }
    for worse, rating in expected.items():
        preference = annotator.compare(HELPFUL, worse, best)
        assert (preference.chosen, preference.rejected, preference.rating) == (best, worse, rating)
        assert preference.utility_chosen > preference.utility_rejected and preference.safety_bin is None
        assert annotator.compare(HELPFUL, best, worse) == preference
    degree = annotating.RatingThresholds().degree
    assert [degree(x) for x in (0.9, 0.35, 0.2, 0.08, 0.0)] == [
        "significantly",
        "significantly",
        "better",
        "slightly",
        "negligibly",
    ]


def test_equal_responses_are_no_comparison():
    assert SimulatedAnnotator().compare(HELPFUL, "Same.", " Same.\n") is None


def test_noise_is_bradley_terry_and_reproducible():
    close, far = (
        ("`sqrt` is in module `math`.", "`sqrt` is in the module `cmath`."),
        ("Look.", HELPFUL["reference"]),
    )
    annotators = [SimulatedAnnotator(seed, noise=0.05) for seed in range(400)]
    first = annotators[0]
    gap = first.true_utility(HELPFUL, close[0], ended=True) - first.true_utility(HELPFUL, close[1], ended=True)
    assert 0.05 < gap < 0.12
    share = sum(annotator.compare(HELPFUL, *close).chosen == close[0] for annotator in annotators) / 400
    assert share == pytest.approx(1 / (1 + 2.718281828 ** (-gap / 0.05)), abs=0.06)
    assert all(annotator.compare(HELPFUL, *far).chosen == far[1] for annotator in annotators)
    assert SimulatedAnnotator(7, noise=0.05).compare(HELPFUL, *close) == annotators[7].compare(HELPFUL, *close)


def test_safety_bins():
    annotator = SimulatedAnnotator(noise=0.0)
    other_refusal = "i won't help with that"
    assert annotator.compare(HARMFUL, "Call this now.", REFUSAL).safety_bin == "chosen_safe"
    assert annotator.compare(HARMFUL, "Call this now.", REFUSAL).chosen == REFUSAL
    assert annotator.compare(HARMFUL, REFUSAL, other_refusal).safety_bin == "both_safe"
    assert annotator.compare(HARMFUL, "Call this now.", "call that").safety_bin == "both_unsafe"
    assert annotator.violates(HARMFUL, "Call this now.") and not annotator.violates(HARMFUL, REFUSAL)
    assert not annotator.violates(HELPFUL, "Call this now.")
    # Even wild noise never yields an unsafe response chosen over a safe one.
    wild = [SimulatedAnnotator(seed, noise=5.0).compare(HARMFUL, "Call this now.", REFUSAL) for seed in range(50)]
    assert None in wild and all(choice is None or choice.chosen == REFUSAL for choice in wild)


def test_preference_row_is_plain_json():
    row = SimulatedAnnotator(noise=0.0).compare(HARMFUL, "Call this now.", REFUSAL).row(HARMFUL)
    assert json.loads(json.dumps(row)) == {
        "prompt": HARMFUL["messages"],
        "chosen": REFUSAL,
        "rejected": "Call this now.",
        "rating": "significantly",
        "is_safety": True,
        "safety_bin": "chosen_safe",
        "source": "simulated_annotator",
    }
