"""Small real data files of every kind that the sources read, all with the same records.

Record i: an image of one colour that says i, and a caption that says i.
"""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from starflow2_jax.data.sources import (
    ArrayRecordSource,
    ConversationSource,
    ParquetSource,
    WebDatasetSource,
)

SIDE = 16


def colour(number):
    return (number * 5 % 256, 255 - number * 3 % 256, number * 11 % 256)


def png(number, size=(24, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, colour(number)).save(file, "PNG")
    return file.getvalue()


def caption(number):
    return f"a picture of number {number}"


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, numbers, change=None):
    """A shard as img2dataset writes it; `change(number, fields)` may alter a sample's members."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            fields = {
                "png": png(number),
                "txt": caption(number).encode(),
                "json": json.dumps({"caption": caption(number), "key": number}).encode(),
            }
            if change is not None:
                change(number, fields)
            for field, data in fields.items():
                add(tar, f"part/{number:06d}.{field}", data)


def example(fields):
    """A serialised tf.train.Example, made by the protobuf library from its published schema."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name, *entries):
        added = file.message_type.add(name=name)
        for number, (field, kind, type_name) in enumerate(entries, 1):
            new = added.field.add(name=field, number=number, type=kind)
            repeated = field in ("value", "feature") and name != "Entry"
            new.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if type_name:
                new.type_name = f".t.{type_name}"
        return added

    message("BytesList", ("value", kinds.TYPE_BYTES, None))
    message("FloatList", ("value", kinds.TYPE_FLOAT, None))
    message("Int64List", ("value", kinds.TYPE_INT64, None))
    of = kinds.TYPE_MESSAGE
    message("Feature", *((n.lower(), of, n) for n in ("BytesList", "FloatList", "Int64List")))
    message("Entry", ("key", kinds.TYPE_STRING, None), ("value", of, "Feature"))
    message("Features", ("feature", of, "Entry"))
    message("Example", ("features", of, "Features"))
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    for key, value in fields.items():
        entry = made.features.feature.add(key=key)
        values = value if isinstance(value, list) else [value]
        lists = {bytes: "byteslist", float: "floatlist", int: "int64list"}
        getattr(entry.value, lists[type(values[0])]).value.extend(values)
    return made.SerializeToString()


def make_webdataset(folder, count, **options):
    third = count // 3
    write_tar(folder / "00000.tar", range(third))
    write_tar(folder / "00001.tar", range(third, count))
    return WebDatasetSource(folder / "*.tar", **options)


def make_array_record(folder, count, **options):
    from array_record.python.array_record_module import ArrayRecordWriter

    third = count // 3
    for name, numbers in (("a", range(third)), ("b", range(third, count))):
        writer = ArrayRecordWriter(str(folder / f"{name}.array_record"), "group_size:1")
        for number in numbers:
            fields = {"png": png(number), "txt": caption(number).encode(), "key": number}
            writer.write(example(fields))
        writer.close()
    return ArrayRecordSource(folder / "*.array_record", **options)


def make_parquet(folder, count, **options):
    import pyarrow
    import pyarrow.parquet

    third = count // 3
    for name, numbers in (("a", range(third)), ("b", range(third, count))):
        rows = [{"png": {"bytes": png(n), "path": None}, "txt": caption(n)} for n in numbers]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=4)
    return ParquetSource(folder / "*.parquet", **options)


def make_conversations(folder, count, **options):
    (folder / "images").mkdir()
    third = count // 3
    for name, numbers in (("a", range(third)), ("b", range(third, count))):
        lines = []
        for number in numbers:
            (folder / "images" / f"{number}.png").write_bytes(png(number))
            said = [
                {"from": "human", "value": "<image>\nwhat is this?"},
                {"from": "gpt", "value": caption(number)},
            ]
            path = f"images/{number}.png"
            record = {"id": number, "image": path, "png": path, "txt": caption(number)}
            lines.append(json.dumps(record | {"conversations": said}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return ConversationSource(folder / "*.jsonl", **options)


MAKERS = {
    "webdataset": make_webdataset,
    "array_record": make_array_record,
    "parquet": make_parquet,
    "conversations": make_conversations,
}


def is_number(image, number):
    return bool((np.asarray(image) == colour(number)).all())
