"""How fast stages train, and how near that is to what the machine can do: the share of a measured matmul ceiling."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig


def operations(config: Any, model: ModelConfig) -> int:
    """Floating-point operations for each token of a stage's steps, of what is trained: PPO's policy and its critic."""
    data, heads = config.data, {"reward": ("reward_head",), "ppo": ("lm_head", "reward_head")}
    if config.stage == "ppo":
        length = data.prompt_length + config.ppo.new_tokens
    else:
        length = getattr(data, "length", model.max_length)
    return sum(table.flops_per_token(model, length=length, head=head) for head in heads.get(config.stage, ("lm_head",)))


def matmul_ceiling(compute: Compute) -> float:
    """The best rate of a large matrix product of the type that `compute` takes on this machine, in GFLOP/s."""
    n = 2048
    x = jnp.ones((n, n), compute.matmul_dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    times = []
    for _ in range(5):
        begun = time.monotonic()
        product(x, x).block_until_ready()
        times.append(time.monotonic() - begun)
    return 2 * n**3 / min(times) / 1e9


def speed(summary: Mapping[str, Any], operations: int, ceiling: float) -> dict[str, float]:
    """tokens_per_second of a finished stage, and matmul_share: what its training's operations (for each token) reach of the
    ceiling (GFLOP/s). Nothing of a stage that was over before its pace could be measured."""
    if (rate := summary.get("tokens_per_second")) is None:
        return {}
    return {"tokens_per_second": rate, "matmul_share": rate * operations / (ceiling * 1e9)}
