"""How programs are compiled whose weights lie divided over devices, as training lays them out: not by all of XLA's defaults."""

from collections.abc import Callable
from typing import Any

import jax

from llama_jax.parallel.mesh import platform

# Not the TPU compiler's defaults: gathers of weights run beside the arithmetic that does not need them yet, and reductions of
# gradients beside that of the layer before. A reduction over three dimensions of a torus stays whole (an all-reduce, of which
# each device keeps its part): over one or two the compiler scatters as it reduces, over three none of its options makes it.
# Products are not cut into windows that wait for a part of their operand each: a window reads and writes the whole float32 sum,
# and on 16 v5p chips they took six times as long as the product. Without them the 7B's forward pass is 0.34 instead of 1.11 s
# of fusions there (64 rows of 2048), a step of SFT takes 3.1 instead of 5.8 s, PPO's update 3.0 instead of 5.7 s, and a step
# of SFT of the 70B on 64 chips (tensor=8) 9.1 instead of 12.8 s: compiled, not run.
COMPILER_OPTIONS = {
    "tpu": {
        "xla_enable_async_all_gather": "true",
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
        "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
    }
}


def jit(function: Callable[..., Any], *, on: str | None = None, **how: Any) -> Callable[..., Any]:
    """`jax.jit` with these options of the platform `on`; by default that of the mesh of `jax.set_mesh`, else JAX's own."""
    return jax.jit(function, compiler_options=COMPILER_OPTIONS.get(on or platform()), **how)
