# SPDX-License-Identifier: Apache-2.0
"""Class folders: which there are, and what lies beside the pictures."""

import collections
import functools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vpt_jax.data import pictures
from vpt_jax.data.found import (
    SPLITS,
    Example,
    Found,
    cut,
    of_files,
    relative,
    shown,
    split_of,
)
from vpt_jax.files.messages import mismatch, printable

LAYOUTS = (
    "DIR/train/<class>/*, DIR/<class>/*, lists (DIR/train800.txt, DIR/train.txt or "
    "DIR/train.json), or an .npz file"
)
# Folders that systems leave behind: whatever lies in them is nobody's class.
_LITTER = frozenset(
    "__macosx/@eadir/lost+found/#recycle/#snapshot/$recycle.bin"
    "/system volume information".split("/")
)
_HIDDEN, _LEFT, _OUTSIDE = "hidden", "left behind by a system", "not in a class folder"
# A split's name among others, such as `cars_train`, `test_images` or `val2017`.
_SPLIT_WORD = re.compile(
    r"(?<![a-z])(train(ing)?|val(id(ation)?)?|test(ing)?)(?![a-z])", re.IGNORECASE
)
# Of folders that hold all pictures, whatever their class.
_ALL = frozenset("images imgs jpegimages jpeg jpg".split())
_LOOKED_AT = 10_000  # files, for a message


class Listing(NamedTuple):
    """What is in one folder: pictures and folders by name, and why others are none."""

    pictures: dict[str, str]
    folders: dict[str, str]
    others: list[tuple[str, str]]  # why, path


Look = Callable[[str], Listing]


def listing(path: str) -> Listing:
    """Lists a folder.

    Raises:
      ValueError: If it cannot be listed.
    """
    found = Listing({}, {}, [])
    try:
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as e:
        raise ValueError(
            f"{printable(path)}: cannot be listed ({e.strerror}); expected a folder "
            "that you may read; check its permissions."
        ) from e
    for entry in entries:
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            found.others.append((_HIDDEN, entry.path))
        elif os.path.isdir(entry.path):
            if entry.name.casefold() in _LITTER:
                found.others.append((_LEFT, entry.path))
            else:
                found.folders[entry.name] = entry.path
        elif extension in pictures.EXTENSIONS:
            found.pictures[entry.name] = entry.path
        else:
            kind = printable(extension)[:20] or "without an extension"
            found.others.append((f"named {kind}", entry.path))
    return found


def _deeper(path: str, look: Look) -> list[str]:
    """The folders in a folder that have pictures: it may be one of classes."""
    return [name for name, sub in look(path).folders.items() if look(sub).pictures]


def recognised(root: Path) -> bool:
    """Whether there are pictures in class folders."""
    look = functools.cache(listing)
    folders = look(os.fspath(root)).folders
    return any(
        look(path).pictures or (split_of(name) and _deeper(path, look))
        for name, path in folders.items()
    )


def refuse_other_splits(root: Path, names: Iterable[str]) -> None:
    """Raises if folders are called as splits are, and by more: they are no classes.

    One alone may be a class (`steam_train`); of two that differ in the split's name
    alone (`cars_train`, `cars_test`) it is known.

    Raises:
      ValueError: It names them.
    """
    alike: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in names:
        if not split_of(name) and (word := _SPLIT_WORD.search(name)):
            rest = f"{name[: word.start()]}/{name[word.end() :]}".casefold()
            alike[rest][split_of(word[0])] = name
    for found in alike.values():
        if len(found) > 1:
            raise ValueError(
                f"{root}: got folders {shown(list(map(printable, found.values())))}, "
                f"which are called like splits; expected {', '.join(SPLITS)}, with a "
                "folder for each class in them; rename them, and sort the pictures "
                "into classes if they are not, or write lists (train.txt with `path "
                "label` a line)."
            )


def refuse_one_too_deep(root: Path, folders: list[Path]) -> None:
    """Raises if each folder holds its pictures in one of its own: `<class>/images/*`.

    Raises:
      ValueError: It names them.
    """
    look = functools.cache(listing)
    inside = [_deeper(os.fspath(folder), look) for folder in folders]
    if all(len(names) == 1 for names in inside):
        places = [f / names[0] for f, names in zip(folders, inside, strict=True)]
        deep = shown([relative(place, root) for place in places])
        got = f"pictures one folder too deep, in {deep}"
        raise mismatch(root, got, LAYOUTS, "move them up into their class folders")


def find(root: Path, notes: list[str]) -> Found:
    """Pictures in class folders, with or without folders of splits around these.

    Args:
      root: The folder.
      notes: Is told what was not taken.

    Raises:
      ValueError: If there are none, train is missing, or it is not clear which folders
        are classes.
    """
    look = functools.cache(listing)
    where = _split_folders(root, look)
    ignored: dict[str, list[str]] = collections.defaultdict(list)
    if where:
        top = look(os.fspath(root))
        outside = {*top.pictures.values(), *top.folders.values()}
        outside |= {path for _, path in top.others}
        for path in sorted(outside - set(where.values())):
            ignored["outside of the splits"].append(relative(path, root))
    folders = where or {"train": os.fspath(root)}
    have = [split for split in SPLITS if split in folders]
    groups = {
        split: _classes(root, folders[split], look, ignored, notes) for split in have
    }
    notes += [
        f"not taken, {why}: {len(found):,} ({shown(sorted(found))})"
        for why, found in sorted(ignored.items())
    ]
    if not any(groups["train"].values()):
        raise nothing(root, " of train" if where else "")
    full = sorted(name for name, group in groups["train"].items() if group)
    if len(full) > 1 and (whole := [n for n in full if n.casefold() in _ALL]):
        got = f"folders {shown(list(map(printable, full)))}, of which {shown(whole)}"
        remedy = "give the folder of the classes, or write lists"
        raise mismatch(root, f"{got} is no name of a class", LAYOUTS, remedy)
    names = tuple(sorted({name for split in have for name in groups[split]}))
    label = {name: k for k, name in enumerate(names)}
    chosen = cut(groups["train"], [s for s in ("val", "test") if s not in have])
    for split in have[1:]:
        chosen[split] = sorted(
            (c, p) for c, some in groups[split].items() for p in some
        )
    splits = {}
    for split, pairs in chosen.items():
        source = groups[split if split in have else "train"]
        paths = [(source[c][p], label[c]) for c, p in pairs]
        splits[split] = [Example(relative(p, root), p, k) for p, k in paths]
    return of_files(root, tuple(map(printable, names)), splits, "crop")


def _split_folders(root: Path, look: Look) -> dict[str, str]:
    """Split to its folder; nothing if folders of classes lie in `root` itself."""
    folders = look(os.fspath(root)).folders
    named = [(split_of(name), name) for name in folders if split_of(name)]
    flat = {n for _, n in named if look(folders[n]).pictures}
    flat = {n for n in flat if not _deeper(folders[n], look)}
    others = [n for n in folders if not split_of(n) and look(folders[n]).pictures]
    if len(named) == 1 and flat and others:
        return {}  # a class of trains, beside others
    if flat:
        got = f"pictures in {shown(sorted(flat))} without a class folder"
        expected = "train/<class>/*, and the same in val and test"
        remedy = "sort them into folders, or move those away that have no labels"
        raise mismatch(root, got, expected, remedy)
    where: dict[str, str] = {}
    for split, name in named:
        if split in where:
            got = (
                f"{os.path.basename(where[split])} and {name}, which both mean {split}"
            )
            raise mismatch(root, got, "one", "join them, or move one away")
        where[split] = folders[name]
    if where and "train" not in where:
        raise mismatch(
            root, f"{' and '.join(where)} but no train", LAYOUTS, "add train"
        )
    return where


def _classes(
    root: Path,
    folder: str,
    look: Look,
    ignored: dict[str, list[str]],
    notes: list[str],
) -> dict[str, dict[str, str]]:
    """Class name to picture name to path, of `folder/<class>/<picture>`."""
    groups: dict[str, dict[str, str]] = {}
    deeper, spellings, top = [], [], look(folder)
    beside = [(_OUTSIDE, path) for path in top.pictures.values()]
    beside += [(w if w in (_HIDDEN, _LEFT) else _OUTSIDE, p) for w, p in top.others]
    for name, path in top.folders.items():
        key, found = unicodedata.normalize("NFC", name), look(path)
        # Two folders whose names look the same are one class, all pictures of both.
        if key in groups:
            spellings.append(printable(key))
        group = groups.setdefault(key, {})
        for picture, place in found.pictures.items():
            _add(group, picture, place)
        beside += found.others
        beside += [
            ("a folder in a class folder", sub) for sub in found.folders.values()
        ]
        if not found.pictures and _deeper(path, look):
            deeper.append(relative(path, root))
    for why, path in beside:
        ignored[why].append(relative(path, root))
    flat = sorted(name for name, group in groups.items() if group)
    if deeper and flat:
        some, others = shown(list(map(printable, flat))), shown(deeper)
        got = f"pictures in {some}, and one folder deeper in {others}"
        raise mismatch(root, got, "all in class folders", "move these up, or away")
    if spellings:
        notes.append(f"two spellings, one class: {shown(spellings)}")
    return groups


def _add(group: dict[str, Any], name: str, value: Any) -> None:
    """Under the name as most write it; a second of that name under another."""
    # A Mac writes é in two characters, others in one: the cut is by name.
    key = name = unicodedata.normalize("NFC", name)
    number = 1
    while key in group:
        number += 1
        key = f"{name} {number}"
    group[key] = value


def nothing(root: Path, which: str = "") -> ValueError:
    """Says that there are no pictures in class folders, and what is there."""
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for number, (folder, _, files) in enumerate(os.walk(root)):
        for name in sorted(files)[: max(0, _LOOKED_AT - number)]:
            kind = os.path.splitext(name)[1].lower()[:20]
            kinds[kind or "without an extension"].append(os.path.join(folder, name))
        if number > _LOOKED_AT:
            break
    texts = [
        f"{len(paths):,} {printable(kind)} ({relative(min(paths), root)})"
        for kind, paths in sorted(kinds.items(), key=lambda x: (-len(x[1]), x[0]))
    ]
    remedy = "check the path"
    if kinds and not kinds.keys() & pictures.EXTENSIONS:
        remedy = "convert them to JPEG or PNG, if they are pictures"
    elif kinds:
        remedy = "move pictures into a folder for each class, or give another path"
    seen = shown(texts) or "no files"
    got = f"no pictures in class folders{which}; seen: {seen}"
    return mismatch(root, got, LAYOUTS, remedy)
