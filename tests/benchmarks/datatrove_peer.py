"""What tests/benchmarks/corpus.py compares itself with: datatrove's filters and MinHash, run by its LocalPipelineExecutor.

Runs by itself, if need be in an environment of its own, and shares with corpus.py only the file of documents:

    python3.11 -m venv /tmp/dt && /tmp/dt/bin/pip install datatrove regex orjson tokenizers spacy nltk "xxhash<4"
    python tests/benchmarks/corpus.py --python=/tmp/dt/bin/python

Prints one line of JSON: versions, CPU seconds of each pipeline, and the ids that it keeps.
"""

import argparse
import functools
import importlib.metadata
import json
import re
import resource
from collections.abc import Callable
from pathlib import Path

import datatrove.pipeline.dedup.minhash as minhash
import datatrove.utils.word_tokenizers as tokenizers
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline import filters
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


class WhiteSpace:
    """Words and sentences as llama_jax has them, in the place of datatrove's."""

    def word_tokenize(self, text: str) -> list[str]:
        """Words between white space."""
        return text.split()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Sentences up to their marks."""
        ends = [m.end() for m in re.finditer(r"[.?!][\"')\]]*(?=\s|\Z)", text)] or [len(text)]
        return list(zip([0, *ends[:-1]], ends))


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of this process and its children; the executor starts one for its queue."""

    def spent() -> float:
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(use.ru_utime + use.ru_stime for use in uses)

    begun = spent()
    run()
    return spent() - begun


def run(folder: Path, source: Path, chosen: list, *, dedup: bool) -> None:
    """Documents of the file `source` through filters, and through the four stages of MinHash, into folder/kept: one worker."""

    def execute(name: str, pipeline: list, tasks: int = 1) -> None:
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(folder / "logs" / name)).run()

    def reader(directory: Path, name: str) -> JsonlReader:
        return JsonlReader(str(directory), glob_pattern=name)

    def writer(directory: str) -> JsonlWriter:
        return JsonlWriter(str(folder / directory), compression=None)

    if chosen or not dedup:
        execute("filters", [reader(source.parent, source.name), *chosen, writer("filtered" if dedup else "kept")])
    if not dedup:
        return
    rows = (folder / "filtered", "00000.jsonl") if chosen else (source.parent, source.name)
    config = minhash.MinhashConfig()  # 14 buckets of 8
    signatures, buckets, remove = (str(folder / name) for name in ("signatures", "buckets", "remove"))
    execute("signatures", [reader(*rows), minhash.MinhashDedupSignature(signatures, config=config)])
    execute("buckets", [minhash.MinhashDedupBuckets(signatures, buckets, config=config)], tasks=config.num_buckets)
    execute("cluster", [minhash.MinhashDedupCluster(buckets, remove, config=config)])
    execute("filter", [reader(*rows), minhash.MinhashDedupFilter(remove), writer("kept")])


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, required=True, help="JSONL of ids and texts")
    parser.add_argument("--folder", type=Path, required=True, help="an empty directory for what the pipelines write")
    parser.add_argument("--words", choices=("own", "white space"), required=True)
    wanted = parser.parse_args()
    if wanted.words == "white space":
        tokenizers.load_word_tokenizer = minhash.load_word_tokenizer = lambda language: WhiteSpace()
    tokenizers.load_word_tokenizer("en").word_tokenize("warm up")

    def make(name: str):
        return {
            "Gopher quality": filters.GopherQualityFilter,
            "Gopher repetition": filters.GopherRepetitionFilter,
            "C4": lambda: filters.C4QualityFilter(min_num_sentences=3, min_words_per_line=5),
        }[name]()

    names = ("Gopher quality", "Gopher repetition", "C4")
    pipelines = {"read and write": ((), False), **{name: ((name,), False) for name in names}, "MinHash": ((), True),
                 "all": (names, True)}  # fmt: skip
    taken, kept = {}, {}
    for name, (chosen, dedup) in pipelines.items():
        folder = wanted.folder / name.replace(" ", "_")
        made = [make(each) for each in chosen]
        taken[name] = seconds(functools.partial(run, folder, wanted.documents, made, dedup=dedup))
        kept[name] = [json.loads(line)["id"] for path in (folder / "kept").glob("*.jsonl") for line in path.open("rb")]
    versions = {name: importlib.metadata.version(name) for name in ("datatrove", "spacy", "xxhash")}
    print(json.dumps({"versions": versions, "seconds": taken, "kept": kept}))


if __name__ == "__main__":
    main()
