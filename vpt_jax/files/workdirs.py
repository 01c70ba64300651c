# SPDX-License-Identifier: Apache-2.0
"""Files of a run: atomic writes, records with a checksum, the lock, the log.

A kill at any moment leaves a file old or new (`durable.py`). A record that turns out to
be damaged is moved aside, named, and made again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np

from vpt_jax import parallel
from vpt_jax.files import durable
from vpt_jax.files.durable import atomic_path as atomic_path

_SPEAKS_EVERY_S = 20.0  # of progress, where there is no terminal to show it on
_REMINDS_AFTER_S = 25.0  # without a word there


def writes() -> bool:
    """Process 0 writes; the others compute the same and keep quiet."""
    return jax.process_index() == 0


def exists(path: str | os.PathLike) -> bool:
    """Whether process 0 sees a file; what depends on it is the same in all processes.

    What process 0 wrote before, the others can read after.
    """
    return bool(parallel.agreed(Path(path).exists()))


@contextlib.contextmanager
def locked(path: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file, if this process writes; one that dies lets it go.

    Raises:
      ValueError: If another process holds it and `wait` is False.
    """
    if not writes():
        yield
        return
    path = Path(path)
    durable.make_folder(path.parent)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        raise ValueError(
            f"another process works on {path.parent}; wait, or pass another --workdir."
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


class Damaged(ValueError):
    """A file that is not as it was written."""


def write_record(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Writes JSON that a later command reads back, with a checksum in it."""
    write_json(path, {**value, "sha256": _checksum(value)})


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """What `write_record` wrote.

    Raises:
      Damaged: If the file is torn, or not what was written.
    """
    again = "delete it, and the same command makes it again"
    try:
        value = json.loads(Path(path).read_bytes())
        found = value.pop("sha256")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        said = f"{path} is damaged: expected JSON with a checksum; {again}."
        raise Damaged(said) from error
    if found != _checksum(value):
        raise Damaged(f"{path} is damaged: its checksum is wrong; {again}.")
    return value


def sound_record(
    path: str | os.PathLike, report: Callable[[str], None]
) -> dict[str, Any] | None:
    """`read_record`; None where there is none, or none that can be trusted.

    Process 0 looks; all processes go on alike.
    """
    value = None
    if writes() and Path(path).exists():
        try:
            value = read_record(path)
        except Damaged:
            set_aside(path, report)
    if not parallel.agreed(value is not None):
        return None
    return value or read_record(path)


def set_aside(path: str | os.PathLike, report: Callable[[str], None]) -> None:
    """Renames what is damaged and reports it; several at once may find the same."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.damaged")
    report(f"warning: {path} is damaged; kept as {aside.name}, made again")
    if writes():
        if aside.is_dir():
            shutil.rmtree(aside)
        durable.move(path, aside)


def remove_leftovers(*folders: Path) -> None:
    """Removes temporary files of `atomic_path` that a killed process left in folders.

    Only where no other process may be writing: under the lock.
    """
    if writes():
        for folder in folders:
            for path in folder.glob(".*.????????"):
                if path.is_file():
                    path.unlink()


def _checksum(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Log:
    """A progress line on a terminal, plain lines in a file, TensorBoard events."""

    def __init__(self, path: Path, events: Path, *, echo: bool = True) -> None:
        """`echo=False` keeps lines off the terminal; progress is still shown there."""
        self._start = self._spoke = time.perf_counter()
        self._quiet, self._echo = not writes(), echo
        self._path, self._folder = path, events
        self._doing, self._closed = "", threading.Event()
        if self._quiet:
            return
        # Not SummaryWriter: its thread dies of a full disk, and the run waits for it.
        from tensorboardX.event_file_writer import EventsWriter

        for folder in (path.parent, events):
            durable.make_folder(folder)
        self._file = open(path, "a", encoding="utf-8", buffering=1)
        self._events = EventsWriter(str(events / "events"))
        if not sys.stderr.isatty():
            threading.Thread(target=self._remind, daemon=True).start()

    def line(self, text: str) -> None:
        """A line for the terminal and the file."""
        if not self._quiet:
            self._doing = text
        if self._echo and not self._quiet:
            self._clear()
            self._say(text)
        self.note(text)

    def note(self, text: str) -> None:
        """A line, or something long, for the file alone."""
        if not self._quiet:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            with durable.named(self._path):
                self._file.write(f"{stamp}  {text}\n")

    def progress(self, text: str) -> None:
        """Replaces the terminal's progress line; elsewhere a line now and then."""
        if self._quiet:
            return
        self._doing = text
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            self._clear(text[:width])
        elif time.perf_counter() - self._spoke > _SPEAKS_EVERY_S:
            self._say(text)

    def _say(self, text: str) -> None:
        self._spoke = time.perf_counter()
        print(f"{self._spoke - self._start:7.1f} s  {text}", flush=True)

    def _remind(self) -> None:
        """Speaks where what is done takes long and says nothing: compiling, say."""
        while not self._closed.wait(_REMINDS_AFTER_S / 20):
            if time.perf_counter() - self._spoke > _REMINDS_AFTER_S:
                self._say(f"still at work; the last word: {self._doing}")

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
        self.note(text)
        from tensorboardX.summary import scalar

        values = {f"{name}/{key}": value for key, value in metrics.items()}
        self._show([scalar(key, value) for key, value in values.items()], epoch)

    def pictures(self, found: Mapping[str, np.ndarray]) -> None:
        """Pictures for TensorBoard by their names, uint8 `[h, w, 3]`."""
        if self._quiet:
            return
        from tensorboardX.summary import image

        named = found.items()
        self._show([image(name, x, dataformats="HWC") for name, x in named], 0)

    def _show(self, summaries: Sequence[Any], step: int) -> None:
        """Writes what TensorBoard shows."""
        from tensorboardX.proto import event_pb2 as proto

        with durable.named(self._folder):
            for summary in summaries:
                fields = {"wall_time": time.time(), "step": step, "summary": summary}
                # Made when it is imported, where pyright cannot see it.
                event = proto.Event(**fields)  # pyright: ignore[reportAttributeAccessIssue]
                self._events.write_event(event)
            self._events.flush()

    def close(self) -> None:
        """Flushes; the log is not used after."""
        self._closed.set()
        if not self._quiet:
            self._clear()
            with durable.named(self._path):
                self._file.close()
            with durable.named(self._folder):
                self._events.close()

    def _clear(self, text: str = "") -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
