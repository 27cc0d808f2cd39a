"""Prompts of several files for PPO, GRPO and rejection sampling: whole, or in shares of a mix."""

import dataclasses
import sys
import types

import numpy as np
import pytest
import small_runs
from absl import flags
from ml_collections import config_flags

from configs import common
from llama_jax.config import ConfigError, describe, differences, parse_flags, with_defaults
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.model.config import SIZES
from llama_jax.rlhf import drawn, rejection
from llama_jax.rlhf.reinforce import RolloutData, encode_prompts, mixed_prompts, rollout_prompts
from llama_jax.steps import change, load_config
from llama_jax.train import parse_stage, run
from llama_jax.training.stage import LoopConfig

FIELDS = {"ppo": "data", "grpo": "data", "rejection": "rejection"}  # stage -> the group with its prompts


class Letters:
    """As much of a tokenizer as prompts need."""

    def encode(self, text, *, bos):
        return [1] * bos + [3 + ord(letter) % 90 for letter in text]


@pytest.fixture
def files(tmp_path):
    """Thirty prompts, of which ten are too long, and forty adversarial ones, of which twenty are."""
    for name, count, long in (("plain", 30, lambda i: i % 3 == 0), ("adversarial", 40, lambda i: i % 2)):
        rows = [{"prompt": f"{name[0]}{i}" + "x" * (40 * long(i)), "is_safety": name != "plain"} for i in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return tuple(str(tmp_path / f"{name}.jsonl") for name in ("plain", "adversarial"))


def asked(prompts):
    return [row["messages"][0]["content"] for row, _ in prompts]


def mixed(prompts, *shares, seed=0):
    return mixed_prompts(RolloutData(prompts, 30, shares=shares), Letters(), seed=seed)


def test_one_file_is_read_in_its_order_and_others_fill_their_share(files):
    plain, adversarial = (encode_prompts(path, Letters(), length=30) for path in files)
    assert (len(plain), len(adversarial)) == (20, 20)
    assert mixed(files[0]) == mixed(files[:1]) == mixed(files[0], 0.0) == mixed(files[0], seed=1) == plain
    assert mixed(files) == mixed(files, 0.0, 0.0) == [*plain, *adversarial]
    found = mixed(files, 0.0, 0.2)
    assert found[:20] == plain and len(found) == 25  # prompts that are too long are no part of a share
    drawn_at = [adversarial.index(prompt) for prompt in found[20:]]
    assert drawn_at == sorted(set(drawn_at)) and drawn_at != list(range(5))  # out of the whole file, which may be sorted
    assert found == mixed(files, 0.0, 0.2) and found != mixed(files, 0.0, 0.2, seed=1)


@pytest.mark.parametrize("stage", FIELDS)
@pytest.mark.parametrize(("prompts", "shares", "message"), [
    (("a", "b"), (0.1,), "shares: expected one for each of the 2 files of {}.prompts, got 1"),
    ("a", (0.0, 0.1), "shares: expected one for each of the 1 files of {}.prompts, got 2"),
    (("a", "b"), (0.5, 0.5), "shares: expected 0 for a file that is taken whole"),
    ((), (), "prompts: expected at least one file, got none"),
    ("", (), "prompts: expected a file, got nothing"),
    (("a", " "), (), "prompts: expected a file, got nothing"),
])  # fmt: skip
def test_files_that_make_no_mix_are_refused_before_they_are_read(stage, prompts, shares, message):
    values, group = load_config(small_runs.ROOT / "configs", f"{stage}.py:tiny"), FIELDS[stage]
    change(values, {group: {"prompts": prompts, "shares": shares}}, where=stage)
    with pytest.raises(ConfigError, match=f"{group}." + message.format(group)):
        parse_stage(values)


def test_a_prompts_row_is_its_place_among_the_rows_of_all_files(files):
    config = types.SimpleNamespace(
        stage="grpo", data=RolloutData(files, 30, shares=(0.0, 0.2)), loop=LoopConfig(steps=1, batch_size=8, seed=3)
    )
    settings, model = types.SimpleNamespace(rollout_size=40, new_tokens=8), types.SimpleNamespace(max_length=64)
    batches, rows = rollout_prompts(config, settings, Letters(), model, None, answers=8)
    expected = mixed_prompts(config.data, Letters(), seed=3)
    assert rows == [row for row, _ in expected]
    seen = []
    for step in range(5):  # an epoch
        batch = batches.batch(step)
        for number, tokens, valid, is_safety in zip(batch.row, batch.tokens, batch.valid, batch.is_safety):
            assert tokens[valid].tolist() == expected[number][1] and is_safety == rows[number]["is_safety"]
        seen += batch.row.tolist()
    assert sorted(seen) == list(range(25)) and sum(rows[number]["is_safety"] for number in seen) == 5


def test_a_config_holds_one_file_or_a_tuple_and_nothing_else():
    for stage, group in FIELDS.items():
        values = load_config(small_runs.ROOT / "configs", f"{stage}.py:tiny")
        assert getattr(parse_stage(values), group).prompts == "prompts.jsonl"
        for given, held in (("a", "a"), (("a", "b"), ("a", "b")), (["a"], ("a",)), ('("a", "b")', ("a", "b"))):
            change(values, {group: {"prompts": given}}, where=stage)
            config = parse_stage(values)
            assert getattr(config, group).prompts == held and values.to_dict()[group]["prompts"] == held
        with pytest.raises(ConfigError, match=rf"{stage}.{group}.prompts: expected a tuple, got 3"):
            change(values, {group: {"prompts": 3}}, where=stage)
        # A run from before there were shares goes on.
        described = describe(config)
        del described[group]["shares"]
        assert differences(with_defaults(type(config), described), describe(config)) == []


def flagged(stage, *arguments, default=None):
    """The config as the command's flags make it."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", values)
    argv = ["train", f"--config={small_runs.ROOT}/configs/{stage}.py:tiny", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for the fields
        if default:
            patch.setattr(common.Files, "__init__", lambda self, _: super(common.Files, self).__init__(default, (str, tuple)))
        parse_flags(argv)
    return getattr(parse_stage(values.config), FIELDS[stage])


@pytest.mark.parametrize("stage", FIELDS)
def test_files_of_prompts_on_the_command_line(stage):
    flag = f"--config.{FIELDS[stage]}"
    for word in ("prompts.jsonl", "/data/my prompts, all.jsonl", "gs://bucket/a-b.jsonl", "7"):
        assert flagged(stage, f"{flag}.prompts={word}").prompts == flagged(stage, f"{flag}.prompts", word).prompts == word
    found = flagged(stage, f"{flag}.prompts=('a.jsonl','b.jsonl')", f"{flag}.shares=(0.0,0.1)")
    assert (found.prompts, found.shares) == (("a.jsonl", "b.jsonl"), (0.0, 0.1))
    # A config file that names several.
    assert flagged(stage, default=("a", "b")).prompts == ("a", "b")
    assert flagged(stage, f"{flag}.prompts=c.jsonl", default=("a", "b")).prompts == ("c.jsonl",)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Data and random models, of `small_runs`."""
    small_runs.prepare(tmp_path)
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    return tmp_path


def test_what_was_drawn_stays_until_a_file_or_a_share_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "fingerprint", lambda workdir: "0123456789abcdef")
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in "ab")
    for file in files:
        write_jsonl(file, [{"prompt": "?"}])

    def config(prompts, shares=()):
        values = load_config(small_runs.ROOT / "configs", "rejection.py:tiny")
        changes = {"policy": "chat", "safety": "s", "rejection": {"prompts": prompts, "shares": shares}}
        change(values, changes, where="rejection")
        return parse_stage(values)

    def stale(prompts, shares=()):
        """Whether what is half drawn is put aside; it is begun anew then."""
        if not (workdir / "samples").exists():
            write_jsonl(workdir / "samples" / "0-1.jsonl", [{}])
        under = rejection.put_stale_aside(config(prompts, shares), workdir)
        gone = not (workdir / "samples").exists()
        drawn.note(workdir, "samples", *under["samples"])
        return gone

    workdir = tmp_path / "run"
    settings, models = rejection.put_stale_aside(config(files[0]), workdir)["samples"]
    assert "shares" not in settings["rejection"]  # as it was before there were any
    assert set(models) == {"policy", "prompts", "safety"}
    drawn.note(workdir, "samples", settings, models)
    assert [stale(files[0]), stale(files), stale(files)] == [False, True, False]
    assert set(drawn.fingerprints(workdir, "samples")) == {"policy", "prompts[0]", "prompts[1]", "safety"}
    assert [stale(files, (0.0, 0.5)), stale(files, (0.0, 0.5)), stale(files, (0.0, 0.2))] == [True, False, True]
    write_jsonl(files[1], [{"prompt": "?"}, {"prompt": "!"}])
    assert [stale(files, (0.0, 0.2)), stale(files, (0.0, 0.2))] == [True, False]


def test_a_round_chooses_its_prompts_from_the_mix(files, tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "fingerprint", lambda workdir: "0123456789abcdef")
    drawn.note(tmp_path, "samples", {}, {"policy": "policy"})
    values = load_config(small_runs.ROOT / "configs", "rejection.py:tiny")
    own = {"prompts": files, "shares": (0.0, 0.2), "prompt_length": 30, "max_prompts": 24}
    change(values, {"rejection": own}, where="rejection")

    def samples(prompts, **_):
        return [{"messages": row["messages"], "is_safety": row["is_safety"], "prompt": i, "response": "yes", "ended": True,
                 "reward": 0.5} for i, (row, _) in enumerate(prompts)]  # fmt: skip

    models = types.SimpleNamespace(config=parse_stage(values), tokenizer=Letters(), samples=samples)
    rejection.gather_pool(models, tmp_path)
    found = [row["messages"][0]["content"] for _, row in read_jsonl(tmp_path / "samples.jsonl")]
    assert len(set(found)) == 24 and set(found) < set(asked(mixed(files, 0.0, 0.2)))


def adversarial(rows, responses):
    """A scorer: 1 for a prompt of small_runs' adversarial file."""
    return [float("risk" in row) for row in rows]


@pytest.mark.parametrize("stage", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_run_on_a_mix(directory, stage):
    """Scorers see the rows of both files."""
    data = {"prompts": tuple(str(directory / f"{name}.jsonl") for name in ("prompts", "adversarial")), "shares": (0.0, 0.5)}
    reward = {"scorers": ("test_prompt_mix:adversarial",)}
    values = small_runs.values(directory, stage, steps=8, data=data, reward=reward, helpfulness="", safety="")
    run(values, directory / "run")
    lines = [row for _, row in read_jsonl(directory / "run" / "metrics.jsonl")]
    rewards = [row["reward"] for row in lines if "reward" in row]  # of each iteration's rollout
    # PPO has asked 64 prompts, which is an epoch; GRPO four an iteration.
    assert np.mean(rewards) == pytest.approx(0.5, abs=1e-6 if stage == "ppo" else 0.25)


@pytest.mark.slow
def test_a_round_on_a_mix(directory):
    several = tuple(str(directory / f"{name}.jsonl") for name in ("prompts", "adversarial"))
    own = {"prompts": several, "shares": (0.0, 0.2), "max_prompts": 64, "temperatures": ()}
    values = small_runs.values(directory, "rejection", steps=2, rejection=own, data={"length": 64})
    assert run(values, directory / "run")["steps"] == 2
    samples = [row for _, row in read_jsonl(directory / "run" / "samples.jsonl")]
    assert len(samples) == 4 * 40  # 32 prompts, and 8 more are a fifth
    assert sum(row["is_safety"] for row in samples) == 4 * (11 + 8)
