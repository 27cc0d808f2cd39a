"""Packing, blocks and batches: no token lost, and a batch depends on seed and step alone, on any number of processes."""

import functools

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.blocks import block_ids, block_length_of, block_record
from llama_jax.data.dialog import EncodedDialog
from llama_jax.data.loader import BlockSource, IndexedBatches, TokenBatch, block_batch, row_source
from llama_jax.data.packing import pack, pack_dialogs, packed_row

FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions")


def assert_same(a: TokenBatch, b: TokenBatch) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype, name


def joined(parts: list[TokenBatch]) -> TokenBatch:
    return TokenBatch(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})


def dialog(*ids: int, supervised_from: int) -> EncodedDialog:
    return EncodedDialog(list(ids), [i >= supervised_from for i in range(len(ids))])


class TestPacking:
    def test_best_fit_decreasing_by_hand(self):
        # 6 opens row 0, 5 opens row 1; 4 fits row 0 exactly, 3 leaves 2 in row 1, where the last 2 goes.
        assert pack([2, 5, 6, 3, 4], 10) == [[2, 4], [1, 3, 0]]

    def test_the_tightest_row_is_chosen_and_ties_go_by_index(self):
        assert pack([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]
        assert pack([4, 4, 4], 4) == [[0], [1], [2]]

    @settings(max_examples=100, deadline=None)
    @given(lengths=st.lists(st.integers(1, 30), max_size=60))
    def test_every_example_is_in_one_row_and_rows_hold_them(self, lengths):
        rows = pack(lengths, 30)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 30 for row in rows)
        # At most one row may be half empty, or two of them would have been one.
        assert sum(sum(lengths[i] for i in row) <= 15 for row in rows) <= 1

    def test_lengths_are_checked(self):
        with pytest.raises(ValueError, match="example 1: expected 1 to 4 tokens, got 5"):
            pack([4, 5], 4)

    def test_packed_row_by_hand(self):
        row = packed_row([dialog(1, 7, 8, 2, supervised_from=2), dialog(1, 9, 2, supervised_from=1)], 9)
        assert row.tokens.tolist() == [1, 7, 8, 2, 1, 9, 2, 0, 0]
        assert row.targets.tolist() == [7, 8, 2, 0, 9, 2, 0, 0, 0]
        assert row.weights.tolist() == [0, 1, 1, 0, 1, 1, 0, 0, 0]  # nothing leads from EOS to the next BOS
        assert row.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0]
        assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0]
        assert [getattr(row, name).dtype for name in FIELDS] == [np.int32, np.int32, np.float32, np.int32, np.int32]
        with pytest.raises(ValueError, match="row: expected at most 2 tokens, got 3 in 1 examples"):
            packed_row([dialog(1, 9, 2, supervised_from=1)], 2)

    @settings(max_examples=50, deadline=None)
    @given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=40), data=st.data())
    def test_tokens_and_targets_are_conserved(self, lengths, data):
        ids = iter(range(3, 10_000))
        examples = [dialog(*(next(ids) for _ in range(n)), supervised_from=data.draw(st.integers(1, n - 1))) for n in lengths]
        packed = pack_dialogs(examples, 20)
        everything = sorted(i for example in examples for i in example.ids)
        assert sorted(i for row in packed.rows for i in row.tokens[row.segment_ids > 0].tolist()) == everything
        assert packed.tokens == len(everything) and packed.overlong == []
        trained = sorted(i for example in examples for i, on in zip(example.ids, example.supervised, strict=True) if on)
        assert sorted(i for row in packed.rows for i in row.targets[row.weights > 0].tolist()) == trained
        assert packed.supervised == len(trained)
        assert packed.padding == pytest.approx(np.mean([row.segment_ids == 0 for row in packed.rows]))

    def test_overlong_examples_are_an_error_or_reported_never_cut(self):
        examples = [dialog(1, 5, 2, supervised_from=1), dialog(1, *range(3, 9), 2, supervised_from=1)]
        with pytest.raises(ValueError, match=r"example 1: expected at most 5 tokens, got 8 \(1 of 2 examples"):
            pack_dialogs(examples, 5)
        packed = pack_dialogs(examples, 5, overlong="report")
        assert (packed.overlong, packed.tokens, len(packed.rows)) == ([1], 3, 1)

    def test_an_example_that_trains_nothing_is_an_error(self):
        with pytest.raises(ValueError, match="example 0: no supervised token"):
            pack_dialogs([dialog(1, 5, 2, supervised_from=3)], 8)


class TestBlockRecords:
    @pytest.mark.parametrize(("vocab_size", "item"), [(65535, 2), (65536, 4)])
    def test_what_is_written_is_read(self, vocab_size, item):
        record = block_record([0, 1, vocab_size - 1], 7, vocab_size)
        assert len(record) == 8 + 8 * item and block_length_of(record) == 7
        assert block_ids(record).tolist() == [0, 1, vocab_size - 1]

    def test_errors(self):
        with pytest.raises(ValueError, match=r"expected 1 to 3 ids, got 4"):
            block_record([1, 2, 3, 4], 2, 10)
        with pytest.raises(ValueError, match=r"expected ids in 0..9, got 1..10"):
            block_record([1, 10], 2, 10)
        for damaged in (b"", b"abc", b"not a record of tokens", block_record([1, 2, 3], 2, 10)[:-3]):
            with pytest.raises(ValueError, match="not a record of tokens"):
                block_ids(damaged)

    def test_block_batch_by_hand(self):
        records = [block_record(ids, 4, 10) for ids in ([1, 5, 2, 1, 6], [6, 2, 1])]
        batch = block_batch(records, 4, row_count=3)
        assert batch.tokens.tolist() == [[1, 5, 2, 1], [6, 2, 1, 0], [0] * 4]
        assert batch.targets.tolist() == [[5, 2, 1, 6], [2, 1, 0, 0], [0] * 4]
        assert batch.weights.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0] * 4]
        assert batch.segment_ids.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0] * 4]
        assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0] * 4]

    def test_documents_may_be_segments(self):
        batch = block_batch([block_record(ids, 4, 10) for ids in ([1, 5, 2, 1, 6], [6, 2, 1])], 4, separate_documents=True)
        assert batch.segment_ids.tolist() == [[1, 1, 1, 2], [1, 1, 2, 0]]
        assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
        assert batch.weights.tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]  # a BOS is no target
        assert batch.weights.dtype == np.float32 and batch.positions.dtype == np.int32


class TestIndexedBatches:
    @pytest.mark.parametrize(("examples", "batch"), [(10, 4), (7, 3), (8, 4), (3, 8)])
    def test_every_epoch_holds_every_example_once(self, examples, batch):
        source = IndexedBatches(range(examples), list, batch, seed=5)
        assert source.steps_per_epoch == -(-examples // batch)
        stream = [i for step in range(examples * 3 // batch + 3) for i in source.batch(step)]
        epochs = [stream[n : n + examples] for n in (0, examples, 2 * examples)]
        assert all(sorted(epoch) == list(range(examples)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch is shuffled anew"

    def test_a_batch_depends_on_seed_and_step_alone(self):
        def source(seed, **options):
            return IndexedBatches(range(100), list, 8, seed, **options)

        first = source(1)
        for step in (37, 2, 0):  # in any order, from any start
            assert first.batch(step) == source(1).batch(step)
        assert first.batch(2) != source(2).batch(2)
        assert source(1, shuffle=False).batch(12) == [96, 97, 98, 99, 0, 1, 2, 3]

    @pytest.mark.parametrize("processes", [2, 4])
    def test_processes_share_one_global_batch(self, processes):
        make = functools.partial(IndexedBatches, range(30), list, 8, 3, blank=lambda example: -1)
        parts = [make(process_index=p, process_count=processes) for p in range(processes)]
        for step in (0, 3, 11):
            assert [i for part in parts for i in part.batch(step)] == make().batch(step)
        together = [sum(batches, []) for batches in zip(*(part.eval_batches() for part in parts), strict=True)]
        assert together == list(make().eval_batches())

    def test_evaluation_is_finite_ordered_and_padded(self):
        source = IndexedBatches(range(5), list, 2, 0, blank=lambda example: -1)
        assert list(source.eval_batches()) == [[0, 1], [2, 3], [4, -1]]
        with pytest.raises(ValueError, match="eval_batches: 5 examples do not fill batches of 2"):
            list(IndexedBatches(range(5), list, 2, 0).eval_batches())

    def test_packed_rows_become_batches(self):
        rows = [packed_row([dialog(1, 10 + i, 2, supervised_from=1)], 4) for i in range(3)]
        source = row_source(rows, 2, seed=0)
        assert source.batch(0).tokens.shape == (2, 4)
        assert sorted(source.batch(0).tokens[:, 1].tolist() + source.batch(1).tokens[:1, 1].tolist()) == [10, 11, 12]
        *_, last = source.eval_batches()
        assert last.weights.sum(axis=1).tolist() == [2, 0] and last.segment_ids[1].tolist() == [0] * 4
        assert source.steps(2) == 3

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"examples": []}, "examples: expected at least one"),
            ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
            ({"process_count": 3}, "batch_size: expected a multiple of the 3 processes, got 4"),
            ({"process_index": 2, "process_count": 2}, "process_index: expected 0..1, got 2"),
        ],
    )
    def test_errors(self, values, message):
        with pytest.raises(ValueError, match=message):
            IndexedBatches(**{"examples": [1], "collate": list, "batch_size": 4, "seed": 0, **values})
        with pytest.raises(ValueError, match="step: expected 0 or more, got -1"):
            IndexedBatches([1], list, 4, 0).batch(-1)


LENGTH = 8
BLOCKS = {"a": 12, "b": 5}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Source a in two files; the block i of a holds ids 100 + i, of b 200 + i; b's last block is short."""
    folder = tmp_path_factory.mktemp("blocks")
    blocks = {name: [[base + i] * (LENGTH + 1) for i in range(BLOCKS[name])] for name, base in (("a", 100), ("b", 200))}
    blocks["b"][-1] = [204] * 3
    parts = {folder / "a-0": blocks["a"][:7], folder / "a-1": blocks["a"][7:], folder / "b-0": blocks["b"]}
    for path, part in parts.items():
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for ids in part:
            writer.write(block_record(ids, LENGTH, 1000))
        writer.close()
    return {"b": [folder / "b-0"], "a": [folder / "a-0", folder / "a-1"]}


class TestBlockSource:
    def stream(self, source, steps):
        return [int(row[0]) for step in range(steps) for row in source.batch(step).tokens]

    def test_each_source_has_its_share_and_every_block_once_an_epoch(self, files):
        source = BlockSource(files, {"a": 3, "b": 1}, 8, 0)
        assert (source.num_blocks, source.block_length) == (BLOCKS, LENGTH)
        rows = self.stream(source, 50)
        assert sum(i < 200 for i in rows) == pytest.approx(0.75 * len(rows), abs=1)
        for name, base in (("a", 100), ("b", 200)):
            own = [i for i in rows if base <= i < base + 100]
            epochs = [own[n : n + BLOCKS[name]] for n in range(0, 4 * BLOCKS[name], BLOCKS[name])]
            assert all(sorted(epoch) == list(range(base, base + BLOCKS[name])) for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) > 1

    def test_a_batch_depends_on_seed_and_step_alone(self, files):
        weights = {"a": 1, "b": 1}
        for step in (9, 0):
            same = BlockSource(dict(sorted(files.items())), weights, 8, 4)
            assert_same(BlockSource(files, weights, 8, 4).batch(step), same.batch(step))
        assert self.stream(BlockSource(files, weights, 8, 4), 4) != self.stream(BlockSource(files, weights, 8, 5), 4)

    @pytest.mark.parametrize("processes", [2, 4])
    def test_processes_share_one_global_batch(self, files, processes):
        make = functools.partial(BlockSource, files, {"a": 2, "b": 1}, 8, 1)
        parts = [make(process_index=p, process_count=processes) for p in range(processes)]
        for step in (0, 7):
            assert_same(joined([part.batch(step) for part in parts]), make().batch(step))
        for *shares, whole in zip(*(part.eval_batches() for part in parts), make().eval_batches(), strict=True):
            assert_same(joined(shares), whole)

    def test_evaluation_reads_every_block_once(self, files):
        batches = list(BlockSource(files, {"a": 1, "b": 1}, 4, 0).eval_batches())
        rows = joined(batches)
        assert rows.tokens.shape == (20, LENGTH) and len(batches) == 5
        assert rows.tokens[:, 0].tolist() == [*range(100, 112), *range(200, 205), 0, 0, 0]
        assert rows.weights.sum() == 16 * LENGTH + 2

    def test_errors(self, files, tmp_path):
        with pytest.raises(ValueError, match=r"weights: expected one for each of \['a', 'b'\], got \['a'\]"):
            BlockSource(files, {"a": 1}, 4, 0)
        with pytest.raises(ValueError, match="each above 0"):
            BlockSource(files, {"a": 1, "b": 0}, 4, 0)
        with pytest.raises(ValueError, match="multiple of the 3 processes, got 4"):
            BlockSource(files, {"a": 1, "b": 1}, 4, 0, process_count=3)
        with pytest.raises(FileNotFoundError, match="source a: .*none: expected an ArrayRecord file, found nothing"):
            BlockSource({"a": [tmp_path / "none"]}, {"a": 1}, 4, 0)
        writer = ArrayRecordWriter(str(tmp_path / "other"), "group_size:1")
        writer.write(block_record([1, 2], 3, 10))
        writer.close()
        with pytest.raises(ValueError, match="files: expected one block length in all sources, got .*'b': 3"):
            BlockSource({**files, "b": [tmp_path / "other"]}, {"a": 1, "b": 1}, 4, 0)
