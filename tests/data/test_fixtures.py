# SPDX-License-Identifier: Apache-2.0
"""The small stand-ins of all benchmarks: every part loads, with its labels."""

import hashlib

import fixtures_tfds
import numpy as np
import pytest

from vpt_jax.data import pictures
from vpt_jax.data.public import records, vtab

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
SMALL = {"train800": 800, "val200": 200}
SIZES = {name: sizes for names, sizes in SIZES.items() for name in names.split()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fixtures_tfds.write(tmp_path_factory.getbasetemp() / "fixtures_tfds")


def read(row, part, root):
    pairs = [*vtab.load(row, part, data_dir=str(root))]
    return [picture for picture, _ in pairs], np.array([label for _, label in pairs])


def drawn_labels(row, part, root):
    """What was drawn, cut by the numbers of the part."""
    drawn = fixtures_tfds.read_labels(root)[row.name]
    sizes = {split: len(labels) for split, labels in drawn.items()}
    run = vtab.part_runs(row, sizes)[part]
    return drawn[run.split][run.start : run.stop]


def probe(train, test):
    """Right answers of ridge regression on pixels, and of the most frequent class."""

    def design(images):
        return np.stack(
            [pictures.to_square(x, 16, "squash").ravel() for x in images]
        ) / np.float32(255)

    x, y = (values[:400] for values in train)  # enough, and quicker
    x_test, y_test = test
    x, x_test = design(x), design(x_test)
    mean, targets = x.mean(0), np.eye(y.max() + 1, dtype=np.float32)[y]
    gram = (x - mean) @ (x - mean).T + 3 * np.eye(len(x), dtype=np.float32)
    weights = (x - mean).T @ np.linalg.solve(gram, targets - targets.mean(0))
    logits = (x_test - mean) @ weights + targets.mean(0)
    frequent = (y_test == np.bincount(y).argmax()).mean()
    return (logits.argmax(-1) == y_test).mean(), frequent


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_every_part_of_every_benchmark(row, root):
    small = row.group != "fgvc"
    chosen = ("train800", "val200", "test") if small else ("train", "val", "test")
    parts = ("train", "val", "test")
    lengths = [len(vtab.load(row, part, data_dir=str(root))) for part in parts]
    assert tuple(lengths) == SIZES[row.name]
    plain = row.label is vtab.BENCHMARKS["svhn"].label
    if small and plain and row.name != "svhn":
        chosen = chosen[1:]  # one of this kind is read as a whole
    found = {part: read(row, part, root) for part in chosen}
    digests = [
        hashlib.sha256(repr(x.shape).encode() + x.tobytes()).digest()
        for images, _ in found.values()
        for x in images
    ]
    assert len(set(digests)) == len(digests)  # no picture twice, nor in two parts
    for part, (_, labels) in found.items():
        assert labels.tolist() == drawn_labels(row, part, root)
        assert 0 <= labels.min() and labels.max() < row.classes
        assert len(np.unique(labels)) >= 2
    accuracy, frequent = probe(found[chosen[0]], found["test"])
    assert accuracy > max(0.5, frequent + 0.1), (accuracy, frequent)
    if small:
        sizes = {part: len(vtab.load(row, part, data_dir=str(root))) for part in SMALL}
        assert sizes == SMALL


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


def test_derived_labels_meet_hard_cases(root):
    """Depths on thresholds, scenes without objects, people nearer than cars."""
    examples = records.open_split(root / "kitti/3.3.0", "train")
    scenes = [
        (
            np.asarray(example["objects"]["type"]),
            np.asarray(example["objects"]["location"]).reshape(-1, 3)[:, 2],
        )
        for example in examples
    ]
    assert any(len(kind) == 0 for kind, _ in scenes)
    assert any(len(kind) and kind.min() > 2 for kind, _ in scenes)
    mixed = [(k, z) for k, z in scenes if (k < 3).any()]
    assert {8.0, 20.0} <= {float(z[k < 3].min()) for k, z in mixed}
    assert any(k[z.argmin()] > 2 for k, z in mixed)
