# SPDX-License-Identifier: Apache-2.0
"""Pictures and labels of an npz file.

`train_images`, `train_labels`, `val_images`, ..., or `images` and `labels`: uint8
`[n, h, w]` or `[n, h, w, 3]`, integers `[n]` or `[n, 1]`, or one-hot `[n, classes]`;
`class_names` may hold the names.

Through `readers.open_arrays`: nothing is unpickled, and shapes and sizes are held
against the file, and against each other, before an array is allocated.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpt_jax.data import found, pictures
from vpt_jax.files.messages import first_of, mismatch, printable, shown
from vpt_jax.weights.readers import (
    MAX_GROWTH,
    MAX_SMALL,
    CheckpointError,
    Lazy,
    open_arrays,
)

_SAVE = "save it again with `np.savez`"
_ARRAYS = "train_images, train_labels, the same for val and test, or images and labels"


def find(path: Path, notes: list[str]) -> found.Found:
    """What an npz file holds; pictures are not read.

    `notes` is told what was not taken, and if labels count from 1.

    Raises:
      ValueError: If the file is damaged or not to be trusted, arrays are missing, or
        their shapes, types or values are wrong; or if names lack for labels.
    """
    with _opened(path) as arrays:
        prefixes = _prefixes(path, arrays) or {"train": ""}
        known = {p + part for p in prefixes.values() for part in ("images", "labels")}
        if "train" not in prefixes or not known <= arrays.keys():
            got = f"arrays {shown(sorted(arrays), 500)}"
            raise mismatch(path, got, _ARRAYS, "rename them")
        if rest := sorted(map(printable, arrays.keys() - known - {"class_names"})):
            notes.append(f"arrays that are not used: {first_of(rest)}")
        written = arrays.get("class_names")
        _check_size(path, [arrays[n] for n in known] + ([written] if written else []))
        labels = {s: _labels(path, p, arrays) for s, p in prefixes.items()}
        # How many classes one-hot labels know of.
        columns = max((*arrays[p + "labels"].shape, 1)[1] for p in prefixes.values())
        names = tuple(map(str, range(columns))) if columns > 1 else None
        names = _class_names(path, written) if written else names
    every = np.unique(np.concatenate(list(labels.values()))).tolist()
    where = os.fspath(path) if names is None else f"{path}, class_names"
    class_names, first = found.name_classes(where, names, every, notes)
    images = {split: f"{prefix}images" for split, prefix in prefixes.items()}
    splits = {
        split: [
            found.Example(f"{images[split]}[{k}]", (images[split], k), label - first)
            for k, label in enumerate(values.tolist())
        ]
        for split, values in labels.items()
    }
    key = [os.path.realpath(path), found.stamp(path.name, os.fspath(path))]
    splits = found.cut_examples(splits)
    names_of_images = tuple(images.values())
    return found.Found(
        class_names, splits, lambda: _reader(path, names_of_images), key, "squash"
    )


def _reader(path: Path, names: Sequence[str]) -> found.Read:
    arrays = load_images(path, names)

    def read(source: Any, side: int, rule: str) -> np.ndarray:
        name, number = source
        picture = np.ascontiguousarray(arrays[name][number])
        return pictures.to_square(picture, side, rule)

    return read


def _prefixes(path: Path, arrays: Iterable[str]) -> dict[str, str]:
    """Split to what the names of its arrays begin with, such as `train_`."""
    prefixes: dict[str, str] = {}
    for name in sorted(n for n in arrays if n.endswith("_images")):
        split = found.split_of(name.removesuffix("_images"))
        if split in prefixes:
            got = f"{prefixes[split]}images and {name}, which both mean {split}"
            raise mismatch(path, got, "one", "leave the other out")
        if split:
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
    column = len(lazy.shape) == 1 or lazy.shape[1:] == (1,)
    if lazy.dtype.kind not in ("biuf" if wide else "iu") or not (wide or column):
        expected = "integers [n] or [n, 1], or one-hot [n, classes]"
        remedy = "one label per picture"
        raise mismatch(path, f"{name} {_kind(lazy)}", expected, remedy)
    coloured = len(images.shape) == 4 and images.shape[3] in (1, 3)
    if images.dtype != np.uint8 or not (coloured or len(images.shape) == 3):
        got = f"{prefix}images {_kind(images)}"
        raise mismatch(path, got, "uint8 [n, h, w] or [n, h, w, 3]", "convert them")
    if 0 in images.shape or images.shape[0] != lazy.shape[0]:
        got = f"{prefix}images {_kind(images)} and {lazy.shape[0]} labels"
        expected = "one label per picture, and at least one pixel"
        raise mismatch(path, got, expected, "check how they were selected")
    labels = lazy.load() if wide else lazy.load().reshape(-1)
    if wide:
        ones = labels == 1
        if not ((ones | (labels == 0)).all() and (ones.sum(1) == 1).all()):
            got = f"{name} {_kind(labels)} that are not one-hot"
            expected = "one 1 and else 0 for each picture, or integers [n]"
            raise mismatch(path, got, expected, "give each picture one class")
        return ones.argmax(1)
    if labels.min() < 0:
        got = f"{name} from {labels.min()}"
        raise mismatch(path, got, "labels from 0", "count them from 0")
    return labels


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
    """The arrays of pictures that `find` found: uint8 `[n, h, w]` or with colours."""
    with _opened(path) as arrays:
        _check_size(path, [arrays[name] for name in names])
        whole = {name: arrays[name].load() for name in names}
    return {n: a[..., 0] if a.shape[3:] == (1,) else a for n, a in whole.items()}
