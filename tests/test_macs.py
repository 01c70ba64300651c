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


@pytest.mark.parametrize("formulation", ["kv", "tokens"])
@pytest.mark.parametrize("prompts", [0, 100])
def test_agrees_with_xlas_own_count(formulation, prompts):
    """Within 3 %, XLA's count taken whole.

    XLA counts every floating-point operation (a multiply-accumulate is two),
    elementwise work included; that work is 0.5-1.5 % of ViT-B/16, for which the 3 %
    leave room.
    The batch is 4, so a quarter of the prompts' projection belongs to each picture.
    """
    model, batch = vpt_jax.ViT("B/16"), 4
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    tokens = tuple(
        jax.ShapeDtypeStruct((prompts, model.width), jnp.float32) for _ in range(12)
    )

    def features(params, images, tokens):
        return model.apply(params, images, prompts=tokens, formulation=formulation)[0]

    compiled = jax.jit(features).lower(params, images, tokens).compile()
    flops = compiled.cost_analysis()["flops"] / batch
    counted = 2 * vpt_jax.macs(
        model, (prompts,) * 12, formulation=formulation, prompt_batch=batch
    )
    assert 1 <= flops / counted < 1.03


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
    """As above, on two layers, with a prompt in every fourth token."""
    sizes = {"width": 768, "depth": 2, "num_heads": 12, "mlp_dim": 3072, "patch": 16}
    model, batch, num = vpt_jax.ViT(**sizes, **options), 4, 49
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    tokens = (jax.ShapeDtypeStruct((num, 768), jnp.float32),) * 2

    def features(params, images, tokens):
        return model.apply(params, images, prompts=tokens, formulation=formulation)[0]

    compiled = jax.jit(features).lower(params, images, tokens).compile()
    flops = compiled.cost_analysis()["flops"] / batch
    counted = 2 * vpt_jax.macs(
        model, (num,) * 2, formulation=formulation, prompt_batch=batch
    )
    # The reference computes the last block whole; XLA leaves out what is not read.
    low = 1 if formulation == "kv" else 0.98
    assert low <= flops / counted < 1.03


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
    """Within 3 %, as for the ViT, at the widths of Swin-B's first two stages."""
    model = Swin("B", depths=(1, 2), num_heads=(4, 8), image_size=112, readout=readout)
    batch, counts = 2, (prompts,) * 3 if deep else (prompts, 0, 0)
    images = jax.ShapeDtypeStruct((batch, 112, 112, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    tokens = tuple(
        jax.ShapeDtypeStruct((n, width), jnp.float32)
        for n, width in zip(counts, model.widths, strict=True)
    )

    def features(params, images, tokens):
        return model.apply(
            params, images, prompts=tokens, formulation=formulation, deep=deep
        )[0]

    compiled = jax.jit(features).lower(params, images, tokens).compile()
    flops = compiled.cost_analysis()["flops"] / batch
    counted = 2 * vpt_jax.macs(
        model, counts, formulation=formulation, deep=deep, prompt_batch=batch
    )
    assert 1 <= flops / counted < 1.03


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"counts": (1, 2)}, "2 entries but the model has depth 12"),
        ({"counts": (1,) * 12, "formulation": "x"}, "unknown formulation 'x'"),
    ],
)
def test_wrong_macs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        vpt_jax.macs(vpt_jax.ViT("B/16"), **kwargs)
