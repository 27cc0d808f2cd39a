"""Pretraining (paper section 2.2): `python -m llama_jax.train --config=configs/pretrain.py:7b --workdir=...`.

`configs/pretrain.py:70b,tpu=v5p-512` adds settings for that slice, as every stage's config does for those that are kept
(configs/common.py: PODS).

Give `--config.data.corpus`, a corpus made by `llama_jax.corpus`. Without
`--config.data.weights='{"web": 0.8, "code": 0.2}'` its sources have the shares that it was planned with.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """Table 1: peak 3e-4 (7B, 13B) or 1.5e-4 (34B, 70B), 2000 steps of warm-up, 4M tokens a batch, 2T tokens."""
    size, _, tpu = common.arguments(argument)
    data = {"corpus": "corpus", "weights": {}, "separate_documents": False}
    if size == "tiny":
        # Small batches: for the same tokens, 1,600 steps of 4 rows reached 0.06 to 0.11 bits per byte less than 800 of 8.
        optim = common.adamw(2.5e-3, warmup=80)
        loop = common.loop(1900, 4, checkpoint_every=400)
    else:
        rows = 2048 if size.startswith("llama1") else 1024  # 4 * 2^20 tokens
        trillions = {"llama1-7b": 1.0, "llama1-13b": 1.0, "llama1-33b": 1.4, "llama1-65b": 1.4}.get(size, 2.0)
        optim = common.adamw(1.5e-4 if size in ("34b", "70b", "llama1-33b", "llama1-65b") else 3e-4, warmup=2000)
        loop = common.loop(round(trillions * 1e12 / (4 * 2**20)), rows, eval_every=1000)
    # At 4M tokens a batch, gathering weights costs less than exchanging activations.
    mesh = {**common.mesh(size), "tensor": 1}
    return common.stage("pretrain", size, tpu, data=data, optim=optim, loop=loop, mesh=mesh, z_loss=0.0)
