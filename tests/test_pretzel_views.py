"""Rows that look at pictures through the vision tower, in both streams."""

import dataclasses
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax.bundle import config_from_json
from starflow2_jax.convert import starflow2
from starflow2_jax.data.pipeline import BatchShape, features, packed_batches, single_batch, to_rows
from starflow2_jax.data.sequences import ImageShape, Turn, encode_turns
from starflow2_jax.data.tokenizer import train_tokenizer
from starflow2_jax.data.views import Limits, view
from starflow2_jax.models.pretzel import Kind, PretzelConfig
from starflow2_jax.models.qwen2_5_vl import qwen2_5_vl_tiny
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.mesh import MeshConfig, make_mesh
from starflow2_jax.sampling import step
from starflow2_jax.sampling.prompts import Row, padded, scored
from starflow2_jax.sampling.state import row_settings

TOKENIZER = train_tokenizer(["a few words", "of some kind"], 290)
VLM = qwen2_5_vl_tiny(vocab_size=TOKENIZER.vocab_size)
TOWER = VLM.vision
CONFIG = PretzelConfig(VLM, tiny.flow(), TOKENIZER.special, dtype="float32")
IMAGE = ImageShape(2, 2, 3, CONFIG.flow.side)


def shown(height, width, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return view(picture, TOWER, Limits(min_pixels=28 * 28))


def drawn(seed):
    return np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)


SEEN = encode_turns(
    [
        Turn("user", ("a", shown(140, 84, 0), "few", shown(28, 56, 1))),
        Turn("assistant", ("words of some kind",)),
    ],
    TOKENIZER,
    IMAGE,
)
# Understood by the tower, and part of the likelihood.
BOTH = encode_turns(
    [Turn("user", (shown(56, 56, 2), drawn(0))), Turn("assistant", ("some", drawn(1), "a"))],
    TOKENIZER,
    IMAGE,
)
BLIND = encode_turns([Turn("user", ("a few",)), Turn("assistant", ("words",))], TOKENIZER, IMAGE)


def rows_of(*documents):
    return to_rows(single_batch(list(documents), tower=TOWER))


def logits_of(model, rows, u):
    spec = AttentionSpec(segments=rows.segments)
    s = model.run(rows.tokens, rows.kinds, rows.positions, u, spec, views=rows.views)
    return model.logits(s.y, s.g)


def plain_logits(vlm, rows):
    """The VLM alone, as one uses it without a flow."""
    e = vlm.embed(rows.tokens, jnp.float32)
    e = jnp.where((rows.views.index >= 0)[..., None], vlm.see(rows.views, jnp.float32), e)
    y, _ = vlm.decode(e, rows.positions, AttentionSpec(segments=rows.segments))
    return vlm.logits(y)


@pytest.mark.parametrize("compiled", [False, True], ids=["jit off", "compiled"])
def test_without_skips_the_logits_are_the_vlms(compiled):
    rows = rows_of(SEEN, BLIND)
    assert (rows.kinds == Kind.VIT).sum() == 15 + 2
    model = tiny.pretzel(CONFIG, zero=("skip_vlm", "skip_flow"))
    u = jnp.ones((*rows.tokens.shape, CONFIG.flow.channels))
    exists = np.asarray(rows.segments) > 0
    if compiled:
        ours = np.asarray(tiny.jit(logits_of)(model, rows, u))[exists]
        plain = np.asarray(tiny.jit(plain_logits)(model.vlm, rows))[exists]
        assert np.abs(ours - plain).max() <= 1e-6 * max(1.0, np.abs(plain).max())
    else:
        with jax.disable_jit():
            ours = np.asarray(logits_of(model, rows, u))[exists]
            plain = np.asarray(plain_logits(model.vlm, rows))[exists]
        np.testing.assert_array_equal(ours, plain)
    assert np.abs(plain).max() > 0.5


log_prob = tiny.jit(lambda model, rows, x: model.log_prob(rows, x))


def test_what_is_seen_counts_and_has_no_likelihood():
    model = tiny.pretzel(CONFIG)
    rows = rows_of(BOTH)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 4, 3)), jnp.float32)
    likelihood = log_prob(model, rows, x)
    is_view = np.asarray(rows.kinds) == Kind.VIT
    assert is_view.sum() == 4
    np.testing.assert_array_equal(np.asarray(likelihood.text_log_prob)[is_view], 0)
    np.testing.assert_array_equal(np.asarray(likelihood.z)[is_view], 0)
    other = dataclasses.replace(rows.views, patches=rows.views.patches + 0.5)
    changed = log_prob(model, dataclasses.replace(rows, views=other), x)
    # Both images come after the view: their likelihoods and the text's depend on it.
    assert (np.abs(np.asarray(changed.image_log_prob - likelihood.image_log_prob)) > 1e-3).all()
    after = np.asarray(rows.kinds)[0] == Kind.TEXT
    after[: np.flatnonzero(is_view[0])[-1] + 1] = False
    same = np.asarray(changed.text_log_prob == likelihood.text_log_prob)[0]
    assert not same[after].any() and same[: np.flatnonzero(is_view[0])[0]].all()


def test_packed_views_are_those_of_their_documents():
    """Rows packed by the pipeline; each document as if it were alone."""
    documents = [SEEN, BLIND, BOTH, BLIND, BOTH]
    made = [features(d, np.random.default_rng(i), TOWER) for i, d in enumerate(documents)]
    shape = BatchShape(rows=2, length=96, images=4, places=5 * 64)
    source = grain.MapDataset.source(made).to_iter_dataset()
    batch = next(iter(packed_batches(source, shape)))
    rows = to_rows(batch)
    assert sorted(np.unique(rows.segments[0])) == [0, 1, 2, 3, 4, 5]
    model = tiny.pretzel(CONFIG)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 4, 4, 3)), jnp.float32)
    likelihood = log_prob(model, rows, x)
    alone = rows_of(SEEN, BOTH, BOTH)
    expected = log_prob(model, alone, jnp.stack([x[1, :2], x[0, :2], x[0, 2:]]))
    for single, (segment, document) in enumerate([(1, SEEN), (3, BOTH), (5, BOTH)]):
        here = np.asarray(rows.segments[0]) == segment
        np.testing.assert_array_equal(rows.tokens[0][here], document.tokens)
        for name in ("y", "g"):
            mine = np.asarray(getattr(likelihood.streams, name))[0][here]
            its = np.asarray(getattr(expected.streams, name))[single][: here.sum()]
            tiny.close(mine, its, 1e-5, name)
    tiny.close(likelihood.image_log_prob[0], expected.image_log_prob[1:].reshape(-1), 1e-5)


def test_room_for_views_is_checked():
    made = [features(SEEN, np.random.default_rng(0), TOWER)]
    source = grain.MapDataset.source(made).to_iter_dataset()
    shape = BatchShape(rows=1, length=96, images=4, places=64)
    with pytest.raises(Exception, match="192 places of views, but a row .* holds 64"):
        next(iter(packed_batches(source, shape)))
    with pytest.raises(ValueError, match="vision tower"):
        features(SEEN, np.random.default_rng(0))
    with pytest.raises(ValueError, match="vision tower"):
        single_batch([SEEN])


def test_a_prompt_with_views_is_prefilled_as_the_whole_row():
    model = tiny.pretzel(CONFIG)
    nothing = np.zeros((0, 4, 3))
    rows = [
        Row(SEEN.tokens, SEEN.kinds, SEEN.positions, nothing, SEEN.views),
        Row(BLIND.tokens, BLIND.kinds, BLIND.positions, nothing),
    ]
    prompt = padded(rows, 48, TOWER)
    settings = row_settings(2, max_new_tokens=4, temperature=0.0)
    state = step.prefill(model, prompt, settings, slots=56, images=1)
    whole = scored(prompt)
    u = jnp.zeros((*prompt.tokens.shape, 3))
    streams = tiny.jit(
        lambda model, r: model.run(
            r.tokens, r.kinds, r.positions, u, AttentionSpec(segments=r.segments), views=r.views
        )
    )(model, whole)
    for b, row in enumerate(rows):
        tiny.close(state.y[b], streams.y[b, len(row) - 1], 1e-5)
        tiny.close(state.g[b], streams.g[b, len(row) - 1], 1e-5)
    with pytest.raises(ValueError, match="no vision tower"):
        padded(rows, 48)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "config",
    [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2, sequence=2)],
    ids=["fsdp", "fsdp-tensor-sequence"],
)
def test_eight_devices_see_what_one_does(config):
    devices = jax.devices()[:8]
    assert len(devices) == 8
    rows = to_rows(single_batch([SEEN, BLIND, BOTH, SEEN] * 2, BatchShape(8, 64, 2, 256), TOWER))
    vlm = tiny.pretzel(CONFIG).vlm
    one = np.asarray(tiny.jit(plain_logits)(vlm, rows))
    mesh = make_mesh(config, devices)
    graphdef, state = tiny.nnx.split(vlm)
    run = tiny.jit(lambda state, rows: plain_logits(tiny.nnx.merge(graphdef, state), rows))
    placed = jax.device_put(state, rules.shardings(state, mesh))
    with rules.use(mesh):
        eight = run(placed, jax.device_put(rows, rules.batch_shardings(rows, mesh)))
    tiny.close(eight, one, 1e-5)


def test_the_tower_is_saved_and_loaded():
    assert config_from_json(json.loads(json.dumps(dataclasses.asdict(CONFIG)))) == CONFIG
    model = tiny.pretzel(CONFIG)
    params = starflow2.by_path(tiny.nnx.state(model))
    tensors = starflow2.to_tensors(CONFIG, params)
    assert tensors["vlm.visual.patch_embed.proj.weight"].shape == (32, 3, 2, 14, 14)
    again = starflow2.by_path(tiny.nnx.state(starflow2.from_tensors(CONFIG, tensors)))
    assert again.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
