# SPDX-License-Identifier: Apache-2.0
"""Pictures and labels of an npz file, see `folder.py` for the names of its arrays.

Through `readers.open_arrays`: nothing is unpickled, and shapes and sizes are held
against the file, and against each other, before an array is allocated.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpt_jax.data import found, pictures
from vpt_jax.files.messages import mismatch, printable, shown
from vpt_jax.weights.readers import (
    MAX_GROWTH,
    MAX_SMALL,
    CheckpointError,
    Lazy,
    open_arrays,
)

_SAVE = "save it again with `np.savez`"
_PARTS = ("images", "labels")


class Described(NamedTuple):
    """What is in a file besides the pictures, by split: an array's name, and labels."""

    images: dict[str, str]
    labels: dict[str, np.ndarray]
    class_names: tuple[str, ...] | None
    rest: list[str]  # arrays of no meaning here


def find(path: Path, notes: list[str]) -> found.Found:
    """What an npz file holds; pictures are not read.

    Args:
      path: The file.
      notes: Is told what was not taken, and if labels count from 1.

    Raises:
      ValueError: As `describe`, or if there are fewer names than labels.
    """
    images, labels, names, rest = describe(path)
    if rest:
        notes.append(f"arrays that are not used: {found.shown(rest)}")
    every = np.unique(np.concatenate(list(labels.values()))).tolist()
    where = os.fspath(path) if names is None else f"{path}, class_names"
    known, first = found.name_classes(where, names, every, notes)
    splits = {
        split: [
            found.Example(f"{images[split]}[{k}]", (images[split], k), label - first)
            for k, label in enumerate(values.tolist())
        ]
        for split, values in labels.items()
    }
    key = [os.path.realpath(path), found.stamp(path.name, os.fspath(path))]
    splits = found.cut_examples(splits)
    arrays = tuple(images.values())
    return found.Found(known, splits, lambda: _reader(path, arrays), key, "squash")


def _reader(path: Path, names: Sequence[str]) -> found.Read:
    arrays = load_images(path, names)

    def read(source: Any, side: int, rule: str) -> np.ndarray:
        name, number = source
        return pictures.to_square(
            np.ascontiguousarray(arrays[name][number]), side, rule
        )

    return read


def describe(path: Path) -> Described:
    """Reads labels and names of classes, and checks how pictures are described.

    Raises:
      ValueError: If the file is damaged or not to be trusted, arrays are missing, or
        their shapes, types or values are wrong.
    """
    with _opened(path) as arrays:
        prefixes = _prefixes(path, arrays) or {"train": ""}
        known = {p + part for p in prefixes.values() for part in _PARTS}
        if "train" not in prefixes or not known <= arrays.keys():
            raise mismatch(
                path,
                f"arrays {shown(sorted(arrays), 500)}",
                "train_images, train_labels, and the same for val and test if there "
                "are any, or images and labels",
                "rename them",
            )
        names = arrays.get("class_names")
        _check_size(path, [arrays[n] for n in known] + ([names] if names else []))
        labels = {s: _labels(path, p, arrays) for s, p in prefixes.items()}
        rest = sorted(map(printable, arrays.keys() - known - {"class_names"}))
        # How many classes one-hot labels know of.
        columns = max((*arrays[p + "labels"].shape, 1)[1] for p in prefixes.values())
        named = tuple(map(str, range(columns))) if columns > 1 else None
        named = _class_names(path, names) if names else named
        images = {split: prefix + "images" for split, prefix in prefixes.items()}
        return Described(images, labels, named, rest)


def _prefixes(path: Path, arrays: Iterable[str]) -> dict[str, str]:
    """Split to what the names of its arrays begin with, such as `train_`."""
    prefixes: dict[str, str] = {}
    for name in sorted(arrays):
        split = found.split_of(name.removesuffix("_images"))
        if not split or not name.endswith("_images"):
            continue
        if split in prefixes:
            got = f"{prefixes[split]}images and {name}, which both mean {split}"
            raise mismatch(path, got, "one", "leave the other out")
        prefixes[split] = name.removesuffix("images")
    return prefixes


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, Lazy]]:
    try:
        with open_arrays(path, text=True) as (arrays, _):
            yield arrays
    except CheckpointError as e:
        why = str(e).removeprefix(f"{path} ").removeprefix("cannot be read as ")
        got = f"a file that cannot be read ({why.rstrip('.')})"
        raise mismatch(path, got, "an .npz of arrays", _SAVE) from e


def _check_size(path: Path, arrays: Sequence[Lazy]) -> None:
    """A small file can describe, and unpack to, arrays without bound."""
    total = sum(array.nbytes for array in arrays)
    limit = max(MAX_GROWTH * os.path.getsize(path), MAX_SMALL)
    if total > limit:
        expected = f"at most {limit:,} from a file of its size"
        remedy = "save it with `np.savez`, not compressed"
        raise mismatch(path, f"{total:,} bytes of arrays", expected, remedy)


def _kind(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _labels(path: Path, prefix: str, arrays: dict[str, Lazy]) -> np.ndarray:
    name, images = prefix + "labels", arrays[prefix + "images"]
    lazy = arrays[name]
    wide = len(lazy.shape) == 2 and lazy.shape[1] > 1  # one-hot, or a mistake
    column = lazy.shape[1:] == (1,)
    good = lazy.dtype.kind in "iu" and (column or len(lazy.shape) == 1)
    if not good and not (wide and lazy.dtype.kind in "biuf"):
        expected = "integers [n] or [n, 1], or one-hot [n, classes]"
        remedy = "one label per picture"
        raise mismatch(path, f"{name} {_kind(lazy)}", expected, remedy)
    grey = len(images.shape) == 3 or images.shape[3:] == (1,)
    if not (grey or images.shape[3:] == (3,)) or images.dtype != np.uint8:
        expected = "uint8 [n, h, w] or [n, h, w, 3]"
        raise mismatch(
            path, f"{prefix}images {_kind(images)}", expected, "convert them"
        )
    if 0 in images.shape or images.shape[0] != lazy.shape[0]:
        num, height, width = images.shape[:3]
        got = (
            f"{num} {prefix}images and {lazy.shape[0]} labels, of {width} x {height} px"
        )
        expected = "one label per picture, and at least one pixel"
        raise mismatch(path, got, expected, "check how they were selected")
    labels = _hot(path, name, lazy.load()) if wide else lazy.load().reshape(-1)
    if labels.min() < 0:
        got = f"{name} from {labels.min()}"
        raise mismatch(path, got, "labels from 0", "count them from 0")
    return labels


def _hot(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """The class of every row of one 1, and 0 else."""
    ones = values == 1
    if not ((ones | (values == 0)).all() and (ones.sum(1) == 1).all()):
        got = f"{name} {_kind(values)} that are not one-hot"
        expected = "one 1 and else 0 for each picture, or integers [n]"
        raise mismatch(path, got, expected, "give each picture one class")
    return ones.argmax(1)


def _class_names(path: Path, lazy: Lazy) -> tuple[str, ...]:
    if len(lazy.shape) != 1 or lazy.dtype.kind not in "Uiu":
        got, remedy = f"class_names {_kind(lazy)}", "leave them out, or correct them"
        raise mismatch(path, got, "texts [classes]", remedy)
    values = lazy.load()
    if values.dtype.kind == "U":
        # Four bytes a letter, of which most numbers are no letter.
        points = values.view(np.uint32)
        if ((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any():
            raise mismatch(path, "class_names that are no text", "Unicode", _SAVE)
    return tuple(map(str, values.tolist()))


def load_images(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of pictures that `describe` found: uint8 `[n, h, w]` or with colours.

    Raises:
      ValueError: If they are damaged.
    """
    with _opened(path) as arrays:
        _check_size(path, [arrays[name] for name in names])
        whole = {name: arrays[name].load() for name in names}
    grey = {n: a[..., 0] for n, a in whole.items() if a.shape[3:] == (1,)}
    return whole | grey
