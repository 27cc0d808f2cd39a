"""What tests of whole runs share: a model of a second's compilation, a tokenizer, data, and random models to start from."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.config import ConfigError, parse
from llama_jax.data.sources import write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop import ours
from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.steps import change, load_config

ROOT = Path(__file__).parents[1]
MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=304, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=64
)
COMPUTE = {"matmul": "float32", "unroll": False, "loss_chunks": 1}


def make_tokenizer(directory: Path) -> Path:
    """304 pieces, byte fallback among them."""
    import sentencepiece

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(912)]
    lines = ["[INST] " + " ".join(words[i : i + 8]) + " [/INST] yes no" for i in range(0, len(words), 8)]
    (directory / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"), model_prefix=str(directory / "tokenizer"), vocab_size=304, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    return directory / "tokenizer.model"


def prepare(directory: Path) -> None:
    """Tokenizer, files of rows, and the workdirs of random models: chat, brief, helpfulness, safety."""
    tokenizer = Tokenizer(make_tokenizer(directory))
    questions = [f"{a}{b}" for a in "abcdefgh" for b in "abcd"]
    write_jsonl(directory / "dialogs.jsonl", [{"prompt": q, "completion": "yes"} for q in questions])
    write_jsonl(directory / "pairs.jsonl", [{"prompt": q, "chosen": "yes", "rejected": "no"} for q in questions])
    write_jsonl(directory / "values.jsonl", [{"kind": "opening", "value": q} for q in questions[:3]])
    write_jsonl(directory / "prompts.jsonl", [
        {"messages": [{"role": "user", "content": q}], "is_safety": i % 3 == 0, "reference": "yes"}
        for i, q in enumerate(questions)
    ])  # fmt: skip
    write_jsonl(directory / "adversarial.jsonl", [
        {"messages": [{"role": "user", "content": q}], "is_safety": True, "risk": "illicit_criminal"} for q in questions
    ])  # fmt: skip
    for seed, (name, head) in enumerate((("chat", "lm_head"), ("helpfulness", "reward_head"), ("safety", "reward_head"))):
        tree = jax.tree.map(lambda x: 2 * x, params.init(params.table(MODEL, head=head), jax.random.key(seed)))
        ours.write(directory / name, tree, MODEL, tokenizer=tokenizer.fingerprint, origin={})
        if name == "chat":  # its logits of EOS are larger, whether above zero or below: half of its answers end soon
            tree["lm_head"]["kernel"] = tree["lm_head"]["kernel"].at[:, tokenizer.eos_id].multiply(16)
            ours.write(directory / "brief", tree, MODEL, tokenizer=tokenizer.fingerprint, origin={})


def values(directory: Path, stage: str, *, steps: int, **changes):
    """The config of a stage at `tiny`, on what `prepare` wrote. Tests set SIZES["tiny"] to MODEL."""
    data = {"prompts": str(directory / "prompts.jsonl"), "prompt_length": 20}
    models = {name: str(directory / name) for name in ("helpfulness", "safety")}
    dialogs = {"train": (str(directory / "dialogs.jsonl"),), "length": 32}
    pairs = {"train": (str(directory / "pairs.jsonl"),), "held_out": (str(directory / "pairs.jsonl"),), "length": 32}
    own = {
        "sft": {"data": dialogs, "epochs": 0.0},
        "reward": {"data": pairs, "epochs": 0.0, "score_pairs": 16},
        "dpo": {"data": pairs, "epochs": 0.0},
        "ppo": {"data": data, "ppo": {"rollout_size": 16, "new_tokens": 8}, **models},
        "rejection": {
            "policy": str(directory / "chat"), **models, "data": dialogs, "epochs": 0.0,
            "rejection": {"prompts": data["prompts"], "prompt_length": 20, "max_prompts": 32, "answers": 4, "new_tokens": 8,
                          "temperatures": (0.8, 1.0), "search_prompts": 4, "sampling_batch": 8},
        },  # fmt: skip
        "grpo": {"data": data, "grpo": {"rollout_size": 16, "answers": 4, "new_tokens": 8}, **models},
        "ghost": {
            "policy": str(directory / "brief"), "data": {**dialogs, "length": 128}, "epochs": 0.0, "context": 128,
            "ghost": {"contexts": dialogs["train"], "turns": (1, 3), "samples": 32, "families": ("opening",),
                      "values": str(directory / "values.jsonl"), "new_tokens": 8, "sampling_batch": 8},
        },
        "distill": {
            "policy": str(directory / "brief"), "safety": models["safety"], "data": dialogs, "epochs": 0.0, "context": 512,
            "distill": {"prompts": str(directory / "adversarial.jsonl"), "prompt_length": 20, "new_tokens": 8, "generic": 1,
                        "category": False, "sampling_batch": 8},
        },
    }[stage]
    config = load_config(ROOT / "configs", f"{stage}.py:tiny")
    loop = {"steps": steps, "batch_size": 8, "checkpoint_every": steps, "log_every": 1}
    common = {
        "tokenizer": str(directory / "tokenizer.model"), "start": str(directory / "chat"), "compute": COMPUTE, "loop": loop,
        "optim": {"warmup": 1, "lr": 1e-3},
    }  # fmt: skip
    change(config, common, where=stage)
    change(config, own, where=stage)
    change(config, changes, where=stage)
    return config


def assert_refused(config: type, file: str, changes: dict, message: str) -> None:
    """A config file with these changes is refused with this message (a pattern)."""
    values = load_config(ROOT / "configs", file)
    change(values, changes, where=file)
    with pytest.raises(ConfigError, match=message):
        parse(config, values)
