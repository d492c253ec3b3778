"""Optimised HLO text, read: instructions, computations, and how often each of them runs.

`cost_analysis()` of a compiled program counts the body of a loop once. What the compiler leaves in
its dump says more: the counts of `planning.cost` are made of it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "s1": 1,
    "u1": 1,
    "s2": 2,
    "u2": 2,
    "s4": 4,
    "u4": 4,
    "f4e2m1fn": 4,
    "s8": 8,
    "u8": 8,
    "f8e3m4": 8,
    "f8e4m3": 8,
    "f8e4m3b11fnuz": 8,
    "f8e4m3fn": 8,
    "f8e4m3fnuz": 8,
    "f8e5m2": 8,
    "f8e5m2fnuz": 8,
    "f8e8m0fnu": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_TILED = re.compile(r"\{([\d,]+):T\(([\d,]+)\)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_END = re.compile(r'^\}(, execution_thread="[^"]*")?$')
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
        space: 0 is the device's main memory.
        places: elements that it takes in memory, the padding of tiles included.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    places: int = 0

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.dims) * _BITS[self.dtype] // 8

    @property
    def stored(self) -> int:
        """Bytes that it takes in memory."""
        return max(self.places, math.prod(self.dims)) * _BITS[self.dtype] // 8


@dataclasses.dataclass
class Instruction:
    """One line of HLO.

    Attributes:
        name: without `%`.
        arrays: of the result, in order, tuples flattened.
        opcode: `fusion`, `convolution`, ...
        operands: names.
        text: the whole line, for attributes.
        root: of its computation.
    """

    name: str
    arrays: list[Array]
    opcode: str
    operands: list[str]
    text: str
    root: bool = False

    def attribute(self, name: str) -> str | None:
        """A value without blanks behind `name=`."""
        found = re.search(rf"\b{name}=([^\s,]+)", self.attributes)
        return found.group(1) if found else None

    @property
    def attributes(self) -> str:
        """What stands behind the operands."""
        return self.text[self._end :]

    _end: int = 0

    def called(self, *names: str) -> list[str]:
        """Computations of attributes `name=%computation` or `name={%a, %b}`."""
        result = []
        for name in names:
            for one, many in re.findall(
                rf"\b{name}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.attributes
            ):
                result += [one] if one else _NAME.findall(many)
        return result


@dataclasses.dataclass
class Computation:
    """Instructions in order, and by name."""

    name: str
    instructions: list[Instruction]

    def __post_init__(self) -> None:
        self.by_name = {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in reversed(self.instructions) if i.root)

    @property
    def parameters(self) -> list[Instruction]:
        """By number."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.text[: i._end].rsplit("(", 1)[1].rstrip(")")))


@dataclasses.dataclass
class Module:
    """A program.

    Attributes:
        computations: by name.
        entry: the one that runs.
        partitions: devices of the program.
    """

    computations: dict[str, Computation]
    entry: Computation
    partitions: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A computation that is no part of a fusion, and how often it runs in one execution."""

    computation: Computation
    times: float


def arrays_of(text: str) -> list[Array]:
    """The arrays of a shape as HLO writes it.

    Raises:
        ValueError: a dtype of unknown size: bytes would go uncounted.
    """
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        if dtype not in _BITS:
            raise ValueError(f"HLO has arrays of dtype {dtype}, whose size is not known: {text}")
        space = _SPACE.search(layout) if layout else None
        sizes = tuple(int(d) for d in dims.split(",")) if dims else ()
        places = _places(sizes, layout) if layout else 0
        found.append(Array(dtype, sizes, int(space.group(1)) if space else 0, places))
    return found


def _places(dims: tuple[int, ...], layout: str) -> int:
    """Elements in memory of an array whose layout has tiles; 0 without."""
    tiled = _TILED.match(layout)
    if tiled is None or not dims:
        return 0
    order = [int(axis) for axis in tiled.group(1).split(",")]  # the minormost first
    tile = [int(size) for size in tiled.group(2).split(",")][::-1]
    sizes = [dims[axis] for axis in order]
    for n, size in enumerate(tile[: len(sizes)]):
        sizes[n] = -(-sizes[n] // size) * size
    return math.prod(sizes)


def _closing(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if not depth:
                return index + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[start : start + 80]!r}")


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    start = head.end()
    if line[start] == "(":
        shape_end = _closing(line, start)
    else:
        shape_end = line.index(" ", start)
    opcode = _OPCODE.match(line, shape_end)
    if opcode is None:
        raise ValueError(f"no opcode in HLO: {line[:120]!r}")
    end = _closing(line, opcode.end() - 1)
    operands = _NAME.findall(line[opcode.end() : end])
    return Instruction(
        head.group(2),
        arrays_of(line[start:shape_end]),
        opcode.group(1),
        operands,
        line,
        bool(head.group(1)),
        end,
    )


def _lines(text: str) -> Iterator[str]:
    """Lines, with those of one instruction that spans several (a kernel's options) joined."""
    held = ""
    for line in text.splitlines():
        if not line:
            continue
        new = _INSTRUCTION.match(line) or _END.match(line) or _HEADER.match(line) or not held
        if new:
            if held:
                yield held
            held = line
        else:
            held += " " + line.strip()
    if held:
        yield held


def parse(text: str) -> Module:
    """Reads the text of an HLO module.

    Raises:
        ValueError: it is none.
    """
    computations: dict[str, Computation] = {}
    entry = None
    name, body, is_entry = "", [], False
    for line in _lines(text):
        header = _HEADER.match(line)
        if header:
            name, body, is_entry = header.group(2), [], bool(header.group(1))
        elif _END.match(line) and name:
            computations[name] = Computation(name, body)
            entry = computations[name] if is_entry else entry
            name = ""
        elif name and (instruction := _instruction(line)) is not None:
            body.append(instruction)
    if entry is None:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[:100_000])
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a `while` runs: what the compiler knows, or the largest constant that it counts to.

    A loop that counts up to no constant (one that goes on while something holds) counts once.
    """
    known = re.search(r"known_trip_count[^\d]*(\d+)", loop.text)
    if known:
        return int(known.group(1))
    constants, counts = [1], False
    pending = loop.called("condition")
    while pending:
        for i in module.computations[pending.pop()].instructions:
            found = re.search(r"\bconstant\((\d+)\)", i.text) if i.opcode == "constant" else None
            if found and i.arrays[0].dtype[0] in "su":
                constants.append(int(found.group(1)))
            counts |= i.opcode == "compare" and i.attribute("direction") == "LT"
            pending += i.called("calls", "to_apply")
    return max(constants) if counts else 1


def runs(module: Module) -> list[Run]:
    """Every computation outside of fusions, with how often it runs.

    Of a conditional's branches each counts whole: what may run.
    """
    return _runs_from(module, module.entry.name)


def runs_of_open_loop(module: Module) -> list[Run]:
    """`runs` of one turn of the entry's loop that goes on while something holds.

    Raises:
        ValueError: there is not exactly one.
    """
    loops = [
        i for i in module.entry.instructions if i.opcode == "while" and trip_count(module, i) == 1
    ]
    if len(loops) != 1:
        raise ValueError(f"{len(loops)} loops without a bound, expected 1")
    return _runs_from(module, *loops[0].called("body"))


def _runs_from(module: Module, first: str) -> list[Run]:
    found: list[Run] = []

    def visit(name: str, times: float) -> None:
        computation = module.computations[name]
        found.append(Run(computation, times))
        for i in computation.instructions:
            if i.opcode == "while":
                visit(*i.called("body"), times * trip_count(module, i))
            elif i.opcode == "conditional":
                for branch in i.called(
                    "branch_computations", "true_computation", "false_computation"
                ):
                    visit(branch, times)
            elif i.opcode == "call":
                visit(*i.called("to_apply"), times)

    visit(first, 1.0)
    return found


def within(module: Module, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """All that an instruction fuses or starts, with the computations they stand in."""
    for name in instruction.called("calls"):
        yield from _inside(module, name)


def _inside(module: Module, name: str) -> Iterator[tuple[Computation, Instruction]]:
    computation = module.computations[name]
    for inner in computation.instructions:
        yield computation, inner
        # What TPUs give to another core is a call in what is started.
        for deeper in inner.called("calls", *["to_apply"] * (inner.opcode == "call")):
            yield from _inside(module, deeper)
