"""The launch scripts say in one line what is wrong with a machine, and keep the top level as the design fixed it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["launch/environment.sh", "launch/demo.sh", "launch/test.sh", ".ci/run"]

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


def test_top_level_is_what_the_design_allows():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {name.split("/")[0] for name in names if name}
    packages = {"llama_jax", "configs", "launch", "tests", "notebooks", ".ci"}
    assert top <= packages | {"setup.cfg", "README.md", "pyproject.toml", ".gitignore", "LICENSE"}
