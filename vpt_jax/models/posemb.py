# SPDX-License-Identifier: Apache-2.0
"""Position tables: resized to another number of patches, or computed (sin-cos)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.prompts import check_choice

RESIZES = (
    "corner_aligned",
    "half_pixel",
    "half_pixel_antialias",
    "bicubic",
    "bicubic_offset",
    "bicubic_antialias",
)


def resize_pos_embedding(
    table: jax.Array,
    grid: int,
    method: str = "corner_aligned",
    class_token: bool = True,
) -> jax.Array:
    """Resizes the position table to a `grid` x `grid` arrangement of patches.

    Args:
      table: `[1, 1 + n * n, d]`; the class token's row is kept as it is.
      grid: New number of patches per side.
      method: How a new row is mixed from old ones, along each side on its own:

        ====================== =======================================================
        `corner_aligned`       linear at `i * (old - 1) / (new - 1)`: what VPT and
                               vit_jax do (`scipy.ndimage.zoom`, order 1).
        `half_pixel`           linear at `(i + 0.5) * old / new - 0.5`.
        `half_pixel_antialias` the same, widened when the table shrinks: TIPSv2.
        `bicubic`              cubic (a = -0.75) at the same places, no antialiasing:
                               transformers' DINOv2.
        `bicubic_offset`       the same with `new + 0.1` for `new` in the places only:
                               the original DINOv2 without registers.
        `bicubic_antialias`    cubic (a = -0.5), widened when the table shrinks: the
                               original DINOv2 with registers, and timm.
        ====================== =======================================================
      class_token: False for a table without the class token's row, `[1, n * n, d]`.

    Returns:
      `[1, 1 + grid * grid, d]`, or without the class token's row.

    Raises:
      ValueError: If the table is not a class token and a square, or the method is
        unknown.

    Example:
      >>> resize_pos_embedding(jnp.zeros((1, 1 + 14 * 14, 8)), grid=16).shape
      (1, 257, 8)
    """
    check_choice("method", method, RESIZES)
    first = int(class_token)
    old = grid_side(table.shape, class_token)
    # Weights are static: computed by NumPy in float64.
    mix = jnp.asarray(_weights(method, old, grid), table.dtype)
    square = table[0, first:].reshape(old, old, -1)
    square = jnp.einsum("ia,jb,abd->ijd", mix, mix, square, precision="highest")
    square = square.reshape(1, grid * grid, -1)
    return jnp.concatenate([table[:, :first], square], axis=1)


def grid_side(shape: tuple[int, ...], class_token: bool = True) -> int:
    """Patches per side of a table `[1, n * n, d]`, plus a row for the class token.

    Raises:
      ValueError: If the shape is not of that form.
    """
    rows = shape[1] - int(class_token) if len(shape) == 3 and shape[0] == 1 else 0
    side = round(max(rows, 0) ** 0.5)
    if side < 1 or side * side != rows:
        expected = "[1, 1 + n * n, d]" if class_token else "[1, n * n, d]"
        raise ValueError(
            f"the position table has shape {tuple(shape)}; expected {expected}"
            f" ({'a class token and ' if class_token else ''}a square grid)."
        )
    return side


@functools.cache
def _weights(method: str, old: int, new: int) -> np.ndarray:
    """How much of every old row goes into every new one, `[new, old]`, float64."""
    if old == new:
        return np.eye(old)
    if method == "corner_aligned":
        where = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    else:
        target = new + 0.1 if method == "bicubic_offset" else new
        where = (np.arange(new) + 0.5) * old / target - 0.5
    if method.endswith("antialias"):
        # The kernel is stretched over the old rows that a new one covers, cut at the
        # border and normalised (as PIL does).
        stretch = max(1.0, old / new)
        distance = (np.arange(old)[None] - where[:, None]) / stretch
        linear = np.maximum(1 - abs(distance), 0)
        weights = linear if method.startswith("half") else _cubic(distance, -0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    # Taps around each place; those outside count for the row at the border.
    taps = np.arange(-1, 3) if method.startswith("bicubic") else np.arange(2)
    near = np.floor(where).astype(int)[:, None] + taps[None]
    distance = np.abs(near - where[:, None])
    cubic = method.startswith("bicubic")
    share = _cubic(distance, -0.75) if cubic else np.maximum(1 - distance, 0)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], near.clip(0, old - 1)), share)
    return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981) with parameter `a`."""
    x = np.abs(x)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


def sincos_table(grid: int, width: int) -> np.ndarray:
    """Fixed two-dimensional sine-cosine table `[1, grid * grid, width]`, float32.

    Columns: sines, then cosines of the horizontal place, then of the vertical one, at
    `width / 4` frequencies from 1 to 1 / 10,000 (Beyer et al., "Better plain ViT
    baselines for ImageNet-1k", arXiv 2205.01580, and big_vision).

    Raises:
      ValueError: If `width` is not a multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"width is {width}; a sin-cos table needs a multiple of 4.")
    count = width // 4
    frequency = 10_000.0 ** -(np.arange(count) / (count - 1))
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = [place[:, None] * frequency[None] for place in (column, row)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1)[None].astype(np.float32)
