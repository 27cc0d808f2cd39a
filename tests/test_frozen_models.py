"""A run is pinned to the models that it reads and does not train: references, reward models, policies that answer for it."""

import dataclasses
import json
import shutil

import pytest
import small_runs

import llama_jax
from llama_jax import convert
from llama_jax.config import ConfigError
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.dialog import encode_prompt
from llama_jax.data.rows import write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import read_json, write_json
from llama_jax.interop.restore import fingerprint
from llama_jax.interop.tokenizer_files import LLAMA2_TEMPLATE
from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.parallel.mesh import make_mesh
from llama_jax.pretrain.base import begin
from llama_jax.rlhf import drawn
from llama_jax.train import parse_stage, run
from llama_jax.training.options import RunOptions
from llama_jax.training.saved import read_meta


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Workdirs of random models: chat, brief, helpfulness, safety."""
    made = tmp_path_factory.mktemp("models")
    small_runs.prepare(made)
    return made


@pytest.fixture
def directory(models, tmp_path, monkeypatch):
    """A copy in which a model can be exchanged."""
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    return shutil.copytree(models, tmp_path / "models")


def exchange(directory, one, other):
    """Puts a copy of one model in the place of the other, as if a stage had trained on."""
    (directory / one).rename(directory / f"{one}_before")
    shutil.copytree(directory / other, directory / one)


def put_back(directory, one):
    shutil.rmtree(directory / one)
    (directory / f"{one}_before").rename(directory / one)


@pytest.mark.parametrize(("stage", "changes"), [
    ("dpo", {"chat": "brief"}), ("ppo", {"chat": "brief", "safety": "helpfulness"}), ("grpo", {"helpfulness": "safety"}),
])  # fmt: skip
def test_a_run_whose_reference_or_reward_model_changed_is_refused(directory, stage, changes):
    values = small_runs.values(directory, stage, steps=2)
    workdir = directory / stage
    run(values, workdir)
    noted = read_meta(workdir)["reads"]
    assert {field: model["fingerprint"] for field, model in noted.items()} == {
        field: fingerprint(values[field]) for field in (("start",) if stage == "dpo" else ("start", "helpfulness", "safety"))
    }
    (workdir / "done.json").unlink()  # as if it had been killed before its end
    for one, other in changes.items():
        was, now = fingerprint(directory / one)[:12], fingerprint(directory / other)[:12]
        exchange(directory, one, other)
        message = f"{stage} was begun with .*{one} of fingerprint {was}, and .*{one} now has {now}: begin anew .*@STEP"
        with pytest.raises(ConfigError, match=message) as refused:
            run(values, workdir)
        assert "\n" not in str(refused.value)
        put_back(directory, one)
    assert run(values, workdir)["steps"] == 2


def begun(directory, workdir, **changes):
    """What a checkpoint of the run would say of its models."""
    config = parse_stage(small_runs.values(directory, "ppo", steps=1, **changes))
    made = begin(config, params.table(SIZES["tiny"], head="lm_head"), make_mesh(), workdir=workdir, reads=("start", "safety"))
    write_json(workdir / "checkpoints/1/meta/metadata", {"fingerprints": {}, **made.meta})
    return made.meta


def test_another_model_by_its_path_is_meant_and_another_base_of_adapters_never(directory):
    for name, lora in (("whole", {}), ("adapted", {"lora": {"rank": 2}})):
        workdir = directory / name
        assert set(begun(directory, workdir, **lora)) == {"reads", *lora}
        begun(directory, workdir, safety=str(directory / "helpfulness"), **lora)  # as --restart_from allows
        assert begun(directory, workdir, start=f"{directory}/chat@0", **lora)["reads"]["start"]["workdir"].endswith("chat@0")
        if lora:
            with pytest.raises(ConfigError, match="adapted was begun with .*chat@0 of fingerprint .*brief now has"):
                begun(directory, workdir, start=str(directory / "brief"), **lora)


def test_a_damaged_newest_checkpoint_does_not_hide_what_the_run_was_begun_with(directory):
    begun(directory, directory / "run")
    write_json(directory / "run/checkpoints/2/meta/metadata", {"torn": True})
    exchange(directory, "safety", "helpfulness")
    with pytest.raises(ConfigError, match="run was begun with .*safety of fingerprint"):
        begun(directory, directory / "run")


@pytest.mark.parametrize("named", ["asked/0.jsonl", "asked", "asked/*"])
def test_files_are_drawn_anew_if_prompts_changed_before_all_of_them_were_there(directory, named):
    prompts, workdir = directory / "asked" / "0.jsonl", directory / "run"
    write_jsonl(prompts, [{"prompt": "a"}])
    under = {"answers": 2}, {"policy": str(directory / "chat"), "prompts": drawn.data_file(str(directory / named))}
    drawn.note(workdir, "samples", *under)
    write_jsonl(workdir / "samples" / "0-1.jsonl", [{}])
    drawn.put_aside(workdir, "samples", *under, ("samples", "samples.jsonl"))
    assert (workdir / "samples").exists()
    write_jsonl(prompts, [{"prompt": "a"}, {"prompt": "b"}])
    drawn.put_aside(workdir, "samples", *under, ("samples", "samples.jsonl"))
    assert not (workdir / "samples").exists() and (workdir / "replaced" / "1" / "samples").exists()


def test_files_are_drawn_anew_if_a_model_changed_before_all_of_them_were_there(directory, caplog):
    workdir, under = directory / "run", ({"answers": 2}, {"policy": str(directory / "chat"), "safety": ""})

    def put_aside():
        drawn.put_aside(workdir, "samples", *under, ("samples", "samples.jsonl"))
        return sorted(path.name for path in workdir.iterdir() if path.name.startswith("samples"))

    drawn.note(workdir, "samples", *under)
    assert drawn.fingerprints(workdir, "samples") == {"policy": fingerprint(directory / "chat")}
    write_jsonl(workdir / "samples" / "0-2.jsonl", [{}])
    assert put_aside() == ["samples"]  # half of the portions, from the same policy
    exchange(directory, "chat", "brief")
    assert put_aside() == [] and (workdir / "replaced" / "1" / "samples" / "0-2.jsonl").exists()
    assert f"fingerprint of policy: {drawn.fingerprints(workdir, 'samples')['policy']!r} -> " in caplog.text
    write_jsonl(workdir / "samples.jsonl", [{}])
    assert put_aside() == ["samples.jsonl"]  # whole: the policy is not read again
    shutil.rmtree(directory / "chat")
    assert put_aside() == ["samples.jsonl"]
    assert json.loads((workdir / "drawn.json").read_text())["samples"]["answers"] == 2


@pytest.mark.parametrize(("stage", "file", "field"), [
    ("sft", "dialogs", "data.train.0"), pytest.param("reward", "pairs", "data.train.0", marks=pytest.mark.slow),
    pytest.param("ppo", "prompts", "data.prompts", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_whose_rows_changed_is_refused_until_it_is_told_to_go_on(directory, stage, file, field):
    values = small_runs.values(directory, stage, steps=2)
    summary = run(values, directory / stage)
    done, rows = directory / stage / "done.json", (directory / f"{file}.jsonl").read_text().splitlines(keepends=True)
    done.unlink()  # as if it had been killed before its end
    run(values, directory / stage)  # nothing has changed
    done.unlink()
    (directory / f"{file}.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(ConfigError, match=rf"begun with other rows: config.{field} .*{file}.jsonl has changed since; expected"):
        run(values, directory / stage)
    again = run(values, directory / stage, RunOptions(restart_from=summary["steps"]))
    assert again["steps"] == summary["steps"]
    done.unlink()
    run(values, directory / stage)  # what it holds now is what it goes on with
    (directory / f"{file}.jsonl").write_text("".join(rows))
    fresh = directory / "fresh"
    run(values, fresh)
    shutil.rmtree(fresh / "checkpoints")
    (fresh / "done.json").unlink()
    (directory / f"{file}.jsonl").write_text("".join(rows[2:]))
    run(values, fresh)  # nothing was trained on yet


def test_a_workdir_has_its_tokenizer_and_what_starts_from_it_takes_that(directory):
    values = small_runs.values(directory, "sft", steps=2)
    run(values, directory / "sft")
    words = Tokenizer(directory / "sft")
    assert words.fingerprint == Tokenizer(values["tokenizer"]).fingerprint == read_meta(directory / "sft")["tokenizer"]
    shutil.rmtree(directory / "chat")
    values = small_runs.values(directory, "dpo", steps=2, start=str(directory / "sft"), tokenizer="")
    run(values, directory / "dpo")
    assert (directory / "dpo" / "tokenizer.model").read_bytes() == (directory / "sft" / "tokenizer.model").read_bytes()
    model = llama_jax.load(directory / "dpo")
    assert model.tokenizer.fingerprint == words.fingerprint
    assert isinstance(model.chat([{"role": "user", "content": "a"}], max_tokens=2), str)
    with pytest.raises(ConfigError, match=f"config.tokenizer: missing; .* since none lies in {directory}/brief"):
        run(small_runs.values(directory, "dpo", steps=2, start=str(directory / "brief"), tokenizer=""), directory / "x")
    with pytest.raises(ConfigError, match="config.tokenizer: missing; .* since there is no start"):
        run(small_runs.values(directory, "sft", steps=2, start="scratch", tokenizer=""), directory / "y")


def test_a_model_is_asked_and_exported_in_the_format_in_which_it_was_trained_to_chat(directory, caplog):
    """Its tokenizer came with a template of its own; SFT in Llama 2's format made another chat model of it."""
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>"
    own = directory / "words"
    own.mkdir()
    shutil.copyfile(directory / "tokenizer.model", own / "tokenizer.model")
    write_json(own / "tokenizer_config.json", {"chat_template": template})
    question = [{"role": "user", "content": "a"}]
    asked = {}
    for chat in ("llama2", "template"):
        values = small_runs.values(directory, "sft", steps=2, tokenizer=str(own), data={"chat": chat, "length": 64})
        run(values, directory / chat)
        assert read_meta(directory / chat)["chat"] == chat
        model = llama_jax.load(directory / chat)
        asked[chat] = encode_chat(question, model.tokenizer)
        convert.run(directory / chat, directory / f"{chat}_hf", to="huggingface", quiet=True)
        said = read_json(directory / f"{chat}_hf" / "tokenizer_config.json")["chat_template"]
        assert said == (LLAMA2_TEMPLATE if chat == "llama2" else template)
    words = Tokenizer(own)
    assert asked["llama2"] == encode_prompt(question, words) != asked["template"] == encode_chat(question, words)
    values = small_runs.values(directory, "dpo", steps=2, tokenizer=str(own), start=str(directory / "template"))
    run(values, directory / "dpo")
    assert "template was trained to chat in the format template, and dpo speaks llama2" in caplog.text
    assert read_meta(directory / "dpo")["chat"] == "llama2"
