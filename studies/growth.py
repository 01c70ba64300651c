# SPDX-License-Identifier: Apache-2.0
"""How ranks grow with prompts: repetitions, fits, errors at what a fit has not seen.

A backbone's layers and heads are all that there are, not a sample: numbers are means
over them. What varies by chance is the draw of prompts and that of pictures. So a
repetition is one seed's prompts seen through its own share of the pictures, and
margins are `study.paired` over these.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# How a rank may grow with x = m / n.
GROWTH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log": np.log1p,
    "sqrt": np.sqrt,
    "linear": lambda x: x,
}
KINDS = ("random", "trained")


def fit(x: np.ndarray, y: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Least squares `a + b GROWTH[form](x)`, for `x [c]` and `y [..., c]`."""
    f = GROWTH[form](x)
    centred = f - f.mean()
    b = np.asarray((y * centred).sum(axis=-1) / (centred @ centred))
    return np.asarray(y.mean(axis=-1) - b * f.mean()), b


def held_out(x: np.ndarray, y: np.ndarray, form: str) -> np.ndarray:
    """Root mean square error at points that a fit has not seen, one at a time.

    Of `y [..., c]` at `x [c]` (at least 3 points, or a line cannot be wrong); `[...]`.
    """
    errors = []
    for i in range(len(x)):
        a, b = fit(np.delete(x, i), np.delete(y, i, axis=-1), form)
        errors.append(a + b * GROWTH[form](x[i]) - y[..., i])
    return np.asarray(np.sqrt(np.mean(np.square(errors), axis=0)))


def table_of(
    rows: Sequence[dict[str, Any]], kind: str, matrix: str, measured: str
) -> dict[int, np.ndarray]:
    """Ranks `[seeds, shares, layers, heads]` by number of prompts.

    No prompts at all are the same for both kinds and every seed: one seed.
    """
    found: dict[int, list[Any]] = {}
    for row in rows:
        if row["kind"] == kind or not row["m"]:
            found.setdefault(row["m"], []).append(row["ranks"][matrix][measured])
    return {m: np.array(found[m]) for m in sorted(found)}


def means(table: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Over seeds and shares of a table: `[layers, heads]` by number of prompts."""
    return {m: ranks.mean(axis=(0, 1)) for m, ranks in table.items()}


def repetitions(ranks: np.ndarray) -> np.ndarray:
    """Of `[seeds, shares, ...]`, seed i on share i: `[shares, ...]`.

    No two of them have a prompt or a picture in common.
    """
    number = ranks.shape[1]
    every = np.broadcast_to(ranks, (number, *ranks.shape[1:]))
    return every[np.arange(number), np.arange(number)]


def growth_fits(
    rows: Sequence[dict[str, Any]],
    tokens: int,
    matrices: Sequence[str],
    measures: Sequence[str],
) -> dict[str, Any]:
    """Fits to random prompts' ranks, of every repetition, layer and head by itself.

    Returns:
      By matrix, measure and form: `a` and `b` (means), and `held_out`, the error at
      numbers of prompts left out, `[repetitions][layers][heads]`. Empty with fewer
      than 4 numbers of prompts.
    """
    fits: dict[str, Any] = {}
    for matrix in matrices:
        for measured in measures:
            table = table_of(rows, "random", matrix, measured)
            if len(table) < 4:
                return {}
            x = np.array(list(table)) / tokens
            y = np.stack([repetitions(ranks) for ranks in table.values()], axis=-1)
            for form in GROWTH:
                a, b = fit(x, y, form)
                fits.setdefault(matrix, {}).setdefault(measured, {})[form] = {
                    "a": float(a.mean()),
                    "b": float(b.mean()),
                    "held_out": held_out(x, y, form).round(4).tolist(),
                }
    return fits
