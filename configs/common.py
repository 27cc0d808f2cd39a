"""What the configs of all stages share: the sizes' ways of computing, the mesh, the paper's optimizer."""

from ml_collections import ConfigDict

SIZES = ("7b", "13b", "34b", "70b", "llama1-7b", "llama1-13b", "llama1-33b", "llama1-65b", "smollm2-135m", "tiny")


def check(size: str) -> str:
    """The size, if it is one."""
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; expected one of {', '.join(SIZES)}")
    return size


def compute(size: str) -> ConfigDict:
    """bfloat16 with recomputation on a pod; float32 activations between bfloat16 products on a CPU."""
    if size == "tiny":
        return ConfigDict(
            {"matmul": "bfloat16", "activations": "float32", "remat": "none", "loss_chunks": 4, "unroll": True}
        )
    if size == "smollm2-135m":  # thirty layers in one scan: unrolled they would compile for minutes
        return ConfigDict(
            {"matmul": "bfloat16", "activations": "float32", "remat": "none", "loss_chunks": 8, "unroll": False}
        )
    return ConfigDict(
        {"matmul": "bfloat16", "activations": "bfloat16", "remat": "full", "loss_chunks": 1, "unroll": False}
    )


def mesh(size: str) -> ConfigDict:
    """Everything over fsdp; the 34B and 70B also over 8-way tensor parallelism."""
    return ConfigDict({"data": 1, "fsdp": -1, "sequence": 1, "tensor": 8 if size in ("34b", "70b") else 1})


def adamw(lr: float, *, schedule: str = "cosine", warmup: int = 0, final: float = 0.1) -> ConfigDict:
    """AdamW as everywhere in the paper (section 2.2)."""
    return ConfigDict({
        "lr": lr, "schedule": schedule, "warmup": warmup, "final": final,
        "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1, "clip": 1.0,
    })  # fmt: skip


def loop(steps: int, batch_size: int, **changes) -> ConfigDict:
    """Steps and rows of the global batch, and how often things are written."""
    return ConfigDict({
        "steps": steps, "batch_size": batch_size, "seed": 0, "microbatches": 1, "log_every": 10, "eval_every": 0,
        "checkpoint_every": 1000, "keep": 2, "max_skipped_in_a_row": 10, **changes,
    })  # fmt: skip


def stage(kind: str, size: str, /, **fields) -> ConfigDict:
    """A stage's config; paths are given on the command line or by the recipe."""
    config = ConfigDict({
        "stage": kind, "model": check(size), "tokenizer": "tokenizer.model", "start": "",
        "compute": compute(size), "mesh": mesh(size), **fields,
    })  # fmt: skip
    return config
