"""Weights and cached keys and values in 8 bits: half of bfloat16's memory traffic, which is what decoding waits for.

Symmetric, with one float32 scale for each output of a product (weights) or each token and head (cache), so that the products
themselves run on the plain integers and are scaled afterwards.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.model.layers import contract
from llama_jax.parallel.mesh import platform


@flax.struct.dataclass
class Int8:
    """A tensor as `values * scales`; scales have size 1 along the axes that share one."""

    values: jax.Array  # int8
    scales: jax.Array  # float32


def quantise(x: jax.Array, axes: int | tuple[int, ...]) -> Int8:
    """Rounds to 255 steps between -max|x| and max|x|, taken over `axes`."""
    x = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True) / 127, 1e-30)
    return Int8(values=jnp.round(x / scales).astype(jnp.int8), scales=scales)


def product(equation: str, x: jax.Array, w: jax.Array | Int8, dtype: jnp.dtype) -> jax.Array:
    """`contract` as generation needs it: the weights may be Int8 with one scale for each output.

    The axes of the outputs end the equation, those of the rows begin it.
    """
    if isinstance(w, Int8):
        weights, out = equation.split(",")[1].split("->")
        shared = tuple(axis for axis, letter in enumerate(weights) if letter not in out)
        return product(equation, x, w.values, dtype) * jnp.squeeze(w.scales, shared)
    if dtype != jnp.float32 and math.prod(x.shape[:-1]) == 1 and platform() == "cpu":
        # XLA has no bfloat16 product of a single row on CPUs: it would first widen the matrix, which takes six times as long
        # as the product of two rows.
        pair = jnp.pad(x, ((0, 1), *[(0, 0)] * (x.ndim - 1)))
        return contract(equation, pair, w, dtype)[:1]
    return contract(equation, x, w, dtype)
