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
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from llama_jax.config import ConfigError, differences, with_defaults
from llama_jax.files import TOKENIZER_FILES, read_json, write_json
from llama_jax.parallel.hosts import first_problem, from_host_0
from llama_jax.paths import check_bucket, is_remote, move, reason
from llama_jax.training.goodput import ATTEMPTS
from llama_jax.training.lease import Lease
from llama_jax.training.metrics import METRICS_FILE
from llama_jax.training.saved import steps_in

log = logging.getLogger(__name__)

INPUTS = "inputs.json"
_LOCK, _SIGN = ".lock", ".shared-"
_PATIENCE = 10.0  # seconds until what one host wrote must be there for all
# What a run leaves behind that was refused, or ended before its first checkpoint: nothing that another could go on from.
_NOT_BEGUN = (
    _LOCK, "config.json", "compiled", "damaged", "logs", "tensorboard", "reached.json", "drawn.json", "diverged.json",
    "restarted.json", "profile", METRICS_FILE, ATTEMPTS, INPUTS, *TOKENIZER_FILES,
)  # fmt: skip


@contextlib.contextmanager
def own(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run: two runs in one workdir would write over each other.

    The kernel lets go of the lock when the process ends, however it ends; in a bucket see `lease`. Host 0 holds it for all,
    so all must see the directory that it sees.

    Raises:
      ConfigError: on every host, if another run has it, host 0 cannot write here or another host sees another directory.
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
        if jax.process_count() > 1:
            _check_shared(workdir)
        yield


def _check_shared(workdir: Path) -> None:
    """ConfigError on every host if one does not find what host 0 writes here: it would save its part of each checkpoint into a
    directory of its own, and no checkpoint would be whole."""

    def sign() -> str:
        name = f"{_SIGN}{uuid.uuid4().hex}"  # never asked for before: a network disk can have no old answer
        (workdir / name).write_text("Host 0 wrote this; the other hosts look whether they see it.")
        return name

    path = workdir / from_host_0(sign)
    try:
        if problem := first_problem(_missed(path)):
            raise ConfigError(problem)
    finally:
        if jax.process_index() == 0:
            path.unlink(missing_ok=True)


def _missed(path: Path) -> str:
    """Why this host does not find a file that another one has written; "" if it does."""
    limit, why = time.monotonic() + _PATIENCE, ""
    while time.monotonic() < limit:
        try:
            if path.exists():
                return ""
            why = "it does not see what host 0 writes there"
        except Exception as error:  # of a disk, or one of the many of a bucket's client
            why = reason(error)
        time.sleep(0.2)
    return f"{path.parent} is not shared ({why}); expected a directory that all hosts share, or gs://bucket/directory"


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


def _for_all(act: Callable[..., Any], *arguments: Any) -> Any:
    """What `act` gives on host 0, None on others; ConfigError on every host if it refuses, or cannot read or write."""
    problem, found = "", None
    if jax.process_index() == 0:
        try:
            found = act(*arguments)
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := first_problem(problem):
        raise ConfigError(problem)
    return found


def _claim(workdir: Path, described: Mapping[str, Any], kind: type | None) -> None:
    path = workdir / "config.json"
    if path.exists() and _is_begun(workdir):
        old = _read(path)
        changed = differences(json.loads(json.dumps(with_defaults(kind, old))) if kind else old, described)
        if changed:
            raise ConfigError(
                f"{workdir} was begun with another config; use a new workdir, go back with --restart_from=STEP, or undo:\n  "
                + "\n  ".join(changed)
            )
        return
    if path.exists() and _read(path) != described:
        (workdir / ATTEMPTS).unlink(missing_ok=True)  # those were starts of another run
    write_json(path, described)


def _is_begun(workdir: Path) -> bool:
    others = [other for other in workdir.iterdir() if other.name not in _NOT_BEGUN and not other.name.startswith(_SIGN)]
    return any(other.name != "checkpoints" or steps_in(other) for other in others)


def go_back(workdir: Path, step: int, described: Mapping[str, Any]) -> None:
    """Makes the checkpoint of `step` the newest one, and `described` the run's config; 0 is the start of the run.

    Later checkpoints are moved into `replaced/<n>`, where a copy of the log up to now lies too. Doing it again with the same
    step and config does nothing but say so: a launcher that starts the same command after a preemption must not go back once
    more. (A run is a function of its config, so going back twice could give nothing else.)

    A kill at any moment loses nothing: the same command does the rest, into another `replaced/<n>`; a start without the flag
    goes on, under the old config until the new one is written.

    Raises:
      ConfigError: on every host, if there is no such checkpoint.
    """
    _for_all(_go_back, workdir, step, json.loads(json.dumps(described)))


def _go_back(workdir: Path, step: int, described: Mapping[str, Any]) -> None:
    asked = {"step": step, "config": described}
    record = workdir / "restarted.json"
    if record.exists() and _read(record) == asked:
        log.warning(
            "--restart_from=%d was done before, as %s says: the run goes on from its newest checkpoint; remove that file to go "
            "back once more", step, record,
        )  # fmt: skip
        return
    directory = workdir / "checkpoints"
    steps = steps_in(directory)
    if step and step not in steps:
        raise ConfigError(f"--restart_from={step}: {directory} has no such checkpoint; it holds {steps or 'none'}")
    old = _read(workdir / "config.json") if (workdir / "config.json").exists() else {}
    for line in differences(old, described) if old else ():
        log.warning("restart from step %d under another config: %s", step, line)
    # The order is for a kill in between: never finished without the last checkpoint, never under another config, or with other
    # rows, at a later checkpoint than `step`. After the record nothing is left to do: the next start takes the rows there are.
    aside = make_aside(workdir)
    if (workdir / "done.json").exists():
        move(workdir / "done.json", aside / "done.json")
    for name in ("config.json", METRICS_FILE):  # the run goes on with the log, without the lines from `step` on
        if (workdir / name).exists():
            (aside / name).write_bytes((workdir / name).read_bytes())
    for later in reversed(steps):
        if later > step or not step:  # early stopping keeps the start as checkpoint 0
            move(directory / str(later), aside / str(later))
    if (workdir / INPUTS).exists():
        move(workdir / INPUTS, aside / INPUTS)
    log.warning("restart from step %d: later checkpoints are in %s", step, aside)
    write_json(workdir / "config.json", described)
    write_json(record, asked)


def check_inputs(workdir: Path, files: Mapping[str, str]) -> None:
    """Keeps what lay in the files that a run reads, {field and file: fingerprint}; refuses to go on if another lies there now.

    Data that are no files (TFDS names) are not among them.

    A batch is a function of its number and of all rows: with a row more or less the same numbers mean other batches, and what
    was seen would be seen again, in the place of what was not. After `go_back` the run goes on with what there is.

    Raises:
      ConfigError: on every host, naming the file.
    """
    _for_all(_check_inputs, workdir, dict(files))


def _check_inputs(workdir: Path, files: dict[str, str]) -> None:
    path = workdir / INPUTS
    if path.exists() and steps_in(workdir / "checkpoints"):
        held = _read(path)
        for name, fact in files.items():
            if held.get(name, fact) != fact:
                raise ConfigError(
                    f"{workdir}: the run was begun with other rows: config.{name} has changed since; expected the file as it "
                    "was, --restart_from=STEP to go on with what it holds now, or another workdir"
                )
        return
    write_json(path, files)


def make_aside(workdir: Path) -> Path:
    """A new directory for what stands in the way: `replaced/1`, `replaced/2`, ..."""
    replaced = workdir / "replaced"
    aside = replaced / str(1 + max((int(path.name) for path in replaced.glob("*") if path.name.isdigit()), default=0))
    aside.mkdir(parents=True)
    return aside


def finished(workdir: Path) -> dict[str, Any] | None:
    """The summary of a stage that has run to its end, or None; as host 0 sees it."""
    path = workdir / "done.json"
    return from_host_0(lambda: _read(path) if path.exists() else None)


def _read(path: Path) -> Any:
    """A small file of a workdir, without which the run goes on as well."""
    try:
        return read_json(path)
    except ValueError as error:
        raise ConfigError(f"{error}; the file is damaged: remove it, and the run goes on from its checkpoints") from None
