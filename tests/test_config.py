"""The border: every config of the paper parses into its dataclass, its numbers are the paper's, mistakes are one line."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import common
from llama_jax.config import ConfigError, describe, differences, parse, parse_flags
from llama_jax.corpus import CorpusConfig
from llama_jax.model.config import SIZES
from llama_jax.recipe_config import RecipeConfig
from llama_jax.steps import change, load_config
from llama_jax.train import STAGES, parse_stage

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name: str) -> Any:
    return load_config(CONFIGS, name)


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate: expected 0 or more, got {self.rate}")


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner
    files: tuple[str, ...] = ()
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    named: dict[str, Inner] = dataclasses.field(default_factory=dict)
    label: str | None = None
    flag: bool = False


GOOD = {"steps": 3, "inner": {"rate": 1}}


def test_parse_converts_a_nested_config_dict():
    values = ConfigDict({**GOOD, "files": ["x", "y"], "shares": {"p": 1}, "named": {"q": {"rate": 2.0, "kind": "b"}}})
    config = parse(Outer, values)
    assert config == Outer(3, Inner(1.0), ("x", "y"), {"p": 1.0}, {"q": Inner(2.0, "b")})
    assert isinstance(config.inner.rate, float) and isinstance(config.shares["p"], float)
    assert parse(Outer, describe(config)) == config


@pytest.mark.parametrize(("changes", "words"), [
    ({"step": 1}, ["config.step: unknown field of Outer", "did you mean 'steps'"]),
    ({"inner": {"rates": 1.0}}, ["config.inner.rates", "did you mean 'rate'"]),
    ({"zzz": 1}, ["config.zzz", "expected one of steps, inner, files"]),
    ({"inner": {}}, ["config.inner.rate: missing", "float"]),
    ({"inner": 3}, ["config.inner", "fields of Inner", "got 3"]),
    ({"inner": {"rate": -1.0}}, ["config.inner", "expected 0 or more, got -1.0"]),
    ({"inner": {"rate": 1.0, "kind": "c"}}, ["config.inner.kind", "'a', 'b'", "got 'c'"]),
    ({"steps": 1.5}, ["config.steps: expected a int, got 1.5 (float)"]),
    ({"steps": True}, ["config.steps", "got True"]),
    ({"flag": 1}, ["config.flag: expected a bool, got 1"]),
    ({"files": "x"}, ["config.files: expected a sequence, got 'x'"]),
    ({"files": ("x", 2)}, ["config.files[1]: expected a str, got 2"]),
    ({"shares": {"p": "much"}}, ["config.shares.p: expected a float, got 'much'"]),
    ({"named": {"q": {"rat": 1.0}}}, ["config.named.q.rat", "did you mean 'rate'"]),
])  # fmt: skip
def test_each_mistake_names_the_field_what_was_expected_and_what_came(changes, words):
    with pytest.raises(ConfigError) as error:
        parse(Outer, {**GOOD, **changes})
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_differences_name_every_leaf():
    old = describe(parse(Outer, GOOD))
    new = describe(parse(Outer, {**GOOD, "steps": 4, "inner": {"rate": 1.0, "kind": "b"}, "shares": {"p": 0.5}}))
    assert differences(old, old) == []
    assert differences(old, new) == ["inner.kind: 'a' -> 'b'", "shares.p: '(absent)' -> 0.5", "steps: 3 -> 4"]


@pytest.mark.parametrize("size", common.SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_parses_at_every_size(stage, size):
    for suffix in ("", ",safety") if stage == "reward" else ("",):
        values = load(f"{stage}.py:{size}{suffix}")
        config = parse_stage(values)
        assert (config.stage, config.model) == (stage, size)
        # A field of the dataclass that the config leaves to its default would be a number hidden in the code.
        assert set(describe(config)) == set(values.keys())
        groups = ("compute", "mesh", "lora", "optim", "loop", "data", "ppo", "grpo", "reward", "dpo", "rejection", "ghost")
        for group in (*groups, "distill"):
            if group in values:
                assert set(describe(config)[group]) == set(values[group].keys()), group


def test_the_sizes_of_the_configs_are_those_of_the_model():
    assert set(common.SIZES) == set(SIZES) - {"nano"}  # which notebooks put into configs of `tiny`


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_size_is_refused(stage):
    with pytest.raises(ValueError, match=r"'8b'.*expected one of 7b, 13b"):
        load(f"{stage}.py:8b")


def test_every_corpus_and_recipe_parses(tmp_path):
    for name in ("tiny", "default"):
        assert parse(CorpusConfig, load(f"corpus.py:{name}")).sources["reference"].reader == "installation"
    values = load("corpus.py:jsonl")
    with pytest.raises(ConfigError, match=r"sources.web.reader: expected 'installation' or files; web.jsonl"):
        parse(CorpusConfig, values)
    (tmp_path / "web.jsonl").write_text('{"text": "x"}\n')
    values.sources.web.reader = str(tmp_path / "web.jsonl")
    assert parse(CorpusConfig, values).total_tokens == 2_000_000_000_000
    recipes = [f"{size}{versions}" for size in ("tiny", "smoke") for versions in ("", *(f",versions={n}" for n in range(1, 6)))]
    for name in recipes:
        config = parse(RecipeConfig, load(f"recipe.py:{name}"))
        # What the recipe overrides must exist in the stages' configs.
        for step, changes in config.overrides.items():
            file = {"sft_variant": "sft", "reward_helpfulness": "reward", "reward_safety": "reward"}.get(step, step)
            change(load(f"{file}.py:{config.size}"), changes, where=step)
    # The paper's versions: Ghost Attention after V3, PPO in V5 only.
    assert [plan.ghost for plan in config.versions] == [False, False, False, True, True]
    assert [plan.ppo for plan in config.versions] == [False, False, False, False, True]
    for argument, error in (("tiny,versions=6", "expected 1 to 5"), ("tiny,version=2", "expected tiny,versions=1 to 5")):
        with pytest.raises(ValueError, match=error):
            load(f"recipe.py:{argument}")
    for file in ("corpus", "recipe"):
        with pytest.raises(ValueError, match="'huge' is unknown; expected"):
            load(f"{file}.py:huge")


def test_the_numbers_of_the_paper():
    peak = {"7b": 3e-4, "13b": 3e-4, "34b": 1.5e-4, "70b": 1.5e-4, "llama1-7b": 3e-4, "llama1-13b": 3e-4,
            "llama1-33b": 1.5e-4, "llama1-65b": 1.5e-4}  # fmt: skip
    for size, lr in peak.items():
        pretrain, sft, reward = (parse_stage(load(f"{name}.py:{size}")) for name in ("pretrain", "sft", "reward"))
        ppo, rejection = (parse_stage(load(f"{name}.py:{size}")) for name in ("ppo", "rejection"))
        # Table 1 and section 2.2
        optim, length = pretrain.optim, SIZES[size].max_length
        assert (optim.lr, optim.warmup, optim.schedule, optim.final) == (lr, 2000, "cosine", 0.1)
        assert pretrain.loop.batch_size * length == 4 * 2**20
        trillions = 1.0 if size in ("llama1-7b", "llama1-13b") else 1.4 if size.startswith("llama1") else 2.0
        assert pretrain.loop.steps * 4 * 2**20 == pytest.approx(trillions * 1e12, rel=1e-5)
        for config in (pretrain, sft, reward, ppo, rejection):
            o = config.optim
            assert (o.beta1, o.beta2, o.eps, o.weight_decay, o.clip) == (0.9, 0.95, 1e-5, 0.1, 1.0)
        # section 3.1
        assert (sft.optim.lr, sft.optim.schedule, sft.loop.batch_size, sft.epochs) == (2e-5, "cosine", 64, 2.0)
        assert sft.data.length == length
        # section 3.2.2
        assert reward.optim.lr == (5e-6 if size == "70b" else 1e-5)
        assert (reward.loop.batch_size, reward.epochs, reward.optim.final, reward.optim.schedule) == (512, 1.0, 0.1, "cosine")
        assert (reward.optim.warmup_of(5700), reward.optim.warmup_of(50)) == (round(0.03 * 5700), 5)
        # section 3.2.3
        assert (ppo.optim.lr, ppo.optim.schedule) == (1e-6, "constant")
        assert (ppo.ppo.rollout_size, ppo.loop.batch_size, ppo.ppo.clip) == (512, 64, 0.2)
        assert ppo.ppo.beta == (0.005 if size in ("34b", "70b") else 0.01)
        iterations = ppo.loop.steps * ppo.loop.batch_size / ppo.ppo.rollout_size
        assert 200 <= iterations <= 400
        assert ppo.ppo.safety_threshold == rejection.rejection.safety_threshold == 0.15
        assert 10 <= rejection.rejection.answers <= 100


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"config.stage: expected one of pretrain, sft, .*, got 'sfft'"):
        parse_stage({"stage": "sfft"})


def test_a_misspelt_flag_is_one_line_that_names_the_nearest_field(tmp_path):
    command = [sys.executable, "-m", "llama_jax.train", "--config=configs/sft.py:tiny", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([*command, "--config.optim.lrr=1"], cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error:") and "config.optim.lrr: unknown field (did you mean 'lr'?), there are" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("argument", "said"), [
    ("--config.limit=2", "config.limit: unknown field; --limit is a flag of its own"),
    ("--config.slot=2", "config.slot: unknown field (did you mean 'slots'?), there are "),
    ("--config=configs/no.py:tiny",
     "config 'configs/no.py' not found; expected a file of the checkout: run there or give its whole path"),
])  # fmt: skip
def test_a_flag_of_the_command_and_a_file_that_is_not_there_are_named(argument, said, monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", values)
    flags.DEFINE_integer("limit", None, "", flag_values=values)
    argv = ["evaluate", f"--config={CONFIGS}/evaluate.py", argument]
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the fields
    with pytest.raises(SystemExit) as error:
        parse_flags(argv)
    assert str(error.value).startswith(f"error: {said}")


@pytest.mark.parametrize(("module", "config", "address", "words"), [
    ("train", "sft", "s3://bucket/run", "or gs://bucket/directory"),
    ("recipe", "recipe", "gs://bucket/run", "this command writes no buckets"),
])  # fmt: skip
def test_an_address_that_cannot_be_written_is_refused(module, config, address, words):
    command = [sys.executable, "-m", f"llama_jax.{module}", f"--config=configs/{config}.py:tiny", f"--workdir={address}"]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 1 and not (CONFIGS.parent / "gs:").exists() and not (CONFIGS.parent / "s3:").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error:") and address in line and words in line
