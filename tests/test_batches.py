"""Ids to batches: packed rows (paper section 3.1), batches as functions of (seed, step), token blocks (section 2.1)."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import ConfigError
from llama_jax.corpus_build import manifest
from llama_jax.corpus_build.blocks import write_blocks
from llama_jax.data import loader, packing
from llama_jax.data.blocks import block_ids, block_record
from llama_jax.data.dialog import EncodedDialog, encode_dialog
from llama_jax.data.loader import Share
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.pretrain import stage
from llama_jax.pretrain.stage import Drawn, mixture

TEXTS = [f"the model reads line {i} of a text: {'and counts its tokens ' * (i % 7)}" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=320)


# Packing


def test_packing_by_hand():
    # 7 first, then 5 and 4 open rows of their own; 3 fills the 7, 3 goes where least room is left, 2 too.
    assert packing.pack([3, 7, 2, 5, 3, 4], 10) == [[1, 0], [3, 5], [4, 2]]
    assert packing.pack([], 10) == [] and packing.pack([10, 10], 10) == [[0], [1]]
    for lengths in ([11], [0]):
        with pytest.raises(ValueError, match=f"example 0: expected 1 to 10 tokens, got {lengths[0]}"):
            packing.pack(lengths, 10)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_every_example_is_in_one_row_that_it_fits(lengths):
    rows = packing.pack(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= 20 for total in filled)
    assert not rows or len(rows) <= 2 * sum(lengths) / 20 + 1  # two rows that are both half empty would be one


def test_a_packed_row_by_hand():
    a = EncodedDialog([1, 11, 12, 2], [False, False, True, True])
    b = EncodedDialog([1, 21, 2], [False, True, True])
    row = packing.packed_row([a, b], 9)
    assert row.tokens.tolist() == [1, 11, 12, 2, 1, 21, 2, 0, 0]
    assert row.targets.tolist() == [11, 12, 2, 0, 21, 2, 0, 0, 0]
    assert row.weights.tolist() == [0, 1, 1, 0, 1, 1, 0, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0]
    assert row.weights.dtype == np.float32 and {row.tokens.dtype, row.targets.dtype, row.positions.dtype} == {np.dtype("i4")}
    with pytest.raises(ValueError, match="row: expected at most 6 tokens, got 7 in 2 examples"):
        packing.packed_row([a, b], 6)


def test_packing_dialogs_conserves_tokens_and_refuses_the_overlong(tokenizer):
    examples = [
        encode_dialog(
            [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "the line " * (n % 5 + 1)}], tokenizer
        )
        for n in [*range(1, 37), 60, 70, 80]
    ]
    lengths = [len(example.ids) for example in examples]
    limit = sorted(lengths)[-3]  # two are longer
    with pytest.raises(ValueError, match=rf"expected at most {limit} tokens, got \d+ \(2 of 39 examples are too long\)"):
        packing.pack_dialogs(examples, limit)
    kept = [example for example in examples if len(example.ids) <= limit]
    packed = packing.pack_dialogs(kept, limit)
    assert packed.tokens == sum(len(example.ids) for example in kept) == sum((r.segment_ids > 0).sum() for r in packed.rows)
    assert packed.supervised == sum(sum(example.supervised) for example in kept) == sum(r.weights.sum() for r in packed.rows)
    segments = [tuple(r.tokens[r.segment_ids == s]) for r in packed.rows for s in range(1, r.segment_ids.max() + 1)]
    assert sorted(segments) == sorted(tuple(example.ids) for example in kept)
    assert packed.padding == pytest.approx(1 - packed.tokens / (len(packed.rows) * limit))


def test_an_example_that_trains_nothing_is_an_error():
    good = EncodedDialog([1, 5, 2], [False, True, True])
    # The first token has no predecessor that could predict it.
    for supervised in ([False] * 3, [True, False, False]):
        with pytest.raises(ValueError, match="example 1: no supervised token"):
            packing.pack_dialogs([good, EncodedDialog([1, 5, 2], supervised)], 8)
    with pytest.raises(ValueError, match="example 0: 3 ids but 2 supervised flags"):
        packing.pack_dialogs([EncodedDialog([1, 5, 2], [False, True])], 8)


# Batches in memory


def numbers(count: int, batch_size: int, seed: int = 0, **settings) -> loader.IndexedBatches:
    return loader.IndexedBatches(range(count), list, batch_size, seed, **settings)


def test_a_batch_is_a_function_of_seed_and_step():
    one, two = numbers(23, 4), numbers(23, 4)
    backwards = {step: one.batch(step) for step in reversed(range(12))}
    assert [two.batch(step) for step in range(12)] == [backwards[step] for step in range(12)]
    assert [numbers(23, 4, seed=1).batch(step) for step in range(5)] != [one.batch(step) for step in range(5)]
    with pytest.raises(ValueError, match="step: expected 0 or more, got -1"):
        one.batch(-1)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batch(processes):
    slices = [numbers(23, 8, share=Share((i,), processes)) for i in range(processes)]
    for step in range(7):
        assert [x for part in slices for x in part.batch(step)] == numbers(23, 8).batch(step)


def test_processes_that_hold_every_other_piece_have_the_rows_of_those_pieces():
    shares = [Share((0, 2), 4), Share((1, 3), 4)]
    for step in range(5):
        whole, parts = numbers(23, 8).batch(step), [numbers(23, 8, share=share).batch(step) for share in shares]
        assert parts == [whole[0:2] + whole[4:6], whole[2:4] + whole[6:8]]
        assert numbers(23, 8, share=shares[1]).rows(step) == numbers(23, 8).rows(step)
    last = [list(numbers(13, 8, share=share, blank=lambda _: -1).eval_batches())[-1] for share in shares]
    assert last == [[8, 9, 12, -1], [10, 11, -1, -1]]
    for wrong in ((), (1, 0), (0, 0), (4,), (-1,)):
        with pytest.raises(ValueError, match="share: expected some of the 4 pieces in order, got"):
            Share(wrong, 4)


def test_each_example_once_an_epoch_in_a_new_order():
    source = numbers(30, 4)
    stream = [x for step in range(source.steps(4)) for x in source.batch(step)]
    epochs = [stream[i * 30 : (i + 1) * 30] for i in range(4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(30))}) == 5
    assert (source.num_examples, source.steps_per_epoch, source.steps(0.5), source.steps(2)) == (30, 8, 4, 15)
    assert numbers(5, 3, shuffle=False).batch(1) == [3, 4, 0]


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_fills_the_last_batch_with_blanks(processes):
    slices = [
        numbers(6, 4, blank=lambda example: -1, share=Share((i,), processes)).eval_batches()
        for i in range(processes)
    ]
    assert [[x for part in parts for x in part] for parts in zip(*slices, strict=True)] == [[0, 1, 2, 3], [4, 5, -1, -1]]
    assert list(numbers(8, 4).eval_batches()) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="eval_batches: 6 examples do not fill batches of 4"):
        list(numbers(6, 4).eval_batches())


def test_rows_are_stacked_and_padded_with_weight_zero():
    example = EncodedDialog([1, 5, 2], [False, True, True])
    rows = [packing.packed_row([example], 4)] * 3
    *_, last = loader.row_source(rows, 2, seed=0).eval_batches()
    assert last.tokens.tolist() == [[1, 5, 2, 0], [0, 0, 0, 0]]
    assert last.weights.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]] and last.segment_ids[1].tolist() == [0] * 4
    assert loader.row_source(rows, 2, seed=0).batch(0).tokens.shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0, "batch_size": 1}, "examples: expected at least one, got an empty data set"),
        ({"count": 5, "batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"count": 5, "batch_size": 3, "share": Share((0,), 2)}, "batch_size: expected a multiple of the 2 shards .* got 3"),
    ],
)
def test_batches_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        numbers(**arguments)


# Blocks on disk


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory) -> dict[str, list[str]]:
    directory = tmp_path_factory.mktemp("shards")
    texts = {"long": [f"{i} {' '.join(TEXTS[:12])}" for i in range(2)], "short": [f"the line {i}\n" * 20 for i in range(12)]}
    for name, of_source in texts.items():
        write_blocks(of_source, directory / name, tokenizer=tokenizer, block_length=16)
    return {name: [str(directory / name)] for name in texts}


def rows_of(batch: loader.TokenBatch) -> list[bytes]:
    return [tokens.tobytes() + targets.tobytes() for tokens, targets in zip(batch.tokens, batch.targets)]


def block_source(shards, batch_size=8, seed=0, **settings) -> loader.BlockSource:
    return loader.BlockSource(shards, {"long": 3.0, "short": 1.0}, batch_size, seed, **settings)


def test_block_batches_do_not_depend_on_history_or_processes(shards):
    whole = block_source(shards)
    batches = {step: rows_of(whole.batch(step)) for step in (5, 0, 3)}
    for processes in (1, 2, 4):
        parts = [block_source(shards, share=Share((i,), processes)) for i in range(processes)]
        for step, rows in batches.items():
            assert [row for part in parts for row in rows_of(part.batch(step))] == rows
    assert rows_of(block_source(shards, seed=1).batch(0)) != batches[0]


def test_the_mixture_has_its_shares_and_each_epoch_is_whole_and_new(shards):
    source = block_source(shards)
    assert source.block_length == 16
    of = {
        row: name
        for name in shards
        for row in rows_of(loader.block_batch([source._records[name][i] for i in range(source.num_blocks[name])], 16))
    }
    steps = max(source.num_blocks.values())  # 8 rows a step, so at least two epochs of each source
    stream = [row for step in range(steps) for row in rows_of(source.batch(step))]
    names = [of[row] for row in stream]
    for end in (steps, len(names) // 2, len(names)):
        assert names[:end].count("long") / end == pytest.approx(0.75, abs=0.02)
    for name, count in source.num_blocks.items():
        rows = [row for row in stream if of[row] == name]
        epochs = [rows[start : start + count] for start in range(0, len(rows) - count + 1, count)]
        assert len(epochs) >= 2 and len({tuple(epoch) for epoch in epochs}) == len(epochs)
        assert all(Counter(epoch) == Counter(epochs[0]) and len(epoch) == count for epoch in epochs)


def test_a_run_tells_how_often_it_has_seen_each_source(shards):
    drawn = Drawn(block_source(shards))
    steps = 101
    names = [row.partition(":")[0] for step in range(steps) for row in drawn.rows(step)]
    blocks = drawn.batches.num_blocks
    told = drawn.batch(steps - 1, None)[1]
    assert told == {f"epochs/{name}": pytest.approx(names.count(name) / blocks[name], abs=1 / blocks[name]) for name in blocks}
    assert drawn.batch(1, None)[1] == {}  # a step that tells something is logged


def test_checksums_are_compared_where_that_takes_seconds(tmp_path, monkeypatch):
    values = {name: {} for name in manifest.FIELDS} | {"files": {"a": {"bytes": 10}, "b": {"bytes": 5}}}
    (tmp_path / manifest.NAME).write_text(json.dumps(values))
    assert stage.is_quickly_read(str(tmp_path)) and not stage.is_quickly_read("gs://bucket/corpus")
    monkeypatch.setattr(stage, "_QUICKLY_READ", 14)
    assert not stage.is_quickly_read(str(tmp_path))


def test_a_block_batch_by_hand():
    records = [block_record([7, 2, 1, 8, 9], 4, 100), block_record([1, 5, 2], 4, 100)]
    batch = loader.block_batch(records, 4)
    assert batch.tokens.tolist() == [[7, 2, 1, 8], [1, 5, 2, 0]]
    assert batch.targets.tolist() == [[2, 1, 8, 9], [5, 2, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    apart = loader.block_batch(records, 4, separate_documents=True)
    assert apart.weights.tolist() == [[1, 0, 1, 1], [1, 1, 0, 0]]
    assert apart.segment_ids.tolist() == [[1, 1, 2, 2], [1, 1, 1, 0]]
    assert apart.positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    other = loader.block_batch(records, 4, separate_documents=True, bos_id=2)  # of another tokenizer
    assert other.segment_ids.tolist() == [[1, 2, 2, 2], [1, 1, 2, 0]]
    assert other.weights.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert apart.weights.dtype == np.float32 and apart.segment_ids.dtype == apart.positions.dtype == np.int32


@pytest.mark.parametrize("vocab_size", [65_535, 65_536])
def test_block_records_hold_their_ids(vocab_size):
    ids = [0, 1, vocab_size - 1]
    record = block_record(ids, 7, vocab_size)
    assert block_ids(record).tolist() == ids and block_ids(record).dtype == (np.uint16 if vocab_size < 65_536 else np.uint32)
    assert len(record) < 110 + 8 * (2 if vocab_size < 65_536 else 4)
    for wrong, message in (([vocab_size], "ids in"), ([-1], "ids in"), ([], "1 to 8 ids, got 0"), ([0] * 9, "got 9")):
        with pytest.raises(ValueError, match=message):
            block_record(wrong, 7, vocab_size)
    for damaged in (b"", record[:6], b"x" * 40, record[:-1], record + b"x"):
        with pytest.raises(ValueError, match="not a record of tokens"):
            block_ids(damaged)


def test_weights_of_a_source_that_the_corpus_lacks_are_refused():
    planned = {"web": 0.8, "code": 0.2}
    assert mixture({}, planned) == planned and mixture({"code": 3.0}, planned) == {"code": 3.0}
    with pytest.raises(ConfigError, match=r"config.data.weights.coed: the corpus has no such source; did you mean 'code'\?"):
        mixture({"web": 1.0, "coed": 1.0}, planned)


def test_block_sources_that_cannot_be_are_refused(shards, tokenizer, tmp_path):
    weights = {"long": 1.0, "short": 1.0}
    with pytest.raises(ValueError, match=r"weights: expected one for each of \['long', 'short'\], got \['long'\]"):
        loader.BlockSource(shards, {"long": 1.0}, 8, 0)
    with pytest.raises(ValueError, match="each above 0"):
        loader.BlockSource(shards, {**weights, "short": 0.0}, 8, 0)
    with pytest.raises(FileNotFoundError, match="source short: .*none: expected an ArrayRecord file, found nothing"):
        loader.BlockSource({**shards, "short": [tmp_path / "none"]}, weights, 8, 0)
    with pytest.raises(ValueError, match="source short: expected at least one ArrayRecord file"):
        loader.BlockSource({**shards, "short": []}, weights, 8, 0)
    write_blocks(["the line"], tmp_path / "eight", tokenizer=tokenizer, block_length=8)
    with pytest.raises(ValueError, match="files: expected one block length in all sources, got .*'short': 8"):
        loader.BlockSource({**shards, "short": [tmp_path / "eight"]}, weights, 8, 0)
    write_blocks([], tmp_path / "empty", tokenizer=tokenizer, block_length=16)
    with pytest.raises(ValueError, match="source short: expected at least one block, got none"):
        loader.BlockSource({**shards, "short": [tmp_path / "empty"]}, weights, 8, 0)
    (tmp_path / "damaged").write_bytes(b"no records at all" * 100)
    with pytest.raises(ValueError, match="source short: cannot read"):
        loader.BlockSource({**shards, "short": [tmp_path / "damaged"]}, weights, 8, 0)
