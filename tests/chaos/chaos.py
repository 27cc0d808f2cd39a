"""Breaks a run again and again and holds the result against an undisturbed one:

    python tests/chaos/chaos.py --directory=/tmp/chaos [--faults=100] [--minutes=30] [--processes=2] [--seed=0]

Pretraining, SFT, a reward model and PPO run on several processes. At random moments a process is killed, stopped or asked
to end, or files of the newest checkpoint are changed, cut or removed; then the same command is started again. With
`--minutes` there are as many faults as fit; the same command with the same directory adds what is missing. In the end

1. the parameters and moments of each stage are those of the undisturbed run, to the bit;
2. no start went on from before the newest checkpoint that was whole at the fault, and none lost more steps than `most_lost`
   says: none after SIGTERM, two intervals after a kill or a stop, three if the newest checkpoint was damaged too;
3. the processes that were left ended within `--end_seconds`.

Prints a table of all faults with the seconds until all processes had ended and until the next step was done.

The processes are forks of this one, which has imported everything and computed nothing: that saves half of a restart.
"""

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ |= {  # before jax is imported
    "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
    # Small programs too: a restart then compiles nothing.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}  # fmt: skip

from stages import INTERVAL, NAMES, flags, make_data  # noqa: E402 - after the path
from worker import preload, run_worker  # noqa: E402

KINDS = ("kill", "kill all", "terminate", "stop", "flip", "truncate", "delete")
UNASKED = "(by itself)"  # an end that a launcher starts again after, without a fault of ours
AGAIN = {69, 70, 75}
FORK = multiprocessing.get_context("fork")
_MEETING = 25.0  # seconds until all processes have come, of which one may have been killed before: all begin at once


@dataclasses.dataclass
class Fault:
    """What was done, and what came of it."""

    stage: str
    kind: str
    reached: int  # steps done when it happened: by this start, or before it those that it goes on from
    saved: int  # the newest checkpoint that was whole afterwards
    codes: list[int] = dataclasses.field(default_factory=list)
    went_on_from: int = -1
    seconds_to_end: float = 0.0
    seconds_to_step: float = 0.0


class Cluster:
    """The processes of one stage."""

    def __init__(self, arguments: Sequence[str], *, processes: int, logs: Path, pause: float, peer_seconds: float):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs.mkdir(parents=True, exist_ok=True)
        self.processes = []
        for host in range(processes):
            environment = {
                "CHAOS_PAUSE": str(pause), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(host),
            }  # fmt: skip
            patience = (f"--peer_seconds={peer_seconds}", f"--meet_seconds={max(peer_seconds, _MEETING)}")
            told = ([*arguments, *patience], environment, logs / f"worker-{host}.log")
            self.processes.append(FORK.Process(target=run_worker, args=told))
            self.processes[-1].start()

    def codes(self) -> list[int | None]:
        """Return codes; None of those that still run."""
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float, *, but: int = 0) -> bool:
        """Whether all but so many end in that time."""
        limit = time.monotonic() + seconds
        while self.codes().count(None) > but:
            if time.monotonic() > limit:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """Ends whatever is left of it."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def reached(workdir: Path) -> int:
    """Steps done, to the second."""
    try:
        return int(json.loads((workdir / "reached.json").read_text())["step"])
    except (OSError, ValueError):
        return 0


def most_lost(kind: str) -> int:
    """How many steps a fault may cost.

    SIGTERM: none, since all hosts save before they end. A kill or a stop: one interval since the last save was begun; and one
    more because that save runs beside the steps after it, and only the next one waits until it is on disk. Were saves waited
    for, it would be one interval; they never are two behind. A damaged checkpoint: one interval more, back to the one before.
    """
    return {"terminate": 0, "flip": 3, "truncate": 3, "delete": 3}.get(kind, 2) * INTERVAL


def touched(workdir: Path) -> float:
    """When a step was done last."""
    path = workdir / "reached.json"
    return path.stat().st_mtime if path.exists() else 0.0


def saved(workdir: Path) -> list[int]:
    """Steps with a finished checkpoint."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def whole(workdir: Path, damaged: set[int]) -> int:
    """The newest checkpoint that no fault has damaged."""
    return max((step for step in saved(workdir) if step not in damaged), default=0)


def attempts(workdir: Path) -> list[dict]:
    """From which step on steps were taken, for each start that came so far."""
    path = workdir / "attempts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if "from" in row]


def inject(kind: str, cluster: Cluster, workdir: Path, draw: random.Random) -> set[int]:
    """Does it; the steps whose checkpoints it damaged."""
    victim = draw.choice(cluster.processes)
    if kind == "kill":
        victim.kill()
    elif kind == "terminate":
        os.kill(victim.pid, signal.SIGTERM)
    elif kind == "stop":
        os.kill(victim.pid, signal.SIGSTOP)
    else:
        cluster.kill()  # the next start must read what is on the disk
        steps = saved(workdir)
        if kind != "kill all" and len(steps) > 1:
            damage(kind, workdir / "checkpoints" / str(steps[-1]), draw)
            return {steps[-1]}
    return set()


def damage(kind: str, checkpoint: Path, draw: random.Random) -> None:
    """Changes a bit in, halves or removes all data files of one item, or one of its other files."""
    item = draw.choice([path for path in sorted(checkpoint.iterdir()) if path.is_dir()])
    data = [path for path in item.rglob("d/*") if path.is_file()]  # all: Orbax may not need each of them any more
    for path in data or [path for path in item.rglob("*") if path.is_file()]:
        content = bytearray(path.read_bytes())
        if kind == "delete":
            path.unlink()
        elif kind == "truncate" or not content:
            path.write_bytes(content[: len(content) // 2])
        else:
            for _ in range(1 + len(content) // 64):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)


def disturb(
    stage: str, runs: Path, data: Path, ledger: "Ledger", *, kinds: list[str], steps: int, processes: int, pause: float,
    peer_seconds: float, end_seconds: float, draw: random.Random, interval: int = INTERVAL, until: float = float("inf"),
) -> None:  # fmt: skip
    """Runs a stage to its end with these faults on the way, or as many of them as come before `until`."""
    workdir, logs = runs / stage, runs / "logs" / stage
    arguments = flags(stage, runs, data, steps=steps, interval=interval)
    last: tuple[Fault, float] | None = None  # of which nobody knows yet what it cost, and when it happened
    damaged: set[int] = set()  # steps whose checkpoints no start has looked at yet
    while not (workdir / "done.json").exists():
        kinds = kinds if time.monotonic() < until else []
        starts, before = len(attempts(workdir)), time.time()
        cluster = Cluster(
            arguments, processes=processes, logs=logs, pause=pause if kinds else 0.0, peer_seconds=peer_seconds
        )
        try:
            last = await_moment(
                cluster, workdir, ledger, last, starts=starts, before=before, comes=bool(kinds), pause=pause, draw=draw
            )
            damaged = damaged if last else set()
            if None in cluster.codes() and not kinds and not cluster.wait(900):
                raise AssertionError(f"{stage}: still running after 15 minutes; see {logs}")
            # What an earlier start had lost is not counted again.
            done = reached(workdir) if touched(workdir) > before else whole(workdir, damaged)
            if None not in cluster.codes():
                if (workdir / "done.json").exists():
                    break
                assert set(cluster.codes()) & AGAIN, f"{stage}: ended with {cluster.codes()}; see {logs}"
                fault, ended = Fault(stage, UNASKED, done, whole(workdir, damaged), list(cluster.codes())), True
                last = fault, time.monotonic()
            else:
                fault = Fault(stage, kinds.pop(), done, saved=0)
                last = fault, time.monotonic()
                ended = break_it(fault, cluster, workdir, damaged, draw, end_seconds=end_seconds)
            ledger.keep(fault)
            assert ended, f"{stage}: after {fault.kind!r} the processes did not end within {end_seconds:g} s; see {logs}"
        finally:
            cluster.kill()
    if kinds and until == float("inf"):
        raise AssertionError(f"{stage}: finished before its {len(kinds)} last faults; more --steps")


def await_moment(
    cluster: Cluster, workdir: Path, ledger: "Ledger", last: tuple[Fault, float] | None, *, starts: int, before: float,
    comes: bool, pause: float, draw: random.Random,
) -> tuple[Fault, float] | None:  # fmt: skip
    """Waits until the next fault is to happen, where one comes, or the processes end. At the first step it notes what the fault
    before has cost; that fault if there was no step."""
    # One in five faults comes while the processes start, the others after a step.
    early = comes and draw.random() < 0.2
    limit = time.monotonic() + (draw.uniform(0.2, 5) if early else 900)
    while None in cluster.codes() and time.monotonic() < limit:
        begun = attempts(workdir)[starts:]
        if last and begun and touched(workdir) > before:
            fault, happened = last
            fault.went_on_from = begun[-1]["from"]
            fault.seconds_to_step = time.monotonic() - happened
            ledger.keep(fault)
            last = None
        if comes and not early and last is None and begun and saved(workdir) and reached(workdir) > begun[-1]["from"]:
            time.sleep(draw.uniform(0, 3 * INTERVAL * pause))
            break
        time.sleep(0.05)
    return last


def break_it(
    fault: Fault, cluster: Cluster, workdir: Path, damaged: set[int], draw: random.Random, *, end_seconds: float
) -> bool:
    """Injects a fault and writes into it what comes of it; whether all processes end that can."""
    begun = time.monotonic()
    damaged |= inject(fault.kind, cluster, workdir, draw)
    fault.saved = whole(workdir, damaged)
    ended = cluster.wait(end_seconds, but=1 if fault.kind == "stop" else 0)  # the stopped one never ends by itself
    fault.seconds_to_end = time.monotonic() - begun
    fault.codes = [code for code in cluster.codes() if code is not None]
    return ended


class Ledger:
    """The faults so far, on the disk: a later start goes on from there."""

    def __init__(self, path: Path):
        self.path = path
        self.faults = [Fault(**row) for row in json.loads(path.read_text())] if path.exists() else []

    def of(self, stage: str) -> list[Fault]:
        """The faults that were injected into a stage."""
        return [fault for fault in self.faults if fault.stage == stage and fault.kind != UNASKED]

    def keep(self, fault: Fault) -> None:
        """Adds a fault, or writes down what is new of it."""
        if not any(fault is known for known in self.faults):
            self.faults.append(fault)
        if fault.went_on_from >= 0:
            print(row(fault), file=sys.stderr, flush=True)
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps([dataclasses.asdict(known) for known in self.faults], indent=1))
        new.replace(self.path)


def row(f: Fault) -> str:
    """A fault as a line of the table."""
    return (
        f"{f.stage:9} {f.kind:11} {f.reached:5} {f.saved:5} {f.went_on_from:5} {f.seconds_to_end:6.1f} "
        f"{f.seconds_to_step:7.1f}  {f.codes}"
    )


def table(faults: Sequence[Fault]) -> str:
    """One line a fault, then one a kind: medians and the longest."""
    lines = [f"{'stage':9} {'fault':11} {'step':>5} {'whole':>5} {'from':>5} {'end s':>6} {'step s':>7}  codes"]
    lines += map(row, faults)
    kinds: dict[str, list[Fault]] = collections.defaultdict(list)
    for fault in faults:
        kinds[fault.kind].append(fault)
    lines += ["", f"{'fault':11} {'count':>5} {'end s: median':>14} {'longest':>8} {'step s: median':>15} {'longest':>8}"]
    for kind, some in sorted(kinds.items()):
        ends = [fault.seconds_to_end for fault in some]
        again = [fault.seconds_to_step for fault in some if fault.went_on_from >= 0] or [float("nan")]
        lines.append(
            f"{kind:11} {len(some):5} {statistics.median(ends):14.1f} {max(ends):8.1f} {statistics.median(again):15.1f} "
            f"{max(again):8.1f}"
        )
    return "\n".join(lines)


def fingerprints(workdir: Path) -> dict[str, int]:
    """Of everything in the newest checkpoint."""
    return json.loads((workdir / "checkpoints" / str(saved(workdir)[-1]) / "meta" / "metadata").read_text())["fingerprints"]


def chaos(
    directory: Path, *, faults: int, minutes: float, steps: int, processes: int, pause: float, peer_seconds: float,
    end_seconds: float, seed: int, stages: Sequence[str] = NAMES,
) -> list[Fault]:  # fmt: skip
    """All of it; AssertionError if a promise is broken."""
    preload()
    begun = time.monotonic()
    maker = FORK.Process(target=make_data, args=(directory,))
    maker.start()
    maker.join()
    assert maker.exitcode == 0, "the data could not be made"
    calm, broken, ledger = directory / "undisturbed", directory / "disturbed", Ledger(directory / "faults.json")
    if not ledger.faults:
        shutil.rmtree(broken, ignore_errors=True)
    for number, stage in enumerate(stages):
        draw = random.Random(f"{seed} {stage} {len(ledger.of(stage))}")
        how = {"steps": steps, "processes": processes, "pause": pause, "draw": draw, "peer_seconds": peer_seconds,
               "end_seconds": end_seconds}  # fmt: skip
        now = time.monotonic()
        share = (begun + 60 * minutes - now) / (len(stages) - number)
        disturb(stage, calm, directory, ledger, kinds=[], interval=steps, **how)
        tail = time.monotonic() - now  # a run without faults: what is left to do after the last one
        count = faults // len(stages) + (number < faults % len(stages)) - len(ledger.of(stage))
        kinds = [KINDS[i % len(KINDS)] for i in range(max(count, 0))]
        draw.shuffle(kinds)
        disturb(stage, broken, directory, ledger, kinds=kinds, until=now + share - tail if minutes else float("inf"), **how)
        assert fingerprints(broken / stage) == fingerprints(calm / stage), f"{stage}: other parameters"
        print(f"{stage}: {len(ledger.of(stage))} faults, parameters and moments equal to the bit", file=sys.stderr, flush=True)
    check(ledger.faults)
    return ledger.faults


def check(faults: Sequence[Fault]) -> None:
    """AssertionError for a fault that cost more than it may. Those whose next start was broken too have cost nothing yet."""
    for fault in faults:
        if fault.went_on_from >= 0:
            assert fault.went_on_from >= fault.saved, f"a whole checkpoint was passed over: {fault}"
            lost, most = fault.reached - fault.went_on_from, most_lost(fault.kind)
            assert lost <= most, f"{lost} steps lost, {fault.kind!r} may cost {most}: {fault}"


def main() -> None:
    """Flags to call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=0.0, help="faults come for about so long; 0: until there are enough")
    parser.add_argument("--steps", type=int, default=80, help="of each stage")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds that a step lasts at least")
    parser.add_argument("--peer_seconds", type=float, default=15.0, help="silence of a process that counts as its death; "
                        "more on a machine with other work")  # fmt: skip
    parser.add_argument("--end_seconds", type=float, default=60.0, help="the longest that the others may take to end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=list(NAMES), choices=NAMES)
    arguments = vars(parser.parse_args())
    print(table(chaos(arguments.pop("directory").resolve(), **arguments)))


if __name__ == "__main__":
    main()
