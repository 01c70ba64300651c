# SPDX-License-Identifier: Apache-2.0
"""The small stand-ins of all benchmarks: every part loads, with its labels."""

import hashlib

import fixtures_tfds
import numpy as np
import pytest
import tfds_files

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
SIZES = {name: sizes for names, sizes in SIZES.items() for name in names.split()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fixtures_tfds.write(tmp_path_factory.getbasetemp() / "fixtures_tfds")


def read(row, part, root):
    pairs = [*vtab.load(row, part, data_dir=str(root))]
    return [picture for picture, _ in pairs], np.array([label for _, label in pairs])


def drawn_labels(row, part, root):
    """What was drawn, cut by the numbers in the part's split expression."""
    drawn = fixtures_tfds.read_labels(root)[row.name]
    sizes = {split: len(labels) for split, labels in drawn.items()}
    out = []
    for run in vtab.split_expressions(row, sizes)[part].split("+"):
        split, _, numbers = run[:-1].partition("[")
        start, stop = (int(x) for x in numbers.split(":"))
        out += drawn[split][start:stop]
    return out


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
    lengths = {
        part: len(vtab.load(row, part, data_dir=str(root))) for part in vtab.PARTS
    }
    train, val, test = SIZES[row.name]
    assert lengths == {
        "train": train,
        "val": val,
        "trainval": train + val,
        "test": test,
    }
    if small:
        both = vtab.load(row, "train800val200", data_dir=str(root))
        assert (len(found["train800"][0]), len(found["val200"][0])) == (800, 200)
        assert len(both) == 1000
        np.testing.assert_array_equal(both[800][0], found["val200"][0][0])


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
    scenes = [
        example["objects"]
        for example in records.open_split(root / "kitti/3.3.0", "train")
    ]
    kinds = [np.asarray(scene["type"]) for scene in scenes]
    depths = [
        np.asarray(s["location"], np.float32).reshape(-1, 3)[:, 2] for s in scenes
    ]
    assert any(len(kind) == 0 for kind in kinds)
    assert any(len(kind) and kind.min() > 2 for kind in kinds)
    near = [z[k < 3].min() for k, z in zip(kinds, depths, strict=True) if (k < 3).any()]
    assert {8.0, 20.0} <= set(near)
    assert any(
        z.argmin() in np.flatnonzero(k > 2) and (k < 3).any()
        for k, z in zip(kinds, depths, strict=True)
        if len(k)
    )


def test_writing_again_gives_the_same_bytes(root, tmp_path):
    chosen = [
        made
        for made in fixtures_tfds.SETS
        if made.sizes == fixtures_tfds.FGVC or made.path.startswith("kitti")
    ]
    again = fixtures_tfds.write(tmp_path / "again", chosen)
    files = [p.relative_to(again) for p in again.rglob("*-of-*")]
    assert len(files) > 10
    for file in files:
        assert (again / file).read_bytes() == (root / file).read_bytes(), file


def test_the_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path, payloads):
        raise OSError("no space left")

    one = fixtures_tfds.SETS[-1:]
    with monkeypatch.context() as patch:
        patch.setitem(tfds_files.WRITERS, "tfrecord", full)
        with pytest.raises(OSError, match="no space left"):
            fixtures_tfds.write(tmp_path / "sets", one)
    assert not list(tmp_path.iterdir())
    root = fixtures_tfds.write(tmp_path / "sets", one)
    assert [p.name for p in tmp_path.iterdir()] == ["sets"]
    with monkeypatch.context() as patch:
        patch.setattr(fixtures_tfds, "write_set", None)  # another test's copy is used
        assert fixtures_tfds.write(root, one) == root
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").touch()
    with pytest.raises(OSError):
        fixtures_tfds.write(tmp_path / "own", one)
    assert [p.name for p in (tmp_path / "own").iterdir()] == ["thesis.txt"]
