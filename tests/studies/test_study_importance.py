# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny
from test_main import load_config

import vpt_jax
from studies import importance, planted, ranks, removal, study
from vpt_jax.data.tasks import Split, Task
from vpt_jax.run import parsing
from vpt_jax.run.experiment import Model, Pictures

NUM = (2, 2, 2)


@pytest.fixture(scope="module")
def problem(tiny):
    """`(model, backbone, trainable, (pictures, labels))`, with prompts that matter."""
    model, backbone = tiny
    keys = jax.random.split(jax.random.key(1), 4)
    prompts = vpt_jax.init_prompts(keys[0], model, NUM)
    trainable = {
        "prompts": jax.tree.map(lambda p: 5 * p, prompts),
        "head": vpt_jax.init_head(keys[1], model.width, 4),
    }
    pictures = jax.random.normal(keys[2], (12, 8, 8, 3))
    return model, backbone, trainable, (pictures, jnp.arange(12) % 4)


def batch_of(problem):
    return {"image": problem[3][0], "label": problem[3][1]}


@functools.partial(jax.jit, static_argnums=0)
def features(model, backbone, pictures, prompts):
    return model.apply({"params": backbone}, pictures, prompts=prompts)[0]


def loss_of(problem, prompts):
    """Every example's loss, straight from the model."""
    model, backbone, trainable, (pictures, labels) = problem
    found = features(model, backbone, pictures, prompts)
    logits = vpt_jax.apply_head(trainable["head"], found)
    return vpt_jax.cross_entropy(logits, {"label": labels})


def test_what_does_not_vary_correlates_with_nothing():
    same, other = np.ones(5), np.arange(5.0)
    assert ranks.spearman(same, other) == ranks.kendall(same, other) == 0
    assert ranks.percentile(other, 4) == 100
    assert ranks.percentile(same, 0) == 50
    assert ranks.precision(other, -other, 0.2) == 0
    assert ranks.precision(other, other, 0.2) == 1


def test_the_oracle_is_the_loss_of_condensed_prompts(problem):
    trainable = problem[2]
    exact = removal.values("exact", *problem, batch_size=5)
    whole = loss_of(problem, trainable["prompts"])
    starts = np.cumsum((0, *NUM))
    for i, n in enumerate(NUM):
        for j in range(n):
            mask = [jnp.ones(m, bool) for m in NUM]
            mask[i] = mask[i].at[j].set(False)
            small = vpt_jax.condense(trainable["prompts"], tuple(mask))
            change = loss_of(problem, small) - whole
            # Differences of losses near 1: float32 leaves 1e-6.
            np.testing.assert_allclose(exact[:, starts[i] + j], change, atol=5e-6)


def test_a_group_is_the_mask_of_all_its_prompts(problem):
    masks = np.ones((2, 6), bool)
    masks[1, [1, 4]] = False
    parts = tuple(jnp.asarray(masks[:, i : i + 2]) for i in (0, 2, 4))
    got = removal.values("masked", *problem, batch_size=5, masks=parts)
    small = vpt_jax.condense(problem[2]["prompts"], tuple(m[1] for m in parts))
    np.testing.assert_allclose(got[:, 1], loss_of(problem, small), atol=5e-6)
    whole = loss_of(problem, problem[2]["prompts"])
    np.testing.assert_allclose(got[:, 0], whole, atol=5e-6)


@pytest.mark.parametrize("name", ["key_gate", "signed", "taylor", "attention"])
def test_scores_are_those_of_the_library(problem, name):
    what, reduction = importance.SCORES[name]
    got = importance.reduce(removal.values(what, *problem, batch_size=5), reduction)
    given, how = (*problem[:3], [batch_of(problem)]), {"reduction": reduction}
    expected = np.concatenate(vpt_jax.importance(*given, score=what, **how))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)


def test_removal_is_exact_where_nothing_curved_follows():
    """A prompt of the last layer, its MLP and final norm made (nearly) linear.

    The change of the logits is then the attention's alone, which removal has exactly
    and key_gate only to first order. Linear: an MLP of zeros, and a class token so
    large that the final norm does not see the attention's part of its length.
    """
    model, backbone = make_tiny(depth=1)
    encoder = backbone["Transformer"]
    block = encoder["encoderblock_0"]
    block["MlpBlock_0"] = jax.tree.map(jnp.zeros_like, block["MlpBlock_0"])
    backbone["cls"] = 1e3 * backbone["cls"]
    prompts = (5 * vpt_jax.init_prompts(jax.random.key(1), model, 3)[0],)
    head = vpt_jax.init_head(jax.random.key(2), model.width, 4)
    trainable = {"prompts": prompts, "head": head}
    pictures = jax.random.normal(jax.random.key(3), (6, 8, 8, 3))
    problem = (model, backbone, trainable, (pictures, jnp.arange(6) % 4))
    exact, removed, gate = (
        removal.values(what, *problem, batch_size=6)
        for what in ("exact", "removal", "key_gate")
    )
    assert np.abs(removed - exact).max() < 0.1 * np.abs(gate - exact).max()


def test_planted_prompts_are_what_they_claim(problem):
    model, backbone, trainable, data = problem
    oracle = np.array([0, 5, 1, 4, 2, 3.0])
    made = planted.plant(model, backbone, trainable, data[0], oracle, steps=60)
    prompts = made.trainable["prompts"]
    assert made.places == {"twins": [3, 2], "flat": [0], "unattended": [4]}
    np.testing.assert_array_equal(prompts[1][0], prompts[1][1])
    np.testing.assert_array_equal(prompts[0][0], 1)
    for i, p in enumerate(trainable["prompts"]):  # nothing else was touched
        np.testing.assert_array_equal(prompts[i][1], p[1])
    after, before = (
        planted.attention_mass(model, backbone, p, data[0], 2, 0).mean()
        for p in (prompts, trainable["prompts"])
    )
    assert after < 0.1 * before
    given = (model, backbone, made.trainable, data)
    flat = removal.values("taylor", *given, batch_size=12)[:, 0]
    assert np.abs(flat).max() < 1e-3
    gate = removal.values("key_gate", *given, batch_size=12)
    np.testing.assert_allclose(gate[:, 2], gate[:, 3], atol=1e-6)


def test_planting_needs_three_layers(problem):
    model, backbone, trainable, data = problem
    few = {**trainable, "prompts": tuple(p[:1] for p in trainable["prompts"])}
    with pytest.raises(ValueError, match="three layers with two prompts"):
        planted.plant(model, backbone, few, data[0], np.zeros(3))


def make_lab(workdir):
    model, backbone = make_tiny()
    images = np.random.default_rng(0).integers(0, 255, (10, 8, 8, 3), np.uint8)
    split = Split(images, np.arange(10, dtype=np.int32) % 2)
    task = Task("noise", ("a", "b"), split, None, split)
    values = load_config("configs/demo.py", "smoke,seeds=2")
    values.prompts.num_prompts = 2
    values.tune.update(optimizer="sgd", head_lr=0.0, batch_size=5)
    values.score.batch_size = 5
    info = {"name": "tiny", "variant": "tiny", "parameters": 1, "load": {}}
    info |= {"hash": vpt_jax.backbone_hash(backbone), "normalisation": "half"}
    pictures = Pictures(task, *map(jnp.asarray, split))
    loaded = Model(model, backbone, info)
    return study.Lab(parsing.parse(values), workdir, loaded, pictures)


def test_the_study_measures_and_shows(tmp_path):
    lab = make_lab(tmp_path)
    lab = lab._replace(config=dataclasses.replace(lab.config, seeds=(0,)))
    one = json.loads(json.dumps(importance.run(lab), allow_nan=False))
    (seed,) = one["seeds"]
    assert seed["seed"] == 0 and len(seed["rows"]) == len(importance.SCORES) * 4
    two = {**one, "seeds": [seed, {**seed, "seed": 1}]}
    for result in (one, two):
        section = importance.show(result)
        assert study.html(section).count("<svg") == 3
        assert {claim.verdict for claim in section.verdicts} <= set(study.VERDICTS)
