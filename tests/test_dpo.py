"""DPO: formulas in float64, the first loss, learning, sharding; DPO and the reward model's report through the real entry."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ConfigError
from llama_jax.data.dialog import encode_dialog
from llama_jax.data.loader import IndexedBatches
from llama_jax.data.sources import write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model import heads, params
from llama_jax.model.config import FLOAT32, SIZES
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel.axes import shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.reward.comparisons import Comparison, blank, encode_comparisons
from llama_jax.rlhf.dpo import DpoSettings, DpoSource, collate, dpo_loss, dpo_losses, response_log_probs
from llama_jax.steps import change, load_config
from llama_jax.train import run
from llama_jax.training.saved import read_meta, restore_params

ROOT = Path(__file__).parents[1]
MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=24, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=32
)
SPECS = params.table(MODEL, head="lm_head")


def tree(seed):
    return jax.tree.map(lambda x: 3 * x, params.init(SPECS, jax.random.key(seed)))


POLICY, REFERENCE = tree(0), tree(1)


def pairs(number, *, seed=0):
    """The chosen answer holds token 7, the rejected one another; the prompt is two tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        a, b = rng.choice(np.arange(8, 24), 2, replace=False).tolist()
        made.append(Comparison([1, a, 7, 2], [1, a, b, b, 2], margin=0.0, degree=-1, safety_bin=None, response_start=2))
    return made


def log_sigmoid(x):
    return -np.log1p(np.exp(-np.abs(x))) + np.minimum(x, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_agree_with_the_formulas_in_float64(smoothing):
    rng = np.random.default_rng(0)
    policy, reference, margin = rng.normal(0, 5, (64, 2)), rng.normal(0, 5, (64, 2)), rng.uniform(0, 1, 64)
    h = (policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1])
    expected = {
        "sigmoid": -(1 - smoothing) * log_sigmoid(0.3 * h - margin) - smoothing * log_sigmoid(margin - 0.3 * h),
        "hinge": np.maximum(0, 1 + margin - 0.3 * h),
        "ipo": (h - margin / 0.3 - 1 / (2 * 0.3)) ** 2,
    }
    arrays = [jnp.asarray(x, jnp.float32) for x in (policy, reference, margin)]
    for kind, values in expected.items():
        found = dpo_losses(*arrays, beta=0.3, kind=kind, label_smoothing=smoothing)
        np.testing.assert_allclose(found, values, rtol=2e-6, atol=1e-6 * np.abs(values).max(), err_msg=kind)


def test_losses_by_hand():
    log_probs, reference = jnp.array([[-1.0, -2.0], [-3.0, -1.0]]), jnp.array([[-1.5, -1.5], [-2.0, -2.0]])
    found = dpo_losses(log_probs, reference, jnp.zeros(2), beta=0.5)  # h = 1 and -2
    np.testing.assert_allclose(found, [np.log1p(np.exp(-0.5)), np.log1p(np.exp(1.0))], rtol=1e-6)
    with pytest.raises(ValueError, match=r"margin \[B\]"):
        dpo_losses(log_probs, reference, jnp.zeros((2, 1)), beta=0.5)


def test_the_response_is_what_follows_the_prompt_up_to_eos():
    batch = collate(pairs(1), length=8)
    for side, ids in enumerate((pairs(1)[0].chosen, pairs(1)[0].rejected)):
        kept = batch.targets[0, side][batch.response[0, side] > 0].tolist()
        assert kept == ids[2:] and kept[-1] == 2
    assert batch.segment_ids.sum() == 4 + 5


def test_log_probs_are_sums_over_the_response_and_ignore_padding():
    short, long = collate(pairs(3), length=6), collate(pairs(3), length=16)
    found = np.asarray(response_log_probs(MODEL, FLOAT32)(POLICY, short))
    np.testing.assert_allclose(found, response_log_probs(MODEL, FLOAT32)(POLICY, long), atol=1e-5)
    for i, pair in enumerate(pairs(3)):
        for side, ids in enumerate((pair.chosen, pair.rejected)):
            row = jnp.array([ids])
            hidden = hidden_states(
                POLICY, row, jnp.ones_like(row), jnp.arange(len(ids))[None], config=MODEL, compute=FLOAT32
            )
            logits = np.asarray(heads.logits(POLICY, hidden, compute=FLOAT32)[0], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            expected = sum(log_p[t - 1, ids[t]] for t in range(2, len(ids)))
            np.testing.assert_allclose(found[i, side], expected, rtol=1e-5)


def source(mesh, reference=REFERENCE, number=8):
    batches = IndexedBatches(pairs(number), lambda rows: collate(rows, length=8), 8, 0, blank=blank)
    return DpoSource(batches, reference, config=MODEL, compute=FLOAT32, mesh=mesh)


def one_device():
    return make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])


def test_the_first_loss_is_log_2_and_filling_weighs_nothing():
    mesh, loss = one_device(), jax.jit(dpo_loss(MODEL, FLOAT32, DpoSettings(beta=0.1)))
    with jax.set_mesh(mesh):
        batch, _ = source(mesh, POLICY).batch(0, None)
        objective, metrics = loss(POLICY, batch)
        np.testing.assert_allclose(objective.mean(), np.log(2), rtol=1e-6)
        assert abs(float(metrics["reward/margin"].mean())) < 1e-5
        part = source(mesh, number=5)
        (filled,) = part.eval_batches()
        whole, _ = loss(POLICY, part.with_reference(filled))
        alone, _ = loss(POLICY, part.with_reference(collate(pairs(5), length=8)))
    assert whole.weight == alone.weight == 5
    np.testing.assert_allclose(whole.sum, alone.sum, rtol=1e-5)


def test_the_next_token_term_is_the_mean_over_the_chosen_tokens():
    mesh = one_device()
    with jax.set_mesh(mesh):
        batch, _ = source(mesh).batch(0, None)
        plain, metrics = dpo_loss(MODEL, FLOAT32, DpoSettings(beta=0.1))(POLICY, batch)
        more, _ = dpo_loss(MODEL, FLOAT32, DpoSettings(beta=0.1, sft_weight=0.5))(POLICY, batch)
    # chosen answers have two tokens, 7 and EOS
    np.testing.assert_allclose(more.sum - plain.sum, 0.5 * -metrics["log_prob/chosen"].sum / 2, rtol=1e-4)


def test_it_learns_to_prefer_the_chosen_answer():
    mesh, loss = one_device(), dpo_loss(MODEL, FLOAT32, DpoSettings(beta=0.5))
    with jax.set_mesh(mesh):
        train = source(mesh, POLICY, number=64).with_reference(collate(pairs(64), length=8))
        test = source(mesh, POLICY).with_reference(collate(pairs(32, seed=1), length=8))
        step = jax.jit(lambda p: jax.tree.map(
            lambda x, g: x - 0.05 * g, p, jax.grad(lambda q: loss(q, train)[0].mean())(p)
        ))  # fmt: skip
        tuned = POLICY
        for _ in range(30):
            tuned = step(tuned)
        objective, metrics = loss(tuned, test)
        _, first = loss(POLICY, test.replace(reference=response_log_probs(MODEL, FLOAT32)(POLICY, test)))
    assert float(first["accuracy"].mean()) == 0.5  # nothing is preferred yet: ties count half
    assert float(metrics["accuracy"].mean()) > 0.9 and float(objective.mean()) < 0.5


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 2, 4, 1)])
def test_eight_devices_give_the_loss_and_gradient_of_one(sizes):
    loss = dpo_loss(MODEL, FLOAT32, DpoSettings(beta=0.1))

    def measured(mesh):
        with jax.set_mesh(mesh):
            policy, reference = (jax.device_put(x, shardings(SPECS, mesh)) for x in (POLICY, REFERENCE))
            batch, _ = source(mesh, reference).batch(0, None)
            return jax.jit(jax.value_and_grad(lambda p, b: loss(p, b)[0].sum))(policy, batch)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), measured(make_mesh(MeshConfig(*sizes))),
        measured(one_device()),
    )  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [
    ({"beta": 0.0}, "dpo.beta: expected a positive number"),
    ({"label_smoothing": 0.5}, "dpo.label_smoothing: expected 0 up to 0.5"),
    ({"label_smoothing": 0.1, "kind": "ipo"}, "belongs to kind 'sigmoid'"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DpoSettings(**{"beta": 0.1, **changes})


def make_tokenizer(directory, size):
    import sentencepiece

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(3 * size)]
    lines = ["[INST] " + " ".join(words[i : i + 8]) + " [/INST] yes no" for i in range(0, len(words), 8)]
    (directory / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"), model_prefix=str(directory / "tokenizer"), vocab_size=size, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    return directory / "tokenizer.model"


def make_data(directory):
    """Dialogs and comparisons: "yes" is chosen over "no", with ratings, sources and safety bins."""
    questions = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    write_jsonl(directory / "dialogs.jsonl", [{"prompt": q, "completion": "yes" if i % 2 else "no"}
                                              for i, q in enumerate(questions)])  # fmt: skip
    write_jsonl(directory / "pairs.jsonl", [
        {"prompt": q, "chosen": "yes", "rejected": "no", "rating": ("better", "slightly")[i % 2],
         "source": ("one", "two")[i % 2], "safety_bin": "chosen_safe"}
        for i, q in enumerate(questions)
    ])  # fmt: skip


def stage_values(name, tokenizer, directory, changes):
    values = load_config(ROOT / "configs", f"{name}.py:tiny")
    change(values, {"tokenizer": str(tokenizer), "epochs": 0.0, "optim": {"warmup": 1}, **changes}, where=name)
    return values


def stages(directory, tokenizer, *, steps):
    """Configs of SFT, DPO and a reward model on the same small data."""
    pairs_file = (str(directory / "pairs.jsonl"),)
    comparisons = {"train": pairs_file, "held_out": pairs_file, "length": 64}
    loop = {"steps": steps, "batch_size": 16, "checkpoint_every": steps}
    return {
        "sft": {"start": "scratch", "data": {"train": (str(directory / "dialogs.jsonl"),), "length": 64}, "loop": loop},
        "dpo": {"start": str(directory / "sft"), "data": comparisons, "loop": loop, "optim": {"warmup": 1, "lr": 1e-3}},
        "reward": {"start": str(directory / "sft"), "data": {**comparisons, "others": pairs_file}, "loop": loop},
    }


def check_run(directory, summaries):
    assert summaries["dpo"]["compilations_after_warm_up"] == 0 and summaries["dpo"]["held_out"]["loss"] < np.log(2)
    first = json.loads((directory / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    np.testing.assert_allclose(first["loss"], np.log(2), atol=0.01)  # bfloat16 products
    assert summaries["dpo"]["held_out"]["accuracy"] > 0.6
    report = json.loads((directory / "reward" / "reward_report.json").read_text())
    assert set(report["accuracy"]) == {"one", "two", "all", "longer"} and report["accuracy"]["all"]["all"]["n"] == 64
    assert report["accuracy"]["all"]["all"]["share"] == pytest.approx(summaries["reward"]["held_out"]["accuracy/all"])
    assert report["others"] == report["accuracy"]  # here they are the same pairs
    rows = [json.loads(line) for line in (directory / "reward" / "held_out_scores.jsonl").read_text().splitlines()]
    scores = np.array([[row["chosen"], row["rejected"]] for row in rows])
    stored = read_meta(directory / "reward")["scores"]
    # The training pairs are the held-out ones here, and fewer than score_pairs.
    np.testing.assert_allclose([stored["mean"], stored["std"], stored["pairs"]], [scores.mean(), scores.std(), 64], rtol=1e-4)


def test_sft_dpo_and_reward_model_through_train(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(tmp_path, 304)
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(MODEL, name="tiny", vocab_size=304, max_length=64))
    make_data(tmp_path)
    summaries = {}
    for name, changes in stages(tmp_path, tokenizer, steps=12).items():
        summaries[name] = run(stage_values(name, tokenizer, tmp_path, changes), tmp_path / name)
    check_run(tmp_path, summaries)
    words = Tokenizer(tokenizer)
    found = encode_comparisons(str(tmp_path / "pairs.jsonl"), words, length=64, margin="small")[0]
    prompt = words.encode("[INST] aa [/INST]", bos=True)
    assert found.chosen[: found.response_start].tolist() == found.rejected[: found.response_start].tolist() == prompt
    assert found.source == "one" and found.margin == 2 / 3

    values = stage_values("dpo", tokenizer, tmp_path, {**stages(tmp_path, tokenizer, steps=12)["dpo"], "start": ""})
    with pytest.raises(ValueError, match="start: DPO starts from a chat model"):
        run(values, tmp_path / "nothing")
    for name, changes in stages(tmp_path, tokenizer, steps=12).items():
        changes["data"]["length"] = 128
        with pytest.raises(ConfigError, match="data.length=128, model tiny takes 64"):
            run(stage_values(name, tokenizer, tmp_path, changes), tmp_path / f"long_{name}")


def test_pairs_are_held_as_arrays_of_the_ids_of_whole_dialogs(tmp_path):
    words = Tokenizer(make_tokenizer(tmp_path, 304))
    user, assistant = ({"role": role, "content": "ab"} for role in ("user", "assistant"))
    system = {"role": "system", "content": "Be brief."}
    prompts = [[user], [system, user], [user, assistant, user], [system, *[user, assistant] * 2, user]]
    rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no, never"} for prompt in prompts]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = encode_comparisons(str(tmp_path / "pairs.jsonl"), words, length=128, margin="none")
    for pair, row in zip(found, rows, strict=True):
        for side in ("chosen", "rejected"):
            whole = encode_dialog([*row["prompt"], {"role": "assistant", "content": row[side]}], words, train_on="last")
            ids = getattr(pair, side)
            assert ids.dtype == np.int32 and ids.tolist() == whole.ids and pair.response_start == whole.supervised.index(True)


def test_pairs_longer_than_a_row_are_dropped_whole_counted_and_the_first_is_named(tmp_path, caplog):
    words = Tokenizer(make_tokenizer(tmp_path, 304))
    path = tmp_path / "pairs.jsonl"
    answers = [("1", "2"), ("1", "2" * 200), ("1" * 90, "2"), ("3", "4"), ("5" * 300, "6")]
    bins = (None, "rejected_safe", None, None, None)  # dropped for what it prefers, the second is not counted as long
    write_jsonl(path, [
        {"prompt": "a", "chosen": chosen, "rejected": rejected, **({"safety_bin": name} if name else {})}
        for (chosen, rejected), name in zip(answers, bins, strict=True)
    ])  # fmt: skip
    question = {"role": "user", "content": "a"}
    sizes = [len(encode_dialog([question, {"role": "assistant", "content": chosen}], words).ids) for chosen, _ in answers]
    found = encode_comparisons(str(path), words, length=64, margin="none")
    assert [pair.tokens for pair in found] == [sizes[0], sizes[3]] and max(sizes[0], sizes[3]) <= 64 < sizes[2]
    assert [record.getMessage() for record in caplog.records if "are longer than" in record.getMessage()] == [
        f"{path}: 2 of 5 pairs are longer than 64 tokens and dropped; the first is {path}:3 ({sizes[2]} tokens)"
    ]
    # The longer side counts, and one that just fits stays.
    assert len(encode_comparisons(str(path), words, length=sizes[4], margin="none")) == 4
    assert len(encode_comparisons(str(path), words, length=sizes[4] - 1, margin="none")) == 3
    assert caplog.records[-1].getMessage().endswith(f"and dropped; the first is {path}:5 ({sizes[4]} tokens)")


def test_pairs_that_prefer_an_unsafe_answer_are_dropped_and_counted(tmp_path, caplog):
    words = Tokenizer(make_tokenizer(tmp_path, 304))
    bins = ("chosen_safe", "rejected_safe", "both_safe", "rejected_safe", None)
    write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": "a", "chosen": f"yes {i}", "rejected": "no", **({"safety_bin": name} if name else {})}
        for i, name in enumerate(bins)
    ])  # fmt: skip
    found = encode_comparisons(str(tmp_path / "pairs.jsonl"), words, length=64, margin="none")
    assert [pair.safety_bin for pair in found] == ["chosen_safe", "both_safe", None]
    assert "pairs.jsonl: 2 of 5 pairs prefer an unsafe answer to a safe one and are dropped" in caplog.text
    assert "longer than" not in caplog.text
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "yes", "rejected": "no", "safety_bin": "rejected_safe"}])
    with pytest.raises(ValueError, match="pairs.jsonl: none of 1 comparisons is left: 0 do not fit into 64"):
        encode_comparisons(str(tmp_path / "pairs.jsonl"), words, length=64, margin="none")


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(tmp_path, 304)
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(MODEL, name="tiny", vocab_size=304, max_length=64))
    make_data(tmp_path)
    made = stages(tmp_path, tokenizer, steps=4)
    run(stage_values("sft", tokenizer, tmp_path, made["sft"]), tmp_path / "sft")
    made["dpo"]["loop"]["checkpoint_every"] = 2
    values = stage_values("dpo", tokenizer, tmp_path, made["dpo"])
    run(values, tmp_path / "whole")
    real = DpoSource.batch

    def stop(self, step, parameters):
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step, parameters)

    monkeypatch.setattr(DpoSource, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        run(values, tmp_path / "stopped")
    monkeypatch.setattr(DpoSource, "batch", real)
    run(values, tmp_path / "stopped")
    mesh = make_mesh(MeshConfig())
    specs = params.table(SIZES["tiny"], head="lm_head")
    a, b = (restore_params(tmp_path / name, specs, mesh) for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_dpo_through_the_command(tmp_path):
    tokenizer = make_tokenizer(tmp_path, 4096)
    make_data(tmp_path)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def train(name, *flags):
        done = subprocess.run(
            [sys.executable, "-m", "llama_jax.train", f"--config=configs/{name}.py:tiny", f"--workdir={tmp_path / name}",
             f"--config.tokenizer={tokenizer}", "--config.epochs=0", "--config.loop.steps=20", "--config.data.length=64",
             "--config.loop.batch_size=16", "--config.compute.unroll=False", *flags],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / name / "done.json").read_text())

    pairs_file = f'("{tmp_path / "pairs.jsonl"}",)'
    more = (f"--config.start={tmp_path / 'sft'}", f"--config.data.train={pairs_file}", f"--config.data.held_out={pairs_file}")
    summaries = {"sft": train("sft", "--config.start=scratch", f'--config.data.train=("{tmp_path / "dialogs.jsonl"}",)')}
    summaries |= {"dpo": train("dpo", *more), "reward": train("reward", *more, f"--config.data.others={pairs_file}")}
    check_run(tmp_path, summaries)
