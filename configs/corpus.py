"""Corpora (paper section 2.1): `python -m llama_jax.corpus --config=configs/corpus.py:tiny --output=/tmp/corpus`.

The paper names neither its sources nor their weights; it up-samples the most factual ones, and so do we.
"""

from ml_collections import ConfigDict


def get_config(name: str = "default") -> ConfigDict:
    """`tiny`: 8 MB of the documentation on this machine, 7 s. `default`: the paper's vocabulary and context over all of
    it. `jsonl`: the paper's sizes over your own file, `--config.sources.web.reader=...`, with a `text` in each row."""
    if name == "tiny":
        return _config(
            {
                "reference": _installation(0.15, 1_000_000),  # all 0.5 MB of it: most factual, seen more than once
                "stdlib_docs": _installation(0.35, 3_000_000),
                "package_docs": _installation(0.35, 3_000_000),
                "source_code": _installation(0.15, 2_000_000),
            },
            vocab_size=4096, block_length=256, tokenizer_bytes=4_000_000,
            total_tokens=2_048_000,  # 1000 steps of 8 rows, as in configs/pretrain.py
        )  # fmt: skip
    if name == "default":
        return _config(
            {
                "reference": _installation(0.10, 10_000_000),
                "stdlib_docs": _installation(0.20, 100_000_000),
                "package_docs": _installation(0.35, 100_000_000),
                "source_code": _installation(0.35, 100_000_000),
            },
            total_tokens=100_000_000, held_out_maximum=1_000_000,
        )  # fmt: skip
    if name == "jsonl":
        return _config(
            {"web": {"reader": "web.jsonl", "weight": 1.0, "byte_budget": 10**15}},
            total_tokens=2_000_000_000_000,  # Table 1
            held_out_fraction=0.001, held_out_maximum=10_000_000,
        )  # fmt: skip
    raise ValueError(f"corpus {name!r} is unknown; expected tiny, default or jsonl")


def _installation(weight: float, byte_budget: int) -> dict:
    return {"reader": "installation", "weight": weight, "byte_budget": byte_budget}


def _config(sources: dict, **changes) -> ConfigDict:
    return ConfigDict({
        "sources": sources,
        "order": tuple(sources),  # of copies, the one in the first source stays
        "vocab_size": 32_000,  # section 2.2
        "block_length": 4096,  # Table 1
        "held_out_fraction": 0.05,
        "held_out_minimum": 40_000,  # bytes a source: less gives no stable figure
        "held_out_maximum": 60_000,
        "tokenizer_bytes": 100_000_000,
        "tokenizer": None,
        "seed": 0,
        **changes,
    })  # fmt: skip
