# SPDX-License-Identifier: Apache-2.0
"""Random and centre crops out of one array, against Pillow and NumPy."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vpt_jax
from vpt_jax import train
from vpt_jax.data import pictures, strips
from vpt_jax.run import probe

RNG = np.random.default_rng(0)
SIDE, HEIGHT = 14, 16
# As decoded, (height, width): square, wide, tall, thin, small, of the size already.
SIZES = ((50, 50), (30, 41), (41, 30), (20, 320), (9, 8), (16, 16), (14, 14), (33, 100))
KEY = jax.random.key(7)


def noise(sizes=SIZES):
    return [RNG.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]


def resized(x):
    """What torchvision's `Resize(16)` makes of a picture, with its formula."""
    h, w = x.shape[:2]
    size = (int(16 * w / h), 16) if h < w else (16, int(16 * h / w))
    return np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BILINEAR))


def lay(examples):
    whole = [resized(x) for x in examples]
    wide = [x.shape[1] > x.shape[0] for x in whole]
    parts = [x.transpose(1, 0, 2) if w else x for x, w in zip(whole, wide, strict=True)]
    return strips.make(np.concatenate(parts), [len(p) for p in parts], wide)


EXAMPLES = noise()
STRIP = lay(EXAMPLES)
ON_DEVICE = jax.tree.map(jnp.asarray, STRIP)


# Of the longest picture, 12 for each of its 243 x 3 windows and their mirror images: a
# window is missed with a probability of 6 in 10^6.
DRAWS = 12 * 243 * 3 * 2
TAKE = jax.jit(strips.take)


def draws(i):
    """Random crops of one picture."""
    return np.asarray(TAKE(ON_DEVICE, jnp.full(DRAWS, i), KEY))


def windows(x):
    """Every crop of a resized picture, as bytes, to its `(top, left, flipped)`."""
    h, w = x.shape[:2]
    found = {}
    for top in range(h - SIDE + 1):
        for left in range(w - SIDE + 1):
            crop = x[top : top + SIDE, left : left + SIDE]
            found[crop.tobytes()] = top, left, False
            found[crop[:, ::-1].tobytes()] = top, left, True
    return found


@pytest.mark.parametrize("i", range(len(SIZES)), ids=[str(size) for size in SIZES])
def test_every_window_of_the_resized_picture_occurs_and_is_equally_likely(i):
    possible = windows(resized(EXAMPLES[i]))
    found = collections.Counter(possible[crop.tobytes()] for crop in draws(i))
    assert found.keys() == set(possible.values())
    counts, expected = np.array([*found.values()]), DRAWS / len(found)
    # Chi-square: its mean is the degrees of freedom, its variance twice that.
    free = len(found) - 1
    assert ((counts - expected) ** 2 / expected).sum() < free + 3 * (2 * free) ** 0.5


def test_examples_of_a_batch_are_cropped_independently():
    index = jnp.zeros(64, int)
    first = np.asarray(strips.take(ON_DEVICE, index, KEY))
    assert len({crop.tobytes() for crop in first}) > 10
    again = np.asarray(strips.take(ON_DEVICE, index, KEY))
    np.testing.assert_array_equal(first, again)
    other = np.asarray(strips.take(ON_DEVICE, index, jax.random.key(8)))
    assert not np.array_equal(first, other)


def test_the_centre_is_the_crop_of_the_rule():
    """Also 17 to 40 px long, wide and tall: half pixels are rounded to even."""
    some = noise([(16, n) for n in range(16, 41)])
    some += [*EXAMPLES, *(x.transpose(1, 0, 2) for x in some)]
    index = RNG.permutation(len(some))
    got = np.asarray(strips.view(jax.tree.map(jnp.asarray, lay(some)), index))
    assert got.dtype == np.uint8 and got.shape == (len(some), SIDE, SIDE, 3)
    for image, i in zip(got, index, strict=True):
        picture = Image.fromarray(some[i])
        np.testing.assert_array_equal(image, pictures.centre_crop(picture, SIDE))


def test_the_side_follows_from_the_height():
    for side in range(1, 1000):
        height = pictures.short_side(side)
        strip = strips.make(np.zeros((height, height, 3), np.uint8), [height], [False])
        assert strips.side_of(strip) == side
    # 224, 384 and 448 px are the reference's.
    assert [pictures.short_side(s) for s in (224, 384, 448)] == [256, 438, 512]


def test_joined_strips_hold_the_pictures_of_both():
    first, second = lay(EXAMPLES[:3]), lay(EXAMPLES[3:])
    jax.tree.map(np.testing.assert_array_equal, strips.join(first, second), STRIP)


# --- training on a strip --------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    """A model of 14 px pictures: `(model, backbone, trainable, labels)`."""
    model = vpt_jax.ViT(
        width=16, depth=1, num_heads=2, mlp_dim=24, patch=7, image_size=SIDE
    )
    image = jnp.zeros((1, SIDE, SIDE, 3))
    backbone = jax.jit(model.init)(jax.random.key(0), image)["params"]
    keys = jax.random.split(jax.random.key(1))
    trainable = {
        "prompts": vpt_jax.init_prompts(keys[0], model, 2),
        "head": vpt_jax.init_head(keys[1], model.width, 2),
    }
    return model, backbone, trainable, jnp.arange(len(SIZES), dtype=jnp.int32) % 2


RECIPE = train.Recipe(dropout=0.1)


def epochs(problem, numbers, state=None):
    model, backbone, trainable, labels = problem
    if state is None:
        state = train.init_state(jax.tree.map(jnp.copy, trainable), RECIPE)
    for number in numbers:
        order, mask = train.epoch_order(0, number, len(labels), 3)
        state, metrics = train.train_epoch(
            state,
            backbone,
            ON_DEVICE,
            labels,
            order,
            mask,
            np.full(len(order), 0.1, np.float32),
            jnp.float32(0.0),
            KEY,
            model=model,
            recipe=RECIPE,
        )
    return state, metrics


def test_training_on_a_strip_learns_compiles_once_and_continues_exactly(problem):
    before = train.train_epoch._cache_size()
    first, metrics = epochs(problem, [0])
    stopped = jax.tree.map(np.asarray, first)
    whole, last = epochs(problem, range(1, 20), first)
    assert train.train_epoch._cache_size() == before + 1
    assert last["loss"] < metrics["loss"]
    restored = jax.tree.map(jnp.asarray, stopped)
    again, _ = epochs(problem, range(1, 20), restored)
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_a_step_sees_the_crops_of_its_number(problem):
    model, backbone, trainable, labels = problem
    state = train.init_state(jax.tree.map(jnp.copy, trainable), RECIPE)
    order = np.array([[0, 1, 2], [3, 1, 0], [6, 4, 5]], np.int32)
    rates, decay = jnp.full(3, 0.1, jnp.float32), jnp.float32(0.0)
    step_fn = jax.jit(train.train_step, static_argnames=("model", "recipe"))
    seen = []
    for step, index in enumerate(order):
        crops = jax.random.fold_in(jax.random.fold_in(KEY, 2**31 - 1), step)
        batch = {
            "image": strips.take(ON_DEVICE, jnp.asarray(index), crops),
            "label": labels[index],
            "mask": jnp.ones(3, bool),
        }
        seen.append(np.asarray(batch["image"]))
        state, _ = step_fn(
            state, backbone, batch, rates[step], decay, KEY, model=model, recipe=RECIPE
        )
    assert not np.array_equal(seen[0][1], seen[1][1])
    start = train.init_state(jax.tree.map(jnp.copy, trainable), RECIPE)
    args = (backbone, ON_DEVICE, labels, order, np.ones((3, 3), bool), rates, decay)
    found, _ = train.train_epoch(start, *args, KEY, model=model, recipe=RECIPE)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        # Terms are of up to 10, whose last digit is 1e-6: steps in a loop add them in
        # another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_features_and_accuracy_of_a_strip_are_those_of_the_centres(problem):
    model, backbone, trainable, labels = problem
    centres = np.asarray(strips.view(ON_DEVICE, np.arange(len(SIZES))))
    got, expected = (
        probe.extract_features(
            backbone, images, model=model, normalisation="half", batch_size=3
        )
        for images in (ON_DEVICE, centres)
    )
    np.testing.assert_array_equal(got, expected)
    assert got.shape == (len(SIZES), 16)
