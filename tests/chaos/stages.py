"""The four stages that are disturbed, and their data: pretraining, SFT, a reward model and PPO of a very small model."""

import json
from pathlib import Path

from llama_jax import corpus as corpus_command
from llama_jax.assistant.datasets import DatasetSizes, write_datasets
from llama_jax.config import parse
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.steps import change, load_config

NAMES = ("pretrain", "sft", "reward", "ppo")
INTERVAL = 2  # steps between checkpoints

SIZES = DatasetSizes(
    objects=600, max_characters=300, held_out_fraction=0.3, sft=64, sft_safety=16, preferences=24, preferences_safety=16,
    rlhf=32, rlhf_safety=16, held_out=16, held_out_safety=16,
)  # fmt: skip


def make_data(directory: Path) -> None:
    """Corpus, dialogs, prompts and preferences; made once."""
    if (directory / "made").exists():
        return
    values = load_config(Path("configs"), "corpus.py:tiny")
    change(values, {"total_tokens": 12_288}, where="corpus")
    corpus_command.run(parse(corpus_command.CorpusConfig, values), directory / "corpus")
    write_datasets(directory / "data", SIZES, seed=0)
    dialogs = [row for _, row in read_jsonl(directory / "data" / "sft.jsonl") if len(row["messages"]) == 2]
    # The answer to another question is the worse one.
    pairs = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1]["content"], "rejected": other["messages"][1]["content"],
         "rating": "better", "is_safety": False, "source": "chaos", "safety_bin": "both_safe"}
        for row, other in zip(dialogs, dialogs[1:] + dialogs[:1], strict=True)
        if row["messages"][1]["content"] != other["messages"][1]["content"]
    ]  # fmt: skip
    write_jsonl(directory / "data" / "pairs.jsonl", pairs)
    (directory / "made").write_text(json.dumps({"pairs": len(pairs)}))


def flags(stage: str, runs: Path | str, directory: Path | str, *, steps: int, interval: int = INTERVAL) -> list[str]:
    """The train command's flags for a stage whose predecessors lie in `runs`."""
    data = f"{directory}/data"
    common = [
        f"--config=configs/{stage}.py:tiny", "--config.model=micro", f"--config.tokenizer={directory}/corpus/tokenizer.model",
        f"--config.loop.steps={steps}", f"--config.loop.checkpoint_every={interval}", "--config.loop.keep=3",
        "--config.loop.log_every=1", "--config.loop.batch_size=8", "--config.compute.unroll=False", "--config.optim.warmup=1",
        f"--workdir={runs}/{stage}",
    ]  # fmt: skip
    more = {
        "pretrain": [f"--config.data.corpus={directory}/corpus"],
        "sft": [f"--config.start={runs}/pretrain", f"--config.data.train=('{data}/sft.jsonl',)", "--config.epochs=0.0"],
        "reward": [
            f"--config.start={runs}/sft", f"--config.data.train=('{data}/pairs.jsonl',)", "--config.data.shares=(0.0,)",
            "--config.epochs=0.0", "--config.score_pairs=0",
        ],
        "ppo": [
            f"--config.start={runs}/sft", f"--config.helpfulness={runs}/reward", f"--config.safety={runs}/reward",
            f"--config.data.prompts={data}/rlhf_prompts.jsonl", "--config.ppo.rollout_size=32", "--config.ppo.new_tokens=16",
        ],
    }  # fmt: skip
    return common + more[stage]
