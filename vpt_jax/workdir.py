# SPDX-License-Identifier: Apache-2.0
"""Files of a run: atomic writes and Orbax checkpoints.

Everything is written under a temporary name and renamed, so a workdir survives a kill
at any moment: a file is either the old one or the new one.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp

from vpt_jax import parallel


def writes() -> bool:
    """Process 0 writes; the others compute the same and keep quiet."""
    return jax.process_index() == 0


def exists(path: str | os.PathLike) -> bool:
    """Whether process 0 sees a file; what depends on it is the same in all processes.

    What process 0 wrote before, the others can read after.
    """
    return bool(parallel.agreed(Path(path).exists()))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path` that is renamed to it on success."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes 0600
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file, if this process writes; one that dies lets it go.

    Args:
      path: The file; its folder is created.
      wait: For the other process, if one holds it.

    Raises:
      ValueError: If another process holds it and `wait` is False.
    """
    if not writes():
        yield
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        raise ValueError(
            f"another process works on {path.parent}; wait for it to end, or pass"
            " another --workdir."
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON atomically, indented, with a final newline; NaN is an error."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _stored(tree: Any) -> dict[str, Any]:
    """Leaves by path, without those of size 0: Orbax refuses to write them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}
    return {name: x for name, x in named.items() if math.prod(x.shape)}


def save_checkpoint(path: str | os.PathLike, tree: Any) -> None:
    """Saves a pytree of arrays with Orbax; `path` appears when it is whole."""
    stored = {name: np.asarray(x) for name, x in _stored(tree).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), stored, force=True)


def restore_checkpoint(path: str | os.PathLike, like: Any) -> Any:
    """Restores a pytree with the structure, shapes and dtypes of `like` (NumPy)."""
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(Path(path).absolute(), _stored(empty))

    def leaf(path: Any, x: np.ndarray) -> np.ndarray:
        return stored.get(jax.tree_util.keystr(path, simple=True, separator="."), x)

    return jax.tree_util.tree_map_with_path(leaf, empty)


def newest_checkpoint(directory: str | os.PathLike) -> tuple[int, Path] | None:
    """The checkpoint `directory/N` with the largest `N`, or None."""
    directory, found = Path(directory), []
    if directory.is_dir():
        found = [int(p.name) for p in directory.iterdir() if p.name.isdecimal()]
    number = parallel.agreed(max(found, default=-1))
    return None if number < 0 else (number, directory / str(number))


def remove_checkpoints(directory: str | os.PathLike, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints of `directory`, if it writes."""
    if not writes():
        return
    numbers = sorted(
        int(p.name) for p in Path(directory).iterdir() if p.name.isdecimal()
    )
    for number in numbers[:-keep] if keep else numbers:
        shutil.rmtree(Path(directory) / str(number))


class Log:
    """A progress line on a terminal, plain lines in a file, TensorBoard events."""

    def __init__(
        self,
        path: str | os.PathLike,
        events: str | os.PathLike,
        *,
        echo: bool = True,
    ) -> None:
        """`echo=False` keeps lines off the terminal; progress is still shown there."""
        self._start = time.perf_counter()
        self._quiet, self._echo = not writes(), echo
        if self._quiet:
            return
        from tensorboardX import SummaryWriter

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8", buffering=1)
        self._events = SummaryWriter(str(events))

    def line(self, text: str) -> None:
        """A line for the terminal and the file."""
        if self._quiet:
            return
        if self._echo:
            self._clear()
            print(f"{time.perf_counter() - self._start:7.1f} s  {text}", flush=True)
        self._write(text)

    def note(self, text: str) -> None:
        """Something long, for the file alone."""
        if not self._quiet:
            self._write(text)

    def progress(self, text: str) -> None:
        """Replaces the terminal's progress line; nothing where there is none."""
        if not self._quiet and sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{text[:width]}", end="", file=sys.stderr, flush=True)

    def epoch(
        self,
        name: str,
        epoch: int,
        epochs: int,
        images: int,
        metrics: dict[str, float],
        prefix: str = "",
    ) -> None:
        """An epoch over `images` pictures: its `loss`, `accuracy` and `seconds`."""
        if self._quiet:
            return
        left = (epochs - epoch) * metrics["seconds"]
        text = (
            f"{name}: epoch {epoch}/{epochs}, loss {metrics['loss']:.4f}, accuracy"
            f" {100 * metrics['accuracy']:.1f} %, {images / metrics['seconds']:.0f}"
            " images/s"
        )
        self.progress(f"{prefix} {text}, {left:.0f} s left")
        self._write(text)
        for key, value in metrics.items():
            self._events.add_scalar(f"{name}/{key}", value, epoch)

    def close(self) -> None:
        """Flushes; the log is not used after."""
        if not self._quiet:
            self._clear()
            self._file.close()
            self._events.close()

    def _clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"{stamp}  {text}\n")
