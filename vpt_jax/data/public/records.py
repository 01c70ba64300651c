# SPDX-License-Identifier: Apache-2.0
"""Reads the examples of prepared tensorflow-datasets directories, without TensorFlow.

Any example can be read by its index, whether the files are ArrayRecord or TFRecord, and
both give the same examples in the same order: shard after shard.
"""

import bisect
import functools
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from vpt_jax.files.messages import mismatch

_AGAIN = "prepare the data set again; the file may be damaged or cut short"
_INTACT = "an intact TFRecord or ArrayRecord file"
_NOT_SUMMED = "that does not match its checksum"
# What array_record raises for damaged files.
_DAMAGE = (RuntimeError, IndexError, ValueError)


def _checksum(data: bytes) -> bytes:
    """TFRecord's masked form of CRC-32C (Castagnoli), as it is stored."""
    crc = google_crc32c.value(data)
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little")


class TFRecord:
    """The records of a TFRecord file, of which the lengths are checked at once.

    A record is its length (8 bytes, little-endian), the masked CRC-32C of these 8 bytes
    (4 bytes), the payload, and the masked CRC-32C of the payload (4 bytes).

    Raises:
      ValueError: If a length or a payload does not match its checksum, or the file is
        cut short.
    """

    def __init__(self, path: str):
        self._path = path
        self._found: list[tuple[int, int]] = []  # where each payload starts, its length
        size, at = os.path.getsize(path), 0
        with open(path, "rb") as f:
            while at + 12 <= size:
                f.seek(at)
                head = f.read(12)
                if _checksum(head[:8]) != head[8:]:
                    where = f"{path}, record {len(self)}"
                    raise mismatch(where, f"a length {_NOT_SUMMED}", _INTACT, _AGAIN)
                length = int.from_bytes(head[:8], "little")
                self._found.append((at + 12, length))
                at += 16 + length
        if at != size:
            # A header of less than 12 bytes is a record too, and was not found.
            last = len(self) if at < size else len(self) - 1
            got = f"a file of {size} bytes that ends inside it"
            raise mismatch(f"{path}, record {last}", got, "the whole record", _AGAIN)

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, i: int) -> bytes:
        start, length = self._found[i]
        with open(self._path, "rb") as f:
            f.seek(start)
            data = f.read(length + 4)
        if len(data) < length + 4 or _checksum(data[:length]) != data[length:]:
            where = f"{self._path}, record {i}"
            raise mismatch(where, f"data {_NOT_SUMMED}", _INTACT, _AGAIN)
        return data[:length]


class _ArrayRecord:
    """The records of one ArrayRecord file, whose checksums the library checks."""

    def __init__(self, path: str):
        import array_record.python.array_record_module as array_record

        self._path = path
        # No reading ahead: examples are read one by one, in any order.
        options = "readahead_buffer_size:0"
        try:
            self._reader = array_record.ArrayRecordReader(path, options)
            self._records = self._reader.num_records()
            if not self._records:
                self._reader.read([0])  # says what is wrong with the file
        except _DAMAGE as e:
            raise mismatch(path, f"no records ({e})", _INTACT, _AGAIN) from e

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, i: int) -> bytes:
        try:
            return self._reader.read([i])[0]
        except _DAMAGE as e:
            where, got = f"{self._path}, record {i}", f"data that cannot be read ({e})"
            raise mismatch(where, got, _INTACT, _AGAIN) from e


_READERS = {"array_record": _ArrayRecord, "tfrecord": TFRecord}


class _Run(NamedTuple):
    """Records `skip` to `skip + take` of a file that should have `total`."""

    path: str
    skip: int
    take: int
    total: int


def decode_picture(data: bytes, channels: int | None) -> np.ndarray:
    """Decodes a PNG or JPEG file to uint8 `[h, w, c]`.

    As TensorFlow does when it is asked for a number of channels: grey is repeated to
    three, alpha is dropped. (tfds' NumPy decoder keeps it, and takes another library
    where OpenCV is installed.) With `channels` None, those of the file stay.

    Raises:
      ValueError: If Pillow cannot decode `data`.
    """
    from PIL import Image

    try:
        # Of Pillow's other readers, some start programs.
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as file:
            mode = {1: "L", 3: "RGB"}.get(channels or 0, file.mode)
            picture = np.array(file.convert(mode))
    except Exception as e:  # readers of damaged files raise whatever comes up
        got = f"{len(data)} bytes that are no picture ({e})"
        raise mismatch("", got, "PNG or JPEG", "prepare the data set again") from e
    return picture[..., None] if picture.ndim == 2 else picture


class Examples:
    """The examples of a split, decoded when they are asked for.

    Each is a dict of the data set's features: pictures uint8 `[h, w, c]`, numbers as
    NumPy arrays or scalars, sequences of features as lists. Reading a damaged record
    raises a ValueError that names the file and the record.
    """

    def __init__(self, features: Any, file_format: str, runs: Sequence[_Run]):
        import tensorflow_datasets as tfds

        self._features = features
        self._channels = {
            name: feature.shape[-1]  # pyright: ignore[reportIndexIssue]
            for name, feature in features.items()
            if isinstance(feature, tfds.features.Image)
        }
        self._decoders = {name: tfds.decode.SkipDecoding() for name in self._channels}
        self._runs = tuple(run for run in runs if run.take)
        self._ends = list(itertools.accumulate(run.take for run in self._runs))

        def opened(path: str, total: int) -> Any:
            reader = _READERS[file_format](path)
            if len(reader) != total:
                expected = f"{total}, as dataset_info.json says"
                raise mismatch(path, f"{len(reader)} records", expected, _AGAIN)
            return reader

        # Files stay open and indexed while they are in use; large sets have hundreds.
        self._open = functools.lru_cache(maxsize=16)(opened)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _locate(self, i: int) -> tuple[_Run, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"got index {i}; expected 0 to {len(self) - 1}.")
        k = bisect.bisect_right(self._ends, i)
        run = self._runs[k]
        return run, run.skip + run.take - (self._ends[k] - i)

    def record(self, i: int) -> bytes:
        """The serialized example `i`."""
        run, number = self._locate(i)
        return self._open(run.path, run.total)[number]

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self.record(i)
        try:
            example = self._features.deserialize_example_np(
                record, decoders=self._decoders
            )
            for name, channels in self._channels.items():
                example[name] = decode_picture(example[name], channels)
        except ValueError as e:
            run, number = self._locate(i)
            raise ValueError(f"{run.path}, record {number}: {e}") from e
        return example


def _builder(directory: str | os.PathLike[str]) -> Any:
    """The read-only builder of a prepared directory; imports no TensorFlow."""
    import tensorflow_datasets as tfds

    for name in ("dataset_info.json", "features.json"):
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            expected = "a version directory that tfds prepared"
            remedy = "give one, such as ~/tensorflow_datasets/cifar100/3.0.2"
            raise mismatch(path, "no such file", expected, remedy)
    return tfds.builder_from_directory(os.fspath(directory))


def split_sizes(directory: str | os.PathLike[str]) -> Mapping[str, int]:
    """The number of examples in each split of the directory of a prepared version."""
    splits = _builder(directory).info.splits
    return {name: split.num_examples for name, split in splits.items()}


def open_split(directory: str | os.PathLike[str], expression: str) -> Examples:
    """Opens the examples of a prepared split, or of a part of it, in order.

    Args:
      directory: The directory of one version, with `dataset_info.json`.
      expression: In tfds' own terms, such as 'train[:800]'. Give numbers rather than
        percentages, which tfds rounds to the nearest.

    Raises:
      ValueError: If files are missing or of another format.
    """
    info = _builder(directory).info
    file_format = info.file_format.value
    if file_format not in _READERS:
        got, expected = f"file format {file_format!r}", f"one of {sorted(_READERS)}"
        remedy = "prepare it again with `file_format='array_record'`"
        raise mismatch(directory, got, expected, remedy)
    parts = info.splits[expression].file_instructions
    runs = [_Run(p.filename, p.skip, p.take, p.examples_in_shard) for p in parts]
    for run in runs:
        if not os.path.isfile(run.path):
            expected = f"the {run.total} examples that dataset_info.json says it has"
            raise mismatch(run.path, "no such file", expected, _AGAIN)
    return Examples(info.features, file_format, runs)
