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
            # Where L-BFGS ends.
            assert np.abs(grad).max() <= 1e-4


def test_a_decay_means_the_same_for_every_scale(problem):
    features, labels = problem
    a = next(probe.fit_probes(features, labels, 3, (0.01,))).head
    b = next(probe.fit_probes(1000 * features + 7, labels, 3, (0.01,))).head
    logits = features @ a["kernel"] + a["bias"]
    other = (1000 * features + 7) @ b["kernel"] + b["bias"]
    # Two descents that each end near the optimum.
    np.testing.assert_allclose(logits, other, atol=2e-3)


def test_more_decay_is_a_smaller_kernel(problem):
    probes = list(probe.fit_probes(*problem, 3, (10.0, 0.1, 0.001)))
    sizes = [np.square(p.head["kernel"]).sum() for p in probes]
    assert [p.decay for p in probes] == [10.0, 0.1, 0.001]
    assert sizes == sorted(sizes)


def test_the_decay_is_chosen_on_other_pictures():
    """Of equals the larger one; three in a row that are no better end the search."""
    heads = {d: {"kernel": [[d, 0.0]], "bias": [0.0, 0.5]} for d in range(9)}
    asked = []

    def probes(*order):
        for decay in order:
            asked.append(decay)
            yield probe.Probe(heads[decay], decay)

    def best(*order):
        asked.clear()
        return probe.best_probe(probes(*order), np.ones((1, 1)), np.zeros(1)).decay

    # A kernel above 0.5 is right.
    assert best(8, 7, 0, 6, 5) == 8 and asked == [8, 7, 0, 6]
    assert best(0, 0, 0, 3, 2, 0) == 3 and asked == [0, 0, 0, 3, 2, 0]
    assert best(0, 0, 0, 0, 3) == 0


def test_features_that_are_all_equal_give_the_prior():
    labels = np.array([0, 0, 0, 1])
    (found,) = probe.fit_probes(np.ones((4, 3), np.float32), labels, 2, (0.1,))
    logits = np.ones(3) @ found.head["kernel"] + found.head["bias"]
    assert logits[0] - logits[1] == pytest.approx(np.log(3), abs=1e-3)
