"""Corpora (paper section 2.1): `python -m llama_jax.corpus --config=configs/corpus.py:tiny --output=/tmp/corpus`.

The paper names neither its sources nor their weights; it up-samples the most factual ones, and so do we.
"""

from ml_collections import ConfigDict


def get_config(name: str = "tiny") -> ConfigDict:
    """`tiny`: the documentation on this machine. `paper`: the paper's sizes, over JSONL files that you name."""
    if name == "tiny":
        return ConfigDict({
            "sources": {
                # the language reference: most factual, 0.5 MB, seen more than once
                "reference": {"path": "installation", "weight": 0.15, "max_bytes": 1_000_000},
                "stdlib_docs": {"path": "installation", "weight": 0.35, "max_bytes": 3_000_000},
                "package_docs": {"path": "installation", "weight": 0.35, "max_bytes": 3_000_000},
                "source_code": {"path": "installation", "weight": 0.15, "max_bytes": 2_000_000},
            },
            "vocab_size": 4096,
            "block_length": 256,
            "total_tokens": 1_800_000,
            "held_out_fraction": 0.05,
            "held_out_bytes": 60_000,
            "tokenizer": None,
            "seed": 0,
        })  # fmt: skip
    if name == "paper":
        return ConfigDict({
            "sources": {"web": {"path": "web.jsonl", "weight": 1.0, "max_bytes": 10**15}},
            "vocab_size": 32_000,  # section 2.2
            "block_length": 4096,  # Table 1
            "total_tokens": 2_000_000_000_000,
            "held_out_fraction": 0.001,
            "held_out_bytes": 10_000_000,
            "tokenizer": None,
            "seed": 0,
        })  # fmt: skip
    raise ValueError(f"corpus {name!r} is unknown; expected tiny or paper")
