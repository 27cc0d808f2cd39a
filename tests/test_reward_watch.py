"""The alarm for reward hacking, by hand: when it is given, and that a resumed run gives the same."""

import numpy as np

from llama_jax.rlhf.reward_watch import RewardWatch, watched

# (rewards of the rollouts since the last evaluation, held-out reward, evaluations in a row in which they moved apart)
INTERVALS = [
    ([], 0.50, 0),  # before the first rollout
    ([0.40, 0.60], 0.52, 0),
    ([0.70], 0.50, 1),
    ([0.65, 0.85], 0.45, 2),
    ([], 0.44, 0),  # nothing was rolled out in between
    ([0.90], 0.43, 3),
    ([0.80], 0.40, 0),  # both fall
    ([0.85], 0.45, 0),  # both rise
    ([0.90], 0.42, 1),
]


def measure(watch, intervals):
    found = []
    for rewards, held_out, _ in intervals:
        for reward in rewards:
            watch.trained(reward)
        found.append(watch.measured(held_out))
    return found


def test_training_rewards_that_rise_while_held_out_ones_fall_are_counted():
    assert measure(RewardWatch(), INTERVALS) == [apart for *_, apart in INTERVALS]


def test_saved_at_any_evaluation_it_counts_on_to_the_bit():
    for at in range(len(INTERVALS)):
        watch, resumed = RewardWatch(), RewardWatch()
        measure(watch, INTERVALS[:at])
        watch.trained(0.1)  # in the middle of an interval
        resumed.restore(watch.state())
        assert measure(resumed, INTERVALS[at:]) == measure(watch, INTERVALS[at:])
        assert resumed.state().dtype == np.float32 and resumed.state().tobytes() == watch.state().tobytes()


def test_the_warning_names_both_rewards_and_comes_from_the_third_time_on(caplog):
    held_out = iter(value for _, value, _ in INTERVALS)
    watch = RewardWatch()
    evaluate = watched(lambda params: {"reward": next(held_out), "kl": 0.1}, watch, "ppo")
    found = []
    for rewards, *_ in INTERVALS[:6]:
        for reward in rewards:
            watch.trained(reward)
        found.append(evaluate({}))
    assert [row["reward_apart"] for row in found] == [0, 0, 1, 2, 0, 3] and found[0]["kl"] == 0.1
    (record,) = caplog.records
    said = "3 evaluations in a row the training reward rose, to 0.9, while that of held-out prompts fell, from 0.45 to 0.43"
    assert record.getMessage().startswith(f"ppo: for {said}")
    assert watched(None, watch, "ppo") is None


def test_rewards_that_are_noise_are_seldom_told(caplog):
    """Of 50 runs of 80 evaluations, 9 here; where two in a row were told, 46."""
    rng, told = np.random.default_rng(0), 0
    for _ in range(50):
        watch = RewardWatch()
        evaluate = watched(lambda params: {"reward": rng.normal()}, watch, "ppo")
        for _ in range(80):
            watch.trained(rng.normal())
            evaluate({})
        told += bool(caplog.records)
        caplog.clear()
    assert told <= 10
