"""The flow: it inverts, its log-dets are those of its Jacobians, guidance is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from starflow2_jax.data import digits
from starflow2_jax.models import flow, patches
from starflow2_jax.models.pretzel import Kind
from starflow2_jax.nn import partition

F64 = jnp.float64


def shallow(**changes):
    return tiny.randomised(
        lambda: flow.ShallowFlow(tiny.flow(**changes), rngs=nnx.Rngs(0)), dtype=F64
    )


def tokens(cfg, images=2, seed=0):
    shape = (images, cfg.tokens, cfg.channels)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


forward = tiny.jit(lambda model, x: model.forward(x, F64))
inverse = tiny.jit(lambda model, u: model.inverse(u, F64))


@pytest.mark.parametrize("orders", [("keep", "flip"), ("flip", "flip")])
def test_shallow_flow_inverts(x64, orders):
    model = shallow(side=3, shallow_orders=orders)
    x = tokens(model.config)
    outputs, _ = forward(model, x)
    assert np.abs(outputs[-1] - x).max() > 0.1
    tiny.close(inverse(model, outputs[-1]), x, 1e-10)
    z = tokens(model.config, seed=1)
    tiny.close(forward(model, inverse(model, z))[0][-1], z, 1e-10)


def test_shallow_log_det_is_that_of_the_jacobian(x64):
    model = shallow()
    x = tokens(model.config)
    shape, size = x.shape[1:], x[0].size

    def u_of(model, flat):
        return model.forward(flat.reshape(1, *shape), F64)[0][-1].ravel()

    jacobian = tiny.jit(jax.vmap(jax.jacfwd(u_of, argnums=1), in_axes=(None, 0)))(
        model, x.reshape(2, size)
    )
    total = sum(log_det.sum((1, 2)) for log_det in forward(model, x)[1])
    assert np.abs(total).min() > 0.1
    tiny.close(total, np.linalg.slogdet(jacobian)[1], 1e-10)


@pytest.mark.parametrize("order", ["keep", "flip"])
def test_one_block_is_triangular_in_its_own_order(x64, order):
    model = shallow(shallow_layers=(1,), shallow_orders=(order,))
    n, c = model.config.tokens, model.config.channels
    x = tokens(model.config, images=1)
    jacobian = tiny.jit(jax.jacfwd(lambda m, x: m.forward(x[None], F64)[0][0][0], argnums=1))(
        model, x[0]
    )
    depends = np.abs(jacobian).max((1, 3))  # [N of z, N of x]
    # A token sees itself and those before it in the block's order; itself only channel by channel.
    wanted = np.tri(n, dtype=bool)
    np.testing.assert_array_equal(depends > 0, wanted if order == "keep" else wanted.T)
    first = 0 if order == "keep" else n - 1
    own = np.asarray(jacobian)[first, :, first, :]
    np.testing.assert_array_equal(own != 0, np.eye(c, dtype=bool))


def test_whole_image_log_det_through_both_streams(x64):
    """x -> z of two images of one row: the second one's z depends on the first."""
    cfg = tiny.config("float64")
    model = tiny.pretzel(cfg)
    rows, x = tiny.pack(cfg, [[tiny.document(cfg, [3, "image", 1, "image", 1], 0)]], dtype=F64)
    latent = np.asarray(rows.kinds[0]) == Kind.LATENT

    def whole(model, flat):
        likelihood = model.log_prob(rows, flat.reshape(x.shape))
        z = likelihood.z[0, latent].ravel()
        log_det = likelihood.deep_log_det.sum((1, 2)) + sum(
            d.sum((1, 2, 3)) for d in likelihood.shallow_log_dets
        )
        return z, log_det[0], likelihood.image_log_prob[0]

    z, log_det, log_prob = tiny.jit(whole)(model, x.ravel())
    jacobian = tiny.jit(jax.jacfwd(lambda m, flat: whole(m, flat)[0], argnums=1))(model, x.ravel())
    half = x.size // 2
    assert np.abs(jacobian[:half, half:]).max() == 0.0  # the second image is not seen by the first
    assert np.abs(jacobian[half:, :half]).max() > 1e-3
    tiny.close(log_det, np.linalg.slogdet(jacobian)[1], 1e-10)
    normal = -0.5 * (np.square(z) + np.log(2 * np.pi))
    tiny.close(log_prob.sum(), normal.sum() + np.linalg.slogdet(jacobian)[1], 1e-10)
    first = np.linalg.slogdet(jacobian[:half, :half])[1]
    tiny.close(log_prob[0], normal[:half].sum() + first, 1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_fresh_flow_is_the_identity(x64, dtype):
    cfg = tiny.flow()
    dtype = jnp.dtype(dtype)
    model = flow.ShallowFlow(cfg, rngs=nnx.Rngs(0))
    x = tokens(cfg).astype(dtype)
    outputs, log_dets = tiny.jit(lambda x: model.forward(x, dtype))(x)
    for output, log_det in zip(outputs, log_dets, strict=True):
        assert output.dtype == dtype
        np.testing.assert_array_equal(output, x)
        np.testing.assert_array_equal(log_det, 0.0)
    mu, sigma = flow.GaussianHead(cfg, rngs=nnx.Rngs(0))(jnp.ones((5, cfg.width), dtype))
    np.testing.assert_array_equal(mu, 0.0)
    np.testing.assert_array_equal(sigma, 1.0)


def test_head_is_clipped_softly(x64):
    cfg = tiny.flow()
    head = tiny.randomised(lambda: flow.GaussianHead(cfg, rngs=nnx.Rngs(0)), dtype=F64)
    mu, sigma = head(jnp.asarray(1e3 * np.random.default_rng(0).normal(size=(50, cfg.width))))
    assert np.abs(mu).max() <= 4.0
    assert sigma.min() >= np.log1p(np.exp(-4.0 + flow.SOFTPLUS_OF_ONE)) - 1e-12
    assert sigma.max() <= np.log1p(np.exp(4.0 + flow.SOFTPLUS_OF_ONE)) + 1e-12


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_what_is_exact_is_multiplied_in_full_precision(monkeypatch, platform):
    monkeypatch.setattr(partition, "platform", lambda: platform)
    codec = patches.fit_patch_codec(digits.load_splits()["tune"].images[:8], 14, 0, smooth=1)
    head = flow.GaussianHead(tiny.flow(), rngs=nnx.Rngs(0))
    hidden = jnp.zeros((2, tiny.flow().width))
    x = jnp.zeros((1, 196, 4))

    def products(function, *arrays):
        with jax.default_matmul_precision(None):  # as the commands run, other than the tests
            text = str(jax.make_jaxpr(function)(*arrays))
        return text.count("dot_general["), text.count("precision=(Precision.HIGHEST")

    def check(function, *arrays):
        count, full = products(function, *arrays)
        assert count > 0 and full == (0 if platform == "cpu" else count)

    check(lambda x: codec.decode(x), x)
    check(lambda images: codec.encode(images, 0.5), jnp.zeros((1, 28, 28, 1)))
    loss = lambda hidden: sum(a.sum() for a in head(hidden))
    check(jax.value_and_grad(loss), hidden)


def gaussians(seed=0, shape=(7, 3)):
    rng = np.random.default_rng(seed)
    mu_c, mu_u = rng.normal(size=(2, *shape))
    sigma_c, sigma_u = np.exp(0.5 * rng.normal(size=(2, *shape)))
    return mu_c, sigma_c, mu_u, sigma_u


def test_guidance_of_zero_is_exactly_conditional(x64):
    mu_c, sigma_c, mu_u, sigma_u = gaussians()
    mu, sigma = flow.guide(mu_c, sigma_c, mu_u, sigma_u, 0.0)
    np.testing.assert_array_equal(mu, mu_c)
    np.testing.assert_array_equal(sigma, sigma_c)


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_guided_density_is_the_combination_of_log_densities(x64, weight):
    mu_c, sigma_c, mu_u, sigma_u = gaussians()
    # Where the conditional is the wider one, both count with the conditional's width.
    narrow = np.maximum(sigma_c, sigma_u)

    def log_density(z, mu, sigma):
        return -0.5 * np.square((z - mu) / sigma) - np.log(sigma)

    mu, sigma = flow.guide(mu_c, sigma_c, mu_u, sigma_u, weight)
    assert (sigma_c < sigma_u).any() and (sigma_c > sigma_u).any()
    z = np.linspace(-3, 3, 9)[:, None, None]
    combined = (1 + weight) * log_density(z, mu_c, sigma_c) - weight * log_density(z, mu_u, narrow)
    difference = combined - log_density(z, mu, sigma)
    tiny.close(difference - difference[0], np.zeros_like(difference), 1e-10)


def test_guidance_of_given_numbers(x64):
    mu, sigma = flow.guide(1.0, 1.0, 0.0, 2.0, 1.0)  # s = 1/4, q = 7/4
    tiny.close(mu, 8 / 7, 1e-12)
    tiny.close(sigma, np.sqrt(4 / 7), 1e-12)
    mu, sigma = flow.guide(1.0, 2.0, 0.5, 1.0, 2.0)  # s = 1: a shift of the mean alone
    tiny.close(mu, 2.0, 1e-12)
    tiny.close(sigma, 2.0, 1e-12)
