# SPDX-License-Identifier: Apache-2.0
"""The model in Flax NNX, through Flax's own bridge, and what docs/nnx.md prints."""

import re
from pathlib import Path

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vpt_jax


@pytest.fixture(scope="module")
def setting(tiny):
    """`(Linen model, parameters, images, prompts)`."""
    model, backbone = tiny
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    prompts = vpt_jax.init_prompts(jax.random.key(2), model, (3, 0, 2))
    return model, backbone, images, jax.tree.map(lambda p: 5 * p, prompts)


@pytest.fixture(scope="module")
def bridged(setting):
    """The NNX module, initialised with prompts, then given the parameters."""
    model, backbone, images, prompts = setting
    module = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0))
    module.lazy_init(images, prompts=prompts)
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, backbone)
    nnx.update(module, state)
    return module


def apply(setting, prompts, **kwargs):
    model, backbone, images, _ = setting
    return model.apply({"params": backbone}, images, prompts=prompts, **kwargs)


def test_its_parameters_are_the_linen_ones_and_prompts_are_none(setting, bridged):
    state = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, state, setting[1])


def test_the_bridged_model_is_the_linen_model(setting, bridged):
    *_, images, prompts = setting
    mask = tuple(jnp.arange(len(p)) != 1 for p in prompts)
    for given in ({}, {"prompt_mask": mask}, {"formulation": "tokens"}):
        features, out = bridged(images, prompts=prompts, **given)
        expected, blocks = apply(setting, prompts, **given)
        np.testing.assert_array_equal(features, expected)
        for a, b in zip(out["blocks"], blocks["blocks"], strict=True):
            np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_the_models_methods_are_there_too(setting, bridged):
    model, backbone, images, prompts = setting
    ready = bridged(prompts, method="prefill")
    features, _ = bridged(images, prompts=ready)
    np.testing.assert_allclose(features, apply(setting, prompts)[0], atol=1e-6)


def test_jit_and_gradients_with_respect_to_prompts(setting, bridged):
    *_, images, prompts = setting

    @nnx.jit
    def value_and_grad(module, prompts, images):
        def loss(prompts, module):
            return jnp.sin(module(images, prompts=prompts)[0]).sum()

        return nnx.value_and_grad(loss)(prompts, module)

    value, got = value_and_grad(bridged, prompts, images)
    expected, grads = jax.jit(
        jax.value_and_grad(lambda p: jnp.sin(apply(setting, p)[0]).sum())
    )(prompts)
    # A sum of sines near 0: its rounding is that of terms of size 1.
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for a, b, p in zip(got, grads, prompts, strict=True):
        assert a.shape == p.shape
        np.testing.assert_allclose(a, b, atol=5e-6)


class PromptedClassifier(nnx.Module):
    """Prompts and head as NNX parameters beside the frozen model."""

    def __init__(self, backbone, prompts, num_classes, rngs):
        self.backbone = backbone
        self.prompts = nnx.List([Prompt(p) for p in prompts])
        self.head = nnx.Linear(prompts[0].shape[1], num_classes, rngs=rngs)

    def __call__(self, images):
        prompts = tuple(p[...] for p in self.prompts)
        return self.head(self.backbone(images, prompts=prompts)[0])


class Prompt(nnx.Param):
    """A variable type of its own, to filter by."""


def test_prompts_as_nnx_parameters(setting, bridged):
    """`nnx.grad` with a filter: the backbone is never differentiated."""
    *_, images, prompts = setting
    classifier = PromptedClassifier(bridged, prompts, 4, nnx.Rngs(1))

    def loss(classifier):
        return jnp.sin(classifier(images)).sum()

    grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, Prompt)))(classifier)
    assert list(grads) == ["prompts"]
    shapes = [g.shape for g in jax.tree.leaves(grads)]
    assert shapes == [p.shape for p in prompts]
    head = classifier.head

    def direct(prompts):
        return jnp.sin(head(apply(setting, prompts)[0])).sum()

    expected = jax.jit(jax.grad(direct))(prompts)
    for a, b in zip(jax.tree.leaves(grads), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_what_the_docs_print_runs_as_printed(setting):
    """Ours in three lines; then a module of NNX that is not ours."""
    docs = Path(__file__).parents[2] / "docs" / "nnx.md"
    ours, prompted, parts = re.findall(r"```py\n(.*?)```", docs.read_text(), re.DOTALL)
    assert len(ours.splitlines()) == 3
    model, backbone, images, prompts = setting
    names = {"nnx": nnx, "vpt_jax": vpt_jax, "images": images, "prompts": prompts}
    exec(ours, names | (own := {"model": model, "backbone": backbone}), own)
    np.testing.assert_array_equal(own["features"], apply(setting, prompts)[0])
    vit = foreign.NnxVit(nnx.Rngs(0))
    exec(prompted, names)
    features = names["features"](vit, prompts, images)
    assert float(jnp.abs(features - vit(images)).max()) > 1e-3
    names["trainable"] = {
        "prompts": prompts,
        "head": vpt_jax.init_head(jax.random.key(4), 16, 2),
    }
    names |= {"vit": vit, "batches": [{"image": images, "label": jnp.arange(2)}]}
    exec(parts.replace("depth=12, width=768", "depth=3, width=16"), names)
    assert sum(vpt_jax.counts(names["small"])) == 2
