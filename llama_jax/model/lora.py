"""Low-rank adapters (Hu et al. 2021): W' = W + (alpha / rank) A B, with A and B trained and W kept.

Adapters are one more subtree of a model's parameters, so that every function of a model takes it with them or without:

    {"trunk": ..., "lm_head": ..., "lora": {"scale": [], "layers": {"query": {"a": [L, D, R], "b": [L, R, H, E]}, ...}}}

B begins as zero: the first step's model is the base to the bit. `scale` is alpha / rank, and not trained.
"""

import dataclasses
import math
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.model.layers import Adapted
from llama_jax.model.params import Params, Specs, normal
from llama_jax.parallel.axes import ParamSpec, constrain

MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapters of a stage.

    rank: of A B; 0: none, all parameters are trained.
    alpha: A B is scaled by alpha / rank, so that another rank needs no other learning rate.
    targets: which matrices of each layer have one.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = MATRICES

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank: expected 0 (no adapters) or more, got {self.rank}")
        if self.rank and not self.alpha > 0:
            raise ValueError(f"lora.alpha: expected a positive number, got {self.alpha}")
        if not self.targets or set(self.targets) - set(MATRICES) or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets: expected some of {', '.join(MATRICES)}, each once, got {self.targets}")


def adapter_specs(specs: Specs, config: LoraConfig) -> Specs:
    """The table of what is trained of the adapters, derived from that of the matrices: {"layers": {name: {"a", "b"}}}."""

    def pair(spec: ParamSpec) -> Specs:
        n = _inputs(spec.axes)
        (L, *shape), axes, R = spec.shape, spec.axes[1:], config.rank
        return {
            "a": ParamSpec(
                (L, *shape[:n], R), ("layers", *axes[:n], "rank"), normal(1 / math.sqrt(math.prod(shape[:n])))
            ),
            "b": ParamSpec((L, R, *shape[n:]), ("layers", "rank", *axes[n:]), _zeros),
        }

    return {"layers": {name: pair(specs["trunk"]["layers"][name]) for name in config.targets}}


def scale_specs(config: LoraConfig) -> Specs:
    """The table of what is not trained of them."""
    return {"scale": ParamSpec((), (), lambda key, shape, dtype: jnp.full(shape, config.alpha / config.rank, dtype))}


def divide(specs: Specs, config: LoraConfig, saved: Container[str] = ("trunk", "lm_head")) -> tuple[Specs, Specs]:
    """(what is trained, what is kept) of a model. With adapters, the trunk and the language-model head are kept, as far as the
    model that is adapted has `saved` them; scalar heads, and heads that it does not have, are trained whole."""
    if not config.rank:
        return specs, {}
    kept = {part: spec for part, spec in specs.items() if part in saved and part in ("trunk", "lm_head")}
    heads = {part: spec for part, spec in specs.items() if part not in kept}
    return {"lora": adapter_specs(specs, config), **heads}, {**kept, "lora": scale_specs(config)}


def attach(layer: Params, adapters: Mapping[str, Any], scale: jax.Array | None, axes: Mapping[str, tuple]) -> Params:
    """The weights of one layer, those that have adapters as `Adapted`. `axes` are the weights' own."""

    def one(name: str) -> Adapted:
        n = _inputs(("layers", *axes[name]))
        a = constrain(adapters[name]["a"], *axes[name][:n], "rank")
        b = constrain(adapters[name]["b"], "rank", *axes[name][n:])
        return Adapted(weight=layer[name], a=a, b=b, scale=scale)

    return {**layer, **{name: one(name) for name in adapters}}


def merged(params: Params) -> Params:
    """The same model without adapters: each product added to its matrix, in float32."""
    if "lora" not in params:
        return params
    lora, rest = params["lora"], {name: part for name, part in params.items() if name != "lora"}
    layers = dict(rest["trunk"]["layers"])
    for name, adapter in lora["layers"].items():
        layers[name] = layers[name] + product(adapter["a"], adapter["b"], lora["scale"])
    return {**rest, "trunk": {**rest["trunk"], "layers": layers}}


def product(a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """scale * A B of all layers. # [L, ..., R], [L, R, ...] -> [L, ..., ...]"""

    def of_layer(a, b):
        return jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)

    return scale * jax.vmap(of_layer)(a, b)


def _inputs(axes: tuple[str | None, ...]) -> int:
    """How many axes of a layer's matrix are summed over: all but the last of those that write into the residual stream."""
    return len(axes) - 2 if axes[-1] == "width" else 1


def _zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del key
    return jnp.zeros(shape, dtype)
