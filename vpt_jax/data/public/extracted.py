# SPDX-License-Identifier: Apache-2.0
"""VTAB-1k as most PETL code has it: a folder of pictures and lists for each task.

`vtab-1k/NAME/{train800,val200,train800val200,test}.txt` with lines `path label`, where
some names are shorter than VTAB's. No tensorflow-datasets is needed.
"""

from collections.abc import Iterable
from pathlib import Path

from vpt_jax.data import folder, lists
from vpt_jax.data.public import vtab
from vpt_jax.files.messages import mismatch

SHORT = {
    "cifar100": "cifar",
    "clevr_distance": "clevr_dist",
    "kitti_distance": "kitti",
    "dsprites_location": "dsprites_loc",
    "dsprites_orientation": "dsprites_ori",
    "smallnorb_azimuth": "smallnorb_azi",
    "smallnorb_elevation": "smallnorb_ele",
}


def find(task: str, data_dir: str) -> Path | None:
    """The folder of a task's lists in `data_dir`, under either name; None if not there.

    Of `task="cifar100"`, `data_dir/cifar100` or `data_dir/cifar`.
    """
    if not data_dir or vtab.BENCHMARKS[task].group == "fgvc":
        return None
    root = Path(data_dir).expanduser()
    places = (root / name for name in (task, SHORT.get(task, task)))
    # tfds' folders have a version below, and no lists.
    return next((p for p in places if p.is_dir() and lists.lists_of(p)), None)


def missing(tasks: Iterable[str], data_dir: str) -> list[str]:
    """Tasks that lack where others are extracted; none where no task is."""
    known = [task for task in tasks if task in vtab.BENCHMARKS]
    lacking = [task for task in known if not find(task, data_dir)]
    return lacking if len(lacking) < len(known) else []


def load(task: str, where: Path, side: int, rule: str) -> folder.Loaded:
    """The pictures of a task in the folder `where`, checked against VTAB-1k.

    Raises:
      ValueError: If there are not 800 pictures to train on and 200 to choose on, or
        classes lack; or as `folder.load`.
    """
    found = folder.load(str(where), side, rule=rule)
    row = vtab.BENCHMARKS[task]
    train, val, test = (len(found.splits[s][1]) for s in folder.SPLITS)
    num = len(found.class_names)
    if (train, val, num) != (vtab.NUM_TRAIN, vtab.NUM_VAL, row.classes):
        got = f"{train} pictures to train on, {val} to choose on, of {num} classes"
        remedy = "look whether all of its lists are there"
        raise mismatch(where, got, f"800 and 200, of {row.classes}", remedy)
    run = vtab.part_runs(row)["test"]
    if test == run.stop - run.start:
        return found
    doubt = (
        f"{test:,} test pictures and not {run.stop - run.start:,}, so that accuracies"
        " are not those of the published test set"
    )
    return found._replace(doubts=(*found.doubts, doubt))
