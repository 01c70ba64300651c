# SPDX-License-Identifier: Apache-2.0
"""`python -m vpt_jax.data`: list, prepare and check, on small prepared directories."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tfds_files

from vpt_jax.data.__main__ import main
from vpt_jax.data.public import builders, check, listing, vtab

SIZES = {"train": 40, "test": 12}
FEATURES = tfds_files.features_dict(
    image=tfds_files.image(), label=tfds_files.class_label(9)
)
CUTS = vtab.Cut("train", (), 50), vtab.Cut("train", (50,)), vtab.Cut("test")
SOURCE = vtab.Source("toy", ("1.*.*",), SIZES, CUTS, "1 MB")


def examples(num, classes=4, seed=0):
    """Pictures and labels; every run of `classes` examples has all labels."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (num, 5, 4, 3), dtype=np.uint8)
    return [(picture, i % classes) for i, picture in enumerate(pictures)]


def write(root, train=None, test=None, form="array_record", version="1.0.0"):
    """A prepared copy of the toy set, sound if not given, train in two files."""
    train, test = (
        [
            tfds_files.serialized({"image": tfds_files.png(picture), "label": label})
            for picture, label in split
        ]
        for split in (train or examples(40), test or examples(12, seed=1))
    )
    half = len(train) // 2
    splits = {"train": [train[:half], train[half:]], "test": [test]}
    folder = root / "toy" / version
    return tfds_files.write_version(folder, "toy", form, FEATURES, splits)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A function that changes the row of svhn, which is the toy set's here."""

    def change(source=None, **changes):
        row = vtab.BENCHMARKS["dtd"]._replace(
            name="svhn", source=SOURCE._replace(**source or {}), classes=4
        )
        monkeypatch.setitem(vtab.BENCHMARKS, "svhn", row._replace(**changes))

    change()
    return change


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a command on `tmp_path`: exit code, stdout, stderr."""

    def run(*args):
        code = main([*args, f"--data_dir={tmp_path}"])
        done = capsys.readouterr()
        return code, done.out, done.err

    return run


def lines_of(text, kind):
    head = f"  {kind}: "
    return [line.removeprefix(head) for line in text.splitlines() if head in line]


@pytest.fixture
def errors(run):
    """Checks the set, which must be wrong: errors, notes, all of stdout."""

    def errors():
        code, out, err = run("check", "svhn")
        assert (code, err) == (1, "")
        return lines_of(out, "error"), lines_of(out, "note"), out

    return errors


# check: what is fine.


@pytest.mark.parametrize("form", tfds_files.WRITERS)
def test_a_good_set(form, run, tmp_path):
    folder = write(tmp_path, form=form)
    code, out, err = run("check", "svhn")
    assert (code, err) == (0, "")
    assert out.splitlines()[:-1] == [
        f"svhn: {folder}",
        "  train: 20 examples of 4 classes, 5 each",
        "  val: 20 examples of 4 classes, 5 each",
        "  test: 12 examples of 4 classes, 3 each",
    ]
    assert out.splitlines()[-1].startswith("svhn: fine (")


def test_a_class_that_a_small_part_lacks_is_a_note(run, tmp_path, monkeypatch):
    monkeypatch.setattr(vtab, "NUM_TRAIN", 3)
    monkeypatch.setattr(vtab, "NUM_VAL", 8)
    write(tmp_path)
    code, out, _ = run("check", "svhn")
    assert code == 0
    assert lines_of(out, "note") == ["train800: got no example of 1 of 4 classes (3)"]
    assert "  val200: 8 examples of 4 classes, 2 each\n" in out


def test_a_few_equal_pictures_are_a_note(run, tmp_path):
    train, test = examples(40), examples(12, seed=1)
    test[3] = train[7][0], test[3][1]
    test[9] = train[31][0], test[9][1]
    train[22] = train[7]  # of val
    # The same bytes in another shape are another picture.
    test[0] = np.ascontiguousarray(train[0][0].reshape(4, 5, 3)), test[0][1]
    write(tmp_path, train, test)
    code, out, _ = run("check", "svhn")
    assert code == 0
    equal = "pictures are equal to one of"
    assert lines_of(out, "note") == [
        f"train and val: 1 of val's 20 {equal} train (val[2] is train[7])",
        f"train and test: 1 of test's 12 {equal} train (test[3] is train[7])",
        f"val and test: 2 of test's 12 {equal} val"
        " (test[3] is val[2]; test[9] is val[11])",
    ]


# check: what is wrong.


def test_other_sizes_than_published_and_a_file_that_is_missing(errors, toy, tmp_path):
    toy({"sizes": {**SIZES, "validation": 5}})
    folder = write(tmp_path, examples(36))
    path = folder / "toy-test.array_record-00000-of-00001"
    path.unlink()
    (train, validation, missing), _, out = errors()
    assert train.startswith("split train: got 36 examples; published are 40;")
    assert validation.startswith("split validation: got 0 examples; published are 5;")
    assert f"{path}: got no such file" in missing
    assert out.splitlines()[-1].startswith("svhn: 3 errors (")


def test_labels_out_of_range_and_a_class_that_never_occurs(errors, toy, tmp_path):
    train = examples(40)
    train[5] = train[5][0], 7
    write(tmp_path, train)
    (error,), _, _ = errors()
    assert "train: svhn, example 5: got label 7; expected 0 to 3" in error
    toy(classes=9)
    (train, test), (val,), _ = errors()
    assert train.startswith("train: got no example of 4 of 9 classes (4; 5; 6; 8);")
    assert test.startswith("test: got no example of 5 of 9 classes (4; 5; 6; 7; 8);")
    assert val == "val: got no example of 5 of 9 classes (4; 5; 6; 7; 8)"


def test_most_pictures_of_a_part_in_another_are_an_error(errors, tmp_path):
    train = examples(40)
    write(tmp_path, train, [*train[:7], *examples(5, seed=1)])
    (error,), _, _ = errors()
    assert error.startswith("train and test: 7 of test's 12 pictures are equal to")
    assert error.endswith("; expected at most a few; prepare the data set again.")


@pytest.mark.parametrize("form", tfds_files.WRITERS)
def test_damaged_records_and_a_file_that_cannot_be_read(form, errors, tmp_path):
    train = examples(40)
    folder = write(tmp_path, train, form=form)
    path = folder / f"toy-train.{form}-00001-of-00002"
    data = bytearray(path.read_bytes())
    at = data.index(tfds_files.png(train[26][0]))
    data[at + 40] ^= 4
    path.write_bytes(data)
    (error,), _, out = errors()
    assert error.startswith(f"val: {path}, record 6: got data")
    assert "  val: 19 examples of 4 classes, 4 to 5 each; class 0: 26.3 %\n" in out
    path.write_bytes(data[:-9])  # left soon
    found, _, _ = errors()
    assert len(found) == check._PATIENCE + 1
    assert f"val: {path}" in found[0]
    assert found[-1] == "val: left after 20 of 20 examples."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("dataset_info.json", x) for x in ("{", "[]", '{"splits": [{}]}')),
        *(("features.json", x) for x in ("", "{}")),
    ],
)
def test_a_damaged_description(name, text, errors, tmp_path):
    folder = write(tmp_path)
    (folder / name).write_text(text)
    assert errors()[0]


def test_progress_and_several_tasks(run, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_INTERVAL_S", -1.0)
    other = vtab.BENCHMARKS["svhn"]._replace(name="dtd", classes=3)
    monkeypatch.setitem(vtab.BENCHMARKS, "dtd", other)
    write(tmp_path)
    code, out, _ = run("check", "svhn", "dtd")
    assert code == 1
    assert "  train: 7 of 20 read\n" in out
    assert "svhn: fine" in out
    assert out.splitlines()[-1] == "wrong: dtd"
    assert run("check", "all")[1].splitlines()[-1] == "wrong: dtd"


# What is missing, and bad usage.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("check", "svhn"), "error: svhn: got no prepared copy of 'toy'"),
        (("check", "all"), "error: got no prepared data set"),
        (("check", "mnist"), "error: got task 'mnist'; expected 'all' or cifar100 or"),
        (("prepare", "dtd", "smallnorb"), "expected 'all' or smallnorb_azimuth or"),
        (("prepare", "sun379"), "error: got task 'sun379'; expected 'all' or sun397;"),
        (("prepare", "cars"), "got no cars_train.tgz, cars_test.tgz, car_devkit.tgz, "),
    ],
)
def test_errors_of_one_line(args, message, run):
    code, _, err = run(*args)
    assert code == 2
    assert message in err.splitlines()[0]
    assert "Traceback" not in err
    with pytest.raises(ValueError):
        run(*args, "--traceback")


@pytest.mark.parametrize("args", [(), ("check",), ("lost",)])
def test_bad_usage(args, capsys):
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2
    assert "usage: python -m vpt_jax.data" in capsys.readouterr().err


def test_ctrl_c_is_130(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "show", interrupt)
    assert run("list")[0] == 130


# prepare.


@pytest.fixture
def prepared(monkeypatch):
    """Stands in for tfds: the names of the sets that were asked for."""
    asked = []

    def prepare(row, data_dir):
        asked.append(row.source.name)
        if row.source.name == "dtd":
            raise AssertionError("the server\nis on fire")
        return "somewhere"

    monkeypatch.setattr(builders, "prepare", prepare)
    monkeypatch.setattr(builders, "_NEEDED", ("json",))
    return asked


def test_what_is_prepared_stays(run, prepared, tmp_path):
    folder = write(tmp_path)
    code, out, _ = run("prepare", "svhn")
    assert (code, prepared) == (0, [])
    assert out == f"toy: already prepared in {folder}\n"


def test_tasks_of_one_set_prepare_it_once(run, prepared, tmp_path):
    names = "dsprites_location", "flowers", "dsprites_orientation", "oxford_flowers102"
    code, out, _ = run("prepare", *names)
    assert code == 0
    assert prepared == ["dsprites", "oxford_flowers102"]
    assert out.startswith(
        f"to prepare in {tmp_path}: dsprites, oxford_flowers102; 378.0 MB to download"
    )
    assert "  verify it: python -m vpt_jax.data check dsprites_location\n" in out


def test_all_are_those_without_manual_files(run, prepared):
    code, out, err = run("prepare", "all")
    sources = {row.source.name: row.source for row in vtab.BENCHMARKS.values()}
    assert set(prepared) == {n for n, source in sources.items() if not source.manual}
    assert len(prepared) == 16
    assert out.splitlines()[0].endswith(
        "by hand: resisc45, diabetic_retinopathy, nabirds, cars"
    )
    # One that fails does not stop the others.
    assert code == 1
    assert prepared[-1] == "stanford_dogs"
    (line,) = err.splitlines()
    assert line.startswith("error: dtd is not prepared: the server is on fire (")


def test_a_package_that_is_missing_is_named_before_anything_is_done(run, monkeypatch):
    monkeypatch.setattr(builders, "_NEEDED", ("json", "no_such_package"))
    monkeypatch.setattr(builders, "prepare", None)
    code, _, err = run("prepare", "dtd", "cifar100")
    assert code == 2
    (line,) = err.splitlines()
    assert "dtd: got no package no_such_package; expected those that tfds" in line
    assert "pip install tensorflow h5py opencv-python-headless" in line


def test_the_builder_is_tfds_own_after_tensorflow(tmp_path):
    """On stand-ins for both packages: TensorFlow first, files as ArrayRecord."""
    (tmp_path / "tensorflow.py").write_text(
        "import sys, types\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "config = types.SimpleNamespace(set_visible_devices=print)\n"
    )
    (tmp_path / "tensorflow_datasets.py").write_text(
        "class builder:\n"
        "  def __init__(self, *args, **kwargs): print(args, kwargs)\n"
        "  def download_and_prepare(self): print('prepares')\n"
    )
    code = (
        "from vpt_jax.data.public import builders, vtab\n"
        "vtab.find = lambda row, root: print(row.name, root)\n"
        "builders.prepare(vtab.BENCHMARKS['caltech101'], 'D')\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env
    )
    assert done.stdout.splitlines() == [
        "[] GPU",
        "('caltech101',) {'data_dir': 'D', 'file_format': 'array_record'}",
        "prepares",
        "caltech101 D",
    ], done.stderr


# list.


def listed(capsys, root, width):
    listing.show(str(root), width)
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 140])
def test_list(width, tmp_path, capsys):
    write(tmp_path, form="tfrecord")
    text = listed(capsys, tmp_path, width)
    table, _, summary = text.partition("\n\n24 tasks")
    assert all(len(line) <= width for line in table.splitlines())
    words = {
        line.split()[0]: line.split()[1:] for line in table.splitlines() if line.split()
    }
    for name, row in vtab.BENCHMARKS.items():
        assert words[name][0] == str(row.classes)
    assert words["svhn"][1:7] == ["20", "20", "12", "1", "MB", "1.0.0"]
    assert words["cifar100"][1:] == "45,000 5,000 10,000 170 MB missing".split()
    assert words["nabirds"][1:] == "21,536 2,393 24,633 by hand missing".split()
    assert set(vtab.GROUPS) <= set(words)
    assert "kB on disk), 19 missing (to download 86.1 GB, and 4 by" in summary
    if width == 140:
        assert words["svhn"][6:8] == ["1.0.0", "tfrecord"]


def test_list_shows_other_versions_and_damage(tmp_path, capsys):
    write(tmp_path, version="2.0.0")
    assert "2.0.0, not 1.*.*" in listed(capsys, tmp_path, 140)
    folder = write(tmp_path)
    (folder / "dataset_info.json").write_text("{")
    assert "1.0.0 damaged" in listed(capsys, tmp_path, 140)
    (folder / "dataset_info.json").write_text(json.dumps({"name": "toy"}))
    assert "1.0.0 tfrecord" in listed(capsys, tmp_path, 140)


def test_list_imports_neither_tfds_nor_tensorflow(tmp_path):
    code = (
        "import sys\n"
        "from vpt_jax.data.__main__ import main\n"
        f"main(['list', '--data_dir={tmp_path}'])\n"
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'array_record',"
        " 'optax', 'orbax', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
