"""What safety data do (section 4.2.3; Figs. 15, 33): `python -m llama_jax.safety_study --config=configs/safety_study.py:tiny`.

Give, of a recipe's workdir RUN: `--config.start=RUN/pretrain --config.helpfulness=RUN/reward_helpfulness
--config.safety=RUN/reward_safety --config.tokenizer=RUN/corpus/tokenizer.model --config.train='("RUN/data/sft.jsonl",)'
--config.prompts=RUN/data/verdict_prompts.jsonl`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "tiny") -> ConfigDict:
    """The paper's shares of safety data, of 0.1M rows beside 0.9M helpful ones; `smoke` is `tiny` in a minute, for tests."""
    if size not in ("tiny", "smoke"):
        raise ValueError(f"safety_study {size!r} is unknown; expected tiny or smoke")
    config = ConfigDict({
        "size": "tiny", "configs": "configs", "start": "", "helpfulness": "", "safety": "",
        "tokenizer": "tokenizer.model", "train": ("sft.jsonl",), "prompts": "verdict_prompts.jsonl", "borderline": "",
        "helpful_rows": 2400, "safety_rows": 600, "most": 210,  # the paper asks 210 borderline prompts (A.4.3)
        "shares": (0.0, 1.0, 10.0, 25.0, 50.0, 100.0),
        "decoding": {"temperature": 0.6, "top_p": 0.9, "prompt_length": 96, "new_tokens": 48, "batch_size": 64},
        "overrides": {"sft": {}},
        "seed": 0,
    })  # fmt: skip
    if size == "smoke":
        config.update({"helpful_rows": 24, "safety_rows": 12, "most": 6, "shares": (0.0, 10.0, 100.0)})
        config.decoding.update({"new_tokens": 8, "batch_size": 8})
        config.overrides.sft = ConfigDict(common.few(2, loop={"batch_size": 4}))
    return config
