# SPDX-License-Identifier: Apache-2.0
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command, make_tiny

import vpt_jax
from scripts.pretrain import crop_and_flip, resize
from vpt_jax import train
from vpt_jax.models.inputs import normalise
from vpt_jax.run import probe

NUM = (2, 0, 3)
KEY = jax.random.key(3)


@pytest.fixture
def problem(tiny):
    """`(model, backbone, trainable, images, labels)`, uint8 pictures."""
    model, backbone = tiny
    keys = jax.random.split(jax.random.key(1), 4)
    trainable = {
        "prompts": vpt_jax.init_prompts(keys[0], model, NUM),
        "head": vpt_jax.init_head(keys[1], model.width, 3),
    }
    images = jax.random.randint(keys[2], (10, 8, 8, 3), 0, 256).astype(jnp.uint8)
    labels = jax.random.randint(keys[3], (10,), 0, 3)
    return model, backbone, trainable, images, labels


def epoch(problem, recipe, state=None, number=0, batch_size=4, lr=0.1, wd=0.01):
    model, backbone, trainable, images, labels = problem
    if state is None:
        # The state is donated; the fixture's arrays must survive.
        state = train.init_state(jax.tree.map(jnp.copy, trainable), recipe)
    order, mask = train.epoch_order(0, number, len(labels), batch_size)
    rates = jnp.full(len(order), lr, jnp.float32), jnp.float32(wd)
    given = state, backbone, images, labels, order, mask, *rates, KEY
    return train.train_epoch(*given, model=model, recipe=recipe)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def gradient(problem, index):
    """Of the mean loss over some examples, without dropout, by jax.grad alone."""
    model, backbone, trainable, images, labels = problem
    return jax.grad(mean_loss)(trainable, backbone, images[index], labels[index], model)


@functools.partial(jax.jit, static_argnums=4)
def mean_loss(trainable, backbone, images, labels, model):
    how = {"model": model, "recipe": train.Recipe()}
    logits = train.predict(trainable, backbone, images, **how)
    return vpt_jax.cross_entropy(logits, {"label": labels}).mean()


@pytest.mark.parametrize("batch_size", [8, 10])
def test_sgd_is_the_coupled_l2_formula_and_a_loss_a_mean_over_real_examples(
    problem, batch_size
):
    """v = 0.9 v + (g + wd p); p = p - lr v; the head's bias does not decay."""
    recipe, lr, wd = train.Recipe(dropout=0.0), 0.1, 0.5
    value, velocity = problem[2], jax.tree.map(jnp.zeros_like, problem[2])
    state = None
    for number in range(2):
        order, mask = train.epoch_order(0, number, 10, batch_size)
        assert mask.sum(1).tolist() == ([8, 2] if batch_size == 8 else [10])
        for row, real in zip(order, mask, strict=True):
            grad = gradient((*problem[:2], value, *problem[3:]), row[real])
            decay = jax.tree.map(lambda p: wd * p, value)
            decay["head"]["bias"] = jnp.zeros(3)
            velocity = jax.tree.map(
                lambda v, g, d: 0.9 * v + g + d, velocity, grad, decay
            )
            value = jax.tree.map(lambda p, v: p - lr * v, value, velocity)
        state, _ = epoch(problem, recipe, state, number, batch_size, lr, wd)
    assert_close(state.trainable, value)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_what_should_move_moves(problem, optimizer):
    backbone, before = jax.tree.map(np.array, problem[1:3])
    for head in (True, False):
        recipe = train.Recipe(optimizer=optimizer, train_head=head)
        # optax's Adam mixes float and int; the strictness is for our own code.
        with jax.numpy_dtype_promotion("standard"):
            state, _ = epoch(problem, recipe)
        assert int(state.step) == 3
        for a, b in zip(state.trainable["prompts"], before["prompts"], strict=True):
            assert a.size == 0 or not np.isclose(a, b, atol=1e-7).any(-1).all()
        for name, own in state.trainable["head"].items():
            assert np.array_equal(own, before["head"][name]) != head
    jax.tree.map(np.testing.assert_array_equal, problem[1], backbone)


def test_the_optimiser_holds_no_state_for_what_is_frozen(problem):
    def numbers(recipe):
        state = train.init_state(problem[2], recipe)
        return sum(x.size for x in jax.tree.leaves(state.opt_state))

    prompts = sum(NUM) * 16
    assert numbers(train.Recipe()) == prompts + 16 * 3 + 3
    assert numbers(train.Recipe(train_head=False)) == prompts


def test_a_sweep_and_a_second_epoch_compile_nothing(problem):
    recipe = train.Recipe(dropout=0.3)  # not used elsewhere
    state, _ = epoch(problem, recipe)
    before = train.train_epoch._cache_size()
    for number, (lr, wd) in enumerate([(0.1, 0.0), (1.0, 0.1)], start=1):
        state, _ = epoch(problem, recipe, state, number, lr=lr, wd=wd)
    assert train.train_epoch._cache_size() == before


def test_dropout_depends_on_the_step_and_not_on_the_history(problem):
    recipe = train.Recipe(dropout=0.5)
    whole, _ = epoch(problem, recipe)
    whole, _ = epoch(problem, recipe, whole, 1)
    first, _ = epoch(problem, recipe)
    restored = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, first))
    again, _ = epoch(problem, recipe, restored, 1)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    without, _ = epoch(problem, train.Recipe(dropout=0.0))
    assert not np.array_equal(without.trainable["prompts"][0], first.trainable)


def test_shared_dropout_is_cheaper_and_is_training_on_what_it_drew(problem):
    """The gradient is that of the prompts with one mask; the work is counted by XLA."""
    recipe = train.Recipe(dropout=0.5, shared_dropout=True)
    model, backbone, trainable, images, labels = problem
    batch = {"image": images, "label": labels, "mask": jnp.ones(10, bool)}

    def lowered(recipe):
        step = functools.partial(train.train_step, model=model, recipe=recipe)
        state = train.init_state(trainable, recipe)
        return jax.jit(step).lower(state, backbone, batch, 1.0, 0.0, KEY)

    step = lowered(recipe).compile()
    state, _ = step(train.init_state(trainable, recipe), backbone, batch, 1.0, 0.0, KEY)
    key, prompts = jax.random.fold_in(KEY, 0), trainable["prompts"]
    drawn = vpt_jax.prompt_dropout(key, prompts, 0.5, None)
    changed = {**trainable, "prompts": drawn}
    grads = gradient((model, backbone, changed, images, labels), np.arange(10))
    moved = jax.tree.map(jnp.subtract, prompts, state.trainable["prompts"])
    pairs = zip(drawn, grads["prompts"], strict=True)
    assert_close(moved, [jnp.where(d == 0, 0.0, 2 * g) for d, g in pairs])
    # Keys and values of 5 prompts, once instead of for 10 examples: the projections,
    # and as much again for the gradient.
    saved = 2 * 2 * 2 * 5 * 16 * 16 * (10 - 1)
    own = lowered(train.Recipe(dropout=0.5)).compile().cost_analysis()["flops"]
    assert own - step.cost_analysis()["flops"] >= saved


def test_training_fits_a_learnable_task(problem):
    recipe = train.Recipe(dropout=0.0)
    state, first = epoch(problem, recipe, lr=0.05, wd=0.0)
    for number in range(1, 40):
        state, last = epoch(problem, recipe, state, number, lr=0.05, wd=0.0)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["accuracy"] > 0.9


def test_a_linear_probe_on_features_is_a_linear_probe_on_pictures(problem):
    model, backbone, trainable, images, labels = problem
    empty = {**trainable, "prompts": tuple(p[:0] for p in trainable["prompts"])}
    features = probe.extract_features(
        backbone, np.asarray(images), model=model, normalisation="half", batch_size=4
    )
    assert features.shape == (10, 16)
    recipe, features = train.Recipe(dropout=0.1), jnp.asarray(features)
    on_pictures, _ = epoch((model, backbone, empty, images, labels), recipe)
    on_features, _ = epoch((None, backbone, empty, features, labels), recipe)
    assert_close(on_features.trainable["head"], on_pictures.trainable["head"])


def test_the_next_batch_is_started_before_a_result_is_read(monkeypatch):
    """And no more than that: two batches are in flight."""
    events = []

    class Result:
        def __init__(self, number):
            self.number = number
            events.append(f"start {number}")

        def __array__(self, dtype=None, copy=None):
            events.append(f"read {self.number}")
            return np.array([True, False])

    monkeypatch.setattr(train, "eval_step", lambda *args, **kwargs: Result(len(events)))
    trainable = {"head": {"kernel": np.zeros((4, 2)), "bias": np.zeros(2)}}
    args = trainable, {}, np.zeros((5, 4, 4, 3), np.uint8), np.zeros(5, np.int32)
    train.evaluate(*args, model=None, recipe=train.Recipe(), batch_size=2)
    kinds = [event.split()[0] for event in events]
    assert kinds == ["start", "start", "read", "start", "read", "read"]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_accuracy_counts_every_example_once(problem, batch_size):
    model, backbone, trainable, images, labels = problem
    static = {"model": model, "recipe": train.Recipe()}
    logits = train.predict(trainable, backbone, images, **static)
    expected = (logits.argmax(-1) == labels).mean()
    given = trainable, backbone, np.asarray(images), np.asarray(labels)
    got = train.evaluate(*given, batch_size=batch_size, **static)
    assert got == pytest.approx(float(expected), abs=1e-7)


STREAM = """
import sys
import jax, numpy as np
import vpt_jax
from vpt_jax import train
from vpt_jax.data import cache
from vpt_jax.run import probe

def peak():
    # In kB. Not getrusage, which starts from the peak of the process that forked.
    (line,) = (x for x in open("/proc/self/status") if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024

NUM, SIDE = 1334, 224
model = vpt_jax.ViT(
    width=16, depth=1, num_heads=2, mlp_dim=16, patch=56, image_size=SIDE
)
image = np.zeros((1, SIDE, SIDE, 3), np.float32)
backbone = jax.jit(model.init)(jax.random.key(0), image)["params"]
trainable = {
    "prompts": vpt_jax.init_prompts(jax.random.key(1), model, 1),
    "head": vpt_jax.init_head(jax.random.key(2), 16, 4),
}
recipe = train.Recipe()

def accuracy(images, labels):
    return train.evaluate(
        trainable, backbone, images, labels, model=model, recipe=recipe, batch_size=16
    )

def features(images):
    return probe.extract_features(
        backbone, images, model=model, normalisation="half", batch_size=16
    )

def picture(i):
    return np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), np.uint8)

def make(write):
    for i in range(NUM):
        write(picture(i))

few, labels = np.stack([picture(i) for i in range(40)]), np.arange(NUM) % 4
accuracy(few, labels[:40]), features(few)  # compiles
start = peak()
cache.cached(sys.argv[1], {}, SIDE, make)
written = peak()
images, _ = cache.cached(sys.argv[1], {}, SIDE, make)
found = accuracy(images, labels.astype(np.int32)), features(images)
streamed = peak()
memory = np.array(images)
assert found[0] == accuracy(memory, labels.astype(np.int32))
np.testing.assert_array_equal(found[1], features(memory))
print(written - start, streamed - start, peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted otherwise")
def test_a_file_larger_than_memory_would_do(tmp_path):
    """200 MB of pictures are written, checked and evaluated in little more memory.

    In flight are at most two batches of 16 pictures, 2.4 MB each, and as much again as
    floats of each; a checksum looks at 4 MB. The rest of the limit is for allocators.
    """
    done = command(str(tmp_path), python=("-c", STREAM))
    assert not done.returncode, done.stderr
    written, streamed, in_memory = map(float, done.stdout.split())
    assert written < 60 and streamed < 60
    assert in_memory > 150  # the measure sees what is held


def test_learning_rates_of_the_reference():
    rates = train.learning_rates(2.0, 100, 10, 3)
    assert rates.shape == (100, 3) and rates.dtype == np.float32
    assert rates[0, 0] == 0
    np.testing.assert_allclose(rates[5], 1.0)
    np.testing.assert_allclose(rates[10], 2.0)
    np.testing.assert_allclose(rates[99] / 2.0, 3.046e-4, rtol=1e-3)
    assert (rates[:, 0] == rates[:, 2]).all()
    assert train.scaled_lr(25.0, 128) == 12.5


def test_learning_rates_per_step_have_no_dead_step():
    rates = train.learning_rates(1.0, 5, 1, 10, per="step").ravel()
    assert (rates > 0).all()
    assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[10:]) < 0).all()
    assert rates.max() < 1 and rates[-1] < 0.01


def test_an_epoch_visits_every_example_once():
    order, mask = train.epoch_order(0, 3, 21, 5)
    assert order.shape == mask.shape == (5, 5)
    assert sorted(order[mask]) == list(range(21))
    other, _ = train.epoch_order(0, 4, 21, 5)
    assert not np.array_equal(order, other)
    np.testing.assert_array_equal(order, train.epoch_order(0, 3, 21, 5)[0])


# --- pictures on the device -----------------------------------------------------------


def test_normalisations_by_hand():
    image = jnp.array([[[[0, 51, 255]]]], jnp.uint8)
    imagenet = [-0.485 / 0.229, (0.2 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    expected = {"half": [-1, -0.6, 1], "none": [0, 0.2, 1], "imagenet": imagenet}
    for name, values in expected.items():
        np.testing.assert_allclose(normalise(image, name)[0, 0, 0], values, rtol=1e-5)


def test_crop_and_flip_shifts_and_mirrors_whole_pictures():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) + 1
    batch = jnp.asarray(np.repeat(image, 200, 0))
    got = np.asarray(crop_and_flip(jax.random.key(0), batch, 1))
    padded = np.pad(image[0, :, :, 0], 1)
    possible = {
        shifted[:, ::step].tobytes()
        for i in range(3)
        for j in range(3)
        for shifted in [padded[i : i + 4, j : j + 4]]
        for step in (1, -1)
    }
    seen = {np.ascontiguousarray(g[:, :, 0]).tobytes() for g in got}
    assert seen <= possible and len(seen) == len(possible) == 18


def test_resize_keeps_constants_and_same_size():
    images = jnp.full((2, 8, 8, 3), 77, jnp.uint8)
    assert resize(images, 8) is images
    assert (resize(images, 5) == 77).all() and resize(images, 5).dtype == jnp.uint8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rates(5), "warmup_epochs is 5 of 5"),
        (lambda: rates(1, per="day"), "unknown schedule 'day'"),
        (lambda: optimizer("lion"), "unknown optimizer 'lion'"),
        (lambda: normalise(jnp.zeros((1, 2, 2, 3)), "zero"), "unknown normalisation"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def rates(warmup, **options):
    return train.learning_rates(1.0, 5, warmup, 2, **options)


def optimizer(name):
    return train.make_optimizer(train.Recipe(optimizer=name), 1, 1)


def test_bfloat16_trains_as_float32_does(problem):
    """Computed with 8 bits, learnt in float32; the bounds are docs/reliability.md's."""
    model, backbone = make_tiny()
    (state, metrics), (half, half_metrics) = (
        epoch((model.clone(dtype=dtype), backbone, *problem[2:]), train.Recipe())
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert {x.dtype for x in jax.tree.leaves(half.trainable)} == {jnp.dtype("float32")}
    assert float(half_metrics["loss"]) == pytest.approx(
        float(metrics["loss"]), rel=0.01
    )
    flat = [
        np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])
        for tree in (problem[2], state.trainable, half.trainable)
    ]
    moved, half_moved = flat[1] - flat[0], flat[2] - flat[0]
    assert np.linalg.norm(half_moved - moved) < 0.05 * np.linalg.norm(moved)
