# SPDX-License-Identifier: Apache-2.0
"""Your own pictures: class folders, lists of paths and labels, or one npz.

`configs/folder.py` shows the layouts. Folders of splits may be called `training`,
`valid`, `validation` and `testing` and be written in capitals. Paths of lists are
relative to DIR or to DIR/images, and lead not out of DIR; `classes.txt` may hold the
classes' names, one per line, from that of label 0 (or from that of 1, if there are as
many as the largest label). The set may lie in a folder of its own in DIR.

A split that is not there is cut from train, or from all pictures, see `found.cut`.
Classes are those with pictures. What was left out, and what looks wrong, is reported,
with an error too. Pictures are decoded once, see `cache.py`.
"""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL

from vpt_jax.data import cache, doubts, layouts, lists, npz, pictures
from vpt_jax.data.found import LAYOUTS, SPLITS, Example, Found
from vpt_jax.files.messages import first_of, mismatch, printable
from vpt_jax.prompts import check_choice

VERSION = 3  # to be raised when the same files give other pixels

_SPEAKS_EVERY_S = 20.0
_BATCH = 256  # pictures in memory while reading
_MAX_NOTES = 2000  # letters of what is shown with an error


class Loaded(NamedTuple):
    """What was loaded; per split, uint8 `[n, side, side, 3]` and int32 `[n]`."""

    class_names: tuple[str, ...]
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    doubts: tuple[str, ...]  # what was left out, and what looks wrong
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
      report: Called with lines of text: progress, and all doubts.

    Returns:
      The pictures as read-only views of one memory-mapped file.

    Raises:
      ValueError: If no layout is recognised, pictures cannot be read, classes or splits
        do not suffice to train and to evaluate, or the cache cannot be written.
    """
    check_choice("task.resize", rule, ("", *pictures.RULES))
    found = find(data_dir)
    notes = list(found.notes)
    for text in [found.layout] * bool(found.layout) + notes:
        report(text)
    with _telling(notes, found.layout):
        notes += _alike(data_dir, found)
        rule = rule or found.rule
        images, broken = _pictures(data_dir, side, rule, skip_broken, found, report)
        if broken:
            num = sum(map(len, found.splits.values()))
            some = first_of(list(broken.values()))
            text = f"{len(broken)} of {num} pictures cannot be read and were left out"
            notes.append(f"{text}; {some}")
        # `images` are those of train, val and test, without the broken ones.
        splits, names, at, first = {}, {}, 0, 0
        for split in SPLITS:
            examples = found.splits[split]
            kept = [e for k, e in enumerate(examples, first) if k not in broken]
            splits[split] = images[at : at + len(kept)], [e.label for e in kept]
            names[split] = [e.name for e in kept]
            at, first = at + len(kept), first + len(examples)
        class_names, splits = _with_pictures(found.class_names, splits, notes)
        notes += _check(data_dir, class_names, {k: v[1] for k, v in splits.items()})
        notes += doubts.doubts(splits, names)
    for text in notes[len(found.notes) :]:
        report(text)
    return Loaded(class_names, splits, tuple(notes), rule)


@contextlib.contextmanager
def _telling(notes: list[str], layout: str) -> Iterator[None]:
    """Shows what was noticed before an error with it."""
    try:
        yield
    except ValueError as e:
        said = ". ".join([layout] * bool(layout) + notes)[:_MAX_NOTES]
        raise ValueError(f"{e} Noticed before: {said}." if said else str(e)) from e


def _pictures(
    data_dir: str,
    side: int,
    rule: str,
    skip_broken: bool,
    found: Found,
    report: Callable[[str], None],
) -> tuple[np.ndarray, dict[int, str]]:
    """All pictures that can be read, decoded; numbers of the others, and why."""
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

    def make(write: Callable[[np.ndarray], None]) -> dict[str, Any]:
        start = time.perf_counter()
        report(f"reading {len(examples):,} pictures, once")
        broken, open_one = [], found.open()

        def read(example: Example) -> np.ndarray | str:
            try:
                return open_one(example.source, side, rule)
            except ValueError as e:
                # Short, as many may follow each other.
                return f"{example.name}: {str(e).partition('; expected')[0]}"

        spoke = start
        for number, result in enumerate(pictures.mapped(read, examples, _BATCH)):
            if time.perf_counter() - spoke > _SPEAKS_EVERY_S:
                spoke = time.perf_counter()
                report(f"read {number:,} of {len(examples):,}")
            if isinstance(result, str):
                broken.append((number, result))
            elif skip_broken or not broken:  # else all is thrown away at the end
                write(result)
        if broken and not skip_broken:
            remedy = "mend or remove them, or pass --config.task.skip_broken=True"
            if len(broken) == len(examples):
                remedy = "expected pictures there; correct the paths (of lists, they "
                remedy += "begin in the folder of the lists, or in images)"
            raise ValueError(
                f"{data_dir}: {len(broken)} of {len(examples)} pictures cannot be "
                f"read; {first_of([text for _, text in broken])}; {remedy}."
            )
        report(f"read in {time.perf_counter() - start:.1f} s; keeping them in {folder}")
        return {"broken": broken}

    folder = cache.default_folder()
    images, info = cache.cached(folder, key, side, make, report)
    return images, dict(info["broken"])


def _with_pictures(
    names: Sequence[str],
    splits: Mapping[str, tuple[np.ndarray, list[int]]],
    notes: list[str],
) -> tuple[tuple[str, ...], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Classes are those with pictures, counted from 0: the one rule for all layouts."""
    present = sorted({label for _, labels in splits.values() for label in labels})
    new = {label: k for k, label in enumerate(present)}
    if lacking := [name for k, name in enumerate(names) if k not in new]:
        text = f"classes without pictures, left out: {len(lacking):,}"
        notes.append(f"{text} ({first_of(lacking)})")
    numbered = {
        split: (images, np.array([new[label] for label in labels], np.int32))
        for split, (images, labels) in splits.items()
    }
    return tuple(names[k] for k in present), numbered


def _check(
    data_dir: str, names: Sequence[str], labels: Mapping[str, np.ndarray]
) -> list[str]:
    """Raises, or returns notes, about classes and splits."""
    present: dict[str, set[int]] = {s: set(x.tolist()) for s, x in labels.items()}
    if len(present["train"]) < 2:
        known = ", ".join(names[k][:200] for k in present["train"]) or "none"
        got, remedy = f"classes in train: {known}", "sort the pictures, or list them"
        raise mismatch(data_dir, got, f"at least 2, in {LAYOUTS}", remedy)
    cut = "remove the split to have it cut from train (by 3 pictures of a class)"
    for split in SPLITS:
        if not present[split]:
            got, remedy = f"no pictures for {split}", f"add some, or {cut}"
            raise mismatch(data_dir, got, "at least 1", remedy)
        if not present[split] & present["train"]:
            some = first_of([names[k] for k in sorted(present[split])])
            got = f"{split} of classes that train has none of ({some})"
            remedy = f"rename them, or {cut}"
            raise mismatch(data_dir, got, "the same classes in each", remedy)
    unseen = sorted((present["val"] | present["test"]) - present["train"])
    texts = [
        f"{names[k]} ({' and '.join(s for s in SPLITS if k in present[s])})"
        for k in unseen
    ]
    text = f"{len(unseen)} classes have no picture in train, so that they cannot be"
    return [f"{text} learned: {first_of(texts)}"] if unseen else []


def _alike(data_dir: str, found: Found) -> list[str]:
    """Raises, or returns a note, about names that only case or blanks tell apart."""
    present = {s: {e.label for e in found.splits[s]} for s in SPLITS}
    names = {k: found.class_names[k] for k in sorted(set().union(*present.values()))}
    plain = {label: " ".join(name.casefold().split()) for label, name in names.items()}
    known = {plain[label]: names[label] for label in present["train"]}
    for split in ("val", "test"):
        odd = [
            f"{known[plain[label]]} and {names[label]}"
            for label in sorted(present[split] - present["train"])
            if plain[label] in known
        ]
        if odd:
            got = f"classes that train and {split} write differently: {first_of(odd)}"
            raise mismatch(data_dir, got, "the same names in each", "rename them")
    times = collections.Counter(plain.values())
    twice = [names[label] for label, name in plain.items() if times[name] > 1]
    text = f"classes whose names are the same but for case or blanks: {first_of(twice)}"
    return [text] if twice else []


def find(data_dir: str) -> Found:
    """Recognises the layout under `data_dir` and lists its pictures.

    Raises:
      ValueError: If there is no layout that is known, or it is not well-formed; with
        what was noticed before.
    """
    if not data_dir:
        remedy = "pass it with --config=configs/folder.py:DIR"
        raise mismatch("", "no folder of pictures", "one", remedy)
    where = printable(data_dir)[:500]
    try:
        root = Path(data_dir).expanduser()
        is_file, is_folder = root.is_file(), root.is_dir()
    # No home of such a user; a name that is too long, or in a folder that is closed.
    except (RuntimeError, OSError) as e:
        got = f"a path that cannot be looked at ({e})"
        raise mismatch(where, got, LAYOUTS, "check the path") from e
    if not is_file and not is_folder:
        raise mismatch(where, "no such file or folder", LAYOUTS, "check the path")
    notes: list[str] = []
    inner = root if is_file else _inner(root)
    layout = "" if inner == root else f"one folder deeper, in {printable(inner.name)}"
    with _telling(notes, layout):
        kind = npz if is_file else lists if lists.recognised(inner) else layouts
        found = kind.find(inner, notes)
    said = ", ".join(filter(None, [found.layout, layout]))
    return found._replace(layout=said, notes=tuple(notes))


def _inner(root: Path) -> Path:
    """`root`, or the one folder in it that has pictures as they are expected."""
    if lists.recognised(root):
        return root
    folders = layouts.listing(os.fspath(root)).folders
    layouts.refuse_other_splits(root, folders)
    if layouts.recognised(root):
        return root
    paths = map(Path, folders.values())
    inside = [p for p in paths if lists.recognised(p) or layouts.recognised(p)]
    listed = any(map(lists.recognised, inside))
    if len(inside) == 1 and not listed:
        names = layouts.listing(os.fspath(inside[0])).folders
        layouts.refuse_other_splits(inside[0], names)
    if len(inside) > 1:
        if not listed:
            layouts.refuse_one_too_deep(root, inside)
        names = first_of([printable(path.name) for path in inside])
        got = f"{len(inside)} folders that each hold pictures and classes ({names})"
        remedy = f"pass one, such as {printable(os.fspath(inside[0]))}, or join them"
        raise mismatch(root, got, "one data set", remedy)
    return inside[0] if inside else root
