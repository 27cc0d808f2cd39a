"""Studies of reward models: `python -m llama_jax.reward_study --config=configs/reward_study.py:7b --workdir=...`.

Tables 27 to 29 and 35, Figs. 6, 27 and 32. Give `--config.tokenizer`, `--config.train`, `--config.held_out` (files of
comparisons), `--config.starts` (a chat model's workdir for each size), for Table 29 `--config.safety_loss='(0.0,1.0)'`, weights
of the auxiliary loss (pairs need a `safety_bin`), and for Fig. 32 the workdirs of reward models, `--config.helpfulness` and
`--config.safety`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """All three margins; 14 batches as in Fig. 6 (3 at `tiny`), at the sizes given: `reward_study.py:7b,13b,70b`."""
    sizes = tuple(common.check(size) for size in argument.split(","))
    return ConfigDict({
        "configs": "configs", "reward": "reward.py:{size},helpfulness", "overrides": {}, "tokenizer": "tokenizer.model",
        "train": (), "held_out": (), "margins": ("none", "small", "large"),
        "sizes": sizes, "starts": ("",) * len(sizes), "batches": 3 if sizes[0] == "tiny" else 14,
        "helpfulness": "", "safety": "", "safety_loss": (),
    })  # fmt: skip
