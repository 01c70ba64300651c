# SPDX-License-Identifier: Apache-2.0
"""Small classification tasks, split as VTAB-1k does: 800 train, 200 val, rest test.

Every task is three pairs of arrays, the same on every machine, so that results can be
compared. Two sources need no download (digits, shapes); Fashion-MNIST is read from
files already on the machine; the tasks of VTAB-1k and the fine-grained sets (FGVC, of
other sizes) from what tensorflow-datasets prepared (`vtab.py`); `folder` is your own
pictures (`folder.py`). Nothing here downloads anything, and what happens to a picture
on its way into the model is in `augment.py` and `strips.py`.
"""

import gzip
import importlib.resources
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vpt_jax.data import bounds, folder, prepared, shapes, strips, vtab
from vpt_jax.data.pictures import resize_bilinear
from vpt_jax.prompts import check_choice

NUM_TRAIN, NUM_VAL, MAX_TEST = 800, 200, 2000
SPLITS = ("all", "select", "final")
"""What a run needs: every split; train and val, to choose by; train with val joined to
it, and test, to report."""

MAX_IDX = 1 << 30  # bytes of an idx file, unpacked; Fashion-MNIST has 47 MB

# One seed per task: changing one changes the splits, and with them every number that
# was ever reported on that task.
DIGITS_SEED = 1101
SHAPES_LOCATION_SEED = 1201
SHAPES_ORIENTATION_SEED = 1202
FASHION_TRAIN_SEED = 1301
FASHION_TEST_SEED = 1302

FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"
_TFDS_HOME = "~/tensorflow_datasets"


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


def check_task(task: Task) -> Task:
    """Returns `task` after checking what the rest of the package relies on.

    Raises:
      ValueError: If a split is empty, has the wrong shapes or dtypes, pictures and
        labels differ in number, a label is not in `[0, num_classes)`, or the train
        split has fewer than two classes.
    """
    num_classes = len(task.class_names)
    found = {"train": task.train, "val": task.val, "test": task.test}
    for which, split in found.items():
        if split is None:
            continue
        images, labels = split
        where = f"task {task.name!r}, split {which!r}"
        if isinstance(images, strips.Strip):
            _check_strip(images, where)
        elif images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"{where}: got images {images.dtype} {list(images.shape)}; expected "
                "uint8 [n, h, w, 3]; convert them (grey: repeat the channel)."
            )
        if labels.ndim != 1 or labels.dtype != np.int32:
            raise ValueError(
                f"{where}: got labels {labels.dtype} {list(labels.shape)}; expected "
                "int32 [n]; convert them with `.astype(np.int32)`."
            )
        if strips.count(images) != len(labels):
            raise ValueError(
                f"{where}: got {strips.count(images)} images and {len(labels)} labels; "
                "expected one label per image; check how they were selected."
            )
        if not len(labels):
            raise ValueError(
                f"{where}: got 0 images; expected at least 1; choose other split sizes."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{where}: got labels from {low} to {high}; expected 0 to "
                f"{num_classes - 1}; give one class name per label, counted from 0."
            )
    present = np.unique(task.train.labels)
    if len(present) < 2:
        raise ValueError(
            f"task {task.name!r}: got only class {present.tolist()} in split 'train'; "
            "expected at least 2 classes; choose another seed or more pictures."
        )
    return task


def _check_strip(strip: strips.Strip, where: str) -> None:
    """Raises if a crop of a picture could be one of another, or of the wrong type."""
    pixels, start, length, wide = strip
    good = pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8
    if not good or not start.shape == length.shape == wide.shape == (len(start),):
        raise ValueError(
            f"{where}: got pixels {pixels.dtype} {list(pixels.shape)} and "
            f"{[list(x.shape) for x in strip[1:]]} starts, lengths and directions; "
            "expected uint8 [total, height, 3] and three [n]; use `strips.make`."
        )
    inside = (start >= 0) & (length >= pixels.shape[1])
    if not (inside & (start.astype(np.int64) + length <= len(pixels))).all():
        raise ValueError(
            f"{where}: got pictures that are shorter than {pixels.shape[1]} px or lie "
            f"outside of the {len(pixels)} rows; expected the short side to be the "
            "height of the strip; use `strips.make`."
        )


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
    """The 1,797 handwritten digits that come with the package."""
    del data_dir  # the file is an asset of the package
    asset = importlib.resources.files("vpt_jax") / "assets" / "digits.npz"
    with asset.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
        grey, labels = arrays["images"], arrays["labels"]
    order = np.random.default_rng(DIGITS_SEED).permutation(len(labels))
    # 0..16 counts of black cells to 0..255, halves up.
    grey = ((grey[order].astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    splits = _cut(_to_rgb(grey, image_size), labels[order])
    return Task("digits", tuple("0123456789"), *splits)


def _shapes(label: str, seed: int, image_size: int) -> Task:
    # One draw without replacement for all splits: no picture is in two of them.
    num = NUM_TRAIN + NUM_VAL + MAX_TEST
    images, labels, names = shapes.make_shapes(label, num, seed)
    # The three channels are equal: resize one.
    splits = _cut(_to_rgb(images[..., 0], image_size), labels)
    return Task(f"shapes_{label}", names, *splits)


def _shapes_location(image_size: int, data_dir: str) -> Task:
    del data_dir  # drawn, not read
    return _shapes("location", SHAPES_LOCATION_SEED, image_size)


def _shapes_orientation(image_size: int, data_dir: str) -> Task:
    del data_dir  # drawn, not read
    return _shapes("orientation", SHAPES_ORIENTATION_SEED, image_size)


def read_idx(path: str, ndim: int) -> np.ndarray:
    """Reads a gzipped idx file of unsigned bytes.

    The format: two zero bytes, one byte for the type (8: unsigned byte), one for the
    number of axes; the axes as big-endian 32-bit integers; the data in C order.

    Args:
      path: The `.gz` file.
      ndim: How many axes it should have.

    Returns:
      uint8, with `ndim` axes.

    Raises:
      ValueError: If the file is not gzip, or its magic number, type, number of axes
        or length is not as expected.
    """
    remedy = "fetch the file again; it may be cut short or be another file."
    try:
        with gzip.open(path, "rb") as f:
            shape = _idx_shape(path, f.read(4 + 4 * ndim), ndim, remedy)
            # A small file can unpack to any size: no more than its header says.
            data = f.read(math.prod(shape) + 1)
    except (EOFError, OSError, zlib.error) as e:
        raise ValueError(
            f"{path}: got data that does not unpack ({e}); expected a gzip file; "
            f"{remedy}"
        ) from e
    expected = math.prod(shape)
    if len(data) != expected:
        got = len(data) if len(data) < expected else f"more than {expected}"
        raise ValueError(
            f"{path}: got {got} bytes of data; expected {expected} for shape "
            f"{list(shape)}; {remedy}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx_shape(path: str, head: bytes, ndim: int, remedy: str) -> tuple[int, ...]:
    """The sizes in an idx header; ValueError as `read_idx`."""
    if len(head) < 4 + 4 * ndim or head[:2] != b"\0\0":
        raise ValueError(
            f"{path}: got {len(head)} bytes that start with {head[:4].hex()!r}; "
            f"expected an idx magic number '000008{ndim:02x}' and {ndim} sizes; "
            f"{remedy}"
        )
    if head[2] != 8:
        raise ValueError(
            f"{path}: got idx type 0x{head[2]:02x}; expected 0x08 (unsigned byte); "
            "save the array as uint8."
        )
    if head[3] != ndim:
        raise ValueError(
            f"{path}: got {head[3]} axes; expected {ndim}; images have 3 and labels "
            "1: check that the two files are not exchanged."
        )
    shape = tuple(np.frombuffer(head, ">u4", ndim, offset=4).tolist())
    if math.prod(shape) > MAX_IDX:
        raise ValueError(
            f"{path}: got a header of shape {list(shape)}; expected at most "
            f"{MAX_IDX:,} bytes; {remedy}"
        )
    return shape


def _idx_paths(folder: str, prefix: str) -> tuple[str, str]:
    return (
        os.path.join(folder, f"{prefix}-images-idx3-ubyte.gz"),
        os.path.join(folder, f"{prefix}-labels-idx1-ubyte.gz"),
    )


def _tfds_version(folder: str) -> str:
    """The newest prepared version under a tfds folder, `''` where there is none."""
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        info = os.path.join(folder, name, "dataset_info.json")
        parts = name.split(".")
        if all(part.isdigit() for part in parts) and os.path.isfile(info):
            found.append((tuple(int(part) for part in parts), name))
    return os.path.join(folder, max(found)[1]) if found else ""


def _read_tfds(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads both official splits of a prepared tfds copy, without TensorFlow."""
    with open(os.path.join(folder, "dataset_info.json"), encoding="utf-8") as f:
        form = json.load(f).get("fileFormat", "tfrecord")
    if form != "array_record":
        raise ValueError(
            f"{folder}: got file format {form!r}; expected 'array_record', which can "
            "be read without TensorFlow; prepare it again with "
            "`tfds.builder('fashion_mnist', file_format='array_record')`."
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as e:
        raise ValueError(
            f"{folder}: got a tfds copy but cannot import tensorflow_datasets ({e}); "
            "expected it to be installed; `pip install tensorflow-datasets "
            "array_record`, or use the idx files."
        ) from e
    builder = tfds.builder_from_directory(folder)
    out = {}
    for split in ("train", "test"):
        examples = list(builder.as_data_source(split))  # pyright: ignore[reportCallIssue]
        images = np.stack([np.asarray(e["image"])[..., 0] for e in examples])
        out[split] = images, np.array([e["label"] for e in examples], np.uint8)
    return out


def _read_fashion(data_dir: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 `[n, 28, 28]` and labels uint8 `[n]` of 'train' and 'test'."""
    folder = os.path.expanduser(data_dir or _DEBIAN_FASHION)
    paths = {"train": _idx_paths(folder, "train"), "test": _idx_paths(folder, "t10k")}
    missing = [p for pair in paths.values() for p in pair if not os.path.isfile(p)]
    if not missing:
        return {k: (read_idx(i, 3), read_idx(j, 1)) for k, (i, j) in paths.items()}
    home = os.path.join(os.path.expanduser(data_dir or _TFDS_HOME), "fashion_mnist")
    version = _tfds_version(home)
    if version:
        return _read_tfds(version)
    names = ", ".join(os.path.basename(p) for p in missing)
    raise ValueError(
        f"Fashion-MNIST: {names} not found in {folder}, and no prepared tfds copy in "
        f"{home}; expected one of the two; `apt-get install dataset-fashion-mnist`, "
        "or pass `data_dir`, or prepare it with tfds "
        "(`file_format='array_record'`)."
    )


def _choose(images: np.ndarray, labels: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Indices of `num` pictures, chosen alike in whatever order they are given.

    tfds shuffles a data set when it prepares it, so that a choice by position would
    depend on the source. Sorting by content first makes it depend on the seed alone.
    """
    keys = [x.tobytes() + bytes([y]) for x, y in zip(images, labels, strict=True)]
    ranked = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.intp)
    return ranked[np.random.default_rng(seed).permutation(len(keys))[:num]]


def _fashion_mnist(image_size: int, data_dir: str) -> Task:
    parts = []
    wanted = {
        "train": (NUM_TRAIN + NUM_VAL, FASHION_TRAIN_SEED),
        "test": (MAX_TEST, FASHION_TEST_SEED),
    }
    source = _read_fashion(data_dir)
    for split, (num, seed) in wanted.items():
        images, labels = source[split]
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise ValueError(
                f"Fashion-MNIST {split}: got images {list(images.shape)} and "
                f"{len(labels)} labels; expected [n, 28, 28] and n; use the original "
                "files."
            )
        if len(images) < num:
            raise ValueError(
                f"Fashion-MNIST {split}: got {len(images)} pictures; expected at least "
                f"{num}; use the original files."
            )
        chosen = _choose(images, labels, num, seed)
        parts.append((_to_rgb(images[chosen], image_size), labels[chosen]))
    splits = _cut(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return Task("fashion_mnist", FASHION_NAMES, *splits)


TASKS: dict[str, Callable[[int, str], Task]] = {
    "digits": _digits,
    "shapes_location": _shapes_location,
    "shapes_orientation": _shapes_orientation,
    "fashion_mnist": _fashion_mnist,
}
"""Name of a task to its loader, called with `(image_size, data_dir)`."""

VTAB = tuple(n for n, row in vtab.BENCHMARKS.items() if row.group != "fgvc")
FGVC = tuple(n for n, row in vtab.BENCHMARKS.items() if row.group == "fgvc")


def _folder(image_size: int, data_dir: str, resize: str, skip_broken: bool) -> Task:
    """Own pictures; the task is called as the folder is."""
    names, splits, doubts = folder.load(
        data_dir, image_size, rule=resize, skip_broken=skip_broken
    )
    name = os.path.basename(os.path.abspath(os.path.expanduser(data_dir)))
    train, val, test = (Split(*splits[k]) for k in folder.SPLITS)
    return Task(bounds.printable(name), names, train, val, test, doubts)


def _vtab(name: str, image_size: int, data_dir: str, rule: str, splits: str) -> Task:
    """One of VTAB-1k's 19 tasks: 800 train, 200 val, the whole test set."""
    row = vtab.BENCHMARKS[name]

    def read(part: str) -> Split:
        found = prepared.arrays(row, part, image_size, rule=rule, data_dir=data_dir)
        return Split(*found)

    train, val = read("train800"), read("val200")
    test = None if splits == "select" else read("test")
    return Task(name, _numbers(row.classes), train, val, test)


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
    return Task(name, _numbers(row.classes), train, val, test)


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
      data_dir: For `fashion_mnist`: a folder of the four idx `.gz` files, or a tfds
        folder that contains `fashion_mnist`. When empty, the Debian package's folder
        and `~/tensorflow_datasets` are looked at. For VTAB and FGVC: see
        `vtab.data_dirs`. For `folder`: a folder of pictures, or an npz file, see
        `folder.py`.
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
        raise ValueError(
            f"got image_size={image_size}; expected at least 1; give the picture side "
            "in px."
        )
    known = sorted([*TASKS, *VTAB, *FGVC, "folder"])
    if name not in known:
        raise ValueError(f"got task {name!r}; expected one of {known}; choose one.")
    own = name == "folder"
    if (skip_broken and not own) or (resize and not own and name not in VTAB):
        raise ValueError(
            f"got resize={resize!r} and skip_broken={skip_broken} for task {name!r};"
            " resize is for VTAB and 'folder', skip_broken for 'folder' alone; leave"
            " them empty."
        )
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
