"""What a program moves between main memory and the core: the parts of operands that it reads, of results those that it writes.

An array that a fusion only hands on, from an operand to its result, stays where it is; of one that it slices the slice is
read, into one that it updates the update is written. A collective that runs over several fusions moves its arrays once.
"""

import re
from collections.abc import Iterable

from llama_jax.planning.hlo import Array, Instruction, Module, begins_collective, ends_collective, fused_into, is_collective

_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # of which operand writes a part of the first one
_SLICES = ("dynamic-slice", "slice", "gather")
_RESHAPES = ("pad", "convert", "copy", "reshape", "transpose")  # the same part of their operand is read as of their result
_SILENT = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all",
           "partition-id", "replica-id", "iota", "async-start"}  # fmt: skip
_NAMES_MEMORY = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')


def hbm_bytes(module: Module) -> int:
    """Bytes between main memory and the core of one device, of every instruction that is executed."""
    return sum(
        count * moved_bytes(module, instruction) for instruction, count in module if instruction.computation not in module.fused
    )


def moved_bytes(module: Module, instruction: Instruction) -> int:
    """Those of one execution of an instruction. One that waits for another (`copy-done`) moves nothing itself."""
    silent = instruction.opcode in _SILENT or instruction.opcode.endswith(("-done", "-update"))
    if silent or _NAMES_MEMORY.search(instruction.attributes):
        return 0
    moved = _written(module, instruction)
    for index in range(len(instruction.operands)):
        operand = module.operand(instruction, index)
        if operand is not None and all(array.in_hbm for array in operand.arrays):
            moved += _taken(module, instruction, index, operand)
    return moved


def _taken(module: Module, instruction: Instruction, index: int, operand: Instruction) -> int:
    """What an executed instruction reads of an operand."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "fusion":
        parameter = module.parameter(fused_into(instruction), index)
        return operand.bytes if parameter is None else _read(module, parameter)
    if index == 0 and opcode in _UPDATES:
        return 0
    if index == 0 and opcode in _SLICES:
        return max(array.bytes for array in _own(module, instruction))
    return operand.bytes


def _read(module: Module, value: Instruction, *, made: bool = False, callers: tuple[Instruction, ...] = ()) -> int:
    """What is read of a value inside of a fusion, by those who use it.

    made: it is computed on the way, so that it is whole where it is a result; what lay in memory is handed on untouched.
    callers: the fusions around, the innermost last, up to the one that is executed.
    """
    handed_on = value.bytes if made else 0
    total = 0
    if module.roots.get(value.computation) is value:
        total += _read(module, callers[-1], made=made, callers=callers[:-1]) if callers else handed_on
    for user, index in module.users(value):
        if user.name in module.continued or begins_collective(user) or ends_collective(user):
            continue
        if user.opcode == "fusion":
            inner = module.parameter(fused_into(user), index)
            total += value.bytes if inner is None else _read(module, inner, made=made, callers=(*callers, user))
        elif user.opcode == "tuple":
            total += value.bytes if callers else handed_on
        elif user.opcode == "bitcast" or (index == 0 and user.opcode in _UPDATES):
            total += _read(module, user, made=made, callers=callers)
        elif user.opcode in _RESHAPES and index == 0:
            total += _read(module, user, made=True, callers=callers) * value.bytes // max(user.bytes, 1)
        else:
            total += user.bytes if index == 0 and user.opcode in _SLICES else value.bytes
    return min(total, value.bytes)


def _written(module: Module, instruction: Instruction) -> int:
    """What an executed instruction writes of its results."""
    own = [array for array in _own(module, instruction) if array.in_hbm]
    opcode = instruction.opcode.removesuffix("-start")
    if own and opcode in _UPDATES:
        return _bytes_of(module, instruction, _UPDATES[opcode])
    root = module.roots.get(fused_into(instruction)) if opcode == "fusion" else None
    if root is None or begins_collective(root):
        return sum(array.bytes for array in own)
    if root.opcode != "tuple":
        return _new(module, root) if own else 0
    values = (module.operand(root, index) for index in range(len(root.operands)))
    pairs = zip(values, instruction.arrays, strict=True)
    return sum(_new(module, value) for value, array in pairs if value is not None and array.in_hbm)


def _new(module: Module, value: Instruction, callers: tuple[Instruction, ...] = ()) -> int:
    """How much of a result of a fusion is written by it, rather than there before; callers as for `_read`."""
    source = module.operand(value, 0) if value.operands else None
    if value.opcode == "parameter":
        outer = module.operand(callers[-1], int(value.arguments)) if callers else None
        return 0 if outer is None else _new(module, outer, callers[:-1])
    if value.name in module.continued or ends_collective(value):
        return 0
    if value.opcode == "bitcast" and source is not None:
        return _new(module, source, callers)
    if value.opcode in _UPDATES and source is not None:
        return _bytes_of(module, value, _UPDATES[value.opcode]) + _new(module, source, callers)
    if value.opcode == "fusion" and (root := module.roots.get(fused_into(value))) is not None and root.opcode != "tuple":
        return _new(module, root, (*callers, value))
    return value.bytes


def _own(module: Module, instruction: Instruction) -> list[Array]:
    """Its results, without the operands that one that begins something names beside them (a copy, a collective)."""
    begins: Iterable[Instruction] = ()
    names_operands = instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start"
    if names_operands or instruction.opcode == "send":
        begins = (instruction,)
    elif instruction.opcode == "fusion":
        body = module.computations.get(fused_into(instruction), {}).values()
        if any(map(begins_collective, body)):
            begins = (inner for inner in body if is_collective(inner))
    results = list(instruction.arrays)
    for beginning in begins:
        for index in range(len(beginning.operands)):
            operand = module.operand(beginning, index)
            for array in operand.arrays if operand is not None else ():
                if array in results:
                    results.remove(array)
    return results


def _bytes_of(module: Module, instruction: Instruction, index: int) -> int:
    operand = module.operand(instruction, index)
    return operand.bytes if operand else 0
