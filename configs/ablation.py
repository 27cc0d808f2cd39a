"""What data are worth (section 2.1): `python -m llama_jax.ablation --config=configs/ablation.py:clean --workdir=/tmp/clean`.

Models of equal size on equal numbers of tokens; only the text differs. The held-out documents are the same for all arms.
"""

from ml_collections import ConfigDict


def get_config(name: str = "clean") -> ConfigDict:
    """`clean`: documentation soiled by code, raw against cleaned. `mixture`: shares of the factual sources. `crawl`: your own
    raw web text against the same, cleaned (`--config.sources.web.reader=... --config.evaluate.reference.reader=...`).
    `smoke`: `clean` with a handful of steps."""
    if name in ("clean", "smoke"):
        config = _config(_docs(3_000_000), ("raw", "cleaned"), raw=_RAW, cleaned=_cleaned(("extract", "normalise", "gopher")))
        config.dirt = ConfigDict({"boilerplate": 0.6, "copies": 0.3, "mojibake": 0.15, "markup": 0.2, "junk": 0.3})
        if name == "smoke":
            config.sources = ConfigDict(_docs(150_000))
            config.held_out_bytes, config.seeds = 4000, (0,)
            config.train = _train(6, eval_every=3)
        return config
    if name == "mixture":
        sources = {**_docs(3_000_000), "source_code": _source("installation", 3_000_000, whole=True)}
        once = _cleaned(("normalise",))
        return _config(
            {"reference": _source("installation", 1_000_000), **sources},
            ("proportional", "uniform", "factual", "code"),
            # About the shares of the text that there is.
            proportional={**once, "what": "sources as large as they are", "weights": _shares(0.05, 0.3, 0.325, 0.325)},
            uniform={**once, "what": "every source alike", "weights": _shares(0.25, 0.25, 0.25, 0.25)},
            # "up-sampling the most factual sources" (section 2.1)
            factual={**once, "what": "reference and standard library up-sampled", "weights": _shares(0.2, 0.5, 0.15, 0.15)},
            code={**once, "what": "source code up-sampled", "weights": _shares(0.05, 0.15, 0.2, 0.6)},
        )
    if name == "crawl":
        web = ("extract", "normalise", "language", "gopher", "repetition", "c4", "privacy")
        config = _config({"web": _source("web.jsonl.gz", 10**9)}, ("raw", "cleaned"), raw=_RAW, cleaned=_cleaned(web))
        config.evaluate = ConfigDict({"reference": _source("reference.jsonl.gz", 10**9)})
        config.held_out_bytes = 150_000
        return config
    raise ValueError(f"ablation {name!r} is unknown; expected clean, mixture, crawl or smoke")


# Exact copies are taken out of every corpus, so the gain of cleaning is what it adds to that.
_RAW = {"what": "as it came but for exact copies: no cleaning, no other duplicates taken out", "steps": (), "deduplication": {},
        "weights": {}}  # fmt: skip


def _cleaned(steps: tuple[str, ...]) -> dict:
    return {
        "what": f"{', '.join(steps)}; boilerplate lines, near duplicates, repeated paragraphs",
        "steps": steps,
        "deduplication": {
            "boilerplate": {"documents": 10, "share": 0.01, "shortest": 20},
            "near": {"threshold": 0.7, "ngram": 5, "permutations": 128, "bands": 21, "seed": 0},
            "repeated_paragraph": 80,
        },
        "weights": {},
    }


def _docs(budget: int) -> dict:
    return {name: _source("installation", budget) for name in ("stdlib_docs", "package_docs")}


def _source(reader: str, budget: int, *, whole: bool = False) -> dict:
    return {"reader": reader, "byte_budget": budget, "weight": 1.0, "whole": whole}


def _shares(reference: float, stdlib: float, package: float, code: float) -> dict:
    return {"reference": reference, "stdlib_docs": stdlib, "package_docs": package, "source_code": code}


def _train(steps: int, *, eval_every: int) -> dict:
    loop = {"steps": steps, "eval_every": eval_every, "checkpoint_every": 1000}
    return {"loop": loop, "optim": {"warmup": min(20, steps // 3)}}


def _config(sources: dict, order: tuple[str, ...], **arms) -> ConfigDict:
    return ConfigDict({
        "size": "tiny",
        "configs": "configs",
        "sources": sources,
        "evaluate": {},
        "held_out_bytes": 60_000,
        "leak_ngram": 8,
        "dirt": None,
        "arms": arms,
        "order": order,
        "block_length": 256,
        "train": _train(600, eval_every=120),
        "seeds": (0, 1),
        "seed": 0,
    })  # fmt: skip
