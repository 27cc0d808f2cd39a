"""Attention of packed rows on any mesh: local, as a ring over the `sequence` axis, or by exchanging heads for length.

One `jax.shard_map` island holds all three, because the kernels inside (see `Kernel`) are not for the compiler to divide.

The ring (Liu et al., 2023, arXiv 2310.01889): each device keeps its queries; keys and values travel from neighbour to
neighbour, and the partial results are merged by their normalisers (online softmax). The backward pass sends the keys and
values around once more, with their gradients behind them. Nothing larger than a block is ever held.

Under the causal mask contiguous pieces would leave the first device idle most of the time. `ring_order` therefore gives
device i of n the half-pieces i and 2n - 1 - i ("zig-zag"): every device then has two full half-blocks of work at every step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.parallel.axes import current_rules, partition

Method = Literal["ring", "all_to_all"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How one device computes attention of T queries on S keys, forward and backward.

    forward: (query [B, H, T, E], key [B, K, S, E], value [B, K, S, E], query_segments [B, T], key_segments [B, S], causal)
      -> (out float32 [B, H, T, E], normaliser float32 [B, H, T]). The query is already scaled; a query sees the keys of its own
      segment, and with `causal` (T = S) those up to its own index. The normaliser is log sum exp of the scores; a query that
      sees nothing has one below -1e29, and any finite out.
    backward: the same arguments, with (out, normaliser, d_out) before `causal` -> (d_query, d_key, d_value) in float32. `out`
      and `normaliser` may be those of more keys than the ones given: each block's share of the gradient follows from them.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def sharded_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, *, kernel: Kernel, method: Method
) -> jax.Array:
    """Causal attention within segments under the mesh of `jax.set_mesh`; without a mesh, on one device.

    With `method="ring"` and a divided length the rows must be in `ring_order`.

    Args:
      query: already scaled. # [B, T, H, E]
      key, value: # [B, T, K, E]
      segment_ids: # int32 [B, T]

    Returns:
      [B, T, H, E] in the type of the query; added up in float32
    """
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))  # head-major, as kernels want it
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.moveaxis(_ring(kernel, None, 1, query, key, value, segment_ids), 1, 2)
    rules = current_rules()
    q_spec = partition(query.shape, ("batch", "act_heads", "length", None), rules, mesh)
    kv_spec = partition(key.shape, ("batch", "act_kv_heads", "length", None), rules, mesh)
    ids_spec = partition(segment_ids.shape, ("batch", "length"), rules, mesh)
    axis, heads_axis = rules["length"], rules["act_heads"]
    n = mesh.shape[axis] if axis else 1
    replicated = kv_spec[1] is None and mesh.shape[heads_axis] > 1
    H, K, T = query.shape[1], key.shape[1], query.shape[2]
    if method == "ring" and T % (2 * n if n > 1 else 1):
        raise ValueError(f"ring attention cuts a row into 2 x {n} pieces, which does not divide its length {T}")

    def island(q, k, v, ids):
        if replicated:
            k, v = (_own_heads(x, heads_axis, heads=q.shape[1], group=H // K) for x in (k, v))
        if n > 1 and method == "all_to_all":
            return _all_to_all_attention(kernel, axis, n, q, k, v, ids)
        return _ring(kernel, axis, n, q, k, v, ids)

    # Kernels in Pallas do not tell along which axes their results vary, hence no check of it.
    attention = jax.shard_map(island, in_specs=(q_spec, kv_spec, kv_spec, ids_spec), out_specs=q_spec, check_vma=False)
    return jnp.moveaxis(attention(query, key, value, segment_ids), 1, 2)


def _own_heads(x: jax.Array, axis: str, *, heads: int, group: int) -> jax.Array:
    """Of key-value heads that every device holds, those that this device's `heads` query heads read. # [B, K, S, E]"""
    if group % heads and heads % group:
        raise ValueError(f"{heads} query heads a device share key-value heads in groups of {group}: neither divides the other")
    first = jax.lax.axis_index(axis) * heads // group
    return jax.lax.dynamic_slice_in_dim(x, first, max(heads // group, 1), axis=1)


# ---- the ring ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(kernel: Kernel, axis: str | None, n: int, q, k, v, ids):
    return _ring_forward(kernel, axis, n, q, k, v, ids)[0]


def _ring_forward(kernel, axis, n, q, k, v, ids):
    out, normaliser = kernel.forward(q, k, v, ids, ids, causal=True)  # the own block: zig-zag order is causal within it
    if n > 1:
        me = jax.lax.axis_index(axis)
        q_low, q_high = _halves(q, 2)
        ids_low, ids_high = _halves(ids, 1)

        def step(results, block, distance):
            k, v, block_ids = block
            before = (me - distance) % n < me  # whose block is this: of a device before or behind this one?
            pairs = _two_blocks(before, q_low, q_high, k, v, ids_low, ids_high, block_ids)
            first, second = zip(*map(_batch_halves, kernel.forward(*pairs, causal=False)), strict=True)
            low, high = results
            high = _merge(*high, *first)
            changed = _merge(*_select(before, low, high), *second)
            return _select(before, changed, low), _select(before, high, changed)

        halves = tuple(zip(_halves(out, 2), _halves(normaliser, 2), strict=True))
        low, high = _around(step, halves, (k, v, ids), axis, n)
        out, normaliser = (jnp.concatenate(pair, axis=2) for pair in zip(low, high, strict=True))
    out, normaliser = (checkpoint_name(x, "attention") for x in (out.astype(q.dtype), normaliser))
    return out, (q, k, v, ids, out, normaliser)


def _ring_backward(kernel, axis, n, residuals, d_out):
    q, k, v, ids, out, normaliser = residuals
    dq, dk, dv = kernel.backward(q, k, v, ids, ids, out, normaliser, d_out, causal=True)
    if n > 1:
        me = jax.lax.axis_index(axis)
        q_low, q_high = _halves(q, 2)
        ids_low, ids_high = _halves(ids, 1)
        given = [_halves(x, 2) for x in (out, normaliser, d_out)]

        def step(carry, block, distance):
            dq_low, dq_high, d_block = carry
            # The gradients of this block were one step behind it; this send overlaps the kernel below.
            dk, dv = _send(d_block, axis, n)
            k, v, block_ids = block
            before = (me - distance) % n < me
            pairs = _two_blocks(before, q_low, q_high, k, v, ids_low, ids_high, block_ids)
            known = [jnp.concatenate([high, jnp.where(before, low, high)]) for low, high in given]
            (dq_1, dq_2), (dk_1, dk_2), (dv_1, dv_2) = map(_batch_halves, kernel.backward(*pairs, *known, causal=False))
            dq_low += jnp.where(before, dq_2, 0)
            dq_high += dq_1 + jnp.where(before, 0, dq_2)
            # The first pair read the block's low half; the second read it too if the block came from before, else its high.
            dk, dv = (
                total + jnp.concatenate([first + jnp.where(before, second, 0), jnp.where(before, 0, second)], axis=2)
                for total, first, second in ((dk, dk_1, dk_2), (dv, dv_1, dv_2))
            )
            return dq_low, dq_high, (dk, dv)

        dq_low, dq_high, d_block = _around(step, (*_halves(dq, 2), (dk, dv)), (k, v, ids), axis, n)
        dk, dv = _send(d_block, axis, n)  # home
        dq = jnp.concatenate([dq_low, dq_high], axis=2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _around(step, carry, block, axis, n):
    """carry = step(carry, the block from `distance` devices before, distance) for 1 .. n - 1.

    Each block is sent on before the step that reads it, so that transport and arithmetic overlap.
    """
    block = _send(block, axis, n)

    def body(state, distance):
        carry, block = state
        following = _send(block, axis, n)
        return (step(carry, block, distance), following), None

    (carry, block), _ = jax.lax.scan(body, (carry, block), jnp.arange(1, n - 1)) if n > 2 else ((carry, block), None)
    return step(carry, block, n - 1)


def _send(tree, axis, n):
    """Every device's arrays to the next device."""
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)]), tree)


def _two_blocks(before, q_low, q_high, k, v, ids_low, ids_high, block_ids):
    """The two half-blocks that are visible, as one batch: (high, low) always; (low, low) or (high, high) beside it."""
    (k_low, k_high), (v_low, v_high), (b_low, b_high) = _halves(k, 2), _halves(v, 2), _halves(block_ids, 1)
    return (
        jnp.concatenate([q_high, jnp.where(before, q_low, q_high)]),
        jnp.concatenate([k_low, jnp.where(before, k_low, k_high)]),
        jnp.concatenate([v_low, jnp.where(before, v_low, v_high)]),
        jnp.concatenate([ids_high, jnp.where(before, ids_low, ids_high)]),
        jnp.concatenate([b_low, jnp.where(before, b_low, b_high)]),
    )


def _merge(out, normaliser, other, other_normaliser):
    """The attention over two sets of keys from that over each."""
    total = jnp.logaddexp(normaliser, other_normaliser)
    parts = ((out, normaliser), (other, other_normaliser))
    return sum(jnp.exp(part - total)[..., None] * x for x, part in parts), total


def _select(condition, yes, no):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _halves(x, axis):
    return jnp.split(x, 2, axis=axis)


def _batch_halves(x):
    return jnp.split(x, 2, axis=0)


# ---- heads for length ----


def _all_to_all_attention(kernel, axis, n, q, k, v, ids):
    """DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv 2309.14509): each device takes all of the length of 1/n of its heads."""
    H, K = q.shape[1], k.shape[1]
    if H % n:
        raise ValueError(f"all-to-all attention divides the {H} query heads of a device by {n} sequence shards")
    if K % n:  # fewer key-value heads than devices: each is sent to all that read it
        repeats = math.lcm(K, n) // K
        if (H // K) % repeats:
            raise ValueError(f"all-to-all attention: {H} query and {K} key-value heads a device, {n} sequence shards")
        k, v = (jnp.repeat(x, repeats, axis=1) for x in (k, v))

    def exchange(x, **axes):
        return jax.lax.all_to_all(x, axis, tiled=True, **axes)

    q, k, v = (exchange(x, split_axis=1, concat_axis=2) for x in (q, k, v))
    ids = jax.lax.all_gather(ids, axis, axis=1, tiled=True)
    return exchange(_ring(kernel, None, 1, q, k, v, ids), split_axis=2, concat_axis=1)


# ---- the order of a row on the ring ----


def ring_order(x: jax.Array, *, back: bool = False) -> jax.Array:
    """Rows into zig-zag order over the axis that divides the length, or `back`; a no-op where nothing divides it. # [B, T, ...]

    A device's piece moves as two halves, each to one other device.
    """
    mesh, axis = jax.sharding.get_abstract_mesh(), current_rules()["length"]
    n = 1 if mesh.empty or not axis else mesh.shape[axis]
    if n == 1:
        return x
    if x.shape[1] % (2 * n):
        raise ValueError(f"ring attention cuts a row into 2 x {n} pieces, which does not divide its length {x.shape[1]}")
    spec = partition(x.shape, ("batch", "length", *(None,) * (x.ndim - 2)), current_rules(), mesh)

    def owner(piece):
        return piece if piece < n else 2 * n - 1 - piece

    # Device i has pieces 2i and 2i + 1. Even pieces go to different devices each, and so do odd ones.
    even, odd = ([(i, owner(2 * i + parity)) for i in range(n)] for parity in (0, 1))

    def there(x):
        first, second = _halves(x, 1)
        from_even, from_odd = jax.lax.ppermute(first, axis, even), jax.lax.ppermute(second, axis, odd)
        # Device j wants piece j in front; its parity tells in which of the two it came.
        is_even = jax.lax.axis_index(axis) % 2 == 0
        return jnp.concatenate(_select(is_even, [from_even, from_odd], [from_odd, from_even]), axis=1)

    def home(x):
        is_even = jax.lax.axis_index(axis) % 2 == 0
        to_even, to_odd = _select(is_even, _halves(x, 1), _halves(x, 1)[::-1])
        back_even, back_odd = ([(j, i) for i, j in pairs] for pairs in (even, odd))
        halves = [jax.lax.ppermute(to_even, axis, back_even), jax.lax.ppermute(to_odd, axis, back_odd)]
        return jnp.concatenate(halves, axis=1)

    # With the check of what varies along which axes: without it a gradient would be summed up over the axes that hold copies.
    return jax.shard_map(home if back else there, in_specs=spec, out_specs=spec)(x)
