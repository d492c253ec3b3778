"""Released STARFlow and TarFlow checkpoints into model directories, and back, tensor by tensor."""

import pathlib

from flax import nnx

from starflow2_jax import flow_bundle
from starflow2_jax.convert import starflow, stored, table
from starflow2_jax.convert.tensor_files import TensorFile, open_tensors, write_safetensors
from starflow2_jax.errors import UserError
from starflow2_jax.models.starflow import ImageFlow, ImageFlowConfig


def _shapes(config: ImageFlowConfig) -> dict[str, tuple[int, ...]]:
    return table.shapes_of(lambda: ImageFlow(config, rngs=nnx.Rngs(0)))


def import_checkpoint(
    config: ImageFlowConfig, checkpoint: pathlib.Path, folder: pathlib.Path
) -> list[str]:
    """Converts a checkpoint to a model directory; see `flow_bundle`.

    Args:
        config: shape of the model.
        checkpoint: `.pth` (torch state dict) or `.safetensors` with the release's names.
        folder: of the model, to be made. It is there when it is complete, and not before.

    Returns:
        Names of the unused buffers that were passed over.

    Raises:
        UserError: the folder exists; the file is truncated; it does not fit the model (all that is
            missing, unknown or of a wrong shape or type in one message).
    """
    entries, shapes = starflow.table(config), _shapes(config)
    with stored.complete_or_nothing(folder) as partial, open_tensors(checkpoint) as whole:
        ignored = starflow.unused(config, list(whole.shapes))
        kept = {name: s for name, s in whole.shapes.items() if name not in set(ignored)}
        source = TensorFile(kept, whole.dtypes, whole.read)
        problems = stored.problems_of(entries, shapes, source)
        if problems:
            raise UserError(f"{checkpoint} does not fit the model: {'; '.join(problems)}")
        checksum = stored.write_weights(partial / flow_bundle.WEIGHTS, entries, shapes, source)
        record = {"source": str(checkpoint), "ignored": ignored, "checksum": checksum}
        flow_bundle.write_description(partial, config, record)
    return ignored


def export_checkpoint(folder: pathlib.Path, file: pathlib.Path) -> None:
    """Converts a model directory to a safetensors file with the release's names.

    Raises:
        UserError: no directory of an image model; the file exists or cannot be written.
    """
    config, _ = flow_bundle.read_description(folder)
    entries, shapes = starflow.table(config), _shapes(config)
    weights = folder / flow_bundle.WEIGHTS
    types = stored.stored_types(weights, entries, shapes)
    wanted = stored.wanted_tensors(entries, shapes)
    write_safetensors(file, wanted, types, stored.tensors_of(weights, entries))
