"""The device mesh: five axes, from slow links to fast ones.

`data` may span slices (DCN); the others want to stay inside one (ICI, NVLink).
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from starflow2_jax.errors import UserError

AXES = ("data", "fsdp", "columns", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp", "columns")
"""Those that share out a batch's rows."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: what remains.

    Attributes:
        data: replicas of the parameters, each with its share of the batch; across slices.
        fsdp: shards of parameters and optimiser state, and of the batch.
        columns: the same, but along the other axis of each matrix. Cut along both, a matrix of a
            layer is whole tiles on each of hundreds of devices, and its gradient is scattered
            where along one axis it would be reduced everywhere.
        tensor: shards of heads, MLP and vocabulary.
        sequence: shards of a row's positions.
    """

    data: int = 1
    fsdp: int = -1
    columns: int = 1
    tensor: int = 1
    sequence: int = 1

    def sizes(self, devices: int) -> tuple[int, int, int, int, int]:
        """The five sizes for this many devices, -1 filled in.

        Raises:
            ValueError: a size that is neither positive nor -1, several -1, or sizes whose product
                is not the number of devices.
        """
        sizes = dataclasses.astuple(self)
        text = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        if any(size != -1 and size < 1 for size in sizes):
            raise ValueError(f"mesh ({text}): a size is a positive number, or -1 for what remains")
        if sizes.count(-1) > 1:
            raise ValueError(f"mesh ({text}): only one size may be -1")
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes:
            if devices % known:
                raise ValueError(
                    f"mesh ({text}): {devices} devices cannot be shared out, the given sizes "
                    f"multiply to {known}, which does not divide {devices}"
                )
            return tuple(devices // known if size == -1 else size for size in sizes)
        if known != devices:
            raise ValueError(
                f"mesh ({text}): the sizes multiply to {known}, but there are {devices} devices"
            )
        return sizes


def parse_mesh(text: str) -> dict[str, int]:
    """A mesh from the command line, `fsdp=8,tensor=2`: the size of every axis, 1 where not given.

    Raises:
        UserError: it is no such text.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in sizes or not number.isdecimal() or int(number) < 1:
            raise UserError(
                f"mesh {text!r}: {part!r} is no axis with its size; expected for example "
                f"fsdp=8,tensor=2 (axes: {', '.join(AXES)})"
            )
        sizes[name] = int(number)
    return sizes


def _across_slices(sizes: Sequence[int], slices: int) -> tuple[int, int, int, int, int]:
    """How many of each axis' shards lie in different slices: data first, what remains fsdp.

    Raises:
        ValueError: data * fsdp cannot be cut along the borders of the slices.
    """
    data = math.gcd(sizes[0], slices)
    fsdp = slices // data
    if sizes[1] % fsdp:
        text = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"mesh ({text}): {slices} slices need data (best) or data * fsdp to be a multiple of "
            f"{slices}; the other axes stay inside a slice"
        )
    return data, fsdp, 1, 1, 1


def arrange(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Devices in mesh order [data, fsdp, columns, tensor, sequence]; see `make_mesh`.

    Raises:
        ValueError: see `MeshConfig.sizes`; or several slices that the mesh cannot span.
    """
    sizes = config.sizes(len(devices))
    slices = collections.Counter(getattr(device, "slice_index", None) or 0 for device in devices)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(
            sizes, devices=list(devices), allow_split_physical_axes=True
        )
    if len(set(slices.values())) > 1:
        raise ValueError(f"slices of different sizes: {dict(sorted(slices.items()))}")
    across = _across_slices(sizes, len(slices))
    inside = [size // outer for size, outer in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices=list(devices), allow_split_physical_axes=True
    )


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh with axes data, fsdp, columns, tensor, sequence over all devices of all processes.

    Args:
        config: sizes.
        devices: jax devices, or those of a topology description; default `jax.devices()`.

    Raises:
        ValueError: sizes that do not fit the number of devices, or slices that they cannot span.
    """
    arranged = arrange(config, jax.devices() if devices is None else devices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def serving_mesh(devices: int) -> Mesh | None:
    """The mesh of a model that is only sampled or scored; see `rules.SERVING`.

    Args:
        devices: of this process, which share out weights and rows; 1: there is no mesh.

    Raises:
        UserError: the process has fewer.
    """
    here = jax.local_devices()
    if devices > len(here):
        raise UserError(f"a model on {devices} devices: this process has {len(here)}")
    return None if devices == 1 else make_mesh(MeshConfig(fsdp=devices), here[:devices])


def check_batch(rows: int, mesh: Mesh, parts: int = 1) -> None:
    """Checks that each device of the batch's axes gets equally many of a batch's rows.

    Args:
        rows: of the batch.
        mesh: see `make_mesh`.
        parts: that the batch is run in, one after another.

    Raises:
        ValueError: it does not.
    """
    names = [axis for axis in BATCH_AXES if axis in ("data", "fsdp") or mesh.shape[axis] > 1]
    sizes = [mesh.shape[axis] for axis in names]
    shares = math.prod(sizes)
    if rows % (shares * parts):
        over = f"{' x '.join(names)} = {' x '.join(map(str, sizes))} = {shares} devices"
        over += f" in {parts} parts" if parts > 1 else ""
        raise ValueError(
            f"a batch of {rows} rows cannot be shared out over {over}: use a multiple of "
            f"{shares * parts} rows, or a smaller fsdp"
        )
