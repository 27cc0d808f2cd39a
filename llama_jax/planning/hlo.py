"""Compiled programs as data: instructions of the scheduled HLO text, how often each runs, and its collectives.

The compiler's own cost analysis counts the body of a loop once, so everything here carries a count: the product of the trip
counts of the loops around it, each read from the loop's condition.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations|async_computation)="
                     r"(?:\{([^}]*)\}|%?([\w.\-]+))")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of an array in a program, and whether it lies in the chip's main memory (not in a scratch memory)."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits.group()) if digits else 8)
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result
    operands: tuple[str, ...]
    attributes: str
    computation: str
    arguments: str = ""  # the text between its parentheses

    @property
    def bytes(self) -> int:
        """The size of its result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate of one execution, in cycles of the core; 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else 0


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind between the devices of a group, as one instruction orders it."""

    kind: str  # of COLLECTIVES
    bytes: int  # of the whole, not the divided array on one device: the result, for reduce-scatter the operand
    group: tuple[int, ...]  # the devices of the first group, by their index in the mesh
    count: int  # executions a step
    overlapped: bool  # arithmetic can run beside it
    op_name: str
    dtype: str


class Module:
    """A parsed program. A loop that ends when it may, so that its text tells no length, runs `trips` times (0: an error)."""

    def __init__(self, text: str, *, trips: int = 0):
        self.trips = trips
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}  # of each computation the one whose value is its result
        self.entry = ""
        current = None
        for line in _lines(text):
            if current is None:
                opened = re.match(r"(ENTRY )?%?([\w.\-]+)\s.*\{$", line)
                if opened and not line.startswith("HloModule"):
                    current = opened.group(2)
                    self.computations[current] = {}
                    self.entry = current if opened.group(1) else self.entry
            elif line == "}":
                current = None
            elif (instruction := _parse(line, current)) is not None:
                self.computations[current][instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    self.roots[current] = instruction
        if not self.entry:
            raise ValueError("no ENTRY computation: this is not the text of a compiled program")

    def __iter__(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that is executed or fused into an executed one, with its executions a step."""
        for name, count in self.counts.items():
            for instruction in self.computations[name].values():
                yield instruction, count

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Executions a step of each computation that is reached. Of two branches both count: the longer is not known."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                trips = self.trip_count(instruction) if instruction.opcode == "while" else 1
                for called in _called(instruction):
                    if called in self.computations:
                        visit(called, round(times * trips))  # a mean is one over the loop around, and whole with its trips

        visit(self.entry, 1)
        return counts

    @functools.cached_property
    def fused(self) -> set[str]:
        """Computations whose instructions are not executed one by one: bodies of fusions and reducers."""
        return {
            called
            for instructions in self.computations.values()
            for instruction in instructions.values()
            if instruction.opcode not in ("while", "conditional", "call") and not instruction.opcode.startswith("async")
            for called in _called(instruction)
        }

    def trip_count(self, loop: Instruction) -> int | Fraction:
        """How often a `while` runs: the bound that its condition compares with (loops here count from 0 by 1), the mean that
        its name tells, or `trips`."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        if mean := mean_trips(loop.op_name.removesuffix("/while")):
            return mean
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes).group(1)
        constants = [
            int(instruction.arguments)
            for name in (condition, *self._below(condition))
            for instruction in self.computations[name].values()
            if instruction.opcode == "constant" and re.fullmatch(r"-?[1-9]\d*", instruction.arguments)  # 0 bounds no loop
        ]
        if len(constants) == 1:
            return constants[0]
        if not self.trips:
            raise ValueError(f"loop {loop.name}: no single bound in its condition {condition}, found {constants}")
        return self.trips

    def _below(self, name: str) -> Iterator[str]:
        """The computations that are parts of one; reducers are not, and may hold numbers of their own."""
        for instruction in self.computations[name].values():
            for called in _called(instruction) if instruction.opcode in ("fusion", "call") else ():
                yield called
                yield from self._below(called)

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction that makes an operand."""
        return self.computations[instruction.computation].get(instruction.operands[index])

    def parameter(self, computation: str, index: int) -> Instruction | None:
        """What stands for the operand of that index inside of a computation."""
        inside = self.computations.get(computation, {}).values()
        return next((i for i in inside if i.opcode == "parameter" and i.arguments == str(index)), None)

    def users(self, instruction: Instruction) -> list[tuple[Instruction, int]]:
        """(user, index of the operand) of everything in the same computation that takes an instruction's value."""
        return self._users[instruction.computation].get(instruction.name, [])

    @functools.cached_property
    def _users(self) -> dict[str, dict[str, list[tuple[Instruction, int]]]]:
        found: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}
        for computation, instructions in self.computations.items():
            users = found[computation] = {}
            for instruction in instructions.values():
                for index, name in enumerate(instruction.operands):
                    users.setdefault(name, []).append((instruction, index))
        return found

    def collectives(self) -> list[Collective]:
        """All communication of a step, that between slices last. Groups of one device, which talk to nobody, are left out."""
        between = (_between_slices(instruction, count) for instruction, count in self)
        return [*map(self._collective, self._parts.values()), *(crossing for crossing in between if crossing is not None)]

    @functools.cached_property
    def continued(self) -> set[str]:
        """The instructions inside of fusions that go on with a collective, or end it, which another fusion has begun."""
        found: set[str] = set()
        for parts in self._parts.values():
            if any(self._begins(instruction) for instruction, _ in parts):
                found |= {instruction.name for instruction, _ in parts if not self._begins(instruction)}
        return found

    @functools.cached_property
    def _parts(self) -> dict[str, list[tuple[Instruction, int]]]:
        """The instructions of each collective with their executions.

        The TPU compiler spreads an asynchronous collective over several fusions (begin, steps beside arithmetic, end), all
        with the channel of one collective. Elsewhere channels of different origin may carry the same number.
        """
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction, count in self:
            if not is_collective(instruction) or len(_group(instruction)) < 2:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            fused = channel is not None and instruction.computation in self.fused
            found.setdefault(channel.group(1) if fused else instruction.name, []).append((instruction, count))
        return found

    def _begins(self, instruction: Instruction) -> bool:
        return any(begins_collective(inner) for inner in self.computations[instruction.computation].values())

    def _collective(self, parts: list[tuple[Instruction, int]]) -> Collective:
        instruction, _ = parts[-1]
        # A step may lie in a loop of its own and run more often than what it is a step of: what begins it is counted.
        begun = sum(count for part, count in parts if self._begins(part))
        kind, arrays = instruction.opcode.removesuffix("-start"), instruction.arrays
        if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]  # (operands, results, ...)
        if instruction.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # as the TPU compiler writes one; its result here is that of the all-reduce
        elif kind == "reduce-scatter":
            arrays = tuple(array for i in range(len(instruction.operands)) for array in self.operand(instruction, i).arrays)
        return Collective(
            kind, sum(array.bytes for array in arrays), _group(instruction), begun or max(count for _, count in parts),
            any(part.opcode.endswith("-start") or self._beside_arithmetic(part) for part, _ in parts),
            instruction.op_name, max(arrays, key=lambda array: array.bytes).dtype,
        )  # fmt: skip

    def _beside_arithmetic(self, instruction: Instruction) -> bool:
        """Whether a collective is part of a fusion with a matrix product, or waited for by another instruction."""
        if instruction.computation not in self.fused:
            return instruction.computation in self._asynchronous
        body = self.computations[instruction.computation].values()
        return any(
            i.opcode in ("convolution", "dot") or (i.opcode == "fusion" and self._multiplies(i)) for i in body
        ) and not instruction.computation.startswith("all-reduce-scatter")

    def _multiplies(self, fusion: Instruction) -> bool:
        return any(
            i.opcode in ("convolution", "dot") for name in _called(fusion) for i in self.computations.get(name, {}).values()
        )

    @functools.cached_property
    def _asynchronous(self) -> set[str]:
        return {
            called
            for instructions in self.computations.values()
            for instruction in instructions.values()
            if instruction.opcode.startswith("async")
            for called in _called(instruction)
        }


def is_collective(instruction: Instruction) -> bool:
    """Whether it is communication between devices, or begins some."""
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def begins_collective(instruction: Instruction) -> bool:
    """Whether it stands, in a fusion, for the begin of a collective that later fusions go on with."""
    return 'custom_call_target="AsyncCollectiveStart"' in instruction.attributes


def ends_collective(instruction: Instruction) -> bool:
    """Whether it stands, in a fusion, for the end of such a one."""
    return 'custom_call_target="AsyncCollectiveDone"' in instruction.attributes


def fused_into(fusion: Instruction) -> str:
    """The computation that a fusion executes; "" for any other instruction."""
    found = re.search(r"calls=%?([\w.\-]+)", fusion.attributes) if fusion.opcode == "fusion" else None
    return found.group(1) if found else ""


def mesh_axes(collective: Collective, shape: dict[str, int]) -> tuple[str, ...]:
    """Along which axes of a mesh (name -> size, in the order of its devices) a collective communicates."""
    places = np.array(np.unravel_index(np.array(collective.group), tuple(shape.values())))
    return tuple(axis for axis, along in zip(shape, places, strict=True) if len(set(along.tolist())) > 1)


def _lines(text: str) -> Iterator[str]:
    """The lines of a program; an instruction is one, although the metadata of Pallas kernels holds line ends."""
    pending = None
    for line in text.splitlines():
        if pending is not None and line != "}" and not re.match(r"  +(ROOT )?%?[\w.\-]+ = ", line):
            pending += " " + line
            continue
        if pending is not None:
            yield pending
            pending = None
        if line.startswith("  "):
            pending = line
        else:
            yield line
    if pending is not None:
        yield pending


def _parse(line: str, computation: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" not in (layout or ""))
        for dtype, shape, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", rest[:end]))
    )
    rest = rest[end:].lstrip()
    opened = rest.index("(")
    closed = opened + _closing(rest[opened:])
    arguments = rest[opened + 1 : closed]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(head.group(1), rest[:opened], arrays, operands, rest[closed + 1 :], computation, arguments)


def mean_trips(name: str) -> Fraction | None:
    """How often a loop in the scope of this name runs on average, if the name tells (`model.blockwise`)."""
    found = re.search(r"mean_trips_(\d+)_halves$", name)
    return Fraction(int(found.group(1)), 2) if found else None


def _closing(text: str) -> int:
    """The index of the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _called(instruction: Instruction) -> list[str]:
    text = instruction.attributes.split(", metadata=")[0].split(", backend_config=")[0]
    return [
        name.strip().lstrip("%")
        for several, one in _CALLED.findall(text)
        for name in (several.split(",") if several else [one])
    ]


def _between_slices(instruction: Instruction, count: int) -> Collective | None:
    """What a `send` to the hosts carries over the data-centre network, between devices of one place in several slices."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x\{(\d+)(?::(\d+))?', instruction.attributes)
    if instruction.opcode != "send" or kind is None or target is None:
        return None
    slices = sum(_length(part) for part in target.group(1).split(","))
    devices = int(target.group(3) or target.group(2)) + 1  # of a slice
    array = instruction.arrays[0]
    return Collective(
        kind.group(1).lower().replace("_", "-"), array.bytes, tuple(k * devices for k in range(slices)), count, True,
        instruction.op_name, array.dtype,
    )  # fmt: skip


def _length(part: str) -> int:
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1


def _group(instruction: Instruction) -> tuple[int, ...]:
    """The devices of the first group that really communicates; () if none does."""
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{([^=]*?)\}\}", text)
    if pairs:
        numbers = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)", "{" + pairs.group(1))]
        return next((pair for pair in numbers if pair[0] != pair[1]), ())
    plain = re.search(r"replica_groups=\{(\{[\d,]+\})", text)
    if plain:
        return tuple(int(n) for n in plain.group(1).strip("{}").split(","))
    # [groups, size]<=[dimensions]T(permutation): an iota, reshaped, transposed and cut into groups
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return tuple(_iota(iota.group(3), iota.group(4)).reshape(int(iota.group(1)), -1)[0].tolist())
    # mesh['a'=8,'b'=4], device_ids=([4,8]T(1,0)) {'a'}: all devices along the named axes; the ids are an iota as above.
    # 'a':(2)4 is the part of `a` of size 4 behind one of size 2.
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text)
    if named is None:
        raise ValueError(f"collective {instruction.name}: cannot read the groups of {text[:200]!r}")
    axes, dimensions, permutation, used = named.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    devices = np.arange(math.prod(sizes.values())) if dimensions is None else _iota(dimensions, permutation)
    devices = devices.reshape(tuple(sizes.values()))
    chosen: list = [0] * len(sizes)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used):
        index = list(sizes).index(name)
        if not size:
            chosen[index] = slice(None)
        else:
            behind = sizes[name] // (int(before) * int(size))
            chosen[index] = slice(0, int(size) * behind, behind)
    return tuple(np.atleast_1d(devices[tuple(chosen)]).flatten().tolist())


def _iota(dimensions: str, permutation: str | None) -> np.ndarray:
    shape = [int(n) for n in dimensions.split(",")]
    devices = np.arange(math.prod(shape)).reshape(shape)
    return (devices.transpose([int(n) for n in permutation.split(",")]) if permutation else devices).flatten()
