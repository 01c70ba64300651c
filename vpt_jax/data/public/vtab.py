# SPDX-License-Identifier: Apache-2.0
"""The 19 tasks of VTAB-1k and the fine-grained sets (FGVC) that VPT was tested on.

`BENCHMARKS` says of each which tensorflow-datasets builder holds it, how it is split,
what its label is, and what was published on it. `load` reads it from a directory that
tfds prepared. Nothing here downloads anything; `python -m vpt_jax.data` does.

Sources: splits, labels and versions are google-research/task_adaptation's (d7630d3) and
KMnP/vpt's (4410440). Prompts per layer and their shares of tuned parameters are those
of VPT's supplement; adapter_plus's are visinf/adapter_plus's `vpt.yaml` files, which
differ on four of the structured tasks: there, and on all eight, they are the lengths of
VPT-Shallow. Published accuracies are VPT's, ViT-B/16 supervised on ImageNet-21k, as the
README of synbol/Parameter-Efficient-Transfer-Learning-Benchmark prints them; three were
measured again by VPT's authors in their `demo.ipynb`. The download sizes are those that
tfds 4.9.10 has on record.
"""

import fnmatch
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpt_jax.data.public import labels, records
from vpt_jax.files.messages import advised, mismatch

NUM_TRAIN, NUM_VAL = 800, 200
GROUPS = ("natural", "specialized", "structured", "fgvc")
INSTALL = "pip install tensorflow h5py opencv-python-headless"
_WHOLE = "prepare the whole data set"


class Cut(NamedTuple):
    """A run of a tfds split, in whole percents of its examples, rounded down."""

    split: str
    skip: tuple[int, ...] = ()  # percents, each rounded down, that come before it
    take: int | None = None  # percent; None takes the rest


class Accuracies(NamedTuple):
    """Published top-1 test accuracies in %."""

    full: float
    linear: float
    shallow: float
    deep: float


class Source(NamedTuple):
    """A tfds data set, and how VTAB or VPT splits it."""

    name: str  # of the builder, with its config where it has one
    versions: tuple[str, ...]  # patterns of those accepted; the newest comes first
    sizes: dict[str, int]  # published number of examples of each split
    cuts: tuple[Cut, Cut, Cut]  # train, val, test
    download: str  # how large, in words
    manual: str = ""  # what to fetch by hand; '' where tfds fetches it
    files: tuple[str, ...] = ()  # which are then in the folder for manual downloads
    own: bool = False  # the builder is ours (`builders.py`) and needs no TensorFlow


class Run(NamedTuple):
    """Examples `start` to `stop` of a tfds split."""

    split: str
    start: int
    stop: int


class Benchmark(NamedTuple):
    """A data set with a label, and what is known of it."""

    name: str
    group: str  # one of GROUPS
    source: Source
    classes: int
    prompts: int  # per layer, of VPT-Deep
    tuned_percent: float  # published share of tuned parameters with `prompts`
    published: Accuracies
    label: Callable[[labels.Example], int] = labels.stored("label")
    picture: Callable[[labels.Example], np.ndarray] = labels.picture


_PERCENT_90 = Cut("train", (), 90), Cut("train", (90,)), Cut("test")
_PERCENT_80 = Cut("train", (), 80), Cut("train", (80,)), Cut("test")
_OFFICIAL = Cut("train"), Cut("validation"), Cut("test")
_PERCENT_60_20 = Cut("train", (), 60), Cut("train", (60,), 20), Cut("train", (60, 20))
_PERCENT_80_10 = Cut("train", (), 80), Cut("train", (80,), 10), Cut("train", (80, 10))
_CLEVR_CUTS = Cut("train", (), 90), Cut("train", (90,)), Cut("validation")
_NORB_CUTS = Cut("train"), Cut("test", (), 50), Cut("test", (50,))

# Builder, versions, published sizes; cuts and download; what is fetched by hand.
# fmt: off
_CIFAR100 = Source("cifar100", ("3.*.*",), {"train": 50000, "test": 10000},
                   _PERCENT_90, "170 MB")
_CALTECH101 = Source("caltech101", ("3.*.*",), {"train": 3059, "test": 6084},
                     _PERCENT_90, "140 MB")
_DTD = Source("dtd", ("3.*.*",), {"train": 1880, "validation": 1880, "test": 1880},
              _OFFICIAL, "630 MB")
_FLOWERS = Source("oxford_flowers102", ("2.*.*",),
                  {"train": 1020, "validation": 1020, "test": 6149},
                  _OFFICIAL, "350 MB")
# VTAB asks for 3.*.*, which tfds no longer prepares.
_PETS = Source("oxford_iiit_pet", ("4.*.*", "3.*.*"), {"train": 3680, "test": 3669},
               _PERCENT_80, "810 MB")
# VPT had 3.0.0. The split 'extra', most of the download, is not used.
_SVHN = Source("svhn_cropped", ("3.*.*",),
               {"train": 73257, "test": 26032, "extra": 531131},
               _PERCENT_90, "1.6 GB")
_SUN397 = Source("sun397/tfds", ("4.*.*",),
                 {"train": 76128, "validation": 10875, "test": 21750},
                 _OFFICIAL, "39 GB")
_CAMELYON = Source("patch_camelyon", ("2.*.*",),
                   {"train": 262144, "validation": 32768, "test": 32768},
                   _OFFICIAL, "8 GB")
_EUROSAT = Source("eurosat/rgb", ("2.*.*",), {"train": 27000},
                  _PERCENT_60_20, "94 MB")
_RESISC45 = Source("resisc45", ("3.*.*",), {"train": 31500},
    _PERCENT_60_20, "31,500 JPEG pictures in one archive, by hand",
    "fetch NWPU-RESISC45.rar from https://1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs and "
    "unpack it, so that there is NWPU-RESISC45/airport/airport_001.jpg",
    ("NWPU-RESISC45",))
_RETINOPATHY = Source("diabetic_retinopathy_detection/btgraham-300", ("3.*.*",),
    {"sample": 10, "train": 35126, "validation": 10906, "test": 42670},
    _OFFICIAL, "more than 35 GB (the training pictures alone are 35), by hand",
    "fetch the files of https://www.kaggle.com/c/diabetic-retinopathy-detection/data "
    "and unpack them: the folders sample, train and test with .jpeg files, and "
    "trainLabels.csv",
    ("sample", "train", "test", "trainLabels.csv"))
# 3.0.0 is 3.1.0 without questions and answers. The test split has no annotations.
_CLEVR = Source("clevr", ("3.*.*",),
                {"train": 70000, "validation": 15000, "test": 15000},
                _CLEVR_CUTS, "19 GB")
_DMLAB = Source("dmlab", ("2.*.*",),
                {"train": 65550, "validation": 22628, "test": 22735},
                _OFFICIAL, "3 GB")
# VTAB asks for 3.1.0, VPT for 3.2.0.
_KITTI = Source("kitti", ("3.3.*", "3.2.*"),
                {"train": 6347, "validation": 423, "test": 711},
                _OFFICIAL, "12.6 GB")
_DSPRITES = Source("dsprites", ("2.*.*",), {"train": 737280},
                   _PERCENT_80_10, "28 MB")
_SMALLNORB = Source("smallnorb", ("2.*.*",), {"train": 24300, "test": 24300},
                    _NORB_CUTS, "260 MB")
# VPT's lists of train and val are lost: the first 90 %, rounded down, and the rest have
# their sizes. tfds has shuffled the examples already, by a hash of their keys.
_CUB = Source("caltech_birds2011", ("0.2.*", "0.1.*"), {"train": 5994, "test": 5794},
              _PERCENT_90, "1.2 GB")
# tfds has no builder for it.
_NABIRDS = Source("nabirds", ("1.*.*",), {"train": 23929, "test": 24633},
    _PERCENT_90, "48,562 JPEG pictures in one archive, by hand",
    "ask the Cornell Lab of Ornithology for the archive at "
    "https://dl.allaboutbirds.org/nabirds and unpack it, so that there is "
    "nabirds/images.txt",
    ("nabirds",), own=True)
_DOGS = Source("stanford_dogs", ("0.2.*",), {"train": 12000, "test": 8580},
               _PERCENT_90, "820 MB")
_CARS = Source("cars196", ("2.*.*",), {"train": 8144, "test": 8041},
    _PERCENT_90, "2 GB",
    "the publisher's addresses are dead (tensorflow/datasets#5656): get from elsewhere "
    "cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat, "
    "unchanged, as tfds compares checksums",
    ("cars_train.tgz", "cars_test.tgz", "car_devkit.tgz",
     "cars_test_annos_withlabels.mat"))

# Of each group: name, source, classes; prompts per layer of VPT-Deep and tuned %;
# accuracies of full, linear, shallow, deep; label and picture where they are derived.
_TABLE: dict[str, tuple[tuple[Any, ...], ...]] = {
    "natural": (
        ("cifar100", _CIFAR100, 100, 10, 0.20, (68.9, 63.4, 77.7, 78.8)),
        ("caltech101", _CALTECH101, 102, 10, 0.20, (87.7, 85.0, 86.9, 90.8)),
        ("dtd", _DTD, 47, 10, 0.15, (64.3, 63.2, 62.6, 65.8)),
        ("oxford_flowers102", _FLOWERS, 102, 1, 0.10, (97.2, 97.0, 97.5, 98.0)),
        ("oxford_iiit_pet", _PETS, 37, 1, 0.04, (86.9, 86.3, 87.3, 88.3)),
        ("svhn", _SVHN, 10, 50, 0.54, (87.4, 36.6, 74.5, 78.1)),
        ("sun397", _SUN397, 397, 5, 0.41, (38.8, 51.0, 51.2, 49.6)),
    ),
    "specialized": (
        ("patch_camelyon", _CAMELYON, 2, 100, 1.06, (79.7, 78.5, 78.2, 81.8)),
        ("eurosat", _EUROSAT, 10, 100, 1.07, (95.7, 87.5, 92.0, 96.1)),
        ("resisc45", _RESISC45, 45, 10, 0.15, (84.2, 68.6, 75.6, 83.4)),
        ("diabetic_retinopathy", _RETINOPATHY, 5, 1, 0.02, (73.9, 74.0, 72.9, 68.4)),
    ),
    "structured": (
        ("clevr_count", _CLEVR, 8, 50, 0.54, (56.3, 34.3, 50.5, 68.5),
         labels.clevr_count),
        ("clevr_distance", _CLEVR, 6, 200, 2.11, (58.6, 30.6, 58.6, 60.0),
         labels.clevr_distance),
        ("dmlab", _DMLAB, 6, 100, 1.07, (41.7, 33.2, 40.5, 46.5)),
        ("kitti_distance", _KITTI, 4, 50, 0.54, (65.5, 55.4, 67.1, 72.8),
         labels.kitti_distance),
        ("dsprites_location", _DSPRITES, 16, 10, 0.12, (57.5, 12.5, 68.7, 73.6),
         labels.binned("label_x_position", 32, 16), labels.binary_picture),
        ("dsprites_orientation", _DSPRITES, 16, 50, 0.55, (46.7, 20.0, 36.1, 47.9),
         labels.binned("label_orientation", 40, 16), labels.binary_picture),
        ("smallnorb_azimuth", _SMALLNORB, 18, 200, 2.12, (25.7, 9.6, 20.2, 32.9),
         labels.stored("label_azimuth")),
        ("smallnorb_elevation", _SMALLNORB, 9, 200, 2.11, (29.1, 19.2, 34.1, 37.8),
         labels.stored("label_elevation")),
    ),
    "fgvc": (
        ("cub", _CUB, 200, 10, 0.29, (87.3, 85.3, 86.7, 88.5)),
        ("nabirds", _NABIRDS, 555, 50, 1.02, (82.7, 75.9, 78.8, 84.2)),
        ("flowers", _FLOWERS, 102, 5, 0.14, (98.8, 97.9, 98.4, 99.0)),
        ("dogs", _DOGS, 120, 100, 1.17, (89.4, 86.2, 90.7, 90.2)),
        ("cars", _CARS, 196, 200, 2.27, (84.5, 51.3, 68.7, 83.6)),
    ),
}
# fmt: on

BENCHMARKS: dict[str, Benchmark] = {
    name: Benchmark(name, group, source, num, prompts, percent, Accuracies(*of), *rules)
    for group, rows in _TABLE.items()
    for name, source, num, prompts, percent, of, *rules in rows
}
"""Name to task: the 19 of VTAB-1k, then CUB, NABirds, Flowers, Dogs and Cars; both in
VPT's order."""


def _bounds(cut: Cut, sizes: Mapping[str, int]) -> tuple[int, int]:
    size = sizes[cut.split]
    start = sum(size * percent // 100 for percent in cut.skip)
    return start, size if cut.take is None else start + size * cut.take // 100


def part_runs(
    benchmark: Benchmark, sizes: Mapping[str, int] | None = None
) -> dict[str, Run]:
    """The parts of a benchmark, in numbers of examples of tfds' splits.

    VTAB-1k trains on the first 800 examples of `train`, chooses on the first 200 of
    `val`, trains again on the two together, and reports on the whole of `test`.

    Args:
      benchmark: A row of `BENCHMARKS`.
      sizes: The number of examples of each tfds split; the published ones when None.

    Returns:
      A run for `train`, `val` and `test` and, for VTAB, for `train800` and `val200`;
      the latter not where there are too few examples, as a test's set may have.

    Raises:
      ValueError: If `sizes` lacks a split, or it is too small to be cut.
    """
    source = benchmark.source
    sizes = source.sizes if sizes is None else sizes
    needed = {cut.split for cut in source.cuts}
    if not needed <= set(sizes):
        got, remedy = f"splits {sorted(sizes)}", "prepare the data set again"
        raise mismatch(benchmark.name, got, str(sorted(needed)), remedy)
    train, val, test = (Run(cut.split, *_bounds(cut, sizes)) for cut in source.cuts)
    if any(run.start >= run.stop for run in (train, val, test)):
        expected = f"those of {source.sizes}, which can be cut"
        raise mismatch(benchmark.name, f"splits of {dict(sizes)}", expected, _WHOLE)
    parts = {"train": train, "val": val, "test": test}
    enough = train.stop - train.start >= NUM_TRAIN and val.stop - val.start >= NUM_VAL
    if benchmark.group != "fgvc" and enough:
        parts["train800"] = train._replace(stop=train.start + NUM_TRAIN)
        parts["val200"] = val._replace(stop=val.start + NUM_VAL)
    return parts


def data_dirs(data_dir: str = "") -> list[Path]:
    """Where prepared data sets are looked for: in `data_dir` alone, if given.

    Else in `$TFDS_DATA_DIR`, if set, and in `~/tensorflow_datasets`.
    """
    if data_dir:
        return [Path(data_dir).expanduser()]
    folders = os.environ.get("TFDS_DATA_DIR", ""), "~/tensorflow_datasets"
    return [Path(folder).expanduser() for folder in folders if folder]


def manual_folder(data_dir: str = "") -> Path:
    """Where tfds looks for what was fetched by hand."""
    return data_dirs(data_dir)[0] / "downloads" / "manual"


def versions(folder: Path) -> list[str]:
    """The versions prepared under a folder, the newest first."""
    names = [path.parent.name for path in folder.glob("*/dataset_info.json")]
    names = [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    return sorted(names, key=lambda name: [int(x) for x in name.split(".")])[::-1]


def find(benchmark: Benchmark, data_dir: str = "") -> Path:
    """The directory of the newest accepted version of a prepared data set.

    Raises:
      ValueError: If there is none in `data_dirs`; it says how to prepare one.
    """
    other = []
    for root in data_dirs(data_dir):
        folder = root / benchmark.source.name
        found = versions(folder)
        for pattern in benchmark.source.versions:
            for version in found:
                if fnmatch.fnmatchcase(version, pattern):
                    return folder / version
        other += [str(folder / version) for version in found]
    raise advised(*_missing(benchmark, data_dir, other))


def prepare_command(benchmark: Benchmark, data_dir: str = "") -> str:
    """The shell command that prepares the data set of a benchmark."""
    command = f"python -m vpt_jax.data prepare {benchmark.name}"
    where = os.fspath(Path(data_dir).expanduser())
    return f"{command} --data_dir={shlex.quote(where)}" if data_dir else command


def _missing(benchmark: Benchmark, data_dir: str, other: Sequence[str]) -> list[str]:
    source, roots = benchmark.source, data_dirs(data_dir)
    got = f"only {', '.join(other)}" if other else "no prepared copy"
    where = " or ".join(str(root / source.name) for root in roots)
    lines = [
        f"{benchmark.name}: got {got} of {source.name!r} in {where}; expected "
        f"version {' or '.join(source.versions)}. Download: {source.download}."
    ]
    if source.manual:
        place = manual_folder(data_dir)
        lines.append(f"By hand: {source.manual}. These go to {place}.")
    if source.own:
        lines.append("Prepare it once:")
    else:
        lines.append("Prepare it once, in any environment; only this needs TensorFlow:")
        lines.append(f"  {INSTALL}")
    return [*lines, f"  {prepare_command(benchmark, data_dir)}"]


class Pictures:
    """Pictures uint8 `[h, w, 3]` of any size with labels, read when asked for."""

    def __init__(self, benchmark: Benchmark, examples: records.Examples):
        self._benchmark = benchmark
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        row, example = self._benchmark, self._examples[i]
        where = f"{row.name}, example {i}"
        try:
            picture, label = row.picture(example), row.label(example)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
        if not 0 <= label < row.classes:
            expected, again = f"0 to {row.classes - 1}", "prepare the data set again"
            raise mismatch(where, f"label {label}", expected, again)
        return picture, label


def load(benchmark: Benchmark, part: str, *, data_dir: str = "") -> Pictures:
    """Opens a part of a benchmark that tfds has prepared; imports no TensorFlow.

    Raises:
      ValueError: If the data set is missing, damaged or has too few examples.
    """
    directory = find(benchmark, data_dir)
    sizes = records.split_sizes(directory)
    run = part_runs(benchmark, sizes).get(part)
    if not run:
        got = f"splits of {dict(sizes)}, too few examples for {part!r}"
        raise mismatch(directory, got, str(benchmark.source.sizes), _WHOLE)
    expression = f"{run.split}[{run.start}:{run.stop}]"
    return Pictures(benchmark, records.open_split(directory, expression))
