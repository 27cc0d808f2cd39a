"""What tests/benchmarks/ppo.py compares itself with: the same PPO iterations by the trainer of TRL 0.24.

Runs by itself in an environment of its own, since TRL 0.24 needs an older transformers than our tests do, and shares with
ppo.py only the numbers of its command line:

    python3.11 -m venv /tmp/trl && /tmp/trl/bin/pip install "trl==0.24.0" "transformers<5" "torch==2.13.0" accelerate datasets
    python tests/benchmarks/ppo.py --trl=/tmp/trl/bin/python

Prints one line of JSON: the versions and the seconds of each iteration after the first.
"""

import argparse
import json
import os
import tempfile
import time

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)


class Clock(TrainerCallback):
    """The time at the end of each iteration."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prompts", "prompt_length", "new_tokens", "vocab_size", "layers", "width", "heads", "ffn", "iterations"):
        parser.add_argument(f"--{name}", type=int, required=True)
    wanted = parser.parse_args()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=wanted.vocab_size, hidden_size=wanted.width, num_hidden_layers=wanted.layers,
        num_attention_heads=wanted.heads, intermediate_size=wanted.ffn, tie_word_embeddings=False,
        max_position_embeddings=wanted.prompt_length + wanted.new_tokens,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1, use_cache=True,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    drawn = torch.randint(3, wanted.vocab_size, (64, wanted.prompt_length))
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = trl.PPOTrainer(
            args=trl.PPOConfig(
                output_dir=directory, per_device_train_batch_size=wanted.prompts, gradient_accumulation_steps=1,
                total_episodes=wanted.prompts * (wanted.iterations + 1), num_ppo_epochs=1, num_mini_batches=1,
                response_length=wanted.new_tokens, local_rollout_forward_batch_size=wanted.prompts, temperature=1.0,
                num_sample_generations=0, learning_rate=1e-5, kl_coef=0.01, lam=0.95, missing_eos_penalty=1.0,
                report_to="none", save_strategy="no", bf16=False, fp16=False, disable_tqdm=True, use_cpu=True,
            ),
            processing_class=tokenizer,
            model=LlamaForCausalLM(shape),
            ref_model=LlamaForCausalLM(shape),
            reward_model=LlamaForSequenceClassification(shape),
            value_model=LlamaForSequenceClassification(shape),
            train_dataset=Dataset.from_dict({"input_ids": drawn.tolist()}),
            eval_dataset=Dataset.from_dict({"input_ids": drawn[:16].tolist()}),
            data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:])]
    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads(), "seconds": seconds}))


if __name__ == "__main__":
    main()
