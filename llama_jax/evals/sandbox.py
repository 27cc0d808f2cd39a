"""Runs code that a model wrote, for HumanEval and MBPP (Table 21): a subprocess without network and with limits.

Every program has a process of its own: Python in isolated mode, without capabilities, in an empty directory that is removed
afterwards. Limits on processor time, wall-clock time, memory, file size, open files; we look many times a second how much the
directory holds. A seccomp filter refuses sockets, further processes, reaching into others, memory and queues that outlive a
process, and changing a file's mode, owner, times or attributes; of what `fcntl` and `ioctl` can, only what is listed is left,
since others send signals or change files. Landlock (Linux 6.2) refuses to write or truncate outside the directory, and from
6.12 on signals to others too. Where one of the two cannot be set, nothing is run, and `require` says so beforehand. What the
program may do is read files that we can read, and use its limits up.

It has passed when it exits with 0 and the word comes back that we gave its process, so neither by its exit code alone, nor
where it ends itself before its last line. No object of Python holds the word while the program runs: walking the frames, the
collector's objects or the open files does not find it. What is not held: program and tests are one interpreter, so a program
that is written against this file can find the word in the memory of its process and return it, as it can exchange `assert`'s
operands or the functions that the tests call.
"""

import contextlib
import ctypes
import dataclasses
import errno
import json
import math
import os
import platform
import resource
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# By machine: its number in seccomp, the number of capset, and the calls that are refused; aarch64 lacks the older ones.
_SYSTEM = {
    "x86_64": (0xC000003E, 126, (
        41, 42, 49, 425,  # network: socket, connect, bind, io_uring_setup
        56, 57, 58, 435, 59, 322,  # processes: clone, fork, vfork, clone3, execve, execveat
        62, 200, 234, 129, 297, 424,  # signals: kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal
        101, 310, 311, 438, 440,  # others' memory and files: ptrace, process_vm_readv, process_vm_writev, pidfd_getfd,
        # process_madvise
        302, 141, 251, 142, 144, 203, 314,  # others' limits and turns: prlimit64, setpriority, ioprio_set,
        # sched_setparam, sched_setscheduler, sched_setaffinity, sched_setattr
        29, 64, 68, 240, 319,  # what outlives it, or is no file: shmget, semget, msgget, mq_open, memfd_create
        # What Landlock leaves open of files anywhere:
        90, 91, 268, 452,  # modes: chmod, fchmod, fchmodat, fchmodat2
        92, 93, 94, 260,  # owners: chown, fchown, lchown, fchownat
        132, 235, 261, 280,  # times: utime, utimes, futimesat, utimensat
        188, 189, 190, 463, 197, 198, 199, 466, 469,  # attributes: setxattr, l, f, at; removexattr, l, f, at; file_setattr
        272, 308, 248, 249, 250,  # namespaces: unshare, setns; keys, which outlive it: add_key, request_key, keyctl
    )),
    "aarch64": (0xC00000B7, 91, (
        198, 203, 200, 425,
        220, 435, 221, 281,
        129, 130, 131, 138, 240, 424,
        117, 270, 271, 438, 440,
        261, 140, 30, 118, 119, 122, 274,
        194, 190, 186, 180, 279,
        52, 53, 452,
        54, 55,
        88,
        5, 6, 7, 463, 14, 15, 16, 466, 469,
        97, 268, 217, 218, 219,
    )),
}  # fmt: skip
# Calls of which all commands but the allowed ones are refused: owners of files get signals (F_SETOWN, FIOSETOWN), leases halt
# whoever writes a file, FS_IOC_SETFLAGS and FS_IOC_FSSETXATTR change files that are open for reading only, TIOCSTI types into a
# terminal.
_COMMANDS = {"x86_64": (72, 16), "aarch64": (25, 29)}  # fcntl, ioctl
_ALLOWED = (
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
    (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
)
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2
_ERRNO_EPERM, _ALLOW = 0x00050000 | 1, 0x7FFF0000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION = 3  # before it, files may be truncated anywhere
_LANDLOCK_SCOPES = 6  # from it on, signals and sockets of others can be out of reach
_SCOPES = 0b11  # abstract sockets, signals
_WRITES = 0x5FF2  # its rights to change files and directories; a move between directories is never allowed
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    # NumPy's libraries start threads as they are imported, which the filter refuses.
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip
_REASON = 4096  # bytes of what a program said last, in which its error is looked for
_LOOK = 0.05  # seconds between looks at its directory, in which a fast disk takes some ten megabytes


class UnconfinedError(OSError):
    """This machine cannot confine a program; nothing was run."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use: seconds of wall clock (and of processor), bytes of memory and of a file, open files; and of its
    directory, bytes of all files, and files and directories in it."""

    seconds: float = 5.0
    memory: int = 1 << 30
    file_bytes: int = 1 << 20
    files: int = 64
    all_bytes: int = 1 << 25
    entries: int = 256


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a program ended well, and its last line of error or why it was stopped."""

    passed: bool
    reason: str


def run_code(code: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008
    """Runs one program.

    Raises:
      UnconfinedError: this machine cannot confine it.
    """
    if platform.system() != "Linux" or platform.machine() not in _SYSTEM:
        raise UnconfinedError(f"model-written code runs on Linux (x86_64, aarch64) only, this is {platform.platform()}")
    directory, word = tempfile.mkdtemp(prefix="sandbox-"), secrets.token_hex(16)
    try:
        # The confining program is this file, read before it gives up its rights.
        command = [sys.executable, "-I", "-c", Path(__file__).read_text(encoding="utf-8"), "run"]
        # Files, where the limit of their size holds; a pipe would fill our memory.
        with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as verdict:
            job = {"code": code, "directory": directory, "word": word, "verdict": verdict.fileno()}
            job |= dataclasses.asdict(limits)
            process = subprocess.Popen(
                command, cwd=directory, env={"HOME": directory, "TMPDIR": directory, **_ENVIRONMENT},
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
                pass_fds=(verdict.fileno(),),
            )  # fmt: skip
            try:
                stopped = _watch(process, json.dumps(job).encode(), directory, limits)
            finally:
                _end(process)
            errors.seek(max(errors.seek(0, os.SEEK_END) - _REASON, 0))
            text = errors.read().decode("utf-8", "replace").strip()
            verdict.seek(0)
            said = verdict.read(64).decode("utf-8", "replace")
        reason, code = text.splitlines()[-1][:300] if text else "", process.returncode
        if code == _UNCONFINED and not said:
            raise UnconfinedError(f"model-written code was not run: {reason}")
        if stopped or code in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
            return Outcome(False, stopped or "timed out")
        if said == _CONFINED + word and code == 0:
            return Outcome(True, reason)
        return Outcome(False, "ended before its last line" if code == 0 else reason or f"ended with code {code}")
    finally:
        _remove(directory)


def _remove(directory: str) -> None:
    with contextlib.suppress(RecursionError):
        shutil.rmtree(directory, ignore_errors=True)
    if os.path.exists(directory):
        # Directories that cannot be read, or deeper than Python goes, than a path may be long or than we may open files.
        for command in ("chmod", "-R", "u+rwx"), ("rm", "-rf"):
            subprocess.run([*command, directory], check=False, stderr=subprocess.DEVNULL)


def _watch(process: subprocess.Popen, job: bytes, directory: str, limits: Limits) -> str:
    """Waits for a program; why it has to be stopped, or ""."""
    last = time.monotonic() + limits.seconds + 5  # its own start is not the program's time
    while True:
        try:
            process.communicate(job, timeout=_LOOK)
            return _too_much(directory, limits)
        except subprocess.TimeoutExpired:
            job = None  # is on its way
        if (reason := _too_much(directory, limits)) or time.monotonic() > last:
            return reason or "timed out"


def _too_much(directory: str, limits: Limits) -> str:
    """What a program's directory holds beyond its limits, or ""."""
    entries = size = 0
    hidden: list[OSError] = []
    for _, folders, files, place in os.fwalk(directory, onerror=hidden.append):
        entries += len(folders) + len(files)
        for name in files:
            try:
                size += 512 * os.stat(name, dir_fd=place, follow_symlinks=False).st_blocks
            except OSError:
                pass  # gone again
        if entries > limits.entries or size > limits.all_bytes:
            return f"wrote more than {limits.entries} files or {limits.all_bytes >> 20} MB"
    if any(error.errno == errno.EACCES for error in hidden):
        return "made a directory that cannot be read"
    return ""


def require() -> None:
    """Raises UnconfinedError where this machine cannot confine a program."""
    run_code("pass")


def run_all(
    programs: Sequence[str], limits: Limits = Limits(), *, workers: int = 0,  # noqa: B008
    done: Callable[[str, Outcome], Any] = lambda program, outcome: None,
) -> list[Outcome]:  # fmt: skip
    """Runs programs, as many at once as there are processors; `done` is told each and its outcome, in order."""
    outcomes = []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for program, outcome in zip(programs, pool.map(lambda code: run_code(code, limits), programs)):
            outcomes.append(outcome)
            done(program, outcome)
    return outcomes


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

_UNCONFINED, _CONFINED = 97, "confined "  # a program may end with any code, but none runs before this is said


def _main() -> None:
    job = json.load(sys.stdin)
    verdict, leave, libc = job.pop("verdict"), os._exit, ctypes.CDLL(None, use_errno=True)
    length, word = len(job["word"]), _out_of_python(libc, job.pop("word").encode())
    try:
        _confine(libc, job)
    except OSError as error:
        print(f"it cannot be confined here: {error}", file=sys.stderr)
        os._exit(_UNCONFINED)
    os.write(verdict, _CONFINED.encode())
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    exec(compile(job["code"], "program", "exec"), {"__name__": "__main__"})
    libc.write(verdict, ctypes.c_void_p(word), ctypes.c_size_t(length))
    leave(0)


def _out_of_python(libc: ctypes.CDLL, word: bytes) -> int:
    """The address of a copy of the word that no object of Python holds; the objects that did are gone when the program runs."""
    libc.malloc.restype = ctypes.c_void_p
    address = libc.malloc(ctypes.c_size_t(len(word)))
    ctypes.memmove(address, word, len(word))
    return address


def _confine(libc: ctypes.CDLL, job: dict) -> None:
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
    # BPF: another architecture's calls are refused, then the listed ones, then other commands than the listed ones; the rest
    # pass. A command is the lower half of a call's second argument, which is all that the kernel reads of it.
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, _ERRNO_EPERM), (0x20, 0, 0, 0)]
    if platform.machine() == "x86_64":  # numbers above are x32's, another way to the same calls
        steps += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, _ERRNO_EPERM)]
    allow, refuse = (0x06, 0, 0, _ALLOW), (0x06, 0, 0, _ERRNO_EPERM)
    steps += [(0x15, len(calls) - i, 0, call) for i, call in enumerate(calls)] + [(0x05, 0, 0, 1), refuse]
    for call, allowed in zip(_COMMANDS[platform.machine()], _ALLOWED, strict=True):
        steps += [(0x15, 0, len(allowed) + 3, call), (0x20, 0, 0, 24)]
        steps += [(0x15, len(allowed) - i, 0, command) for i, command in enumerate(allowed)] + [refuse, allow]
    steps.append(allow)
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program))
    check(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.c_char_p(header), 0, 0), "seccomp")


def _only_write_in(libc: ctypes.CDLL, directory: str, check) -> None:
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < _LANDLOCK_VERSION:
        found = f"version {version}" if version > 0 else "none"
        raise OSError(f"expected Landlock of version {_LANDLOCK_VERSION} or later (Linux 6.2), found {found}")
    rights = struct.pack("3Q", _WRITES, 0, _SCOPES)[: 24 if version >= _LANDLOCK_SCOPES else 8]
    ruleset = check(libc.syscall(_LANDLOCK_CREATE, ctypes.c_char_p(rights), ctypes.c_size_t(len(rights)), 0), "landlock")
    beneath = os.open(directory, os.O_PATH)
    rule = struct.pack("=Qi", _WRITES, beneath)
    check(libc.syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.c_char_p(rule), 0), "landlock rule")
    check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(beneath)
    os.close(ruleset)


if __name__ == "__main__" and sys.argv[1:] == ["run"]:
    _main()
