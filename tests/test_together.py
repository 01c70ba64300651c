# SPDX-License-Identifier: Apache-2.0
"""Many runs in one program are the runs one by one.

Random numbers are the same bits. A matrix product of more rows is summed in another
order on some backends (on CPU from a few hundred numbers on), so the rest is the same
to float32's rounding, which momentum carries along: 1e-4 after a few steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vpt_jax
from vpt_jax import together, train

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax's Adam
NUM = (3, 2)
EPOCHS, BATCH = 3, 4
SGD = train.Recipe(dropout=0.2)
ADAM = train.Recipe(optimizer="adamw", dropout=0.2)


def make_backbone(model):
    """Random numbers in all parameters; nothing is compiled for them."""
    side, rng = model.image_size, np.random.default_rng(0)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes
    )


@pytest.fixture(scope="module")
def model():
    return vpt_jax.ViT(
        width=16, depth=2, num_heads=2, mlp_dim=24, patch=4, image_size=8
    )


@pytest.fixture(scope="module")
def shared(model):
    """`(backbone, images, labels)`, uint8 pictures; the tests share programs too."""
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.integers(0, 256, (10, 8, 8, 3), np.uint8))
    labels = jnp.asarray(rng.integers(0, 3, 10, np.int32))
    return make_backbone(model), images, labels


def training(model, seed, lr, wd=0.01, keep=None):
    """A run; with `keep`, under a mask of so many prompts."""
    keys = jax.random.split(jax.random.key(seed))
    start = {
        "prompts": vpt_jax.init_prompts(keys[0], model, NUM),
        "head": vpt_jax.init_head(keys[1], model.width, 3),
    }
    rates = train.learning_rates(lr, EPOCHS, 0, 3)
    scores = tuple(jnp.arange(n, dtype=jnp.float32) for n in NUM)
    mask = keep and vpt_jax.keep_mask(scores, keep=keep)
    return together.Training(start, rates, wd, seed, mask)


def alone(run, shared, model, recipe):
    """Prompts and head by `train.train_epoch`."""
    backbone, images, labels = shared
    # The state is donated.
    state = train.init_state(jax.tree.map(jnp.copy, run.trainable), recipe)
    for epoch in range(EPOCHS):
        order, real = train.epoch_order(run.seed, epoch, len(labels), BATCH)
        state, _ = train.train_epoch(
            state,
            backbone,
            images,
            labels,
            order,
            real,
            run.learning_rates[epoch],
            jnp.float32(run.weight_decay),
            jax.random.key(run.seed),
            run.prompt_mask,
            model=model,
            recipe=recipe,
        )
    return state.trainable


def fit(runs, shared, model, recipe, at_once, **kwargs):
    settings = {"model": model, "recipe": recipe, "batch_size": BATCH}
    return together.fit(runs, *shared, at_once=at_once, **settings, **kwargs)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.slow
def test_seeds_and_masks_are_what_each_is_alone(model, shared):
    """Prompts, order, dropout, rates, decay and mask of its own; a partial batch.

    Prompts that are masked do not move.
    """
    runs = [training(model, 0, 0.05, 0.0, keep=1), training(model, 1, 0.2, 0.0, keep=4)]
    for run, got in zip(runs, fit(runs, shared, model, SGD, 2), strict=True):
        own = alone(run, shared, model, SGD)
        assert got.epochs == EPOCHS
        assert_close(got.trainable, own, 1e-4)
        for p, start, keep in zip(
            got.trainable["prompts"],
            run.trainable["prompts"],
            run.prompt_mask,
            strict=True,
        ):
            moved = np.abs(p - start).max(axis=1)
            assert (moved[keep] > 0.01).all() and not moved[~keep].any()


def test_a_grid_is_what_each_of_its_runs_is_alone(model, shared):
    """One seed: the batches and dropout are shared, rates and decay are not."""
    runs = [training(model, 5, 0.005, 0.1), training(model, 5, 0.02, 0.0)]
    for run, got in zip(runs, fit(runs, shared, model, ADAM, 2), strict=True):
        # Adam divides by the gradient's own size: rounding is not small beside it.
        assert_close(got.trainable, alone(run, shared, model, ADAM), 1e-3)


def test_in_parts_one_program_is_compiled_and_places_do_not_matter(model, shared):
    """Five runs, two at a time, the last beside itself; bit for bit in any order."""
    runs = [training(model, seed, 0.05 * (seed + 1), keep=3) for seed in range(5)]
    two = fit(runs[:2], shared, model, SGD, 2)
    before, told = together.train_epoch._cache_size(), []
    found = fit(runs, shared, model, SGD, 2, progress=lambda *news: told.append(news))
    turned = fit(runs[::-1], shared, model, SGD, 2)[::-1]
    assert together.train_epoch._cache_size() == before
    for a, b in zip([*found, *found], [*turned, *two, *found[2:]], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.trainable, b.trainable)
    expected = [[0, 1]] * EPOCHS + [[2, 3]] * EPOCHS + [[4]] * EPOCHS
    assert [list(metrics) for _, metrics in told] == expected
    assert [epoch for epoch, _ in told] == [1, 2, 3] * 3
    assert all(m["loss"] > 0 for _, metrics in told for m in metrics.values())


def test_patches_are_embedded_once_for_a_grid():
    """By XLA's count: what runs share is computed once, and not once per run."""
    model = vpt_jax.ViT(
        width=16, depth=1, num_heads=2, mlp_dim=16, patch=8, image_size=32
    )
    images, backbone = jnp.zeros((4, 32, 32, 3), jnp.uint8), make_backbone(model)
    recipe = train.Recipe(dropout=0.0)
    head = vpt_jax.init_head(jax.random.key(1), 16, 3)
    one = {"prompts": (jnp.zeros((1, 16)),), "head": head}
    states = together.init_states(together.stack([one] * 4), recipe)
    embedding = 2 * 4 * 16 * (8 * 8 * 3) * 16  # 4 pictures of 16 patches

    def flops(order, key):
        lowered = together.train_epoch.lower(
            states,
            backbone,
            images,
            jnp.zeros(4, jnp.int32),
            order,
            jnp.ones((1, 4), bool),
            jnp.ones((4, 1)),
            jnp.ones(4),
            key,
            model=model,
            recipe=recipe,
        )
        return lowered.cost_analysis()["flops"]

    order = jnp.arange(4, dtype=jnp.int32)[None]
    key = jax.random.key(0)
    same = flops(order, key)
    own = flops(jnp.stack([order] * 4), jnp.stack([key] * 4))
    # Three embeddings less, and the first block's queries, keys and values.
    assert own - same > 3 * embedding


@pytest.mark.slow
def test_a_run_that_diverges_ends_alone(model, shared):
    """It keeps its last finite epoch, and its neighbour is as without it."""
    good, bad = training(model, 3, 0.01), training(model, 3, 1e25, wd=1e10)
    told = []

    def tell(epoch, metrics):
        told.append(list(metrics))

    found = fit([good, bad], shared, model, ADAM, 2, progress=tell)
    both = fit([good, good], shared, model, ADAM, 2)
    assert found[0].epochs == EPOCHS > found[1].epochs
    jax.tree.map(np.testing.assert_array_equal, found[0].trainable, both[0].trainable)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found[1].trainable))
    assert told[-1] == [0]
    told.clear()
    # When all have ended no epoch more is trained.
    ended = fit([bad, bad], shared, model, ADAM, 2, progress=tell)
    assert len(told) == ended[0].epochs + 1 and told[-1] == []


def test_answers_of_many_runs_are_those_of_each(model, shared):
    """Also of prefilled prompts, and of one set under a curve of masks."""
    backbone, images, labels = shared
    images, labels = np.asarray(images), np.asarray(labels)
    settings = {"model": model, "recipe": train.Recipe(dropout=0.3), "batch_size": 4}
    runs = [training(model, seed, 0.1).trainable for seed in range(3)]
    one_by_one = [
        train.answers(run, backbone, images, labels, **settings) for run in runs
    ]
    stacked = together.stack(runs)
    found = together.answers(stacked, backbone, images, labels, **settings)
    np.testing.assert_array_equal(found, one_by_one)
    ready = [
        {**run, "prompts": vpt_jax.prefill(model, backbone, run["prompts"])}
        for run in runs
    ]
    found = together.answers(
        together.stack(ready), backbone, images, labels, **settings
    )
    np.testing.assert_array_equal(found, one_by_one)

    scores = tuple(jnp.arange(n, dtype=jnp.float32) for n in NUM)
    masks = [vpt_jax.keep_mask(scores, keep=n) for n in (1, 2, 4)]
    same = together.stack([runs[0]] * 3)
    curve = together.answers(
        same, backbone, images, labels, prompt_mask=together.stack(masks), **settings
    )
    sizes = []
    for mask, right in zip(masks, curve, strict=True):
        alone = train.answers(
            runs[0], backbone, images, labels, prompt_mask=mask, **settings
        )
        np.testing.assert_array_equal(right, alone)
        sizes.append(train.eval_step._cache_size())
    assert sizes[0] == sizes[2]  # one by one, the masks compile once too


def test_stacked_trees_come_apart(model):
    runs = [training(model, seed, 0.1).trainable for seed in range(2)]
    for a, b in zip(together.unstack(together.stack(runs)), runs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_wrong_arguments(model, shared):
    recipe = SGD
    run = training(model, 0, 0.1)
    with pytest.raises(ValueError, match="at_once=0 and 1 runs"):
        fit([run], shared, model, recipe, 0)
    with pytest.raises(ValueError, match="at_once=1 and 0 runs"):
        fit([], shared, model, recipe, 1)
    fewer = {**run.trainable, "prompts": tuple(p[:1] for p in run.trainable["prompts"])}
    with pytest.raises(ValueError, match="run 1 has shapes"):
        fit([run, run._replace(trainable=fewer)], shared, model, recipe, 2)
    order, real = train.epoch_order(0, 0, 10, 4)
    with pytest.raises(ValueError, match="one key for runs that see the same"):
        together.train_epoch(
            together.init_states(together.stack([run.trainable]), recipe),
            *shared,
            order,
            real,
            jnp.ones((1, 3)),
            jnp.ones(1),
            jnp.stack([jax.random.key(0)]),
            model=model,
            recipe=recipe,
        )
