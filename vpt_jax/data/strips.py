# SPDX-License-Identifier: Apache-2.0
"""Training pictures of all proportions in one array, of which a crop is one slice.

VPT trains the fine-grained sets on `Resize(256)`, `RandomCrop(224)` and flips, and
evaluates on the centre. Pictures of which the short side is resized have one side in
common, so they are glued along the other: each lies with its long side along axis 0,
wide ones transposed. All shapes are static then, and the whole set stays on the device.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from vpt_jax import parallel
from vpt_jax.data import cache


class Strip(NamedTuple):
    """`n` pictures; a pytree, of NumPy arrays as loaded, of JAX arrays to be cropped.

    Picture `i` is `pixels[start[i] : start[i] + length[i]]`: its rows, or its columns
    where it is wide.
    """

    pixels: Any  # uint8 [total, height, 3]; height is the short side of every picture
    start: Any  # int32 [n]
    length: Any  # int32 [n], at least height
    wide: Any  # bool [n]


def make(pixels: np.ndarray, length: ArrayLike, wide: ArrayLike) -> Strip:
    """A strip of pictures that follow each other without gaps."""
    length = np.asarray(length, np.int32)
    start = np.cumsum(length, dtype=np.int32) - length
    return Strip(pixels, start, length, np.asarray(wide, bool))


def join(first: Strip, second: Strip) -> Strip:
    """The pictures of two strips in memory, those of `first` first."""
    pixels, length, wide = (
        np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("pixels", "length", "wide")
    )
    return make(pixels, length, wide)


def put(images: Any, mesh: Mesh | None) -> Any:
    """An array or a strip on the devices: a part of the pixels on each.

    Padded at the end where they do not divide. See `parallel.all_devices`.
    """
    if not isinstance(images, Strip):
        return parallel.put_rows(images, mesh)
    rest = parallel.put_whole(images._replace(pixels=()), mesh)
    return rest._replace(pixels=parallel.put_rows(images.pixels, mesh))


def count(images: Any) -> int:
    """The number of pictures, of an array or a strip."""
    return len(images.start) if isinstance(images, Strip) else len(images)


def side_of(strip: Strip) -> int:
    """The only side of which 256/224, rounded down, is the height: 224 px for 256."""
    return -(-strip.pixels.shape[1] * 224 // 256)


def take(images: Any, index: jax.Array, key: jax.Array) -> jax.Array:
    """Examples `index [b]` to train on: `images[index]` of an array.

    Of a strip random crops, flipped half of the time: uint8 `[b, s, s, 3]` for the `s`
    of `side_of`, every crop equally likely as with torchvision's `RandomCrop`.
    """
    if not isinstance(images, Strip):
        return images[index]
    along_key, across_key, flip_key = jax.random.split(key, 3)
    shape, spare = index.shape, _spare(images, index)
    along = jax.random.randint(along_key, shape, 0, spare[0] + 1)
    across = jax.random.randint(across_key, shape, 0, spare[1] + 1)
    flip = jax.random.bernoulli(flip_key, 0.5, shape)
    crops = _cut(images, index, along, across)
    return jnp.where(flip[:, None, None, None], crops[:, :, ::-1], crops)


def view(images: Any, index: Any) -> Any:
    """Examples `index [b]` to look at: `images[index]` of an array.

    Of a strip the centres, as `pictures.RULES`' `crop`: uint8 `[b, s, s, 3]`.
    """
    return _centres(images, index) if isinstance(images, Strip) else images[index]


@jax.jit
def _centres(strip: Strip, index: jax.Array) -> jax.Array:
    # Halves to even, as Python and with it torchvision's CenterCrop.
    at = (jnp.round(spare / 2).astype(jnp.int32) for spare in _spare(strip, index))
    return _cut(strip, index, *at)


def _spare(strip: Strip, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pixels by which pictures exceed the crop, along the strip and across it."""
    side, height = side_of(strip), strip.pixels.shape[1]
    return strip.length[index] - side, jnp.full(index.shape, height - side, jnp.int32)


def _cut(
    strip: Strip, index: jax.Array, along: jax.Array, across: jax.Array
) -> jax.Array:
    """Upright squares at offsets `[b]` within pictures `index [b]`."""
    side = side_of(strip)
    if parallel.parts() > 1:
        # A device holds a range of rows, so pictures are fetched row by row.
        rows = (strip.start[index] + along)[:, None] + jnp.arange(side)[None]
        slabs, wide = parallel.spread((strip.pixels[rows], strip.wide[index]))
        cut = jax.vmap(lambda x, y: jax.lax.dynamic_slice_in_dim(x, y, side, axis=1))
        squares = cut(slabs, across)
        return jnp.where(wide[:, None, None, None], squares.swapaxes(1, 2), squares)

    def one(i: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        at = strip.start[i] + x, y, 0
        square = jax.lax.dynamic_slice(strip.pixels, at, (side, side, 3))
        return jnp.where(strip.wide[i], square.swapaxes(0, 1), square)

    return jax.vmap(one)(index, along, across)


def batches(
    images: Any, batch_size: int
) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """All pictures in order, `(batch, index [b], mask [b])`; the last batch is padded.

    Of a memory-mapped file, what has been copied into a batch no longer takes memory.
    """
    num, batch_size = count(images), parallel.round_up(batch_size)
    for start in range(0, num, batch_size):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        mask = index < num
        index = np.where(mask, index, 0)
        batch = parallel.feed(view(images, index))
        cache.forget(images, start, start + batch_size)
        yield batch, index, mask
