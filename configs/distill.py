"""Safety context distillation (paper section 4.2.4): `python -m llama_jax.train --config=configs/distill.py:7b --workdir=...`.

Give `--config.policy`, `--config.start`, `--config.safety` (workdirs), `--config.distill.prompts`, and in
`--config.data.train` the dialogs that the kept answers join.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "tiny") -> ConfigDict:
    """The paper gives the way, but no numbers; those of SFT and rejection sampling stand here."""
    size, _, tpu = common.arguments(argument)
    tiny = size == "tiny"
    length = {"tiny": 256}.get(size, 2048 if size.startswith("llama1") else 4096)
    data = {"train": (), "held_out": (), "length": length, "train_on": "all", "shares": ()}
    distill = {
        "prompts": "prompts.jsonl",
        "prompt_length": 96 if tiny else 1024,
        "max_prompts": 500 if tiny else 100_000,
        "generic": 2 if tiny else 1,
        "category": True,
        "least_gain": 0.0,
        "new_tokens": 48 if tiny else 512,
        "temperature": 1.0,
        "sampling_batch": 128 if tiny else 256,
    }
    optim = common.adamw(5e-4 if tiny else 2e-5, warmup=5 if tiny else 0)
    loop = common.loop(0, 8 if tiny else 64, checkpoint_every=100)
    config = common.stage(
        "distill", size, tpu, data=data, distill=distill, policy="", safety="", epochs=2.0, optim=optim, loop=loop
    )
    config.context = 512 if tiny else 0  # the answer templates have up to 126 tokens of the demo's tokenizer
    return config
