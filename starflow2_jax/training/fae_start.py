"""A start for small FAEs near the best linear one, in the place of a random start.

The weights of a principal components analysis fit into encoder and feature decoder as they are, and
those of a regression of pixels into the pixel decoder; training goes on from there. Letters: N
tokens, D features, C latent channels, W width of the pixel decoder, P numbers of a patch.
"""

from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx

from starflow2_jax.errors import UserError
from starflow2_jax.models.fae import FAE, GridDecoder
from starflow2_jax.nn import grid

# Log-variance of the posterior of a latent whose means have variance 1.
_LOGVAR = -6.0
# Root mean square of what all tokens share in the pixel decoder; that of a token is about 1.
_SHARED = 2.0
# Least part of the mean variance that a direction must have to be regressed on.
_RIDGE = 1e-4


def put(variable: nnx.Variable, value: np.ndarray) -> None:
    """Gives a parameter another value, float32, where the one before it is."""
    place = variable[...].sharding
    variable[...] = jax.device_put(np.asarray(value, np.float32), place)


def _silence(decoder: GridDecoder) -> None:
    """Lets the layers of a stack add nothing at first."""
    for layer in (decoder.decoder.layers.attention.out, decoder.decoder.layers.mlp.down):
        for variable in (layer.kernel, layer.bias):
            put(variable, np.zeros(variable[...].shape))


def start_linear(fae: FAE, parts: Iterable[tuple[np.ndarray, np.ndarray]], seed: int) -> None:
    """Puts PCA and regression into a fresh FAE that has its statistics of features.

    silu(u) - silu(-u) = u: so 2C of the encoder's hidden numbers make C linear ones, the scores of
    the largest components with variance 1. The others start at random, and unheard.

    Args:
        fae: no norm at the end of its feature decoder, SiLU in its encoder.
        parts: features float32 [b, N, D] in their own units, and images uint8 [b, H, W, channels].
        seed: of the pixel decoder's basis.

    Raises:
        UserError: the shape has no room for it.
    """
    config = fae.config
    encoder, inner = config.encoder, config.encoder.heads * config.encoder.head_dim
    count, width, features = config.channels, config.pixel_decoder.width, config.features
    if encoder.activation != "silu" or config.feature_decoder.final_norm != "none":
        raise UserError("a linear start needs activation 'silu' and final_norm 'none'")
    if inner < 2 * count or features < count or width < features + config.tokens + 2:
        raise UserError(
            f"no room for a linear start: it needs at least {2 * count} numbers in the encoder's "
            f"heads (there are {inner}), {count} features (there are {features}) and "
            f"{features + config.tokens + 2} in the pixel decoder's width (there are {width})"
        )
    squares, cross, pixel_mean, tokens = 0.0, 0.0, 0.0, 0
    for x, images in parts:
        normed = np.asarray(fae.features.normalise(x)).reshape(-1, features).astype(np.float64)
        pixels = images.astype(np.float32) / 127.5 - 1.0
        patches = np.asarray(grid.to_patches(pixels, config.pixel_decoder.patch))
        patches = patches.reshape(len(normed), -1)
        squares = squares + normed.T @ normed
        cross = cross + normed.T @ patches
        pixel_mean = pixel_mean + patches.sum(0)
        tokens += len(normed)
    squares, cross, pixel_mean = squares / tokens, cross / tokens, pixel_mean / tokens
    _start_features(fae, squares, inner)
    regularised = squares + _RIDGE * np.trace(squares) / features * np.eye(features)
    _start_pixels(fae, np.linalg.solve(regularised, cross), pixel_mean, seed)


def _start_features(fae: FAE, squares: np.ndarray, inner: int) -> None:
    """The encoder and the feature decoder, from the covariance [D, D] of normalised features."""
    count = fae.config.channels
    variances, axes = np.linalg.eigh(squares)
    variances, axes = variances[::-1][:count], axes[:, ::-1][:, :count]
    sizes = np.sqrt(np.maximum(variances, 1e-6 * variances[0]))
    scores = axes / sizes  # [D, C]
    encoder = fae.encoder
    skip, value = np.array(encoder.skip.kernel[...]), np.array(encoder.v.kernel[...])
    skip_bias, value_bias = np.array(encoder.skip.bias[...]), np.array(encoder.v.bias[...])
    skip[:, : 2 * count] = np.concatenate([scores, -scores], 1)
    value[:, : 2 * count] = 0.0
    skip_bias[: 2 * count] = value_bias[: 2 * count] = 0.0
    out = np.zeros((inner, 2 * count))
    out[:count, :count] = np.eye(count)
    out[count : 2 * count, :count] = -np.eye(count)
    out_bias = np.repeat([0.0, _LOGVAR], count)
    for variable, array in (
        (encoder.skip.kernel, skip),
        (encoder.skip.bias, skip_bias),
        (encoder.v.kernel, value),
        (encoder.v.bias, value_bias),
        (encoder.out.kernel, out),
        (encoder.out.bias, out_bias),
        (fae.feature_decoder.proj_in.kernel, (axes * sizes).T),
        (fae.feature_decoder.proj_in.bias, np.zeros(len(axes))),
    ):
        put(variable, array)
    if fae.feature_decoder.positions is not None:
        put(fae.feature_decoder.positions, np.zeros(fae.feature_decoder.positions[...].shape))
    _silence(fae.feature_decoder)


def _start_pixels(fae: FAE, weights: np.ndarray, mean: np.ndarray, seed: int) -> None:
    """The pixel decoder, from regression weights [D, P] and the mean patch [P].

    Features go into D directions that neither the positions nor the last norm's centring touch, and
    one more is the same everywhere, by which that norm is nearly linear.
    """
    config, decoder = fae.config, fae.pixel_decoder
    width, features = config.pixel_decoder.width, config.features
    table = grid.sincos_table(config.side, config.side, width)
    rng = np.random.default_rng(seed)
    taken = np.concatenate([np.ones((1, width)), table])
    others = np.concatenate([taken, rng.normal(size=(features + 1, width))])
    free = np.linalg.qr(others.T)[0].T[len(taken) :]  # rows
    content, shared = free[:features], free[features]
    gain = np.sqrt(
        features / width + np.square(table - table.mean(1, keepdims=True)).mean() + _SHARED**2
    )
    final = decoder.grid.decoder.final_norm
    scale = final.scale if config.pixel_decoder.norm == "layer" else final.weight
    for variable, array in (
        (decoder.grid.proj_in.kernel, content),
        (decoder.grid.proj_in.bias, _SHARED * np.sqrt(width) * shared),
        (scale, np.full(width, gain)),
        (decoder.head.kernel, content.T @ weights),
        (decoder.head.bias, mean),
    ):
        put(variable, array)
    _silence(decoder.grid)
