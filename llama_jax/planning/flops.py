"""Arithmetic and memory traffic that a program executes, recomputation included."""

import math
import re
from typing import Any

import jax
from jax.interpreters import partial_eval

from llama_jax.planning.hlo import Instruction, Module

# Matrix products of one visit of a tile, by kernel: scores and out; scores, d_scores and dq; those two with dk and dv.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_SILENT = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all",
           "partition-id", "replica-id", "iota", "copy-done"}  # fmt: skip


def traced_flops(jaxpr: Any, *, trips: int = 0) -> int:
    """Operations of all matrix products of a closed jaxpr, of all devices together. Pallas kernels are not looked into.

    A `while` of unknown length counts `trips` times (0: once), of a branch the longer side. What nobody reads is left out,
    as the compiler leaves it out: gradients of matrices that adapters keep as they are.
    """
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _traced(used, trips)


def _traced(jaxpr: Any, trips: int) -> int:
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
            times = {"scan": parameters.get("length"), "while": max(trips, 1)}.get(name, 1)
            if name == "shard_map":  # its shapes are one device's
                times = parameters["mesh"].size
            total += times * sum(_traced(inner, trips) for inner in _inner(parameters))
    return total


def _inner(parameters: dict[str, Any]) -> list[Any]:
    values = [item for value in parameters.values() for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return [value for value in values if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")]


def kernel_flops(module: Module) -> int:
    """Operations of the splash-attention kernels, of one device: the tiles that they visit, masked halves included."""
    return sum(count * flops for _, flops, count in kernels(module))


def kernels(module: Module) -> list[tuple[Instruction, int, int]]:
    """(instruction, operations of one execution, executions a step) of every splash-attention kernel."""
    found = []
    for instruction, count in module:
        if instruction.opcode != "custom-call" or "tpu_custom_call" not in instruction.attributes:
            continue
        kind = next((kind for kind in _KERNEL_PRODUCTS if instruction.name.startswith(kind)), None)
        if kind is None:
            raise ValueError(f"kernel {instruction.name}: its operations are not known")
        # The query [..., H, T, E] and the key [..., K, S, E]; the compiler leaves out batches of one.
        operands = (module.operand(instruction, i) for i in range(len(instruction.operands)))
        shapes = [a.shape for o in operands if o is not None for a in o.arrays[:1] if a.dtype in ("bf16", "f32")]
        (*B, H, T, E), (*_, S, _) = shapes[:2]
        tiles = S // _key_block(instruction)
        visited = (tiles + 1) / (2 * tiles) if "causal_tiles" in instruction.op_name else 1.0
        found.append((instruction, round(_KERNEL_PRODUCTS[kind] * 2 * math.prod(B) * H * T * S * E * visited), count))
    return found


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
        total += count * _moved(module, instruction)
    return total


def _moved(module: Module, instruction: Instruction) -> int:
    results = sum(array.bytes for array in instruction.arrays if array.in_hbm)
    inner = re.search(r"calls=%?([\w.\-]+)", instruction.attributes) if instruction.opcode == "fusion" else None
    body = module.computations.get(inner.group(1), {}) if inner else {instruction.name: instruction}
    updates = [i for i in body.values() if i.opcode == "dynamic-update-slice"]
    if updates:  # written in place
        results = sum(_operand_bytes(module, update, 1) for update in updates)
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
