"""What a step has to compute, against counts by hand."""

import dataclasses
import math

import jax
import pytest
import tiny
from flax import nnx

from starflow2_jax.data.packing import BatchShape
from starflow2_jax.models.pretzel import Pretzel, starflow2_3_6b
from starflow2_jax.models.starflow import StarFlowConfig
from starflow2_jax.training.flops import image_flow_flops, matrix_parameters, pretzel_flops
from starflow2_jax.training.stages import IMAGE_TO_TEXT, JOINT, PRETRAIN_LM, TEXT_TO_IMAGE


def test_by_hand():
    config = tiny.config()  # VLM: 2 layers, width 64, 4 + 2 x 2 heads of 16, MLP 96, 64 words
    shape = BatchShape(rows=2, length=20, images=3, targets=5)  # N = 4: 12 LATENT positions
    vlm = 2 * (64 * 16 * (4 + 2 + 2) + 4 * 16 * 64 + 3 * 64 * 96)
    vlm_attention = 2 * (2 + 2) * 64 * (20 * 21 / 2)
    deep = 2 * (32 * 3 * 32 + 32 * 32 + 2 * 32 * 128)  # 2 layers, width 32
    found = pretzel_flops(config, JOINT, shape)
    assert found["vlm"] == 2 * 20 * 4 * vlm
    assert found["vlm_attention"] == 2 * 3 * vlm_attention
    assert found["head"] == 2 * 5 * 4 * 64 * 64
    assert found["adapter"] == 2 * 12 * 6 * (3 * 64 + 64 * 64)
    assert found["deep"] == 2 * 20 * 6 * deep
    assert found["deep_attention"] == 2 * 3 * 2 * 4 * 32 * (20 * 21 / 2)
    assert found["deep_ends"] == 2 * 6 * (8 * 64 * 32 + 12 * 3 * 3 * 32)
    assert found["skips"] == 2 * 6 * 64 * 32 * (12 + 5)
    assert found["shallow_1"] == 6 * 6 * 4 * (deep / 2 + 3 * 3 * 32)  # 6 images of 4, one layer
    assert found["shallow_1_attention"] == 6 * 3 * 4 * 32 * (4 * 5 / 2)
    captions = dataclasses.replace(shape, images=1, prefix=16, targets=0)
    found = pretzel_flops(config, TEXT_TO_IMAGE, captions)
    assert "head" not in found and "adapter" not in found and "skips" not in found
    assert found["vlm"] == 2 * 16 * 2 * vlm  # no gradient at all
    assert found["vlm_attention"] == 2 * 2 * 4 * 64 * (16 * 17 / 2)
    found = pretzel_flops(config, IMAGE_TO_TEXT, shape)
    assert "deep" not in found
    assert found["vlm"] == 2 * 20 * 4 * vlm and found["head"] == 2 * 5 * 4 * 64 * 64
    assert found["shallow_1"] == 6 * 2 * 4 * (deep / 2 + 3 * 3 * 32)
    found = pretzel_flops(config, PRETRAIN_LM, shape)
    assert set(found) == {"vlm", "vlm_attention", "head"}
    assert found["vlm"] == 2 * 20 * 6 * vlm and found["head"] == 2 * 5 * 6 * 64 * 64


def test_matrices_are_those_of_the_model():
    config = starflow2_3_6b()
    shapes = nnx.state(nnx.eval_shape(lambda: Pretzel(config, rngs=nnx.Rngs(0))))

    def matrices(part):
        """Of a stack: its kernels; its other parameters are vectors for each layer."""
        kernels = [leaf for path, leaf in nnx.to_flat_state(part) if path[-1] == "kernel"]
        return sum(math.prod(leaf.shape) for leaf in kernels)

    assert matrix_parameters(config.vlm.decoder()) == matrices(shapes["vlm"]["decoder"])
    deep = config.flow.decoder(config.flow.deep_layers)
    assert matrix_parameters(deep) == matrices(shapes["deep"]["decoder"])


def test_the_papers_model():
    # 1024 rows of 512, one image each: 6 x 3.6e9 and 4 x 6.5e9 for each position, and attention.
    shape = BatchShape(rows=1024, length=512, images=1, targets=256)
    total = sum(pretzel_flops(starflow2_3_6b(), JOINT, shape).values())
    by_hand = 1024 * 512 * (6 * 24 * 12 * 3072**2 + 4 * 6.53e9)
    by_hand += 1024 * 256 * 6 * 8 * 12 * 3072**2 + 1024 * 256 * 4 * 152064 * 3584
    assert total == pytest.approx(by_hand, rel=0.04) and total > by_hand


def test_an_image_flow():
    config = StarFlowConfig(channels=3, side=2, width=32, deep_width=32, depths=(1, 2), head_dim=16)
    layer = 32 * 3 * 32 + 32 * 32 + 2 * 32 * 128
    found = image_flow_flops(config, rows=5)
    assert found["block_1"] == 5 * 4 * 6 * (2 * layer + 3 * 3 * 32)
    assert found["block_0_attention"] == 5 * 3 * 4 * 32 * (4 * 5 / 2)
    assert jax.tree.reduce(lambda a, b: a + b, found) == sum(found.values())
