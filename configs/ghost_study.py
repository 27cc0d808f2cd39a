"""How long an instruction is kept (Table 30, Fig. 10): `python -m llama_jax.ghost_study --config=configs/ghost_study.py:tiny`.

Give `--config.start` (a chat model's workdir), `--config.tokenizer` and `--config.dialogs` (JSONL of its SFT data).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "tiny") -> ConfigDict:
    """The turns of Table 30 at `tiny`, whose 20 short turns fit a context of 1024; `smoke` is `tiny` in a minute, for tests."""
    if size not in ("tiny", "smoke"):
        raise ValueError(f"ghost_study {size!r} is unknown; expected tiny or smoke")
    config = ConfigDict({
        "size": "tiny", "configs": "configs", "start": "", "tokenizer": "tokenizer.model", "dialogs": "dialogs.jsonl",
        "context": 1024, "turns": (1, 2, 4, 6, 20), "longest": 40,
        "instructions": 2400, "samples": 1300, "held_out": 48, "new_tokens": 32,
        "overrides": {
            "baseline": {"epochs": 4.0, "optim": {"lr": 1e-3}, "loop": {"batch_size": 4}},
            # The baseline obeys in eight of ten samples; after three epochs it did in four to seven, by where it began, and
            # with four turn 20 kept 25 %.
            "ghost": {"epochs": 2.0, "ghost": {"keep": "obeyed"}},
        },
        "seed": 0,
    })  # fmt: skip
    if size == "smoke":
        config.update({"context": 384, "longest": 80, "turns": (1, 2, 3)})
        config.update({"instructions": 60, "samples": 6, "held_out": 6, "new_tokens": 8})
        config.overrides = ConfigDict({name: common.few(2, loop={"batch_size": 4}) for name in ("baseline", "ghost")})
    return config
