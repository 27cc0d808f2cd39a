"""The recommended settings, each compiled for its slice as it is written in configs/common.py."""

import json
import math

import pytest
from tpu_compiler import needs_libtpu, plan

from configs import common
from llama_jax.model.config import SIZES
from llama_jax.model.params import count, table
from llama_jax.planning.calibration import REFERENCES

# Seconds of fusions, GiB of a chip, and the share of a step that communication is not hidden. Of MaxText, with the same batch,
# 4 x 2.31 s at 45.8 GiB (7B) and 22.3 s at 76.1 GiB (70B on v5p-512); the others as they were found, and a little more.
BOUNDS = {
    ("7b", "v5p-128"): (9.24, 45.8, 0.03), ("70b", "v5p-512"): (22.3, 76.1, 0.04), ("34b", "v5p-512"): (10.0, 60.0, 0.06),
    ("70b", "v6e-256"): (15.4, 16.0, 0.14),
}  # fmt: skip


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "size", "tpu"), common.PODS, ids=str)
def test_recommended_settings_fit_and_gather_only_weights(stage, size, tpu):
    found = json.loads(plan(f"--config=configs/{stage}.py:{size},tpu={tpu}", f"--topology={tpu}", "--json"))
    assert found["fits"]
    seconds, memory, exposed = BOUNDS.get((size, tpu), (math.inf, math.inf, 0.2))
    assert found["fusion_seconds"] <= seconds and found["hbm_bytes_per_chip"] <= memory * 2**30
    assert found["exposed_seconds"] <= exposed * found["step_seconds"]
    assert set(found["collective_bytes"]) == {"fsdp"}
    gathers = [t for t in found["traffic"] if t["kind"] == "all-gather"]
    moved, hidden = (sum(t["bytes"] for t in found["traffic"] if t["overlapped"] or not only) for only in (False, True))
    assert hidden > 0.5 * moved  # beside arithmetic: gathers of weights, and reductions of their gradients
    weights = 2 * count(table(SIZES[size], head="lm_head"))  # bytes, in bfloat16
    _, microbatches, _ = common.PODS[stage, size, tpu]
    assert sum(t["bytes"] for t in gathers) <= 2.1 * microbatches * weights


@needs_libtpu
@pytest.mark.slow
def test_the_calibration_is_what_the_compiler_gives_today():
    for known, found in zip(REFERENCES, json.loads(plan("--calibrate", "--json")), strict=True):
        assert found["topology"] == known.topology
        assert found["estimated"] == pytest.approx(known.estimated, rel=0.01), known
