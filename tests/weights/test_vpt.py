# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of VPT's code, by its modules' names; `tests/parity` has PyTorch."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import vpt_jax
from vpt_jax.weights.vpt import load_vpt, save_vpt

VIT = vpt_jax.ViT("demo/4")
SWIN = vpt_jax.Swin(
    embed_dim=8, depths=(2, 2), num_heads=(2, 2), window=2, patch=2, image_size=8
)
RNG = np.random.default_rng(0)
FIRST = "enc.transformer.prompt_embeddings"
LATER = "enc.transformer.deep_prompt_embeddings"


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def state(**more):
    """Of a VPT-Deep ViT with 3 prompts a layer."""
    names = {
        FIRST: normal(1, 3, 128),
        LATER: normal(5, 3, 128),
        "head.last_layer.weight": normal(7, 128),
        "head.last_layer.bias": normal(7),
        "enc.transformer.embeddings.cls_token": normal(1, 1, 128),
    }
    return names | more


@pytest.fixture
def saved(tmp_path):
    def save(arrays):
        save_file(arrays, tmp_path / "vpt.safetensors")
        return tmp_path / "vpt.safetensors"

    return save


def test_deep_prompts_and_head_of_a_vit(saved):
    arrays = state()
    prompts, head, deep = load_vpt(saved(arrays), VIT)
    assert deep and vpt_jax.counts(prompts) == (3,) * 6
    whole = np.concatenate([arrays[FIRST], arrays[LATER]])
    np.testing.assert_array_equal(np.stack(prompts), whole)
    np.testing.assert_array_equal(head["kernel"].T, arrays["head.last_layer.weight"])
    np.testing.assert_array_equal(head["bias"], arrays["head.last_layer.bias"])


def test_shallow_prompts(saved):
    arrays = state()
    del arrays[LATER]
    prompts, _, deep = load_vpt(saved(arrays), VIT)
    assert not deep and vpt_jax.counts(prompts) == (3, 0, 0, 0, 0, 0)


def test_a_projection_is_applied(saved):
    weight, bias = normal(128, 5), normal(128)
    arrays = {FIRST: normal(1, 3, 5), LATER: normal(5, 3, 5)}
    proj = {"prompt_proj.weight": weight, "prompt_proj.bias": bias}
    prompts, head, _ = load_vpt(saved(arrays | proj), VIT)
    own = arrays[LATER][2] @ weight.T + bias
    np.testing.assert_allclose(prompts[3], own, rtol=1e-6)
    assert head is None


def test_a_swin_has_prompts_by_stage(saved):
    arrays = {
        "enc.prompt_embeddings": normal(1, 3, 8),
        "enc.deep_prompt_embeddings_0": normal(1, 3, 8),
        "enc.deep_prompt_embeddings_1": normal(2, 3, 16),
    }
    prompts, _, deep = load_vpt(saved(arrays), SWIN)
    assert deep and [p.shape for p in prompts] == [(3, 8), (3, 8), (3, 16), (3, 16)]
    np.testing.assert_array_equal(prompts[3], arrays["enc.deep_prompt_embeddings_1"][1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (state(**{FIRST: normal(1, 3, 64)}), r"widths \[64, 128\]"),
        (state(**{LATER: normal(4, 3, 128)}), "of 5 layers"),
        (state(**{"module.prompt_embeddings": normal(1, 3, 128)}), "embeddings twice"),
        ({"x": normal(1)}, "no prompt_embeddings"),
    ],
)
def test_what_does_not_fit_is_refused(saved, arrays, message):
    with pytest.raises(vpt_jax.CheckpointError, match=message):
        load_vpt(saved(arrays), VIT)


def test_an_mlp_head_is_left_out(saved):
    path = saved(state(**{"head.projection.0.weight": normal(128, 128)}))
    assert load_vpt(path, VIT).head is None


def test_only_equal_numbers_can_be_written(tmp_path):
    prompts = vpt_jax.init_prompts(jax.random.key(0), VIT, (3, 2, 3, 3, 3, 3))
    with pytest.raises(ValueError, match="same number in every layer"):
        save_vpt(tmp_path / "x.pth", prompts, model=VIT)
