# SPDX-License-Identifier: Apache-2.0
"""Scores without labels: their derivatives, oracles and verdicts, and a small lab."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_study_importance import make_lab

import vpt_jax
from studies import gates, removal, study, unlabelled

NUM = (2, 2, 2)
DRAWS = 1000  # for each of four times the same picture


@pytest.fixture(scope="module")
def made(tiny):
    """`(model, backbone, trainable, batch)` with prompts that matter."""
    model, backbone = tiny
    keys = jax.random.split(jax.random.key(1), 3)
    prompts = vpt_jax.init_prompts(keys[0], model, NUM)
    head = vpt_jax.init_head(keys[1], model.width, 4)
    trainable = {
        "prompts": jax.tree.map(lambda p: 5 * p, prompts),
        # No class so rare that draws of it would be all of a mean.
        "head": jax.tree.map(lambda x: 0.3 * x, head),
    }
    image = jax.random.normal(keys[2], (4, 8, 8, 3))
    return model, backbone, trainable, {"image": image, "label": jnp.arange(4)}


def in_float64(made):
    model, *arrays = made
    arrays = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        arrays,
    )
    return model.clone(dtype=jnp.float64, param_dtype=jnp.float64), *arrays


@pytest.fixture
def problem(made):
    """In float64, and with it whatever the test computes."""
    with jax.enable_x64(True):
        yield in_float64(made)


@pytest.fixture(scope="module")
def draws(made):
    """Values of the first picture, drawn again and again: `[draws, 6]` by name."""
    with jax.enable_x64(True):
        given = repeated(in_float64(made), 4)
        found = [derivatives(given, seed) for seed in range(DRAWS)]
        return {name: np.concatenate([x[name] for x in found]) for name in found[0]}


def derivatives(problem, seed=0):
    model, backbone, trainable, batch = problem
    key = jax.random.key(seed)
    return gates.derivatives(backbone, trainable, batch, key, model=model)


def outputs_of(problem):
    """Features and log-probabilities as a function of all prompts' gates `[6]`."""
    model, backbone, trainable, batch = problem

    @jax.jit
    def outputs(gates):
        features, _ = model.apply(
            {"params": backbone},
            batch["image"],
            prompts=trainable["prompts"],
            prompt_gate=tuple(jnp.split(gates, np.cumsum(NUM)[:-1])),
        )
        logits = vpt_jax.apply_head(trainable["head"], features)
        return features, jax.nn.log_softmax(logits)

    return outputs


def repeated(problem, times):
    """The first picture of a problem, many times over."""
    model, backbone, trainable, batch = problem
    many = jax.tree.map(lambda x: jnp.repeat(x[:1], times, axis=0), batch)
    return model, backbone, trainable, many


def check_mean(values, expected):
    """The mean of draws is what is expected: within five of its standard errors."""
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    assert (error < 0.1 * expected).all()  # else the test would say nothing
    assert (np.abs(values.mean(axis=0) - expected) < 5 * error).all()


def test_entropy_and_pseudo_label_are_central_differences(problem):
    got, eps = derivatives(problem), 1e-5
    outputs = outputs_of(problem)
    own = np.asarray(outputs(jnp.ones(6))[1]).argmax(axis=1)
    rows = np.arange(len(own))
    for j in range(6):
        step = jnp.zeros(6).at[j].set(eps)
        at = [np.asarray(outputs(1 + sign * step)[1]) for sign in (1, -1)]
        entropies = [-(np.exp(log_p) * log_p).sum(axis=1) for log_p in at]
        losses = [-log_p[rows, own] for log_p in at]
        for name, (up, down) in (("entropy", entropies), ("pseudo_label", losses)):
            found = got[f"{name}, key_gate"][:, j]
            # Central differences: error of order eps**2 and rounding / eps.
            np.testing.assert_allclose(found, -(up - down) / (2 * eps), atol=1e-9)


def test_distill_is_the_second_difference_of_the_divergence(problem, draws):
    outputs, eps = outputs_of(repeated(problem, 1)), 1e-3
    log_p = outputs(jnp.ones(6))[1]
    slopes = jax.jacfwd(outputs)(jnp.ones(6))[1]
    fisher = (jnp.exp(log_p)[..., None] * slopes**2).sum(axis=(0, 1))
    expected = []
    for j in range(6):
        step = jnp.zeros(6).at[j].set(eps)
        others = [outputs(1 + sign * step)[1] for sign in (1, -1)]
        kl = [float((jnp.exp(log_p) * (log_p - x)).sum()) for x in others]
        assert min(kl) > 0
        # The step from 1 to 0 has length 1: half the second derivative.
        expected.append(sum(kl) / eps**2 / 2)
    # Third derivatives cancel, fourth ones leave eps**2.
    np.testing.assert_allclose(fisher / 2, expected, rtol=1e-4)
    check_mean(draws["distill, key_gate"], np.asarray(expected))


def test_feature_change_is_the_features_derivative_squared(problem, draws):
    outputs = outputs_of(repeated(problem, 1))
    slopes = jax.jacfwd(outputs)(jnp.ones(6))[0]
    expected = np.asarray((slopes**2).sum(axis=(0, 1)))
    check_mean(draws["feature_change, key_gate"], expected)


def test_with_labels_the_values_are_the_librarys(problem):
    model, backbone, trainable, batch = problem
    # Examples do not see each other: neither order nor batches matter.
    data = (jnp.concatenate([x, x[::-1]]) for x in (batch["image"], batch["label"]))
    given = (model, backbone, trainable, tuple(data))
    found = gates.values(gates.derivatives, *given, batch_size=4)
    names = {"loss, key_gate": "key_gate", "loss, removal": "removal"}
    for name, score in (names | {"attention": "attention"}).items():
        expected = removal.values(score, *given, batch_size=8)
        np.testing.assert_allclose(found[name], expected, atol=1e-12)


def test_labels_are_read_by_the_loss_alone(problem):
    *rest, batch = problem
    other = {**batch, "label": (batch["label"] + 1) % 4}
    before, after = derivatives(problem), derivatives((*rest, other))
    differ = [name for name in before if (before[name] != after[name]).any()]
    assert differ == ["loss, key_gate", "loss, removal"]


def divergence(problem):
    *given, batch = problem
    data = (batch["image"], batch["label"])
    return gates.values(gates.divergence, *given, data, batch_size=4)["divergence"]


def test_the_divergence_is_that_of_condensed_prompts(made):
    model, backbone, trainable, batch = made

    @jax.jit
    def log_p(prompts):
        inputs = {"params": backbone}
        features, _ = model.apply(inputs, batch["image"], prompts=prompts)
        return jax.nn.log_softmax(vpt_jax.apply_head(trainable["head"], features))

    got, whole = divergence(made), log_p(trainable["prompts"])
    places = [(i, j) for i, n in enumerate(NUM) for j in range(n)]
    for column, (layer, j) in enumerate(places):
        mask = [jnp.ones(n, bool) for n in NUM]
        mask[layer] = mask[layer].at[j].set(False)
        without = log_p(vpt_jax.condense(trainable["prompts"], tuple(mask)))
        expected = (jnp.exp(whole) * (whole - without)).sum(axis=1)
        # Differences of entropies near 1: float32 leaves 1e-6.
        np.testing.assert_allclose(got[:, column], expected, atol=2e-6)


def test_removal_is_closer_to_the_divergence_than_the_plain_gate(made, draws):
    """What the softmax does to the other keys is a large part of the change."""
    exact = divergence(made)[0]
    error = {
        form: np.abs(draws[f"distill, {form}"].mean(axis=0) - exact).sum()
        for form in gates.FORMS
    }
    assert error["removal"] < 0.5 * error["key_gate"]


MEASURED = ("spearman", "kendall", "layer_spearman", "layer_kendall", "precision")


def row(score, dtype, oracle, seed=0, rho=0.9):
    about = {"score": score, "dtype": dtype, "oracle": oracle}
    return about | dict.fromkeys(MEASURED, rho + 0.01 * seed)


def made_up(lost=0.2, low=0.9, seeds=3, noise=0.1):
    """A result in which `entropy` is best on val and loses `lost` points on test."""
    shift = noise * np.arange(seeds)

    def outcome(test, val):
        return {"test": (test + shift).tolist(), "val": (val + shift).tolist()}

    accuracy = {"1.0": {"all": outcome(50.0, 50.0)}}
    for ratio, names in unlabelled.FINETUNED.items():
        accuracy[str(ratio)] = {name: outcome(39.0, 40.0) for name in names}
        accuracy[str(ratio)]["removal"] = outcome(45.0, 45.0)
    at_30 = accuracy["0.3"]
    at_30["random"] = outcome(30.0, 60.0)  # no candidate, however good on val
    at_30["distill"] = outcome(47.0, 41.0)  # better on test, but not on val
    at_30["entropy"] = {
        "test": (45.0 - lost + shift * np.arange(seeds)).tolist(),
        "val": [44.0] * seeds,
    }
    references = (*unlabelled.ORACLES, unlabelled.DEFAULT, unlabelled.SECOND)
    seeds = [
        {
            "seed": seed,
            "rows": [
                row(score, dtype, oracle, seed, low if score == "distill" else 0.85)
                for score in unlabelled.SCORES
                for dtype in unlabelled.DTYPES
                for oracle in references
            ],
            "divergence_halves": 0.9,
            "divergence_share": {"removal": 1.0, "key_gate": 0.5},
        }
        for seed in range(seeds)
    ]
    return {"examples": 10, "seeds": seeds, "accuracy": accuracy}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (made_up(lost=0.2), "supported"),
        (made_up(lost=4.0), "not supported"),
        (made_up(lost=1.5), "undecided"),
        (made_up(lost=0.2, seeds=1), "undecided"),
    ],
)
def test_the_verdict_on_labels_follows_the_score_chosen_on_val(found, expected):
    verdict = unlabelled.show(found).verdicts[0]
    assert verdict.verdict == expected
    assert "entropy, best of 6 on val" in verdict.because


@pytest.mark.parametrize(
    ("low", "expected"),
    [(0.8, "supported"), (0.795, "undecided"), (0.7, "not supported")],
)
def test_the_verdict_on_distill_needs_every_seed(low, expected):
    verdicts = unlabelled.show(made_up(low=low)).verdicts
    assert [v.verdict for v in verdicts[1:]] == [expected, "supported"]


def test_a_small_lab(tmp_path):
    """What was trained is found again, and the result is plain."""
    lab = make_lab(tmp_path)
    task = lab.pictures.task
    recipe = {"optimizer": "sgd", "head_lr": 0.0, "batch_size": 5}
    settings = dataclasses.replace(lab.config.finetune, **recipe)
    config = dataclasses.replace(lab.config, finetune=settings)
    pictures = lab.pictures._replace(task=task._replace(val=task.test))
    lab = lab._replace(config=config, pictures=pictures)
    found = unlabelled.run(lab)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1]
    for ratio, names in unlabelled.FINETUNED.items():
        assert tuple(found["accuracy"][str(ratio)]) == names
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("masked/*.json")}
    assert len(kept) > 10
    assert unlabelled.run(lab) == found
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("masked/*.json")} == kept
    section = unlabelled.show(found)
    assert study.html(section).count("<svg") == 2
    study.print_section(section)
