# SPDX-License-Identifier: Apache-2.0
"""One, two, four and eight devices: the same results, an equal share of the work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import optimised
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vpt_jax
from vpt_jax import parallel, train
from vpt_jax.data import strips
from vpt_jax.run import probe
from vpt_jax.run.config import BackboneConfig
from vpt_jax.run.experiment import load_model
from vpt_jax.weights.checkpoint import save_backbone

NUM = (3, 4)
KEY = jax.random.key(3)
OTHERS = ["taylor", "grad_norm", "attention", "leave_one_out"]


def mesh_of(num, kind=AxisType.Auto):
    """The first `num` devices; None for one, as the program has it."""
    if num == 1:
        return None
    return jax.make_mesh(
        (num,), ("batch",), axis_types=(kind,), devices=jax.devices()[:num]
    )


def make(**sizes):
    """A model and random parameters, drawn by NumPy: `init` compiles for long."""
    sizes = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, **sizes}
    model = vpt_jax.ViT(**{"patch": 4, "image_size": 8, **sizes})
    shape = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(model.init, KEY, shape)["params"]
    return model, jax.tree.map(lambda x: normal(x.shape), shapes)


def normal(shape, seed=0):
    drawn = np.random.default_rng((seed, *shape)).normal(size=shape)
    return jnp.asarray(0.3 * drawn, jnp.float32)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def problem(model, num=21, counts=NUM):
    """Trainable, uint8 pictures and labels."""
    rng, side = np.random.default_rng(1), model.image_size
    trainable = {
        "prompts": tuple(normal((n, model.width), i) for i, n in enumerate(counts)),
        "head": {"kernel": normal((model.width, 3)), "bias": normal((3,))},
    }
    images = rng.integers(0, 256, (num, side, side, 3)).astype(np.uint8)
    return trainable, images, rng.integers(0, 3, num).astype(np.int32)


@pytest.fixture(scope="module")
def small():
    return make()


# --- the stages -----------------------------------------------------------------------


def trained(model, backbone, mesh, put=parallel.put_whole):
    """Two epochs, answers and features: 21 pictures in batches of 6."""
    trainable, images, labels = problem(model)
    recipe = train.Recipe(dropout=0.3)
    backbone = put(backbone, mesh)
    resident = strips.put(images, mesh)
    settings = {"model": model, "batch_size": 6}
    with parallel.everywhere(lambda: mesh):
        state = train.init_state(jax.tree.map(jnp.array, trainable), recipe)
        for epoch in range(2):
            order, mask = train.epoch_order(0, epoch, len(labels), 6)
            given = state, backbone, resident, labels, order, mask
            rates = np.full(len(order), 0.3, np.float32), np.float32(0.01)
            static = {"model": model, "recipe": recipe}
            state, metrics = train.train_epoch(*given, *rates, KEY, **static)
        given = state.trainable, backbone, images, labels
        right = train.answers(*given, recipe=recipe, **settings)
        settings["normalisation"] = "half"
        features = probe.extract_features(backbone, resident, **settings)
    exact = right, float(metrics["accuracy"])
    close = state.trainable, features[: len(labels)], float(metrics["loss"])
    return jax.tree.map(np.asarray, (exact, close))


def scores_of(model, backbone, mesh):
    """Importance over 21 pictures in batches of 6."""
    trainable, images, labels = problem(model)
    images = images.astype(np.float32) / 128 - 1
    batches = (
        {"image": images[i : i + 6], "label": labels[i : i + 6]}
        for i in range(0, len(labels), 6)
    )
    backbone = parallel.put_whole(backbone, mesh)
    with parallel.everywhere(lambda: mesh):
        scores = vpt_jax.importance(model, backbone, trainable, batches)
    return tuple(jnp.asarray(np.asarray(s)) for s in scores)


@pytest.fixture(scope="module")
def alone(small):
    return trained(*small, None), scores_of(*small, None)


@pytest.mark.parametrize(
    "num", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_training_and_evaluation_are_the_same_on_many_devices(small, alone, num):
    """Neither the pictures nor a batch divide by the devices."""
    exact, close = trained(*small, mesh_of(num))
    jax.tree.map(np.testing.assert_array_equal, exact, alone[0][0])
    assert_close(close, alone[0][1])


@pytest.mark.parametrize("num", [2, 4, 8])
def test_keep_masks_are_the_same_on_many_devices(small, alone, num):
    scores = scores_of(*small, mesh_of(num))
    for a, b in zip(scores, alone[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for ratio in (0.15, 0.3, 0.5, 0.7, 0.9):
        for scope in ("global", "layer"):
            a, b = (
                vpt_jax.keep_mask(s, keep_ratio=ratio, scope=scope)
                for s in (scores, alone[1])
            )
            jax.tree.map(np.testing.assert_array_equal, a, b)


@optimised()
def test_crops_of_a_strip_are_the_same_and_no_device_holds_it_all():
    rng = np.random.default_rng(0)
    length, wide = rng.integers(37, 60, 13), rng.random(13) < 0.5
    pixels = rng.integers(0, 256, (length.sum(), 37, 3)).astype(np.uint8)
    strip, index = strips.make(pixels, length, wide), np.array([3, 0, 12, 12, 7, 9])
    resident = jax.tree.map(jnp.asarray, strip)
    expected = strips.take(resident, jnp.asarray(index), KEY)
    mesh = mesh_of(8)
    spread = strips.put(strip, mesh)
    held = spread.pixels.addressable_shards[0].data.shape[0]
    assert held == -(-len(pixels) // 8)
    with parallel.everywhere(lambda: mesh):
        more = jnp.pad(jnp.asarray(index), (0, parallel.round_up(6) - 6))
        take = jax.jit(strips.take).lower(spread, more, KEY).compile()
        got = take(spread, more, KEY)
    np.testing.assert_array_equal(got[:6], expected)
    for kind, what, shape in collectives(take.as_text()):
        assert len(pixels) not in shape, f"{kind} of the strip, {what}{shape}"


# --- the compiled program -------------------------------------------------------------


def collectives(text):
    """`(kind, dtype, shape)` of every array that devices exchange in compiled text."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    for line in text.splitlines():
        found = re.search(rf" = (.*?) ({kinds}|collective-broadcast)(-start)?\(", line)
        if found:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
                yield found[2], dtype, tuple(map(int, filter(None, shape.split(","))))


@pytest.fixture(scope="module")
@optimised()
def epochs():
    """An epoch of a small ViT with 16 pictures a step, compiled for 1 and 8 devices."""
    sizes = {"width": 64, "num_heads": 4, "mlp_dim": 128}
    model, backbone = make(image_size=32, patch=8, **sizes)
    trainable, images, labels = problem(model, 40, (5, 4))
    order, mask = train.epoch_order(0, 0, 40, 16)
    recipe = train.Recipe(dropout=0.1)

    def compiled(mesh):
        resident = strips.put(images, mesh)
        whole = parallel.put_whole((backbone, labels), mesh)
        rates = np.zeros(len(order), np.float32), np.float32(0)
        with parallel.everywhere(lambda: mesh):
            state = train.init_state(trainable, recipe)
            given = state, whole[0], resident, whole[1], order, mask, *rates, KEY
            static = {"model": model, "recipe": recipe}
            return train.train_epoch.lower(*given, **static).compile()

    return compiled(None), compiled(mesh_of(8)), trainable


def test_a_device_does_an_eighth_of_the_work(epochs):
    one, eight, _ = epochs
    whole, share = (e.cost_analysis()["flops"] for e in (one, eight))
    assert share <= 1.03 * whole / 8


def test_devices_exchange_gradients_and_uint8_pictures_alone(epochs):
    one, eight, trainable = epochs
    assert not list(collectives(one.as_text()))
    gradients = {x.shape for x in jax.tree.leaves(trainable)}
    gradients |= {shape[::-1] for shape in gradients}
    seen = set()
    for kind, dtype, shape in collectives(eight.as_text()):
        seen.add(dtype)
        if dtype == "f32":
            assert kind == "all-reduce" and shape in gradients | {()}, (kind, shape)
        elif dtype == "u8":
            assert kind == "all-reduce" and shape == (16, 32, 32, 3), (kind, shape)
        else:  # which pictures
            assert dtype == "s32" and np.prod(shape) == 16, (kind, dtype, shape)
    assert {"f32", "u8"} <= seen


def test_a_device_holds_its_part_of_the_training_set(epochs):
    images = strips.put(np.ones((42, 2, 2, 3), np.uint8), mesh_of(8))
    assert {s.data.shape for s in images.addressable_shards} == {(6, 2, 2, 3)}
    assert np.asarray(images).sum() == 42 * 12  # zeros behind


# --- the caller's own mesh ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "names"),
    [
        ("data", AxisType.Explicit, ["removal"]),
        pytest.param("data", AxisType.Auto, OTHERS, marks=pytest.mark.slow),
        pytest.param("batch", AxisType.Explicit, OTHERS, marks=pytest.mark.slow),
    ],
)
def test_library_functions_under_the_callers_mesh(kind, name, names):
    model, backbone = make(depth=1)
    trainable, images, labels = problem(model, 16, (3,))
    batch = {"image": images, "label": labels, "mask": np.arange(16) < 13}
    recipe, rate, decay = train.Recipe(dropout=0.3), jnp.float32(0.1), jnp.float32(0)
    step = jax.jit(train.train_step, static_argnames=("model", "recipe"))

    static = {"model": model, "recipe": recipe}

    def everything(trainable, backbone, batch):
        state = train.init_state(trainable, recipe)
        state, sums = step(state, backbone, batch, rate, decay, KEY, **static)
        image = jnp.asarray(batch["image"]).astype(jnp.float32) / 128.0 - 1.0
        given = model, backbone, trainable, [{**batch, "image": image}]
        scores = [vpt_jax.importance(*given, score=score) for score in names]
        given = (batch[name] for name in ("image", "label", "mask"))
        right = train.eval_step(trainable, backbone, *given, **static)
        return jax.tree.map(np.asarray, (state.trainable, sums, scores, right))

    expected = everything(trainable, backbone, batch)
    mesh = jax.make_mesh((8,), (name,), axis_types=(kind,))
    with jax.set_mesh(mesh):
        kept = jax.device_put((trainable, backbone), NamedSharding(mesh, P()))
        got = everything(*kept, jax.device_put(batch, NamedSharding(mesh, P(name))))
    assert_close(got, expected)


# --- a backbone over several devices --------------------------------------------------


@pytest.mark.parametrize("swiglu", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_split_backbone_computes_the_same(swiglu):
    model, backbone = make(num_heads=4, mlp_dim=32, swiglu=swiglu)
    images, prompts = normal((4, 8, 8, 3)), problem(model)[0]["prompts"]

    def loss(prompts, backbone, images):
        found = model.apply({"params": backbone}, images, prompts=prompts)[0]
        return jnp.sin(found).mean()

    step = jax.jit(jax.value_and_grad(loss))
    expected = step(prompts, backbone, images)
    mesh = parallel.all_devices(4)
    assert dict(mesh.shape) == {"batch": 2, "model": 4}
    shardings = parallel.backbone_shardings(mesh, backbone)
    split = jax.device_put(backbone, shardings)
    images = jax.device_put(images, NamedSharding(mesh, P("batch")))
    with parallel.everywhere(lambda: mesh):
        assert_close(step(prompts, split, images), expected)
    block = split["Transformer"]["encoderblock_0"]
    kernel = block["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 1, 4)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("g/14", {}),
        ("7B/16", {"posemb": "rotary", "registers": 4, "layer_scale": True}),
    ],
)
def test_a_giant_is_never_whole_on_a_device(variant, options):
    """By shapes alone: what a device holds, and what it would hold whole."""
    model = vpt_jax.ViT(variant, **options)
    shape = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    backbone = jax.eval_shape(model.init, KEY, shape)["params"]
    shardings = parallel.backbone_shardings(parallel.all_devices(8), backbone)
    parts = jax.tree.map(lambda x, s: s.shard_shape(x.shape), backbone, shardings)
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    held = sum(np.prod(shape) for shape in jax.tree.leaves(parts, **is_shape))
    assert held < 0.13 * sum(x.size for x in jax.tree.leaves(backbone))


def test_the_command_shares_a_backbone_between_devices(small, alone, tmp_path):
    """`--config.backbone.share=2`: loaded in parts, trained on the same mesh."""
    file = tmp_path / "mine.safetensors"
    save_backbone(file, small[1], {"normalisation": "half", "num_heads": 2})
    settings = {"variant": str(file), "num_heads": 2}
    try:
        loaded = load_model(BackboneConfig(**settings, share=2))
        mesh = parallel.all_devices()
    finally:
        whole = load_model(BackboneConfig(**settings))
    assert dict(mesh.shape) == {"batch": 4, "model": 2}
    assert dict(parallel.all_devices().shape) == {"batch": 8}
    assert whole.info == loaded.info
    jax.tree.map(np.testing.assert_array_equal, loaded.backbone, small[1])
    shardings = parallel.backbone_shardings(mesh, small[1])
    got = [x.sharding for x in jax.tree.leaves(loaded.backbone)]
    assert got == jax.tree.leaves(shardings)
    exact, close = trained(small[0], loaded.backbone, mesh, put=lambda tree, _: tree)
    jax.tree.map(np.testing.assert_array_equal, exact, alone[0][0])
    assert_close(close, alone[0][1])
    with pytest.raises(ValueError, match="backbone.share is 3; expected a divisor"):
        load_model(BackboneConfig(**settings, share=3))
    with pytest.raises(ValueError, match="backbone.share is 0; expected an integer"):
        BackboneConfig(**settings, share=0)


def test_what_cannot_be_split_is_an_error(small):
    expected = "backbone.share is 3; expected a divisor of the 8 devices here"
    with pytest.raises(ValueError, match=expected):
        parallel.all_devices(3)
    with pytest.raises(ValueError, match="cannot be split over 8 devices"):
        parallel.backbone_shardings(parallel.all_devices(8), small[1])  # two heads
