"""PPO (paper section 3.2.3): `python -m llama_jax.train --config=configs/ppo.py:7b --workdir=...`.

Give `--config.start`, `--config.helpfulness`, `--config.safety` (workdirs), `--config.data.prompts`. A tenth of adversarial
prompts: `--config.data.prompts='("prompts.jsonl","adversarial.jsonl")' --config.data.shares='(0.0,0.1)'`.
Early stopping on held-out reward, measured every 5 iterations of 8 steps (off; the best checkpoint is then the newest one):
`--config.data.held_out=held_out.jsonl --config.loop.eval_every=40 --config.loop.patience=4 --config.loop.keep_best=reward
--config.loop.keep_best_mode=max`. With held-out prompts a warning tells where their reward falls while that of training rises.
A scorer of your own: `--config.reward.scorers='("reward_models","my_rules:score")' --config.reward.weights='(1.0,0.5)'`. With
one reward model alone (the other's workdir left empty), its score is the reward.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """512 prompts an iteration in mini-batches of 64, one gradient step each, 200 to 400 iterations at constant 1e-6."""
    size, _, tpu = common.arguments(argument)
    tiny = size == "tiny"
    ppo = {
        "rollout_size": 64 if tiny else 512,
        "new_tokens": 48 if tiny else 1024,
        "beta": 0.1 if tiny else 0.005 if size in ("34b", "70b") else 0.01,
        "clip": 0.2,
        # not in the paper; as in common open implementations
        "value_clip": 0.2, "value_weight": 0.1, "gamma": 1.0, "lam": 0.95, "temperature": 1.0,
        "safety_threshold": 0.15,
        "missing_eos_penalty": 1.0,
        "epochs": 1, "importance_cap": 0.0, "kl_target": 0.0, "kl_horizon": 10_000.0,
        # of each shard: 2048 tokens of the 7B are 1 GiB of keys and values; on 64 chips a rollout is 8 rows of each
        "sampling_batch": 0 if tiny else 16, "judge_batch": 0 if tiny else 16,
        "critic_warmup": -1,  # of iterations; -1: none where the critic begins as a reward model, else a twentieth
    }  # fmt: skip
    data = {
        "prompts": common.Files("prompts.jsonl"), "prompt_length": 96 if tiny else 1024, "held_out": "", "shares": ()
    }  # fmt: skip
    optim = common.adamw(1e-4 if tiny else 1e-6, schedule="constant", warmup=4 if tiny else 0)
    loop = common.loop(24 * 2 if tiny else 8 * 400, 32 if tiny else 64, log_every=1, checkpoint_every=40)
    return common.stage(
        "ppo", size, tpu, data=data, ppo=ppo, reward=common.reward(), helpfulness="", safety="", optim=optim, loop=loop
    )
