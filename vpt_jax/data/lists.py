# SPDX-License-Identifier: Apache-2.0
"""Lists of pictures and labels: `path label` a line, JSON, or those of CUB.

A list in JSON is an object of paths and labels, as VPT has it, or pairs of them; labels
are numbers, or names of classes. CUB_200_2011 and NABirds have a line for each number
of a picture: `images.txt` a path below `images/`, `image_class_labels.txt` the number
of a class, `train_test_split.txt` 1 for train, else 0.
"""

import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vpt_jax.data import found, layouts
from vpt_jax.data.found import relative, text
from vpt_jax.files.messages import mismatch, printable, reason

CUB = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
AGAIN = "unpack the publisher's archive again"
_FIRST = {"train": ("train800.txt", "train800val200.txt"), "val": ("val200.txt",)}
_DIGITS = 20  # of a label; a longer one is a mistake
_PLACES = ("", "images", "Images")  # that paths may be relative to
_NUMBERED = re.compile(r"(\d{1,9})\s+(.+)")  # a line of CUB's classes.txt

Row = tuple[str, Any, str]  # path as listed, label, path to open


def lists_of(root: Path) -> dict[str, list[Path]]:
    """Split to its lists, the first of which counts; empty if train has none."""
    others = layouts.listing(os.fspath(root)).others
    by_name: dict[str, Path] = {}
    for path in (Path(path) for _, path in others if os.path.isfile(path)):
        twin = by_name.setdefault(path.name.casefold(), path)
        if twin != path and path.suffix.lower() in (".txt", ".json"):
            got = f"{printable(twin.name)} and {printable(path.name)}"
            raise mismatch(root, got, "one of them", "move the other away")
    lists = {}
    for split, words in found.NAMES.items():
        names = [word + end for end in (".txt", ".json") for word in words]
        names = [*_FIRST.get(split, ()), *names]
        if paths := [by_name[name] for name in names if name in by_name]:
            lists[split] = paths
    return lists if "train" in lists else {}


def recognised(root: Path) -> bool:
    """Whether lists say which pictures there are."""
    return bool(lists_of(root)) or all((root / name).is_file() for name in CUB)


def find(root: Path, notes: list[str]) -> found.Found:
    """The pictures that lists name; `notes` is told what was not used.

    Raises:
      ValueError: If a list is not well-formed, or names lack for labels.
    """
    files = lists_of(root)
    if files:
        said = f"lists: {', '.join(paths[0].name for paths in files.values())}"
        rest = [p.name for paths in files.values() for p in paths[1:]]
        if rest:
            notes.append(f"lists that are not used: {', '.join(rest)}")
        rows = {split: _rows(root, paths[0]) for split, paths in files.items()}
        names = _number(root, rows, notes)
    else:
        said, names, rows = "lists: those of CUB_200_2011", *_cub_rows(root)
    splits = {
        split: [found.Example(name, path, label) for name, label, path in some]
        for split, some in rows.items()
    }
    splits = found.cut_examples(splits)
    return found.of_files(root, names, splits, "squash")._replace(layout=said)


def _number(
    root: Path, rows: dict[str, list[Row]], notes: list[str]
) -> tuple[str, ...]:
    """Makes the labels of all rows numbers from 0; the classes' names."""
    labels = {label for some in rows.values() for _, label, _ in some}
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        got = "labels that are numbers, and others that are names"
        raise mismatch(root, got, "one kind", "use numbers from 0 in all lists")
    written = _class_lines(root)
    numbered = _numbered(written or [])
    if kinds == {str}:
        new = {name: k for k, name in enumerate(sorted(labels))}
        known = tuple(printable(name)[:500] for name in new)
    elif labels <= numbered.keys():
        new = {number: k for k, number in enumerate(numbered)}
        known = tuple(map(printable, numbered.values()))
    else:
        where = os.fspath(root / "classes.txt")
        known, first = found.name_classes(where, written, labels, notes)
        new = {label: label - first for label in labels}
    for split, some in rows.items():
        rows[split] = [(name, new[label], path) for name, label, path in some]
    return known


def _class_lines(root: Path) -> list[str] | None:
    file = root / "classes.txt"
    return found.lines(file) if file.is_file() else None


def _numbered(written: list[str]) -> dict[int, str]:
    """Number to name, if every line begins with another number, as CUB's do."""
    pairs = [_NUMBERED.fullmatch(line) for line in written]
    names = {int(pair[1]): pair[2] for pair in pairs if pair}
    return names if len(names) == len(written) else {}


def _rows(root: Path, path: Path) -> list[Row]:
    pairs = _json_pairs if path.suffix.lower() == ".json" else _text_pairs
    rows = []
    for where, name, label in pairs(path):
        if "\\" in name and not os.path.lexists(_place(root, name)):
            name = name.replace("\\", "/")  # of a list that Windows wrote
        if name.startswith("/") or ".." in name.split("/"):
            remedy = "move the pictures there, or link to them"
            raise mismatch(path, where, f"a path inside of {root}", remedy)
        rows.append((printable(name)[:500], label, _place(root, name)))
    if not rows:
        remedy = "remove the file to have the split cut from train"
        raise mismatch(path, "no lines", "`path label` in each", remedy)
    return rows


def _label(text: str) -> int | None:
    """A number from 0 that somebody can mean."""
    return int(text) if text.isdecimal() and len(text) < _DIGITS else None


def _text_pairs(path: Path) -> Iterator[tuple[str, str, int]]:
    """Where, path and label of every line."""
    for number, line in enumerate(found.lines(path), start=1):
        name, _, text = line.replace("\t", " ").rpartition(" ")
        where, label = f"line {number} {line[:200]!r}", _label(text)
        if not name.strip() or label is None or "\0" in name:
            expected = "`path label`, the label a number from 0"
            raise mismatch(path, where, expected, "correct it")
        yield where, name.strip(), label


def _json_pairs(path: Path) -> Iterator[tuple[str, str, int | str]]:
    """Where, path and label of every pair."""
    expected, content = "an object of paths and labels from 0", text(path)
    try:
        # As pairs: of a path that is there twice, an object would keep one.
        pairs = json.loads(content, object_pairs_hook=list)
    except (ValueError, RecursionError) as e:
        raise mismatch(path, f"no JSON ({reason(e)})", expected, "correct it") from e
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs], 1):
        whole = isinstance(pair, list | tuple) and len(pair) == 2
        name, label = pair if whole else ("", "")
        where = f"entry {number} {repr(pair)[:200]}"
        if isinstance(label, str):
            value = _label(label)
            label = label if value is None else value
        good = isinstance(label, str) or (type(label) is int and label >= 0)
        if not good or not isinstance(name, str) or not name or "\0" in name:
            raise mismatch(path, where, expected, "correct it")
        yield where, name, label


def _place(root: Path, name: str) -> str:
    """The path to open, in whichever form of Unicode the disk has it."""
    forms = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    pairs = itertools.product(forms[:1] if name.isascii() else forms, _PLACES)
    places = [root / sub / form for form, sub in pairs]
    return os.fspath(next((p for p in places if os.path.lexists(p)), places[0]))


class Picture(NamedTuple):
    """A picture of the lists of CUB or NABirds."""

    path: Path
    label: int  # counted from 0, in the order of the classes' numbers
    train: bool


def read_cub(folder: Path) -> tuple[dict[str, Picture], list[int]]:
    """Reads the lists of CUB or NABirds in `folder`; pictures are not looked for.

    Returns:
      A picture's number to it, and the classes' numbers in the order of labels.

    Raises:
      ValueError: If a file is missing or has a line of another form, or the files are
        about different pictures.
    """
    files = [folder / name for name in CUB]
    paths = _table(files[0], "a path below images/", _path)
    ids = _table(files[1], "a class id", int)
    train = _table(files[2], "0 or 1", {"0": False, "1": True}.__getitem__)
    for other, table in ((files[1], ids), (files[2], train)):
        if differing := sorted(paths.keys() ^ table.keys()):
            got = (
                f"{len(table)} uuids, {len(differing)} of them or of {len(paths)} in "
                f"images.txt without counterpart, such as {differing[0][:200]!r}"
            )
            raise mismatch(other, got, "the same in both", AGAIN)
    # By number: as text, '1003' would come before '295'.
    numbers = sorted(set(ids.values()))
    order = {number: k for k, number in enumerate(numbers)}
    pictures = {
        uuid: Picture(folder / "images" / path, order[ids[uuid]], train[uuid])
        for uuid, path in paths.items()
    }
    return pictures, numbers


def _table(path: Path, kind: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Picture's number to value, of a file of lines `number value`."""
    try:
        written = text(path).splitlines()
    except ValueError as e:
        raise ValueError(f"{e} Or {AGAIN}.") from e
    table = {}
    for number, line in enumerate(written, 1):
        uuid, _, rest = line.strip().partition(" ")
        where = f"{path}:{number}"
        try:
            value = parse(rest)
        except (KeyError, ValueError) as e:
            raise mismatch(where, repr(line[:200]), f"a uuid and {kind}", AGAIN) from e
        if uuid in table:
            raise mismatch(where, f"uuid {uuid[:200]} again", "it once", AGAIN)
        table[uuid] = value
    return table


def _path(rest: str) -> str:
    path = PurePosixPath(rest)
    if not rest or path.is_absolute() or ".." in path.parts or "\0" in rest:
        raise ValueError(rest)
    return rest


def _cub_rows(root: Path) -> tuple[tuple[str, ...], dict[str, list[Row]]]:
    pictures, numbers = read_cub(root)
    known = _numbered(_class_lines(root) or [])
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for path, label, train in pictures.values():
        name = relative(path, root)[:500]
        rows["train" if train else "test"].append((name, label, os.fspath(path)))
    return tuple(printable(known.get(n, str(n))) for n in numbers), rows
