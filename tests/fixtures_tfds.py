# SPDX-License-Identifier: Apache-2.0
"""Small prepared tfds directories of every benchmark.

python tests/fixtures_tfds.py DIR

What stands in for the 16 data sets behind VTAB-1k's 19 tasks and the five fine-grained
ones: their names, versions, splits and the features that labels are derived from, with
as few tiny pictures as the split rules allow (800 train, 200 val, some 40 test).
Formats and shards alternate. The label can be seen in the picture, under noise, so that
training beats chance: of each label a bright bar, whose place and colour is its value.

Other features, and splits that no benchmark reads (svhn's `extra`, clevr's `test`), are
left out.
"""

import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tfds_files import (
    class_label,
    features_dict,
    image,
    png,
    sequence,
    serialized,
    tensor,
    text,
    write_version,
)

MAX_LABELS = 10  # of a plain set: more would be too few pictures of each
FGVC = {"train": 100, "test": 40}
OFFICIAL = {"train": 800, "validation": 200, "test": 40}
PERCENT_90 = {"train": 1991, "test": 40}  # 1,791 and 200
PERCENT_80 = {"train": 1000, "test": 40}  # 800 and 200
PERCENT_60_20 = {"train": 1334}  # 800, 266 and 268
PERCENT_80_10 = {"train": 2000}  # 1,600, 200 and 200
CLEVR = {"train": 1991, "validation": 40}
SMALLNORB = {"train": 800, "test": 400}  # val and test are halves of test

# Heights and widths in px, from and to.
SQUARE = (16, 16), (16, 16)
VARYING = (12, 20), (12, 20)
LARGER = (16, 48), (16, 48)  # as narrow as one to three
WIDE = (12, 12), (16, 16)
WIDER = (10, 10), (28, 28)

# Depths in each class of nearest objects, the last on the upper threshold.
CLEVR_NEAREST = (7.0, 8.0), (8.01, 8.5), (8.51, 9.0), (9.01, 9.5), (9.51, 10.0), (12.0,)
KITTI_NEAREST = (3.5, 8.0), (8.01, 20.0), (20.01, 45.0), ()


class Set(NamedTuple):
    """A data set: its directory, the benchmarks that read it, and how it is drawn."""

    path: str  # builder, config and version
    sizes: dict[str, int]  # of its splits
    classes: dict[str, int]  # of each benchmark
    shape: tuple[tuple[int, int], tuple[int, int]]
    values: Callable  # of a generator, a shape and the class of each benchmark
    features: dict


def drawn(rng, shape, fractions, channels=3):
    """Of each fraction a bright bar, one above the other: 0 is left, 1 is right."""
    height, width = (int(rng.integers(a, b, endpoint=True)) for a, b in shape)
    picture = rng.uniform(0, 60, (height, width, channels))
    at = np.arange(width)[:, None]
    rows = np.array_split(np.arange(height), len(fractions))
    for band, fraction in zip(rows, fractions, strict=True):
        colour = np.ones(1)
        if channels == 3:
            phase = 0.8 * fraction + np.arange(3) / 3
            colour = 0.5 + 0.5 * np.cos(2 * np.pi * phase)
        bar = np.exp(-((at - fraction * (width - 1)) ** 2))
        picture[band] += 190 * bar * colour
    picture = picture.astype(np.uint8)
    return png(picture[..., 0] if channels == 1 else picture)


def plain(classes):
    """The values of a set with a picture and a label."""

    def values(rng, shape, label):
        return {"image": drawn(rng, shape, [label / (classes - 1)]), "label": label}

    return values


def clevr(rng, shape, count, distance):
    nearest = float(rng.choice(CLEVR_NEAREST[distance]))
    depths = np.append(nearest, nearest + rng.uniform(0, 4, count + 2))
    points = rng.uniform(0, 300, (count + 3, 3))
    points[:, 2] = rng.permutation(depths)
    return {
        "image": drawn(rng, shape, [count / 7, distance / 5]),
        "objects/pixel_coords": points,
        "objects/shape": rng.integers(0, 3, count + 3),
    }


def kitti(rng, shape, distance):
    """Cars, vans and trucks (0 to 2) from some depth on, others nearer than that."""
    vehicles = []
    if KITTI_NEAREST[distance]:
        nearest = float(rng.choice(KITTI_NEAREST[distance]))
        vehicles = [nearest, *(nearest + rng.uniform(0, 50, rng.integers(3)))]
    others = [*rng.uniform(1, 3, rng.integers(3))]
    kinds = [*rng.integers(0, 3, len(vehicles)), *rng.integers(3, 8, len(others))]
    order = rng.permutation(len(kinds))
    points = rng.uniform(-9, 9, (len(kinds), 3))
    points[:, 2] = vehicles + others
    return {
        "image": drawn(rng, shape, [distance / 3]),
        "objects/location": points[order],
        "objects/type": np.array(kinds, np.int64)[order],
    }


def dsprites(rng, shape, location, orientation):
    """Zeros and ones: a line down at the position, one across at the orientation."""
    x = 2 * location + int(rng.integers(2))
    turn = int(rng.choice([k for k in range(40) if 2 * k // 5 == orientation]))
    (height, _), (width, _) = shape
    picture = rng.random((height, width)) < 0.05
    picture[:, location] = picture[orientation] = True
    return {
        "image": png(picture.astype(np.uint8)),
        "label_x_position": x,
        "label_orientation": turn,
    }


def smallnorb(rng, shape, azimuth, elevation):
    return {
        "image": drawn(rng, shape, [azimuth / 17, elevation / 8], 1),
        "image2": drawn(rng, shape, [rng.random(), rng.random()], 1),
        "label_azimuth": azimuth,
        "label_elevation": elevation,
    }


def new_set(path, sizes, shape, classes, values, **features):
    features = features_dict(file_name=text(), **features)
    return Set(path, sizes, classes, shape, values, features)


def plain_set(path, sizes, shape, **classes):
    num = next(iter(classes.values()))
    features = {"image": image(), "label": class_label(num)}
    return new_set(path, sizes, shape, classes, plain(num), **features)


SETS = (
    plain_set("cifar100/3.0.2", PERCENT_90, SQUARE, cifar100=100),
    plain_set("caltech101/3.0.2", PERCENT_90, VARYING, caltech101=102),
    plain_set("dtd/3.0.1", OFFICIAL, VARYING, dtd=47),
    plain_set(
        "oxford_flowers102/2.1.1", OFFICIAL, LARGER, oxford_flowers102=102, flowers=102
    ),
    plain_set("oxford_iiit_pet/4.0.0", PERCENT_80, VARYING, oxford_iiit_pet=37),
    plain_set("svhn_cropped/3.1.0", PERCENT_90, SQUARE, svhn=10),
    plain_set("sun397/tfds/4.0.0", OFFICIAL, VARYING, sun397=397),
    plain_set("patch_camelyon/2.0.0", OFFICIAL, SQUARE, patch_camelyon=2),
    plain_set("eurosat/rgb/2.0.0", PERCENT_60_20, SQUARE, eurosat=10),
    plain_set("resisc45/3.0.0", PERCENT_60_20, SQUARE, resisc45=45),
    plain_set(
        "diabetic_retinopathy_detection/btgraham-300/3.0.0",
        {"sample": 10, **OFFICIAL},
        VARYING,
        diabetic_retinopathy=5,
    ),
    new_set(
        "clevr/3.1.0",
        CLEVR,
        WIDE,
        {"clevr_count": 8, "clevr_distance": 6},
        clevr,
        image=image(),
        objects=sequence(features_dict(pixel_coords=tensor(3), shape=class_label(3))),
    ),
    plain_set("dmlab/2.0.1", OFFICIAL, WIDE, dmlab=6),
    new_set(
        "kitti/3.3.0",
        OFFICIAL,
        WIDER,
        {"kitti_distance": 4},
        kitti,
        image=image(),
        objects=sequence(features_dict(location=tensor(3), type=class_label(8))),
    ),
    new_set(
        "dsprites/2.0.0",
        PERCENT_80_10,
        SQUARE,
        {"dsprites_location": 16, "dsprites_orientation": 16},
        dsprites,
        image=image(1),
        label_x_position=class_label(32),
        label_orientation=class_label(40),
    ),
    new_set(
        "smallnorb/2.0.0",
        SMALLNORB,
        ((20, 20), (20, 20)),
        {"smallnorb_azimuth": 18, "smallnorb_elevation": 9},
        smallnorb,
        image=image(1),
        image2=image(1),
        label_azimuth=class_label(18),
        label_elevation=class_label(9),
    ),
    plain_set("caltech_birds2011/0.2.0", FGVC, LARGER, cub=200),
    plain_set("nabirds/1.0.0", FGVC, LARGER, nabirds=555),
    plain_set("stanford_dogs/0.2.0", FGVC, LARGER, dogs=120),
    plain_set("cars196/2.1.0", FGVC, LARGER, cars=196),
)


def draw_labels(rng, made, num):
    """Classes, int `[num, labels]`: a column for each label that the set has."""
    if "label" in made.features["featuresDict"]["features"]:
        # One label, whichever benchmarks read it; the first and the last class too.
        classes = next(iter(made.classes.values()))
        used = np.linspace(0, classes - 1, min(classes, MAX_LABELS)).round()
        return rng.choice(used.astype(np.int64), (num, 1))
    return rng.integers(0, [*made.classes.values()], (num, len(made.classes)))


def write_set(root, made, form):
    """Writes one set, and returns the labels of each benchmark in each split."""
    name, _, _ = made.path.rpartition("/")
    rng = np.random.default_rng(zlib.crc32(made.path.encode()))
    labels, splits = {benchmark: {} for benchmark in made.classes}, {}
    for split, num in made.sizes.items():
        drawn_labels = draw_labels(rng, made, num)
        payloads = []
        for i, row in enumerate(drawn_labels.tolist()):
            values = made.values(rng, made.shape, *row)
            values["file_name"] = f"{split}_{i:05d}.png".encode()
            payloads.append(serialized(values))
        shards = 1 if num < 100 else 3 if form == "tfrecord" else 2
        cut = [k * num // shards for k in range(shards + 1)]
        splits[split] = [payloads[cut[k] : cut[k + 1]] for k in range(shards)]
        for k, benchmark in enumerate(made.classes):
            column = min(k, drawn_labels.shape[1] - 1)
            labels[benchmark][split] = drawn_labels[:, column].tolist()
    write_version(root / made.path, name, form, made.features, splits)
    return labels


def write(root):
    """Writes all sets under `root`, a `data_dir` that is not there yet.

    In it, labels.json has the labels that were drawn: of each benchmark and split, in
    order.
    """
    root, labels = Path(root), {}
    for k, made in enumerate(SETS):
        labels |= write_set(root, made, ("array_record", "tfrecord")[k % 2])
    (root / "labels.json").write_text(json.dumps(labels))
    return root


def read_labels(root):
    """The labels that were drawn, by benchmark and split."""
    return json.loads((root / "labels.json").read_text())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected one folder: python tests/fixtures_tfds.py DIR")
    print(write(sys.argv[1]))
