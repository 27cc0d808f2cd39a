"""The recommended settings, each compiled for its slice as it is written in configs/common.py."""

import json

import pytest
from tpu_compiler import needs_libtpu, plan

from configs import common
from llama_jax.model.config import SIZES
from llama_jax.model.params import count, table


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "size", "tpu"), common.PODS, ids=str)
def test_recommended_settings_fit_and_gather_only_weights(stage, size, tpu):
    found = json.loads(plan(f"--config=configs/{stage}.py:{size},tpu={tpu}", f"--topology={tpu}", "--json"))
    assert found["fits"]
    assert set(found["collective_bytes"]) == {"fsdp"}
    gathers = [t for t in found["traffic"] if t["kind"] == "all-gather"]
    moved, hidden = (sum(t["bytes"] for t in found["traffic"] if t["overlapped"] or not only) for only in (False, True))
    assert hidden > 0.5 * moved  # beside arithmetic: gathers of weights, and reductions of their gradients
    weights = 2 * count(table(SIZES[size], head="lm_head"))  # bytes, in bfloat16
    _, microbatches, _ = common.PODS[stage, size, tpu]
    assert sum(t["bytes"] for t in gathers) <= 2.1 * microbatches * weights
