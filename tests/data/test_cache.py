# SPDX-License-Identifier: Apache-2.0
"""The cache of decoded pictures: hits, keys, damage, full disks, several builders."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vpt_jax.data import cache

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 3), np.uint8)
KEY = {"files": [["a.jpg", 10, 3], ["é\udcff.jpg", 2, 3]], "side": 6, "splits": (1, 2)}


def make(write):
    for picture in PICTURES:
        write(picture)
    return {"note": [1, "two"]}


def never(write):
    raise AssertionError("it is in the cache")


def test_the_second_time_nothing_is_made(tmp_path):
    folder = tmp_path / "a" / "b"
    first, info = cache.cached(folder, KEY, 6, make)
    second, again = cache.cached(folder, KEY, 6, never)
    for images in (first, second):
        assert images.dtype == np.uint8 and type(images) is np.ndarray
        np.testing.assert_array_equal(images, PICTURES)
        assert not images.flags.writeable
    assert info == again == {"note": [1, "two"]}
    assert np.memmap in (type(second.base), type(second.base.base))
    assert len(list(folder.iterdir())) == 1


def test_every_part_of_the_key_counts(tmp_path):
    cache.cached(tmp_path, KEY, 6, make)
    for change in ({"side": 7}, {"files": []}, {"new": None}, {"splits": (2, 1)}):
        made = []

        def make_again(write, made=made):
            made.append(1)
            return make(write)

        cache.cached(tmp_path, KEY | change, 6, make_again)
        assert made
    cache.cached(tmp_path, dict(reversed(KEY.items())), 6, never)  # order does not


def test_a_damaged_file_is_reported_and_made_again(tmp_path, monkeypatch):
    """Of a flipped bit of the description: or it made no difference."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # it takes its time
    cache.cached(tmp_path, KEY, 6, make)
    (path,) = tmp_path.iterdir()
    good, size = path.read_bytes(), PICTURES.size
    damaged = [good[:at] for at in (0, 1, 15, size - 1, size, size + 40)]
    for at in (0, 1, size // 2, *range(size - 1, len(good))):
        flipped = good[at] ^ (1 << at % 8)
        damaged.append(good[:at] + bytes([flipped]) + good[at + 1 :])
    silent = 0
    for data in damaged:
        path.write_bytes(data)
        said = []
        images, info = cache.cached(tmp_path, KEY, 6, make, said.append)
        np.testing.assert_array_equal(images, PICTURES)
        assert info == {"note": [1, "two"]}
        if said:
            assert len(said) == 1 and f"{path} is damaged" in said[0]
            assert path.read_bytes() == good
        else:
            silent += 1
            assert data[:size] == good[:size] and len(data) == len(good)
    assert silent < 10


def test_an_error_while_making_leaves_nothing(tmp_path):
    def broken(write):
        make(write)
        raise ValueError("3 pictures cannot be read")

    with pytest.raises(ValueError, match="3 pictures"):
        cache.cached(tmp_path, KEY, 6, broken)
    assert not list(tmp_path.iterdir())


STRIP = [PICTURES[0], np.concatenate(PICTURES[1:4]), PICTURES[4, :2]]


def make_strip(write):
    for picture in STRIP:
        write(picture)
    return [len(picture) for picture in STRIP]


def test_a_strip_is_pictures_of_any_length_one_after_the_other(tmp_path):
    for maker in (make_strip, never):
        pixels, info = cache.cached(tmp_path, KEY, 6, maker, strip=True)
        np.testing.assert_array_equal(pixels, np.concatenate(STRIP))
        assert info == [6, 18, 2] and not pixels.flags.writeable
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[1:])
    said = []
    cache.cached(tmp_path, KEY, 6, make_strip, said.append, strip=True)
    assert len(said) == 1 and "making it again" in said[0]


def test_what_is_forgotten_is_read_again(tmp_path):
    big = np.random.default_rng(1).integers(0, 256, (40, 64, 64, 3), np.uint8)
    images, _ = cache.cached(tmp_path, KEY, 64, lambda w: [w(x) for x in big] and 0)
    for start, stop in ((0, 3), (3, 20), (39, 60), (5, 5), (0, 40)):
        cache.forget(images, start, stop)
        np.testing.assert_array_equal(images, big)
    part = images[7:30]
    cache.forget(part, 1, 9)
    cache.forget(part[::2], 1, 9)
    np.testing.assert_array_equal(part, big[7:30])


def test_only_what_a_file_holds_is_forgotten(tmp_path):
    memory = PICTURES.copy()
    np.save(tmp_path / "a.npy", PICTURES)
    private = np.load(tmp_path / "a.npy", mmap_mode="c")
    private[:] = 7
    for images in (memory, private, private[2:], [1, 2], None):
        cache.forget(images, 0, 5)
    np.testing.assert_array_equal(memory, PICTURES)
    assert (private == 7).all()


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device.*VPT_JAX_CACHE"):
        cache.cached(tmp_path, KEY, 6, make)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    real = open
    monkeypatch.setattr(
        cache,
        "open",
        lambda path, mode: real("/dev/full" if mode == "wb" else path, mode),
        raising=False,
    )

    def much(write):
        for _ in range(2000):
            write(PICTURES[0])

    with pytest.raises(ValueError, match="No space left on device.*VPT_JAX_CACHE"):
        cache.cached(tmp_path, KEY, 6, much)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strip", [False, True])
def test_no_pictures_at_all(tmp_path, strip):
    for maker in (lambda write: "none", never):
        images, info = cache.cached(tmp_path, KEY, 6, maker, strip=strip)
        assert images.shape == ((0, 6, 3) if strip else (0, 6, 6, 3)) and info == "none"


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    cache.cached(tmp_path, KEY, 6, make)
    (path,) = tmp_path.iterdir()
    path.unlink()
    old, new = (tmp_path / f".{path.name}.{x}" for x in ("old", "new"))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    cache.cached(tmp_path, KEY, 6, make)
    assert set(tmp_path.iterdir()) == {path, new}  # another process may be at it


def test_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path))
    assert cache.default_folder() == tmp_path / "pictures"
    monkeypatch.setenv("VPT_JAX_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / ".cache" / "vpt_jax" / "pictures"


def test_two_makers_at_once(tmp_path):
    """Both make it, slowly; a reader's map survives the other's replacing the file."""
    both = threading.Barrier(2)

    def slowly(write):
        for picture in PICTURES:
            both.wait()
            write(picture)

    def read(_):
        return cache.cached(tmp_path, {"k": 1}, 6, slowly)

    with ThreadPoolExecutor(2) as pool:
        for images, _ in pool.map(read, range(2)):
            np.testing.assert_array_equal(images, PICTURES)
    np.testing.assert_array_equal(
        cache.cached(tmp_path, {"k": 1}, 6, never)[0], PICTURES
    )
    assert len(list(tmp_path.iterdir())) == 1
