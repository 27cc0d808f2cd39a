"""Batched generation with a KV cache, one compiled program per batch shape (paper section 3.2.3, "FSDP ... generation").

Weights are cast and laid out for decoding once a call, not once a token: with the training layout, generation made the
paper's PPO about 20x slower. Prompts come left-padded, as RLHF keeps them, so that all responses begin in one column; inside,
every row's first token stands in slot 0 of the cache.
"""

import operator
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model.cache import empty_cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import Prepared, extend, logits, prefill, prepare
from llama_jax.model.decode_attention import round_up
from llama_jax.model.params import Params, Specs
from llama_jax.parallel.axes import DECODE, layout
from llama_jax.parallel.hosts import on_every_host
from llama_jax.sampling.choose import Choice, count_drawn, count_prompt, draw
from llama_jax.sampling.keys import row_keys


@flax.struct.dataclass
class Samples:
    """Generated rows. A row's response is its tokens up to and including the first EOS (or other stop), or all of them."""

    tokens: jax.Array  # [B, N] int32; 0 after the end
    log_probs: jax.Array  # [B, N] float32, of the distribution drawn from; 0 after the end
    mask: jax.Array  # [B, N] bool: belongs to the response
    ended: jax.Array  # [B] bool: EOS (or another stop) was drawn


def pad_left(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of at most `length` ids as right-aligned rows, and where they are real. # int32 [B, P], bool [B, P]"""
    tokens = np.zeros((len(prompts), length), np.int32)
    valid = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= length:
            raise ValueError(f"prompt {row}: expected 1 to {length} tokens, got {len(prompt)}")
        tokens[row, length - len(prompt) :] = prompt
        valid[row, length - len(prompt) :] = True
    return tokens, valid


def align_left(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Left-padded rows with their padding moved behind. # int32 [B, P], [B] -> [B, P]"""
    P = tokens.shape[1]
    source = (jnp.arange(P) + P - lengths[:, None]) % P
    return jnp.take_along_axis(tokens, source, axis=1)


def make_sampler(
    config: ModelConfig, specs: Specs, *, compute: Compute, eos_id: int, max_new_tokens: int, temperature: float,
    top_p: float = 1.0, stop_ids: Sequence[int] = (),
) -> Callable[..., Samples]:  # fmt: skip
    """A jitted (params, tokens [B, P], valid [B, P], keys [B], choice=None, limit=None) -> Samples.

    Weights that `model.decode.prepare` laid out beforehand may stand in the place of `params`: one model that is asked again
    and again. A policy in training is laid out at each call.

    `choice` gives rows settings of their own in place of `temperature` and `top_p`; after `limit` tokens, an integer that is
    part of no program, the loop ends before `max_new_tokens`. A row ends with EOS or one of
    `stop_ids`; the loop ends as soon as every row has. Each position's draw uses the row's key folded with the position, so
    a longer `max_new_tokens` continues the same draws. What a row draws depends on nothing but its prompt, key and settings:
    bitwise for one batch shape, up to the rounding of the matrix products between shapes.
    """
    N, uniform, stops = max_new_tokens, Choice(temperature=temperature, top_p=top_p), np.array([eos_id, *stop_ids], np.int32)

    @jax.jit
    def sample(
        params: Params | Prepared, tokens: jax.Array, valid: jax.Array, keys: jax.Array, choice: Choice | None = None,
        limit: jax.Array | None = None,
    ) -> Samples:  # fmt: skip
        with layout(DECODE):
            B, P = tokens.shape
            weights = prepare(params, specs, compute=compute) if "trunk" in params else params
            cache = empty_cache(config, batch=B, slots=round_up(P + N - 1), dtype=compute.activation_dtype)
            lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
            hidden, cache = prefill(weights, align_left(tokens, lengths), lengths, cache, config=config, compute=compute)
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

            def choose(out, n, hidden, counts):
                step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, n)
                new = draw(logits(weights, hidden, compute=compute), step_keys, choice or uniform, counts=counts)
                ended = out.ended
                return Samples(
                    tokens=out.tokens.at[:, n].set(jnp.where(ended, 0, new.tokens)),
                    log_probs=out.log_probs.at[:, n].set(jnp.where(ended, 0.0, new.log_probs)),
                    mask=out.mask.at[:, n].set(~ended),
                    ended=ended | jnp.any(new.tokens[:, None] == stops, axis=1),
                )

            def unfinished(carry):
                n, out, _, _ = carry
                return (n < (N if limit is None else jnp.minimum(limit, N))) & ~jnp.all(out.ended)

            def step(carry):
                n, out, cache, counts = carry
                token = jax.lax.dynamic_index_in_dim(out.tokens, n - 1, axis=1)
                hidden, cache = extend(
                    weights, token, jnp.where(out.ended, 0, 1), cache, config=config, compute=compute
                )
                counts = None if counts is None else count_drawn(counts, token[:, 0], ~out.ended)
                return n + 1, choose(out, n, hidden[:, 0], counts), cache, counts

            out = Samples(
                tokens=jnp.zeros((B, N), jnp.int32),
                log_probs=jnp.zeros((B, N), jnp.float32),
                mask=jnp.zeros((B, N), bool),
                ended=jnp.zeros((B,), bool),
            )
            # Only rows with settings of their own can have penalties.
            counts = None if choice is None else count_prompt(jnp.zeros((B, config.vocab_size), jnp.int32), tokens, valid)
            start = (jnp.ones((), jnp.int32), choose(out, 0, last, counts), cache, counts)
            return jax.lax.while_loop(unfinished, step, start)[1]

    return sample


def generate(
    sampler: Callable[..., Samples], params: Params | Prepared, prompts: Sequence[Sequence[int]], *, prompt_length: int,
    batch_size: int, seed: int, choice: Choice | None = None, progress: Callable[[int], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Responses (ids, with EOS where it was drawn) to any number of prompts, in batches of one shape.

    Row i's draws depend on (seed, i) only; `choice` has an entry for each row. The last batch
    is filled with copies of its first prompt. Prompts of similar length are not grouped: `prompt_length` is one shape for all,
    so that nothing is compiled twice. On several hosts every one calls this with the same arguments and gets all responses.
    """
    responses: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        rows = [start + row if row < len(part) else start for row in range(batch_size)]
        tokens, valid = pad_left([prompts[row] for row in rows], prompt_length)
        own = {} if choice is None else {"choice": jax.tree.map(operator.itemgetter(rows), choice)}
        samples = on_every_host(sampler(params, tokens, valid, row_keys(seed, rows), **own))
        for row in range(len(part)):
            responses.append(samples.tokens[row][samples.mask[row]].tolist())
        if progress:
            progress(len(part))
    return responses
