# SPDX-License-Identifier: Apache-2.0
"""VTAB-1k as PETL code has it extracted."""

import numpy as np
import pytest
from PIL import Image

from vpt_jax.data import tasks
from vpt_jax.data.public import extracted, vtab

SIZES = {"train800": 20, "val200": 10, "test": 10}


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vtab, "NUM_TRAIN", SIZES["train800"])
    monkeypatch.setattr(vtab, "NUM_VAL", SIZES["val200"])


def write(folder, classes=10, **sizes):
    """A task's folder; returns the labels of its lists."""
    (folder / "images").mkdir(parents=True)
    labels, rng = {}, np.random.default_rng(0)
    for which, size in (SIZES | sizes).items():
        labels[which] = [(7 * k) % classes for k in range(size)]
        rows = []
        for number, label in enumerate(labels[which]):
            path = f"images/{which}{number}.png"
            Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / path)
            rows.append(f"{path} {label}")
        (folder / f"{which}.txt").write_text("\n".join(rows))
    return labels


def test_a_task_is_what_its_lists_say(tmp_path):
    labels = write(tmp_path / "svhn")
    options = {"image_size": 8, "data_dir": str(tmp_path)}
    task = tasks.load_task("svhn", **options)
    for split, which in zip(task[2:5], SIZES, strict=True):
        np.testing.assert_array_equal(split.labels, labels[which])
    with Image.open(tmp_path / "svhn" / "images" / "val2003.png") as picture:
        np.testing.assert_array_equal(task.val.images[3][..., 0], np.asarray(picture))
    assert any("not 26,032" in doubt for doubt in task.doubts)
    final = tasks.load_task("svhn", **options, splits="final")
    expected = labels["train800"] + labels["val200"]  # as train800val200.txt has them
    np.testing.assert_array_equal(final.train.labels, expected)


def test_short_names_are_understood_and_what_lacks_is_known(tmp_path):
    for name in ("svhn", "dsprites_loc"):
        write(tmp_path / name)
    root = str(tmp_path)
    assert extracted.find("dsprites_location", root).name == "dsprites_loc"
    assert extracted.find("dtd", root) is None and extracted.find("svhn", "") is None
    names = ["svhn", "dtd", "dsprites_location", "cifar100"]
    assert extracted.missing(names, root) == ["dtd", "cifar100"]
    assert extracted.missing(["dtd", "cifar100"], root) == []  # another layout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val200": 5}, "got 20 pictures to train on, 5 to choose on"),
        ({"classes": 9}, "of 9 classes; expected 800 and 200, of 10"),
    ],
)
def test_what_is_not_vtab_1k_is_refused(changes, message, tmp_path):
    write(tmp_path / "svhn", **changes)
    with pytest.raises(ValueError, match=message):
        tasks.load_task("svhn", image_size=8, data_dir=str(tmp_path))
