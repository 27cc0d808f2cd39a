"""Jobs of steps: overrides are checked before the first step, one config reaches all stages, seconds outlive kills."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from llama_jax import steps
from llama_jax.config import ConfigError, describe, parse
from llama_jax.corpus import CorpusConfig
from llama_jax.evals.speed import operations
from llama_jax.model import params as table
from llama_jax.parallel.mesh import MeshConfig, fitting_mesh
from llama_jax.recipe import Recipe
from llama_jax.recipe_config import RecipeConfig
from llama_jax.steps import assignment, load_config, timed, with_overrides
from llama_jax.train import parse_stage

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "recipe.py:smoke"
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def smoke(**changes) -> RecipeConfig:
    values = load_config(CONFIG.parent, CONFIG.name)
    values.configs = str(CONFIG.parent)
    return dataclasses.replace(parse(RecipeConfig, values), **{"mesh": MESH, **changes})


def stage_configs(recipe: Recipe) -> dict:
    return {kind: parse_stage(recipe.values(kind, file, {})) for kind, file in recipe.files().items()}


def test_mesh_compute_and_seed_reach_every_stage_and_overrides_win(tmp_path):
    given = ["ppo.mesh.tensor=1", "ppo.mesh.fsdp=4", "sft.loop.seed=9", "sft.compute.remat=full"]
    config = with_overrides(smoke(seed=3), CONFIG, given)
    recipe = Recipe(config, tmp_path)
    recipe.check()
    found = stage_configs(recipe)
    assert found.keys() == {"pretrain", "sft", "sft_variant", "reward_helpfulness", "reward_safety", "rejection", "ppo",
                            "ghost", "distill"}  # fmt: skip
    assert {stage.mesh for kind, stage in found.items() if kind != "ppo"} == {MESH}
    assert found["ppo"].mesh == dataclasses.replace(MESH, fsdp=4, tensor=1)
    assert {kind: stage.loop.seed for kind, stage in found.items() if stage.loop.seed != 3} == {"sft": 9}
    plain = found.pop("sft")
    assert plain.compute == dataclasses.replace(config.compute, remat="full")
    assert {stage.compute for stage in found.values()} == {config.compute}
    assert recipe.corpus_config().seed == 3
    first, second = config.versions
    study = Recipe(smoke(ghost_study="smoke", versions=(first, dataclasses.replace(second, ghost=True))), tmp_path)
    study.check()
    both = stage_configs(study.make_study("chat"))
    assert {stage.mesh for stage in both.values()} == {MESH} and both["baseline"].loop.batch_size == 4
    assert not list(tmp_path.iterdir())


def test_every_stage_has_its_operations(tmp_path):
    recipe = Recipe(smoke(), tmp_path)
    found = {kind: operations(config, recipe.model) for kind, config in stage_configs(recipe).items()}
    policy, critic = (table.flops_per_token(recipe.model, length=96 + 16, head=h) for h in ("lm_head", "value_head"))
    assert found["ppo"] == policy + critic
    assert found["pretrain"] == found["sft"] == table.flops_per_token(recipe.model, length=256)
    assert found["reward_safety"] == table.flops_per_token(recipe.model, length=128, head="reward_head") < found["sft"]


def test_rows_that_do_not_fill_the_devices_leave_them_to_the_matrices():
    assert fitting_mesh(MeshConfig(), devices=8, rows=4) == MeshConfig(fsdp=4, tensor=2)
    assert fitting_mesh(MeshConfig(), devices=4, rows=4) == fitting_mesh(MeshConfig(), devices=1, rows=4) == MeshConfig()
    assert fitting_mesh(MeshConfig(data=2), devices=16, rows=4) == MeshConfig(data=2, fsdp=2, tensor=4)
    assert fitting_mesh(MESH, devices=8, rows=1) == MESH  # as it was asked for


@pytest.mark.parametrize(("overrides", "message"), [
    ({"pretrian": {"loop": {"steps": 5}}}, r"config.overrides.pretrian: unknown stage; did you mean 'pretrain'\?"),
    ({"ppo": {"optim": {"lrr": 1.0}}}, r"overrides.ppo.optim.lrr: unknown field; did you mean 'lr'\?"),
    ({"ppo": {"optim": {"lr": "much"}}}, r"overrides.ppo.optim.lr: expected a float, got 'much'"),
    ({"ppo": {"optim": 1}}, r"overrides.ppo.optim: expected fields, got 1"),
    ({"distill": {"loop": {"keep": 0}}}, r"distill: config.loop: loop.keep: expected at least 1, got 0"),
    ({"pretrain": {"loop": {"batch_size": 6}}}, r"pretrain: loop.batch_size=6 cannot be divided into 4 shards"),
    ({"sft": {"mesh": {"data": 1, "fsdp": 1, "tensor": 8}}}, r"sft: axis 'heads' .* cannot divide into 8 shards"),
    ({"ppo": {"ppo": {"rollout_size": 20}}}, r"ppo: rollout_size=20 is no multiple of loop.batch_size=8"),
    ({"corpus": {"total_token": 1}}, r"overrides.corpus.total_token: unknown field; did you mean 'total_tokens'\?"),
])  # fmt: skip
def test_what_a_late_stage_could_not_run_with_is_said_at_the_start(tmp_path, overrides, message):
    config = smoke()
    with pytest.raises(ConfigError, match=message):
        Recipe(dataclasses.replace(config, overrides=steps.merged(config.overrides, overrides)), tmp_path).check()


def test_the_command_line_adds_to_the_overrides_of_the_file():
    given = {"sft": {"epochs": 0.5}, "ppo": {"optim": {"lr": 1e-3}}}  # as --config.overrides={...} leaves them
    more = ["ppo.optim.lr=1e-5", "ghost.ghost.turns=(1, 3)", "sft.data.chat=llama2"]
    found = with_overrides(smoke(overrides=given), CONFIG, more)
    assert found.overrides["sft"] == {**smoke().overrides["sft"], "epochs": 0.5, "data": {"chat": "llama2"}}
    assert found.overrides["ppo"] == {**smoke().overrides["ppo"], "optim": {"lr": 1e-5}}
    assert found.overrides["ghost"]["ghost"] == {"turns": (1, 3)} and "pretrain" in found.overrides
    for wrong in ("ppo.optim.lr", "lr=1", "ppo..lr=1"):
        with pytest.raises(ConfigError, match="expected STAGE.FIELD=VALUE, as in ppo.optim.lr=1e-5"):
            assignment(wrong)


def test_a_finished_step_refuses_another_config_with_the_difference(tmp_path):
    recipe = Recipe(smoke(), tmp_path)
    config = recipe.corpus_config()
    assert recipe.step("corpus", lambda: "table", config=config) == "table"
    assert recipe.step("corpus", lambda: "another", config=config) == "table"
    edited = parse(CorpusConfig, {**describe(config), "total_tokens": 5})
    with pytest.raises(ConfigError, match=r"(?s)corpus was made with another config.*\n  total_tokens: 12288 -> 5"):
        recipe.step("corpus", lambda: "another", config=edited)


def test_seconds_are_those_of_all_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_BEAT", 0.01)
    recipe, path = Recipe(smoke(), tmp_path), tmp_path / "steps" / "v1" / "ppo.seconds.json"
    with timed(path):
        limit = time.monotonic() + 10
        while not path.exists() or len(json.loads(path.read_text())) < 1:
            assert time.monotonic() < limit
        killed = path.read_text()  # what a kill at this moment would leave
    path.write_text(json.dumps([100 + json.loads(killed)[0]]))

    def run_stage(values, workdir):
        steps.write_json(workdir / "done.json", {"seconds": 1.0})
        return {"seconds": 1.0}

    monkeypatch.setattr(steps, "run_stage", run_stage)
    assert 100 < recipe.stage("v1/ppo", "ppo.py:tiny", {})["seconds"] < 110
    attempts = json.loads(path.read_text())
    assert len(attempts) == 2 and json.loads((tmp_path / "v1" / "ppo" / "done.json").read_text())["seconds"] == sum(attempts)
    path = tmp_path / "steps" / "scores.seconds.json"
    path.write_text("[50.0]")
    recipe.step("scores", lambda: None)
    assert 50 < recipe.seconds["scores"] < 60


def test_an_error_ends_an_attempt_too(tmp_path):
    with pytest.raises(RuntimeError), timed(tmp_path / "seconds.json"):
        raise RuntimeError
    assert len(json.loads((tmp_path / "seconds.json").read_text())) == 1


def test_ghost_attentions_dialogs_of_another_config_are_refused(tmp_path, monkeypatch):
    drawn = []

    def gather(config, mesh, workdir):
        drawn.append(config.ghost.turns)
        steps.write_json(workdir / "samples.jsonl", {})
        return [{}, {}]

    monkeypatch.setattr("llama_jax.rlhf.ghost.gather", gather)
    turns = [f"ghost.ghost.turns=(1, {most})" for most in (2, 2, 3)]
    first, again, edited = (Recipe(with_overrides(smoke(), CONFIG, [text]), tmp_path) for text in turns)
    assert first.make_ghost("v4", 4) == again.make_ghost("v4", 4) == 2 and drawn == [(1, 2)]
    with pytest.raises(ConfigError, match=r"(?s)begun with another config.*ghost.turns: \[1, 2\] -> \[1, 3\]"):
        edited.make_ghost("v4", 4)
