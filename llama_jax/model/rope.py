"""Rotary frequencies, and the published ways to stretch them over longer contexts than a model was trained on.

The paper's models use none (section 2.2); later models of the same architecture, whose files we read, do.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are changed.

    kind: `linear` divides all of them (Chen et al. 2023); `llama3` divides those of wavelengths beyond the old context, with a
      smooth border (Llama 3.1); `yarn` does so with a linear border (Peng et al. 2023) and scales the attention's inputs;
      `dynamic` ("NTK") raises theta with the length of a sequence, from where it exceeds the old context.
    factor: what they are divided by; of `dynamic`, how fast theta grows.
    original_length: the old context, in tokens.
    slow, fast: the border: frequencies that turn fewer than `slow` times within the old context are divided, those that turn
      more than `fast` times are not.
    magnitude: factor of sine and cosine.
    """

    kind: Literal["linear", "llama3", "yarn", "dynamic"]
    factor: float
    original_length: int = 0
    slow: float = 1.0
    fast: float = 4.0
    magnitude: float = 1.0

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"rope scaling: expected a factor of at least 1, got {self.factor}")
        if self.kind == "dynamic" and self.original_length < 1:
            raise ValueError(f"rope scaling dynamic: expected the length of the old context, got {self.original_length}")
        if self.kind in ("llama3", "yarn") and (self.original_length < 1 or self.fast <= self.slow):
            raise ValueError(f"rope scaling {self.kind}: expected an original length and slow < fast, got {self}")


def stretched(head_size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """theta^(-2i / E), i = 0 .. E/2-1, scaled; of `dynamic`, within the old context. # float32 [E/2]"""
    plain = theta ** (-np.arange(0, head_size, 2) / head_size)
    if scaling.kind == "dynamic":
        return plain.astype(np.float32)
    if scaling.kind == "linear":
        kept = np.zeros_like(plain)
    elif scaling.kind == "llama3":
        turns = scaling.original_length * plain / (2 * math.pi)
        kept = np.clip((turns - scaling.slow) / (scaling.fast - scaling.slow), 0, 1)
    else:
        # Of which pair the frequency turns so often; the border runs along the pairs, between whole ones.
        low, high = (
            head_size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.fast, scaling.slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), head_size - 1)
        kept = 1 - np.clip((np.arange(head_size // 2) - low) / max(high - low, 1e-3), 0, 1)
    return (plain * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def growth(lengths: jax.Array, head_size: int, scaling: RopeScaling) -> jax.Array:
    """By what `dynamic` scaling multiplies the frequencies of sequences of some lengths. # int32 [...] -> float32 [..., E/2]

    Theta is multiplied by (factor * length / original - (factor - 1)) ^ (E / (E - 2)), and the lowest frequency thereby
    divided by the term in brackets. Within the old context that term is 1.
    """
    ratio = jnp.maximum(lengths, scaling.original_length) / scaling.original_length
    exponents = -np.arange(0, head_size, 2) / max(head_size - 2, 1)
    return (scaling.factor * ratio - (scaling.factor - 1))[..., None] ** exponents.astype(np.float32)


def sequence_lengths(segment_ids: jax.Array, positions: jax.Array, scaling: RopeScaling | None) -> jax.Array | None:
    """Of each token, the length of its sequence, that of its segment of the row; None where no scaling reads it.

    In memory linear in T: tokens of a segment are brought together by sorting, so ids may be any, in any order.
    # int32 [B, T] x 2 -> [B, T]
    """
    if scaling is None or scaling.kind != "dynamic":
        return None

    def of_row(ids: jax.Array, positions: jax.Array) -> jax.Array:
        order = jnp.argsort(ids)
        ordered = ids[order]
        begins = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
        segment = jnp.zeros_like(ids).at[order].set(jnp.cumsum(begins, dtype=ids.dtype))  # 0, 1, ... by rising id
        return jax.ops.segment_max(positions, segment, num_segments=ids.shape[0])[segment] + 1

    return jax.vmap(of_row)(segment_ids, positions)
