"""Corpora (paper section 2.1): `python -m llama_jax.corpus --config=configs/corpus.py:tiny --output=/tmp/corpus`.

The paper names neither its sources nor their weights; it up-samples the most factual ones, and so do we.

Flags change the fields of the sources that a config has. Other sources need a config of their own, a file such as

    from configs import corpus

    def get_config():
        config = corpus.get_config("jsonl")
        config.sources = {
            "wiki": corpus.files("wiki/*.parquet?text=content", 0.2),  # weight; of Parquet, the column that holds the text
            "web": corpus.files("crawl/*.warc.gz", 0.8, steps=("extract", *corpus.WEB_STEPS)),
        }
        config.order = ("wiki", "web")  # of copies, the one in the first source stays
        return config

in the directory of the command, and `--config=mine.py`. A rule is switched off by a 0 where the comment says so.

One process holds all documents that pass the steps in memory, and once more while they are saved: plan three times their bytes.
Beyond that use `--beam` with a runner that keeps its data on disks (Flink, Spark, Dataflow: launch/README.md; Beam's
DirectRunner holds them in memory too), of whose workers each holds the documents of the file that it reads.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(name: str = "default") -> ConfigDict:
    """`tiny`: 8 MB of the documentation on this machine, 10 s. `default`: the paper's vocabulary and context over all of
    it. `jsonl`: the paper's sizes over your own file, `--config.sources.web.reader=...`, with a `text` in each row. `web`: the
    whole pipeline over a crawl and curated sources."""
    if name == "tiny":
        return _config(
            {
                "reference": _installation(0.10, 1_000_000),  # all 0.5 MB of it: most factual, seen more than once
                "stdlib_docs": _installation(0.22, 3_000_000),
                "package_docs": _installation(0.58, 3_000_000),
                "source_code": _installation(0.10, 2_000_000, whole=True),
            },
            vocab_size=4096, block_length=256, tokenizer_bytes=4_000_000,
            analyses=("demographics",),
            total_tokens=1_945_600,  # 1,900 steps of 4 rows, as in configs/pretrain.py
            held_out_group="module",  # which the documentation and the source code of a module share
            leak_ngram=8,  # docstrings are copied with small changes; so few held-out documents can be strict
        )  # fmt: skip
    if name == "default":
        return _config(
            {
                "reference": _installation(0.10, 10_000_000),
                "stdlib_docs": _installation(0.20, 100_000_000),
                "package_docs": _installation(0.35, 100_000_000),
                "source_code": _installation(0.35, 100_000_000, whole=True),
            },
            total_tokens=100_000_000, held_out_maximum=1_000_000, held_out_group="module",
        )  # fmt: skip
    if name == "jsonl":
        return _config(
            {"web": files("web.jsonl", 1.0)},
            total_tokens=2_000_000_000_000,  # Table 1
            held_out_fraction=0.001, held_out_maximum=10_000_000,
        )  # fmt: skip
    if name == "web":
        return _config(
            {
                "encyclopedia": files("encyclopedia/*.parquet", 0.05),  # most factual: up-sampled, at most six times
                "books": files("books/*.jsonl.zst", 0.05),
                "code": files("code/*.jsonl.zst", 0.05, whole=True),
                "web": files("crawl/*.warc.gz", 0.85, steps=("extract", *WEB_STEPS)),
            },
            total_tokens=2_000_000_000_000,
            max_epochs=6.0,
            held_out_fraction=0.001, held_out_maximum=10_000_000, shards=1024, max_bad_rows=1000, max_bad_files=10,
            analyses=("language", "demographics", "toxicity"), analysed_share=0.1,  # A.4.3
            boilerplate=10,
        )  # fmt: skip
    raise ValueError(f"corpus {name!r} is unknown; expected tiny, default, jsonl or web")


# In the order in which a page goes through them: what is cheap and removes much comes first.
WEB_STEPS = ("normalise", "language", "gopher", "repetition", "c4", "privacy")


def _installation(weight: float, byte_budget: int, *, whole: bool = False) -> dict:
    return {"reader": "installation", "weight": weight, "byte_budget": byte_budget, "whole": whole, "steps": ("normalise",)}


def files(reader: str, weight: float, *, whole: bool = False, steps: tuple = ("normalise",)) -> dict:
    """A source of files (a path, a pattern or a directory); `whole` for programs, which may not lose paragraphs."""
    budget = placeholder(int)  # bytes of text that are read at most; Beam reads whole files
    return {"reader": reader, "weight": weight, "byte_budget": budget, "whole": whole, "steps": steps}


def _config(sources: dict, *, leak_ngram: int = 13, boilerplate: int = 0, **changes) -> ConfigDict:
    return ConfigDict({
        "sources": sources,
        "order": tuple(sources),  # of copies, the one in the first source stays
        "vocab_size": 32_000,  # section 2.2
        "block_length": 4096,  # Table 1
        "held_out_fraction": 0.05,
        "held_out_minimum": 40_000,  # bytes a source: less gives no stable figure
        "held_out_maximum": 60_000,
        # A field of the rows' `metadata`, say a book, a course or a repository. Documents with the same value there never stand
        # on both sides: of those with a held-out one among them no model is trained, so each value should have few of them.
        "held_out_group": placeholder(str),
        "tokenizer_bytes": 100_000_000,
        "clean": {
            "extractor": "resiliparse",  # or trafilatura
            "page_characters": 5_000_000,  # of HTML; longer pages are left out
            "languages": ("en",),  # that stay: ISO 639 codes, and unknown
            "language_threshold": 0.5,  # A.4.3
            "private_density": 1.0,  # findings per 1,000 characters
            "private_least": 3,  # findings that a document is allowed whatever its length
            "mask": False,
            "block_list": placeholder(str),  # a file of domains and reasons instead of the built-in list
            "gopher": {  # Gopher, A.1.1 and Table A1
                "words": (50, 100_000),
                "word_length": (3.0, 10.0),
                "symbols": 0.1,  # a word
                "bullets": 0.9,  # share of lines, as the next
                "ellipses": 0.3,
                "with_letter": 0.8,  # share of words
                "stop_words": 2,  # of the document's language; 0: none are asked for
                "duplicate_lines": 0.30,  # shares of lines, paragraphs and characters in what repeats; 1.0 allows all
                "duplicate_paragraphs": 0.30,
                "duplicate_line_characters": 0.20,
                "duplicate_paragraph_characters": 0.20,
                "top_ngrams": (0.20, 0.18, 0.16),  # 2- to 4-grams
                "duplicate_ngrams": (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),  # 5- to 10-grams
            },
            "c4": {"line_words": 5, "sentences": 3},
        },
        "deduplication": {
            # Lines of at least 20 characters in so many documents of a source, and in this share of them; documents=0: none.
            "boilerplate": {"documents": boilerplate, "share": 0.001, "shortest": 20},
            "evaluation": (),  # files of samples that must not be in the training text
            "evaluation_share": 0.0,  # of a program's n-grams that may be in them: it is not cut, it stays or goes
            # Documents of this Jaccard similarity of word 5-grams; threshold=0.0: none.
            "near": {"threshold": 0.7, "ngram": 5, "permutations": 128, "bands": 21, "seed": 0},
            "leak_ngram": leak_ngram,  # words; GPT-3 decontaminates by 13; 0: nothing is cut
            "repeated_paragraph": 80,  # characters; 0: repeats stay
        },
        "tokenizer": placeholder(str),  # a SentencePiece model instead of training one
        "temperature": placeholder(float),  # of the mixture
        "max_epochs": placeholder(float),  # cap on how often a source is seen
        "shards": 1,
        "max_bad_rows": 0,  # of each source that are skipped
        "max_bad_files": 0,  # of each source that are damaged, whose rest is skipped
        "analyses": (),  # of the report: language, demographics, toxicity
        "analysed_share": 1.0,
        "identities": placeholder(str),  # a file of axes and descriptors instead of those that Table 9 prints
        "toxicity_checkpoint": placeholder(str),  # PATH[#LABEL] of a classifier for transformers; else a built-in one
        "seed": 0,
        **changes,
    })  # fmt: skip
