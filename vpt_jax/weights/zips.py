# SPDX-License-Identifier: Apache-2.0
"""Bounded reading of files that others made, and of the members of zip files."""

import io
import os
import re
import struct
import zipfile
from typing import Any

from vpt_jax.files.messages import shown

MAX_HEADER = 4 << 20  # of any format; a ViT-L needs 50 kB
MAX_ARRAYS = 20_000

_CHUNK = 1 << 20
_DEFLATE_LIMIT = 1032  # times smaller is the most that deflate can do
_UNSAFE_NAME = re.compile(r"^[/~]|^[A-Za-z]:|\\|(^|/)(\.{0,2})(/|$)|[\x00-\x1f\x7f]")


class Refused(ValueError):
    """The file is sound, but holds what is not read; the message says what to do."""


class File(io.BufferedReader):
    """Refuses long reads: zipfile believes what a file says of its directory's size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None:
            at_most(MAX_HEADER, size, "bytes of header")
        return super().read(size)

    @property
    def size(self) -> int:
        return os.fstat(self.fileno()).st_size


def at_most(limit: int, got: int, what: str) -> None:
    """Raises Refused for more than the limit."""
    if got > limit:
        raise Refused(f"it has {got} {what}, expected at most {limit}")


def check_name(name: str) -> None:
    """Names are never used as paths here, but nobody else should have to know."""
    if _UNSAFE_NAME.search(name):
        raise Refused(
            f"it has the unsafe name {shown(name, 80)}, expected one like a/b"
        )


def fill(file: Any, view: memoryview) -> None:
    """Reads all of `view` from where the file stands."""
    while view:
        n = file.readinto(view[:_CHUNK])
        if not n:
            raise ValueError(f"the file ends {len(view)} bytes too early")
        view = view[n:]


class Zip:
    """The members of a zip file, checked before they are believed."""

    def __init__(self, file: File):
        self.file = file
        self.archive = zipfile.ZipFile(file)
        self.members: dict[str, zipfile.ZipInfo] = {}
        infos = self.archive.infolist()
        file.seek(-22 - len(self.archive.comment), os.SEEK_END)
        magic, count = struct.unpack("<4s6xH10x", file.read(22))
        if magic != b"PK\x05\x06" or count not in (len(infos), 0xFFFF):  # zip64
            raise ValueError(f"its directory lists {len(infos)} of {count} members")
        at_most(MAX_ARRAYS, len(infos), "members")
        for info in infos:
            name = info.orig_filename
            check_name(name)
            if name in self.members:
                raise ValueError(f"it has two members {name!r}")
            if info.flag_bits & 1:
                raise Refused(f"its member {name!r} is encrypted; unpack it first")
            packed, largest = info.compress_size, info.compress_size
            if info.compress_type == zipfile.ZIP_DEFLATED:
                largest = _DEFLATE_LIMIT * (packed + 1)
            elif info.compress_type != zipfile.ZIP_STORED:
                raise Refused(
                    f"its member {name!r} has compression {info.compress_type},"
                    " expected none or deflate; write it again with np.savez"
                )
            if packed > file.size or info.file_size > largest:
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
        if start + info.file_size > self.file.size:
            raise ValueError("the file ends within a member")
        return start

    def read(self, info: zipfile.ZipInfo, skip: int, out: memoryview) -> None:
        """Fills `out` from byte `skip` of a member, and checks the whole member."""
        with self.archive.open(info) as member:  # compares checksums at its end
            scratch = memoryview(bytearray(min(skip, _CHUNK)))
            while skip:
                fill(member, scratch[:skip])
                skip -= min(skip, _CHUNK)
            fill(member, out)
            while member.read(_CHUNK):
                pass
