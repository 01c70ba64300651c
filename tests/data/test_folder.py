# SPDX-License-Identifier: Apache-2.0
"""Own pictures: the layouts, the cut, what is reported, and a whole run on them."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, save_small_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vpt_jax
from vpt_jax.bench import search
from vpt_jax.data import cache, folder, found, npz, pictures, tasks

ROOT = Path(__file__).parents[2]
SIDE = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))


def colour(name):
    """A picture of one colour that is known from the file's name."""
    value = random.Random(name).randbytes(3)
    return np.broadcast_to(np.frombuffer(value, np.uint8), (SIDE, SIDE, 3))


def put(root, *names, format="png"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(colour(name))).save(path, format)


def load(root, **options):
    """`(what was loaded, what was said)`, but of progress and of plain pictures."""
    said = []
    loaded = folder.load(str(root), SIDE, report=said.append, **options)
    left_out = ("reading", "read in")
    said = [text for text in said if not text.startswith(left_out)]
    return loaded, [text for text in said if "pictures are of one colour" not in text]


def contents(loaded):
    """Per split: the set of (class name, colour of the picture)."""
    return {
        split: sorted(
            (loaded.class_names[y], tuple(x[0, 0].tolist()))
            for x, y in zip(images, labels, strict=True)
        )
        for split, (images, labels) in loaded.splits.items()
    }


def expected(**names):
    return {
        split: sorted(
            (kind, tuple(colour(f"{where}/{kind}/{name}.png")[0, 0].tolist()))
            for kind, where, name in rows
        )
        for split, rows in names.items()
    }


def full(root):
    for split in ("train", "val", "test"):
        put(root, *(f"{split}/{c}/{k}.png" for c in ("dog", "cat") for k in "123"))


# --- class folders --------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_train_val_and_test_are_kept_as_they_are(tmp_path, val):
    full(tmp_path / "pets")
    (tmp_path / "pets" / "val").rename(tmp_path / "pets" / val)
    loaded, said = load(tmp_path / "pets")
    assert loaded.class_names == ("cat", "dog") and said == []
    rows = {
        split: [(c, split, k) for c in ("cat", "dog") for k in "123"]
        for split in folder.SPLITS
    }
    assert contents(loaded) == expected(**rows)
    for images, labels in loaded.splits.values():
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert not images.flags.writeable


def test_missing_splits_are_a_fifth_of_every_class(tmp_path):
    put(tmp_path / "a", *(f"train/cat/{k}.png" for k in range(20)))
    put(tmp_path / "a", *(f"train/dog/{k}.png" for k in range(7)))
    put(tmp_path / "a", "train/emu/0.png", "train/fox/0.png", "train/fox/1.png")
    loaded, _ = load(tmp_path / "a")
    counts = {k: np.bincount(y, minlength=4) for k, (_, y) in loaded.splits.items()}
    assert counts["val"].tolist() == counts["test"].tolist() == [4, 1, 0, 0]
    assert counts["train"].tolist() == [12, 5, 1, 2]
    together = [pair for pairs in contents(loaded).values() for pair in pairs]
    assert len(set(together)) == 30  # nothing is lost, nothing is twice


def test_a_given_test_set_is_kept_and_val_is_cut_from_train(tmp_path):
    full(tmp_path / "a")
    put(tmp_path / "a", *(f"train/dog/{k}.png" for k in range(4, 11)))
    (tmp_path / "a" / "val").rename(tmp_path / "elsewhere")
    loaded, _ = load(tmp_path / "a")
    got = contents(loaded)
    rows = [(c, "test", k) for c in ("cat", "dog") for k in "123"]
    assert got["test"] == expected(test=rows)["test"]
    assert [len(v) for v in got.values()] == [2 + 8, 1 + 2, 6]


def test_classes_without_a_train_folder_are_cut_alike(tmp_path):
    names = [f"{c}/{k}.png" for c in ("cat", "dog") for k in range(10)]
    put(tmp_path / "a", *names)
    put(tmp_path / "b" / "train", *names)
    a, b = (load(tmp_path / x)[0] for x in "ab")
    assert contents(a) == contents(b)
    assert [len(y) for _, y in a.splits.values()] == [12, 4, 4]


def test_the_cut_is_the_same_on_every_machine():
    """Changing it changes everyone's splits: not by accident."""
    groups = {"cat": dict.fromkeys(f"{k}.jpg" for k in range(10))}
    out = found.cut(groups, ("val", "test"))
    assert {k: [n for _, n in v] for k, v in out.items() if k != "train"} == SPLIT


SPLIT = {"val": ["0.jpg", "7.jpg"], "test": ["1.jpg", "8.jpg"]}


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.text(max_size=5), st.sets(st.text(max_size=5), min_size=1), max_size=5
    ),
    st.sampled_from([(), ("val",), ("test",), ("val", "test")]),
    st.randoms(),
)
def test_cut(groups, missing, rng):
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
            assert len(taken) == 1  # as many for val as for test
            n, k = len(names), len(missing)
            assert taken == {min(max(1, int(n / 5 + 0.5)), (n - 1) // k)}
    # Neither the order of listing nor other classes make a difference.
    shuffled = {g: list(groups[g]) for g in rng.sample(sorted(groups), len(groups))}
    for names in shuffled.values():
        rng.shuffle(names)
    turned = {g: dict.fromkeys(names) for g, names in shuffled.items()}
    assert found.cut(turned, missing) == out
    for group, names in groups.items():
        alone = found.cut({group: names}, missing)
        for split, rows in alone.items():
            assert rows == [p for p in out[split] if p[0] == group]


def test_what_is_not_taken_is_said(tmp_path):
    root = tmp_path / "a"
    full(root)
    for name in (
        "README.md",
        "train/notes.txt",
        "train/cat/Thumbs.db",
        "train/cat/.DS_Store",
        "train/cat/raw/1.png",
        "train/dog/1.HEIC",
        "train/dog/noname",
        "test/.hidden/1.png",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    put(root, "train/dog/4.JPG", format="jpeg")  # upper case is fine
    loaded, said = load(root)
    assert [len(y) for _, y in loaded.splits.values()] == [7, 6, 6]
    assert said == [
        "not taken, a folder in a class folder: 1 (train/cat/raw)",
        "not taken, hidden: 2 (test/.hidden; train/cat/.DS_Store)",
        "not taken, named .db: 1 (train/cat/Thumbs.db)",
        "not taken, named .heic: 1 (train/dog/1.HEIC)",
        "not taken, named without an extension: 1 (train/dog/noname)",
        "not taken, not in a class folder: 1 (train/notes.txt)",
        "not taken, outside of the splits: 1 (README.md)",
    ]


def test_names_in_any_language(tmp_path):
    put(tmp_path / "a", *(f"train/Ka\u0308fer/ü {k}.png" for k in range(5)))  # a Mac's
    put(tmp_path / "a", *(f"train/чайка/{k}.png" for k in range(5)))
    put(tmp_path / "a", *(f"test/K\u00e4fer/{k}.png" for k in range(2)))
    loaded, _ = load(tmp_path / "a")
    assert loaded.class_names == ("K\u00e4fer", "чайка")
    assert loaded.splits["test"][1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: None, r"no such file or folder; expected DIR/train/<class>/\*"),
        (lambda r: r.mkdir(), "got no pictures in class folders"),
        (lambda r: put(r, "val/cat/1.png"), "got val but no train"),
        (lambda r: put(r, "1.png", "2.png"), "got no pictures in class folders"),
        (
            lambda r: put(r, *(f"train/cat/{k}.png" for k in range(5))),
            "got classes in train: cat; expected at least 2",
        ),
        (
            lambda r: (full(r), put(r, "test/Cat/1.png")),
            "train and test write differently: cat and Cat; expected the same names",
        ),
        (
            lambda r: put(r, "train/cat/1.png", "train/dog/1.png", "train/dog/2.png"),
            "got no pictures for val; expected at least 1",
        ),
        (
            lambda r: (full(r), [p.unlink() for p in r.glob("val/*/*")]),
            "got no pictures for val",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, change, message):
    root = tmp_path / "a"
    change(root)
    with pytest.raises(ValueError, match=message):
        load(root)


def test_no_folder_is_given():
    with pytest.raises(ValueError, match=r"--config=configs/folder\.py:DIR"):
        folder.load("", SIDE)


# --- broken pictures ------------------------------------------------------------------


def test_all_broken_pictures_are_named_in_one_error(tmp_path):
    root = tmp_path / "a"
    full(root)
    for k in range(12):
        (root / f"train/cat/bad{k:02}.jpg").write_text("<html>")
    (root / "val/dog/loop.png").symlink_to("loop.png")
    with pytest.raises(ValueError) as e:
        load(root)
    message = str(e.value)
    assert "13 of 31 pictures cannot be read" in message
    assert "train/cat/bad00.jpg: got no picture" in message
    assert "bad09" in message and "bad10" not in message
    assert "and 3 more" in message and "--config.task.skip_broken=True" in message
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_broken_pictures_can_be_left_out(tmp_path):
    root = tmp_path / "a"
    full(root)
    whole = contents(load(root)[0])
    (root / "train/cat/0.jpg").write_text("<html>")
    (root / "val/cat/2b.png").write_bytes(b"")
    (root / "test/dog/9.png").write_bytes((root / "test/dog/1.png").read_bytes()[:45])
    loaded, said = load(root, skip_broken=True)
    assert contents(loaded) == whole
    again, said_again = load(root, skip_broken=True)
    assert contents(again) == whole
    assert said == said_again  # from the cache too
    assert len(said) == 1 and said[0].startswith("3 of 21 pictures cannot be read")
    for name in ("train/cat/0.jpg", "val/cat/2b.png", "test/dog/9.png"):
        assert name in said[0]
    with pytest.raises(ValueError, match="3 of 21"):
        load(root)


def test_a_class_of_broken_pictures_only_is_not_in_train(tmp_path):
    root = tmp_path / "a"
    full(root)
    for k in "123":
        (root / f"train/cat/{k}.png").write_text("broken")
    put(root, "train/emu/1.png")
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
    root = tmp_path / "a"
    full(root)
    (root / "test/dog/copy.png").write_bytes((root / "train/cat/1.png").read_bytes())
    (root / "train/dog/same.png").write_bytes((root / "train/dog/1.png").read_bytes())
    for _ in range(2):
        _, said = load(root)
        assert len(said) == 1
        assert said[0].startswith("1 of 7 test pictures are also in train, 1 with")
        assert said[0].endswith(" are: test/dog/copy.png = train/cat/1.png")


# --- the cache ------------------------------------------------------------------------


def test_a_second_start_reads_no_picture(tmp_path, monkeypatch):
    full(tmp_path / "a")
    first = contents(load(tmp_path / "a")[0])

    def refuse(*args):
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(found, "opened", refuse)
    monkeypatch.setattr(pictures, "decode", refuse)
    said = []
    loaded = folder.load(str(tmp_path / "a"), SIDE, report=said.append)
    assert contents(loaded) == first
    assert not [text for text in said if text.startswith("read")]


@pytest.mark.parametrize("change", ["content", "new", "gone", "side", "rule", "pillow"])
def test_what_changes_the_pictures_rebuilds(tmp_path, monkeypatch, change):
    root = tmp_path / "a"
    full(root)
    load(root)
    options, side = {}, SIDE
    if change == "content":  # of the same size and name
        path = root / "train/cat/1.png"
        status = path.stat()
        data = bytearray(path.read_bytes())
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "new":
        put(root, "train/cat/4.png")
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


# --- lists ----------------------------------------------------------------------------


def lists(root, **texts):
    root.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)


def test_lists_of_paths_and_labels(tmp_path):
    root = tmp_path / "cifar"
    put(
        root,
        "images/a/1.png",
        "images/a b/2.png",
        "images/3.png",
        "images/b.png",
        "top.png",
    )
    lists(
        root,
        train800="images/a/1.png 1\na b/2.png\t0\n\n",
        val200="3.png 2\nb.png 0\n",
        test="top.png 0\r\nimages/3.png 2\n",
    )
    loaded, said = load(root)
    assert loaded.class_names == ("0", "1", "2")
    colours = {
        split: [tuple(x[0, 0].tolist()) for x in images]
        for split, (images, _) in loaded.splits.items()
    }
    rgb = {n: tuple(colour(n)[0, 0].tolist()) for n in ("images/3.png", "top.png")}
    assert colours["test"] == [rgb["top.png"], rgb["images/3.png"]]
    assert loaded.splits["train"][1].tolist() == [1, 0]
    assert said[0] == "lists: train800.txt, val200.txt, test.txt"
    assert said[2].endswith(": images/3.png = 3.png")
    assert said[1].endswith("cannot be learned: 2 (val and test)")
    (root / "classes.txt").write_text("cat\ndog\nsea lion\n")
    assert load(root)[0].class_names == ("cat", "dog", "sea lion")


def test_a_missing_list_is_cut_from_train(tmp_path):
    root = tmp_path / "a"
    names = [f"images/{k}.png" for k in range(20)]
    put(root, *names)
    text = "".join(f"{n} {k % 2}\n" for k, n in enumerate(names))
    lists(root, train800val200=text, test="images/0.png 0\n")
    loaded, said = load(root)
    assert said[0] == "lists: train800val200.txt, test.txt"
    count = [np.bincount(y).tolist() for _, y in loaded.splits.values()]
    assert count == [[8, 8], [2, 2], [1]]
    # Other lines first: the same cut.
    shuffled = text.splitlines(keepends=True)
    random.Random(0).shuffle(shuffled)
    lists(root, train800val200="".join(shuffled))
    assert contents(load(root)[0]) == contents(loaded)


def test_lists_are_squashed_and_folders_are_cropped(tmp_path):
    """As other PETL code does, and as FGVC is evaluated; another rule can be given."""
    x = np.zeros((40, 80, 3), np.uint8)
    x[:, :10] = 255  # cut off by the crop
    root = tmp_path / "a"
    put(root, *(f"{c}/{k}.png" for c in "ab" for k in range(5)))
    Image.fromarray(x).save(root / "a/wide.png")
    text = "".join(
        f"{p.relative_to(root)} {p.parent.name == 'b':d}\n" for p in root.glob("*/*")
    )

    def brightest(**options):
        loaded, _ = load(root, **options)
        wide = [
            x
            for images, _ in loaded.splits.values()
            for x in images
            if x[0, -1].sum() == 0
        ]
        return max(x.max() for x in wide)

    assert brightest() == 0
    assert brightest(rule="squash") > 200
    lists(root, train=text)
    assert brightest() > 200
    assert brightest(rule="crop") == 0
    with pytest.raises(ValueError, match="unknown task.resize 'cubic'"):
        load(root, rule="cubic")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"train": "a.png\n"},
            r"train\.txt: got line 1 'a\.png'; expected `path label`",
        ),
        ({"train": "a.png -1\n"}, "got line 1"),
        ({"train": "a.png 0\nb.png 20261122\n"}, "got label 20261122; expected labels"),
        ({"train": "\na.png 0\nb.png one\n"}, "got line 2 'b.png one'"),
        ({"train": " \n"}, "got no lines"),
        (
            {"train": "a.png 0\nb.png 2\n", "classes": "x\ny\n"},
            "got 2 names; expected 3",
        ),
        (
            {"train": "a.png 0\nb.png 1\n", "val": "c.png 0", "test": "c.png 0"},
            "4 of 4",
        ),
    ],
)
def test_lists_that_are_refused(tmp_path, texts, message):
    lists(tmp_path / "a", **texts)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


# --- npz ------------------------------------------------------------------------------


def arrays(n, seed, shape=(5, 7, 3)):
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
    images, labels = arrays(30, 0)
    names = np.array(["a", "b", "ç"])
    np.savez(tmp_path / "x.npz", images=images, labels=labels, class_names=names)
    loaded, _ = load(tmp_path / "x.npz")
    assert loaded.class_names == ("a", "b", "ç")
    for split, n in (("train", 6), ("val", 2), ("test", 2)):
        assert np.bincount(loaded.splits[split][1]).tolist() == [n] * 3
    together = np.concatenate([x for x, _ in loaded.splits.values()])
    squashed = [pictures.to_square(x, SIDE, "squash").tobytes() for x in images]
    assert sorted(x.tobytes() for x in together) == sorted(squashed)
    monkeypatch.setattr(npz, "load_images", None)  # not needed a second time
    load(tmp_path / "x.npz")


# --- as a task ------------------------------------------------------------------------


def test_load_task(tmp_path, capsys):
    full(tmp_path / "pets")
    put(tmp_path / "pets", "test/emu/1.png")
    task = tasks.load_task("folder", image_size=SIDE, data_dir=str(tmp_path / "pets"))
    assert task.doubts and "cannot be learned: emu (test)" in task.doubts[0]
    (tmp_path / "pets" / "test" / "emu" / "1.png").unlink()
    capsys.readouterr()
    task = tasks.load_task("folder", image_size=SIDE, data_dir=str(tmp_path / "pets"))
    assert task.doubts and "left out: 1 (emu)" in task.doubts[0]
    assert task.name == "pets" and task.class_names == ("cat", "dog")
    assert isinstance(task.train, tasks.Split) and len(task.test.labels) == 6
    assert "reading 18 pictures, once" in capsys.readouterr().out
    with pytest.raises(ValueError, match="did you mean 'folder'"):
        tasks.load_task("folders")
    with pytest.raises(ValueError, match="for task 'digits'; expected resize for"):
        tasks.load_task("digits", resize="crop")


def folder_config(arg):
    module = {}
    path = ROOT / "configs" / "folder.py"
    exec(compile(path.read_text(), path, "exec"), module)
    return module["get_config"](arg)


def test_the_config_leaves_rate_and_epochs_to_be_found():
    values = folder_config("some/where")
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
    values = folder_config(str(tmp_path / "zoo")).to_dict()
    values["backbone"].update(variant=SMALL, checkpoint=str(weights))
    values["prompts"]["num_prompts"] = 4
    values["condense"].update(keep_ratios=())
    values["baselines"] = ("linear",)
    for stage in ("linear", "tune", "finetune"):
        values[stage].update(epochs=2, warmup_epochs=0, batch_size=9)
    report = search.run(values, tmp_path / "out")
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
