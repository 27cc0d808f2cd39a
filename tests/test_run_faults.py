"""Real processes on this machine, through the train command's own code: how a run ends when a host dies, stops, hangs or lies.

The stage is a regression (tests/toy_run.py): what is tested is everything around it.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_jax.parallel.abort import EXIT_HOST_LOST
from llama_jax.training.metrics import read_metrics
from llama_jax.training.preemption import EXIT_PREEMPTED
from llama_jax.training.saved import read_meta
from llama_jax.training.watchdog import EXIT_HANGS

ROOT = Path(__file__).parents[1]


def start(workdir, *more, count=1, per_host=None):
    """Starts the toy run in `count` processes; the processes, whose output lies beside the workdir."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for host in range(count):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(host),
        }  # fmt: skip
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        workdir.parent.mkdir(parents=True, exist_ok=True)
        output = open(output_of(workdir, host), "w")
        arguments = [f"--workdir={workdir}", *more, *(per_host or {}).get(host, [])]
        processes.append(
            subprocess.Popen(
                [sys.executable, "tests/toy_run.py", *arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env=environment | (cluster if count > 1 else {}),
            )
        )  # fmt: skip
    return processes


def output_of(workdir, host=0):
    return workdir.parent / f"{workdir.name}.host-{host}.txt"


def ends(processes, timeout=400):
    """Return codes."""
    try:
        return [process.wait(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(OSError):
                process.kill()


def run(workdir, *more, count=1, per_host=None):
    return ends(start(workdir, *more, count=count, per_host=per_host))


def wait_for_checkpoint(workdir, step, processes):
    limit = time.monotonic() + 400
    while not (workdir / "checkpoints" / str(step)).exists():
        assert time.monotonic() < limit and all(process.poll() is None for process in processes), texts(workdir)
        time.sleep(0.05)


def texts(workdir):
    return "\n".join(path.read_text() for path in sorted(workdir.parent.glob(f"{workdir.name}.host-*.txt")))


def losses(workdir):
    log = read_metrics(workdir)
    return log["loss"][np.argsort(log["step"])]


# ---- one process ----


@pytest.mark.slow
def test_a_run_that_hangs_ends_with_its_stacks_and_a_terminated_one_with_the_code_for_again(tmp_path):
    workdir = tmp_path / "run"
    assert run(workdir, "--steps=100", "--hang_at=4", "--on_host=0", "--step_seconds=5") == [EXIT_HANGS], texts(workdir)
    for text in (texts(workdir), (workdir / "logs" / "host-0.log").read_text()):
        assert re.search(r"error: host 0 hangs: no progress for \d+ s, in batch of step 4", text)
        assert "in batch" in text and "toy_run.py" in text and "Thread" in text  # stacks of all threads
    processes = start(workdir, "--pause=0.2", "--steps=100")
    wait_for_checkpoint(workdir, 6, processes)
    second = run(workdir, "--pause=0.2", "--steps=100")  # while the first is writing
    assert second == [1] and f"{workdir}: another run is writing here (pid {processes[0].pid}" in texts(workdir)
    processes[0].send_signal(signal.SIGTERM)
    assert ends(processes) == [EXIT_PREEMPTED]


# ---- several ----


@pytest.mark.slow
def test_one_two_and_four_processes_compute_the_same_and_resume_each_other(tmp_path):
    for count in (1, 2, 4):
        assert set(run(tmp_path / f"{count}", count=count)) == {0}, texts(tmp_path / f"{count}")
    for count in (2, 4):
        np.testing.assert_allclose(losses(tmp_path / f"{count}"), losses(tmp_path / "1"), rtol=1e-6)
    for count in (2, 1):
        workdir = tmp_path / f"4to{count}"
        processes = start(workdir, "--pause=0.3", count=4)
        wait_for_checkpoint(workdir, 3, processes)
        for process in processes:
            process.kill()
        ends(processes)
        assert set(run(workdir, count=count)) == {0}, texts(workdir)
        np.testing.assert_allclose(losses(workdir), losses(tmp_path / "1"), rtol=1e-6)
        assert len(losses(workdir)) == 8 and read_meta(workdir)["step"] == 8
        done = json.loads((workdir / "done.json").read_text())
        assert done["restarts"] == 1 and done["lost_steps"] <= 3 and 0 < done["goodput"] < 1


@pytest.mark.slow
def test_a_checkpoint_that_one_host_cannot_read_is_damaged_for_all(tmp_path):
    workdir = tmp_path / "run"
    assert run(workdir, "--steps=6", count=2) == [0, 0], texts(workdir)
    (workdir / "done.json").unlink()  # as if it had been killed right after its last checkpoint
    failing = ["--unreadable=6", "--unreadable_now", "--on_host=1"]
    assert run(workdir, "--steps=6", *failing, count=2) == [1, 1], texts(workdir)
    told = "error: .*checkpoint 6 cannot be read: host 1: the disk .* fails"
    for host in (0, 1):  # a disk that fails for a while takes no checkpoint away
        assert re.search(told, output_of(workdir, host).read_text()), texts(workdir)
    assert not (workdir / "damaged").exists()
    assert run(workdir, "--steps=6", "--unreadable=6", "--on_host=1", count=2) == [0, 0], texts(workdir)
    assert "checkpoint 6 of" in texts(workdir) and "host 1: cannot read this host's part of 6" in texts(workdir)
    assert (workdir / "damaged" / "6").exists() and read_meta(workdir)["step"] == 6


@pytest.mark.slow
def test_a_checkpoint_that_one_host_does_not_see_yet_is_taken_by_all(tmp_path):
    """Listings of network disks are of different age; hosts that went on from different steps would hang."""
    workdir = tmp_path / "run"
    assert run(workdir, count=2) == [0, 0], texts(workdir)
    (workdir / "done.json").unlink()
    assert run(workdir, "--unseen=8", "--on_host=1", count=2) == [0, 0], texts(workdir)
    assert begun_from(workdir) == [0, 8]
    assert run(workdir, count=2) == [0, 0] and begun_from(workdir) == [0, 8], texts(workdir)  # finished: nothing is done


def begun_from(workdir):
    """The steps from which its starts took steps."""
    attempts = [json.loads(line) for line in (workdir / "attempts.jsonl").read_text().splitlines()]
    return [attempt["from"] for attempt in attempts if "from" in attempt]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_host_that_dies_or_stops_is_named_and_ends_all(tmp_path, how, victim):
    workdir = tmp_path / "run"
    processes = start(workdir, "--pause=0.2", "--steps=1000", count=4)
    wait_for_checkpoint(workdir, 6, processes)
    begun = time.monotonic()
    processes[victim].send_signal(getattr(signal, how))
    others = [process for host, process in enumerate(processes) if host != victim]
    codes = [process.wait(timeout=60) for process in others]
    assert time.monotonic() - begun < 60
    ends(processes[victim : victim + 1], timeout=0.1) if how == "SIGKILL" else processes[victim].kill()
    assert codes == [EXIT_HOST_LOST] * 3, texts(workdir)
    for host in {0, 1, 2, 3} - {victim}:
        for text in (output_of(workdir, host).read_text(), (workdir / "logs" / f"host-{host}.log").read_text()):
            assert re.search(rf"error: host {host}, in .*: .*\bhost {victim}\b", text), text
    saved = read_meta(workdir)["step"]
    # The same command goes on; here it goes back too, to end soon: another number of steps is another config.
    assert set(run(workdir, f"--steps={saved + 2}", f"--restart_from={saved}", count=4)) == {0}, texts(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_never_comes_is_not_waited_for_long(tmp_path, victim):
    workdir, begun = tmp_path / "run", time.monotonic()
    processes = start(workdir, "--meet_seconds=5", count=2)
    processes[victim].kill()  # long before it has imported anything
    assert processes[1 - victim].wait(timeout=60) == EXIT_HOST_LOST, texts(workdir)
    assert time.monotonic() - begun < 60 and not workdir.exists()
    last = output_of(workdir, 1 - victim).read_text().splitlines()[-1]
    assert re.fullmatch(rf"error: process {1 - victim} of 2 ends: not all others came to 127.0.0.1:\d+ within 5 s", last)


@pytest.mark.slow
def test_a_host_that_hangs_or_fails_is_told_from_those_that_wait(tmp_path):
    workdir = tmp_path / "hangs"
    codes = run(workdir, "--hang_at=4", "--step_seconds=8", count=2)
    assert set(codes) <= {EXIT_HANGS, EXIT_HOST_LOST} and EXIT_HANGS in codes, texts(workdir)
    assert re.search(r"host 1 hangs: no progress .* in batch of step 4", texts(workdir)) or re.search(
        r"host 0 hangs: .*; host 1 \(.*\) is in batch of step 4", texts(workdir)
    )
    workdir = tmp_path / "fails"
    codes = run(workdir, "--fail_at=4", count=2)
    assert codes == [EXIT_HOST_LOST, 1], texts(workdir)
    assert re.search(r"host 0, in .*: host 1 \(.*\) failed in .*: cannot read the rows of step 4", texts(workdir))
    assert "Traceback" in (workdir / "logs" / "host-1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_run_that_diverged_ends_with_its_code_on_all_hosts_however_late_one_is(tmp_path, late):
    """With another code on one of them launchers would start it again, and it would diverge again."""
    workdir = tmp_path / "run"
    assert run(workdir, "--diverge_at=4", "--late=12", f"--on_host={late}", count=2) == [65, 65], texts(workdir)
    assert "3 updates in a row were not finite, the last at step 6" in output_of(workdir, 1 - late).read_text()


@pytest.mark.slow
def test_a_host_that_ends_before_the_first_step_is_named_soon(tmp_path):
    for how, code, words in (
        ("error", 1, r"host 1 \(.*\) failed in the start: start: expected a workdir, found nothing"),
        ("killed", -signal.SIGKILL, r"host 1 (\(.*\) )?has been silent for \d+ s"),
    ):
        workdir, begun = tmp_path / how, time.monotonic()
        assert run(workdir, f"--start_fails={how}", "--peer_seconds=5", count=2) == [EXIT_HOST_LOST, code], texts(workdir)
        assert time.monotonic() - begun < 90
        assert re.search(f"error: host 0, in .*, stops: {words}", output_of(workdir, 0).read_text()), texts(workdir)
    # What is wrong with all, each says itself, without stacks.
    assert run(tmp_path / "all", "--start_fails=error", "--on_host=-1", count=2) == [1, 1]
    for host in (0, 1):
        last = output_of(tmp_path / "all", host).read_text().splitlines()[-1]
        assert last == "error: start: expected a workdir, found nothing", texts(tmp_path / "all")
    # That run never began: another config may take its workdir.
    assert run(tmp_path / "all", "--steps=2") == [0], texts(tmp_path / "all")
    assert json.loads((tmp_path / "all" / "done.json").read_text())["restarts"] == 0


@pytest.mark.slow
def test_sigterm_before_the_first_step_stops_all_hosts_there(tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, "--portions=1000", "--pause=0.3", count=2)
    limit = time.monotonic() + 200
    while not (workdir / "attempts.jsonl").exists():
        assert time.monotonic() < limit, texts(workdir)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes, timeout=60) == [EXIT_PREEMPTED] * 2, texts(workdir)
    assert not (workdir / "checkpoints").exists()


@pytest.mark.slow
def test_a_host_with_another_config_data_or_clock_is_refused_before_it_computes(tmp_path):
    for disk in ("a", "b"):
        (tmp_path / disk).mkdir()
        (tmp_path / disk / "words").write_text(f"the tokenizer on {disk}")
    for name, flags, words in (
        ("config", ["--lr=0.1"], "config.lr: host 2 has 0.1, the others have 0.05"),
        ("data", [f"--within={tmp_path / 'b'}"], "tokenizer words: host 2 has"),
        ("clock", ["--clock_off=3600", "--on_host=2"], r"clock: host 2 is \+36\d\d s off"),
    ):
        workdir = tmp_path / name
        codes = run(workdir, "--tokenizer=words", f"--within={tmp_path / 'a'}", count=4, per_host={2: flags})
        assert codes == [1] * 4, texts(workdir)
        assert len(re.findall(f"error: the hosts of this run differ; .*{words}", texts(workdir))) == 4, texts(workdir)
        assert not (workdir / "checkpoints").exists()


@pytest.mark.slow
def test_a_workdir_that_is_not_the_same_directory_for_all_is_refused(tmp_path):
    workdir = tmp_path / "run"
    codes = run(workdir, count=2, per_host={1: [f"--workdir={tmp_path / 'own'}"]})
    assert codes == [1, 1], texts(workdir)
    words = f"error: host 1: {tmp_path / 'own'} is not shared (it does not see what host 0 writes there); expected a directory"
    assert texts(workdir).count(words) == 2, texts(workdir)
    assert not list(tmp_path.glob("*/checkpoints")) and not list(tmp_path.glob("*/config.json"))
    assert run(workdir, "--steps=2", count=2) == [0, 0], texts(workdir)  # the same command with a shared one
    assert not list(workdir.glob(".shared-*"))


@pytest.mark.slow
def test_a_signal_to_one_of_two_hosts_saves_on_both_and_goes_on(tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, "--pause=0.2", "--steps=30", count=2)
    wait_for_checkpoint(workdir, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes) == [EXIT_PREEMPTED] * 2, texts(workdir)
    stopped = read_meta(workdir)["step"]
    assert 3 <= stopped < 30
    assert set(run(workdir, "--steps=30", count=2)) == {0}, texts(workdir)
    assert len(losses(workdir)) == 30
    assert begun_from(workdir) == [0, stopped]
    assert json.loads((workdir / "done.json").read_text())["lost_steps"] == 0
