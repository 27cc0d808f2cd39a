"""A run's directory: whose it is, under which config it was begun, whether it is finished, going back in it.

`.lock` says that a process is writing here; `config.json` is what the run was begun with; `done.json` its summary. Nothing
is ever deleted that may still be of use: what stands in the way is moved into `replaced/`.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from llama_jax.config import ConfigError, differences, with_defaults
from llama_jax.files import write_json
from llama_jax.parallel.hosts import first_problem
from llama_jax.paths import check_bucket, is_remote, move, reason
from llama_jax.training.checkpoint import steps_in
from llama_jax.training.goodput import ATTEMPTS
from llama_jax.training.lease import Lease
from llama_jax.training.metrics import METRICS_FILE

log = logging.getLogger(__name__)

_LOCK = ".lock"
# What a run leaves behind that was refused, or ended before its first checkpoint: nothing that another could go on from.
_NOT_BEGUN = (
    _LOCK, "config.json", "compiled", "logs", "tensorboard", "reached.json", "drawn.json", METRICS_FILE, ATTEMPTS,
)  # fmt: skip


@contextlib.contextmanager
def own(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run: two runs in one workdir would write over each other.

    The kernel lets go of the lock when the process ends, however it ends; in a bucket see `lease`. Host 0 holds it for all.

    Raises:
      ConfigError: on every host, if another run has it or host 0 cannot write here.
    """
    problem = ""
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            try:
                check_bucket(workdir)
                if owner := (_lease if is_remote(workdir) else _lock)(workdir / _LOCK, held):
                    problem = f"{workdir}: another run is writing here ({owner}); wait for it, or use another workdir"
            except OSError as error:
                said = reason(error)
                problem = said if said.startswith(str(workdir)) else f"{workdir}: cannot be written: {said}"
        if problem := first_problem(problem):
            raise ConfigError(problem)
        yield


def _lock(path: Path, held: contextlib.ExitStack) -> str:
    """Takes the kernel's lock on a file; "" or who has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = held.enter_context(open(path, "a+", encoding="utf-8"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip()
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return ""


def _lease(path: Path, held: contextlib.ExitStack) -> str:
    lease = Lease(path)
    held.callback(lease.release)
    return lease.take()


def claim(workdir: Path, described: Mapping[str, Any], *, kind: type | None = None) -> None:
    """Writes the run's config into its workdir, or refuses to go on under another one, naming the fields that differ.

    With `kind`, the config's class, a run that an older version of the library began goes on if new fields have their
    defaults. A workdir of a run that was refused, or that ended before its first checkpoint, is free to take another one.
    Host 0 reads and writes for all: they would write one file at the same moment.

    Raises:
      ConfigError: on every host, if the configs differ or host 0 cannot write here.
    """
    _for_all(_claim, workdir, json.loads(json.dumps(described)), kind)


def _for_all(act: Callable[..., None], *arguments: Any) -> None:
    """Calls `act` on host 0; ConfigError on every host if it refuses or cannot write."""
    problem = ""
    if jax.process_index() == 0:
        try:
            act(*arguments)
        except (ConfigError, OSError) as error:
            problem = str(error)
    if problem := first_problem(problem):
        raise ConfigError(problem)


def _claim(workdir: Path, described: Mapping[str, Any], kind: type | None) -> None:
    path = workdir / "config.json"
    if path.exists() and _is_begun(workdir):
        old = json.loads(path.read_text())
        changed = differences(json.loads(json.dumps(with_defaults(kind, old))) if kind else old, described)
        if changed:
            raise ConfigError(
                f"{workdir} was begun with another config; use a new workdir, go back with --restart_from=STEP, or undo:\n  "
                + "\n  ".join(changed)
            )
        return
    if path.exists() and json.loads(path.read_text()) != described:
        (workdir / ATTEMPTS).unlink(missing_ok=True)  # those were starts of another run
    write_json(path, described)


def _is_begun(workdir: Path) -> bool:
    others = [other for other in workdir.iterdir() if other.name not in _NOT_BEGUN]
    return any(other.name != "checkpoints" or steps_in(other) for other in others)


def go_back(workdir: Path, step: int, described: Mapping[str, Any]) -> None:
    """Makes the checkpoint of `step` the newest one, and `described` the run's config; 0 is the start of the run.

    Later checkpoints are moved into `replaced/<n>`, where a copy of the log up to now lies too. Doing it again with the same
    step and config does nothing but say so: a launcher that starts the same command after a preemption must not go back once
    more. (A run is a function of its config, so going back twice could give nothing else.)

    Raises:
      ConfigError: on every host, if there is no such checkpoint.
    """
    _for_all(_go_back, workdir, step, json.loads(json.dumps(described)))


def _go_back(workdir: Path, step: int, described: Mapping[str, Any]) -> None:
    asked = {"step": step, "config": described}
    record = workdir / "restarted.json"
    if record.exists() and json.loads(record.read_text()) == asked:
        log.warning(
            "--restart_from=%d was done before, as %s says: the run goes on from its newest checkpoint; remove that file to go "
            "back once more", step, record,
        )  # fmt: skip
        return
    directory = workdir / "checkpoints"
    steps = steps_in(directory)
    if step and step not in steps:
        raise ConfigError(f"--restart_from={step}: {directory} has no such checkpoint; it holds {steps or 'none'}")
    old = json.loads((workdir / "config.json").read_text()) if (workdir / "config.json").exists() else {}
    for line in differences(old, described) if old else ():
        log.warning("restart from step %d under another config: %s", step, line)
    aside = make_aside(workdir)
    for name in ("config.json", "done.json"):
        if (workdir / name).exists():
            move(workdir / name, aside / name)
    if (workdir / METRICS_FILE).exists():  # the run goes on with it, without the lines from `step` on
        (aside / METRICS_FILE).write_bytes((workdir / METRICS_FILE).read_bytes())
    for later in steps:
        if later > step or not step:  # early stopping keeps the start as checkpoint 0
            move(directory / str(later), aside / str(later))
    log.warning("restart from step %d: later checkpoints are in %s", step, aside)
    write_json(workdir / "config.json", described)
    write_json(record, asked)


def make_aside(workdir: Path) -> Path:
    """A new directory for what stands in the way: `replaced/1`, `replaced/2`, ..."""
    replaced = workdir / "replaced"
    aside = replaced / str(1 + max((int(path.name) for path in replaced.glob("*") if path.name.isdigit()), default=0))
    aside.mkdir(parents=True)
    return aside


def finished(workdir: Path) -> dict[str, Any] | None:
    """The summary of a stage that has run to its end, or None."""
    path = workdir / "done.json"
    return json.loads(path.read_text()) if path.exists() else None
