# SPDX-License-Identifier: Apache-2.0
"""What was found under a `data_dir`, whatever its layout: names, labels, splits."""

import collections
import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpt_jax.data import pictures
from vpt_jax.data.bounds import MAX_TEXT, opened
from vpt_jax.files.messages import mismatch, printable

SPLITS = ("train", "val", "test")
NAMES = {  # of splits, however they are written
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
LAYOUTS = (
    "DIR/train/<class>/*, DIR/<class>/*, lists (DIR/train800.txt, DIR/train.txt or "
    "DIR/train.json), or an .npz file"
)
SEED = 1401  # of the cut: another one gives other splits
MAX_CLASSES = 1_000_000  # a label above is a mistake


class Example(NamedTuple):
    """One picture: where it is (for people), how its reader finds it, its label."""

    name: str
    source: Any
    label: int


# (source, side, rule) to the picture, or ValueError.
Read = Callable[[Any, int, str], np.ndarray]


class Found(NamedTuple):
    """What lies under a `data_dir`; nothing is decoded yet.

    Labels point into `class_names`, of which some may have no picture.
    """

    class_names: tuple[str, ...]
    splits: dict[str, list[Example]]
    open: Callable[[], Read]  # called once, if anything must be read
    key: Any  # what the content depends on, see `cache.cached`
    rule: str  # of resizing, unless another is asked for
    layout: str = ""  # where that is worth a word
    notes: tuple[str, ...] = ()  # what was left out, and what is odd


def split_of(name: str) -> str:
    """The split that a folder or a part of a file is named after, or nothing."""
    wanted = name.casefold()
    return next((s for s, names in NAMES.items() if wanted in names), "")


def relative(path: str | os.PathLike, root: Path) -> str:
    """Where a file lies, for people."""
    return printable(os.path.relpath(path, root))


def text(path: Path) -> str:
    """The content of a text file; ValueError if it is no UTF-8 or cannot be read."""
    try:
        with opened(os.fspath(path), MAX_TEXT) as data:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        got = f"no UTF-8 ({e.reason})"
        raise mismatch(path, got, "a text file in UTF-8", "save it again") from e
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def lines(path: Path) -> list[str]:
    """Lines of `text` that are not empty, without surrounding blanks."""
    return [line.strip() for line in text(path).splitlines() if line.strip()]


def of_files(
    root: Path, names: tuple[str, ...], splits: dict[str, list[Example]], rule: str
) -> Found:
    """Pictures that are files; the source of each is its path."""
    key = [os.path.realpath(root)]
    key += [stamp(e.name, e.source) for split in SPLITS for e in splits[split]]
    return Found(names, splits, lambda: _read_file, key, rule)


def stamp(name: str, path: str) -> list[Any]:
    """Changes when the file does."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return [name, -1, -1]  # reading it will say why
    return [name, status.st_size, status.st_mtime_ns]


def _read_file(path: str, side: int, rule: str) -> np.ndarray:
    with opened(path) as data:
        return pictures.decode(data, side, rule)


def name_classes(
    where: str, names: Sequence[str] | None, labels: Iterable[int], notes: list[str]
) -> tuple[tuple[str, ...], int]:
    """Names of classes, and what is to be taken off a label to find its name.

    Without `names` the numbers are the names. `notes` is told if labels count from 1.

    Raises:
      ValueError: If there are fewer names than labels, or a label is a mistake.
    """
    present = set(labels)
    low, top = min(present), max(present)
    if top >= MAX_CLASSES:
        below = f"labels below {MAX_CLASSES:,}"
        raise mismatch(where, f"label {top}", below, "count the classes from 0")
    if names is None:
        return tuple(map(str, range(top + 1))), 0
    first = int(low == 1 and top == len(names))
    if first:
        notes.append(f"labels count from 1: 1 is {printable(names[0])[:200]}")
    elif len(names) <= top:
        expected = f"{top + 1}, for labels from {low} to {top}"
        raise mismatch(where, f"{len(names)} names", expected, "add the missing ones")
    return tuple(map(printable, names)), first


def cut_examples(splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """Adds the splits that are missing, see `cut`."""
    missing = [split for split in ("val", "test") if split not in splits]
    if not missing:
        return splits
    groups: dict[Hashable, dict[str, Example]] = collections.defaultdict(dict)
    for number, example in enumerate(splits["train"]):
        group, name = groups[example.label], example.name
        # A picture that is listed twice is kept twice, as it was asked for.
        group[f"{name} {number}" if name in group else name] = example
    parts = {
        split: [groups[label][name] for label, name in pairs]
        for split, pairs in cut(groups, missing).items()
    }
    return splits | parts


def cut(
    groups: Mapping[Any, Mapping[str, Any]], missing: Sequence[str]
) -> dict[str, list[tuple[Any, str]]]:
    """Cuts the `missing` splits from train, a fifth of every class for each.

    A class of `n` pictures gives `n / 5` of them, rounded, at least one, but as few as
    it takes to leave it one to train on. Which ones is decided by a hash of `SEED` and
    the names of the class and the picture: not by the order of the files, the machine,
    or what is in other classes; and a picture added later moves few others.

    Returns:
      For "train" and each missing split, `(class, picture name)`, sorted.
    """

    def rank(pair: tuple[Any, str]) -> bytes:
        text = f"{SEED}/{pair[0]}/{pair[1]}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    out: dict[str, list[tuple[Any, str]]] = {split: [] for split in ("train", *missing)}
    for group, members in groups.items():
        order = sorted(((group, name) for name in members), key=rank)
        take = max(1, (2 * len(order) + 5) // 10)
        take = min(take, (len(order) - 1) // len(missing)) if missing else 0
        for k, split in enumerate(missing):
            out[split] += order[k * take : (k + 1) * take]
        out["train"] += order[len(missing) * take :]
    return {split: sorted(pairs) for split, pairs in out.items()}
