# SPDX-License-Identifier: Apache-2.0
"""Class folders: which there are, and what lies beside the pictures."""

import collections
import functools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from vpt_jax.data import found, pictures
from vpt_jax.data.found import LAYOUTS, SPLITS, relative, split_of
from vpt_jax.files.messages import first_of, mismatch, printable

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
    """Lists a folder; ValueError if it cannot be listed."""
    listed = Listing({}, {}, [])
    try:
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as e:
        got = f"a folder that cannot be listed ({e.strerror})"
        where, remedy = printable(path), "check its permissions"
        raise mismatch(where, got, "one that you may read", remedy) from e
    for entry in entries:
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            listed.others.append((_HIDDEN, entry.path))
        elif os.path.isdir(entry.path):
            if entry.name.casefold() in _LITTER:
                listed.others.append((_LEFT, entry.path))
            else:
                listed.folders[entry.name] = entry.path
        elif extension in pictures.EXTENSIONS:
            listed.pictures[entry.name] = entry.path
        else:
            kind = printable(extension)[:20] or "without an extension"
            listed.others.append((f"named {kind}", entry.path))
    return listed


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

    One alone may be a class (`steam_train`), and not two that differ in the split's
    name alone (`cars_train`, `cars_test`).
    """
    alike: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in names:
        if not split_of(name) and (word := _SPLIT_WORD.search(name)):
            rest = f"{name[: word.start()]}/{name[word.end() :]}".casefold()
            alike[rest][split_of(word[0])] = name
    for names_alike in alike.values():
        if len(names_alike) > 1:
            some = first_of(list(map(printable, names_alike.values())))
            got = f"folders {some}, which are called like splits"
            expected = f"{', '.join(SPLITS)}, with a folder for each class in them"
            remedy = "rename and sort them, or write lists"
            raise mismatch(root, got, expected, remedy)


def refuse_one_too_deep(root: Path, folders: list[Path]) -> None:
    """Raises if each folder has its pictures in one of its own: `<class>/images/*`."""
    look = functools.cache(listing)
    inside = [_deeper(os.fspath(folder), look) for folder in folders]
    if all(len(names) == 1 for names in inside):
        places = [f / names[0] for f, names in zip(folders, inside, strict=True)]
        deep = first_of([relative(place, root) for place in places])
        got = f"pictures one folder too deep, in {deep}"
        raise mismatch(root, got, LAYOUTS, "move them up into their class folders")


def find(root: Path, notes: list[str]) -> found.Found:
    """Pictures in class folders, with or without folders of splits around these.

    `notes` is told what was not taken.

    Raises:
      ValueError: If there are none, train is missing, or it is not clear which folders
        are classes.
    """
    look = functools.cache(listing)
    top = look(os.fspath(root))
    where = _split_folders(root, look)
    ignored: dict[str, list[str]] = collections.defaultdict(list)
    if where:
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
        f"not taken, {why}: {len(paths):,} ({first_of(sorted(paths))})"
        for why, paths in sorted(ignored.items())
    ]
    full = sorted(name for name, group in groups["train"].items() if group)
    if not full:
        raise _nothing(root, " of train" if where else "")
    if len(full) > 1 and (whole := [n for n in full if n.casefold() in _ALL]):
        some = first_of(list(map(printable, full)))
        got = f"folders {some}, of which {first_of(whole)}"
        remedy = "give the folder of the classes, or write lists"
        raise mismatch(root, f"{got} is no name of a class", LAYOUTS, remedy)
    names = tuple(sorted({name for split in have for name in groups[split]}))
    label = {name: k for k, name in enumerate(names)}
    chosen = found.cut(groups["train"], [s for s in ("val", "test") if s not in have])
    for split in have[1:]:
        chosen[split] = sorted((c, p) for c, g in groups[split].items() for p in g)
    splits = {}
    for split, pairs in chosen.items():
        source = groups[split if split in have else "train"]
        paths = [(source[c][p], label[c]) for c, p in pairs]
        splits[split] = [found.Example(relative(p, root), p, k) for p, k in paths]
    return found.of_files(root, tuple(map(printable, names)), splits, "crop")


def _split_folders(root: Path, look: Look) -> dict[str, str]:
    """Split to its folder; nothing if folders of classes lie in `root` itself."""
    folders = look(os.fspath(root)).folders
    with_pictures = [name for name, path in folders.items() if look(path).pictures]
    named = [name for name in folders if split_of(name)]
    flat = [n for n in named if n in with_pictures and not _deeper(folders[n], look)]
    if len(named) == 1 and flat and len(with_pictures) > 1:
        return {}  # a class of trains, beside others
    if flat:
        got = f"pictures in {first_of(flat)} without a class folder"
        expected = "train/<class>/*, and the same in val and test"
        remedy = "sort them into folders, or move those away that have no labels"
        raise mismatch(root, got, expected, remedy)
    where: dict[str, str] = {}
    for name in named:
        split = split_of(name)
        if split in where:
            first = os.path.basename(where[split])
            got = f"{first} and {name}, which both mean {split}"
            raise mismatch(root, got, "one", "join them, or move one away")
        where[split] = folders[name]
    if where and "train" not in where:
        got = f"{' and '.join(where)} but no train"
        raise mismatch(root, got, LAYOUTS, "add train")
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
        key, inside = unicodedata.normalize("NFC", name), look(path)
        # Two folders whose names look the same are one class, all pictures of both.
        if key in groups:
            spellings.append(printable(key))
        group = groups.setdefault(key, {})
        for picture, place in inside.pictures.items():
            group[_new_name(group, picture)] = place
        beside += inside.others
        beside += [("a folder in a class folder", p) for p in inside.folders.values()]
        if not inside.pictures and _deeper(path, look):
            deeper.append(relative(path, root))
    for why, path in beside:
        ignored[why].append(relative(path, root))
    flat = sorted(printable(name) for name, group in groups.items() if group)
    if deeper and flat:
        got = (
            f"pictures in {first_of(flat)}, and one folder deeper in {first_of(deeper)}"
        )
        raise mismatch(root, got, "all in class folders", "move these up, or away")
    if spellings:
        notes.append(f"two spellings, one class: {first_of(spellings)}")
    return groups


def _new_name(group: dict[str, str], name: str) -> str:
    """The name as most write it; of a second picture of that name another."""
    # A Mac writes é in two characters, others in one: the cut is by name.
    key = name = unicodedata.normalize("NFC", name)
    number = 1
    while key in group:
        number += 1
        key = f"{name} {number}"
    return key


def _nothing(root: Path, which: str) -> ValueError:
    """Says that there are no pictures in class folders, and what is there."""
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for number, (folder, _, files) in enumerate(os.walk(root)):
        for name in sorted(files)[: max(0, _LOOKED_AT - number)]:
            kind = os.path.splitext(name)[1].lower()[:20]
            kinds[kind or "without an extension"].append(os.path.join(folder, name))
        if number > _LOOKED_AT:
            break
    seen = [
        f"{len(paths):,} {printable(kind)} ({relative(min(paths), root)})"
        for kind, paths in sorted(kinds.items(), key=lambda x: (-len(x[1]), x[0]))
    ]
    remedy = "check the path"
    if kinds and not kinds.keys() & pictures.EXTENSIONS:
        remedy = "convert them to JPEG or PNG, if they are pictures"
    elif kinds:
        remedy = "move pictures into a folder for each class, or give another path"
    got = f"no pictures in class folders{which}; seen: {first_of(seen) or 'no files'}"
    return mismatch(root, got, LAYOUTS, remedy)
