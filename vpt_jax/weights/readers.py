# SPDX-License-Identifier: Apache-2.0
"""Arrays out of files that others made: one door for all formats.

`open_arrays` tells `.npz`, safetensors and PyTorch's two formats apart by their first
bytes, not by their names, and lists what a file holds; the values of an array are read
when they are asked for, straight into it. So a file costs its size in memory once, and
an array that nobody expects is never allocated.

Files may be damaged or hostile. Nothing in them is executed, none of their names is
used as a path, every size that they state is held against the file before it is
believed, and whatever goes wrong is a `CheckpointError` that names the file.
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
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vpt_jax.files.messages import shown
from vpt_jax.weights import torch_files
from vpt_jax.weights.torch_files import Refused

MAX_HEADER = torch_files.MAX_PICKLE  # also of other formats; a ViT-L needs 50 kB
MAX_ARRAYS = 20_000
# `read_arrays` reads at most this many bytes for each byte of the file, or this many.
MAX_GROWTH, MAX_SMALL = 64, 64 << 20

_CHUNK = 1 << 20
_NPY_HEADER = 10_000
_DEFLATE_LIMIT = 1032  # times smaller is the most that deflate can do
_EXPECTED = "expected .npz, .safetensors or a PyTorch file (.pth, .pt, .bin)"
_UNSAFE_NAME = re.compile(r"^[/~]|^[A-Za-z]:|\\|(^|/)(\.{0,2})(/|$)|[\x00-\x1f\x7f]")
_NPY_PAIR = r"'(?:descr|fortran_order|shape)':\s*(?:'[^']*'|True|False|\([0-9L, ]*\))"
_NPY_DICT = re.compile(rf"\{{\s*{_NPY_PAIR},\s*{_NPY_PAIR},\s*{_NPY_PAIR},?\s*\}}\s*")
_NPY_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248])")
_NPY_TEXT = re.compile(r"[<>]U[1-9]\d{0,3}")
_SAFETENSORS = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}


class CheckpointError(ValueError):
    """A file of weights is absent, damaged, or holds what must not be trusted."""


class Lazy(NamedTuple):
    """An array that is still in its file; `load` reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Arrays(NamedTuple):
    """What a file holds.

    `metadata` is a safetensors header's. Of a PyTorch file it has `networks` where
    there are several: which was taken.
    """

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
            for name in arrays:
                _check_name(name)
        yield Arrays(
            {
                name: Lazy(a.shape, a.dtype, _explained(path, kind)(a.load))
                for name, a in arrays.items()
            },
            metadata,
        )


def read_arrays(
    path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All arrays of a file, and its metadata.

    A small file can describe arrays without bound (by compression, or by members that
    share their bytes). So the arrays may have 64 times the size of the file in total,
    or 64 MiB where that is more.

    Raises:
      CheckpointError: As `open_arrays`, and if the arrays are larger than that.
    """
    with open_arrays(path) as (lazy, metadata):
        with _explained(Path(path), "a file of weights"):
            limit = max(MAX_GROWTH * os.path.getsize(path), MAX_SMALL)
        total = sum(array.nbytes for array in lazy.values())
        if total > limit:
            raise CheckpointError(
                f"{path} describes {total} bytes of arrays, expected at most {limit}"
                " from a file of its size; open it with open_arrays and load what you"
                " need."
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
        reason = str(error)[:1000].rstrip(".")
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__} {reason}".rstrip()
        if not isinstance(error, Refused | OSError | MemoryError):
            reason += "; it is damaged or incomplete, download it again"
        elif isinstance(error, OSError):
            reason += "; expected a file that you may read, check its permissions"
        raise CheckpointError(f"{path} cannot be read as {kind}: {reason}.") from error


class _File(io.BufferedReader):
    """Refuses long reads: zipfile believes what a file says of its directory's size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_HEADER:
            raise Refused(f"its header has {size} bytes, expected at most {MAX_HEADER}")
        return super().read(size)


def _open(path: Path) -> _File:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}.") from None
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is a folder; {_EXPECTED}.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no regular file; {_EXPECTED}.")
    return _File(io.FileIO(path))


def _kind(file: _File, text: bool) -> tuple[str, Callable[[_File], Any]]:
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


def _looks_like(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, such as a login or an error in place of the download"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself (run git lfs pull)"
    if head.startswith(b"\x93NUMPY"):
        return "is a single .npy array (collect arrays by name with np.savez)"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file (convert it with np.savez)"
    if head[257:262] == b"ustar":
        return "is a tar archive (unpack it)"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")):
        return "is compressed (unpack it)"
    if re.match(rb"\x80[\x02-\x05]", head):
        return "is a Python pickle, which could run anything when loaded"
    return f"starts with {head[:16]!r}"


def _check_name(name: str) -> None:
    """Names are never used as paths here, but nobody else should have to know."""
    if _UNSAFE_NAME.search(name):
        raise Refused(
            f"it has the unsafe name {shown(name, 80)}, expected one like a/b; save it"
            " again with other names"
        )


def _fill(file: Any, view: memoryview) -> None:
    while view:
        n = file.readinto(view[:_CHUNK])
        if not n:
            raise ValueError(f"the file ends {len(view)} bytes too early")
        view = view[n:]


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _plain(array: np.ndarray) -> np.ndarray:
    """In the machine's byte order, and booleans that are 0 or 1."""
    if array.dtype == np.bool_:
        return array.view(np.uint8) != 0
    return array.astype(array.dtype.newbyteorder("="), copy=False)


# --- zip ------------------------------------------------------------------------------


class _Zip:
    """The members of a zip file, checked before they are believed."""

    def __init__(self, file: _File):
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.archive = zipfile.ZipFile(file)
        self.members: dict[str, zipfile.ZipInfo] = {}
        infos = self.archive.infolist()
        file.seek(-22 - len(self.archive.comment), os.SEEK_END)
        magic, count = struct.unpack("<4s6xH10x", file.read(22))
        if magic != b"PK\x05\x06" or count not in (len(infos), 0xFFFF):  # zip64
            raise ValueError(f"its directory lists {len(infos)} of {count} members")
        if len(infos) > MAX_ARRAYS:
            raise Refused(f"it has {len(infos)} members, expected at most {MAX_ARRAYS}")
        for info in infos:
            name = info.orig_filename
            _check_name(name)
            if name in self.members:
                raise ValueError(f"it has two members {name!r}")
            if info.flag_bits & 1:
                raise Refused(f"its member {name!r} is encrypted; unpack it first")
            packed = info.compress_size
            largest = {
                zipfile.ZIP_STORED: packed,
                zipfile.ZIP_DEFLATED: _DEFLATE_LIMIT * (packed + 1),
            }.get(info.compress_type)
            if largest is None:
                raise Refused(
                    f"its member {name!r} has compression {info.compress_type},"
                    " expected none or deflate; write it again with np.savez"
                )
            if packed > self.size or info.file_size > largest:
                raise ValueError(f"member {name!r} states a size that it cannot have")
            self.members[name] = info

    def head(self, info: zipfile.ZipInfo, size: int) -> bytes:
        """The first bytes of a member, after a check of its own header."""
        with self.archive.open(info) as member:
            return member.read(size)

    def start(self, info: zipfile.ZipInfo) -> int:
        """Where the bytes of a stored member begin."""
        self.head(info, 0)
        self.file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", self.file.read(4))
        start = info.header_offset + 30 + name + extra
        if start + info.file_size > self.size:
            raise ValueError("the file ends within a member")
        return start

    def read(self, info: zipfile.ZipInfo, skip: int, out: memoryview) -> None:
        """Fills `out` from byte `skip` of a member, and checks the whole member."""
        rest = info.file_size - skip - len(out)
        scratch = memoryview(bytearray(min(_CHUNK, max(skip, rest))))

        def parts() -> Iterator[memoryview]:
            for size, target in ((skip, None), (len(out), out), (rest, None)):
                for i in range(0, size, _CHUNK):
                    part = scratch if target is None else target[i:]
                    yield part[: min(_CHUNK, size - i)]

        if info.compress_type == zipfile.ZIP_STORED:
            self.file.seek(self.start(info))
            checksum = 0
            for part in parts():
                _fill(self.file, part)
                checksum = zlib.crc32(part, checksum)
            if checksum != info.CRC:
                raise ValueError(f"bad checksum of member {info.orig_filename!r}")
        else:
            with self.archive.open(info) as member:  # checks at the end
                for part in parts():
                    _fill(member, part)


def _parse_zip(file: _File, text: bool) -> Arrays:
    zipped = _Zip(file)
    described = [n for n in zipped.members if re.fullmatch(r"[^/]*/data\.pkl", n)]
    if described:
        return _parse_torch_zip(zipped, described[0].removesuffix("data.pkl"))
    arrays = {}
    for name, info in zipped.members.items():
        if not name.endswith(".npy"):
            raise Refused(
                f"its member {name!r} is no .npy array, so it is no .npz file;"
                f" {_EXPECTED}"
            )
        arrays[name.removesuffix(".npy")] = _npy(zipped, info, text)
    return Arrays(arrays, {})


def _npy(zipped: _Zip, info: zipfile.ZipInfo, text: bool) -> Lazy:
    shape, dtype, fortran, skip = _npy_header(zipped.head(info, _NPY_HEADER), text)
    count = math.prod(shape)
    if skip + count * dtype.itemsize != info.file_size:
        raise ValueError(
            f"member {info.orig_filename!r} has {info.file_size} bytes, but its header"
            f" describes {skip + count * dtype.itemsize}"
        )

    def load() -> np.ndarray:
        flat = np.empty(count, dtype)
        zipped.read(info, skip, _bytes_of(flat))
        flat = _plain(flat)
        return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)

    return Lazy(shape, dtype.newbyteorder("="), load)


def _npy_header(
    head: bytes, strings: bool
) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Shape, dtype, whether in Fortran's order, and where the values begin.

    NumPy's own reader evaluates the header as Python and may warn; this one matches
    the text that writers of arrays produce.
    """
    if head[:6] != b"\x93NUMPY" or head[6:7] not in (b"\1", b"\2", b"\3"):
        raise ValueError(f"an array starts with {head[:8]!r}, which is no .npy header")
    length, start = ("<H", 10) if head[6] == 1 else ("<I", 12)
    (size,) = struct.unpack(length, head[8:start])
    text = head[start : start + size].decode("latin-1")
    if len(text) < size or not _NPY_DICT.fullmatch(text):
        raise Refused(
            f"the .npy header {shown(text, 80)} is not that of a plain array; write"
            " the file again with np.savez"
        )
    fields = dict(re.findall(r"'(\w+)':\s*('[^']*'|True|False|\([^)]*\))", text))
    code = fields["descr"].strip("'")
    if code in ("|V2", "<V2"):
        dtype = np.dtype(jnp.bfloat16)
    elif _NPY_DTYPE.fullmatch(code) or (strings and _NPY_TEXT.fullmatch(code)):
        dtype = np.dtype(code)
    else:
        why = "Python objects (pickle), never loaded" if "O" in code else "unsupported"
        raise Refused(
            f"an array has dtype {shown(code, 40)} ({why}); expected booleans,"
            " integers or floats"
        )
    shape = tuple(int(n) for n in re.findall(r"\d+", fields["shape"]))
    if len(shape) > torch_files.MAX_DIMS:
        raise Refused(
            f"an array has {len(shape)} axes, expected at most {torch_files.MAX_DIMS}"
        )
    return shape, dtype, fields["fortran_order"] == "True", start + size


# --- PyTorch --------------------------------------------------------------------------


def _parse_torch_zip(zipped: _Zip, folder: str) -> Arrays:
    order = zipped.members.get(folder + "byteorder")
    if order is not None and zipped.head(order, 8) != b"little":
        raise Refused("it was not saved on a little-endian machine; re-save it")
    described = zipped.members[folder + "data.pkl"]
    if described.file_size > torch_files.MAX_PICKLE:
        raise Refused(
            f"its data.pkl has {described.file_size} bytes, expected at most"
            f" {torch_files.MAX_PICKLE}"
        )
    pickled = torch_files.unpickle(
        io.BytesIO(zipped.head(described, torch_files.MAX_PICKLE))
    )
    checked = set()

    def reader(storage: torch_files.Storage) -> Callable[[int, memoryview], None]:
        info = zipped.members[f"{folder}data/{storage.key}"]
        size = storage.size * storage.dtype.itemsize
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
            raise ValueError(
                f"storage {info.orig_filename!r} has {info.file_size} bytes, expected"
                f" {size}, not compressed"
            )
        start = zipped.start(info)

        def read(skip: int, out: memoryview) -> None:
            if storage.key not in checked:
                zipped.read(info, skip, out)
                checked.add(storage.key)
            else:  # another view of a large storage
                zipped.file.seek(start + skip)
                _fill(zipped.file, out)

        return read

    return _torch_arrays(pickled.value, reader, zipped.size)


def _parse_legacy(file: _File) -> Arrays:
    size = os.fstat(file.fileno()).st_size
    stream = io.BytesIO(file.read(torch_files.MAX_PICKLE))
    pickled, storages = torch_files.legacy_storages(stream)
    position, starts = stream.tell(), {}
    for storage in storages:
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.size:
            raise ValueError(f"a storage has {count} values, expected {storage.size}")
        starts[storage.key] = position + 8
        position += 8 + count * storage.dtype.itemsize
        if position > size:
            raise ValueError("the file ends within a storage")

    def reader(storage: torch_files.Storage) -> Callable[[int, memoryview], None]:
        def read(skip: int, out: memoryview) -> None:
            file.seek(starts[storage.key] + skip)
            _fill(file, out)

        return read

    return _torch_arrays(pickled.value, reader, size)


def _torch_arrays(
    value: Any,
    reader: Callable[[torch_files.Storage], Callable[[int, memoryview], None]],
    size: int,
) -> Arrays:
    tensors = torch_files.state_dict(value)
    if len(tensors) > MAX_ARRAYS:
        raise Refused(f"it has {len(tensors)} tensors, expected at most {MAX_ARRAYS}")
    covered = sum(t.span * t.storage.dtype.itemsize for t in tensors.values())
    if covered > max(MAX_GROWTH * size, MAX_SMALL):
        raise Refused(
            f"its tensors share their bytes {covered // size} times over, expected at"
            f" most {MAX_GROWTH}; re-save it after .contiguous()"
        )
    readers = {t.storage: reader(t.storage) for t in tensors.values()}

    def lazy(tensor: torch_files.Tensor) -> Lazy:
        dtype = tensor.storage.dtype

        def load() -> np.ndarray:
            values = np.empty(tensor.span, dtype)
            skip = tensor.offset * dtype.itemsize if tensor.span else 0
            readers[tensor.storage](skip, _bytes_of(values))
            return torch_files.as_array(tensor, _plain(values))

        return Lazy(tensor.shape, dtype, load)

    several = torch_files.networks(value)
    metadata = {"networks": several} if several else {}
    return Arrays({name: lazy(tensor) for name, tensor in tensors.items()}, metadata)


# --- safetensors ----------------------------------------------------------------------


def _parse_safetensors(file: _File) -> Arrays:
    """Without the safetensors library: to NumPy it reads neither bfloat16 nor float8.

    Its memory map would also end the process where a file is cut while it is read.
    """
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", file.read(8))
    text = file.read(length)
    if len(text) < length:
        raise ValueError("the file ends within its header")
    header = json.loads(text.decode(), object_pairs_hook=_unique)
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no strings")
    if len(header) > MAX_ARRAYS:
        raise Refused(f"it has {len(header)} arrays, expected at most {MAX_ARRAYS}")
    arrays, runs = {}, []
    for name, entry in header.items():
        begin, end = _naturals(entry["data_offsets"])
        shape = _naturals(entry["shape"])
        if entry["dtype"] not in _SAFETENSORS or len(shape) > torch_files.MAX_DIMS:
            raise Refused(
                f"an array has dtype {shown(entry['dtype'], 40)} and {len(shape)}"
                f" axes; expected one of {sorted(_SAFETENSORS)}"
            )
        dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the bytes of {shown(name, 80)} do not fit its shape")
        load = _loader(file, 8 + length + begin, shape, dtype)
        arrays[name] = Lazy(shape, dtype, load)
        runs.append((begin, end))
    position = 0
    for begin, end in sorted(runs):
        if begin != position:
            raise ValueError("its arrays overlap or leave gaps")
        position = end
    described = 8 + length + position
    if described != size:
        raise ValueError(f"it has {size} bytes, its header describes {described}")
    return Arrays(arrays, metadata)


def _loader(
    file: _File, start: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        array = np.empty(shape, dtype)
        file.seek(start)
        _fill(file, _bytes_of(array))
        return _plain(array)

    return load


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is there twice in its header")
    return dict(pairs)


def _naturals(values: Any) -> tuple[int, ...]:
    if type(values) is not list or not all(
        type(v) is int and 0 <= v < 2**62 for v in values
    ):
        raise ValueError("a shape or an offset in its header is no natural number")
    return tuple(values)
