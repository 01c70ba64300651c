# SPDX-License-Identifier: Apache-2.0
"""The linear probe: regularised logistic regression on frozen features.

What tuned prompts have to beat. The reference trains its probe by SGD over a grid of
rates; this one is the optimum of a convex problem, found in seconds without a rate.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vpt_jax import parallel, train
from vpt_jax.models.inputs import normalise

DECAYS = tuple(float(f"{10.0**-e:.3g}") for e in np.arange(-1.0, 5.1, 0.5))
"""Decays that are tried, 10 ... 1e-5, of features at unit scale."""
PATIENCE = 3
OPTIONS = {"maxiter": 500, "gtol": 1e-4}  # the largest gradient that it ends at


class Probe(NamedTuple):
    """A fitted head `{kernel [d, k], bias [k]}` for features as they are."""

    head: dict[str, np.ndarray]
    decay: float


def feature_scale(features: np.ndarray) -> float:
    """Root of the mean variance of features `[n, d]`; 1 if all are equal."""
    scale = float(np.sqrt(np.asarray(features, np.float64).var(axis=0).mean()))
    return scale or 1.0


def fit_probes(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    decays: Sequence[float] = DECAYS,
) -> Iterator[Probe]:
    """Minimises mean cross entropy plus `decay / 2 * sum(kernel**2)`, once per decay.

    The kernel in that sum is of features that were centred and divided by
    `feature_scale`, so that a decay means the same for every backbone. L-BFGS in
    float64, from the largest decay down, each from the optimum before.

    Args:
      features: `[n, d]`.
      labels: `[n]`, from 0 to `num_classes` - 1.
      num_classes: `k`.
      decays: Each above 0.

    Yields:
      One per decay, the largest first, fitted when it is asked for.

    Example:
      >>> probes = list(fit_probes(np.eye(4), np.arange(4), 4, decays=(0.1, 0.01)))
      >>> [p.decay for p in probes], np.argmax(probes[0].head["kernel"], 0).tolist()
      ([0.1, 0.01], [0, 1, 2, 3])
    """
    # Not at start-up: it takes a fifth of a second.
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    mean = np.asarray(features, np.float64).mean(axis=0)
    scale = feature_scale(features)
    x = (features - mean) / scale
    n, d = x.shape
    target = np.eye(num_classes)[labels]

    def objective(flat: np.ndarray, decay: float) -> tuple[float, np.ndarray]:
        kernel, bias = flat[:-num_classes].reshape(d, num_classes), flat[-num_classes:]
        logits = x @ kernel + bias
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        loss = -(target * log_p).sum() / n + 0.5 * decay * (kernel**2).sum()
        error = (np.exp(log_p) - target) / n
        return loss, np.append(x.T @ error + decay * kernel, error.sum(axis=0))

    flat, given = np.zeros((d + 1) * num_classes), {"method": "L-BFGS-B", "jac": True}
    for decay in sorted(decays, reverse=True):
        # These products are small: threads wait for each other, 2 to 15 times as long.
        with threadpool_limits(1, user_api="blas"):
            found: Any = minimize(objective, flat, (decay,), options=OPTIONS, **given)
        flat = found.x
        kernel = flat[:-num_classes].reshape(d, num_classes) / scale
        bias = flat[-num_classes:] - mean @ kernel
        yield Probe({"kernel": kernel, "bias": bias}, decay)


def accuracy(head: dict[str, Any], features: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers, in [0, 1]."""
    logits = features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    return float(np.mean(logits.argmax(axis=1) == labels))


def best_probe(
    probes: Iterable[Probe], features: np.ndarray, labels: np.ndarray
) -> Probe:
    """The probe with the highest accuracy on other features; of equals, the first.

    No more are fitted when `PATIENCE` in a row were not better.
    """
    probes = iter(probes)
    best = next(probes)
    most, worse = accuracy(best.head, features, labels), 0
    for found in probes:
        right, worse = accuracy(found.head, features, labels), worse + 1
        if right > most:
            best, most, worse = found, right, 0
        if worse == PATIENCE:
            break
    return best


@functools.partial(jax.jit, static_argnames=("model", "normalisation"))
def _features(
    backbone: Any, images: jax.Array, *, model: Any, normalisation: str
) -> jax.Array:
    images = normalise(parallel.spread(images), normalisation)
    return parallel.whole(model.apply({"params": backbone}, images)[0])


def extract_features(
    backbone: Any, images: Any, *, model: Any, normalisation: str, batch_size: int
) -> np.ndarray:
    """Features `[n, d]` of the model without prompts.

    Of a strip, which lies on the device, those of the centres: see `strips.view`.
    """
    fixed = {"model": model, "normalisation": normalisation}
    return train.by_batches(
        lambda batch, *_: _features(backbone, batch, **fixed), images, batch_size
    )
