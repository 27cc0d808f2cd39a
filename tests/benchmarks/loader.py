"""Tokens a second that one process of the trainer gets from a corpus on disk, beside what a host of a 7B run can ask for:

    python tests/benchmarks/loader.py [--megabytes=256] [--rows=64] [--steps=30] [--data=/tmp]

Three sources in four ArrayRecord shards each, blocks of 4,096 ids (uint16), mixed by weight, shuffled as a whole, with and
without a segment for each document. Wall time of one thread, best of the steps and their mean; the files were just written, so
they come from the page cache: a disk or a bucket has to deliver two bytes a token. The demand is that of chips at their peak
(an MFU of 100 %), which no plan of `llama_jax.plan` reaches: operations a token against bfloat16 operations a second.

On two cores, with 128 MB: 68 M tokens/s (40 M with a segment a document), 1,583 (941) times what four v5p chips can ask for
and 315 (187) times what four tpu7x chips can.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llama_jax.data.blocks import block_record
from llama_jax.data.loader import BlockSource
from llama_jax.data.tokenizer import BOS_ID
from llama_jax.model.config import SIZES
from llama_jax.model.params import flops_per_token
from llama_jax.parallel.topology import CHIPS

LENGTH, VOCABULARY, DOCUMENT = 4096, 32_000, 700  # tokens: a web document's median or so
CHIPS_PER_HOST = 4
WEIGHTS = {"web": 0.85, "books": 0.1, "encyclopedia": 0.05}


def write_corpus(directory: Path, megabytes: float) -> dict[str, list[Path]]:
    """Shards of random ids with a BOS about every DOCUMENT tokens."""
    draw, files = np.random.default_rng(0), {}
    for name, share in WEIGHTS.items():
        blocks = max(int(megabytes * 1e6 * share / (2 * LENGTH)), 8)
        files[name] = [directory / f"{name}-{shard}.array_record" for shard in range(4)]
        for shard, path in enumerate(files[name]):
            writer = ArrayRecordWriter(str(path), "group_size:1")  # as corpus_build.blocks writes them
            for _ in range(shard, blocks, 4):
                ids = draw.integers(3, VOCABULARY, LENGTH + 1)
                ids[draw.integers(0, LENGTH, LENGTH // DOCUMENT)] = BOS_ID
                writer.write(block_record(ids, LENGTH, VOCABULARY))
            writer.close()
    return files


def rate(source: BlockSource, steps: int) -> tuple[float, float]:
    """Tokens a second: of the fastest step, and of all of them."""
    source.batch(0)
    times = []
    for step in range(1, steps + 1):
        begun = time.perf_counter()
        batch = source.batch(step)
        times.append(time.perf_counter() - begun)
        assert batch.tokens.shape[1] == LENGTH
    return batch.tokens.size / min(times), batch.tokens.size * steps / sum(times)


def demands() -> dict[str, float]:
    """Tokens a second that a host can train a 7B model on, if its chips ran at their peak."""
    operations = flops_per_token(SIZES["7b"], length=LENGTH)
    return {name: CHIPS_PER_HOST * chip.peak / operations for name, chip in CHIPS.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=256.0)
    parser.add_argument("--rows", type=int, default=64, help="rows of a host: 4M tokens over 16 hosts")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--data", default=None, help="directory for the files")
    arguments = parser.parse_args()
    needed = demands()
    with tempfile.TemporaryDirectory(dir=arguments.data) as folder:
        files = write_corpus(Path(folder), arguments.megabytes)
        for separate in (False, True):
            source = BlockSource(files, WEIGHTS, arguments.rows, 0, separate_documents=separate)
            best, mean = rate(source, arguments.steps)
            print(f"{'a segment a document' if separate else 'plain blocks':<22}"
                  f"{best / 1e6:6.2f} M tokens/s best, {mean / 1e6:6.2f} mean")  # fmt: skip
            for name, tokens in needed.items():
                print(f"    7B on {CHIPS_PER_HOST} chips {name:<8} asks for at most {tokens / 1e3:6.0f} k tokens/s: "
                      f"{best / tokens:5.0f} times that (mean {mean / tokens:.0f})")  # fmt: skip


if __name__ == "__main__":
    main()
