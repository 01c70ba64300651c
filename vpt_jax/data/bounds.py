# SPDX-License-Identifier: Apache-2.0
"""Files from strangers: what of them is read, and how much of it at a time."""

import contextlib
import os
import stat
import threading
from collections.abc import Iterator

from vpt_jax.files.messages import mismatch

MAX_BYTES = 1 << 30  # of a picture file: the largest picture, with 16 bits a channel
MAX_TEXT = 1 << 28  # of a list: ImageNet's has 50 MB


class Room:
    """What all threads together hold in memory at a time; one alone may take more.

    A small file can hold a large picture, and there are many threads.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._held: list[int] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Waits until there is room."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._held or sum(self._held) + amount <= self._limit
            )
            self._held.append(amount)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(amount)
                self._changed.notify_all()


_ROOM = Room(MAX_BYTES)


@contextlib.contextmanager
def opened(path: str, limit: int = MAX_BYTES) -> Iterator[bytes]:
    """The content of a regular file, for as long as the block takes.

    Raises:
      ValueError: If it cannot be had, or is larger than `limit`.
    """
    with _explained():
        found = os.stat(path)
    # Reading a pipe would wait for ever.
    if not stat.S_ISREG(found.st_mode):
        raise mismatch("", "something else", "a regular file", "remove it")
    if (size := found.st_size) > limit:
        got = f"a file of {size:,} bytes"
        raise mismatch("", got, f"at most {limit:,}", "make it smaller")
    with _ROOM.take(size):
        with _explained(), open(path, "rb") as f:
            data = f.read(size)  # and not what is added meanwhile
        yield data


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
        raise ValueError(
            f"cannot be read ({getattr(e, 'strerror', e)}); expected a file that you "
            "may read; check its permissions, or where the link leads."
        ) from e
