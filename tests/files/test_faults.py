# SPDX-License-Identifier: Apache-2.0
"""The real command, killed: `benchmarks/faults.py` in short."""

import sys
from pathlib import Path

import pytest
from conftest import QUICK

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import faults
import soak


def test_a_killed_command_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    """While Orbax writes, and then with a flipped bit in what it left."""
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    kinds = ("orbax", "flip")
    result = faults.inject(tmp_path, kinds, twice=False)
    assert result.complaints == [] and result.lost == 0
    assert result.kinds == dict.fromkeys(kinds, 1)


@pytest.mark.slow
def test_twenty_faults_over_all_stages(tmp_path):
    result = faults.inject(tmp_path, faults.schedule(20, seed=1), seed=1)
    assert result.complaints == [] and result.lost == 0
    assert sum(result.kinds.values()) == 20


def test_a_soak_that_leaks_or_slows_down_is_not_called_flat():
    steps = range(0, 60_000, 1000)
    flat = [(s, 300.0 + s % 3, 2.0 + s % 2) for s in steps]
    assert soak.verdict(flat)["flat"]
    leak = [(s, m + s * 3e-4, t) for s, m, t in flat]
    assert soak.verdict(leak)["memory_rise_mb"] == pytest.approx(18 * 0.9, rel=0.05)
    assert not soak.verdict(leak)["flat"]
    # A hundred MB given back half way do not hide it; what else changed then is unseen.
    fallen = [(s, m - 100 * (s > 30_000), t) for s, m, t in leak]
    assert soak.verdict(fallen)["memory_rise_mb"] == pytest.approx(18 * 0.9, abs=2.3)
    assert not soak.verdict([(s, m, t + s * 1e-5) for s, m, t in flat])["flat"]


@pytest.mark.slow
def test_memory_and_step_time_stay_flat():
    found = soak.soak(20_000)
    assert found["memory_rise_mb"] < soak.MEMORY_MB
    # Other work on the machine makes steps slower too; a leak would double them.
    assert found["slower"] < 0.5
