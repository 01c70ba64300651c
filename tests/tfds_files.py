# SPDX-License-Identifier: Apache-2.0
"""Writes prepared tfds directories without TensorFlow and without tfds.

TFRecord files, tf.train.Example messages and features.json are written here from their
specifications; ArrayRecord files with their own library.
"""

import io
import json
import struct

import numpy as np
from PIL import Image


def _crc_table():
    """What each byte adds to a CRC-32C: eight steps of its polynomial, reflected."""
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE = _crc_table()


def crc32c(data):
    """Byte by byte; not the package's own, which reads what is written here."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    rotated = ((crc >> 15) | (crc << 17)) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)


def write_tfrecord(path, payloads):
    with open(path, "wb") as f:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            f.write(length + masked(length) + payload + masked(payload))


def write_array_record(path, payloads):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()


WRITERS = {"tfrecord": write_tfrecord, "array_record": write_array_record}


# Messages.


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, data):
    """A length-delimited field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def serialized(values):
    """A tf.train.Example: names to lists of bytes, floats or ints.

    Bytes are one string, an array of floats is flattened, all else is ints.
    """
    entries = []
    for name, value in values.items():
        if isinstance(value, bytes):
            data = field(1, field(1, value))
        elif np.asarray(value).dtype.kind == "f":
            data = field(2, field(1, np.asarray(value, "<f4").tobytes()))
        else:
            ints = np.asarray(value, np.int64).reshape(-1).tolist()
            data = field(3, field(1, b"".join(varint(i) for i in ints)))
        entries.append(field(1, field(1, name.encode()) + field(2, data)))
    return field(1, b"".join(entries))


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# Features, as features.json has them.


def _feature(kind, name, **content):
    return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}"} | {
        name: content
    }


def features_dict(**features):
    return _feature("features_dict.FeaturesDict", "featuresDict", features=features)


def image(channels=3):
    shape = {"dimensions": ["-1", "-1", str(channels)]}
    return _feature("image_feature.Image", "image", shape=shape, dtype="uint8")


def class_label(classes):
    kind = "class_label_feature.ClassLabel"
    return _feature(kind, "classLabel", numClasses=str(classes))


def text():
    return _feature("text_feature.Text", "text")


def tensor(*dims):
    shape = {"dimensions": [str(n) for n in dims]}
    kind = "tensor_feature.Tensor"
    return _feature(kind, "tensor", shape=shape, dtype="float32", encoding="none")


def sequence(feature):
    kind = "sequence_feature.Sequence"
    return _feature(kind, "sequence", feature=feature, length="-1")


def write_version(folder, name, form, features, splits):
    """A prepared directory of a version, as tfds would leave it.

    Args:
      folder: To be made; of a version such as `.../toy/1.0.0`.
      name: Of the data set, with its config where it has one.
      form: A key of `WRITERS`.
      features: What the functions above return.
      splits: Name of each to its shards, lists of serialized examples.
    """
    folder.mkdir(parents=True)
    name, _, config = name.partition("/")
    info = {"name": name, "version": folder.name, "fileFormat": form, "splits": []}
    if config:
        info["configName"] = config
    for split, shards in splits.items():
        for k, payloads in enumerate(shards):
            shard = f"{name}-{split}.{form}-{k:05d}-of-{len(shards):05d}"
            WRITERS[form](folder / shard, payloads)
        info["splits"].append(
            {
                "name": split,
                "shardLengths": [str(len(payloads)) for payloads in shards],
                "numBytes": str(sum(len(p) for payloads in shards for p in payloads)),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    (folder / "features.json").write_text(json.dumps(features, indent=2))
    return folder
