# SPDX-License-Identifier: Apache-2.0
"""How well two lists of scores order the same things; pure NumPy."""

import numpy as np


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, of `x [n]`; equal values share the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[place]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (x, y))
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, ties averaged."""
    return pearson(ranks(x), ranks(y))


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b: pairs in the same order minus the others, ties corrected."""
    a, b = (np.sign(v[:, None] - v[None, :]).astype(np.float64) for v in (x, y))
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else 0.0


def percentile(x: np.ndarray, j: int) -> float:
    """Rank of `x[j]` in per cent: 0 is last, 100 is first."""
    return float(100 * ranks(x)[j] / max(1, len(x) - 1))


def precision(x: np.ndarray, truth: np.ndarray, share: float) -> float:
    """How many of the best by `x` are among the best by `truth`, as a share."""
    k = max(1, int(share * len(x) + 0.5))
    best = [set(np.argsort(-v, kind="stable")[:k].tolist()) for v in (x, truth)]
    return len(best[0] & best[1]) / k
