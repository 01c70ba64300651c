# SPDX-License-Identifier: Apache-2.0
"""Tiny raw downloads in the publishers' own layouts, and what should come of them.

Each function of `MAKERS` writes files under a folder and returns a `Raw`: what stands
in for tfds' download manager, and the picture and the labels of every example, worked
out here from the publisher's files and VTAB's words, not from tfds or vpt_jax.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def digest(picture):
    """A name for a picture: its shape and its bytes."""
    picture = np.ascontiguousarray(picture)
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


@dataclasses.dataclass
class Raw:
    """Stands in for a download, and says what its examples are."""

    result: Any = None
    download: Any = None  # where `download` gives something else than the others
    extract: Any = None
    manual: Any = None
    # Split to the digest of the picture to the label of each benchmark.
    examples: dict = dataclasses.field(default_factory=dict)
    # Split to the example's name to the label: where tfds encodes the picture again.
    named: dict = dataclasses.field(default_factory=dict)

    def expect(self, split, picture, **labels):
        if picture.shape[-1] == 1:
            picture = np.repeat(picture, 3, -1)
        known = self.examples.setdefault(split, {})
        key = digest(picture)
        assert key not in known, "two pictures are equal"
        known[key] = {name: int(label) for name, label in labels.items()}


def noise(rng, h, w, c=3):
    return rng.integers(0, 256, (h, w, c), dtype=np.uint8)


def smooth(rng, h, w):
    """A picture that JPEG keeps nearly as it is."""
    coarse = Image.fromarray(noise(rng, 4, 4))
    return np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC))


def encode(picture, form="JPEG"):
    buffer = io.BytesIO()
    grey = picture.shape[-1] == 1
    Image.fromarray(picture[..., 0] if grey else picture).save(buffer, form)
    return buffer.getvalue()


def decoded(data):
    """What a decoder makes of a file when it is asked for three channels."""
    picture = np.asarray(Image.open(io.BytesIO(data)))
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, -1)
    return picture[..., :3]  # without alpha


def jpeg(rng, h, w, grey=False):
    return encode(noise(rng, h, w, 1 if grey else 3))


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def class_names(builder):
    features = tfds.builder(builder, data_dir="none").info.features
    assert features is not None
    return features["label"].names  # pyright: ignore


def make_cifar100(d, rng):
    raw = Raw(d)
    for split, n in (("train", 2000), ("test", 40)):
        pixels = noise(rng, n, 3, 1024)  # planes of red, green, blue
        fine = rng.integers(0, 100, n, dtype=np.uint8)
        rows = np.concatenate(
            [np.stack([fine // 5, fine], 1), pixels.reshape(n, -1)], 1
        )
        put(d / "cifar-100-binary" / f"{split}.bin", rows.tobytes())
        for x, y in zip(pixels, fine, strict=True):
            raw.expect(split, x.reshape(3, 32, 32).transpose(1, 2, 0), cifar100=y)
    for kind, n in (("coarse", 20), ("fine", 100)):
        text = "".join(f"{kind}{i}\n" for i in range(n))
        put(d / "cifar-100-binary" / f"{kind}_label_names.txt", text.encode())
    return raw


def make_svhn_cropped(d, rng):
    import scipy.io

    raw = Raw({})
    for split, n in (("train", 2000), ("test", 30), ("extra", 5)):
        x, y = noise(rng, n, 32, 32 * 3).reshape(n, 32, 32, 3), np.arange(n) % 10 + 1
        raw.result[split] = d / f"{split}_32x32.mat"
        mat = {"X": np.moveaxis(x, 0, -1), "y": y.astype(np.uint8)[:, None]}
        scipy.io.savemat(raw.result[split], mat)
        for picture, digit in zip(x, y, strict=True):
            raw.expect(split, picture, svhn=0 if digit == 10 else digit)
    return raw


def make_oxford_flowers102(d, rng):
    import scipy.io

    sizes = {"train": 60, "validation": 60, "test": 80}
    ids = rng.permutation(sum(sizes.values())) + 1
    labels = np.arange(len(ids)) % 102 + 1
    scipy.io.savemat(d / "imagelabels.mat", {"labels": labels[None]})
    paths = {"images": d / "img", "labels": d / "imagelabels.mat"}
    raw, sets, at = Raw({**paths, "setid": d / "setid.mat"}), {}, 0
    for (split, n), key in zip(sizes.items(), ("trnid", "valid", "tstid"), strict=True):
        sets[key] = ids[None, at : at + n]
        for i in ids[at : at + n]:
            path = d / "img" / "jpg" / f"image_{i:05d}.jpg"
            data = jpeg(rng, 40, 50)
            put(path, data)
            label = labels[i - 1] - 1
            raw.expect(split, decoded(data), oxford_flowers102=label, flowers=label)
        at += n
    scipy.io.savemat(d / "setid.mat", sets)
    return raw


def make_dtd(d, rng):
    raw, splits = Raw(d), {"train": "train1", "validation": "val1", "test": "test1"}
    for split, listed in splits.items():
        names = []
        for label, name in enumerate(sorted(class_names("dtd"))):
            for k in range(2):
                names.append(f"{name}/{name}_{listed}{k}.jpg")
                data = jpeg(rng, 30, 36)
                put(d / "dtd" / "images" / names[-1], data)
                raw.expect(split, decoded(data), dtd=label)
        put(d / "dtd" / "labels" / f"{listed}.txt", "\n".join([*names, ""]).encode())
    return raw


def make_dsprites(d, rng):
    import h5py

    n, raw = 2000, Raw(d / "d.hdf5")
    sizes = (1, 3, 6, 40, 32, 32)  # colour, shape, scale, orientation, x, y
    classes = np.stack([rng.integers(0, k, n) for k in sizes], 1)
    pictures = rng.integers(0, 2, (n, 64, 64), dtype=np.uint8)
    with h5py.File(d / "d.hdf5", "w") as f:
        f["imgs"], f["latents/classes"] = pictures, classes
        f["latents/values"] = classes / np.maximum(1, np.array(sizes) - 1)
    # The first and last value of every class of 2.5 orientations.
    first = (0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38)
    for picture, (_, _, _, turn, x, _) in zip(pictures, classes, strict=True):
        raw.expect(
            "train",
            picture[..., None] * np.uint8(255),
            dsprites_location=x // 2,
            dsprites_orientation=sum(turn >= start for start in first) - 1,
        )
    return raw


def make_smallnorb(d, rng):
    def put_norb(name, array, magic):
        dims = [*array.shape, 1, 1][: max(3, array.ndim)]
        header = np.array([magic, array.ndim, *dims], "<i4").tobytes()
        raw.result[name] = put(d / name, header + array.tobytes())

    raw, n = Raw({}), 60
    for split, name in (("train", "training"), ("test", "testing")):
        pairs = rng.integers(0, 256, (n, 2, 96, 96), dtype=np.uint8)
        turns = rng.integers(0, (10, 9, 18, 6), (n, 4))
        put_norb(f"{name}_dat", pairs, 507333717)
        put_norb(f"{name}_cat", (np.arange(n) % 5).astype("<i4"), 507333716)
        # The publisher counts azimuths in tens of degrees: 0, 2, ..., 34.
        put_norb(f"{name}_info", (turns * (1, 1, 2, 1)).astype("<i4"), 507333716)
        for pair, (_, elevation, azimuth, _) in zip(pairs, turns, strict=True):
            labels = {"smallnorb_azimuth": azimuth, "smallnorb_elevation": elevation}
            raw.expect(split, pair[0, ..., None], **labels)
    return raw


def make_clevr(d, rng):
    raw, base = Raw(d), d / "CLEVR_v1.0"
    # On the thresholds, and beside them.
    depths = (7.0, 8.0, 8.01, 8.5, 8.51, 9.0, 9.25, 9.5, 9.75, 10.0, 10.5, 12.0)
    steps = (8.0, 8.5, 9.0, 9.5, 10.0)
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        scenes, questions = [], []
        for i in range(40):
            file = f"CLEVR_{name}_{i:06d}.png"
            data = encode(noise(rng, 32, 48, 4), "PNG")  # the real ones have alpha
            put(base / "images" / name / file, data)
            nearest = depths[i % len(depths)]
            z = [nearest, *rng.uniform(nearest, 14, 2 + i % 8)]
            rng.shuffle(z)
            look = {"color": "gray", "material": "metal", "shape": "cube"}
            look |= {"size": "small", "rotation": 1.0, "3d_coords": [0.0, 0.0, 0.3]}
            objects = [look | {"pixel_coords": [10.0, 11.0, float(v)]} for v in z]
            scenes.append({"objects": objects, "image_filename": file})
            questions.append({"image_filename": file, "question": "q?", "answer": "a"})
            raw.expect(
                split,
                decoded(data),
                clevr_count=len(z) - 3,
                clevr_distance=sum(nearest > step for step in steps),
            )
        if name != "test":  # published without scenes
            path = base / "scenes" / f"CLEVR_{name}_scenes.json"
            put(path, json.dumps({"scenes": scenes}).encode())
        path = base / "questions" / f"CLEVR_{name}_questions.json"
        put(path, json.dumps({"questions": questions}).encode())
    return raw


def make_kitti(d, rng):
    raw = Raw({k: d / f"{k}.zip" for k in ("images", "annotations", "devkit")})
    n, videos = 60, 20
    kinds = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram")
    depths = (3.5, 8.0, 8.01, 19.99, 20.0, 20.01, 45.0)
    examples = {}
    with (
        zipfile.ZipFile(raw.result["images"], "w") as images,
        zipfile.ZipFile(raw.result["annotations"], "w") as annotations,
        zipfile.ZipFile(raw.result["devkit"], "w") as devkit,
    ):
        for i in range(n):
            data = encode(noise(rng, 24, 80), "PNG")
            images.writestr(f"training/image_2/{i:06d}.png", data)
            # A few scenes are empty, a few have no vehicle.
            found = [
                (kinds[int(rng.integers(3, 7)) if i % 5 == 1 else int(k)], depths[j])
                for k, j in zip(
                    rng.integers(0, 7, i % 5), rng.integers(0, 7, i % 5), strict=True
                )
            ]
            lines = [
                f"{kind} 0.00 0 1.5 5.0 5.0 20.0 20.0 1.5 1.6 3.9 0.1 1.5 {z:.2f} 1.5"
                for kind, z in found
            ]
            lines += ["DontCare -1 -1 -10 5 5 9 9 -1 -1 -1 -1000 -1000 -1000 -10", ""]
            annotations.writestr(f"training/label_2/{i:06d}.txt", "\n".join(lines))
            near = [z for kind, z in found if kind in ("Car", "Van", "Truck")]
            label = 3 if not near else 0 if min(near) <= 8 else 1 + (min(near) > 20)
            examples[i] = decoded(data), label
        order = ",".join(str(x + 1) for x in rng.permutation(n))
        devkit.writestr("mapping/train_rand.txt", order)
        drive = "2011_09_26 2011_09_26_drive_{:04d}_sync {:010d}"
        mapping = "\n".join(drive.format(k % videos, k) for k in range(n))
        devkit.writestr("mapping/train_mapping.txt", mapping)
    # Which videos go where is tfds' own choice.
    for picture, label in examples.values():
        raw.expect("any", picture, kitti_distance=label)
    return raw


def make_caltech101(d, rng):
    raw = Raw(d, extract=d / "ex")
    names = class_names("caltech101")
    for name in names[:6]:
        for k in range(33):
            data = jpeg(rng, 20, 24, grey=k % 11 == 0)  # a few of the real ones too
            put(d / "ex" / "101_ObjectCategories" / name / f"image_{k:04d}.jpg", data)
            # Which 30 of a class train is drawn by tfds.
            raw.expect("any", decoded(data), caltech101=names.index(name))
    return raw


def make_oxford_iiit_pet(d, rng):
    raw, lists = Raw({"images": d, "annotations": d}), {"train": [], "test": []}
    for i in range(74):
        name, split = f"Breed_{i % 37}_{i}", "test" if i % 2 else "train"
        data = jpeg(rng, 30, 40)
        put(d / "images" / f"{name}.jpg", data)
        mask = encode(noise(rng, 30, 40, 1), "PNG")
        put(d / "annotations" / "trimaps" / f"{name}.png", mask)
        lists[split].append(f"{name} {i % 37 + 1} {1 + i % 2} 1\n")
        raw.expect(split, decoded(data), oxford_iiit_pet=i % 37)
    (d / "annotations" / "xmls").mkdir()
    put(d / "annotations" / "trainval.txt", "".join(lists["train"]).encode())
    put(d / "annotations" / "test.txt", "".join(lists["test"]).encode())
    return raw


def make_patch_camelyon(d, rng):
    import h5py

    raw, n = Raw({}), 12
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        x, y = noise(rng, n, 96, 96 * 3).reshape(n, 96, 96, 3), np.arange(n) % 2
        for kind, array in (("x", x), ("y", y.astype(np.uint8).reshape(n, 1, 1, 1))):
            raw.result[f"{name}_{kind}"] = d / f"{name}_{kind}.h5"
            with h5py.File(d / f"{name}_{kind}.h5", "w") as f:
                f[kind] = array
        for picture, label in zip(x, y, strict=True):
            raw.expect(split, picture, patch_camelyon=label)
    return raw


def make_resisc45(d, rng):
    raw = Raw(d, manual=d)
    for label, name in enumerate(sorted(class_names("resisc45"))):
        for k in range(3):
            data = jpeg(rng, 256, 256)
            put(d / "NWPU-RESISC45" / name / f"{name}_{k:03d}.jpg", data)
            raw.expect("train", decoded(data), resisc45=label)
    return raw


def make_nabirds(d, rng):
    raw, lists = Raw(d, manual=d), ("images", "image_class_labels", "train_test_split")
    lines = {name: "" for name in lists}
    for k in range(2 * 555):
        label, train = k // 2, k % 2
        number, uuid = 2 + label + label // 3, f"{k:08x}-21dc-4d0c-bfe1-4cae3c85c829"
        path, data = f"{number:04d}/{uuid.replace('-', '')}.jpg", jpeg(rng, 12, 10)
        put(d / "nabirds" / "images" / path, data)
        for name, value in zip(lists, (path, number, train), strict=True):
            lines[name] += f"{uuid} {value}\n"
        raw.expect("train" if train else "test", decoded(data), nabirds=label)
    for name, text in lines.items():
        put(d / "nabirds" / f"{name}.txt", text.encode())
    return raw


def make_eurosat(d, rng):
    raw = Raw(d)
    for label, name in enumerate(sorted(class_names("eurosat/rgb"))):
        for k in range(10):
            data = jpeg(rng, 64, 64)
            put(d / "2750" / name / f"{name}_{k}.jpg", data)
            raw.expect("train", decoded(data), eurosat=label)
    return raw


def make_dmlab(d, rng):
    import tensorflow as tf

    def values(kind, value):
        return tf.train.Feature(**{kind: {"value": [value]}})

    raw = Raw(d)
    for split in ("train", "validation", "test"):
        path = d / f"dmlab-{split}.tfrecord-00000-of-00001"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for i in range(8):
                data = jpeg(rng, 360, 480)
                feature = {
                    "image": values("bytes_list", data),
                    "filename": values("bytes_list", f"{split}_{i}.jpg".encode()),
                    "label": values("int64_list", i % 6),
                }
                example = tf.train.Example(features={"feature": feature})
                writer.write(example.SerializeToString())
                raw.expect(split, decoded(data), dmlab=i % 6)
    return raw


def make_diabetic_retinopathy_detection(d, rng):
    raw = Raw(d / "retinopathy_solution.csv", manual=d)
    for folder in ("sample", "train", "test"):
        for i in range(10):
            eye = np.zeros((200, 260, 3), np.uint8)
            eye[10:190, 40:220] = rng.integers(60, 200, (180, 180, 3))
            put(d / folder / f"{i}_left.jpeg", encode(eye))
    labels = [f"{i}_left,{i % 5}" for i in range(10)]
    text = "\n".join(["image,level", *labels, ""])
    put(d / "trainLabels.csv", text.encode())
    # 'Public' is tfds' validation.
    usage = [
        f"{row},{'Public' if i < 4 else 'Private'}" for i, row in enumerate(labels)
    ]
    put(raw.result, "\n".join(["image,level,Usage", *usage, ""]).encode())
    names = {f"{i}_left": i % 5 for i in range(10)}
    raw.named = {
        "train": names,
        "validation": {k: v for i, (k, v) in enumerate(names.items()) if i < 4},
        "test": {k: v for i, (k, v) in enumerate(names.items()) if i >= 4},
    }
    return raw


def make_sun397(d, rng):
    names = class_names("sun397/tfds")
    lists = Path(tfds.__file__).parent / "image_classification"
    raw = Raw({"images": d / "SUN397.tar.gz", "partitions": d / "P"})
    (d / "P").mkdir()
    splits = {"train": "tr", "test": "te", "validation": "va"}
    with tarfile.open(d / "SUN397.tar.gz", "w:gz") as tar:
        for split, listed in splits.items():
            files = (lists / f"sun397_tfds_{listed}.txt").read_text().split()[:6]
            raw.named[split] = {}
            for file in files:
                add(tar, "SUN397" + file, encode(smooth(rng, 300, 500)))
                raw.named[split][file] = names.index(file.rpartition("/")[0])
    return raw


def make_caltech_birds2011(d, rng):
    archive = d / "CUB_200_2011.tgz"
    raw = Raw(
        [d / "ex", d / "seg"],
        download=lambda urls: [archive] if isinstance(urls, list) else archive,
    )
    rows = [
        (i + 1, f"{i % 200 + 1:03d}.Bird_{i % 200}/Bird_{i:04d}.jpg") for i in range(40)
    ]
    base = d / "ex" / "CUB_200_2011"
    columns = {"images": lambda i, file: file}
    columns |= {"train_test_split": lambda i, file: i % 2}
    columns |= {"bounding_boxes": lambda i, file: "2.0 3.0 10.0 9.0"}
    for name, column in columns.items():
        text = "".join(f"{i} {column(i, file)}\n" for i, file in rows)
        put(base / f"{name}.txt", text.encode())
    with tarfile.open(archive, "w:gz") as tar:
        for i, file in rows:
            data = jpeg(rng, 30, 40, grey=i % 10 == 0)  # eight of the real ones too
            add(tar, "CUB_200_2011/images/" + file, data)
            mask = encode(noise(rng, 30, 40, 1), "PNG")
            put(d / "seg" / "segmentations" / file.replace(".jpg", ".png"), mask)
            split = "train" if i % 2 else "test"
            raw.expect(split, decoded(data), cub=(i - 1) % 200)
    return raw


def make_stanford_dogs(d, rng):
    import scipy.io

    raw = Raw([d / "lists", d / "ann"], download=lambda urls: d / "images.tar")
    name = "n{0:08d}-dog_{0}/n{0:08d}_{1}.jpg"
    rows = [name.format(i % 120, i) for i in range(240)]
    lists = {"train": rows[:120], "test": rows[120:]}
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
    size = "<size><width>40</width><height>30</height></size>"
    text = f"<annotation>{size}<object>{box}</object></annotation>"
    (d / "lists").mkdir()
    with tarfile.open(d / "images.tar", "w") as tar:
        for split, files in lists.items():
            listed = {"file_list": np.array(files, dtype=object)}
            scipy.io.savemat(d / "lists" / f"{split}_list.mat", listed)
            for i, file in enumerate(files):
                data = jpeg(rng, 30, 40)
                add(tar, "Images/" + file, data)
                put(d / "ann" / "Annotation" / file[:-4], text.encode())
                raw.expect(split, decoded(data), dogs=i)
    return raw


def make_cars196(d, rng):
    import scipy.io

    raw, n = Raw({"extra": d / "extra"}), 30
    columns = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    for split in ("train", "test"):
        rows = np.zeros((1, n), [(name, "O") for name in columns])
        for i in range(n):
            label, file = (7 * i) % 196 + 1, f"{i + 1:05d}.jpg"
            data = jpeg(rng, 30, 40)
            put(d / split / f"cars_{split}" / file, data)
            rows[0, i] = (1, 1, 20, 20, label, file)
            raw.expect(split, decoded(data), cars=label - 1)
        path = d / "extra" / "devkit" / f"cars_{split}_annos.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(path, {"annotations": rows})
        raw.result[split] = d / split
    raw.result["test_annos"] = d / "extra" / "devkit" / "cars_test_annos.mat"
    return raw


MAKERS = {
    "caltech101": make_caltech101,
    "caltech_birds2011": make_caltech_birds2011,
    "cars196": make_cars196,
    "cifar100": make_cifar100,
    "clevr": make_clevr,
    "diabetic_retinopathy_detection/btgraham-300": make_diabetic_retinopathy_detection,
    "dmlab": make_dmlab,
    "dsprites": make_dsprites,
    "dtd": make_dtd,
    "eurosat/rgb": make_eurosat,
    "kitti": make_kitti,
    "nabirds": make_nabirds,
    "oxford_flowers102": make_oxford_flowers102,
    "oxford_iiit_pet": make_oxford_iiit_pet,
    "patch_camelyon": make_patch_camelyon,
    "resisc45": make_resisc45,
    "smallnorb": make_smallnorb,
    "stanford_dogs": make_stanford_dogs,
    "sun397/tfds": make_sun397,
    "svhn_cropped": make_svhn_cropped,
}
