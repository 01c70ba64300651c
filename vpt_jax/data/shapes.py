# SPDX-License-Identifier: Apache-2.0
"""White shapes on black, drawn in the manner of dSprites, to test structured tasks.

A picture is decided by five numbers (shape, scale, orientation, x, y), so that a
label can ask for any one of them. None of the shapes here (heart, arrow, L) has a
rotational symmetry, as dSprites' square and ellipse have: the orientation can always be
read from the picture. No picture of dSprites is used.
"""

import math

import numpy as np

GRID = (3, 6, 40, 32, 32)
"""How many values each latent has: shape, scale, orientation, x, y."""

SIDE = 32
_SUPERSAMPLE = 4
_CHUNK = 16  # pictures at a time: one float32 grid of 1 MiB stays in the cache

# Every shape has its centroid at the origin and fits in the unit circle. The largest
# radius, 8 px, is below the distance of the outermost centres to the frame, 8.25 px.
_RADII = np.array([8.0 * (0.5 + 0.1 * k) for k in range(6)], np.float32)  # px
# Half a pixel per step: centres fall on corners of the 4 x 4 sample grid, so that two
# steps move a picture by one pixel exactly.
_FIRST_CENTRE, _STEP = 8.25, 0.5  # px

_HEART = 0.7  # half the diagonal of the square below the two lobes
# Height of the heart's centroid over the centre of that square: two half discs (area
# pi / 2, centroid 1 / 2 + 2 / (3 pi)) and the square (area 2, centroid 0), times
# `_HEART` squared and `_HEART`.
_HEART_CENTROID = _HEART * (math.pi / 2) * (0.5 + 2 / (3 * math.pi)) / (2 + math.pi / 2)

# Of each label: the latent, how many values make a class, a class's name, its unit.
_LABELS = {
    "location": (3, 2, "x {}-{}", 1),
    "orientation": (2, 2.5, "{}-{} deg", 360 // GRID[2]),
}


def _turns() -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the 40 orientations, float32 `[40]` each."""
    # A quarter is computed and then exchanged, so that a turn by 90 degrees is exact.
    angles = [2 * math.pi * k / GRID[2] for k in range(GRID[2] // 4)]
    cos = np.array([math.cos(a) for a in angles], np.float32)
    sin = np.array([math.sin(a) for a in angles], np.float32)
    cosines = np.concatenate([cos, -sin, -cos, sin])
    return cosines, np.concatenate([sin, cos, -sin, -cos])


def _inside(shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether the points `(u, v)` (v points up) lie in the shape of radius 1."""
    if shape == 0:  # heart
        w = np.abs(u)
        v = v + np.float32(_HEART_CENTROID)
        half = np.float32(_HEART / 2)
        lobe = (w - half) ** 2 + (v - half) ** 2 <= np.float32(_HEART**2 / 2)
        return lobe | (w + np.abs(v) <= np.float32(_HEART))
    if shape == 1:  # arrow
        w = np.abs(u)
        head = (v >= 0) & (v <= 0.9 - 1.2 * w)
        return head | ((v < 0) & (v >= -0.9) & (w <= 0.25))
    bar = (u <= 0.125) & (v <= 0.875)  # L
    foot = (u <= 0.625) & (v <= -0.125)
    return (bar | foot) & (u >= -0.375) & (v >= -0.625)


def draw(latents: np.ndarray) -> np.ndarray:
    """Draws one picture per row of latents.

    The orientation turns counter-clockwise in steps of 9 degrees and is taken modulo
    40; x grows to the right and y downwards, in steps of half a pixel.

    Args:
      latents: Integers `[n, 5]`: shape, scale, orientation, x, y, within `GRID`
        (except for the orientation).

    Returns:
      uint8 `[n, 32, 32, 3]`, antialiased by 4 x 4 samples a pixel.
    """
    cosines, sines = _turns()
    k, side = _SUPERSAMPLE, SIDE * _SUPERSAMPLE
    # Sample points, in px, at the middle of each cell of the fine grid.
    points = ((np.arange(side) + 0.5) / k).astype(np.float32)
    grey = np.zeros((len(latents), SIDE, SIDE), np.uint8)
    for shape in range(GRID[0]):
        rows = np.flatnonzero(latents[:, 0] == shape)
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            _, scale, orientation, x, y = latents[chunk].T
            turn = orientation % GRID[2]
            # Products of small arrays only; the full grid is met in one sum each.
            cos, sin = cosines[turn, None], sines[turn, None]
            inverse = 1 / _RADII[scale, None]
            dx = points - (_FIRST_CENTRE + _STEP * x[:, None]).astype(np.float32)
            dy = (_FIRST_CENTRE + _STEP * y[:, None]).astype(np.float32) - points
            u = (cos * dx * inverse)[:, None, :] + (sin * dy * inverse)[:, :, None]
            v = (cos * dy * inverse)[:, :, None] - (sin * dx * inverse)[:, None, :]
            fine = _inside(shape, u, v).view(np.uint8)
            count = fine.reshape(len(fine), SIDE, k, SIDE, k).sum((2, 4), np.uint16)
            grey[chunk] = (count * 255 + k * k // 2) // (k * k)
    return np.repeat(grey[..., None], 3, axis=-1)


def sample_latents(num: int, seed: int) -> np.ndarray:
    """Draws `num` different points of the grid, uniformly, int64 `[num, 5]`."""
    flat = np.random.default_rng(seed).choice(math.prod(GRID), num, replace=False)
    return np.stack(np.unravel_index(flat, GRID), axis=1)


def label_latents(
    label: str, latents: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int32 `[n]` of latents `[n, 5]` by VTAB's bins, and the 16 class names.

    VTAB divides the value by (number of values / 16) and rounds down. For the 32
    positions x this makes pairs; for the 40 orientations bins of 3, 2, 3, 2, ...
    """
    column, width, form, unit = _LABELS[label]
    bins = np.floor(np.arange(GRID[column]) / width).astype(np.int32)
    members = [np.flatnonzero(bins == k) * unit for k in range(bins[-1] + 1)]
    names = tuple(form.format(values[0], values[-1]) for values in members)
    return bins[latents[:, column]], names


def make_shapes(
    label: str, num: int, seed: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Draws `num` pictures uint8 `[num, 32, 32, 3]` and labels, see `label_latents`.

    No two have the same latents, so that splits cut from one call share no picture.
    """
    latents = sample_latents(num, seed)
    labels, names = label_latents(label, latents)
    return draw(latents), labels, names
