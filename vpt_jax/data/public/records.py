# SPDX-License-Identifier: Apache-2.0
"""Reads the examples of prepared tensorflow-datasets directories, without TensorFlow.

Any example can be read by its index, whether the files are ArrayRecord or TFRecord, and
both give the same examples in the same order: shard after shard, part after part of the
split expression. (`tf.data` interleaves the parts of 'a+b'; this does not.)
"""

import bisect
import functools
import io
import itertools
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from vpt_jax.files.messages import mismatch

_AGAIN = "prepare the data set again; the file may be damaged or cut short"
_INTACT = "an intact TFRecord or ArrayRecord file"
_NOT_SUMMED = "that does not match its checksum"

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")


def _checksum(data: bytes) -> int:
    """TFRecord's masked form of CRC-32C (Castagnoli)."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def index_tfrecord(path: str) -> np.ndarray:
    """Finds the records of a TFRecord file, and checks the checksums of their lengths.

    A record is its length (8 bytes, little-endian), the masked CRC-32C of these 8 bytes
    (4 bytes), the payload, and the masked CRC-32C of the payload (4 bytes).

    Returns:
      int64 `[records, 2]`: where each payload starts, and its length.

    Raises:
      ValueError: If a length does not match its checksum, or the file is cut short.
    """
    size = os.path.getsize(path)
    found, at = [], 0
    with open(path, "rb") as f:
        while at + 12 <= size:
            f.seek(at)
            head = f.read(12)
            if _checksum(head[:8]) != _CRC.unpack(head[8:])[0]:
                where = f"{path}, record {len(found)}"
                raise mismatch(where, f"a length {_NOT_SUMMED}", _INTACT, _AGAIN)
            (length,) = _LENGTH.unpack(head[:8])
            found.append((at + 12, length))
            at += 16 + length
    if at != size:
        # A header of less than 12 bytes is a record too, and not in `found`.
        last = len(found) if at < size else len(found) - 1
        got = f"a file of {size} bytes that ends inside it"
        raise mismatch(f"{path}, record {last}", got, "the whole record", _AGAIN)
    return np.array(found, np.int64).reshape(-1, 2)


class _TFRecord:
    def __init__(self, path: str):
        self._path = path
        self._index = index_tfrecord(path)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> bytes:
        start, length = self._index[i].tolist()
        with open(self._path, "rb") as f:
            f.seek(start)
            data = f.read(length + 4)
        payload = data[:length]
        if len(data) < length + 4 or _checksum(payload) != _CRC.unpack(data[-4:])[0]:
            where = f"{self._path}, record {i}"
            raise mismatch(where, f"data {_NOT_SUMMED}", _INTACT, _AGAIN)
        return payload


class _ArrayRecord:
    """The records of one ArrayRecord file, whose checksums the library checks."""

    def __init__(self, path: str):
        try:
            import array_record.python.array_record_module as array_record
        except ImportError as e:
            got = f"an ArrayRecord file but cannot import array_record ({e})"
            remedy = "`pip install array_record`"
            raise mismatch(path, got, "it to be installed", remedy) from e
        self._path = path
        # No reading ahead: examples are read one by one, in any order.
        try:
            self._reader = array_record.ArrayRecordReader(
                path, "readahead_buffer_size:0"
            )
            self._records = self._reader.num_records()
            if not self._records:
                self._reader.read([0])  # says what is wrong with the file
        except (RuntimeError, IndexError, ValueError) as e:
            raise mismatch(path, f"no records ({e})", _INTACT, _AGAIN) from e

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, i: int) -> bytes:
        try:
            return self._reader.read([i])[0]
        except (RuntimeError, IndexError, ValueError) as e:
            where = f"{self._path}, record {i}"
            got = f"data that cannot be read ({e})"
            raise mismatch(where, got, _INTACT, _AGAIN) from e


_READERS = {"array_record": _ArrayRecord, "tfrecord": _TFRecord}


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
            picture = np.array(file if file.mode == mode else file.convert(mode))
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
        reader = _READERS[file_format]
        # Files stay open and indexed while they are in use; large sets have hundreds.
        self._open = functools.lru_cache(maxsize=16)(
            lambda path, total: _checked(reader(path), path, total)
        )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _locate(self, i: int) -> tuple[_Run, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"got index {i}; expected less than {len(self)}.")
        i %= len(self)
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


def _checked(reader: Any, path: str, total: int) -> Any:
    if len(reader) != total:
        expected = f"{total}, as dataset_info.json says"
        raise mismatch(path, f"{len(reader)} records", expected, _AGAIN)
    return reader


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
    """The number of examples in each split of a prepared directory.

    Raises:
      ValueError: If it is not that of one version, with `dataset_info.json`.
    """
    splits = _builder(directory).info.splits
    return {name: split.num_examples for name, split in splits.items()}


def open_split(directory: str | os.PathLike[str], expression: str) -> Examples:
    """Opens the examples of a prepared split, or of parts of splits, in that order.

    Args:
      directory: The directory of one version, with `dataset_info.json`.
      expression: In tfds' own terms, such as 'train[:800]+validation[:200]'. Give
        numbers rather than percentages, which tfds rounds to the nearest.

    Raises:
      ValueError: If it is not such a directory, its file format is neither
        ArrayRecord nor TFRecord, a file is missing, or the expression names a split
        or examples that are not there.
    """
    info = _builder(directory).info
    file_format = info.file_format.value
    if file_format not in _READERS:
        got, expected = f"file format {file_format!r}", f"one of {sorted(_READERS)}"
        remedy = "prepare it again with `file_format='array_record'`"
        raise mismatch(directory, got, expected, remedy)
    try:
        parts = info.splits[expression].file_instructions
    except (ValueError, KeyError, AssertionError) as e:
        sizes = {name: split.num_examples for name, split in info.splits.items()}
        got, expected = f"split {expression!r} ({e})", f"examples of {sizes}"
        raise mismatch(directory, got, expected, "choose among them") from e
    runs = [_Run(p.filename, p.skip, p.take, p.examples_in_shard) for p in parts]
    for run in runs:
        if not os.path.isfile(run.path):
            expected = f"the {run.total} examples that dataset_info.json says it has"
            raise mismatch(run.path, "no such file", expected, _AGAIN)
    return Examples(info.features, file_format, runs)
