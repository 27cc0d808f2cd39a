"""Supervised fine-tuning (paper section 3.1): `python -m llama_jax.train --config=configs/sft.py:7b --workdir=...`.

Give `--config.start` (the pretraining's workdir) and `--config.data.train='("dialogs.jsonl",)'`. For
a model with a chat format of its own (`sft.py:smollm2-135m`), `--config.data.chat=template` trains in that.

Here and in every config with `epochs`, `--config.loop.steps=20` ends the run after 20 steps, if the epochs have more.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """27,540 annotations, 2 epochs (1 at `tiny`), batch 64 rows of 4096, learning rate 2e-5 with cosine."""
    size, _, tpu = common.arguments(argument)
    length = {"tiny": 256}.get(size, 2048 if size.startswith("llama1") else 4096)
    data = {"train": ("dialogs.jsonl",), "held_out": (), "length": length, "train_on": "all", "shares": (), "chat": "llama2"}
    if size == "tiny":
        optim, loop = common.adamw(1e-3, warmup=10), common.loop(0, 8, checkpoint_every=100)
    else:
        optim, loop = common.adamw(2e-5), common.loop(0, 64, checkpoint_every=200)
    return common.stage("sft", size, tpu, data=data, epochs=1.0 if size == "tiny" else 2.0, optim=optim, loop=loop)
