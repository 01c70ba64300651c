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
    if isinstance(images, strips.Strip):
        _check_strip(images, where)
    elif images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        got = f"images {images.dtype} {list(images.shape)}"
        remedy = "convert them (grey: repeat the channel)"
        raise mismatch(where, got, "uint8 [n, h, w, 3]", remedy)
    if labels.ndim != 1 or labels.dtype != np.int32:
        got = f"labels {labels.dtype} {list(labels.shape)}"
        remedy = "convert them with `.astype(np.int32)`"
        raise mismatch(where, got, "int32 [n]", remedy)
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


def _check_strip(strip: strips.Strip, where: str) -> None:
    """Raises if a crop of a picture could be one of another, or of the wrong type."""
    pixels, start, length, wide = strip
    good = pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8
    remedy = "use `strips.make`"
    if not good or not start.shape == length.shape == wide.shape == (len(start),):
        others = [list(x.shape) for x in strip[1:]]
        got = f"pixels {pixels.dtype} {list(pixels.shape)} and {others} starts, lengths"
        got, expected = (
            f"{got} and directions",
            "uint8 [total, height, 3] and three [n]",
        )
        raise mismatch(where, got, expected, remedy)
    inside = (start >= 0) & (length >= pixels.shape[1])
    if not (inside & (start.astype(np.int64) + length <= len(pixels))).all():
        short = f"shorter than {pixels.shape[1]} px"
        got = f"pictures that are {short} or lie outside of the {len(pixels)} rows"
        raise mismatch(where, got, "the short side to be the strip's height", remedy)


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
    train, val, test = (
        Split(images[a:b], labels[a:b]) for a, b in itertools.pairwise(ends)
    )
    return train, val, test


def _to_rgb(grey: np.ndarray, side: int) -> np.ndarray:
    """Resizes uint8 `[n, h, w]` and repeats the channel: `[n, side, side, 3]`."""
    return np.repeat(resize_bilinear(grey[..., None], side), 3, axis=-1)


def _digits(image_size: int, data_dir: str) -> Task:
    """The 1,797 handwritten digits that are an asset of the package."""
    del data_dir
    asset = importlib.resources.files("vpt_jax") / "assets" / "digits.npz"
    with asset.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
        grey, labels = arrays["images"], arrays["labels"]
    order = np.random.default_rng(1101).permutation(len(labels))
    # 0..16 counts of black cells to 0..255, halves up.
    grey = ((grey[order].astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    splits = _cut(_to_rgb(grey, image_size), labels[order])
    return Task("digits", tuple("0123456789"), *splits)


def _sign_digits(image_size: int, data_dir: str) -> Task:
    """2,000 photographs of hands that show a digit: 800, 200 and 1,000, in the package.

    Pictures of one person can lie in several splits: the files do not tell signers.
    """
    del data_dir
    asset = importlib.resources.files("vpt_jax") / "assets" / "sign_digits.npz"
    with asset.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
        mosaic = np.asarray(Image.open(io.BytesIO(arrays["jpeg"].tobytes())))
        labels = arrays["labels"]
    rows = mosaic.reshape(-1, 32, mosaic.shape[1] // 32, 32, 3).transpose(0, 2, 1, 3, 4)
    images = resize_bilinear(rows.reshape(-1, 32, 32, 3), image_size)
    return Task("sign_digits", tuple("0123456789"), *_cut(images, labels))


def _shapes(label: str, seed: int, image_size: int, data_dir: str) -> Task:
    del data_dir  # drawn, not read
    # One draw without replacement for all splits: no picture is in two of them.
    num = NUM_TRAIN + NUM_VAL + MAX_TEST
    images, labels, names = shapes.make_shapes(label, num, seed)
    # The three channels are equal: resize one.
    splits = _cut(_to_rgb(images[..., 0], image_size), labels)
    return Task(f"shapes_{label}", names, *splits)


# With the seed of each: changing one changes the splits, and with them every number
# that was ever reported on that task.
TASKS: dict[str, Callable[[int, str], Task]] = {
    "digits": _digits,
    "sign_digits": _sign_digits,
    "shapes_location": functools.partial(_shapes, "location", 1201),
    "shapes_orientation": functools.partial(_shapes, "orientation", 1202),
}
"""Name of a task to its loader, called with `(image_size, data_dir)`."""

VTAB = tuple(n for n, row in vtab.BENCHMARKS.items() if row.group != "fgvc")
FGVC = tuple(n for n, row in vtab.BENCHMARKS.items() if row.group == "fgvc")


def _folder(image_size: int, data_dir: str, resize: str, skip_broken: bool) -> Task:
    """Own pictures; the task is called as the folder is."""
    found = folder.load(data_dir, image_size, rule=resize, skip_broken=skip_broken)
    name = os.path.basename(os.path.abspath(os.path.expanduser(data_dir)))
    return _task(printable(name), found)


def _task(name: str, found: folder.Loaded) -> Task:
    train, val, test = (Split(*found.splits[split]) for split in folder.SPLITS)
    return Task(name, found.class_names, train, val, test, found.doubts, found.rule)


def _vtab(name: str, image_size: int, data_dir: str, rule: str, splits: str) -> Task:
    """One of VTAB-1k's 19 tasks: 800 train, 200 val, the whole test set."""
    row = vtab.BENCHMARKS[name]
    if where := extracted.find(name, data_dir):
        task = _task(name, extracted.load(name, where, image_size, rule))
        return task._replace(class_names=_numbers(row.classes))

    def read(part: str) -> Split:
        found = prepared.arrays(row, part, image_size, rule=rule, data_dir=data_dir)
        return Split(*found)

    train, val = read("train800"), read("val200")
    test = None if splits == "select" else read("test")
    return Task(name, _numbers(row.classes), train, val, test, resize=rule)


def _fgvc(name: str, image_size: int, data_dir: str, splits: str) -> Task:
    """A fine-grained set as VPT saw it: random crops to train on, else the centre."""
    row = vtab.BENCHMARKS[name]

    def strip(part: str) -> Split:
        return Split(*prepared.strip(row, part, image_size, data_dir=data_dir))

    def centres(part: str) -> Split:
        found = prepared.arrays(row, part, image_size, rule="crop", data_dir=data_dir)
        return Split(*found)

    train = strip("train")
    # To be trained on, val needs room for crops as well.
    val = strip("val") if splits == "final" else centres("val")
    test = None if splits == "select" else centres("test")
    return Task(name, _numbers(row.classes), train, val, test, resize="crop")


def _numbers(classes: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(classes))


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
    if own:
        task = _folder(image_size, data_dir, resize, skip_broken)
    elif name in VTAB:
        task = _vtab(name, image_size, data_dir, resize or "corner", splits)
    elif name in FGVC:
        task = _fgvc(name, image_size, data_dir, splits)
    else:
        task = TASKS[name](image_size, data_dir)
    if splits == "select":
        task = task._replace(test=None)
    elif splits == "final":
        assert task.val  # every loader gives it
        task = task._replace(train=join(task.train, task.val), val=None)
    return check_task(task)
