"""Adapters: the first model is the base, gradients reach adapters alone, merged = unmerged, eight devices = one, real runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

import llama_jax
from llama_jax import convert
from llama_jax.config import ConfigError
from llama_jax.data.loader import TokenBatch
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import write_json
from llama_jax.interop.restore import base_of, describe_base, restore_model
from llama_jax.model import heads, lora, params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.model.lora import LoraConfig
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel.axes import shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.pretrain.base import begin, load_tokenizer
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.reward.comparisons import encode_comparisons
from llama_jax.reward.score import scorer
from llama_jax.rlhf.rollout import RolloutSource
from llama_jax.sampling.generate import make_sampler, pad_left
from llama_jax.sampling.keys import row_keys
from llama_jax.train import parse_stage, run
from llama_jax.training import optimizer
from llama_jax.training.fingerprint import CheckpointError
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.saved import read_meta, restore_params, saved_parts
from llama_jax.training.state import abstract_state, create, overlay
from llama_jax.training.step import make_step, put_batch

MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=304, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=96
)
BASE_SPECS = params.table(MODEL, head="lm_head")
CONFIG = LoraConfig(rank=4, alpha=8.0)
SPECS = {"lora": lora.adapter_specs(BASE_SPECS, CONFIG)}
FROZEN = {
    **jax.tree.map(lambda x: 2 * x, params.init(BASE_SPECS, jax.random.key(0))),
    "lora": params.init(lora.scale_specs(CONFIG), jax.random.key(0)),
}
ADAPTERS = params.init(SPECS, jax.random.key(1))
BASE = {name: part for name, part in FROZEN.items() if name != "lora"}


def moved(seed=2):
    """Adapters whose B is no longer zero."""
    noise = params.init(SPECS, jax.random.key(seed))
    draw = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(str(path))), x.shape)  # noqa: E731
    return jax.tree_util.tree_map_with_path(draw, noise)


def batch(rows=8, length=12):
    tokens = np.random.default_rng(0).integers(3, 300, (rows, length + 1)).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    return TokenBatch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=ones.astype(np.float32), segment_ids=ones,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape).copy(),
    )  # fmt: skip


def logits(tree):
    rows = batch(2)
    hidden = hidden_states(tree, rows.tokens, rows.segment_ids, rows.positions, config=MODEL, compute=FLOAT32)
    return heads.logits(tree, hidden, compute=FLOAT32)


def test_the_table_of_adapters_by_hand():
    layers = SPECS["lora"]["layers"]
    assert layers["query"]["a"].shape == (2, 32, 4) and layers["query"]["b"].shape == (2, 4, 4, 8)
    assert layers["output"]["a"].axes == ("layers", "heads", "head", "rank") and layers["output"]["b"].shape == (2, 4, 32)
    assert layers["down"]["a"].shape == (2, 48, 4) and layers["down"]["b"].axes == ("layers", "rank", "width")
    assert float(FROZEN["lora"]["scale"]) == 2.0
    # q, k, v, o: 4 * (32 + 32), 2 * 4 * (32 + 16), 4 * (32 + 32); gate, up, down: 3 * 4 * (32 + 48); two layers
    assert params.count(SPECS) == 2 * (256 + 384 + 256 + 960)
    only = lora.adapter_specs(BASE_SPECS, LoraConfig(rank=2, targets=("value",)))
    assert set(only["layers"]) == {"value"}


def test_the_first_model_is_the_base_to_the_bit():
    np.testing.assert_array_equal(logits(overlay(ADAPTERS, FROZEN)), logits(BASE))


def test_merged_equals_unmerged():
    whole = overlay(moved(), FROZEN)
    merged = lora.merged(whole)
    assert "lora" not in merged and jax.tree.structure(merged) == jax.tree.structure(BASE)
    assert float(jnp.max(jnp.abs(logits(whole) - logits(BASE)))) > 0.05  # the adapters do something
    np.testing.assert_allclose(logits(merged), logits(whole), atol=1e-5)
    layer, name = 1, "output"
    a, b = (np.asarray(whole["lora"]["layers"][name][part][layer], np.float64) for part in "ab")
    expected = np.asarray(BASE["trunk"]["layers"][name][layer]) + 2.0 * np.einsum("her,rd->hed", a, b)
    np.testing.assert_allclose(merged["trunk"]["layers"][name][layer], expected, atol=1e-5)


def test_the_sampler_draws_from_the_adapted_model():
    sample = make_sampler(MODEL, BASE_SPECS, compute=FLOAT32, eos_id=2, max_new_tokens=6, temperature=1.0)
    tokens, valid = pad_left([[1, 5, 9], [1, 7]], 4)
    whole = overlay(moved(), FROZEN)
    adapted, merged, base = (sample(tree, tokens, valid, row_keys(0, [0, 1])) for tree in (whole, lora.merged(whole), BASE))
    np.testing.assert_array_equal(adapted.tokens, merged.tokens)
    np.testing.assert_allclose(adapted.log_probs, merged.log_probs, atol=1e-5)
    assert (np.asarray(adapted.log_probs) != np.asarray(base.log_probs)).any()


def train(mesh, steps=3):
    """A few steps on a mesh; the state, the losses, and the frozen parameters as they lay during them."""
    optim = optimizer.make(OptimConfig(lr=1e-2, schedule="constant"), steps=steps, decay=params.decay_mask(SPECS))
    frozen_specs = {**BASE_SPECS, "lora": lora.scale_specs(CONFIG)}
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(SPECS, optim, mesh))
        state = jax.device_put(create(jax.tree.map(jnp.copy, ADAPTERS), optim), layout)
        frozen = jax.device_put(FROZEN, shardings(frozen_specs, mesh))
        step = make_step(language_model_loss(MODEL, FLOAT32), optim, microbatches=2, layout=layout)
        losses = []
        for _ in range(steps):
            state, means = step(state, put_batch(batch(16), mesh), frozen)
            losses.append(float(means["loss"]))
    return state, losses, frozen


def test_only_adapters_are_trained_and_have_moments():
    state, losses, frozen = train(make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1]))
    assert losses[2] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, FROZEN)  # neither changed nor donated
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), state.params, ADAPTERS)
    assert all(jax.tree.leaves(changed))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert numbers == 2 * params.count(SPECS)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 8, 1, 1)])
def test_eight_devices_train_as_one(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    state, losses, _ = train(mesh)
    expected, expected_losses, _ = train(make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1]))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), state.params, expected.params)
    jax.tree.map(lambda x, sharding: x.sharding == sharding or pytest.fail(str(x.sharding)), state.params,
                 shardings(SPECS, mesh))  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [
    ({"rank": -1}, "lora.rank: expected 0"),
    ({"alpha": 0.0}, "lora.alpha: expected a positive number"),
    ({"targets": ("query", "norm")}, "lora.targets: expected some of query, key"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"rank": 4, **changes})


# Whole runs


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("lora")
    small_runs.prepare(made)
    return made


@pytest.fixture
def small_tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))


def one_mesh():
    return make_mesh(MeshConfig())


def saved(workdir):
    return saved_parts(workdir), read_meta(workdir)


def test_sft_with_adapters_saves_them_alone_and_loads_as_a_whole_model(directory, small_tiny, tmp_path):
    values = small_runs.values(directory, "sft", steps=3, lora={"rank": 4})
    run(values, tmp_path / "sft")
    parts, meta = saved(tmp_path / "sft")
    assert set(parts) == {"lora"} and meta["lora"]["rank"] == 4
    assert all("['lora']" in name or "count" in name or "step" in name or "skipped" in name for name in meta["fingerprints"])
    specs = params.table(SIZES["tiny"], head="lm_head")
    base = restore_model(directory / "chat", specs, one_mesh())
    merged = restore_model(tmp_path / "sft", specs, one_mesh())
    np.testing.assert_array_equal(merged["trunk"]["embedding"], base["trunk"]["embedding"])
    config = LoraConfig(rank=4)
    adapters = restore_params(tmp_path / "sft", {"lora": lora.adapter_specs(specs, config)}, one_mesh())
    a, b = (np.asarray(adapters["lora"]["layers"]["gate"][part]) for part in "ab")
    expected = np.asarray(base["trunk"]["layers"]["gate"]) + 4.0 * np.einsum("ldr,lrf->ldf", a, b)
    assert np.abs(expected - np.asarray(base["trunk"]["layers"]["gate"])).max() > 1e-4
    np.testing.assert_allclose(merged["trunk"]["layers"]["gate"], expected, atol=1e-6)

    # The front of the library, and an export that others read.
    loaded = llama_jax.load(tmp_path / "sft", tokenizer=directory / "tokenizer.model", mesh=one_mesh())
    tokens = np.random.default_rng(0).integers(3, 300, (2, 10))
    whole = overlay(adapters, {**base, "lora": {"scale": jnp.float32(4.0)}})
    ones = np.ones((2, 10), np.int32)

    @jax.jit
    def unmerged(tree):
        hidden = hidden_states(tree, tokens, ones, np.arange(10) + 0 * ones, config=SIZES["tiny"], compute=FLOAT32)
        return heads.logits(tree, hidden, compute=FLOAT32)

    np.testing.assert_allclose(loaded.logits(tokens), unmerged(whole), atol=1e-5)
    convert.run(tmp_path / "sft", tmp_path / "hf", to="huggingface", tokenizer="none", quiet=True)
    again = llama_jax.load(tmp_path / "hf", mesh=one_mesh())
    np.testing.assert_allclose(again.logits(tokens), loaded.logits(tokens), atol=1e-6)
    theirs = by_transformers("AutoModelForCausalLM", tmp_path / "hf", tokens)
    np.testing.assert_allclose(theirs, loaded.logits(tokens), atol=1e-4)
    unadapted = llama_jax.load(directory / "chat", tokenizer=directory / "tokenizer.model", mesh=one_mesh())
    assert np.abs(theirs - unadapted.logits(tokens)).max() > 0.01


def by_transformers(kind, directory, tokens):
    """What a model of transformers computes from an export."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = getattr(transformers, kind).from_pretrained(directory).eval()
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def test_the_base_may_be_a_named_checkpoint(directory, tmp_path):
    described = describe_base(LoraConfig(rank=2), f"{directory}/chat@0", tmp_path / "sft")
    write_json(tmp_path / "sft/checkpoints/3/meta/metadata", {"fingerprints": {}, "lora": described})
    assert described["base"]["workdir"] == f"{directory.resolve()}/chat@0" and described["base"]["relative"].endswith("/chat@0")
    assert str(base_of(f"{tmp_path}/sft@3")).endswith("/chat@0")


def test_adapters_on_adapters_and_a_base_that_changed(directory, small_tiny, tmp_path):
    run(small_runs.values(directory, "sft", steps=2, lora={"rank": 2}), tmp_path / "first")
    second = small_runs.values(directory, "sft", steps=2, lora={"rank": 3, "targets": ("query",)})
    second.start = str(tmp_path / "first")
    run(second, tmp_path / "second")
    specs = params.table(SIZES["tiny"], head="lm_head")
    first, both = (restore_model(tmp_path / name, specs, one_mesh()) for name in ("first", "second"))
    np.testing.assert_array_equal(first["trunk"]["layers"]["key"], both["trunk"]["layers"]["key"])
    assert np.any(np.asarray(first["trunk"]["layers"]["query"]) != np.asarray(both["trunk"]["layers"]["query"]))
    # Moved together they are found; another model in the base's place is refused.
    (tmp_path / "moved").mkdir()
    for name in ("first", "second"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    jax.tree.map(np.testing.assert_array_equal, restore_model(tmp_path / "moved/second", specs, one_mesh()), both)
    (tmp_path / "moved" / "first").rename(tmp_path / "moved" / "gone")
    with pytest.raises(CheckpointError, match="holds adapters of .*first, which is not there"):
        restore_model(tmp_path / "moved/second", specs, one_mesh())
    run(small_runs.values(directory, "sft", steps=3, lora={"rank": 2}), tmp_path / "moved" / "first")
    with pytest.raises(CheckpointError, match="holds adapters of a model with fingerprint"):
        restore_model(tmp_path / "moved/second", specs, one_mesh())


def test_a_reward_model_with_adapters_trains_its_head_too_and_scores(directory, small_tiny, tmp_path):
    summary = run(small_runs.values(directory, "reward", steps=4, lora={"rank": 4}), tmp_path / "reward")
    parts, meta = saved(tmp_path / "reward")
    assert set(parts) == {"lora", "reward_head"} and summary["compilations_after_warm_up"] == 0
    loaded = llama_jax.load(tmp_path / "reward", tokenizer=directory / "tokenizer.model", mesh=one_mesh())
    assert loaded.head == "reward_head"
    words = Tokenizer(directory / "tokenizer.model")
    pairs = encode_comparisons(str(directory / "pairs.jsonl"), words, length=32, margin="none")
    found = [[float(loaded.scores([ids])[0]) for ids in (pair.chosen, pair.rejected)] for pair in pairs[:2]]
    rows = [json.loads(line) for line in (tmp_path / "reward" / "held_out_scores.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(found, [[row["chosen"], row["rejected"]] for row in rows[:2]], atol=1e-4)
    convert.run(tmp_path / "reward", tmp_path / "hf", to="huggingface", tokenizer="none", quiet=True)
    tokens = np.random.default_rng(0).integers(3, 300, (2, 10))
    theirs = by_transformers("AutoModelForSequenceClassification", tmp_path / "hf", tokens)[:, 0]
    np.testing.assert_allclose(theirs, loaded.scores(tokens), atol=1e-4)
    head = restore_params(tmp_path / "reward", {"reward_head": params.table(SIZES["tiny"], head="reward_head")["reward_head"]},
                          one_mesh())  # fmt: skip
    base = restore_model(directory / "chat", params.table(SIZES["tiny"], head="lm_head"), one_mesh())
    unadapted = scorer(SIZES["tiny"], FLOAT32)({"trunk": base["trunk"], **head}, jnp.asarray(tokens), jnp.ones_like(tokens))
    assert np.abs(theirs - unadapted).max() > 0.01
    run(small_runs.values(directory, "ppo", steps=2, helpfulness=str(tmp_path / "reward")), tmp_path / "ppo")


def test_ppo_with_adapters_resumes_to_the_bit(directory, small_tiny, tmp_path, monkeypatch):
    values = small_runs.values(directory, "ppo", steps=4, lora={"rank": 4}, loop={"checkpoint_every": 1})
    run(values, tmp_path / "whole")
    parts, meta = saved(tmp_path / "whole")
    assert parts == {"policy": {"lora"}, "critic": {"lora", "value_head"}} and {"lora", "lora_critic"} <= set(meta)
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] == 0  # the policy begins as its reference
    real = RolloutSource.batch

    def stop(self, step, trees):
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step, trees)

    monkeypatch.setattr(RolloutSource, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        run(values, tmp_path / "stopped")
    monkeypatch.setattr(RolloutSource, "batch", real)
    run(values, tmp_path / "stopped")
    assert read_meta(tmp_path / "stopped")["fingerprints"] == meta["fingerprints"]
    specs = params.table(SIZES["tiny"], head="lm_head")
    policy = restore_model(tmp_path / "whole", specs, one_mesh())  # other stages start from the merged policy
    assert np.any(np.asarray(policy["trunk"]["layers"]["up"]) != np.asarray(
        restore_model(directory / "chat", specs, one_mesh())["trunk"]["layers"]["up"]))  # fmt: skip


def test_dpo_and_grpo_take_adapters(directory, small_tiny, tmp_path):
    run(small_runs.values(directory, "dpo", steps=2, lora={"rank": 2}), tmp_path / "dpo")
    first = json.loads((tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the base is the reference
    run(small_runs.values(directory, "grpo", steps=2, lora={"rank": 2}), tmp_path / "grpo")
    assert saved(tmp_path / "grpo")[0] == {"policy": {"lora"}}


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_no_stage_but_pretraining_draws_a_model_that_was_not_asked_for(directory, small_tiny, tmp_path, stage):
    values = small_runs.values(directory, stage, steps=1, start="")
    with pytest.raises(ConfigError, match=f"config.start: {stage} .* expected its workdir, got nothing.*'scratch'"):
        run(values, tmp_path / stage)
    config = parse_stage(small_runs.values(directory, stage, steps=1, start="scratch"))
    load_tokenizer(config)
    specs = params.table(SIZES["tiny"], head="lm_head")
    made = begin(config, specs, make_mesh(), workdir=tmp_path)
    assert all(jax.tree.leaves(jax.tree.map(np.isfinite, jax.tree.map(np.sum, made.init()))))
    with pytest.raises(ConfigError, match="config.start=scratch: .* no reference"):
        made.completed(specs, make_mesh(), start=config.start)


def test_adapters_without_a_start_are_refused(directory, small_tiny, tmp_path):
    values = small_runs.values(directory, "sft", steps=2, lora={"rank": 2})
    values.start = "scratch"
    with pytest.raises(ConfigError, match="lora.rank.* need a model to adapt"):
        run(values, tmp_path / "sft")
