# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import pytest

import vpt_jax
from vpt_jax.models.swin import Swin


@pytest.mark.parametrize(
    ("prompts", "giga"),
    [(0, 17.56), (50, 22.22), (100, 26.97), (150, 31.81), (200, 36.74)],
)
def test_reference_formulation_gives_the_papers_table_1(prompts, giga):
    model = vpt_jax.ViT("B/16")
    got = vpt_jax.macs(model, (prompts,) * 12, formulation="tokens")
    assert round(got / 1e9, 2) == giga


def test_shallow_prompts_are_tokens_of_every_block():
    model = vpt_jax.ViT("B/16")
    shallow = vpt_jax.macs(model, (50, *(0,) * 11), deep=False)
    assert shallow == vpt_jax.macs(model, (50,) * 12, formulation="tokens")


def test_ragged_counts_add_up():
    model = vpt_jax.ViT("S/16")
    for formulation in ("kv", "tokens"):

        def cost(counts, formulation=formulation):
            return vpt_jax.macs(model, counts, formulation=formulation)

        base, zeros = cost((0,) * 12), [0] * 12
        ones = [cost((*zeros[:i], 7, *zeros[i + 1 :])) - base for i in range(12)]
        assert cost((7,) * 12) == base + sum(ones)


def xla_over_ours(model, counts, batch, **how):
    """XLA's own count, taken whole, of a program that is compiled, to ours.

    XLA counts every floating-point operation (a multiply-accumulate is two),
    elementwise work included; that work is 0.5-1.5 % of ViT-B/16, for which the tests
    leave 3 % of room. A part of the prompts' projection belongs to each picture.
    """
    side = model.image_size
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    shapes = zip(counts, model.widths, strict=True)
    tokens = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def features(params, images, tokens):
        return model.apply(params, images, prompts=tokens, **how)[0]

    compiled = jax.jit(features).lower(params, images, tokens).compile()
    flops = compiled.cost_analysis()["flops"] / batch
    return flops / 2 / vpt_jax.macs(model, counts, prompt_batch=batch, **how)


@pytest.mark.parametrize("formulation", ["kv", "tokens"])
@pytest.mark.parametrize("prompts", [0, 100])
def test_agrees_with_xlas_own_count(formulation, prompts):
    model = vpt_jax.ViT("B/16")
    found = xla_over_ours(model, (prompts,) * 12, 4, formulation=formulation)
    assert 1 <= found < 1.03


@pytest.mark.parametrize("formulation", ["kv", "tokens"])
@pytest.mark.parametrize(
    "options",
    [
        {"readout": "mean", "registers": 4},
        {"readout": "mean_with_prompts", "swiglu": True},
        {"readout": "mean", "class_token": False},
        {"readout": "map", "class_token": False},
        {"posemb": "rotary", "pre_norm": True, "registers": 4},
    ],
)
def test_other_backbones_agree_with_xlas_own_count(options, formulation):
    """On two layers, with a prompt in every fourth token."""
    sizes = {"width": 768, "depth": 2, "num_heads": 12, "mlp_dim": 3072, "patch": 16}
    model = vpt_jax.ViT(**sizes, **options)
    found = xla_over_ours(model, (49, 49), 4, formulation=formulation)
    # The reference computes the last block whole; XLA leaves out what is not read.
    assert (1 if formulation == "kv" else 0.98) <= found < 1.03


@pytest.mark.parametrize(
    ("variant", "giga"), [("T", 4.5), ("S", 8.7), ("B", 15.4), ("L", 34.5)]
)
def test_swin_gives_the_numbers_of_its_paper(variant, giga):
    model = Swin(variant)  # Liu et al., table 1, at 224; L: their repository
    assert round(vpt_jax.macs(model, (0,) * model.depth) / 1e9, 1) == giga


@pytest.mark.parametrize("readout", ["mean", "mean_with_prompts"])
@pytest.mark.parametrize(
    ("prompts", "formulation", "deep"),
    [(0, "kv", True), (50, "kv", True), (50, "tokens", True), (50, "tokens", False)],
)
def test_swin_agrees_with_xlas_own_count(readout, prompts, formulation, deep):
    """At the widths of Swin-B's first two stages."""
    model = Swin("B", depths=(1, 2), num_heads=(4, 8), image_size=112, readout=readout)
    counts = (prompts,) * 3 if deep else (prompts, 0, 0)
    found = xla_over_ours(model, counts, 2, formulation=formulation, deep=deep)
    assert 1 <= found < 1.03


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"counts": (1, 2)}, "2 entries but the model has depth 12"),
        ({"counts": (1,) * 12, "formulation": "x"}, "unknown formulation 'x'"),
        ({"counts": (1,) * 12, "deep": False}, "with deep=False; shallow prompts"),
    ],
)
def test_wrong_macs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        vpt_jax.macs(vpt_jax.ViT("B/16"), **kwargs)
