# SPDX-License-Identifier: Apache-2.0
"""Small classification tasks, split as VTAB-1k does: 800 train, 200 val, rest test.

Every task is three pairs of arrays, the same on every machine. Two sources need no
download (digits, shapes); the tasks of VTAB-1k and the fine-grained sets (FGVC, of
other sizes) are read from what tensorflow-datasets prepared; `folder` is your own
pictures (`folder.py`). Nothing here downloads anything.
"""

import functools
import importlib.resources
import io
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vpt_jax.data import folder, shapes, strips
from vpt_jax.data.pictures import resize_bilinear
from vpt_jax.data.public import extracted, prepared, vtab
from vpt_jax.files.messages import mismatch, printable
from vpt_jax.prompts import check_choice

NUM_TRAIN, NUM_VAL, MAX_TEST = 800, 200, 2000
SPLITS = ("all", "select", "final")
"""What a run needs: every split; train and val, to choose by; train with val joined to
it, and test, to report."""


class Split(NamedTuple):
    """Pictures uint8 `[n, h, w, 3]`, or a strip to train on, and labels int32 `[n]`."""

    images: Any  # np.ndarray or strips.Strip; the number of pictures is len(labels)
    labels: np.ndarray


class Task(NamedTuple):
    """A classification task; label `k` means `class_names[k]`."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split | None  # None where train has these pictures too
    test: Split | None  # None where it was not asked for
    doubts: tuple[str, ...] | None = None  # None where nobody looked, see `doubts.py`
    resize: str = "half_pixel"  # how pictures became squares, of `pictures.RULES`


def check_task(task: Task) -> Task:
    """Returns `task` after checking what the rest of the package relies on.

    Raises:
      ValueError: If a split is empty, has the wrong shapes or dtypes, pictures and
        labels differ in number, a label is not in `[0, num_classes)`, or the train
        split has fewer than two classes.
    """
    for which, split in zip(folder.SPLITS, task[2:5], strict=True):
        if split:
            where = f"task {task.name!r}, split {which!r}"
            _check_split(split, where, len(task.class_names))
    present = np.unique(task.train.labels)
    if len(present) < 2:
        got = f"only class {present.tolist()} in split 'train'"
        remedy = "choose another seed or more pictures"
        raise mismatch(f"task {task.name!r}", got, "at least 2 classes", remedy)
    return task


def _check_split(split: Split, where: str, num_classes: int) -> None:
    images, labels = split
    is_strip = isinstance(images, strips.Strip)
    pixels = images.pixels if is_strip else images
    good = pixels.ndim == 4 - is_strip and pixels.shape[-1] == 3
    kinds = pixels.dtype == np.uint8, labels.dtype == np.int32, labels.ndim == 1
    if not (good and all(kinds)):
        got = f"images {pixels.dtype} {list(pixels.shape)}"
        got += f" and labels {labels.dtype} {list(labels.shape)}"
        raise mismatch(where, got, "uint8 [n, h, w, 3] and int32 [n]", "convert them")
    num = strips.count(images)
    if num != len(labels) or not num:
        got = f"{num} images and {len(labels)} labels"
        expected = "one label per image, and at least one"
        raise mismatch(where, got, expected, "check how they were selected")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        got, expected = f"labels from {low} to {high}", f"0 to {num_classes - 1}"
        remedy = "give one class name per label, counted from 0"
        raise mismatch(where, got, expected, remedy)


def join(train: Split, val: Split) -> Split:
    """The pictures of two splits in memory, those of `train` first."""
    if isinstance(train.images, strips.Strip):
        images = strips.join(train.images, val.images)
    else:
        images = np.concatenate([train.images, val.images])
    return Split(images, np.concatenate([train.labels, val.labels]))


def _cut(images: np.ndarray, labels: np.ndarray) -> tuple[Split, Split, Split]:
    """Cuts pictures in their given order into train, val and test."""
    labels = labels.astype(np.int32)
    ends = (0, NUM_TRAIN, NUM_TRAIN + NUM_VAL, NUM_TRAIN + NUM_VAL + MAX_TEST)
    pairs = itertools.pairwise(ends)
    train, val, test = (Split(images[a:b], labels[a:b]) for a, b in pairs)
    return train, val, test


def _to_rgb(grey: np.ndarray, side: int) -> np.ndarray:
    """Resizes uint8 `[n, h, w]` and repeats the channel: `[n, side, side, 3]`."""
    return np.repeat(resize_bilinear(grey[..., None], side), 3, axis=-1)


def _asset(name: str, images: str) -> tuple[np.ndarray, np.ndarray]:
    asset = importlib.resources.files("vpt_jax") / "assets" / f"{name}.npz"
    with asset.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
        return arrays[images], arrays["labels"]


def _digits(image_size: int) -> Task:
    """The 1,797 handwritten digits that are an asset of the package."""
    grey, labels = _asset("digits", "images")
    order = np.random.default_rng(1101).permutation(len(labels))
    # 0..16 counts of black cells to 0..255, halves up.
    grey = ((grey[order].astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    splits = _cut(_to_rgb(grey, image_size), labels[order])
    return Task("digits", tuple("0123456789"), *splits)


def _sign_digits(image_size: int) -> Task:
    """2,000 photographs of hands that show a digit: 800, 200 and 1,000, in the package.

    Pictures of one person can lie in several splits: the files do not tell signers.
    """
    jpeg, labels = _asset("sign_digits", "jpeg")
    mosaic = np.asarray(Image.open(io.BytesIO(jpeg.tobytes())))
    rows = mosaic.reshape(-1, 32, mosaic.shape[1] // 32, 32, 3).transpose(0, 2, 1, 3, 4)
    images = resize_bilinear(rows.reshape(-1, 32, 32, 3), image_size)
    return Task("sign_digits", tuple("0123456789"), *_cut(images, labels))


def _shapes(label: str, seed: int, image_size: int) -> Task:
    # One draw without replacement for all splits: no picture is in two of them.
    num = NUM_TRAIN + NUM_VAL + MAX_TEST
    images, labels, names = shapes.make_shapes(label, num, seed)
    # The three channels are equal: resize one.
    splits = _cut(_to_rgb(images[..., 0], image_size), labels)
    return Task(f"shapes_{label}", names, *splits)


# With the seed of each: changing one changes the splits, and with them every number
# that was ever reported on that task.
TASKS: dict[str, Callable[[int], Task]] = {
    "digits": _digits,
    "sign_digits": _sign_digits,
    "shapes_location": functools.partial(_shapes, "location", 1201),
    "shapes_orientation": functools.partial(_shapes, "orientation", 1202),
}
"""Name of a task to its loader, called with the side of its pictures in px."""

VTAB = tuple(n for n, row in vtab.BENCHMARKS.items() if row.group != "fgvc")
FGVC = tuple(n for n, row in vtab.BENCHMARKS.items() if row.group == "fgvc")


def _task(name: str, found: folder.Loaded) -> Task:
    train, val, test = (Split(*found.splits[split]) for split in folder.SPLITS)
    return Task(name, found.class_names, train, val, test, found.doubts, found.rule)


def _public(name: str, image_size: int, data_dir: str, rule: str, splits: str) -> Task:
    """One of VTAB-1k's tasks: 800 train, 200 val, the whole test set.

    Or a fine-grained set as VPT saw it: random crops to train on, else the centre.
    """
    row, fine = vtab.BENCHMARKS[name], name in FGVC
    names = tuple(map(str, range(row.classes)))
    if where := extracted.find(name, data_dir):
        task = _task(name, extracted.load(name, where, image_size, rule))
        return task._replace(class_names=names)

    def read(part: str, crops: bool = False) -> Split:
        if crops:
            return Split(*prepared.strip(row, part, image_size, data_dir=data_dir))
        found = prepared.arrays(row, part, image_size, rule=rule, data_dir=data_dir)
        return Split(*found)

    train = read("train" if fine else "train800", fine)
    # To be trained on, val needs room for crops as well.
    val = read("val" if fine else "val200", fine and splits == "final")
    test = None if splits == "select" else read("test")
    return Task(name, names, train, val, test, resize=rule)


def load_task(
    name: str,
    *,
    image_size: int = 32,
    data_dir: str = "",
    resize: str = "",
    skip_broken: bool = False,
    splits: str = "all",
) -> Task:
    """Loads a task, resized and split; the same pictures on every machine.

    Args:
      name: A key of `TASKS`, one of `vtab.BENCHMARKS`, or `folder`.
      image_size: Height and width of the pictures in px.
      data_dir: For VTAB and FGVC: see `vtab.data_dirs`; or, for VTAB, the folder in
        which the tasks are extracted, see `extracted.py`. For `folder`: a folder of
        pictures, or an npz file, see `folder.py`.
      resize: For VTAB and `folder`: one of `pictures.RULES`. Empty: `corner` for VTAB,
        as VPT ran it, and the layout's own for `folder`.
      skip_broken: For `folder`: leave out pictures that cannot be read.
      splits: One of `SPLITS`. `select`: without test, which of VTAB and FGVC is not
        even read. `final`: val's pictures follow train's, in memory; there is no val.

    Returns:
      A checked `Task`. Of `folder` and FGVC as many pictures as there are, of the
      others 800 train, 200 val and up to 2,000 test pictures, of VTAB the whole test
      set. Those of VTAB, FGVC and `folder` are memory-mapped. Of FGVC, train is a
      `strips.Strip`.

    Raises:
      ValueError: If `name` or `splits` is unknown, `image_size` is below 1, the files
        of the task are missing or damaged, or an option is not for this task.
    """
    check_choice("splits", splits, SPLITS)
    if image_size < 1:
        raise mismatch("", f"image_size={image_size}", "at least 1", "give it in px")
    check_choice("task", name, sorted([*TASKS, *VTAB, *FGVC, "folder"]))
    own = name == "folder"
    if (skip_broken and not own) or (resize and not own and name not in VTAB):
        got = f"resize={resize!r} and skip_broken={skip_broken} for task {name!r}"
        expected = "resize for VTAB and 'folder', skip_broken for 'folder' alone"
        raise mismatch("", got, expected, "leave them empty")
    if own:  # the task is called as the folder is
        found = folder.load(data_dir, image_size, rule=resize, skip_broken=skip_broken)
        name = os.path.basename(os.path.abspath(os.path.expanduser(data_dir)))
        task = _task(printable(name), found)
    elif name in TASKS:
        task = TASKS[name](image_size)
    else:
        rule = "crop" if name in FGVC else resize or "corner"
        task = _public(name, image_size, data_dir, rule, splits)
    if splits == "select":
        task = task._replace(test=None)
    elif splits == "final":
        assert task.val  # every loader gives it
        task = task._replace(train=join(task.train, task.val), val=None)
    return check_task(task)
