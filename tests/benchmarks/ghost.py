"""Ghost Attention at `tiny`: how well an instruction of the first turn is kept at turns 2, 4, 6 and 20 (Table 30).

    python tests/benchmarks/ghost.py --start=runs/demo/sft --tokenizer=runs/demo/corpus/tokenizer.model \
        --dialogs=runs/demo/data/sft.jsonl --workdir=/tmp/ghost

1. The demo's SFT model knows no instructions. It is fine-tuned on dialogs of 1 to 20 turns, written by a program, in rows of
   1024 tokens (it was trained on 256): most end with a turn that holds an instruction and obeys it, the others have none. No
   answer obeys an instruction of an earlier turn. This is the baseline, and the policy sampled from.
2. `configs/ghost.py:tiny` samples from it with the instruction in every turn and trains on it in the first turn only.
3. Both answer held-out dialogs of 20 turns. Their instructions have values of the training rows: a model of this size does not
   copy others, not even in the turn that names them.

Obeyed on 48 such dialogs, with 95 % intervals, beside the paper's Table 30 (asked by people, hobbies and figures only):

| turn | baseline | Ghost Attention | paper, baseline | paper, Ghost Attention |
|---|---|---|---|---|
| 1 | 100 % | 100 % | | |
| 2 | 23 % (12 to 35) | 94 % (85 to 100) | 100 % | 100 % |
| 4 | 4 % (0 to 10) | 96 % (90 to 100) | 10 % | 100 % |
| 6 | 4 % (0 to 10) | 96 % (90 to 100) | 0 % | 100 % |
| 20 | 2 % (0 to 6) | 92 % (83 to 98) | 0 % | 100 % |
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llama_jax.config import describe  # noqa: E402
from llama_jax.data.sources import read_jsonl  # noqa: E402
from llama_jax.data.tokenizer import Tokenizer  # noqa: E402
from llama_jax.evals.ghost import TURNS as RECALL_TURNS  # noqa: E402
from llama_jax.evals.ghost import follow, recall_rows, recall_table  # noqa: E402
from llama_jax.files import write_json  # noqa: E402
from llama_jax.parallel.host import keep_heap  # noqa: E402
from llama_jax.parallel.mesh import make_mesh  # noqa: E402
from llama_jax.pretrain.base import load_tokenizer  # noqa: E402
from llama_jax.rlhf.instructions import VALUES, contexts_of, single_turns, write_instruction_data  # noqa: E402
from llama_jax.rlhf.respond import Responder  # noqa: E402
from llama_jax.steps import load_config  # noqa: E402
from llama_jax.train import parse_stage, run  # noqa: E402

CONTEXT = 1024  # tokens: about 20 short turns
TURNS = 20


def stage(name: str, workdir: Path, flags: argparse.Namespace, **changes) -> float:
    """Runs a stage of the tiny config; returns its seconds."""
    values = load_config(ROOT / "configs", f"{name}.py:tiny")
    values.update({"tokenizer": flags.tokenizer, "context": CONTEXT})
    for key, value in changes.items():
        if isinstance(value, dict):
            values[key].update(value)
        else:
            values[key] = value
    begin = time.monotonic()
    run(values, workdir)
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("start", "tokenizer", "dialogs", "workdir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--samples", type=int, default=900)
    parser.add_argument("--instructions", type=int, default=2400, help="rows that teach the baseline to obey")
    parser.add_argument("--contexts", type=int, default=48, help="held-out dialogs of each model")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--resample", action="store_true")
    parser.add_argument("--keep", default="all")
    parser.add_argument("--name", default="ghost", help="of the second stage's directory")
    flags = parser.parse_args()
    keep_heap()
    workdir, tokenizer = Path(flags.workdir), Tokenizer(flags.tokenizer)
    short = single_turns(flags.dialogs, tokenizer, longest=40)
    held_out, train = short[::8], [d for i, d in enumerate(short) if i % 8]
    files = write_instruction_data(
        workdir, train, VALUES, rows=flags.instructions, plain=flags.instructions // 30, most_turns=TURNS, seed=0
    )
    sft = {"train": (files["instructions"], files["plain"]), "length": CONTEXT}
    seconds = {"baseline": stage(
        "sft", workdir / "baseline", flags, start=flags.start, data=sft, epochs=3.0, optim={"lr": 1e-3}, loop={"batch_size": 4},
    )}  # fmt: skip
    baseline = str(workdir / "baseline")
    ghost = {"contexts": (files["contexts"],), "values": files["values"], "families": tuple(VALUES), "samples": flags.samples,
             "resample": flags.resample, "keep": flags.keep}  # fmt: skip
    seconds["ghost"] = stage(
        "ghost", workdir / flags.name, flags, start=baseline, policy=baseline, data=sft, ghost=ghost, epochs=flags.epochs,
    )  # fmt: skip
    samples = [row for _, row in read_jsonl(workdir / flags.name / "samples.jsonl")]
    print(f"the policy obeys in {100 * np.mean([bool(row['obeyed']) for row in samples]):.0f} % of {len(samples)} samples "
          "(a hobby counts where it is asked for)")  # fmt: skip

    values = load_config(ROOT / "configs", "ghost.py:tiny")
    values.update({"tokenizer": flags.tokenizer})
    config = parse_stage(values)
    model, _ = load_tokenizer(config)
    mesh, report = make_mesh(config.mesh), {}
    contexts = contexts_of(held_out, VALUES, flags.contexts, turns=TURNS, rng=np.random.default_rng(1))
    tables = {}
    for name in ("baseline", flags.name):
        begin = time.monotonic()
        respond = Responder(
            str(workdir / name), model, tokenizer, compute=config.compute, mesh=mesh, new_tokens=32, temperature=0.0,
            batch_size=flags.contexts,
        )  # fmt: skip
        found = follow(contexts, respond, turns=(1, *RECALL_TURNS))
        seconds[f"{name} eval"] = time.monotonic() - begin
        tables[name] = recall_table(found)
        report[name] = [describe(row) for row in found]
        for family in VALUES:
            some = [row for row in found if contexts[row.context].constraints[0].family == family]
            shares = {turn: round(interval.mean, 2) for turn, interval in recall_table(some).items()}
            print(f"  {name}, {family}: {shares}")
    for row in recall_rows(tables):
        print(" | ".join(map(str, row)))
    write_json(workdir / f"{flags.name}.json", {"answers": report, "seconds": seconds})
    print(json.dumps({name: round(value) for name, value in seconds.items()}), "seconds")


if __name__ == "__main__":
    main()
