"""GRPO (Shao et al. 2024), a baseline: `python -m llama_jax.train --config=configs/grpo.py:7b --workdir=...`.

Give `--config.start`, `--config.data.prompts`, and the reward models' workdirs `--config.helpfulness`,
`--config.safety`, or scorers of your own in their place: `--config.reward.scorers='("my_rules:score",)'`. Early stopping, and
prompts of several files, as in configs/ppo.py.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """64 prompts of 16 answers an iteration (published: 64 answers), one gradient step on them, KL 0.04, constant 1e-6."""
    size, _, tpu = common.arguments(argument)
    tiny = size == "tiny"
    grpo = {
        "rollout_size": 64 if tiny else 1024,
        "answers": 8 if tiny else 16,
        "new_tokens": 48 if tiny else 1024,
        "beta": 0.04, "clip": 0.2, "normalise": "token", "divide_by_std": True, "temperature": 1.0,
        "safety_threshold": 0.15, "missing_eos_penalty": 1.0, "epochs": 1, "importance_cap": 0.0,
        "sampling_batch": 0 if tiny else 16, "judge_batch": 0 if tiny else 16,  # see configs/ppo.py
    }  # fmt: skip
    data = {
        "prompts": common.Files("prompts.jsonl"), "prompt_length": 96 if tiny else 1024, "held_out": "", "shares": ()
    }  # fmt: skip
    optim = common.adamw(1e-4 if tiny else 1e-6, schedule="constant", warmup=4 if tiny else 0)
    loop = common.loop(72 if tiny else 400, 64 if tiny else 1024, log_every=1, checkpoint_every=40 if tiny else 5)
    return common.stage(
        "grpo", size, tpu, data=data, grpo=grpo, reward=common.reward(), helpfulness="", safety="", optim=optim, loop=loop
    )
