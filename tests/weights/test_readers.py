# SPDX-License-Identifier: Apache-2.0
"""Files of weights: what is written comes back, and what is hostile is refused."""

import contextlib
import pickle
import resource
import time
import tracemalloc

import hostile
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import changed, check_error, or_refused
from weight_files import (
    BF16,
    FUZZED,
    WRITERS,
    Raw,
    fuzz_sample,
    npy,
    npz,
    opcodes,
    pickled,
    raw_zip,
    safetensors,
    tensor,
    torch_legacy,
    torch_zip,
    zipped,
)

from vpt_jax.weights import torch_files
from vpt_jax.weights.readers import CheckpointError, open_arrays, read_arrays

RNG = np.random.default_rng(0)
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
        for name, a in lazy.items():
            assert (a.shape, a.dtype) == (got[name].shape, got[name].dtype)
        for _ in range(2):
            np.testing.assert_array_equal(lazy["a/kernel"].load(), got["a/kernel"])
    with pytest.raises(CheckpointError, match="closed file"):
        lazy["a/kernel"].load()


def read(path, data):
    path.write_bytes(data)
    return read_arrays(path)[0]


def test_npz_of_all_orders_and_types(tmp_path):
    base = RNG.normal(size=(2, 3, 4))
    arrays = {
        "fortran": np.asfortranarray(base),
        "big": base.astype(">f4"),
        "big fortran": np.asfortranarray(base.astype(">i2")),
    }
    arrays |= {code: base.astype(code) for code in "?bhilqBHILQefd"}
    native = {n: a.astype(a.dtype.newbyteorder("=")) for n, a in arrays.items()}
    check_same(read(tmp_path / "a", npz(arrays)), native)


def test_npy_headers_of_other_writers(tmp_path):
    payload = np.arange(2, dtype=np.float32).tobytes()
    texts = [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2L,), }   \n",
        "{'shape':(2,),'fortran_order':True,'descr':'<f4'}",
    ]
    for text in texts:
        for version in (1, 2, 3):
            data = zipped({"x.npy": npy(text, payload, version)})
            check_same(read(tmp_path / "a", data), {"x": np.float32([0, 1])})


def test_float8_in_safetensors(tmp_path):
    values = np.arange(4).astype(jnp.float8_e4m3fn)
    header = {"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    data = safetensors(header, values.tobytes())
    check_same(read(tmp_path / "a", data), {"x": values})


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
    views = {
        "rows": (view(6, (2, 6), (6, 1)), square[1:3]),
        "whole": (whole, square),
        "parameter": (parameter, square),
        "transposed": (view(0, (6, 4), (1, 6)), square.T),
        "column": (view(3, (4,), (6,)), square[:, 3]),
        "every other": (view(1, (2, 3), (12, 2)), square[::2, 1::2]),
        "one": (view(23, (), ()), base[23]),
        "none": (view(24, (3, 0), (1, 1)), np.zeros((3, 0), np.float32)),
    }
    data = pickled({name: made for name, (made, _) in views.items()})
    got = read(tmp_path / "a", write(data, {"0": base}))
    check_same(got, {name: expected for name, (_, expected) in views.items()})
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
        check_same(read(tmp_path / "a", write(tree)), {"w": weights["w"]})
    # The attribute `_metadata` of PyTorch's state dicts is ignored.
    storages = {}
    body = opcodes(weights, storages) + opcodes({"_metadata": {}}, {}) + b"b"
    data = write(b"\x80\x02" + body + b".", storages)
    check_same(read(tmp_path / "a", data), {"w": weights["w"]})


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


@pytest.mark.parametrize("kind", hostile.FILES)
def test_hostile_files(kind, tmp_path, monkeypatch):
    """Refused by one error of our own, and nothing else happens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch_files, "MAX_OPCODES", 60_000)  # with checked types: slow
    path = tmp_path / "weights.npz"
    for data, message in hostile.FILES[kind]():
        path.write_bytes(data)
        with bounded(), pytest.raises(CheckpointError, match=message) as error:
            read_arrays(path)
        check_error(error.value, path)
        assert len(str(error.value)) < 1500
        assert list(tmp_path.iterdir()) == [path]


def test_what_no_model_expects_is_listed_and_costs_nothing(tmp_path):
    (tmp_path / "a").write_bytes(hostile.bomb(2048))
    with bounded(), open_arrays(tmp_path / "a") as (lazy, _):
        assert lazy["x"].shape == (2048 * MB,)


def test_the_length_of_a_zips_comment_is_of_no_importance(tmp_path):
    data = raw_zip({"name": "x.npy", "data": hostile.GOOD}, comment=999)
    check_same(read(tmp_path / "a", data), {"x": np.zeros(2, np.float32)})


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


@pytest.mark.parametrize("kind", FUZZED)
def test_damaged_files_are_refused_and_nothing_else_happens(
    kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path, rng = tmp_path / "weights", np.random.default_rng(0)
    make, checksums = FUZZED[kind]
    whole = make(lambda data: data)
    check_same(dict(sorted(read(path, whole).items())), fuzz_sample())
    # benchmarks/fuzz.py tries thousands.
    cases = [whole[: k * len(whole) // 100] for k in range(100)]
    cases += [make(lambda data: changed(data, rng)) for _ in range(200)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, slowest = 0, 0.0
    for data in cases:
        start = time.thread_time()
        with or_refused(path) as outcome:
            outcome.append(read(path, data))
        slowest = max(slowest, time.thread_time() - start)
        if outcome == ["refused"]:
            refused += 1
        elif checksums:
            check_same(dict(sorted(outcome[0].items())), fuzz_sample())
        else:
            assert all(a.dtype != object for a in outcome[0].values())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused > 150 and slowest < 2 and (after - before) / 1024 < 200
    assert list(tmp_path.iterdir()) == [path]
