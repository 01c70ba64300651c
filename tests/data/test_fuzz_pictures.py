# SPDX-License-Identifier: Apache-2.0
"""Pictures and folders from strangers: refused in one line, in bounded memory."""

import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
from fuzzing import READERS, ROOT, SIDE, SOUND, load_folder, png, put
from hypothesis import given, settings

from vpt_jax.data import bounds, colours, folder, pictures
from vpt_jax.data.public import records
from vpt_jax.files.messages import printable


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.mark.parametrize("name", ["pictures", "folders", "lists", "npz sets"])
def test_what_is_read_is_accepted_or_refused_by_one_error(scratch, name):
    reader = READERS[name]()

    @settings(max_examples=40, deadline=None)
    @given(reader.cases)
    def attempt(case):
        reader.attempt(case, scratch)

    attempt()


# --- bombs ----------------------------------------------------------------------------


def test_a_large_size_in_a_few_bytes_is_refused_before_it_is_allocated(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(13_000, 13_000, 9, colour=6))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="13000 px in .* bytes of PNG"):
        pictures.read_picture(path, SIDE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


BOMBS = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from vpt_jax.data import pictures
rule, paths = sys.argv[1], sys.argv[2:]
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda p: pictures.read_picture(p, 8, rule), paths))
print(len(found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["crop", "corner"])
@pytest.mark.parametrize(("depth", "colour"), [(8, 6), (16, 0)])
def test_threads_with_bombs_hold_one_at_a_time(tmp_path, rule, depth, colour):
    """Each is 0.2 MB on disk and 12,000 x 12,000 px, the size of a real picture."""
    data = png(12_000, 12_000, 12_000, depth, colour)
    paths = [tmp_path / f"{k}.png" for k in range(4)]
    for path in paths:
        path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, rule, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    count, mib = map(int, done.stdout.split())
    assert count == 4 and mib < 2600, mib


def test_pictures_wait_for_room():
    room, held, most = bounds.Room(10), [], []
    guard = threading.Lock()

    def work(amount):
        with room.take(amount):
            with guard:
                held.append(amount)
                most.append((sum(held), len(held)))
            with guard:
                held.remove(amount)

    amounts = [4, 6, 3, 50, 7, 10, 1, 2] * 20
    threads = [threading.Thread(target=work, args=(n,)) for n in amounts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(most) == len(amounts)
    assert all(total <= 10 or number == 1 for total, number in most)


def test_bands_are_the_whole_picture(monkeypatch):
    """Conversion band by band gives every pixel that conversion at once gives."""
    for (format, mode), data in SOUND.items():
        if format == "EPS" or mode == "F":  # the latter is out of range
            continue
        monkeypatch.setattr(colours, "BAND", 1 << 20)
        with pictures.quiet():
            whole = pictures.decode(data, 4, "corner")
            monkeypatch.setattr(colours, "BAND", 11)
            np.testing.assert_array_equal(
                pictures.decode(data, 4, "corner"), whole, f"{format} {mode}"
            )
    floats = np.random.default_rng(0).random((9, 11), np.float32)
    in_bands = colours.to_8_bits(floats, 1)
    monkeypatch.setattr(colours, "BAND", 1 << 20)
    np.testing.assert_array_equal(in_bands, colours.to_8_bits(floats, 1))


# --- what is no picture ---------------------------------------------------------------


def good(root):
    for kind in ("cat", "dog"):
        for k in range(4):
            put(root, [kind, f"{k}.png"], "picture")


@pytest.mark.parametrize("kind", ["pipe", "loop", "zero", "empty", "broken"])
def test_what_is_no_picture_is_named_and_does_not_hang(tmp_path, kind, monkeypatch):
    root = tmp_path / "data"
    good(root)
    put(root, ["cat", "odd\n\udcff.png"], kind)
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"cat/odd\\n\\udcff\.png: ") as error:
        folder.load(str(root), SIDE, report=lambda text: None)
    assert "\n" not in str(error.value)
    assert load_folder(root, tmp_path, skip_broken=True) == "accepted"


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path):
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="got a file of 1,099,511,627,776 bytes"):
        pictures.read_picture(path, SIDE)
    with open(tmp_path / "train.txt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="train.txt: got a file of 1,099"):
        folder.find(str(tmp_path))


@pytest.mark.parametrize("data_dir", ["~no-such-user", "x" * 5000, "a\0b", "absent\n"])
def test_a_folder_that_cannot_be(data_dir):
    with pytest.raises(ValueError, match="expected DIR/train/<class>") as error:
        folder.find(data_dir)
    assert "\n" not in str(error.value)


def test_names_of_classes_can_be_printed(tmp_path):
    root = tmp_path / "data"
    good(root)
    for k in range(3):
        put(root, ["\x1b[31m\udcfe", f"{k}.png"], "picture")
    found = folder.find(str(root))
    assert found.class_names == (r"\x1b[31m\udcfe", "cat", "dog")
    assert printable("é ok\n") == r"é ok\n"


def test_prepared_pictures_start_no_programs_and_have_a_limit():
    damaged = SOUND["PNG", "RGB"][:40]
    for data in (SOUND["EPS", "RGB"], png(20_000, 20_000), b"", damaged):
        with pytest.raises(ValueError, match="expected PNG or JPEG"):
            records.decode_picture(data, 3)
