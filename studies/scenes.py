# SPDX-License-Identifier: Apache-2.0
"""Drawn scenes with a label for every pixel: shapes in front of textures.

A dense task that needs no download. A scene is decided by its seed and number in the
coordinates of the unit square, so that the same one can be drawn at any size (32 px for
the small backbone, 224 px for a ViT-B/16). Form alone tells the classes apart: colours,
textures, poses and places are drawn without regard to the class, and all shapes of one
radius have the same area. The drawing code and all numbers are our own.
"""

import math

import numpy as np

CLASSES = ("background", "disk", "square", "triangle", "ring")
MOST_SHAPES = 3  # in one scene; at least one
TEXTURES = ("plain", "gradient", "stripes", "checks", "noise")

_RADII = (0.18, 0.3)  # of the disk with a shape's area; the picture's side is 1
_CENTRES = (0.2, 0.8)
_WAVES = (2.0, 6.0)  # per side: above four pixels of a 32 px picture
_LATTICE = 7  # grid points of the noise per side
_CONTRAST = 0.15  # of a texture's two colours, per channel
# Of the colours of background and shape, per channel and on a circle, so that both are
# uniform and still never alike.
_DISTANCE = 0.25
_HOLE = 0.55  # of the ring, in outer radii


def make_scenes(num: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws scenes 0 ... `num - 1` of a seed.

    A scene does not depend on `num`, and splits cut from one call share no picture.

    Args:
      num: How many.
      size: Side in pixels.
      seed: Not negative.

    Returns:
      Images uint8 `[num, size, size, 3]` and labels int32 `[num, size, size]`, indices
      of `CLASSES`.

    Raises:
      ValueError: If `num` is negative or `size` is below 1.
    """
    if num < 0 or size < 1:
        raise ValueError(
            f"got num={num}, size={size}; expected at least 0 scenes of at least 1"
            " pixel; pass e.g. num=800, size=32."
        )
    images = np.empty((num, size, size, 3), np.uint8)
    labels = np.empty((num, size, size), np.int32)
    for i in range(num):
        rng = np.random.default_rng((seed, i))
        shapes = rng.integers(1, MOST_SHAPES + 1)
        kinds = rng.integers(1, len(CLASSES), shapes)
        images[i], labels[i] = draw(kinds, rng, size)
    return images, labels


def draw(
    kinds: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """One scene: the given shapes, later ones in front, all else drawn from `rng`.

    Picture and label of a pixel are those of its centre (no antialiasing). What is
    drawn from `rng` does not depend on `kinds` (but for their number) or `size`.

    Args:
      kinds: Indices of `CLASSES` from 1 on, `[shapes]`.
      rng: Is advanced.
      size: Side in pixels.

    Returns:
      The image uint8 `[size, size, 3]` and labels int32 `[size, size]`.
    """
    centres = (np.arange(size) + 0.5) / size
    x, y = np.broadcast_to(centres, (size, size)), centres[:, None]
    colour = rng.random(3)
    image = _paint(rng, colour, x, y)
    labels = np.zeros((size, size), np.int32)
    for kind in kinds:
        radius, angle = rng.uniform(*_RADII), rng.uniform(0, 2 * math.pi)
        dx, dy = x - rng.uniform(*_CENTRES), y - rng.uniform(*_CENTRES)
        u = (math.cos(angle) * dx + math.sin(angle) * dy) / radius
        v = (math.cos(angle) * dy - math.sin(angle) * dx) / radius
        inside = _inside(CLASSES[kind], u, v)
        own = (colour + rng.uniform(_DISTANCE, 1 - _DISTANCE, 3)) % 1
        image = np.where(inside[..., None], _paint(rng, own, x, y), image)
        labels[inside] = kind
    return np.round(255 * image).astype(np.uint8), labels


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether the points `(u, v)` lie in the shape, of which the area is pi."""
    if shape == "disk":
        return u * u + v * v <= 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= math.sqrt(math.pi) / 2
    if shape == "triangle":
        corner = math.sqrt(4 * math.pi / math.sqrt(27))  # circumscribed circle
        return (v >= -corner / 2) & (math.sqrt(3) * abs(u) + v <= corner)
    squared = (u * u + v * v) * (1 - _HOLE**2)
    return (squared <= 1) & (squared >= _HOLE**2)


def _paint(
    rng: np.random.Generator, colour: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """A texture of two colours at the points `x`, `y`: `[size, size, 3]` in [0, 1]."""
    # Every number is drawn for every texture, so that the next ones stay the same.
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    contrast = rng.uniform(-_CONTRAST, _CONTRAST, 3)
    angle, phase = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)
    waves, lattice = rng.uniform(*_WAVES), rng.random((_LATTICE, _LATTICE))
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    if texture == "plain":
        mixed = np.zeros(x.shape)
    elif texture == "gradient":
        mixed = along / math.sqrt(2)
    elif texture == "stripes":
        mixed = np.sin(2 * math.pi * waves * along + phase)
    elif texture == "checks":
        rate = math.pi * waves
        mixed = np.sign(np.sin(rate * along + phase) * np.sin(rate * across + phase))
    else:
        mixed = 2 * _noise(lattice, x, y) - 1
    return np.clip(colour + contrast * mixed[..., None], 0, 1)


def _noise(lattice: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values of a square grid `[l, l]` over the unit square, between them bilinear."""
    last = len(lattice) - 1
    column, row = (np.minimum((p * last).astype(int), last - 1) for p in (x, y))
    right, down = x * last - column, y * last - row
    top = lattice[row, column] * (1 - right) + lattice[row, column + 1] * right
    low = lattice[row + 1, column] * (1 - right) + lattice[row + 1, column + 1] * right
    return top * (1 - down) + low * down
