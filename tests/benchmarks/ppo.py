"""Seconds of a PPO iteration at 34M parameters, split into rollout, scoring and update; and of GRPO on the same answers.

    python tests/benchmarks/ppo.py [--rewards=1] [--matmul=float32] [--iterations=5] [--lora=0] [--grpo] [--trl=PYTHON]

288 wide, 6 layers, vocabulary 49152 untied; 16 prompts of 64 tokens, answers of 64 (none ends earlier), one epoch, one
mini-batch; policy, critic, reference and reward models of that size. Prints the least seconds of each part, the median
of an iteration, and tokens per second. With `--trl`, the Python of an environment that has TRL (tests/benchmarks/trl_ppo.py
says how to make one), the same iterations by TRL's trainer follow in the same run, and the ratio of the medians.

Measured with `--iterations=3 --trl=...` on two cores without bfloat16 products: 7.66 s an iteration, TRL 15.42 s (2.01x).

TRL has policy, critic, reference and one reward model: `--rewards=1` (the default) computes what it does, a score of one model
for each answer by `Roller.score`; `--rewards=2` is the paper's rule, a helpfulness and a safety model and their gate, one
forward pass of a fifth model more.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.loader import IndexedBatches
from llama_jax.model import lora, params
from llama_jax.model.config import SIZES, Compute
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.reward.score import scorer
from llama_jax.rlhf import grpo
from llama_jax.rlhf.judge import RewardRule, empty_rollout, make_judge
from llama_jax.rlhf.ppo import PpoSettings, ppo_loss
from llama_jax.rlhf.reinforce import collate_prompts
from llama_jax.rlhf.rollout import KlControl, Roller, RolloutSource
from llama_jax.sampling.generate import make_sampler
from llama_jax.sampling.keys import row_keys
from llama_jax.training import optimizer
from llama_jax.training.optimizer import OptimConfig
from llama_jax.training.state import abstract_state, create, overlay
from llama_jax.training.step import make_step

PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 16, 64, 64
MODEL = dataclasses.replace(
    SIZES["tiny"], name="34m", vocab_size=49152, layers=6, width=288, heads=6, kv_heads=6, head_size=48, ffn=768,
    max_length=PROMPT_LENGTH + NEW_TOKENS, tie_embeddings=False,
)  # fmt: skip


def one_score(reward: dict, prompts: np.ndarray, compute: Compute) -> Callable[..., jax.Array]:
    """(prompt numbers [B], responses [B, N], mask [B, N]) -> the reward model's logit of each dialog, float32 [B]."""
    score = jax.jit(scorer(MODEL, compute))

    def of(numbers: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        dialogs = jnp.concatenate([prompts[np.asarray(numbers)], tokens], axis=1)
        real = jnp.concatenate([jnp.ones((len(tokens), PROMPT_LENGTH), bool), mask], axis=1)
        return score(reward, dialogs, real.astype(jnp.int32))

    return of


def drawn(specs: dict, seed: int) -> dict:
    """Random parameters."""
    return jax.jit(lambda key: params.init(specs, key))(jax.random.key(seed))


def seconds_of_trl(python: str, iterations: int) -> dict:
    """What tests/benchmarks/trl_ppo.py prints under another Python: `seconds` of each iteration, `versions`, `threads`."""
    sizes = {
        "prompts": PROMPTS, "prompt_length": PROMPT_LENGTH, "new_tokens": NEW_TOKENS, "vocab_size": MODEL.vocab_size,
        "layers": MODEL.layers, "width": MODEL.width, "heads": MODEL.heads, "ffn": MODEL.ffn, "iterations": iterations,
    }  # fmt: skip
    command = [python, str(Path(__file__).with_name("trl_ppo.py")), *(f"--{name}={value}" for name, value in sizes.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matmul", default="float32")
    parser.add_argument("--rewards", type=int, default=1, choices=(1, 2), help="reward models; 1: as TRL, 2: the paper's")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all parameters are trained")
    parser.add_argument("--grpo", action="store_true", help="GRPO with 4 answers to each of 4 prompts")
    parser.add_argument("--trl", default="", metavar="PYTHON", help="the Python of an environment with TRL 0.24, to compare")
    arguments = parser.parse_args()
    if arguments.trl and arguments.grpo:
        parser.error("--trl: TRL's PPO is compared with ours, not with GRPO")
    keep_heap()
    compute = Compute(arguments.matmul, "float32", unroll=True)
    mesh = make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    tables = {head: params.table(MODEL, head=head) for head in ("lm_head", "value_head", "reward_head")}
    heads = {"policy": "lm_head"} if arguments.grpo else {"policy": "lm_head", "critic": "value_head"}
    whole = {name: drawn(tables[head], seed) for seed, (name, head) in enumerate(heads.items())}
    reference = whole["policy"] if arguments.lora else drawn(tables["lm_head"], 2)
    specs, frozen = {name: tables[head] for name, head in heads.items()}, {name: {} for name in heads}
    trained = whole
    if arguments.lora:
        config = lora.LoraConfig(rank=arguments.lora)
        specs = {name: {"lora": lora.adapter_specs(tables[head], config)} for name, head in heads.items()}
        frozen = {name: {**tree, "lora": drawn(lora.scale_specs(config), 0)} for name, tree in whole.items()}
        trained = {name: drawn(table, 5) for name, table in specs.items()}
    optim = optimizer.make(OptimConfig(lr=1e-5, schedule="constant"), steps=1000, decay=params.decay_mask(specs))
    rule = RewardRule(
        beta=0.01, gamma=1.0, lam=0.95, safety_threshold=0.15, missing_eos_penalty=1.0, temperature=1.0
    )
    if arguments.grpo:
        answers, settings = 4, grpo.GrpoSettings(rollout_size=PROMPTS, answers=4, new_tokens=NEW_TOKENS, beta=0.04)
        judge, loss = grpo.make_group_judge(MODEL, compute, rule, settings), grpo.grpo_loss(MODEL, compute, settings)
        empty = grpo.empty_rollout(PROMPTS, PROMPT_LENGTH, NEW_TOKENS)
    else:
        answers, settings = 1, PpoSettings(rollout_size=PROMPTS, new_tokens=NEW_TOKENS, beta=0.01)
        judge, loss = make_judge(MODEL, compute, rule), ppo_loss(MODEL, compute, settings)
        empty = empty_rollout(PROMPTS, PROMPT_LENGTH, NEW_TOKENS)
    rng = np.random.default_rng(0)
    prompts = np.concatenate([np.ones((64, 1)), rng.integers(3, 49152, (64, PROMPT_LENGTH - 1))], axis=1).astype(np.int32)
    models = {"helpfulness": drawn(tables["reward_head"], 3), "safety": drawn(tables["reward_head"], 4)}
    alone = one_score(models["helpfulness"], prompts, compute) if arguments.rewards == 1 else None
    roll = Roller(
        # An id that is never drawn: all answers have their full length.
        sample=make_sampler(
            MODEL, tables["lm_head"], compute=compute, eos_id=-1, max_new_tokens=NEW_TOKENS, temperature=1.0
        ),
        judge=judge,
        frozen={"reference": reference} if alone else {"reference": reference, **models},
        keys=functools.partial(row_keys, 0),
        score=alone,
    )  # fmt: skip
    examples = [(i % 4 == 0, ids, i) for i, ids in enumerate(prompts.tolist())]
    batches = IndexedBatches(
        examples, functools.partial(collate_prompts, length=PROMPT_LENGTH), PROMPTS // answers, seed=0
    )
    seconds: dict[str, list[float]] = {"rollout": [], "scoring": [], "update": [], "iteration": []}
    with jax.set_mesh(mesh):
        source = RolloutSource(
            batches, roll, mesh=mesh, empty=empty, size=PROMPTS, rows=PROMPTS, answers=answers, control=KlControl(0.01),
            seed=0,
        )  # fmt: skip
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(specs, optim, mesh))
        state = jax.device_put(create(trained, optim), layout)
        step = make_step(loss, optim, microbatches=1, layout=layout)
        for number in range(arguments.iterations + 1):  # the first one compiles
            begun = time.perf_counter()
            batch, metrics = source.batch(number, overlay(state.params, frozen))
            jax.block_until_ready(batch)
            judged = time.perf_counter()
            state, means = step(state, batch, frozen)
            jax.block_until_ready(state)
            done = time.perf_counter()
            if number:
                parts = (metrics["seconds/rollout"], metrics["seconds/score"], done - judged, done - begun)
                for name, value in zip(seconds, parts):
                    seconds[name].append(value)
    assert float(means["ratio_deviation"]) < 1e-3, "rollout and update disagree"
    for name, values in seconds.items():
        print(f"{name:10s} {min(values):6.2f} s (median {statistics.median(values):.2f})")
    total = PROMPTS * (PROMPT_LENGTH + NEW_TOKENS)
    print(f"{total / min(seconds['iteration']):.0f} tokens/s of prompts and answers; "
          f"{PROMPTS * NEW_TOKENS / min(seconds['rollout']):.0f} tokens/s drawn")  # fmt: skip
    if arguments.trl:
        trl = seconds_of_trl(arguments.trl, arguments.iterations)
        ours, theirs = statistics.median(seconds["iteration"]), statistics.median(trl["seconds"])
        print(f"TRL {trl['versions']['trl']} {theirs:6.2f} s an iteration (median; torch {trl['versions']['torch']}, "
              f"{trl['threads']} threads): {theirs / ours:.2f}x ours")  # fmt: skip


if __name__ == "__main__":
    main()
