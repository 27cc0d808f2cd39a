"""The short form of `python tests/chaos/chaos.py`, which is the long one."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_stages_that_are_killed_stopped_and_damaged_end_with_the_same_parameters(tmp_path):
    command = [sys.executable, Path(__file__).with_name("chaos.py"), f"--directory={tmp_path}"]
    # Another test shares the cores.
    short = ["--faults=4", "--steps=16", "--peer_seconds=30", "--end_seconds=200", "--stages", "pretrain", "sft"]
    done = subprocess.run([*command, *short], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    faults = [line for line in done.stdout.splitlines() if line.startswith(("pretrain", "sft"))]
    assert len(faults) >= 4, done.stdout
