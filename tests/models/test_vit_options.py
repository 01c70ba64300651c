# SPDX-License-Identifier: Apache-2.0
"""The ViT against a float64 reference and itself, as all backbones have it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny
from reference import features as reference_features
from test_vit import NUM, SHALLOW, big_prompts, make_run, relative, some_mask

import vpt_jax
from vpt_jax.models.layers import KeyValue

OPTIONS = {
    "plain": {},
    "mae": {"readout": "mean_with_prompts", "norm": "after"},
    "mean": {"readout": "mean", "norm": "after"},
    "dinov2": {"registers": 2, "layer_scale": True},
    "giant": {"layer_scale": True, "swiglu": True},
    "big_vision": {"class_token": False, "readout": "mean", "posemb": "sincos"},
    "siglip": {"class_token": False, "readout": "map"},
    "dinov3": {"registers": 2, "layer_scale": True, "swiglu": True, "epsilon": 1e-5}
    | {"posemb": "rotary"},
    "rotary mean": {"posemb": "rotary", "readout": "mean_with_prompts"},
    "clip": {"pre_norm": True, "activation": "quick_gelu", "epsilon": 1e-5},
    "everything": {
        "registers": 3,
        "layer_scale": True,
        "readout": "mean_with_prompts",
        "class_token": False,
    },
}


@pytest.fixture(scope="module", params=OPTIONS)
def case(request):
    """Model, parameters, compiled forward pass and the reference's arguments."""
    options = OPTIONS[request.param]
    model, backbone = make_tiny(**options)
    told = ("readout", "norm", "posemb", "activation", "epsilon")
    kind = {n: options[n] for n in told if n in options}
    return model, backbone, make_run(model, backbone), kind


@pytest.fixture
def images(getkey):
    return jax.random.normal(getkey(), (3, 8, 8, 3))


@pytest.mark.parametrize(
    ("num", "deep"),
    [
        (None, True),
        (NUM, True),
        (SHALLOW, False),
        pytest.param((0, 2, 7), True, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_a_float64_reference(case, images, getkey, num, deep):
    model, backbone, run, kind = case
    prompts = None if num is None else big_prompts(getkey(), model, num)
    got, _ = run(images, prompts=prompts, deep=deep)
    as64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    expected = [
        reference_features(as64(backbone), image, as64(prompts), deep, **kind)
        for image in as64(images)
    ]
    assert relative(got, expected) < 1e-5


def test_formulations_and_their_gradients_agree(case, images, getkey):
    model, _, run, _ = case
    prompts = big_prompts(getkey(), model, NUM)
    mask = some_mask(prompts)

    def loss(prompts, formulation):
        features, _ = run(
            images, prompts=prompts, prompt_mask=mask, formulation=formulation
        )
        return jnp.sin(features).sum(), features

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    kv, tokens = grad(prompts, "kv"), grad(prompts, "tokens")
    assert relative(kv[1], tokens[1]) < 1e-5
    for a, b in zip(kv[0], tokens[0], strict=True):
        if a.size:
            assert np.abs(b).max() > 0 and relative(a, b) < 1e-5


@pytest.mark.parametrize("deep", [True, False])
def test_masked_and_condensed_agree(case, images, getkey, deep):
    model, _, run, _ = case
    prompts = big_prompts(getkey(), model, NUM if deep else SHALLOW)
    mask = some_mask(prompts)
    run = functools.partial(run, images, deep=deep)
    masked, _ = run(prompts=prompts, prompt_mask=mask)
    condensed, _ = run(prompts=vpt_jax.condense(prompts, mask))
    assert relative(masked, condensed) < 1e-5
    assert relative(masked, run(prompts=prompts)[0]) > 1e-3


def test_prefilled_prompts_agree(case, images, getkey):
    model, backbone, run, _ = case
    prompts = big_prompts(getkey(), model, NUM)
    mask = some_mask(prompts)
    ready = vpt_jax.prefill(model, backbone, prompts)
    reads_prompts = model.readout == "mean_with_prompts"
    assert isinstance(ready[-1], KeyValue) != reads_prompts
    expected, _ = run(images, prompts=prompts, prompt_mask=mask)
    got, _ = run(images, prompts=ready, prompt_mask=mask)
    assert relative(got, expected) < 1e-6


def test_importance_is_the_slope_of_the_loss_along_the_gate(case, images, getkey):
    model, backbone, run, _ = case
    prompts = big_prompts(getkey(), model, NUM)
    trainable = {
        "prompts": prompts,
        "head": vpt_jax.init_head(getkey(), model.width, 3),
    }
    batch = {"image": images, "label": jnp.array([0, 1, 2])}
    scores = vpt_jax.importance(model, backbone, trainable, [batch], score="signed")

    def loss(layer, step):
        gate = [jnp.ones(len(p)) for p in prompts]
        gate[layer] = gate[layer].at[1].add(step)
        features, _ = run(images, prompts=prompts, prompt_gate=tuple(gate))
        logits = vpt_jax.apply_head(trainable["head"], features)
        return float(vpt_jax.cross_entropy(logits, batch).mean())

    for layer in (0, 2):
        slope = (loss(layer, 2e-2) - loss(layer, -2e-2)) / 4e-2
        # Central differences in float32: error about 1e-3 of the loss's scale.
        assert float(scores[layer][1]) == pytest.approx(-slope, abs=1e-3, rel=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "max"}, "unknown readout 'max'"),
        ({"norm": "none"}, "unknown norm 'none'"),
        ({"posemb": "rope"}, "unknown posemb 'rope'"),
        ({"class_token": False}, "readout 'cls' needs class_token=True"),
        ({"readout": "map", "norm": "after"}, "'map' pools normalised patches; leave"),
        ({"posemb": "rotary", "num_heads": 8}, "'rotary' has heads of width 2; exp"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_tiny(**options)
