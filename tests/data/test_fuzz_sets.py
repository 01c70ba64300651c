# SPDX-License-Identifier: Apache-2.0
"""Data sets in one file (npz) from strangers: nothing is run, nothing explodes."""

import tracemalloc

import numpy as np
import pytest
from fuzzing import npz_of, sound_set, try_set, zip_with

from vpt_jax.data import folder

RAN = []


def test_arrays_that_lack_and_files_that_are_none(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"got arrays \['images'\]; expected train_im"):
        folder.find(str(path))
    path.write_bytes(b"PK\3\4 not quite")
    with pytest.raises(ValueError, match=r"x\.npz: got a file that cannot be read"):
        folder.find(str(path))


def test_sound_files_are_accepted(tmp_path):
    assert try_set(npz_of(sound_set(), compressed=True), tmp_path) == "accepted"


class Runs:
    def __reduce__(self):
        return RAN.append, ("unpickled",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([Runs()] * 6, object)}, "never loaded"),
        ({"class_names": np.array([Runs(), 2], object)}, "never loaded"),
        ({"labels": np.full(6, np.nan)}, "labels float64 .*expected integers"),
        ({"labels": np.arange(6) - 1}, "labels from -1; expected labels from 0"),
        ({"labels": np.arange(6) * 10**9}, "got label 5000000000; expected labels"),
        ({"labels": np.full(6, 2**64 - 1, np.uint64)}, "expected labels below"),
        ({"labels": np.zeros((6, 2), int)}, r"\[6, 2\] that are not one-hot; expected"),
        ({"labels": np.zeros(7, int)}, r"\[6, 9, 9, 3\] and 7 labels"),
        (
            {"labels": np.zeros(0, int), "images": np.zeros((0, 1, 1), "u1")},
            "and 0 labels",
        ),
        ({"images": np.zeros((6, 4, 4, 2), "u1")}, r"\[6, 4, 4, 2\]; expected uint8"),
        ({"images": np.zeros((6, 9, 9, 3))}, "images float64"),
        ({"images": np.zeros((6, 9), np.uint8)}, r"images uint8 \[6, 9\]"),
        ({"images": np.zeros((6, 0, 9), np.uint8)}, "at least one pixel"),
        ({"class_names": np.array(["a"])}, "class_names: got 1 names; expected 2"),
        ({"class_names": np.zeros((2, 2))}, r"class_names float64 \[2, 2\]"),
        ({"class_names": np.array([2**31] * 2, "u4").view("U1")}, "no text"),
        ({"val_images": np.zeros((1, 1, 1), "u1")}, "expected train_images"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "set.npz"
    path.write_bytes(npz_of(sound_set() | change))
    with pytest.raises(ValueError, match=message) as error:
        folder.find(str(path))
    assert str(error.value).startswith(str(path)) and not RAN


HEADER = {"descr": "|u1", "fortran_order": False, "shape": (1 << 30,)}


@pytest.mark.parametrize(
    ("name", "header", "size", "message"),
    [
        # A gigabyte in a megabyte; sizes that the file does not have.
        ("images", HEADER | {"shape": (1 << 20, 8, 8)}, 64 << 20, "labels"),
        ("labels", HEADER, 64 << 20, "cannot be read"),
        ("labels", HEADER | {"shape": (10**15,), "descr": "<i8"}, 0, "cannot be read"),
        ("images", HEADER | {"shape": (2**63, 2**63, 3)}, 0, "cannot be read"),
    ],
)
def test_declared_sizes_are_not_believed(tmp_path, name, header, size, message):
    path = tmp_path / "set.npz"
    path.write_bytes(zip_with(name, header, b"", size))
    assert refusing(path, message) < 20 << 20


def refusing(path, message):
    """The bytes of memory that it takes at most."""
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        folder.find(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_zip_bomb_of_pictures_is_refused(tmp_path):
    path = tmp_path / "set.npz"
    images = np.zeros((128, 1024, 1024), np.uint8)  # 128 MiB of zeros in 0.1 MiB
    labels = np.arange(128) % 2
    path.write_bytes(npz_of({"images": images, "labels": labels}, compressed=True))
    assert path.stat().st_size < 1 << 18
    assert refusing(path, "save it with `np.savez`, not compressed") < 5 << 20
