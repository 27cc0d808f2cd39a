"""Speed of the corpus pipeline, step by step and beside datatrove on the same documents, and of the trainer's loader:

    python tests/benchmarks/corpus.py [--data=../shared/data/pretrain] [--megabytes=20]

CPU time of this process, so that a busy machine changes little: MB of UTF-8 a second and core. The documents are the JSONL
files of --data and, up to as much again, the documentation and source code of this Python installation. The comparison needs
datatrove; it runs twice, with its own English words (spaCy, if that is installed) and with words between white space, which are
ours: the second tells how the decisions differ for other reasons.

Measured (30.5 MB, 5,755 documents; datatrove 0.10, spaCy 3.8): 4.6 MB/s a core against 0.9 of datatrove with words by white
space, 5.2 times (Gopher quality 2.7, repetition 6.0, C4 6.4, MinHash 5.3; 99.2, 95.4, 94.3 and 99.5 % decided alike), and 28
times with its own words. Where they differ (a count of the rules on 420 of the documents):
- C4: we drop a page with a curly bracket anywhere, as C4's authors do; datatrove looks at the lines that it keeps only.
- Repetition: datatrove counts the spaces of the most frequent n-gram, also of one that occurs once; we the words, of
  n-grams that repeat. In repeated 5- to 10-grams we count each word that lies in a repeat, it goes on n words behind one.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llama_jax.assistant.documents import installation_documents
from llama_jax.corpus_build import demographics, privacy, quality, toxicity
from llama_jax.corpus_build.blocks import write_blocks
from llama_jax.corpus_build.dedup import drop_duplicates
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.language import identify
from llama_jax.corpus_build.near_duplicates import NearDuplicates, drop_near_duplicates
from llama_jax.corpus_build.paragraphs import drop_leaks, drop_repeats
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.source_files import expand
from llama_jax.corpus_build.text import fix_mojibake, normalise
from llama_jax.data.loader import BlockSource
from llama_jax.data.tokenizer import train_tokenizer

# Table 2: 184,320 GPU hours for the 7B's 2T tokens; a host of four TPU v5p chips at about three times the rate of such a GPU.
TOKENS_PER_GPU = 2e12 / (184_320 * 3600)
HOST_TOKENS = 4 * 3 * TOKENS_PER_GPU


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    """CPU seconds of this process, all threads, and the result."""
    begun = time.process_time()
    result = run()
    return max(time.process_time() - begun, 1e-9), result


def documents(data: Path, megabytes: float) -> list[Document]:
    """Documents of both kinds, at most `megabytes` of each."""
    found: list[Document] = []
    left = megabytes * 1e6
    for path in expand(str(data)):
        for number, row in enumerate(read_file(path, "data")):
            if isinstance(row, Document) and row.text.strip() and left > len(row.text):
                found.append(Document(f"{Path(path).stem}/{number}", row.text, "data"))
                left -= len(row.text.encode())
    for name in ("package_docs", "source_code"):
        budget = int(megabytes * 5e5)
        found += [Document(d.id, d.text, "data") for d in installation_documents(name, byte_budget=budget)]
    return found


def steps(found: Sequence[Document], size: float) -> None:
    """A line for each step on its own."""
    texts = [d.text for d in found]
    by_source = {"data": list(found)}
    held_out = texts[:: max(len(texts) // 20, 1)]

    def each(function: Callable[[str], object]) -> Callable[[], object]:
        return lambda: [function(text) for text in texts]

    rows: dict[str, Callable[[], object]] = {
        "mojibake": each(fix_mojibake),
        "normalise": each(normalise),
        "language": each(identify),
        "Gopher quality": each(quality.gopher_quality),
        "Gopher repetition": each(quality.gopher_repetition),
        "C4 lines": each(quality.c4_lines),
        "privacy": each(privacy.find),
        "pronouns and identities": each(demographics.mentions),
        "toxicity (a tenth)": lambda: toxicity.document_scores([t for t in texts if toxicity.in_sample(t, 0.1)]),
        "exact duplicates": lambda: drop_duplicates(by_source),
        "near duplicates": lambda: drop_near_duplicates(by_source, NearDuplicates()),
        "leaks": lambda: drop_leaks(by_source, held_out, ngram=13),
        "repeated paragraphs": lambda: drop_repeats(by_source, shortest=80),
    }
    identify("warm up"), toxicity.document_scores(["warm up"]), fix_mojibake("wärm up")
    print(f"\n{'step':<28}{'MB/s a core':>12}")
    whole = 0.0
    for name, run in rows.items():
        taken, _ = seconds(run)
        whole += taken
        print(f"{name:<28}{size / taken:>12.1f}", flush=True)
    print(f"{'all of them':<28}{size / whole:>12.1f}")


def ours(found: Sequence[Document]) -> tuple[dict[str, float], dict[str, set[str]]]:
    """CPU seconds and kept ids of the filters and of MinHash."""
    taken, kept = {}, {}
    rules: dict[str, Callable[[str], object]] = {
        "Gopher quality": quality.gopher_quality,
        "Gopher repetition": quality.gopher_repetition,
        "C4": lambda text: quality.c4_lines(text)[1],
    }
    for name, rule in rules.items():
        taken[name], result = seconds(lambda rule=rule: {d.id for d in found if rule(d.text) is None})
        kept[name] = result
    settings = NearDuplicates(threshold=0.7, permutations=112, bands=14)  # datatrove's 14 buckets of 8
    taken["MinHash"], result = seconds(lambda: drop_near_duplicates({"data": found}, settings))
    kept["MinHash"] = {d.id for d in result[0]["data"]}
    return taken, kept


class WhiteSpace:
    """datatrove's word tokenizer with our words and sentences."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words between white space."""
        return text.split()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Sentences up to their marks."""
        ends = [m.end() for m in re.finditer(r"[.?!][\"')\]]*(?=\s|\Z)", text)] or [len(text)]
        return list(zip([0, *ends[:-1]], ends))


def theirs(found: Sequence[Document], *, words: str) -> tuple[dict[str, float], dict[str, set[str]]]:
    """The same of datatrove: its filters and the four steps of its MinHash, one worker."""
    import datatrove.pipeline.dedup.minhash as minhash
    import datatrove.utils.word_tokenizers as tokenizers
    from datatrove.data import Document as Row
    from datatrove.pipeline import filters
    from datatrove.utils.hashing import HashConfig

    if words == "white space":
        tokenizers.load_word_tokenizer = minhash.load_word_tokenizer = lambda language: WhiteSpace()
    rows = [Row(text=d.text, id=d.id) for d in found]
    chosen = {
        "Gopher quality": filters.GopherQualityFilter(),
        "Gopher repetition": filters.GopherRepetitionFilter(),
        "C4": filters.C4QualityFilter(min_num_sentences=3, min_words_per_line=5),
    }
    taken, kept = {}, {}
    tokenizers.load_word_tokenizer("en").word_tokenize("warm up")
    for name, check in chosen.items():
        copies = [Row(text=row.text, id=row.id) for row in rows]  # C4's filter changes the text
        taken[name], kept[name] = seconds(
            lambda check=check, copies=copies: {row.id for row in copies if check.filter(row) is True}
        )

    def dedup(folder: str) -> set[str]:
        config = minhash.MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # its xxhash breaks with xxhash 4
        places = [f"{folder}/{name}" for name in ("signatures", "buckets", "remove")]
        minhash.MinhashDedupSignature(places[0], config=config).run(iter(rows), 0, 1)
        for rank in range(config.num_buckets):
            minhash.MinhashDedupBuckets(places[0], places[1], config=config).run(None, rank, config.num_buckets)
        minhash.MinhashDedupCluster(places[1], places[2], config=config).run(None, 0, 1)
        return {row.id for row in minhash.MinhashDedupFilter(places[2]).run(iter(rows), 0, 1)}

    with tempfile.TemporaryDirectory() as folder:
        taken["MinHash"], kept["MinHash"] = seconds(lambda: dedup(folder))
    return taken, kept


def compare(found: Sequence[Document], size: float) -> None:
    """Our throughput, datatrove's, their ratio, and how many documents are decided alike."""
    mine, kept = ours(found)
    for words in ("datatrove's own", "white space"):
        try:
            peer, peer_kept = theirs(found, words=words)
        except ImportError as error:
            print(f"\nbeside datatrove, words {words}: not run ({error})")
            continue
        title = f"beside datatrove, words {words}"
        print(f"\n{title:<44}{'ours MB/s':>10}{'its MB/s':>10}{'ratio':>7}{'decided alike':>15}")
        for name in mine:
            alike = 1 - len(kept[name] ^ peer_kept[name]) / len(found)
            rates = f"{size / mine[name]:>10.1f}{size / peer[name]:>10.1f}{peer[name] / mine[name]:>7.1f}"
            print(f"{name:<44}{rates}{alike:>15.1%}", flush=True)
        ratio = sum(peer.values()) / sum(mine.values())
        print(f"{'all':<44}{size / sum(mine.values()):>10.1f}{size / sum(peer.values()):>10.1f}{ratio:>7.1f}")


def loader(texts: Sequence[str]) -> None:
    """Tokens a second of one process that reads shuffled blocks of 4,096, beside what a host of the 7B plan needs."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(texts[:300], Path(folder) / "tokenizer.model", vocab_size=2000)
        path = Path(folder) / "x.array_record"
        taken, counts = seconds(lambda: write_blocks(texts, path, tokenizer=tokenizer, block_length=4096))
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(f"\ntokenise and write: {size / taken:.1f} MB/s a core, {counts.blocks} blocks")
        source = BlockSource({"x": [path]}, {"x": 1.0}, 16, 0)
        source.batch(0)
        taken, _ = seconds(lambda: [source.batch(step) for step in range(1, 101)])
        rate = 100 * 16 * 4096 / taken
        needed = f"a host needs {HOST_TOKENS:,.0f}: {rate / HOST_TOKENS:.0f} times that"
        print(f"loader: {rate / 1e6:.1f} M tokens/s a core; {needed}")


def main() -> None:
    """Runs all comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data" / "pretrain")
    parser.add_argument("--megabytes", type=float, default=20.0)
    arguments = parser.parse_args()
    found = documents(arguments.data, arguments.megabytes)
    size = sum(len(d.text.encode()) for d in found) / 1e6
    lengths = np.array([len(d.text) for d in found])
    version = sys.version.split()[0]
    print(f"{len(found):,} documents, {size:.1f} MB, median {np.median(lengths):,.0f} characters; Python {version}")
    steps(found, size)
    compare(found, size)
    loader([d.text for d in found])


if __name__ == "__main__":
    main()
