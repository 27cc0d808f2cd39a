"""Arithmetic that a program executes, recomputation included, and what its arrays take."""

import math
import re
from fractions import Fraction
from typing import Any

import jax
from jax.interpreters import partial_eval

from llama_jax.planning.hlo import Instruction, Module, mean_trips

# Matrix products of one visit of a tile, by kernel: scores and out; scores, d_scores and dq; those two with dk and dv.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def traced_flops(jaxpr: Any, *, trips: int = 0) -> int:
    """Operations of all matrix products of a closed jaxpr, of all devices together. Pallas kernels are not looked into.

    A `while` of unknown length counts as often as its name tells, or `trips` times (0: once), of a branch the longer side. What
    nobody reads is left out, as the compiler leaves it out: gradients of matrices that adapters keep as they are.
    """
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return round(_traced(used, trips))


def _traced(jaxpr: Any, trips: int) -> int | Fraction:
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "pallas_call":
            continue
        elif name == "cond":
            total += max(_traced(branch, trips) for branch in parameters["branches"])
        else:
            mean = mean_trips(str(equation.source_info.name_stack)) if name == "while" else None
            times = {"scan": parameters.get("length"), "while": mean or max(trips, 1)}.get(name, 1)
            if name == "shard_map":  # its shapes are one device's
                times = parameters["mesh"].size
            total += times * sum(_traced(inner, trips) for inner in _inner(parameters))
    return total


def _inner(parameters: dict[str, Any]) -> list[Any]:
    values = [item for value in parameters.values() for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return [value for value in values if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")]


def kernels(module: Module) -> list[tuple[Instruction, int, int]]:
    """(instruction, operations of one execution, executions a step) of every attention kernel, of one device.

    The operations are those of the tiles that it visits, masked halves included.
    """
    found = []
    for instruction, count in module:
        if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes:
            flops = _paged_flops if instruction.name.startswith("paged_attention") else _splash_flops
            found.append((instruction, flops(module, instruction), count))
    return found


def _arrays(module: Module, kernel: Instruction, *dtypes: str) -> list[tuple[int, ...]]:
    """The shapes of a kernel's operands of some types; the compiler leaves out batches of one."""
    operands = (module.operand(kernel, i) for i in range(len(kernel.operands)))
    return [a.shape for o in operands if o is not None for a in o.arrays[:1] if a.dtype in dtypes]


def _splash_flops(module: Module, kernel: Instruction) -> int:
    kind = next((kind for kind in _KERNEL_PRODUCTS if kernel.name.startswith(kind)), None)
    if kind is None:
        raise ValueError(f"kernel {kernel.name}: its operations are not known")
    (*B, H, T, E), (*_, S, _) = _arrays(module, kernel, "bf16", "f32")[:2]  # query [..., H, T, E], key [..., K, S, E]
    tiles = S // _key_block(kernel)
    visited = (tiles + 1) / (2 * tiles) if "causal_tiles" in kernel.op_name else 1.0
    return round(_KERNEL_PRODUCTS[kind] * 2 * math.prod(B) * H * T * S * E * visited)


def _paged_flops(module: Module, kernel: Instruction) -> int:
    """Scores and out of one query a row over all slots of its cache, filled or not."""
    lengths = _arrays(module, kernel, "s32")[0]  # one for each pair of row and key-value head, [B K]
    query, keys = _arrays(module, kernel, "bf16", "f32")[:2]  # [B K, H / K, ...], E and [B K pages, slots of a page, E]
    shared = math.prod(query) // query[-1] // math.prod(lengths)  # query heads of a key-value head
    return 2 * 2 * shared * math.prod(keys)


def _key_block(kernel: Instruction) -> int:
    """How many keys a tile of the kernel has, as the kernel itself says for profilers (`block_kv`, `block_kv_dq`, ...)."""
    own = kernel.name.removeprefix("splash_mha_").split("_")[0]
    name = "block_kv" if own == "fwd" else f"block_kv_{own}"
    block = re.search(rf'\\"{name}\\": (\d+)', kernel.attributes)
    if block is None:
        raise ValueError(f"kernel {kernel.name}: {name} is not in its metadata")
    return int(block.group(1))


def device_bytes(tree: Any) -> int:
    """What a tree of sharded arrays, or of their shapes, takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "sharding")
    )
