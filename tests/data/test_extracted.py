# SPDX-License-Identifier: Apache-2.0
"""VTAB-1k as PETL code has it extracted."""

import numpy as np
import pytest
from PIL import Image

from vpt_jax.data import tasks
from vpt_jax.data.public import extracted

SIZES = {"train800": 800, "val200": 200, "test": 30}
CLASSES = 10  # of svhn


def write(root, name, sizes=None, classes=CLASSES):
    """A task's folder: a few pictures, which lists name again and again."""
    folder = root / name
    (folder / "images").mkdir(parents=True)
    labels = {}
    for which, size in {**SIZES, **(sizes or {})}.items():
        labels[which] = [(7 * k) % classes for k in range(size)]
        rows = []
        for number, label in enumerate(labels[which]):
            path = f"images/{which}{number}.png"
            noise = np.random.default_rng((len(which), number)).integers(0, 255, (8, 8))
            Image.fromarray(noise.astype(np.uint8)).save(folder / path)
            rows.append(f"{path} {label}")
        (folder / f"{which}.txt").write_text("\n".join(rows))
    return labels


@pytest.fixture(scope="module")
def vtab_1k(tmp_path_factory):
    root = tmp_path_factory.mktemp("vtab-1k")
    labels = write(root, "svhn")
    write(root, "dsprites_loc", classes=16)
    return root, labels


def test_a_task_is_what_its_lists_say(vtab_1k, tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path))
    root, labels = vtab_1k
    task = tasks.load_task("svhn", image_size=8, data_dir=str(root))
    for split, which in zip(
        (task.train, task.val, task.test), ("train800", "val200", "test"), strict=True
    ):
        np.testing.assert_array_equal(split.labels, labels[which])
    with Image.open(root / "svhn" / "images" / "val2003.png") as picture:
        np.testing.assert_array_equal(task.val.images[3][..., 0], np.asarray(picture))
    assert any("not 26,032" in doubt for doubt in task.doubts)
    final = tasks.load_task("svhn", image_size=8, data_dir=str(root), splits="final")
    expected = labels["train800"] + labels["val200"]  # as train800val200.txt has them
    np.testing.assert_array_equal(final.train.labels, expected)


def test_short_names_are_understood_and_what_lacks_is_known(vtab_1k):
    root = str(vtab_1k[0])
    assert extracted.find("dsprites_location", root).name == "dsprites_loc"
    assert extracted.find("dtd", root) is None and extracted.find("svhn", "") is None
    names = ["svhn", "dtd", "dsprites_location", "cifar100"]
    assert extracted.missing(names, root) == ["dtd", "cifar100"]
    assert extracted.missing(["dtd", "cifar100"], root) == []  # another layout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {"val200": 100}}, "got 800 pictures to train on, 100 to choose on"),
        ({"classes": 9}, "of 9 classes; expected 800 and 200, of 10"),
    ],
)
def test_what_is_not_vtab_1k_is_refused(changes, message, tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))
    write(tmp_path, "svhn", **changes)
    with pytest.raises(ValueError, match=message):
        tasks.load_task("svhn", image_size=8, data_dir=str(tmp_path))
