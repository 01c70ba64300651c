# SPDX-License-Identifier: Apache-2.0
"""Invariants of the drawn shapes, of the resizing, and of the splits of every task."""

import functools
import importlib.resources
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.data import shapes, strips, tasks


@pytest.fixture(autouse=True, scope="module")
def loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        for name, loader in list(tasks.TASKS.items()):
            patch.setitem(tasks.TASKS, name, functools.cache(loader))
        yield


def all_sprites(x=15, y=15):
    """Latents of every shape, scale and orientation at one position."""
    sprites = np.stack(np.indices(shapes.GRID[:3]), -1).reshape(-1, 3)
    return np.concatenate([sprites, np.full((len(sprites), 2), (x, y))], axis=1)


def centroids(images):
    """Brightness-weighted mean of the pixel centres, `(x, y)` in px, `[n, 2]`."""
    grey = images[..., 0].astype(np.float64)
    at = np.arange(grey.shape[1]) + 0.5
    total = grey.sum((1, 2))
    return np.stack([grey.sum(1) @ at / total, grey.sum(2) @ at / total], axis=1)


# Shapes.


def test_draw_gives_grey_antialiased_pictures():
    images = shapes.draw(shapes.sample_latents(200, 0))
    assert images.shape == (200, 32, 32, 3)
    assert images.dtype == np.uint8
    assert (images == images[..., :1]).all()
    # 17 levels of coverage by 16 samples, each of them met, from 0 to 255.
    levels = [int(k * 255 / 16 + 0.5) for k in range(17)]
    assert np.unique(images).tolist() == levels
    assert (images.max((1, 2, 3)) == 255).all()


@pytest.mark.parametrize("column, axis", [(3, 2), (4, 1)])
def test_draw_is_translation_equivariant(column, axis):
    here = shapes.sample_latents(100, seed=1)
    here = here[here[:, column] < 22]
    there = here.copy()
    there[:, column] += 10  # steps of half a pixel
    moved = np.roll(shapes.draw(here), 5, axis)
    np.testing.assert_array_equal(shapes.draw(there), moved)


def test_ten_steps_of_orientation_turn_the_frame_by_90_degrees():
    latents = shapes.sample_latents(200, seed=2)
    shape, scale, orientation, x, y = latents.T
    turned = np.stack([shape, scale, orientation + 10, y, 31 - x], axis=1)
    expected = np.rot90(shapes.draw(latents), axes=(1, 2))
    np.testing.assert_array_equal(shapes.draw(turned), expected)
    whole = latents + np.array([0, 0, -40, 0, 0])
    np.testing.assert_array_equal(shapes.draw(whole), shapes.draw(latents))


def test_heart_and_arrow_are_their_own_mirror_image_and_L_is_not():
    latents = all_sprites(x=6, y=20)
    mirrored = latents.copy()
    mirrored[:, 2] = -latents[:, 2]
    mirrored[:, 3] = 31 - latents[:, 3]
    same = (shapes.draw(mirrored) == shapes.draw(latents)[:, :, ::-1]).all((1, 2, 3))
    assert same[latents[:, 0] != 2].all()
    assert not same[latents[:, 0] == 2].any()


def test_no_shape_looks_alike_in_two_orientations():
    for size in (0, 5):
        for shape in range(3):
            latents = np.array([[shape, size, k, 15, 15] for k in range(40)])
            grey = shapes.draw(latents)[..., 0].reshape(40, -1).astype(np.float64)
            apart = np.abs(grey[:, None] - grey[None]).sum(-1) / 255
            np.fill_diagonal(apart, np.inf)
            assert apart.min() > 1.0  # px of area, for neighbours 9 degrees apart
            turns = (np.arange(40)[:, None] - np.arange(40)) % 40
            far = apart[(turns >= 5) & (turns <= 35)]  # 45 degrees and more
            assert far.min() > 0.15 * grey[0].sum() / 255


def test_every_picture_of_the_grid_is_another():
    # By translation, the four half-pixel phases stand for all positions.
    for x, y in [(14, 14), (15, 14), (14, 15), (15, 15)]:
        images = shapes.draw(all_sprites(x, y))
        assert len({image.tobytes() for image in images}) == 720


@pytest.mark.parametrize("at", [0, 31])
def test_nothing_is_cut_off_at_the_corners(at):
    largest = all_sprites()[:, 1] == 5
    corner = shapes.draw(all_sprites(at, at)[largest]).sum((1, 2, 3), dtype=np.int64)
    same_phase = 15 if at else 16
    middle = shapes.draw(all_sprites(same_phase, same_phase)[largest])
    np.testing.assert_array_equal(corner, middle.sum((1, 2, 3), dtype=np.int64))
    # So the sums say something: no shape in the middle touches the frame.
    assert not middle[:, [0, -1]].any() and not middle[:, :, [0, -1]].any()


def test_area_grows_with_the_square_of_the_scale():
    latents = all_sprites()
    area = shapes.draw(latents)[..., 0].sum((1, 2), dtype=np.float64) / 255
    area = area.reshape(3, 6, 40).mean(-1)
    ratio = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]) ** 2
    np.testing.assert_allclose(area / area[:, 5:], np.tile(ratio, (3, 1)), rtol=0.02)
    # Areas of the formulas, by hand, at a radius of 8 px.
    heart, arrow, ell = 0.49 * (2 + np.pi / 2), 0.675 + 0.45, 1.0
    np.testing.assert_allclose(
        area[:, 5], 64 * np.array([heart, arrow, ell]), rtol=0.01
    )


@pytest.mark.parametrize("x, y", [(0, 31), (15, 16)])
def test_the_centroid_is_at_the_position(x, y):
    found = centroids(shapes.draw(all_sprites(x, y)))
    at = [8.25 + 0.5 * x, 8.25 + 0.5 * y]
    np.testing.assert_allclose(found, np.tile(at, (720, 1)), atol=0.2)
    np.testing.assert_allclose(found.mean(0), at, atol=0.01)


def test_sampled_latents_are_distinct_and_cover_the_grid():
    latents = shapes.sample_latents(3000, seed=4)
    assert len(np.unique(latents, axis=0)) == 3000
    for column, size in enumerate(shapes.GRID):
        assert np.unique(latents[:, column]).tolist() == list(range(size))
        expected = 3000 / size
        found = np.bincount(latents[:, column])
        assert np.abs(found - expected).max() < 5 * np.sqrt(expected)
    np.testing.assert_array_equal(latents, shapes.sample_latents(3000, seed=4))
    assert (latents != shapes.sample_latents(3000, seed=5)).any()


def test_what_is_unknown_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown task 'mnist'.*digits.*shapes_location"
    ):
        tasks.load_task("mnist")
    with pytest.raises(ValueError, match="got image_size=0; expected at least 1"):
        tasks.load_task("digits", image_size=0)


def test_bins():
    latents = np.array([[0, 0, 7, x, 9] for x in range(32)])
    labels, names = shapes.label_latents("location", latents)
    assert labels.dtype == np.int32
    assert labels.tolist() == [k for k in range(16) for _ in range(2)]
    assert len(names) == 16 and names[0] == "x 0-1" and names[-1] == "x 30-31"
    latents = np.array([[0, 0, o, 7, 9] for o in range(40)])
    labels, names = shapes.label_latents("orientation", latents)
    assert labels.tolist() == [2 * o // 5 for o in range(40)]
    assert len(names) == 16
    assert names[:2] == ("0-18 deg", "27-36 deg") and names[-1] == "342-351 deg"


def test_labels_follow_the_pictures():
    images, labels, _ = shapes.make_shapes("location", 500, seed=6)
    x = np.rint((centroids(images)[:, 0] - 8.25) / 0.5)
    np.testing.assert_array_equal(labels, x // 2)
    # The same pictures, whose orientation is known by how they were drawn.
    same, labels, _ = shapes.make_shapes("orientation", 500, seed=6)
    latents = shapes.sample_latents(500, seed=6)
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(same, shapes.draw(latents))
    np.testing.assert_array_equal(labels, 2 * latents[:, 2] // 5)


# Resizing.


@pytest.mark.parametrize("h, w, side", [(8, 8, 32), (28, 28, 20), (1, 6, 6)])
def test_resize_agrees_with_jax(h, w, side):
    # More pictures than one chunk holds.
    images = np.random.default_rng(0).integers(0, 256, (70, h, w, 3), np.uint8)
    expected = jax.image.resize(
        jnp.asarray(images, jnp.float32), (70, side, side, 3), "bilinear", False
    )
    out = tasks.resize_bilinear(images, side)
    assert out.dtype == np.uint8 and out.shape == (70, side, side, 3)
    # Half a level of rounding, and float32 on the other side.
    assert np.abs(out - np.asarray(expected, np.float64)).max() < 0.501


# Tasks that need no files.


# Of each: the number of test pictures and classes, and a checksum. A change of it makes
# every result on the task incomparable with earlier ones.
MADE_HERE = {
    "digits": (797, 10, "bdd819e3"),
    "shapes_location": (2000, 16, "bdb01053"),
    "shapes_orientation": (2000, 16, "6e35b92a"),
    "sign_digits": (1000, 10, "694a3a92"),
}


@pytest.mark.parametrize("name", MADE_HERE)
def test_splits_are_whole_and_the_same_on_every_machine(name):
    task, crc = tasks.load_task(name), 0
    num_test, num_classes, checksum = MADE_HERE[name]
    assert task.name == name and len(set(task.class_names)) == num_classes
    for split in task[2:5]:
        assert split.images.shape == (len(split.labels), 32, 32, 3)
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        assert np.unique(split.labels).tolist() == list(range(num_classes))
        crc = zlib.crc32(split.images.tobytes(), crc)
        crc = zlib.crc32(split.labels.astype("<i4").tobytes(), crc)
    assert [len(split.labels) for split in task[2:5]] == [800, 200, num_test]
    assert f"{crc:08x}" == checksum
    pictures = [x.tobytes() for split in task[2:5] for x in split.images]
    assert len(set(pictures)) == len(pictures)  # in one split alone


# One of each loader.
@pytest.mark.parametrize("name", ["digits", "shapes_location", "sign_digits"])
def test_image_size_changes_the_pictures_only(name):
    plain, large = tasks.load_task(name), tasks.load_task(name, image_size=48)
    assert large.class_names == plain.class_names
    for a, b in zip(plain[2:5], large[2:5], strict=True):
        np.testing.assert_array_equal(a.labels, b.labels)
        assert b.images.shape == (len(a.labels), 48, 48, 3)
        # Enlarging keeps the mean brightness, up to the edges.
        means = [x.images.mean((1, 2, 3)) for x in (a, b)]
        np.testing.assert_allclose(*means, atol=3.0)


def test_digits_are_the_asset_in_another_order():
    task = tasks.load_task("digits", image_size=8)
    asset = importlib.resources.files("vpt_jax") / "assets" / "digits.npz"
    with asset.open("rb") as f:
        arrays = np.load(f)
        cells, labels = arrays["images"], arrays["labels"]
    assert cells.shape == (1797, 8, 8) and cells.dtype == np.uint8
    assert cells.min() == 0 and cells.max() == 16
    # The counts per digit that UCI gives for this part of the data set.
    expected = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(labels).tolist() == expected
    images = np.concatenate([s.images for s in task[2:5]])
    assert (images == images[..., :1]).all()
    back = np.rint(images[..., 0] / 255 * 16).astype(np.uint8)
    found = zip(
        back.reshape(1797, -1).tolist(),
        np.concatenate([s.labels for s in task[2:5]]).tolist(),
        strict=True,
    )
    source = zip(cells.reshape(1797, -1).tolist(), labels.tolist(), strict=True)
    assert sorted(found) == sorted(source)


def test_splits_to_choose_by_and_to_report():
    task = tasks.load_task("digits")
    select = tasks.load_task("digits", splits="select")
    assert select.test is None
    final = tasks.load_task("digits", splits="final")
    assert final.val is None and len(final.train.labels) == 1000
    for a, b in ((select.train, task.train), (select.val, task.val)):
        np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(final.test.images, task.test.images)
    for k in range(2):  # pictures, labels
        joined = np.concatenate([task.train[k], task.val[k]])
        np.testing.assert_array_equal(final.train[k], joined)


# check_task.


def tiny_task(num_classes=3):
    labels = np.arange(6, dtype=np.int32) % num_classes
    split = tasks.Split(np.zeros((6, 4, 4, 3), np.uint8), labels)
    names = tuple(f"class {k}" for k in range(num_classes))
    return tasks.Task("tiny", names, split, split, split)


# Pictures of 4, 5 and 6 px by 4.
STRIP = strips.make(np.zeros((15, 4, 3), np.uint8), [4, 5, 6], [False, True, True])


@pytest.mark.parametrize(
    "which, change, message",
    [
        ("train", lambda x, y: (x.astype(np.float32), y), "images float32.*uint8"),
        ("train", lambda x, y: (x[..., 0], y), r"\[6, 4, 4\].*\[n, h, w, 3\]"),
        ("train", lambda x, y: (x[..., :1], y), r"\[6, 4, 4, 1\]"),
        ("val", lambda x, y: (x, y.astype(np.int64)), "int64.*int32"),
        ("val", lambda x, y: (x, y[:, None]), r"labels int32 \[6, 1\].*int32 \[n\]"),
        ("val", lambda x, y: (x[:5], y), "5 images and 6 labels"),
        ("test", lambda x, y: (x[:0], y[:0]), "got 0 images"),
        ("test", lambda x, y: (x, y + np.int32(1)), "1 to 3; expected 0 to 2"),
        ("test", lambda x, y: (x, y - np.int32(1)), "labels from -1 to 1"),
        ("train", lambda x, y: (STRIP, y), "got 3 images and 6 labels"),
        ("train", lambda x, y: (STRIP._replace(pixels=x), y[:3]), r"\[6, 4, 4, 3\]"),
    ],
)
def test_check_task_refuses(which, change, message):
    task = tiny_task()
    bad = task._replace(**{which: tasks.Split(*change(*getattr(task, which)))})
    with pytest.raises(ValueError, match=f"'tiny', split '{which}'.*{message}"):
        tasks.check_task(bad)


def test_check_task_takes_a_strip_a_split_less_and_a_class_that_is_absent():
    task = tiny_task()
    wide = task._replace(class_names=(*task.class_names, "absent"))
    train = tasks.Split(STRIP, np.arange(3, dtype=np.int32))
    for good in (task, wide, task._replace(train=train, val=None, test=None)):
        assert tasks.check_task(good) is good


def test_check_task_refuses_one_class():
    task = tiny_task()
    train = task.train._replace(labels=np.full(6, 2, np.int32))
    with pytest.raises(ValueError, match=r"only class \[2\].*at least 2 classes"):
        tasks.check_task(task._replace(train=train))
