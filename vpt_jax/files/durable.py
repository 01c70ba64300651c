# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, whenever the process or the machine ends.

A file is written under a temporary name, flushed, renamed, and the rename is flushed
too. What a disk refuses is an OSError that names the file.
"""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RIGHT = (errno.EROFS, errno.EACCES, errno.EPERM)
_GONE = (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV)


def sync(path: str | os.PathLike) -> None:
    """Flushes a file's content, or a folder's names, to disk."""
    folder = os.path.isdir(path)
    if folder and os.name == "nt":
        return  # Windows cannot open folders; its renames are not delayed
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have nothing to flush for a folder.
        if not (folder and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(handle)


def make_folder(path: str | os.PathLike) -> None:
    """Creates a folder and those above it, on disk when this returns."""
    path = Path(path).absolute()
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for new in missing:
        sync(new.parent)


def move(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Renames a file or folder whose content is on disk, and flushes the rename."""
    os.replace(source, target)
    sync(Path(target).absolute().parent)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path` that is renamed to it on success.

    Raises:
      OSError: If it cannot be written; it names `path`, whose old content stays.
    """
    path = Path(path)
    with named(path):
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o644)  # mkstemp makes 0600
            sync(temporary)
            move(temporary, path)
        finally:
            # A file system that is gone would hide the error that said so.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Gives OSErrors of the block, which often name no file or a temporary one, a name.

    Those of another file keep theirs.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the system: a decoder's, say
            raise
        found = os.path.basename(os.fsdecode(error.filename or ""))
        if found and not found.startswith(f".{Path(path).name}."):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def explain(error: OSError) -> str:
    """What happened to which file, what was expected of the disk, and what to do."""
    expected, remedy = "a file that can be used", "check the path"
    if error.errno in _ROOM:
        expected, remedy = "room on its disk", "free some, or raise the quota"
    elif error.errno in _RIGHT:
        expected = "a place that this user may write to"
        remedy = "change the rights, or choose another place (--workdir, VPT_JAX_CACHE)"
    elif error.errno in _GONE:
        expected, remedy = "its disk to answer", "check the disk or the network"
    what = error.strerror or str(error) or type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return (
        f"{where}{what}; expected {expected}; {remedy}, then give the same command"
        " again: it continues from what was saved."
    )


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
