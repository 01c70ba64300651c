# SPDX-License-Identifier: Apache-2.0
"""A guard on what programs cost: FLOP, memory, compilations; never seconds."""

import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, optimised
from ml_collections import ConfigDict

import vpt_jax
from vpt_jax import train
from vpt_jax.files import cli
from vpt_jax.models.vit import REMATS
from vpt_jax.prompts import per_example

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import roofline

BATCH = 8
FUSED = re.MULTILINE | re.DOTALL
# What the command asks of XLA's CPU backend where `backbone.remat` is set.
SPARE = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def make_model(**changes):
    """Four layers of ViT-B's shape but a quarter of its width: compiles in seconds."""
    sizes = {"width": 192, "depth": 4, "num_heads": 3, "mlp_dim": 768, "patch": 16}
    return vpt_jax.ViT(**{**sizes, "image_size": 224, **changes})


def compiled_step(model, num, formulation="kv", spare=False, masked=False):
    """A tuning step's compiled program; no weights are made."""
    key, side = jax.random.key(0), model.image_size
    prompts = jax.eval_shape(lambda: vpt_jax.init_prompts(key, model, num))
    head = jax.eval_shape(lambda: vpt_jax.init_head(key, model.width, 10))
    shapes = jax.eval_shape(model.init, key, jnp.zeros((1, side, side, 3)))

    def loss(trainable, backbone, images, labels, mask):
        features, _ = model.apply(
            {"params": backbone},
            images,
            prompts=trainable["prompts"],
            prompt_mask=mask,
            formulation=formulation,
        )
        logits = vpt_jax.apply_head(trainable["head"], features)
        return vpt_jax.cross_entropy(logits, {"label": labels}).mean()

    images = jax.ShapeDtypeStruct((BATCH, side, side, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    mask = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[:1], bool), prompts)
    args = ({"prompts": prompts, "head": head}, shapes["params"], images, labels)
    args += (mask if masked else None,)
    return jax.jit(jax.grad(loss)).lower(*args).compile(SPARE if spare else None)


def flop(program):
    return program.cost_analysis()["flops"]


def temporary(program):
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("num", [(40, 0, 7, 3), (0, 0, 30, 10), (0, 0, 0, 20)])
@optimised()
def test_a_training_step_does_hardly_more_than_the_least_work(num):
    # Nothing is computed for prompts as tokens, for the last block's patches, or below
    # the lowest prompted layer. XLA also counts what is not a product: less than 9 % at
    # this width (2 % of ViT-B/16's, see docs/performance.md).
    model = make_model()
    least = 2 * BATCH * roofline.least_training_macs(model, num, BATCH)
    assert 1 <= flop(compiled_step(model, num)) / least < 1.09


def test_without_prompts_the_least_training_work_is_the_forward_pass():
    model = make_model()
    none = (0,) * model.depth
    assert roofline.least_training_macs(model, none, 8) == vpt_jax.macs(model, none)


@pytest.fixture(scope="module")
def given():
    return roofline.make_inputs(vpt_jax.ViT(SMALL), 2)


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        ("programs", 5),
        ("inference_programs", 4),
        ("remat_programs", 3),
        ("compile_programs", 4),
    ],
)
def test_the_script_has_its_rows_and_they_run(given, make, rows):
    found = getattr(roofline, make)(given, 8)
    assert len({program.what for program in found}) == len(found) == rows
    assert all(flop(p.compiled) >= 2 * p.least_flop for p in found)
    if make != "compile_programs":
        assert all(seconds > 0 for seconds in roofline.measure(found, 1))


def kernels(program):
    """How many different fused computations XLA had to compile."""
    text = re.sub(r", metadata=\{[^}]*\}", "", program.as_text())
    bodies = re.findall(r"^%\S*fused_computation\S* \(.*?\{\n(.*?)^\}", text, FUSED)
    return len({renamed(body) for body in bodies})


def renamed(body):
    """The same text for computations that differ in the names of values alone."""
    seen = {}
    return re.sub(r"%[\w.-]+", lambda m: seen.setdefault(m[0], f"%{len(seen)}"), body)


@pytest.mark.parametrize(("dropout", "most"), [(0.0, 17), (0.1, 20)])
def test_what_another_count_costs_to_compile(dropout, most):
    """Each further count makes attention of another shape, and little else.

    Before layers shared the drawing of dropout it was 25 kernels instead of 20 (XLA of
    jaxlib 0.10.2).
    """
    sizes = {"width": 64, "depth": 6, "num_heads": 4, "mlp_dim": 128, "patch": 8}
    given = roofline.make_inputs(make_model(**sizes, image_size=32), 8)
    found = []
    for num in ([10] * 6, [8, 9, 10, 11, 12, 13]):
        trainable = roofline.trainable_of(given, num)
        program = roofline.epoch_program(given, "", trainable, dropout)
        found.append(kernels(program.compiled))
    assert 0 < found[1] - found[0] <= 5 * most, found


@optimised()
def test_memory_of_keys_and_values_of_tokens_and_of_every_remat():
    num = 100
    tokens = temporary(compiled_step(make_model(), num, "tokens"))
    shares = {
        name: temporary(compiled_step(make_model(remat=name), num, spare=True)) / tokens
        for name in REMATS
    }
    masked = temporary(compiled_step(make_model(), num, masked=True)) / tokens
    assert masked < 1.1 * shares["none"]  # attention weights are kept once: not 1.9
    # Four layers; the twelve of ViT-B/16 are in docs/performance.md: 0.24 for blocks.
    assert shares["block"] < 0.35
    assert shares["block"] < shares["attention"] < shares["none"] < 0.65


def test_remat_asks_for_the_order_that_spares_memory(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    cli.spare_memory(ConfigDict({"backbone": {"remat": "none"}}))
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x"
    cli.spare_memory(ConfigDict({"backbone": {"remat": "block"}}))
    ((option, order),) = SPARE.items()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x --{option}={order}"
    cli.spare_memory(ConfigDict({"backbone": {"remat": "attention"}}))
    assert os.environ["XLA_FLAGS"].count(option) == 1


@pytest.mark.parametrize("remat", sorted(set(REMATS) - {"none"}))
@pytest.mark.parametrize(
    "formulation", ["kv", pytest.param("tokens", marks=pytest.mark.slow)]
)
def test_remat_changes_no_number(remat, formulation):
    model = make_model(image_size=32, depth=3)
    key = jax.random.key(0)
    images = jax.random.normal(key, (2, 32, 32, 3))
    backbone = jax.jit(model.init)(key, images)["params"]
    prompts = vpt_jax.init_prompts(key, model, (2, 0, 3))
    mask = tuple(jnp.arange(len(p)) != 1 for p in prompts)

    def gradient(model):
        def loss(prompts):
            features, _ = model.apply(
                {"params": backbone},
                images,
                prompts=prompts,
                prompt_mask=mask,
                formulation=formulation,
            )
            return jnp.sin(features).sum()

        return jax.jit(jax.grad(loss))(prompts)

    for a, b in zip(gradient(model), gradient(model.clone(remat=remat)), strict=True):
        # The same sums, which XLA may fuse in another order.
        np.testing.assert_allclose(
            a, b, rtol=0, atol=1e-5 * max(1, np.abs(a).max(initial=0))
        )


def test_an_unknown_remat_is_named():
    with pytest.raises(ValueError, match="unknown remat 'all'; choose one of 'none'"):
        make_model(remat="all")


def test_one_copy_for_each_example_and_the_sum_of_their_gradients():
    like = jnp.zeros((3, 4, 5))
    x = jax.random.normal(jax.random.key(0), (2, 5))
    copies, pull = jax.vjp(lambda x: per_example(x, like), x)
    np.testing.assert_array_equal(copies, np.broadcast_to(x, (3, 2, 5)))
    g = jax.random.normal(jax.random.key(1), (3, 2, 5))
    np.testing.assert_allclose(pull(g)[0], g.sum(0), rtol=1e-6)
    np.testing.assert_array_equal(per_example(x[None], like), copies)
    np.testing.assert_array_equal(per_example(copies, like), copies)


def test_masks_of_any_selection_share_one_program():
    model = make_model(image_size=32)
    key = jax.random.key(0)
    backbone = jax.jit(model.init)(key, jnp.zeros((1, 32, 32, 3)))["params"]
    prompts = vpt_jax.init_prompts(key, model, 6)
    trainable = {"prompts": prompts, "head": vpt_jax.init_head(key, model.width, 3)}
    scores = tuple(jax.random.uniform(key, (6,)) * (i + 1) for i in range(model.depth))
    images = np.zeros((2, 32, 32, 3), np.uint8)
    recipe = train.Recipe()
    before = train.eval_step._cache_size()
    for ratio in (1.0, 0.7, 0.5, 0.3, 0.1):
        mask = vpt_jax.keep_mask(scores, keep_ratio=ratio)
        static = {"model": model, "recipe": recipe, "batch_size": 2}
        given = trainable, backbone, images, np.zeros(2, np.int32)
        train.evaluate(*given, prompt_mask=mask, **static)
    assert train.eval_step._cache_size() == before + 1


def small_bfloat16(**changes):
    model = make_model(image_size=32, depth=2, dtype=jnp.bfloat16, **changes)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    prompts = vpt_jax.init_prompts(jax.random.key(2), model, (3, 2))
    return model, images, prompts


def test_the_fused_kernel_gets_scaled_queries_and_all_keys(monkeypatch):
    plain, images, prompts = small_bfloat16()
    backbone = jax.jit(plain.init)(jax.random.key(0), images)["params"]
    ours, lengths = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, scale, key_value_seq_lengths, implementation):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        lengths.append((k.shape[1], *key_value_seq_lengths.tolist()))
        with jax.numpy_dtype_promotion("standard"):
            return ours(
                q, k, v, scale=scale, key_value_seq_lengths=key_value_seq_lengths
            )

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    fused = plain.clone(attention="cudnn")
    a, _ = plain.apply({"params": backbone}, images, prompts=prompts)
    b, out = fused.apply({"params": backbone}, images, prompts=prompts)
    assert lengths == [(8, 8, 8), (8, 7, 7)]
    assert out["blocks"][0]["prompt_attention"].shape == (2, 3, 5, 3)
    # bfloat16 has 8 bits: the kernel's weights are rounded elsewhere.
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=0.05)
    mask = (jnp.array([True, False, True]), jnp.ones(2, bool))
    c, _ = fused.apply({"params": backbone}, images, prompts=prompts, prompt_mask=mask)
    d, _ = plain.apply({"params": backbone}, images, prompts=prompts, prompt_mask=mask)
    np.testing.assert_array_equal(c, d)  # products: the kernel has no key weights
    assert len(lengths) == 2


def test_the_fused_kernel_lowers_for_gpus(monkeypatch):
    # Without a GPU nothing can run it; its program can be written down.
    from jax._src.cudnn import fused_attention_stablehlo as kernel

    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda _: True)
    model, images, prompts = small_bfloat16(attention="cudnn")
    backbone = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    def loss(prompts, backbone):
        return model.apply({"params": backbone}, images, prompts=prompts)[0].sum()

    traced = jax.jit(jax.grad(loss)).trace(prompts, backbone)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("fmhaSoftmaxBackward") >= 2 and text.count("fmhaSoftmax") >= 4


def test_the_fused_kernel_needs_16_bits():
    model = make_model(image_size=32, depth=1, attention="cudnn")
    images = jnp.zeros((1, 32, 32, 3))
    with pytest.raises(ValueError, match="dtype float32; the kernel takes bfloat16"):
        jax.eval_shape(model.init, jax.random.key(0), images)
