# SPDX-License-Identifier: Apache-2.0
"""Configs and flags that cannot work: one error that says what to do, exit code 2."""

import math
import os
import subprocess
import sys

import pytest
from fuzzing import ROOT, edited, load_config, try_config, try_protocol
from hypothesis import given, settings

from vpt_jax.bench import protocol
from vpt_jax.files import cli, messages
from vpt_jax.run import parsing


@settings(max_examples=100)
@given(edited("demo.py:smoke"))
def test_a_config_is_accepted_or_refused_by_one_error(values):
    try_config(values, ROOT)


@settings(max_examples=60)
@given(edited("vtab.py:task=svhn,smoke"))
def test_a_benchmark_is_accepted_or_refused_by_one_error(values):
    try_protocol(values, ROOT)


def changed(name, **changes):
    values = load_config(name)
    for key, value in changes.items():
        group, _, key = key.rpartition("__")
        (values[group] if group else values)[key] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune__base_lr": math.inf}, "base_lr is inf; it must be .* and finite"),
        ({"tune__base_lr": 10**400}, "base_lr is inf; it must be .* and finite"),
        ({"tune__weight_decay": math.nan}, "weight_decay is nan; it must be >= 0"),
        ({"prompts__num_prompts": (4, -1)}, "each must be from 0 to 10,000"),
        ({"prompts__num_prompts": 10**9}, "each must be from 0 to 10,000"),
        ({"prompts__num_prompts": 10**5000}, "a number of thousands of digits"),
        ({"seeds": (0, -1)}, r"seeds is \(0, -1\); each must be from 0"),
        ({"seeds": (2**32,)}, "each must be from 0 to 4294967295"),
        ({"backbone__image_size": -1}, "backbone.image_size is -1; it must be from 0"),
        ({"backbone__image_size": 10**6}, "to 4,096 px"),
        ({"tune": [1]}, r"config.tune is \[1\]; expected a group of keys"),
        ({3: 4}, r"unknown config key config\.3; known keys there"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    values = load_config("demo.py:smoke")
    if 3 not in changes:
        values = changed("demo.py:smoke", **changes)
    with pytest.raises(ValueError, match=message):
        parsing.parse(values | {k: v for k, v in changes.items() if k == 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark__rates": (0.1, 0.1000000001)}, "a value is there twice"),
        ({"benchmark__decays": (-1.0,)}, "decays has -1.0; each must be >= 0"),
        ({"benchmark__num_prompts": (0, 5)}, "each must be greater than 0"),
        ({"tune__batch_size": 0}, "batch_size is 0; it must be greater than 0"),
        ({"tune": 5}, "config.tune is 5; expected a group of keys"),
        ({"tune": {0: False}}, r"unknown config key config\.tune\.0; known keys there"),
        ({"seeds": 5}, "config.seeds is 5; expected tuple"),
        ({"baselines": True}, "config.baselines is True; expected tuple"),
        ({"linear__base_lr": 1.0}, "linear.base_lr is 1.0; a benchmark fills it in"),
        ({"task__splits": "all"}, "task.splits is 'all'; a benchmark fills it in"),
    ],
)
def test_a_benchmark_that_cannot_work_is_refused(changes, message):
    values = changed("vtab.py:task=svhn,smoke", **changes)
    with pytest.raises(ValueError, match=message):
        protocol.parse(values)


@pytest.mark.parametrize(
    "name", ["../../x", "/x", "a/b", "", "..", "a\n", "x" * 300, 7]
)
def test_a_task_that_is_no_name_of_a_folder_is_refused(name):
    """Runs lie in folders of their tasks' names: nothing may lie elsewhere."""
    values = load_config("vtab.py:task=svhn,smoke")
    values["tasks"] = {name: values["tasks"]["svhn"]}
    with pytest.raises(ValueError, match="expected names of letters, digits"):
        protocol.parse(values)


def test_what_is_printed_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.fail("a\nb \x1b[31m \ud800")
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        r"error: a\nb \x1b[31m \ud800 (--traceback shows where)"
    ]


def test_lines_of_advice_are_lines(capsys):
    """Commands that can be pasted; names in them are still one line."""
    with pytest.raises(SystemExit):
        cli.fail(messages.advised("got a\nb; do:", "  make 'a\nb'", "  then c"))
    assert capsys.readouterr().err.splitlines() == [
        r"error: got a\nb; do: (--traceback shows where)",
        r"  make 'a\nb'",
        "  then c",
    ]


def test_flags_through_the_real_parser_end_with_2_and_one_line():
    """Forks of one process, which JAX's threads in this one would not survive."""
    done = subprocess.run(
        [sys.executable, "benchmarks/fuzz.py", "--readers", "flags", "--cases", "25"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'crashes': 0" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=configs/absent.py"],
        ["--config=README.md"],
        ["--config=configs/demo.py:smoke", "--unknown"],
        # Keys that cannot be sorted: found by fuzzing 2,000 command lines.
        ["--config=configs/demo.py:smoke", "--config.linear={-35: 1, 'x': 2}"],
        ["--config=configs/vtab.py:task=svhn", "--config.linear={-35: 1, 'x': 2}"],
    ],
)
def test_the_command_line_ends_with_2(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vpt_jax.main", *arguments],
        cwd=ROOT,
        env={**os.environ, "VPT_JAX_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
