"""The device's side of the engine: the state of B slots, and the few programs that change it.

Every program has one static shape, takes the state and gives it back in the same buffers. Which request sits in which slot
is the host's affair (`engine.py`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.model.cache import KVCache, empty_cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import Prepared, extend, logits, prefill
from llama_jax.model.decode_attention import round_up
from llama_jax.parallel.axes import DECODE, ENTER, batch_shards, layout, partition
from llama_jax.sampling.choose import Choice, Draw, count_drawn, count_prompt, draw
from llama_jax.sampling.request import EngineConfig, Request


@flax.struct.dataclass
class Slots:
    """B requests in progress. The newest token of a slot is not in the cache yet."""

    cache: KVCache
    token: jax.Array  # [B] int32: drawn last, or the prompt's last
    drawn: jax.Array  # [B] int32: how many were drawn
    limit: jax.Array  # [B] int32: how many may be
    active: jax.Array  # [B] bool: goes on drawing
    keys: jax.Array  # [B, ...] uint32: the data of each request's PRNG key
    choice: Choice  # [B] each
    stops: jax.Array  # [B, EngineConfig.stops] int32, filled with -1
    seen: jax.Array  # [B, V] int32: what `penalise` counts; right only for requests that have a penalty


@flax.struct.dataclass
class Pieces:
    """Pieces of G prompts; on the host, NumPy arrays."""

    rows: Any  # [G] int32: the slot; B where there is none
    tokens: Any  # [G, C] int32
    counts: Any  # [G] int32: how many of them are real
    starts: Any  # [G] int32: the position of the first


@flax.struct.dataclass
class Seats:
    """Requests whose prompts are in the cache, on their way into slots; on the host, NumPy arrays."""

    rows: Any  # [M] int32: the slot; B where there is none
    token: Any  # [M] int32: the prompt's last
    lengths: Any  # [M] int32: its tokens in the cache, all but that one
    limit: Any
    keys: Any
    choice: Choice
    stops: Any


@flax.struct.dataclass
class Drawn:
    """What a program drew."""

    tokens: jax.Array  # [B, N] int32
    log_probs: jax.Array  # [B, N] float32, of the distribution drawn from
    model_log_probs: jax.Array  # [B, N] float32, of the model's own
    mask: jax.Array  # [B, N] bool
    active: jax.Array  # [B] bool: goes on
    likely_tokens: jax.Array  # [B, N, A] int32: the most likely ones, where some request asked for them
    likely_log_probs: jax.Array  # [B, N, A] float32: the model's own


# ---- on the host ----


def pieces(group: Sequence[Request], shape: tuple[int, int], *, nowhere: int) -> Pieces:
    """The next piece of each prompt. Rows that none needs lie at `nowhere`, outside the slots."""
    C, G = shape
    made = Pieces(
        rows=np.full((G,), nowhere, np.int32), tokens=np.zeros((G, C), np.int32), counts=np.zeros((G,), np.int32),
        starts=np.zeros((G,), np.int32),
    )  # fmt: skip
    for i, request in enumerate(group):
        piece = request.prompt[request.filled : min(request.filled + C, len(request.prompt) - 1)]
        made.rows[i], made.counts[i], made.starts[i] = request.slot, len(piece), request.filled
        made.tokens[i, : len(piece)] = piece
    return made


def seats(group: Sequence[Request], size: int, *, nowhere: int, key_shape: tuple[int, ...], stops: int) -> Seats:
    """What slots need to know of at most `size` requests."""
    M = size
    made = Seats(
        rows=np.full((M,), nowhere, np.int32), token=np.zeros((M,), np.int32), lengths=np.zeros((M,), np.int32),
        limit=np.zeros((M,), np.int32), keys=np.zeros((M, *key_shape), np.uint32),
        choice=Choice.empty(M), stops=np.full((M, stops), -1, np.int32),
    )  # fmt: skip
    for i, request in enumerate(group):
        made.rows[i], made.token[i], made.lengths[i] = request.slot, request.prompt[-1], len(request.prompt) - 1
        made.limit[i], made.keys[i] = request.max_tokens, request.key
        made.stops[i, : len(request.stop_ids)] = request.stop_ids
        for field in dataclasses.fields(Choice):
            getattr(made.choice, field.name)[i] = getattr(request.choice, field.name)
    return made


# ---- on the device ----


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of an engine's shapes."""

    empty: Callable[..., Slots]
    fill: Callable[..., KVCache]
    take: Callable[..., Slots]
    extend: Callable[..., Slots]
    copy: Callable[..., Slots]
    sit: Callable[..., Slots]
    decode: Callable[..., tuple[Slots, Drawn]]
    set_seen: Callable[..., Slots]
    deactivate: Callable[..., Slots]

    @property
    def compilations(self) -> int:
        """How many were compiled so far, each shape counted."""
        return sum(getattr(self, field.name)._cache_size() for field in dataclasses.fields(self))


@functools.lru_cache(maxsize=16)
def programs(config: ModelConfig, compute: Compute, settings: EngineConfig, mesh: Mesh) -> Programs:
    """The programs, the same ones for every engine of these shapes: a second policy compiles nothing."""
    dtype = jnp.dtype("int8") if settings.int8_cache else compute.activation_dtype

    def empty():
        slots = round_up(settings.max_length)
        return empty_slots(config, batch=settings.slots, slots=slots, stops=settings.stops, dtype=dtype)

    # Without fixed layouts of its state, a program would be compiled again for what another one returned. What was drawn is
    # whole on every device, so that each of several hosts can read it.
    own = None if mesh.empty else shardings(jax.eval_shape(empty), mesh)
    whole = None if mesh.empty else NamedSharding(mesh, PartitionSpec())

    def program(function, out=own, **options):
        # A function of its own: jit shares what it compiled among those of one function.
        return jax.jit(functools.wraps(function)(lambda *args: function(*args)), out_shardings=out, **options)

    return Programs(
        empty=program(empty),
        fill=program(make_fill(config, compute=compute, dtype=dtype), None),
        take=program(take_rows, donate_argnums=0),
        extend=program(make_extend(config, compute=compute), donate_argnums=1),
        copy=program(copy_rows, donate_argnums=0),
        sit=program(sit, donate_argnums=0),
        decode=program(
            make_decode(config, compute=compute, steps=settings.steps, alternatives=settings.alternatives), (own, whole),
            donate_argnums=1,
        ),
        set_seen=program(set_seen, donate_argnums=0),
        deactivate=program(deactivate, donate_argnums=0),
    )


def empty_slots(config: ModelConfig, *, batch: int, slots: int, stops: int, dtype: jnp.dtype) -> Slots:
    """No request anywhere."""
    B = batch
    keys = jax.random.key_data(jax.vmap(jax.random.key)(jnp.zeros((B,), jnp.uint32)))
    return Slots(
        cache=empty_cache(config, batch=B, slots=slots, dtype=dtype),
        token=jnp.zeros((B,), jnp.int32), drawn=jnp.zeros((B,), jnp.int32), limit=jnp.zeros((B,), jnp.int32),
        active=jnp.zeros((B,), bool), keys=keys, choice=Choice().rows(B), stops=jnp.full((B, stops), -1, jnp.int32),
        seen=jnp.zeros((B, config.vocab_size), jnp.int32),
    )  # fmt: skip


def shardings(slots: Slots, mesh: Mesh) -> Any:
    """Where the state lies: rows over the devices of the batch, key-value heads as in attention, what was seen as logits do, if
    their devices divide it. # tree like Slots"""
    seen = "act_vocab" if slots.seen.shape[1] % mesh.shape[DECODE["act_vocab"]] == 0 else None

    def of(path, leaf):
        heads = ["act_kv_heads"] if path[0].name == "cache" and leaf.ndim > 1 else []
        axes = ("cache_rows", *heads, *[None] * (leaf.ndim - 1 - len(heads)))
        if path[0].name == "seen":
            axes = ("cache_rows", seen)
        return NamedSharding(mesh, partition(leaf.shape, axes, DECODE, mesh))

    return jax.tree_util.tree_map_with_path(of, slots)


def make_fill(
    config: ModelConfig, *, compute: Compute, dtype: jnp.dtype
) -> Callable[[Prepared, jax.Array, jax.Array], KVCache]:
    """(weights, whole prompts [G, C], their lengths [G]) -> their cache of C slots."""

    def fill(weights, tokens, lengths):
        mesh = jax.sharding.get_abstract_mesh()
        split = mesh.empty or tokens.shape[0] % batch_shards(mesh) == 0
        with layout(DECODE if split else {**ENTER, "cache_rows": None}):
            cache = empty_cache(config, batch=tokens.shape[0], slots=tokens.shape[1], dtype=dtype)
            return prefill(weights, tokens, lengths, cache, config=config, compute=compute)[1]

    return fill


def take_rows(slots: Slots, filled: KVCache, sources: jax.Array, rows: jax.Array) -> Slots:
    """Copies rows of a cache of C slots each into the beginning of some slots; rows outside are dropped. # int32 [M] x 2"""

    def put(x, new):
        # Axes are [B, K, E, S], [B, K, S, E] or [B, K, S]: the one in which the two differ is S.
        part = tuple(slice(0, size) for size in new.shape[1:])
        return x.at[(rows, *part)].set(new[sources], mode="drop")

    with layout(DECODE):
        cache = slots.cache
        return slots.replace(cache=cache.replace(layers=jax.tree.map(put, cache.layers, filled.layers)))


def make_extend(config: ModelConfig, *, compute: Compute) -> Callable[[Prepared, Slots, Pieces], Slots]:
    """(weights, slots, pieces of prompts) -> slots with them in the cache."""

    def run(weights, slots, pieces):
        with layout(ENTER):
            cache = slots.cache
            cache = cache.replace(lengths=cache.lengths.at[pieces.rows].set(pieces.starts, mode="drop"))
            _, cache = extend(
                weights, pieces.tokens, pieces.counts, cache, config=config, compute=compute, rows=pieces.rows
            )
            return slots.replace(cache=cache)

    return run


def sit(slots: Slots, seats: Seats) -> Slots:
    """Starts requests whose prompts are in the cache of their slots."""

    def put(old, new):
        return old.at[seats.rows].set(new, mode="drop")

    return slots.replace(
        cache=slots.cache.replace(lengths=put(slots.cache.lengths, seats.lengths)),
        token=put(slots.token, seats.token), drawn=put(slots.drawn, 0), limit=put(slots.limit, seats.limit),
        active=put(slots.active, True), keys=put(slots.keys, seats.keys),
        choice=jax.tree.map(put, slots.choice, seats.choice), stops=put(slots.stops, seats.stops),
    )  # fmt: skip


def make_decode(
    config: ModelConfig, *, compute: Compute, steps: int, alternatives: int
) -> Callable[[Prepared, Slots, jax.Array, jax.Array, jax.Array], tuple[Slots, Drawn]]:
    """(weights, slots, most, until, tell) -> (slots, drawn [B, steps]).

    Draws up to `most` <= `steps` tokens a slot; stops early once at most `until` slots are active. Where `tell` is true, the
    most likely tokens come with what was drawn.
    """
    A = alternatives

    def likely(scores):
        log_probs, tokens = jax.lax.top_k(jax.nn.log_softmax(scores), A)
        return tokens, log_probs

    def decode(weights, slots, most, until, tell):
        B = slots.token.shape[0]
        unknown = jnp.zeros((B, A), jnp.int32), jnp.zeros((B, A))

        def unfinished(carry):
            n, slots, _ = carry
            left = jnp.sum(slots.active)
            return (n < most) & (left > jnp.where(n == 0, 0, until))

        def step(carry):
            n, slots, out = carry
            hidden, cache = extend(
                weights, slots.token[:, None], slots.active.astype(jnp.int32), slots.cache, config=config, compute=compute
            )
            scores = logits(weights, hidden[:, 0], compute=compute)
            new = _draw(scores, slots)
            token = new.tokens
            tokens, log_probs = jax.lax.cond(tell, likely, lambda _: unknown, scores) if A else unknown
            active = slots.active & (slots.drawn + 1 < slots.limit) & ~_stops(token, slots.stops)
            out = Drawn(
                tokens=out.tokens.at[:, n].set(token), log_probs=out.log_probs.at[:, n].set(new.log_probs),
                model_log_probs=out.model_log_probs.at[:, n].set(new.model_log_probs),
                mask=out.mask.at[:, n].set(slots.active), active=active,
                likely_tokens=out.likely_tokens.at[:, n].set(tokens),
                likely_log_probs=out.likely_log_probs.at[:, n].set(log_probs),
            )  # fmt: skip
            slots = slots.replace(
                cache=cache, token=jnp.where(slots.active, token, slots.token), drawn=slots.drawn + slots.active,
                active=active, seen=count_drawn(slots.seen, token, slots.active),
            )  # fmt: skip
            return n + 1, slots, out

        with layout(DECODE):
            out = Drawn(
                tokens=jnp.zeros((B, steps), jnp.int32), log_probs=jnp.zeros((B, steps)),
                model_log_probs=jnp.zeros((B, steps)), mask=jnp.zeros((B, steps), bool), active=slots.active,
                likely_tokens=jnp.zeros((B, steps, A), jnp.int32), likely_log_probs=jnp.zeros((B, steps, A)),
            )  # fmt: skip
            _, slots, out = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), slots, out))
            return slots, out

    return decode


def copy_rows(slots: Slots, sources: jax.Array, rows: jax.Array) -> Slots:
    """Copies the cache of some slots into others; rows outside are dropped. # int32 [G] x 2"""
    cache = slots.cache
    layers = jax.tree.map(lambda x: x.at[rows].set(x[sources], mode="drop"), cache.layers)
    return slots.replace(cache=cache.replace(layers=layers))


def set_seen(slots: Slots, row: jax.Array, tokens: jax.Array, count: jax.Array) -> Slots:
    """Makes what a slot has seen a prompt. # int32 [], [S], []"""
    fresh = count_prompt(jnp.zeros_like(slots.seen[:1]), tokens[None], (jnp.arange(len(tokens)) < count)[None])
    return slots.replace(seen=slots.seen.at[row].set(fresh[0]))


def deactivate(slots: Slots, rows: jax.Array) -> Slots:
    """Cancels slots. # bool [B]"""
    return slots.replace(active=slots.active & ~rows)


def _draw(scores: jax.Array, slots: Slots) -> Draw:
    """The next token of each row, as `generate.make_sampler` draws it. # float32 [B, V]"""
    step_keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(slots.keys), slots.drawn)
    return draw(scores, step_keys, slots.choice, counts=slots.seen)


def _stops(token: jax.Array, stops: jax.Array) -> jax.Array:
    return jnp.any(token[:, None] == stops, axis=1)
