"""Rejection-sampling fine-tuning (paper section 3.2.3): K answers a prompt, the best by reward model, then fine-tuning as SFT.

All answers come from the policy at the start of the round. They are kept with their scores in `samples.jsonl`: a file that
is a pure function of the checkpoints and the config, written whole, from which the curve of Fig. 7 is drawn.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.dialog import decode_response, find_tag
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.pretrain.base import StageConfig, check_start, load_tokenizer
from llama_jax.reward.score import combined_reward, scorer
from llama_jax.rlhf.ppo import encode_prompts
from llama_jax.sampling.generate import generate, make_sampler
from llama_jax.sft.stage import SftData, fine_tuning_stage
from llama_jax.training.metrics import Progress
from llama_jax.training.stage import LoopConfig, Stage

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RejectionSettings:
    """One round. The paper gives no K; its figures use 10 to 100 answers a prompt."""

    prompts: str  # JSONL
    prompt_length: int
    max_prompts: int
    answers: int  # K
    new_tokens: int
    temperature: float
    sampling_batch: int
    safety_threshold: float = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectionConfig(StageConfig):
    """See configs/rejection.py. `policy` is sampled from; `start` is what is fine-tuned on its best answers.

    The paper restarts each round from the base model, with the SFT data in the mix (`data.train`); a distilled smaller
    model is a `start` of another size than `policy`'s.
    """

    data: SftData  # dialogs that the best answers are mixed with; may be empty
    rejection: RejectionSettings
    policy: str
    helpfulness: str
    safety: str
    epochs: float = 2.0


def score_responses(
    config: ModelConfig, compute: Compute, rewards: dict[str, Params], prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]], is_safety: Sequence[bool], *, length: int, batch_size: int, threshold: float,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Sigmoid scores of both reward models and the combined reward R_c of each (prompt, response). # -> float32 [n] each"""
    scores = {
        name: sigmoid_scores(config, compute, rewards[name], prompts, responses, length=length, batch_size=batch_size)
        for name in ("helpfulness", "safety")
    }
    combined = combined_reward(
        jnp.asarray(scores["helpfulness"]), jnp.asarray(scores["safety"]), jnp.asarray(is_safety, bool), threshold=threshold
    )
    return {**scores, "reward": np.asarray(combined)}


def sigmoid_scores(
    config: ModelConfig, compute: Compute, reward: Params, prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]], *, length: int, batch_size: int,
) -> np.ndarray:  # fmt: skip
    """Scores of one reward model, in (0, 1), of each (prompt, response). # -> float32 [n]

    Rows of similar length are scored together, in a third, two thirds or all of `length`: most are much shorter than that.
    """
    score = _jitted_scorer(config, compute)
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        width = next(w for w in (-(-length // 3), -(-2 * length // 3), length) if len(rows[part[-1]]) <= w or w == length)
        tokens = np.zeros((batch_size, width), np.int32)
        segment_ids = np.zeros_like(tokens)
        for row, i in enumerate(part):
            tokens[row, : len(rows[i])] = rows[i]
            segment_ids[row, : len(rows[i])] = 1
        scores[part] = np.asarray(jax.nn.sigmoid(score(reward, tokens, segment_ids)))[: len(part)]
    return scores


@functools.cache
def _jitted_scorer(config: ModelConfig, compute: Compute):
    return jax.jit(scorer(config, compute))


def best_dialogs(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best answer of each prompt as a dialog row. Answers that did not end or that hold a chat tag cannot win."""
    best: dict[int, dict[str, Any]] = {}
    for sample in samples:
        if not sample["ended"] or not sample["response"] or find_tag(sample["response"]):
            continue
        number = sample["prompt"]
        if number not in best or sample["reward"] > best[number]["reward"]:
            best[number] = sample
    return [
        {
            "messages": [*sample["messages"], {"role": "assistant", "content": sample["response"]}],
            "source": "rejection_sampling",
            "is_safety": sample["is_safety"],
        }
        for sample in best.values()
    ]


def choose_prompts(prompts: Sequence[T], limit: int, seed: int) -> list[T]:
    """A random choice of at most `limit` prompts: files are often sorted by kind, so the first ones would not do."""
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:limit]]


def draw_samples(config: RejectionConfig, mesh: Mesh) -> list[dict[str, Any]]:
    """K scored answers to every prompt, in prompt order."""
    model, tokenizer = load_tokenizer(config)
    for path in (config.policy, config.helpfulness, config.safety):
        check_start(path, model, tokenizer)
    settings = config.rejection
    prompts = choose_prompts(
        encode_prompts(settings.prompts, tokenizer, length=settings.prompt_length), settings.max_prompts, config.loop.seed
    )
    repeated = [(number, row, ids) for number, (row, ids) in enumerate(prompts) for _ in range(settings.answers)]
    lm, reward = table.table(model, head="lm_head"), table.table(model, head="reward_head")
    with jax.set_mesh(mesh):
        sampler = make_sampler(
            model, lm, compute=config.compute, eos_id=tokenizer.eos_id, max_new_tokens=settings.new_tokens,
            temperature=settings.temperature,
        )  # fmt: skip
        with Progress(len(repeated), "rejection: sampling", "answer", quiet=jax.process_index() > 0) as progress:
            responses = generate(
                sampler, restore_model(config.policy, lm, mesh), [ids for _, _, ids in repeated],
                prompt_length=settings.prompt_length, batch_size=settings.sampling_batch, seed=config.loop.seed,
                progress=progress.update,
            )  # fmt: skip
        scores = score_responses(
            model, config.compute,
            {
                "helpfulness": restore_model(config.helpfulness, reward, mesh),
                "safety": restore_model(config.safety, reward, mesh),
            },
            [ids for _, _, ids in repeated], responses, [row["is_safety"] for _, row, _ in repeated],
            length=settings.prompt_length + settings.new_tokens, batch_size=settings.sampling_batch,
            threshold=settings.safety_threshold,
        )  # fmt: skip
    samples = []
    for i, (number, row, _) in enumerate(repeated):
        text, ended = decode_response(responses[i], tokenizer)
        samples.append(
            {
                "prompt": number, "messages": row["messages"], "is_safety": row["is_safety"], "response": text,
                "ended": ended, **{name: float(values[i]) for name, values in scores.items()},
            }
        )  # fmt: skip
    return samples


def make_stage(config: RejectionConfig, mesh: Mesh, workdir: Path) -> tuple[Stage, LoopConfig]:
    """Draws the round's samples unless they are there, and makes the fine-tuning stage on the best of them."""
    if jax.process_count() > 1:
        raise ConfigError("rejection sampling draws its samples in one process so far; expected 1, got several")
    path = workdir / "samples.jsonl"
    if not path.exists():
        write_jsonl(path, draw_samples(config, mesh))
    best = best_dialogs([row for _, row in read_jsonl(path)])
    if not best and not config.data.train:
        raise ConfigError(f"{path}: no answer ended by itself, so there is nothing to fine-tune on")
    write_jsonl(workdir / "best.jsonl", best)
    train = (*config.data.train, *([str(workdir / "best.jsonl")] if best else []))
    data = dataclasses.replace(config.data, train=train)
    return fine_tuning_stage(config, data, mesh, workdir, name="rejection", epochs=config.epochs)
