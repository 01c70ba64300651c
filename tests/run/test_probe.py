# SPDX-License-Identifier: Apache-2.0
"""The regularised linear probe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpt_jax.run import probe


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = rng.normal(size=(60, 8)) + np.eye(8)[labels] * 2
    return (40 * features).astype(np.float32), labels


@pytest.mark.parametrize("decay", [1.0, 1e-3])
def test_it_is_the_optimum(problem, decay):
    """JAX's gradient of the stated loss, in float64, is 0 there."""
    features, labels = problem
    (found,) = probe.fit_probes(features, labels, 3, (decay,))
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        x = jnp.asarray(features, jnp.float64)
        mean, scale = x.mean(0), jnp.sqrt(x.var(0).mean())

        def loss(kernel, bias):
            logits = (x - mean) / scale @ kernel + bias
            log_p = jax.nn.log_softmax(logits)
            fit = -log_p[jnp.arange(60), labels].mean()
            return fit + decay / 2 * (kernel**2).sum()

        kernel = jnp.asarray(found.head["kernel"]) * scale
        bias = jnp.asarray(found.head["bias"]) + mean @ found.head["kernel"]
        for grad in jax.grad(loss, (0, 1))(kernel, bias):
            # L-BFGS stops at a projected gradient of 1e-5 or where the loss stands.
            assert np.abs(grad).max() < 1e-4


def test_a_decay_means_the_same_for_every_scale(problem):
    features, labels = problem
    a = probe.fit_probes(features, labels, 3, (0.01,))[0].head
    b = probe.fit_probes(1000 * features + 7, labels, 3, (0.01,))[0].head
    logits = features @ a["kernel"] + a["bias"]
    other = (1000 * features + 7) @ b["kernel"] + b["bias"]
    # Two descents that each stop within 1e-5 of the optimum.
    np.testing.assert_allclose(logits, other, atol=2e-3)


def test_more_decay_is_a_smaller_kernel(problem):
    probes = probe.fit_probes(*problem, 3, (10.0, 0.1, 0.001))
    sizes = [np.square(p.head["kernel"]).sum() for p in probes]
    assert [p.decay for p in probes] == [10.0, 0.1, 0.001]
    assert sizes == sorted(sizes)


def test_the_decay_is_chosen_on_other_pictures(problem):
    features, labels = problem
    probes = probe.fit_probes(features, labels, 3)
    # Labels at random: nothing is learnt of them, so ties go to the largest decay.
    best = probe.best_probe(probes, features[:1], labels[:1])
    right = [p for p in probes if probe.accuracy(p.head, features[:1], labels[:1])]
    assert best is right[0]
    assert len(probes) == len(probe.DECAYS) == 13


def test_features_that_are_all_equal_give_the_prior():
    labels = np.array([0, 0, 0, 1])
    (found,) = probe.fit_probes(np.ones((4, 3), np.float32), labels, 2, (0.1,))
    logits = np.ones(3) @ found.head["kernel"] + found.head["bias"]
    assert logits[0] - logits[1] == pytest.approx(np.log(3), abs=1e-3)
