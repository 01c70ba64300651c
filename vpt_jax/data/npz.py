# SPDX-License-Identifier: Apache-2.0
"""Pictures and labels of an npz file, see `folder.py` for the names of its arrays.

Labels are numbers, or one-hot: a row for each picture, 1 for its class and 0 else.

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
from vpt_jax.files.messages import printable, shown
from vpt_jax.weights.readers import (
    MAX_GROWTH,
    MAX_SMALL,
    CheckpointError,
    Lazy,
    open_arrays,
)

_SAVE = "save it again with `np.savez`"


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
    arrays = tuple(images.values())
    splits = found.cut_examples(splits)
    return found.Found(known, splits, lambda: _reader(path, arrays), key, "squash")


def _reader(path: Path, names: Sequence[str]) -> found.Read:
    arrays = load_images(path, names)

    def read(source: Any, side: int, rule: str) -> np.ndarray:
        name, number = source
        pixels = np.ascontiguousarray(arrays[name][number])
        return pictures.to_square(pixels, side, rule)

    return read


def describe(path: Path) -> Described:
    """Reads labels and names of classes, and checks how pictures are described.

    Raises:
      ValueError: If the file is damaged or not to be trusted, arrays are missing, or
        their shapes, types or values are wrong.
    """
    with _opened(path) as arrays:
        prefixes = _prefixes(path, arrays) or {"train": ""}
        if "train" not in prefixes or any(
            prefix + part not in arrays
            for prefix in prefixes.values()
            for part in ("images", "labels")
        ):
            raise ValueError(
                f"{path}: got arrays {shown(sorted(arrays), 500)}; expected "
                "train_images, train_labels, and the same for val and test if there "
                "are any, or images and labels; rename them."
            )
        images = {split: prefix + "images" for split, prefix in prefixes.items()}
        used = [arrays[n] for n in images.values()]
        used += [arrays[p + "labels"] for p in prefixes.values()]
        names = arrays.get("class_names")
        _check_size(path, [*used, *([names] if names else [])])
        labels = {s: _labels(path, p, arrays) for s, p in prefixes.items()}
        known = {p + part for p in prefixes.values() for part in ("images", "labels")}
        rest = sorted(map(printable, arrays.keys() - known - {"class_names"}))
        named = _class_names(path, names) if names else None
        if named is None and (columns := _columns(prefixes.values(), arrays)) > 1:
            named = tuple(map(str, range(columns)))
        return Described(images, labels, named, rest)


def _columns(prefixes: Iterable[str], arrays: dict[str, Lazy]) -> int:
    """How many classes one-hot labels know of."""
    return max((*arrays[p + "labels"].shape, 1)[1] for p in prefixes)


def _prefixes(path: Path, arrays: Iterable[str]) -> dict[str, str]:
    """Split to what the names of its arrays begin with, such as `train_`."""
    prefixes: dict[str, str] = {}
    for name in sorted(arrays):
        split = found.split_of(name.removesuffix("_images"))
        if not split or not name.endswith("_images"):
            continue
        if split in prefixes:
            raise ValueError(
                f"{path}: got {prefixes[split]}images and {name}, which both mean "
                f"{split}; expected one; leave the other out."
            )
        prefixes[split] = name.removesuffix("images")
    return prefixes


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, Lazy]]:
    try:
        with open_arrays(path, text=True) as (arrays, _):
            yield arrays
    except CheckpointError as e:
        why = str(e).removeprefix(f"{path} ").removeprefix("cannot be read as ")
        raise ValueError(
            f"{path}: cannot be read ({why.rstrip('.')}); expected an .npz of arrays; "
            f"{_SAVE}."
        ) from e


def _check_size(path: Path, arrays: Sequence[Lazy]) -> None:
    """A small file can describe, and unpack to, arrays without bound."""
    total = sum(array.nbytes for array in arrays)
    limit = max(MAX_GROWTH * os.path.getsize(path), MAX_SMALL)
    if total > limit:
        raise ValueError(
            f"{path}: got {total:,} bytes of arrays; expected at most {limit:,} from "
            "a file of its size; save it with `np.savez`, not compressed."
        )


def _labels(path: Path, prefix: str, arrays: dict[str, Lazy]) -> np.ndarray:
    name, images = prefix + "labels", arrays[prefix + "images"]
    lazy = arrays[name]
    wide = len(lazy.shape) == 2 and lazy.shape[1] > 1  # one-hot, or a mistake
    column = lazy.shape[1:] == (1,)
    good = lazy.dtype.kind in "iu" and (column or len(lazy.shape) == 1)
    if not good and not (wide and lazy.dtype.kind in "biuf"):
        raise ValueError(
            f"{path}: got {name} {lazy.dtype} {list(lazy.shape)}; expected "
            "integers [n] or [n, 1], or one-hot [n, classes]; one label per picture."
        )
    grey = len(images.shape) == 3 or images.shape[3:] == (1,)
    if not (grey or images.shape[3:] == (3,)) or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: got {prefix}images {images.dtype} {list(images.shape)}; expected "
            "uint8 [n, h, w] or [n, h, w, 3]; convert them."
        )
    if 0 in images.shape or images.shape[0] != lazy.shape[0]:
        raise ValueError(
            f"{path}: got {images.shape[0]} {prefix}images and {lazy.shape[0]} labels, "
            f"of {images.shape[2]} x {images.shape[1]} px; expected one label per "
            "picture, and at least one pixel; check how they were selected."
        )
    labels = _hot(path, name, lazy.load()) if wide else lazy.load().reshape(-1)
    if labels.min() < 0:
        raise ValueError(
            f"{path}: got {name} from {labels.min()}; expected labels from 0; count "
            "them from 0."
        )
    return labels


def _hot(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """The class of every row of one 1, and 0 else."""
    ones = values == 1
    if not ((ones | (values == 0)).all() and (ones.sum(1) == 1).all()):
        raise ValueError(
            f"{path}: got {name} {values.dtype} {list(values.shape)} that are not "
            "one-hot; expected one 1 and else 0 for each picture, or integers [n]; "
            "give each picture one class."
        )
    return ones.argmax(1)


def _class_names(path: Path, lazy: Lazy) -> tuple[str, ...]:
    if len(lazy.shape) != 1 or lazy.dtype.kind not in "Uiu":
        raise ValueError(
            f"{path}: got class_names {lazy.dtype} {list(lazy.shape)}; expected texts "
            "[classes]; leave them out, or correct them."
        )
    values = lazy.load()
    if values.dtype.kind == "U":
        # Four bytes a letter, of which most numbers are no letter.
        points = values.view(np.uint32)
        if ((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any():
            raise ValueError(
                f"{path}: got class_names that are no text; expected Unicode; {_SAVE}."
            )
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
