"""Are a run's checkpoints whole? `python -m llama_jax.verify --workdir=runs/demo/sft [--step=200]`.

Every leaf of every checkpoint is read and compared with the checksum that was taken on the devices when it was saved; a
leaf that differs or cannot be read is named. Holds one leaf at a time. Ends with code 1 if anything is damaged.
"""

import sys
from pathlib import Path

from absl import flags

from llama_jax import command
from llama_jax.paths import check_bucket, place
from llama_jax.training.fingerprint import CheckpointError, damages
from llama_jax.training.metrics import Progress
from llama_jax.training.saved import written_steps


def verify(workdir: Path, step: int | None = None) -> dict[int, list[str]]:
    """Step -> what is damaged in it (nothing: []), for one step or all of a stage's workdir."""
    steps = written_steps(workdir)
    if step is not None and step not in steps:
        raise CheckpointError(f"{workdir}: has no checkpoint {step}; it holds {', '.join(map(str, steps)) or 'none'}")
    if not steps:
        raise CheckpointError(f"{workdir}: expected a stage's workdir with checkpoints, found none")
    chosen = steps if step is None else [step]
    with Progress(len(chosen), "verify", "checkpoint") as progress:
        found = {}
        for number in chosen:
            found[number] = damages(workdir, number)
            progress.update()
    return found


def main() -> None:
    """Flags to call."""
    check_bucket(flags.FLAGS.workdir)
    found = verify(place(flags.FLAGS.workdir), flags.FLAGS.step)
    for step, lines in found.items():
        print(f"checkpoint {step}: {'whole' if not lines else 'damaged'}")
        for line in lines:
            print(f"  {line}")
    if any(found.values()):
        whole = max((step for step, lines in found.items() if not lines), default="none")
        sys.exit(f"error: {sum(map(bool, found.values()))} of {len(found)} are damaged; the newest whole one is {whole}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "a stage's workdir; gs://bucket/... too")
    flags.DEFINE_integer("step", None, "the checkpoint to look at; default: all")
    flags.mark_flag_as_required("workdir")
    command.launch(main)
