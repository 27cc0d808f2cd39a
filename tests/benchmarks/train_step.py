"""The train step of `tiny` against this machine's matmul ceiling and against a plain float32 step, in one run:

    python tests/benchmarks/train_step.py [--rows=8] [--steps=10]

Prints tokens per second (best step), the share of the measured bfloat16 and float32 matmul ceilings that the model's
operations reach, and the ratio to the float32 step without unrolling.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.loader import TokenBatch
from llama_jax.model import params
from llama_jax.model.config import SIZES, Compute
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.mesh import make_mesh
from llama_jax.pretrain.base import fresh
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.training import optimizer
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.state import abstract_state, born_sharded
from llama_jax.training.step import make_step, put_batch

VARIANTS = {
    "tuned (configs/common.py)": Compute("bfloat16", "float32", loss_chunks=4, unroll=True),
    "plain float32": Compute("float32", "float32"),
}


def ceiling(dtype: str) -> float:
    """GFLOP/s of a large matrix product."""
    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    return 2 * 2048**3 / best_time(lambda: product(x, x), 10) / 1e9


def best_time(call, repeats: int) -> float:
    """Seconds of the fastest of several calls, the first (compilation) left out."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return min(times)


def step_time(compute: Compute, *, rows: int, steps: int) -> float:
    """Seconds of the fastest full update of `tiny`: loss, gradient, clipping, AdamW."""
    model, mesh = SIZES["tiny"], make_mesh()
    specs = params.table(model, head="lm_head")
    update = optimizer.make(OptimConfig(lr=1e-3, warmup=1), steps=100, decay=params.decay_mask(specs))
    shape = (rows, model.max_length)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape).astype(np.int32)
    batch = TokenBatch(
        tokens=tokens, targets=np.roll(tokens, -1, 1), weights=np.ones(shape, np.float32),
        segment_ids=np.ones(shape, np.int32), positions=np.tile(np.arange(shape[1], dtype=np.int32), (rows, 1)),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        state = born_sharded(lambda: fresh(specs, mesh, seed=0), specs, update, mesh)
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(specs, update, mesh))
        step = make_step(language_model_loss(model, compute), update, microbatches=1, layout=layout)
        batch = put_batch(batch, mesh)

        def call():
            nonlocal state
            state, means = step(state, batch)
            return means

        return best_time(call, steps)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    keep_heap()
    ceilings = {dtype: ceiling(dtype) for dtype in ("bfloat16", "float32")}
    print(", ".join(f"{dtype} matmul {rate:.0f} GFLOP/s" for dtype, rate in ceilings.items()))
    model = SIZES["tiny"]
    tokens, flops = arguments.rows * model.max_length, params.flops_per_token(model, length=model.max_length)
    times = {name: step_time(compute, rows=arguments.rows, steps=arguments.steps) for name, compute in VARIANTS.items()}
    for name, seconds in times.items():
        rate = tokens * flops / seconds / 1e9
        shares = ", ".join(f"{rate / top:.0%} of {dtype}" for dtype, top in ceilings.items())
        print(f"{name}: {tokens / seconds:,.0f} tokens/s, {rate:.0f} GFLOP/s, {shares}")
    tuned, plain = times.values()
    print(f"tuned / plain: {plain / tuned:.2f}x")


if __name__ == "__main__":
    main()
