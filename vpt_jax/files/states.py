# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: Orbax folders `directory/STEP` with checksums.

A checkpoint appears by a rename, when all of it is on disk. Before one is used, every
file is checked; a damaged one is moved aside and the one before it is used.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vpt_jax import parallel
from vpt_jax.files import durable, workdirs

CHECKSUMS = "checksums.json"
KEEP = 2  # the newest, and one to go back to if it turns out to be damaged


def save_checkpoint(path: str | os.PathLike, tree: Any) -> None:
    """Saves a pytree of arrays with Orbax; `path` appears when it is whole.

    Raises:
      OSError: If it cannot be written; it names `path`.
    """
    path = Path(path).absolute()
    partial = path.with_name(f".{path.name}.partial")
    stored = {name: np.asarray(x) for name, x in _stored(tree).items()}
    with durable.named(path), _system_errors():
        durable.make_folder(path.parent)
        if workdirs.writes():
            for left in path.parent.glob(".*.partial*"):  # of a killed process
                shutil.rmtree(left)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial, stored, force=True)
        if workdirs.writes():
            _seal(partial)
            if path.exists():
                shutil.rmtree(path)
            durable.move(partial, path)


def restore_checkpoint(path: str | os.PathLike, like: Any) -> Any:
    """Restores a pytree with the structure, shapes and dtypes of `like` (NumPy).

    Raises:
      Damaged: If a file of it is not as it was written.
    """
    check_checkpoint(path)
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    with _system_errors(), ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(Path(path).absolute(), _stored(empty))

    def leaf(path: Any, x: np.ndarray) -> np.ndarray:
        return stored.get(jax.tree_util.keystr(path, simple=True, separator="."), x)

    return jax.tree_util.tree_map_with_path(leaf, empty)


def restore_newest(
    directory: str | os.PathLike, like: Any, report: Callable[[str], None]
) -> tuple[int, Any] | None:
    """The newest sound checkpoint, `(number, tree)` or None; damaged ones go aside."""
    sound = -1
    if workdirs.writes():  # it looks; all processes restore the same one
        for number, path in sorted(_numbered(directory), reverse=True):
            try:
                check_checkpoint(path)
                sound = number
                break
            except workdirs.Damaged:
                workdirs.set_aside(path, report)
    sound = parallel.agreed(sound)
    if sound < 0:
        return None
    return sound, restore_checkpoint(Path(directory) / str(sound), like)


def check_checkpoint(path: str | os.PathLike) -> None:
    """Raises Damaged unless every file of a checkpoint is as it was written."""
    path = Path(path)
    try:
        expected = dict(json.loads((path / CHECKSUMS).read_bytes()))
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise workdirs.Damaged(
            f"{path} is damaged: expected checksums of its files in {CHECKSUMS}."
        ) from error
    found = _checksums(path)
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise workdirs.Damaged(
                f"{path} is damaged: {name} is not as it was written."
            )


def newest_checkpoint(directory: str | os.PathLike) -> tuple[int, Path] | None:
    """The checkpoint `directory/N` with the largest `N`, or None."""
    return max(_numbered(directory), default=None)


def remove_checkpoints(directory: str | os.PathLike, keep: int = KEEP) -> None:
    """Removes all but the newest `keep` checkpoints of `directory`, if it writes."""
    if not workdirs.writes():
        return
    found = sorted(_numbered(directory))
    for _, path in found[:-keep] if keep else found:
        shutil.rmtree(path)


def _numbered(directory: str | os.PathLike) -> list[tuple[int, Path]]:
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return [(int(p.name), p) for p in directory.iterdir() if p.name.isdecimal()]


def _stored(tree: Any) -> dict[str, Any]:
    """Leaves by path, without those of size 0: Orbax refuses to write them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}
    return {name: x for name, x in named.items() if math.prod(x.shape)}


def _checksums(path: Path) -> dict[str, str]:
    inside = (p for p in path.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    return {p.relative_to(path).as_posix(): durable.digest(p) for p in sorted(inside)}


def _seal(path: Path) -> None:
    """Writes the checksums, and flushes all files and folders to disk."""
    (path / CHECKSUMS).write_text(json.dumps(_checksums(path), indent=2) + "\n")
    for inside in (*path.rglob("*"), path):
        durable.sync(inside)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Orbax's ValueErrors of the system as OSErrors; its threads print nothing."""
    hook = threading.excepthook
    threading.excepthook = lambda args: None  # the same error is raised here
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if isinstance(error, workdirs.Damaged) or not code:
            raise
        number = int(code[1])
        raise OSError(number or errno.EIO, os.strerror(number)) from error
    finally:
        threading.excepthook = hook
