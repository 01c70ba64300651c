# SPDX-License-Identifier: Apache-2.0
"""What happens to pictures on the device: normalisation, crop, flip, resize.

Pictures live on the device as uint8; every function here is pure JAX on a batch
`[b, h, w, 3]` and runs inside the jitted step. Random crops of pictures that are not
squares are in `strips.py`.
"""

import jax
import jax.numpy as jnp

from vpt_jax.prompts import check_choice

NORMALISATIONS = {
    # name: (mean, std) per channel of pictures scaled to [0, 1]
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # Google's ViT checkpoints
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # VPT's pipeline
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def normalise(images: jax.Array, name: str) -> jax.Array:
    """uint8 `[b, h, w, 3]` to float32: `(x / 255 - mean) / std`.

    Raises:
      ValueError: If `name` is not one of `NORMALISATIONS`.
    """
    check_choice("normalisation", name, tuple(NORMALISATIONS))
    mean, std = (
        jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in NORMALISATIONS[name]
    )
    return (images.astype(jnp.float32) / 255.0 - mean) / std


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
