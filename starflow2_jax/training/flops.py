"""What a step has to compute, counted from shapes alone: the numerator of MFU.

A multiply-add is two floating-point operations (FLOPs). Each parameter of a matrix costs, per
token, 2 forward, 2 more where a gradient passes through it and 2 more where it is trained: 6 if
trained, 4 if frozen below something that is trained, 2 otherwise. Attention is counted for the
causal half of its scores. Norms, activations, look-ups and everything recomputed are not counted.

Letters: B rows, T positions, I images per row, N tokens per image, P positions of a prefix, K text
targets per row, D width, H heads, d head width.
"""

import enum

from starflow2_jax.data.packing import BatchShape
from starflow2_jax.models.af_block import BlockConfig
from starflow2_jax.models.pretzel import PretzelConfig
from starflow2_jax.models.qwen2_5_vision import VisionConfig
from starflow2_jax.models.starflow import StarFlowConfig, TarFlowConfig
from starflow2_jax.nn.decoder import DecoderConfig
from starflow2_jax.training.stages import Stage


class Work(enum.IntEnum):
    """FLOPs for each parameter and token."""

    FORWARD = 2
    PASSED = 4
    TRAINED = 6


def matrix_parameters(config: DecoderConfig) -> int:
    """Parameters of a stack's matrices; norms and biases, which multiply nothing, are left out."""
    attention = config.width * config.head_dim * 2 * (config.heads + config.kv_heads)
    mlp = config.width * config.mlp_width * (2 if config.mlp == "gelu" else 3)
    return config.layers * (attention + mlp)


def attention_flops(config: DecoderConfig, length: int, work: Work, window: int = 0) -> float:
    """Scores and mixtures of a row of T positions, all layers.

    Args:
        config: of the stack.
        length: T.
        work: gradients cost twice the forward pass, whether or not the stack is trained.
        window: positions that each one sees where attention is not causal; 0: it is causal.
    """
    seen = window or (length + 1) / 2
    forward = config.layers * 2 * 2 * config.heads * config.head_dim * length * seen
    return forward * (1 if work == Work.FORWARD else 3)


def _stack(
    name: str, config: DecoderConfig, rows: int, length: int, work: Work
) -> dict[str, float]:
    return {
        name: float(work * matrix_parameters(config) * rows * length),
        f"{name}_attention": rows * attention_flops(config, length, work),
    }


def _tower(config: VisionConfig, rows: int, places: int, work: Work) -> dict[str, float]:
    stack = config.decoder()
    group = config.merge**2
    merged = config.width * group
    matrices = (
        config.patch_numbers * config.width
        + matrix_parameters(stack)
        + (merged * merged + merged * config.out_width) // group
    )
    whole = len(config.full_layers) / config.layers
    seen = places * whole + min(config.window_places, places) * (1 - whole)
    return {
        "tower": float(work * matrices * rows * places),
        "tower_attention": rows * attention_flops(stack, places, work, seen),
    }


def pretzel_flops(config: PretzelConfig, stage: Stage, shape: BatchShape) -> dict[str, float]:
    """FLOPs of one optimiser step of a stage, by part; padding counts as if it were full.

    Args:
        config: the model's shape.
        stage: what is computed and trained.
        shape: of the whole batch.

    Returns:
        By part; their sum is the step's.
    """
    rows, flow, vlm = shape.rows, config.flow, config.vlm
    parts = stage.parts
    drawn = min(shape.images * flow.tokens, shape.length)  # LATENT positions of a row
    length = shape.prefix or shape.length  # of the VLM's row
    written = min(shape.targets or shape.length, shape.length)
    trained = lambda part: Work.TRAINED if part in stage.trains else Work.FORWARD
    vlm_work = trained("vlm")
    if vlm_work == Work.FORWARD and parts.adapter and {"adapter", "shallow"} & {*stage.trains}:
        vlm_work = Work.PASSED
    found = _stack("vlm", vlm.decoder(), rows, length, vlm_work)
    if shape.places and vlm.vision is not None:
        found |= _tower(vlm.vision, rows, shape.places, trained("vlm"))
    if stage.text:
        head = max(vlm_work, Work.PASSED if parts.skips else Work.FORWARD)
        found["head"] = float(head * vlm.vocab_size * vlm.width * rows * written)
    if parts.adapter or parts.deep:
        for index, depth in enumerate(flow.shallow_layers):
            block = flow.block(depth)
            one = _block(block, rows * shape.images, flow.tokens, trained("shallow"))
            found |= {f"shallow_{index}{name}": value for name, value in one.items()}
    if parts.adapter:
        adapter = flow.channels * vlm.width + vlm.width**2
        found["adapter"] = float(trained("adapter") * adapter * rows * drawn)
    if parts.deep:
        work = trained("deep")
        found |= _stack("deep", flow.decoder(flow.deep_layers), rows, shape.length, work)
        plain = shape.prefix or shape.length - drawn
        ends = plain * vlm.width * flow.width + drawn * 3 * flow.channels * flow.width
        found["deep_ends"] = float(work * ends * rows)
    if parts.deep and parts.skips:
        at = drawn * ("skip_vlm" in stage.trains) + written * ("skip_flow" in stage.trains)
        found["skips"] = float(Work.TRAINED * vlm.width * flow.width * rows * at)
    return found


def _block(block: BlockConfig, rows: int, tokens: int, work: Work) -> dict[str, float]:
    stack = block.decoder()
    ends = block.channels * block.width * (2 if block.scale == "none" else 3)
    return {
        "": float(work * (matrix_parameters(stack) + ends) * rows * tokens),
        "_attention": rows * attention_flops(stack, tokens, work),
    }


def image_flow_flops(config: StarFlowConfig | TarFlowConfig, rows: int) -> dict[str, float]:
    """FLOPs of one optimiser step on B = `rows` images, by block."""
    found = {}
    for index, block in enumerate(config.blocks()):
        one = _block(block, rows, config.side**2, Work.TRAINED)
        found |= {f"block_{index}{name}": value for name, value in one.items()}
    return found
