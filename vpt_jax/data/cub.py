# SPDX-License-Identifier: Apache-2.0
"""The lists that CUB_200_2011 and NABirds come with: a line for each picture's number.

`images.txt`: a path below `images/`; `image_class_labels.txt`: the number of a class;
`train_test_split.txt`: 1 for train, else 0; `classes.txt`: the names by their numbers.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vpt_jax.data.found import text
from vpt_jax.files.messages import mismatch

FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
AGAIN = "unpack the publisher's archive again"


class Picture(NamedTuple):
    """A picture of the publisher's folder."""

    path: Path
    label: int  # counted from 0, in the order of the classes' numbers
    train: bool


def _table(path: Path, kind: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Picture's number to value, of a file of lines `number value`."""
    try:
        found = text(path).splitlines()
    except ValueError as e:
        raise ValueError(f"{e} Or {AGAIN}.") from e
    table = {}
    for number, line in enumerate(found, 1):
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


def read(folder: Path) -> tuple[dict[str, Picture], list[int]]:
    """Reads the publisher's lists; pictures are not looked for.

    Args:
      folder: Of `FILES` and `images/`.

    Returns:
      Uuid to picture, and the classes' numbers in the order of labels.

    Raises:
      ValueError: If a file is missing or has a line of another form, or the files are
        about different pictures.
    """
    files = [folder / name for name in FILES]
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
