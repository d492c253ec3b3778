"""What the flow needs of whatever turns images into its latents and back.

Letters: B images, N tokens, C latent channels, H, W pixels.
"""

from typing import Protocol

import jax


class Codec(Protocol):
    """`patches.PatchCodec`, or `fae_codec.FAECodec`; a pytree.

    Attributes:
        shape: (H, W, channels) of the images.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """See above."""

    @property
    def of_pixels(self) -> bool:
        """Whether x is the dequantised image itself, so that a density of x is one of the image.

        If not, x is drawn from a posterior given the image, and nothing says how likely an image
        is given x.
        """

    def latents(
        self,
        images: jax.Array,
        seed: jax.Array | int,
        image_seeds: jax.Array,
        noise_std: jax.Array | float = 0.0,
        reading: bool = False,
    ) -> jax.Array:
        """Latents of images with their noise, the same whatever batch they are in.

        Args:
            images: uint8 [B, H, W, channels], or what else the codec takes.
            seed: of the run, or of one draw; scalar.
            image_seeds: uint32 [B], of each image's record and of its place there.
            noise_std: of the noise on the latents.
            reading: for images that are only looked at: nothing is drawn that need not be.

        Returns:
            x [B, N, C].
        """

    def decode(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> real pixels [B, H, W, channels] on the [-1, 1] scale."""

    def to_uint8(self, x: jax.Array) -> jax.Array:
        """x [B, N, C] -> 8-bit images."""

    def bits_per_dim(self, log_prob: jax.Array) -> jax.Array:
        """log p(x) in nats of a whole image -> bits per dim, of what the codec says."""
