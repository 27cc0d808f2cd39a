"""Speed of the corpus pipeline, step by step, as a whole, and beside datatrove on the same documents; and of the loader:

    python tests/benchmarks/corpus.py [--mb=100] [--machine-mb=60] [--python=PYTHON] [--data=../shared/data/pretrain]

CPU time of all threads, so that a busy machine changes little: MB of UTF-8 a second and core. Two corpora, one after the other:
the files of --data (at most --mb), and --machine-mb of the documentation and source code of this Python installation. Of each:

1. Each step alone. Extraction reads the documents as HTML pages; evaluation samples are runs of words of every 20th document.
2. `build_corpus` from documents to manifest and report in this process, all steps on: the documents as a crawl has them
   (`corpus_build.dirt`: lines of sites, pages, broken encodings).
3. Beside datatrove: its filters and MinHash by its LocalPipelineExecutor, one worker (datatrove_peer.py, under `--python` where
   it has an environment of its own; else `pip install 'llama_jax[peers]'`). Every line is a pipeline that reads the same JSONL,
   decides, and writes what stays, on both sides; `all` is the filters and MinHash in a row. Twice: with words between white
   space, which are ours, to see how decisions differ for other reasons; and, on --data alone since it is that slow, with
   datatrove's own English words (spaCy).

Where decisions differ (a count of the rules on 420 of the documents):
- C4: we drop a page with a curly bracket anywhere, as C4's authors do; datatrove looks at the lines that it keeps only.
- Repetition: datatrove counts the spaces of the most frequent n-gram, also of one that occurs once; we the words, of
  n-grams that repeat. In repeated 5- to 10-grams we count each word that lies in a repeat, it goes on n words behind one.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llama_jax.assistant.documents import installation_documents
from llama_jax.corpus_build import demographics, privacy, quality, toxicity
from llama_jax.corpus_build.blocks import write_blocks
from llama_jax.corpus_build.boilerplate import Boilerplate
from llama_jax.corpus_build.build import Settings, build_corpus
from llama_jax.corpus_build.dedup import drop_duplicates
from llama_jax.corpus_build.dirt import Dirt, dirty, markup, site_lines
from llama_jax.corpus_build.document import Document, Removed
from llama_jax.corpus_build.language import identify
from llama_jax.corpus_build.near_duplicates import NearDuplicates, drop_near_duplicates
from llama_jax.corpus_build.paragraphs import drop_leaks, drop_repeats
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.refine import Deduplication, HeldOut, drop_boilerplate
from llama_jax.corpus_build.source_files import expand
from llama_jax.corpus_build.steps import STEPS, CleanConfig, clean, make_steps
from llama_jax.corpus_build.text import extract_text, fix_mojibake, normalise
from llama_jax.data.loader import BlockSource
from llama_jax.data.sources import write_jsonl
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer

# Table 2: 184,320 GPU hours for the 7B's 2T tokens; a host of four TPU v5p chips at about three times the rate of such a GPU.
TOKENS_PER_GPU = 2e12 / (184_320 * 3600)
HOST_TOKENS = 4 * 3 * TOKENS_PER_GPU
FREQUENT = Boilerplate(10, 0.001, 20)  # as in the config `web`
NGRAM = 13


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    """CPU seconds of this process, all threads, and the result."""
    begun = time.process_time()
    result = run()
    return max(time.process_time() - begun, 1e-9), result


def megabytes(texts: Sequence[str]) -> float:
    """UTF-8."""
    return sum(len(text.encode()) for text in texts) / 1e6


def file_documents(data: Path, most: float) -> Iterator[Document]:
    """The documents of files, up to so many MB."""
    left = most * 1e6
    for path in expand(str(data)):
        for number, row in enumerate(read_file(path, "data")):
            if isinstance(row, Document) and row.text.strip() and (used := len(row.text.encode())) <= left:
                yield Document(f"{Path(path).stem}/{number}", row.text, "data")
                left -= used


def machine_documents(most: float) -> Iterator[Document]:
    """So many MB of this installation: a tenth documentation, which takes long to parse, the rest source code."""
    for name, share in (("package_docs", 0.1), ("source_code", 0.9)):
        for document in installation_documents(name, byte_budget=max(int(share * most * 1e6), 1)):
            yield Document(document.id, document.text, "data")


def samples_of(texts: Sequence[str]) -> list[str]:
    """Evaluation samples that stand in the training text: 60 words of every 20th document."""
    return [" ".join(words[:60]) for text in texts[::20] if len(words := text[:2000].split()) >= 30]


def steps(found: Sequence[Document]) -> None:
    """A line for each step on its own."""
    texts, by_source = [d.text for d in found], {"data": list(found)}
    pages = [markup(text, *site_lines(i % 12)) for i, text in enumerate(texts)]
    held_out, samples = texts[:: max(len(texts) // 20, 1)], samples_of(texts)
    size, of_pages = megabytes(texts), megabytes(pages)

    def each(function: Callable[[str], object], texts: Sequence[str] = texts) -> Callable[[], object]:
        return lambda: [function(text) for text in texts]

    rows: dict[str, Callable[[], object]] = {
        "extraction (of HTML)": each(extract_text, pages),
        "mojibake": each(fix_mojibake),
        "normalise": each(normalise),
        "language": each(identify),
        "Gopher quality": each(quality.gopher_quality),
        "Gopher repetition": each(quality.gopher_repetition),
        "C4 lines": each(quality.c4_lines),
        "privacy": each(privacy.find),
        "exact duplicates": lambda: drop_duplicates(by_source),
        "boilerplate lines": lambda: drop_boilerplate(by_source["data"], FREQUENT),
        "near duplicates": lambda: drop_near_duplicates(by_source, NearDuplicates()),
        "leaks of held-out text": lambda: drop_leaks(by_source, held_out, ngram=NGRAM),
        "contamination removal": lambda: drop_leaks(by_source, samples, ngram=NGRAM, largest=0.0),
        "repeated paragraphs": lambda: drop_repeats(by_source, shortest=80),
        "pronouns and identities": each(demographics.mentions),
        "toxicity (a tenth)": lambda: toxicity.document_scores([t for t in texts if toxicity.in_sample(t, 0.1)]),
    }
    identify("warm up"), toxicity.document_scores(["warm up"]), fix_mojibake("wärm up"), extract_text("<p>warm up</p>")
    print(f"\n{'step':<28}{'MB/s a core':>12}")
    for name, run in rows.items():
        taken, _ = seconds(run)
        print(f"{name:<28}{(of_pages if 'HTML' in name else size) / taken:>12.1f}", flush=True)


def whole(found: Sequence[Document]) -> None:
    """One build with all of them on, as the command makes it."""
    crawl = list(dirty(found, Dirt(copies=0.0, junk=0.0), seed=0))
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        write_jsonl(samples, [{"text": text} for text in samples_of([d.text for d in found])])
        settings = Settings(
            vocab_size=4096, block_length=4096, held_out=HeldOut(0.01, 10_000, 1_000_000), weights={"data": 1.0},
            steps={"data": tuple(STEPS)}, clean=CleanConfig(languages=("en", "unknown")),
            deduplication=Deduplication(FREQUENT, NearDuplicates(), NGRAM, (str(samples),), 80),
            analyses=("language", "demographics", "toxicity"), analysed_share=0.1,
        )  # fmt: skip
        begun = time.perf_counter()
        taken, manifest = seconds(lambda: build_corpus({"data": crawl}, Path(folder) / "corpus", settings, inputs={}))
    size, row = megabytes([d.text for d in crawl]), manifest["sources"]["data"]
    print(f"\nthe whole build: {size / taken:.2f} MB/s a core ({size:.1f} MB, {time.perf_counter() - begun:.0f} s); "
          f"{row['documents']:,} of {row['documents_read']:,} documents to train on, {row['tokens']:,} tokens")  # fmt: skip


FILTERS = {"Gopher quality": "gopher", "Gopher repetition": "repetition", "C4": "c4"}  # by step
PIPELINES: dict[str, tuple[tuple[str, ...], bool]] = {  # steps, and whether MinHash follows
    "read and write": ((), False),
    **{name: ((step,), False) for name, step in FILTERS.items()},
    "MinHash": ((), True),
    "all": (tuple(FILTERS.values()), True),
}


def ours(source: Path, target: Path, names: Sequence[str], *, dedup: bool) -> set[str]:
    """A file of documents through steps and MinHash into another; the ids that stay."""
    chain = make_steps(names, CleanConfig())
    kept = []
    for row in read_file(str(source), "data"):
        result = clean(row, chain)
        if not isinstance(result, Removed):
            kept.append(result)
    if dedup:
        settings = NearDuplicates(threshold=0.7, permutations=112, bands=14)  # datatrove's 14 buckets of 8
        kept = drop_near_duplicates({"data": kept}, settings)[0]["data"]
    write_jsonl(target, ({"id": d.id, "text": d.text} for d in kept))
    return {d.id for d in kept}


def compare(found: Sequence[Document], python: str, words: Sequence[str]) -> None:
    """Our throughput, datatrove's, their ratio, and how many documents are decided alike."""
    size = megabytes([d.text for d in found])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "documents" / "all.jsonl"
        write_jsonl(source, ({"id": d.id, "text": d.text} for d in found))
        target = Path(folder) / "kept.jsonl"
        mine = {
            name: seconds(functools.partial(ours, source, target, names, dedup=dedup))
            for name, (names, dedup) in PIPELINES.items()
        }
        for kind in words:
            script = Path(__file__).with_name("datatrove_peer.py")
            command = [python, str(script), f"--documents={source}", f"--folder={folder}/{kind}", f"--words={kind}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"\nbeside datatrove, words {kind}: not run ({done.stderr.strip().splitlines()[-1]})")
                continue
            peer = json.loads(done.stdout.splitlines()[-1])
            title = f"beside datatrove {peer['versions']['datatrove']}, words: {kind}"
            print(f"\n{title:<44}{'ours MB/s':>10}{'its MB/s':>10}{'ratio':>7}{'decided alike':>15}")
            for name, (taken, kept) in mine.items():
                its = peer["seconds"][name]
                alike = 1 - len(kept ^ set(peer["kept"][name])) / len(found)
                print(f"{name:<44}{size / taken:>10.2f}{size / its:>10.2f}{its / taken:>7.1f}{alike:>15.1%}", flush=True)


def loader(texts: Sequence[str]) -> None:
    """Tokens a second of one process that reads shuffled blocks of 4,096, beside what a host of the 7B plan needs."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(texts[:300], Path(folder) / "tokenizer.model", vocab_size=2000)
        path = Path(folder) / "x.array_record"
        taken, counts = seconds(lambda: write_blocks(texts, path, tokenizer=tokenizer, block_length=4096))
        print(f"\ntokenise and write: {megabytes(texts) / taken:.1f} MB/s a core, {counts.blocks} blocks")
        source = BlockSource({"x": [path]}, {"x": 1.0}, 16, 0)
        source.batch(0)
        taken, _ = seconds(lambda: [source.batch(step) for step in range(1, 101)])
        rate = 100 * 16 * 4096 / taken
        needed = f"a host needs {HOST_TOKENS:,.0f}: {rate / HOST_TOKENS:.0f} times that"
        print(f"loader: {rate / 1e6:.1f} M tokens/s a core; {needed}")


def main() -> None:
    """Runs all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data" / "pretrain")
    parser.add_argument("--mb", type=float, default=100.0, help="of --data, at most")
    parser.add_argument("--machine-mb", type=float, default=60.0, help="of this machine's documentation and source")
    parser.add_argument("--python", default=sys.executable, help="of an environment that has datatrove")
    wanted = parser.parse_args()
    corpora = (
        (f"documents of {wanted.data}", file_documents(wanted.data, wanted.mb), ("white space", "own")),
        ("documentation and source code of this machine", machine_documents(wanted.machine_mb), ("white space",)),
    )
    print(f"Python {sys.version.split()[0]}")
    for title, documents, words in corpora:
        found = list(documents)
        texts = [d.text for d in found]
        median = np.median([len(text) for text in texts])
        print(f"\n== {title}: {len(found):,}, {megabytes(texts):.1f} MB, median {median:,.0f} characters ==")
        steps(found)
        whole(found)
        compare(found, wanted.python, words)
        loader(texts)


if __name__ == "__main__":
    main()
