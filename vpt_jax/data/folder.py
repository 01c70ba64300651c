# SPDX-License-Identifier: Apache-2.0
"""Your own pictures: class folders, lists of paths and labels, or one npz.

Class folders, any of these (`valid` and `validation` are names of `val` too):

    DIR/train/cat/1.jpg   DIR/val/cat/2.jpg   DIR/test/cat/3.jpg
    DIR/train/cat/1.jpg
    DIR/cat/1.jpg

Lists, as other PETL code uses them: `train800.txt`, `val200.txt` (or
`train800val200.txt`) and `test.txt`, or `train.txt`, `val.txt`, `test.txt`, with a line
`path label` for every picture. Paths are relative to DIR or to DIR/images, and lead not
out of DIR; labels count from 0; `classes.txt` may hold their names, one per line.

An npz: `train_images`, `train_labels`, `val_images`, ..., or `images` and `labels`:
uint8 `[n, h, w]` or `[n, h, w, 3]`, integers `[n]` or `[n, 1]`; `class_names` may hold
the names.

A split that is not there is cut from train, or from all pictures, see `cut`. Pictures
are decoded once, see `cache.py`; what was left out, and what looks wrong, is reported.
"""

import collections
import hashlib
import os
import time
import unicodedata
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL

from vpt_jax.data import cache, npz, pictures
from vpt_jax.data.bounds import MAX_TEXT, opened, printable
from vpt_jax.prompts import check_choice

SPLITS = ("train", "val", "test")
SEED = 1401  # of the cut: another one gives other splits
MAX_CLASSES = 1_000_000  # a label above is a mistake
SHOWN = 10  # names in a message
VERSION = 2  # to be raised when the same files give other pixels

_VAL_NAMES = ("val", "valid", "validation")
_LISTS = {
    "train": ("train800.txt", "train800val200.txt", "train.txt"),
    "val": ("val200.txt", "val.txt"),
    "test": ("test.txt",),
}
_LAYOUTS = (
    "expected DIR/train/<class>/*, DIR/<class>/*, lists (DIR/train800.txt or "
    "DIR/train.txt), or an .npz file"
)
_DIGITS = 20  # of a label; a longer one is a mistake
_BATCH = 256  # pictures in memory while reading


class Example(NamedTuple):
    """One picture: where it is (for people), how its reader finds it, its label."""

    name: str
    source: Any
    label: int


# (source, side, rule) to (a hash of the content, the picture), or ValueError.
Read = Callable[[Any, int, str], tuple[bytes, np.ndarray]]


class Found(NamedTuple):
    """What lies under a `data_dir`; nothing is decoded yet."""

    class_names: tuple[str, ...]
    splits: dict[str, list[Example]]
    open: Callable[[], Read]  # called once, if anything must be read
    key: Any  # what the content depends on, see `cache.cached`
    rule: str  # of resizing, unless another is asked for
    every_class_in_train: bool
    notes: list[str]


class Loaded(NamedTuple):
    """Class names; per split, uint8 `[n, side, side, 3]` and int32 `[n]`; the rule."""

    class_names: tuple[str, ...]
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    rule: str  # by which they were resized, of `pictures.RULES`


def load(
    data_dir: str,
    side: int,
    *,
    rule: str = "",
    skip_broken: bool = False,
    report: Callable[[str], None] = print,
) -> Loaded:
    """Finds, decodes, caches and splits pictures; see the module's docstring.

    Args:
      data_dir: A folder, or an npz file.
      side: Height and width of the pictures in px.
      rule: One of `pictures.RULES`. Empty: `crop` for class folders, `squash` for
        lists (as other PETL code does) and for npz files.
      skip_broken: Leave out pictures that cannot be read, instead of refusing.
      report: Called with lines of text: what was left out, what is in two splits.

    Returns:
      The pictures as read-only views of one memory-mapped file.

    Raises:
      ValueError: If no layout is recognised, pictures cannot be read (all are counted,
        the first are named), fewer than two classes are in train, a class folder
        is in val or test but not in train, a split is empty, or the cache cannot be
        written.
    """
    check_choice("task.resize", rule, ("", *pictures.RULES))
    found = find(data_dir)
    for note in found.notes:
        report(note)
    rule = rule or found.rule
    examples = [e for split in SPLITS for e in found.splits[split]]
    key = {
        "version": VERSION,
        "pillow": PIL.__version__,
        "side": side,
        "rule": rule,
        "skip_broken": skip_broken,
        "splits": [len(found.splits[split]) for split in SPLITS],
        "content": found.key,
    }
    split_of = [split for split in SPLITS for _ in found.splits[split]]

    def make(write: Callable[[np.ndarray], None]) -> dict[str, Any]:
        start = time.perf_counter()
        report(f"reading {len(examples):,} pictures, once")
        broken, digests = [], collections.defaultdict(list)
        open_one = found.open()

        def read(example: Example) -> tuple[bytes, np.ndarray] | str:
            try:
                return open_one(example.source, side, rule)
            except ValueError as e:
                # Short, as many may follow each other.
                return f"{example.name}: {str(e).partition('; expected')[0]}"

        for number, result in enumerate(_in_order(read, examples)):
            if isinstance(result, str):
                broken.append((number, result))
                continue
            digest, picture = result
            digests[digest].append(number)
            if skip_broken or not broken:  # else all is thrown away at the end
                write(picture)
        if broken and not skip_broken:
            raise ValueError(
                f"{data_dir}: {len(broken)} of {len(examples)} pictures cannot be "
                f"read; {_shown([text for _, text in broken])}; mend or remove them, "
                "or leave them out with --config.task.skip_broken=True."
            )
        report(f"read in {time.perf_counter() - start:.1f} s; keeping them in {folder}")
        twins = [
            [examples[k].name for k in numbers]
            for numbers in digests.values()
            if len({split_of[k] for k in numbers}) > 1
        ]
        return {"broken": broken, "twins": twins}

    folder = cache.default_folder()
    images, info = cache.cached(folder, key, side, make, report)
    broken = dict(info["broken"])
    if broken:
        report(
            f"{len(broken)} of {len(examples)} pictures cannot be read and were left "
            f"out; {_shown(list(broken.values()))}"
        )
    twins = [" = ".join(names) for names in info["twins"]]
    if twins:
        report(
            f"the same picture in more than one split: {len(twins)} times, which makes "
            f"results look better than they are; {_shown(twins)}"
        )
    splits, at = {}, 0
    kept = [(e, s) for k, (e, s) in enumerate(zip(examples, split_of, strict=True))]
    kept = [pair for k, pair in enumerate(kept) if k not in broken]
    for split in SPLITS:
        labels = np.array([e.label for e, s in kept if s == split], np.int32)
        splits[split] = images[at : at + len(labels)], labels
        at += len(labels)
    for note in _check(data_dir, found, {k: v[1] for k, v in splits.items()}):
        report(note)
    return Loaded(found.class_names, splits, rule=rule)


def _in_order(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Maps in threads (Pillow decodes and resizes without Python's lock)."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), _BATCH):
            # Not around the yield: the filters of warnings belong to the process.
            with pictures.quiet():
                done = list(pool.map(function, items[start : start + _BATCH]))
            yield from done


def _shown(texts: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(texts) - SHOWN
    tail = f"; and {more:,} more" if more > 0 else ""
    return "; ".join(texts[:SHOWN]) + tail


def _check(
    data_dir: str, found: Found, labels: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Raises, or yields notes, about classes and splits."""
    names = found.class_names
    present = {split: set(x.tolist()) for split, x in labels.items()}
    if len(present["train"]) < 2:
        shown = ", ".join(names[k] for k in present["train"]) or "none"
        raise ValueError(
            f"{data_dir}: got classes in train: {shown}; expected at least 2; "
            f"{_LAYOUTS}."
        )
    for split in SPLITS:
        if not present[split]:
            raise ValueError(
                f"{data_dir}: got no pictures for {split}; expected at least 1; add "
                "some, or remove the split to have it cut from train (which needs 3 "
                "pictures of a class)."
            )
    unseen = sorted((present["val"] | present["test"]) - present["train"])
    if not unseen:
        return
    shown = _shown([names[k] for k in unseen])
    if found.every_class_in_train:
        raise ValueError(
            f"{data_dir}: got {len(unseen)} classes that are in val or test and not in "
            f"train: {shown}; expected the same folders in each; rename or add them."
        )
    yield f"{len(unseen)} classes are in val or test and not in train: {shown}"


def find(data_dir: str) -> Found:
    """Recognises the layout under `data_dir` and lists its pictures.

    Raises:
      ValueError: If there is no layout that is known, or it is not well-formed.
    """
    if not data_dir:
        raise ValueError(
            "got no folder of pictures; expected one; pass it with "
            "--config=configs/folder.py:DIR (or --config.task.data_dir=DIR)."
        )
    try:
        root = Path(data_dir).expanduser()
        is_file, is_folder = root.is_file(), root.is_dir()
    # No home of such a user; a name that is too long, or in a folder that is closed.
    except (RuntimeError, OSError) as e:
        raise ValueError(
            f"{printable(data_dir)[:500]}: cannot be looked at ({e}); {_LAYOUTS}; "
            "check the path."
        ) from e
    if is_file:
        return _find_npz(root)
    if not is_folder:
        raise ValueError(
            f"{printable(str(root))}: no such file or folder; {_LAYOUTS}; check the "
            "path."
        )
    if any((root / name).is_file() for name in _LISTS["train"]):
        return _find_lists(root)
    return _find_folders(root)


def cut(
    groups: Mapping[Any, Mapping[str, Any]], missing: Sequence[str]
) -> dict[str, list[tuple[Any, str]]]:
    """Cuts the `missing` splits from train, a fifth of every class for each.

    A class of `n` pictures gives `n / 5` of them, rounded, at least one, but as few as
    it takes to leave it one to train on. Which ones is decided by a hash of `SEED` and
    the names of the class and the picture: not by the order of the files, the machine,
    or what is in other classes; and a picture added later moves few others.

    Args:
      groups: For each class, the pictures by name.
      missing: Splits to cut, of "val" and "test".

    Returns:
      For "train" and each missing split, `(class, picture name)`, sorted.
    """
    out: dict[str, list[tuple[Any, str]]] = {"train": []}
    out |= {split: [] for split in missing}
    for group, members in groups.items():

        def rank(name: str, group: Any = group) -> tuple[bytes, str]:
            text = f"{SEED}/{group}/{name}".encode(errors="surrogateescape")
            return hashlib.sha256(text).digest(), name

        order = sorted(members, key=rank)
        num = len(order)
        take = max(1, (2 * num + 5) // 10)
        take = min(take, (num - 1) // len(missing)) if missing else 0
        for k, split in enumerate(missing):
            out[split] += [(group, n) for n in order[k * take : (k + 1) * take]]
        out["train"] += [(group, n) for n in order[len(missing) * take :]]
    return {split: sorted(pairs) for split, pairs in out.items()}


# --- class folders --------------------------------------------------------------------


def _find_folders(root: Path) -> Found:
    where = {"train": root / "train", "test": root / "test"}
    where["val"] = next(
        (root / name for name in _VAL_NAMES if (root / name).is_dir()), root / "val"
    )
    have = [split for split in SPLITS if where[split].is_dir()]
    if have and "train" not in have:
        raise ValueError(
            f"{root}: got {' and '.join(have)} but no train; {_LAYOUTS}; add train."
        )
    ignored: dict[str, list[str]] = collections.defaultdict(list)
    if have:
        for entry in _entries(root):
            if entry.path not in {os.fspath(where[split]) for split in have}:
                ignored["outside of the splits"].append(_name(entry.path, root))
    else:
        have, where["train"] = ["train"], root
    groups = {split: _classes(root, where[split], ignored) for split in have}
    names = tuple(sorted({name for split in have for name in groups[split]}))
    if not any(groups["train"].values()):
        raise ValueError(
            f"{root}: got no pictures in class folders; {_LAYOUTS}; check the path."
        )
    missing = [split for split in ("val", "test") if split not in have]
    chosen = cut(groups["train"], missing)
    for split in have[1:]:
        pairs = [(c, p) for c, members in groups[split].items() for p in members]
        chosen[split] = sorted(pairs)
    label = {name: k for k, name in enumerate(names)}
    splits = {}
    for split, pairs in chosen.items():
        source = groups[split if split in have else "train"]
        splits[split] = [
            Example(_name(source[c][p], root), source[c][p], label[c]) for c, p in pairs
        ]
    notes = [
        f"not taken, {why}: {len(found):,} ({_shown(sorted(found))})"
        for why, found in sorted(ignored.items())
    ]
    shown = tuple(map(printable, names))
    return _found_files(root, shown, splits, "crop", True, notes)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as e:
        raise ValueError(
            f"{folder}: cannot be listed ({e.strerror}); expected a folder that you "
            "may read; check its permissions."
        ) from e


def _classes(
    root: Path, folder: Path, ignored: dict[str, list[str]]
) -> dict[str, dict[str, str]]:
    """Class name to picture name to path, of `folder/<class>/<picture>`."""
    found: dict[str, dict[str, str]] = {}
    for entry in _entries(folder):
        name = _name(entry.path, root)
        if entry.name.startswith("."):
            ignored["hidden"].append(name)
        elif not os.path.isdir(entry.path):
            ignored["not in a class folder"].append(name)
        else:
            # A Mac writes é in two characters, others in one: the same class.
            group = found.setdefault(unicodedata.normalize("NFC", entry.name), {})
            group |= _members(root, Path(entry.path), ignored)
    return found


def _members(root: Path, folder: Path, ignored: dict[str, list[str]]) -> dict[str, str]:
    found = {}
    for entry in _entries(folder):
        name = _name(entry.path, root)
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            ignored["hidden"].append(name)
        elif os.path.isdir(entry.path):
            ignored["a folder in a class folder"].append(name)
        elif extension not in pictures.EXTENSIONS:
            kind = printable(extension)[:20] or "without an extension"
            ignored[f"named {kind}"].append(name)
        else:
            found[entry.name] = entry.path
    return found


def _name(path: str, root: Path) -> str:
    """Where a file lies, for people."""
    return printable(os.path.relpath(path, root))


def _found_files(
    root: Path,
    names: tuple[str, ...],
    splits: dict[str, list[Example]],
    rule: str,
    every_class_in_train: bool,
    notes: list[str],
) -> Found:
    key = [os.path.realpath(root)]
    key += [_stamp(e.name, e.source) for split in SPLITS for e in splits[split]]
    return Found(
        names, splits, lambda: _read_file, key, rule, every_class_in_train, notes
    )


def _stamp(name: str, path: str) -> list[Any]:
    """Changes when the file does."""
    try:
        status = os.stat(path)
    except OSError:
        return [name, -1, -1]  # reading it will say why
    return [name, status.st_size, status.st_mtime_ns]


def _digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _read_file(path: str, side: int, rule: str) -> tuple[bytes, np.ndarray]:
    with opened(path) as data:
        return _digest(data), pictures.decode(data, side, rule)


# --- lists ----------------------------------------------------------------------------


def _find_lists(root: Path) -> Found:
    files = {
        split: next((root / n for n in names if (root / n).is_file()), None)
        for split, names in _LISTS.items()
    }
    lists = {split: _read_list(root, f) for split, f in files.items() if f}
    top = max(label for pairs in lists.values() for _, label, _ in pairs)
    names = _numbers(root, top)
    if (root / "classes.txt").is_file():
        names = tuple(map(printable, _lines(root / "classes.txt")))
        if len(names) <= top:
            raise ValueError(
                f"{root / 'classes.txt'}: got {len(names)} names; expected "
                f"{top + 1}, for labels from 0 to {top}; add the missing ones."
            )
    splits = {
        split: [Example(name, path, label) for name, label, path in rows]
        for split, rows in lists.items()
    }
    splits = _cut_examples(splits)
    used = [os.path.basename(f) for f in files.values() if f]
    notes = [f"lists: {', '.join(used)}"]
    return _found_files(root, names, splits, "squash", False, notes)


def _numbers(where: Path, top: int) -> tuple[str, ...]:
    """Names of classes that have none: "0" ... `top`."""
    if top >= MAX_CLASSES:
        raise ValueError(
            f"{where}: got label {top}; expected labels below {MAX_CLASSES:,}; count "
            "the classes from 0."
        )
    return tuple(map(str, range(top + 1)))


def _cut_examples(splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """Adds the splits that are missing, see `cut`."""
    missing = [split for split in ("val", "test") if split not in splits]
    if not missing:
        return splits
    groups: dict[Hashable, dict[str, Example]] = collections.defaultdict(dict)
    for number, example in enumerate(splits["train"]):
        # A picture that is listed twice is kept twice, as it was asked for.
        twin = example.name in groups[example.label]
        groups[example.label][f"{example.name} {number}" if twin else example.name] = (
            example
        )
    parts = {
        split: [groups[label][name] for label, name in pairs]
        for split, pairs in cut(groups, missing).items()
    }
    return splits | parts


def _lines(path: Path) -> list[str]:
    """Lines that are not empty, without surrounding blanks."""
    try:
        with opened(os.fspath(path), MAX_TEXT) as data:
            text = data.decode("utf-8-sig")
    except ValueError as e:
        why = f"no UTF-8: {e.reason}" if isinstance(e, UnicodeDecodeError) else e
        raise ValueError(
            f"{path}: cannot be read ({why}); expected a text file in UTF-8; save it "
            "again."
        ) from e
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_list(root: Path, path: Path) -> list[tuple[str, int, str]]:
    """`(path as listed, label, path to open)` for every line."""
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        name, _, label = line.replace("\t", " ").rpartition(" ")
        decimal = label.isdecimal() and len(label) < _DIGITS
        if not name.strip() or not decimal or "\0" in name:
            raise ValueError(
                f"{path}: got line {number} {line[:200]!r}; expected `path label`, the "
                "label a number from 0; correct it."
            )
        name = name.strip()
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(
                f"{path}: got line {number} {line[:200]!r}; expected a path inside of "
                f"{root}; move the pictures there, or link to them."
            )
        places = (root / name, root / "images" / name)
        place = next((p for p in places if os.path.lexists(p)), places[0])
        rows.append((printable(name)[:500], int(label), os.fspath(place)))
    if not rows:
        raise ValueError(
            f"{path}: got no lines; expected `path label` in each; remove the file to "
            "have the split cut from train."
        )
    return rows


# --- npz ------------------------------------------------------------------------------


def _find_npz(path: Path) -> Found:
    images, labels, names = npz.describe(path, SPLITS)
    splits = {
        split: [
            Example(f"{images[split]}[{k}]", (images[split], k), label)
            for k, label in enumerate(found.tolist())
        ]
        for split, found in labels.items()
    }
    top = max(int(found.max()) for found in labels.values())
    numbers = _numbers(path, top)
    names = numbers if names is None else tuple(map(printable, names))
    if len(names) <= top:
        raise ValueError(
            f"{path}: got {len(names)} class_names; expected {top + 1}, for labels "
            f"from 0 to {top}; add the missing ones."
        )
    splits = _cut_examples(splits)
    key = [os.path.realpath(path), _stamp(path.name, os.fspath(path))]
    arrays = tuple(images.values())
    return Found(
        names, splits, lambda: _open_npz(path, arrays), key, "squash", False, []
    )


def _open_npz(path: Path, names: Sequence[str]) -> Read:
    arrays = npz.load_images(path, names)

    def read(source: Any, side: int, rule: str) -> tuple[bytes, np.ndarray]:
        name, number = source
        pixels = np.ascontiguousarray(arrays[name][number])
        return _digest(pixels), pictures.to_square(pixels, side, rule)

    return read
