"""From counts to times: what the units of a chip would need at their vendor's rates.

Nothing here was run. A time is a bound from below: full rate, no latency, no instruction between.
"""

import dataclasses
import math

from starflow2_jax.nn import attention_kernels
from starflow2_jax.planning.cost import Cost, KernelCall
from starflow2_jax.planning.topology import Chip


def kernel_flops(call: KernelCall) -> float:
    """FLOPs of one run of an attention kernel on a device: of the blocks of scores that it visits.

    Raises:
        ValueError: a kernel that is not known.
    """
    arrays = [a for a in call.operands if len(a.dims) == 4 and a.dtype in ("bf16", "f16", "f32")]
    if call.name.startswith("splash_mha"):
        rows, heads, *sizes = arrays[0].dims
        d, length = sorted(sizes)  # in either order; heads have 128 at most, rows at least
        block = attention_kernels.splash_block(length)
        blocks = length // block
        visited = blocks * (blocks + 1) / 2 * block * block  # of the causal mask
        # Products of [T, d] and [T, T]: scores and mixture; their gradients recompute the scores.
        products = {"fwd": 2, "dq": 3, "dkv": 4}
        kind = call.name.removeprefix("splash_mha_").split("_")[0]
        return 2.0 * products[kind] * rows * heads * visited * d
    if call.name.startswith("__cudnn"):
        rows, length, heads, d = arrays[0].dims
        products = 5 if "Backward" in call.name else 2
        return 2.0 * products * rows * heads * length * (length + 1) / 2 * d
    raise ValueError(f"kernel {call.name!r}: nothing says how many FLOPs it takes")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one execution on each device, by unit.

    Attributes:
        matrix: matrix units, kernels included.
        memory: main memory.
        links: interconnect inside a slice or node.
        network: between slices or nodes.
        matrix_flops, kernel_flops: per device.
        ideal: seconds of the model's FLOPs alone; NaN where there are none to compare with.
    """

    matrix: float
    memory: float
    links: float
    network: float
    matrix_flops: float
    kernel_flops: float
    ideal: float

    @property
    def compiled_flops(self) -> float:
        """Per device."""
        return self.matrix_flops + self.kernel_flops

    @property
    def seconds(self) -> float:
        """Everything overlapped."""
        return max(self.matrix, self.memory, self.links, self.network)

    @property
    def seconds_serial(self) -> float:
        """Interconnect and network not overlapped at all."""
        return max(self.matrix, self.memory) + self.links + self.network

    @property
    def mfu(self) -> float:
        """Bound on the share of the peak that the model's FLOPs reach."""
        return self.ideal / self.seconds

    @property
    def mfu_serial(self) -> float:
        """The same, interconnect not overlapped."""
        return self.ideal / self.seconds_serial


def roofline(cost: Cost, chip: Chip, model_flops: float = math.nan) -> Roofline:
    """Times of a device.

    A collective that crosses slices (or nodes) sends what it must across the network; the rest of
    its bytes stay inside.

    Args:
        cost: of a device.
        chip: figures of a device: `Chip.per_device`.
        model_flops: of a device.
    """
    kernels = sum(kernel_flops(call) * call.times for call in cost.kernels)
    links = network = 0.0
    for c in cost.collectives:
        sent = c.bytes * c.times
        outside = 0.0
        if c.crosses > 1:
            # An all-to-all has a piece for each device: those for devices of other slices go out.
            # The others are hierarchical: the devices at one place of each slice make a ring that
            # works on their part of the array, and the rest happens inside. A ring of n sends
            # (1 - 1/n) of an array, or twice that: here of a part, with slices for n.
            outside = sent * (1 - 1 / c.crosses) / (1 - 1 / c.group)
            if c.kind != "all-to-all":
                outside /= max(1, c.group // c.crosses)
        links += sent - outside if c.crosses < c.group else 0.0
        network += outside
    return Roofline(
        matrix=(cost.matrix_flops + kernels) / chip.flops,
        memory=cost.memory_bytes / chip.hbm_bandwidth,
        links=links / chip.link_bandwidth,
        network=network / chip.network_bandwidth,
        matrix_flops=cost.matrix_flops,
        kernel_flops=kernels,
        ideal=model_flops / chip.flops,
    )
