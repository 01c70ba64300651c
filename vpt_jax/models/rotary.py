# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of patches along both axes (DINOv3, arXiv 2508.10104).

Queries and keys of patches are turned by angles that grow with their place. Class
token, registers and prompts have no place and are not turned: a deep prompt is one more
key and value here too, the same for every picture.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vpt_jax.models.attention import wide

BASE = 100.0  # of every DINOv3: periods grow from 1 to nearly this


@functools.lru_cache(32)
def rotation(tokens: int, patches: int, width: int) -> np.ndarray:
    """Cosines and sines `[2, tokens, width]`, float32, of a head of that width.

    A patch's place is its centre's, between -1 and 1 on either axis. The first quarter
    of the columns has the vertical one at `width / 4` frequencies, the second the
    horizontal one, the second half both again.

    Args:
      tokens: All tokens, of which the last are patches; the others are not turned.
      patches: How many, a square, row by row.
      width: Width of a head, a multiple of 4.
    """
    side = round(patches**0.5)
    centres = 2 * (np.arange(side) + 0.5) / side - 1
    frequency = 2 * np.pi * BASE ** -(np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(patches), side)
    angles = np.concatenate(
        [centres[place][:, None] * frequency for place in (row, column) * 2], axis=1
    )
    still = np.zeros((tokens - patches, width))
    angles = np.concatenate([still, angles])
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def rotate(x: jax.Array, turn: np.ndarray) -> jax.Array:
    """Queries or keys `[b, h, t, c]`, turned by `turn [2, t, c]`, see `rotation`."""
    kind = wide(x.dtype)
    cos, sin = (jnp.asarray(part, kind)[None, None] for part in turn)
    first, second = jnp.split(x.astype(kind), 2, axis=-1)
    across = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(kind) * cos + across * sin).astype(x.dtype)
