"""Runs code that a model wrote, for HumanEval and MBPP (Table 21): a subprocess without network and with limits.

Every program has a process of its own: Python in isolated mode, without capabilities, in an empty directory that is removed
afterwards. Limits on processor time, wall-clock time, memory, file size, open files. A seccomp filter refuses sockets, further
processes, signals to others and looking into them; Landlock (Linux 5.13) refuses to write outside the directory. Where one of
the two cannot be set, nothing is run. What the program may do is read files that we can read, and use its limits up.
"""

import ctypes
import dataclasses
import json
import math
import os
import platform
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# By machine: its number in seccomp, capset, and the refused calls: socket, connect, bind, io_uring_setup (network); clone,
# fork, vfork, clone3, execve, execveat (processes); kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal
# (signals); ptrace, process_vm_readv, process_vm_writev (others' memory). aarch64 has no fork and vfork.
_SYSTEM = {
    "x86_64": (0xC000003E, 126, (
        41, 42, 49, 425, 56, 57, 58, 435, 59, 322, 62, 200, 234, 129, 297, 424, 101, 310, 311,
    )),
    "aarch64": (0xC00000B7, 91, (198, 203, 200, 425, 220, 435, 221, 281, 129, 130, 131, 138, 240, 424, 117, 270, 271)),
}  # fmt: skip
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2
_ERRNO_EPERM, _ALLOW = 0x00050000 | 1, 0x7FFF0000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_WRITES = 0x1FF2  # of Landlock's first version: all rights that change files or directories


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use: seconds of wall clock (and of processor), bytes of memory and of a file, open files."""

    seconds: float = 5.0
    memory: int = 1 << 30
    file_bytes: int = 1 << 20
    files: int = 64


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a program ended well, and its last line of error or why it was stopped."""

    passed: bool
    reason: str


def run_code(code: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008
    """Runs one program.

    Raises:
      RuntimeError: this machine cannot confine it.
    """
    if platform.system() != "Linux" or platform.machine() not in _SYSTEM:
        raise RuntimeError(f"model-written code runs on Linux (x86_64, aarch64) only, this is {platform.platform()}")
    directory = tempfile.mkdtemp(prefix="sandbox-")
    try:
        # The confining program is this file, read before it gives up its rights.
        command = [sys.executable, "-I", "-c", Path(__file__).read_text(encoding="utf-8"), "run"]
        process = subprocess.Popen(
            command, cwd=directory, env={"HOME": directory, "TMPDIR": directory, "PATH": "/usr/bin:/bin"},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        job = json.dumps({"code": code, "directory": directory, **dataclasses.asdict(limits)}).encode()
        try:
            _, errors = process.communicate(job, timeout=limits.seconds + 5)  # its own start is not the program's time
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            _end(process)
        text = errors.decode("utf-8", "replace").strip()
        reason = text.splitlines()[-1][:300] if text else ""
        if process.returncode == _UNCONFINED:
            raise RuntimeError(f"model-written code was not run: {reason}")
        if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
            return Outcome(False, "timed out")
        if process.returncode == 0:
            return Outcome(False, "ended before its last line")
        return Outcome(process.returncode == _FINISHED, reason)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run_all(programs: Sequence[str], limits: Limits = Limits(), *, workers: int = 0) -> list[Outcome]:  # noqa: B008
    """Runs programs, as many at once as there are processors."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda code: run_code(code, limits), programs))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) of the chance that one of k samples is correct (Chen et al. 2021)."""
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k}: expected 0 <= correct <= samples and 1 <= k <= samples, got {correct} of {samples}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


# ---- inside the process ----

_UNCONFINED, _FINISHED = 97, 96


def _main() -> None:
    job = json.load(sys.stdin)
    try:
        _confine(job)
    except OSError as error:
        print(f"it cannot be confined here: {error}", file=sys.stderr)
        os._exit(_UNCONFINED)
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    exec(compile(job["code"], "program", "exec"), {"__name__": "__main__"})
    os._exit(_FINISHED)


def _confine(job: dict) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int, what: str) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
        return result

    seconds = math.ceil(job["seconds"])
    for kind, value in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, job["memory"]), (resource.RLIMIT_FSIZE, job["file_bytes"]),
        (resource.RLIMIT_NOFILE, job["files"]), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (value, value))
    architecture, capset, calls = _SYSTEM[platform.machine()]
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _only_write_in(libc, job["directory"], check)
    header = ctypes.c_char_p(struct.pack("Ii", 0x20080522, 0))
    check(libc.syscall(capset, header, ctypes.c_char_p(bytes(24))), "capabilities")
    # BPF: another architecture's calls are refused, then the listed ones, the rest pass.
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, _ERRNO_EPERM), (0x20, 0, 0, 0)]
    if platform.machine() == "x86_64":  # numbers above are x32's, another way to the same calls
        steps += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, _ERRNO_EPERM)]
    for i, call in enumerate(calls):
        steps.append((0x15, len(calls) - i, 0, call))
    steps += [(0x06, 0, 0, _ALLOW), (0x06, 0, 0, _ERRNO_EPERM)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program))
    check(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.c_char_p(header), 0, 0), "seccomp")


def _only_write_in(libc: ctypes.CDLL, directory: str, check) -> None:
    writes = ctypes.c_char_p(struct.pack("Q", _WRITES))
    ruleset = check(libc.syscall(_LANDLOCK_CREATE, writes, ctypes.c_size_t(8), 0), "landlock")
    beneath = os.open(directory, os.O_PATH)
    rule = struct.pack("=Qi", _WRITES, beneath)
    check(libc.syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.c_char_p(rule), 0), "landlock rule")
    check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(beneath)
    os.close(ruleset)


if __name__ == "__main__" and sys.argv[1:] == ["run"]:
    _main()
