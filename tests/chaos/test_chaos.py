"""The short form of `python tests/chaos/chaos.py`, which is the long one."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_each_kind_of_fault_has_its_own_bound_of_lost_steps():
    script = """
import chaos
kept = [("terminate", 7, 7), ("terminate", 7, 8), ("kill", 8, 4), ("stop", 8, 4), ("kill all", 8, 4), ("flip", 8, 2)]
for kind, reached, went_on_from in kept:
    chaos.check([chaos.Fault("sft", kind, reached, 2, went_on_from=went_on_from)])
for kind, reached, went_on_from in (("terminate", 7, 6), ("kill", 9, 4), ("stop", 9, 4), ("delete", 9, 2), ("flip", 1, 0)):
    try:
        chaos.check([chaos.Fault("sft", kind, reached, 2, went_on_from=went_on_from)])
    except AssertionError:
        continue
    raise SystemExit(f"{kind} may cost {reached - went_on_from} steps")
"""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_stages_that_are_killed_stopped_and_damaged_end_with_the_same_parameters(tmp_path):
    command = [sys.executable, Path(__file__).with_name("chaos.py"), f"--directory={tmp_path}"]
    # Another test shares the cores.
    short = ["--faults=4", "--steps=16", "--peer_seconds=30", "--end_seconds=200", "--stages", "pretrain", "sft"]
    done = subprocess.run([*command, *short], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    faults = [line for line in done.stdout.splitlines() if line.startswith(("pretrain", "sft"))]
    assert len(faults) >= 4, done.stdout
