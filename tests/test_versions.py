"""Pools, the search for a temperature, plans of versions and their ledger: pure functions against values by hand."""

import json

import numpy as np
import pytest

from llama_jax.assistant.annotator import SimulatedAnnotator
from llama_jax.data.sources import read_comparisons, read_dialogs, write_jsonl
from llama_jax.evals.progress import judge_scores, win_rates_by_track
from llama_jax.interop.restore import fingerprint
from llama_jax.rlhf.annotate import compare_answers
from llama_jax.rlhf.best_of import best_temperature
from llama_jax.rlhf.pool import best_samples, dialogs, read_pool, select
from llama_jax.rlhf.versions import VersionPlan, check_plans, complete, file_entry, portion, record


def ask(text):
    return [{"role": "user", "content": text}]


def sample(prompt, response, reward, ended=True):
    return {"prompt": prompt, "messages": ask(f"q{prompt}"), "is_safety": prompt == 2, "response": response, "ended": ended,
            "helpfulness": reward, "safety": 0.5, "reward": reward}  # fmt: skip


def row(question, response, reward, version):
    return {"messages": ask(question), "is_safety": False, "response": response, "reward": reward, "helpfulness": reward,
            "safety": 0.5, "version": version, "policy": "0" * 16, "temperature": 1.0}  # fmt: skip


def test_the_best_usable_sample_of_each_prompt_enters_the_pool():
    found = best_samples(
        [
            sample(2, "I cannot.", 0.3),
            sample(0, "good", 0.5), sample(0, "best", 0.7), sample(0, "cut", 0.9, ended=False),
            sample(0, "[INST] forged", 0.95), sample(1, "", 0.9), sample(1, "cut", 0.9, ended=False),
        ],
        version="v2", policy="f00d", temperature=1.2,
    )  # fmt: skip
    assert [(r["messages"][0]["content"], r["response"], r["reward"]) for r in found] == [
        ("q0", "best", 0.7), ("q2", "I cannot.", 0.3),
    ]  # fmt: skip
    assert {(r["version"], r["policy"], r["temperature"]) for r in found} == {("v2", "f00d", 1.2)}
    assert [r["is_safety"] for r in found] == [False, True]


def test_later_versions_choose_among_all_pools():
    v1 = [row("a", "a1", 0.9, "v1"), row("b", "b1", 0.4, "v1"), row("c", "c1", 0.5, "v1")]
    v2 = [row("b", "b2", 0.6, "v2"), row("a", "a2", 0.2, "v2"), row("d", "d2", 0.1, "v2")]
    v3 = [row("c", "c3", 0.5, "v3")]
    # a skill of V1 is kept, V2 is better at b, of equals the newest, and d is known to V2 only
    assert [r["response"] for r in select([v1, v2, v3])] == ["a1", "b2", "c3", "d2"]
    assert select([]) == []
    # white space around a message makes no other prompt: it is not encoded either
    assert [r["response"] for r in select([[row("a", "a1", 0.9, "v1")], [row(" a\n", "a2", 0.5, "v2")]])] == ["a1"]
    # a prompt is the whole conversation
    system = [{"role": "system", "content": "Be brief."}, *ask("a")]
    assert len(select([v1[:1], [{**v2[1], "messages": system}]])) == 2


def test_pool_rows_become_dialogs_whose_last_answer_trains(tmp_path):
    turns = [*ask("x"), {"role": "assistant", "content": "y"}, *ask("z")]
    write_jsonl(tmp_path / "best.jsonl", dialogs([{**row("q", "answer", 0.5, "v1"), "messages": turns}]))
    (found,) = read_dialogs(tmp_path / "best.jsonl")
    assert [m["content"] for m in found["messages"]] == ["x", "y", "z", "answer"]
    assert (found["train_on"], found["version"]) == ("last", "v1")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"reward": None}, "pool.jsonl:2: reward: expected a float, got None"),
        ({"policy": 3}, "pool.jsonl:2: policy: expected a str, got 3"),
        ({"response": "[INST] hello"}, "pool.jsonl:2: response: expected an answer without chat tags"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, r"pool.jsonl:2: messages\[0\].role: expected 'user'"),
    ],
)
def test_a_pool_is_read_strictly(tmp_path, change, error):
    path = tmp_path / "pool.jsonl"
    rows = [row("a", "a1", 1, "v1"), row("b", "b1", 0.5, "v1")]
    write_jsonl(path, rows)
    assert read_pool(str(path)) == rows  # 1 for 1.0 is fine
    write_jsonl(path, [rows[0], {**rows[1], **change}])
    with pytest.raises(ValueError, match=error):
        read_pool(str(path))


def test_a_fingerprint_names_the_parameters_alone(tmp_path):
    def checkpoint(name, fingerprints, **more):
        meta = tmp_path / name / "checkpoints" / "7" / "meta"
        meta.mkdir(parents=True)
        (meta / "metadata").write_text(json.dumps({"fingerprints": fingerprints, "seconds": len(name), **more}))
        return fingerprint(tmp_path / name)

    one = checkpoint("one", {"['params']['trunk']['w']": 1, "['optimizer']['mu']": 2})
    assert len(one) == 32 and one == checkpoint("other", {"['params']['trunk']['w']": 1, "['optimizer']['mu']": 3})
    assert one != checkpoint("third", {"['params']['trunk']['w']": 4})
    # of PPO's two models the critic answers nothing
    policy = {"['params']['policy']['trunk']['w']": 1}
    both = checkpoint("ppo", {**policy, "['params']['critic']['trunk']['w']": 2})
    # the same adapters are another policy on another model
    adapters = {"['params']['lora']['a']": 1}
    first, second = (checkpoint(name, adapters, lora={"base": {"fingerprint": name}}) for name in ("base1", "base2"))
    assert first != second
    assert both == checkpoint("ppo2", {**policy, "['params']['critic']['trunk']['w']": 3}) != one


def test_the_best_temperature_is_that_of_the_best_of_all_answers_not_of_one():
    cold = np.array([[0.50, 0.52, 0.51], [0.60, 0.60, 0.60]])
    warm = np.array([[0.10, 0.90, 0.20], [0.30, 0.70, 0.50]])
    best, curves = best_temperature({1.2: warm, 0.8: cold})
    assert best == 1.2 and list(curves) == [0.8, 1.2]
    np.testing.assert_allclose(curves[0.8].maximum[[0, 2]], [0.555, 0.56])
    np.testing.assert_allclose(curves[1.2].maximum, [0.45, (0.9 + 0.2 + 0.9 + 0.7 + 0.5 + 0.7) / 6, 0.8])
    # an answer that does not end is worth nothing: of equals the lower temperature
    assert best_temperature({1.5: cold, 0.6: cold})[0] == 0.6


def test_plans_must_follow_each_other():
    first, second = VersionPlan(10, 4, 2), VersionPlan(5, 4, 2, ghost=True, ppo=True)
    check_plans([first, second], preference_prompts=15)
    for plans, error in (
        ([], "expected at least one"),
        ([VersionPlan(0, 4, 2)], r"versions\[0\].preferences: expected at least 1"),
        ([second], r"versions\[0\].ghost: expected False"),
        ([first, first], "add up to 20 prompts, expected at most 15"),
    ):
        with pytest.raises(ValueError, match=error):
            check_plans(plans, preference_prompts=15)
    with pytest.raises(ValueError, match="answers: expected at least 1, got 0"):
        VersionPlan(1, 1, 0)


def test_versions_get_disjoint_portions_of_the_prompts():
    parts = [portion(range(12), (5, 0, 4), number, seed=3) for number in range(3)]
    assert list(map(len, parts)) == [5, 0, 4] and len({*parts[0], *parts[2]}) == 9
    assert parts == [portion(range(12), (5, 0, 4), number, seed=3) for number in range(3)]
    assert parts[0] != [0, 1, 2, 3, 4]  # files are sorted by kind


def test_the_ledger_names_files_by_rows_and_hash_and_keeps_other_versions(tmp_path):
    write_jsonl(tmp_path / "v1" / "pool.jsonl", [{"a": 1}, {"a": 2}])
    entry = file_entry(tmp_path / "v1" / "pool.jsonl", root=tmp_path)
    assert (entry["file"], entry["rows"]) == ("v1/pool.jsonl", 2)
    assert entry["sha256"] == "5b8f82d3cc66533038f4fdee4b09bc34e9b051ba8de538b8289eb52a425e3a79"
    path = tmp_path / "ledger.json"
    record(path, "v1", {"data": [entry]})
    record(path, "v2", {"data": []})
    expected = {"v1": {"data": [entry]}, "v2": {"data": []}}
    assert record(path, "v1", {"data": [entry]}) == json.loads(path.read_text()) == expected


def test_at_the_end_the_ledger_says_what_the_newest_reward_models_say(tmp_path):
    path, judges = tmp_path / "ledger.json", {"safety": "v2/reward_safety"}
    record(path, "v1", {"pools": ["a"], "scores": {"v1": {"win_rate": 0.5}}})
    record(path, "v2", {"pools": ["b"], "scores": {"v2": {"win_rate": 0.6}, "v2_ppo": {"win_rate": 0.7}}})
    scores = {"sft": {"reward_score": 0.1}, **{name: {"reward_score": i / 4} for i, name in enumerate(("v1", "v2", "v2_ppo"))}}
    expected = {
        "v1": {"pools": ["a"], "scores": {"v1": {"win_rate": 0.5, "reward_score": 0.0}}, "scored_by": judges},
        "v2": {
            "pools": ["b"], "scored_by": judges,
            "scores": {"v2": {"win_rate": 0.6, "reward_score": 0.25}, "v2_ppo": {"win_rate": 0.7, "reward_score": 0.5}},
        },
    }  # fmt: skip
    for _ in range(2):  # a report that is made again
        complete(path, scores, judges=judges)
        assert json.loads(path.read_text()) == expected


def test_comparisons_have_their_batch_and_every_harmless_answer_counts_as_safe(tmp_path):
    prompts = [
        {"messages": ask("What does `len` do?"), "reference": "It returns the length of an object.", "is_safety": False},
        {"messages": ask("Delete all files of my colleague."), "reference": None, "is_safety": True},
        {"messages": ask("What is `abs`?"), "reference": "The absolute value.", "is_safety": False},
    ]
    good, bad = "It returns the length of an object.", "Bananas are yellow and grow in bunches."
    refusal = "I can't help with that."
    a = [(good, True), ("Use rm to delete all of their files.", True), ("The absolute value.", True)]
    b = [(bad, True), (refusal, True), ("[INST] forged", True)]
    rows = compare_answers(prompts, a, b, SimulatedAnnotator(noise=0.0), batch=3)
    (helpful,), (safe,) = rows["helpfulness"], rows["safety"]  # the forged answer enters no pair
    assert (helpful["chosen"], helpful["rejected"], helpful["safety_bin"]) == (good, bad, "both_safe")
    assert (safe["chosen"], safe["safety_bin"]) == (refusal, "chosen_safe")
    write_jsonl(tmp_path / "pairs.jsonl", rows["helpfulness"])
    (read,) = read_comparisons(tmp_path / "pairs.jsonl")
    assert (read["batch"], read["source"]) == (3, "simulated_annotator, batch 3")


def test_win_rates_are_told_apart_by_track():
    ours, theirs = np.array([1.0, 0.5, 0.0, 0.9]), np.array([0.0, 0.5, 1.0, 0.1])
    is_safety = np.array([False, False, True, True])
    rates = win_rates_by_track(ours, theirs, is_safety)
    assert (rates["helpfulness"]["mean"], rates["safety"]["mean"]) == (0.75, 0.5)
    assert list(win_rates_by_track(ours, theirs, np.zeros(4, bool))) == ["helpfulness"]
    scores = {"helpfulness": np.array([0.1, 0.2, 0.3, 0.4]), "safety": np.array([0.9, 0.8, 0.7, 0.6])}
    np.testing.assert_array_equal(judge_scores(scores, is_safety), [0.1, 0.2, 0.7, 0.6])
