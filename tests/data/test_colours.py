# SPDX-License-Identifier: Apache-2.0
"""What Pillow hands over raw: files written by hand, against what they say is in."""

import io
import struct
import zlib

import numpy as np
import pytest
from fuzzing import png_of, tiff
from PIL import Image

from vpt_jax.data import pictures
from vpt_jax.data.pictures import read_picture

SIDE = 16
RNG = np.random.default_rng(0)
RAW, DEFLATE = 1, 8


def read(tmp_path, data, name="a.bin"):
    path = tmp_path / name
    path.write_bytes(data)
    return read_picture(path, SIDE, "squash").astype(int)


def grey(x):
    return np.repeat(np.asarray(x, np.float64)[..., None], 3, axis=-1)


def near(got, expected):
    """Up to the rounding of a half: nothing here is resized or lossy."""
    np.testing.assert_allclose(got, expected, atol=0.501)


# --- TIFF -----------------------------------------------------------------------------


def grey_tiff(x, photometric, packing, order, bits=0, kind=1, **more):
    data = x.astype(x.dtype.newbyteorder(order)).tobytes()
    if bits == 12:  # two numbers in three bytes, the first's upper bits first
        a, b = x.ravel()[::2].astype(int), x.ravel()[1::2].astype(int)
        data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1)
        data = data.astype(np.uint8).tobytes()
    data = zlib.compress(data) if packing == DEFLATE else data
    bits = bits or x.itemsize * 8
    tags = {258: bits, 259: packing, 262: photometric, 277: 1, 339: kind}
    return tiff(*x.shape, tags | more, data, order)


FULL = {  # type and what is white
    "uint8": (1, 255),
    "uint16": (1, 65535),
    "int16": (2, 32767),
    "float32": (3, 1),
}


@pytest.mark.parametrize("packing", [RAW, DEFLATE])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("dtype", FULL)
def test_white_is_what_the_header_says(tmp_path, dtype, photometric, order, packing):
    """Right or refused: Pillow has no reader for some of them."""
    kind, top = FULL[dtype]
    x = (RNG.random((SIDE, SIDE)) * top).astype(dtype)
    x[0, :2] = 0, top
    data = grey_tiff(x, photometric, packing, order, kind=kind)
    expected = x.astype(np.float64) / top * 255
    expected = grey(255 - expected if photometric == 0 else expected)
    try:
        got = read(tmp_path, data)
    except ValueError as error:
        assert photometric == 0 and "no picture that can be read" in str(error)
        assert dtype == "int16" or (dtype, order) == ("uint16", ">")
    else:
        near(got, expected)


@pytest.mark.parametrize("packing", [RAW, DEFLATE])
def test_twelve_bits_are_scaled(tmp_path, packing):
    x = RNG.integers(0, 4096, (SIDE, SIDE), np.uint16)
    x[0, :2] = 0, 4095
    near(read(tmp_path, grey_tiff(x, 1, packing, "<", bits=12)), grey(x / 4095 * 255))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("top", [255, 65535])
def test_palettes_of_8_and_of_16_bits(tmp_path, top, order):
    index = RNG.integers(0, 256, (SIDE, SIDE), np.uint8)
    colours = RNG.integers(0, top + 1, (3, 256))
    colours[0, 0] = top
    data = grey_tiff(index, 3, RAW, order, **{"320": (3, colours.ravel().tolist())})
    expected = colours.T[index] // (1 if top == 255 else 256)  # as Pillow has it
    near(read(tmp_path, data), expected)


def rgb_tiff(planes, planar, **more):
    bits = planes.itemsize * 8
    tags = {258: (3, [bits] * 3), 259: RAW, 262: 2, 277: 3, 284: planar}
    order = (2, 0, 1) if planar == 2 else (0, 1, 2)
    size = planes[..., 0].nbytes
    strips = [size] * 3 if planar == 2 else [3 * size]
    tags[278] = SIDE
    return tiff(
        SIDE, SIDE, tags | more, planes.transpose(order).tobytes(), strips=strips
    )


def test_planes_that_are_stored_apart(tmp_path):
    x = RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    near(read(tmp_path, rgb_tiff(x, 2)), x)
    near(read(tmp_path, rgb_tiff(x, 1)), x)
    wide = RNG.integers(0, 65536, (SIDE, SIDE, 3), np.uint16)
    got = read(tmp_path, rgb_tiff(wide, 1))
    np.testing.assert_allclose(got, wide / 257, atol=1)
    for odd in (
        rgb_tiff(wide, 2),
        grey_tiff(wide[..., 0], 1, RAW, "<", **{"284": 2}),
        grey_tiff(x[..., 0], 0, RAW, "<", **{"284": 2}),
    ):
        with pytest.raises(ValueError, match="TIFF of separate planes; .*PNG"):
            read(tmp_path, odd)


def test_what_pillow_would_misread_is_refused(tmp_path):
    x = RNG.integers(-128, 128, (SIDE, SIDE), np.int8)
    with pytest.raises(ValueError, match="TIFF of signed 8-bit numbers"):
        read(tmp_path, grey_tiff(x, 1, RAW, "<", kind=2))
    # Two rows and columns share their colours, which is so where nothing is said.
    y = RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    with pytest.raises(ValueError, match="YCbCr with fewer colours than pixels"):
        read(tmp_path, rgb_tiff(y, 1, **{"262": 6}))
    rgb = np.asarray(Image.fromarray(y, "YCbCr").convert("RGB"))
    near(read(tmp_path, rgb_tiff(y, 1, **{"262": 6, "530": (3, [1, 1])})), rgb)


@pytest.mark.parametrize("order", "<>")
def test_strips_that_a_tiff_lacks_are_not_black(tmp_path, order):
    x = RNG.integers(0, 256, (SIDE, SIDE), np.uint8)
    tags = {258: 8, 259: RAW, 262: 1, 277: 1, 278: SIDE // 4}
    whole = tiff(SIDE, SIDE, tags, x.tobytes(), order, [4 * SIDE] * 4)
    near(read(tmp_path, whole), grey(x))
    cut = tiff(SIDE, SIDE, tags, x[:12].tobytes(), order, [4 * SIDE] * 3)
    high = tiff(1 << 20, SIDE, tags, x.tobytes(), order, [4 * SIDE] * 4)  # of a bomb
    for data in (cut, high):
        with pytest.raises(
            ValueError, match="strips of .* px.; expected all .*; fetch"
        ):
            read(tmp_path, data)


def test_premultiplied_alpha_of_grey(tmp_path):
    alpha = RNG.integers(0, 256, (SIDE, SIDE))
    shown = RNG.integers(0, 256, (SIDE, SIDE)) * alpha // 255
    data = np.stack([shown, alpha], -1).astype(np.uint8).tobytes()
    tags = {258: (3, [8, 8]), 259: RAW, 262: 1, 277: 2, 338: 1}
    got = read(tmp_path, tiff(SIDE, SIDE, tags, data))
    np.testing.assert_allclose(got, grey(shown + 255 - alpha), atol=1.01)


# --- PNG ------------------------------------------------------------------------------


def png(x, depth, colour, clear, *more):
    """A picture of numbers of `depth` bits, one value of which is transparent."""
    bits = (x[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = [np.packbits(r.reshape(-1)).tobytes() for r in bits.reshape(len(x), -1)]
    parts = [(b"tRNS", struct.pack(f">{len(clear)}H", *clear)), *more]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows)))]
    return png_of((x.shape[1], len(x), depth, colour), parts)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_any_depth_becomes_white(tmp_path, depth):
    top = 2**depth - 1
    value = top // 2
    x = RNG.integers(0, top + 1, (SIDE, SIDE))
    x[3:9, 3:9] = value
    x[10] = value ^ 1  # differs in the last bit: to be seen
    expected = grey(np.where(x == value, 255, x / top * 255))
    assert (x != value).any() and (depth == 1 or (expected < 128).any())
    near(read(tmp_path, png(x, depth, 0, (value,))), expected)
    if 1 < depth < 16:  # bits that the value cannot have are none of it
        near(read(tmp_path, png(x, depth, 0, (value | 0x8000,))), expected)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_any_depth_becomes_white(
    tmp_path, depth, orientation
):
    top = 2**depth - 1
    value = np.array([top // 5, top // 3, top // 2])
    x = RNG.integers(0, top + 1, (SIDE, SIDE, 3))
    x[3:9, 3:9] = value
    x[10] = value ^ [0, 0, 1]
    expected = np.where((x == value).all(-1)[..., None], 255, x / top * 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    part = b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")
    got = read(tmp_path, png(x, depth, 2, value.tolist(), part))
    turned = np.rot90(expected, -1) if orientation == 6 else expected
    np.testing.assert_allclose(got, turned, atol=1)


# --- JPEG 2000, and what has a JPEG in it ---------------------------------------------


@pytest.mark.parametrize("sign", [0, 128])
@pytest.mark.parametrize("depth", [4, 7, 9, 12, 16])
def test_depths_of_jpeg_2000_that_are_misread(tmp_path, depth, sign):
    """Pillow shifts: of 9 bits and more, white becomes black."""
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(
        out, "JPEG2000"
    )
    data = bytearray(out.getvalue())
    assert read(tmp_path, bytes(data)).shape == (SIDE, SIDE, 3)
    at = data.index(b"\xff\x4f\xff\x51") + 42
    assert data[at] == 7
    for k in range(3):
        data[at + 3 * k] = depth - 1 + sign
    with pytest.raises(ValueError, match="got a JPEG2000 of (signed numbers|.* bits)"):
        read(tmp_path, bytes(data))


def scans(side, number):
    """A JPEG whose last scan comes again and again."""
    out = io.BytesIO()
    Image.new("L", (side, side), 128).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * number + data[-2:]


def as_mpo(data):
    """With the marker of a file of several pictures, which gives it another name."""
    block = b"MPF\0MM\0*" + struct.pack(">IH", 8, 3)
    block += struct.pack(">HHII", 0xB000, 7, 4, 0x30313030)
    block += struct.pack(">HHII", 0xB001, 4, 1, 2)
    block += struct.pack(">HHII", 0xB002, 7, 32, 50) + struct.pack(">I", 0)
    block += struct.pack(">IIIHH", 0x030000, len(data), 0, 0, 0)
    block += struct.pack(">IIIHH", 0, 10, len(data), 0, 0)
    return data[:2] + b"\xff\xe2" + struct.pack(">H", len(block) + 2) + block + data[2:]


def in_tiff(data, side, copies=1, **more):
    rows = side // copies
    tags = {258: 8, 259: 7, 262: 1, 277: 1, 278: rows}
    return tiff(side, side, tags | more, data * copies, strips=[len(data)] * copies)


WRAPPED = {"JPEG": lambda data, side: data, "MPO": lambda data, side: as_mpo(data)}
WRAPPED["TIFF"] = in_tiff


@pytest.mark.parametrize("format", WRAPPED)
def test_scans_are_counted_whatever_is_around_them(tmp_path, format, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 64)
    sound, bomb = (WRAPPED[format](scans(64, n), 64) for n in (1, 20))
    with Image.open(io.BytesIO(sound)) as picture:
        assert picture.format == format
    near(read(tmp_path, sound), grey(np.full((SIDE, SIDE), 128)))
    with pytest.raises(ValueError, match=r"JPEG of 64 x 64 px in \d+ scans"):
        read(tmp_path, bomb)


def test_every_strip_of_a_tiff_may_have_its_scans(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 64)
    out = io.BytesIO()
    Image.new("L", (64, 4), 128).save(out, "JPEG")
    many = in_tiff(out.getvalue(), 64, copies=16)
    near(read(tmp_path, many), grey(np.full((SIDE, SIDE), 128)))
    assert many.count(b"\xff\xda") > pictures._SCANS


def test_a_large_size_in_a_few_bytes_of_jpeg_2000(tmp_path):
    out = io.BytesIO()
    Image.new("L", (3000, 3000)).save(out, "JPEG2000")
    assert len(out.getvalue()) < 1000
    with pytest.raises(ValueError, match="3000 x 3000 px in .* bytes of JPEG2000"):
        read(tmp_path, out.getvalue())
