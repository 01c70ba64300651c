# SPDX-License-Identifier: Apache-2.0
"""The real command, killed: `benchmarks/faults.py` in short."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import faults


def test_a_killed_command_ends_as_an_undisturbed_one(tmp_path):
    """In Orbax, by SIGTERM, and with a flipped bit, one after the other."""
    kinds = ("orbax", "term", "flip")
    result = faults.inject(tmp_path, kinds)
    assert result.complaints == [] and result.lost == 0
    assert result.kinds == dict.fromkeys(kinds, 1)


@pytest.mark.slow
def test_twenty_faults_over_all_stages(tmp_path):
    result = faults.inject(tmp_path, faults.schedule(20, seed=1), seed=1)
    assert result.complaints == [] and result.lost == 0
    assert sum(result.kinds.values()) == 20
