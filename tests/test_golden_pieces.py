"""The golden numbers of single rules: rotary tables, guidance, scale maps, schedules, templates."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from golden_files import files

from starflow2_jax.convert import layout
from starflow2_jax.data import captions
from starflow2_jax.models import af_block, guidance, starflow
from starflow2_jax.nn import rope
from starflow2_jax.training import schedules

pytestmark = [
    pytest.mark.golden,
    pytest.mark.parametrize("path", files("pieces"), ids=lambda p: p.stem),
]
TOLERANCE = 1e-9


def close(ours, theirs, name=""):
    # Angles of the largest table are stored in float32.
    tolerance = TOLERANCE if np.asarray(theirs).dtype == np.float64 else 1e-6
    tiny.close(ours, theirs, tolerance, name)


def angles(data, spec):
    """Coordinates [T, A], the ladders, and the angles [T, d/2] of one table, by the rules."""
    head_dim, latent = spec["head_dim"], spec["latent_len"]
    rows, columns, text = spec["h"], spec["w"], spec["text_len"]
    if spec["mode"] == "1d":
        at = jnp.arange(text + rows * columns, dtype=jnp.float64)[None]
        counts = (head_dim // 2,)
    else:
        frames = max(spec["frames"], 1)
        at = rope.area_coordinates(
            rows, columns, spec["pt_seq_len"], jnp.float64, text_length=text, frames=frames
        )
        spatial = (head_dim // 2 - starflow.TIME_ANGLES) // 2 if latent else head_dim // 4
        counts = (spatial, spatial, starflow.TIME_ANGLES)[: 3 if latent else 2]
        at = at[: len(counts)]
    return at, counts, rope.angles_ladder_per_axis(at, counts, 1e4, jnp.float64)


def test_rotary_tables(path, x64):
    data = np.load(path)
    specs = json.loads(str(data["rope/spec_json"]))
    for spec in specs:
        key = f"rope/{spec['tag']}"
        at, counts, table = angles(data, spec)
        close(at.T, data[f"{key}/pos"], key)
        close(rope.ladder(counts[0], 1e4, jnp.float64), data[f"{key}/freqs"], key)
        if f"{key}/freqs_t" in data:
            time = rope.ladder(starflow.TIME_ANGLES, 1e4, jnp.float64)
            close(time, data[f"{key}/freqs_t"], key)
        close(np.repeat(table, 2, axis=-1), data[f"{key}/angles"], key)
    stems = {k.split("/")[1] for k in data.files if re.match(r"rope/\w+/pos", k)}
    assert stems == {spec["tag"] for spec in specs}


def test_the_models_own_table(path, x64):
    data = np.load(path)
    model = starflow.starflow_3b_t2i_256()
    close(np.repeat(model.angles(32, 32, 128, jnp.float64)[0], 2, -1), data["rope/sq_text/angles"])


def test_rotation(path, x64):
    data = np.load(path)
    q = np.moveaxis(data["rope/q"], 1, 2)  # [1, T, heads, d]
    table = data["rope/wide/angles"][None, :, ::2]
    cos, sin = jnp.cos(table), jnp.sin(table)
    half = rope.rotate(jnp.asarray(q), cos, sin)
    close(half, np.moveaxis(data["rope/q_rot_halfsplit"], 1, 2))
    # Adjacent pairs are half-split pairs of permuted channels.
    order = layout._pairs_to_halves(q.shape[-1])
    turned = rope.rotate(jnp.asarray(q[..., order]), cos, sin)[..., np.argsort(order)]
    close(turned, np.moveaxis(data["rope/q_rot_interleaved"], 1, 2))


def test_gaussian_guidance(path, x64):
    data = np.load(path)
    parts = [data[f"cfg/{name}"] for name in ("mu_c", "sigma_c", "mu_u", "sigma_u")]
    weights = [k.removeprefix("cfg/mu_w") for k in data.files if k.startswith("cfg/mu_w")]
    assert weights
    for weight in weights:
        mu, sigma = guidance.guide(*parts, float(weight))
        close(mu, data[f"cfg/mu_w{weight}"])
        close(sigma, data[f"cfg/sigma_w{weight}"])
        halves = (np.concatenate(parts[0::2])[:, None], np.concatenate(parts[1::2])[:, None])
        rule = guidance.GaussianGuidance(float(weight))
        for ours, theirs in zip(rule(*halves, jnp.arange(1), 1), (mu, sigma), strict=True):
            close(ours[:, 0], np.asarray(theirs))


def head(soft_clip, scale="softplus"):
    config = af_block.BlockConfig(1, 16, 16, 1, soft_clip=soft_clip, scale=scale)
    return af_block.GaussianHead(config, rngs=nnx.Rngs(0))


def through(head, raw):
    """The scale and mean maps of a head, with its projection taken out."""
    head.proj = lambda x: x
    return head(jnp.asarray(np.stack([raw, raw], -1)))


def test_scale_maps(path, x64):
    data = np.load(path)
    raw = data["affine/raw"]
    mu, sigma = through(head(None), raw)
    close(mu[:, 0], raw)
    close(sigma[:, 0], data["affine/sigma_softplus"])
    mu, sigma = through(head(4.0), raw)
    close(mu[:, 0], data["affine/soft_clip4"])
    close(sigma[:, 0], data["affine/sigma_softplus_after_clip4"])
    close(through(head(None, "exp"), raw)[1][:, 0], np.exp(raw))


def test_learning_rates(path, x64):
    data = np.load(path)
    names = [k for k in data.files if k.startswith("lr/") and not k.endswith("_args")]
    assert names
    for name in names:
        warmup, total, minimum, maximum, start = data[f"{name}_args"].tolist()
        rate = schedules.warmup_cosine(int(warmup), int(total), minimum, maximum, start)
        steps = np.arange(1, len(data[name]) + 1)
        np.testing.assert_allclose(jax.vmap(rate)(steps), data[name], rtol=TOLERANCE, atol=0)
        assert rate(0) == start
        if start == min(minimum, 1e-6):
            again = schedules.warmup_cosine(int(warmup), int(total), minimum, maximum)
            np.testing.assert_array_equal(jax.vmap(again)(steps), jax.vmap(rate)(steps))


def test_sizes_of_aspect_ratios(path):
    table = json.loads(str(np.load(path)["aspect_json"]))
    assert table
    for key, size in table.items():
        area, multiple, ratio = key.split("/")
        assert captions.bucket_size(int(area), int(multiple), ratio) == tuple(size), key
    assert {key.split("/")[2] for key in table} == set(captions.ASPECT_RATIOS)
    with pytest.raises(ValueError, match="3x2"):
        captions.bucket_size(256, 8, "3x2")


def test_prompt_templates(path):
    table = json.loads(str(np.load(path)["captions_json"]))
    ours = {
        "plain": [captions.prompt("a cat"), captions.prompt("")],
        "video_16fps_noise0.5_16:9": [
            captions.prompt(caption, 16, 0.5, "16:9") for caption in ("a cat", "")
        ],
        "image_in_video_model": [captions.prompt("a cat", 0, 0.5, "1:1")],
        "gemma_template": [captions.gemma_prompt("a cat")],
        "aspect_only": [captions.prompt("a cat", aspect_ratio="3:2")],
    }
    assert ours == table


def test_every_piece_is_compared(path):
    known = r"rope/.*|cfg/.*|affine/(raw|soft_clip4|sigma_softplus(_after_clip4)?)|lr/.*"
    rest = [k for k in np.load(path).files if not re.fullmatch(known, k)]
    assert sorted(rest) == ["aspect_json", "captions_json"]
