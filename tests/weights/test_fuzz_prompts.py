# SPDX-License-Identifier: Apache-2.0
"""Files of prompts from strangers: what is accepted fits, what is damaged is named."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from fuzzing import (
    PROMPT_FILES,
    changed,
    prompt_arrays,
    prompt_header,
    safetensors_of,
    try_prompts,
)
from hypothesis import given, settings

import vpt_jax
from vpt_jax.weights.readers import CheckpointError


def written(arrays=None, **header):
    return headed(json.dumps(prompt_header() | header), arrays or {})


def headed(text, arrays=()):
    return safetensors_of(prompt_arrays() | dict(arrays), {"vpt_jax": text})


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


@settings(max_examples=50)
@given(PROMPT_FILES)
def test_a_file_is_accepted_or_refused_by_one_error(scratch, data):
    try_prompts(data, scratch)


def test_a_damaged_file_is_refused_and_nothing_crashes(tmp_path):
    whole, rng = written(), np.random.default_rng(0)
    assert try_prompts(whole, tmp_path) == "accepted"
    for size in range(0, len(whole), 17):
        assert try_prompts(whole[:size], tmp_path) == "refused"
    outcomes = [try_prompts(changed(whole, rng), tmp_path) for _ in range(100)]
    assert outcomes.count("refused") > 50


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (written({"prompts/00": np.full((2, 4), np.nan, "f4")}), "infinite or NaN"),
        (written({"prompts/00": np.zeros((2, 4), "f8")}), "float64.*expected float32"),
        (written({"prompts/00": np.zeros(4, "f4")}), r"prompts/00 float32 \[4\]"),
        (written({"head/kernel": np.zeros((4, 2), "f4")}), r"expected .* \[d, 3\]"),
        (written({"more": np.zeros(1, "f4")}), "holds .*more"),
        (written(counts=[1, 2]), r"expected float32 \[1, d\]"),
        (written(counts=[2]), r"expected \['prompts/00', 'head/bias', 'head/kernel'\]"),
        (written(counts="ab"), "counts 'ab' in its header"),
        (written(counts=[True, 1]), r"counts \[True, 1\] in its header"),
        (written(class_names=None), "class_names None in its header"),
        (written(version=2), "format version 2.*reads version 1"),
        (written(backbone_hash="other"), "belongs to another backbone"),
        (safetensors_of(prompt_arrays(), {}), "without a vpt_jax header"),
        (headed("[1]"), r"is \[1\]; expected an object"),
        (headed("[" * 99999), "is no JSON"),
        (headed(5), "expected a string"),
        (struct.pack("<Q", 2**63) + b"{}", "bytes of header"),
        (written().replace(b"prompts/01", b"prompts/00", 1), "invalid offset"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, data, message):
    path = tmp_path / "some.prompts"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as error:
        vpt_jax.load_prompts(path, backbone="abc")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value) and peak < 50 << 20


def test_a_model_card_that_is_no_card_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    for card in ("[", '{"normalisation": ["half"]}'):
        path.write_bytes(safetensors_of({"a": np.zeros(1, "f4")}, {"model_card": card}))
        with pytest.raises(CheckpointError, match=r"weights.safetensors (is|has) "):
            vpt_jax.read_card(path)


def test_a_user_without_a_home_is_one_error():
    with pytest.raises(CheckpointError, match="expected the path of a file"):
        vpt_jax.load_backbone("B/16", "~no-such-user/weights.npz")
