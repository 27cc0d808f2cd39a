"""What the configs of all stages share: the sizes' ways of computing, the mesh, the paper's optimizer."""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_flags import tuple_parser

SIZES = ("7b", "13b", "34b", "70b", "llama1-7b", "llama1-13b", "llama1-33b", "llama1-65b", "smollm2-135m", "tiny")


def check(size: str) -> str:
    """The size, if it is one."""
    if size not in SIZES:
        raise ValueError(f"size {size!r} is unknown; expected one of {', '.join(SIZES)}")
    return size


def compute(size: str) -> ConfigDict:
    """bfloat16 with recomputation on a pod; on a CPU float32 activations between products of what is faster there."""
    if size == "tiny":
        how = {"matmul": "auto", "activations": "float32", "remat": "none", "loss_chunks": 4, "unroll": True}
    elif size == "smollm2-135m":  # thirty layers in one scan: unrolled they would compile for minutes
        how = {"matmul": "auto", "activations": "float32", "remat": "none", "loss_chunks": 8, "unroll": False}
    else:
        how = {"matmul": "bfloat16", "activations": "bfloat16", "remat": "full", "loss_chunks": 8, "unroll": False}
    return ConfigDict({"attention": "auto", "sequence": "ring", **how})


class Files(FieldReference):
    """A field that holds one file or a tuple of them, for a ConfigDict, which else keeps a field to the type it begins with."""

    def __init__(self, default: str | tuple[str, ...]):
        super().__init__(default, (str, tuple))

    def get_type(self) -> type:
        """What a flag is read as: the words as they are, or a tuple."""
        return type(self.get())

    def set(self, value: object, type_safe: bool = True) -> None:
        """Takes a tuple in words too: a flag's '("a.jsonl","b.jsonl")'."""
        if isinstance(value, str) and value.startswith("("):
            value = tuple_parser.TupleParser().parse(value)
        super().set(tuple(value) if isinstance(value, list) else value, type_safe)


def few(steps: int, *, loop: dict | None = None, **changes) -> dict:
    """Changes of a stage's config for tests: a handful of steps, by a scan over layers, which compiles in less time."""
    loop = {"steps": steps, **(loop or {})}
    return {"epochs": 0.0, "loop": loop, "optim": {"warmup": 1}, "compute": {"unroll": False}, **changes}


def arguments(text: str, *, named: bool = False) -> tuple[str, str, str]:
    """Size, name and slice of a stage's argument, `70b` or `70b,tpu=v5p-512`; with `named` also `70b,safety,tpu=v5p-512`."""
    size, *words = text.split(",")
    tpu = words.pop().removeprefix("tpu=") if words and words[-1].startswith("tpu=") else ""
    if len(words) > named:
        form = "<size>,<name>,tpu=<slice>" if named else "<size>,tpu=<slice>"
        raise ValueError(f"{text!r}: expected {form}, of which the size alone must be there")
    return check(size), words[0] if words else "", tpu


def mesh(size: str) -> ConfigDict:
    """Everything over fsdp; models of 33B and more also over tensor parallelism, which generation needs to hold them.

    Generation divides weights over `tensor` alone; the 33B of Llama 1 has 52 heads, which 8 does not divide.
    """
    tensor = {"34b": 8, "70b": 8, "llama1-33b": 4, "llama1-65b": 8}.get(size, 1)
    return ConfigDict({"data": 1, "fsdp": -1, "sequence": 1, "tensor": tensor})


# Settings by stage, size and slice, each compiled for it by a test: (remat, microbatches, changes of the mesh).
PODS: dict[tuple[str, str, str], tuple[str, int, dict]] = {
    ("pretrain", "7b", "v5p-128"): ("dots", 4, {}),
    ("pretrain", "7b", "v5e-256"): ("full", 4, {}),
    ("pretrain", "13b", "v5p-256"): ("dots", 2, {}),
    ("pretrain", "34b", "v5p-512"): ("dots", 2, {}),
    ("pretrain", "70b", "v5p-512"): ("queries", 1, {}),
    ("pretrain", "70b", "v6e-256"): ("full", 4, {}),
    ("pretrain", "70b", "tpu7x-256"): ("attention", 2, {}),
}


def pod(config: ConfigDict, tpu: str) -> ConfigDict:
    """A stage's config with the settings of PODS for a slice; without one, as it is."""
    if not tpu:
        return config
    kind, size = config.stage, config.model
    if (kind, size, tpu) not in PODS:
        known = [f"{stage}.py:{model},tpu={name}" for stage, model, name in PODS if model == size]
        raise ValueError(
            f"{kind}.py:{size},tpu={tpu}: no settings are kept for it; there are {', '.join(known) or 'none for this size'}. "
            f"Others: python -m llama_jax.plan --config=configs/{kind}.py:{size} --topology={tpu} --search"
        )
    remat, microbatches, changes = PODS[kind, size, tpu]
    config.compute.remat, config.loop.microbatches = remat, microbatches
    config.mesh.update(changes)
    return config


def adamw(
    lr: float, *, schedule: str = "cosine", warmup: int = 0, warmup_share: float = 0.0, final: float = 0.1
) -> ConfigDict:
    """AdamW as everywhere in the paper (section 2.2)."""
    return ConfigDict({
        "lr": lr, "schedule": schedule, "warmup": warmup, "warmup_share": warmup_share, "final": final,
        "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1, "clip": 1.0,
    })  # fmt: skip


def lora() -> ConfigDict:
    """Adapters (Hu et al. 2021) in place of the start's matrices: off; `--config.lora.rank=16` trains them.

    They want a learning rate about ten times that of the whole model. The paper trains whole models.
    """
    return ConfigDict({"rank": 0, "alpha": 16.0, "targets": ("query", "key", "value", "output", "gate", "up", "down")})


def reward() -> ConfigDict:
    """R_c of the two reward models (section 3.2.3) alone; "module:function" names a scorer, empty weights are all 1."""
    return ConfigDict({"scorers": ("reward_models",), "weights": ()})


def loop(steps: int, batch_size: int, **changes) -> ConfigDict:
    """Steps (0: as many as the stage's epochs make) and rows of the global batch, and how often things are written."""
    return ConfigDict({
        "steps": steps, "batch_size": batch_size, "seed": 0, "microbatches": 1, "log_every": 10, "eval_every": 0,
        "checkpoint_every": 1000, "keep": 2, "keep_every": 0, "keep_best": "", "keep_best_mode": "min",
        "patience": 0, "least_gain": 0.0,
        "max_skipped_in_a_row": 10, "spike": {"sigma": 0.0, "window": 128, "rewind": False, "skip": 1, "limit": 3}, **changes,
    })  # fmt: skip


def stage(kind: str, size: str, tpu: str = "", /, **fields) -> ConfigDict:
    """A stage's config, with the settings of a slice if one is named; paths are given on the command line or by the recipe."""
    config = ConfigDict({
        "stage": kind, "model": check(size), "tokenizer": "", "start": "", "context": 0,
        "compute": compute(size), "mesh": mesh(size), "lora": lora(), **fields,
    })  # fmt: skip
    return pod(config, tpu)
