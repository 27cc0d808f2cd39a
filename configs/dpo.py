"""Direct preference optimisation (Rafailov et al. 2023): `python -m llama_jax.train --config=configs/dpo.py:7b --workdir=...`.

Give `--config.start` (a chat model's workdir) and `--config.data.train`, `--config.data.shares` or
`--config.data.rest` (as in configs/reward.py). Expect a first loss of log 2 = 0.693 and, on data that it can learn, an
accuracy that rises from chance.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """beta 0.1 and 64 pairs a batch as published; one epoch at peak 5e-7 with cosine, as chat models of 7B are tuned."""
    size, _, tpu = common.arguments(argument)
    length = {"tiny": 144}.get(size, 2048 if size.startswith("llama1") else 4096)
    data = ConfigDict({
        "train": (), "shares": (), "rest": (), "rest_share": 0.5, "held_out": (), "length": length,
        "buckets": 3 if size == "tiny" else 8,
    })  # fmt: skip
    dpo = {"beta": 0.1, "kind": "sigmoid", "label_smoothing": 0.0, "margin": "none", "sft_weight": 0.0}
    if size == "tiny":
        optim, loop = common.adamw(5e-5, warmup=5), common.loop(0, 16, checkpoint_every=100)
    else:
        optim, loop = common.adamw(5e-7, warmup_share=0.03), common.loop(0, 64, checkpoint_every=500)
    return common.stage("dpo", size, tpu, data=data, dpo=dpo, epochs=1.0, optim=optim, loop=loop)
