# SPDX-License-Identifier: Apache-2.0
"""Files of weights that must not be read, and what is said of them.

Each function yields pairs of a file and a regular expression; `FILES` lists them all.
"""

import functools
import json
import pickle
import struct
import zipfile
import zlib

import numpy as np
from weight_files import (
    Raw,
    described,
    npy,
    opcodes,
    pickled,
    raw_zip,
    safetensors,
    tensor,
    torch_legacy,
    torch_zip,
    zipped,
)

from vpt_jax.weights import readers

MB = 1 << 20
GOOD = npy(described(), bytes(8))
UNSAFE = ("/etc/x", "a/../x", "~/x", "C:x", "a\\x", "a\nx", "", "a//x")


def others():
    yield b"", "is empty; expected .npz, .safetensors or a PyTorch file"
    yield b"\n<!DOCTYPE html><html>", "is a web page"
    yield b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"
    yield GOOD, "single .npy array"
    yield b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"
    yield bytes(257) + b"ustar  " + bytes(300), "is a tar archive"
    yield b"\x1f\x8b\x08" + bytes(20), "is compressed"
    yield pickle.dumps({"a": 1}), "is a Python pickle"
    yield zipped({}), "holds no arrays"
    yield safetensors({}), "holds no arrays"
    yield bytes(range(200, 250)), r"starts with b'\\xc8"


# --- npz ------------------------------------------------------------------------------


def array(payload=b"", version=1, **fields):
    return zipped({"x.npy": npy(described(**fields), payload, version)})


def header(text, **more):
    return zipped({"x.npy": npy(text, **more)})


def member(**lies):
    return raw_zip({"name": "x.npy", "data": GOOD, **lies})


def arrays():
    """Members of an `.npz` that are no arrays of numbers, or lie about their size."""
    yield array(b"cos\nsystem\n(S'x'\ntR.", descr="|O", shape=()), "Python objects"
    yield array(bytes(8), descr=[("a", "<f4")]), "an array has dtype"
    yield array(bytes(16), descr="<U2"), "dtype '<U2'"
    yield array(bytes(8), descr="|V4"), "dtype '.V4'"
    yield array(bytes(8), descr="nope"), "not a valid dtype"
    yield header("__import__('os').system('touch x')", payload=bytes(8)), "damaged"
    yield header(r"{'descr': '\d', 'fortran_order': 0, 'shape': ()}"), "damaged"
    yield header("-" * 9000 + "1"), "it is damaged"
    yield header(" " * 50 * MB, version=2), "damaged"
    yield header(repr(described(shape="N")).replace("'N'", f"({'9' * 9000})")), "damage"
    yield zipped({"x.npy": b""}), "damaged"
    yield array(version=9), "version 9 of .npy"
    yield array(bytes(7)), "describes"
    yield array(shape=(2**62, 2**62)), "describes"
    yield array(shape=(0, 2**63)), "too large|too big|dimens"
    yield array(bytes(16), shape=(-2, -2)), "has the shape"
    yield array(bytes(4), shape=(1,) * 40), "40 axes"


def zips():
    """Zip files that are none, or whose members lie."""
    first = {"name": "x.npy", "data": GOOD}
    yield b"PK\x03\x04 nothing", "BadZipFile .*download it again"
    yield zipped({"x.npy": GOOD, "readme.txt": b""}), "no .npy array"
    yield zipped({"x.npy": GOOD}, zipfile.ZIP_LZMA), "compression 14"
    yield member(flags=1), "is encrypted"
    yield raw_zip(first, first), "two members 'x.npy'"
    yield member(crc=1), "Bad CRC-32"
    yield member(size=2**31), "cannot have"
    yield member(size=2**31, packed=2**31), "cannot have"
    yield member(method=8, size=2**31), "cannot have"
    yield member(method=8), "damaged"
    yield member(offset=7), "damaged"
    yield member(offset=2**31), "damaged"
    yield raw_zip(first, size=2**31), "damaged"
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 5 * MB, 0, 0)
    yield member()[:-22] + bytes(5 * MB) + end, "at most"
    many = {f"{i}.npy": b"" for i in range(readers.MAX_ARRAYS + 1)}
    yield zipped(many), "20001 members"
    for name in UNSAFE:
        yield zipped({f"{name}.npy" if name else "/": GOOD}), "unsafe name"


def bomb(millions):
    """A deflated member of that many MiB of zeros, a thousandth of it in size."""
    compress = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compress.compress(bytes(16 * MB)) + compress.flush(zlib.Z_FULL_FLUSH)
    head = npy(described("|u1", shape=(millions * MB,)))
    compress = zlib.compressobj(0, zlib.DEFLATED, -15)
    start = compress.compress(head) + compress.flush(zlib.Z_FULL_FLUSH)
    data = start + block * (millions // 16) + b"\x03\0"
    size = len(head) + millions * MB
    return raw_zip({"name": "x.npy", "data": data, "method": 8, "size": size})


def bombs():
    yield bomb(2048), "2147483648 bytes of arrays, expected"
    # Members that share their bytes.
    large = npy(described("|u1", shape=(2 * MB,)), bytes(2 * MB))
    more = {"name": "x.npy", "data": b"", "offset": 0, "crc": zlib.crc32(large)}
    more |= {"packed": len(large), "size": len(large)}
    first = {"name": "x.npy", "data": large}
    yield raw_zip(first, *[more] * 200), "two members|overlap"


# --- safetensors ----------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(payload=bytes(8), **changes):
    return safetensors({"x": ENTRY | changes}, payload)


def headers():
    yield safetensors(b"{}", length=2**63 - 1), "9223372036854775807 bytes of header"
    yield safetensors(b"{}", length=999), "invalid header length; it is damaged"
    yield safetensors(b"{nope}"), "invalid JSON"
    yield safetensors(b"{\xff\xfe}"), "invalid UTF-8"
    yield safetensors(b'{"a":' * 99999), "recursion limit"
    yield safetensors(b'{"a":[' + b"[]," * MB + b"[]]}"), "invalid type"
    yield safetensors(b'{"x":{"shape":[' + b"9" * 9999 + b"]}}"), "damaged"
    twice = json.dumps({"x": ENTRY, "y": ENTRY}).replace('"y"', '"x"')
    yield safetensors(twice.encode(), bytes(8)), "twice in its header"
    yield entry(dtype="O"), "unknown variant `O`"
    yield entry(dtype="C64", shape=[1]), "dtype 'C64'; expected"
    yield entry(shape=[2**61] * 10**5), "overflow"
    yield entry(b"", shape=[0] + [2**61] * 9, data_offsets=[0, 0]), "damaged"
    yield entry(shape=[2**99]), "invalid type"
    yield entry(shape=[-2, -1]), "invalid value"
    yield entry(shape=[1] * 40 + [2]), "41 axes"
    yield entry(bytes(9), data_offsets=[1, 9]), "invalid offset"
    yield safetensors({"x": ENTRY, "y": ENTRY}, bytes(8)), "invalid offset"
    yield entry(bytes(7)), "not fully covered"
    named = {"a\nb": ENTRY | {"data_offsets": [1, 9]}}
    yield safetensors(named, bytes(9)), "tensor `a b`"
    yield safetensors({"__metadata__": {"a": 1}}), "expected a string"
    yield safetensors({"../x": ENTRY}, bytes(8)), "unsafe name '../x'"
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    many = {str(i): empty for i in range(readers.MAX_ARRAYS + 1)}
    yield safetensors(many), "20001 arrays"


# --- PyTorch --------------------------------------------------------------------------


def stored(offset=0, shape=(2,), strides=(1,), size=2, key="0", kind="FloatStorage"):
    return {"x": tensor(kind, key, size, offset, shape, strides)}


def call(function, *args):
    return {"x": Raw(f"c{function}\n".encode() + opcodes(args, {}) + b"R")}


def reference(*fields):
    return Raw(opcodes(fields, {}) + b"Q")


def calls():
    """Pickles that would run something."""
    touch, known = opcodes("touch marker", {}), b"ccollections\nOrderedDict\n"
    yield call("os\nsystem", "touch marker"), "holds os.system, which"
    by_stack = b"X\5\0\0\0posixX\6\0\0\0system\x93"
    yield Raw(by_stack + touch + b"\x85R"), "holds posix.system"
    yield call("collections\nOrderedDict.fromkeys", "ab"), "fromkeys"
    yield call("argparse\nNamespace"), "argparse.Namespace.*re-save"
    yield call("torch\nSize", call("os\nsystem", "touch marker")), "os.system"
    reducer = type("X", (), {"__reduce__": lambda self: (print, ("x",))})()
    yield pickle.dumps(reducer, 2), "print"
    yield Raw(b"(" + touch + b"ios\nsystem\n"), "os.system"
    yield Raw(b"(icollections\nOrderedDict\n"), "INST"
    yield Raw(b"(" + known + b"o"), "opcode OBJ"
    yield Raw(known + b")\x81"), "opcode NEWOBJ"
    yield Raw(b"Pos.system\n"), "opcode PERSID"
    yield Raw(b"K\1}b"), "sets attributes"
    yield call("torch\nFloatStorage", 10**9), "calls torch"
    yield Raw(b"})R"), "where _Global is needed"
    yield Raw(known + b"K\1R"), "tuple"
    yield call("collections\nOrderedDict", [("a", 1)]), "damaged"
    yield call("torch._utils\n_rebuild_sparse_tensor"), "_rebuild_sparse"


def opcodes_of_no_pickle():
    """Streams of opcodes that are no pickle of a state dict, or cost too much."""
    yield b"\x80\x02}", "damaged"
    yield b".", "damaged"
    yield Raw(b"t"), "damaged"
    yield Raw(b"N\x86"), "takes more values"
    yield Raw(b"}(K\1u"), "damaged"
    yield Raw(b"]X\1\0\0\0aNs"), "where dict is needed"
    yield Raw(b"}Na"), "where list is needed"
    yield Raw(b"Np" + b"9" * 99 + b"\n"), "memo index"
    yield Raw(b"Nr\xff\xff\xff\xff"), "expected a state dict"
    yield Raw(b"h\7"), "damaged"
    yield Raw(b"N" + b"r\xff\xff\xff\x7f" * 5000), "expected a state dict"
    # Lengths of a text and of numbers; a number of a million bytes.
    yield Raw(b"\x8d" + struct.pack("<Q", 2**62)), "damaged"
    yield Raw(b"\x8b\xff\xff\xff\x7f"), "damaged"
    yield Raw(b"\x8b\xff\xff\xff\xff"), "damaged"
    number = Raw(b"\x8b" + struct.pack("<I", MB) + b"\x7f" * MB)
    yield stored(offset=number), "not made of counts"
    yield Raw(b"I" + b"9" * MB + b"\n"), "damaged"
    yield Raw(b"S'\\d'\n"), "expected a state dict"
    yield Raw(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f}"), "no state dict"
    yield Raw(b"]" * 5000 + b"a" * 4999), "expected a state dict"
    yield Raw(b")" + b"\x85" * 50_000), "expected a state dict"
    yield Raw(b"}X\1\0\0\0a" * 5000 + b"N" + b"s" * 5000), "no state dict"
    yield Raw(b"0N" * (2 * MB - 9)), "opcode POP"
    yield Raw(b"]" * (4 * MB - 9)), "more than 60000 opcodes"
    yield Raw(b"]" * (5 * MB)), "opcodes|5242883 bytes"
    # Lists and tuples of twice the one before, two hundred times; endless ones.
    laughs = b"(" * 200 + b"]q\0"
    laughs += b"".join(b"h%clq%c" % (i, i + 1) for i in range(200))
    tuples = b")q\0" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(200))
    yield Raw(laughs), "expected a state dict"
    yield {"x": Raw(laughs), "y": Raw(tuples)}, "keys are"
    yield Raw(tuples + b"}h\xc8Ns"), "no state dict"
    yield call("torch\nSize", 1, Raw(tuples)), "damaged"
    yield stored(shape=Raw(tuples)), "not made of counts"
    yield Raw(tuples + b"Q"), "outside of it"
    yield Raw(b"]q\0h\0a"), "expected a state dict"
    yield Raw(b"}q\0X\5\0\0\0modelh\0s"), "no state dict"
    # Keys whose hashes collide.
    numbers = [(i * (2**61 - 1)).to_bytes(10, "little") for i in range(25_000)]
    colliding = b"".join(b"\x8a\x0a" + number + b"N" for number in numbers)
    yield Raw(b"}(" + colliding + b"u"), "no state dict"
    yield Raw(b"}X\0\0\x10\0" + b"k" * MB + b"Ns"), "keys are"


def tensors():
    """Pickles of what is no tensor of the file's storage, `float32 [2]`."""
    yield {"epoch": 3, "args": {}}, r"keys are \['epoch', 'args'\]"
    yield [1.5], "type list; expected a state dict"
    yield {"../x": stored()["x"]}, "unsafe name '../x'"
    yield reference("module", "x"), "'module'"
    float32 = Raw(b"ctorch\nFloatStorage\n")
    view = reference("storage", float32, "0", "cpu", 2, ("1", 0, 1))
    yield view, "views of storages"
    yield stored(kind="Size"), "stores values as torch.Size; expected"
    yield stored(key="7"), "damaged"
    yield stored(size=3), "damaged"
    other = {"y": stored(size=4, kind="HalfStorage")["x"]}
    yield stored() | other, "two types or sizes"
    yield stored(offset=1), "exceeds its storage"
    yield stored(offset=-1), "not made of counts"
    yield stored(strides=(2,)), "exceeds its storage"
    yield stored(offset=1, strides=(-1,)), "not made of"
    yield stored(shape=(2**40,), strides=(0,)), "repeats the 2"
    yield stored(shape=(True,), strides=(1,)), "not made of counts"
    yield stored(shape=(1,) * 99, strides=(1,) * 99), "99 entries"
    yield stored(strides=()), "1 sizes but 0 strides"


def inside(write, pickles):
    """Files around pickles, in one of PyTorch's two formats."""
    for value, message in pickles():
        data = value if type(value) is bytes else pickled(value)
        if write is torch_legacy:  # its list of storages comes first
            message += "|not that of its tensors"
        yield write(data, {"0": np.float32([1, 2])}), message


def around_tensors():
    weights = {"w": np.float32([1, 2])}
    good, deflated = pickled(stored()), zipfile.ZIP_DEFLATED
    yield torch_zip(weights, byteorder=b"big"), "little-endian"
    yield torch_legacy(weights, system={"little_endian": False}), "little-endian"
    yield torch_legacy(weights)[:-1], "ends within a storage"
    yield zipped({"a/data.pkl": good}), "damaged"
    values = weights["w"].tobytes()
    yield torch_zip(weights).replace(values, bytes(8)), "Bad CRC-32"
    large = zipped({"a/data.pkl": b"." * 5 * MB}, deflated)
    yield large, "5242880 bytes of data.pkl"
    yield zipped({"a/data.pkl": good, "a/data/0": bytes(8)}, deflated), "not compressed"
    # One large storage that a thousand tensors span.
    size = MB // 4
    view = tensor("FloatStorage", "0", size, 0, (2,), (size - 1,))
    views = pickled({str(i): view for i in range(1000)})
    yield torch_zip(views, {"0": np.zeros(size, np.float32)}), "share their bytes"


FILES = {
    generate.__name__: generate
    for generate in (others, arrays, zips, bombs, headers, around_tensors)
} | {
    f"{pickles.__name__} of {write.__name__}": functools.partial(inside, write, pickles)
    for write, kinds in (
        (torch_zip, (calls, tensors, opcodes_of_no_pickle)),
        (torch_legacy, (calls, tensors)),  # the same decoder of opcodes
    )
    for pickles in kinds
}
