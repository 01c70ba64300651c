# SPDX-License-Identifier: Apache-2.0
"""What may be wrong with a task's pictures although it can be trained on.

Real data sets have pictures that lie in two splits, and some that show nothing, so
these are said and not refused. What cannot be trained on is refused by `check_task`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vpt_jax.data import cache, strips
from vpt_jax.data.tasks import Split, Task

_CHUNK = 64  # pictures looked at together; a mapped file's memory is given back after


def doubts(task: Task) -> list[str]:
    """Sentences about pictures in two splits and constant pictures; all are looked at.

    Of a strip, whose pictures are of all proportions, the centres are compared: what is
    evaluated of those pictures. Takes about a second per GB.
    """
    found, before = [], {}
    names = {"train": task.train, "val": task.val, "test": task.test}
    for which, split in names.items():
        if split is None:
            continue
        hashes, constant = _look(split)
        if len(constant):
            found.append(
                f"{len(constant)} of {len(hashes)} {which} pictures are of one colour;"
                f" the first is number {constant[0]} (label"
                f" {split.labels[constant[0]]})"
            )
        for other, known in before.items():
            pairs = _in_both(split, hashes, names[other], known)
            if pairs:
                (mine, theirs), labels = pairs[0], names[other].labels
                differ = sum(split.labels[i] != labels[j] for i, j in pairs)
                found.append(
                    f"{len(pairs)} of {len(hashes)} {which} pictures are also in"
                    f" {other}, {differ} with another label; the first is {which}"
                    f" number {mine}, {other} number {theirs}"
                )
        before[which] = hashes
    return found


def _look(split: Split) -> tuple[list[int], list[int]]:
    """A hash of every picture, and which are constant."""
    hashes, constant = [], []
    for start, part in _chunks(split.images):
        for number, picture in enumerate(part, start=start):
            hashes.append(hash(picture.tobytes()))
            # Most differ in their corners, and need not be read through.
            alike = (picture[0, 0] == picture[-1, -1]).all()
            if alike and (picture == picture[0, 0]).all():
                constant.append(number)
    return hashes, constant


def _in_both(
    split: Split, hashes: list[int], other: Any, known: list[int]
) -> list[tuple[int, int]]:
    """Numbers of equal pictures, the first of the other split for each of this one."""
    first: dict[int, int] = {}
    for number, value in enumerate(known):
        first.setdefault(value, number)
    alike = [(i, first[value]) for i, value in enumerate(hashes) if value in first]
    return [
        (i, j)
        for i, j in alike
        if np.array_equal(_some(split.images, i, i + 1), _some(other.images, j, j + 1))
    ]


def _chunks(images: Any) -> Iterator[tuple[int, np.ndarray]]:
    num = strips.count(images)
    for start in range(0, num, _CHUNK):
        stop = min(start + _CHUNK, num)
        yield start, _some(images, start, stop)
        cache.forget(images, start, stop)


def _some(images: Any, start: int, stop: int) -> np.ndarray:
    if isinstance(images, strips.Strip):
        return np.asarray(strips.view(images, np.arange(start, stop)))
    return images[start:stop]
