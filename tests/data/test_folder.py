# SPDX-License-Identifier: Apache-2.0
"""Own pictures as they lie on people's disks: read, or refused with what was seen."""

import json
import os
import random
import shutil
import unicodedata

import numpy as np
import pytest
from conftest import SMALL, load_config, save_small_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vpt_jax
from vpt_jax.bench import search
from vpt_jax.data import cache, folder, found, npz, pictures, tasks
from vpt_jax.run import experiment

SIDE = 8
NFC, NFD = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
WRITTEN = {}  # a picture's bytes to the name of its file


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))


def make(root, files):
    """Writes files: of None a picture that the name decides, else the content."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            data = random.Random(name).randbytes(SIDE * SIDE * 3)
            x = np.frombuffer(data, np.uint8).reshape(SIDE, SIDE, 3)
            WRITTEN[x.tobytes()] = name
            Image.fromarray(x).save(path, "PNG")  # whatever it is called
        else:
            path.write_bytes(content.encode())
    return root


def some(*folders, count=5):
    return {f"{name}/{k}.png": None for name in folders for k in range(count)}


FULL = some(*(f"{s}/{c}" for s in folder.SPLITS for c in ("dog", "cat")), count=3)


def load(path, **options):
    """`(what was loaded, what was said)`, but of progress."""
    said = []
    loaded = folder.load(str(path), SIDE, report=said.append, **options)
    return loaded, [text for text in said if not text.startswith("read")]


def sizes(loaded):
    """Pictures per class, in train, val and test."""
    num = len(loaded.class_names)
    return [np.bincount(y, minlength=num).tolist() for _, y in loaded.splits.values()]


def contents(loaded):
    """Per split, class and name of the file of every picture."""
    return {
        split: sorted(
            (loaded.class_names[y], WRITTEN[x.tobytes()])
            for x, y in zip(images, labels, strict=True)
        )
        for split, (images, labels) in loaded.splits.items()
    }


def refused(path, *parts, **options):
    with pytest.raises(ValueError) as error:
        load(path, **options)
    for part in parts:
        assert part in str(error.value), error.value
    assert any(word in str(error.value) for word in ("expected", "mend or remove"))


# --- layouts --------------------------------------------------------------------------


def cub(first=None):
    """CUB_200_2011 as it is unpacked, of three classes; and VPT's lists beside it."""
    names = [f"{k:03d}.Bird_{k}" for k in (1, 2, 3)]
    rows = [(n, k) for n in names for k in range(6)]
    texts = {
        "images": [f"{n}/{k}.jpg" for n, k in rows],
        "image_class_labels": [int(n[:3]) for n, _ in rows],
        "train_test_split": [int(k < 4) for _, k in rows],
    }
    files = {f"images/{n}/{k}.jpg": None for n, k in rows}
    for name, values in texts.items():
        lines = [f"{i} {value}" for i, value in enumerate(values, 1)]
        files[f"{name}.txt"] = "\n".join(lines)
    files["classes.txt"] = "\n".join(f"{int(n[:3])} {n}" for n in names)
    parts = {"train": (0, 1, 2), "val": (3,), "test": (4, 5)}
    for split, numbers in parts.items() if first is not None else ():
        own = {f"{n}/{k}.jpg": i for i, n in enumerate(names, first) for k in numbers}
        files[f"{split}.json"] = json.dumps(own)
    return files, names


def inside(name, files):
    return {f"{name}/{path}": content for path, content in files.items()}


def listed(*folders, first=0):
    """Lines for what `some` makes."""
    labels = enumerate(folders, first)
    return "".join(f"{n}/{k}.png {y}\n" for y, n in labels for k in range(5))


BIRDS = cub()[1]
CUB_SIZES = [[3] * 3, [1] * 3, [2] * 3]
FIVE = [[3, 3], [1, 1], [1, 1]]  # of five each
LACK = "1 classes have no picture in train, so that they cannot be learned: "
FOUND = {
    "litter": (
        some("cat", "dog")
        | dict.fromkeys(["@eaDir/0.jpg", "__MACOSX/cat/1.png", "cat/@eaDir/2.jpg"])
        | dict.fromkeys(["cat/._0.png", "cat/Thumbs.db", "t/a.txt"], "x"),
        ("cat", "dog"),
        FIVE,
        "not taken, hidden: 1 (cat/._0.png)",
        "not taken, left behind by a system: 3 (@eaDir; __MACOSX; cat/@eaDir)",
        "not taken, named .db: 1 (cat/Thumbs.db)",
        "not taken, named .txt: 1 (t/a.txt)",
        "classes without pictures, left out: 1 (t)",
    ),
    "others beside the pictures": (
        FULL
        | {"README.md": "x", "train/notes.txt": "x", "train/dog/4.JPG": None}
        | {"train/cat/raw/1.png": None, "train/dog/no": "x"},
        ("cat", "dog"),
        [[3, 4], [3, 3], [3, 3]],
        "not taken, a folder in a class folder: 1 (train/cat/raw)",
        "not taken, named without an extension: 1 (train/dog/no)",
        "not taken, not in a class folder: 1 (train/notes.txt)",
        "not taken, outside of the splits: 1 (README.md)",
    ),
    "two spellings": (
        {f"{form}/{k}.png": None for form in (NFC, NFD) for k in range(10)}
        | some("Ant", "ant"),
        ("Ant", NFC, "ant"),
        [[3, 12, 3], [1, 4, 1], [1, 4, 1]],
        f"two spellings, one class: {NFC}",
        "classes whose names are the same but for case or blanks: Ant; ant",
    ),
    "other languages": (
        some(f"train/{NFD}", "train/чайка", f"test/{NFC}", count=10),
        (NFC, "чайка"),
        [[8, 8], [2, 2], [10, 0]],
    ),
    "files of one stem or name": (
        {
            f"{kind}/{name}": None
            for kind in "ab"
            for name in ("1.png", "1.jpg", "1.PNG", "\u00e9.png", "e\u0301.png")
        },
        ("a", "b"),
        FIVE,
    ),
    "a class called train": (some("bus", "train"), ("bus", "train"), FIVE),
    "classes called like one split": (
        some("steam_train", "express_train", "test_pattern", "crash_test"),
        ("crash_test", "express_train", "steam_train", "test_pattern"),
        [[3] * 4, [1] * 4, [1] * 4],
    ),
    "one folder deeper": (
        some("animals/cat", "animals/dog") | {"__MACOSX/cat/._1.png": "x"},
        ("cat", "dog"),
        FIVE,
        "one folder deeper, in animals",
    ),
    "lists that count from 1": (
        some("x", "y")
        | {"train.txt": listed("x", "y", first=1), "classes.txt": "ant\nbee\n"},
        ("ant", "bee"),
        FIVE,
        "lists: train.txt",
        "labels count from 1: 1 is ant",
    ),
    "a name more": (
        some("x", "y")
        | {"train.txt": listed("x", "y", first=1), "classes.txt": "none\nant\nbee\n"},
        ("ant", "bee"),
        FIVE,
        "lists: train.txt",
        "classes without pictures, left out: 1 (none)",
    ),
    "a list in the other form": (
        some(f"images/{NFD}", "images/x") | {"train800val200.txt": listed(NFC, "x")},
        ("0", "1"),
        FIVE,
        "lists: train800val200.txt",
    ),
    "a list of Windows": (
        some("a/x", "a/y") | {"train.txt": listed("a/x", "a/y").replace("/", "\\")},
        ("0", "1"),
        FIVE,
        "lists: train.txt",
    ),
    "a path twice in JSON": (
        some("x", "y")
        | {"train.json": '{"x/0.png": 0, "y/0.png": 1, "x/1.png": 0, "x/0.png": 0}'},
        ("0", "1"),
        [[1, 1], [1, 0], [1, 0]],
        "lists: train.json",
        None,  # the same picture in two splits
    ),
    "names in JSON": (
        some("x", "y")
        | {"train.json": json.dumps({p: p[0] * 2 for p in some("y", "x")})},
        ("xx", "yy"),
        FIVE,
        "lists: train.json",
    ),
    "VTAB-1k's lists": (
        some("x", "y")
        | {
            f"{name}.txt": "x/0.png 0\ny/0.png 1\n".replace("0.", f"{k}.")
            for k, name in enumerate(("train800", "val200", "test", "train800val200"))
        },
        ("0", "1"),
        [[1, 1]] * 3,
        "lists: train800.txt, val200.txt, test.txt",
        "lists that are not used: train800val200.txt",
    ),
    "CUB in a folder": (
        inside("CUB_200_2011", cub()[0]) | {"segmentations/x": "x"},
        BIRDS,
        CUB_SIZES,
        "lists: those of CUB_200_2011, one folder deeper, in CUB_200_2011",
    ),
    "VPT from 1": (
        cub(1)[0],
        BIRDS,
        CUB_SIZES,
        "lists: train.json, val.json, test.json",
    ),
    "VPT from 0": (
        cub(0)[0],
        [f"{k} {name}" for k, name in enumerate(BIRDS, 1)],
        CUB_SIZES,
        "lists: train.json, val.json, test.json",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_is_read(tmp_path, case):
    files, names, expected, *texts = FOUND[case]
    loaded, said = load(make(tmp_path / "data", files))
    assert loaded.class_names == tuple(names)
    assert sizes(loaded) == expected
    assert len(said) == len(texts)
    for text, wanted in zip(said, texts, strict=True):
        assert wanted in (text, None)
    doubts = [t for t in said if not t.startswith(("lists: ", "one folder"))]
    assert loaded.doubts == tuple(doubts)
    for images, labels in loaded.splits.values():
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert not images.flags.writeable


@pytest.mark.parametrize("val", ["val", "VALID", "Validation", ""])
def test_given_splits_are_kept_and_others_are_cut_from_train(tmp_path, val):
    root = make(tmp_path / "a", FULL | some("train/dog", count=10))
    (root / "val").rename(root / val if val else tmp_path / "elsewhere")
    (root / "test").rename(root / "Testing")
    loaded, said = load(root)
    assert said == []
    got = contents(loaded)
    for split in ("val", "test") if val else ("test",):
        assert [x for _, x in got[split]] == sorted(x for x in FULL if split in x)
    cut = [[3, 10], [3, 3], [3, 3]] if val else [[2, 8], [1, 2], [3, 3]]
    assert sizes(loaded) == cut
    assert all(f"/{kind}/" in name for pairs in got.values() for kind, name in pairs)
    make(root, some("test/cat"))
    refused(root, "got Testing and test, which both mean test")


def test_classes_without_a_train_folder_are_cut_alike(tmp_path):
    names = some("cat", "dog", count=10)
    a, b = (load(make(tmp_path / x, names))[0] for x in ("a", "b/train"))
    c, _ = load(tmp_path / "b")
    assert contents(a) == contents(b) == contents(c)
    assert sizes(a) == [[6, 6], [2, 2], [2, 2]]


def test_the_cut_does_not_depend_on_how_a_disk_writes_names(tmp_path):
    seen = []
    for form in ("NFC", "NFD"):
        root = make(tmp_path / form, some("a/é", "b/é", count=0))
        for kind in "ab":
            for k in range(9):
                path = root / kind / unicodedata.normalize(form, f"é{k}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (9, 9), (k, ord(kind), 0)).save(path)
        loaded, _ = load(root)
        seen.append([x[:, 0, 0].tolist() for x, _ in loaded.splits.values()])
    assert seen[0] == seen[1]


def test_the_cut_is_the_same_on_every_machine():
    """Changing it changes everyone's splits: not by accident."""
    groups = {"cat": dict.fromkeys(f"{k}.jpg" for k in range(10))}
    out = found.cut(groups, ("val", "test"))
    names = {split: [name for _, name in pairs] for split, pairs in out.items()}
    assert names["val"] == ["0.jpg", "7.jpg"] and names["test"] == ["1.jpg", "8.jpg"]


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.text(max_size=5), st.sets(st.text(max_size=5), min_size=1), max_size=5
    ),
    st.sampled_from([(), ("val",), ("test",), ("val", "test")]),
    st.integers(0, 2**32 - 1),
)
def test_cut(groups, missing, seed):
    groups = {g: dict.fromkeys(names) for g, names in groups.items()}
    out = found.cut(groups, missing)
    assert list(out) == ["train", *missing]
    pairs = [p for split in out.values() for p in split]
    assert sorted(pairs) == sorted((g, n) for g, names in groups.items() for n in names)
    for group, names in groups.items():
        count = {k: sum(g == group for g, _ in v) for k, v in out.items()}
        assert count["train"] >= 1
        if missing:
            taken = {count[split] for split in missing}
            n, k = len(names), len(missing)
            assert taken == {min(max(1, int(n / 5 + 0.5)), (n - 1) // k)}
    # Neither the order of listing nor other classes make a difference.
    rng = random.Random(seed)

    def shuffled(names):
        return rng.sample(list(names), len(names))

    turned = {g: dict.fromkeys(shuffled(groups[g])) for g in shuffled(groups)}
    assert found.cut(turned, missing) == out
    for group, names in groups.items():
        alone = found.cut({group: names}, missing)
        for split, rows in alone.items():
            assert rows == [p for p in out[split] if p[0] == group]


def test_lists_of_paths_and_labels(tmp_path):
    paths = ["images/a/1.png", "images/a b/2.png", "images/3.png", "images/b.png"]
    texts = {
        "train800.txt": "images/a/1.png 1\na b/2.png\t0\n\n",
        "val200.txt": "3.png 2\nb.png 0\n",
        "test.txt": "top.png 0\r\nimages/3.png 2\n",
    }
    root = make(tmp_path / "a", dict.fromkeys([*paths, "top.png"]) | texts)
    loaded, said = load(root)
    assert loaded.class_names == ("0", "1", "2")
    assert contents(loaded) == {
        "train": [("0", "images/a b/2.png"), ("1", "images/a/1.png")],
        "val": [("0", "images/b.png"), ("2", "images/3.png")],
        "test": [("0", "top.png"), ("2", "images/3.png")],
    }
    assert loaded.splits["train"][1].tolist() == [1, 0]  # in the order of the list
    assert said[1].endswith("cannot be learned: 2 (val and test)")
    assert said[2].endswith(": images/3.png = 3.png")
    (root / "classes.txt").write_text("cat\ndog\nsea lion\n")
    assert load(root)[0].class_names == ("cat", "dog", "sea lion")


def test_lists_are_squashed_and_folders_are_cropped(tmp_path):
    """As other PETL code does, and as FGVC is evaluated; another rule can be given."""
    root = make(tmp_path / "a", some("b", "c") | some("a", count=3))
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, :10] = 255  # cut off by the crop
    Image.fromarray(wide).save(root / "a/wide.png")

    def brightest(**options):
        splits = load(root, **options)[0].splits.values()
        every = np.concatenate([images for images, _ in splits])
        return max(x.max() for x in every if not x[:, -1].any())

    assert brightest() == 0
    assert brightest(rule="squash") > 200
    paths = [f"{p.parent.name}/{p.name}" for p in root.glob("*/*")]
    (root / "train.txt").write_text("".join(f"{p} {p > 'b':d}\n" for p in paths))
    assert brightest() > 200
    assert brightest(rule="crop") == 0
    with pytest.raises(ValueError, match="unknown task.resize 'cubic'; choose one"):
        load(root, rule="cubic")


# --- npz ------------------------------------------------------------------------------


def arrays(n, seed=0, shape=(5, 7, 3)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % 3


@pytest.mark.parametrize("shape", [(SIDE, SIDE, 3), (SIDE, SIDE), (SIDE, SIDE, 1)])
def test_npz_with_splits(tmp_path, shape):
    parts = {}
    for k, split in enumerate(folder.SPLITS):
        images, labels = arrays(6 + k, k, shape)
        parts[f"{split}_images"] = images
        parts[f"{split}_labels"] = labels[:, None] if k else labels.astype(np.uint8)
    np.savez_compressed(tmp_path / "mnist.npz", **parts)
    loaded, said = load(tmp_path / "mnist.npz")
    assert loaded.class_names == ("0", "1", "2") and said == []
    for split, (images, labels) in loaded.splits.items():
        wanted = parts[f"{split}_images"].reshape(-1, SIDE, SIDE, shape[-1] % SIDE or 1)
        np.testing.assert_array_equal(images, np.broadcast_to(wanted, images.shape))
        np.testing.assert_array_equal(labels, parts[f"{split}_labels"].ravel())


def test_npz_without_splits(tmp_path, monkeypatch):
    images, labels = arrays(30)
    names = np.array(["a", "b", "ç"])
    path = tmp_path / "x.npz"
    np.savez(path, images=images, labels=labels + 1, class_names=names)
    loaded, said = load(path)
    assert loaded.class_names == ("a", "b", "ç")
    assert said == ["labels count from 1: 1 is a"]
    assert sizes(loaded) == [[6] * 3, [2] * 3, [2] * 3]
    together = np.concatenate([x for x, _ in loaded.splits.values()])
    squashed = [pictures.to_square(x, SIDE, "squash").tobytes() for x in images]
    assert sorted(x.tobytes() for x in together) == sorted(squashed)
    monkeypatch.setattr(npz, "load_images", None)  # not needed a second time
    load(path)


@pytest.mark.parametrize("kind", [np.float64, np.int8, bool])
def test_one_hot_labels(tmp_path, kind):
    images, labels = arrays(30)
    hot = np.eye(4)[labels].astype(kind)  # of the fourth there is none
    np.savez(tmp_path / "a.npz", images=images, labels=hot)
    loaded, said = load(tmp_path / "a.npz")
    assert loaded.class_names == ("0", "1", "2")
    assert sizes(loaded) == [[6] * 3, [2] * 3, [2] * 3]
    assert said == ["classes without pictures, left out: 1 (3)"]
    hot = hot.astype(np.float64)
    for odd in (hot * 0.5, hot * 0, np.ones_like(hot), hot * np.nan):
        np.savez(tmp_path / "a.npz", images=images, labels=odd)
        refused(tmp_path / "a.npz", "labels float64 [30, 4] that are not one-hot")


@pytest.mark.parametrize(("low", "step"), [(1, 1), (0, 7), (900, 4000)])
def test_labels_without_pictures_are_no_classes(tmp_path, low, step):
    labels = [low, low + step]
    text = listed("x").replace(" 0", f" {low}")
    text += listed("y").replace(" 0", f" {low + step}")
    make(tmp_path / "a", some("x", "y") | {"train.txt": text})
    np.savez(tmp_path / "b.npz", images=arrays(10)[0], labels=np.repeat(labels, 5))
    for path in (tmp_path / "a", tmp_path / "b.npz"):
        loaded, said = load(path)
        assert loaded.class_names == tuple(map(str, labels))
        assert sizes(loaded) == FIVE
        assert f"pictures, left out: {labels[1] - 1:,} ({int(low == 0)}" in said[-1]


def test_arrays_of_an_npz_that_are_not_used_are_said(tmp_path):
    images, labels = arrays(30)
    parts = {"Train_images": images[:20], "valid_images": images[20:]}
    parts |= {"Train_labels": labels[:20] % 2, "valid_labels": labels[20:]}
    np.savez(tmp_path / "a.npz", **parts, holdout_images=images)
    loaded, said = load(tmp_path / "a.npz")
    assert said == ["arrays that are not used: holdout_images", f"{LACK}2 (val)"]
    assert [len(y) for _, y in loaded.splits.values()] == [16, 10, 4]
    np.savez(tmp_path / "a.npz", **parts, val_images=images[:1], val_labels=[0])
    refused(tmp_path / "a.npz", "val_images and valid_images, which both mean val")


# --- what is refused ------------------------------------------------------------------

TASK = {"images/0.png": None, "train.txt": "images/0.png 0\n"}
REFUSED = [
    ({"val/cat/1.png": None}, "got val but no train"),
    ({"a.csv": "x", "1.png": None}, "seen: 1 .csv (a.csv); 1 .png", "for each class"),
    (
        {"x/1.HEIC": "x", "y/1.heic": "x", "y/no": "x"},
        "seen: 2 .heic (x/1.HEIC); 1 without an extension (y/no)",
        "convert them to JPEG or PNG",
    ),
    (some("test/x") | {"train/x/1.HEIC": "x"}, "class folders of train; seen: 5 .png"),
    (
        some("cat") | {"dog/1.heic": "x"},
        "got classes in train: cat; expected at least 2",
        "Noticed before: not taken, named .heic: 1 (dog/1.heic). classes without",
    ),
    (some("cat", count=1) | some("dog", count=2), "got no pictures for val; expected"),
    (some("train/cat", "train/dog", "test/a cat"), "that train has none of (a cat)"),
    (some("test", "train", "bus"), "pictures in test; train without a class folder"),
    (some("images", "masks"), "got folders images; masks, of which images is no name"),
    (some("n01/images", "n02/images"), "too deep, in n01/images; n02/images"),
    (some("cat", "dog", "birds/emu"), "in cat; dog, and one folder deeper in birds"),
    (
        some("animals/cat", "animals/dog", "birds/emu", "birds/owl"),
        "2 folders that each hold pictures and classes (animals; birds)",
        "/animals",
    ),
    (inside("cifar", TASK) | inside("svhn", TASK), "got 2 folders that each hold"),
    ({"train.txt": "a.png\n"}, "train.txt: got line 1 'a.png'; expected `path label`"),
    ({"train.txt": "a.png 0\nb.png 20261122\n"}, "got label 20261122; expected labels"),
    ({"train.txt": "\na.png 0\nb.png one\n"}, "got line 2 'b.png one'"),
    ({"train.txt": " \n"}, "got no lines"),
    ({"train.txt": "a 1\nb 2\n", "classes.txt": "x\n"}, "got 1 names; expected 3, for"),
    ({"train.txt": "..\\1.png 0\n"}, "expected a path inside of"),
    (
        some("x", "y") | {"train.txt": listed("a\\x", "a\\y")},
        "10 of 10 pictures cannot be read",
        "correct the paths (of lists",
    ),
    (
        {"train.txt": "x 0\n", "Train.txt": "x 0\n"},
        "got Train.txt and train.txt; expec",
    ),
    (cub()[0] | {"image_class_labels.txt": "1 1\n"}, "got 1 uuids, 17 of them"),
]
REFUSED += [
    (
        {"train.json": '{"a": "cat", "b": "dog"}', "test.json": f'{{"a": "{other}"}}'},
        f"train and test write differently: cat and {other}; expected the same names",
    )
    for other in ("Cat", "cat ")
]
REFUSED += [
    ({"train.json": text}, message)
    for text, message in (
        ("{", "got no JSON"),
        ("[" * 100_000, "got no JSON"),
        ('{"a.png": 0, "b.png": -1}', "got entry 2"),
        ('{"a.png": true}', "got entry 1"),
        ('[["a.png", 1, "cat"]]', "got entry 1"),
        ("7", "got entry 1"),
        ('{"a/../../b.png": 1}', "expected a path inside of"),
        ('{"/etc/passwd": 1}', "expected a path inside of"),
        ('{"a\\u0000.png": 1}', "got entry 1"),
        ('{"\\ud800.png": 0, "b.png": 1}', "2 of 2 pictures cannot be read"),
        ('{"a.png": 0, "b.png": "x"}', "labels that are numbers, and others that are"),
    )
]
# Of other people's sets: splits by other names.
REFUSED += [
    (some(*names.split()), "called like splits; expected train, val, test")
    for names in (
        "training_set/cat training_set/dog test_set/cat test_set/dog",
        "training_set/training_set/cat test_set/test_set/cat",
        "seg_train/seg_train/sea seg_test/seg_test/sea seg_pred/seg_pred",
        "train_images test_images",
        "cars_train cars_test",
        "train2017/x val2017/x",
        "set/Train-Set set/Validation-Set",
    )
]


@pytest.mark.parametrize(("files", "parts"), [(f, p) for f, *p in REFUSED])
def test_what_is_refused(tmp_path, files, parts):
    refused(make(tmp_path, files), str(tmp_path), *parts)


# --- broken pictures ------------------------------------------------------------------


def test_all_broken_pictures_are_named_in_one_error(tmp_path):
    bad = {f"train/cat/bad{k:02}.jpg": "<html>" for k in range(12)}
    root = make(tmp_path / "a", FULL | bad)
    (root / "val/dog/loop.png").symlink_to("loop.png")
    refused(
        root,
        "13 of 31 pictures cannot be read; train/cat/bad00.jpg: got no picture",
        "; and 3 more; mend or remove them, or pass --config.task.skip_broken=True",
    )
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_broken_pictures_can_be_left_out(tmp_path):
    root = make(tmp_path / "a", FULL)
    whole = contents(load(root)[0])
    make(root, {"train/cat/0b.jpg": "<html>", "val/cat/2b.png": ""})
    (root / "test/dog/9.png").write_bytes((root / "test/dog/1.png").read_bytes()[:45])
    seen = []
    for _ in range(2):  # from the cache too
        loaded, said = load(root, skip_broken=True)
        assert contents(loaded) == whole
        seen.append(said)
        assert len(said) == 1 and said[0].startswith("3 of 21 pictures cannot be read")
    assert seen[0] == seen[1]
    for name in ("train/cat/0b.jpg", "val/cat/2b.png", "test/dog/9.png"):
        assert name in said[0]
    refused(root, "3 of 21")


def test_a_class_of_broken_pictures_only_is_not_in_train(tmp_path):
    files = FULL | {f"train/cat/{k}.png": "broken" for k in range(3)}
    root = make(tmp_path / "a", files | {"train/emu/1.png": None})
    loaded, said = load(root, skip_broken=True)
    assert loaded.class_names == ("cat", "dog", "emu")
    assert said[1].endswith("cannot be learned: cat (val and test)")
    for path in [*root.glob("val/cat/*"), *root.glob("test/cat/*")]:
        path.write_text("broken")
    loaded, said = load(root, skip_broken=True)
    assert loaded.class_names == ("dog", "emu")
    assert said[1] == "classes without pictures, left out: 1 (cat)"
    assert loaded.splits["train"][1].tolist() == [0, 0, 0, 1]


def test_the_same_picture_in_two_splits_is_said_every_time(tmp_path):
    root = make(tmp_path / "a", FULL)
    shutil.copy(root / "train/cat/1.png", root / "test/dog/copy.png")
    shutil.copy(root / "train/dog/1.png", root / "train/dog/same.png")
    for _ in range(2):
        _, (said,) = load(root)
        assert said.startswith("1 of 7 test pictures are also in train, 1 with")
        assert said.endswith(" are: test/dog/copy.png = train/cat/1.png")


# --- the cache ------------------------------------------------------------------------


def test_a_second_start_reads_no_picture(tmp_path, monkeypatch):
    make(tmp_path / "a", FULL)
    first = contents(load(tmp_path / "a")[0])
    monkeypatch.setattr(found, "opened", None)
    monkeypatch.setattr(pictures, "decode", None)
    said = []
    loaded = folder.load(str(tmp_path / "a"), SIDE, report=said.append)
    assert contents(loaded) == first and said == []


@pytest.mark.parametrize("change", ["content", "new", "gone", "side", "rule", "pillow"])
def test_what_changes_the_pictures_rebuilds(tmp_path, monkeypatch, change):
    root = make(tmp_path / "a", FULL)
    load(root)
    options, side = {}, SIDE
    if change == "content":  # of the same size and name
        path = root / "train/cat/1.png"
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "new":
        make(root, {"train/cat/4.png": None})
    elif change == "gone":
        (root / "train/cat/1.png").unlink()
    elif change == "side":
        side = 9
    elif change == "rule":
        options["rule"] = "corner"
    else:
        monkeypatch.setattr(folder.PIL, "__version__", "0.0")
    said = []
    folder.load(str(root), side, report=said.append, **options)
    assert [text.split()[0] for text in said[:2]] == ["reading", "read"]
    assert len(list((tmp_path / "cache" / "pictures").iterdir())) == 2


# --- as a task ------------------------------------------------------------------------


def test_load_task(tmp_path, capsys):
    make(tmp_path / "pets", FULL | {"test/emu/1.png": None})
    options = {"image_size": SIDE, "data_dir": str(tmp_path / "pets")}
    task = tasks.load_task("folder", **options)
    assert task.doubts == (f"{LACK}emu (test)",)
    assert task.name == "pets" and task.class_names == ("cat", "dog", "emu")
    assert isinstance(task.train, tasks.Split) and len(task.test.labels) == 7
    assert "reading 19 pictures, once" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--config=configs/folder\.py:DIR"):
        tasks.load_task("folder")
    with pytest.raises(ValueError, match="for task 'digits'; expected resize for"):
        tasks.load_task("digits", resize="crop")


def test_the_config_leaves_rate_and_epochs_to_be_found():
    values = load_config("configs/folder.py", "some/where")
    assert values.task.name == "folder" and values.task.data_dir == "some/where"
    assert search.wanted(values)
    assert values.tune.base_lr is values.tune.epochs is values.finetune.base_lr is None
    assert (values.tune.optimizer, values.tune.schedule) == ("adamw", "step")


@pytest.mark.usefixtures("standard_promotion")
def test_a_whole_run_on_a_folder(tmp_path):
    """Class names reach the released prompts; a second run reads the cache alone."""
    rng = np.random.default_rng(0)
    for kind, tone in (("ant", 40), ("bee", 128), ("cow", 210)):
        (tmp_path / "zoo" / kind).mkdir(parents=True)
        for k in range(10):
            x = np.clip(rng.normal(tone, 20, (40, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(x).save(tmp_path / "zoo" / kind / f"{k}.jpg")
    weights = save_small_backbone(tmp_path / "small.safetensors")
    values = load_config("configs/folder.py", str(tmp_path / "zoo")).to_dict()
    values["backbone"].update(variant=SMALL, checkpoint=str(weights))
    values["prompts"]["num_prompts"] = 4
    values["condense"].update(keep_ratios=())
    values["baselines"] = ("linear",)
    for stage in ("linear", "tune", "finetune"):
        values[stage].update(epochs=2, warmup_epochs=0, batch_size=9)
    config, how = search.choose(values, tmp_path / "out")
    report = experiment.run(config, tmp_path / "out", "", how)
    assert len(report["search"]["trials"]) == 4  # of one epoch: there is no longer rung
    assert report["task"] == "zoo"
    data = report["data"]
    assert [data[k] for k in ("train", "val", "test", "classes")] == [18, 6, 6, 3]
    released = list((tmp_path / "out" / "prompts").iterdir())
    assert len(released) == len(report["rows"])
    for path in released:
        header = vpt_jax.load_prompts(path).header
        assert header["class_names"] == ["ant", "bee", "cow"]
    json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(list(cache.default_folder().iterdir())) == 1
