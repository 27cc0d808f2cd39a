"""Arithmetic and memory traffic that a program executes, recomputation included."""

import math
import re
from fractions import Fraction
from typing import Any

import jax
from jax.interpreters import partial_eval

from llama_jax.planning.hlo import Instruction, Module, mean_trips

# Matrix products of one visit of a tile, by kernel: scores and out; scores, d_scores and dq; those two with dk and dv.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # of which operand writes a part of the first one
_SILENT = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all",
           "partition-id", "replica-id", "iota", "copy-done"}  # fmt: skip


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


def hbm_bytes(module: Module) -> int:
    """Bytes between main memory and the core of one device: operands and results of every instruction that is executed.

    Of an array that an instruction only slices, or writes a slice of, the slice counts.
    """
    total = 0
    for instruction, count in module:
        if instruction.computation in module.fused or instruction.opcode in _SILENT:
            continue
        total += count * moved_bytes(module, instruction)
    return total


def moved_bytes(module: Module, instruction: Instruction) -> int:
    """Those of one execution of an instruction."""
    results = sum(array.bytes for array in instruction.arrays if array.in_hbm)
    inner = re.search(r"calls=%?([\w.\-]+)", instruction.attributes) if instruction.opcode == "fusion" else None
    body = module.computations.get(inner.group(1), {}) if inner else {instruction.name: instruction}
    updates = [i for i in body.values() if i.opcode in _UPDATES]
    if updates:  # written in place
        results = sum(_operand_bytes(module, update, _UPDATES[update.opcode]) for update in updates)
    moved = results
    for index in range(len(instruction.operands)):
        operand = module.operand(instruction, index)
        if operand is None or not all(array.in_hbm for array in operand.arrays):
            continue
        size = operand.bytes
        if inner:
            parameter = next((i for i in body.values() if i.opcode == "parameter" and i.arguments == str(index)), None)
            users = [i for i in body.values() if parameter is not None and parameter.name in i.operands]
            if users and all(user.opcode == "dynamic-slice" for user in users):
                size = sum(user.bytes for user in users)
            elif any(user in updates and user.operands[0] == parameter.name for user in users):
                size = 0
        elif instruction.opcode in ("dynamic-slice", "gather") and index == 0:
            size = results
        elif updates and index == 0:
            size = 0
        moved += size
    return moved


def _operand_bytes(module: Module, instruction: Instruction, index: int) -> int:
    operand = module.operand(instruction, index)
    return operand.bytes if operand else 0


def device_bytes(tree: Any) -> int:
    """What a tree of sharded arrays, or of their shapes, takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "sharding")
    )
