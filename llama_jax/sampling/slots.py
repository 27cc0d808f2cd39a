"""The device's side of the engine: the state of B slots, and the few programs that change it.

Every program has one static shape, takes the state and gives it back in the same buffers. Which request sits in which slot
is the host's affair (`engine.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llama_jax.model.cache import KVCache, empty_cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import Prepared, extend, logits
from llama_jax.parallel.axes import DECODE, ENTER, layout, partition
from llama_jax.sampling.choose import Choice, draw
from llama_jax.sampling.generate import mark_seen

STOPS = 8  # stop ids a request may have


@flax.struct.dataclass
class Slots:
    """B requests in progress. The newest token of a slot is not in the cache yet."""

    cache: KVCache
    token: jax.Array  # [B] int32: drawn last
    drawn: jax.Array  # [B] int32: how many were drawn
    limit: jax.Array  # [B] int32: how many may be
    active: jax.Array  # [B] bool: goes on drawing
    keys: jax.Array  # [B, ...] uint32: the data of each request's PRNG key
    choice: Choice  # [B] each
    stops: jax.Array  # [B, STOPS] int32, filled with -1
    seen: jax.Array  # [B, V] bool: for the repetition penalty; kept only for requests that have one


@flax.struct.dataclass
class Entries:
    """Pieces of G prompts on their way into slots; on the host, NumPy arrays."""

    rows: Any  # [G] int32: the slot; B where there is none
    tokens: Any  # [G, C] int32
    counts: Any  # [G] int32: how many of them are real
    starts: Any  # [G] int32: the position of the first
    final: Any  # [G] bool: the prompt ends here, so its first token is drawn
    limit: Any
    keys: Any
    choice: Choice
    stops: Any


@flax.struct.dataclass
class Drawn:
    """What a program drew."""

    tokens: jax.Array  # [B, N] int32
    log_probs: jax.Array  # [B, N] float32
    mask: jax.Array  # [B, N] bool
    active: jax.Array  # [B] bool: goes on


def empty_slots(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> Slots:
    """No request anywhere."""
    B = batch
    keys = jax.random.key_data(jax.vmap(jax.random.key)(jnp.zeros((B,), jnp.uint32)))
    return Slots(
        cache=empty_cache(config, batch=B, slots=slots, dtype=dtype),
        token=jnp.zeros((B,), jnp.int32), drawn=jnp.zeros((B,), jnp.int32), limit=jnp.zeros((B,), jnp.int32),
        active=jnp.zeros((B,), bool), keys=keys, choice=Choice().rows(B), stops=jnp.full((B, STOPS), -1, jnp.int32),
        seen=jnp.zeros((B, config.vocab_size), bool),
    )  # fmt: skip


def shardings(slots: Slots, mesh: jax.sharding.Mesh) -> Any:
    """Where the state lies: rows over the devices of the batch, key-value heads as in attention. # tree like Slots"""

    def of(path, leaf):
        in_cache = path[0].name == "cache" and leaf.ndim == 4
        axes = ("cache_rows", "act_kv_heads", None, None) if in_cache else ("cache_rows", *[None] * (leaf.ndim - 1))
        return NamedSharding(mesh, partition(leaf.shape, axes, DECODE, mesh))

    return jax.tree_util.tree_map_with_path(of, slots)


def make_admit(config: ModelConfig, *, compute: Compute) -> Callable[[Prepared, Slots, Entries], tuple[Slots, Drawn]]:
    """(weights, slots, entries) -> (slots, first tokens of the prompts that are complete [G, 1])."""

    def admit(weights, slots, entries):
        with layout(ENTER):
            cache = slots.cache
            cache = cache.replace(lengths=cache.lengths.at[entries.rows].set(entries.starts, mode="drop"))
            hidden, cache = extend(
                weights, entries.tokens, entries.counts, cache, config=config, compute=compute, rows=entries.rows
            )
            last = jnp.take_along_axis(hidden, jnp.maximum(entries.counts - 1, 0)[:, None, None], axis=1)[:, 0]
            seen = slots.seen[entries.rows]
            token, log_p = _draw(weights, last, entries.keys, 0, entries.choice, seen, compute)
            active = entries.final & (entries.limit > 1) & ~_stops(token, entries.stops)

            def put(old, new):
                return old.at[entries.rows].set(new, mode="drop")

            rows = jnp.arange(len(token))
            marked = seen.at[rows, token].set(seen[rows, token] | entries.final)
            slots = Slots(
                cache=cache, token=put(slots.token, token), drawn=put(slots.drawn, jnp.ones_like(token)),
                limit=put(slots.limit, entries.limit), active=put(slots.active, active),
                keys=put(slots.keys, entries.keys), choice=jax.tree.map(put, slots.choice, entries.choice),
                stops=put(slots.stops, entries.stops), seen=put(slots.seen, marked),
            )  # fmt: skip
            drawn = Drawn(tokens=token[:, None], log_probs=log_p[:, None], mask=entries.final[:, None], active=active)
            return slots, drawn

    return admit


def make_decode(
    config: ModelConfig, *, compute: Compute, steps: int
) -> Callable[[Prepared, Slots, jax.Array, jax.Array], tuple[Slots, Drawn]]:
    """(weights, slots, most, until) -> (slots, drawn [B, steps]).

    Draws up to `most` <= `steps` tokens a slot; stops early once at most `until` slots are active.
    """

    def decode(weights, slots, most, until):
        B = slots.token.shape[0]

        def unfinished(carry):
            n, slots, _ = carry
            left = jnp.sum(slots.active)
            return (n < most) & (left > jnp.where(n == 0, 0, until))

        def step(carry):
            n, slots, out = carry
            hidden, cache = extend(
                weights, slots.token[:, None], slots.active.astype(jnp.int32), slots.cache, config=config, compute=compute
            )
            token, log_p = _draw(weights, hidden[:, 0], slots.keys, slots.drawn, slots.choice, slots.seen, compute)
            active = slots.active & (slots.drawn + 1 < slots.limit) & ~_stops(token, slots.stops)
            out = Drawn(
                tokens=out.tokens.at[:, n].set(token), log_probs=out.log_probs.at[:, n].set(log_p),
                mask=out.mask.at[:, n].set(slots.active), active=active,
            )  # fmt: skip
            slots = slots.replace(
                cache=cache, token=jnp.where(slots.active, token, slots.token), drawn=slots.drawn + slots.active,
                active=active, seen=mark_seen(slots.seen, token[:, None], slots.active[:, None]),
            )  # fmt: skip
            return n + 1, slots, out

        with layout(DECODE):
            out = Drawn(
                tokens=jnp.zeros((B, steps), jnp.int32), log_probs=jnp.zeros((B, steps)),
                mask=jnp.zeros((B, steps), bool), active=slots.active,
            )  # fmt: skip
            _, slots, out = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), slots, out))
            return slots, out

    return decode


def copy_rows(slots: Slots, sources: jax.Array, rows: jax.Array) -> Slots:
    """Copies the cache of some slots into others; rows outside are dropped. # int32 [G] x 2"""
    cache = slots.cache
    put = functools.partial(jax.tree.map, lambda x: x.at[rows].set(x[sources], mode="drop"))
    return slots.replace(cache=cache.replace(keys=put(cache.keys), values=put(cache.values)))


def set_seen(slots: Slots, row: jax.Array, tokens: jax.Array, count: jax.Array) -> Slots:
    """Makes a slot's set of seen tokens that of a prompt. # int32 [], [S], []"""
    fresh = mark_seen(jnp.zeros((1, slots.seen.shape[1]), bool), tokens[None], (jnp.arange(len(tokens)) < count)[None])
    return slots.replace(seen=slots.seen.at[row].set(fresh[0]))


def deactivate(slots: Slots, rows: jax.Array) -> Slots:
    """Cancels slots. # bool [B]"""
    return slots.replace(active=slots.active & ~rows)


def _draw(weights, hidden, keys, n, choice, seen, compute):
    """The n-th token of each row, as `generate.make_sampler` draws it."""
    n = jnp.broadcast_to(n, keys.shape[:1])
    step_keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), n)
    return draw(logits(weights, hidden, compute=compute), step_keys, choice, seen=seen)


def _stops(token: jax.Array, stops: jax.Array) -> jax.Array:
    return jnp.any(token[:, None] == stops, axis=1)
