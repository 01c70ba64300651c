# SPDX-License-Identifier: Apache-2.0
"""Reads a whole prepared data set and says what is wrong with it.

Every record of train, val and test is read, which verifies its checksum, decoded and
labelled. Of a picture only a hash is kept.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vpt_jax.data import doubts
from vpt_jax.data.public import records, vtab
from vpt_jax.files import messages

_INTERVAL_S = 10.0  # between lines of progress
_PATIENCE = 20  # unreadable examples of a part, after which it is left
# Real sets have some equal pictures. That most of a part is in another is a mistake.
_LEAK = 0.5

_TOGETHER = (("train", "val", "test"), ("train800", "val200", "test"))


class Findings(NamedTuple):
    """What a check found."""

    errors: list[str]
    notes: list[str]  # what is worth knowing, and not wrong


class _Read(NamedTuple):
    labels: np.ndarray  # int64 [n]; -1 where an example cannot be read
    prints: list[int | None]  # of the decoded pictures, see `doubts.fingerprint`
    errors: list[str]


def check(
    row: vtab.Benchmark, data_dir: str = "", report: Callable[[str], None] = print
) -> Findings:
    """Checks a prepared data set against what was published of it, and against itself.

    Errors are: other numbers of examples than published, parts that have records in
    common, records that are damaged or have no right picture or label, a class that
    train or test lacks, and a part most of whose pictures are in another part too.
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
        found.errors.extend(_compare_sizes(row.source.sizes, sizes))
        parts = vtab.part_runs(row, sizes)
    # tfds and protobuf raise errors of many kinds for damaged descriptions.
    except Exception as e:
        found.errors.append(messages.reason(e))
        return found
    found.errors.extend(_overlaps(parts))

    read: dict[str, _Read] = {}
    for part in ("train", "val", "test"):
        try:
            read[part] = _read(row, part, data_dir, report)
        except ValueError as e:  # a file is missing
            found.errors.append(str(e))
            continue
        found.errors.extend(read[part].errors)
    for part, runs in parts.items():
        joined = part in ("trainval", "train800val200")
        labels = None if joined else _labels_of(runs[0], parts, read)
        if labels is not None:
            _count_classes(row, part, labels, found, report)
    for first, second in itertools.combinations(read, 2):
        _compare_pictures(first, second, read, found)
    return found


def _compare_sizes(published: Mapping[str, int], got: Mapping[str, int]) -> list[str]:
    return [
        f"split {split}: got {got.get(split, 0):,} examples; published are {size:,}; "
        "prepare the whole data set."
        for split, size in published.items()
        if got.get(split, 0) != size
    ]


def _overlaps(parts: Mapping[str, Sequence[vtab.Run]]) -> list[str]:
    """Records that are in two parts which must have none in common."""
    pairs = dict.fromkeys(
        pair for names in _TOGETHER for pair in itertools.combinations(names, 2)
    )
    errors = []
    for first, second in pairs:
        for a, b in itertools.product(parts.get(first, ()), parts.get(second, ())):
            start, stop = max(a.start, b.start), min(a.stop, b.stop)
            if a.split == b.split and start < stop:
                both, where = f"{first} and {second}", f"{a.split}[{start}:{stop}]"
                got = f"{stop - start:,} records in common, {where}"
                error = messages.mismatch(both, got, "none", "correct the table")
                errors.append(str(error))
    return errors


def _read(
    row: vtab.Benchmark, part: str, data_dir: str, report: Callable[[str], None]
) -> _Read:
    pictures = vtab.load(row, part, data_dir=data_dir)
    num = len(pictures)
    labels = np.full(num, -1, np.int64)
    prints: list[int | None] = [None] * num
    errors, last = [], time.monotonic()
    for i in range(num):
        try:
            picture, labels[i] = pictures[i]
            prints[i] = doubts.fingerprint(picture)
        except ValueError as e:
            errors.append(f"{part}: {e}")
            if len(errors) == _PATIENCE:
                errors.append(f"{part}: left after {i + 1:,} of {num:,} examples.")
                break
        if time.monotonic() - last > _INTERVAL_S:
            last = time.monotonic()
            report(f"  {part}: {i + 1:,} of {num:,} read")
    return _Read(labels, prints, errors)


def _labels_of(
    run: vtab.Run, parts: Mapping[str, Sequence[vtab.Run]], read: Mapping[str, _Read]
) -> np.ndarray | None:
    """The labels of a run that lies in one of the parts that were read."""
    for part, known in read.items():
        (whole,) = parts[part]
        inside = whole.start <= run.start and run.stop <= whole.stop
        if whole.split == run.split and inside:
            return known.labels[run.start - whole.start : run.stop - whole.start]
    return None


def _count_classes(
    row: vtab.Benchmark,
    part: str,
    labels: np.ndarray,
    found: Findings,
    report: Callable[[str], None],
) -> None:
    whole = bool((labels >= 0).all())
    labels = labels[labels >= 0]
    counts = np.bincount(labels, minlength=row.classes)
    present = counts[counts > 0]
    if len(present):
        low, high = present.min(), present.max()
        each = f"{low:,} each"
        if low < high:
            share = 100 * high / len(labels)
            each = f"{low:,} to {high:,} each; class {counts.argmax()}: {share:.1f} %"
        report(f"  {part}: {len(labels):,} examples of {len(present)} classes, {each}")
    lacking = np.flatnonzero(counts == 0).tolist()
    if lacking and whole:  # else what cannot be read has been reported
        some = doubts.first_of([str(k) for k in lacking])
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
    some = doubts.first_of([f"{second}[{j}] is {first}[{i}]" for j, i in pairs])
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
