# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of all public names are run.

They begin where README's example ends: a model, its backbone, prompts and head, some
pictures with labels, another project's module, and a released file.
"""

import doctest
from pathlib import Path

import flax.linen as nn
import foreign
import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image

import vpt_jax

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(autouse=True, scope="module")
def as_users_call_it():
    """Without the type checks that tests otherwise run with."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def names(folder):
    """What examples take for granted."""
    model, backbone = vpt_jax.load_backbone("demo/4")
    key = jax.random.key(0)
    prompts = vpt_jax.init_prompts(key, model, num_prompts=2)
    head = vpt_jax.init_head(key, model.width, 10)
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (40, 30)).save(folder / name)
    vpt_jax.save_prompts(
        folder / "mine.safetensors",
        prompts,
        head,
        model=model,
        backbone=backbone,
        backbone_name="demo",
        normalisation="half",
        class_names=[str(k) for k in range(10)],
        resize="crop",
        source="demo",
    )
    images = jax.random.normal(key, (4, 32, 32, 3))
    module = foreign.VitJax(patch=4, width=16, depth=2, mlp_dim=24, num_heads=2)
    modules = {"Path": Path, "jax": jax, "jnp": jnp, "nn": nn, "np": np}
    return {
        **{name: getattr(vpt_jax, name) for name in vpt_jax.__all__},
        **modules,
        "model": model,
        "backbone": backbone,
        "prompts": prompts,
        "head": head,
        "trainable": {"prompts": prompts, "head": head},
        "module": module,
        "params": module.init(key, images, train=False)["params"],
        "images": images,
        "labels": jnp.arange(4),
        "classifier": vpt_jax.load_classifier(folder / "mine.safetensors"),
    }


@pytest.mark.parametrize("name", vpt_jax.__all__)
def test_the_example_of_a_public_name_is_right(name, names, folder, monkeypatch):
    monkeypatch.chdir(folder)
    said, finder = [], doctest.DocTestFinder()
    own, *methods = finder.find(getattr(vpt_jax, name), name, globs=dict(names))
    assert own.examples, f"{name} has no example"
    for found in (own, *methods):
        doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(
            found, out=said.append
        )
    assert not said, "".join(said)
