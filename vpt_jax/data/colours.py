# SPDX-License-Identifier: Apache-2.0
"""The pixels of an opened picture file as 8-bit RGB, whatever Pillow makes of them.

Pillow's mode says how numbers are stored and not what they mean: which of them is
white, or transparent. That is read from the file's header here, before and after
`load`. What Pillow would misread is refused.
"""

import contextlib
import io
import re
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vpt_jax.files.messages import mismatch

BAND = 1 << 20  # pixels converted at a time
_WIDE = 65535  # integers in 16 bits, or in more, where nobody knows what is white
# TIFF's tags, by name in its specification.
_BITS, _PHOTOMETRIC, _PLANAR, _COLOURS = 258, 262, 284, 320
_SIGN, _SUBSAMPLING = 339, 530
_SIZES = b"\xff\x4f\xff\x51"  # JPEG 2000's marker before the sizes
_CLEAR = "transparency"


class OddError(Exception):
    """What is wrong with a picture that is whole."""


def before_load(picture: Image.Image, data: bytes) -> None:
    """Corrects how Pillow is going to read the pixels; OddError where it cannot."""
    odd = ""
    if picture.format == "TIFF":
        _check_covered(picture)
        odd = _odd_tiff(picture)
    elif picture.format == "JPEG2000":
        # Pillow shifts: white would become black (above 8 bits), or grey (below).
        depth = data[data.index(_SIZES) + 42] + 1  # above 128: signed
        odd = f"{depth} bits" if depth != 8 and picture.mode != "I;16" else ""
        odd = "signed numbers" if depth > 128 else odd
    if odd:
        got, remedy = f"a {picture.format} of {odd}", "save it as 8-bit PNG"
        raise OddError(mismatch("", got, "a more common kind", remedy))


def _check_covered(picture: Any) -> None:
    """Raises if strips or tiles are missing from a TIFF: Pillow leaves them black."""
    tiles, size = picture.tile, picture.width * picture.height
    if tiles and tiles[0].codec_name != "libtiff":  # which counts its rows itself
        boxes = {tile.extents for tile in tiles}  # of every plane the same
        there = sum((right - left) * (low - top) for left, top, right, low in boxes)
        if there < size:
            got = f"a damaged picture (a TIFF with the strips of {there:,} px)"
            raise OddError(mismatch("", got, f"all {size:,}", "fetch it again"))


def _odd_tiff(picture: Any) -> str:
    """What of a TIFF Pillow would misread; byte order it is told here."""
    tags, tile = picture.tag_v2, picture.tile[0] if picture.tile else None
    bits, kind = set(tags.get(_BITS, (1,))), tags.get(_PHOTOMETRIC, 0)
    if bits == {8} and 2 in tags.get(_SIGN, ()):
        return "signed 8-bit numbers"
    if tile and tile.codec_name == "libtiff":
        # Its numbers are in the machine's order, Pillow asks for the file's.
        raw, *others = tile.args
        raw = re.sub(r"^([FI];\d+)B?([FS])$", r"\1N\2", raw)
        picture.tile = [tile._replace(args=(raw, *others))]
        return ""
    # Pillow takes a letter of its raw mode for each plane, whatever it stands for.
    if tags.get(_PLANAR) == 2 and not (bits == {8} and kind in (1, 2, 5)):
        return "separate planes"
    if kind == 6 and tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1):
        return "YCbCr with fewer colours than pixels"
    return ""


def to_rgb(picture: Image.Image, data: bytes = b"") -> Image.Image:
    """A loaded picture of any mode to RGB, upright, see the docstring of `pictures.py`.

    OddError if values are out of the range that the mode is taken to have.
    """
    if picture.format == "TIFF" and picture.mode in ("P", "PA"):
        _widen_palette(picture)
    _upright(picture)
    clear = _clear(picture, data)
    if picture.mode == "RGB" and not picture.has_transparency_data:
        out = picture
    elif picture.mode.startswith(("I", "F")):
        top, inverted = _range(picture)
        grey = to_8_bits(np.asarray(picture), top, inverted)
        out = Image.fromarray(grey).convert("RGB")
    else:
        out = _in_bands(picture)
    if clear is not None:
        out.paste((255, 255, 255), mask=Image.fromarray(clear))
    return out


def _upright(picture: Image.Image) -> None:
    """Applies EXIF's orientation; a damaged EXIF block is no reason to refuse."""
    with contextlib.suppress(Exception):  # whatever the bytes lead to
        ImageOps.exif_transpose(picture, in_place=True)


def _widen_palette(picture: Any) -> None:
    """Some write a TIFF's palette in 8 bits, all 0 in the upper half of 16."""
    colours = np.array(picture.tag_v2.get(_COLOURS, (0,)))
    if 0 < colours.max() < 256 and len(colours) % 3 == 0:
        picture.putpalette(colours.reshape(3, -1).T.astype(np.uint8).tobytes())


def _range(picture: Any) -> tuple[int, bool]:
    """Of integers or floats: which is the largest, and whether that is black."""
    if picture.format != "TIFF":
        return (1 if picture.mode == "F" else _WIDE), False
    tags = picture.tag_v2
    kind = tags.get(_BITS, (1,))[0], tags.get(_SIGN, (1,))[0]
    top = {(12, 1): 4095, (16, 2): 32767, (32, 3): 1}.get(kind, _WIDE)
    return top, tags.get(_PHOTOMETRIC) == 0


def _clear(picture: Image.Image, data: bytes) -> np.ndarray | None:
    """Which pixels of a PNG have its transparent value, where Pillow cannot tell.

    Where it can, the value is brought to the range that Pillow brought pixels to.
    """
    value: Any = picture.info.get(_CLEAR)
    told = picture.format == "PNG" and isinstance(value, int | tuple)
    if not told or picture.mode not in ("L", "RGB", "I;16"):
        return None
    top = 2 ** data[24] - 1  # of the bits of a channel, by the header
    if top < _WIDE:
        values = value if isinstance(value, tuple) else (value,)
        values = tuple((v & top) * (255 // top) for v in values)
        picture.info[_CLEAR] = values if isinstance(value, tuple) else values[0]
        return None
    del picture.info[_CLEAR]
    pixels = np.asarray(picture)
    if isinstance(value, int):
        return pixels == value
    # Of colours Pillow keeps the high byte; asked for the other byte order, the low.
    with Image.open(io.BytesIO(data), formats=("PNG",)) as other:
        other.tile = [tile._replace(args="RGB;16L") for tile in other.tile]
        _upright(other)
        low = np.asarray(other)
    high_value, low_value = np.divmod(value, 256)
    return ((pixels == high_value) & (low == low_value)).all(-1)


def _in_bands(picture: Image.Image) -> Image.Image:
    """Whole, each step of the conversion would be another copy of a large picture."""
    out = Image.new("RGB", picture.size)
    for top, bottom in bands(*picture.size):
        band = picture.crop((0, top, picture.width, bottom))
        out.paste(_band_to_rgb(band), (0, top))
    return out


def bands(width: int, height: int) -> list[tuple[int, int]]:
    """Top and bottom of parts of a picture of at most `BAND` pixels, or one row."""
    rows = max(1, BAND // width)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def _band_to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "La":  # to which Pillow has no way
        grey, alpha = picture.split()
        picture = Image.merge("RGBa", (grey, grey, grey, alpha))
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return picture.convert("RGB")


def to_8_bits(x: np.ndarray, top: int, inverted: bool = False) -> np.ndarray:
    """Grey `[h, w]` of 0 ... `top` to 0 ... 255, or to 255 ... 0."""
    low, high = x.min(), x.max()
    if not (low >= 0 and high <= top):  # NaN too
        got, remedy = f"{x.dtype.name} values from {low} to {high}", "save it as 8 bits"
        raise OddError(mismatch("", got, f"0 to {top}", remedy))
    out = np.empty(x.shape, np.uint8)
    for start, stop in bands(x.shape[1], len(x)):
        band = x[start:stop].astype(np.float64)
        out[start:stop] = np.floor(band * (255 / top) + 0.5)
    return 255 - out if inverted else out
