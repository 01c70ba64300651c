# SPDX-License-Identifier: Apache-2.0
"""Arrays out of files that others made: one door for all formats.

Formats are told apart by their first bytes, and values are read when they are asked
for. Files may be hostile: nothing in them is executed, every size is held against the
file before it is believed, and whatever goes wrong is a `CheckpointError`.
"""

import contextlib
import functools
import io
import json
import math
import os
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vpt_jax.files.messages import reason, shown
from vpt_jax.weights import torch_files
from vpt_jax.weights.zips import (
    MAX_ARRAYS,
    MAX_HEADER,
    File,
    Refused,
    Zip,
    at_most,
    check_name,
    fill,
)

# `read_arrays` reads at most this many bytes for each byte of the file, or this many.
MAX_GROWTH, MAX_SMALL = 64, 64 << 20

_NPY_HEADER = 10_000
_EXPECTED = "expected .npz, .safetensors or a PyTorch file (.pth, .pt, .bin)"
_SAFETENSORS = {
    f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}")
    for kind, sizes in (("u", (1, 2, 4, 8)), ("i", (1, 2, 4, 8)), ("f", (2, 4, 8)))
    for size in sizes
} | {
    "BOOL": np.dtype(np.bool_),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}


class CheckpointError(ValueError):
    """A file of weights is absent, damaged, or holds what must not be trusted.

    Example:
      >>> try:
      ...     load_backbone("B/16", "missing.npz")
      ... except CheckpointError as error:
      ...     print(error)
      no such file: missing.npz...
    """


class Lazy(NamedTuple):
    """An array that is still in its file; `load` reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Arrays(NamedTuple):
    """What a file holds; `metadata` of a PyTorch file says which network was taken."""

    arrays: dict[str, Lazy]
    metadata: dict[str, str]


@contextlib.contextmanager
def open_arrays(path: str | os.PathLike, *, text: bool = False) -> Iterator[Arrays]:
    """Lists the arrays of a file; they can be loaded while the context is open.

    Args:
      path: A local `.npz` (not pickled; arrays of type `V2` are bfloat16, as JAX users
        store it), `.safetensors`, or PyTorch file, of whatever name. Of a PyTorch file
        it lists the state dict, see `torch_files.state_dict`.
      text: Take arrays of text in an `.npz`, such as names of classes.

    Yields:
      The arrays by name, and the metadata. One thread at a time may load.

    Raises:
      CheckpointError: If the file cannot be read or is not to be trusted. So does
        `load`, where damage shows only in the values.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        with _explained(path, "a file of weights"):
            file = stack.enter_context(_open(path))
            kind, parse = _kind(file, text)
        with _explained(path, kind):
            arrays, metadata = parse(file)
            if not arrays:
                raise Refused("it holds no arrays, expected at least one")
            at_most(MAX_ARRAYS, len(arrays), "arrays")
            for name in arrays:
                check_name(name)
            explained = _explained(path, kind)
            arrays = {n: a._replace(load=explained(a.load)) for n, a in arrays.items()}
        yield Arrays(arrays, metadata)


def read_arrays(
    path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All arrays of a file, and its metadata.

    Raises:
      CheckpointError: As `open_arrays`; or if the arrays have more than 64 times the
        size of the file, and more than 64 MiB: compression makes that possible.
    """
    with open_arrays(path) as (lazy, metadata):
        with _explained(Path(path), "a file of weights"):
            limit = max(MAX_GROWTH * os.path.getsize(path), MAX_SMALL)
        total = sum(array.nbytes for array in lazy.values())
        if total > limit:
            raise CheckpointError(
                f"{path} describes {total} bytes of arrays, expected at most {limit}"
                " from a file of its size; load what you need with open_arrays."
            )
        return {name: array.load() for name, array in lazy.items()}, metadata


@contextlib.contextmanager
def _explained(path: Path, kind: str) -> Iterator[None]:
    """Makes every error inside a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever hostile bytes make a parser raise
        said, name = reason(error, 1000).rstrip("."), type(error).__name__
        if not isinstance(error, ValueError) and said != name:
            said = f"{name} {said}"
        if isinstance(error, OSError):
            said += "; expected a file that you may read, check its permissions"
        elif isinstance(error, MemoryError):
            said += "; it is damaged, or needs more memory than there is"
        elif not isinstance(error, Refused):
            said += "; it is damaged or incomplete, download it again"
        raise CheckpointError(f"{path} cannot be read as {kind}: {said}.") from error


def _open(path: Path) -> File:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}.") from None
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is a folder; {_EXPECTED}.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no regular file; {_EXPECTED}.")
    return File(io.FileIO(path))


def _kind(file: File, text: bool) -> tuple[str, Callable[[File], Any]]:
    """The format's name for messages, and its parser."""
    head = file.read(512)
    file.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ".npz or PyTorch's zip", functools.partial(_parse_zip, text=text)
    if head[8:9] == b"{":
        return ".safetensors", _parse_safetensors
    if head[:1] == b"\x80" and torch_files.LEGACY_MAGIC in head[:32]:
        return "PyTorch's old format", _parse_legacy
    raise Refused(f"it {_looks_like(head)}; {_EXPECTED}")


_OTHERS = (
    (rb"$", "is empty"),
    (rb"\s*<(!doctype|html|\?xml)", "is a web page, such as a login or an error"),
    (rb"version https://git-lfs", "is a Git LFS pointer; run git lfs pull"),
    (rb"\x93NUMPY", "is a single .npy array; collect arrays by name with np.savez"),
    (rb"\x89HDF", "is an HDF5 file; convert it with np.savez"),
    (rb".{257}ustar", "is a tar archive; unpack it"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf", "is compressed; unpack it"),
    (rb"\x80[\2-\5]", "is a Python pickle, which could run anything when loaded"),
)


def _looks_like(head: bytes) -> str:
    for pattern, what in _OTHERS:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return what
    return f"starts with {head[:16]!r}"


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _plain(array: np.ndarray) -> np.ndarray:
    """In the machine's byte order, and booleans that are 0 or 1."""
    if array.dtype == np.bool_:
        return array.view(np.uint8) != 0
    return array.astype(array.dtype.newbyteorder("="), copy=False)


# --- zip ------------------------------------------------------------------------------


def _parse_zip(file: File, text: bool) -> Arrays:
    zipped = Zip(file)
    described = [n for n in zipped.members if re.fullmatch(r"[^/]*/data\.pkl", n)]
    if described:
        return _parse_torch_zip(zipped, described[0].removesuffix("data.pkl"))
    arrays = {}
    for name, info in zipped.members.items():
        if not name.endswith(".npy"):
            raise Refused(f"its member {name!r} is no .npy array; {_EXPECTED}")
        arrays[name.removesuffix(".npy")] = _npy(zipped, info, text)
    return Arrays(arrays, {})


def _npy(zipped: Zip, info: zipfile.ZipInfo, text: bool) -> Lazy:
    shape, dtype, fortran, skip = _npy_header(zipped.head(info, _NPY_HEADER), text)
    count = math.prod(shape)
    size = skip + count * dtype.itemsize
    if size != info.file_size:
        raise ValueError(
            f"member {info.orig_filename!r} has {info.file_size} bytes, but its header"
            f" describes {size}"
        )

    def load() -> np.ndarray:
        flat = np.empty(count, dtype)
        zipped.read(info, skip, _bytes_of(flat))
        return _plain(flat).reshape(shape, order="F" if fortran else "C")

    return Lazy(shape, dtype.newbyteorder("="), load)


def _npy_header(head: bytes, text: bool) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Shape, dtype, whether in Fortran's order, and where the values begin."""
    stream = io.BytesIO(head)
    # Of odd escapes, and of Python 2's integers.
    with warnings.catch_warnings(action="ignore"):
        version = np.lib.format.read_magic(stream)[0]
        if not 1 <= version <= 3:
            raise ValueError(f"an array has version {version} of .npy")
        # Version 3 differs from 2 in the names of columns only, which are refused.
        parse = getattr(np.lib.format, f"read_array_header_{min(version, 2)}_0")
        shape, fortran, dtype = parse(stream, max_header_size=_NPY_HEADER)
    letters = text and dtype.kind == "U" and 0 < dtype.itemsize < 40_000
    if dtype == "V2":  # as JAX users store it
        dtype = np.dtype(jnp.bfloat16)
    elif dtype.char not in "?bhilqBHILQefd" and not letters:
        why = " (Python objects, never loaded)" if dtype.hasobject else ""
        raise Refused(
            f"an array has dtype {shown(str(dtype), 40)}{why}; expected booleans,"
            " integers or floats"
        )
    at_most(torch_files.MAX_DIMS, len(shape), "axes of an array")
    if min(shape, default=0) < 0:
        raise ValueError(f"an array has the shape {shape}")
    return shape, dtype, fortran, stream.tell()


# --- PyTorch --------------------------------------------------------------------------


# Fills a view with the bytes of a storage, from one of them on.
_Read = Callable[[torch_files.Storage, int, memoryview], None]


def _parse_torch_zip(zipped: Zip, folder: str) -> Arrays:
    order = zipped.members.get(folder + "byteorder")
    if order is not None and zipped.head(order, 8) != b"little":
        raise Refused(torch_files.LITTLE)
    described = zipped.members[folder + "data.pkl"]
    at_most(torch_files.MAX_PICKLE, described.file_size, "bytes of data.pkl")
    pickled = torch_files.unpickle(
        io.BytesIO(zipped.head(described, torch_files.MAX_PICKLE))
    )
    members = {key: zipped.members[f"{folder}data/{key}"] for key in pickled.storages}
    for key, info in members.items():
        size = pickled.storages[key].nbytes
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
            raise ValueError(
                f"storage {info.orig_filename!r} has {info.file_size} bytes, expected"
                f" {size}, not compressed"
            )
    checked = set()

    def read(storage: torch_files.Storage, skip: int, out: memoryview) -> None:
        info = members[storage.key]
        if storage.key not in checked:
            zipped.read(info, skip, out)
            checked.add(storage.key)
        else:  # another view of a large storage
            zipped.file.seek(zipped.start(info) + skip)
            fill(zipped.file, out)

    return _torch_arrays(pickled.value, read, zipped.file.size)


def _parse_legacy(file: File) -> Arrays:
    stream = io.BytesIO(file.read(torch_files.MAX_PICKLE))
    pickled, storages = torch_files.legacy_storages(stream)
    position, starts = stream.tell(), {}
    for storage in storages:
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.size:
            raise ValueError(f"a storage has {count} values, expected {storage.size}")
        starts[storage.key] = position + 8
        position += 8 + storage.nbytes
        if position > file.size:
            raise ValueError("the file ends within a storage")

    def read(storage: torch_files.Storage, skip: int, out: memoryview) -> None:
        file.seek(starts[storage.key] + skip)
        fill(file, out)

    return _torch_arrays(pickled.value, read, file.size)


def _torch_arrays(value: Any, read: _Read, size: int) -> Arrays:
    tensors, several = torch_files.state_dict(value)
    covered = sum(t.span * t.storage.dtype.itemsize for t in tensors.values())
    if covered > max(MAX_GROWTH * size, MAX_SMALL):
        raise Refused(
            f"its tensors share their bytes {covered // size} times over, expected at"
            f" most {MAX_GROWTH}; re-save it after .contiguous()"
        )

    def load(tensor: torch_files.Tensor) -> np.ndarray:
        values = np.empty(tensor.span, tensor.storage.dtype)
        skip = tensor.offset * values.itemsize if tensor.span else 0
        read(tensor.storage, skip, _bytes_of(values))
        return torch_files.as_array(tensor, _plain(values))

    arrays = {
        name: Lazy(t.shape, t.storage.dtype, functools.partial(load, t))
        for name, t in tensors.items()
    }
    return Arrays(arrays, {"networks": several} if several else {})


# --- safetensors ----------------------------------------------------------------------


def _parse_safetensors(file: File) -> Arrays:
    """The library checks the header: JSON, types, shapes and offsets.

    Values are read here: for NumPy the library knows no float8, and its memory map ends
    the process where a file is cut meanwhile.
    """
    from safetensors import safe_open

    (length,) = struct.unpack("<Q", file.read(8))
    at_most(MAX_HEADER, length, "bytes of header")
    with safe_open(file.name, "np") as checked:
        metadata = checked.metadata() or {}
    header = json.loads(file.read(length), object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    at_most(MAX_ARRAYS, len(header), "arrays")

    def load(start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = np.empty(shape, dtype)
        file.seek(start)
        fill(file, _bytes_of(array))
        return _plain(array)

    arrays = {}
    for name, entry in header.items():
        dtype, shape = _SAFETENSORS.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise Refused(
                f"an array has dtype {shown(entry['dtype'], 40)}; expected one of"
                f" {sorted(_SAFETENSORS)}"
            )
        at_most(torch_files.MAX_DIMS, len(shape), "axes of an array")
        start = 8 + length + entry["data_offsets"][0]
        arrays[name] = Lazy(shape, dtype, functools.partial(load, start, shape, dtype))
    return Arrays(arrays, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The library takes the last of two entries of a name."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is there twice in its header")
    return dict(pairs)
