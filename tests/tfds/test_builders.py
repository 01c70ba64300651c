# SPDX-License-Identifier: Apache-2.0
"""The real tfds builders on raw files of our own, read back without TensorFlow.

One process prepares (with TensorFlow), one reads (without), and this one compares.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vpt_jax.data.public import vtab

HERE = Path(__file__).parent
FORMATS = ("array_record", "tfrecord")
NAMES = tuple(vtab.BENCHMARKS)

if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("needs TensorFlow: bash .ci/tfds", allow_module_level=True)


def run(script, folder):
    # Builders and TensorFlow print a great deal.
    env = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
    command = [sys.executable, str(HERE / script), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-5000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the prepared data sets; `TFDS_FIXTURES` names one that is kept."""
    kept = os.environ.get("TFDS_FIXTURES")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("built")
    if not (folder / "expected.json").exists():
        run("prepare.py", folder)
    run("read_back.py", folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "read_back.json").read_text())


def of_split(benchmark, expected, split):
    """What the raw files say of a split: digest of the picture to the label."""
    known = expected[benchmark.source.name]["examples"]
    # 'any': which split an example is in is the builder's own choice.
    labels = known.get(split, known.get("any"))
    return {key: label[benchmark.name] for key, label in labels.items()}


def test_every_builder_of_the_table_is_here(expected):
    assert set(expected) == {b.source.name for b in vtab.BENCHMARKS.values()}
    assert len(expected) == 20
    for name, known in expected.items():
        assert set(known["shards"].values()) == {3}, name


@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_labels_are_those_of_the_raw_files(name, expected, found):
    benchmark = vtab.BENCHMARKS[name]
    if not expected[benchmark.source.name]["examples"]:
        return  # encoded again by tfds: below
    parts = found["parts"]["tfrecord"][name]
    for part, cut in zip(("train", "val", "test"), benchmark.source.cuts, strict=True):
        known = of_split(benchmark, expected, cut.split)
        assert parts[part]
        for picture, label in parts[part]:
            assert label == known[picture]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "name", ["sun397/tfds", "diabetic_retinopathy_detection/btgraham-300"]
)
def test_labels_of_pictures_that_tfds_encodes_again(name, form, expected, found):
    for split, labels in expected[name]["named"].items():
        examples = dict(found["distances"][form][name][split]["names"])
        assert examples and examples == labels


@pytest.mark.parametrize("name", NAMES)
def test_parts_have_the_right_examples_in_the_right_order(name, found):
    parts = found["parts"]["tfrecord"][name]
    assert parts == found["parts"]["array_record"][name]
    train, val, test = (parts[p] for p in ("train", "val", "test"))
    if "train800" in parts:
        assert parts["train800"] == train[:800]
        assert parts["val200"] == val[:200]
        assert (len(parts["train800"]), len(parts["val200"])) == (800, 200)
    if len({cut.split for cut in vtab.BENCHMARKS[name].source.cuts}) == 1:
        pictures = [picture for picture, _ in train + val + test]
        assert len(set(pictures)) == len(pictures)  # the parts are disjoint
    assert not {picture for picture, _ in test} & {x for x, _ in train + val}


def test_small_parts_of_vtab_1k_are_read_for_three_builders(found):
    parts = found["parts"]["tfrecord"]
    assert {name for name, known in parts.items() if "train800" in known} == {
        "cifar100",
        "svhn",
        "dsprites_location",
        "dsprites_orientation",
    }


@pytest.mark.parametrize(
    "name", sorted({b.source.name for b in vtab.BENCHMARKS.values()})
)
def test_pictures_and_order_are_tensorflows(name, found):
    # Lossless pictures are equal. TensorFlow decodes JPEG with a faster, coarser
    # transform; on noise, its worst case, that is one step of 255 on average.
    lossless = "cifar100 clevr dsprites kitti patch_camelyon smallnorb svhn_cropped"
    for split, distance in found["distances"]["tfrecord"][name].items():
        assert distance["worst"] <= (0 if name in lossless.split() else 8), split
        assert distance["mean"] <= (0 if name in lossless.split() else 1.1), split


def test_sizes_of_the_parts(found):
    sizes = {
        name: [len(parts[p]) for p in ("train", "val", "test")]
        for name, parts in found["parts"]["tfrecord"].items()
    }
    # By hand, from the number of raw files.
    expected = {
        "cifar100": [1800, 200, 40],
        "dtd": [94, 94, 94],
        "oxford_iiit_pet": [29, 8, 37],  # 80 % of 37, rounded down
        "eurosat": [60, 20, 20],
        "resisc45": [81, 27, 27],
        "clevr_count": [36, 4, 40],
        "dsprites_location": [1600, 200, 200],
        "smallnorb_azimuth": [60, 30, 30],
        "diabetic_retinopathy": [10, 4, 6],
        "cub": [18, 2, 20],
        "nabirds": [499, 56, 555],
        "dogs": [108, 12, 120],
        "cars": [27, 3, 30],
    }
    assert sizes | expected == sizes


@pytest.mark.parametrize("name", ["clevr_count", "clevr_distance", "kitti_distance"])
def test_derived_labels_meet_every_class(name, found):
    parts = found["parts"]["tfrecord"][name]
    labels = {label for part in parts.values() for _, label in part}
    assert labels == set(range(vtab.BENCHMARKS[name].classes))
