# SPDX-License-Identifier: Apache-2.0
"""Decoded pictures on disk: made once, memory-mapped from then on.

A cache file is the pixels, then one line of JSON (the key, what the maker had to say,
the number of pictures, a checksum) and the length of that line. The file is found by a
hash of its key, appears when it is whole, and is checked when it is opened. It may be
deleted at any time, and be larger than memory: who goes through it calls `forget`.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.array_utils import byte_bounds

from vpt_jax.files.durable import atomic_path, make_folder

_END = b"vptcache"  # the last bytes of every file
_TAIL = len(_END) + 8
_CHUNK = 1 << 22  # bytes per checksum call
_STALE_S = 24 * 3600  # a temporary file of this age was left by a killed process


def default_folder() -> Path:
    """`~/.cache/vpt_jax/pictures`, or in `VPT_JAX_CACHE` if that is set."""
    root = os.environ.get("VPT_JAX_CACHE") or "~/.cache/vpt_jax"
    return Path(root).expanduser() / "pictures"


def cached(
    folder: str | os.PathLike,
    key: Mapping[str, Any],
    side: int,
    make: Callable[[Callable[[np.ndarray], None]], Any],
    report: Callable[[str], None] = print,
    *,
    strip: bool = False,
) -> tuple[np.ndarray, Any]:
    """Pictures from the cache; made, and kept for the next time, if not there.

    Several processes may do this at once: each makes the file, the last one's stays.

    Args:
      folder: Where cache files lie; it is created.
      key: Everything that determines the pictures, as JSON can hold it.
      side: Height and width of the pictures.
      make: Calls its argument with uint8 `[side, side, 3]` once per picture, in order,
        and returns something that JSON can hold: the `info`.
      report: Called with a line of text when a damaged file was found.
      strip: Pictures are uint8 `[any, side, 3]` and are glued along their first axis.

    Returns:
      A read-only memory map uint8 `[n, side, side, 3]`, or `[total, side, 3]` of a
      strip, and the `info`.

    Raises:
      ValueError: If the folder cannot be written; nothing is left behind then.
    """
    text = json.dumps(key, sort_keys=True)
    key = json.loads(text)  # tuples as lists: as it will be read
    shape = (side, 3) if strip else (side, side, 3)
    path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.pictures"
    try:
        if path.exists():
            return _open(path, key, shape)
    except (OSError, ValueError) as e:
        report(f"{path} is damaged ({e}); making it again")
    with _new_file(path) as file:
        crc, num = 0, 0

        def write(picture: np.ndarray) -> None:
            nonlocal crc, num
            data = np.ascontiguousarray(picture).data.cast("B")
            crc, num = zlib.crc32(data, crc), num + (len(picture) if strip else 1)
            # Not into a memory map: a full disk would end the process.
            file.write(data)

        info = make(write)
        crc = zlib.crc32(json.dumps(info).encode(), crc)
        end = {"key": key, "info": info, "num": num, "side": side, "crc32": crc}
        line = json.dumps(end).encode() + b"\n"
        file.write(line + len(line).to_bytes(8, "little") + _END)
    return _open(path, key, shape)


def forget(images: Any, start: int, stop: int) -> None:
    """Gives back the memory of `images[start:stop]`, if it is that of a mapped file.

    What is asked for again is read again. Without it, all that was ever looked at
    counts as this process's memory, and a job with a limit is killed.
    """
    mapped = images
    while isinstance(mapped, np.ndarray) and not isinstance(mapped, np.memmap):
        mapped = mapped.base
    # Only a read-only map: changes that were made in memory alone would be lost.
    if not isinstance(mapped, np.memmap) or mapped.mode != "r":
        return
    pages: mmap.mmap = mapped._mmap  # pyright: ignore[reportAttributeAccessIssue]
    low, high = byte_bounds(images[start:stop])
    first, _ = byte_bounds(np.frombuffer(pages, np.uint8))
    # Whole pages: the one that holds the start has been read, as has all before it.
    low = (low - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if high - first > low and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        pages.madvise(mmap.MADV_DONTNEED, low, high - first - low)


def _open(path: Path, key: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, Any]:
    """Maps a cache file of `shape` rows; ValueError says what is wrong with it."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        f.seek(max(size - _TAIL, 0))
        tail = f.read()
        start = size - _TAIL - int.from_bytes(tail[:8], "little")
        if tail[8:] != _END or start < 0:
            raise ValueError("its end is missing")
        f.seek(start)
        line = f.read(size - _TAIL - start)
    try:
        end = json.loads(line)
        same = end["key"] == key and end["side"] == shape[0]
        num, crc, info = end["num"], end["crc32"], end["info"]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError("its description cannot be read") from e
    if not same:
        raise ValueError("it describes other pictures")
    # Before mapping: touching a page that the file does not have kills the process.
    if start != num * math.prod(shape):
        raise ValueError(f"got {start} bytes of pixels for {num} pictures")
    # A map cannot be empty.
    pixels = np.memmap(path, np.uint8, "r", shape=(start,)) if num else np.zeros(0)
    found = 0
    for at in range(0, start, _CHUNK):
        found = zlib.crc32(pixels[at : at + _CHUNK].data, found)
        forget(pixels, at, at + _CHUNK)
    if zlib.crc32(json.dumps(info).encode(), found) != crc:
        raise ValueError("its checksum is wrong")
    return np.asarray(pixels, np.uint8).reshape(num, *shape), info


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path`, on disk, when the block ends well."""
    try:
        make_folder(path.parent)
        for left in path.parent.glob(f".{path.name}.*"):  # of killed processes
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _STALE_S:
                    left.unlink()
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            yield file
    except OSError as e:
        raise ValueError(
            f"cannot write {path} ({e.strerror}); expected room for decoded pictures; "
            "free some, or set VPT_JAX_CACHE to a folder on another disk."
        ) from e
