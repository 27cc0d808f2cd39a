"""The train command with one more size of model, so small that a restart takes seconds; steps last CHAOS_PAUSE seconds."""

import atexit
import ctypes
import dataclasses
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llama_jax import command
from llama_jax import train as train_command
from llama_jax.model.config import SIZES
from llama_jax.training.feed import Feed

SIZES["micro"] = dataclasses.replace(
    SIZES["tiny"], name="micro", layers=1, width=64, heads=2, kv_heads=1, head_size=32, ffn=128
)


_PR_SET_PDEATHSIG = 1


def slowly(batch):
    """A pause before each batch: faults are to come in the middle of training, not only of starting."""

    def wrapped(*arguments):
        time.sleep(float(os.environ.get("CHAOS_PAUSE", "0")))
        return batch(*arguments)

    return wrapped


def preload() -> None:
    """Imports what a run imports later, for processes that are forked from this one."""
    for name in (*(module for module, _ in train_command.STAGES.values()), "tensorboardX", "ml_collections.config_flags"):
        importlib.import_module(name)


def run_worker(arguments: Sequence[str], environment: dict[str, str], output: Path) -> None:
    """The command in a forked process, which ends as one that was started would."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing of it outlives the test
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ |= environment
    sys.argv = ["worker.py", *arguments]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def main() -> None:
    """The command."""
    Feed.batch = slowly(Feed.batch)
    command.define("configs/<stage>.py:<size>", buckets=True, workdir=train_command.WORKDIR)
    train_command.define_options()
    command.launch(train_command.main, expected=train_command.EXPECTED)


if __name__ == "__main__":
    main()
