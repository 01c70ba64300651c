# SPDX-License-Identifier: Apache-2.0
"""From a prepared tfds directory to a task, and to a row of the report."""

from pathlib import Path

import jax
import numpy as np
import pytest
import test_records
from PIL import Image
from test_vtab import toy

from vpt_jax.data import pictures, strips, tasks
from vpt_jax.data.public import prepared, vtab

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Twelve train and four test pictures, under the name of a VTAB task."""
    test_records.make(tmp_path / "toy" / "1.0.0", "array_record")
    monkeypatch.setitem(vtab.BENCHMARKS, "svhn", toy(name="svhn"))
    monkeypatch.setattr(vtab, "NUM_TRAIN", 4)
    monkeypatch.setattr(vtab, "NUM_VAL", 2)
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))
    return str(tmp_path)


def as_decoded(split, i):
    picture, _, _ = test_records.example(split, i)
    picture = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, -1)
    return Image.fromarray(picture[..., :3])  # alpha is dropped, as TensorFlow does


def test_a_task_has_the_pictures_that_were_written(data_dir):
    task = tasks.load_task("svhn", image_size=16, data_dir=data_dir)
    assert task.train.labels.tolist() == [0, 1, 2, 3]
    assert task.val.labels.tolist() == [6, 7]
    assert task.test.labels.tolist() == [0, 1, 2, 3]
    for split, first in ((task.train, 0), (task.val, 6)):
        for i, image in enumerate(split.images):
            picture = np.asarray(as_decoded("train", first + i))
            expected = pictures.resize_bilinear(picture[None], 16, "corner")[0]
            np.testing.assert_array_equal(image, expected)


def test_only_what_is_needed_is_read(data_dir, monkeypatch):
    parts, load = [], vtab.load

    def listening(row, part, **options):
        parts.append(part)
        return load(row, part, **options)

    monkeypatch.setattr(vtab, "load", listening)
    task = tasks.load_task("svhn", image_size=8, data_dir=data_dir, splits="select")
    assert task.test is None and parts == ["train800", "val200"]
    everything = tasks.load_task("svhn", image_size=8, data_dir=data_dir)
    final = tasks.load_task("svhn", image_size=8, data_dir=data_dir, splits="final")
    assert parts == ["train800", "val200", "test"]  # each once, and no fourth file
    assert len(list(Path(data_dir, "cache", "pictures").iterdir())) == 3
    assert final.val is None
    np.testing.assert_array_equal(final.test.images, everything.test.images)
    for k in range(2):  # pictures, labels
        parts = everything.train[k], everything.val[k]
        np.testing.assert_array_equal(final.train[k], np.concatenate(parts))
    with pytest.raises(ValueError, match="unknown splits 'test'; choose one of 'all'"):
        tasks.load_task("svhn", data_dir=data_dir, splits="test")


def test_tasks_with_the_same_pictures_share_a_file(data_dir, monkeypatch):
    plain = vtab.BENCHMARKS["svhn"]
    backwards = plain._replace(name="dtd", label=lambda e: 19 - int(e["label"]))
    monkeypatch.setitem(vtab.BENCHMARKS, "dtd", backwards)
    dark = plain._replace(name="dmlab", picture=lambda e: 0 * plain.picture(e))
    monkeypatch.setitem(vtab.BENCHMARKS, "dmlab", dark)
    options = {"rule": "corner", "data_dir": data_dir}
    images, labels = prepared.arrays(plain, "test", 8, **options)
    assert labels.tolist() == [0, 1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(vtab, "load", None)
        same, others = prepared.arrays(backwards, "test", 8, **options)
        with pytest.raises(TypeError):  # another rule is another file
            prepared.arrays(plain, "test", 8, **options | {"rule": "squash"})
    assert others.tolist() == [19, 18, 17, 16] and others.dtype == np.int32
    np.testing.assert_array_equal(same, images)
    black, labels = prepared.arrays(dark, "test", 8, **options)
    assert labels.tolist() == [0, 1, 2, 3] and not black.any() and images.any()
    # A row that is not in the table keeps its labels for itself.
    renamed = plain._replace(name="my own")
    assert prepared.arrays(renamed, "test", 8, **options)[1].tolist() == [0, 1, 2, 3]


def test_the_tasks_that_share_pictures():
    found = {}
    for row in vtab.BENCHMARKS.values():
        found.setdefault((row.source.name, row.picture), []).append(row.name)
    assert [names for names in found.values() if len(names) > 1] == [
        ["oxford_flowers102", "flowers"],  # but for the rule and the parts
        ["clevr_count", "clevr_distance"],
        ["dsprites_location", "dsprites_orientation"],
        ["smallnorb_azimuth", "smallnorb_elevation"],
    ]


@pytest.mark.parametrize("splits", tasks.SPLITS)
def test_a_fine_grained_set_trains_on_crops(data_dir, monkeypatch, splits):
    """Pictures of 3 x 4 to 14 x 4 px; `crop` of 14 px has the short side at 16."""
    monkeypatch.setitem(vtab.BENCHMARKS, "cub", toy(name="cub", group="fgvc"))
    options = {"image_size": 14, "data_dir": data_dir, "splits": splits}
    task = tasks.load_task("cub", **options)
    numbers = [*range(12)] if splits == "final" else [*range(6)]
    assert task.train.labels.tolist() == numbers
    strip = task.train.images
    assert isinstance(strip, strips.Strip) and strips.side_of(strip) == 14
    for i in numbers:
        width, height = as_decoded("train", i).size
        assert (width, height) == (4, 3 + i)
        size = (max(16, 16 * 4 // (3 + i)), max(16, 16 * (3 + i) // 4))
        whole = as_decoded("train", i).resize(size, Image.Resampling.BILINEAR)
        start, length = strip.start[i], strip.length[i]
        pixels = strip.pixels[start : start + length]
        pixels = pixels.swapaxes(0, 1) if strip.wide[i] else pixels
        np.testing.assert_array_equal(pixels, np.asarray(whole))
    for split, name, first in ((task.val, "train", 6), (task.test, "test", 0)):
        if split is None:
            assert splits == ("final" if name == "train" else "select")
            continue
        for i, image in enumerate(split.images):
            picture = as_decoded(name, first + i)
            np.testing.assert_array_equal(image, pictures.centre_crop(picture, 14))
    # From the cache alone.
    monkeypatch.setattr(vtab, "load", None)
    again = tasks.load_task("cub", **options)
    jax.tree.map(np.testing.assert_array_equal, task[2:], again[2:])


def test_a_picture_that_is_too_long_is_named(data_dir, monkeypatch):
    monkeypatch.setattr(pictures, "_LONGEST", 1)
    row = toy(name="cub", group="fgvc")
    with pytest.raises(
        ValueError, match="cub train, example 0: got a picture of 4 x 3"
    ):
        prepared.strip(row, "train", 14, data_dir=data_dir)
    assert not any(Path(data_dir, "cache", "pictures").iterdir())


def test_other_files_are_read_anew(data_dir, capsys):
    row = vtab.BENCHMARKS["svhn"]
    prepared.arrays(row, "test", 8, rule="corner", data_dir=data_dir)
    capsys.readouterr()
    test_records.make(vtab.find(row, data_dir).parent / "1.0.1", "tfrecord")
    prepared.arrays(row, "test", 8, rule="corner", data_dir=data_dir)
    assert capsys.readouterr().out == "reading svhn test: 0 of 4, once\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "nowhere"}, "svhn: got no prepared copy"),
        ({"skip_broken": True}, "skip_broken for 'folder' alone"),
        ({"name": "cub", "resize": "crop"}, "for task 'cub'; expected resize for"),
    ],
)
def test_what_cannot_be_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load_task(**{"name": "svhn", **options})
