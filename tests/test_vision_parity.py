"""Our Qwen2.5-VL with its vision tower against that of `transformers`, module by module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import qwen_reference as qwen  # noqa: E402
from qwen_reference import lifted  # noqa: E402, F401
from transformers.vision_utils import (  # noqa: E402
    get_vision_position_ids,
    get_vision_window_index,
)

from starflow2_jax.models.pretzel import Kind  # noqa: E402
from starflow2_jax.models.qwen2_5_vision import grid_layout  # noqa: E402
from starflow2_jax.nn import rope  # noqa: E402
from starflow2_jax.nn.attention import AttentionSpec  # noqa: E402

pytestmark = pytest.mark.parity

# Height and width in pixels: exact windows; last windows partial in both, one, or no direction;
# one token; long and thin.
SIZES = [(224, 112), (140, 168), (84, 252), (252, 84), (28, 28), (28, 420)]
# (heads, kv heads): each kv head serves 1, 4, 7 query heads.
RATIOS = {"1": (2, 2), "4": (8, 2), "7": (7, 1)}
AS_SHIPPED = (np.float32, 1e-5)
WIDE = (np.float64, 1e-10)


def agree(ours, theirs, tolerance, name):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    assert ours.dtype == theirs.dtype, (name, ours.dtype, theirs.dtype)
    assert np.abs(theirs).max() > 0.1, name
    worst = np.abs(ours - theirs).max()
    assert worst <= tolerance * max(1.0, np.abs(theirs).max()), (name, worst)


# Where patches lie.

GRIDS = [(2, 2), (8, 8), (16, 16), (10, 12), (18, 18), (6, 18), (2, 34), (36, 10), (34, 46)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_window_index(grid):
    config = qwen.config_of().vision
    layout = grid_layout(config, *grid)
    index, ends = get_vision_window_index(torch.tensor([[1, *grid]]), 2, 112, 14)
    assert layout.tokens[layout.tokens >= 0].tolist() == index.tolist()
    lengths = (layout.patches.reshape(-1, config.window_places) >= 0).sum(1)
    assert [0, *np.cumsum(lengths)] == ends.tolist()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rotary_ids(grid):
    layout = grid_layout(qwen.config_of().vision, *grid)
    theirs = get_vision_position_ids(torch.tensor([[1, *grid]]), 2).numpy()
    exists = layout.patches >= 0
    np.testing.assert_array_equal(
        layout.coordinates[exists], theirs[layout.patches[exists]], strict=False
    )
    assert sorted(layout.patches[exists]) == list(range(grid[0] * grid[1]))


# The tower, module by module, on several pictures at once.


class Towers:
    """Both towers on the same pictures; their places without a patch are left out of ours."""

    def __init__(self, dtype, sizes=SIZES, prepare=lambda model: None, rows=1):
        self.config = qwen.config_of()
        self.ours, model = qwen.pair(self.config, dtype)
        prepare(model)
        self.theirs = model.model.visual
        self.seen = qwen.views_of(self.config, sizes)
        groups = np.array_split(np.arange(len(sizes)), rows)
        self.groups = [[self.seen[i] for i in group] for group in groups]
        kinds = np.zeros((rows, max(sum(np.prod(v.tokens) for v in g) for g in self.groups)), int)
        for b, group in enumerate(self.groups):
            kinds[b, : sum(np.prod(v.tokens) for v in group)] = Kind.VIT
        self.views = qwen.pack_views(self.groups, kinds, self.config.vision)
        self.dtype = dtype
        self.pixels = torch.from_numpy(
            np.concatenate([qwen.both_frames(v, self.config) for v in self.seen]).astype(dtype)
        )
        self.grids = torch.tensor([[1, v.rows, v.columns] for v in self.seen])

    def flat(self):
        """Patches [R, S, P], coordinates [R, S, 2], segments [R, S] of all tower rows."""
        b, k, s, p = self.views.patches.shape
        return (
            self.views.patches.reshape(b * k, s, p).astype(self.dtype),
            self.views.coordinates.reshape(b * k, s, 2),
            self.views.segments.reshape(b * k, s),
        )

    def picked(self, hidden):
        """Patches [R, S, D] of ours in the order of theirs: picture by picture, in windows."""
        hidden = np.asarray(hidden).reshape(self.views.segments.shape + hidden.shape[-1:])
        segments = self.views.segments
        return np.concatenate(
            [
                hidden[b][segments[b] == i + 1]
                for b, group in enumerate(self.groups)
                for i in range(len(group))
            ]
        )

    def call(self):
        """All that their blocks were given and gave: [(input, output)], and the tower's output."""
        seen = []
        hooks = [
            block.register_forward_hook(
                lambda module, args, kwargs, out: seen.append((args[0], kwargs, out)),
                with_kwargs=True,
            )
            for block in self.theirs.blocks
        ]
        with torch.no_grad():
            out = self.theirs(self.pixels, self.grids)
        for hook in hooks:
            hook.remove()
        return seen, out


def order_of(towers):
    """Index of places in the order of theirs, into [R, S]."""
    b, k, s = towers.views.segments.shape
    place = np.arange(b * k * s).reshape(b * k, s, 1)
    flat = towers.picked(place)[:, 0]
    return flat // s, flat % s


@tiny.jit
def modules_of(model, patches, coordinates, segments, given):
    """Each module of our tower; the attentions and blocks on inputs given as [L, R, S, D]."""
    tower, config = model.tower, model.tower.config
    quarter = config.width // config.heads // 4
    angles = rope.angles_ladder_per_axis(
        jnp.moveaxis(coordinates, -1, 0), (quarter, quarter), config.rope_theta, patches.dtype
    )
    rotation = jnp.cos(angles), jnp.sin(angles)
    found = {"patch embedding": tower.embed_patches(patches), "cos": rotation[0]}
    found["sin"] = rotation[1]
    for i in range(config.layers):
        layer = jax.tree.map(lambda a, i=i: a[i], tower.decoder.layers)
        window = 0 if i in config.full_layers else config.window_places
        spec = AttentionSpec(causal=False, segments=segments, window=window)
        mixed, _ = layer.attention(layer.attention_norm(given[i]), rotation, spec, None)
        found[f"attention {i}"] = mixed
        found[f"block {i}"], _ = layer(given[i], rotation, spec, None)
    found["all blocks and the norm"] = tower.encode(patches, coordinates, segments)
    return found


def check_modules(dtype, tolerance, prepare=lambda model: None):
    towers = Towers(dtype, prepare=prepare)
    patches, coordinates, segments = towers.flat()
    seen, out = towers.call()
    where = order_of(towers)
    given = np.zeros((len(seen), *segments.shape, towers.config.vision.width), dtype)
    for i, (x, _, _) in enumerate(seen):
        given[i][where] = x
    ours = modules_of(towers.ours, patches, coordinates, segments, given)
    expected = {"patch embedding": seen[0][0]}
    with torch.no_grad():
        cos, sin = seen[0][1]["position_embeddings"]
        expected |= {"cos": cos[:, :8], "sin": sin[:, :8]}
        assert torch.equal(cos[:, :8], cos[:, 8:])
        for i, (x, kwargs, gave) in enumerate(seen):
            block = towers.theirs.blocks[i]
            expected[f"attention {i}"] = block.attn(block.norm1(x), **kwargs)
            expected[f"block {i}"] = gave
        expected["all blocks and the norm"] = towers.theirs.merger.ln_q(out.last_hidden_state)
        raw = towers.theirs.patch_embed(towers.pixels)
    assert not np.allclose(raw, seen[0][0]), "the windows move patches"
    assert set(ours) == set(expected)
    for name, value in expected.items():
        agree(np.asarray(ours[name])[where], value, tolerance, name)


def test_modules_as_shipped():
    check_modules(*AS_SHIPPED)


def test_modules_in_float64(x64, lifted):  # noqa: F811
    check_modules(*WIDE, prepare=lifted)


@tiny.jit
def features(model, views):
    return model.tower(views, model.embedding[...].dtype)


def check_tower(dtype, tolerance, prepare=lambda model: None):
    for rows in (1, 3):
        towers = Towers(dtype, prepare=prepare, rows=rows)
        ours = np.asarray(features(towers.ours, towers.views))
        _, out = towers.call()
        index = towers.views.index
        picked = np.concatenate([ours[b][index[b][index[b] >= 0] // 4] for b in range(rows)])
        agree(picked, out.pooler_output, tolerance, f"tower, {rows} rows")


def test_tower_as_shipped():
    check_tower(*AS_SHIPPED)


def test_tower_in_float64(x64, lifted):  # noqa: F811
    check_tower(*WIDE, prepare=lifted)


# The whole model.

DOCUMENTS = {
    "text": [[7], [4], [11]],
    "one picture": [[3, (140, 168), 4], [5, (28, 56), 2], [2, (112, 112), 3]],
    "several pictures": [
        [3, (140, 168), 2, (28, 28), 1, (84, 252), 4],
        [6],
        [1, (28, 140), (252, 84), 3],
    ],
}


@tiny.jit
def ours_of(model, batch):
    dtype = model.embedding[...].dtype
    e = model.embed(batch["tokens"], dtype)
    is_view = (batch["kinds"] == Kind.VIT)[..., None]
    e = jnp.where(is_view, model.see(batch["views"], dtype), e)
    spec = AttentionSpec(segments=batch["segments"])
    y, _ = model.decode(e, batch["positions"], spec)
    angles = rope.angles_shared_ladder(
        batch["positions"],
        rope.multimodal_counts(model.config.head_dim),
        model.config.rope_theta,
        dtype,
    )
    first = jax.tree.map(lambda a: a[0], model.decoder.layers)
    layer, _ = first(e, (jnp.cos(angles), jnp.sin(angles)), spec, None)
    return {"e": e, "layer": layer, "y": y, "logits": model.logits(y)}


def theirs_of(model, config, documents, left, dtype):
    """What they make of each document: e, positions, first layer, y, logits; padding left out."""
    inputs = qwen.their_inputs(config, documents, left, dtype)
    given = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=False)
    hook.remove()
    exists = inputs["attention_mask"].numpy() > 0
    found = []
    for b in range(len(documents)):
        here = exists[b]
        one = {
            "e": given["inputs_embeds"][b].numpy()[here],
            "layer": out.hidden_states[1][b].numpy()[here],
            "y": out.hidden_states[-1][b].numpy()[here],
            "logits": out.logits[b].numpy()[here],
        }
        if given["position_ids"] is not None:
            one["positions"] = given["position_ids"][-3:, b].numpy()[:, here]
        found.append(one)
    return found


def check_model(config, parts, layout, dtype, tolerance, prepare=lambda model: None):
    ours, model = qwen.pair(config, dtype)
    prepare(model)
    documents = [qwen.document(config, p, 10 * i) for i, p in enumerate(parts)]
    rows = [documents] if layout == "packed" else [[d] for d in documents]
    batch = qwen.batch(config, rows, left=layout == "left")
    found = ours_of(ours, vars(batch) | {"places": None})
    found = {name: np.asarray(value) for name, value in found.items()}
    wide = torch.float64 if dtype == np.float64 else torch.float32
    theirs = theirs_of(model, config, documents, layout == "left", wide)
    for (b, here), expected in zip(batch.places, theirs, strict=True):
        if "positions" in expected:
            np.testing.assert_array_equal(batch.positions[:, b, here], expected.pop("positions"))
        for name, value in expected.items():
            agree(found[name][b, here], value, tolerance, name)


CASES = [
    pytest.param(parts, layout, id=f"{name}, {layout}")
    for name, parts in DOCUMENTS.items()
    for layout in ("right", "left", "packed")
]


@pytest.mark.parametrize(("parts", "layout"), CASES)
def test_model_as_shipped(parts, layout):
    check_model(qwen.config_of(), parts, layout, *AS_SHIPPED)


@pytest.mark.parametrize(("parts", "layout"), CASES)
def test_model_in_float64(x64, lifted, parts, layout):  # noqa: F811
    check_model(qwen.config_of(), parts, layout, *WIDE, prepare=lifted)


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_heads_as_shipped(ratio, tied):
    config = qwen.config_of(*RATIOS[ratio], tied)
    check_model(config, DOCUMENTS["several pictures"], "right", *AS_SHIPPED)


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_heads_in_float64(x64, lifted, ratio, tied):  # noqa: F811
    config = qwen.config_of(*RATIOS[ratio], tied)
    check_model(config, DOCUMENTS["several pictures"], "right", *WIDE, prepare=lifted)


def test_the_lifted_casts_matter(x64):
    """With the casts as shipped, float64 parity fails: the tests above measure what they say."""
    with pytest.raises(AssertionError):
        check_tower(*WIDE)
