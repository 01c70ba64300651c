# SPDX-License-Identifier: Apache-2.0
"""How well two lists of scores order the same things."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    return _correlation(stats.pearsonr, x, y)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, ties averaged; 0 as in `pearson`."""
    return _correlation(stats.spearmanr, x, y)


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b: pairs in the same order minus the others; 0 as in `pearson`."""
    return _correlation(stats.kendalltau, x, y)


def _correlation(of: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> float:
    # SciPy computes in the type that it is given.
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(of(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


def percentile(x: np.ndarray, j: int) -> float:
    """Rank of `x[j]` in per cent: 0 is last, 100 is first."""
    return float(100 * (stats.rankdata(x)[j] - 1) / max(1, len(x) - 1))


def precision(x: np.ndarray, truth: np.ndarray, share: float) -> float:
    """How many of the best by `x` are among the best by `truth`, as a share."""
    k = max(1, int(share * len(x) + 0.5))
    best = [set(np.argsort(-v, kind="stable")[:k].tolist()) for v in (x, truth)]
    return len(best[0] & best[1]) / k
