"""Early stopping: patience by hand, a loop with hand-made rewards, PPO and GRPO on held-out prompts; all resumed to the bit."""

import dataclasses
import json
import math
import os
import signal

import jax
import numpy as np
import pytest
import small_runs
from jax.sharding import NamedSharding, PartitionSpec
from test_rlhf import FROZEN, MODEL, MODELS, RULE
from test_training import Rollouts, assert_equal, final, loop, mesh_of, stage

from llama_jax.config import ConfigError, describe
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.reward.scorers import OtherScores
from llama_jax.rlhf.held_out import held_out_batches, make_evaluate, make_measure
from llama_jax.rlhf.reinforce import collate_prompts
from llama_jax.rlhf.rollout import Roller
from llama_jax.sampling.generate import make_sampler
from llama_jax.train import run
from llama_jax.training import checkpoint
from llama_jax.training.fingerprint import fingerprints
from llama_jax.training.loop import train
from llama_jax.training.metrics import read_metrics
from llama_jax.training.patience import Patience, Rule
from llama_jax.training.preemption import Preempted
from llama_jax.training.saved import read_meta, written_steps
from llama_jax.training.stage import LoopConfig
from llama_jax.training.workdir import claim


def test_patience_by_hand():
    patience = Patience(Rule("reward", "max", 3, least=0.05))
    seen = [patience.see(step, {"reward": r}) for step, r in enumerate((0.5, 0.54, 0.56, math.nan, 0.6))]
    assert seen == [True, False, True, False, False] and (patience.step, patience.since) == (2, 2)
    assert not patience.exhausted and patience.rank(best=True) == {"reward": 0.56}
    resumed = Patience(patience.rule)
    resumed.restore(json.loads(json.dumps(patience.state())))
    assert not resumed.see(5, {"reward": 0.56}) and resumed.exhausted and resumed.held_out == {"reward": 0.56}
    assert resumed.report(5) == "stopped at step 5: the best held-out reward is 0.56, of step 2"
    other = Patience(Rule("loss", "min", 3))
    other.restore(patience.state())  # of another metric
    assert not other.seen and other.see(0, {"loss": 2.0}) and other.see(1, {"loss": 1.9}) and not other.see(2, {"loss": 1.9})
    with pytest.raises(ConfigError, match="keep_best=loss: no such held-out metric; there are reward"):
        other.rule.check({"reward": 1.0})
    Rule("", "min", 0).check({"reward": 1.0})


@pytest.mark.parametrize("changes", [{"patience": 2, "eval_every": 2}, {"patience": 2, "keep_best": "loss"}])
def test_patience_needs_a_metric_and_a_time(changes):
    with pytest.raises(ValueError, match="loop.patience=2: expected loop.keep_best, .* and loop.eval_every"):
        LoopConfig(steps=8, batch_size=4, **changes)


# ---- the loop, rewards made by hand ----

REWARDS = (0.1, 0.4, 0.7, 0.6, 0.65, 0.9)  # at steps 0, 2, 4, 6, 8, 10
PATIENCE = {"steps": 12, "eval_every": 2, "keep_best": "reward", "keep_best_mode": "max", "patience": 2, "keep": 1}


class Rewards:
    """The n-th parameters that are measured get the n-th reward; the same parameters always the same."""

    def __init__(self, rewards=REWARDS):
        self.rewards, self.known = rewards, {}

    def __call__(self, params):
        key = tuple(fingerprints(params).values())
        self.known.setdefault(key, len(self.known))
        return {"reward": self.rewards[self.known[key]], "number": float(self.known[key])}


def measurements(workdir):
    """The held-out rewards in the log, by the number of steps before them."""
    log = read_metrics(workdir)
    return {int(step) + 1: value for step, value in zip(log["step"], log["held_out/reward"]) if not math.isnan(value)}


@pytest.fixture(scope="module")
def mesh():
    return mesh_of()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, mesh):
    """A run that stopped after step 8, since nothing was better than step 4; its summary and what measured it."""
    workdir, rewards = tmp_path_factory.mktemp("early") / "whole", Rewards()
    summary = train(stage(mesh, source=Rollouts(), evaluate=rewards), loop(**PATIENCE), mesh=mesh, workdir=workdir)
    return workdir, summary, rewards


def test_a_run_stops_and_its_best_checkpoint_is_its_result(stopped, mesh):
    workdir, summary, _ = stopped
    assert (summary["steps"], summary["best_step"], summary["held_out"]) == (8, 4, {"reward": 0.7, "number": 2.0})
    assert max(written_steps(workdir)) == 4 and final(workdir, mesh)[2] == 4
    assert sorted(path.name for path in (workdir / "after_best").iterdir()) == ["6"]
    assert measurements(workdir) == dict(zip((0, 2, 4, 6, 8), REWARDS))


def test_patience_begins_when_what_is_measured_moves(mesh, tmp_path):
    """While PPO's critic warms up, every measurement would be the first one again, and patience would end the run there."""
    made = dataclasses.replace(stage(mesh, source=Rollouts(), evaluate=Rewards((0.1, 0.4, 0.7, 0.6, 0.65))), still=6)
    summary = train(made, loop(**{**PATIENCE, "steps": 16}), mesh=mesh, workdir=tmp_path)
    assert measurements(tmp_path) == {0: 0.1, 8: 0.4, 10: 0.7, 12: 0.6, 14: 0.65}
    assert (summary["steps"], summary["best_step"]) == (14, 10)


@pytest.mark.parametrize("at", [1, 5])
def test_interrupted_it_stops_at_the_same_step_with_the_same_bits(stopped, mesh, tmp_path, at):
    def interrupt():
        raise KeyboardInterrupt

    workdir, summary, rewards = stopped
    with pytest.raises(KeyboardInterrupt):
        broken = stage(mesh, source=Rollouts(interrupt=interrupt, at=at), evaluate=rewards)
        train(broken, loop(**PATIENCE), mesh=mesh, workdir=tmp_path)
    again = train(stage(mesh, source=Rollouts(), evaluate=rewards), loop(**PATIENCE), mesh=mesh, workdir=tmp_path)
    assert len(rewards.known) == 5  # no parameters but those of the whole run
    assert {name: again[name] for name in ("steps", "best_step", "held_out")} == {
        name: summary[name] for name in ("steps", "best_step", "held_out")
    }
    assert_equal(final(tmp_path, mesh), final(workdir, mesh))


@pytest.mark.parametrize("at", [0, 3, 4, 6])
def test_sigterm_in_the_middle_of_a_rollout_saves_the_steps_before_it(mesh, tmp_path, at):
    def preempt():
        raise Preempted

    expected = train(stage(mesh, source=Rollouts()), loop(), mesh=mesh, workdir=tmp_path / "whole")
    with pytest.raises(Preempted):
        train(stage(mesh, source=Rollouts(interrupt=preempt, at=at)), loop(), mesh=mesh, workdir=tmp_path / "parts")
    assert max(written_steps(tmp_path / "parts"), default=0) == at  # checkpoints come after 3 and 6 steps by themselves
    again = train(stage(mesh, source=Rollouts()), loop(), mesh=mesh, workdir=tmp_path / "parts")
    assert again["metrics"] == expected["metrics"]
    assert_equal(final(tmp_path / "parts", mesh), final(tmp_path / "whole", mesh))


def test_sigterm_in_the_middle_of_an_evaluation_saves_and_measures_when_the_run_goes_on(mesh, tmp_path):
    calls, rewards = [], Rewards()

    def preempted(params):
        calls.append(0)
        if len(calls) == 3:  # of step 4
            raise Preempted
        return rewards(params)

    expected = train(stage(mesh, source=Rollouts(), evaluate=rewards), loop(**PATIENCE), mesh=mesh, workdir=tmp_path / "whole")
    with pytest.raises(Preempted):
        train(stage(mesh, source=Rollouts(), evaluate=preempted), loop(**PATIENCE), mesh=mesh, workdir=tmp_path / "parts")
    assert read_meta(tmp_path / "parts")["step"] == 4 and read_meta(tmp_path / "parts")["unmeasured"]
    again = train(stage(mesh, source=Rollouts(), evaluate=rewards), loop(**PATIENCE), mesh=mesh, workdir=tmp_path / "parts")
    for name in ("steps", "best_step", "held_out"):
        assert again[name] == expected[name]
    assert measurements(tmp_path / "parts") == measurements(tmp_path / "whole")


@pytest.mark.parametrize(("changes", "kept"), [
    (PATIENCE, [4]),
    ({**PATIENCE, "patience": 0, "eval_every": 0, "checkpoint_every": 4, "steps": 8}, [4, 8]),  # the best, and the newest
])  # fmt: skip
def test_sigterm_saves_without_an_evaluation_which_comes_first_when_the_run_goes_on(mesh, tmp_path, changes, kept):
    """After step 4, of the best parameters: they are ranked, and measured as a stage's result, when they are known to be."""

    def stopped_by(rewards, **interrupted):
        made = stage(mesh, source=Rollouts(**interrupted), evaluate=rewards)
        return dataclasses.replace(made, measure=lambda params: {"score": rewards(params)["number"]})

    rewards = Rewards((0.1, 0.4, 0.7, 0.6, 0.65) if changes is PATIENCE else (0.5, 0.7, 0.6))
    whole = train(stopped_by(rewards), loop(**changes), mesh=mesh, workdir=tmp_path / "whole")
    calls = []
    with pytest.raises(Preempted):
        terminate = {"interrupt": lambda: calls.clear() or os.kill(os.getpid(), signal.SIGTERM), "at": 3}
        told = stopped_by(lambda params: calls.append(0) or rewards(params), **terminate)
        train(told, loop(**changes), mesh=mesh, workdir=tmp_path / "parts")
    assert not calls and read_meta(tmp_path / "parts")["step"] == 4
    again = train(stopped_by(rewards), loop(**changes), mesh=mesh, workdir=tmp_path / "parts")
    for name in {"steps", "best_step", "held_out"} & whole.keys():
        assert again[name] == whole[name]
    assert written_steps(tmp_path / "parts") == written_steps(tmp_path / "whole") == kept
    assert measurements(tmp_path / "parts") == measurements(tmp_path / "whole")
    assert read_meta(tmp_path / "parts").get("score") == read_meta(tmp_path / "whole").get("score")
    assert_equal(final(tmp_path / "parts", mesh), final(tmp_path / "whole", mesh))


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_its_very_end_it_ends_the_same(stopped, mesh, tmp_path, monkeypatch, before):
    """Before or after the best checkpoint is made the newest; a checkpoint of the step at which patience ends is there."""
    make_newest = checkpoint.Checkpoints.make_newest

    def kill(self, *which):
        if not before:
            make_newest(self, *which)
        raise KeyboardInterrupt

    workdir, summary, rewards = stopped
    config = loop(**PATIENCE, checkpoint_every=4)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.Checkpoints, "make_newest", kill)
        train(stage(mesh, source=Rollouts(), evaluate=rewards), config, mesh=mesh, workdir=tmp_path)
    assert max(written_steps(tmp_path)) == (8 if before else 4)
    again = train(stage(mesh, source=Rollouts(), evaluate=rewards), config, mesh=mesh, workdir=tmp_path)
    assert (again["steps"], again["best_step"], len(rewards.known)) == (8, 4, 5)
    assert final(tmp_path, mesh)[1] == final(workdir, mesh)[1]


def test_a_run_that_only_gets_worse_ends_with_its_start(mesh, tmp_path):
    rewards = Rewards((0.9, 0.8, math.nan))
    summary = train(stage(mesh, evaluate=rewards), loop(**PATIENCE), mesh=mesh, workdir=tmp_path)
    assert (summary["steps"], summary["best_step"], read_meta(tmp_path)["step"]) == (4, 0, 0)


def test_the_best_of_a_run_that_came_to_its_end_is_its_result(mesh, tmp_path):
    """What a stage measures of its result is measured of the best, last of all."""
    rewards, measured = Rewards((0.1, 0.2, 0.9, 0.3, 0.4)), []

    def measure(params):
        measured.append(rewards(params)["number"])
        return {"score": measured[-1]}

    made = dataclasses.replace(stage(mesh, evaluate=rewards), measure=measure)
    summary = train(made, loop(**{**PATIENCE, "steps": 8, "patience": 5}), mesh=mesh, workdir=tmp_path)
    assert (summary["steps"], summary["best_step"], read_meta(tmp_path)["step"]) == (8, 4, 4)
    assert measured == [0, 1, 2] and read_meta(tmp_path)["score"] == 2


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its config.json knows no patience: that is the default, and no other value will do."""
    config = LoopConfig(steps=8, batch_size=4)
    old = {name: value for name, value in describe(config).items() if name not in ("patience", "least_gain")}
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(old))
    claim(tmp_path, describe(config), kind=LoopConfig)
    changed = dataclasses.replace(config, patience=2, eval_every=2, keep_best="loss")
    with pytest.raises(ConfigError, match="patience: 0 -> 2"):
        claim(tmp_path, describe(changed), kind=LoopConfig)


# ---- the held-out reward ----


def evaluate_with(mesh, *, most, score):
    frozen, models = jax.device_put((FROZEN, MODELS), NamedSharding(mesh, PartitionSpec()))
    roller = Roller(
        sample=make_sampler(
            MODEL, params.table(MODEL, head="lm_head"), compute=FLOAT32, eos_id=2, max_new_tokens=6, temperature=0.8
        ),
        judge=None, frozen=frozen, keys=None,
    )  # fmt: skip
    examples = [(i % 3 == 0, [1, 3 + i, 4 + i][: 2 + i % 2], i) for i in range(7)]
    batches = held_out_batches(examples, lambda rows: collate_prompts(rows, length=4), most=most, mesh=mesh)
    measure = make_measure(MODEL, FLOAT32, RULE)
    return make_evaluate(roller, batches, measure, score=score, seed=3, mesh=mesh)(models), batches


def test_each_held_out_prompt_counts_once_whatever_the_batches():
    rows = []

    def score(numbers, tokens, mask):  # a prompt's number in the file, for whoever answers it
        del tokens, mask
        rows.append(np.asarray(numbers).tolist())
        found = jax.numpy.asarray(numbers, jax.numpy.float32)
        return OtherScores(found, {"rules:number": 10 * found})

    mesh = mesh_of()
    with jax.set_mesh(mesh):
        whole, batches = evaluate_with(mesh, most=100, score=score)
        parts, filled = evaluate_with(mesh, most=4, score=score)
    assert [len(b.weight) for b in batches] == [7] and [b.weight.tolist() for b in filled] == [[1] * 4, [1, 1, 1, 0]]
    assert rows == [[*range(7)], [0, 1, 2, 3], [4, 5, 6, 0]]
    assert set(whole) == set(parts) == {
        "reward", "score/helpfulness", "score/safety", "score/other", "score/rules:number", "kl", "eos_rate", "response_length"
    }  # fmt: skip
    assert whole["score/rules:number"] == 30.0
    assert whole["score/other"] == parts["score/other"] == 3.0  # (0 + ... + 6) / 7
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5), name
    assert 0 < whole["score/safety"] < 1 and 1 <= whole["response_length"] <= 6


@pytest.mark.slow
def test_on_four_devices_the_held_out_reward_is_the_same():
    found = []
    for mesh in (mesh_of(), mesh_of(data=2, fsdp=2)):
        with jax.set_mesh(mesh):
            values, batches = evaluate_with(mesh, most=8, score=None)
            found.append(values)
    assert [b.weight.tolist() for b in batches] == [[1] * 7 + [0]]  # rows that four devices can divide
    assert found[1] == pytest.approx(found[0], rel=1e-4) and "score/other" not in found[0]


def length_rule(rows, responses):
    """A scorer: short answers are good."""
    return [-float(len(text)) for text in responses]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_stage_stops_on_held_out_reward_and_resumes_to_the_bit(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    small_runs.prepare(tmp_path)
    changes = {"helpfulness": "", "safety": "", "reward": {"scorers": ("test_early_stop:length_rule",)}}
    if kind == "ppo":  # without a reward model the critic would warm up first, in which nothing is measured (see above)
        changes["ppo"] = {"critic_warmup": 0}
    values = small_runs.values(
        tmp_path, kind, steps=40, data={"held_out": str(tmp_path / "prompts.jsonl")}, **changes,
        loop={"batch_size": 8, "eval_every": 2, "checkpoint_every": 3, "keep_best": "reward", "keep_best_mode": "max",
              "patience": 2, "least_gain": 0.5},
        optim={"lr": 3e-3},
    )  # fmt: skip
    summary = run(values, tmp_path / "whole")
    assert summary["steps"] == summary["best_step"] + 4 < 40  # two evaluations in vain
    assert read_meta(tmp_path / "whole")["step"] == summary["best_step"]
    measured = measurements(tmp_path / "whole")
    assert sorted(measured) == list(range(0, summary["steps"] + 1, 2))
    assert measured[summary["best_step"]] == summary["held_out"]["reward"]
    assert {"eos_rate", "response_length", "reward", "reward_apart", "score/other", "kl",
            "score/test_early_stop:length_rule"} == set(summary["held_out"])  # fmt: skip

    save = checkpoint.Checkpoints.save

    def kill(self, step, *rest):
        save(self, step, *rest)
        if step == 3:  # between two evaluations, in the middle of a rollout
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.Checkpoints, "save", kill)
        run(values, tmp_path / "broken")
    again = run(values, tmp_path / "broken")
    assert (again["steps"], again["held_out"]) == (summary["steps"], summary["held_out"])
    assert read_meta(tmp_path / "broken")["fingerprints"] == read_meta(tmp_path / "whole")["fingerprints"]


def test_early_stopping_without_held_out_prompts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    small_runs.prepare(tmp_path)
    values = small_runs.values(tmp_path, "ppo", steps=4, loop={"eval_every": 2, "keep_best": "reward", "patience": 1})
    with pytest.raises(ConfigError, match="keep_best=reward: ppo measures nothing on held-out data"):
        run(values, tmp_path / "refused")
