# SPDX-License-Identifier: Apache-2.0
"""Reading prepared tfds directories: both formats, shards, damaged files.

The files are those of `tfds_files.py`.
"""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from tfds_files import (
    WRITERS,
    class_label,
    features_dict,
    image,
    png,
    sequence,
    serialized,
    tensor,
    write_tfrecord,
    write_version,
)

from vpt_jax.data.public import records

SIZES = {"train": (5, 4, 3), "test": (2, 2)}  # examples in each shard
FORMATS = tuple(WRITERS)


def example(split, i):
    """Picture, label and points of an example; pictures differ in size and mode."""
    rng = np.random.default_rng([len(split), i])
    channels = {0: (), 1: (4,)}.get(i % 3, (3,))  # grey, with alpha, plain
    picture = rng.integers(0, 256, (3 + i, 4, *channels), dtype=np.uint8)
    points = rng.normal(size=(i % 3, 3)).astype(np.float32)
    return picture, i, points


FEATURES = features_dict(
    image=image(),
    label=class_label(20),
    points=sequence(features_dict(xyz=tensor(3))),
)


def make(folder, form, name="toy"):
    """A prepared directory of a version, as tfds would leave it."""
    splits = {}
    for split, shards in SIZES.items():
        payloads = []
        for i in range(sum(shards)):
            picture, label, points = example(split, i)
            values = {"image": png(picture), "label": label, "points/xyz": points}
            payloads.append(serialized(values))
        ends = list(itertools.accumulate(shards, initial=0))
        splits[split] = [payloads[a:b] for a, b in itertools.pairwise(ends)]
    return write_version(folder, name, form, FEATURES, splits)


@pytest.fixture(scope="module", params=FORMATS)
def prepared(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return make(root / "toy" / "1.0.0", request.param)


def labels(examples):
    return [int(e["label"]) for e in examples]


# Reading.


def test_examples_are_those_written_in_order(prepared):
    for split, shards in SIZES.items():
        examples = records.open_split(prepared, split)
        assert len(examples) == sum(shards)
        for i, read in enumerate(examples):
            picture, label, points = example(split, i)
            if picture.ndim == 2:
                picture = np.repeat(picture[..., None], 3, -1)
            assert read["image"].dtype == np.uint8
            np.testing.assert_array_equal(read["image"], picture[..., :3])
            assert read["label"] == label
            found = np.asarray(read["points"]["xyz"], np.float32).reshape(-1, 3)
            np.testing.assert_array_equal(found, points)


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("train[5:9]", [5, 6, 7, 8]),  # exactly the second shard
        ("train[4:10]", [4, 5, 6, 7, 8, 9]),
        ("train[0:2]+train[8:10]", [0, 1, 8, 9]),
        ("test[2:4]+train[:2]", [2, 3, 0, 1]),
    ],
)
def test_split_expressions(prepared, expression, expected):
    assert labels(records.open_split(prepared, expression)) == expected


def test_random_access(prepared):
    assert records.split_sizes(prepared) == {"train": 12, "test": 4}
    examples = records.open_split(prepared, "train[3:11]")
    assert [int(examples[i]["label"]) for i in (7, 0, 5, 2)] == [10, 3, 8, 5]
    for i in (8, -9):
        with pytest.raises(IndexError, match="expected 0 to 7"):
            examples[i]


# Pictures.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_pictures_get_the_channels_of_the_feature(mode, channels):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (51, 51, 51)).convert(mode).save(buffer, "PNG")
    picture = records.decode_picture(buffer.getvalue(), channels)
    assert picture.shape == (2, 3, channels) and (picture == 51).all()


# Damage.


def flipped(data, at):
    data = bytearray(data)
    data[at] ^= 4
    return bytes(data)


def test_every_flipped_bit_of_a_tfrecord_is_found(tmp_path):
    path = tmp_path / "f"
    payloads = [b"one", b"", b"three" * 9]
    write_tfrecord(path, payloads)
    intact = path.read_bytes()
    starts = [0, 19, 35, len(intact)]
    for at in range(len(intact)):
        path.write_bytes(flipped(intact, at))
        number = next(k for k in range(3) if at < starts[k + 1])
        with pytest.raises(ValueError) as e:
            file = records.TFRecord(str(path))
            assert [file[i] for i in range(len(file))] == payloads
        assert f"{path}, record {number}:" in str(e.value), at


def test_every_truncation_of_a_tfrecord_is_found(tmp_path):
    path = tmp_path / "f"
    write_tfrecord(path, [b"one", b"", b"three" * 9])
    intact = path.read_bytes()
    whole = {0: 0, 19: 1, 35: 2}  # cut between records: fewer of them
    for size in range(len(intact)):
        path.write_bytes(intact[:size])
        if size in whole:
            assert len(records.TFRecord(str(path))) == whole[size]
            continue
        number = sum(size > start for start in (0, 19, 35)) - 1
        with pytest.raises(ValueError, match=f"record {number}: got a file of {size}"):
            records.TFRecord(str(path))


@pytest.mark.parametrize("form", FORMATS)
def test_damage_names_the_file_and_the_record(form, tmp_path):
    folder = make(tmp_path / "1.0.0", form)
    path = folder / f"toy-train.{form}-00001-of-00003"
    payload = records.open_split(folder, "train").record(6)
    data = path.read_bytes()
    path.write_bytes(flipped(data, data.index(payload) + len(payload) // 2))
    examples = records.open_split(folder, "train")
    assert labels(examples[i] for i in (0, 5, 7, 11)) == [0, 5, 7, 11]
    with pytest.raises(ValueError, match="00001-of-00003, record 1: .*prepare the"):
        examples[6]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("keep", [0, 100, -20])
def test_cut_files_are_errors(form, keep, tmp_path):
    folder = make(tmp_path / "1.0.0", form)
    path = folder / f"toy-train.{form}-00001-of-00003"
    path.write_bytes(path.read_bytes()[:keep])
    assert labels(records.open_split(folder, "train[:5]")) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="00001-of-00003.* got .*prepare the data set"):
        records.open_split(folder, "train")[5]
    WRITERS[form](path, [b"a", b"b", b"c"])
    with pytest.raises(ValueError, match="got 3 records; expected 4"):
        records.open_split(folder, "train")[5]
    path.unlink()
    with pytest.raises(ValueError, match="got no such file; expected the 4 examples"):
        records.open_split(folder, "train")


def test_other_directories_are_errors(tmp_path):
    with pytest.raises(ValueError, match="dataset_info.json: got no such file"):
        records.open_split(tmp_path, "train")
    folder = make(tmp_path / "1.0.0", "tfrecord")
    info = (folder / "dataset_info.json").read_text()
    assert "tfrecord" in info
    (folder / "dataset_info.json").write_text(info.replace("tfrecord", "riegeli"))
    with pytest.raises(ValueError, match="got file format 'riegeli'; expected one of"):
        records.open_split(folder, "train")
    (folder / "features.json").unlink()
    with pytest.raises(ValueError, match="features.json: got no such file"):
        records.split_sizes(folder)
