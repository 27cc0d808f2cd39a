"""How the next token is drawn from logits: greedy, temperature, top-k, nucleus, min-p, penalties of what came before.

The paper samples with temperature and nucleus (section 3.2.3; reference `generation.py`); the others are what users of
language models expect. Each row has settings of its own, as arrays: one compiled program serves all of them.
"""

import dataclasses
import numbers
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.parallel.axes import shards_of

_REMOVED = -1e30
_LARGEST = float(np.finfo(np.float32).max)
_BLOCK = 128  # tokens


@flax.struct.dataclass
class Choice:
    """How each row's next token is drawn; every field is a number for all rows, or one for each. # [] or [B]

    They apply in this order, as in Hugging Face's library and vLLM: penalties, temperature, top-k, top-p, min-p.
    """

    temperature: jax.Array | float = 1.0  # 0 takes the most likely token
    top_k: jax.Array | int = 0  # keep the k most likely; 0: all
    top_p: jax.Array | float = 1.0  # keep the fewest tokens that hold this mass; 1: all
    min_p: jax.Array | float = 0.0  # keep tokens at least this likely relative to the most likely one
    repetition_penalty: jax.Array | float = 1.0  # tokens seen before: positive logits divided by it, others multiplied
    presence_penalty: jax.Array | float = 0.0  # taken from the logits of tokens drawn before, as in OpenAI's API
    frequency_penalty: jax.Array | float = 0.0  # the same, times how often each was drawn

    def check(self) -> "Choice":
        """Itself, if the settings (of one request, on the host) make sense; ValueError with field and range otherwise."""
        for name, fine, expected in (
            ("temperature", lambda x: x >= 0, "at least 0"),
            ("top_k", lambda x: 0 <= x < 2**31 and x == int(x), f"an integer in 0..{2**31 - 1}"),
            ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "0 to 1"),
            ("repetition_penalty", lambda x: x > 0, "above 0"),
            ("presence_penalty", lambda x: -2 <= x <= 2, "-2 to 2"),
            ("frequency_penalty", lambda x: -2 <= x <= 2, "-2 to 2"),
        ):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not abs(value) <= _LARGEST:  # nor NaN
                raise ValueError(f"{name}: expected a finite number, {expected}, got {value!r}")
            if not fine(value):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        return self

    @property
    def penalises(self) -> jax.Array | bool:
        """Which rows are drawn otherwise because of what came before."""
        return (self.repetition_penalty != 1) | (self.presence_penalty != 0) | (self.frequency_penalty != 0)

    def rows(self, batch: int) -> "Choice":
        """The settings as arrays, one entry a row. # [B] each"""
        return Choice(**{
            name: jnp.broadcast_to(jnp.asarray(getattr(self, name), dtype), (batch,)) for name, dtype in _TYPES.items()
        })

    @classmethod
    def empty(cls, batch: int) -> "Choice":
        """Settings on the host that change nothing, to be written over. # [B] each"""
        return cls(**{field.name: np.full((batch,), field.default, _TYPES[field.name]) for field in dataclasses.fields(cls)})


_TYPES = {field.name: np.int32 if field.name == "top_k" else np.float32 for field in dataclasses.fields(Choice)}


@flax.struct.dataclass
class Draw:
    """The next token of each row."""

    tokens: jax.Array  # [B] int32
    # [B] float32, under the distribution it was drawn from; of a greedy row, that of temperature 1
    log_probs: jax.Array
    model_log_probs: jax.Array  # [B] float32, under the model's own, without temperature, filters and penalties


def draw(logits: jax.Array, keys: jax.Array, choice: Choice, *, counts: jax.Array | None = None) -> Draw:
    """The next token of each row.

    Args:
      logits: # float32 [B, V]
      keys: one PRNG key a row, so that a row's draws do not depend on its neighbours. # [B]
      choice: the settings. RLHF needs the whole distribution, so its rollouts leave all filters off.
      counts: what the penalties know (`count_prompt`); without it there are none. # int32 [B, V]
    """
    c, own = choice.rows(len(logits)), logits
    if counts is not None:
        logits = _if_any(choice.penalises, lambda x: penalise(x, counts, c), logits)
    greedy = c.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, c.temperature)[:, None]
    scaled = _if_any(choice.top_k > 0, lambda x: top_k_filter(x, c.top_k), scaled)
    scaled = _if_any(choice.top_p < 1, lambda x: top_p_filter(x, c.top_p), scaled)
    scaled = _if_any(choice.min_p > 0, lambda x: min_p_filter(x, c.min_p), scaled)

    tokens, log_normaliser = inverse_draw(scaled, jax.vmap(jax.random.uniform)(keys))
    tokens = _if_any(choice.temperature <= 0, lambda t: jnp.where(greedy, _first_argmax(scaled), t), tokens)
    log_probs = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - log_normaliser
    return Draw(tokens, log_probs, _if_any(_changes(choice), lambda _: _log_probs_of(tokens, own), log_probs))


def _changes(choice: Choice) -> jax.Array | bool:
    """Which rows are drawn from another distribution than the model's."""
    warm = (choice.temperature != 1) & (choice.temperature != 0)
    filtered = (choice.top_k > 0) | (choice.top_p < 1) | (choice.min_p > 0)
    return warm | filtered | choice.penalises


def _log_probs_of(tokens: jax.Array, logits: jax.Array) -> jax.Array:
    """# int32 [B], float32 [B, V] -> float32 [B]"""
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)


def inverse_draw(logits: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tokens at which the cumulative probability reaches 1 - `uniform`, and log sum exp. # [B, V], [B] in [0, 1) -> [B] x 2

    One random number a row instead of one a token: with 32,000 tokens, noise for the Gumbel trick takes ten times as long as
    the softmax. The sum runs over blocks first and then inside one, which also rounds less than one long sum.
    """
    B, V = logits.shape
    pieces = shards_of("act_vocab")  # each device sums up its own part of the vocabulary
    pieces = pieces if V % pieces == 0 else 1
    top = jnp.max(logits, axis=-1)
    mass = jnp.exp(logits - top[:, None]).reshape(B, pieces, V // pieces)
    mass = jnp.pad(mass, ((0, 0), (0, 0), (0, -(V // pieces) % _BLOCK)))
    padded = mass.shape[2]
    mass = mass.reshape(B, pieces * padded // _BLOCK, _BLOCK)
    blocks = jnp.cumsum(jnp.sum(mass, axis=-1), axis=-1)
    total = blocks[:, -1]
    # In (0, total], so the first sum that reaches it ends with a token that has some mass.
    target = ((1 - uniform) * total)[:, None]
    block = jnp.sum(blocks < target, axis=-1, keepdims=True)
    before = jnp.where(block > 0, jnp.take_along_axis(blocks, jnp.maximum(block - 1, 0), axis=-1), 0)
    if pieces == 1:
        inside = jnp.take_along_axis(mass, block[..., None], axis=1)[:, 0]
    else:  # a sum over the blocks needs no device to hold all of them
        inside = jnp.sum(jnp.where(jnp.arange(mass.shape[1])[:, None] == block[..., None], mass, 0), axis=1)
    inside = jnp.cumsum(inside, axis=-1)
    # Rounded otherwise than the blocks' sums, the target may lie behind the block's end.
    rest = jnp.minimum(target - before, inside[:, -1:])
    place = block[:, 0] * _BLOCK + jnp.sum(inside < rest, axis=-1)
    tokens = place // padded * (V // pieces) + place % padded
    return tokens.astype(jnp.int32), top + jnp.log(total)


def count_prompt(counts: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """Counts of 1 for the tokens of prompts, where valid, in place of 0. # int32 [B, V], int32 [B, T], bool [B, T] -> [B, V]"""
    V = counts.shape[1]
    return jax.vmap(lambda row, ids: row.at[ids].max(1, mode="drop"))(counts, jnp.where(valid, tokens, V))


def count_drawn(counts: jax.Array, tokens: jax.Array, active: jax.Array) -> jax.Array:
    """Adds 2 to the count of each row's newest token, if the row is active. # int32 [B, V], [B], bool [B] -> [B, V]"""
    # Row by row, so that no device needs to look at another's rows.
    return jax.vmap(lambda row, token, more: row.at[token].add(more))(counts, tokens, 2 * active.astype(counts.dtype))


def penalise(logits: jax.Array, counts: jax.Array, choice: Choice) -> jax.Array:
    """Lowers the logits of tokens that came before. # float32 [B, V], int32 [B, V], [B] each

    Repetition (Keskar et al. 2019, with the sign rule of later code) looks at prompt and answer, presence and frequency at the
    answer alone.
    """
    repetition, presence, frequency = (
        x[:, None] for x in (choice.repetition_penalty, choice.presence_penalty, choice.frequency_penalty)
    )
    lowered = jnp.where(logits > 0, logits / repetition, logits * repetition)
    drawn = counts >> 1
    return jnp.where(counts > 0, lowered, logits) - frequency * drawn - presence * (drawn > 0)


def top_k_filter(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Removes all but the k most likely tokens (and those as likely as the k-th); k = 0 removes none. # [B, V], [B]"""
    ranks = _ranks(logits)
    border = _border(ranks, jnp.ones_like(logits), top_k - 1.0)
    return jnp.where((ranks < border) & (top_k > 0)[:, None], _REMOVED, logits)


def top_p_filter(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Removes the tail: tokens for which the mass of all likelier ones already exceeds `top_p`. # [B, V], [B]

    The token that crosses the border stays, so at least one always does; equally likely tokens stay or go together.
    """
    ranks = _ranks(logits)
    border = _border(ranks, jax.nn.softmax(logits, axis=-1), top_p)
    return jnp.where((ranks < border) & (top_p < 1)[:, None], _REMOVED, logits)


def min_p_filter(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Removes tokens less likely than `min_p` times the most likely one. # [B, V], [B]"""
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(logits < floor, _REMOVED, logits)


def _if_any(wanted: jax.Array | bool, change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`change(x)` where some row wants it; the work is not done otherwise, nor compiled if that is known beforehand."""
    if isinstance(wanted, bool):
        return change(x) if wanted else x
    return jax.lax.cond(jnp.any(wanted), change, lambda x: x, x)


def _ranks(x: jax.Array) -> jax.Array:
    """Integers in the order of finite float32 numbers. # float32 -> int32"""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)  # + 0.0 makes -0.0 and 0.0 one number
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _border(ranks: jax.Array, weights: jax.Array, budget: jax.Array) -> jax.Array:
    """The smallest rank above which lies at most `budget` of the weight, by bisection. # [B, V] x 2, [B] -> [B, 1]

    32 passes over the row take a fiftieth of the time of sorting it on a CPU, and need no second array of its size.
    """

    def halve(_, bounds):
        low, high = bounds  # the border lies in (low, high]
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        fits = jnp.sum(jnp.where(ranks > middle, weights, 0.0), axis=-1, keepdims=True) <= budget[:, None]
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    high = jnp.max(ranks, axis=-1, keepdims=True)
    low = jnp.min(ranks, axis=-1, keepdims=True) - 1
    return jax.lax.fori_loop(0, 32, halve, (low, high))[1]


def _first_argmax(x: jax.Array) -> jax.Array:
    """argmax over the last axis as two plain reductions: XLA's CPU backend takes nine times as long over its own. # [B]"""
    V = x.shape[-1]
    at_top = jnp.where(x >= jnp.max(x, axis=-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
    return jnp.min(at_top, axis=-1)
