# SPDX-License-Identifier: Apache-2.0
"""Configs and flags that cannot work: one error that says what to do, exit code 2."""

import pytest
from conftest import command
from fuzzing import ROOT, edited, load_config, try_config, try_protocol
from hypothesis import given, settings

from vpt_jax.bench import protocol
from vpt_jax.files import cli, messages


@settings(max_examples=100)
@given(edited("demo.py:smoke"))
def test_a_config_is_accepted_or_refused_by_one_error(values):
    try_config(values, ROOT)


@settings(max_examples=60)
@given(edited("vtab.py:task=svhn,smoke"))
def test_a_benchmark_is_accepted_or_refused_by_one_error(values):
    try_protocol(values, ROOT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark__rates": (0.1, 0.1000000001)}, "expected each value once"),
        ({"benchmark__decays": (-1.0,)}, "decays is .-1.0,.; expected each 0 to"),
        ({"benchmark__num_prompts": (0, 5)}, "expected each 1 or more"),
        ({"tune__batch_size": 0}, "batch_size is 0; expected a finite number"),
        ({"tune": 5}, "config.tune is 5; expected a group of keys"),
        ({"tune": {0: False}}, r"unknown config key config\.tune\.0; known keys there"),
        ({"seeds": 5}, "config.seeds is 5; expected tuple"),
        ({"baselines": True}, "config.baselines is True; expected tuple"),
        ({"linear__base_lr": 1.0}, "linear.base_lr is 1.0; expected None"),
        ({"task__splits": "all"}, "task.splits is 'all'; expected None"),
    ],
)
def test_a_benchmark_that_cannot_work_is_refused(changes, message):
    values = load_config("vtab.py:task=svhn,smoke")
    for key, value in changes.items():
        group, _, key = key.rpartition("__")
        (values[group] if group else values)[key] = value
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
    fuzz = ("benchmarks/fuzz.py", "--readers", "flags", "--cases", "25")
    done = command(python=fuzz)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'crashes': 0" in done.stdout
