# SPDX-License-Identifier: Apache-2.0
"""The page of measurements is what the script makes of the files beside it."""

import importlib.util
import json

import pytest
from fuzzing import READERS, ROOT


@pytest.fixture(scope="module")
def script():
    path = ROOT / "docs" / "make_reliability.py"
    spec = importlib.util.spec_from_file_location("make_reliability", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_committed_figures(script):
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text) == text, "run python docs/make_reliability.py"


def test_every_reader_was_fuzzed_without_a_crash():
    rows = json.loads((ROOT / "docs/reliability/fuzz.json").read_text())["rows"]
    assert [row["reader"] for row in rows] == list(READERS)
    for row in rows:
        assert row["crashes"] == 0 and row["refused"] > 0 and row["accepted"] > 0, row
        assert row["cases"] == row["refused"] + row["accepted"]


def test_what_was_not_run_is_said(script, tmp_path):
    assert script.section(tmp_path).count("Not run: `python benchmarks/") == 3
    faults = {"command": "c", "faults": 21, "survived": 20, "lost": 1}
    faults["kinds"] = {"SIGKILL": 20, "disk full": {"faults": 1, "survived": 1}}
    (tmp_path / "faults.json").write_text(json.dumps(faults))
    numbers = ("seconds", "memory_mb", "memory_rise_mb", "memory_bound_mb")
    soak = dict.fromkeys((*numbers, "step_ms_first", "step_ms_last"), 0.25)
    soak |= {"command": "s", "steps": 2000}
    (tmp_path / "soak.json").write_text(json.dumps(soak))
    made = script.section(tmp_path)
    assert "| all | 21 | 20 | 1 |" in made and "| SIGKILL | 20 |  |  |" in made
    assert "| steps | 2,000 |" in made
    assert made.count("Not run") == 1


def test_a_page_without_its_markers_is_refused(script):
    with pytest.raises(ValueError, match="expected one each"):
        script.page("# Reliability\n")
