# SPDX-License-Identifier: Apache-2.0
"""What may be wrong with pictures although they can be trained on.

Real data sets have pictures that lie in two splits, and some that show nothing, so
these are said and not refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vpt_jax.data import cache, strips
from vpt_jax.files.messages import first_of

_CHUNK = 64  # pictures looked at together; a mapped file's memory is given back after


def doubts(
    splits: Mapping[str, tuple[Any, np.ndarray] | None],
    names: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Sentences about pictures in two splits and constant pictures; all are looked at.

    Of a strip the centres are compared. Takes about half a second per GB.

    Args:
      splits: Name to pictures uint8 `[n, h, w, 3]`, or a strip, and labels `[n]`; or
        None where a split is not there.
      names: What to call the pictures of each split; else by number.
    """
    found, before = [], {}

    def name(which: str, number: int) -> str:
        return names[which][number] if names else f"{which} number {number}"

    for which, (images, labels) in ((k, v) for k, v in splits.items() if v):
        prints, constant = [], []
        for picture in _each(images):
            # Most differ in their corners, and need not be read through.
            alike = (picture[0, 0] == picture[-1, -1]).all()
            if alike and (picture == picture[0, 0]).all():
                constant.append(len(prints))
            prints.append(fingerprint(picture))
        if constant:
            found.append(
                f"{len(constant)} of {len(prints)} {which} pictures are of one colour;"
                f" the first is {name(which, constant[0])} (label"
                f" {labels[constant[0]]})"
            )
        for other, (known, others) in before.items():
            if pairs := shared(prints, known):
                differ = sum(labels[i] != others[j] for i, j in pairs)
                some = [f"{name(which, i)} = {name(other, j)}" for i, j in pairs]
                found.append(
                    f"{len(pairs)} of {len(prints)} {which} pictures are also in"
                    f" {other}, {differ} with another label, which makes results look"
                    f" better than they are: {first_of(some)}"
                )
        before[which] = prints, labels
    return found


def fingerprint(picture: np.ndarray) -> int:
    """64 bits, by Python's own hash: to be compared within one process."""
    return hash((picture.shape, picture.tobytes()))


def shared(
    mine: Sequence[int | None], theirs: Sequence[int | None]
) -> list[tuple[int, int]]:
    """Numbers of equal prints: each of mine that they have, with the first of theirs.

    None is for a picture that could not be read, and equals nothing.
    """
    first = {value: number for number, value in reversed([*enumerate(theirs)])}
    first.pop(None, None)
    return [(i, first[value]) for i, value in enumerate(mine) if value in first]


def _each(images: Any) -> Iterator[np.ndarray]:
    num = strips.count(images)
    for start in range(0, num, _CHUNK):
        stop = min(start + _CHUNK, num)
        yield from np.asarray(strips.view(images, np.arange(start, stop)))
        cache.forget(images, start, stop)
