"""What a run writes and shows while it trains: a JSONL log, TensorBoard scalars and a progress bar.

The log is the source of the paper's training curves (Fig. 5; PPO curves of section 3.2.3). It survives `kill
-9`: a resumed run first drops the lines that it is about to write again, so every step stands in the log
exactly once.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from llama_jax.files import write_text
from llama_jax.paths import Mirror, may_fail, place, untaken

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
HELD_OUT = "held_out/"  # how the names of held-out measurements begin, which have lines of their own
_RESERVED = ("step", "time")


class MetricWriter:
    """Appends scalar metrics to `workdir/metrics.jsonl` and to TensorBoard files in `workdir/tensorboard`.

    One line is one flat object: `{"step": 7, "time": 1700000000.0, "loss": 2.5, ...}`, time in seconds since
    the epoch. Non-finite values are written as the strings "nan", "inf" and "-inf", which keeps the file
    strict JSON. With `enabled=False` (every host but the first) all methods do nothing. `resume_step` is the
    first step that this run will write: see `rewind`, also for `remeasure`; leave it None to append. In a bucket
    both logs are there after `sync`, and now and then; a network that fails meanwhile is told, and ends no run.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, enabled: bool = True, resume_step: int | None = None, remeasure: bool = False
    ):
        self.enabled = enabled
        self._workdir = workdir
        self._mirror: Mirror | None = None
        self._purge_step: int | None = None
        self._file: TextIO | None = None
        self._tensorboard = None
        if resume_step is not None:
            self.rewind(resume_step, remeasure=remeasure)

    def rewind(self, step: int, *, remeasure: bool = False) -> None:
        """Drops every logged line with a step >= `step`, and a line torn by a kill; an atomic rewrite.

        With `remeasure` also the held-out measurements after the step before, which are to come again. Damaged lines are
        dropped too: a run with whole checkpoints goes on, and the log as it was is kept in `damaged/`.
        """
        if not self.enabled:
            return
        self.close()
        self._purge_step = step
        path = place(self._workdir) / METRICS_FILE
        if not path.exists():
            return
        end = step - 1 if remeasure else step
        rows, problems = _parse_rows(path)
        if problems:
            aside = untaken(path.parent / "damaged" / METRICS_FILE)
            aside.parent.mkdir(exist_ok=True)
            aside.write_bytes(path.read_bytes())
            log.warning("%s; the run goes on without %d damaged lines, the whole log is %s", problems[0], len(problems), aside)
        kept = [
            json.dumps(row) + "\n"
            for row in rows
            if row["step"] < end or row["step"] < step and not any(name.startswith(HELD_OUT) for name in row)
        ]
        write_text(path, "".join(kept))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs `metrics` (numbers or 0-d arrays) of one step; the line is flushed when this returns."""
        if not self.enabled:
            return
        values = {}
        for name, value in metrics.items():
            if name in _RESERVED:
                raise ValueError(
                    f"metric {name!r}: this name is taken by the log's own column; rename the metric"
                )
            if np.size(value) != 1:
                raise ValueError(
                    f"metric {name!r}: expected one number, got an array of shape {np.shape(value)}"
                )
            values[name] = float(np.asarray(value).reshape(()))
        self._open()
        row = {
            "step": int(step),
            "time": round(time.time(), 3),
            **{k: _jsonable(v) for k, v in values.items()},
        }
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error
        for name, value in values.items():
            if math.isfinite(value):  # TensorBoard draws no others; a degree without pairs has no accuracy
                self._tensorboard.add_scalar(name.replace(":", "."), value, step)  # in its names a scorer's colon is illegal
        with may_fail(self._workdir):
            self._mirror.send_if_due()

    def sync(self) -> None:
        """Sends what was written where it belongs, in a bucket too; to be called before a checkpoint is saved, which is worth
        more than the log: at SIGTERM there is no time for another try."""
        if self._file is not None:
            with may_fail(self._workdir):
                self._tensorboard.flush()
                self._mirror.send()

    def close(self) -> None:
        """Closes both logs; a later `write` opens them again."""
        if self._file is not None:
            # What could not be written has been told by `write`; on a full disk there is nothing more to save here.
            for log in (self._file, self._tensorboard):
                with contextlib.suppress(OSError):
                    log.close()
            with may_fail(self._workdir):  # not in the place of the error that ends the run
                self._mirror.close()
            self._file = self._tensorboard = self._mirror = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _open(self) -> None:
        if self._file is not None:
            return
        from tensorboardX import SummaryWriter  # half a second of protobuf that readers of a log need not pay

        self._mirror = Mirror(self._workdir)
        self._mirror.local.mkdir(parents=True, exist_ok=True)
        path = self._mirror.fetch(METRICS_FILE)
        _cut_torn_line(path)
        self._file = open(path, "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(self._mirror.local / "tensorboard"), purge_step=self._purge_step, write_to_disk=True, flush_secs=30
        )
        self._purge_step = None


def read_metrics(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a log (the file, or the workdir that holds it) into aligned columns, all float64 `[rows]`.

    "step" and "time" are always there; a metric that a row lacks is NaN in that row. Only the last line may
    be torn (the run was killed while writing it) and is then ignored; any other malformed line is a
    ValueError with file and line.
    """
    path = place(path)
    if path.is_dir():
        path = path / METRICS_FILE
    rows = _read_rows(path)
    names = list(dict.fromkeys([*_RESERVED, *(name for row in rows for name in row)]))
    return {name: np.array([float(row.get(name, "nan")) for row in rows], np.float64) for name in names}


def _read_rows(path: Path) -> list[dict]:
    rows, problems = _parse_rows(path)
    if problems:
        raise ValueError(problems[0])
    return rows


def _parse_rows(path: Path) -> tuple[list[dict], list[str]]:
    """The rows of a log, and what is wrong with each of its other lines but a last one that was torn by a kill."""
    rows, problems = [], []
    *lines, _ = path.read_bytes().split(b"\n")  # only the last line can lack its end
    for number, line in enumerate(lines, start=1):
        where, shown = f"{path}:{number}:", f"got {line.strip()[:80].decode(errors='replace')!r}"
        try:
            row = json.loads(line)
        except ValueError:  # of JSON, or of its encoding
            problems.append(f"{where} expected one JSON object, {shown}")
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            problems.append(f"{where} field 'step': expected an integer, {shown}")
    return rows, problems


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


class Progress:
    """A progress bar of one stage: rate, ETA and the current loss or reward.

    On a terminal it is a tqdm bar. Elsewhere (a log file, CI) it prints one plain line at most every
    `interval` seconds and one when the stage ends; with `quiet=True` it prints nothing at all. `done` is
    where a resumed stage starts; the rate counts this run's work only. `total` is None where nobody knows it before the end.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "step",
        *,
        done: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
        interval: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.label, self.unit = total, label, unit
        self.done, self._start = done, done
        self._stream = sys.stderr if stream is None else stream
        self._quiet, self._interval, self._clock = quiet, interval, clock
        self._started = self._reported = clock()
        self._values: dict[str, float] = {}
        self._closed = False
        self._bar = None
        if not quiet and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, desc=label, unit=unit, unit_scale=(total or 0) >= 100_000,
                file=self._stream, dynamic_ncols=True, mininterval=0.2, smoothing=0.1,
            )  # fmt: skip

    def update(self, amount: int = 1, **values: float) -> None:
        """Adds finished work; `values` are shown as given last, e.g. `update(1, loss=2.31, reward=0.4)`."""
        self.done += amount
        self._values.update({name: float(value) for name, value in values.items()})
        if self._bar is not None:
            self._bar.set_postfix(
                {name: f"{value:.4g}" for name, value in self._values.items()}, refresh=False
            )
            self._bar.update(amount)
        elif not self._quiet and self._clock() - self._reported >= self._interval:
            self._report()

    def close(self) -> None:
        """Ends the bar, or prints the last plain line; calling it twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        elif not self._quiet:
            self._report()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _report(self) -> None:
        self._reported = self._clock()
        seconds = self._reported - self._started
        rate = (self.done - self._start) / seconds if seconds > 0 else 0.0
        of = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.label}: {self.done}{of} {self.unit}s", f"{rate:.3g} {self.unit}s/s"]
        if self.total is not None and self.done < self.total:
            parts.append(f"ETA {format_seconds((self.total - self.done) / rate) if rate else '?'}")
        elif self.total is not None or self._closed:
            parts.append(f"took {format_seconds(seconds)}")
        parts += [f"{name} {value:.4g}" for name, value in self._values.items()]
        print(", ".join(parts), file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
    """42.4 -> '42 s', 192 -> '3 min 12 s', 7500 -> '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Compilations:
    """Counts the programs that XLA compiles while batches are made and steps are taken, on any thread.

    The first two steps of a run are the warm-up: an RL source hands out another mini-batch of its rollout in the second.
    After them nothing may compile; saving and evaluating are not counted.
    """

    WARM_UP = 2
    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self.count = self.after_warm_up = 0
        self._step: int | None = None

    @contextlib.contextmanager
    def of_step(self, number: int) -> Iterator[None]:
        """Counts inside the block, which is the run's step `number` (from 0)."""
        self._step = number
        try:
            yield
        finally:
            self._step = None

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        del duration
        if event == self._EVENT and self._step is not None:
            self.count += 1
            self.after_warm_up += self._step >= self.WARM_UP

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exc_info: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
