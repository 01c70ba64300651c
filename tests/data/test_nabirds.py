# SPDX-License-Identifier: Apache-2.0
"""NABirds: the publisher's files, through our tfds builder, to our reader.

Without TensorFlow, with which tests/tfds does the same; tfds writes TFRecord files only
with it, so that here there are ArrayRecord files.
"""

import functools
import hashlib
import io
import sys

import numpy as np
import pytest
from PIL import Image

from vpt_jax.data.__main__ import main
from vpt_jax.data.public import nabirds, records, vtab

ROW = vtab.BENCHMARKS["nabirds"]
# Gaps, and numbers of one to four digits: sorted as text they would be in other order.
IDS = [i for i in range(2, 1011) if i % 9 < 5][-555:]
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def write_raw(folder, ids, seed=0):
    """The publisher's layout; returns path to `(file, label, is train)`."""
    rng = np.random.default_rng(seed)
    known, lines = {}, {name: [] for name in LISTS}
    for k in range(2 * len(ids) + 7):  # each class in both splits
        label, train = k // 2 % len(ids), k % 2
        uuid = f"{rng.integers(2**32):08x}-21dc-4d0c-bfe1-{k:012x}"
        path = f"{ids[label]:04d}/{uuid.replace('-', '')}.jpg"
        mode = "L" if k % 50 == 3 else "RGB"  # a few are grey
        pixels = rng.integers(0, 256, (5 + k % 3, 7, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
        file = folder / "images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(buffer.getvalue())
        known[path] = buffer.getvalue(), label, bool(train)
        for name, value in zip(LISTS, (path, ids[label], train), strict=True):
            lines[name].append(f"{uuid} {value}\n")
    for name in LISTS:
        rng.shuffle(lines[name])
        (folder / name).write_text("".join(lines[name]))
    (folder / "classes.txt").write_text("0 Birds\n1 Ducks, Geese, and Swans\n")
    (folder / "bounding_boxes.txt").write_text("not read\n")
    return known


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A data folder with NABirds prepared, and what its pictures are."""
    root = tmp_path_factory.mktemp("tfds")
    known = write_raw(root / "downloads/manual/nabirds", IDS)
    assert main(["prepare", "nabirds", f"--data_dir={root}"]) == 0
    return root, known


def test_it_is_prepared_without_tensorflow_and_found(built):
    root, _ = built
    assert len(IDS) == 555 and sorted(IDS, key=str) != IDS
    assert vtab.find(ROW, str(root)) == root / "nabirds" / "1.0.0"
    assert "tensorflow" not in sys.modules
    left = [path.name for path in (root / "nabirds").iterdir()]
    assert left == ["1.0.0"]


@pytest.mark.parametrize(("split", "train"), [("train", True), ("test", False)])
def test_splits_labels_and_bytes_are_those_of_the_raw_files(built, split, train):
    """In the order of a hash of the uuids, whatever the order of the lists."""
    root, known = built
    examples, names = records.open_split(root / "nabirds" / "1.0.0", split), []
    for i, example in enumerate(examples):
        names.append(example["image/filename"].decode())
        data, label, is_train = known[names[-1]]
        assert (int(example["label"]), is_train) == (label, train)
        assert data in examples.record(i)  # the file as it was
    assert sorted(names) == sorted(path for path in known if known[path][2] == train)
    lines = (root / "downloads/manual/nabirds/images.txt").read_text().splitlines()
    uuids = {path: uuid for uuid, path in map(str.split, lines)}
    hashes = [hashlib.md5(f"{split}{uuids[name]}".encode()).digest() for name in names]
    assert hashes == sorted(hashes)


def test_load_gives_pictures_and_labels(built):
    root, known = built
    expected = {}
    for data, label, train in known.values():
        picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        expected[picture.tobytes()] = label, train
    val = vtab.load(ROW, "val", data_dir=str(root))
    num = sum(train for _, _, train in known.values())
    assert len(val) == num - num * 9 // 10
    assert all(expected[x.tobytes()] == (label, True) for x, label in val)
    test = vtab.load(ROW, "test", data_dir=str(root))
    assert {label for _, label in test} == set(range(555))


# What is wrong with the publisher's files.


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "nabirds"
    write_raw(folder, [3, 20, 100])
    return folder


def test_lists(raw):
    pictures = nabirds.read_lists(raw, 3)
    assert len(pictures) == 13
    found = {p.path.parent.name: p.label for p in pictures.values()}
    assert found == {"0003": 0, "0020": 1, "0100": 2}


def without_first(text):
    return text.partition("\n")[2]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (LISTS[0], None, r"cannot be read \(No such file"),
        (LISTS[1], lambda text: b"\xff\xfe\0", "got no UTF-8 .*unpack the publisher"),
        *((name, without_first, "without counterpart, such as '") for name in LISTS),
        (
            LISTS[0],
            lambda text: text + text[: text.index("\n")],
            r":14: got uuid \S+ a",
        ),
    ],
)
def test_damaged_lists_are_errors(raw, name, change, message):
    path = raw / name
    content = change(path.read_text()) if change else b""
    path.unlink()
    if change:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        nabirds.read_lists(raw, 3)
    assert str(raw) in str(error.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (0, "1234 ../../secret.jpg"),
        (0, "1234 /etc/passwd"),
        (0, "1234"),
        (0, ""),
        (1, "1234 bird"),
        (2, "1234 2"),
    ],
)
def test_a_malformed_line_is_named(name, line, raw):
    path = raw / LISTS[name]
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(ValueError) as error:
        nabirds.read_lists(raw, 3)
    assert f"{path}:1: got {line!r}; expected a uuid and " in str(error.value)


def test_a_missing_picture_is_an_error(raw):
    gone = sorted((raw / "images").rglob("*.jpg"))[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(ValueError, match="got no such file, nor 1 others") as e:
        nabirds.read_lists(raw, 3)
    assert any(str(path) in str(e.value) for path in gone)


def test_another_number_of_classes_is_an_error(raw):
    with pytest.raises(ValueError, match="got 3 classes; expected 555"):
        nabirds.read_lists(raw)


def test_a_picture_that_is_none_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    manual = tmp_path / "downloads" / "manual" / "nabirds"
    write_raw(manual, [3, 20, 100])
    few = functools.partial(nabirds.read_lists, classes=3)
    monkeypatch.setattr(nabirds, "read_lists", few)
    path = sorted((manual / "images").rglob("*.jpg"))[5]
    path.write_bytes(b"hello")
    assert main(["prepare", "nabirds", f"--data_dir={tmp_path}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"nabirds is not prepared: {path}: got 5 bytes that are no JPEG" in error
    assert list(tmp_path.glob("nabirds/*")) == []
    with pytest.raises(ValueError, match="got no prepared copy"):
        vtab.find(ROW, str(tmp_path))
