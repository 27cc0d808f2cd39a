"""What each stage trains, without data: its table of parameters, its loss, and the shapes of its batch.

Losses and batches are those of the stages; nothing is written a second time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import ConfigError
from llama_jax.data.loader import TokenBatch
from llama_jax.model import params as table
from llama_jax.model.config import ModelConfig, size
from llama_jax.model.params import Specs
from llama_jax.pretrain.base import StageConfig, check_length
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.reward.comparisons import ComparisonBatch
from llama_jax.reward.scorers import REWARD_MODELS
from llama_jax.reward.stage import reward_loss
from llama_jax.rlhf import grpo
from llama_jax.rlhf.dpo import dpo_loss, empty_batch
from llama_jax.rlhf.judge import empty_rollout
from llama_jax.rlhf.ppo import ppo_loss
from llama_jax.rlhf.reinforce import reward_models
from llama_jax.training.stage import Loss


@dataclasses.dataclass(frozen=True)
class StageShape:
    """The models, the loss and the batch of a stage.

    models: {name: table} of what is trained; the one model of most stages has the name "".
    heads: {name: head} of the same models.
    sequences, length: rows that each model reads a step, and their length.
    beside: {name: table} of models that lie in memory meanwhile, and that the step does not read.
    """

    models: dict[str, Specs]
    heads: dict[str, table.Head]
    loss: Loss
    batch: Any
    sequences: int
    length: int
    beside: dict[str, Specs] = dataclasses.field(default_factory=dict)


def model_of(config: StageConfig) -> ModelConfig:
    """The shape of a config's model, with its context."""
    model = size(config.model)
    return dataclasses.replace(model, max_length=config.context) if config.context else model


def stage_shape(config: StageConfig) -> StageShape:
    """That of a stage's config; ConfigError for rows that the stage itself would refuse."""
    return _SHAPES.get(config.stage, _language_model)(config, model_of(config))


def _language_model(config: Any, model: ModelConfig) -> StageShape:
    """Pretraining, and all that fine-tune a language model."""
    rows, length = config.loop.batch_size, getattr(config.data, "length", model.max_length)
    check_length(length, model)
    loss = language_model_loss(model, config.compute, z_loss=getattr(config, "z_loss", 0.0))
    return _single("lm_head", model, loss, _tokens(rows, length), rows, length)


def _reward(config: Any, model: ModelConfig) -> StageShape:
    rows, length = config.loop.batch_size, config.data.length  # the longest of its lengths, if it has several (data.buckets)
    check_length(length, model)
    loss = reward_loss(model, config.compute, safety_weight=config.safety_weight, center_weight=config.center_weight)
    return _single("reward_head", model, loss, _comparisons(rows, length), 2 * rows, length)


def _dpo(config: Any, model: ModelConfig) -> StageShape:
    rows, length = config.loop.batch_size, config.data.length
    check_length(length, model)
    batch = jax.eval_shape(lambda: empty_batch(rows, length))
    shape = _single("lm_head", model, dpo_loss(model, config.compute, config.dpo), batch, 2 * rows, length)
    reference = {} if config.lora.rank else {"reference": table.table(model, head="lm_head")}
    return dataclasses.replace(shape, beside=reference)


def _ppo(config: Any, model: ModelConfig) -> StageShape:
    rows, (prompt, new) = config.loop.batch_size, _answer(config, config.ppo, model)
    heads = {"policy": "lm_head", "critic": "value_head"}
    return StageShape(
        {name: table.table(model, head=head) for name, head in heads.items()}, heads,
        ppo_loss(model, config.compute, config.ppo), jax.eval_shape(lambda: empty_rollout(rows, prompt, new)),
        rows, prompt + new, _judges(config, model),
    )  # fmt: skip


def _grpo(config: Any, model: ModelConfig) -> StageShape:
    rows, (prompt, new) = config.loop.batch_size, _answer(config, config.grpo, model)
    beside = _judges(config, model)
    if not config.grpo.beta:  # no penalty, no reference
        beside.pop("reference", None)
    return StageShape(
        {"policy": table.table(model, head="lm_head")}, {"policy": "lm_head"},
        grpo.grpo_loss(model, config.compute, config.grpo), jax.eval_shape(lambda: grpo.empty_rollout(rows, prompt, new)),
        rows, prompt + new, beside,
    )  # fmt: skip


_SHAPES: dict[str, Callable[[Any, ModelConfig], StageShape]] = {"reward": _reward, "dpo": _dpo, "ppo": _ppo, "grpo": _grpo}


def _single(head: table.Head, model: ModelConfig, loss: Loss, batch: Any, sequences: int, length: int) -> StageShape:
    return StageShape({"": table.table(model, head=head)}, {"": head}, loss, batch, sequences, length)


def _answer(config: Any, settings: Any, model: ModelConfig) -> tuple[int, int]:
    """Tokens of a prompt, and of what is drawn after it."""
    prompt, new = config.data.prompt_length, settings.new_tokens
    if prompt + new > model.max_length:
        raise ConfigError(
            f"data.prompt_length={prompt} + {config.stage}.new_tokens={new} exceed the model's {model.max_length}"
        )
    return prompt, new


def _judges(config: Any, model: ModelConfig) -> dict[str, Specs]:
    """The frozen models of reinforcement learning (paper section 3.2.3), of the reward models those that the config names.

    Before they are trained it names none, and both are planned, unless it has other scorers alone. Adapters leave the policy's
    start as it is, and the critic's, which is the first reward model: those are not held twice.
    """
    heads: dict[str, table.Head] = {} if config.lora.rank else {"reference": "lm_head"}
    if REWARD_MODELS in config.reward.scorers:
        named = [*reward_models(config)] or ["helpfulness", "safety"]
        shared = 1 if config.lora.rank and config.stage == "ppo" else 0
        heads |= dict.fromkeys(named[shared:], "reward_head")
    return {name: table.table(model, head=head) for name, head in heads.items()}


def _tokens(rows: int, length: int) -> TokenBatch:
    ids, weights = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    return TokenBatch(tokens=ids, targets=ids, weights=weights, segment_ids=ids, positions=ids)


def _comparisons(pairs: int, length: int) -> ComparisonBatch:
    ids, number, degree, safe = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((pairs, 2, length), jnp.int32), ((pairs,), jnp.float32), ((pairs,), jnp.int32), ((pairs, 2), jnp.float32),
        )
    )  # fmt: skip
    return ComparisonBatch(
        tokens=ids, segment_ids=ids, margin=number, weight=number, degree=degree, safe=safe, safe_known=number
    )
