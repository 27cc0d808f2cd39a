"""Ghost Attention (paper section 3.3): `python -m llama_jax.train --config=configs/ghost.py:7b --workdir=...`.

Give `--config.policy` (the newest chat model), `--config.start` (what is fine-tuned),
`--config.ghost.contexts='("dialogs.jsonl",)'` and in `--config.data.train` the SFT dialogs that the samples join.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """The paper gives the way, but no numbers except the families and the half of terse instructions; SFT's for the rest."""
    size, _, tpu = common.arguments(argument)
    tiny = size == "tiny"
    length = {"tiny": 1024}.get(size, 2048 if size.startswith("llama1") else 4096)
    data = {"train": (), "held_out": (), "length": length, "train_on": "all", "shares": ()}
    ghost = {
        "contexts": ("dialogs.jsonl",),
        "join": tiny,  # the demo's dialogs have three turns at most
        "turns": (1, 20) if tiny else (2, 10),
        "samples": 1200 if tiny else 20_000,
        "families": ("opening", "closing", "hobby") if tiny else ("hobby", "language", "figure"),
        "values": "",  # the policy writes the lists
        "most_constraints": 1 if tiny else 3,
        "terse_share": 0.5,
        "probe_share": 0.5,
        "place": "user",
        "resample": False,
        "keep": "all",
        "new_tokens": 32 if tiny else 1024,
        "temperature": 0.7 if tiny else 1.0,
        "sampling_batch": 64,
    }
    optim = common.adamw(5e-4 if tiny else 2e-5, warmup=5 if tiny else 0)
    loop = common.loop(0, 4 if tiny else 64, checkpoint_every=100)
    config = common.stage("ghost", size, tpu, data=data, ghost=ghost, policy="", epochs=2.0, optim=optim, loop=loop)
    config.context = length if tiny else 0
    return config
