# SPDX-License-Identifier: Apache-2.0
"""What a GPU or TPU would compile is at least traced and lowered for both.

No such device is needed: `jax.export` writes the program down for the platforms that it
is told. Shapes are small, the code is the one that a card would take.
"""

import functools
import importlib
import re
import sys
from pathlib import Path

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny
from jax import export
from jax.sharding import AxisType

import vpt_jax
from vpt_jax import parallel, train
from vpt_jax.condense import DEFAULT_REDUCTION, SCORES, _batch_values
from vpt_jax.data import strips
from vpt_jax.models.swin import Swin
from vpt_jax.models.vit import REMATS
from vpt_jax.run import probe

BOTH = ("cuda", "tpu")
NUM, CLASSES = (3, 0, 2), 5
BATCH = {
    "image": np.zeros((2, 8, 8, 3), np.uint8),
    "label": np.zeros(2, np.int32),
    "mask": np.ones(2, bool),
}
pytestmark = pytest.mark.usefixtures("standard_promotion")


def lowered(function, *args, **static):
    """The program's text; its results have the shapes that the function's have."""
    whole = functools.partial(function, **static)
    found = export.export(function, platforms=BOTH)(*args, **static)
    assert found.platforms == BOTH
    expected = jax.tree.leaves(jax.eval_shape(whole, *args))
    assert [x.shape for x in found.out_avals] == [x.shape for x in expected]
    return found.mlir_module()


def trainable_of(model, num=NUM):
    key = jax.random.key(0)
    return {
        "prompts": vpt_jax.init_prompts(key, model, num),
        "head": vpt_jax.init_head(key, model.width, CLASSES),
    }


# ------------------------------------------------------------------ the benchmark's


@pytest.fixture(scope="module")
def accelerator():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("accelerator")
    sys.path.pop(0)


def rows_of(accelerator, kernel):
    """Every program of ours that the benchmark has, with cuDNN's kernel or without."""
    rows = accelerator.plan(accelerator.SMALL, gpu=True)
    parts = ("speed", "remedy", "attention", "protocol")
    ours = [row for row in rows if row.part in parts and row.who == "vpt_jax"]
    return [row for row in ours if ("cudnn" in row.option + row.what) == kernel]


def with_kernel(function, *args, **static):
    """The same for NVIDIA's GPUs alone; `export` takes no call of a library."""
    return function.trace(*args, **static).lower(lowering_platforms=BOTH[:1]).as_text()


def written(accelerator, row, monkeypatch, lower):
    """The text of a row's program, written down where it would be compiled."""
    texts = []

    def write(what, counts, least, function, *args, options=None, **static):
        texts.append(lower(function, *args, **static))
        return accelerator.rows.roofline.Program(what, counts, *least, None, None, 0.0)

    monkeypatch.setattr(accelerator.rows.roofline, "compiled", write)
    if row.part == "protocol":
        accelerator.checks.trial_program(row, accelerator.SMALL)
    else:
        accelerator.rows.program(row)
    (text,) = texts
    return text


def test_the_benchmarks_programs(accelerator, monkeypatch):
    rows = rows_of(accelerator, kernel=False)
    assert len({(row.what, row.option) for row in rows}) >= 17
    for row in rows:
        text = written(accelerator, row, monkeypatch, lowered)
        assert "dot_general" in text and "fmha" not in text, row.name


def test_the_benchmarks_programs_with_cudnns_kernel(accelerator, monkeypatch):
    # JAX asks for the library's version before it writes the kernel's call down.
    from jax._src.cudnn import fused_attention_stablehlo as kernel

    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda _: True)
    rows = rows_of(accelerator, kernel=True)
    assert len(rows) >= 5
    for row in rows:
        text = written(accelerator, row, monkeypatch, with_kernel)
        backward = re.search(r"fmha\w*Backward", text) is not None
        assert backward == (row.what != "inference"), row.name
        assert "fmha" in text


@pytest.mark.parametrize("formulation", ["kv", "tokens"])
def test_what_is_compared_with_float64(accelerator, formulation):
    model, backbone = make_tiny()
    function = accelerator.checks.logits_and_gradients
    args = backbone, trainable_of(model), BATCH, None
    lowered(function, *args, model=model, formulation=formulation)


# ------------------------------------------------------------------- the library's

MODELS = {
    "bfloat16": {"dtype": jnp.bfloat16},
    "parameters in bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
    "mean": {"readout": "mean", "norm": "after", "posemb": "sincos"},
    "mean with prompts": {"readout": "mean_with_prompts"},
    "no class token": {"readout": "mean", "class_token": False},
    "DINOv2": {"layer_scale": True, "swiglu": True, "registers": 2},
    **{f"remat {name}": {"remat": name} for name in REMATS},
}


@pytest.mark.parametrize("name", MODELS)
def test_an_epoch_of_every_kind_of_model(name):
    model, backbone = make_tiny(**MODELS[name])
    recipe, key = train.Recipe(), jax.random.key(0)
    state = train.init_state(trainable_of(model), recipe)
    rest = epoch_inputs(backbone)
    lowered(train.train_epoch, state, *rest, key, model=model, recipe=recipe)


def epoch_inputs(backbone, images=BATCH["image"], size=2):
    labels = np.zeros(len(BATCH["label"]), np.int32)
    order = np.zeros((3, size), np.int32)
    rest = (order, np.ones(order.shape, bool), np.zeros(3, np.float32))
    return backbone, images, labels, *rest, np.float32(0)


RECIPES = {
    "AdamW": {"optimizer": "adamw"},
    "one mask a step": {"shared_dropout": True},
    "prompts alone": {"train_head": False},
    "shallow": {"deep": False},
}


@pytest.mark.parametrize("name", RECIPES)
def test_an_epoch_of_every_recipe(tiny, name):
    model, backbone = tiny
    recipe, key = train.Recipe(**RECIPES[name]), jax.random.key(0)
    num = (3, 0, 0) if name == "shallow" else NUM
    state = train.init_state(trainable_of(model, num), recipe)
    rest = epoch_inputs(backbone)
    lowered(train.train_epoch, state, *rest, key, model=model, recipe=recipe)


@pytest.mark.parametrize("crops", [False, True])
def test_an_epoch_over_many_devices_under_a_mask(tiny, crops):
    model, backbone = tiny
    recipe, key = train.Recipe(), jax.random.key(0)
    trainable = trainable_of(model)
    mask = tuple(jnp.ones(len(p), bool) for p in trainable["prompts"])
    images = BATCH["image"]
    if crops:
        pixels = np.zeros((20, 9, 3), np.uint8)  # of which 8 are cropped
        images = jax.tree.map(jnp.asarray, strips.make(pixels, [9, 11], [True, False]))
    mesh = jax.make_mesh((8,), (parallel.BATCH,), axis_types=(AxisType.Auto,))
    with parallel.everywhere(lambda: mesh):
        rest = epoch_inputs(backbone, images, 8)
        state = train.init_state(trainable, recipe)
        static = {"model": model, "recipe": recipe}
        text = lowered(train.train_epoch, state, *rest, key, mask, **static)
    assert "sdy.sharding_constraint" in text or "@Sharding" in text


def test_evaluation_of_one_run_and_of_many_and_a_probes_features(tiny):
    model, backbone = tiny
    trainable, recipe = trainable_of(model), train.Recipe()
    ready = vpt_jax.prefill(model, backbone, trainable["prompts"])
    static = {"model": model, "recipe": recipe}
    rest = (backbone, BATCH["image"], BATCH["label"], BATCH["mask"])
    lowered(train.eval_step, {**trainable, "prompts": ready}, *rest, **static)
    images = BATCH["image"]
    lowered(probe._features, backbone, images, model=model, normalisation="imagenet")
    prefill = jax.jit(functools.partial(vpt_jax.prefill, model))
    lowered(prefill, backbone, trainable["prompts"])


@pytest.mark.parametrize("score", sorted({*SCORES} - {"l2_norm", "random"}))
def test_every_score(tiny, score):
    model, backbone = tiny
    pictures = {**BATCH, "image": np.zeros((2, 8, 8, 3), np.float32)}
    args = backbone, trainable_of(model), pictures, None
    static = {"score": score, "reduction": DEFAULT_REDUCTION[score]}
    static |= {"deep": True, "loss_fn": vpt_jax.cross_entropy}
    if score == "signed":
        static["reduction"] = "mean"
    lowered(_batch_values, *args, model=model, **static)


def gradient(apply):
    """Of a model's features with respect to prompts, `(prompts, backbone, images)`."""

    @jax.jit
    def run(prompts, backbone, images):
        return jax.grad(lambda p: apply(p, backbone, images).sum())(prompts)

    return run


@pytest.mark.parametrize("deep", [True, False])
def test_swin(deep):
    sizes = {"embed_dim": 8, "depths": (1, 2), "num_heads": (2, 4), "window": 4}
    model = Swin(**sizes, patch=2, image_size=32, mlp_ratio=2, dtype=jnp.bfloat16)
    images = jnp.zeros((2, 32, 32, 3))
    backbone = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    num = (3, 0, 4) if deep else (3, 0, 0)
    prompts = vpt_jax.init_prompts(jax.random.key(0), model, num)

    def apply(prompts, backbone, images):
        variables = {"params": backbone}
        return model.apply(variables, images, prompts=prompts, deep=deep)[0]

    lowered(gradient(apply), prompts, backbone, images)


def test_a_model_that_is_not_ours():
    module, images = foreign.VitJax(), jnp.zeros((2, 8, 8, 3))
    init = functools.partial(module.init, train=False)
    backbone = jax.eval_shape(init, jax.random.key(0), images)["params"]
    prompts = tuple(jnp.zeros((n, 16)) for n in NUM)

    def apply(prompts, backbone, images):
        with vpt_jax.prompted(prompts):
            return module.apply({"params": backbone}, images, train=False)

    lowered(gradient(apply), prompts, backbone, images)
