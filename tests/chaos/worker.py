"""The train command with one more size of model, so small that a restart takes seconds; steps last CHAOS_PAUSE seconds."""

import dataclasses
import os
import time

from llama_jax import command
from llama_jax import train as train_command
from llama_jax.model.config import SIZES
from llama_jax.training.feed import Feed

SIZES["micro"] = dataclasses.replace(
    SIZES["tiny"], name="micro", layers=1, width=64, heads=2, kv_heads=1, head_size=32, ffn=128
)


def slowly(batch):
    """A pause before each batch: faults are to come in the middle of training, not only of starting."""

    def wrapped(*arguments):
        time.sleep(float(os.environ.get("CHAOS_PAUSE", "0")))
        return batch(*arguments)

    return wrapped


if __name__ == "__main__":
    Feed.batch = slowly(Feed.batch)
    command.define("configs/<stage>.py:<size>", buckets=True, workdir=train_command.WORKDIR)
    train_command.define_options()
    command.launch(train_command.main, expected=train_command.EXPECTED)
