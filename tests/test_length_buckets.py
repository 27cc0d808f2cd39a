"""Batches of similar lengths: every example once an epoch, one length on all processes, the same numbers with less padding."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_runs

from llama_jax.data.length_buckets import BucketedBatches, padded_lengths
from llama_jax.data.loader import Share
from llama_jax.data.sources import write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop.restore import restore_model
from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.reward.comparisons import collate, encode_comparisons
from llama_jax.reward.score import scorer
from llama_jax.train import parse_stage, run


def make(examples, batch_size=4, lengths=(8, 16), seed=3, **more):
    def collate(rows, *, length):
        return np.array([row + [0] * (length - len(row)) for row in rows])

    return BucketedBatches(
        examples, collate, batch_size, seed, lengths=lengths, size=len, blank=lambda row: [-1] * len(row), **more
    )  # fmt: skip


def rows(count, seed=0):
    """Row i holds its number, 1 to 16 times."""
    return [[i] * n for i, n in enumerate(np.random.default_rng(seed).integers(1, 17, count))]


def test_lengths_are_even_multiples_of_eight():
    assert padded_lengths(192, 4) == (48, 96, 144, 192) and padded_lengths(100, 3) == (40, 72, 100)
    assert padded_lengths(20, 4) == (8, 16, 20) and padded_lengths(128, 1) == (128,)
    with pytest.raises(ValueError, match="data.buckets"):
        padded_lengths(128, 0)


@pytest.mark.parametrize("count", [40, 640, 4 * 97, 4 * 1000])  # epochs of 97 and of 1,000 steps are no multiple of 64
def test_an_epoch_has_every_example_once_and_each_batch_what_it_says(count):
    source = make(rows(count))
    epoch = [source.rows(step) for step in range(source.steps_per_epoch)]
    assert sorted(sum(epoch, [])) == list(range(count))
    assert epoch != [source.rows(step) for step in range(source.steps_per_epoch, 2 * source.steps_per_epoch)]
    for step, numbers in enumerate(epoch):
        batch = source.batch(step)
        assert batch[:, 0].tolist() == numbers
        assert batch.shape[1] == (8 if max(len(source.examples[i]) for i in numbers) <= 8 else 16)


def test_a_batch_depends_on_its_number_alone():
    examples = rows(640)
    late = make(examples).rows(150)
    source = make(examples)
    assert [source.rows(step) for step in range(300)][150] == late
    assert make(examples, seed=4).rows(150) != late


def test_padding_is_less_than_half_of_what_it_was_and_lengths_come_mixed():
    source = make(rows(640), lengths=padded_lengths(16, 2))
    widths = [source.batch(step).shape[1] for step in range(160)]
    assert sum(width == 8 for width in widths) > 70  # one of 160 shuffled batches of 4 would be so short in 16
    assert len({tuple(widths[i : i + 20]) for i in range(0, 160, 20)}) == 8


def test_the_mean_length_is_that_of_the_batches():
    source = make(rows(640), lengths=padded_lengths(16, 2))
    assert source.mean_length == np.mean([source.batch(step).shape[1] for step in range(source._window(0)[1])]) < 13


def test_a_batch_of_each_length_that_occurs_is_an_example():
    source = make(rows(640), lengths=(4, 8, 12, 16))
    shapes = {source.batch(step).shape for step in range(source._window(1)[1])}
    examples = list(source.shapes())
    assert [batch.shape for batch in examples] == sorted(shapes) and len(shapes) == 4
    assert all((batch[:, 0] == -1).all() for batch in examples)


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_a_batch_may_be_several_epochs(count):
    """Then windows of some epochs have no batch: the second one of the lengths that are looked up beforehand, among others."""
    source = make(rows(count), batch_size=8)
    seen = sum((source.rows(step) for step in range(2 * count)), [])
    assert all(seen.count(i) == 16 for i in range(count)) and len(list(source.shapes())) >= 1


def test_processes_share_a_length_and_their_parts_are_the_global_batch():
    examples = rows(40)
    parts = [make(examples, share=Share((i,), 2)) for i in (0, 1)]
    for step in range(10):
        both = [part.batch(step) for part in parts]
        np.testing.assert_array_equal(np.concatenate(both), make(examples).batch(step))
    for whole, *halves in zip(make(examples).eval_batches(), *(part.eval_batches() for part in parts), strict=True):
        np.testing.assert_array_equal(np.concatenate(halves), whole)


def test_evaluation_is_in_stored_order_and_filled():
    examples = rows(10)
    batches = list(make(examples).eval_batches())
    assert np.concatenate([batch[:, 0] for batch in batches]).tolist() == [*range(10), -1, -1]


def test_a_row_that_fits_no_length_is_an_error():
    with pytest.raises(ValueError, match="17 tokens does not fit into 16"):
        make([[1] * 17] * 4).batch(0)


def test_a_reward_model_trained_in_buckets_reports_each_pair_by_its_own_score(monkeypatch, tmp_path):
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(small_runs.MODEL, name="tiny"))
    small_runs.prepare(tmp_path)
    pairs = [{"prompt": "a", "chosen": "bc " * (1 + 5 * i % 11), "rejected": "d " * (1 + 3 * i % 5)} for i in range(44)]
    write_jsonl(tmp_path / "mixed.jsonl", pairs)
    files = {name: (str(tmp_path / "mixed.jsonl"),) for name in ("train", "held_out", "validation")}
    values = small_runs.values(tmp_path, "reward", steps=8, data={**files, "length": 48, "buckets": 4})
    summary = run(values, tmp_path / "reward")
    assert summary["compilations_after_warm_up"] == 0 and summary["compilations"] > 1
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    encoded = encode_comparisons(files["held_out"][0], tokenizer, length=48, margin="none")
    widths = {len(ids) for pair in encoded for ids in (pair.chosen, pair.rejected)}
    assert len(widths) > 3 and min(widths) <= 24 < max(widths), "the pairs do not need several lengths"
    model, mesh = SIZES["tiny"], make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    trained = restore_model(tmp_path / "reward", params.table(model, head="reward_head"), mesh)
    score = jax.jit(scorer(model, parse_stage(values).compute))
    whole = collate(encoded, length=48)
    expected = np.stack([score(trained, whole.tokens[:, i], whole.segment_ids[:, i]) for i in (0, 1)], axis=1)
    rows = [json.loads(line) for line in (tmp_path / "reward" / "held_out_scores.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([[row["chosen"], row["rejected"]] for row in rows], expected, atol=1e-4)
    assert len(np.unique(expected.round(4))) > 11
    report = json.loads((tmp_path / "reward" / "reward_report.json").read_text())
    assert report["baselines"]["longer"]["share"] == np.mean([(np.sign(row["longer_by"]) + 1) / 2 for row in rows])
