# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, the notice before a machine is taken away: save, then exit with 75.

`watch` makes SIGTERM raise `Preempted`, as Ctrl-C raises KeyboardInterrupt. Where
something is worth saving first, `deferred` holds the exception back and `requested` is
asked between two compiled calls. A second SIGTERM ends the process at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: the same command continues
_SAME_S = 1.0


class Preempted(BaseException):
    """SIGTERM came; like KeyboardInterrupt, nothing but the command line catches it."""


_requested = threading.Event()
_held = 0


def watch() -> None:
    """From here on SIGTERM is handled as the module says; in the main thread, once."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, _handle)
    # Python's handlers wait until a compiled call returns; this one does not.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()


def requested() -> bool:
    """Whether SIGTERM came."""
    return _requested.is_set()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Holds `Preempted` back within the block; it is raised when the block ends well.

    The block asks `requested` often, saves, and raises `Preempted` itself.
    """
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    if requested():
        raise Preempted


def _handle(number: int, frame: FrameType | None) -> None:
    del number, frame
    # Once: raised again, it would break off what the first one cleans up.
    if _requested.is_set():
        return
    _requested.set()
    if not _held:
        raise Preempted


def _listen(reader: int) -> None:
    first = None
    while data := os.read(reader, 64):
        if signal.SIGTERM not in data:
            continue
        # coreutils' timeout, for one, signals the process and then its group.
        if first is not None and time.monotonic() - first > _SAME_S:
            os._exit(128 + signal.SIGTERM)
        first = time.monotonic() if first is None else first
