"""The programs of each stage, lowered for a mesh without data: the train step as the loop runs it, and generation.

Nothing is re-implemented: losses, optimizer, step and sampler are those of the stages; only their arguments are abstract.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.loader import TokenBatch
from llama_jax.model import params as table
from llama_jax.model.config import ModelConfig, size
from llama_jax.parallel.axes import batch_shardings, batch_shards
from llama_jax.pretrain.base import StageConfig
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.reward.comparisons import ComparisonBatch
from llama_jax.reward.stage import reward_loss
from llama_jax.rlhf import grpo
from llama_jax.rlhf.dpo import dpo_loss, empty_batch
from llama_jax.rlhf.ppo import ppo_loss
from llama_jax.rlhf.rollout import empty_rollout
from llama_jax.sampling.generate import make_sampler
from llama_jax.training import optimizer
from llama_jax.training.state import abstract_state
from llama_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and what it does a call.

    trace: traces it for its mesh.
    tokens: tokens that it processes (or, in generation, draws).
    model_flops: operations that the model needs for them: no recomputation, attention to earlier tokens only.
    full_attention_flops: the same with attention counted to all tokens of a row, as some publish it.
    state: {name: tree of sharded ShapeDtypeStructs} of what stays on the devices between calls.
    """

    name: str
    trace: Callable[[], Any]
    mesh: Mesh
    tokens: int
    model_flops: int
    full_attention_flops: int
    state: dict[str, Any]


def train_program(config: StageConfig, mesh: Mesh) -> Program:
    """The train step of a stage's config."""
    model, rows = size(config.model), config.loop.batch_size
    shards = batch_shards(mesh) * config.loop.microbatches
    if rows % shards:
        raise ConfigError(
            f"loop.batch_size={rows} cannot be divided into {batch_shards(mesh)} shards of the mesh x "
            f"{config.loop.microbatches} microbatches"
        )
    compute = config.compute
    if config.lora.rank:
        raise ConfigError(f"config.lora.rank: plans are of whole models so far; expected 0, got {config.lora.rank}")
    if config.stage == "reward":
        specs, length, sequences = table.table(model, head="reward_head"), config.data.length, 2 * rows
        loss = reward_loss(model, compute, safety_weight=config.safety_weight)
        batch = _comparisons(rows, length, mesh)
        flops = _flops(model, sequences, length, "reward_head")
    elif config.stage == "dpo":  # beside it the frozen reference lies in memory, laid out as the parameters
        specs, length, sequences = table.table(model, head="lm_head"), config.data.length, 2 * rows
        loss = dpo_loss(model, compute, config.dpo)
        batch = _place(jax.eval_shape(lambda: empty_batch(rows, length)), mesh)
        flops = _flops(model, sequences, length, "lm_head")
    elif config.stage == "ppo":
        specs = {"policy": table.table(model, head="lm_head"), "critic": table.table(model, head="value_head")}
        length, sequences = config.data.prompt_length + config.ppo.new_tokens, rows
        loss = ppo_loss(model, compute, config.ppo)
        batch = _place(jax.eval_shape(lambda: empty_rollout(rows, config.data.prompt_length, config.ppo.new_tokens)), mesh)
        flops = tuple(
            map(sum, zip(_flops(model, rows, length, "lm_head"), _flops(model, rows, length, "value_head"), strict=True))
        )
    elif config.stage == "grpo":
        specs, sequences = {"policy": table.table(model, head="lm_head")}, rows
        length = config.data.prompt_length + config.grpo.new_tokens
        loss = grpo.grpo_loss(model, compute, config.grpo)
        empty = functools.partial(grpo.empty_rollout, rows, config.data.prompt_length, config.grpo.new_tokens)
        batch = _place(jax.eval_shape(empty), mesh)
        flops = _flops(model, rows, length, "lm_head")
    else:  # the stages that share the language-model loss
        length = getattr(config.data, "length", model.max_length)
        specs, sequences = table.table(model, head="lm_head"), rows
        loss = language_model_loss(model, compute)
        batch = _token_batch(rows, length, mesh)
        flops = _flops(model, rows, length, "lm_head")
    optim = optimizer.make(config.optim, steps=config.loop.steps, decay=table.decay_mask(specs))
    with jax.set_mesh(mesh):
        state = abstract_state(specs, optim, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(loss, optim, microbatches=config.loop.microbatches, layout=layout)

    parts = {"parameters": state.params, "optimizer": state.opt_state, "batch": batch}
    trace = functools.partial(step.trace, state, batch)
    return Program(f"{config.stage} step", trace, mesh, sequences * length, *flops, parts)


def rollout_program(config: StageConfig, mesh: Mesh) -> Program:
    """Generation of the rollout of a PPO or GRPO config, to the last of its new tokens."""
    if config.stage not in ("ppo", "grpo"):
        raise ConfigError(f"config.stage: a rollout is planned for ppo and grpo, got {config.stage!r}")
    model, settings = size(config.model), getattr(config, config.stage)
    rows = settings.rollout_size
    specs = table.table(model, head="lm_head")
    with jax.set_mesh(mesh):
        params = abstract_state(specs, optimizer.make(config.optim, steps=1, decay=table.decay_mask(specs)), mesh).params
    sample = make_sampler(
        model, specs, compute=config.compute, eos_id=2, max_new_tokens=settings.new_tokens, temperature=settings.temperature
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    prompt = (rows, config.data.prompt_length)
    arguments = _place((jax.ShapeDtypeStruct(prompt, jnp.int32), jax.ShapeDtypeStruct(prompt, bool), keys), mesh)

    # A third of what training needs: no backward pass.
    length = config.data.prompt_length + settings.new_tokens
    flops = tuple(n // 3 for n in _flops(model, rows, length, "lm_head"))
    trace = functools.partial(sample.trace, params, *arguments)
    state = {"parameters": params, "batch": arguments}
    return Program("rollout", trace, mesh, rows * settings.new_tokens, *flops, state)


def _flops(model: ModelConfig, sequences: int, length: int, head: str) -> tuple[int, int]:
    tokens = sequences * length
    causal = table.flops_per_token(model, length=length, head=head)
    full = causal + 6 * model.layers * model.heads * model.head_size * length
    return tokens * causal, tokens * full


def _place(tree: Any, mesh: Mesh) -> Any:
    """A batch's shapes with their layout."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, batch_shardings(tree, mesh)
    )


def _token_batch(rows: int, length: int, mesh: Mesh) -> TokenBatch:
    ids, weights = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    return _place(TokenBatch(tokens=ids, targets=ids, weights=weights, segment_ids=ids, positions=ids), mesh)


def _comparisons(pairs: int, length: int, mesh: Mesh) -> ComparisonBatch:
    ids, number, degree, safe = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((pairs, 2, length), jnp.int32), ((pairs,), jnp.float32), ((pairs,), jnp.int32), ((pairs, 2), jnp.float32),
        )
    )  # fmt: skip
    return _place(
        ComparisonBatch(
            tokens=ids, segment_ids=ids, margin=number, weight=number, degree=degree, safe=safe, safe_known=number
        ),
        mesh,
    )
