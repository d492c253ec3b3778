"""What one execution of a compiled program costs a device: FLOPs, memory traffic, collectives."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from starflow2_jax.planning import hlo
from starflow2_jax.planning.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They move nothing: names for what is there.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "copy-done",
    "async-done",
    "async-update",
    "domain",
}
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Operations that change a part of their first operand in place: which operand is the part."""
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    Attributes:
        kind: of `COLLECTIVES`.
        axes: mesh axes that its groups span.
        group: devices of a group.
        crosses: devices of a group that are in different slices (or nodes) number this many.
        bytes: that a device sends in one run, by ring.
        times: how often it runs.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    crosses: int
    bytes: float
    times: float


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a kernel that the compiler does not look into."""

    name: str
    operands: tuple[Array, ...]
    times: float


@dataclasses.dataclass
class Cost:
    """Of one device, in one execution.

    Attributes:
        matrix_flops: of products of matrices, loop bodies as often as they run.
        kernels: see `KernelCall`.
        memory_bytes: read and written in the device's main memory.
        collectives: all of them.
    """

    matrix_flops: float
    kernels: list[KernelCall]
    memory_bytes: float
    collectives: list[Collective]

    def bytes_by_collective(self) -> dict[str, float]:
        """Bytes that a device sends, by kind and mesh axes: `all-gather over fsdp`."""
        found: dict[str, float] = defaultdict(float)
        for c in self.collectives:
            found[f"{c.kind} over {'+'.join(c.axes) or 'nothing'}"] += c.bytes * c.times
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _label_sizes(labels: str, dims: Sequence[int]) -> dict[str, int]:
    return dict(zip(labels, dims, strict=True))


def _window(text: str, rank: int) -> list[dict[str, int]]:
    """Of each spatial axis: `size`, `stride`, `pad`, and the dilations `lhs` and `rhs`.

    A reversal (`rhs_reversal`) is not read: it changes no count.
    """
    body = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=") for part in body.group(1).split()) if body else {}
    axes = []
    for axis in range(rank):

        def value(name: str, default: int, axis: int = axis) -> int:
            if name not in fields:
                return default
            return int(fields[name].split("x")[axis].split("_")[0])

        axes.append(
            {
                "size": value("size", 1),
                "stride": value("stride", 1),
                "pad": value("pad", 0),
                "lhs": value("lhs_dilate", 1),
                "rhs": value("rhs_dilate", 1),
            }
        )
    return axes


@functools.lru_cache(maxsize=4096)
def _taps(out: int, size: int, stride: int, pad: int, lhs: int, rhs: int, inputs: int) -> int:
    """Pairs of an output position and a window position that meet a real input."""
    at = np.arange(out)[:, None] * stride + np.arange(size)[None] * rhs - pad
    return int(((at >= 0) & (at <= (inputs - 1) * lhs) & (at % lhs == 0)).sum())


def convolution_flops(instruction: Instruction, left: Array, right: Array) -> float:
    """2 for each multiplication with a real input: TPUs write products of matrices like that."""
    labels = instruction.attribute("dim_labels")
    lhs, rest = labels.split("_")
    rhs, result = rest.split("->")
    out = _label_sizes(result, instruction.arrays[0].dims)
    kernel = _label_sizes(rhs, right.dims)
    inputs = _label_sizes(lhs, left.dims)
    spatial = sorted(label for label in result if label.isdigit())
    taps = 1
    for axis, w in zip(spatial, _window(instruction.text, len(spatial)), strict=True):
        taps *= _taps(out[axis], w["size"], w["stride"], w["pad"], w["lhs"], w["rhs"], inputs[axis])
    return 2.0 * out["b"] * out["f"] * kernel["i"] * taps


def dot_flops(instruction: Instruction, left: Array) -> float:
    """2 x the result x the contracted axes."""
    axes = re.search(
        r'"?lhs_contracting_(?:dims|dimensions)"?[=:]\s*[{\[]([^}\]]*)', instruction.text
    )
    contracted = re.findall(r"\d+", axes.group(1)) if axes else []
    size = math.prod(left.dims[int(axis)] for axis in contracted)
    return 2.0 * math.prod(instruction.arrays[0].dims) * size


def groups(text: str) -> np.ndarray:
    """Device ids [groups, devices of a group] of `replica_groups`, in any of its forms.

    Raises:
        ValueError: a form that is not known.
    """
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", text)
    if pairs:
        return np.array(
            [
                [int(n) for n in p.split(",")]
                for p in re.findall(r"\{([^{}]*)\}", text[pairs.start() : pairs.end()])
                if p
            ]
        )
    meshed = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", text
    )
    if meshed:
        sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", meshed.group(1))}
        over = meshed.group(3).replace("'", "").split(",")
        if not set(over) <= set(sizes):
            raise ValueError(f"a collective over part of an axis: {meshed.group(0)!r}")
        ids = _device_ids(meshed.group(2), math.prod(sizes.values())).reshape(*sizes.values())
        moved = [list(sizes).index(name) for name in over]
        kept = [axis for axis in range(len(sizes)) if axis not in moved]
        return ids.transpose(*kept, *moved).reshape(-1, math.prod(sizes[name] for name in over))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        dims = [int(d) for d in iota.group(3).split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(4):
            ids = ids.transpose([int(a) for a in iota.group(4).split(",")])
        return ids.reshape(int(iota.group(1)), int(iota.group(2)))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if listed:
        return np.array(
            [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed.group(0))]
        )
    raise ValueError(
        f"replica groups of an unknown form: {text[text.find('replica_groups') :][:120]!r}"
    )


def _device_ids(text: str | None, count: int) -> np.ndarray:
    """In a mesh's order: listed, or counted through a transposed box, `[16,8]T(1,0)`."""
    if not text:
        return np.arange(count)
    box = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", text)
    if box is None:
        return np.array([int(n) for n in re.findall(r"\d+", text)])
    ids = np.arange(count).reshape([int(d) for d in box.group(1).split(",")])
    if box.group(2):
        ids = ids.transpose([int(axis) for axis in box.group(2).split(",")])
    return ids.ravel()


def _sent(kind: str, inputs: float, outputs: float, group: int) -> float:
    """Bytes that a device sends, by ring."""
    if group <= 1:
        return 0.0
    share = (group - 1) / group
    if kind == "all-gather":
        return outputs * share
    if kind == "all-reduce":
        return 2.0 * inputs * share
    if kind in ("collective-permute", "collective-broadcast"):
        return inputs
    return inputs * share


class _Reader:
    """Walks a module; see `cost`."""

    def __init__(
        self, module: Module, mesh: Mapping[str, int], slice_of: Sequence[int] | None
    ) -> None:
        self.module = module
        self.mesh = mesh
        self.slice_of = slice_of
        self.flops = 0.0
        self.memory = 0.0
        self.kernels: list[KernelCall] = []
        self.collectives: dict[tuple, Collective] = {}

    def read(self, runs: list[hlo.Run]) -> Cost:
        """The cost of these runs."""
        for run in runs:
            for i in run.computation.instructions:
                self._count(run.computation, run, run.computation, i)
                self.memory += run.times * self._memory(run.computation, i)
                for inside, inner in hlo.within(self.module, i):
                    self._count(run.computation, run, inside, inner)
        return Cost(self.flops, self.kernels, self.memory, list(self.collectives.values()))

    def _count(self, outer: Computation, run: hlo.Run, inside: Computation, i: Instruction) -> None:
        operand = lambda n: inside.by_name[i.operands[n]].arrays[0]
        opcode = i.opcode.removesuffix("-start")
        if i.opcode == "convolution":
            self.flops += run.times * convolution_flops(i, operand(0), operand(1))
        elif i.opcode == "dot":
            self.flops += run.times * dot_flops(i, operand(0))
        elif opcode in COLLECTIVES and i.operands:
            self._collective(outer, run, inside, i, opcode)
        elif i.opcode == "send" and "_xla_megascale_transfer_type" in i.text:
            self._between_slices(run, inside, i)
        elif i.opcode == "custom-call":
            target = i.attribute("custom_call_target").strip('"')
            if target.startswith("__cublas"):
                self.flops += run.times * dot_flops(i, operand(0))
            elif target == "tpu_custom_call" or target.startswith("__cudnn"):
                operands = tuple(a for name in i.operands for a in inside.by_name[name].arrays)
                self.kernels.append(KernelCall(_kernel_name(i, target), operands, run.times))

    def _collective(
        self, outer: Computation, run: hlo.Run, inside: Computation, i: Instruction, kind: str
    ) -> None:
        # An asynchronous collective shows up in each of the fusions that it overlaps with.
        chain = re.search(r'chain_id="(\d+)"', i.text) if inside is not outer else None
        key = (outer.name, chain.group(1)) if chain else (inside.name, i.name)
        if key in self.collectives:
            return
        ids = groups(i.text)
        inputs = sum(a.bytes for name in i.operands for a in inside.by_name[name].arrays)
        outputs = sum(a.bytes for a in i.arrays)
        if i.opcode == "all-gather-start":
            outputs -= inputs  # the result holds the operand, too
        if kind == "all-reduce" and "all-reduce-scatter" in inside.name:
            kind = "reduce-scatter"  # how TPUs write one: its result is a slice
        group = ids.shape[1]
        axes, crosses = self._axes(ids)
        self.collectives[key] = Collective(
            kind, axes, group, crosses, _sent(kind, inputs, outputs, group), run.times
        )

    def _between_slices(self, run: hlo.Run, inside: Computation, i: Instruction) -> None:
        """Between slices, hosts do the rest of a collective: each device sends what it has."""
        if self.slice_of is None:
            raise ValueError("a transfer between slices in a program of one slice")
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.text).group(1)
        kind = kind.lower().replace("_", "-")
        if kind not in COLLECTIVES:
            raise ValueError(f"a transfer of an unknown kind between slices: {kind}")
        slices = np.asarray(self.slice_of)
        # The devices at the same place of each slice.
        ids = np.stack([np.flatnonzero(slices == n) for n in np.unique(slices)], axis=1)
        axes, crosses = self._axes(ids)
        group = ids.shape[1]
        inputs = sum(a.bytes for a in inside.by_name[i.operands[0]].arrays)
        sent = _sent(kind, inputs, inputs * group, group)
        self.collectives[inside.name, i.name] = Collective(
            kind, axes, group, crosses, sent, run.times
        )

    def _axes(self, ids: np.ndarray) -> tuple[tuple[str, ...], int]:
        sizes = tuple(self.mesh.values())
        if math.prod(sizes) <= ids.max():
            raise ValueError(f"a collective of device {ids.max()} on a mesh of {sizes}")
        where = np.array(np.unravel_index(ids, sizes))  # [axes, groups, devices]
        varies = (where != where[:, :, :1]).any((1, 2))
        axes = tuple(name for name, v in zip(self.mesh, varies, strict=True) if v)
        crosses = 1
        if self.slice_of is not None:
            slices = np.asarray(self.slice_of)[ids]
            crosses = max(len(set(row)) for row in slices)
        return axes, crosses

    def _memory(self, computation: Computation, i: Instruction) -> float:
        """Bytes of main memory that an instruction reads and writes when it runs once."""
        if i.opcode in _FREE or i.opcode.endswith("-done"):
            return 0.0
        if (
            i.opcode == "custom-call"
            and i.attribute("custom_call_target").strip('"') in _FREE_CALLS
        ):
            return 0.0
        operands = [computation.by_name[name] for name in i.operands]
        if i.opcode == "copy-start":
            return float(sum(_main(a) for a in i.arrays[:2]))
        if i.opcode == "async-start":
            return self._called_memory(i, operands)
        if i.opcode == "fusion":
            return self._called_memory(i, operands)
        if i.opcode in _SLICES:
            moved = i.arrays[0]
            return float(_main(moved) + (moved.stored if _in_main(operands[0]) else 0))
        if i.opcode == "dynamic-update-slice":
            update = operands[1].arrays[0]
            return float(_main(update) + (update.stored if _in_main(i) else 0))
        if i.opcode == "scatter":
            update = operands[2].arrays[0]
            return float(_main(update) + (2 * update.stored if _in_main(i) else 0))
        started = i.opcode.removesuffix("-start")
        if (started in COLLECTIVES and started != i.opcode) or i.opcode in ("send", "recv"):
            return float(sum(_main(a) for a in i.arrays))
        read = sum(_main(a) for o in operands for a in o.arrays)
        return float(read + sum(_main(a) for a in i.arrays))

    def _called_memory(self, i: Instruction, operands: list[Instruction]) -> float:
        (name,) = i.called("calls")
        called = self.module.computations[name]
        held = _aliased(i) if self._overlaps(i) else set()
        total = 0.0
        for number, (parameter, operand) in enumerate(
            zip(called.parameters, operands, strict=True)
        ):
            if number in held or not operand.arrays or not _in_main(operand):
                continue
            total += self._read(called, parameter, operand.arrays)
        if not held:
            results = i.arrays
            if i.opcode == "async-start":  # operands, results, context
                results = called.root.arrays
                results = [
                    dataclasses.replace(a, space=s.space)
                    for a, s in zip(
                        results, i.arrays[sum(len(o.arrays) for o in operands) :], strict=False
                    )
                ]
            total += self._written(called, results)
        return total

    def _overlaps(self, i: Instruction) -> bool:
        """Whether a fusion holds a piece of an asynchronous collective."""
        return any(inner.opcode in COLLECTIVES for _, inner in hlo.within(self.module, i))

    def _read(self, called: Computation, parameter: Instruction, arrays: list[Array]) -> float:
        """Bytes of a parameter that a fused computation reads."""
        whole = float(sum(a.stored for a in arrays if not a.space))
        total = 0.0
        for user in called.instructions:
            if parameter.name not in user.operands:
                continue
            if user.opcode in _SLICES:
                if user.operands[0] == parameter.name:
                    total += user.arrays[0].stored
            elif user.opcode in _UPDATES and user.operands[0] == parameter.name:
                continue  # in place
            elif user.opcode in ("bitcast", "get-tuple-element"):
                total += self._read(
                    called, user, [dataclasses.replace(a, space=0) for a in user.arrays]
                )
            elif user.opcode == "fusion":
                inner = self.module.computations[user.called("calls")[0]]
                for number, name in enumerate(user.operands):
                    if name != parameter.name:
                        continue
                    total += self._read(inner, inner.parameters[number], arrays)
                    if _source(inner) == inner.parameters[number].name:  # handed on, to be read
                        total += self._read(
                            called, user, [dataclasses.replace(a, space=0) for a in user.arrays]
                        )
            elif user.opcode == "tuple":
                continue  # handed through
            else:
                return whole
        return min(total, whole)

    def _written(self, called: Computation, results: list[Array]) -> float:
        """Bytes of its results that a fused computation writes: of an update, the update."""
        roots = [called.root]
        if called.root.opcode == "tuple":
            roots = [called.by_name[name] for name in called.root.operands]
        if len(roots) != len(results):
            return float(sum(_main(a) for a in results))
        total = 0.0
        for root, result in zip(roots, results, strict=True):
            if not result.space:
                total += self._update(called, root) or result.stored
        return total

    def _update(self, called: Computation, root: Instruction) -> float:
        """Bytes that an update in place writes; 0 where the result is made anew."""
        while root.opcode in ("bitcast", "convert") and root.operands:
            root = called.by_name[root.operands[0]]
        if root.opcode in _UPDATES:
            return float(called.by_name[root.operands[_UPDATES[root.opcode]]].arrays[0].stored)
        if root.opcode == "fusion":
            inner = self.module.computations[root.called("calls")[0]]
            return self._update(inner, inner.root) if inner.root.opcode != "tuple" else 0.0
        if root.opcode == "parameter":
            return 1e-9  # handed through
        return 0.0


def _source(called: Computation) -> str:
    """What a computation returns, under the name that it had before it was seen in other shapes."""
    found = called.root
    while found.opcode == "bitcast":
        found = called.by_name[found.operands[0]]
    return found.name


def _main(array: Array) -> int:
    return 0 if array.space else array.stored


def _in_main(i: Instruction) -> bool:
    return any(not a.space for a in i.arrays)


def _aliased(i: Instruction) -> set[int]:
    """Operands that share memory with a result."""
    listed = re.search(r"output_to_operand_aliasing=\{(.*?\})\}", i.attributes)
    return {int(n) for n in re.findall(r"\((\d+),", listed.group(1))} if listed else set()


def _kernel_name(i: Instruction, target: str) -> str:
    return re.sub(r"[.\d]+$", "", i.name) if target == "tpu_custom_call" else target


def cost(
    module: Module,
    mesh: Mapping[str, int],
    slice_of: Sequence[int] | None = None,
    open_loop: bool = False,
) -> Cost:
    """The cost of one execution on each device.

    Args:
        module: compiled for all devices of the mesh.
        mesh: axis -> size, in order.
        slice_of: the slice (or node) of each device, in the mesh's order; None: one slice.
        open_loop: of one turn of the program's loop that goes on while something holds.

    Raises:
        ValueError: HLO of an unknown form.
    """
    runs = hlo.runs_of_open_loop(module) if open_loop else hlo.runs(module)
    return _Reader(module, mesh, slice_of).read(runs)
