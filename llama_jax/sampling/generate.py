"""Batched generation with a KV cache, one compiled program per batch shape (paper section 3.2.3, "FSDP ... generation").

Prompts are left-padded, so that all rows decode in step. Weights are cast and laid out for decoding once a call, not once
a token: with the training layout, generation made the paper's PPO about 20x slower.
"""

import functools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model import heads
from llama_jax.model.cache import empty_cache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params, Specs
from llama_jax.model.transformer import extend
from llama_jax.parallel.axes import DECODE, is_spec, layout, partition
from llama_jax.sampling.choose import draw


@flax.struct.dataclass
class Samples:
    """Generated rows. A row's response is its tokens up to and including the first EOS, or all of them."""

    tokens: jax.Array  # [B, N] int32; 0 after the end
    log_probs: jax.Array  # [B, N] float32, of the distribution drawn from; 0 after the end
    mask: jax.Array  # [B, N] bool: belongs to the response
    ended: jax.Array  # [B] bool: EOS was drawn


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


def row_keys(seed: int, indices: Sequence[int]) -> jax.Array:
    """One key for each row, from its index in the whole job: batching does not change what is drawn. # [B]"""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(indices, jnp.uint32))


def decode_layout(params: Params, specs: Specs, *, compute: Compute) -> Params:
    """The parameters as generation reads them: in the matmul type, gathered over fsdp, still split over tensor."""
    mesh = jax.sharding.get_abstract_mesh()

    def place(spec, x):
        if x.ndim > 1:
            x = x.astype(compute.matmul_dtype)
        if mesh.empty or mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, partition(spec.shape, spec.axes, DECODE, mesh))

    return jax.tree.map(place, specs, {name: params[name] for name in specs}, is_leaf=is_spec)


def make_sampler(
    config: ModelConfig, specs: Specs, *, compute: Compute, eos_id: int, max_new_tokens: int, temperature: float,
    top_p: float = 1.0,
) -> Callable[[Params, jax.Array, jax.Array, jax.Array], Samples]:  # fmt: skip
    """A jitted (params, tokens [B, P], valid [B, P], keys [B]) -> Samples.

    The loop ends as soon as every row has drawn EOS. Each position's draw uses the row's key folded with the position, so
    a longer `max_new_tokens` continues the same draws.
    """
    N = max_new_tokens

    @jax.jit
    def sample(params: Params, tokens: jax.Array, valid: jax.Array, keys: jax.Array) -> Samples:
        with layout(DECODE):
            B, P = tokens.shape
            fast = decode_layout(params, specs, compute=compute)
            cache = empty_cache(config, batch=B, slots=P + N, dtype=compute.activation_dtype)
            positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
            lengths = jnp.sum(valid, axis=1)
            hidden, cache = extend(fast, tokens, valid, positions, cache, config=config, compute=compute)
            last = heads.logits(fast, hidden[:, -1:], compute=compute)[:, 0]

            def choose(logits, n, ended):
                step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, n)
                token, log_p = draw(logits, step_keys, temperature=temperature, top_p=top_p)
                return jnp.where(ended, 0, token), jnp.where(ended, 0.0, log_p)

            def unfinished(carry):
                return (carry[0] < N) & ~jnp.all(carry[1])

            def step(carry):
                n, ended, logits, cache, out = carry
                token, log_p = choose(logits, n, ended)
                out = Samples(
                    tokens=out.tokens.at[:, n].set(token),
                    log_probs=out.log_probs.at[:, n].set(log_p),
                    mask=out.mask.at[:, n].set(~ended),
                    ended=ended | (token == eos_id),
                )
                hidden, cache = extend(
                    fast, token[:, None], ~ended[:, None], (lengths + n)[:, None], cache, config=config, compute=compute
                )
                return n + 1, out.ended, heads.logits(fast, hidden, compute=compute)[:, 0], cache, out

            empty = Samples(
                tokens=jnp.zeros((B, N), jnp.int32),
                log_probs=jnp.zeros((B, N), jnp.float32),
                mask=jnp.zeros((B, N), bool),
                ended=jnp.zeros((B,), bool),
            )
            start = (jnp.zeros((), jnp.int32), empty.ended, last, cache, empty)
            return jax.lax.while_loop(unfinished, step, start)[-1]

    return sample


def generate(
    sampler: Callable[..., Samples], params: Params, prompts: Sequence[Sequence[int]], *, prompt_length: int,
    batch_size: int, seed: int, progress: Callable[[int], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Responses (ids, with EOS where it was drawn) to any number of prompts, in batches of one shape.

    Row i's draws depend on (seed, i) only. The last batch is filled with copies of its first prompt. Prompts of similar
    length are not grouped: `prompt_length` is one shape for all, so that nothing is compiled twice.
    """
    responses: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        filled = part + part[:1] * (batch_size - len(part))
        tokens, valid = pad_left(filled, prompt_length)
        keys = row_keys(seed, range(start, start + batch_size))
        samples = jax.device_get(sampler(params, tokens, valid, keys))
        for row in range(len(part)):
            responses.append(samples.tokens[row][samples.mask[row]].tolist())
        if progress:
            progress(len(part))
    return responses
