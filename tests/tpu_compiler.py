"""For tests with the real TPU compiler, which needs no TPU: they skip where libtpu is not installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'")


def plan(*arguments: str) -> str:
    """What `llama_jax.plan` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.plan", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
