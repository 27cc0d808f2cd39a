"""Several answers to each prompt scored by a reward model: prompts computed once, against a row for every answer, in one run.

    python tests/benchmarks/scoring.py [--model=tiny] [--prompts=300] [--answers=8] [--repeats=3]

Rejection sampling, distillation and studies score this way. Rows of one answer each are sorted by length, in batches of 128
that are padded to 48, 96 or 144 tokens. Prompts have 16 to 96 tokens (mean about 50), answers 4 to 48 (mean about 28), as in
the recipe.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from llama_jax.model import params
from llama_jax.model.config import SIZES, Compute
from llama_jax.parallel.host import keep_heap
from llama_jax.reward.score import scorer
from llama_jax.rlhf.scoring import logit_scores

LONGEST_PROMPT, LONGEST_ANSWER = 96, 48


def workload(vocab: int, prompts: int, answers: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, each as often as it has answers, and the answers."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(8, 6, prompts), 16, LONGEST_PROMPT).astype(int)
    asked = [[1, *rng.integers(3, vocab, size=n - 1).tolist()] for n in lengths]
    ends = np.clip(rng.gamma(3, 10, prompts * answers), 4, LONGEST_ANSWER).astype(int)
    return [prompt for prompt in asked for _ in range(answers)], [rng.integers(3, vocab, size=n).tolist() for n in ends]


def row_each(
    score: Callable[..., jax.Array], tree: params.Params, prompts: list[list[int]], answers: list[list[int]], batch: int = 128
) -> np.ndarray:
    """Scores of rows that hold one text each, in batches of similar length. # -> float32 [n]"""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    scores = np.zeros(len(texts), np.float32)
    for start in range(0, len(texts), batch):
        part = order[start : start + batch]
        width = next(w for w in (48, 96, 144) if len(texts[part[-1]]) <= w)
        tokens, real = np.zeros((2, batch, width), np.int32)
        for row, i in enumerate(part):
            tokens[row, : len(texts[i])], real[row, : len(texts[i])] = texts[i], 1
        scores[part] = np.asarray(score(tree, tokens, real))[: len(part)]
    return scores


def timed(call: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """Least seconds, after a call that compiles."""
    found, seconds = call(), []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    keep_heap()
    model, compute = SIZES[arguments.model], Compute("auto", "float32", unroll=True)
    tree = jax.jit(lambda key: params.init(params.table(model, head="reward_head"), key))(jax.random.key(0))
    prompts, answers = workload(model.vocab_size, arguments.prompts, arguments.answers)
    sizes = {"length": LONGEST_PROMPT + LONGEST_ANSWER, "batch_size": 128}
    together = functools.partial(logit_scores, model, compute, tree, prompts, answers, **sizes)
    alone = functools.partial(row_each, jax.jit(scorer(model, compute)), tree, prompts, answers)
    mine, found = timed(together, arguments.repeats)
    theirs, expected = timed(alone, arguments.repeats)
    texts, length = len(prompts), np.mean([len(p) + len(a) for p, a in zip(prompts, answers)])
    print(f"{texts} texts of {length:.0f} tokens, {arguments.answers} to a prompt; {model.name}, {compute.matmul_dtype}")
    print(f"  prompts computed once   {mine:6.2f} s, {texts / mine:7.0f} texts/s")
    print(f"  a row for every text    {theirs:6.2f} s, {texts / theirs:7.0f} texts/s; ours is {theirs / mine:.2f}x")
    print(f"  scores differ by at most {np.abs(found - expected).max():.4f}, their deviation is {expected.std():.4f}")


if __name__ == "__main__":
    main()
