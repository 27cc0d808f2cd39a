"""The parts of a block: mixed-precision contraction, RMSNorm, rotary positions, SwiGLU (paper section 2.2)."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model.rope import RopeScaling, growth, stretched
from llama_jax.parallel.axes import constrain
from llama_jax.parallel.mesh import platform


@flax.struct.dataclass
class Adapted:
    """A matrix with a low-rank adapter: weight + scale * a b (see `model.lora`)."""

    weight: jax.Array  # [in..., out...]
    a: jax.Array  # [in..., R]
    b: jax.Array  # [R, out...]
    scale: jax.Array  # [] float32


def contract(equation: str, x: jax.Array, w: jax.Array | Adapted, dtype: jnp.dtype) -> jax.Array:
    """`einsum(equation, x, w)` with operands of `dtype` and a float32 result, in the backward pass too.

    Every letter of an operand must occur in the other operand or in the result, which makes each gradient a contraction of
    the same kind. An adapter is applied beside its matrix: their sum would cost a matrix of gradients.
    """
    if not isinstance(w, Adapted):
        return _contract(equation, x, w, dtype)
    (left, right), result = equation.split("->")[0].split(","), equation.split("->")[1]
    rows = "".join(letter for letter in left if letter in result)
    summed = "".join(letter for letter in right if letter not in result)
    kept = "".join(letter for letter in right if letter in result)
    small = _contract(f"{left},{summed}r->{rows}r", x, w.a, dtype)
    return _contract(equation, x, w.weight, dtype) + w.scale * _contract(f"{rows}r,r{kept}->{result}", small, w.b, dtype)


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product of operands of one type with a float32 result. Float32 operands are multiplied as such: left to itself, a TPU
    would round them to bfloat16 first, and a GPU to 19 bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _contract(equation: str, x: jax.Array, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`contract` of plain arrays.

    Left to itself, differentiation would multiply a float32 cotangent with a bfloat16 operand, and XLA would widen both:
    two thirds of a training step would then miss the matrix units.
    """
    return einsum(equation, x.astype(dtype), w.astype(dtype))


def _contract_forward(equation, x, w, dtype):
    result = _contract(equation, x, w, dtype)
    # The empty arrays carry the operands' types, to which the gradients are cast back.
    return result, (x.astype(dtype), w.astype(dtype), jnp.empty((0,), x.dtype), jnp.empty((0,), w.dtype))


def _contract_backward(equation, dtype, residuals, cotangent):
    x, w, x_like, w_like = residuals
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    cotangent = compute_once(cotangent.astype(dtype))
    dx = einsum(f"{result},{right}->{left}", cotangent, w)
    dw = einsum(f"{left},{result}->{right}", x, cotangent)
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


_contract.defvjp(_contract_forward, _contract_backward)


def compute_once(x: jax.Array) -> jax.Array:
    """Makes a TPU compute `x` once, before the matrix products that read it.

    Its compiler would rather repeat element-wise work inside every product that reads it, and that work then is what the
    matrix units wait for: SwiGLU's products take up to 1.9 times as long (compiled for v5p).
    """
    return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """x / rms(x) in float32, cast back, then times the weight: the order of the reference code. # [..., D]"""
    normed = x.astype(jnp.float32)
    normed = normed * jax.lax.rsqrt(jnp.mean(jnp.square(normed), axis=-1, keepdims=True) + eps)
    return _scaled(normed.astype(x.dtype), weight)


@jax.custom_vjp
def _scaled(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x times the weight of its last axis, in x's type. The gradient of the weight is summed over all rows, and over devices,
    in float32; differentiation by itself would sum it in x's type. # [..., D], [D] -> [..., D]"""
    return x * weight.astype(x.dtype)


def _scaled_forward(x, weight):
    return _scaled(x, weight), (x, weight)


def _scaled_backward(residuals, cotangent):
    x, weight = residuals
    products = cotangent.astype(jnp.float32) * x.astype(jnp.float32)
    d_weight = jnp.sum(products, axis=tuple(range(x.ndim - 1)))
    return cotangent * weight.astype(x.dtype), d_weight.astype(weight.dtype)


_scaled.defvjp(_scaled_forward, _scaled_backward)


def rope_angles(
    positions: jax.Array, head_size: int, *, theta: float, scaling: RopeScaling | None = None,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Cosine and sine of position * theta^(-2i / E) in float32, i = 0 .. E/2-1. # [B, T] -> 2 x [B, T, E/2]

    `lengths` of the tokens' sequences are read by `dynamic` scaling; without them, none exceeds the old context. # [B, T]
    """
    if scaling is None:
        frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    else:
        frequencies = stretched(head_size, theta, scaling)
        if scaling.kind == "dynamic" and lengths is not None:
            frequencies = frequencies * growth(lengths, head_size, scaling)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    if scaling is None or scaling.magnitude == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return scaling.magnitude * jnp.cos(angles), scaling.magnitude * jnp.sin(angles)


def materialise(tables: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The same arrays, which XLA's CPU backend then computes once. # [..., N] each

    In an unrolled trunk it would otherwise put the cosine into each of its uses and compute it for every head of every layer
    again, forward and backward: 15 % of a training step. It ignores `optimization_barrier` here, but a product with the
    identity (exact in float32) it does keep.
    """
    return tuple(jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=jax.lax.Precision.HIGHEST) for x in tables)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding of queries or keys. # [B, T, H, E]

    Element i is paired with element i + E/2 ("split halves", as in Hugging Face checkpoints). Meta's files pair 2i with
    2i + 1; the interop tables permute the query and key weights accordingly, and the scores come out the same.
    """
    cos, sin = (angle[:, :, None, :] for angle in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """down(silu(gate x) * up x). # [B, T, D], [D, F], [D, F], [F, D] -> float32 [B, T, D]"""
    gated = checkpoint_name(contract("btd,df->btf", x, gate, dtype).astype(x.dtype), "gate")
    hidden = jax.nn.silu(gated) * checkpoint_name(contract("btd,df->btf", x, up, dtype).astype(x.dtype), "up")
    hidden = compute_once(constrain(hidden, "batch", "length", "act_ffn"))
    return contract("btf,fd->btd", hidden, down, dtype)
