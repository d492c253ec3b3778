"""Images per second of the data pipeline, for every kind of source, against Pillow alone.

    python benchmarks/data_speed.py --json FILE

The records are random crops of the photographs that scikit-image and scikit-learn ship, brought to
sides of 512 to 1024 pixels and saved as JPEG of quality 85 to 95, each with a caption. The pipeline
reads them, decodes and crops them to 256 x 256, makes conversations of them and packs those into
batches. Pillow decodes the same files, in one thread, with the same filter and the same crop, as
few lines as it takes. Both are counted by the processor time of all their threads, so that
`images/s` is of one core. They take turns in stretches, so that a busy machine slows both alike; a
ratio is the median over the stretches.
"""

import argparse
import io
import json
import pathlib
import statistics
import struct
import tarfile
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

SIDE, TOKENS_A_SIDE = 256, 16
STRETCHES = 10
SMALLEST, LARGEST = 512, 1024


def photographs() -> list[Image.Image]:
    """Colour photographs of the two packages; nothing is fetched."""
    import skimage
    import sklearn.datasets

    folder = pathlib.Path(skimage.__file__).parent / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    files = [folder / name for name in names]
    files += sorted((pathlib.Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    return [Image.open(file).convert("RGB") for file in files]


def write_jpegs(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    """The files, in the order of their numbers."""
    rng = np.random.default_rng(0)
    sources = photographs()
    paths = []
    for number in range(count):
        picture = sources[rng.integers(len(sources))]
        width, height = (int(n) for n in rng.integers(SMALLEST, LARGEST + 1, 2))
        # A part of the photograph of these proportions.
        scale = min(picture.width / width, picture.height / height) * rng.uniform(0.6, 1)
        left = rng.uniform(0, picture.width - width * scale)
        top = rng.uniform(0, picture.height - height * scale)
        box = (left, top, left + width * scale, top + height * scale)
        crop = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
        paths.append(folder / f"{number:06d}.jpg")
        crop.save(paths[-1], quality=int(rng.integers(85, 96)))
    return paths


def caption(number: int) -> str:
    """Of record `number`."""
    return f"photograph number {number}"


def write_webdataset(folder: pathlib.Path, jpegs: list[pathlib.Path]) -> None:
    """Shards of a thousand samples, as img2dataset writes them."""
    for first in range(0, len(jpegs), 1000):
        with tarfile.open(folder / f"{first // 1000:05d}.tar", "w") as tar:
            for number, path in enumerate(jpegs[first : first + 1000], first):
                for suffix, data in (("jpg", path.read_bytes()), ("txt", caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size, varint = len(data), b""
    while size > 127:
        varint += struct.pack("B", size & 127 | 128)
        size >>= 7
    return struct.pack("B", number << 3 | 2) + varint + struct.pack("B", size) + data


def write_array_record(folder: pathlib.Path, jpegs: list[pathlib.Path]) -> None:
    """`tf.train.Example`s of two bytes features."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "all.array_record"), "group_size:1")
    for number, path in enumerate(jpegs):
        fields = {"jpg": path.read_bytes(), "txt": caption(number).encode()}
        entries = [
            _field(1, _field(1, name.encode()) + _field(2, _field(1, _field(1, value))))
            for name, value in fields.items()
        ]
        writer.write(_field(1, b"".join(entries)))
    writer.close()


def write_parquet(folder: pathlib.Path, jpegs: list[pathlib.Path]) -> None:
    """Row groups of a hundred rows with the images in them."""
    import pyarrow
    import pyarrow.parquet

    for first in range(0, len(jpegs), 1000):
        rows = [
            {"jpg": {"bytes": path.read_bytes(), "path": None}, "txt": caption(number)}
            for number, path in enumerate(jpegs[first : first + 1000], first)
        ]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(
            table, folder / f"{first // 1000:05d}.parquet", row_group_size=100
        )


def write_conversations(folder: pathlib.Path, jpegs: list[pathlib.Path]) -> None:
    """LLaVA's form: the images stay files."""
    with (folder / "all.jsonl").open("w", encoding="utf-8") as file:
        for number, path in enumerate(jpegs):
            said = [
                {"from": "human", "value": "<image>\nwhat is this?"},
                {"from": "gpt", "value": caption(number)},
            ]
            print(json.dumps({"image": str(path), "conversations": said}), file=file)


def pipeline(kind: str, folder: pathlib.Path) -> Iterator[int]:
    """Endless batches of a source; yields how many images each had."""
    from starflow2_jax.data import sources, tasks
    from starflow2_jax.data.mixture import Entry, MixtureData
    from starflow2_jax.data.packing import BatchShape
    from starflow2_jax.data.pipeline import packed_batches
    from starflow2_jax.data.sequences import ImageShape
    from starflow2_jax.data.tokenizer import train_tokenizer
    from starflow2_jax.models.patches import PatchCodec

    make, pattern, task = {
        "webdataset": (sources.WebDatasetSource, "*.tar", tasks.Draw()),
        "array_record": (sources.ArrayRecordSource, "*.array_record", tasks.Draw()),
        "parquet": (sources.ParquetSource, "*.parquet", tasks.Draw()),
        "conversations": (sources.ConversationSource, "*.jsonl", tasks.Conversation()),
    }[kind]
    shape = (SIDE, SIDE, 3)
    values = SIDE * SIDE * 3 // TOKENS_A_SIDE**2
    codec = PatchCodec(
        order=np.arange(np.prod(shape), dtype=np.int32),
        basis=np.eye(values, dtype=np.float32),
        waves=np.broadcast_to(
            np.eye(TOKENS_A_SIDE**2, dtype=np.float32), (values, *[TOKENS_A_SIDE**2] * 2)
        ),
        divisors=np.ones((values, TOKENS_A_SIDE**2), np.float32),
        shape=shape,
    )
    data = MixtureData(
        tokenizer=train_tokenizer([caption(n) for n in range(100)], vocab_size=300),
        image=ImageShape(*shape, TOKENS_A_SIDE),
        codec=codec,
        entries={kind: Entry(make(folder / pattern), task)},
        mixtures={"joint": {kind: 1.0}},
        threads=1,
    )
    batches = iter(packed_batches(data.documents("joint", False, 0), BatchShape(8, 2048, 6)))
    try:
        while True:
            yield int((next(batches)["image_start"] >= 0).sum())
    finally:
        batches.close()


def with_pillow(path: pathlib.Path) -> np.ndarray:
    """The same image, by Pillow alone: shorter side to SIDE, the middle of it."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        side = min(image.size)
        left, top = ((n - side) / 2 for n in image.size)
        box = (left, top, left + side, top + side)
        image = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)


def measure(kind: str, folder: pathlib.Path, jpegs: list[pathlib.Path]) -> dict[str, object]:
    """The row of one kind of source."""
    each = max(1, len(jpegs) // STRETCHES)
    batches = pipeline(kind, folder)
    order = np.random.default_rng(1).permutation(len(jpegs))
    turns = iter(np.resize(order, (STRETCHES + 1) * each))
    next(batches)  # its threads start, the modules are loaded

    def stretch() -> tuple[float, float]:
        """Images per second of processor time, of the pipeline and of Pillow."""
        whole, done = time.process_time(), 0
        while done < each:
            done += next(batches)
        alone = time.thread_time()
        for _ in range(each):
            with_pillow(jpegs[next(turns)])
        # Meanwhile the pipeline has read ahead, as far as it was before: all that this thread did
        # not spend on Pillow is the pipeline's.
        alone = time.thread_time() - alone
        return done / (time.process_time() - whole - alone), each / alone

    stretch()
    rates = [stretch() for _ in range(STRETCHES)]
    batches.close()
    ours, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
    return {
        "name": f"{kind}, {len(jpegs)} records",
        "value": ours,
        "unit": "images/s per core",
        "peer": theirs,
        "ratio": statistics.median(x / y for x, y in rates),
    }


WRITERS = {
    "webdataset": write_webdataset,
    "array_record": write_array_record,
    "parquet": write_parquet,
    "conversations": write_conversations,
}


def main() -> None:
    """Writes the records, measures, prints the rows, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", metavar="N", type=int, default=5000, help="of a source (5000)")
    parser.add_argument("--dir", metavar="DIR", help="where to work; default: a temporary one")
    parser.add_argument("--json", metavar="FILE", help="writes the rows")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="data_speed_", dir=args.dir) as work:
        images = pathlib.Path(work, "images")
        images.mkdir()
        jpegs = write_jpegs(images, args.records)
        for kind, write in WRITERS.items():
            with tempfile.TemporaryDirectory(prefix=kind, dir=work) as folder:
                write(pathlib.Path(folder), jpegs)
                rows.append(measure(kind, pathlib.Path(folder), jpegs))
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
