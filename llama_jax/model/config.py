"""Every size of the paper (Table 1), of Llama 1, SmolLM2, the demo (`tiny`) and notebooks (`nano`); how they are computed."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from llama_jax.config import check_choices, check_least
from llama_jax.model.rope import RopeScaling
from llama_jax.parallel.host import multiplies_bfloat16
from llama_jax.parallel.mesh import platform


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model: *what* is computed. L layers, D width, H heads, K kv_heads, E head_size, F ffn, V vocab_size."""

    name: str
    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    max_length: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self):
        check_least(
            self.name, self, vocab_size=1, layers=1, width=1, heads=1, kv_heads=1, head_size=2, ffn=1, max_length=1
        )  # fmt: skip
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: {self.heads} heads are no multiple of {self.kv_heads} kv_heads")
        if self.head_size % 2:
            raise ValueError(f"{self.name}: head_size {self.head_size} is odd; RoPE rotates pairs")


@dataclasses.dataclass(frozen=True)
class Compute:
    """*How* a model is computed; none of it changes the parameters.

    matmul: operand type of every contraction; products are accumulated in float32. `auto` takes bfloat16 but on a CPU whose
      arithmetic has none, where it would only be converted to float32 and back.
    activations: type of the residual stream and of everything element-wise outside the float32 islands (norms, softmax,
      losses). TPUs want bfloat16; CPUs are faster on float32 even between bfloat16 matrix products.
    attention: how training computes attention: `full` holds all scores of a row; `blockwise` (XLA) and `splash` (Pallas, TPU)
      hold blocks of them. `auto` takes splash on a TPU, blockwise for long or divided rows, full otherwise.
    sequence: what devices that divide a row exchange: keys and values around a `ring`, or heads for length, `all_to_all`.
    remat: what the backward pass recomputes: nothing (`none`), every block (`full`), all but the results of most products
      (`dots`), all but those of attention (`attention`), or but those and its queries and keys (`queries`); `offload` is
      `dots` with the products kept in the host's memory.
    loss_chunks: into how many parts the tokens are cut for the vocabulary projection of the loss, which bounds its memory
      to [B, T / loss_chunks, V].
    """

    matmul: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    activations: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "full", "dots", "queries", "attention", "offload"] = "none"
    attention: Literal["auto", "full", "blockwise", "splash"] = "auto"
    sequence: Literal["ring", "all_to_all"] = "ring"
    loss_chunks: int = 1
    unroll: bool = False

    def __post_init__(self):
        check_choices("", self)  # else a mistaken name is met in the middle of a trace, or means the default
        check_least("", self, loss_chunks=1)

    @property
    def matmul_dtype(self) -> jnp.dtype:
        """The operand type of contractions in the program that is being traced."""
        if self.matmul != "auto":
            return jnp.dtype(self.matmul)
        converted = platform() == "cpu" and not multiplies_bfloat16()
        return jnp.dtype(jnp.float32 if converted else jnp.bfloat16)

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The type of the residual stream."""
        return jnp.dtype(self.activations)


FLOAT32 = Compute(matmul="float32", activations="float32")


def ffn_size(width: int, *, multiplier: float | None = None, multiple_of: int = 256) -> int:
    """The hidden width of SwiGLU in the reference code: 2/3 of 4 x width, scaled, rounded up to a multiple."""
    size = int(2 * (4 * width) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


def _llama(name: str, layers: int, width: int, heads: int, kv_heads: int, ffn: int, length: int, eps: float):
    return ModelConfig(
        name=name, vocab_size=32_000, layers=layers, width=width, heads=heads, kv_heads=kv_heads,
        head_size=width // heads, ffn=ffn, max_length=length, norm_eps=eps,
    )  # fmt: skip


SIZES: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        # Llama 2, Table 1. The 34B was never released; its shape is that of Code Llama 34B, which starts from it.
        _llama("7b", 32, 4096, 32, 32, ffn_size(4096), 4096, 1e-5),
        _llama("13b", 40, 5120, 40, 40, ffn_size(5120), 4096, 1e-5),
        _llama("34b", 48, 8192, 64, 8, ffn_size(8192), 4096, 1e-5),
        # The 70B widens its feed-forward by 1.3 to pay back what grouped-query attention saves (section A.2.1).
        _llama("70b", 80, 8192, 64, 8, ffn_size(8192, multiplier=1.3, multiple_of=4096), 4096, 1e-5),
        # Llama 1, for the comparisons.
        _llama("llama1-7b", 32, 4096, 32, 32, ffn_size(4096), 2048, 1e-6),
        _llama("llama1-13b", 40, 5120, 40, 40, ffn_size(5120), 2048, 1e-6),
        _llama("llama1-33b", 60, 6656, 52, 52, ffn_size(6656), 2048, 1e-6),
        _llama("llama1-65b", 80, 8192, 64, 64, ffn_size(8192), 2048, 1e-6),
        # SmolLM2 135M, a real model of this architecture that a laptop can train; its embeddings are tied.
        ModelConfig(name="smollm2-135m", vocab_size=49_152, layers=30, width=576, heads=9, kv_heads=3, head_size=64,
                    ffn=1536, max_length=8192, rope_theta=100_000.0, tie_embeddings=True),
        # The demo's size: minutes on two CPU cores, and grouped-query attention as in the 70B.
        ModelConfig(name="tiny", vocab_size=4096, layers=6, width=256, heads=4, kv_heads=2, head_size=64, ffn=704,
                    max_length=256),
        # The notebooks' size: a chapter of the paper in a minute, with the settings of `tiny`.
        ModelConfig(name="nano", vocab_size=2048, layers=2, width=128, heads=4, kv_heads=2, head_size=32, ffn=352,
                    max_length=256),
    )
}  # fmt: skip


def size(name: str) -> ModelConfig:
    """The model of that name; ValueError with the list of names otherwise."""
    if name not in SIZES:
        raise ValueError(f"model {name!r} is unknown; expected one of {', '.join(SIZES)}")
    return SIZES[name]
