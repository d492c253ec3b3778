"""The report on a model of emoji: likelihoods, retrieval, drawings, skin tones, noise removed.

Pictures are latents of an FAE. Letters: n emoji, N tokens, C latent channels.
"""

import dataclasses
import json
import pathlib
import resource
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from starflow2_jax.data import emoji as talk
from starflow2_jax.data.emoji import EmojiSet
from starflow2_jax.data.emoji_archive import TONES
from starflow2_jax.data.pipeline import single_batch, to_rows
from starflow2_jax.data.sequences import Turn, encode_turns
from starflow2_jax.evaluation.distances import kernel_distance
from starflow2_jax.evaluation.likelihood import paired_difference, score_captions
from starflow2_jax.evaluation.pictures import grid, plot_losses
from starflow2_jax.metrics import read_metrics
from starflow2_jax.model import Conversation, Model, Sampling
from starflow2_jax.models.dinov2 import DinoV2
from starflow2_jax.models.fae import FeatureFAE
from starflow2_jax.provenance import write_json
from starflow2_jax.sampling import display

NAMES = 32
SHOWN = 32
SHOWN_EDITS = 4


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """How much is measured.

    Attributes:
        groups: of `NAMES` emoji, among which retrieval is done, of each split.
        drawings: captions drawn, half of them held out; the first of each half are shown.
        edits: emoji whose skin tone is changed, and so many whose colours are restored.
        questions: emoji that are asked about.
        guidance, temperature: of drawings and edits.
        seed: of all sampling.
    """

    groups: int
    drawings: int
    edits: int
    questions: int
    guidance: float
    temperature: float
    seed: int


def _ask(*parts: str | np.ndarray) -> Conversation:
    return [Turn("user", parts)]


def _plain(emoji: EmojiSet, count: int, seed: int) -> np.ndarray:
    """Indices of so many emoji without skin tones and of names of their own, in random order."""
    names: dict[str, int] = {}
    for i, one in enumerate(emoji.emoji):
        if not one.tones:
            names.setdefault(one.caption, i)
    chosen = np.random.default_rng(seed).permutation(sorted(names.values()))
    return chosen[: min(count, len(chosen))]


def retrieval(model: Model, emoji: EmojiSet, config: ReportConfig) -> dict[str, float]:
    """Which of `NAMES` names makes a picture likeliest, and what the right one is worth.

    Returns:
        `retrieval`: share of pictures whose own name is the likeliest; `chance`; bits per noisy
        latent dim with its own caption, without one; their difference in nats a picture, with its
        standard error; `pictures`.
    """
    chosen = _plain(emoji, NAMES * config.groups, config.seed)
    # Whole groups, so that chance is the same in all; where there are few emoji, one small group.
    size = min(NAMES, len(chosen))
    right, own, empty = [], [], []
    for start in range(0, len(chosen) - size + 1, size):
        here = chosen[start : start + size]
        captions = [emoji.emoji[i].caption for i in here]
        scores = score_captions(model, emoji.images[here], captions)
        right += list(scores.posterior_argmax() == np.arange(size))
        own += list(np.diag(scores.captioned))
        empty += list(scores.empty)
    gain, error = paired_difference(np.array(own), np.array(empty))
    bits = lambda nats: float(np.mean(model.bundle.codec.bits_per_dim(np.array(nats))))
    return {
        "retrieval": float(np.mean(right)),
        "chance": 1.0 / size,
        "bits_per_dim": bits(own),
        "bits_per_dim_no_caption": bits(empty),
        "caption_gain_nats": gain,
        "caption_gain_standard_error": error,
        "pictures": len(right),
    }


def denoised(
    model: Model, prompts: Sequence[Conversation], x: np.ndarray, noise_std: float
) -> np.ndarray:
    """Drawn latents [n, N, C] after one score step, given what they were drawn for."""
    image = np.zeros(model.bundle.codec.shape, np.uint8)  # takes the place of the drawing
    documents = [
        encode_turns([*p, Turn("assistant", (image,))], model.tokenizer, model.bundle.image)
        for p in prompts
    ]
    # The drawing is the last image of its row; those before it were shown.
    if any(len(d.images) != 1 for d in documents):
        raise ValueError("prompts with images are not supported")
    rows = to_rows(single_batch(documents))
    step = jax.jit(display.denoise, static_argnames="noise_std")
    return np.asarray(step(model.pretzel, rows, jnp.asarray(x)[:, None], noise_std))[:, 0]


def _decoded(fae: FeatureFAE, x: np.ndarray) -> np.ndarray:
    """Normalised latents [n, N, C] to uint8 [n, H, W, 3]."""
    pixels = jax.jit(lambda fae, x: fae.fae.decode(fae.fae.latents.denormalise(x)))(fae, x)
    return np.asarray(jnp.round(jnp.clip(pixels, 0.0, 1.0) * 255.0)).astype(np.uint8)


def vit_features(vit: DinoV2, images: np.ndarray) -> np.ndarray:
    """Mean over the patches of what a ViT makes of images, uint8 [n, H, W, 3]: [n, D], float32."""
    made = jax.jit(lambda vit, pixels: vit(vit.normalise(pixels)).patches.mean(1))
    return np.asarray(made(vit, jnp.asarray(images, jnp.float32) / 255.0))


def labelled(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str]) -> Image.Image:
    """Pictures of each row beside their caption, in two columns."""
    height, width = rows[0][0].shape[:2]
    text = 230
    half = -(-len(rows) // 2)
    sheet = Image.new("RGB", (2 * (text + width * len(rows[0]) + 12), half * (height + 4)), "white")
    writer = ImageDraw.Draw(sheet)
    for i, (pictures, caption) in enumerate(zip(rows, captions, strict=True)):
        left, top = (i // half) * (sheet.width // 2), (i % half) * (height + 4)
        # The built-in font has no other characters.
        plain = caption.encode("latin-1", "replace").decode("latin-1")
        writer.text((left + 4, top + height // 2 - 6), plain[:36], fill="black")
        for j, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left + text + j * width, top))
    return sheet


def _draw(
    model: Model,
    untuned: FeatureFAE,
    judge: DinoV2 | None,
    splits: dict[str, EmojiSet],
    noise_std: float,
    config: ReportConfig,
    folder: pathlib.Path,
) -> dict[str, float]:
    halves = [_plain(splits[n], config.drawings // 2, config.seed + 1) for n in ("test", "train")]
    half = min(map(len, halves))
    chosen = [(n, i) for n, h in zip(("test", "train"), halves, strict=True) for i in h[:half]]
    captions = [splits[name].emoji[i].caption for name, i in chosen]
    originals = [splits[name].images[i] for name, i in chosen]
    prompts = [_ask(caption) for caption in captions]
    sampling = Sampling(config.guidance, config.temperature, seed=config.seed)
    x = model.draw_latents(prompts, sampling)
    tuned = np.asarray(model.bundle.codec.to_uint8(jnp.asarray(x)))
    stepped = _decoded(untuned, denoised(model, prompts, x, noise_std))
    noisy = _decoded(untuned, x)
    order = np.argsort(np.arange(len(captions)) % half, kind="stable")[:SHOWN]
    rows = [[originals[i], tuned[i], stepped[i], noisy[i]] for i in order]
    labelled(rows, [captions[i] for i in order]).save(folder / "drawings.png")
    if judge is None:
        return {}
    real = vit_features(judge, np.stack(originals))
    return {
        f"kid_{name}": kernel_distance(vit_features(judge, made), real, subsets=1)[0]
        for name, made in (("tuned", tuned), ("score_step", stepped), ("noisy", noisy))
    }


def _edit(
    model: Model,
    real: np.ndarray,
    requests: Sequence[str],
    config: ReportConfig,
    path: pathlib.Path,
) -> dict[str, float]:
    """Pictures in the first of their forms, asked for in the others.

    Args:
        model: the model.
        real: uint8 [n, F, H, W, 3], of n emoji the F forms.
        requests: for each form; the first is not asked for.
        config: see `ReportConfig`.
        path: of a picture of the first few: real forms, and below them what was drawn.

    Returns:
        `accuracy`: how often the nearest of the emoji's real forms is the one that was asked for;
        `chance`; `emoji_accuracy`: how often the nearest of all n emoji in that form is the right
        one; `emoji_chance`; `edits`. Nothing if there are no emoji.
    """
    count, forms = real.shape[:2]
    if not count:
        return {}
    cases = [(emoji, form) for emoji in range(count) for form in range(1, forms)]
    prompts = [_ask(*talk.edit_parts(requests[form], real[emoji, 0])) for emoji, form in cases]
    sampling = Sampling(config.guidance, config.temperature, seed=config.seed + 3)
    drawn = np.asarray(model.bundle.codec.to_uint8(model.draw_latents(prompts, sampling)))

    def nearest(picture: np.ndarray, others: np.ndarray) -> int:
        squares = np.square(others.astype(np.float64) - picture)
        return int(squares.mean((1, 2, 3)).argmin())

    own = [nearest(d, real[e]) == f for d, (e, f) in zip(drawn, cases, strict=True)]
    right = [nearest(d, real[:, f]) == e for d, (e, f) in zip(drawn, cases, strict=True)]
    sheet = []
    for number in range(min(SHOWN_EDITS, count)):
        mine = drawn[number * (forms - 1) :][: forms - 1]
        sheet += [*real[number], real[number, 0], *mine]
    grid(sheet, forms, scale=1).save(path)
    return {
        "accuracy": float(np.mean(own)),
        "chance": 1.0 / forms,
        "emoji_accuracy": float(np.mean(right)),
        "emoji_chance": 1.0 / count,
        "edits": len(cases),
    }


def _edits(
    model: Model, emoji: EmojiSet, config: ReportConfig, folder: pathlib.Path
) -> dict[str, float]:
    """`_edit` of skin tones, from the light one, and of colours that are restored."""
    toned = emoji.toned[: config.edits]
    tones = np.array([emoji.images[variants] for variants in toned]).reshape(
        -1, len(TONES), *emoji.images.shape[1:]
    )
    plain = emoji.images[_plain(emoji, config.edits, config.seed + 4)]
    changes = [change for name, change in talk.COLOURS.items() if name != talk.NATURAL]
    changed = [changes[n % len(changes)](image) for n, image in enumerate(plain)]
    pairs = np.stack([np.stack(changed), plain], axis=1)
    found = {
        "tone": (tones, [talk.tone_request(tone) for tone in TONES.values()], "edits.png"),
        "restore": (pairs, ["", talk.RESTORE], "restored.png"),
    }
    return {
        f"{kind}_{name}": value
        for kind, (real, requests, file) in found.items()
        for name, value in _edit(model, real, requests, config, folder / file).items()
    }


def _questions(model: Model, emoji: EmojiSet, config: ReportConfig) -> dict[str, float]:
    chosen = _plain(emoji, config.questions, config.seed + 2)
    prompts = [_ask(emoji.images[i], talk.QUESTION) for i in chosen]
    replies = model.generate(prompts, Sampling(max_new_tokens=16))
    answers = [talk.category(emoji.emoji[i]) for i in chosen]
    right = [reply.parts == (answer,) for reply, answer in zip(replies, answers, strict=True)]
    common = max(answers.count(answer) for answer in set(answers)) / len(answers)
    return {"category_accuracy": float(np.mean(right)), "category_most_common": common}


def write_report(
    model: Model,
    untuned: FeatureFAE,
    judge: DinoV2 | None,
    splits: dict[str, EmojiSet],
    noise_std: float,
    config: ReportConfig,
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """Measures; writes `report.json`, `report.md` and pictures into the work directory.

    Args:
        model: whose FAE's decoders are tuned to the noise.
        untuned: the FAE before that, for what the score step leaves.
        judge: the ViT in whose features the drawings' KID is measured; None: it is not.
        splits: `train` and `test`, with pixels.
        noise_std: of the noise on the normalised latents that the flow was trained with.
        config: see `ReportConfig`.
        workdir: of the run.
    """
    report: dict[str, Any] = {
        "held_out": retrieval(model, splits["test"], config),
        "seen": retrieval(model, splits["train"], config),
    }
    report |= _draw(model, untuned, judge, splits, noise_std, config, workdir)
    report |= _edits(model, splits["test"], config, workdir)
    report |= _questions(model, splits["test"], config)
    stages = {
        row["stage"]: row
        for row in read_metrics(workdir / "metrics.jsonl")
        if "stage_seconds" in row
    }
    report["stage_seconds"] = {name: row["stage_seconds"] for name, row in stages.items()}
    report["peak_memory_gb"] = max(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        *(row["peak_memory_gb"] for row in stages.values()),
    )
    write_json(workdir / "report.json", report)
    plot_losses(
        workdir,
        [("text_to_image", "loss_image"), ("joint", "loss_image"), ("joint", "loss_text")],
    )
    flat = {k: v for k, v in report.items() if isinstance(v, float | int)}
    lines = ["| measure | held out | seen in training |", "|---|---|---|"]
    for name, value in report["held_out"].items():
        lines.append(f"| {name} | {value:.4g} | {report['seen'][name]:.4g} |")
    lines += ["", "| measure | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in flat.items()]
    table = "\n".join(lines)
    times = json.dumps({k: round(v) for k, v in report["stage_seconds"].items()})
    (workdir / "report.md").write_text(
        f"# Emoji\n\nGuidance {config.guidance}, temperature {config.temperature}. Bits are per "
        f"noisy normalised latent dim.\n\n{table}\n\nSeconds of the stages: `{times}`.\n\n"
        "Captions (held out, seen, in turn): the original; the drawing with decoders tuned to the "
        "noise; after a score step, decoders not tuned; with the noise, decoders not tuned.\n\n"
        "![drawings](drawings.png)\n\nSkin tones: real forms, and below them the light one with "
        "what was drawn for the others.\n\n![edits](edits.png)\n\nPictures in other colours and "
        "as they are, and below them what was drawn to restore the colours.\n\n"
        "![restored](restored.png)\n\n"
        "![losses](losses.png)\n",
        encoding="utf-8",
    )
    print(table)
    return report
