"""Weights and cached keys and values in 8 bits: half of bfloat16's memory traffic, which is what decoding waits for.

Symmetric, with one float32 scale for each output of a product (weights) or each token and head (cache), so that the products
themselves run on the plain integers and are scaled afterwards.
"""

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.model.layers import contract


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
    """`contract`, where the weights may be Int8 with one scale for each output. The outputs' axes end the equation."""
    if not isinstance(w, Int8):
        return contract(equation, x, w, dtype)
    weights, out = equation.split(",")[1].split("->")
    shared = tuple(axis for axis, letter in enumerate(weights) if letter not in out)
    return contract(equation, x, w.values, dtype) * jnp.squeeze(w.scales, shared)
