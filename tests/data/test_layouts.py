# SPDX-License-Identifier: Apache-2.0
"""Pictures as they lie on people's disks: read, or refused with what was seen."""

import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from vpt_jax.data import folder

SIDE = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))


RNG = np.random.default_rng(0)


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(RNG.integers(0, 256, (9, 9, 3), np.uint8))
        picture.save(path, "JPEG" if path.suffix.lower() == ".jpg" else "PNG")


def classes(root, *names, count=5):
    put(root, *(f"{name}/{k}.png" for name in names for k in range(count)))


def load(path, **options):
    said = []
    loaded = folder.load(str(path), SIDE, report=said.append, **options)
    return loaded, [text for text in said if not text.startswith("read")]


def sizes(loaded):
    """Pictures per class, in train, val and test."""
    num = len(loaded.class_names)
    return [np.bincount(y, minlength=num).tolist() for _, y in loaded.splits.values()]


def refused(path, *parts, **options):
    with pytest.raises(ValueError) as error:
        load(path, **options)
    for part in parts:
        assert part in str(error.value), error.value
    assert any(word in str(error.value) for word in ("expected", "mend or remove"))


# --- classes are those with pictures --------------------------------------------------


def test_folders_without_pictures_are_no_classes(tmp_path):
    classes(tmp_path, "cat", "dog")
    for name in ("__MACOSX", "@eaDir", "lost+found", "empty", "only text"):
        (tmp_path / name).mkdir()
    (tmp_path / "only text" / "a.txt").write_text("x")
    put(tmp_path, "@eaDir/0.jpg", "__MACOSX/cat/1.png", "cat/@eaDir/2.jpg")
    (tmp_path / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    loaded, said = load(tmp_path)
    assert loaded.class_names == ("cat", "dog")
    assert sizes(loaded) == [[3, 3], [1, 1], [1, 1]]
    assert said == [
        "not taken, hidden: 1 (cat/._0.png)",
        "not taken, left behind by a system: 4 (@eaDir; __MACOSX; cat/@eaDir;"
        " lost+found)",
        "not taken, named .db: 1 (cat/Thumbs.db)",
        "not taken, named .txt: 1 (only text/a.txt)",
        "classes without pictures, left out: 2 (empty; only text)",
    ]
    assert loaded.doubts == tuple(said)


@pytest.mark.parametrize(("low", "step"), [(1, 1), (0, 7), (900, 4000)])
def test_labels_without_pictures_are_no_classes(tmp_path, low, step):
    labels = [low, low + step]
    classes(tmp_path / "a", "x", "y")
    text = [
        f"{n}/{k}.png {y}\n"
        for n, y in zip("xy", labels, strict=True)
        for k in range(5)
    ]
    (tmp_path / "a" / "train.txt").write_text("".join(text))
    images = RNG.integers(0, 256, (10, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "b.npz", images=images, labels=np.repeat(labels, 5))
    for path in (tmp_path / "a", tmp_path / "b.npz"):
        loaded, said = load(path)
        assert loaded.class_names == tuple(map(str, labels))
        assert sizes(loaded) == [[3, 3], [1, 1], [1, 1]]
        lacking = labels[1] + 1 - 2
        start = f"classes without pictures, left out: {lacking:,} (0"
        start = start.replace("(0", "(1") if low == 0 else start
        assert said[-1].startswith(start)


def test_names_of_labels_that_count_from_1(tmp_path):
    classes(tmp_path, "x", "y")
    text = [f"{n}/{k}.png {y}\n" for n, y in (("x", 1), ("y", 2)) for k in range(5)]
    (tmp_path / "train.txt").write_text("".join(text))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    loaded, said = load(tmp_path)
    assert loaded.class_names == ("ant", "bee")
    assert said == ["lists: train.txt", "labels count from 1: 1 is ant"]
    (tmp_path / "classes.txt").write_text("none\nant\nbee\n")
    loaded, said = load(tmp_path)
    assert loaded.class_names == ("ant", "bee")
    assert said[1] == "classes without pictures, left out: 1 (none)"
    (tmp_path / "classes.txt").write_text("ant\n")
    refused(tmp_path, "got 1 names; expected 3, for labels from 1 to 2")
    images = RNG.integers(0, 256, (10, 8, 8, 3), np.uint8)
    labels = np.repeat([1, 2], 5)
    names = np.array(["ant", "bee"])
    np.savez(tmp_path / "a.npz", images=images, labels=labels, class_names=names)
    loaded, said = load(tmp_path / "a.npz")
    assert loaded.class_names == ("ant", "bee") and "count from 1" in said[0]


def test_a_class_that_train_lacks_is_said(tmp_path):
    for split in ("train", "val", "test"):
        classes(tmp_path / "a" / split, "cat", "dog")
    classes(tmp_path / "a" / "test", "emu")
    loaded, said = load(tmp_path / "a")
    assert loaded.class_names == ("cat", "dog", "emu")
    text = "1 classes have no picture in train, so that they cannot be learned: "
    assert said == [f"{text}emu (test)"] and loaded.doubts == tuple(said)
    images = RNG.integers(0, 256, (12, 8, 8, 3), np.uint8)
    labels = np.arange(12) % 3
    both = {f"{s}_images": images + k for k, s in enumerate(("val", "test"), 1)}
    both |= {f"{s}_labels": labels for s in ("val", "test")}
    np.savez(tmp_path / "b.npz", train_images=images, train_labels=labels % 2, **both)
    loaded, said = load(tmp_path / "b.npz")
    assert said == [f"{text}2 (val and test)"]
    for path in (tmp_path / "a" / "test").glob("[cd]*"):
        path.rename(path.with_name(f"a {path.name}"))
    refused(tmp_path / "a", "got test of classes that train has none of (a cat; a dog")


@pytest.mark.parametrize("kind", [np.float64, np.int8, bool])
def test_one_hot_labels(tmp_path, kind):
    images = RNG.integers(0, 256, (30, 8, 8, 3), np.uint8)
    hot = np.eye(4)[np.arange(30) % 3].astype(kind)  # of the fourth there is none
    np.savez(tmp_path / "a.npz", images=images, labels=hot)
    loaded, said = load(tmp_path / "a.npz")
    assert loaded.class_names == ("0", "1", "2")
    assert sizes(loaded) == [[6] * 3, [2] * 3, [2] * 3]
    assert said == ["classes without pictures, left out: 1 (3)"]
    hot = hot.astype(np.float64)
    for odd in (hot * 0.5, hot * 0, np.ones_like(hot), hot * np.nan):
        np.savez(tmp_path / "a.npz", images=images, labels=odd)
        refused(tmp_path / "a.npz", "labels float64 [30, 4] that are not one-hot")


def test_arrays_of_an_npz_that_are_not_used_are_said(tmp_path):
    images = RNG.integers(0, 256, (30, 8, 8, 3), np.uint8)
    parts = {"Train_images": images[:20], "valid_images": images[20:]}
    parts |= {"Train_labels": np.arange(20) % 2, "valid_labels": np.arange(10) % 2}
    np.savez(tmp_path / "a.npz", **parts, holdout_images=images)
    loaded, said = load(tmp_path / "a.npz")
    assert said == ["arrays that are not used: holdout_images"]
    assert [len(y) for _, y in loaded.splits.values()] == [16, 10, 4]
    np.savez(tmp_path / "a.npz", **parts, val_images=images[:1], val_labels=[0])
    refused(tmp_path / "a.npz", "val_images and valid_images, which both mean val")


# --- nothing is lost ------------------------------------------------------------------


def test_two_spellings_of_a_class_keep_all_pictures(tmp_path):
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "K\u00e4fer")
        put(tmp_path, *(f"{name}/{k}.png" for k in range(10)))
    classes(tmp_path, "Ant", "ant")
    loaded, said = load(tmp_path)
    assert loaded.class_names == ("Ant", "K\u00e4fer", "ant")
    assert np.sum(sizes(loaded), axis=0).tolist() == [5, 20, 5]
    assert said == [
        "two spellings, one class: K\u00e4fer",
        "classes whose names are the same but for case or blanks: Ant; ant",
    ]


def test_two_files_of_one_stem_or_name_are_two_pictures(tmp_path):
    names = ["1.png", "1.jpg", "1.PNG", "\u00e9.png", "e\u0301.png"]
    put(tmp_path, *(f"{c}/{n}" for c in "ab" for n in names))
    loaded, _ = load(tmp_path)
    assert np.sum(sizes(loaded), axis=0).tolist() == [5, 5]
    every = np.concatenate([x for x, _ in loaded.splits.values()])
    assert len(np.unique(every.reshape(10, -1), axis=0)) == 10


def test_the_cut_does_not_depend_on_how_a_disk_writes_names(tmp_path):
    seen = []
    for form in ("NFC", "NFD"):
        root, names = tmp_path / form, [f"\u00e9{k}.png" for k in range(9)]
        for kind in "ab":
            for k, name in enumerate(names):
                path = root / kind / unicodedata.normalize(form, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (9, 9), (k, ord(kind), 0)).save(path)
        loaded, _ = load(root)
        seen.append([x[:, 0, 0].tolist() for x, _ in loaded.splits.values()])
    assert seen[0] == seen[1]


def test_a_list_finds_a_name_in_the_other_form(tmp_path):
    classes(tmp_path / "images", unicodedata.normalize("NFD", "K\u00e4fer"), "x")
    text = [f"K\u00e4fer/{k}.png 0\nx/{k}.png 1\n" for k in range(5)]
    (tmp_path / "train.txt").write_text("".join(text), encoding="utf-8")
    assert sizes(load(tmp_path)[0]) == [[3, 3], [1, 1], [1, 1]]


def test_a_path_that_a_list_in_json_has_twice_is_kept_twice(tmp_path):
    classes(tmp_path, "x", "y")
    text = [f'"{n}/{k}.png": {y}' for y, n in enumerate("xy") for k in range(5)]
    (tmp_path / "train.json").write_text("{" + ", ".join([*text, text[0]]) + "}")
    assert np.sum(sizes(load(tmp_path)[0]), axis=0).tolist() == [6, 5]


# --- names of splits, and where they lie ----------------------------------------------


@pytest.mark.parametrize("val", ["Val", "VALID", "Validation", ""])
def test_splits_in_capitals(tmp_path, val):
    for name in ("Train", val, "Test"):
        classes(tmp_path / name, *("xy" if name else ()))
    loaded, said = load(tmp_path)
    assert loaded.class_names == ("x", "y") and not said
    assert sizes(loaded) == ([[5, 5]] * 3 if val else [[4, 4], [1, 1], [5, 5]])
    classes(tmp_path / "testing", "x", "y")
    refused(tmp_path, "got Test and testing, which both mean test")


def test_class_folders_one_level_deeper(tmp_path):
    classes(tmp_path / "plain", "cat", "dog")
    classes(tmp_path / "deep" / "animals", "cat", "dog")
    (tmp_path / "deep" / "__MACOSX" / "cat").mkdir(parents=True)
    put(tmp_path, "deep/__MACOSX/cat/._1.png")
    loaded, said = load(tmp_path / "deep")
    assert said == ["one folder deeper, in animals"]
    assert loaded.class_names == ("cat", "dog")
    assert sizes(loaded) == sizes(load(tmp_path / "plain")[0])
    classes(tmp_path / "deep" / "birds", "emu", "owl")
    example = tmp_path / "deep" / "animals"
    refused(
        tmp_path / "deep", "2 folders that each hold", "(animals; birds)", str(example)
    )
    classes(tmp_path / "mixed", "cat", "dog", "birds/emu")
    refused(tmp_path / "mixed", "pictures in cat; dog, and one folder deeper in birds")


def test_the_folder_above_many_tasks_says_which_to_take(tmp_path):
    parts = ("train800", "val200", "test")
    for task in ("cifar", "svhn"):
        names = {s: [f"images/{s}/{k}.jpg" for k in range(4)] for s in parts}
        names["train800val200"] = names["train800"] + names["val200"]
        for split, paths in names.items():
            put(tmp_path / task, *paths if split in parts else ())
            text = [f"{path} {k % 2}\n" for k, path in enumerate(paths)]
            (tmp_path / task / f"{split}.txt").write_text("".join(text))
    refused(tmp_path, "got 2 folders", "(cifar; svhn)", f"such as {tmp_path / 'cifar'}")
    loaded, said = load(tmp_path / "cifar")
    assert sizes(loaded) == [[2, 2]] * 3
    assert said == [
        "lists: train800.txt, val200.txt, test.txt",
        "lists that are not used: train800val200.txt",
    ]


def test_a_class_may_be_called_train(tmp_path):
    classes(tmp_path, "bus", "train")
    assert load(tmp_path)[0].class_names == ("bus", "train")
    classes(tmp_path, "test")
    refused(tmp_path, "got pictures in test; train without a class folder")
    for split in ("train", "val"):
        classes(tmp_path / "b" / split, "x", "y")
    put(tmp_path / "b", "test/1.png", "test/2.png")
    refused(tmp_path / "b", "got pictures in test without a class folder")


SPLITS_BY_OTHER_NAMES = [
    ("training_set/cat", "training_set/dog", "test_set/cat", "test_set/dog"),
    ("training_set/training_set/cat", "test_set/test_set/cat"),
    ("seg_train/seg_train/sea", "seg_test/seg_test/sea", "seg_pred/seg_pred"),
    ("train_images", "test_images"),
    ("cars_train", "cars_test"),
    ("train2017/x", "val2017/x"),
    ("set/Train Set", "set/Validation Set"),
]


@pytest.mark.parametrize("names", SPLITS_BY_OTHER_NAMES)
def test_folders_called_like_splits_are_no_classes(tmp_path, names):
    classes(tmp_path, *names)
    refused(tmp_path, "which are called like splits; expected train, val, test")


def test_one_class_may_be_called_like_a_split(tmp_path):
    names = "steam_train", "express_train", "test_pattern", "crash_test"
    classes(tmp_path, *names)
    loaded, said = load(tmp_path)
    assert loaded.class_names == tuple(sorted(names)) and not said


def test_a_folder_of_all_pictures_is_no_class(tmp_path):
    classes(tmp_path, "images", "masks")
    refused(tmp_path, "got folders images; masks", "images is no name of a class")


@pytest.mark.parametrize("inner", ["images", "photos"])
def test_pictures_one_folder_too_deep(tmp_path, inner):
    classes(tmp_path, f"n01/{inner}", f"n02/{inner}")
    where = f"one folder too deep, in n01/{inner}; n02/{inner}"
    refused(tmp_path, where, "move them up into their class folders")


@pytest.mark.parametrize("other", ["Cat", "cat "])
def test_names_that_only_case_or_blanks_tell_apart(tmp_path, other):
    names = {c: [f"img/{c.strip()}{k}.png" for k in range(5)] for c in ("cat", "dog")}
    put(tmp_path, *names["cat"], *names["dog"])
    one = {path: c for c, paths in names.items() for path in paths}
    two = one | dict.fromkeys(names["cat"][:3], other)
    (tmp_path / "train.json").write_text(json.dumps(two))
    _, said = load(tmp_path)
    pair = "; ".join(sorted(("cat", other)))
    assert f"classes whose names are the same but for case or blanks: {pair}" in said
    (tmp_path / "train.json").write_text(json.dumps(one))
    (tmp_path / "test.json").write_text(json.dumps({names["cat"][0]: other}))
    refused(tmp_path, f"train and test write differently: cat and {other}")


# --- lists of others ------------------------------------------------------------------


def cub(root, count=6):
    """CUB_200_2011 as it is unpacked, of three classes."""
    names = [f"{k:03d}.Bird_{k}" for k in (1, 2, 3)]
    put(root, *(f"images/{n}/{k}.jpg" for n in names for k in range(count)))
    rows = [(n, k) for n in names for k in range(count)]
    texts = {
        "images": [f"{i} {n}/{k}.jpg" for i, (n, k) in enumerate(rows, 1)],
        "image_class_labels": [f"{i} {int(n[:3])}" for i, (n, _) in enumerate(rows, 1)],
        "train_test_split": [f"{i} {int(k < 4)}" for i, (_, k) in enumerate(rows, 1)],
        "classes": [f"{int(n[:3])} {n}" for n in names],
    }
    for name, lines in texts.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return names


def test_cub_as_it_is_unpacked(tmp_path):
    names = cub(tmp_path / "CUB_200_2011")
    (tmp_path / "segmentations").mkdir()
    for path in (tmp_path, tmp_path / "CUB_200_2011"):
        loaded, said = load(path)
        assert loaded.class_names == tuple(names)
        assert sizes(loaded) == [[3] * 3, [1] * 3, [2] * 3]
        assert said[0].startswith("lists: those of CUB_200_2011")
    file = tmp_path / "CUB_200_2011" / "image_class_labels.txt"
    file.write_text(file.read_text().rsplit("\n", 2)[0])
    refused(tmp_path, "image_class_labels.txt: got 17 uuids, 1 of them")


@pytest.mark.parametrize("first", [0, 1])
def test_lists_of_vpt(tmp_path, first):
    """An object of paths and numbers, beside CUB's own files."""
    names = cub(tmp_path)
    parts = {"train": (0, 1, 2), "val": (3,), "test": (4, 5)}
    for split, numbers in parts.items():
        rows = {f"{n}/{k}.jpg": i for i, n in enumerate(names, first) for k in numbers}
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    loaded, said = load(tmp_path)
    assert said == ["lists: train.json, val.json, test.json"]
    assert sizes(loaded) == [[3] * 3, [1] * 3, [2] * 3]
    numbered = [f"{k} {name}" for k, name in enumerate(names, 1)]
    assert loaded.class_names == tuple(names if first else numbered)
    (tmp_path / "classes.txt").unlink()
    assert load(tmp_path)[0].class_names == tuple(map(str, range(first, 3 + first)))


def test_a_list_that_windows_wrote(tmp_path):
    paths = [f"img/{k}.png" for k in range(8)]
    put(tmp_path, *paths)
    lines = [f"{path} {k % 2}\n" for k, path in enumerate(paths)]
    (tmp_path / "train.txt").write_text("".join(lines).replace("/", "\\"))
    assert sizes(load(tmp_path)[0]) == [[2, 2], [1, 1], [1, 1]]
    (tmp_path / "train.txt").write_text("..\\1.png 0\n")
    refused(tmp_path, "expected a path inside of")
    (tmp_path / "train.txt").write_text("".join(lines).replace("img", "pictures"))
    refused(tmp_path, "8 of 8 pictures cannot be read", "correct the paths (of lists")


def test_labels_in_json_may_be_names(tmp_path):
    classes(tmp_path, "x", "y")
    rows = {f"{n}/{k}.png": n * 2 for n in "yx" for k in range(5)}
    (tmp_path / "train.json").write_text(json.dumps(rows))
    loaded, _ = load(tmp_path)
    assert loaded.class_names == ("xx", "yy")
    assert sizes(loaded) == [[3, 3], [1, 1], [1, 1]]
    (tmp_path / "train.json").write_text(json.dumps(rows | {"x/0.png": 3}))
    refused(tmp_path, "labels that are numbers, and others that are names")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "got no JSON"),
        ("[" * 100_000, "got no JSON"),
        ('{"a.png": -1}', "got entry 1"),
        ('{"a.png": 0, "b.png": 1.5}', "got entry 2"),
        ('{"a.png": true}', "got entry 1"),
        ('{"a.png": [1]}', "got entry 1"),
        ('{"train": [["a.png", 1, "cat"]]}', "got entry 1"),
        ("7", "got entry 1"),
        ("[]", "got no lines"),
        ('{"../a.png": 1}', "expected a path inside of"),
        ('{"/etc/passwd": 1}', "expected a path inside of"),
        ('{"a\\u0000.png": 1}', "got entry 1"),
        ('{"a.png": 12345678}', "expected labels below 1,000,000"),
        ('{"\\ud800.png": 0, "b.png": 1}', "2 of 2 pictures cannot be read"),
    ],
)
def test_lists_in_json_that_are_refused(tmp_path, text, message):
    (tmp_path / "train.json").write_text(text)
    refused(tmp_path, message, str(tmp_path))


def test_two_lists_of_one_name(tmp_path):
    classes(tmp_path, "x", "y")
    for name in ("train.txt", "Train.txt"):
        (tmp_path / name).write_text("x/0.png 0\n")
    refused(tmp_path, "got Train.txt and train.txt; expected one of them")


# --- errors say what was seen ---------------------------------------------------------


def test_only_pictures_that_cannot_be_read(tmp_path):
    for split in ("", "Train"):
        root = tmp_path / f"in {split}"
        for name in ("x", "y"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        refused(root, "seen: 2 .heic", "/1.HEIC)", "convert them to JPEG or PNG")
    classes(root / "test", "x", "y")
    refused(root, "no pictures in class folders of train; seen: 10 .png (test/x/0.png)")


def test_what_was_noticed_before_an_error_is_shown_with_it(tmp_path):
    classes(tmp_path, "cat")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.heic").write_bytes(b"x")
    refused(
        tmp_path,
        "got classes in train: cat; expected at least 2",
        "Noticed before: not taken, named .heic: 1 (dog/1.heic). classes without"
        " pictures, left out: 1 (dog).",
    )


def test_a_folder_of_other_things_says_what_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    put(tmp_path, "1.png", "2.png")
    refused(tmp_path, "seen: 2 .png (1.png); 1 .csv (a.csv)", "a folder for each class")
