"""What fewer kv heads bring in serving (Fig. 24): `python -m llama_jax.serving_study --config=configs/serving_study.py:33b`.

`33b` is the paper's (its "30B" is Llama 1's 33B; eight chips of 80 GiB or more), `tiny` takes two CPU cores some minutes, and
`smoke` is for tests. Any other name of `model/config.py` will do too.
"""

from ml_collections import ConfigDict


def get_config(size: str = "tiny") -> ConfigDict:
    """Prompts of 256 and 2048 tokens, answers of 128, batches up to 2048; `tiny` stops at 64, its prompts at 1024."""
    name = {"33b": "llama1-33b", "smoke": "nano"}.get(size, size)
    config = ConfigDict({
        "size": name, "prompts": (256, 2048), "new_tokens": 128, "largest": 2048, "repeats": 3,
        "compute": {"matmul": "auto", "activations": "bfloat16"},
        "mesh": {"data": 1, "fsdp": 1, "sequence": 1, "tensor": -1},  # the paper's, on which a batch of one runs
    })  # fmt: skip
    if size == "tiny":
        config.update({"prompts": (256, 1024), "largest": 64, "repeats": 2})
    if size == "smoke":
        config.update({"prompts": (8, 16), "new_tokens": 4, "largest": 4, "repeats": 1})
    return config
