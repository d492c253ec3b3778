"""Accelerator topologies by name, without the hardware, and the figures of their chips.

`v5p:4x4x4` is a TPU slice by its chips along each axis, `h100:4x8` nodes x GPUs.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any, Literal

from starflow2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Vendor's figures of one chip.

    Attributes:
        platform: that compiles for it.
        flops: dense bfloat16 peak, FLOP/s.
        hbm_bytes: memory.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s that a chip can SEND to its neighbours, all links together; it can
            receive as much at the same time. ICI for TPUs, NVLink for GPUs.
        network_bandwidth: bytes/s that a chip can send out of its slice or node: DCN, InfiniBand.
        cores: devices of one chip; each has its share of everything above.
        source: where the figures are from, and what was converted.
    """

    platform: Literal["tpu", "cuda"]
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    source: str
    cores: int = 1

    def per_device(self) -> "Chip":
        """The figures of one device: of a core where a chip has several."""
        n = self.cores
        return dataclasses.replace(
            self,
            flops=self.flops / n,
            hbm_bytes=self.hbm_bytes / n,
            hbm_bandwidth=self.hbm_bandwidth / n,
            link_bandwidth=self.link_bandwidth / n,
            network_bandwidth=self.network_bandwidth / n,
            cores=1,
        )


_TPU = "docs.cloud.google.com/tpu/docs"
_HALF = "the interconnect is listed as both directions together: halved"

CHIPS = {
    "v5e": Chip(
        "tpu",
        197e12,
        16 * 2**30,
        819e9,
        200e9,
        3.1e9,
        f"{_TPU}/v5e; 400 GB/s, {_HALF} (also as 1600 Gbit/s, one direction); network 6.4 Tbit/s "
        "for 256 chips",
    ),
    "v5p": Chip(
        "tpu",
        459e12,
        95 * 2**30,
        2765e9,
        600e9,
        6.25e9,
        f"{_TPU}/v5p; 1200 GB/s, {_HALF} (also as 4800 Gbit/s, one direction); network 50 Gbit/s",
    ),
    "v6e": Chip(
        "tpu",
        918e12,
        32 * 2**30,
        1600e9,
        400e9,
        12.5e9,
        f"{_TPU}/v6e; 3200 Gbit/s, one direction (earlier the page said 3584, and 1640 GB/s of "
        "memory); network 25.6 Tbit/s for 256 chips",
    ),
    "tpu7x": Chip(
        "tpu",
        2307e12,
        192 * 2**30,
        7380e9,
        600e9,
        12.5e9,
        f"{_TPU}/tpu7x; 1200 GB/s, {_HALF}; network 100 Gbit/s; two devices a chip",
        cores=2,
    ),
    "h100": Chip(
        "cuda",
        989.4e12,
        80e9,
        3352e9,
        450e9,
        50e9,
        "NVIDIA H100 SXM5 data sheet, dense bfloat16; NVLink 900 GB/s, both directions: halved; "
        "network 400 Gbit/s a GPU, as in DGX H100",
    ),
}

# What the compiler must know of a GPU that is not there: XLA's target configuration.
_GPU_TARGETS = {
    "h100": """gpu_device_info {
      cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
      threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
      registers_per_block_limit: 65536 registers_per_core_limit: 65536
      shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
      shared_memory_per_core: 233472 l2_cache_size: 52428800
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: 3352320000000 device_memory_size: 84929347584
    }
    platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
    dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 patch: 0 }"""
}

_GPU_PLUGIN = "jax_cuda12_plugin"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind in one or several slices (GPUs: nodes).

    Attributes:
        name: as given.
        kind: key of `CHIPS`.
        shape: chips along each axis of a slice; GPUs: nodes, and GPUs of a node.
        slices: that the network connects.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """Figures of one chip."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Of all slices."""
        count = self.slices
        for size in self.shape:
            count *= size
        return count

    @property
    def network_groups(self) -> int:
        """Slices, or nodes of GPUs: what only the network connects."""
        return self.shape[0] if self.chip.platform == "cuda" else self.slices


# How devices call themselves, from the longest name to the shortest.
_DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v5": "v5p",
    "TPU7x": "tpu7x",
    "NVIDIA H100": "h100",
}


def device_peak_flops(device_kind: str) -> float | None:
    """FLOP/s in bfloat16 of one device that calls itself so (`jax.Device.device_kind`).

    A chip may be several devices. None: the table does not have it.
    """
    for name, kind in _DEVICE_KINDS.items():
        if device_kind.startswith(name):
            return CHIPS[kind].per_device().flops
    return None


def parse(name: str, slices: int = 1) -> Topology:
    """A topology by name.

    Args:
        name: `v5e:16x16`, `v5p:4x4x4`, `tpu7x:4x4x4`, `h100:4x8`.
        slices: TPU slices of that shape.

    Raises:
        UserError: no such chip, or a shape of another dimension.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"topology {name}: no chip {kind!r}; there are {', '.join(CHIPS)}")
    dimensions = 3 if kind in ("v5p", "tpu7x") else 2
    example = "x".join("4" * dimensions)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape.count("x") + 1 != dimensions:
        raise UserError(
            f"topology {name}: expected {dimensions} sizes behind the chip, as in {kind}:{example}"
        )
    sizes = tuple(int(size) for size in shape.split("x"))
    if min(sizes) < 1 or slices < 1:
        raise UserError(f"topology {name} x {slices} slices has no devices")
    if CHIPS[kind].platform == "cuda" and slices != 1:
        raise UserError(f"topology {name}: slices are of TPUs; give GPUs more nodes instead")
    return Topology(name, kind, sizes, slices)


def prepare_environment() -> None:
    """To be called before JAX is imported: compile only, no devices, no neighbours to look for."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:  # autotuning runs kernels
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def check_installed(topology: Topology) -> None:
    """Whether the compiler for this topology is here.

    Raises:
        UserError: it is not; says what to install.
    """
    if topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology {topology.name} needs the TPU compiler: pip install 'starflow2-jax[tpu]'"
        )
    if topology.chip.platform == "cuda" and importlib.util.find_spec(_GPU_PLUGIN) is None:
        raise UserError(
            f"topology {topology.name} needs the CUDA plugin, in an environment of its own: "
            "pip install 'starflow2-jax[gpu-plan]'"
        )


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology, to make a mesh of and to compile for; nothing runs on them.

    Raises:
        UserError: the compiler knows no such topology, or is not installed.
    """
    from jax.experimental import topologies

    check_installed(topology)
    try:
        if topology.chip.platform == "cuda":
            _pretend_hopper()
            nodes, gpus = topology.shape
            found = topologies.get_topology_desc(
                platform="cuda",
                topology=f"{nodes}x1x{gpus}",  # one process a node: what it holds is not network
                target_config=_GPU_TARGETS[topology.kind],
            )
        else:
            more = {"num_slices": topology.slices} if topology.slices > 1 else {}
            found = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{topology.kind}:{'x'.join(map(str, topology.shape))}",
                **more,
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or "see the compiler's message above"
        raise UserError(
            f"the compiler does not know the topology {topology.name}: {reason}"
        ) from error
    expected = topology.chips * topology.chip.cores
    if len(found.devices) != expected:
        # Some generations present the two cores of a chip as one device, or the other way round.
        raise UserError(
            f"topology {topology.name}: {len(found.devices)} devices, expected {expected}"
        )
    return list(found.devices)


def _pretend_hopper() -> None:
    """JAX asks the GPU that is here what it can do, where it should ask the one compiled for."""
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_compute_capability = lambda capability: True
