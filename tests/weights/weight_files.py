# SPDX-License-Identifier: Apache-2.0
"""Writes files of weights, and what they would look like if their writers lied."""

import io
import json
import struct
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as save_safetensors

from vpt_jax.weights import torch_files

BF16 = np.dtype(jnp.bfloat16)


def npz(arrays, save=np.savez):
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def npy(header, payload=b"", version=1):
    header = str(header).encode("latin-1")
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + payload


def described(descr="<f4", fortran_order=False, shape=(2,)):
    return {"descr": descr, "fortran_order": fortran_order, "shape": shape}


def zipped(members, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def raw_zip(*members, size=None, comment=0):
    """A zip file whose directory may lie about its members, and its end about both."""
    out, directory = b"", b""
    for member in members:
        name, data = member["name"].encode(), member["data"]
        method, flags = member.get("method", 0), member.get("flags", 0)
        crc = member.get("crc", zlib.crc32(data))
        sizes = (member.get("packed", len(data)), member.get("size", len(data)))
        fields = (flags, method, 0, 0, crc, *sizes, len(name), 0)
        offset = member.get("offset", len(out))
        out += struct.pack("<4s5H3L2H", b"PK\3\4", 20, *fields) + name + data
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, *fields, 0, 0, 0, 0, offset
        )
        directory += name
    size = len(directory) if size is None else size
    tail = (0, 0, len(members), len(members), size, len(out), comment)
    return out + directory + struct.pack("<4s4H2LH", b"PK\5\6", *tail)


def safetensors(header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return struct.pack("<Q", length) + text + payload


class Raw(bytes):
    """Opcodes to put into a pickle as they are."""


STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    BF16: "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


def opcodes(value, storages):
    """What PyTorch's pickler writes for `value`; arrays are added to `storages`."""

    def many(values):
        return b"".join(opcodes(v, storages) for v in values)

    if isinstance(value, Raw):
        return bytes(value)
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + many(value) + b"t"
    if isinstance(value, list):
        return b"](" + many(value) + b"e"
    if isinstance(value, dict):
        items = [part for pair in value.items() for part in pair]
        return b"ccollections\nOrderedDict\n)R(" + many(items) + b"u"
    value = np.asarray(value)
    key = str(len(storages))
    storages[key] = np.ascontiguousarray(value).reshape(-1)
    strides = tuple(
        s // value.itemsize for s in np.zeros_like(value, order="C").strides
    )
    return tensor(STORAGES[value.dtype], key, value.size, 0, value.shape, strides)


def tensor(kind, key, size, offset, shape, strides, rebuild="_rebuild_tensor_v2"):
    storage = ("storage", Raw(b"ctorch\n" + kind.encode() + b"\n"), key, "cpu", size)
    args = (Raw(opcodes(storage, {}) + b"Q"), offset, shape, strides, False, {})
    return Raw(b"ctorch._utils\n" + rebuild.encode() + b"\n" + opcodes(args, {}) + b"R")


def pickled(value, storages=None):
    return b"\x80\x02" + opcodes(value, {} if storages is None else storages) + b"."


def torch_zip(value, storages=None, **members):
    storages = {} if storages is None else storages
    data = value if isinstance(value, bytes) else pickled(value, storages)
    return zipped(
        {"archive/data.pkl": data, "archive/byteorder": b"little"}
        | {f"archive/data/{key}": a.tobytes() for key, a in storages.items()}
        | {f"archive/{name}": data for name, data in members.items()}
        | {"archive/version": b"3\n"}
    )


def torch_legacy(value, storages=None, system=None):
    storages = {} if storages is None else storages
    data = value if isinstance(value, bytes) else pickled(value, storages)
    data = data.replace(b"tQ", b"NtQ")  # a storage's reference has one more entry
    magic = int.from_bytes(torch_files.LEGACY_MAGIC, "little")
    system = {"protocol_version": 1001, "little_endian": True} | (system or {})
    return (
        pickled(magic) + pickled(1001) + pickled(system) + data + pickled([*storages])
    ) + b"".join(struct.pack("<q", a.size) + a.tobytes() for a in storages.values())


WRITERS = {
    "npz": npz,
    "npz compressed": lambda arrays: npz(arrays, np.savez_compressed),
    "safetensors": lambda arrays: save_safetensors(
        {n: np.asarray(a) for n, a in arrays.items()}, {"note": "x"}
    ),
    "torch zip": torch_zip,
    "torch legacy": torch_legacy,
}


# --- for fuzzing ---------------------------------------------------------------------


def fuzz_sample():
    return {
        "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3),
        "c": np.ones((2, 2), np.float16),
    }


def inside_npz(change):
    """Changes an array within an `.npz`, whose checksums are then right."""
    members = {}
    for name, array in fuzz_sample().items():
        out = io.BytesIO()
        np.save(out, array)
        members[f"{name}.npy"] = out.getvalue()
    members["b.npy"] = change(members["b.npy"])
    return zipped(members)


def inside_torch(change):
    storages = {}
    data = pickled({"model": fuzz_sample(), "epoch": 3, "best": 0.5}, storages)
    return torch_zip(change(data), storages)


def around(write):
    data = write(fuzz_sample())
    return lambda change: change(data)


# How to make a file, and whether checksums find every change of a value.
FUZZED = {
    "npz": (around(npz), True),
    "npz compressed": (around(WRITERS["npz compressed"]), True),
    "inside npz": (inside_npz, False),
    "safetensors": (around(WRITERS["safetensors"]), False),
    "torch zip": (around(lambda a: torch_zip({"model": a, "epoch": 3})), True),
    "inside torch zip": (inside_torch, False),
    "torch legacy": (around(lambda a: torch_legacy({"model": a, "epoch": 3})), False),
}
