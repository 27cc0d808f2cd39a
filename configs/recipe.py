"""The whole recipe: `python -m llama_jax.recipe --config=configs/recipe.py:tiny --workdir=...` (paper, all of it).

About 15 minutes on two CPU cores. `smoke` is the same path in a minute, for tests.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(size: str = "tiny") -> ConfigDict:
    """`tiny`, or `smoke`: `tiny` with a handful of steps."""
    decoding = {"temperature": 1.0, "top_p": 1.0, "prompt_length": 96, "new_tokens": 48, "batch_size": 128}
    config = ConfigDict({
        "size": "tiny",
        "configs": "configs",
        "corpus": "tiny",
        "datasets": {
            "objects": 10_000, "max_characters": 300, "held_out_fraction": 0.1,
            "sft": 14_000, "sft_safety": 2400,
            "preferences": 3000, "preferences_safety": 700,
            "rlhf": 1800, "rlhf_safety": 500,
            "held_out": 300, "held_out_safety": 100,
        },
        "variant_temperatures": (0.8, 1.1),
        "preference_rounds": 1,
        "annotator_noise": 0.03,
        "rejection_with_sft": False,
        "verdict": decoding,
        "sampling": decoding,
        "compute": common.compute("tiny"),
        "mesh": common.mesh("tiny"),
        "safety_mix": 0.25,  # the paper's 10 % would be 40 pairs here
        "overrides": {"sft_variant": {"epochs": 0.25}},
        "seed": 0,
    })  # fmt: skip
    if size == "smoke":
        config.datasets = ConfigDict({
            "objects": 600, "max_characters": 300, "held_out_fraction": 0.3,
            "sft": 64, "sft_safety": 16, "preferences": 24, "preferences_safety": 16, "rlhf": 32, "rlhf_safety": 16,
            "held_out": 16, "held_out_safety": 16,
        })  # fmt: skip
        small = {"batch_size": 32, "new_tokens": 16}
        config.verdict.update(small)
        config.sampling.update(small)
        config.rejection_with_sft = True  # models this young never end an answer, so there is no best one
        config.overrides = ConfigDict({
            "corpus": {"total_tokens": 12_288},
            "pretrain": {"loop": {"steps": 6, "checkpoint_every": 3}, "optim": {"warmup": 2}},
            "sft": {"epochs": 0.0, "loop": {"steps": 4}, "optim": {"warmup": 1}},
            "sft_variant": {"epochs": 0.0, "loop": {"steps": 2}, "optim": {"warmup": 1}},
            "reward_helpfulness": {"epochs": 0.0, "loop": {"steps": 2}, "optim": {"warmup": 1}},
            "reward_safety": {"epochs": 0.0, "loop": {"steps": 2}, "optim": {"warmup": 1}},
            "rejection": {
                "epochs": 0.0, "loop": {"steps": 2}, "optim": {"warmup": 1},
                "rejection": {"max_prompts": 8, "answers": 4, "new_tokens": 16, "sampling_batch": 32},
            },
            "ppo": {
                "loop": {"steps": 8, "batch_size": 8, "checkpoint_every": 1},
                "ppo": {"rollout_size": 16, "new_tokens": 16},
            },
        })  # fmt: skip
    elif size != "tiny":
        raise ValueError(f"recipe {size!r} is unknown; expected tiny or smoke")
    return config
