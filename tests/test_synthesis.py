"""Stages that sample first (Ghost Attention, context distillation, rejection sampling) on eight devices, by `train.run`."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs
from test_hosts import launch

from llama_jax.config import ConfigError
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.interop.restore import fingerprint
from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.pretrain.base import check_start
from llama_jax.rlhf import respond
from llama_jax.rlhf.constraints import Constraint, instruction
from llama_jax.rlhf.pool import read_pool
from llama_jax.rlhf.rejection import Round
from llama_jax.rlhf.respond import usable
from llama_jax.safety.distillation import score_distributions
from llama_jax.steps import load_config
from llama_jax.train import parse_stage, run
from llama_jax.training.saved import read_meta, restore_params

pytestmark = pytest.mark.slow  # trainings, most of them compiled for eight devices

CONFIGS = Path(__file__).parents[1] / "configs"
WORDS = "red green blue list dict set tuple string file loop".split()


def one_device():
    return make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def stage(name, base, **changes):
    values = load_config(CONFIGS, f"{name}.py:tiny")
    changes = {"tokenizer": str(base / "tokenizer.model"), "epochs": 0.0, **changes}
    for key, value in changes.items():
        values[key].update(value) if isinstance(value, dict) else values.__setitem__(key, value)
    values.loop.update({"batch_size": 8, "steps": 2, **changes.get("loop", {})})
    values.optim.warmup = 0
    return values


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A chat model that ends its answers, a safety reward model, and their data."""
    path = tmp_path_factory.mktemp("synthesis")
    texts = [f"What is a {a}? A {b} is a {a}, is it not? [INST] <<SYS>> [/INST] Begin: {b}." for a in WORDS for b in WORDS]
    train_tokenizer(texts, path / "tokenizer.model", vocab_size=330)
    model = dataclasses.replace(
        SIZES["tiny"], vocab_size=330, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=64, max_length=96
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", model)
        write_jsonl(path / "sft.jsonl", [{"messages": chat(f"What is a {w}?", f"A {w}.")} for w in WORDS * 8])
        write_jsonl(path / "pairs.jsonl", [
            {"prompt": f"What is a {w}?", "chosen": f"A {w}.", "rejected": "is it not?", "is_safety": True} for w in WORDS
        ])  # fmt: skip
        write_jsonl(path / "prompts.jsonl", [
            {"messages": chat(f"What is a {w}?", "")[:1], "is_safety": i % 2 == 0, "risk": "illicit_criminal"}
            for i, w in enumerate(WORDS)
        ])  # fmt: skip
        write_jsonl(path / "values.jsonl", [{"kind": "opening", "value": w} for w in WORDS[:3]])
        data = {"train": (str(path / "sft.jsonl"),), "length": 96}
        run(stage("sft", path, start="scratch", data=data, optim={"lr": 2e-2}, loop={"steps": 40}), path / "sft")
        reward = {"train": (str(path / "pairs.jsonl"),), "length": 96}
        run(stage("reward", path, data=reward, start=str(path / "sft")), path / "safety")
        yield path


def test_ghost_attention_draws_trains_and_extends_the_context(base, tmp_path):
    sft = str(base / "sft")
    ghost = {"contexts": (str(base / "sft.jsonl"),), "turns": (1, 3), "samples": 24, "families": ("opening",),
             "values": str(base / "values.jsonl"), "new_tokens": 12, "sampling_batch": 8, "resample": True}  # fmt: skip
    values = stage("ghost", base, start=sft, policy=sft, ghost=ghost, data={"length": 192}, context=192)
    summary = run(values, tmp_path)
    assert summary["steps"] == 2
    samples = [row for _, row in read_jsonl(tmp_path / "samples.jsonl")]
    assert len(samples) == 24 and {len(row["messages"]) for row in samples} == {1, 3, 5}
    for row in samples:
        constraints = [Constraint(**c) for c in row["constraints"]]
        assert row["instruction"] in (instruction(constraints, terse=True), instruction(constraints, terse=False))
        assert row["obeyed"] is constraints[0].holds(row["response"])
    rows = [row for _, row in read_jsonl(tmp_path / "ghost.jsonl")]
    assert 0 < len(rows) <= 24 and {row["train_on"] for row in rows} == {"last"}
    assert all(row["messages"][2]["content"].startswith("What") for row in rows if len(row["messages"]) > 2)
    assert read_meta(tmp_path)["model"]["max_length"] == 192 and read_meta(sft)["model"]["max_length"] == 96
    # The longer model starts from the shorter one, and the other way round.
    tokenizer = Tokenizer(base / "tokenizer.model")
    check_start(tmp_path, SIZES["tiny"], tokenizer)
    with pytest.raises(ConfigError, match="holds model"):
        check_start(tmp_path, dataclasses.replace(SIZES["tiny"], width=64), tokenizer)


def test_context_distillation_keeps_what_the_reward_model_prefers(base, tmp_path):
    sft = str(base / "sft")
    distill = {"prompts": str(base / "prompts.jsonl"), "prompt_length": 48, "new_tokens": 12, "sampling_batch": 8}
    how = {"start": sft, "policy": sft, "safety": str(base / "safety"), "context": 1024}
    data = {"train": (str(base / "sft.jsonl"),), "length": 96}
    run(stage("distill", base, distill=distill, data=data, **how), tmp_path)
    samples = [row for _, row in read_jsonl(tmp_path / "samples.jsonl")]
    assert len(samples) == 5  # those with is_safety
    assert [[a["kind"] for a in row["answers"]] for row in samples] == [["base", "generic", "generic", "category"]] * 5
    scores = score_distributions(samples)
    assert {kind: len(values) for kind, values in scores.items()} == {"base": 5, "generic": 10, "category": 5}
    assert all(0 < value < 1 for values in scores.values() for value in values)
    by_prompt = {row["messages"][0]["content"]: row["answers"] for row in samples}
    kept = (tmp_path / "kept.jsonl").read_text().splitlines()
    for row in map(json.loads, kept):
        question, answer = row["messages"]
        answers = by_prompt[question["content"]]
        chosen = next(a for a in answers[1:] if a["response"] == answer["content"])
        assert chosen["safety"] > answers[0]["safety"]
    with pytest.raises(ConfigError, match="distill.prompt_length=48 .*exceed the model's 40"):
        run(stage("distill", base, distill=distill, data={**data, "length": 32}, **{**how, "context": 40}), tmp_path / "short")
    write_jsonl(tmp_path / "helpful.jsonl", [{"messages": chat("What?", "")[:1]}])
    helpful = {**distill, "prompts": str(tmp_path / "helpful.jsonl")}
    with pytest.raises(ConfigError, match="no prompt has is_safety true; helpful prompts are never distilled"):
        run(stage("distill", base, distill=helpful, data=data, **how), tmp_path / "none")


def check_that_a_kill_costs_one_portion(values, workdir, monkeypatch, *, whole):
    """A round in portions of three prompts, killed in the second: its answers are those of one that was drawn whole."""
    monkeypatch.setitem(respond.write_in_portions.__kwdefaults__, "size", 3)
    real, drawn = Round.samples, []

    def samples(self, prompts, **how):
        if how.get("first") == 3 and len(drawn) < 4:
            raise KeyboardInterrupt
        drawn.append(how.get("first"))
        return real(self, prompts, **how)

    monkeypatch.setattr(Round, "samples", samples)
    with pytest.raises(KeyboardInterrupt):
        run(values, workdir)
    assert drawn == [None, None, 0]  # a search at two temperatures, and the first portion
    drawn.append("killed")
    run(values, workdir)
    assert drawn[4:] == [3, 6]
    found = [row for _, row in read_jsonl(workdir / "samples.jsonl")]
    for a, b in zip(found, whole, strict=True):
        scores = {name: pytest.approx(b.pop(name), rel=1e-5) for name in ("helpfulness", "safety", "reward")}
        assert a == {**b, **scores}  # rows are scored beside others, which rounds otherwise


def test_a_small_model_learns_from_a_larger_ones_best_answers_and_from_pools_alone(base, tmp_path, monkeypatch):
    sft, reward = str(base / "sft"), str(base / "safety")
    small = dataclasses.replace(SIZES["tiny"], name="small", width=16, heads=2, kv_heads=1, ffn=32)
    rejection = {"prompts": str(base / "prompts.jsonl"), "prompt_length": 48, "max_prompts": 8, "answers": 3, "new_tokens": 12,
                 "temperatures": (0.5, 1.0), "search_prompts": 4, "sampling_batch": 8, "version": "v1"}  # fmt: skip
    sizes = {"start": "scratch", "model": "small", "policy_model": "tiny", "reward_model": "tiny", "data": {"length": 96}}
    models = {"policy": sft, "helpfulness": reward, "safety": reward}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small", small)
        run(stage("rejection", base, rejection=rejection, **models, **sizes), tmp_path / "v1")
        assert read_meta(tmp_path / "v1")["model"]["width"] == 16
        search = json.loads((tmp_path / "v1" / "temperatures.json").read_text())
        curves = {t: curve["maximum"] for t, curve in search["curves"].items()}
        assert search["prompts"] == 4 and {t: len(curve) for t, curve in curves.items()} == {"0.5": 3, "1": 3}
        assert curves[f"{search['temperature']:g}"][-1] == max(curve[-1] for curve in curves.values())
        pool = read_pool(str(tmp_path / "v1" / "pool.jsonl"))
        assert pool and {row["policy"] for row in pool} == {fingerprint(sft)} and {row["version"] for row in pool} == {"v1"}
        samples = [row for _, row in read_jsonl(tmp_path / "v1" / "samples.jsonl")]
        assert len(samples) == 24
        for row in pool:
            own = [s for s in samples if s["messages"] == row["messages"] and usable(s["response"], s["ended"])]
            rewards = [s["reward"] for s in own]
            assert row["reward"] == max(rewards)
        # From the pool alone: nothing is sampled, and an older row counts by what the given reward models say of it now.
        older = [{**pool[0], "reward": 0.99, "version": "v0", "response": "is it not?"}]
        write_jsonl(tmp_path / "older.jsonl", older)
        pools = (str(tmp_path / "older.jsonl"), str(tmp_path / "v1" / "pool.jsonl"))
        alone = {**rejection, "answers": 0, "repeat": 2}
        for name, judges in (("kept", {"helpfulness": "", "safety": ""}), ("again", {"helpfulness": reward, "safety": reward})):
            run(stage("rejection", base, rejection=alone, pools=pools, **judges, **sizes), tmp_path / name)
            assert not (tmp_path / name / "samples.jsonl").exists()
        kept, again = ([row for _, row in read_jsonl(tmp_path / name / "best.jsonl")] for name in ("kept", "again"))
        assert len(kept) == len(again) == len(pool)
        assert kept[0]["version"] == "v0"
        scored = Round(parse_stage(stage("rejection", base, rejection=alone, pools=pools, **models, **sizes)), one_device())
        old, new = (row["reward"] for row in scored.again([older[0], pool[0]]))
        assert again[0]["version"] == ("v0" if old > new else "v1")
        assert new == pytest.approx(pool[0]["reward"], abs=1e-5)  # the same model says the same again
        check_that_a_kill_costs_one_portion(
            stage("rejection", base, rejection=rejection, **models, **sizes), tmp_path / "killed", monkeypatch, whole=samples
        )
        for changes, error in (
            ({**models, "policy": ""}, "config.policy: expected the workdir of a stage"),
            ({**models, "helpfulness": "", "safety": ""}, "expected the workdir of one at least, got nothing"),
            ({**models, "rejection": {**rejection, "answers": 0}}, "config.pools: expected at least one"),
            ({**models, "rejection": {**rejection, "prompt_length": 90}}, "exceed the 96 tokens of"),
            ({**models, "policy_model": "small"}, "sft holds model"),
        ):
            with pytest.raises(ConfigError, match=error):
                run(stage("rejection", base, **{"rejection": rejection, **sizes, **changes}), tmp_path / "wrong")


def test_two_processes_make_the_files_and_parameters_of_one(tmp_path):
    """Rejection sampling in portions, on a mesh of two devices: of one process, and of two with one each."""
    small_runs.prepare(tmp_path)
    script = """
        import os
        from pathlib import Path
        import jax
        from llama_jax.parallel.mesh import start_distributed
        count = int(os.environ["JAX_NUM_PROCESSES"])
        jax.config.update("jax_num_cpu_devices", 2 // count)
        start_distributed()
        import small_runs
        from llama_jax.model.config import SIZES
        from llama_jax.rlhf import respond
        from llama_jax.steps import change, load_config
        from llama_jax.train import run
        SIZES["tiny"] = small_runs.MODEL
        respond.write_in_portions.__kwdefaults__["size"] = 5
        at = Path(os.environ["AT"])
        values = load_config(small_runs.ROOT / "configs", "rejection.py:tiny")
        models = {name: str(at / name) for name in ("helpfulness", "safety")}
        change(values, {
            **models, "start": str(at / "chat"), "policy": str(at / "chat"), "tokenizer": str(at / "tokenizer.model"),
            "compute": small_runs.COMPUTE, "epochs": 0.0, "data": {"train": (str(at / "dialogs.jsonl"),), "length": 64},
            "loop": {"steps": 2, "batch_size": 4}, "optim": {"warmup": 1},
            "rejection": {"prompts": str(at / "prompts.jsonl"), "prompt_length": 20, "answers": 2, "new_tokens": 8,
                          "temperatures": (0.8, 1.0), "search_prompts": 4, "max_prompts": 12, "sampling_batch": 8},
        }, where="rejection")
        run(values, at / f"by_{count}")
    """
    path = f"{small_runs.ROOT}:{small_runs.ROOT / 'tests'}"
    for count in (1, 2):
        done = launch(script, count, AT=str(tmp_path), PYTHONPATH=path, XLA_FLAGS="--xla_backend_optimization_level=0")
        assert [code for code, _, _ in done] == [0] * count, done
    one, two = tmp_path / "by_1", tmp_path / "by_2"
    assert len((one / "samples.jsonl").read_text().splitlines()) == 24
    for name in ("temperatures.json", "samples.jsonl", "pool.jsonl", "best.jsonl"):
        assert (one / name).read_text() == (two / name).read_text(), name
    specs, mesh = params.table(small_runs.MODEL, head="lm_head"), one_device()
    a, b = (restore_params(workdir, specs, mesh) for workdir in (one, two))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)
