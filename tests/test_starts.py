"""How a stage begins: from a model of ours that is finished, with its tokenizer, for as many steps as were asked for; or
again, from a step that it has passed."""

import dataclasses
import functools
import importlib
import itertools
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs

from llama_jax import train as train_command
from llama_jax.config import ConfigError
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import read_json, write_json
from llama_jax.interop import restore, tokenizer_files
from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.parallel.mesh import make_mesh
from llama_jax.pretrain.base import check_reward_model, check_start, load_tokenizer, starting_params
from llama_jax.rlhf import reinforce, rejection, respond
from llama_jax.safety import distillation
from llama_jax.steps import load_config
from llama_jax.train import STAGES, parse_stage, run
from llama_jax.training import attempt
from llama_jax.training import workdir as workdirs
from llama_jax.training.fingerprint import CheckpointError
from llama_jax.training.options import RunOptions
from llama_jax.training.saved import read_meta, steps_in

WITH_EPOCHS = ("sft", "reward", "dpo", "rejection", "ghost", "distill")
MODEL = dataclasses.replace(small_runs.MODEL, name="tiny")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What `small_runs.prepare` writes, and the workdir of an SFT run: sft."""
    directory = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", MODEL)
        small_runs.prepare(directory)
        run(small_runs.values(directory, "sft", steps=2, loop={"checkpoint_every": 1}), directory / "sft")
    return directory


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", MODEL)


# ---- which model ----


def test_a_model_that_is_still_trained_is_told_once_unless_its_step_is_named(models, tmp_path, caplog):
    tokenizer, sft = Tokenizer(models / "tokenizer.model"), tmp_path / "sft"
    shutil.copytree(models / "sft", sft)

    def told(start):
        caplog.clear()
        check_start(start, MODEL, tokenizer)
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    assert not told(sft) and not told(models / "chat")  # one has ended, the other was converted
    assert read_meta(models / "chat")["stage"] == "convert" and not (models / "chat" / "done.json").exists()
    (tmp_path / "running").mkdir()
    shutil.copytree(sft / "checkpoints", tmp_path / "running" / "checkpoints")
    assert not told(f"{tmp_path}/running@1")
    (line,) = told(tmp_path / "running")
    assert line.startswith(f"{tmp_path}/running: NOT FINISHED") and "of step 2, is taken" in line
    assert line.endswith(f": {tmp_path}/running@2")
    assert not told(str(tmp_path / "running"))


def test_a_start_of_another_size_names_the_fields_that_differ(models):
    tokenizer = Tokenizer(models / "tokenizer.model")
    other = dataclasses.replace(MODEL, name="wide", ffn=64, max_length=8)  # the length is no difference
    with pytest.raises(ConfigError) as error:
        check_start(models / "sft", other, tokenizer)
    assert str(error.value) == (
        f"{models}/sft holds model tiny, expected wide; they differ in ffn: 48 -> 64, name: 'tiny' -> 'wide'"
    )


def test_a_start_with_another_tokenizer_names_its_own(models, tmp_path):
    """Converted weights have theirs beside them, often of another format than the one that they came with."""
    words = Tokenizer(models / "tokenizer.model")
    (tmp_path / "hf").mkdir()
    pytest.importorskip("tokenizers")
    tokenizer_files.write(words, tmp_path / "hf", to="huggingface")
    theirs = Tokenizer(tmp_path / "hf")
    assert theirs.path.name == "tokenizer.json" and theirs.vocab_size == words.vocab_size
    shutil.copytree(models / "chat", tmp_path / "chat")
    said = f"chat was trained with tokenizer {words.fingerprint[:12]}, {theirs.path} is {theirs.fingerprint[:12]}"

    def refused():
        with pytest.raises(ConfigError) as error:
            check_start(tmp_path / "chat", MODEL, theirs)
        return str(error.value).removeprefix(f"{tmp_path}/")

    assert refused() == said
    (tmp_path / "chat" / "tokenizer.model").write_bytes(b"another")
    assert refused() == said
    shutil.copyfile(models / "tokenizer.model", tmp_path / "chat" / "tokenizer.model")
    assert refused() == f"{said}; its own lies at {tmp_path}/chat/tokenizer.model"
    with pytest.raises(ConfigError, match=f"sft was trained with .*; its own lies at {models}/sft/tokenizer.model"):
        check_start(models / "sft", MODEL, theirs)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rejection", "distill"])
def test_a_language_model_is_no_judge(stage, models, tmp_path, monkeypatch):
    for module in (reinforce, respond, rejection, distillation):
        for name in ("begin", "restore_model"):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was loaded"), raising=False)
    with pytest.raises(ConfigError) as error:
        run(small_runs.values(models, stage, steps=4, safety=str(models / "sft")), tmp_path / stage)
    assert str(error.value) == f"config.safety: {models}/sft: expected a reward model, found a language model"


@pytest.mark.parametrize(("stage", "field"), [
    *[(stage, "start") for stage in ("sft", "dpo", "ppo", "grpo", "rejection", "ghost", "distill")],
    *[(stage, "policy") for stage in ("rejection", "ghost", "distill")],
])  # fmt: skip
def test_a_reward_model_is_no_language_model(stage, field, models, tmp_path, monkeypatch):
    """Its head is none: a random one would be drawn in its place."""
    monkeypatch.setattr(restore, "restore_plain", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError) as error:
        run(small_runs.values(models, stage, steps=4, **{field: str(models / "helpfulness")}), tmp_path / stage)
    assert str(error.value) == f"config.{field}: {models}/helpfulness: expected a language model, found a reward model"
    assert not (tmp_path / stage / "samples").exists()


def test_a_reward_model_goes_on_from_either_kind_and_draws_the_scalar_head_alone(models):
    mesh, head = make_mesh(devices=jax.devices()[:1]), functools.partial(params.table, MODEL)
    own, chat = str(models / "helpfulness"), str(models / "chat")
    for start in (own, chat):
        load_tokenizer(parse_stage(small_runs.values(models, "reward", steps=1, start=start)))
    drawn = [starting_params(head(head="reward_head"), mesh, start=own, seed=seed)()["reward_head"] for seed in (0, 1)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, drawn)))  # not drawn, but its own
    value = starting_params(head(head="value_head"), mesh, start=chat, seed=0)()
    assert value.keys() == {"trunk", "value_head"}
    with pytest.raises(CheckpointError, match=r"helpfulness.*has no parameter \['lm_head'\]"):
        starting_params(head(head="lm_head"), mesh, start=own, seed=0)()


def test_reward_models_in_each_others_place_are_refused(models, tmp_path):
    run(small_runs.values(models, "reward", steps=2, name="safety"), tmp_path / "safety")
    tokenizer = Tokenizer(models / "tokenizer.model")
    check_reward_model("safety", tmp_path / "safety", MODEL, tokenizer)
    for field in ("helpfulness", "safety"):
        check_reward_model(field, models / "helpfulness", MODEL, tokenizer)  # converted weights do not say
    for stage in ("ppo", "grpo", "rejection"):
        with pytest.raises(ConfigError) as error:
            run(small_runs.values(models, stage, steps=4, helpfulness=str(tmp_path / "safety")), tmp_path / stage)
        assert str(error.value) == (
            f"config.helpfulness: {tmp_path}/safety: expected a reward model of helpfulness, found one of safety"
        )


@pytest.mark.parametrize(("stage", "changes", "field"), [
    ("rejection", {"pools": ("",)}, "pools"), ("ghost", {"ghost": {"contexts": ("",)}}, "ghost.contexts"),
    ("ppo", {"data": {"prompts": ""}}, "data.prompts"), ("sft", {"data": {"train": ("",)}}, "data.train"),
    ("distill", {"data": {"held_out": ("",)}}, "data.held_out"), ("dpo", {"data": {"train": ("",)}}, "data.train"),
])  # fmt: skip
def test_the_empty_name_of_a_file_is_refused_with_its_field(stage, changes, field, models, tmp_path, monkeypatch):
    """Of a shell variable that is not set: it would mean whatever lies in the current directory."""
    monkeypatch.chdir(models)
    with pytest.raises(ConfigError, match=f"^{field}: expected a file, got nothing$"):
        run(small_runs.values(models, stage, steps=4, **changes), tmp_path / stage)


def test_sft_without_files_names_the_field(models, tmp_path):
    with pytest.raises(ConfigError, match="^data.train: expected at least one file, got none$"):
        run(small_runs.values(models, "sft", steps=4, data={"train": ()}), tmp_path / "sft")


@pytest.mark.parametrize("tokenizer", ["", "tokenizer.model"])
def test_the_command_that_converts_a_start_is_in_the_error_of_a_stage(tokenizer, models, tmp_path):
    write_json(tmp_path / "hf" / "config.json", {"model_type": "llama"})
    tokenizer = str(models / tokenizer) if tokenizer else ""  # without one, the start's own would do
    values = small_runs.values(models, "sft", steps=1, start=str(tmp_path / "hf"), tokenizer=tokenizer)
    command = f"python -m llama_jax.convert --input={tmp_path}/hf --output={tmp_path}/hf-llama_jax --to=llama_jax"
    with pytest.raises(ValueError, match=f"found none; .* converted first: {command}$"):
        run(values, tmp_path / "run")


# ---- in which order ----


class Enough(Exception):
    """What was to be seen has been."""


def test_hosts_are_watched_while_they_compare_their_data(models, tmp_path, monkeypatch):
    """One that cannot read its data to their end would else leave the others waiting for ever."""

    def compare(facts):
        assert {"config.loop.steps", f"data.train.0 {models}/dialogs.jsonl"} <= set(facts)
        assert facts["--restart_from"] == "None" and attempt._current.get() is not None  # what only some hosts do hangs all
        raise Enough

    shared_facts = train_command.shared_facts
    monkeypatch.setattr(train_command, "shared_facts", lambda config: attempt._current.get() and shared_facts(config))
    monkeypatch.setattr(train_command, "preflight", compare)
    with pytest.raises(Enough):
        run(small_runs.values(models, "sft", steps=2), tmp_path / "run")
    assert attempt._current.get() is None and not (tmp_path / "run").exists()


def test_what_fine_tuning_measures_and_its_schedule_are_looked_at_before_weights_are_read(models, tmp_path, monkeypatch):
    def begin(*_, **__):
        raise Enough

    def made(**changes):
        config = parse_stage(small_runs.values(models, "sft", steps=4, **changes))
        return importlib.import_module(STAGES["sft"][0]).make_stage(config, make_mesh(config.mesh), tmp_path)

    monkeypatch.setattr(importlib.import_module(STAGES["sft"][0]), "begin", begin)
    with pytest.raises(FileNotFoundError, match="none.jsonl: expected a JSONL file, found nothing"):
        made(data={"held_out": (str(tmp_path / "none.jsonl"),)})
    with pytest.raises(ValueError, match="optim.warmup=4 leaves nothing of loop.steps=4"):
        made(optim={"warmup": 4})
    with pytest.raises(Enough):
        made()


# ---- how long ----


@pytest.mark.parametrize(("stage", "rows"), [("reward", 32), ("dpo", 32), ("sft", 0)])
def test_epochs_make_the_steps_and_a_number_of_steps_ends_them_before(stage, rows, models, tmp_path, caplog):
    module = importlib.import_module(STAGES[stage][0])

    def made(steps, epochs):
        """Steps of the loop, steps of the cosine, and what was said of them."""
        caplog.clear()
        config = parse_stage(small_runs.values(models, stage, steps=2, epochs=epochs, loop={"steps": steps}))
        mesh = make_mesh(config.mesh)
        found, loop = module.make_stage(config, mesh, tmp_path)
        return loop.steps, int(found.optimizer.schedule.steps), [line for line in caplog.messages if "loop.steps" in line]

    whole, cosine, said = made(0, 4.0)
    assert whole == cosine > 3 and not said and (not rows or whole == 4 * rows // 8)
    assert made(3, 4.0) == (3, 3, [f"loop.steps=3 ends the run before the {whole} steps of epochs=4"])
    assert made(whole, 4.0) == made(whole + 1, 4.0) == (whole, whole, [])
    assert made(5, 0.0) == (5, 5, [])


def test_a_run_ends_after_the_steps_that_were_asked_for(models, tmp_path):
    values = small_runs.values(models, "sft", steps=2, epochs=5.0)
    assert run(values, tmp_path / "run")["steps"] == 2


@pytest.mark.parametrize("stage", WITH_EPOCHS)
def test_by_default_the_epochs_alone_make_the_steps(stage):
    for size in ("7b", "70b", "llama1-7b", "smollm2-135m", "tiny"):
        config = parse_stage(load_config(small_runs.ROOT / "configs", f"{stage}.py:{size}"))
        assert config.epochs > 0 and config.loop.steps == 0, size


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_steps_and_epochs_is_refused(stage):
    values = load_config(small_runs.ROOT / "configs", f"{stage}.py:tiny")
    values.loop.steps = 0
    why = ""
    if stage in WITH_EPOCHS:
        values.epochs, why = 0.0, " since epochs is 0"
    with pytest.raises(ConfigError, match=f"config: loop.steps: expected at least 1{why}, got 0"):
        parse_stage(values)


# ---- going back ----


class Killed(BaseException):
    """The process ends here, and nothing that stands behind is done."""


@pytest.fixture
def start_run(models, tmp_path, monkeypatch):
    """start_run(workdir, lr, row, back=, kill_at=): the train command's own code up to the first step, in a run of 8 steps
    whose checkpoints are empty; killed before a write by its number. Gives the step it would go on from, and the writes."""
    monkeypatch.setattr(importlib.import_module(STAGES["sft"][0]), "make_stage", lambda config, mesh, workdir: config)
    monkeypatch.setattr(train_command, "keep_tokenizer", lambda config, workdir: None)
    monkeypatch.setattr(train_command, "train", lambda *_, workdir, **more: {"from": steps_in(workdir / "checkpoints")[-1]})
    numbers, wanted = itertools.count(), [-1]

    def before(write):
        def writes(*arguments, **more):
            if next(numbers) == wanted[0]:
                raise Killed
            return write(*arguments, **more)

        return writes

    for module, name in ((workdirs, "move"), (workdirs, "write_json"), (workdirs, "make_aside"), (Path, "write_bytes")):
        monkeypatch.setattr(module, name, before(getattr(module, name)))
    rows = tmp_path / "rows.jsonl"

    def start_run(workdir, lr, row, *, back=None, kill_at=-1):
        nonlocal numbers
        numbers, wanted[0] = itertools.count(), kill_at
        rows.write_text(json.dumps({"prompt": "a", "completion": row}) + "\n")
        values = small_runs.values(models, "sft", steps=8, data={"train": (str(rows),)}, optim={"lr": lr})
        return run(values, workdir, RunOptions(restart_from=back)).get("from"), next(numbers)

    return start_run


def begun_run(workdir, start_run):
    """A finished run with lr 1e-3 and the row "yes"."""
    for step in (3, 6, 8):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    assert start_run(workdir, 1e-3, "yes")[0] == 8
    (workdir / "metrics.jsonl").write_text('{"step": 7}\n')
    write_json(workdir / "done.json", {"steps": 8})
    return read_json(workdir / "config.json")


def test_a_kill_while_a_run_goes_back_to_a_step_stops_no_later_start(tmp_path, start_run):
    begun_run(tmp_path / "whole", start_run)
    step, writes = start_run(tmp_path / "whole", 2e-3, "no", back=3)
    # A directory; done.json; two copies; two checkpoints; fingerprints; config, record and, of the run, fingerprints again.
    assert (step, writes) == (3, 10)
    for kill_at in range(writes):
        workdir = tmp_path / str(kill_at)
        old = begun_run(workdir, start_run)
        with pytest.raises(Killed):
            start_run(workdir, 2e-3, "no", back=3, kill_at=kill_at)
        shutil.copytree(workdir, given_up := tmp_path / f"{kill_at}.given_up")
        for _ in range(2):  # the same command goes on, as often as it is given
            assert start_run(workdir, 2e-3, "no", back=3)[0] == 3
        assert start_run(workdir, 2e-3, "no")[0] == 3
        assert steps_in(workdir / "checkpoints") == [3] and not (workdir / "done.json").exists()
        assert sorted(int(path.name) for path in workdir.glob("replaced/*/[0-9]*")) == [6, 8]  # nothing is lost
        assert {"done.json", "inputs.json", "metrics.jsonl"} <= {path.name for path in workdir.glob("replaced/*/*")}
        assert old in [read_json(path) for path in workdir.glob("replaced/*/config.json")]
        with pytest.raises(ConfigError, match="was begun with other rows"):
            start_run(workdir, 2e-3, "yes")
        # Who gives it up: the old run is as it was but for steps that are done again, and takes no other config before.
        newest = steps_in(given_up / "checkpoints")[-1]
        if read_json(given_up / "config.json") == old:
            with pytest.raises(ConfigError, match="was begun with another config"):
                start_run(given_up, 2e-3, "no")
            if newest > 3 and not (given_up / "done.json").exists():
                with pytest.raises(ConfigError, match="was begun with other rows"):
                    start_run(given_up, 1e-3, "no")
            assert start_run(given_up, 1e-3, "yes")[0] == (None if (given_up / "done.json").exists() else newest)
        else:
            assert start_run(given_up, 2e-3, "no")[0] == 3
