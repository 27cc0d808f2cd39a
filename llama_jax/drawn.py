"""What a pretraining run has drawn of its corpus, beside what was planned: `python -m llama_jax.drawn --workdir=/tmp/pretrain`.

The run's log says how often it has seen each source (`epochs/<source>`), and the manifest of its corpus what that is in
documents, bytes and tokens (paper section 2.1).
"""

import json
import os

import numpy as np
from absl import flags

from llama_jax import command
from llama_jax.config import ConfigError
from llama_jax.corpus_build.manifest import read_manifest
from llama_jax.corpus_build.tables import drawn_table
from llama_jax.paths import check_bucket, place
from llama_jax.training.metrics import read_metrics


def run(workdir: str | os.PathLike) -> str:
    """The table of a run, finished or not. ConfigError for a workdir that is no pretraining run's, or of one without a step."""
    path = place(workdir) / "config.json"
    if not path.exists():
        raise ConfigError(f"{path}: expected the config of a pretraining run, found nothing")
    config = json.loads(path.read_text())
    if config["stage"] != "pretrain":
        raise ConfigError(f"{path}: stage: expected pretrain, got {config['stage']}")
    log, sources = read_metrics(workdir), read_manifest(config["data"]["corpus"])["sources"]
    steps = int(log["step"].max(initial=-1)) + 1
    epochs = {}
    for source in sources:
        told = np.flatnonzero(np.isfinite(log.get(f"epochs/{source}", np.zeros(0))))
        if len(told):  # some steps tell; shares are even, so the steps since then have drawn as those before
            epochs[source] = float(log[f"epochs/{source}"][told[-1]] * steps / (log["step"][told[-1]] + 1))
    if not epochs:
        raise ConfigError(f"{workdir}: its log says nothing of the sources of {config['data']['corpus']}")
    return f"{drawn_table(sources, epochs)}\nafter {steps:,} of {config['loop']['steps']:,} steps"


def main() -> None:
    """Flags to call."""
    check_bucket(flags.FLAGS.workdir)
    print(run(flags.FLAGS.workdir))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "workdir of a pretraining run; gs://bucket/... too", required=True)
    command.launch(main)
