"""What pretraining runs have drawn of their corpus, beside what was planned, and their loss by tokens (Fig. 5).

    python -m llama_jax.drawn --workdir=/tmp/pretrain

A run's log says how often it has seen each source (`epochs/<source>`), and the manifest of its corpus what that is in
documents, bytes and tokens (paper section 2.1).

    python -m llama_jax.drawn --curves=7b=runs/7b,13b=runs/13b --output=/tmp/curves

draws the training loss of several runs against tokens, beside where the paper's curves end (`evals/loss_by_tokens.py`).
"""

import os
from collections.abc import Mapping

import numpy as np
from absl import flags

from llama_jax import command
from llama_jax.config import ConfigError
from llama_jax.corpus_build.manifest import read_manifest
from llama_jax.corpus_build.tables import aligned, drawn_table
from llama_jax.evals import loss_by_tokens
from llama_jax.paths import check_bucket, place


def run(workdir: str | os.PathLike) -> str:
    """The table of a run, finished or not. ConfigError for a workdir that is no pretraining run's, or of one without a step."""
    config = loss_by_tokens.config_of(workdir)
    log, sources = loss_by_tokens.log_of(workdir), read_manifest(config["data"]["corpus"])["sources"]
    steps = int(log["step"].max(initial=-1)) + 1
    epochs = {}
    for source in sources:
        told = np.flatnonzero(np.isfinite(log.get(f"epochs/{source}", np.zeros(0))))
        if len(told):  # some steps tell; shares are even, so the steps since then have drawn as those before
            epochs[source] = float(log[f"epochs/{source}"][told[-1]] * steps / (log["step"][told[-1]] + 1))
    if not epochs:
        raise ConfigError(f"{workdir}: its log says nothing of the sources of {config['data']['corpus']}")
    return f"{drawn_table(sources, epochs)}\nafter {steps:,} of {config['loop']['steps']:,} steps"


def curves(workdirs: Mapping[str, str], output: str | os.PathLike) -> str:
    """Draws the losses of runs by tokens, {size: workdir}, into a directory; the table of what they have reached."""
    runs = {name: loss_by_tokens.read(workdir) for name, workdir in workdirs.items()}
    loss_by_tokens.write(runs, place(output))
    paper = {size.casefold(): f"{loss:.2f}" for size, loss in loss_by_tokens.FIG_5.items()}
    rows = [[name, f"{found.steps:,}", f"{found.tokens.max():,.0f}", f"{found.reached:.3f}", paper.get(name.casefold(), "-")]
            for name, found in runs.items()]  # fmt: skip
    return aligned([["run", "steps", "tokens", "loss", "the paper's at 2T"], *rows])


def main() -> None:
    """Flags to calls."""
    values = flags.FLAGS
    if bool(values.workdir) == bool(values.curves):
        raise ValueError("expected either --workdir (what one run has drawn) or --curves (the losses of several)")
    if values.workdir:
        check_bucket(values.workdir)
        print(run(values.workdir))
        return
    workdirs = command.named("curves", values.curves, "workdir")
    if not values.output:
        raise ValueError("--output: missing; expected a directory for the figure of --curves")
    for directory in (*workdirs.values(), values.output):
        check_bucket(directory)
    print(curves(workdirs, values.output))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "workdir of a pretraining run; gs://bucket/... too")
    flags.DEFINE_list("curves", [], "size=workdir of each pretraining run whose loss is drawn; gs://bucket/... too")
    flags.DEFINE_string("output", None, "directory for the figure of --curves; gs://bucket/... too")
    command.launch(main)
