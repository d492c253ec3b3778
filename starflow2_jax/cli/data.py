"""Prepare data for training.

emoji: the 64x64 Noto emoji of the npm package emoji-datasource-google, as a folder of pictures.
latents: images to cached latents of an FAE, which training then reads in place of the images.
"""

import argparse

from starflow2_jax.cli.arguments import positive

SUMMARY = "prepare data: emoji, cached latents"

_EMOJI_EPILOG = """\
example:
  npm pack emoji-datasource-google
  starflow2 data emoji --archive emoji-datasource-google-16.0.0.tgz --out DIR

result:
  DIR/train, tune, test   PNG files on white; forms of one emoji (skin tones, genders) share a split
  DIR/emoji.json          name, category, skin tones of each, and the licence

licence: the pictures are Noto Emoji, Apache-2.0; names and categories are emoji-datasource's, MIT

exit codes: 0 done; 2 bad input
"""

_LATENTS_EPILOG = """\
examples:
  starflow2 data latents --fae runs/fae --data emoji/train --out latents/train --keep file
  starflow2 data latents --fae FAE --data 'cc12m/*.tar' --image jpg --keep txt --out latents
  starflow2 data latents --fae FAE --data llava.jsonl --keep conversations --out latents

result:
  DIR/latents-*.array_record  tf.train.Example with moments (bfloat16, tokens x 2 channels: means,
                              then log-variances) and the fields that are kept
  DIR/manifest.json           checksum of the FAE, shapes, whether all is there, what was left out

The same command goes on with what an interrupted one left, and ends with the same bytes. A folder
that holds latents of another FAE or of other images is refused.

exit codes: 0 done; 2 bad input (an image that cannot be read is named); 130 interrupted
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds one sub-command for each kind of data."""
    kinds = parser.add_subparsers(
        metavar="WHAT", required=True, help="what to prepare; each has a --help of its own"
    )

    def command(name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        return kinds.add_parser(
            name,
            help=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    emoji = command("emoji", "pictures of emoji from the archive of a package", _EMOJI_EPILOG)
    emoji.add_argument("--archive", metavar="FILE.tgz", required=True, help="the npm package")
    emoji.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    emoji.set_defaults(prepare=_emoji)
    latents = command("latents", "images to cached latents of an FAE", _LATENTS_EPILOG)
    latents.add_argument("--fae", metavar="DIR", required=True, help="FAE, or workdir of its run")
    latents.add_argument(
        "--data",
        metavar="PATH",
        required=True,
        help="folder of images; or .tar, .parquet, .array_record, .jsonl files, also as a pattern",
    )
    latents.add_argument("--out", metavar="DIR", required=True, help="folder of the cache")
    latents.add_argument("--image", metavar="FIELD", default="image", help="field of the images")
    latents.add_argument(
        "--keep", metavar="FIELD", nargs="+", default=[], help="fields to keep with the latents"
    )
    latents.add_argument(
        "--index",
        metavar="DIR",
        help="folder for the index of tar, Parquet and JSONL files, where theirs is read-only",
    )
    latents.add_argument(
        "--shard", metavar="N", type=positive, default=8192, help="images of a file"
    )
    latents.add_argument(
        "--batch", metavar="B", type=positive, default=64, help="encoded at a time"
    )
    latents.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the encoder"
    )
    latents.add_argument(
        "--threads", metavar="N", type=positive, default=4, help="that read images"
    )
    latents.add_argument(
        "--skip-broken",
        metavar="N",
        type=int,
        default=0,
        help="leave out up to N records without an image that can be read (0: the first one ends "
        "the job); manifest.json names them",
    )
    latents.set_defaults(prepare=_latents)


def run(args: argparse.Namespace) -> None:
    """Prepares; prints what there is now.

    Raises:
        UserError: see `data.emoji_archive`, `fae_cache`.
    """
    args.prepare(args)


def _emoji(args: argparse.Namespace) -> None:
    from starflow2_jax.data.emoji_archive import LICENCE, write_emoji

    counts = write_emoji(args.archive, args.out)
    print(f"{args.out}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    print(f"licence: {LICENCE}")


def _latents(args: argparse.Namespace) -> None:
    from starflow2_jax.fae_cache import cache_latents, open_images

    source = open_images(args.data, args.index)
    rates = cache_latents(
        args.fae,
        source,
        args.out,
        image=args.image,
        keep=tuple(args.keep),
        shard=args.shard,
        batch=args.batch,
        dtype=args.dtype,
        threads=args.threads,
        skip_broken=args.skip_broken,
    )
    print(f"{args.out}: {len(source) - rates.skipped} images, {rates.images} of them now")
    if rates.skipped:
        print(f"{rates.skipped} records were left out; {args.out}/manifest.json names them")
    if rates.images:
        print(
            f"{rates.images / rates.seconds:.1f} images/s, {100 * rates.share:.0f}% of the "
            f"encoder's own {rates.encoder:.1f}"
        )
