"""One full update (loss, gradient, clipping, AdamW) of Llama shapes on this CPU, beside transformers and torch, in one run:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python tests/benchmarks/training.py [--sizes 15m 60m 135m tiny] [--steps=3]

512 tokens a row, 4096 tokens a step. Prints tokens per second (best step), the share of the measured matmul ceiling of the
operand type that the model's operations reach, and the ratio to torch in float32, eager, with the same threads. Without
transformers and torch (extra [test] on Python 3.11) ours stands alone.
"""

import argparse
import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.loader import TokenBatch
from llama_jax.model import params
from llama_jax.model.config import SIZES, Compute, ModelConfig
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.mesh import make_mesh
from llama_jax.pretrain.base import fresh
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.training import optimizer
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.state import abstract_state, born_sharded
from llama_jax.training.step import make_step, put_batch

LENGTH, ROWS = 512, 8


def shape(name: str, layers: int, width: int, heads: int, ffn: int) -> ModelConfig:
    """A Llama with 32,000 tokens and tied embeddings."""
    return ModelConfig(
        name=name, vocab_size=32_000, layers=layers, width=width, heads=heads, kv_heads=heads, head_size=width // heads,
        ffn=ffn, max_length=LENGTH, tie_embeddings=True,
    )  # fmt: skip


MODELS = {
    "15m": shape("15m", 6, 288, 6, 768),
    "60m": shape("60m", 10, 512, 8, 2048),
    "135m": dataclasses.replace(SIZES["smollm2-135m"], max_length=LENGTH),
    "tiny": dataclasses.replace(SIZES["tiny"], max_length=LENGTH),
}


def best_time(call: Callable, repeats: int) -> float:
    """Seconds of the fastest of several calls, the first (compilation) left out."""
    call()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def ceiling(dtype: str) -> float:
    """GFLOP/s of a large matrix product."""
    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    return 2 * 2048**3 / best_time(lambda: product(x, x).block_until_ready(), 5) / 1e9


def tokens_of(model: ModelConfig) -> np.ndarray:
    """Random ids. # int32 [B, T + 1]"""
    return np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)


def ours(model: ModelConfig, compute: Compute, steps: int) -> float:
    """Seconds of a step of the loop's own train step."""
    mesh, ids = make_mesh(devices=jax.devices()[:1]), tokens_of(model)
    specs = params.table(model, head="lm_head")
    update = optimizer.make(OptimConfig(lr=1e-3, warmup=1), steps=100, decay=params.decay_mask(specs))
    batch = TokenBatch(
        tokens=ids[:, :-1], targets=ids[:, 1:], weights=np.ones((ROWS, LENGTH), np.float32),
        segment_ids=np.ones((ROWS, LENGTH), np.int32), positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        state = born_sharded(lambda: fresh(specs, mesh, seed=0), specs, update, mesh)
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(specs, update, mesh))
        step = make_step(language_model_loss(model, compute), update, microbatches=1, layout=layout)
        batch = put_batch(batch, mesh)

        def call() -> None:
            nonlocal state
            state, means = step(state, batch)
            jax.block_until_ready((state, means))

        return best_time(call, steps)


def torch_eager(model: ModelConfig, steps: int, *, bfloat16: bool) -> float:
    """Seconds of a step of transformers' LlamaForCausalLM with torch's AdamW; bfloat16 by autocast."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size, hidden_size=model.width, intermediate_size=model.ffn,
            num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
            head_dim=model.head_size, max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False,
            attn_implementation="sdpa",
        )
    ).train()  # fmt: skip
    update = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    ids = torch.from_numpy(tokens_of(model)[:, :-1].astype(np.int64))

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        update.step()
        update.zero_grad(set_to_none=True)

    return best_time(call, steps)


def ways(model: ModelConfig) -> dict[str, Compute]:
    """Ours, in both operand types; layers are unrolled as far as that compiles in reasonable time."""
    how = {"activations": "float32", "loss_chunks": 8, "unroll": model.layers <= 12}
    return {"ours float32": Compute("float32", **how), "ours bfloat16": Compute("bfloat16", **how)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["15m", "60m", "135m"], choices=MODELS)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    keep_heap()
    ceilings = {dtype: ceiling(dtype) for dtype in ("float32", "bfloat16")}
    print(", ".join(f"{dtype} matmul {rate:.0f} GFLOP/s" for dtype, rate in ceilings.items()), flush=True)
    with_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    for size in arguments.sizes:
        model = MODELS[size]
        flops = ROWS * LENGTH * params.flops_per_token(model, length=LENGTH)
        times = {}
        if with_torch:
            times["torch float32"] = torch_eager(model, arguments.steps, bfloat16=False)
            times["torch bfloat16"] = torch_eager(model, arguments.steps, bfloat16=True)
        times |= {name: ours(model, compute, arguments.steps) for name, compute in ways(model).items()}
        for name, seconds in times.items():
            share = flops / seconds / 1e9 / ceilings[name.split()[1]]
            ratio = f", {times['torch float32'] / seconds:.2f}x torch float32" if with_torch else ""
            print(f"{size} {name}: {ROWS * LENGTH / seconds:,.0f} tokens/s, {share:.0%} of the ceiling{ratio}", flush=True)


if __name__ == "__main__":
    main()
