"""Documents to token blocks on disk: BOS document EOS, joined and cut, nothing dropped and nothing padded inside.

Blocks have T+1 ids, and the last id of one is the first of the next. So each id but the first of a source is a
target exactly once. The paper does not say how it separates documents; BOS and EOS are what an author of Code
Llama reported (fact sheet 1.5).
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from array_record.python.array_record_module import ArrayRecordWriter

from llama_jax.data.blocks import block_record
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import local_file

_ENCODED_AT_ONCE = 1000  # documents: bounds the memory, and enough for the tokenizer's threads


@dataclass(frozen=True)
class BlockCounts:
    """What a file of blocks holds."""

    documents: int
    tokens: int  # BOS and EOS of each document among them
    blocks: int
    targets: int  # always tokens - 1


def document_ids(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """BOS, the ids of a text, EOS; for each text."""
    texts = iter(texts)
    while part := list(itertools.islice(texts, _ENCODED_AT_ONCE)):
        for ids in tokenizer.encode_many(part):
            yield [tokenizer.bos_id, *ids, tokenizer.eos_id]


def token_blocks(documents: Iterable[Sequence[int]], block_length: int) -> Iterator[list[int]]:
    """The joined ids in blocks of T+1 that overlap by one. The last block may be shorter, and has at least 2 ids."""
    if block_length < 1:
        raise ValueError(f"block_length: expected at least 1, got {block_length}")
    waiting: list[int] = []
    for ids in documents:
        waiting += ids
        start = 0
        while len(waiting) - start > block_length:
            yield waiting[start : start + block_length + 1]
            start += block_length
        del waiting[:start]
    if len(waiting) > 1:
        yield waiting


def write_blocks(
    texts: Iterable[str], path: str | os.PathLike, *, tokenizer: Tokenizer, block_length: int
) -> BlockCounts:
    """Writes the blocks of `texts` as an ArrayRecord file. RuntimeError if a single token got lost on the way."""
    documents = tokens = blocks = targets = 0

    def counted() -> Iterator[list[int]]:
        nonlocal documents, tokens
        for ids in document_ids(texts, tokenizer):
            documents += 1
            tokens += len(ids)
            yield ids

    with local_file(path) as local:
        writer = ArrayRecordWriter(os.fspath(local), "group_size:1")  # a record a chunk: blocks are read at random
        try:
            for block in token_blocks(counted(), block_length):
                writer.write(block_record(block, block_length, tokenizer.vocab_size))
                blocks += 1
                targets += len(block) - 1
        finally:
            writer.close()
    if targets != max(tokens - 1, 0):
        raise RuntimeError(f"{path}: {tokens} tokens went in, {targets} targets came out; expected one less")
    return BlockCounts(documents, tokens, blocks, targets)
