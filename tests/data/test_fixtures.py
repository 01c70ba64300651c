# SPDX-License-Identifier: Apache-2.0
"""The small stand-ins of all benchmarks: every part loads, with its labels."""

import fixtures_tfds
import numpy as np
import pytest

from vpt_jax.data import pictures
from vpt_jax.data.public import vtab

ROWS = tuple(vtab.BENCHMARKS.values())
# Sizes of train, val and test by the rule, and of VTAB's small parts.
SIZES = {
    "cifar100 caltech101 svhn": (1791, 200, 40),
    "dtd oxford_flowers102 flowers oxford_iiit_pet sun397": (800, 200, 40),
    "patch_camelyon diabetic_retinopathy dmlab kitti_distance": (800, 200, 40),
    "eurosat resisc45": (800, 266, 268),
    "clevr_count clevr_distance": (1791, 200, 40),
    "dsprites_location dsprites_orientation": (1600, 200, 200),
    "smallnorb_azimuth smallnorb_elevation": (800, 200, 200),
    "cub nabirds dogs cars": (90, 10, 40),
}
SIZES = {name: sizes for names, sizes in SIZES.items() for name in names.split()}
MOST = 400  # read of a part: enough, and quicker


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fixtures_tfds.write(tmp_path_factory.mktemp("sets") / "tfds")


def drawn_labels(row, part, root):
    """What was drawn, cut by the numbers of the part."""
    drawn = fixtures_tfds.read_labels(root)[row.name]
    sizes = {split: len(labels) for split, labels in drawn.items()}
    run = vtab.part_runs(row, sizes)[part]
    return drawn[run.split][run.start : run.stop]


def probe(train, test):
    """Right answers of ridge regression on pixels, and of the most frequent class."""

    def design(images):
        small = [pictures.to_square(x, 16, "squash").ravel() for x in images]
        return np.stack(small) / np.float32(255)

    (x, y), (x_test, y_test) = train, test
    x, x_test = design(x), design(x_test)
    mean, targets = x.mean(0), np.eye(y.max() + 1, dtype=np.float32)[y]
    gram = (x - mean) @ (x - mean).T + 3 * np.eye(len(x), dtype=np.float32)
    weights = (x - mean).T @ np.linalg.solve(gram, targets - targets.mean(0))
    logits = (x_test - mean) @ weights + targets.mean(0)
    frequent = (y_test == np.bincount(y).argmax()).mean()
    return (logits.argmax(-1) == y_test).mean(), frequent


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_every_part_of_every_benchmark(row, root):
    parts, sizes = ("train", "val", "test"), SIZES[row.name]
    chosen = parts
    if row.group != "fgvc":
        parts, sizes = ("train800", "val200", *parts), (800, 200, *sizes)
        # Of the sets with a label of their own, only svhn's train is read.
        plain = row.label is vtab.BENCHMARKS["svhn"].label and row.name != "svhn"
        chosen = ("val200", "test") if plain else ("train800", "val200", "test")
    opened = {part: vtab.load(row, part, data_dir=str(root)) for part in parts}
    assert tuple(map(len, opened.values())) == sizes
    found, seen = {}, []
    for part in chosen:
        pairs = [opened[part][i] for i in range(min(MOST, len(opened[part])))]
        images, labels = [x for x, _ in pairs], np.array([label for _, label in pairs])
        assert labels.tolist() == drawn_labels(row, part, root)[:MOST]
        assert 0 <= labels.min() and labels.max() < row.classes
        assert len(np.unique(labels)) >= 2
        found[part] = images, labels
        seen += [(x.shape, x.tobytes()) for x in images]
    assert len(set(seen)) == len(seen)  # no picture twice, nor in two parts
    accuracy, frequent = probe(found[chosen[0]], found["test"])
    assert accuracy > max(0.5, frequent + 0.1), (accuracy, frequent)


def test_every_directory_belongs_to_a_benchmark(root):
    wanted = {vtab.find(row, str(root)) for row in ROWS}
    written = {root / made.path for made in fixtures_tfds.SETS}
    assert wanted <= written
    assert {p.parent for p in root.rglob("dataset_info.json")} == written
    names = [name for made in fixtures_tfds.SETS for name in made.classes]
    assert len(set(names)) == len(names)
    for made in fixtures_tfds.SETS:
        for name, classes in made.classes.items():
            if name in vtab.BENCHMARKS:
                assert vtab.BENCHMARKS[name].classes == classes
