# SPDX-License-Identifier: Apache-2.0
"""`jax.export` with a free batch: one file for every size, on every platform."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised
from foreign import VitJax
from jax import export

import vpt_jax
from vpt_jax.models.attention import attend

SIDE, PLATFORMS = 8, ("cpu", "cuda", "tpu")
KEY = jax.random.key(0)
SIZES = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "patch": 4}
MODELS = {
    "vit": vpt_jax.ViT(**SIZES, image_size=SIDE),
    "vit mean": vpt_jax.ViT(**SIZES, image_size=SIDE, readout="mean_with_prompts"),
    "swin": vpt_jax.Swin(
        **{"embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "patch": 1},
        **{"window": 2, "image_size": SIDE, "readout": "mean_with_prompts"},
    ),
}


@functools.cache
def setting(name):
    """The model, its parameters, and deep and shallow prompts of it."""
    model = MODELS[name]
    params = jax.jit(model.init)(KEY, jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    deep = vpt_jax.init_prompts(KEY, model, [2, 0, 3][: model.depth])
    shallow = vpt_jax.init_prompts(KEY, model, 2, deep=False)
    return model, randomised(params), deep, shallow


def travelled(function, *specs):
    """The function, lowered for all platforms, written and read again."""
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*specs)
    assert exported.platforms == PLATFORMS
    return export.deserialize(exported.serialize()).call


def pictures(b, dtype=jnp.float32):
    shape = (b, SIDE, SIDE, 3)
    if dtype == jnp.uint8:
        return jax.random.randint(jax.random.key(b), shape, 0, 256).astype(dtype)
    return jax.random.normal(jax.random.key(b), shape, dtype)


def agrees(function, dtype=jnp.float32):
    """The same answers for batches of one and of several."""
    shape = export.symbolic_shape(f"b, {SIDE}, {SIDE}, 3")
    call = travelled(function, jax.ShapeDtypeStruct(shape, dtype))
    for b in (1, 3):
        x = pictures(b, dtype)
        got, expected = call(x), function(x)
        assert got.shape == expected.shape and got.shape[0] == b
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


KINDS = ("plain", "prompts", "prefilled", "masked", "gated", "tokens", "shallow")
CASES = [
    *itertools.product(("vit", "swin"), KINDS),
    *itertools.product(("vit mean",), ("prefilled", "masked")),  # prompts are read too
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_model_answers_as_before_it_was_exported(name, case):
    model, params, deep, shallow = setting(name)
    given = {"prompts": shallow if case == "shallow" else deep}
    if case == "plain":
        given = {}
    if case == "prefilled":
        given["prompts"] = vpt_jax.prefill(model, params, deep)
    if case in ("masked", "shallow"):
        given["prompt_mask"] = tuple(jnp.arange(len(p)) > 0 for p in given["prompts"])
    if case == "gated":
        given["prompt_gate"] = tuple(0.5 * jnp.ones(len(p)) for p in deep)
    if case == "tokens":
        given["formulation"] = "tokens"
    given["deep"] = case != "shallow"
    agrees(lambda x: model.apply({"params": params}, x, **given)[0])


def test_a_classifier_of_uint8_pictures_is_exported_whole():
    model, params, deep, _ = setting("vit")
    head = vpt_jax.init_head(KEY, model.width, 3)

    def classify(images):
        images = vpt_jax.normalise(images, "half")
        features, out = model.apply({"params": params}, images, prompts=deep)
        seen = out["blocks"][0]["prompt_attention"].mean((1, 2))
        return jnp.concatenate([vpt_jax.apply_head(head, features), seen], axis=1)

    agrees(classify, jnp.uint8)


def test_every_example_may_bring_its_own_prompts():
    model, params, deep, _ = setting("vit")

    def function(x, prompts):
        return model.apply({"params": params}, x, prompts=(prompts, deep[1]))[0]

    (b,) = export.symbolic_shape("b")
    call = travelled(
        function,
        jax.ShapeDtypeStruct((b, SIDE, SIDE, 3), jnp.float32),
        jax.ShapeDtypeStruct((b, 2, 16), jnp.float32),
    )
    x, prompts = pictures(3), jax.random.normal(KEY, (3, 2, 16))
    np.testing.assert_allclose(call(x, prompts), function(x, prompts), atol=1e-5)


def test_a_foreign_model_is_exported_with_its_prompts():
    module = VitJax()
    params = module.init(KEY, pictures(1), train=False)["params"]
    model = vpt_jax.PromptedModel(module, depth=3, width=16, patch=4)
    prompts = vpt_jax.init_prompts(KEY, model, (2, 0, 1))
    mask = tuple(jnp.arange(len(p)) < 1 for p in prompts)
    how = {"prompts": prompts, "prompt_mask": mask}
    agrees(lambda x: model.apply({"params": params}, x, **how)[0])


def test_attention_over_many_tokens_is_exported():
    """Where a CPU would take the queries of a known batch in blocks."""
    shape = export.symbolic_shape("b, 16, 264, 64")
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 16, 264, 64)) for i in range(3))

    def function(q):
        return attend(q, k[:1] + 0 * q, v[:1] + 0 * q, None)[0]

    call = travelled(function, jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_allclose(call(q), function(q), rtol=1e-5, atol=1e-5)
