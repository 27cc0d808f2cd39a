"""The heads: next-token logits, and the scalar head of reward models and critics (paper section 3.2.2).

Training never holds the logits of a whole batch. `token_losses` computes the vocabulary projection, its softmax and its
gradient chunk by chunk, once: since a loss is a weighted sum over tokens, the gradient of each chunk is known (up to the
scalar cotangent) as soon as its logits are.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.model.config import Compute
from llama_jax.model.layers import contract, einsum
from llama_jax.model.params import Params
from llama_jax.parallel.axes import constrain, shards_of


def vocabulary_kernel(params: Params) -> jax.Array:
    """The output matrix; the transposed embedding in models that tie them. # [D, V]"""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["trunk"]["embedding"].T


def logits(params: Params, hidden: jax.Array, *, compute: Compute) -> jax.Array:
    """Next-token logits. # [B, T, D] -> float32 [B, T, V]"""
    with jax.named_scope("lm_head"):
        out = contract("btd,dv->btv", hidden, vocabulary_kernel(params), compute.matmul_dtype)
        return constrain(out, "batch", "length", "act_vocab")


def scores(params: Params, hidden: jax.Array, *, head: str) -> jax.Array:
    """One number a token from the scalar head, in float32. # [B, T, D] -> float32 [B, T]"""
    with jax.named_scope(head):
        return einsum("btd,d->bt", hidden.astype(jnp.float32), params[head]["kernel"].astype(jnp.float32))


def token_losses(
    params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array, *, compute: Compute, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of -log p(target), and the weighted number of targets that are the most likely token.

    Args:
      hidden: # [B, T, D]
      targets: # int32 [B, T]
      weights: # float32 [B, T]
      z_loss: adds this times the square of each token's log normaliser, which keeps logits from drifting (PaLM, section 5).

    Returns:
      two float32 scalars; the second carries no gradient.
    """
    T = targets.shape[1] // shards_of("length")
    if T % compute.loss_chunks:
        raise ValueError(f"compute.loss_chunks={compute.loss_chunks} does not divide the row length {T} of a device")
    with jax.named_scope("token_losses"):
        return _token_losses(
            vocabulary_kernel(params), hidden, targets, weights, compute.matmul_dtype, compute.loss_chunks, z_loss
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _token_losses(kernel, hidden, targets, weights, dtype, chunks, z_loss):
    def step(sums, chunk):
        return jax.tree.map(jnp.add, sums, _chunk_losses(kernel, *chunk, dtype, z_loss)[0]), None

    sums, _ = jax.lax.scan(step, (jnp.zeros(()), jnp.zeros(())), _split((hidden, targets, weights), chunks))
    return sums


def _chunk_losses(kernel, hidden, targets, weights, dtype, z_loss):
    scores = contract("btd,dv->btv", hidden, kernel, dtype)
    scores = constrain(scores, "batch", "length", "act_vocab")
    log_normaliser = jax.nn.logsumexp(scores, axis=-1)
    if shards_of("act_vocab") == 1:
        target_scores = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    else:  # a sum over the vocabulary needs no device to hold all of it
        target_scores = jnp.sum(jnp.where(_at(targets, scores), scores, 0), axis=-1)
    losses = log_normaliser - target_scores
    if z_loss:
        losses += z_loss * jnp.square(log_normaliser)
    loss = jnp.sum(weights * losses)
    hits = jnp.sum(weights * (target_scores >= jnp.max(scores, axis=-1)))
    return (loss, hits), (scores, log_normaliser)


def _token_losses_forward(kernel, hidden, targets, weights, dtype, chunks, z_loss):
    small_kernel = kernel.astype(dtype)

    def step(carry, chunk):
        sums, d_kernel = carry
        h, t, w = chunk
        new_sums, (scores, log_normaliser) = _chunk_losses(small_kernel, h, t, w, dtype, z_loss)
        p = jnp.exp(scores - log_normaliser[..., None])
        if z_loss:
            p *= 1 + 2 * z_loss * log_normaliser[..., None]
        d_scores = ((p - _at(t, scores)) * w[..., None]).astype(dtype)
        d_hidden = einsum("btv,dv->btd", d_scores, small_kernel)
        d_kernel += einsum("btd,btv->dv", h.astype(dtype), d_scores)
        return (jax.tree.map(jnp.add, sums, new_sums), d_kernel), d_hidden.astype(h.dtype)

    zero = (jnp.zeros(()), jnp.zeros(())), jnp.zeros(kernel.shape, jnp.float32)
    (sums, d_kernel), d_hidden = jax.lax.scan(step, zero, _split((hidden, targets, weights), chunks))
    return sums, (d_kernel.astype(kernel.dtype), _join(d_hidden))


def _token_losses_backward(dtype, chunks, z_loss, residuals, cotangents):
    d_kernel, d_hidden = residuals
    cotangent = cotangents[0]
    return (d_kernel * cotangent).astype(d_kernel.dtype), (d_hidden * cotangent).astype(d_hidden.dtype), None, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _at(targets, scores):
    """True at the target of each token. # [B, T], [B, T, V] -> bool [B, T, V]"""
    return jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2) == targets[..., None]


def _split(arrays, chunks):
    """Cuts the length into chunks and brings them to the front. # [B, T, ...] -> [C, B, T/C, ...]

    Where devices divide the length, each chunk takes a part of every device's piece.
    """
    pieces = shards_of("length")

    def cut(x):
        B, T = x.shape[:2]
        x = x.reshape(B, pieces, chunks, T // chunks // pieces, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0).reshape(chunks, B, T // chunks, *x.shape[4:])

    return jax.tree.map(cut, arrays)


def _join(x):
    """Undoes `_split`. # [C, B, T/C, ...] -> [B, T, ...]"""
    pieces, (C, B, t) = shards_of("length"), x.shape[:3]
    x = x.reshape(C, B, pieces, t // pieces, *x.shape[3:])
    return jnp.moveaxis(x, 0, 2).reshape(B, C * t, *x.shape[4:])


def log_probabilities(
    params: Params, hidden: jax.Array, targets: jax.Array, *, temperature: float | jax.Array = 1.0, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """log p(target) and the entropy of each position's distribution, at a sampling temperature. # -> 2 x float32 [B, T]

    RLHF uses it in the sampler's, the trainer's and the reference's role alike, with the same temperature. The entropy is a
    measurement and carries no gradient. The backward pass computes the scores again chunk by chunk, so it holds
    [B, T / loss_chunks, V] as well; a single chunk it keeps.
    """
    with jax.named_scope("log_probabilities"):
        chunks = compute.loss_chunks if targets.shape[1] // shards_of("length") % compute.loss_chunks == 0 else 1
        return _log_probabilities(
            vocabulary_kernel(params), hidden, targets, temperature, compute.matmul_dtype, chunks
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _log_probabilities(kernel, hidden, targets, temperature, dtype, chunks):
    return _log_probabilities_forward(kernel, hidden, targets, temperature, dtype, chunks)[0]


def _chunk_scores(kernel, hidden, temperature, dtype):
    scores = contract("btd,dv->btv", hidden, kernel, dtype) / temperature
    return constrain(scores, "batch", "length", "act_vocab")


def _log_probabilities_forward(kernel, hidden, targets, temperature, dtype, chunks):
    def step(carry, chunk):
        h, t = chunk
        scores = _chunk_scores(kernel, h, temperature, dtype)
        log_normaliser = jax.nn.logsumexp(scores, axis=-1)
        if shards_of("act_vocab") == 1:
            chosen = jnp.take_along_axis(scores, t[..., None], axis=-1)[..., 0]
        else:  # a sum over the vocabulary needs no device to hold all of it
            chosen = jnp.sum(jnp.where(_at(t, scores), scores, 0), axis=-1)
        mean = jnp.sum(jnp.exp(scores - log_normaliser[..., None]) * scores, axis=-1)
        saved = scores if chunks == 1 else None
        return carry, (chosen - log_normaliser, log_normaliser - mean, log_normaliser, saved)

    _, (log_p, entropy, log_normaliser, saved) = jax.lax.scan(step, None, _split((hidden, targets), chunks))
    residuals = (kernel, hidden, targets, temperature, log_normaliser, saved)
    return (_join(log_p), _join(entropy)), residuals


def _log_probabilities_backward(dtype, chunks, residuals, cotangents):
    kernel, hidden, targets, temperature, log_normaliser, saved = residuals
    small_kernel = kernel.astype(dtype)

    def step(d_kernel, chunk):
        (h, t, g), normaliser, scores = chunk
        scores = _chunk_scores(kernel, h, temperature, dtype) if scores is None else scores
        p = jnp.exp(scores - normaliser[..., None])
        d_scores = ((_at(t, scores) - p) * (g / temperature)[..., None]).astype(dtype)
        d_hidden = einsum("btv,dv->btd", d_scores, small_kernel)
        d_kernel += einsum("btd,btv->dv", h.astype(dtype), d_scores)
        return d_kernel, d_hidden.astype(h.dtype)

    parts = (_split((hidden, targets, cotangents[0]), chunks), log_normaliser, saved)
    d_kernel, d_hidden = jax.lax.scan(step, jnp.zeros(kernel.shape, jnp.float32), parts)
    return d_kernel.astype(kernel.dtype), _join(d_hidden), None, None


_log_probabilities.defvjp(_log_probabilities_forward, _log_probabilities_backward)
