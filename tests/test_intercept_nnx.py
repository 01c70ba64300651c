# SPDX-License-Identifier: Apache-2.0
"""Prompts in NNX models that are not ours.

Oracles: `vpt_jax.ViT` with `formulation="tokens"` on the same parameters, and, for
rotary blocks, the loop over blocks with the prompts concatenated by hand.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from foreign import NnxVit, RotaryVit, nnx_params
from test_intercept import (
    BATCH,
    IMAGES,
    NUM,
    SHALLOW,
    WIDTH,
    AsTokens,
    check_agreement,
    make_case,
    make_prompts,
    relative,
    setting,
    some_mask,
)
from test_intercept import adapter as linen_adapter

import vpt_jax

LIST, NESTED, ROTARY = r"layers/(\d+)", r"layers/layers/(\d+)", r"layer/(\d+)"


@functools.cache
def plain_vit(nested=False):
    """`(NNX module, our model, our parameters)`, with the same numbers."""
    *_, model, params = setting("vit_jax")
    vit = NnxVit(nnx.Rngs(0), nested=nested)
    nnx.update(vit, nnx_params(params, nested=nested))
    return vit, model, params


@functools.cache
def rotary():
    """A module with parameters that are no initial values."""
    vit, rng = RotaryVit(nnx.Rngs(0)), np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype)

    nnx.update(vit, jax.tree.map(draw, nnx.state(vit, nnx.Param)))
    return vit


def run(vit, block, images=IMAGES, **given):
    with vpt_jax.prompted(block=block, model=vit, **given):
        return vit(images)


def adapter(vit, block=LIST, **kwargs):
    graphdef, params = nnx.split(vit)
    return linen_adapter(graphdef, block=block, **kwargs), params


MODELS = {
    "list": lambda: adapter(plain_vit()[0]),
    "rotary": lambda: adapter(rotary(), ROTARY, read=lambda result: result["pooled"]),
}


def by_hand(prompts, deep=True):
    """The rotary model's features, block by block."""
    vit = rotary()
    x, angles = vit.embedded(IMAGES)
    n = 0
    for i, layer in enumerate(vit.layer):
        if deep or i == 0:
            n = len(prompts[i])
            own = jnp.broadcast_to(prompts[i], (BATCH, n, WIDTH))
            x = jnp.concatenate([x[:, :1], own, x[:, 1:]], axis=1)
        x = layer(x, angles)
        if deep:
            x = jnp.concatenate([x[:, :1], x[:, 1 + n :]], axis=1)
    return vit.norm(x)[:, 0]


# --- the same network as ours ---------------------------------------------------------


@pytest.mark.parametrize(
    ("nested", "case"),
    [(False, "deep masked gated"), (True, "shallow masked gated")],
    ids=["list, deep", "sequential, shallow"],
)
def test_agrees_with_our_model_forward_and_gradient(nested, case):
    vit, *ours = plain_vit(nested)
    theirs = functools.partial(run, vit, NESTED if nested else LIST)
    got = check_agreement(theirs, *ours, make_case(case))
    assert relative(got, vit(IMAGES)) > 1e-2


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_rotary_blocks_agree_with_the_loop_by_hand(deep):
    prompts = make_prompts(NUM if deep else SHALLOW)
    got = run(rotary(), ROTARY, prompts=prompts, deep=deep)["pooled"]
    assert relative(got, by_hand(prompts, deep)) < 1e-6
    assert relative(got, rotary()(IMAGES)["pooled"]) > 1e-2


@pytest.mark.parametrize(
    ("name", "deep"), [("list", True), ("rotary", True), ("rotary", False)]
)
def test_mask_equals_condense_equals_a_gate_of_zero(name, deep):
    model, params = MODELS[name]()
    prompts = make_prompts(NUM if deep else SHALLOW)
    mask = some_mask(prompts)
    call = functools.partial(model.apply, {"params": params}, IMAGES, deep=deep)
    removed, _ = call(prompts=vpt_jax.condense(prompts, mask))
    masked, out = call(prompts=prompts, prompt_mask=mask)
    gate = tuple(m.astype(jnp.float32) for m in mask)
    assert relative(masked, removed) < 1e-5
    assert relative(call(prompts=prompts, prompt_gate=gate)[0], removed) < 1e-5
    assert relative(call(prompts=prompts)[0], removed) > 1e-2
    for i, block in enumerate(out["blocks"]):
        weights, keep = block["prompt_attention"], mask[i if deep else 0]
        assert weights.shape == (BATCH, 2, 7 if name == "rotary" else 5, len(keep))
        np.testing.assert_array_equal(weights[..., ~keep], 0)
        assert weights[..., keep].size == 0 or weights[..., keep].min() > 0


# --- scoring, selecting, condensing ---------------------------------------------------


@functools.cache
def problem():
    head = vpt_jax.init_head(jax.random.key(4), WIDTH, 4)
    batch = {"image": IMAGES, "label": jnp.arange(BATCH) % 4}
    return {"prompts": make_prompts(), "head": head}, [batch]


@pytest.mark.parametrize("score", ["attention", "leave_one_out"])
def test_importance_is_that_of_our_model(score):
    _, ours, our_params = plain_vit()
    got = vpt_jax.importance(*MODELS["list"](), *problem(), score=score)
    expected = vpt_jax.importance(AsTokens(ours), our_params, *problem(), score=score)
    assert relative(np.concatenate(got), np.concatenate(expected)) < 1e-4


def test_importance_of_rotary_blocks_is_what_removal_changes():
    """`removal` is exact in the softmax; at its gate a finite difference agrees."""
    model, params = MODELS["rotary"]()
    trainable, batches = problem()
    importance = functools.partial(
        vpt_jax.importance, model, params, trainable, batches
    )
    exact = importance(score="leave_one_out")

    @jax.jit
    def loss(gate):
        features, _ = model.apply(
            {"params": params}, IMAGES, prompts=trainable["prompts"], prompt_gate=gate
        )
        logits = vpt_jax.apply_head(trainable["head"], features)
        return vpt_jax.cross_entropy(logits, batches[0]).mean()

    ones = tuple(jnp.ones(n) for n in NUM)
    for i, j in ((0, 1), (2, 0)):
        without = tuple(g.at[j].set(0.0) if k == i else g for k, g in enumerate(ones))
        change = float(loss(without) - loss(ones))
        np.testing.assert_allclose(float(exact[i][j]), change, rtol=1e-4, atol=1e-6)
    signed, slopes = importance(score="signed"), jax.grad(loss)(ones)
    for score, slope in zip(signed, slopes, strict=True):
        np.testing.assert_allclose(score, -slope, rtol=1e-4, atol=1e-6)
    mask = vpt_jax.keep_mask(importance(), keep_ratio=0.4)  # removal
    small = vpt_jax.condense(trainable["prompts"], mask)
    assert sum(vpt_jax.counts(small)) == 2


# --- transformations ------------------------------------------------------------------


def test_it_runs_under_jit_grad_and_vmap_of_nnx_and_jax():
    vit, *_ = plain_vit()
    prompts = make_prompts()
    expected = run(vit, LIST, prompts=prompts)

    @nnx.jit
    def features(vit, prompts, images):
        with vpt_jax.prompted(prompts, model=vit, block=LIST):
            return vit(images)

    assert relative(features(vit, prompts, IMAGES), expected) < 1e-5
    other = make_prompts(seed=7)
    assert relative(features(vit, other, IMAGES), expected) > 1e-2

    def loss(vit):
        return jnp.sin(features(vit, prompts, IMAGES)).sum()

    grads = nnx.grad(loss)(vit)
    step = 1e-3 * jax.random.normal(jax.random.key(0), vit.positions.shape)

    def loss_after(step):
        moved = nnx.clone(vit)
        moved.positions[...] += step
        return loss(moved)

    slope = float(loss_after(step) - loss_after(-step)) / 2
    # In float32 a difference of losses of size 10 has 3 digits.
    np.testing.assert_allclose(slope, (grads["positions"][...] * step).sum(), rtol=2e-2)
    one = jax.vmap(lambda image: run(vit, LIST, image[None], prompts=prompts)[0])
    assert relative(one(IMAGES), expected) < 1e-5
    # After all that the module is what it was.
    assert {type(b).__name__ for b in vit.layers} == {"NnxBlock"}
    assert not any(hasattr(type(b), "_prompted") for b in vit.layers)


def test_nothing_stays_after_the_context_even_if_it_fails():
    vit, *_ = plain_vit()
    before, kinds = vit(IMAGES), [type(layer) for layer in vit.layers]
    attend = [layer.attn.attention_fn for layer in vit.layers]
    gates = tuple(jnp.ones((2, n)) for n in NUM)  # of another batch size
    with pytest.raises(TypeError, match="incompatible shapes"):
        run(vit, LIST, prompts=make_prompts(), prompt_gate=gates)
    with pytest.raises(KeyError, match="mine"):
        with vpt_jax.prompted(make_prompts(), model=vit, block=LIST):
            raise KeyError("mine")
    assert [type(layer) for layer in vit.layers] == kinds
    assert [layer.attn.attention_fn for layer in vit.layers] == attend
    np.testing.assert_array_equal(vit(IMAGES), before)
    empty = make_prompts((0, 0, 0))
    np.testing.assert_array_equal(run(vit, LIST, prompts=empty), before)


# --- what goes wrong ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block": r"encoderblock_(\d+)"}, r"block=, one of layers/\(\\d\+\)\."),
        ({"prompts": make_prompts((1, 1))}, "a block 2 but the prompts have 2 layers"),
        ({"prompts": (jnp.ones((1, 8)),) * 3}, "that layer has width 16"),
        ({"model": "vit"}, "model is a str; expected an NNX module"),
        ({"model": None}, "no block was reached.*pass an NNX module as model="),
    ],
)
def test_wrong_arguments(given, message):
    vit, *_ = plain_vit()
    given = {"prompts": make_prompts(), "block": LIST, "model": vit, **given}
    with pytest.raises(ValueError, match=message):
        with vpt_jax.prompted(**given):
            vit(IMAGES)


class Mean(nnx.Module):
    """A block without attention."""

    def __call__(self, x):
        return x + x.mean(axis=1, keepdims=True)


class Several(nnx.Module):
    """Two encoders, of which some blocks are called, in some order."""

    def __init__(self, order=(0, 1, 2)):
        self.img = nnx.List([Mean() for _ in range(3)])
        self.txt = nnx.List([Mean() for _ in range(3)])
        self.order = order

    def __call__(self, x):
        for i in self.order:
            x = self.img[i](x)
        return x


@pytest.mark.parametrize(
    ("order", "changes", "message"),
    [
        ((0, 1, 2), {"block": r"\w+/(\d+)"}, "another module are both block 0"),
        ((0, 1), {}, "only blocks 0 ... 1 were reached"),
        ((1, 0, 2), {}, "block 1 was called where block 0 was due"),
        ((0, 1, 2), {"prompt_mask": some_mask(make_prompts())}, "softmax over"),
        ((0, 1, 2, 0), {}, "only blocks 0 ... 0 were reached"),
    ],
)
def test_wrong_encoders(order, changes, message):
    given = {"block": r"img/(\d+)", "prompts": make_prompts(), **changes}
    with pytest.raises(ValueError, match=message):
        run(Several(order), images=jnp.ones((BATCH, 5, WIDTH)), **given)


def test_a_context_around_a_transformation_is_an_error():
    vit, *_ = plain_vit()
    with vpt_jax.prompted(make_prompts(), model=vit, block=LIST):
        vit(IMAGES)
        with pytest.raises(ValueError, match="was copied inside .with prompted"):
            nnx.jit(lambda vit, x: vit(x))(vit, IMAGES)
        with pytest.raises(ValueError, match="called by a compiled function inside"):
            jax.jit(lambda x: vit(x))(IMAGES)
        with pytest.raises(ValueError, match="has prompts already"):
            run(vit, LIST, prompts=make_prompts())
        errors = []

        def elsewhere():
            try:
                vit(IMAGES)
            except ValueError as error:
                errors.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "another thread, and lost its prompts" in errors[0]
