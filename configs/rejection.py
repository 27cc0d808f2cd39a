"""Rejection sampling (paper section 3.2.3): `python -m llama_jax.train --config=configs/rejection.py:7b --workdir=...`.

Give `--config.policy`, `--config.start`, `--config.helpfulness`, `--config.safety` (workdirs),
`--config.rejection.prompts`, in `--config.data.train` the SFT dialogs to mix in, and in `--config.pools` the `pool.jsonl` of
earlier rounds. Scorers of your own, and prompts of several files (`--config.rejection.shares`), as in configs/ppo.py; with one
reward model alone its score is the reward. Distillation: `configs/rejection.py:7b,70b` fine-tunes the 7B on the best answers of
a 70B, by reward models of 70B, on a mesh that holds these; or the pools of the 70B alone serve, by `configs/rejection.py:7b
--config.rejection.answers=0`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """K answers a prompt (the paper: 10 to 100; Fig. 26 uses 20), then the hyper-parameters of SFT.

    "7b,70b" names what is fine-tuned, and the size of policy and reward models.
    """
    size, judge, tpu = common.arguments(argument, named=True)
    tiny = size == "tiny"
    length = {"tiny": 256}.get(size, 2048 if size.startswith("llama1") else 4096)
    data = {"train": (), "held_out": (), "length": length, "train_on": "all", "shares": ()}
    rejection = {
        "prompts": common.Files("prompts.jsonl"),
        "shares": (),
        "prompt_length": 96 if tiny else 1024,
        "max_prompts": 2300 if tiny else 100_000,
        "answers": 8 if tiny else 20,
        "new_tokens": 48 if tiny else 1024,
        "temperature": 1.0 if tiny else 1.2,  # where `temperatures` is empty
        # Fig. 8 tries 0.6, 0.8, 0.9, 1.0 ... 1.5; for the RLHF model 1.2 to 1.3 are best for 10 to 100 samples.
        "temperatures": () if tiny else (0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
        "search_prompts": 64 if tiny else 256,
        "sampling_batch": 128 if tiny else 256,
        "version": "1",
        "repeat": 1,
        "safety_threshold": 0.15,
    }
    optim = common.adamw(1e-3 if tiny else 2e-5, warmup=5 if tiny else 0)
    loop = common.loop(0, 8 if tiny else 64, checkpoint_every=100)
    config = common.stage(
        "rejection", size, tpu, data=data, rejection=rejection, policy="", policy_model=judge, helpfulness="", safety="",
        reward_model=judge, reward=common.reward(), pools=(), epochs=3.0 if tiny else 2.0, optim=optim, loop=loop,
    )  # fmt: skip
    if judge:  # generation needs as many parts as the larger model
        config.mesh.tensor = max(config.mesh.tensor, common.mesh(common.check(judge)).tensor)
    return config
