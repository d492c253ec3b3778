"""Made-up pictures and words for them: for smoke modes of configs that come without data."""

import grain
import numpy as np

from starflow2_jax.data.batches import Documents
from starflow2_jax.data.packing import features
from starflow2_jax.data.sequences import ImageShape, Turn, encode_turns
from starflow2_jax.data.tokenizer import train_tokenizer
from starflow2_jax.models.patches import fit_patch_codec

_SIDE, _PATCH = 8, 4
_WORDS = ("a dark picture", "a grey picture", "a bright picture")
_QUESTION = "describe this image"


class MadeData:
    """Noise of three brightnesses, 8x8 pixels in 16 tokens of 4 channels, to draw and to read."""

    def __init__(self) -> None:
        self.tokenizer = train_tokenizer([*_WORDS, _QUESTION], 300)
        self.image = ImageShape(_SIDE, _SIDE, 1, _PATCH)
        rng = np.random.default_rng(0)
        self.codec = fit_patch_codec(np.stack([_picture(n % 3, rng) for n in range(96)]), _PATCH, 0)

    def documents(self, stage: str, held_out: bool, seed: int) -> Documents:
        """An endless stream: what the stage trains, drawings or readings, or both in turn."""
        kinds = {"text_to_image": ("draw",), "image_to_text": ("read",)}.get(
            stage, ("draw", "read")
        )

        def document(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
            brightness = int(rng.integers(3))
            picture, words = _picture(brightness, rng), _WORDS[brightness]
            if kinds[index % len(kinds)] == "draw":
                turns = [Turn("user", (words,)), Turn("assistant", (picture,))]
            else:
                turns = [Turn("user", (picture, _QUESTION)), Turn("assistant", (words,))]
            return features(encode_turns(turns, self.tokenizer, self.image), rng)

        own = int(np.random.SeedSequence([seed, held_out]).generate_state(1)[0])
        return Documents(grain.MapDataset.range(2**40).seed(own).random_map(document))


def _picture(brightness: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 1]."""
    noise = rng.integers(0, 64, (_SIDE, _SIDE, 1))
    return (noise + 90 * brightness).astype(np.uint8)
