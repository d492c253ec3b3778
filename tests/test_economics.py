"""What a stage does not compute: logits, the VLM over images, gradients of frozen weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from starflow2_jax.data import packing
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Parts
from starflow2_jax.nn import cross_entropy
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.mesh import MeshConfig, make_mesh
from starflow2_jax.training.objective import ObjectiveConfig, objective
from starflow2_jax.training.stages import IMAGE_TO_TEXT, JOINT, PRETRAIN_LM, TEXT_TO_IMAGE

V, D = 96, 8


def full(y, head, tokens):
    logits = jnp.einsum("bkd,vd->bkv", y, head)
    total = jax.nn.logsumexp(logits, -1)
    return jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] - total, total


def inputs(dtype):
    rng = np.random.default_rng(0)
    y, head = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 8, D), (V, D)))
    return y, head, jnp.asarray(rng.integers(0, V, (2, 8)), jnp.int32)


def with_gradients(f):
    """Of a function of both results that weights every position otherwise."""

    def scalar(y, head, tokens):
        found = f(y, head, tokens)
        weights = jnp.arange(1.0, found[0].size + 1).reshape(found[0].shape)
        return (found[0] * weights + found[1] ** 2 / weights).sum(), found

    return tiny.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [1, 2 * 8 * 8 * 12, 10**9], ids=["ones", "chunks", "whole"])
def test_chunks_are_the_whole(most):
    chunked = with_gradients(lambda *a: cross_entropy.token_log_prob(*a, most=most))
    given = inputs(jnp.float64)
    tiny.close_trees(chunked(*given), with_gradients(full)(*given), 1e-10)


def test_chunks_divide_the_vocabulary():
    chunks = cross_entropy.vocabulary_chunks
    assert chunks(1024, 152064, 4, 2**26) == 11 and 152064 % 11 == 0
    assert chunks(10, 96, 4, 10**9) == 1
    assert chunks(1, 7, 4, 1) == 7


def shapes_of(jaxpr):
    """(primitive, shape) of all results, also of inner programs."""
    for eqn in jaxpr.eqns:
        for out in eqn.outvars:
            yield eqn.primitive.name, getattr(out.aval, "shape", ())
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_of(inner)


def test_no_logits_over_the_whole_vocabulary():
    y, head, tokens = inputs(jnp.float32)
    most = 2 * 8 * 4 * 12  # 12 words at a time
    sizes = lambda f: max(
        np.prod(s) for _, s in shapes_of(jax.make_jaxpr(jax.grad(f, (0, 1)))(y, head).jaxpr)
    )
    ours = sizes(lambda y, head: cross_entropy.token_log_prob(y, head, tokens, most)[0].sum())
    assert ours == max(2 * 8 * 12, V * D)
    assert sizes(lambda y, head: full(y, head, tokens)[0].sum()) == 2 * 8 * V


@pytest.mark.distributed
def test_chunks_of_a_vocabulary_over_tensor():
    assert len(jax.devices()) >= 8
    y, head, tokens = inputs(jnp.float32)
    expected = with_gradients(full)(y, head, tokens)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2), jax.devices()[:8])
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
    with rules.use(mesh):
        chunked = with_gradients(lambda *a: cross_entropy.token_log_prob(*a, most=4 * 4 * 4 * 12))
        ours = chunked(put(y, "fsdp", "sequence"), put(head, "tensor", "fsdp"), put(tokens, "fsdp"))
    tiny.close_trees(ours, expected, 1e-4)


# Rows as the pipeline makes them.


@pytest.fixture(scope="module")
def packed():
    with jax.enable_x64(True):
        cfg = tiny.config("float64")
        documents = [
            tiny.document(cfg, [3, "image", 2], 1),
            tiny.document(cfg, [1, "image"], 2),
            tiny.document(cfg, [6, "image", 1], 3),
            tiny.document(cfg, [4], 4),
        ]
        rows = [documents[:2], documents[2:]]
        return tiny.pretzel(cfg), *tiny.pack(cfg, rows, length=24, dtype=jnp.float64)


def chosen(rows, **sizes):
    """The rows with what `packing.finish` adds for these sizes."""
    host = {
        "kinds": np.asarray(rows.kinds),
        "tokens_segment_ids": np.asarray(rows.segments),
    }
    masks = {"text_targets": np.asarray(rows.text_loss_mask)}
    masks["prefix"] = packing._before_images(host)
    made = {n: jnp.asarray(packing._indices(masks[n], size)) for n, size in sizes.items()}
    return dataclasses.replace(rows, **made)


def evaluate(model, rows, x, parts, weights):
    graphdef, state = nnx.split(model)

    def loss(state, x):
        return objective(nnx.merge(graphdef, state), rows, x, parts, weights)

    return tiny.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)


@pytest.mark.usefixtures("x64")
def test_text_targets_alone_give_the_same_losses_and_gradients(packed):
    model, rows, x = packed
    few = chosen(rows, text_targets=12)
    assert (np.asarray(few.text_targets) >= 0).sum() == np.asarray(rows.text_loss_mask).sum()
    weights = ObjectiveConfig(z_loss=0.1)
    whole = evaluate(model, rows, x, Parts(), weights)
    tiny.close_trees(evaluate(model, few, x, Parts(), weights), whole, 1e-10)
    assert whole[0][1]["z_loss"] > 0
    likelihood = tiny.jit(lambda m, r, x: m.log_prob(r, x).text_log_prob)
    ours, theirs = (np.asarray(likelihood(model, r, x)) for r in (few, rows))
    mask = np.asarray(rows.text_loss_mask)
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-12)
    assert (ours[~mask] == 0).all() and (theirs[~mask] != 0).any()


@pytest.mark.usefixtures("x64")
def test_the_vlm_over_the_prefix_gives_stage_1_the_same_loss_and_gradients(packed):
    model, rows, x = packed
    short = chosen(rows, prefix=8)
    # 3 + 1 tokens and a start before each image; none of what follows the last image of a segment.
    assert (np.asarray(short.prefix) >= 0).sum(1).tolist() == [4 + 2, 7]
    stage = dataclasses.replace(TEXT_TO_IMAGE.parts, text=False)
    weights = ObjectiveConfig(text=0.0)
    whole = evaluate(model, rows, x, stage, weights)
    tiny.close_trees(evaluate(model, short, x, stage, weights), whole, 1e-10)
    assert float(whole[0][0]) != 0
    with pytest.raises(ValueError, match="over whole rows"):
        model.log_prob(short, x, Parts(text=False))
    with pytest.raises(ValueError, match="no likelihood"):
        model.log_prob(short, x, TEXT_TO_IMAGE.parts)


def test_the_pipeline_packs_to_the_limits():
    import grain

    from starflow2_jax.data.batches import Documents
    from starflow2_jax.data.pipeline import BatchShape, packed_batches

    cfg = tiny.config()

    def features(parts, seed):
        d = tiny.document(cfg, parts, seed)
        return {
            "tokens": d.tokens.astype(np.int32),
            "kinds": d.kinds.astype(np.int32),
            "positions": d.positions.T.astype(np.int32),
            "text_loss": d.text_loss,
            "images": np.zeros((len(d.starts), 4, 4, 1), np.uint8),
            "image_seeds": np.arange(len(d.starts), dtype=np.uint32),
        }

    captions = [features([n % 4 + 1, "image"], n) for n in range(12)]
    stream = Documents(grain.MapDataset.source(captions).repeat())
    shape = BatchShape(rows=2, length=40, images=4, targets=9, prefix=10)
    for batch, _ in zip(packed_batches(stream, shape), range(4), strict=False):
        for row in range(2):
            targets = batch["text_targets"][row]
            assert (targets[targets >= 0] == np.flatnonzero(batch["text_loss"][row])).all()
            prefix = batch["prefix"][row][batch["prefix"][row] >= 0]
            starts = batch["image_start"][row]
            before = np.concatenate([np.arange(s - p, s) for s, p in _lengths(batch, row, starts)])
            assert (prefix == before).all()
    # A document that no row holds, and one that needs the VLM over its image.
    for parts, message in (([11, "image"], "positions before images"), ([1, "image"] * 2, "text")):
        one = Documents(grain.MapDataset.source([features(parts, 0)]).repeat())
        with pytest.raises(UserError, match=message):
            next(iter(packed_batches(one, dataclasses.replace(shape, targets=0))))
    with pytest.raises(UserError, match="has no views"):
        packed_batches(stream, dataclasses.replace(shape, places=4))


def _lengths(batch, row, starts):
    for start in starts[starts >= 0]:
        segment = batch["segments"][row]
        yield start, start - np.flatnonzero(segment == segment[start])[0]


# Gradients of the VLM.


@pytest.mark.parametrize(
    "stage", [TEXT_TO_IMAGE, IMAGE_TO_TEXT, JOINT, PRETRAIN_LM], ids=lambda s: s.name
)
def test_gradients_of_frozen_weights_are_never_formed(stage):
    cfg = tiny.config()
    rows, x = tiny.pack(cfg, [[tiny.document(cfg, [3, "image", 2], 1)]] * 2)
    model = nnx.eval_shape(lambda: tiny.pretzel(cfg))
    graphdef, trainable, frozen = nnx.split(model, stage.trainable, ...)
    parts = dataclasses.replace(stage.parts, text=stage.text)
    weights = ObjectiveConfig(image=float(stage.image), text=float(stage.text))

    def loss(trainable, frozen):
        return objective(nnx.merge(graphdef, trainable, frozen), rows, x, parts, weights)[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable, frozen).jaxpr
    products = {shape for name, shape in shapes_of(jaxpr) if name == "dot_general"}
    kernels = {
        leaf.shape[-2:]
        for path, leaf in nnx.to_flat_state(nnx.state(model.vlm))
        if path[-1] in ("kernel", "head")
    }
    of_others = {
        leaf.shape[-2:]
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if path[0] != "vlm" and len(leaf.shape) > 1
    }
    formed = {s for s in (kernels - of_others) if s in products or s[::-1] in products}
    assert len(kernels - of_others) >= 3
    if stage is PRETRAIN_LM:
        assert formed == kernels - of_others
    else:
        assert not formed
