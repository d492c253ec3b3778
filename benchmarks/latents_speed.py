"""Rate of `starflow2 data latents` beside that of its encoder alone, on PNG files.

    python benchmarks/latents_speed.py --json FILE

The encoder is an FAE on a ViT of DINOv2-S's shape (224x224, random weights); the files hold noise,
which is the most that PNG can take to read.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
from flax import nnx
from PIL import Image

from starflow2_jax.data.sources import FolderSource
from starflow2_jax.fae_bundle import save_fae
from starflow2_jax.fae_cache import cache_latents
from starflow2_jax.models.dinov2 import dinov2_small
from starflow2_jax.models.fae import (
    EncoderConfig,
    FAEConfig,
    FeatureDecoderConfig,
    FeatureFAE,
    PixelDecoderConfig,
)


def main() -> None:
    """Measures, prints, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", required=True)
    parser.add_argument("--images", metavar="N", type=int, default=128)
    args = parser.parse_args()
    vit = dinov2_small()
    config = FAEConfig(
        features=vit.width,
        encoder=EncoderConfig(heads=6, head_dim=64),
        feature_decoder=FeatureDecoderConfig(1, 6, 64),
        pixel_decoder=PixelDecoderConfig(1, 64, 2, 64),
    )
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "pictures").mkdir()
        for i in range(args.images):
            noise = rng.integers(0, 256, (config.image_size, config.image_size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "pictures" / f"{i:06d}.png")
        save_fae(folder / "fae", FeatureFAE(config, vit, rngs=nnx.Rngs(0)))
        source = FolderSource(folder / "pictures")
        rates = cache_latents(folder / "fae", source, folder / "cache", shard=64, batch=16)
    rate = rates.images / rates.seconds
    row = {
        "name": "latents/cache",
        "value": rate,
        "unit": "images/s",
        "peer": rates.encoder,
        "ratio": rates.share,
    }
    print(f"{rate:.2f} images/s cached, {rates.encoder:.2f} encoded: {rates.share:.3f}")
    pathlib.Path(args.json).write_text(json.dumps([row], indent=2) + "\n")


if __name__ == "__main__":
    main()
