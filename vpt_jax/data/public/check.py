# SPDX-License-Identifier: Apache-2.0
"""Reads a whole prepared data set and says what is wrong with it.

Every record of train, val and test is read, which verifies its checksum, decoded and
labelled. Of a picture only a hash is kept.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from vpt_jax.data import doubts
from vpt_jax.data.public import records, vtab
from vpt_jax.files import messages

_INTERVAL_S = 10.0  # between lines of progress
_PATIENCE = 20  # unreadable examples of a part, after which it is left
# Real sets have some equal pictures. That most of a part is in another is a mistake.
_LEAK = 0.5


class Findings(NamedTuple):
    """What a check found: what is wrong, and what is only worth knowing."""

    errors: list[str]
    notes: list[str]


class _Read(NamedTuple):
    labels: np.ndarray  # int64 [n]; -1 where an example cannot be read
    prints: list[int | None]  # of the decoded pictures, see `doubts.fingerprint`


def check(
    row: vtab.Benchmark, data_dir: str = "", report: Callable[[str], None] = print
) -> Findings:
    """Checks a prepared data set against what was published of it, and against itself.

    Errors are: other numbers of examples than published, records that are damaged or
    have no right picture or label, a class that train or test lacks, and a part most of
    whose pictures are in another part too.
    Notes are: classes that other parts lack, and fewer equal pictures, which several
    published sets have. Progress is reported in lines of text.

    Raises:
      ValueError: If the data set is not prepared.
    """
    directory = vtab.find(row, data_dir)
    report(f"{row.name}: {directory}")
    found = Findings([], [])
    try:
        sizes = records.split_sizes(directory)
        for split, size in row.source.sizes.items():
            if (got := sizes.get(split, 0)) != size:
                found.errors.append(
                    f"split {split}: got {got:,} examples; published are {size:,}; "
                    "prepare the whole data set."
                )
        parts = vtab.part_runs(row, sizes)
    # tfds and protobuf raise errors of many kinds for damaged descriptions.
    except Exception as e:
        found.errors.append(messages.reason(e))
        return found
    read: dict[str, _Read] = {}
    for part in ("train", "val", "test"):
        try:
            read[part] = _read(row, part, data_dir, found, report)
        except ValueError as e:  # a file is missing
            found.errors.append(str(e))
    for part in parts:
        _count_classes(row, part, _labels_of(part, parts, read), found, report)
    for first, second in itertools.combinations(read, 2):
        _compare_pictures(first, second, read, found)
    return found


def _read(
    row: vtab.Benchmark,
    part: str,
    data_dir: str,
    found: Findings,
    report: Callable[[str], None],
) -> _Read:
    pictures = vtab.load(row, part, data_dir=data_dir)
    num = len(pictures)
    labels = np.full(num, -1, np.int64)
    prints: list[int | None] = [None] * num
    errors, last = 0, time.monotonic()
    for i in range(num):
        try:
            picture, labels[i] = pictures[i]
            prints[i] = doubts.fingerprint(picture)
        except ValueError as e:
            found.errors.append(f"{part}: {e}")
            errors += 1
            if errors == _PATIENCE:
                text = f"{part}: left after {i + 1:,} of {num:,} examples."
                found.errors.append(text)
                break
        if time.monotonic() - last > _INTERVAL_S:
            last = time.monotonic()
            report(f"  {part}: {i + 1:,} of {num:,} read")
    return _Read(labels, prints)


def _labels_of(
    part: str, parts: Mapping[str, vtab.Run], read: Mapping[str, _Read]
) -> np.ndarray:
    """The labels of a part, as it was read or the beginning of one that was read."""
    known = read.get(part.rstrip("0123456789"))
    length = parts[part].stop - parts[part].start
    return known.labels[:length] if known else np.full(1, -1)


def _count_classes(
    row: vtab.Benchmark,
    part: str,
    labels: np.ndarray,
    found: Findings,
    report: Callable[[str], None],
) -> None:
    whole = bool((labels >= 0).all())
    counts = np.bincount(labels[labels >= 0], minlength=row.classes)
    num, present = counts.sum(), counts[counts > 0]
    if num:
        low, high = present.min(), present.max()
        each = f"{low:,} each"
        if low < high:
            share = f"{100 * high / num:.1f} %"
            each = f"{low:,} to {high:,} each; class {counts.argmax()}: {share}"
        report(f"  {part}: {num:,} examples of {len(present)} classes, {each}")
    lacking = np.flatnonzero(counts == 0).tolist()
    if lacking and whole:  # else what cannot be read has been reported
        some = messages.first_of([str(k) for k in lacking])
        text = f"{part}: got no example of {len(lacking)} of {row.classes} classes"
        if part in ("train", "test"):
            more = "expected all; prepare the whole data set."
            found.errors.append(f"{text} ({some}); {more}")
        else:
            found.notes.append(f"{text} ({some})")


def _compare_pictures(
    first: str, second: str, read: Mapping[str, _Read], found: Findings
) -> None:
    """Looks for equal pictures in two parts, whichever records they are."""
    ours, theirs = read[first].prints, read[second].prints
    pairs = doubts.shared(theirs, ours)
    if not pairs:
        return
    some = messages.first_of([f"{second}[{j}] is {first}[{i}]" for j, i in pairs])
    text = (
        f"{first} and {second}: {len(pairs):,} of {second}'s {len(theirs):,} "
        f"pictures are equal to one of {first} ({some})"
    )
    smaller = pairs if len(theirs) <= len(ours) else doubts.shared(ours, theirs)
    if len(smaller) > _LEAK * min(len(ours), len(theirs)):
        more = "expected at most a few; prepare the data set again."
        found.errors.append(f"{text}; {more}")
    else:
        found.notes.append(text)
