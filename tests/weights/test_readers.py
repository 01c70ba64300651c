# SPDX-License-Identifier: Apache-2.0
"""Files of weights: what is written comes back, and what is hostile is refused."""

import contextlib
import io
import json
import pickle
import resource
import struct
import time
import tracemalloc
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import changed
from safetensors.numpy import save as save_safetensors

from vpt_jax.weights import readers, torch_files
from vpt_jax.weights.readers import CheckpointError, open_arrays, read_arrays

RNG = np.random.default_rng(0)
BF16 = np.dtype(jnp.bfloat16)
MB = 1 << 20


def sample():
    return {
        "a/kernel": RNG.normal(size=(3, 4)).astype(np.float32),
        "a/bias": np.arange(4),
        "half": RNG.normal(size=(2, 5)).astype(np.float16),
        "double": RNG.normal(size=2),
        "scalar": np.float32(3.5),
        "bytes": np.arange(7, dtype=np.uint8),
        "flags": np.array([True, False, True]),
        "empty": np.zeros((0, 3), np.float32),
        "brain": np.arange(6).reshape(2, 3).astype(BF16),
    }


def check_same(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        value = np.asarray(value)
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value)


# --- writers --------------------------------------------------------------------------


def npz(arrays, save=np.savez):
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def npy(header, payload=b"", version=1):
    if isinstance(header, dict):
        header = repr(header)
    if isinstance(header, str):
        header = header.encode("latin-1")
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


def raw_zip(*members, **lies):
    """A zip file whose directory may lie about its members."""
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
    end = {
        "count": len(members),
        "size": len(directory),
        "offset": len(out),
        "comment": 0,
        **lies,
    }
    count = end["count"]
    tail = (0, 0, count, count, end["size"], end["offset"], end["comment"])
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


# --- what is written comes back -------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_arrays_come_back_whatever_the_name_of_the_file(kind, tmp_path):
    arrays, path = sample(), tmp_path / "weights.pth.tar"
    path.write_bytes(WRITERS[kind](arrays))
    got, metadata = read_arrays(path)
    if kind == "safetensors":
        got = {name: got[name] for name in arrays}  # its writer sorts
    check_same(got, arrays)
    assert metadata == ({"note": "x"} if kind == "safetensors" else {})
    with open_arrays(str(path)) as (lazy, _):
        assert {n: (a.shape, a.dtype) for n, a in lazy.items()} == {
            n: (a.shape, a.dtype) for n, a in got.items()
        }
        first, again = lazy["a/kernel"].load(), lazy["a/kernel"].load()
        np.testing.assert_array_equal(first, again)
    with pytest.raises(CheckpointError, match="closed file"):
        lazy["a/kernel"].load()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_all_orders_and_types(save, tmp_path):
    base = RNG.normal(size=(2, 3, 4))
    arrays = {
        "fortran": np.asfortranarray(base),
        "big": base.astype(">f4"),
        "big fortran": np.asfortranarray(base.astype(">i2")),
    }
    arrays |= {code: base.astype(code) for code in "?bhilqBHILQefd"}
    (tmp_path / "a").write_bytes(npz(arrays, save))
    got, _ = read_arrays(tmp_path / "a")
    native = {n: a.astype(a.dtype.newbyteorder("=")) for n, a in arrays.items()}
    check_same(got, native)


def test_npy_headers_of_other_writers(tmp_path):
    payload = np.arange(2, dtype=np.float32).tobytes()
    texts = [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2L,), }   \n",
        "{'shape':(2,),'fortran_order':True,'descr':'<f4'}",
    ]
    for text in texts:
        for version in (1, 2, 3):
            data = zipped({"x.npy": npy(text, payload, version)})
            (tmp_path / "a").write_bytes(data)
            check_same(read_arrays(tmp_path / "a")[0], {"x": np.float32([0, 1])})


def test_float8_in_safetensors(tmp_path):
    values = np.arange(4).astype(jnp.float8_e4m3fn)
    header = {"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    (tmp_path / "a").write_bytes(safetensors(header, values.tobytes()))
    check_same(read_arrays(tmp_path / "a")[0], {"x": values})


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_views_of_torch_storages(write, tmp_path):
    base = np.arange(24, dtype=np.float32)
    square = base.reshape(4, 6)

    def view(offset, shape, strides, rebuild="_rebuild_tensor_v2"):
        return tensor("FloatStorage", "0", 24, offset, shape, strides, rebuild)

    whole = view(0, (4, 6), (6, 1), "_rebuild_tensor")
    parameter = Raw(
        b"ctorch._utils\n_rebuild_parameter\n" + opcodes((whole, True, {}), {}) + b"R"
    )
    state = {
        "whole": whole,
        "parameter": parameter,
        "transposed": view(0, (6, 4), (1, 6)),
        "rows": view(6, (2, 6), (6, 1)),
        "column": view(3, (4,), (6,)),
        "every other": view(1, (2, 3), (12, 2)),
        "one": view(23, (), ()),
        "none": view(24, (3, 0), (1, 1)),
    }
    (tmp_path / "a").write_bytes(write(pickled(state), {"0": base}))
    expected = {
        "whole": square,
        "parameter": square,
        "transposed": square.T,
        "rows": square[1:3],
        "column": square[:, 3],
        "every other": square[::2, 1::2],
        "one": base[23],
        "none": np.zeros((3, 0), np.float32),
    }
    got, _ = read_arrays(tmp_path / "a")
    check_same(got, expected)
    assert all(a.flags.c_contiguous for a in got.values())


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_the_state_dict_is_found_in_a_training_checkpoint(write, tmp_path):
    weights = {"w": np.float32([1, 2]), "_extra_state": None}
    numpy_scalar = Raw(
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\0\0\0f8K\0K\1tR"
        b"(K\3X\1\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        b"c_codecs\nencode\n(X\x01\0\0\0aX\6\0\0\0latin1tRtR"
    )
    others = {
        "epoch": 3,
        "best": np.float32(0.5),
        "score": numpy_scalar,
        "optimizer": {"state": {"0": {"step": np.float32(1)}}, "groups": [{"lr": 0.1}]},
        "size": Raw(b"ctorch\nSize\n" + opcodes(((1, 2),), {}) + b"R"),
    }
    for tree in (
        weights,
        {"model": weights} | others,
        others | {"state_dict": weights},
        {"student": {"v": np.float32([3])}, "teacher": weights},
        {"model_state": weights, "epoch": 1},
        {"model": "ViT-B", "module": weights},
    ):
        (tmp_path / "a").write_bytes(write(tree))
        check_same(read_arrays(tmp_path / "a")[0], {"w": weights["w"]})
    # The attribute `_metadata` of PyTorch's state dicts is ignored.
    storages = {}
    body = opcodes(weights, storages) + opcodes({"_metadata": {}}, {}) + b"b"
    (tmp_path / "a").write_bytes(write(b"\x80\x02" + body + b".", storages))
    check_same(read_arrays(tmp_path / "a")[0], {"w": weights["w"]})


def test_only_what_is_loaded_is_allocated(tmp_path):
    arrays = {"large": np.zeros((6, MB), np.float32), "small": np.ones(3, np.float32)}
    for kind, write in WRITERS.items():
        (tmp_path / "a").write_bytes(write(arrays))
        tracemalloc.start()
        with open_arrays(tmp_path / "a") as (lazy, _):
            lazy["small"].load()
            assert tracemalloc.get_traced_memory()[1] < 6 * MB, kind
            lazy["large"].load()
            peak = tracemalloc.get_traced_memory()[1]
            assert 24 * MB <= peak < 28 * MB, kind
        tracemalloc.stop()


# --- what is refused ------------------------------------------------------------------


@contextlib.contextmanager
def bounded(seconds=10, megabytes=100):
    """Processor time and memory; nothing may be unpickled."""

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "loads", "Unpickler", "_Unpickler"):
            patch.setattr(pickle, name, refuse)
        tracemalloc.start()
        start = time.thread_time()
        try:
            yield
            assert tracemalloc.get_traced_memory()[1] < megabytes * MB
            assert time.thread_time() - start < seconds
        finally:
            tracemalloc.stop()


@contextlib.contextmanager
def noted(case):
    try:
        yield
    except BaseException as error:
        error.add_note(f"case: {case}")
        raise


def check_own(error):
    """What only tests raise must not be why a file is refused."""
    assert not isinstance(error.__cause__, Warning | AssertionError)
    assert "TypeCheckError" not in str(error)


def check_refused(path, data, message):
    path.write_bytes(data)
    before = sorted(path.parent.iterdir())
    with bounded(), pytest.raises(CheckpointError, match=message) as error:
        read_arrays(path)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) < 1500
    check_own(error.value)
    assert sorted(path.parent.iterdir()) == before


OTHER = {
    "nothing": (b"", "is empty; expected .npz, .safetensors or a PyTorch file"),
    "a page": (b"\n<!DOCTYPE html><html>", "is a web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "an array": (npy(described(), bytes(8)), "single .npy array"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"),
    "tar": (bytes(257) + b"ustar  " + bytes(300), "is a tar archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "is compressed"),
    "a pickle": (pickle.dumps({"a": 1}), "is a Python pickle"),
    "an empty zip": (zipped({}), "holds no arrays"),
    "an empty header": (safetensors({}), "holds no arrays"),
    "noise": (bytes(range(200, 250)), r"starts with b'\\xc8"),
}


def test_other_files(tmp_path):
    for case, (data, message) in OTHER.items():
        with noted(case):
            check_refused(tmp_path / "w.npz", data, message)


def test_no_file_at_all(tmp_path):
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path / "absent", "no such file: .*absent"),
        (tmp_path, "is a folder; expected"),
        ("/dev/zero", "no regular file"),
        ("a\0b", "null (byte|character)"),
        (tmp_path / "file" / "a", "NotADirectoryError"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_arrays(path)


GOOD = npy(described(), bytes(8))
OBJECTS = npz({"x": np.array([{}], dtype=object)})
NAMES = ("../../x", "/etc/x", "a/../x", "~/x", "C:x", "a\\x", "a\nx", "", "a//x")


def array(payload=b"", version=1, **fields):
    return zipped({"x.npy": npy(described(**fields), payload, version)})


def member(**lies):
    return raw_zip({"name": "x.npy", "data": GOOD, **lies})


def hostile_zips():
    large = 5 * MB
    digits = repr(described(shape="N")).replace("'N'", f"({'9' * 9000})")
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, large, 0, 0)
    call = "__import__('os').system('touch x')"
    escape = r"{'descr': '\d', 'fortran_order': 0, 'shape': ()}"
    both = [{"name": "x.npy", "data": GOOD}] * 2
    return {
        "only a start": (b"PK\x03\x04 nothing", "BadZipFile .*download it again"),
        "objects": (OBJECTS, "Python objects"),
        "an object's code": (
            array(b"cos\nsystem\n(S'x'\ntR.", descr="|O", shape=()),
            "Python objects",
        ),
        "records": (array(bytes(8), descr=[("a", "<f4")]), "an array has dtype"),
        "strings": (array(bytes(16), descr="<U2"), "dtype '<U2'"),
        "complex": (array(bytes(16), descr="<c8"), "dtype 'complex64'"),
        "void": (array(bytes(8), descr="|V4"), "dtype '.V4'"),
        "wide floats": (array(bytes(32), descr="<f16"), "dtype 'float128'"),
        "dates": (array(bytes(16), descr="<M8[s]"), "dtype 'datetime64"),
        "no type": (array(bytes(8), descr="nope"), "not a valid dtype"),
        "a call in the header": (zipped({"x.npy": npy(call, bytes(8))}), "damaged"),
        "an escape in the header": (zipped({"x.npy": npy(escape)}), "damaged"),
        "a deep header": (zipped({"x.npy": npy("[" * 9000)}), "damaged"),
        "signs": (zipped({"x.npy": npy("-" * 9000 + "1")}), "MemoryE|damaged"),
        "a long header": (zipped({"x.npy": npy(" " * 50 * MB, version=2)}), "damaged"),
        "no header": (zipped({"x.npy": b""}), "damaged"),
        "a version": (array(version=9), "version 9 of .npy"),
        "too short": (array(bytes(7)), "describes"),
        "too long": (array(bytes(9)), "describes"),
        "an absurd shape": (array(shape=(2**62, 2**62)), "describes"),
        "an absurd empty shape": (array(shape=(0, 2**63)), "too large|too big|dimens"),
        "a negative shape": (array(bytes(16), shape=(-2, -2)), "has the shape"),
        "digits": (zipped({"x.npy": npy(digits)}), "damaged"),
        "axes": (array(bytes(4), shape=(1,) * 40), "40 axes"),
        "another member": (zipped({"x.npy": GOOD, "readme.txt": b""}), "no .npy array"),
        "lzma": (zipped({"x.npy": GOOD}, zipfile.ZIP_LZMA), "compression 14"),
        "bzip2": (zipped({"x.npy": GOOD}, zipfile.ZIP_BZIP2), "compression 12"),
        "encrypted": (member(flags=1), "is encrypted"),
        "twice": (raw_zip(*both), "two members 'x.npy'"),
        "a wrong checksum": (member(crc=1), "CRC|check"),
        "a large stored size": (member(size=2**31), "cannot have"),
        "large stored sizes": (member(size=2**31, packed=2**31), "cannot have"),
        "a large deflated size": (member(method=8, size=2**31), "cannot have"),
        "no deflate stream": (member(method=8), "damaged"),
        "an offset": (member(offset=7), "damaged"),
        "offsets": (member(offset=2**31), "damaged"),
        "a size of the directory": (raw_zip(both[0], size=2**31), "damaged"),
        "a large directory": (member()[:-22] + bytes(large) + end, "at most"),
        "many members": (
            zipped({f"{i}.npy": b"" for i in range(readers.MAX_ARRAYS + 1)}),
            "20001 members",
        ),
    } | {
        name: (zipped({f"{name}.npy" if name else "/": GOOD}), "unsafe name")
        for name in NAMES
    }


def test_hostile_npz(tmp_path):
    for case, (data, message) in hostile_zips().items():
        with noted(case):
            check_refused(tmp_path / "w.npz", data, message)
    # A comment's length is of no importance.
    data = raw_zip({"name": "x.npy", "data": GOOD}, comment=999)
    (tmp_path / "w.npz").write_bytes(data)
    check_same(read_arrays(tmp_path / "w.npz")[0], {"x": np.zeros(2, np.float32)})


def test_zip_bombs(tmp_path):
    compress = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compress.compress(bytes(16 * MB)) + compress.flush(zlib.Z_FULL_FLUSH)
    count = 128 * MB
    header = npy(described("|u1", shape=(16 * count,)))
    compress = zlib.compressobj(0, zlib.DEFLATED, -15)
    start = compress.compress(header) + compress.flush(zlib.Z_FULL_FLUSH)
    data = start + block * 128 + b"\x03\0"
    bomb = {"name": "x.npy", "data": data, "method": 8}
    bomb["size"] = len(header) + 16 * count
    check_refused(tmp_path / "a", raw_zip(bomb), "2147483648 bytes of arrays, expected")
    with bounded(), open_arrays(tmp_path / "a") as (lazy, _):
        assert lazy["x"].shape == (16 * count,)  # not what any model expects
    # Members that share their bytes.
    large = npy(described("|u1", shape=(2 * MB,)), bytes(2 * MB))
    first = {"name": "x.npy", "data": large}
    more = [
        {"name": "x.npy", "data": b"", "offset": 0}
        | {"packed": len(large), "size": len(large), "crc": zlib.crc32(large)}
        for _ in range(200)
    ]
    check_refused(tmp_path / "a", raw_zip(first, *more), "two members|overlap")


ST = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def hostile_safetensors():
    return {
        "a long header": (safetensors(b"{}", length=2**63 - 1), "9223372036854775807"),
        "a longer header": (safetensors(b"{}", length=2**64 - 1), "bytes of header"),
        "a header that is not there": (safetensors(b"{}", length=999), "describes"),
        "no JSON": (safetensors(b"{nope}"), "damaged"),
        "no text": (safetensors(b"{\xff\xfe}"), "damaged"),
        "a deep header": (safetensors(b'{"a":' * 99999), "damaged"),
        "many lists": (safetensors(b'{"a":[' + b"[]," * MB + b"[]]}"), "damaged"),
        "no dict": (safetensors({"x": [1]}), "damaged"),
        "a name twice": (
            safetensors(json.dumps({"x": ST, "y": ST}).replace("y", "x").encode()),
            "twice",
        ),
        "an object": (safetensors({"x": ST | {"dtype": "O"}}, bytes(8)), "dtype 'O'"),
        "a list of dtypes": (safetensors({"x": ST | {"dtype": ["F32"]}}), "damaged"),
        "an absurd shape": (safetensors({"x": ST | {"shape": [2**61] * 9}}), "not fit"),
        "a huge number": (safetensors({"x": ST | {"shape": [2**99]}}), "natural"),
        "digits": (safetensors(b'{"x":{"shape":[' + b"9" * 9999 + b"]}}"), "damaged"),
        "a fraction": (safetensors({"x": ST | {"shape": [2.0]}}, bytes(8)), "natural"),
        "a sign": (safetensors({"x": ST | {"shape": [-2, -1]}}, bytes(8)), "natural"),
        "axes": (safetensors({"x": ST | {"shape": [1] * 40 + [2]}}, b""), "41 axes"),
        "many axes": (safetensors({"x": ST | {"shape": [2**61] * 10**5}}), "0 axes"),
        "a gap": (safetensors({"x": ST | {"data_offsets": [1, 9]}}, bytes(9)), "gaps"),
        "overlap": (safetensors({"x": ST, "y": ST}, bytes(8)), "overlap"),
        "more": (safetensors({"x": ST}, bytes(9)), "its header describes"),
        "less": (safetensors({"x": ST}, bytes(7)), "its header describes"),
        "metadata": (safetensors({"__metadata__": {"a": 1}}), "no strings"),
        "a name": (safetensors({"../x": ST}, bytes(8)), "unsafe name '../x'"),
        "many names": (
            safetensors(
                {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                 for i in range(readers.MAX_ARRAYS + 1)}
            ),
            "20001 arrays",
        ),
    }  # fmt: skip


def test_hostile_safetensors(tmp_path):
    for case, (data, message) in hostile_safetensors().items():
        with noted(case):
            check_refused(tmp_path / "w.safetensors", data, message)


def raw_tensor(
    offset=0, shape=(2,), strides=(1,), size=2, key="0", kind="FloatStorage"
):
    return {"x": tensor(kind, key, size, offset, shape, strides)}


def call(function, *args):
    return {"x": Raw(f"c{function}\n".encode() + opcodes(args, {}) + b"R")}


def hostile_pickles():
    touch = opcodes("touch marker", {})
    laughs = b"(" * 200 + b"]q\0"
    laughs += b"".join(b"h%clq%c" % (i, i + 1) for i in range(200))
    tuples = b")q\0" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(200))
    colliding = b"".join(
        b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N"
        for i in range(25_000)
    )
    return {
        "os.system": (call("os\nsystem", "touch marker"), "holds os.system, which"),
        "eval": (call("builtins\neval", "1"), "holds builtins.eval"),
        "getattr": (call("builtins\ngetattr", {}, "x"), "builtins.getattr"),
        "posix by stack": (
            Raw(b"X\5\0\0\0posixX\6\0\0\0system\x93" + touch + b"\x85R"),
            "holds posix.system",
        ),
        "an attribute": (call("torch._utils\n__dict__"), "torch._utils.__dict__"),
        "a method": (call("collections\nOrderedDict.fromkeys", "ab"), "fromkeys"),
        "namespace": (call("argparse\nNamespace"), "argparse.Namespace.*re-save"),
        "a nested call": (
            call("torch\nSize", call("os\nsystem", "touch marker")),
            "os.system",
        ),
        "a reducer": (
            pickle.dumps(type("X", (), {"__reduce__": lambda s: (print, ("x",))})(), 2),
            "print",
        ),
        "inst": (Raw(b"(" + touch + b"ios\nsystem\n"), "os.system"),
        "inst of what is known": (Raw(b"(icollections\nOrderedDict\n"), "INST"),
        "obj": (Raw(b"(ccollections\nOrderedDict\no"), "opcode OBJ"),
        "newobj": (Raw(b"ccollections\nOrderedDict\n)\x81"), "opcode NEWOBJ"),
        "newobj_ex": (Raw(b"ccollections\nOrderedDict\n)}\x92"), "opcode NEWOBJ_EX"),
        "ext": (Raw(b"\x82\x01"), "opcode EXT1"),
        "persistent text": (Raw(b"Pos.system\n"), "opcode PERSID"),
        "build a global": (Raw(b"ccollections\nOrderedDict\n}b"), "sets attributes"),
        "build a number": (Raw(b"K\1}b"), "sets attributes"),
        "a call of a storage": (call("torch\nFloatStorage", 10**9), "calls torch"),
        "a call of a dict": (Raw(b"})R"), "where _Global is needed"),
        "a call without a tuple": (Raw(b"ccollections\nOrderedDict\nK\1R"), "tuple"),
        "a dict of pairs": (call("collections\nOrderedDict", [("a", 1)]), "damaged"),
        "sparse": (call("torch._utils\n_rebuild_sparse_tensor"), "_rebuild_sparse"),
        "quantised": (call("torch._utils\n_rebuild_qtensor"), "_rebuild_qtensor"),
        "nothing": (b"", "damaged"),
        "no end": (b"\x80\x02}", "damaged"),
        "an empty stack": (b".", "damaged"),
        "no mark": (Raw(b"t"), "damaged"),
        "an odd dict": (Raw(b"}(K\1u"), "damaged"),
        "items of a list": (Raw(b"]X\1\0\0\0aNs"), "where dict is needed"),
        "appended to a dict": (Raw(b"}Na"), "where list is needed"),
        "a memo beyond": (Raw(b"Np" + b"9" * 99 + b"\n"), "memo index"),
        "a memo at the end": (Raw(b"Nr\xff\xff\xff\xff"), "expected a state dict"),
        "a memo of nothing": (Raw(b"h\7"), "damaged"),
        "memos": (Raw(b"N" + b"r\xff\xff\xff\x7f" * 20_000), "expected a state dict"),
        "a long text": (Raw(b"\x8d" + struct.pack("<Q", 2**62)), "damaged"),
        "long bytes": (Raw(b"\x8e" + struct.pack("<Q", 2**62)), "damaged"),
        "a long number": (Raw(b"\x8b\xff\xff\xff\x7f"), "damaged"),
        "a negative length": (Raw(b"\x8b\xff\xff\xff\xff"), "damaged"),
        "a number of a million bytes": (
            raw_tensor(offset=Raw(b"\x8b" + struct.pack("<I", MB) + b"\x7f" * MB)),
            "not made of counts",
        ),
        "decimal digits": (Raw(b"I" + b"9" * MB + b"\n"), "damaged"),
        "an escape": (Raw(b"S'\\d'\n"), "expected a state dict"),
        "a frame": (Raw(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f}"), "no state dict"),
        "deep lists": (Raw(b"]" * 20_000 + b"a" * 19_999), "expected a state dict"),
        "deep tuples": (Raw(b")" + b"\x85" * 50_000), "expected a state dict"),
        "deep dicts": (
            Raw(b"}X\1\0\0\0a" * 15_000 + b"N" + b"s" * 15_000),
            "no state dict",
        ),
        "many opcodes": (Raw(b"0N" * (2 * MB - 9)), "opcode POP"),
        "more opcodes": (Raw(b"]" * (4 * MB - 9)), "more than 60000 opcodes"),
        "more dicts": (Raw(b"}" * 50_000), "no state dict"),
        "a large pickle": (Raw(b"]" * (5 * MB)), "opcodes|5242883 bytes"),
        "laughs": (Raw(laughs), "expected a state dict"),
        "laughs as values": ({"x": Raw(laughs), "y": Raw(tuples)}, "keys are"),
        "laughs as a key": (Raw(tuples + b"}h\xc8Ns"), "no state dict"),
        "laughs as a tensor": (call("torch\nSize", 1, Raw(tuples)), "damaged"),
        "laughs as a shape": (raw_tensor(shape=Raw(tuples)), "not made of counts"),
        "laughs as a storage": (Raw(tuples + b"Q"), "outside of it"),
        "a list within itself": (Raw(b"]q\0h\0a"), "expected a state dict"),
        "a dict within itself": (Raw(b"}q\0X\5\0\0\0modelh\0s"), "no state dict"),
        "keys that collide": (Raw(b"}(" + colliding + b"u"), "no state dict"),
        "a long key": (Raw(b"}X\0\0\x10\0" + b"k" * MB + b"Ns"), "keys are"),
        "no tensors": ({"epoch": 3, "args": {}}, r"keys are \['epoch', 'args'\]"),
        "a list": ([1.5], "type list; expected a state dict"),
        "an unsafe name": ({"../x": raw_tensor()["x"]}, "unsafe name '../x'"),
        "another persistent id": (Raw(opcodes(("module", "x"), {}) + b"Q"), "'module'"),
        "a view of a storage": (
            Raw(opcodes(("storage", Raw(b"ctorch\nFloatStorage\n"), "0", "cpu", 2,
                         ("1", 0, 1)), {}) + b"Q"),
            "views of storages",
        ),
        "a storage that is none": (
            raw_tensor(kind="Size"),
            "stores values as torch.Size; expected",
        ),
        "an absent storage": (raw_tensor(key="7"), "damaged"),
        "a storage elsewhere": (raw_tensor(key="../../data.pkl"), "damaged"),
        "a larger storage": (raw_tensor(size=3), "damaged"),
        "a smaller storage": (raw_tensor(size=1, shape=(1,)), "damaged"),
        "two storages": (
            raw_tensor() | {"y": raw_tensor(size=4, kind="HalfStorage")["x"]},
            "two types or sizes",
        ),
        "an offset": (raw_tensor(offset=1), "exceeds its storage"),
        "a negative offset": (raw_tensor(offset=-1), "not made of counts"),
        "a large offset": (raw_tensor(offset=2**63), "not made of counts"),
        "a large shape": (raw_tensor(shape=(2**40,) * 2, strides=(1, 1)), "exceeds"),
        "a stride": (raw_tensor(strides=(2,)), "exceeds its storage"),
        "a negative stride": (raw_tensor(offset=1, strides=(-1,)), "not made of"),
        "no stride": (raw_tensor(shape=(2**40,), strides=(0,)), "repeats the 2"),
        "truth": (raw_tensor(shape=(True,), strides=(1,)), "not made of counts"),
        "axes": (raw_tensor(shape=(1,) * 99, strides=(1,) * 99), "99 entries"),
        "fewer strides": (raw_tensor(strides=()), "1 sizes but 0 strides"),
        "no numbers": (raw_tensor(shape=("a",)), "not made of counts"),
    }  # fmt: skip


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_hostile_pickles(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch_files, "MAX_OPCODES", 60_000)  # with checked types: slow
    for case, (value, message) in hostile_pickles().items():
        data = value if type(value) is bytes else pickled(value)
        if write is torch_legacy:  # its list of storages comes first
            message += "|not that of its tensors"
        data = write(data, {"0": np.float32([1, 2])})
        with noted(case):
            check_refused(tmp_path / "w.pth", data, message)


def test_hostile_torch_files(tmp_path):
    weights = {"w": np.float32([1, 2])}
    whole, tensors = torch_zip(weights), pickled(raw_tensor())
    deflated = zipfile.ZIP_DEFLATED
    packed = zipped({"a/data.pkl": tensors, "a/data/0": bytes(8)}, deflated)
    # One large storage that a thousand tensors span.
    size = MB // 4
    view = tensor("FloatStorage", "0", size, 0, (2,), (size - 1,))
    views = pickled({str(i): view for i in range(1000)})
    for data, message in [
        (torch_zip(weights, byteorder=b"big"), "little-endian"),
        (torch_legacy(weights, system={"little_endian": False}), "little-endian"),
        (torch_legacy(weights)[:-1], "ends within a storage"),
        (zipped({"a/data.pkl": tensors}), "damaged"),
        (whole.replace(weights["w"].tobytes(), bytes(8)), "bad checksum"),
        (zipped({"a/data.pkl": b"." * 5 * MB}, deflated), "5242880 bytes of data.pkl"),
        (packed, "not compressed"),
        (torch_zip(views, {"0": np.zeros(size, np.float32)}), "share their bytes"),
    ]:
        check_refused(tmp_path / "w.pth", data, message)


# --- fuzzing --------------------------------------------------------------------------


def fuzz_sample():
    return {
        "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3),
        "c": np.ones((2, 2), np.float16),
    }


def inside_npz(change):
    """Changes an array within an `.npz`, whose checksums are then right."""
    arrays = fuzz_sample()
    members = {f"{n}.npy": npz({"x": a}) for n, a in arrays.items()}
    for name, data in members.items():
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members[name] = archive.read("x.npy")
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


def outcome(path, expected):
    """Reads a file: `"refused"`, `"same"` or `"other"`; all else is a failure."""
    try:
        got, _ = read_arrays(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))
        check_own(error)
        return "refused"
    assert all(isinstance(a, np.ndarray) and a.dtype != object for a in got.values())
    with contextlib.suppress(AssertionError):
        check_same({n: got[n] for n in sorted(got)}, expected)
        return "same"
    return "other"


def fuzz(kind, path, cases, seed=0):
    """Counts of outcomes, and the most processor time that one case took."""
    make, checksums = FUZZED[kind]
    rng, counts, slowest = np.random.default_rng(seed), {}, 0.0
    whole = make(lambda data: data)
    expected = fuzz_sample()
    path.write_bytes(whole)
    assert outcome(path, expected) == "same"
    for case in range(cases):
        if case < cases // 3:
            data = whole[: case * len(whole) * 3 // cases]
        else:
            data = make(lambda d: changed(d, rng))
        path.write_bytes(data)
        start = time.thread_time()
        result = outcome(path, expected)
        slowest = max(slowest, time.thread_time() - start)
        if result == "other" and checksums:
            raise AssertionError(f"{kind}, case {case} reads as something else")
        counts[result] = counts.get(result, 0) + 1
    return counts, slowest


@pytest.mark.parametrize("kind", FUZZED)
def test_damaged_files_are_refused_and_nothing_else_happens(
    kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts, slowest = fuzz(kind, path, 1000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert counts["refused"] > 500
    assert slowest < 2 and (after - before) / 1024 < 200
    assert list(tmp_path.iterdir()) == [path]
