# SPDX-License-Identifier: Apache-2.0
"""Calls of the library with what people give by mistake: right, or one sentence."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from conftest import make_tiny
from foreign import VitJax

import vpt_jax
from vpt_jax import train

CLASSES, B = 5, 4
IMAGES = jax.random.normal(jax.random.key(0), (B, 8, 8, 3))
RAW = np.random.default_rng(0).integers(0, 256, (B, 8, 8, 3)).astype(np.uint8)
MODEL, BACKBONE = make_tiny()
KEY = jax.random.key(1)
PROMPTS = vpt_jax.init_prompts(KEY, MODEL, num_prompts=2)
HEAD = {"kernel": jax.random.normal(KEY, (16, CLASSES)), "bias": jnp.zeros(CLASSES)}
TRAINABLE = {"prompts": PROMPTS, "head": HEAD}
BATCH = {"image": IMAGES, "label": jnp.arange(B)}
MASK = tuple(jnp.ones(2, bool) for _ in PROMPTS)
LISTS = tuple(np.asarray(p).tolist() for p in PROMPTS)
FEATURES, LOGITS = jnp.zeros((B, 16)), jnp.zeros((B, CLASSES))
SWIN = vpt_jax.Swin(
    embed_dim=8, depths=(1, 1), num_heads=(2, 2), window=2, patch=2, image_size=8
)


@pytest.fixture(autouse=True, scope="module")
def as_users_call_it():
    """Without the type checks that tests otherwise run with."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def importance(
    *, model=MODEL, backbone=BACKBONE, trainable=TRAINABLE, batches=(BATCH,), **kwargs
):
    return vpt_jax.importance(model, backbone, trainable, batches, **kwargs)


def look(images=IMAGES, **kwargs):
    return MODEL.apply({"params": BACKBONE}, images, **kwargs)


# --- labels ---------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "make"), [(5, jnp.array), (-1, np.array)])
def test_a_label_that_is_no_class_is_an_error(label, make):
    labels = make([1, label, 2, 3])
    given, how = (TRAINABLE, BACKBONE, RAW, labels), {"model": MODEL, "batch_size": B}
    grad = jax.grad(lambda logits: losses({"label": labels}, logits).sum())
    message = rf"labels hold {label}, .* 5 classes; expected 0 \.\.\. 4"
    for call in (
        lambda: importance(batches=[BATCH, {**BATCH, "label": labels}]),
        lambda: grad(LOGITS),
        lambda: train.evaluate(*given, **how, recipe=train.Recipe()),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("label", [5, -1, -5, -(2**31)])
def test_under_jit_its_loss_and_gradient_are_nan_and_no_others(label):
    logits = jax.random.normal(KEY, (B, CLASSES))
    right = {"label": jnp.array([1, 0, 2, 4])}
    wrong = {"label": right["label"].at[1].set(label)}

    def loss(logits, batch):
        losses = vpt_jax.cross_entropy(logits, batch)
        return losses.sum(), losses

    grad = jax.jit(jax.grad(loss, has_aux=True))
    (got, losses), (expected, plain) = grad(logits, wrong), grad(logits, right)
    others = np.array([0, 2, 3])
    assert np.isnan(losses[1]) and np.isnan(got[1]).all()
    np.testing.assert_array_equal(losses[others], plain[others])
    np.testing.assert_array_equal(got[others], expected[others])
    each = jax.vmap(lambda x, y: vpt_jax.cross_entropy(x[None], {"label": y[None]}))
    found = each(logits, wrong["label"])[:, 0]
    np.testing.assert_array_equal(np.isnan(found), [False, True, False, False])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64, np.uint32])
def test_cross_entropy_is_that_of_optax_for_labels_of_any_integers(dtype):
    logits = jax.random.normal(KEY, (300, 300))
    label = np.arange(300).astype(dtype) % 100
    expected = optax.softmax_cross_entropy_with_integer_labels(
        logits, label.astype(np.int32)
    )
    for run in (lambda f: f, jax.jit):
        got = run(vpt_jax.cross_entropy)(logits, {"label": label})
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    last = vpt_jax.cross_entropy(jnp.arange(5.0)[None], {"label": jnp.array([4])})
    expected = np.log(np.exp(np.arange(-4.0, 1)).sum())
    np.testing.assert_allclose(last, expected, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_of_examples_that_do_not_count_are_not_looked_at(label):
    batch = {**BATCH, "mask": jnp.array([False, True, True, True])}
    padded = {**batch, "label": jnp.array([label, 1, 2, 3])}
    got, expected = importance(batches=[padded]), importance(batches=[batch])
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    for run in (lambda f: f, jax.jit):
        found = run(losses)(padded)
        np.testing.assert_allclose(found, np.log(5) * np.ones(B), rtol=1e-6)


@pytest.mark.parametrize("label", [1, 5, -1])
def test_training_on_a_label_that_is_no_class_does_not_pass_for_training(label):
    labels = jnp.array([label, 1, 2, 3])
    recipe = train.Recipe()
    order, mask = np.arange(B)[::-1].reshape(2, 2), np.ones((2, 2), bool)
    state = train.init_state(jax.tree.map(jnp.copy, TRAINABLE), recipe)
    given = state, BACKBONE, jnp.asarray(RAW), labels, order, mask
    rates = np.full(2, 0.1, np.float32), jnp.float32(0)
    state, metrics = train.train_epoch(*given, *rates, KEY, model=MODEL, recipe=recipe)
    known = label == 1  # it comes in the second step
    assert int(metrics["finite_steps"]) == (2 if known else 1)
    assert np.isfinite(metrics["loss"]) == known
    for x in jax.tree.leaves(state.trainable):
        assert np.isfinite(x).all() == known


# --- pictures -------------------------------------------------------------------------


def test_normalise_is_what_training_does():
    raw = jnp.asarray(RAW)
    features, _ = look(vpt_jax.normalise(raw, "imagenet"), prompts=PROMPTS)
    recipe = train.Recipe(normalisation="imagenet")
    logits = train.predict(TRAINABLE, BACKBONE, raw, model=MODEL, recipe=recipe)
    np.testing.assert_array_equal(vpt_jax.apply_head(HEAD, features), logits)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(
        vpt_jax.normalise(RAW, "imagenet"), (RAW / 255 - mean) / std, atol=1e-6
    )


@functools.cache
def adapter(**kwargs):
    module = VitJax()
    params = module.init(KEY, IMAGES, train=False)["params"]
    return vpt_jax.PromptedModel(module, depth=3, width=16, patch=4, **kwargs), params


@pytest.mark.parametrize(
    ("dtype", "run"),
    [(np.uint8, lambda f: f), (np.int32, jax.jit), (bool, jax.vmap)],
    ids=["eager", "jit", "vmap"],
)
def test_pictures_that_are_not_normalised_are_an_error(dtype, run):
    raw = jnp.asarray(RAW.astype(dtype))
    raw = raw[None] if run is jax.vmap else raw
    foreign, params = adapter()
    swin = jax.eval_shape(SWIN.init, KEY, IMAGES)["params"]
    swin = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), swin)
    for model, own in ((MODEL, BACKBONE), (SWIN, swin), (foreign, params)):
        with pytest.raises(ValueError, match=rf"{raw.dtype}.*vpt_jax.normalise\("):
            run(lambda x, m=model, p=own: m.apply({"params": p}, x)[0])(raw)
    with pytest.raises(ValueError, match=r"vpt_jax.normalise\("):
        importance(batches=[{**BATCH, "image": raw.reshape(RAW.shape)}])


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_colours_as_floats_are_not_normalised_either(array):
    raw = array(RAW.astype(np.float32))
    with pytest.raises(ValueError, match=r"values up to 25\d;.*vpt_jax.normalise\("):
        look(raw)
    with pytest.raises(ValueError, match=r"values up to 25\d;.*vpt_jax.normalise\("):
        importance(batches=[{**BATCH, "image": raw}])
    look(raw / 255)
    closed_over = raw / 255
    jax.jit(lambda b: MODEL.apply({"params": b}, closed_over)[0])(BACKBONE)


@pytest.mark.parametrize(
    "images",
    [RAW / 255, RAW.astype(np.int32), RAW[0], RAW[..., :1], RAW.tolist(), RAW[0, 0, 0]],
    ids=["floats", "int32", "one", "grey", "list", "pixel"],
)
def test_normalise_takes_uint8_pictures_only(images):
    with pytest.raises(ValueError, match=r"expected uint8 \[b, h, w, 3\]"):
        vpt_jax.normalise(images, "half")


# --- what stands for the same ---------------------------------------------------------


@pytest.mark.parametrize("four", [np.int64(4), np.uint8(4), np.array(4), jnp.array(4)])
def test_numpys_integers_are_integers(four):
    expected = vpt_jax.init_prompts(KEY, MODEL, num_prompts=4)
    for num in (four, [four, 4, four], np.array([4, 4, 4])):
        got = vpt_jax.init_prompts(KEY, MODEL, num_prompts=num)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    shallow = vpt_jax.init_prompts(KEY, MODEL, num_prompts=four, deep=False)
    assert vpt_jax.counts(shallow) == (4, 0, 0)
    head = vpt_jax.init_head(KEY, np.int64(16), four)
    assert head["kernel"].shape == (16, 4)
    scores = tuple(jnp.arange(4.0) for _ in range(2))
    assert sum(int(m.sum()) for m in vpt_jax.keep_mask(scores, keep=four)) == 4
    assert vpt_jax.macs(MODEL, (four,) * 3) == vpt_jax.macs(MODEL, (4,) * 3)


def test_lists_are_as_good_as_tuples_and_numpy_as_jax():
    kinds = (list, lambda x: tuple(map(np.asarray, x)))
    for kind in kinds:
        prompts, mask = kind(PROMPTS), kind(MASK)
        own = {**TRAINABLE, "prompts": prompts}
        features, _ = look(prompts=prompts, prompt_mask=mask)
        expected, _ = look(prompts=PROMPTS)
        np.testing.assert_allclose(features, expected, atol=1e-6)
        got = importance(trainable=own, prompt_mask=mask)
        for x, y in zip(got, importance(), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)
        kept = vpt_jax.keep_mask(kind(got), keep=3)
        small = vpt_jax.condense(prompts, kind(kept))
        assert sum(vpt_jax.counts(small)) == 3
        ready = vpt_jax.prefill(MODEL, BACKBONE, prompts)
        again, _ = look(prompts=list(ready))
        np.testing.assert_allclose(again, expected, atol=1e-5)


def test_a_batch_may_hold_what_is_nothing_to_compute_with():
    named = {**BATCH, "name": ["a", "b", "c", "d"]}
    jax.tree.map(
        np.testing.assert_array_equal, importance(batches=[named]), importance()
    )


def brightness(logits, batch):
    return logits[:, 0] * batch["image"].mean((1, 2, 3))


def test_a_loss_of_ones_own_needs_no_labels():
    scores = importance(batches=[{"image": IMAGES}], loss_fn=brightness)
    assert all(np.abs(s).max() > 0 for s in scores)
    other = {**BATCH, "label": jnp.eye(B)}
    jax.tree.map(
        np.testing.assert_array_equal,
        importance(batches=[other], loss_fn=brightness),
        scores,
    )


# --- wrong calls ----------------------------------------------------------------------


def apply(**kwargs):
    return look(**{"prompts": PROMPTS, **kwargs})


def fill(prompts=PROMPTS, model=MODEL, backbone=BACKBONE):
    return vpt_jax.prefill(model, backbone, prompts)


def classify(features=FEATURES, head=HEAD):
    return vpt_jax.apply_head(head, features)


def losses(labels, logits=LOGITS):
    return vpt_jax.cross_entropy(logits, labels)


def another(**kwargs):
    model, params = adapter()
    return model.apply({"params": params}, IMAGES, **kwargs)


def save(**kwargs):
    given = {
        "prompts": PROMPTS,
        "head": HEAD,
        "model": MODEL,
        "backbone": BACKBONE,
        "backbone_name": "tiny",
        "normalisation": "half",
        "class_names": list("abcde"),
    }
    vpt_jax.save_prompts("never-written.safetensors", **{**given, **kwargs})


def own(n, *shape):
    """One set of prompts (or gates, ...) for each of `n` examples."""
    return tuple(jnp.ones((n, *shape)) for _ in PROMPTS)


def of(**changes):
    return importance(batches=[{**BATCH, **changes}])


def start(num):
    return vpt_jax.init_prompts(KEY, MODEL, num)


def load(variant="demo/4", **kwargs):
    return vpt_jax.load_backbone(variant, **kwargs)


SCORES = tuple(jnp.arange(2.0) for _ in PROMPTS)
READY = fill()
WRONG = [
    # pictures
    (lambda: look(IMAGES[0]), "images.None"),
    (lambda: look(IMAGES.transpose(0, 3, 1, 2)), r"images.transpose\(0, 2, 3, 1\)"),
    (lambda: look(IMAGES[..., :1]), "make them RGB"),
    (lambda: look(list(IMAGES)), "shape a list but .*one array of all pictures"),
    (lambda: look("cat.png"), r"shape 'cat.png' but the model expects \[b, 8, 8, 3\]"),
    # keys and parameters
    (lambda: vpt_jax.init_prompts(0, MODEL, 2), "0; expected a JAX random key, such"),
    (lambda: vpt_jax.init_head(0, MODEL.width, 5), "0; expected a JAX random key"),
    (
        lambda: importance(backbone={"params": BACKBONE}),
        "backbone is a dict of 'params'; expected the parameters themselves",
    ),
    (lambda: fill(backbone={"params": BACKBONE}), "backbone is a dict of 'params'"),
    # load_backbone
    (lambda: load(resize="bicubic2"), "unknown resize 'bicubic2'; did you mean 'bic"),
    (lambda: load(image_size="64"), "image_size is '64'; expected an integer >= 0"),
    (lambda: load(16), "variant is 16; expected a text or a path"),
    # importance
    (lambda: importance(batches=BATCH), r"pass \[batch\]"),
    (lambda: importance(batches=None), "batches is None"),
    (
        lambda: importance(batches=IMAGES),
        r"a batch is an array float32 \[8, 8, 3\]; expected a dict with 'image'",
    ),
    (
        lambda: importance(batches=[{"image": IMAGES, "labels": BATCH["label"]}]),
        r"a batch is a dict of 'image', 'labels'; expected .*'label'",
    ),
    (lambda: importance(trainable=PROMPTS), "a tuple; expected a dict with 'prompts'"),
    (lambda: importance(trainable=HEAD), "a dict of 'kernel'"),
    (lambda: importance(trainable={**TRAINABLE, "head": None}), "head is None; expect"),
    (lambda: of(label=jnp.eye(5)[:B]), r"float32 \[4, 5\]; expected .* \[4\].*argmax"),
    (lambda: of(label=jnp.arange(4.0)), "labels are an array float32"),
    (lambda: of(label=[0, 1, 2, 3]), "labels are a list; expected an array of integ"),
    (lambda: of(label=jnp.arange(3)), r"int32 \[3\]; expected .* integers \[4\]"),
    (lambda: of(mask=jnp.ones(B)), r"mask is an array float32 \[4\]; expected bool"),
    (lambda: of(image=IMAGES[0], label=jnp.array(0)), "labels are an array"),
    (
        lambda: importance(model=BACKBONE),
        "model is a dict of .*; expected one with app",
    ),
    (lambda: importance(prompt_mask=MASK[:2], score="l2_norm"), "mask has shapes"),
    # cross_entropy and apply_head
    (lambda: losses(BATCH["label"]), "batch is an array int32.*'label'"),
    (
        lambda: losses({"label": jnp.array(0)}, jnp.zeros(5)),
        r"logits are an array float32 \[5\]; expected an array \[b, k\]",
    ),
    (lambda: jax.jit(losses)({"label": jnp.eye(5)[:B]}), "argmax"),
    (lambda: classify(apply()), "features are a tuple; .* first result of model.apply"),
    (lambda: classify(jnp.zeros((B, 8))), r"\[4, 8\]; expected \[b, 16\]"),
    (lambda: classify(head=TRAINABLE), "a dict of 'prompts', 'head'; .*'kernel'"),
    (lambda: classify(head={**HEAD, "bias": jnp.zeros(4)}), r"bias an array .* \[4\]"),
    # init
    (lambda: start(2.5), "num_prompts is 2.5; expected an integer >= 0"),
    (lambda: start((1, 2.5, 1)), "a count is 2.5"),
    (lambda: jax.jit(start)(4), r"is an array int32 \[\]; expected an integer"),
    (
        lambda: vpt_jax.init_prompts(KEY, (MODEL, BACKBONE), 4),
        "model is a tuple; expected one with widths, patch",
    ),
    (lambda: vpt_jax.init_head(KEY, 16, ("cat", "dog")), "num_classes is a tuple"),
    # model.apply
    (lambda: apply(prompts=TRAINABLE), "prompts is a dict"),
    (lambda: apply(prompts=LISTS), "a layer of prompts is a list"),
    (lambda: apply(prompts=READY[0]), "is a KeyValue; expected a tuple with one array"),
    (
        lambda: apply(prompts=own(3, 2, 16)),
        r"prompts\[0\] has shape \(3, 2, 16\).*3 examples.*4 pictures",
    ),
    (lambda: apply(prompts=fill(own(3, 2, 16))), "of 3 examples"),
    (lambda: apply(prompt_gate=own(3, 2)), r"prompt_gate\[0\] has shape \(3, 2\)"),
    (
        lambda: apply(prompt_mask=SCORES),
        r"mask\[0\] is .* float32 \[2\]; expected bool",
    ),
    (lambda: apply(prompt_mask=jnp.ones((3, 2), bool)), "prompt_mask is an array bool"),
    (lambda: another(prompts=own(3, 2, 16)), r"prompts\[0\] has shape \(3, 2, 16\)"),
    (lambda: vpt_jax.prompted(TRAINABLE).__enter__(), "prompts is a dict"),
    # prefill
    (lambda: fill(READY), "is a KeyValue; expected .* not prefilled before"),
    (lambda: fill(TRAINABLE), "prompts is a dict"),
    (lambda: fill(model=adapter()[0]), "a PromptedModel; expected one with prefill"),
    # keep_mask and condense
    (lambda: vpt_jax.keep_mask(SCORES, keep_ratio=30), "keep_ratio is 30"),
    (lambda: vpt_jax.keep_mask(SCORES, keep_ratio="0.3"), "keep_ratio is '0.3'"),
    (
        lambda: jax.jit(lambda r: vpt_jax.keep_mask(SCORES, keep_ratio=r))(0.3),
        "static under jit",
    ),
    (lambda: vpt_jax.keep_mask(SCORES, keep=2.5), "keep is 2.5; expected an integer"),
    (
        lambda: vpt_jax.keep_mask(PROMPTS, keep=2),
        r"a layer of scores is an array float32 \[2, 16\]; expected .* \[n_i\]",
    ),
    (lambda: vpt_jax.keep_mask(jnp.ones((3, 2)), keep=2), "scores is an array"),
    (lambda: vpt_jax.condense(PROMPTS, SCORES), "must be boolean"),
    (
        lambda: vpt_jax.condense(MASK, PROMPTS),
        r"layer of prompts is an array bool \[2\]",
    ),
    (lambda: vpt_jax.condense(PROMPTS, MASK[0]), r"mask is an array bool \[2\]"),
    (lambda: vpt_jax.condense(PROMPTS, [[True, False]] * 3), "layer of mask is a list"),
    (lambda: vpt_jax.condense(READY, MASK), "a layer of prompts is a KeyValue"),
    (lambda: vpt_jax.counts(PROMPTS[0]), r"prompts is an array float32 \[2, 16\]"),
    (
        lambda: vpt_jax.prompt_dropout(KEY, own(B, 2, 16), 0.1, B),
        r"a layer of prompts is an array float32 \[4, 2, 16\]",
    ),
    # macs
    (lambda: vpt_jax.macs(MODEL, 50), "counts is 50; expected one number"),
    (lambda: vpt_jax.macs(MODEL, PROMPTS), r"a count is an array float32 \[2, 16\]"),
    (lambda: vpt_jax.macs(MODEL, (1, -1, 1)), "a count is -1"),
    (lambda: vpt_jax.macs(adapter()[0], (1, 1, 1)), "expected a ViT or a Swin"),
    (lambda: vpt_jax.macs(MODEL, (1, 1, 1), deep=False), "later counts must be 0"),
    (lambda: vpt_jax.macs(MODEL, (1, 1, 1), prompt_batch=0), "prompt_batch is 0"),
    # save_prompts
    (lambda: save(prompts=PROMPTS[:2]), "prompts have 2 layers"),
    (lambda: save(prompts=READY), "is a KeyValue"),
    (
        lambda: save(head=vpt_jax.init_head(KEY, 8, 5)),
        "head has width 8 but the model's features have 16",
    ),
    (lambda: save(class_names="abcde"), "is 'abcde'"),
    (lambda: save(class_names=range(5)), "a range; expected"),
    (lambda: save(class_names=["a"]), "1 entries but the head"),
    (lambda: save(normalisation="inception"), "unknown normalisation 'inception'"),
    (lambda: save(prompts=tuple(p * jnp.nan for p in PROMPTS)), "infinite or NaN"),
    (lambda: save(deep=False), "deep=False"),
    (lambda: save(model=adapter()[0]), "expected one with widths, variant, readout"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_a_wrong_call_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert type(caught.value) is ValueError
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400
