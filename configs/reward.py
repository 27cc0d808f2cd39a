"""Reward models (paper section 3.2.2): `python -m llama_jax.train --config=configs/reward.py:7b --workdir=...`.

`configs/reward.py:7b,safety` is the safety model. Give `--config.start` (a chat model's workdir),
`--config.data.train` (preference files that are taken whole) and `--config.data.rest`, from all of which together the paper's
share is drawn: half of the helpfulness model's pairs, a tenth of the safety model's. `--config.data.shares` gives each file of
`train` a share of its own (0: all of it).

`configs/reward.py:smollm2-135m` is for two CPU cores: adapters on a small public model, short pairs. The whole path from
published files to accuracy on held-out conversations is `python tests/benchmarks/reward.py`, three quarters of an hour.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """One epoch of 512 pairs a batch, peak 5e-6 (70B) or 1e-5, cosine to 10 %, warm-up 3 % of the steps, at least 5."""
    size, name, tpu = common.arguments(argument, named=True)
    name = name or "helpfulness"
    length = {"tiny": 128, "smollm2-135m": 256}.get(size, 2048 if size.startswith("llama1") else 4096)
    data = ConfigDict({
        "train": (), "shares": (), "held_out": (), "others": (), "validation": (), "length": length, "buckets": 8,
    })  # fmt: skip
    # Section 3.2.2: as many pairs of all others as of Meta's helpfulness set; nine tenths of Meta's safety set.
    data.rest, data.rest_share = (), 0.1 if name == "safety" else 0.5
    if size == "tiny":
        data.buckets = 3
        optim, loop = common.adamw(5e-4, warmup=5), common.loop(0, 16, checkpoint_every=100)
    elif size == "smollm2-135m":
        # Adapters want ten times the learning rate; a batch of 8 gives a few thousand pairs some hundred steps. In halves it
        # takes 6 GB.
        optim, loop = common.adamw(2e-4, warmup=10), common.loop(0, 8, microbatches=2, checkpoint_every=100)
        data.buckets = 4
    else:
        # 2.9M comparisons (Table 6) in batches of 512 pairs are 5,700 steps. Table 6's examples have 600 tokens, a seventh of
        # the context, so batches are padded to few lengths.
        optim = common.adamw(5e-6 if size == "70b" else 1e-5, warmup=5, warmup_share=0.03)
        loop = common.loop(0, 512, checkpoint_every=500)
    # The paper prints no weight of the auxiliary loss (A.3.4); it belongs to the safety model.
    config = common.stage(
        "reward", size, tpu, name=name, data=data, margin="small", safety_weight=1.0 if name == "safety" else 0.0,
        center_weight=0.0, epochs=1.0,
        score_pairs=256 if size in ("tiny", "smollm2-135m") else 4096, optim=optim, loop=loop,
    )  # fmt: skip
    config.lora.rank = 16 if size == "smollm2-135m" else 0
    return config
