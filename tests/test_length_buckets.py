"""Batches of similar lengths: every example once an epoch, one length on all processes, the same numbers with less padding."""

import numpy as np
import pytest

from llama_jax.data.length_buckets import BucketedBatches, padded_lengths


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


@pytest.mark.parametrize("count", [40, 640])
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


def test_processes_share_a_length_and_their_parts_are_the_global_batch():
    examples = rows(40)
    parts = [make(examples, process_index=i, process_count=2) for i in (0, 1)]
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


