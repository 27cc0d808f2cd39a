"""The programs of each stage, lowered for a mesh without data: the train step as the loop runs it, and generation.

Nothing is re-implemented: losses, optimizer, step and sampler are those of the stages, and so are the checks of what does not
divide; only their arguments are abstract.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.config import ConfigError
from llama_jax.model import params as table
from llama_jax.model.decode import Prepared, axes_of, prepare
from llama_jax.model.decode_attention import round_up
from llama_jax.model.lora import divide
from llama_jax.model.params import Specs
from llama_jax.parallel.axes import DECODE, abstract, batch_shardings, is_spec, partition, row_share
from llama_jax.planning.stages import StageShape, model_of, stage_shape
from llama_jax.pretrain.base import StageConfig
from llama_jax.rlhf.rollout import check_size, draws_in_slots, on_mesh
from llama_jax.sampling import slots as device
from llama_jax.sampling.answers import answering
from llama_jax.sampling.generate import make_sampler
from llama_jax.training import optimizer
from llama_jax.training.state import TrainState, abstract_state, overlay
from llama_jax.training.step import check_batch, make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and what it does a call.

    trace: traces it for its mesh.
    rows: of its batch.
    tokens: tokens that it processes (or, in generation, draws).
    model_flops: operations that the model needs for them: no recomputation, attention to earlier tokens only.
    full_attention_flops: the same with attention counted to all tokens of a row, as some publish it.
    state: {name: tree of sharded ShapeDtypeStructs} of what stays on the devices between calls.
    beside: the same of what lies on the devices too, and is no part of the program.
    trips: how often its loop runs at most, if it has one that may end early; 0: it has none.
    """

    name: str
    trace: Callable[[], Any]
    mesh: Mesh
    rows: int
    tokens: int
    model_flops: int
    full_attention_flops: int
    state: dict[str, Any]
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)
    trips: int = 0


def train_program(config: StageConfig, mesh: Mesh) -> Program:
    """The train step of a stage's config; with adapters (`config.lora`), the step that trains them."""
    _check(config, mesh)
    shape = stage_shape(config)
    optim, state, frozen = _abstract(config, shape, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(shape.loss, optim, microbatches=config.loop.microbatches, layout=layout)
    batch = _place(shape.batch, mesh)
    flops = [_flops(config, shape.sequences, shape.length, head) for head in shape.heads.values()]
    parts = {"parameters": state.params, "optimizer": state.opt_state, "frozen": frozen, "batch": batch}
    return Program(
        f"{config.stage} step", functools.partial(step.trace, state, batch, frozen, optim.schedule), mesh,
        config.loop.batch_size, shape.sequences * shape.length, *map(sum, zip(*flops, strict=True)), _filled(parts),
        abstract(shape.beside, mesh),
    )  # fmt: skip


def rollout_program(config: StageConfig, mesh: Mesh) -> Program:
    """Generation of a PPO or GRPO config: of the whole rollout to the last of its new tokens; or (`sampling_batch`) what the
    host asks of the engine at a time, with every slot at work."""
    settings = _rolls_out(config)
    if settings is None:
        raise ConfigError(f"config.stage: a rollout is planned for ppo and grpo, got {config.stage!r}")
    settings = on_mesh(settings, mesh)
    _check(config, mesh)
    shape = stage_shape(config)
    _, state, frozen = _abstract(config, shape, mesh)
    others = {name: overlay(state.params[name], frozen.get(name, {})) for name in state.params}
    others |= {"optimizer": state.opt_state, **abstract(shape.beside, mesh)}
    policy = others.pop("policy")
    if draws_in_slots(settings):
        return _slots_program(config, settings, mesh, policy, shape.models["policy"], others)
    rows, length = settings.rollout_size, config.data.prompt_length + settings.new_tokens
    sample = make_sampler(
        model_of(config), shape.models["policy"], compute=config.compute, eos_id=2, max_new_tokens=settings.new_tokens,
        temperature=settings.temperature,
    )  # fmt: skip
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    prompt = (rows, config.data.prompt_length)
    arguments = _place((jax.ShapeDtypeStruct(prompt, jnp.int32), jax.ShapeDtypeStruct(prompt, bool), keys), mesh)
    return Program(
        "rollout", functools.partial(sample.trace, policy, *arguments), mesh, rows, rows * settings.new_tokens,
        *_flops(config, rows, length, "lm_head", backward=False), {"parameters": policy, "batch": arguments}, others,
        trips=settings.new_tokens - 1,
    )  # fmt: skip


def _slots_program(
    config: StageConfig, settings: Any, mesh: Mesh, policy: Any, specs: Specs, others: dict[str, Any]
) -> Program:
    """The engine's decoding steps between two looks of the host, beside a group of prompts that wait for slots."""
    model, compute, N = model_of(config), config.compute, settings.new_tokens
    engine = answering(config.data.prompt_length, N, slots=settings.sampling_batch, mesh=mesh)
    length, group = engine.whole[-1]

    def of(batch: int, slots: int) -> device.Slots:
        make = functools.partial(
            device.empty_slots, model, batch=batch, slots=slots, stops=engine.stops, dtype=compute.activation_dtype
        )
        shapes = jax.eval_shape(make)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes,
            device.shardings(shapes, mesh),
        )  # fmt: skip

    with jax.set_mesh(mesh):  # a TPU has a layout of its own
        weights, prompts = _prepared(policy, config, specs, mesh), of(group, length).cache
        slots = of(engine.slots, round_up(engine.max_length))
        decode = device.programs(model, compute, engine, mesh).decode
    whole = engine.max_length
    flops = (flops * engine.steps // whole for flops in _flops(config, engine.slots, whole, "lm_head", backward=False))
    decode = functools.partial(decode.trace, weights, slots, np.int32(engine.steps), np.int32(0), np.bool_(False))
    return Program(
        f"rollout, {engine.slots} slots", decode, mesh, engine.slots, engine.slots * engine.steps, *flops,
        {"weights": weights, "slots": slots}, {"parameters": policy, "prompts": prompts, **others}, trips=engine.steps,
    )  # fmt: skip


def _check(config: StageConfig, mesh: Mesh) -> None:
    """ConfigError, or ValueError, for what the stage itself could not divide over the mesh and its hosts."""
    check_batch(config.loop, mesh)
    row_share(mesh)
    if (settings := _rolls_out(config)) is not None:
        check_size(settings.rollout_size, config.loop.batch_size, mesh)


def _rolls_out(config: StageConfig) -> Any | None:
    """The algorithm's numbers of a stage that learns from its own answers."""
    return getattr(config, config.stage) if config.stage in ("ppo", "grpo") else None


def _prepared(params: Any, config: StageConfig, specs: Specs, mesh: Mesh) -> Prepared:
    """What `prepare` makes of parameters, as shapes with the layout that it gives them."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(prepare, specs=specs, compute=config.compute), params)

    def place(x: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition(x.shape, names, DECODE, mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, axes_of(shapes, specs))


def _abstract(config: StageConfig, shape: StageShape, mesh: Mesh) -> tuple[Any, TrainState, Any]:
    """(optimizer, state of what is trained, what is frozen) of a stage; the arrays as shapes with their layout."""
    divided = {name: divide(specs, config.lora) for name, specs in shape.models.items()}
    trained, frozen = ({name: parts[i] for name, parts in divided.items()} for i in (0, 1))
    if "" in divided:  # one model, which the stage's loss takes without a name
        trained, frozen = trained[""], frozen[""]
    steps = config.loop.steps or config.optim.warmup + 1000  # of so many epochs; an argument of the program, and not in it
    optim = optimizer.make(config.optim, steps=steps, decay=table.decay_mask(trained))
    with jax.set_mesh(mesh):
        return optim, abstract_state(trained, optim, mesh), abstract(_filled(frozen), mesh)


def _filled(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in parts.items() if jax.tree.leaves(tree, is_leaf=is_spec)}


def _flops(config: StageConfig, sequences: int, length: int, head: table.Head, *, backward: bool = True) -> tuple[int, int]:
    """(with causal attention, with full attention): operations that the model needs for so many rows."""
    model, tokens = model_of(config), sequences * length
    attention = 6 * model.layers * model.heads * model.head_size * length
    causal = table.flops_per_token(model, length=length, head=head)
    full = causal + attention
    if not backward:
        return tokens * causal // 3, tokens * full // 3
    if config.lora.rank:  # the matrices that are kept need no gradients of their own: a third less
        specs = table.table(model, head=head)
        trained, _ = divide(specs, config.lora)
        adapters = table.count(trained["lora"])
        kept = table.flops_per_token(model, length=0, head=head) // 6 - table.count(trained) + adapters
        causal, full = (flops - 2 * kept + 6 * adapters for flops in (causal, full))
    return tokens * causal, tokens * full


def _place(tree: Any, mesh: Mesh) -> Any:
    """A batch's shapes with their layout."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, batch_shardings(tree, mesh)
    )
