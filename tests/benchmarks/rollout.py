"""Many prompts of mixed lengths with answers of mixed lengths: continuous batching against static batches, in one run.

    python tests/benchmarks/rollout.py [--model=tiny] [--prompts=256] [--slots=64] [--repeats=3]

Every answer has a length of its own, known beforehand so that both sides draw the same tokens; a static batch goes on until
its longest answer is done. Prints useful tokens per second of wall time and of CPU time (the latter is what counts on a
machine that others use), and the ratios. The last case asks each prompt eight times, as rejection sampling does.
"""

import argparse
import functools
import time

import jax
import numpy as np

from llama_jax.model import params
from llama_jax.model.config import SIZES, Compute
from llama_jax.model.decode import prepare
from llama_jax.parallel.host import keep_heap
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.generate import make_sampler, pad_left
from llama_jax.sampling.keys import key_data, row_keys
from llama_jax.sampling.request import EngineConfig

LONGEST_PROMPT, LONGEST_ANSWER = 96, 128


def workload(vocab: int, prompts: int, answers: int) -> tuple[list[list[int]], np.ndarray]:
    """Prompts of 16 to 96 tokens, most of them short, and answer lengths of 4 to 128, most of them short."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(3, 14, prompts // answers), 16, LONGEST_PROMPT).astype(int)
    distinct = [[1, *rng.integers(3, vocab, size=length - 1).tolist()] for length in lengths]
    repeated = [prompt for prompt in distinct for _ in range(answers)]
    return repeated, np.clip(rng.exponential(32, len(repeated)), 4, LONGEST_ANSWER).astype(int)


def continuous(engine: Engine, prompts: list[list[int]], lengths: np.ndarray) -> None:
    """All answers by the engine."""
    engine.prefilled_tokens = 0
    keys = key_data(0, range(len(prompts)))
    engine.run([engine.submit(prompt, max_tokens=int(n), key=key) for prompt, n, key in zip(prompts, lengths, keys)])


def static(sampler, tree, prompts: list[list[int]], batch: int) -> None:
    """All answers by the sampler, batch after batch."""
    for start in range(0, len(prompts), batch):
        tokens, valid = pad_left(prompts[start : start + batch], LONGEST_PROMPT)
        jax.block_until_ready(sampler(tree, tokens, valid, row_keys(0, range(start, start + batch))))


def timed(call, repeats: int) -> tuple[float, float]:
    """Least seconds of wall time and of CPU time."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    keep_heap()
    model = SIZES[arguments.model]
    specs, compute = params.table(model, head="lm_head"), Compute("bfloat16", "float32")
    tree = jax.jit(lambda key: params.init(specs, key))(jax.random.key(0))
    weights = jax.jit(lambda tree: prepare(tree, specs, compute=compute))(tree)
    settings = EngineConfig(
        slots=arguments.slots, max_length=LONGEST_PROMPT + LONGEST_ANSWER, chunks=(), whole=((48, 16), (96, 8)), steps=16
    )
    engine = Engine(model, weights, settings, compute=compute).warm_up()
    compiled = engine.compilations
    # An id that is never drawn: the lengths are given, as if by EOS.
    sampler = make_sampler(
        model, specs, compute=compute, eos_id=-1, max_new_tokens=LONGEST_ANSWER, temperature=1.0
    )

    for answers in (1, 8):
        prompts, lengths = workload(model.vocab_size, arguments.prompts, answers)
        print(f"{len(prompts)} prompts, {answers} answer(s) to each, {lengths.sum()} tokens drawn (mean {lengths.mean():.0f})")
        continuous(engine, prompts[:8], lengths[:8])
        mine = timed(functools.partial(continuous, engine, prompts, lengths), arguments.repeats)
        name = f"continuous, {arguments.slots} slots"
        print(f"  {name:28s} {lengths.sum() / mine[0]:8.0f} tokens/s, {lengths.sum() / mine[1]:8.0f} per CPU second, "
              f"{engine.prefilled_tokens} of {sum(map(len, prompts))} prompt tokens computed", flush=True)  # fmt: skip
        for batch in sorted({arguments.slots, len(prompts)}):
            static(sampler, tree, prompts[:batch], batch)
            theirs = timed(functools.partial(static, sampler, tree, prompts, batch), arguments.repeats)
            print(f"  {f'static, batches of {batch}':28s} {lengths.sum() / theirs[0]:8.0f} tokens/s, "
                  f"{lengths.sum() / theirs[1]:8.0f} per CPU second; continuous is {theirs[0] / mine[0]:.2f}x (wall), "
                  f"{theirs[1] / mine[1]:.2f}x (CPU)", flush=True)  # fmt: skip
    if engine.compilations != compiled:
        raise RuntimeError(f"{engine.compilations - compiled} programs were compiled after warm-up")


if __name__ == "__main__":
    main()
