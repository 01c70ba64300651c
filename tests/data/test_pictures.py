# SPDX-License-Identifier: Apache-2.0
"""Every kind of picture file against what it must look like, and resizing by hand."""

import io
import os
import warnings

import numpy as np
import pytest
from fuzzing import png
from PIL import Image, TiffImagePlugin, features

from vpt_jax.data import pictures
from vpt_jax.data.pictures import read_picture

SIDE = 16
RNG = np.random.default_rng(0)
SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (4, 4, 3), np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
)
NOISE = RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
GREY = NOISE[..., 0]


def save(tmp_path, picture, name, **options):
    path = tmp_path / name
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(path, **options)
    return path


SHARP = {"a.jpg": 0, "a.avif": "4:4:4", "a.jp2": None}  # colours in full


def mode(path):
    with Image.open(path) as picture:
        return picture.mode


def grey(x):
    return np.repeat(x[..., None], 3, axis=-1)


# --- kinds of files: of the right side, so that nothing is resized --------------------


@pytest.mark.parametrize("name", ["a.jpg", "a.jp2", "a.avif"])
def test_lossy_rgb_is_nearly_kept(tmp_path, name):
    if not features.check({"a.jp2": "jpg_2000", "a.avif": "avif"}.get(name, "jpg")):
        pytest.skip("Pillow cannot write it")
    path = save(tmp_path, SMOOTH, name, quality=100, subsampling=SHARP[name])
    assert np.abs(read_picture(path, SIDE).astype(int) - SMOOTH).mean() < 6


def on_white(colour, alpha):
    a = alpha[..., None].astype(np.float64) / 255
    return colour * a + 255 * (1 - a)


INDEX = RNG.integers(0, 4, (SIDE, SIDE), np.uint8)
COLOURS = np.array([[9, 20, 31], [250, 0, 3], [0, 99, 7], [1, 2, 200]], np.uint8)
PALETTE = Image.fromarray(INDEX, "L")
PALETTE.putpalette(COLOURS.ravel().tolist())
CLEARED = np.where((INDEX == 2)[..., None], 255, COLOURS[INDEX])
ALPHA = RNG.integers(0, 256, (SIDE, SIDE), np.uint8)
ALPHA[:2], ALPHA[2:4] = 0, 255
ALPHAS = np.array([0, 60, 128, 255], np.uint8)
ONE_COLOUR = NOISE.copy()
ONE_COLOUR[3:5] = 7, 8, 9
WITHOUT = ONE_COLOUR.copy()
WITHOUT[3:5] = 255
BITS = GREY > 127
EACH, FIRST = ({"transparency": x} for x in (ALPHAS.tobytes(), int(GREY[0, 0])))
# Names, picture, mode in the file, what it looks like, options.
LOSSLESS = [
    ("a.png a.bmp a.tif a.ppm", NOISE, "RGB", NOISE, {}),
    ("a.webp", NOISE, "RGB", NOISE, {"lossless": True}),
    ("a.png", GREY, "L", grey(GREY), {}),
    ("a.png", BITS, "1", grey(BITS * 255), {}),
    ("a.png", np.dstack([NOISE, ALPHA]), "RGBA", on_white(NOISE, ALPHA), {}),
    ("a.png", np.dstack([GREY, GREY.T]), "LA", on_white(grey(GREY), GREY.T), {}),
    ("a.png a.gif a.bmp", PALETTE, "P", COLOURS[INDEX], {}),
    ("a.png a.gif", PALETTE, "P", CLEARED, {"transparency": 2}),
    ("a.png", PALETTE, "P", on_white(COLOURS[INDEX], ALPHAS[INDEX]), EACH),
    ("a.png", ONE_COLOUR, "RGB", WITHOUT, {"transparency": (7, 8, 9)}),
    ("a.png", GREY, "L", grey(np.where(GREY == GREY[0, 0], 255, GREY)), FIRST),
]


@pytest.mark.parametrize(
    ("name", "picture", "kind", "expected", "options"),
    [(name, *case) for names, *case in LOSSLESS for name in names.split()],
)
def test_lossless(tmp_path, name, picture, kind, expected, options):
    path = save(tmp_path, picture, name, **options)
    assert mode(path) == kind
    out = read_picture(path, SIDE)
    assert out.dtype == np.uint8
    blended = expected.dtype == np.float64  # and rounded
    assert np.abs(out.astype(int) - expected).max() <= int(blended)
    if kind == "RGBA":
        assert (out[:2] == 255).all()
        np.testing.assert_array_equal(out[2:4], NOISE[2:4])


def test_cmyk(tmp_path):
    ink = np.zeros((SIDE, SIDE, 4), np.uint8)
    ink[:8, :, 0] = 255  # cyan above
    ink[8:, :, 3] = 128  # half black below
    for name in ("a.tif", "a.jpg"):
        path = save(tmp_path, Image.fromarray(ink, "CMYK"), name, quality=100)
        assert mode(path) == "CMYK"
        out = read_picture(path, SIDE).astype(int)
        assert np.abs(out[:8] - (0, 255, 255)).max() <= 3
        assert np.abs(out[8:] - 127).max() <= 3


def test_16_bits_are_scaled_not_clipped(tmp_path):
    wide = RNG.integers(0, 65536, (SIDE, SIDE), np.uint16)
    wide[0, :4] = 0, 255, 256, 65535
    expected = np.rint(wide.astype(np.float64) / 65535 * 255).astype(np.uint8)
    for name in ("a.png", "a.tif", "a.pgm"):
        out = read_picture(save(tmp_path, Image.fromarray(wide), name), SIDE)
        np.testing.assert_array_equal(out, grey(expected), err_msg=name)
    assert expected[0, :4].tolist() == [0, 1, 1, 255]
    out = read_picture(save(tmp_path, wide.astype(np.int32), "b.tif"), SIDE)
    np.testing.assert_array_equal(out, grey(expected))


@pytest.mark.parametrize(
    ("value", "kind"), [(1.5, np.float32), (np.nan, np.float32), (70000, np.int32)]
)
def test_values_of_unknown_range_are_refused(tmp_path, value, kind):
    x = np.zeros((SIDE, SIDE), kind)
    x[1, 1] = value
    path = save(tmp_path, x, "a.tif")
    message = rf"a\.tif: got {np.dtype(kind).name} values from .*expected 0 to"
    with pytest.raises(ValueError, match=message):
        read_picture(path, SIDE)


# EXIF orientation: what was done to the upright picture before it was stored.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),  # to be turned clockwise to be seen
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize(
    ("orientation", "name"),
    [*((k, "a.png") for k in STORED), (6, "a.jpg"), (6, "a.tif")],
)
def test_exif_orientation(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](SMOOTH))
    options = {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}
    path = save(tmp_path, stored, name, exif=exif, **options)
    out = read_picture(path, SIDE).astype(int)
    assert np.abs(out - SMOOTH).mean() < (6 if name == "a.jpg" else 1e-9)


def test_orientation_comes_before_the_crop(tmp_path):
    """A tall picture that is stored lying, as cameras do."""
    tall = RNG.integers(0, 256, (64, 31, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = save(tmp_path, np.ascontiguousarray(np.rot90(tall)), "a.png", exif=exif)
    upright = read_picture(save(tmp_path, tall, "b.png"), 28)
    np.testing.assert_array_equal(read_picture(lying, 28), upright)


def test_a_damaged_exif_block_is_ignored(tmp_path):
    options = {"quality": 100, "subsampling": 0, "exif": b"Exif\0\0II*\0\xff\xff"}
    path = save(tmp_path, SMOOTH, "a.jpg", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = read_picture(path, SIDE).astype(int)
    assert np.abs(out - SMOOTH).mean() < 6


def test_the_first_frame_of_an_animation_and_page_of_a_tiff(tmp_path):
    other = Image.new("RGB", (SIDE, SIDE), "green")
    for name in ("a.gif", "a.tif"):
        path = save(tmp_path, PALETTE, name, save_all=True, append_images=[other])
        with Image.open(path) as picture:
            assert picture.n_frames == 2
        np.testing.assert_array_equal(read_picture(path, SIDE), COLOURS[INDEX])


# --- broken files ---------------------------------------------------------------------


def encoded(form, side):
    buffer, pixels = io.BytesIO(), RNG.integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got an empty file"),
        (b"<html>404 not found</html>", "got no picture that can be read; expected JP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "got no picture"),
        (encoded("JPEG", 64)[:200], "got"),
        (encoded("JPEG", 64)[:-900], r"got a damaged picture \(.*truncated"),
        (encoded("PNG", SIDE)[:-300], "got a damaged picture"),
        (
            png(60_000, 60_000),
            "got a picture that is too large; expected at most 178,956,970",
        ),
        (png(0, 5), "got"),
    ],
)
def test_broken_files_are_named_with_the_reason(tmp_path, data, message):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"holiday\.jpg: {message}"):
        read_picture(path, SIDE)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jpg: cannot be read \(No such file"):
        read_picture(tmp_path / "absent.jpg", SIDE)
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(ValueError, match=r"loop\.jpg: cannot be read .*where the link"):
        read_picture(tmp_path / "loop.jpg", SIDE)
    with pytest.raises(ValueError, match="expected a regular file"):
        read_picture(tmp_path, SIDE)
    path = save(tmp_path, NOISE, "secret.png")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied"):
        read_picture(path, SIDE)


def test_memory_errors_are_not_blamed_on_the_file(tmp_path, monkeypatch):
    def load(self):
        raise MemoryError

    path = save(tmp_path, NOISE, "a.png")
    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(MemoryError):
        read_picture(path, SIDE)


def test_sides_and_rules_that_do_not_exist(tmp_path):
    path = save(tmp_path, NOISE, "a.png")
    with pytest.raises(ValueError, match=r"a\.png: got side=0; expected at least 1"):
        read_picture(path, 0)
    with pytest.raises(ValueError, match="unknown rule 'bicubic'; choose one of 'cr"):
        read_picture(path, 8, "bicubic")


# --- resizing -------------------------------------------------------------------------


def triangle(size, side):
    """Antialiased bilinear weights `[side, size]`, in float64."""
    scale = size / side
    centre = (np.arange(side)[:, None] + 0.5) * scale
    at = np.arange(size)[None] + 0.5
    weight = np.maximum(0, 1 - np.abs(at - centre) / max(scale, 1.0))
    return weight / weight.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("h", "w"), [(60, 101), (101, 60), (20, 17), (5, 9)])
def test_squash_is_antialiased_bilinear(tmp_path, h, w):
    x = RNG.integers(0, 256, (h, w, 3), np.uint8)
    rows, columns = triangle(h, 28), triangle(w, 28)
    expected = np.einsum("ih,hwc,jw->ijc", rows, x.astype(np.float64), columns)
    out = read_picture(save(tmp_path, x, "a.png"), 28, "squash")
    assert np.abs(out - expected).max() <= 1.01  # two roundings


@pytest.mark.parametrize(
    ("h", "w"), [(375, 500), (640, 427), (100, 90), (90, 1440), (257, 256), (224, 224)]
)
def test_crop_is_resizing_the_whole_and_cutting(tmp_path, h, w):
    """As torchvision's `Resize(256)` and `CenterCrop(224)` do on Pillow pictures."""
    x = RNG.integers(0, 256, (h, w, 3), np.uint8)
    new = (256, int(256 * h / w)) if w <= h else (int(256 * w / h), 256)
    whole = np.asarray(Image.fromarray(x).resize(new, Image.Resampling.BILINEAR))
    top, left = round((new[1] - 224) / 2), round((new[0] - 224) / 2)
    expected = whole[top : top + 224, left : left + 224]
    # The reference resizes one of 224 px too; `read_picture` leaves it alone.
    out = pictures.centre_crop(Image.fromarray(x), 224)
    np.testing.assert_array_equal(out, expected)
    out = read_picture(save(tmp_path, x, "a.png"), 224, "crop")
    np.testing.assert_array_equal(out, x if h == w else expected)


def test_a_picture_that_is_too_long_is_cropped_but_not_resized_whole():
    x = RNG.integers(0, 256, (20, 401, 3), np.uint8)  # more than 16 times as long
    with pytest.raises(ValueError, match="401 x 20 px; expected one at most 16 times"):
        pictures.resize_short(Image.fromarray(x), 28)
    whole = Image.fromarray(x).resize((641, 32), Image.Resampling.BILINEAR)
    expected = np.asarray(whole).astype(int)[2:30, 306:334]  # 306.5 to even
    out = pictures.centre_crop(Image.fromarray(x), 28)
    assert np.abs(out - expected).max() <= 1  # the box is in single precision


@pytest.mark.parametrize(("h", "w"), [(1, 9), (3, 200_000), (100_000, 1)])
@pytest.mark.parametrize("rule", pictures.RULES)
def test_narrow_strips_need_little_memory(tmp_path, h, w, rule):
    x = np.full((h, w, 3), 77, np.uint8)
    out = read_picture(save(tmp_path, x, "a.png"), 8, rule)
    assert out.shape == (8, 8, 3) and (out == 77).all()


def by_hand(x, side, half):
    """Two neighbours per axis, in float64, pixel by pixel."""
    h, w = x.shape[:2]
    out = np.zeros((side, side, 3))
    for i in range(side):
        for j in range(side):
            y = min(max((i + half) * h / side - half, 0), h - 1)
            z = min(max((j + half) * w / side - half, 0), w - 1)
            a, b = int(y), int(z)
            c, d = min(a + 1, h - 1), min(b + 1, w - 1)
            fy, fx = y - a, z - b
            above = x[a, b] * (1 - fx) + x[a, d] * fx
            out[i, j] = above * (1 - fy) + (x[c, b] * (1 - fx) + x[c, d] * fx) * fy
    return out


@pytest.mark.parametrize(("rule", "half"), [("half_pixel", 0.5), ("corner", 0.0)])
@pytest.mark.parametrize(("h", "w"), [(21, 34), (16, 9), (1, 1)])
def test_rules_without_antialiasing(tmp_path, rule, half, h, w):
    x = RNG.integers(0, 256, (h, w, 3), np.uint8)
    out = read_picture(save(tmp_path, x, "a.png"), 16, rule)
    assert np.abs(out - by_hand(x, 16, half)).max() <= 0.5 + 1e-3


def test_a_picture_of_the_right_side_is_not_touched(tmp_path):
    path = save(tmp_path, NOISE, "a.png")
    for rule in pictures.RULES:
        np.testing.assert_array_equal(read_picture(path, SIDE, rule), NOISE)
    np.testing.assert_array_equal(pictures.to_square(GREY, SIDE, "crop"), grey(GREY))


@pytest.mark.parametrize("rule", ["crop", "squash"])
def test_large_jpegs_are_decoded_small_but_true(tmp_path, rule):
    low = Image.fromarray(RNG.integers(0, 256, (12, 16, 3), np.uint8))
    big = low.resize((1200, 904), Image.Resampling.BICUBIC)
    noisy = np.asarray(big).astype(int) + RNG.integers(-20, 21, (904, 1200, 1))
    big = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    path = save(tmp_path, big, "a.jpg", quality=92)
    with Image.open(path) as picture:
        whole = save(tmp_path, picture, "a.png")  # decoded in full
    a, b = (read_picture(p, 64, rule).astype(int) for p in (path, whole))
    assert np.abs(a - b).max() <= 4 and np.abs(a - b).mean() < 1


def test_no_warning_leaves(tmp_path, monkeypatch):
    """Odd TIFF tags make Pillow warn; many pixels do too."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = "a description"
    path = save(tmp_path, NOISE, "a.tif", tiffinfo=tags)
    data = path.read_bytes().replace(b"a description", b"\xff description")
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_picture(path, SIDE)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE - 1)
        np.testing.assert_array_equal(read_picture(path, SIDE), NOISE)
