# SPDX-License-Identifier: Apache-2.0
"""A picture file of any common kind to one uint8 RGB square.

Whatever is in the file, the result has EXIF's orientation applied and three channels:

* 1-bit, grey, palette: as they look;
* transparency (alpha channel, transparent palette entry or colour): on white;
* CMYK, YCbCr, Lab: converted by Pillow's formula, colour profiles are not applied;
* 12 and 16-bit grey: scaled, 4095 and 65535 become 255, or 0 in a TIFF whose white is
  0; signed, 32767 does (Pillow reads 16-bit colour by its high byte);
* 32-bit integers: taken as 16-bit values, refused if one is outside of 0 ... 65535;
* floats: taken as 0 ... 1, refused if one is outside;
* several frames or pages: the first.
"""

import functools
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vpt_jax.data import bounds, colours
from vpt_jax.files.messages import mismatch, reason
from vpt_jax.prompts import check_choice

RULES = ("crop", "squash", "half_pixel", "corner")
"""How a picture becomes a square; one that has the side already is left alone.

`crop`: the short side to 256/224 of the side, then the centre, as FGVC is evaluated.
`squash`: height and width to the side, whatever that does to the proportions.
Both are antialiased (Pillow's bilinear filter). These two squash without antialiasing:
`half_pixel`: bilinear between the two nearest pixels, centres at half-integers.
`corner`: the same with pixel k at k: TensorFlow 1's rule, with which VPT ran VTAB.
"""
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .tif .tiff .webp .avif .jp2 .ppm .pgm .pbm"
    " .pnm".split()
)
MAX_PIXELS = 178_956_970  # Pillow's own limit: 0.7 GB as Pillow keeps RGB

# Only what people keep pictures in. Other readers of Pillow's start programs (EPS).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
_LONGEST = 16  # times the short side: resized whole, 3 MB for 224 px
_ROOM = bounds.Room(MAX_PIXELS)
_SCANS = 12  # passes over `MAX_PIXELS` that a progressive JPEG may take: usual are 10
_SCAN = b"\xff\xda"
_PARTS = (273, 324), (279, 325)  # TIFF's tags of strips or tiles: offsets, sizes
_DEFLATE = 1032
_BLOCK = 64 << 20  # bytes
_CHUNK = 16  # pictures resized at a time, so that float copies stay small


def quiet() -> warnings.catch_warnings:
    """Silences Pillow's warnings about odd files: what matters becomes an error.

    Warning filters belong to the process: not to be entered in several threads.
    """
    return warnings.catch_warnings(action="ignore")


def mapped(
    function: Callable[[Any], Any], items: Iterable[Any], batch: int
) -> Iterator[Any]:
    """Maps in order, in threads (Pillow works without Python's lock), by batches."""
    items = iter(items)
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        while some := list(itertools.islice(items, batch)):
            # Not around the yield: the filters of warnings belong to the process.
            with quiet():
                done = list(pool.map(function, some))
            yield from done


def read_picture(path: str | os.PathLike, side: int, rule: str = "crop") -> np.ndarray:
    """Reads one picture file to uint8 `[side, side, 3]`, by one of `RULES`.

    Raises:
      ValueError: Names the file and what is wrong with it. Or if `side` is below 1 or
        `rule` is another.
    """
    path = os.fspath(path)
    try:
        with quiet(), bounds.opened(path) as data:
            return decode(data, side, rule)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def decode(data: bytes, side: int, rule: str) -> np.ndarray:
    """`read_picture` of a file's content; to be called within `quiet()`."""
    check_choice("rule", rule, RULES)
    if side < 1:
        raise mismatch("", f"side={side}", "at least 1", "give it in px")
    if not data:
        raise mismatch("", "an empty file", "a picture", "fetch it again")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            _check_bomb(picture, data)
            colours.before_load(picture, data)
            if rule in ("crop", "squash"):
                _draft(picture, side, rule)
            with _ROOM.take(picture.width * picture.height):
                try:
                    picture.load()
                    return fit(colours.to_rgb(picture, data), side, rule)
                finally:
                    picture.close()  # its pixels go, whoever holds the error
    except colours.OddError as e:
        raise ValueError(str(e)) from e
    except UnidentifiedImageError as e:
        got, expected = "no picture that can be read", ", ".join(_formats())
        raise mismatch("", got, expected, "convert it") from e
    except Image.DecompressionBombError as e:
        raise _too_large("a picture that is too large") from e
    except MemoryError:
        raise  # says nothing about the file
    except Exception as e:  # readers of damaged files raise whatever comes up
        got = f"a damaged picture ({reason(e)})"
        raise mismatch("", got, "a whole one", "fetch it again") from e


def _too_large(got: str) -> ValueError:
    return mismatch("", got, f"at most {MAX_PIXELS:,} pixels", "make it smaller")


def square(picture: Image.Image, side: int, rule: str) -> np.ndarray:
    """`read_picture` of a picture that Pillow has opened; it stays as it is."""
    check_choice("rule", rule, RULES)
    try:
        return fit(colours.to_rgb(picture.copy()), side, rule)
    except (colours.OddError, OSError) as e:  # OSError: its file is damaged
        raise ValueError(f"got a picture that cannot be used ({reason(e)}).") from e


def _check_bomb(picture: Image.Image, data: bytes) -> None:
    """Raises for what would take 0.7 GB, or minutes, and be damaged in the end."""
    kind, pixels = picture.format, picture.width * picture.height
    size = f"{picture.width} x {picture.height} px"
    # Deflate makes nothing more than `_DEFLATE` times smaller, and a pixel has a bit;
    # nothing but one colour is as small in JPEG 2000, which takes ten times as long.
    if kind in ("PNG", "JPEG2000") and len(data) < pixels // (8 * _DEFLATE):
        raise ValueError(f"{size} in {len(data)} bytes of {kind}")
    scans = _scans(picture, data)
    if scans * pixels > _SCANS * MAX_PIXELS:
        got = f"a JPEG of {size} in {scans} scans"
        raise colours.OddError(mismatch("", got, "fewer", "save it again"))


def _scans(picture: Any, data: bytes) -> int:
    """How often decoding goes over all pixels; each takes a JPEG but a few bytes."""
    # By content: a JPEG with something around it has other names (MPO).
    if data.startswith(b"\xff\xd8"):
        return data.count(_SCAN)
    if "jpeg" not in str(picture.info.get("compression")):
        return 0
    # A TIFF's parts are JPEGs of their own, with a scan each.
    tags = picture.tag_v2
    starts, sizes = (tags.get(a) or tags.get(b) or () for a, b in _PARTS)
    if not starts or sum(sizes) > len(data):  # they overlap: no more than there are
        return data.count(_SCAN)
    parts = zip(starts, sizes, strict=False)
    return max(data.count(_SCAN, start, start + size) for start, size in parts)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    # Blocks above 32 MB go back to the system when they are freed; of Pillow's 16 MB,
    # glibc would keep a picture's worth for every thread that once had a large one.
    Image.core.set_block_size(_BLOCK)
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _draft(picture: Image.Image, side: int, rule: str) -> None:
    """Lets JPEG decode at 1/2, 1/4 or 1/8, but at twice what is needed or more.

    Several times faster, and true to about a grey level: the antialiasing filter comes
    after. Only where whole pixels are left, else the picture would be shifted.
    """
    width, height = picture.size
    need = _cropped_from(width, height, side) if rule == "crop" else (side, side)
    for n in (8, 4, 2):
        whole = width % n == height % n == 0
        if whole and width >= 2 * n * need[0] and height >= 2 * n * need[1]:
            picture.draft(picture.mode, (width // n, height // n))
            return


def fit(picture: Image.Image, side: int, rule: str) -> np.ndarray:
    """An RGB picture to uint8 `[side, side, 3]` by one of `RULES`."""
    if rule in ("half_pixel", "corner"):
        return resize_bilinear(_pixels(picture)[None], side, rule)[0]
    if picture.size == (side, side):
        return np.asarray(picture)
    if rule == "crop":
        return centre_crop(picture, side)
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))


def _pixels(picture: Image.Image) -> np.ndarray:
    """uint8 `[h, w, 3]`, band by band: at once, Pillow would make two copies more."""
    width, height = picture.size
    out = np.empty((height, width, 3), np.uint8)
    for top, bottom in colours.bands(width, height):
        out[top:bottom] = np.asarray(picture.crop((0, top, width, bottom)))
    return out


def centre_crop(picture: Image.Image, side: int) -> np.ndarray:
    """The rule `crop`, of a picture that has the side already too: `[side, side, 3]`.

    To the last bit torchvision's `Resize(256)` and `CenterCrop(224)`, for 224.
    """
    width, height = picture.size
    new = _cropped_from(width, height, side)
    x, y = (round((n - side) / 2) for n in new)  # halves to even, as torchvision
    if not _too_long(width, height):
        resized = resize_short(picture, side)
        return np.asarray(resized.crop((x, y, x + side, y + side)))
    # Only the part that is kept: resizing a narrow strip whole would fill memory. True
    # to a grey level or so: Pillow keeps the corners of a box in single precision.
    box = (
        x * width / new[0],
        y * height / new[1],
        min((x + side) * width / new[0], width),
        min((y + side) * height / new[1], height),
    )
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, box))


def resize_short(picture: Image.Image, side: int) -> Image.Image:
    """The short side to 256/224 of `side`, antialiased: what is cropped to `side`.

    ValueError if the picture is so long that it would fill memory.
    """
    if _too_long(*picture.size):
        got = f"a picture of {picture.width} x {picture.height} px"
        expected = f"one at most {_LONGEST} times as long as it is wide"
        raise mismatch("", got, expected, "cut or remove it")
    new = _cropped_from(*picture.size, side)
    return picture.resize(new, Image.Resampling.BILINEAR)


def short_side(side: int) -> int:
    """Of a picture that is cropped to `side`, rounded down: 256 px for 224."""
    return side * 256 // 224


def _too_long(width: int, height: int) -> bool:
    return max(width, height) > _LONGEST * min(width, height)


def _cropped_from(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height of which `crop` keeps the centre; rounded as torchvision."""
    short = short_side(side)
    if width <= height:
        return short, short * height // width
    return short * width // height, short


def _taps(size: int, side: int, rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `side` outputs: two neighbours, and the weight of the second."""
    # What falls outside takes the edge pixel.
    half = 0.5 if rule == "half_pixel" else 0.0
    at = np.clip((np.arange(side) + half) * size / side - half, 0, size - 1)
    low = np.floor(at).astype(np.intp)
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)


def resize_bilinear(
    images: np.ndarray, side: int, rule: str = "half_pixel"
) -> np.ndarray:
    """Resizes uint8 `[n, h, w, c]` to `[n, side, side, c]`, without antialiasing.

    Edge clamp; halves are rounded up. With `half_pixel`, pixel centres are at
    half-integers, as in `jax.image.resize(..., "bilinear", antialias=False)`; with
    `corner`, at integers, as in `tf.compat.v1.image.resize`. Pictures that have the
    size already are returned themselves.
    """
    n, h, w, c = images.shape
    if h == w == side:
        return images
    top, bottom, fy = _taps(h, side, rule)
    left, right, fx = _taps(w, side, rule)
    fy, fx = fy[:, None, None], fx[:, None]
    out = np.empty((n, side, side, c), np.uint8)
    for start in range(0, n, _CHUNK):
        # Pictures last, so that picking rows and columns copies whole runs. No matrix
        # product: sums in another order on another machine would round differently.
        x = images[start : start + _CHUNK].transpose(1, 2, 0, 3)
        x = x.reshape(h, w, -1)
        # Floats of the rows that are used only: a large picture has many others.
        x = x[top].astype(np.float32) * (1 - fy) + x[bottom].astype(np.float32) * fy
        x = x[:, left] * (1 - fx) + x[:, right] * fx
        rounded = (x + np.float32(0.5)).astype(np.uint8)  # towards zero: halves up
        rounded = rounded.reshape(side, side, -1, c)
        out[start : start + _CHUNK] = rounded.transpose(2, 0, 1, 3)
    return out


def to_square(pixels: Any, side: int, rule: str) -> np.ndarray:
    """uint8 grey `[h, w]` or RGB `[h, w, 3]` to `[side, side, 3]` by one of `RULES`.

    ValueError if it has more than `MAX_PIXELS`.
    """
    height, width = pixels.shape[:2]
    if height * width > MAX_PIXELS:
        raise _too_large(f"a picture of {width} x {height} px")
    return fit(Image.fromarray(pixels).convert("RGB"), side, rule)
