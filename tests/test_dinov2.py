"""Our DINOv2 against that of `transformers`, and the interpolation of its positions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from qwen_reference import lifted  # noqa: E402, F401

from starflow2_jax.convert import dinov2 as convert  # noqa: E402
from starflow2_jax.convert import table  # noqa: E402
from starflow2_jax.models import dinov2  # noqa: E402
from starflow2_jax.models.dinov2 import DinoV2, DinoV2Config  # noqa: E402
from starflow2_jax.nn import grid  # noqa: E402

# The true structure of each: small as published; giant's SwiGLU and width at one of 40 layers.
SIZES = {
    "small": dinov2.dinov2_small(),
    "small with registers, 2 layers": dataclasses.replace(dinov2.dinov2_small(True), layers=2),
    "giant, 1 layer": dataclasses.replace(dinov2.dinov2_giant(), layers=1),
    "giant with registers, 1 layer": dataclasses.replace(dinov2.dinov2_giant(True), layers=1),
}


def reference(config, dtype):
    """The model of `transformers` of this shape."""
    fields = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "mlp_ratio": 4,
        "use_swiglu_ffn": config.mlp == "swiglu",
        "patch_size": config.patch,
        "image_size": config.patch * config.table_side,
        "attn_implementation": "eager",
    }
    if config.registers:
        made = transformers.Dinov2WithRegistersConfig(
            **fields, num_register_tokens=config.registers
        )
        return transformers.Dinov2WithRegistersModel(made).eval().to(dtype)
    return transformers.Dinov2Model(transformers.Dinov2Config(**fields)).eval().to(dtype)


def pair(config, dtype, seed=0):
    """Our model and theirs, of the same random weights."""
    ours = tiny.randomised(lambda: DinoV2(config, rngs=nnx.Rngs(0)), seed, dtype)
    # Wide matrices of these random numbers would push everything into the norms' tails.
    graphdef, state = nnx.split(ours)
    state = jax.tree.map(lambda a: a * (4.0 / math.sqrt(a.shape[-2])) if a.ndim > 2 else a, state)
    ours = nnx.merge(graphdef, state)
    theirs = reference(config, torch.float64 if dtype == np.float64 else torch.float32)
    params = {path: np.array(a) for path, a in convert_paths(ours).items()}
    tensors = table.to_tensors(convert.entries_for(config), params)
    theirs.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in tensors}, strict=True)
    return ours, theirs


def convert_paths(model):
    return table.by_path(nnx.state(model))


def compare(config, dtype, tolerance, side=16):
    ours, theirs = pair(config, dtype)
    shape = (1, side * config.patch, side * config.patch, 3)
    images = np.random.default_rng(1).normal(size=shape).astype(dtype)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        hidden = theirs(pixels).last_hidden_state.numpy()
    assert hidden.dtype == dtype and np.abs(hidden).max() > 0.5
    tokens = jax.jit(lambda model, images: model(images))(ours, jnp.asarray(images))
    assert tokens.patches.dtype == dtype
    found = np.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], axis=1)
    tiny.close(found, hidden, tolerance)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_as_shipped(size):
    compare(SIZES[size], np.float32, 1e-5)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_float64(size, x64, lifted):  # noqa: F811
    compare(SIZES[size], np.float64, 1e-10)


@pytest.mark.parity
@pytest.mark.parametrize("registers", [0, 4])
def test_float64_grid_of_the_table_and_masked_patches(registers, x64, lifted):  # noqa: F811
    config = DinoV2Config(
        layers=1, width=32, heads=2, mlp_width=128, registers=registers, patch=4, table_side=4
    )
    compare(config, np.float64, 1e-10, side=4)
    ours, theirs = pair(config, np.float64)
    images = np.random.default_rng(2).normal(size=(2, 16, 16, 3))
    masked = np.random.default_rng(3).random((2, 16)) < 0.5
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        hidden = theirs(pixels, bool_masked_pos=torch.from_numpy(masked)).last_hidden_state
    tokens = ours(jnp.asarray(images), jnp.asarray(masked))
    tiny.close(tokens.patches, hidden[:, 1 + registers :].numpy(), 1e-10)
    tiny.close(tokens.cls, hidden[:, 0].numpy(), 1e-10)


@pytest.mark.parametrize(
    "rule, options",
    [
        ("size", {"size": (16, 16)}),
        # The original's rule: a scale that is not the ratio of the sizes.
        ("offset", {"scale_factor": ((16 + 0.1) / 37, (16 + 0.1) / 37)}),
        ("antialias", {"size": (16, 16), "antialias": True}),
    ],
)
def test_position_interpolation(rule, options, x64):
    config = dataclasses.replace(dinov2.dinov2_small(), layers=1, interpolation=rule)
    model = tiny.randomised(lambda: DinoV2(config, rngs=nnx.Rngs(0)), 0, np.float64)
    table_ = np.array(model.positions[...])
    square = torch.from_numpy(table_[1:].reshape(1, 37, 37, -1)).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(square, mode="bicubic", **options)
    assert theirs.shape[-2:] == (16, 16)
    theirs = theirs.permute(0, 2, 3, 1).reshape(256, -1).numpy()
    found = model.position_table(16, 16, jnp.float64)
    tiny.close(found[1:], theirs, 1e-10)
    np.testing.assert_array_equal(found[0], table_[0])
    # Its own grid: unchanged, under every rule.
    np.testing.assert_array_equal(model.position_table(37, 37, jnp.float64), table_)


@pytest.mark.parametrize("out", [(224, 224), (16, 16), (256, 300), (31, 7)])
def test_resize_is_torchs_antialiased_bicubic(out, x64):
    images = np.random.default_rng(0).random((2, 256, 64, 3))
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2), out, mode="bicubic", antialias=True
    )
    tiny.close(grid.resize(jnp.asarray(images), *out), theirs.permute(0, 2, 3, 1).numpy(), 1e-10)


@pytest.mark.parametrize(
    "size, registers, count",
    [
        (dinov2.dinov2_small, False, 22_056_576),
        (dinov2.dinov2_base, False, 86_580_480),
        (dinov2.dinov2_large, False, 304_368_640),
        (dinov2.dinov2_giant, False, 1_136_480_768),
        (dinov2.dinov2_giant, True, 1_136_486_912),
    ],
)
def test_published_sizes(size, registers, count):
    shapes = table.shapes_of(lambda: DinoV2(size(registers), rngs=nnx.Rngs(0)))
    assert sum(map(math.prod, shapes.values())) == count


def test_patches_and_back():
    images = jnp.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
    patches = grid.to_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 3], images[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(grid.from_patches(patches, 3, 2, 2), images)
    with pytest.raises(ValueError, match="do not fill"):
        grid.to_patches(images, 4)
