"""THE table: every parameter's name, shape, logical axes and initialiser. All else about parameters is derived from it.

One tree serves all trainers: `{"trunk": {...}, "lm_head" | "reward_head" | "value_head": {...}}`. The policy, the reference,
the reward models and the critic differ in the head only, so that any stage can start from any stage's checkpoint.
"""

import math
import typing
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import traverse_util

from llama_jax.model.config import ModelConfig
from llama_jax.parallel.axes import Initialiser, ParamSpec, is_spec

Params = dict[str, Any]
Specs = dict[str, Any]
Head = Literal["lm_head", "reward_head", "value_head"]


def normal(std: float) -> Initialiser:
    """Draws from N(0, std^2)."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The initial weight of a norm."""
    del key
    return jnp.ones(shape, dtype)


def table(config: ModelConfig, *, head: Head) -> Specs:
    """The parameters of a model with the given head, as a tree of ParamSpecs.

    The paper is silent on initialisation. Like most open code we draw from N(0, 0.02^2), and scale the two matrices that
    write into the residual stream by 1 / sqrt(2 L), so that its variance does not grow with depth.

    Raises:
      ValueError: there is no such head.
    """
    if head not in (known := typing.get_args(Head)):
        raise ValueError(f"head: expected one of {', '.join(known)}, got {head!r}")
    L, D, H, K = config.layers, config.width, config.heads, config.kv_heads
    E, F, V = config.head_size, config.ffn, config.vocab_size
    inward, outward = normal(0.02), normal(0.02 / math.sqrt(2 * L))
    trunk = {
        "embedding": ParamSpec((V, D), ("vocab", "width"), inward),
        "layers": {
            "attention_norm": ParamSpec((L, D), ("layers", None), ones),
            "query": ParamSpec((L, D, H, E), ("layers", "width", "heads", "head"), inward),
            "key": ParamSpec((L, D, K, E), ("layers", "width", "kv_heads", "head"), inward),
            "value": ParamSpec((L, D, K, E), ("layers", "width", "kv_heads", "head"), inward),
            "output": ParamSpec((L, H, E, D), ("layers", "heads", "head", "width"), outward),
            "ffn_norm": ParamSpec((L, D), ("layers", None), ones),
            "gate": ParamSpec((L, D, F), ("layers", "width", "ffn"), inward),
            "up": ParamSpec((L, D, F), ("layers", "width", "ffn"), inward),
            "down": ParamSpec((L, F, D), ("layers", "ffn", "width"), outward),
        },
        "final_norm": ParamSpec((D,), (None,), ones),
    }
    return {"trunk": trunk, head: _heads(config)[head]} if _heads(config)[head] else {"trunk": trunk}


def _heads(config: ModelConfig) -> dict[str, Specs]:
    D, V = config.width, config.vocab_size
    # N(0, 1 / (D + 1)), as in Stiennon et al. 2020: the normed features then give scores of unit variance.
    scalar = {"kernel": ParamSpec((D,), ("width",), normal(1 / math.sqrt(D + 1)))}
    return {
        "lm_head": {} if config.tie_embeddings else {"kernel": ParamSpec((D, V), ("width", "vocab"), normal(0.02))},
        "reward_head": scalar,
        "value_head": scalar,
    }


def init(specs: Specs, key: jax.Array) -> Params:
    """Draws the parameters of a table. Each leaf's key comes from its name, so tables that share a leaf draw it alike."""
    flat = traverse_util.flatten_dict(specs, sep="/", is_leaf=lambda _, node: is_spec(node))
    return traverse_util.unflatten_dict(
        {
            name: spec.init(jax.random.fold_in(key, zlib.crc32(name.encode())), spec.shape, spec.dtype)
            for name, spec in flat.items()
        },
        sep="/",
    )


def count(specs: Specs) -> int:
    """The number of parameters of a table."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def decay_mask(specs: Specs) -> Any:
    """True where weight decay applies: matrices yes, norm weights and scalar heads no (the paper does not say)."""

    def is_matrix(spec: ParamSpec) -> bool:
        return len([axis for axis in spec.axes if axis != "layers"]) > 1

    return jax.tree.map(is_matrix, specs, is_leaf=is_spec)


def flops_per_token(config: ModelConfig, *, length: int, head: Head = "lm_head") -> int:
    """Floating-point operations of one forward and backward pass per token: 6 per matrix weight, plus attention.

    The embedding look-up is free. Causal attention over T tokens takes 2 contractions of 2 * H * E * T / 2 a token, times 3
    for the backward pass. (Recomputation is not counted: these are the model's operations, not the hardware's.)
    """
    specs = table(config, head=head)
    weights = count(specs) - count({"embedding": specs["trunk"]["embedding"]})
    if config.tie_embeddings and head == "lm_head":
        weights += config.vocab_size * config.width
    return 6 * weights + 6 * config.layers * config.heads * config.head_size * length
