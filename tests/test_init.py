# SPDX-License-Identifier: Apache-2.0
"""How prompts and head start."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vpt_jax

KEY = jax.random.key(0)


def vit():
    model = vpt_jax.ViT(
        width=8, depth=3, num_heads=2, mlp_dim=16, patch=4, image_size=12, registers=2
    )
    images = jax.random.normal(KEY, (4, 12, 12, 3))
    return model, jax.jit(model.init)(KEY, images)["params"], images


def swin():
    model = vpt_jax.Swin(
        embed_dim=8, depths=(1, 2), num_heads=(2, 4), window=2, patch=2, image_size=8
    )
    images = jax.random.normal(KEY, (4, 8, 8, 3))
    return model, jax.jit(model.init)(KEY, images)["params"], images


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))


class Foreign(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x.reshape(x.shape[0], -1, 12))
        for i in range(2):
            x = Block(name=f"encoderblock_{i}")(x)
        return x.mean(1)


def foreign():
    module, images = Foreign(), jax.random.normal(KEY, (4, 8, 8, 3))
    params = jax.jit(module.init)(KEY, images)["params"]
    return vpt_jax.PromptedModel(module, depth=2, width=8, patch=2), params, images


def test_tokens_are_those_that_enter_the_blocks():
    """As the model itself names them: embedded, and what each block returns."""
    model, backbone, images = vit()
    tokens = vpt_jax.block_tokens(model, backbone, images)
    empty = tuple(jnp.zeros((0, 8)) for _ in range(3))
    # The tokens' formulation keeps those of every block whole.
    _, out = model.apply(
        {"params": backbone}, images, prompts=empty, formulation="tokens"
    )
    expected = [out["embedded"], *(b["tokens"] for b in out["blocks"][:-1])]
    for got, want in zip(tokens, expected, strict=True):
        # Two programs that XLA rounds differently.
        np.testing.assert_allclose(got, want.reshape(-1, 8), atol=1e-5)


@pytest.mark.parametrize("make", [vit, swin, foreign])
@pytest.mark.parametrize("init", ["tokens", "kmeans"])
def test_every_model_starts_from_its_tokens(make, init):
    model, backbone, images = make()
    tokens = vpt_jax.block_tokens(model, backbone, images)
    depth = len(model.widths)
    counts = tuple(range(depth))  # ragged, the first layer has none
    prompts = vpt_jax.init_prompts(KEY, model, counts, init=init, tokens=tokens)
    assert vpt_jax.counts(prompts) == counts
    for p, t in zip(prompts, tokens, strict=True):
        p = np.asarray(p)
        assert p.shape[1] == t.shape[1] and np.isfinite(p).all()
        if init == "tokens":
            assert len({row.tobytes() for row in p}) == len(p)
            assert all((row == t).all(axis=1).any() for row in p)
        elif len(p):
            assert (p <= t.max(axis=0)).all() and (p >= t.min(axis=0)).all()
    model.apply({"params": backbone}, images, prompts=prompts)
    again = vpt_jax.init_prompts(KEY, model, counts, init=init, tokens=tokens)
    other = vpt_jax.init_prompts(
        jax.random.key(1), model, counts, init=init, tokens=tokens
    )
    assert all(map(np.array_equal, prompts, again))
    if init == "tokens":  # centres may be found from every start
        assert not all(map(np.array_equal, prompts, other))


def test_shallow_prompts_start_from_the_first_blocks_tokens():
    model, backbone, images = vit()
    tokens = vpt_jax.block_tokens(model, backbone, images)
    prompts = vpt_jax.init_prompts(
        KEY, model, 2, deep=False, init="tokens", tokens=tokens
    )
    assert vpt_jax.counts(prompts) == (2, 0, 0)


def test_kmeans_finds_clusters():
    model, *_ = vit()
    centres = 10 * np.eye(3, 8)
    rng = np.random.default_rng(0)
    near = np.repeat(centres, 30, axis=0) + 0.01 * rng.normal(size=(90, 8))
    for seed in range(20):  # a start with one token of each cluster finds all
        prompts = vpt_jax.init_prompts(
            jax.random.key(seed), model, (3, 0, 0), init="kmeans", tokens=[near] * 3
        )
        gaps = np.abs(np.asarray(prompts[0])[:, None] - centres[None]).max(-1).min(0)
        if (gaps < 0.05).all():
            return
    raise AssertionError("no start found three clusters that lie far apart")


def test_normal_has_its_deviation():
    model = vpt_jax.ViT("demo/4")
    prompts = vpt_jax.init_prompts(KEY, model, 200, init="normal")
    assert np.std(np.concatenate(prompts)) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("num", [2, 10, 100])
def test_a_head_of_zeros_starts_at_log_classes(num):
    head = vpt_jax.init_head(KEY, 8, num, init="zeros")
    logits = vpt_jax.apply_head(head, 1000 * jnp.ones((1, 8)))
    loss = vpt_jax.cross_entropy(logits, {"label": jnp.zeros(1, jnp.int32)})
    assert float(loss[0]) == pytest.approx(np.log(num), rel=1e-6)


def test_errors_say_what_to_pass():
    model, *_ = vit()
    with pytest.raises(ValueError, match="'random'; choose one of 'reference'"):
        vpt_jax.init_prompts(KEY, model, 2, init="random")
    with pytest.raises(ValueError, match=r"Pass tokens=block_tokens"):
        vpt_jax.init_prompts(KEY, model, 2, init="tokens")
    few = [np.zeros((1, 8))] * 3
    with pytest.raises(ValueError, match=r"shapes \[\(1, 8\).*at least \[\(2, 8\)"):
        vpt_jax.init_prompts(KEY, model, 2, init="kmeans", tokens=few)
    module, params, images = foreign()
    with pytest.raises(ValueError, match="widths \\[\\]; expected \\[8, 8\\]"):
        vpt_jax.block_tokens(module, params, images, block="no_such_block")
