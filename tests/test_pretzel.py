"""The two streams: who sees whom, packing, padding, empty counts, stages, precision, full size."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from starflow2_jax.models.pretzel import Kind, Parts, Pretzel, spread_images, starflow2_3_6b
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.training.objective import ObjectiveConfig, objective

F64 = jnp.float64
ALL = Parts()
STAGE_1 = Parts(adapter=False, skips=False)
STAGE_2 = Parts(adapter=True, skips=False, deep=False)


@functools.partial(tiny.jit, static_argnums=(3, 4))
def evaluate(model, rows, x, parts=ALL, weights=ObjectiveConfig()):
    """Likelihood, (loss, metrics) of one batch."""
    return model.log_prob(rows, x, parts), objective(model, rows, x, parts, weights)


@functools.partial(tiny.jit, static_argnums=(3, 4))
def gradients(model, rows, x, parts=ALL, weights=ObjectiveConfig()):
    """(loss, metrics), and their gradients by every parameter, the VLM's too, and by x."""

    def loss(model, x):
        return objective(model, rows, x, parts, weights)

    losses, (of_model, of_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, x)
    return losses, (nnx.state(of_model), of_x)


@tiny.jit
def predictions(model, tokens, kinds, positions, segments, u):
    """Everything that a position says: y, g, logits, mu, sigma, each [B, T, ...]."""
    s = model.run(tokens, kinds, positions, u, AttentionSpec(segments=segments))
    mu, sigma = model.deep.head(s.g)
    return {"y": s.y, "g": s.g, "logits": model.logits(s.y, s.g), "mu": mu, "sigma": sigma}


# Causality.


def changed(before, after):
    """bool [T]: the position's output is not bit-equal."""
    return (np.asarray(before) != np.asarray(after)).any((0, 2))


def test_no_position_sees_what_comes_after(x64):
    cfg = tiny.config("float64")
    model = tiny.pretzel(cfg)
    # Both streams count, and both skips: turning any of them off would change the outputs.
    first = tiny.document(cfg, [2, "image", 2, "image", 1], 0)
    rows, _ = tiny.pack(cfg, [[first, tiny.document(cfg, [2, "image", 1], 1)]])
    length = rows.tokens.shape[1]
    segment = np.asarray(rows.segments[0])
    u = np.random.default_rng(0).normal(size=(1, length, cfg.flow.channels))
    rest = (rows.kinds, rows.positions, rows.segments)
    base = predictions(model, rows.tokens, *rest, u)
    for t in range(length):
        tokens, other = np.array(rows.tokens), u.copy()
        if rows.kinds[0, t] == Kind.LATENT:
            other[0, t] += 0.3
        else:
            tokens[0, t] = (tokens[0, t] + 1) % tiny.VOCABULARY
        after = predictions(model, tokens, *rest, other)
        reached = (segment == segment[t]) & (np.arange(length) >= t)
        for name, value in base.items():
            np.testing.assert_array_equal(changed(value, after[name]), reached, f"{name} at {t}")


def test_both_skips_and_the_adapter_carry_something(x64):
    """u reaches logits through the adapter and W_flow; the images reach g through W_vlm."""
    cfg = tiny.config("float64")
    rows, x = tiny.pack(cfg, [[tiny.document(cfg, [3, "image", 1, "image", 1], 0)]], dtype=F64)
    only = {
        name: evaluate(tiny.pretzel(cfg, zero=zero), rows, x)[0]
        for name, zero in {
            "all": (),
            "no adapter": ("adapter.out",),
            "no skip_vlm": ("skip_vlm",),
            "no skip_flow": ("skip_flow",),
        }.items()
    }
    full = only.pop("all")
    for name, other in only.items():
        text = np.abs(full.text_log_prob - other.text_log_prob).max()
        image = np.abs(full.image_log_prob - other.image_log_prob).max()
        assert text > 1e-3, (name, text)
        assert (image > 1e-3) == (name != "no skip_flow"), (name, image)


def test_what_is_off_equals_a_zero_coupling(x64):
    cfg = tiny.config("float64")
    rows, x = tiny.pack(cfg, [[tiny.document(cfg, [3, "image", 1, "image", 1], 0)]], dtype=F64)
    model = tiny.pretzel(cfg)
    for parts, zero in [
        (Parts(adapter=False), ("adapter.out",)),
        (Parts(skips=False), ("skip_vlm", "skip_flow")),
    ]:
        off = evaluate(model, rows, x, parts)[0]
        nothing = evaluate(tiny.pretzel(cfg, zero=zero), rows, x)[0]
        tiny.close(off.image_log_prob, nothing.image_log_prob, 1e-10)
        tiny.close(off.text_log_prob, nothing.text_log_prob, 1e-10)


def test_a_later_image_changes_nothing_before_it(x64):
    cfg = tiny.config("float64")
    model = tiny.pretzel(cfg)
    rows, x = tiny.pack(cfg, [[tiny.document(cfg, [2, "image", 2, "image", 1], 0)]], dtype=F64)
    base = evaluate(model, rows, x)[0]
    after = evaluate(model, rows, x.at[:, 1].add(0.3))[0]
    second = int(rows.image_start[0, 1])
    assert base.image_log_prob[0, 0] == after.image_log_prob[0, 0]
    assert base.image_log_prob[0, 1] != after.image_log_prob[0, 1]
    text = base.text_log_prob != after.text_log_prob
    assert not text[0, :second].any()
    assert text[0, second + cfg.flow.tokens :].all()


# Packing and padding.


def packs(cfg):
    """The same three documents: packed into rows, each alone, each alone behind left padding."""
    docs = [
        tiny.document(cfg, [3, "image", 2, "image", 2], 0),
        tiny.document(cfg, [2, "image", 1], 1),
        tiny.document(cfg, [5], 2),
    ]
    # All of one shape, so that each function compiles once.
    length = sum(map(len, docs)) + 3
    apart, together = [[d] for d in docs], [docs, [], []]
    pack = lambda rows, left: tiny.pack(cfg, rows, length, 3, left, F64)
    others = {
        "left": pack(apart, True),
        "packed": pack(together, False),
        "packed behind padding": pack(together, True),
    }
    return docs, pack(apart, False), others


def where(rows, document, packed):
    """(row, positions) of a document."""
    row, segment = (0, document + 1) if packed else (document, 1)
    return row, np.flatnonzero(np.asarray(rows.segments[row]) == segment)


def test_packed_and_left_padded_rows_are_their_documents(x64):
    cfg = tiny.config("float64")
    model = tiny.pretzel(cfg)
    docs, alone, others = packs(cfg)

    def everything(rows, x):
        likelihood, _ = evaluate(model, rows, x)
        (loss, metrics), gradient = gradients(model, rows, x)
        u = spread_images(likelihood.shallow_outputs[-1], rows.image_start, rows.tokens.shape[1])
        heads = predictions(model, rows.tokens, rows.kinds, rows.positions, rows.segments, u)
        per_position = heads | {
            "text_log_prob": likelihood.text_log_prob[..., None],
            "z": likelihood.z,
            "deep_log_det": likelihood.deep_log_det,
        }
        images = np.asarray(likelihood.image_log_prob)[np.asarray(rows.image_start) >= 0]
        return per_position, images, {"loss": loss, **metrics}, gradient

    wanted, wanted_images, wanted_losses, (wanted_state, wanted_x) = everything(*alone)
    present = np.asarray(alone[0].image_start) >= 0
    assert present.sum() == 3
    for case, (rows, x) in others.items():
        ours, images, losses, (state, of_x) = everything(rows, x)
        for index in range(len(docs)):
            a, at = where(rows, index, "packed" in case)
            b, there = where(alone[0], index, False)
            assert len(at) == len(there) == len(docs[index])
            for name, value in ours.items():
                tiny.close(
                    np.asarray(value)[a, at],
                    np.asarray(wanted[name])[b, there],
                    1e-10,
                    f"{case}: {name} of document {index}",
                )
        tiny.close(images, wanted_images, 1e-10, case)
        for name, value in losses.items():
            tiny.close(value, wanted_losses[name], 1e-10, f"{case}: {name}")
        tiny.close_trees(state, wanted_state, 1e-10)
        here = np.asarray(rows.image_start) >= 0
        tiny.close(np.asarray(of_x)[here], np.asarray(wanted_x)[present], 1e-10, case)


def test_a_document_without_any_padding(x64):
    """Right padding and other rows change nothing either."""
    cfg = tiny.config("float64")
    model = tiny.pretzel(cfg)
    docs, alone, _ = packs(cfg)
    together = evaluate(model, *alone)[0]
    rows, x = tiny.pack(cfg, [[docs[1]]], dtype=F64)
    single = evaluate(model, rows, x)[0]
    length = len(docs[1])
    for name in ("text_log_prob", "z", "deep_log_det"):
        tiny.close(getattr(together, name)[1, :length], getattr(single, name)[0], 1e-10, name)
    tiny.close(together.image_log_prob[1, :1], single.image_log_prob[0], 1e-10)


def test_the_loss_is_the_sum_over_counts(x64):
    """L_image and L_text from the log-probabilities: what the objective says it means."""
    cfg = tiny.config("float64")
    _, (rows, x), _ = packs(cfg)
    likelihood, (loss, metrics) = evaluate(tiny.pretzel(cfg), rows, x)
    dims = 3 * cfg.flow.tokens * cfg.flow.channels
    wanted = -likelihood.image_log_prob.sum() / dims - 0.5 * math.log(2 * math.pi)
    tiny.close(metrics["loss_image"], wanted, 1e-10)
    mask = np.asarray(rows.text_loss_mask)
    tiny.close(metrics["loss_text"], -np.asarray(likelihood.text_log_prob)[mask].mean(), 1e-10)
    total = metrics["loss_image"] + metrics["loss_text"] + 1e-4 * metrics["latent_norm"]
    tiny.close(loss, total, 1e-10)
    # An image that is not counted is still context.
    masked = dataclasses.replace(rows, image_loss_mask=rows.image_loss_mask.at[0, 0].set(False))
    other, (_, fewer) = evaluate(tiny.pretzel(cfg), masked, x)
    tiny.close(other.image_log_prob, likelihood.image_log_prob, 1e-10)
    rest = likelihood.image_log_prob.sum() - likelihood.image_log_prob[0, 0]
    wanted = -rest / (dims * 2 / 3) - 0.5 * math.log(2 * math.pi)
    tiny.close(fewer["loss_image"], wanted, 1e-10)


# Counts of zero, stages and precision: float32, all of one shape.


def float32_rows(cfg, *documents):
    """One or two rows of one document each, given by their parts."""
    rows = [[tiny.document(cfg, parts, i)] if parts else [] for i, parts in enumerate(documents)]
    return tiny.pack(cfg, rows + [[]] * (2 - len(rows)), length=20, images=2)


@pytest.mark.parametrize(
    "case, zero",
    [
        ("text", {"loss_image", "latent_norm"}),
        ("image", {"loss_text"}),
        ("padding", {"loss_image", "loss_text", "latent_norm"}),
    ],
)
def test_a_count_of_zero_gives_zero(case, zero):
    cfg = tiny.config()
    model = tiny.pretzel(cfg)
    parts = {"text": [4], "image": ["image"], "padding": []}[case]
    rows, x = float32_rows(cfg, parts)
    if case == "image":
        rows = dataclasses.replace(rows, text_loss_mask=jnp.zeros_like(rows.text_loss_mask))
    (loss, metrics), (of_model, of_x) = gradients(model, rows, x)
    for name, value in metrics.items():
        assert np.isfinite(value)
        assert (value == 0) == (name in zero), (name, value)
    assert (loss == 0) == (case == "padding")
    total = 0.0
    for leaf in jax.tree.leaves((of_model, of_x)):
        assert np.isfinite(leaf).all()
        total += np.abs(leaf).sum()
    assert (total == 0) == (case == "padding")
    if case != "image":
        np.testing.assert_array_equal(of_x, 0)


def test_zero_initialised_parameters_are_the_couplings_and_heads():
    cfg = tiny.config()
    model = tiny.jit(lambda: nnx.state(Pretzel(cfg, rngs=nnx.Rngs(0))))()
    zero = {
        ".".join(map(str, path))
        for path, leaf in nnx.to_flat_state(model)
        if not np.any(leaf[...]) and "norm" not in str(path)
    }
    heads = {f"{b}.head.proj" for b in ("deep", "shallow.blocks.0", "shallow.blocks.1")}
    wanted = {f"{name}.{leaf}" for name in heads | {"adapter.out"} for leaf in ("kernel", "bias")}
    assert zero == wanted | {"skip_vlm.kernel", "skip_flow.kernel"}


def test_zero_couplings_leave_the_vlm_and_stage_1_as_they_are():
    cfg = tiny.config()
    model = tiny.pretzel(cfg, zero=("adapter.out", "skip_vlm", "skip_flow"))
    rows, x = float32_rows(cfg, [3, "image", 2, "image", 2], [4])
    full = evaluate(model, rows, x)[0]

    @tiny.jit
    def plain(vlm, rows):
        e = vlm.embed(rows.tokens, jnp.float32)
        y, _ = vlm.decode(e, rows.positions, AttentionSpec(segments=rows.segments))
        return y, vlm.logits(y)

    y, logits = plain(model.vlm, rows)
    alive = np.asarray(rows.kinds) != Kind.PAD
    tiny.close(np.asarray(full.streams.y)[alive], np.asarray(y)[alive], 1e-6)
    ours = tiny.jit(lambda m, s: m.logits(s.y, s.g))(model, full.streams)
    tiny.close(np.asarray(ours)[alive], np.asarray(logits)[alive], 1e-6)
    first = evaluate(model, rows, x, STAGE_1)[0]
    tiny.close(full.image_log_prob, first.image_log_prob, 1e-6)


def test_stage_3_starts_where_stages_1_and_2_ended():
    """The adapter is trained (stage 2), so is the flow (stage 1); the skips are still zero."""
    cfg = tiny.config()
    model = tiny.pretzel(cfg, zero=("skip_vlm", "skip_flow"))
    captions = float32_rows(cfg, [3, "image"], [4, "image"])  # one image, after its caption
    stage_1 = evaluate(model, *captions, STAGE_1)[1][1]
    stage_3 = evaluate(model, *captions)[1][1]
    tiny.close(stage_3["loss_image"], stage_1["loss_image"], 1e-6)
    answers = float32_rows(cfg, [1, "image", 3], [1, "image", 4])
    likelihood, (_, stage_2) = evaluate(model, *answers, STAGE_2, ObjectiveConfig(image=0.0))
    assert likelihood.z is None and likelihood.image_log_prob is None
    assert set(stage_2) == {"loss_text"}
    stage_3 = evaluate(model, *answers)[1][1]
    tiny.close(stage_3["loss_text"], stage_2["loss_text"], 1e-6)


def test_text_loss_reaches_the_flow_through_u():
    """Joint training has no stop-gradient: with no image counted, L_text still moves the flow."""
    cfg = tiny.config()
    rows, x = float32_rows(cfg, [1, "image", 3])
    rows = dataclasses.replace(rows, image_loss_mask=jnp.zeros_like(rows.image_loss_mask))
    (_, metrics), (of_model, _) = gradients(tiny.pretzel(cfg), rows, x)
    assert metrics["loss_image"] == 0
    # The only other term, the latents' norm, has a weight of 1e-4.
    for name in ("adapter", "shallow", "skip_vlm", "skip_flow"):
        assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(of_model[name])), name


def test_bfloat16_compute_keeps_float32_losses():
    cfg = tiny.config("bfloat16")
    model = tiny.pretzel(cfg)
    rows, x = float32_rows(cfg, [3, "image", 2, "image", 2])
    likelihood, losses = evaluate(model, rows, x)
    for value in (likelihood.streams.y, likelihood.streams.g):
        assert value.dtype == jnp.bfloat16
    exact = dataclasses.replace(likelihood, streams=None)
    for leaf in jax.tree.leaves((exact, losses)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    _, gradient = jax.eval_shape(gradients, model, rows, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    wide = tiny.pretzel(dataclasses.replace(cfg, dtype="float32"))
    _, (reference, _) = evaluate(wide, rows, x)
    assert abs(losses[0] - reference) < 0.05 * abs(reference)


def test_float64_stays_float64(x64):
    cfg = tiny.config("float64")
    _, (rows, x), _ = packs(cfg)
    for leaf in jax.tree.leaves(evaluate(tiny.pretzel(cfg), rows, x)):
        assert leaf.dtype == jnp.float64


# The full size, by shapes alone.


def count(state):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def test_parameter_counts_of_the_full_size():
    model = nnx.eval_shape(lambda: Pretzel(starflow2_3_6b(), rngs=nnx.Rngs(0)))
    language = (model.vlm.embedding, model.vlm.decoder, model.vlm.head)
    assert count(language) == 7_615_616_512
    _, trainable = nnx.split_state(nnx.state(model), nnx.PathContains("vlm"), ...)
    assert 3.6e9 < count(trainable) < 3.75e9
    assert count(trainable) == 3_672_060_160
