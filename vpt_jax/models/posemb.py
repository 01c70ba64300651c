# SPDX-License-Identifier: Apache-2.0
"""Resizing the learned position table to another number of patches."""

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.prompts import check_choice

RESIZES = ("corner_aligned", "half_pixel")


def resize_pos_embedding(
    table: jax.Array, grid: int, method: str = "corner_aligned"
) -> jax.Array:
    """Resizes the position table to a `grid` x `grid` arrangement of patches.

    Args:
      table: `[1, 1 + n * n, d]`; the class token's row is kept as it is.
      grid: New number of patches per side.
      method: `"corner_aligned"` samples at `i * (old - 1) / (new - 1)`, bilinear: what
        VPT and vit_jax do (`scipy.ndimage.zoom`, order 1). `"half_pixel"` is
        `jax.image.resize`'s bilinear without antialiasing.

    Returns:
      `[1, 1 + grid * grid, d]`.

    Raises:
      ValueError: If the table is not a class token and a square, or the method is
        unknown.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    if table.ndim != 3 or table.shape[0] != 1 or old * old + 1 != table.shape[1]:
        raise ValueError(
            f"position table has shape {tuple(table.shape)}; expected [1, 1 + n * n, d]"
            " (a class token and a square grid)."
        )
    check_choice("method", method, RESIZES)
    cls, square = table[:, :1], table[0, 1:].reshape(old, old, -1)
    if method == "half_pixel":
        square = jax.image.resize(
            square, (grid, grid, square.shape[-1]), "bilinear", antialias=False
        )
    else:
        # Positions are static: computed exactly by NumPy, in float64.
        where = np.linspace(0, old - 1, grid) if grid > 1 else np.zeros(1)
        low = np.clip(np.floor(where).astype(int), 0, max(old - 2, 0))
        high = np.minimum(low + 1, old - 1)
        part = jnp.asarray(where - low, table.dtype)
        rows = part[:, None, None]
        square = square[low] * (1 - rows) + square[high] * rows
        columns = part[None, :, None]
        square = square[:, low] * (1 - columns) + square[:, high] * columns
    return jnp.concatenate([cls, square.reshape(1, grid * grid, -1)], axis=1)
