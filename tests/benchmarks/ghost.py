"""Ghost Attention at `tiny`: how well an instruction of the first turn is kept at turns 2, 4, 6 and 20 (Table 30).

    python tests/benchmarks/ghost.py --start=runs/demo/sft --tokenizer=runs/demo/corpus/tokenizer.model \
        --dialogs=runs/demo/data/sft.jsonl --workdir=/tmp/ghost

1. The demo's SFT model knows no instructions. It is fine-tuned on dialogs of 1 to 20 turns, written by a program, in rows of
   1024 tokens (it was trained on 256): most end with a turn that holds an instruction and obeys it, the others have none. No
   answer obeys an instruction of an earlier turn. This is the baseline, and the policy sampled from.
2. `configs/ghost.py:tiny` samples from it with the instruction in every turn and trains on it in the first turn only.
3. Both answer held-out dialogs of 20 turns under instructions whose values occur in no training row.
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
from llama_jax.data.dialog import encode_dialog  # noqa: E402
from llama_jax.data.sources import read_dialogs, read_jsonl, write_jsonl  # noqa: E402
from llama_jax.data.tokenizer import Tokenizer  # noqa: E402
from llama_jax.evals.ghost import follow, recall_rows, recall_table  # noqa: E402
from llama_jax.files import write_json  # noqa: E402
from llama_jax.parallel.host import keep_heap  # noqa: E402
from llama_jax.parallel.mesh import make_mesh  # noqa: E402
from llama_jax.pretrain.base import load_tokenizer  # noqa: E402
from llama_jax.rlhf.constraints import Constraint, instruction  # noqa: E402
from llama_jax.rlhf.ghost import Context, in_first_turn  # noqa: E402
from llama_jax.rlhf.respond import Responder  # noqa: E402
from llama_jax.steps import load_config  # noqa: E402
from llama_jax.train import parse_stage, run  # noqa: E402

CONTEXT = 1024
EARLIER_SHARE = 0.15  # of the instructions stand behind other turns; these rows are ten times as long
FAMILIES = ("opening", "closing", "hobby")
# Everyday words, since a model of this size knows few names; every sixth is held out.
WORDS = (
    "red green blue north south east west gold iron wood water fire stone river cloud snow rain moon star sun tree leaf "
    "bird fish horse bread salt paper glass silk lamp bell door wall road ship copper silver marble winter summer spring "
    "autumn coffee pepper butter honey apple lemon cherry orange melon carrot tiger lion eagle wolf bear fox mouse rabbit "
    "camel cotton linen velvet diamond ruby pearl amber mountain valley forest desert island ocean harbor bridge tower "
    "castle garden window mirror"
).split()
HOBBIES = (
    "chess reading painting sailing cooking hiking dancing fishing singing gardening running swimming cycling drawing writing "
    "climbing skating surfing rowing knitting sewing baking juggling camping skiing boxing golf tennis football hockey"
).split()


def split(values: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out)."""
    return [v for i, v in enumerate(values) if i % 6], values[::6]


def obedient(constraint: Constraint, question: str, answer: str) -> tuple[str, str]:
    """A question and the answer to it that obeys."""
    if constraint.family == "hobby":
        return constraint.probe, f"My hobby is {constraint.value}."
    return question, f"{constraint.value}: {answer}" if constraint.family == "opening" else f"{answer} {constraint.value}"


def instructed_rows(dialogs: list, values: dict[str, list[str]], count: int, rng: np.random.Generator) -> list[dict]:
    """Instructions that are obeyed in their own turn, the last one; some of them after turns without any."""
    rows = []
    for _ in range(count):
        family = str(rng.choice(FAMILIES))
        constraint = Constraint(family, str(rng.choice(values[family])))
        question, answer = (m["content"] for m in dialogs[rng.integers(len(dialogs))])
        question, answer = obedient(constraint, question, answer)
        text = instruction([constraint], terse=bool(rng.random() < 0.5))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        earlier = rng.integers(len(dialogs), size=rng.integers(1, 20)) if rng.random() < EARLIER_SHARE else []
        messages = [*(m for i in earlier for m in dialogs[i]), *in_first_turn(messages, text, place="user")]
        rows.append({"messages": messages, "source": "instructions"})
    return rows


def plain_rows(dialogs: list, count: int, rng: np.random.Generator) -> list[dict]:
    """Dialogs of 2 to 20 turns without instruction."""
    rows = []
    for _ in range(count):
        chosen = rng.integers(len(dialogs), size=rng.integers(2, 21))
        rows.append({"messages": [m for i in chosen for m in dialogs[i]], "source": "plain"})
    return rows


def held_out_contexts(dialogs: list, values: dict[str, list[str]], count: int, rng: np.random.Generator) -> list[Context]:
    """20 turns, one constraint each, the families in turn."""
    contexts = []
    for number in range(count):
        constraint = Constraint(name := FAMILIES[number % len(FAMILIES)], values[name][number // 3 % len(values[name])])
        messages = [m for i in rng.integers(len(dialogs), size=20) for m in dialogs[i]]
        contexts.append(Context(messages, (constraint,), instruction([constraint], terse=bool(number % 2))))
    return contexts


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
    short = []
    for row in read_dialogs(flags.dialogs):
        if len(row["messages"]) == 2 and len(encode_dialog(row["messages"], tokenizer).ids) <= 40:
            short.append(row["messages"])
    held_out, train = short[::8], [d for i, d in enumerate(short) if i % 8]
    kinds = {"opening": split(WORDS), "closing": split(WORDS), "hobby": split(HOBBIES)}
    known, unseen = ({name: pair[side] for name, pair in kinds.items()} for side in (0, 1))
    rng = np.random.default_rng(0)
    files = {name: str(workdir / f"{name}.jsonl") for name in ("instructions", "plain", "contexts", "values")}
    write_jsonl(files["instructions"], instructed_rows(train, known, flags.instructions, rng))
    write_jsonl(files["plain"], plain_rows(train, flags.instructions // 30, rng))
    write_jsonl(files["contexts"], [{"messages": dialog} for dialog in train])
    write_jsonl(files["values"], [{"kind": k, "value": v} for k, values in known.items() for v in values])
    sft = {"train": (files["instructions"], files["plain"]), "length": CONTEXT}
    seconds = {"baseline": stage(
        "sft", workdir / "baseline", flags, start=flags.start, data=sft, epochs=3.0, optim={"lr": 1e-3}, loop={"batch_size": 4},
    )}  # fmt: skip
    baseline = str(workdir / "baseline")
    ghost = {"contexts": (files["contexts"],), "values": files["values"], "families": FAMILIES, "samples": flags.samples,
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
    contexts = held_out_contexts(held_out, unseen, flags.contexts, np.random.default_rng(1))
    mesh, tables, report = make_mesh(config.mesh), {}, {}
    for name in ("baseline", flags.name):
        begin = time.monotonic()
        respond = Responder(
            str(workdir / name), model, tokenizer, compute=config.compute, mesh=mesh, new_tokens=32, temperature=0.0,
            batch_size=flags.contexts,
        )  # fmt: skip
        found = follow(contexts, respond)
        seconds[f"{name} eval"] = time.monotonic() - begin
        tables[name] = recall_table(found)
        report[name] = [describe(row) for row in found]
        for family in FAMILIES:
            some = [row for row in found if contexts[row.context].constraints[0].family == family]
            shares = {turn: round(interval.mean, 2) for turn, interval in recall_table(some).items()}
            print(f"  {name}, {family}: {shares}")
    write_json(workdir / f"{flags.name}.json", {"answers": report, "seconds": seconds})
    for row in recall_rows(tables):
        print(" | ".join(map(str, row)))
    print(json.dumps({name: round(value) for name, value in seconds.items()}), "seconds")


if __name__ == "__main__":
    main()
