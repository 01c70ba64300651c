# SPDX-License-Identifier: Apache-2.0
"""What happens to pictures on the device: normalisation, crop, flip, resize.

Pictures live on the device as uint8; every function here is pure JAX on a batch
`[b, h, w, 3]` and runs inside the jitted step. Random crops of pictures that are not
squares are in `strips.py`.
"""

import jax
import jax.numpy as jnp

from vpt_jax.models.inputs import NORMALISATIONS, normalise

__all__ = ["NORMALISATIONS", "crop_and_flip", "normalise", "resize"]


def resize(images: jax.Array, side: int) -> jax.Array:
    """Bilinear resize of `[b, h, w, 3]` to `side`, antialiased when shrinking."""
    if images.shape[1:3] == (side, side):
        return images
    shape = (images.shape[0], side, side, images.shape[3])
    out = jax.image.resize(images.astype(jnp.float32), shape, "bilinear")
    return jnp.round(out).astype(images.dtype)


def crop_and_flip(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Random shift by up to `pad` pixels (zeros outside), random horizontal flip."""
    b, h, w, c = images.shape
    shift_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (b, 2), 0, 2 * pad + 1)
    flips = jax.random.bernoulli(flip_key, 0.5, (b,))
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def one(image: jax.Array, shift: jax.Array, flip: jax.Array) -> jax.Array:
        image = jax.lax.dynamic_slice(image, (shift[0], shift[1], 0), (h, w, c))
        return jnp.where(flip, image[:, ::-1], image)

    return jax.vmap(one)(padded, shifts, flips)
